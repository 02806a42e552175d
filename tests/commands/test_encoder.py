import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytest.importorskip("soxr", reason="soxr is not installed")

from conftest import SMALL

import ajepa
from ajepa import config, finetune
from ajepa.config import PRESETS, ConfigError
from ajepa.encoder import Chunk, Encoder, EncoderConfig, open_encoder
from ajepa.evaluation.features import pool
from ajepa.model.clip import make_projector
from ajepa.model.jepa import Encoder as ViT
from ajepa.training.checkpoint import save_checkpoint
from ajepa.training.engine import Engine
from ajepa.training.summary import write_encoder
from ajepa.utils.errors import UserError
from ajepa.utils.json_files import DamagedError, write_json
from ajepa_kernels import log_mel

TINY = EncoderConfig(front_end=PRESETS["tiny"].front_end, size="tiny", clip_samples=32_000)
P = 3_968  # samples per frame


CHUNK_POOLINGS = ("mean+std", "concat+std", "projection")


def encoder(**changes) -> Encoder:
    torch.manual_seed(0)
    return Encoder(dataclasses.replace(TINY, **changes))


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run with two checkpoints and the final encoder. Its target and context encoders differ."""
    folder = tmp_path_factory.mktemp("run") / "run"
    cfg = config.parse([*SMALL, "--out", str(folder), "--pad", "zero"])
    folder.mkdir()
    config.save(cfg, folder / "config.json")
    engine = Engine(cfg, torch.device("cpu"))
    target = engine.model.target_encoder
    for step in (4, 8):
        with torch.no_grad():
            for p in target.parameters():
                p.add_(0.01)
        save_checkpoint(folder / "checkpoints", step, engine, {}, keep=3)
    save_file(target.state_dict(), folder / "encoder.safetensors")
    return folder


# --- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "seconds"), [("tiny", 2.0), ("a-jepa", 10.0), ("audio-jepa", 10.0)])
def test_frames_are_evenly_spaced_at_any_length(name, seconds):
    spec = PRESETS[name].front_end
    one = Encoder(EncoderConfig(front_end=spec, size="tiny", clip_samples=round(seconds * spec.sample_rate)))
    clip, step = one.config.clip_samples, one.frame_samples
    assert one.hop_size_in_ms == pytest.approx(1000 * step / spec.sample_rate)
    assert one.chunks(clip) == [Chunk(0, clip, min(spec.grid[1], -(-spec.frames(clip) // spec.patch[1])))]
    for samples in (1, spec.win_length, clip // 3, clip + 1, 3 * clip + 12_345, 600 * spec.sample_rate):
        plan = one.chunks(samples)
        first = [c.start // step for c in plan]
        assert all(c.start % step == 0 and 0 < c.stop - c.start <= clip for c in plan)
        assert first == [sum(c.frames for c in plan[:i]) for i in range(len(plan))]  # no gap and no overlap
        total = sum(c.frames for c in plan)
        assert max(1, samples // step - 1) <= total <= -(-samples // step)


def test_a_long_clip_is_its_chunks_side_by_side():
    one, x = encoder(), noise(70_000)
    frames = one(x)
    assert frames.shape == (1, 8 + 8 + 2, 128)
    stride = 8 * P
    for i in range(2):
        chunk = x[i * stride : i * stride + 32_000]
        torch.testing.assert_close(frames[:, 8 * i : 8 * i + 8], one(chunk)[:, :8])
    torch.testing.assert_close(frames[:, 16:], one(x[2 * stride :]))


@pytest.mark.parametrize("pad", ["cyclic", "zero", "silence"])
@pytest.mark.parametrize("pooling", ["mean", "concat"])
def test_frames_are_the_pooled_latents_of_what_training_would_see(pad, pooling):
    one, x = encoder(pad=pad, pooling=pooling), noise(9_000)
    spec = one.config.front_end
    filled = {
        "cyclic": torch.cat([x, x, x, x])[:32_000],
        "zero": torch.nn.functional.pad(x, (0, 23_000), value=7.0),  # the padding is never read
        "silence": torch.nn.functional.pad(x, (0, 23_000)),
    }[pad]
    lengths = torch.tensor([9_000]) if pad == "zero" else None
    latents = one.vit.encode(log_mel(filled[None], spec, lengths=lengths))
    frames = one(x)
    assert frames.shape == (1, 3, 128 * (8 if pooling == "concat" else 1)) and one.output_dim == frames.shape[2]
    torch.testing.assert_close(frames.mean(1), pool(latents, spec, torch.tensor([9_000]), pooling))


@pytest.mark.parametrize("pooling", CHUNK_POOLINGS)
def test_poolings_of_a_chunk_give_one_frame_per_chunk(pooling):
    one, x = encoder(pooling=pooling, projector=(32, 16)), noise(70_000)
    frames = one(x)
    width = {"mean+std": 256, "concat+std": 2048, "projection": 16}[pooling]
    assert frames.shape == (1, 3, width) and one.output_dim == width
    assert one.frame_samples == one.stride == 32_000 and one.hop_size_in_ms == 2000
    assert one.chunks(70_000) == [Chunk(0, 32_000, 1), Chunk(32_000, 64_000, 1), Chunk(64_000, 70_000, 1)]
    assert one.chunks(64_100) == [Chunk(0, 32_000, 1), Chunk(32_000, 64_000, 1)]  # the tail has no frame
    assert one.chunks(100) == [Chunk(0, 100, 1)] and one.frames(100) == 0 and one.frames(32_000) == 1
    for i, chunk in enumerate(x.split(32_000)):
        torch.testing.assert_close(frames[:, i], one.embed(chunk))
    if pooling == "projection":
        torch.testing.assert_close(frames.mean(1), one.embed(x))
    else:  # the deviation over the recording is not the mean of the chunks' deviations
        assert not torch.allclose(frames.mean(1), one.embed(x), rtol=1e-3, atol=1e-3)


def test_padding_of_a_chunk_is_not_encoded():
    """With the poolings of a chunk, `pad` has no effect: what fills a short chunk up is never attended to."""
    x = noise(9_000)
    for pooling in CHUNK_POOLINGS:
        cyclic, zero = (encoder(pooling=pooling, projector=(32, 16), pad=pad)(x) for pad in ("cyclic", "zero"))
        assert torch.equal(cyclic, zero)


@pytest.mark.parametrize("pooling", ["mean", "concat"])
def test_mean_of_layers_is_that_of_normalised_block_outputs(pooling):
    one, x = encoder(pooling=pooling, layers="mean"), noise(32_000)
    patches = log_mel(x[None], one.config.front_end)
    outputs = [o.double() for o in one.vit.encode(patches, 4)]
    normed = [(o - o.mean(-1, keepdim=True)) / (o.var(-1, keepdim=True, correction=0) + 1e-6).sqrt() for o in outputs]
    grid = (sum(normed) / 4).unflatten(1, one.config.front_end.grid)
    wanted = grid.mean(1) if pooling == "mean" else grid.transpose(1, 2).flatten(2)
    torch.testing.assert_close(one(x).double(), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one(x), encoder(pooling=pooling)(x), atol=1e-2)


@pytest.mark.parametrize("pooling", ["mean", *CHUNK_POOLINGS])
def test_lengths_give_what_each_clip_gives_alone(pooling):
    one, lengths = encoder(pooling=pooling, projector=(32, 16)), [40_000, 700, 33_000]
    x = noise(3, 40_000)
    for i, n in enumerate(lengths):
        x[i, n:] = torch.nan
    frames = one(x, lengths=torch.tensor(lengths))
    for row, clip, n in zip(frames, x, lengths, strict=True):
        own = one(clip[:n])[0]
        torch.testing.assert_close(row[: len(own)], own)
        assert not row[len(own) :].any() and len(own) == sum(c.frames for c in one.chunks(n))
    clips = one.embed(x, lengths=torch.tensor(lengths))
    assert clips.shape == (3, one.output_dim)
    for row, clip, n in zip(clips, x, lengths, strict=True):
        torch.testing.assert_close(row, one.embed(clip[:n])[0])


def test_int16_and_other_rates_are_the_same_sound():
    one = encoder()
    t = torch.arange(48_000) / 48_000
    sound = 0.3 * torch.sin(2 * torch.pi * 440 * t) + 0.1 * torch.sin(2 * torch.pi * 3_000 * t)
    same = one(sound[::3], 16_000)
    assert (one(sound, 48_000) - same).abs().max() < 0.05 * same.abs().max()
    pcm = (sound * 32768).short()
    torch.testing.assert_close(one(pcm[::3]), one(pcm[::3].float() / 32768))
    torch.testing.assert_close(one(pcm, 48_000), one(pcm.float() / 32768, 48_000))
    torch.testing.assert_close(one.embed(pcm, 48_000), one.embed(pcm.float() / 32768, 48_000))
    ragged = one(torch.stack([sound, sound]), 48_000, lengths=torch.tensor([48_000, 24_000]))
    torch.testing.assert_close(ragged[1, :2], one(sound[:24_000], 48_000)[0])


def test_no_graph_is_kept_outside_of_training():
    one, x = encoder(), noise(2, 9_000)
    for call in (one, one.embed):
        features = call(x)
        assert not features.requires_grad and features.numpy().shape[0] == 2
        head = torch.nn.Linear(128, 3)
        head(features).sum().backward()  # a head on frozen features learns
        assert head.weight.grad.any() and all(p.grad is None for p in one.parameters())
        one.train()
        assert call(x).requires_grad
        with torch.no_grad():
            assert not call(x).requires_grad
        one.eval()


def test_audio_is_taken_in_the_forms_that_readers_return():
    one, x = encoder(), noise(2, 9_000)
    same = [
        x.numpy(),
        x.numpy().astype(">f8"),
        x.numpy()[:, ::-1].copy()[:, ::-1],
        x.tolist(),
        list(x),
        tuple(x.numpy()),
    ]
    for audio in same:
        torch.testing.assert_close(one(audio), one(x))
    torch.testing.assert_close(one(x[0].tolist(), np.int64(16_000)), one(x[:1]))
    pcm = (x * 32768).short()
    assert torch.equal(one(pcm.numpy()), one(pcm)) and torch.equal(one.embed(list(pcm.numpy())), one.embed(pcm))
    ragged, lengths = [x[0, :700].numpy(), x[1].numpy()], torch.tensor([700, 9_000])
    assert torch.equal(one(ragged), one(x, lengths=lengths))
    assert torch.equal(one.embed(ragged, 48_000), one.embed(x, 48_000, lengths=[700, 9_000]))


def test_it_trains_and_runs_in_half_precision():
    one, x = encoder().train(), noise(32_000)
    frames = one(x)
    frames.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in one.parameters())
    half = one.bfloat16()(x)
    assert half.dtype == torch.float32 and 0 < (half - frames).abs().max() < 0.1
    clip = encoder(pooling="projection", projector=(32, 16), layers="mean")
    whole, half = clip.embed(x), clip.bfloat16().embed(x)
    assert half.dtype == torch.float32 and 0 < (half - whole).abs().max() < 0.1


@pytest.mark.parametrize(
    ("waveform", "options", "message"),
    [
        (torch.zeros(1, 2, 3), {}, "average the channels"),
        (torch.zeros(9, dtype=torch.int32), {}, "int16"),
        (torch.zeros(2, 0), {}, "samples"),
        (torch.zeros(2, 9), {"lengths": torch.tensor([9, 0])}, "samples"),
        (torch.zeros(2, 9), {"lengths": torch.tensor([9.0, 1.0])}, "lengths"),
        (torch.zeros(16_000, 2), {}, r"looks like \[T, channels\]"),
        (torch.zeros(16_000, 32), {}, r"waveform\.mean\(1\)"),
        (torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [0.0, torch.inf]]), {}, r"clips \[1, 2\].* NaN or infinite"),
        (np.array([0.0, np.inf]), {}, "NaN or infinite"),
        ([0, 1, 2], {}, "int16"),
        ([], {}, "samples"),
        ([[0.0], []], {}, "samples"),
        ([[0.0], [[0.0]]], {}, "of one dtype"),
        ([np.zeros(9), np.zeros(9, np.int16)], {}, "of one dtype"),
        ([np.zeros(9)], {"lengths": [9]}, "leave out lengths"),
        ("runs/mine", {}, "a list of numbers"),
        (torch.zeros(9), {"sampling_rate": 16}, "sampling_rate must be whole Hz .*44100, got 16"),
        (torch.zeros(9), {"sampling_rate": 44_100.0}, "whole Hz"),
        (torch.zeros(9), {"sampling_rate": True}, "whole Hz"),
        (torch.zeros(9), {"sampling_rate": "44100"}, "whole Hz"),
        (torch.zeros(9), {"sampling_rate": 1_000_000}, "384000"),
    ],
)
def test_bad_waveforms_are_refused(waveform, options, message):
    for call in (encoder(), encoder().embed):
        with pytest.raises((TypeError, ValueError), match=message):
            call(waveform, **options)


@pytest.mark.parametrize(("pooling", "layers"), [("mean", "last"), ("concat+std", "mean"), ("projection", "last")])
def test_exported_program_runs_without_ajepa_and_agrees(tmp_path, pooling, layers):
    one, x = encoder(pooling=pooling, layers=layers, projector=(32, 16)), noise(2, 50_000)
    program = torch.export.export(one, (noise(2, 50_000) + 1,))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [name for name in targets if "ajepa" in name]
    torch.export.save(program, tmp_path / "encoder.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "encoder.pt2").module()(x), one(x), rtol=1e-4, atol=1e-4)


# --- files ----------------------------------------------------------------------------------------------------------


def test_save_and_load_in_hugging_faces_layout(tmp_path):
    one = encoder(pooling="concat", positions="rotary", norm_eps=1e-5)
    one.save_pretrained(tmp_path / "mine")
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert "library_name: ajepa" in (tmp_path / "mine" / "README.md").read_text()
    two = ajepa.Encoder.from_pretrained(tmp_path / "mine")
    assert two.config == one.config and not two.training and two.fingerprint() == one.fingerprint()
    assert torch.equal(two(noise(9_000)), one(noise(9_000)))
    assert two.vit.norm.eps == two.vit.blocks[0].norm1.eps == 1e-5
    mean = Encoder.from_pretrained(tmp_path / "mine", pooling="mean", layers="mean")
    assert mean.config.layers == "mean"
    assert mean.output_dim == 128 and mean.fingerprint() != one.fingerprint()
    with torch.no_grad():
        two.vit.norm.weight[0] += 1
    assert two.fingerprint() != one.fingerprint()


def test_the_projector_is_saved_with_the_encoder(tmp_path):
    one = encoder(projector=(32, 16))
    with torch.no_grad():
        one.projector.norm.running_var.mul_(3)
    one.save_pretrained(tmp_path)
    two = Encoder.from_pretrained(tmp_path, pooling="projection")
    assert two.config.projector == (32, 16) and two.output_dim == 16
    one.config = two.config
    assert torch.equal(two.embed(noise(9_000)), one.embed(noise(9_000)))
    with torch.no_grad():
        two.projector.norm.running_var.mul_(2)
    assert two.fingerprint() != one.fingerprint()


def test_a_projection_needs_a_projector(run_folder, tmp_path):
    encoder().save_pretrained(tmp_path)
    for source in (run_folder, tmp_path):
        with pytest.raises(ConfigError, match="projector of a clip objective"):
            Encoder.from_pretrained(source, pooling="projection")
    with pytest.raises(ConfigError, match="projector of a clip objective"):
        encoder(pooling="projection")
    with pytest.raises(ConfigError, match="pooling"):
        Encoder.from_pretrained(tmp_path, pooling="median")


@pytest.mark.parametrize("loss", ["lejepa", "byol"])
def test_a_run_with_a_clip_objective_gives_encoder_and_projector(tmp_path, loss):
    """From the final files and from a checkpoint; without a teacher the encoder is the trained one."""
    flags = ["--objective", "clip", "--clip-loss", loss, "--pooling", "projection", "--projector-width", "16"]
    cfg = config.parse([*SMALL, "--out", str(tmp_path / "run"), *flags])
    config.save(cfg, tmp_path / "config.json")
    engine = Engine(cfg, torch.device("cpu"))
    with torch.no_grad():
        for p in engine.model.parameters():
            p.add_(0.02 * torch.randn_like(p))
        engine.model.clip.projector.norm.running_var.fill_(2.0)
    save_checkpoint(tmp_path / "checkpoints", 4, engine, {}, keep=3)
    trained = engine.model.context_encoder if loss == "lejepa" else engine.model.target_encoder
    projector = engine.model.clip.projector.state_dict()

    unfinished = Encoder.from_pretrained(tmp_path)
    save_file(trained.state_dict(), tmp_path / "encoder.safetensors")
    save_file(projector, tmp_path / "projector.safetensors")
    finished = Encoder.from_pretrained(tmp_path)
    for one in (unfinished, finished):
        assert one.config.pooling == "projection" and one.output_dim == 16
        assert all(torch.equal(v, trained.state_dict()[k]) for k, v in one.vit.state_dict().items())
        assert all(torch.equal(v, projector[k]) for k, v in one.projector.state_dict().items())
    (tmp_path / "projector.safetensors").write_bytes(b"damaged")
    with pytest.raises(DamagedError, match=r"projector\.safetensors is damaged or not a safetensors file"):
        Encoder.from_pretrained(tmp_path)


def test_a_hub_id_is_loaded_through_the_hub(tmp_path, monkeypatch):
    encoder().save_pretrained(tmp_path)
    asked, cached = [], []

    def download(repo_id, filename, revision=None, local_files_only=False, **_):
        asked.append((repo_id, filename, revision))
        cached.append(local_files_only)
        return str(tmp_path / filename)

    monkeypatch.setattr("ajepa.encoder.hf_hub_download", download)
    monkeypatch.setattr("ajepa.encoder.get_hf_file_metadata", lambda *_, **__: None)
    one = Encoder.from_pretrained("someone/audio", revision="v1", pooling="concat")
    assert asked == [("someone/audio", name, "v1") for name in ("config.json", "model.safetensors")]
    assert one.output_dim == 1024 and torch.equal(one.vit.norm.weight, encoder().vit.norm.weight)

    def unreachable(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("ajepa.encoder.get_hf_file_metadata", unreachable)
    assert Encoder.from_pretrained("someone/audio").fingerprint() == encoder().fingerprint()
    assert cached == [False, False, True, True]  # without a connection, what the cache holds
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(ConfigError, match="wav2vec2"):
        Encoder.from_pretrained("someone/audio")


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    Encoder(TINY)
    assert torch.equal(before, torch.get_rng_state())


def test_a_run_gives_its_ema_target_encoder(run_folder, monkeypatch):
    final = load_file(run_folder / "encoder.safetensors")
    last = sorted((run_folder / "checkpoints").iterdir())[-1]
    for source in (run_folder, last):
        one = Encoder.from_pretrained(source)
        assert one.config.pad == "zero" and one.config.clip_samples == 8_000
        assert one.vit.state_dict().keys() == final.keys()
        assert all(torch.equal(v, final[k]) for k, v in one.vit.state_dict().items())
    monkeypatch.chdir(last)
    assert torch.equal(Encoder.from_pretrained(".")(noise(8_000)), one(noise(8_000)))


def test_an_unfinished_run_gives_its_last_whole_checkpoint(run_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    (run / "encoder.safetensors").unlink()
    *_, earlier, last = sorted((run / "checkpoints").iterdir())
    (last / "model.safetensors").write_bytes(b"damaged")
    wanted = load_file(earlier / "model.safetensors")
    for name, value in Encoder.from_pretrained(run).vit.state_dict().items():
        assert torch.equal(value, wanted[f"target_encoder.{name}"])
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="nor a usable checkpoint"):
        Encoder.from_pretrained(run)


def test_folders_that_hold_no_encoder_are_refused(tmp_path):
    def refused(match: str, source=tmp_path):
        with pytest.raises(UserError, match=match) as error:
            Encoder.from_pretrained(source)
        assert "\n" not in str(error.value)

    refused("holds no config.json")
    refused("no such folder", tmp_path / "no" / "such" / "folder")
    for text, match in [
        ("{", "not written by ajepa"),
        ("[" * 10**5, "not written by ajepa"),
        ('{"size": ' + "9" * 5_000 + "}", "not written by ajepa"),
        ("[]", "not written by ajepa"),
        ('{"model_type": "wav2vec2"}', "wav2vec2"),
        ('{"model_type": "ajepa-encoder"}', "front_end"),
    ]:
        (tmp_path / "config.json").write_text(text)
        refused(match)
    encoder().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x04.")
    refused("damaged or not a safetensors file")
    (tmp_path / "model.safetensors").unlink()
    refused("model.safetensors")
    encoder(positions="rotary").save_pretrained(tmp_path)
    raw = {k: v for k, v in json.loads((tmp_path / "config.json").read_text()).items() if k != "sha256"}
    for change, match in [
        ({"size": "S"}, "does not fit"),
        ({"size": "XXL"}, "size"),
        ({"clip_samples": 3}, "clip_samples"),
        ({"clip_samples": 10**12}, "clip_samples"),
        ({"projector": [10**9, 16]}, "projector"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"front_end": {**raw["front_end"], "n_frames": 10**9}}, "grid of"),
        ({"front_end": {**raw["front_end"], "patch": [16, 10**9]}}, "patches of"),
        ({"colour": "red"}, "colour"),
        ({"front_end": {**raw["front_end"], "n_frames": None}}, "n_frames"),
        ({"front_end": {**raw["front_end"], "window": "none"}}, "window"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
        refused(match)


@pytest.fixture(scope="module")
def weights_of_all_kinds(tmp_path_factory):
    """A folder with a finished run of a clip objective, `run`, and its export, `exported`."""
    root = tmp_path_factory.mktemp("weights")
    cfg = config.parse([*SMALL, "--objective", "clip", "--projector-width", "16", "--projector-hidden", "8"])
    (root / "run").mkdir()
    config.save(cfg, root / "run" / "config.json")
    write_encoder(cfg, root / "run", ViT(cfg.model, cfg.front_end), make_projector(cfg))
    Encoder.from_pretrained(root / "run").save_pretrained(root / "exported")
    return root


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["run/encoder.safetensors", "run/projector.safetensors", "exported/model.safetensors", "exported/config.json"],
)
def test_every_flipped_bit_is_noticed(weights_of_all_kinds, name):
    """Fifty bits of length, header, metadata and values. The error names the file."""
    file = weights_of_all_kinds / name
    size, rng = file.stat().st_size, np.random.default_rng(0)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little") if file.suffix == ".safetensors" else size
    assert header <= size
    bits = [*rng.integers(64, size=5), *rng.integers(8 * header, size=25), *rng.integers(8 * size, size=20)]
    for bit in map(int, bits):
        flip(file, bit)
        with pytest.raises(UserError, match=re.escape(str(file))):
            Encoder.from_pretrained(file.parent)
        flip(file, bit)
    assert Encoder.from_pretrained(file.parent).config.projector == (8, 16)


def test_equal_weights_are_equal_files(weights_of_all_kinds, tmp_path):
    one = Encoder.from_pretrained(weights_of_all_kinds / "exported")
    one.save_pretrained(tmp_path)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / name).read_bytes() == (weights_of_all_kinds / "exported" / name).read_bytes()


def test_configurations_of_other_writers_are_accepted(weights_of_all_kinds, tmp_path):
    """A hub may format a configuration anew and leave the checksum out, or add a key of its own to the weights."""
    shutil.copytree(weights_of_all_kinds / "exported", tmp_path / "mine")
    raw = json.loads((tmp_path / "mine" / "config.json").read_text())
    del raw["sha256"]
    (tmp_path / "mine" / "config.json").write_text(json.dumps(raw, sort_keys=True))
    save_file(load_file(tmp_path / "mine" / "model.safetensors"), tmp_path / "mine" / "model.safetensors")
    assert Encoder.from_pretrained(tmp_path / "mine").config.projector == (8, 16)


def test_every_kind_of_source_is_opened(run, tones, tmp_path):
    """A run, a checkpoint, a fine-tuning and its checkpoint, and the export of each."""
    tuning = tmp_path / "finetune"
    rows = [f"{tones}/{label}/{i:02d}.wav,{label},{i % 2}" for label in ("low", "high") for i in range(8)]
    (tmp_path / "tones.csv").write_text("\n".join(["filename,label,fold", *rows]) + "\n")
    argv = [str(run), "--data", str(tmp_path / "tones.csv"), "--test", "fold=1", "--epochs", "1"]
    assert finetune.main([*argv, "--out", str(tuning), "--device", "cpu"]) == 0
    checkpoint, last = (max((folder / "checkpoints").iterdir()) for folder in (tuning, run))
    cfg = config.load(run / "config.json")
    tuned = {name.removeprefix("vit."): x for name, x in load_file(tuning / "model.safetensors").items()}
    files = {run: run / "encoder.safetensors", last: last, tuning: tuning / "model.safetensors", checkpoint: checkpoint}
    for source, file in files.items():
        weights = load_file(run / "encoder.safetensors") if source in (run, last) else tuned
        opened = open_encoder(source)
        assert opened.file == file and (opened.run == cfg) == (source in (run, last)) and not opened.encoder.training
        assert opened.encoder.config.front_end == cfg.front_end
        for name, value in opened.encoder.vit.state_dict().items():
            assert torch.equal(value, weights[name])
        opened.encoder.save_pretrained(tmp_path / "exported")
        again = open_encoder(tmp_path / "exported")
        assert again.run is None and again.file == tmp_path / "exported" / "model.safetensors"
        assert again.encoder.fingerprint() == opened.encoder.fingerprint()


def test_a_fine_tuning_of_an_exported_encoder_is_opened(weights_of_all_kinds, tmp_path):
    shutil.copy(weights_of_all_kinds / "exported" / "config.json", tmp_path)
    write_json(tmp_path / "finetune.json", {})
    shutil.copy(weights_of_all_kinds / "run" / "encoder.safetensors", tmp_path)
    encoder, run, file = open_encoder(tmp_path, pooling="concat")
    assert run is None and file == tmp_path / "encoder.safetensors" and encoder.projector is None
    with pytest.raises(ConfigError, match="needs the projector"):
        open_encoder(tmp_path, pooling="projection")
    wanted = Encoder.from_pretrained(weights_of_all_kinds / "run").vit.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in encoder.vit.state_dict().items())


def test_folders_that_are_something_else_are_kept(run, tmp_path):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for folder in (run, sorted((run / "checkpoints").iterdir())[-1]):
        with pytest.raises(ConfigError, match=r"OUT .* which this command would damage"):
            encoder().save_pretrained(folder)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    encoder().save_pretrained(tmp_path / "mine")
    encoder(pooling="concat").save_pretrained(tmp_path / "mine")  # what is an encoder already may be replaced
    assert Encoder.from_pretrained(tmp_path / "mine").config.pooling == "concat"


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    encoder().save_pretrained("~/mine")
    assert (tmp_path / "mine" / "config.json").is_file()
    assert Encoder.from_pretrained("~/mine").fingerprint() == encoder().fingerprint()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rusn/mine", "the hub cannot be reached; did you mean runs/mine?"),
        ("someone/audio", "no local folder has this name, and no encoder of the hub: the hub cannot be reached"),
        ("runs/mien", "no such folder; did you mean runs/mine?"),
        ("mien", "no such folder"),
        ("./rusn/mine", "no such folder; did you mean runs/mine?"),
        ("~/rusn/mine", "no such folder; did you mean {home}/runs/mine?"),
        ("/nowhere/mine", "no such folder"),
        ("runs\\mine", "no such folder"),
        ("a/b/c", "no such folder"),
        ("runs/mine/config.json", "is a file: name the folder"),
    ],
)
def test_misspelt_names_are_told_without_a_hub(tmp_path, monkeypatch, name, message):
    """Only names that look like those of a hub are asked for there, once."""
    encoder().save_pretrained(tmp_path / "runs" / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    asked = []

    def unreachable(url, **_):
        asked.append(url)
        raise ConnectionError("no route to host")

    monkeypatch.setattr("ajepa.encoder.get_hf_file_metadata", unreachable)
    with pytest.raises(ConfigError) as error:
        Encoder.from_pretrained(name, cache_dir=str(tmp_path / "cache"))
    assert str(error.value).startswith(name) and message.format(home=tmp_path) in str(error.value)
    assert len(asked) == ("hub" in message)


def test_import_of_ajepa_is_light():
    code = "import sys, ajepa; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
