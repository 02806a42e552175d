import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytest.importorskip("soxr", reason="soxr is not installed")

from conftest import SMALL

import ajepa
from ajepa import config
from ajepa.config import PRESETS, ConfigError
from ajepa.encoder import Chunk, Encoder, EncoderConfig
from ajepa.evaluation.features import pool
from ajepa.training.checkpoint import save_checkpoint
from ajepa.training.engine import Engine
from ajepa.utils.errors import UserError
from ajepa.utils.json_files import DamagedError
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


def test_it_trains_and_runs_in_half_precision():
    one, x = encoder(), noise(32_000)
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
    asked = []

    def download(repo_id, filename, revision=None, **_):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr("ajepa.encoder.hf_hub_download", download)
    monkeypatch.setattr("ajepa.encoder.get_hf_file_metadata", lambda *_, **__: None)
    one = Encoder.from_pretrained("someone/audio", revision="v1", pooling="concat")
    assert asked == [("someone/audio", name, "v1") for name in ("config.json", "model.safetensors")]
    assert one.output_dim == 1024 and torch.equal(one.vit.norm.weight, encoder().vit.norm.weight)
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
        ({"colour": "red"}, "colour"),
        ({"front_end": {**raw["front_end"], "n_frames": None}}, "n_frames"),
        ({"front_end": {**raw["front_end"], "window": "none"}}, "window"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
        refused(match)


def test_import_of_ajepa_is_light():
    code = "import sys, ajepa; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
