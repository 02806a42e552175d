"""The probes: their accuracy, the rows and samples that they must not see, and the files that they write."""

import csv
import dataclasses
import json
import shutil
import signal
import tarfile
from typing import get_args

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import SMALL
from safetensors.torch import save_file

import ajepa
from ajepa import config, pack, probe
from ajepa.config import PRESETS, SIZES, ConfigError, ModelConfig, Pooling
from ajepa.data.formats.audiofile import inspect
from ajepa.data.index import DataError, build_index
from ajepa.data.synthetic import make_synthetic
from ajepa.encoder import EncoderConfig, open_encoder
from ajepa.evaluation import feature_cache, labelled, probes
from ajepa.evaluation.feature_cache import EncoderFeatures, LogMelFeatures, embed
from ajepa.evaluation.labelled import Material, materials, recognise, seen_in_training
from ajepa.evaluation.probes import Embedded, predict, validation_split
from ajepa.model.frontend import FrontEnd
from ajepa.model.jepa import Encoder
from ajepa.model.layers import Sequences
from ajepa.model.pooling import statistics
from ajepa.model.pretrained import load_pretrained
from ajepa.training.corpus import load_evaluation
from ajepa.training.engine import Engine
from ajepa.utils.tensor_files import tensors_hash
from ajepa_kernels import LogMelSpec, log_mel

SPEC = LogMelSpec(n_fft=512, win_length=400, hop_length=160, n_mels=32, n_frames=64, patch=(8, 8))  # 4 x 8 patches
SAMPLES = 400 + 63 * 160  # samples of a chunk
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder(ModelConfig(size="tiny"), SPEC).eval()


@pytest.fixture(scope="module")
def manifest(tones, tmp_path_factory):
    """A manifest of the tones with a class and a fold column."""
    path = tmp_path_factory.mktemp("manifest") / "meta.csv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "kind", "fold"])
        for i, wav in enumerate(sorted(tones.rglob("*.wav"))):
            rows.writerow([wav, wav.parent.name, i % 3])
    return path


def features(encoder, pcm, lengths, kind):
    source = EncoderFeatures(encoder, FrontEnd(SPEC), SPEC, "")
    with torch.no_grad():
        x, columns = source(pcm, lengths)
    return source.pool(statistics(x, columns), torch.arange(len(pcm)), len(pcm), kind)


@pytest.mark.parametrize("kind", ["mean", "concat"])
def test_what_follows_a_clip_never_reaches_its_features(encoder, kind):
    """Samples after the end of a clip do not change its features, and the encoder does not attend to padded patches."""
    generator = torch.Generator().manual_seed(0)
    pcm = torch.randint(-9999, 9999, (2, SAMPLES), dtype=torch.int16, generator=generator)
    lengths = torch.full((2,), 400 + 160 * 20)
    silent, loud = pcm.clone(), pcm.clone()
    silent[:, lengths[0] :] = 0
    loud[:, lengths[0] :] = 32000
    assert torch.equal(features(encoder, silent, lengths, kind), features(encoder, loud, lengths, kind))
    whole = features(encoder, silent, torch.full((2,), SAMPLES), kind)
    assert not torch.allclose(features(encoder, silent, lengths, kind), whole, atol=1e-2)

    patches, columns = FrontEnd(SPEC)(silent, lengths), torch.tensor([3, 3])
    spoilt = patches.view(2, 4, 8, -1).clone()
    spoilt[:, :, 3:] = torch.nan
    with torch.no_grad():
        clean, leaky = (
            feature_cache.encode_real(encoder, p, SPEC, columns) for p in (patches, spoilt.view_as(patches))
        )
    assert torch.equal(clean, leaky) and not clean.view(2, 4, 8, -1)[:, :, 3:].any()


def test_long_recordings_are_pooled_over_all_their_chunks(encoder, tmp_path):
    """Every chunk of a long recording is encoded alone, and each real column counts once in the pooled features."""
    rng = np.random.default_rng(0)
    names = ["a", "b", "c"]
    lengths = [SAMPLES * 2 + SAMPLES // 2, SAMPLES // 3, SAMPLES * 2 + 100]  # the last tail is below a frame
    for name, length in zip(names, lengths, strict=True):
        soundfile.write(tmp_path / f"{name}.wav", rng.integers(-9999, 9999, length).astype(np.int16), 16_000)
    index = build_index(tmp_path)
    sources = {"e": EncoderFeatures(encoder, FrontEnd(SPEC), SPEC, "e"), "m": LogMelFeatures(SPEC)}
    sources["m"] = LogMelFeatures(LogMelSpec(n_fft=512, n_mels=32, patch=(8, 8)))
    items, got = embed(index, sources, SAMPLES, ["concat", "tokens"], device=CPU, reading={}, skipped=[])
    assert items.tolist() == [0, 1, 2]
    for i in range(3):
        pcm = torch.from_numpy(soundfile.read(tmp_path / f"{names[i]}.wav", dtype="int16")[0])
        columns, mels = [], []
        for piece in pcm.split(SAMPLES):
            if len(piece) < 400:
                continue
            x = FrontEnd(SPEC)(F.pad(piece, (0, SAMPLES - len(piece)))[None], torch.tensor([len(piece)]))
            real = -(-SPEC.frames(len(piece)) // 8)
            x = x.view(4, 8, -1)[:, :real].flatten(0, 1)[None]
            index_T = (torch.arange(4)[:, None] * 8 + torch.arange(real)).flatten()
            with torch.no_grad():
                full = torch.zeros(1, 32, x.shape[-1]).index_copy(1, index_T, x)
                latents = encoder(full, index_T, Sequences(torch.tensor([0, 4 * real]), 32))
            columns.append(latents.view(4, real, -1).transpose(0, 1))
            mels.append(log_mel(piece[None], sources["m"].spec, layout="spectrogram")[0])
        wanted, mel = torch.cat(columns), torch.cat(mels, 1)
        torch.testing.assert_close(got["e"].clips[i], wanted.mean(0).flatten(), rtol=1e-4, atol=1e-5)
        tokens = got["e"].tokens[got["e"].cu[i] : got["e"].cu[i + 1]]
        torch.testing.assert_close(tokens.float(), wanted.flatten(0, 1), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(got["m"].clips[i], mel.mean(1), rtol=1e-3, atol=1e-3)
        first = got["m"].tokens[got["m"].cu[i]].float()
        torch.testing.assert_close(first[:32], mels[0][:, :8].mean(1), rtol=1e-2, atol=1e-2)


def test_a_damaged_cache_is_made_again_and_a_whole_one_used(encoder, tones, tmp_path, capsys, monkeypatch):
    index = build_index(tones)

    def make(key="k"):
        sources = {"e": EncoderFeatures(encoder, FrontEnd(SPEC), SPEC, key)}
        return embed(index, sources, SAMPLES, ["mean"], device=CPU, reading={}, skipped=[], cache=tmp_path)[1][
            "e"
        ].clips

    first = make()
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # safetensors would not notice this damage
    file.write_bytes(data)
    assert torch.equal(make(), first) and "damaged" in capsys.readouterr().err
    file.write_bytes(b"\x80\x04cos\nsystem\n.")
    assert torch.equal(make(), first) and "damaged" in capsys.readouterr().err
    make("another checkpoint")
    assert len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(feature_cache, "_embed", None)  # computing features would now fail
    assert torch.equal(make(), first)


TRAIN, TEST = torch.arange(900), torch.arange(900, 1200)


def blobs():
    """Three classes of 400 recordings in 8 dimensions. One token shows the class, but the mean of tokens does not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1200) % 3
    clips = 3 * F.one_hot(labels, 8).float() + torch.randn(1200, 8, generator=generator)
    counts = torch.randint(2, 7, (1200,), generator=generator)
    tokens = [torch.randn(n, 16, generator=generator) * 0.3 for n in counts]
    for t, label in zip(tokens, labels.tolist(), strict=True):
        t[:, 10] = 0
        t[-1, label], t[-1, 10] = 3.0, 3.0  # the last token shows the class
        t[0, label] -= 3.0  # the first token cancels it in the mean
    cu = F.pad(counts.cumsum(0), (1, 0))
    return Embedded(clips, torch.cat(tokens).half(), cu), labels


@pytest.mark.parametrize("head", list(probes.HEADS))
def test_every_head_learns_classes_and_is_the_same_twice(head):
    x, labels = blobs()
    state = torch.get_rng_state()
    guess = predict(head, x, labels, TRAIN, TEST, seed=3)
    assert (guess == labels[TEST]).float().mean() > 0.75
    assert torch.equal(guess, predict(head, x, labels, TRAIN, TEST, seed=3))
    assert torch.equal(state, torch.get_rng_state())


def test_the_attentive_probe_ignores_padding():
    torch.manual_seed(0)
    module, x = probes.AttentiveProbe(64, 3), torch.randn(2, 5, 64)
    padding = torch.arange(5) >= torch.tensor([[3], [5]])
    spoilt = x.masked_fill(padding[..., None], 1e3)
    torch.testing.assert_close(module(x, padding), module(spoilt, padding))
    torch.testing.assert_close(module(x[:1, :3], padding[:1, :3]), module(x, padding)[:1])
    plain = module.norm(x[1])  # the attention by its formula
    weight = (plain @ module.query[0]).softmax(0)
    torch.testing.assert_close(module.linear(weight @ (plain @ module.value[0].T)), module(x, padding)[1])


def test_no_test_row_is_ever_looked_at(monkeypatch):
    """The probes choose their epoch with training rows only."""
    x, labels = blobs()
    learn, held = validation_split(labels, TRAIN, 0)
    assert sorted(torch.cat([learn, held]).tolist()) == TRAIN.tolist()
    assert torch.bincount(labels[held]).tolist() == [30, 30, 30]
    seen = []
    monkeypatch.setattr(probes, "classify", lambda module, inputs, rows, device: seen.append(rows) or labels[rows])
    predict("linear", x, labels, TRAIN, TEST, seed=0)
    assert len(seen) == probes.EPOCHS + 1 and all(torch.equal(rows, held) for rows in seen[:-1])
    assert torch.equal(seen[-1], TEST)


def test_linear_is_x_ares_head_and_schedule(monkeypatch):
    x, labels = blobs()
    rates, batches = [], []

    class Adam(torch.optim.Adam):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    inputs = lambda rows: (batches.append(len(rows)) or x.clips[rows],)  # noqa: E731
    probes.fit(probes.LinearProbe(8, 3), inputs, labels, torch.arange(120), 0, CPU)
    steps = 10 * 4  # 10 epochs of 108 rows in batches of 32
    assert len(rates) == steps and rates[0] == pytest.approx(1e-3) and max(batches) == 32
    assert rates[steps // 2] == pytest.approx(0.55e-3) and rates[-1] == pytest.approx(1e-4, rel=0.1)


def test_scores_by_hand():
    task = probe.Task(None, torch.arange(4), torch.tensor([0, 1, 1, 0]), ["a", "b"])
    task.folds.extend([probe.Fold("x", torch.tensor([2, 3]), torch.tensor([0, 1])),
                       probe.Fold("y", torch.tensor([0, 1]), torch.tensor([2, 3]))])  # fmt: skip
    got = probe.scores(torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]]), task)
    assert got["folds"] == [0.75, 0.5] and got["mean"] == 0.625 and got["seeds"] == [0.75, 0.5]
    assert got["deviation"] == pytest.approx(0.1767767)
    table = probe.per_class(torch.tensor([[0, 1, 1, 1]]), task)
    assert table["confusion"] == [[1, 1], [0, 2]]
    assert table["table"]["a"] == {"precision": 1.0, "recall": 0.5, "f1-score": pytest.approx(2 / 3), "support": 2}


def test_the_program_writes_its_results_and_pictures(run, manifest, tones, tmp_path, capsys):
    argv = [str(run), "--data", str(manifest), "--label", "kind", "--folds", "fold", "--seeds", "2"]
    assert probe.main(argv) == 0
    printed = capsys.readouterr().out
    assert "trained encoder" in printed and "untrained encoder" in printed and "high" in printed
    result = json.loads((run / "probe.json").read_text())
    assert [f["name"] for f in result["folds"]] == ["fold=0", "fold=1", "fold=2"]
    assert result["data"]["classes"] == ["high", "low"] and sum(f["test"] for f in result["folds"]) == 40
    for name in ("pooled log-mel", "untrained encoder", "trained encoder"):
        for head in ("knn", "linear", "attentive"):
            assert len(result["scores"][name][head]["folds"]) == 3
    assert result["scores"]["pooled log-mel"]["knn"]["mean"] > 0.9
    assert len(result["scores"]["trained encoder"]["linear"]["seeds"]) == 2
    assert np.array(result["classes"]["knn"]["confusion"]).sum() == 40
    assert result["dimensions"] == {"pooled log-mel": 128, "untrained encoder": 2048, "trained encoder": 2048}
    for name in ("confusion.png", "embeddings.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")

    last = sorted((run / "checkpoints").iterdir())[-1]  # the checkpoint with the run's final weights
    out = tmp_path / "out"
    again = [str(last), "--data", str(tones), "--map", "none", "--heads", "knn", "--out", str(out)]
    assert probe.main(again) == 0
    other = json.loads((out / "probe.json").read_text())
    assert other["checkpoint"]["sha256"] == result["checkpoint"]["sha256"]
    assert [f["seen_in_pretraining"] for f in other["folds"]] == [10]  # the run was trained on this folder
    assert "warning: 10 of the 10 test recordings of every fourth were pretrained on (10 recognised by path); " in (
        capsys.readouterr().err
    )


def test_the_untrained_baseline_is_the_run_before_its_first_step(run, tones, tmp_path, monkeypatch):
    hashes = {}

    def spy(index, sources, *args, **kwargs):
        hashes.update({k: tensors_hash(s.encoder.state_dict()) for k, s in sources.items() if k != probe.LOG_MEL})
        return embed(index, sources, *args, **kwargs)

    monkeypatch.setattr(probe, "embed", spy)
    assert probe.main([str(run), "--data", str(tones), "--heads", "knn", "--map", "none", "--out", str(tmp_path)]) == 0
    cfg, weights, *_ = load_pretrained(run)
    start = Engine(cfg, CPU).model.context_encoder.state_dict()
    assert hashes == {
        probe.UNTRAINED: tensors_hash(start),
        probe.TRAINED: tensors_hash(weights),
    }
    assert len(set(hashes.values())) == 2


@pytest.fixture(scope="module")
def clip_run(tones, tmp_path_factory):
    """The folder of a run with a clip objective and no teacher, and the encoder and projector that it ended with."""
    folder = tmp_path_factory.mktemp("clip") / "run"
    cfg = config.parse([*SMALL, "--data", str(tones), "--out", str(folder), "--objective", "clip"])
    folder.mkdir()
    config.save(cfg, folder / "config.json")
    engine = Engine(cfg, CPU)
    trained = {"encoder": engine.encoder(), "projector": engine.projector}
    with torch.no_grad():
        for name, module in trained.items():
            for p in module.parameters():
                p.add_(0.02 * torch.randn_like(p))
            save_file(module.state_dict(), folder / f"{name}.safetensors")
    return folder, trained


@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_baselines_are_pooled_as_the_encoder_is(clip_run, tones, tmp_path, monkeypatch, pooling):
    """The untrained encoder has the same pooling and layers, and is projected by the untrained projector."""
    seen = {}

    def spy(index, sources, samples, kinds, **options):
        for name, source in sources.items():
            projector = getattr(source, "projector", None)
            hashes = projector and tensors_hash(projector.state_dict())
            seen[name] = kinds, getattr(source, "layers", None), hashes
        return embed(index, sources, samples, kinds, **options)

    monkeypatch.setattr(probe, "embed", spy)
    folder, trained = clip_run
    argv = [str(folder), "--data", str(tones), "--heads", "knn", "--map", "none", "--out", str(tmp_path)]
    assert probe.main([*argv, "--pooling", pooling, "--layers", "mean"]) == 0
    result = json.loads((tmp_path / "probe.json").read_text())
    width = {"mean": 128, "mean+std": 256, "concat": 1024, "concat+std": 2048, "projection": 128}[pooling]
    mel = 64 if pooling in ("mean", "concat") else 128
    assert result["dimensions"] == {probe.LOG_MEL: mel, probe.UNTRAINED: width, probe.TRAINED: width}
    assert result["settings"]["pooling"] == pooling and result["settings"]["layers"] == "mean"
    start = Engine(load_pretrained(folder).cfg, CPU).projector
    projected = [tensors_hash(p.state_dict()) for p in (start, trained["projector"])]
    untrained, end = projected if pooling == "projection" else (None, None)
    assert seen == {
        probe.UNTRAINED: ([pooling], "mean", untrained),
        probe.TRAINED: ([pooling], "mean", end),
        probe.LOG_MEL: ([pooling], None, None),
    }


@pytest.mark.parametrize(("precision", "bf16"), [("auto", False), ("fp32", False), ("bf16", True)])
def test_a_cpu_probes_in_float32_unless_the_run_names_bf16(clip_run, tones, tmp_path, monkeypatch, precision, bf16):
    """By itself only training computes in bf16 on a CPU. Weight copies, autocast and the cache's key agree."""
    seen = []

    def spy(index, sources, *args, **options):
        for name, source in sources.items():
            if name != probe.LOG_MEL:
                with source.autocast():
                    autocast = torch.is_autocast_enabled("cpu")
                seen.append((autocast, " bf16 " in source.key, source.encoder.embed.copies is not None))
        return embed(index, sources, *args, **options)

    monkeypatch.setattr(probe, "embed", spy)
    folder = tmp_path / "run"
    shutil.copytree(clip_run[0], folder)
    config.save(dataclasses.replace(config.load(folder / "config.json"), precision=precision), folder / "config.json")
    argv = [str(folder), "--data", str(tones), "--heads", "knn", "attentive", "--map", "none"]
    assert probe.main([*argv, "--pooling", "projection"]) == 0
    assert seen == [(bf16, bf16, bf16)] * 2, "the untrained and the trained encoder"


def test_trained_features_are_those_of_ajepa_encoder(clip_run, tones, tmp_path, monkeypatch):
    """What the probe scores is what `Encoder.embed` returns for the same run, pooling and layers."""
    found = {}

    def spy(*args, **options):
        items, got = embed(*args, **options)
        found.update(got)
        return items, got

    monkeypatch.setattr(probe, "embed", spy)
    one = ajepa.Encoder.from_pretrained(clip_run[0], pooling="projection", layers="mean")
    argv = [str(clip_run[0]), "--data", str(tones), "--heads", "knn", "--map", "none", "--out", str(tmp_path)]
    assert probe.main([*argv, "--pooling", "projection", "--layers", "mean"]) == 0
    index = build_index(tones)
    for row in (0, 17, 39):
        pcm = torch.from_numpy(soundfile.read(index.entries[row].path, dtype="int16")[0])
        with torch.inference_mode():
            torch.testing.assert_close(one.embed(pcm)[0], found[probe.TRAINED].clips[row], rtol=1e-4, atol=1e-5)


# --- what can be probed, and where to -------------------------------------------------------------------------------


@pytest.fixture
def spied(monkeypatch):
    """The sources of features by name, and the features, of the last probe."""
    seen = {}

    def spy(index, sources, *args, **options):
        items, made = embed(index, sources, *args, **options)
        seen.update({name: (source, made[name]) for name, source in sources.items()})
        return items, made

    monkeypatch.setattr(probe, "embed", spy)
    return seen


QUICK = ["--heads", "knn", "--map", "none"]


def test_an_exported_encoder_and_one_of_the_hub_are_scored_as_their_run_is(run, tones, tmp_path, spied, monkeypatch):
    exported = tmp_path / "exported"
    ajepa.Encoder.from_pretrained(run).save_pretrained(exported)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ajepa.encoder._from_hub", lambda name: open_encoder(exported)._replace(file=tmp_path / name))
    clips, sums = [], set()
    for source, out in ((run, "a"), (exported, "exported"), ("owner/name", "probe/name")):
        more = ["--out", out] if source == run else []  # else the default
        assert probe.main([str(source), "--data", str(tones), *QUICK, *more]) == 0
        clips.append(spied[probe.TRAINED][1].clips)
        result = json.loads((tmp_path / out / "probe.json").read_text())
        sums.add(result["checkpoint"]["sha256"])
        assert result["settings"]["pooling"] == "concat+std" and result["settings"]["layers"] == "last"
        untrained = spied[probe.UNTRAINED][0].encoder
        assert result["folds"][0]["seen_in_pretraining"] == (10 if source == run else None)
    assert torch.equal(clips[0], clips[1]) and torch.equal(clips[0], clips[2]) and len(sums) == 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = ajepa.Encoder(open_encoder(exported).encoder.config)
    assert tensors_hash(untrained.state_dict()) == tensors_hash(fresh.vit.state_dict())


def test_a_converted_encoder_is_scored_with_its_own_epsilon_and_layers(tones, tmp_path, spied):
    cfg = EncoderConfig(PRESETS["tiny"].front_end, "tiny", 32_000, pooling="projection", layers="mean", pad="silence",
                        projector=(16, 8), norm_eps=1e-2)  # fmt: skip
    torch.manual_seed(5)
    one = ajepa.Encoder(cfg)
    one.save_pretrained(tmp_path)
    assert probe.main([str(tmp_path), "--data", str(tones), *QUICK]) == 0
    for name in (probe.TRAINED, probe.UNTRAINED):
        source = spied[name][0]
        assert {m.eps for m in source.encoder.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-2}
        assert source.layers == "mean" and source.projector is not None and "0.01" in source.key
    index = build_index(tones)
    pcm = torch.from_numpy(soundfile.read(index.entries[0].path, dtype="int16")[0])
    with torch.inference_mode():
        torch.testing.assert_close(one.embed(pcm)[0], spied[probe.TRAINED][1].clips[0], rtol=1e-4, atol=1e-5)


def test_results_go_only_where_they_do_no_harm(run, tones, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "embed", None)  # the folder is judged before the work
    last = sorted((run / "checkpoints").iterdir())[-1]
    other, shards = tmp_path / "other", tmp_path / "shards"
    for folder, name in ((other, "notes.txt"), (shards, "000000000.shard")):
        folder.mkdir()
        (folder / name).write_text("")
    for folder, what in ((other, "other files"), (shards, "packed shards"), (last, "a checkpoint")):
        before = sorted(folder.iterdir())
        assert probe.main([str(run), "--data", str(tones), *QUICK, "--out", str(folder)]) == 2
        assert capsys.readouterr().err.startswith(f"error: --out {folder} holds {what}, which")
        assert sorted(folder.iterdir()) == before


# --- recordings that were trained on --------------------------------------------------------------------------------


def test_a_source_that_was_never_decoded_here_is_read_by_its_headers(tones, tmp_path, monkeypatch):
    """As on another machine than that of the pretraining, where decoding it could take hours."""
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path / "cache"))
    decoded = []

    def noted(*where, decode, **options):
        decoded.append(decode)
        return inspect(*where, decode=decode, **options)

    monkeypatch.setattr("ajepa.data.index.inspect", noted)
    trained = Material(str(tones), None, None, 1.0)
    assert len(trained.read()) == 40 and set(decoded) == {False}
    build_index(tones)
    decoded.clear()
    assert len(trained.read()) == 40 and not decoded


def test_recordings_are_recognised_by_path_content_and_name(tones, tmp_path, monkeypatch):
    """Through another manifest, a link, a copy, a tar, and shards; a recording of the same name and size is not one."""
    low = sorted((tones / "low").iterdir())
    trained = build_index(tones / "low")
    monkeypatch.chdir(tones)
    (tmp_path / "meta.csv").write_text("file\n" + "".join(f"{tones}/low/../high/../low/{f.name}\n" for f in low[:5]))
    (tmp_path / "links").mkdir()
    (tmp_path / "link").symlink_to(tones / "low")
    for f in low[:5]:
        (tmp_path / "links" / f.name).symlink_to(f)
    shutil.copytree(tones / "low", tmp_path / "copy")
    data = bytearray((tmp_path / "copy" / "00.wav").read_bytes())
    data[-1000:] = bytes(1000)
    (tmp_path / "copy" / "00.wav").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for f in [*low[3:5], tones / "high" / "00.wav"]:
            tar.add(f, f"{f.parent.name}-{f.name}")
    assert recognise(build_index(tmp_path / "meta.csv"), trained).tolist() == ["path"] * 5
    assert recognise(build_index(tmp_path / "link"), trained).tolist() == ["path"] * 20
    assert recognise(build_index(tmp_path / "links"), trained).tolist() == ["content"] * 5
    assert recognise(build_index(tmp_path / "copy"), trained).tolist() == [""] + ["content"] * 19
    assert recognise(build_index(tmp_path / "a.tar"), trained).tolist() == ["content", "content", ""]
    assert recognise(build_index(tones / "high"), trained).tolist() == [""] * 20
    monkeypatch.setattr(labelled, "MOST", 0)  # too many recordings to read: only those of equal names are compared
    assert recognise(build_index(tmp_path / "copy"), trained).tolist() == [""] + ["content"] * 19
    assert recognise(build_index(tmp_path / "a.tar"), trained).tolist() == [""] * 3


def test_recordings_are_recognised_in_shards(tones, tmp_path):
    moved = tmp_path / "moved" / "low"
    shutil.copytree(tones / "low", moved)
    for source, target, rate in ((tones / "low", "a", 16_000), (moved, "b", 8_000), (tones / "high", "c", 16_000)):
        assert pack.main([str(source), str(tmp_path / target), "--rate", str(rate)]) == 0
    files, a, b, c = (build_index(x) for x in (tones / "low", *(tmp_path / x for x in "abc")))
    assert (recognise(files, a) == "path").all() and (recognise(a, files) == "path").all()
    assert (recognise(files, b) == "name").all() and (recognise(b, files) == "name").all()
    assert (recognise(a, b) == "name").all() and (recognise(a, a) == "path").all()
    assert not recognise(files, c).any() and not recognise(c, b).any()


def test_recordings_of_a_source_that_is_gone_may_have_been_trained_on(run, tones, tmp_path, capsys):
    gone = tmp_path / "run"
    shutil.copytree(run, gone)
    cfg = config.load(gone / "config.json")
    data = dataclasses.replace(cfg.data, data=str(tmp_path / "gone"))
    config.save(dataclasses.replace(cfg, data=data), gone / "config.json")
    assert probe.main([str(gone), "--data", str(tones), *QUICK]) == 0
    message = f"warning: {tmp_path / 'gone'} was trained on and cannot be read, so test recordings may be among it\n"
    assert message in capsys.readouterr().err
    assert json.loads((gone / "probe.json").read_text())["folds"][0]["seen_in_pretraining"] is None


def test_what_the_run_before_a_run_was_trained_on_is_known(run, tones, tmp_path):
    cfg = config.load(run / "config.json")
    second = dataclasses.replace(cfg, init_from=str(run), data=dataclasses.replace(cfg.data, data=str(tones / "low")))
    assert [m.data for m in materials(second, tmp_path)] == [str(tones), str(tones / "low")]
    third = dataclasses.replace(second, init_from=str(tmp_path / "gone"))
    assert [m.data for m in materials(third, tmp_path)] == [str(tones / "low")]


def test_the_synthetic_set_is_recognised(tmp_path, monkeypatch):
    made = make_synthetic(tmp_path / "set", n_clips=88, seconds=0.5)
    monkeypatch.setattr(labelled, "default_set", lambda seconds, rate: made)
    how = seen_in_training(build_index(made), materials(PRESETS["tiny"], tmp_path))
    splits = build_index(made).metadata["split"]
    assert [bool(way) for way in how] == [split == "train" for split in splits]


# --- what heads can do ----------------------------------------------------------------------------------------------


def test_classes_without_training_rows_are_named(run, tones, tmp_path, capsys):
    manifest = tmp_path / "meta.csv"
    rows = [f"{f},{'rare' if i % 20 == 4 else f.parent.name},{int(i % 20 == 4)}"
            for i, f in enumerate(sorted(tones.rglob("*.wav")))]  # fmt: skip
    manifest.write_text("\n".join(["file,label,fold", *rows]))
    argv = [str(run), "--data", str(manifest), "--test", "fold=1", *QUICK, "--out", str(tmp_path / "out")]
    assert probe.main(argv) == 0
    message = "1 of 3 classes occur in no training row and cannot be recognised: rare"
    assert f"warning: fold=1: {message}\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["folds"][0]["absent_classes"] == message


@pytest.mark.parametrize("head", list(probes.HEADS))
@pytest.mark.filterwarnings("ignore:Degrees of freedom")
def test_a_head_without_finite_outputs_fails(head):
    x, labels = blobs()
    x.clips[3, 2] = x.tokens[5, 2] = torch.inf
    with pytest.raises(ConfigError, match="not finite"):
        predict(head, x, labels, TRAIN, TEST, seed=3)


def test_features_that_are_not_finite_fail(run, tones, tmp_path, capsys, monkeypatch):
    def spoilt(*args, **options):
        items, made = embed(*args, **options)
        for x in made.values():
            x.tokens[-1, -1] = torch.nan
        return items, made

    monkeypatch.setattr(probe, "embed", spoilt)
    argv = [str(run), "--data", str(tones), "--heads", "attentive", "--map", "none", "--out", str(tmp_path / "out")]
    assert probe.main(argv) == 2 and "features are not finite" in capsys.readouterr().err


def test_memory_is_estimated_before_it_is_taken(run, tones, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(probe, "embed", None)
    monkeypatch.setattr(probe, "available_memory", lambda: 10**6)
    argv = [str(run), "--data", str(tones), "--map", "none", "--out", str(tmp_path / "out")]
    assert probe.main(argv) == 2
    error = capsys.readouterr().err
    assert "of 40 recordings need 0.0 GB of memory and 0.0 GB are free: leave attentive out" in error
    assert error.count("\n") == 1


def test_the_estimate_of_memory_is_close(run, tones, tmp_path, monkeypatch, spied):
    """The features take less, but not an order of magnitude less: they are copied, and batches take memory."""
    argv = [str(run), "--data", str(tones), "--heads", "attentive", "--map", "none", "--out", str(tmp_path / "out")]
    assert probe.main(argv) == 0
    tensors = [t for _, x in spied.values() for t in (x.clips, x.tokens)]
    took = sum(t.nbytes for t in tensors)
    for room, fits in ((16 * took, True), (took - 1, False)):
        monkeypatch.setattr(probe, "available_memory", lambda room=room: room)
        assert (probe.main(argv) == 0) == fits


def test_heads_take_bounded_memory(monkeypatch):
    x, labels = blobs()
    whole = predict("knn", x, labels, TRAIN, TEST, 0), x.padded(torch.arange(6))[0]
    monkeypatch.setattr(probes, "VOTES", 9_300)  # ten rows at a time
    assert torch.equal(predict("knn", x, labels, TRAIN, TEST, 0), whole[0])
    monkeypatch.setattr(probes, "BATCH_VALUES", 4 * probes.BATCH * 16)  # four tokens of a recording
    few, padding = x.padded(torch.arange(6))
    assert few.shape[1] == 4
    for row in range(6):
        tokens = x.tokens[x.cu[row] : x.cu[row + 1]].float()
        kept = few[row][~padding[row]]
        assert len(kept) == min(4, len(tokens))
        assert torch.equal(kept[0], tokens[0]) and torch.equal(kept[-1], tokens[-1])
        assert all((tokens == token).all(1).any() for token in kept)


# --- kills ----------------------------------------------------------------------------------------------------------


def shrink(patch):
    patch.setitem(SIZES, "tiny", (32, 1, 4))


def main_with_a_micro_model(argv):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(probes, "EPOCHS", 2)
        return probe.main(argv)


# Before which call of which function a probe is killed, or so many seconds later.
MOMENTS = """
ajepa.probe.open_encoder 1
ajepa.probe.build_index 1
ajepa.evaluation.feature_cache._embed 1
ajepa.evaluation.feature_cache.statistics 2
ajepa.evaluation.feature_cache._save 1
ajepa.evaluation.feature_cache._save 2
ajepa.utils.atomic_files.os.fsync 2
ajepa.evaluation.feature_cache._save 4
ajepa.evaluation.feature_cache._load 3
ajepa.probe._cross_validate 1
ajepa.evaluation.probes.fit 1
ajepa.evaluation.probes.fit 2 0.005
ajepa.probe._cross_validate 5
ajepa.evaluation.probes.classify 6
ajepa.probe.scores 3
ajepa.probe.per_class 1
ajepa.probe.write_json 1
ajepa.probe.draw 1
ajepa.evaluation.plots.write_atomic 1
ajepa.probe.report 1
""".strip().splitlines()


def test_killed_at_20_moments_a_probe_repeats_to_the_same_result(manifest, tmp_path, forks, monkeypatch):
    shrink(monkeypatch)
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path / "cache"))
    spec = dataclasses.replace(PRESETS["tiny"].front_end, n_frames=16)
    torch.manual_seed(1)  # not the seed of the untrained encoder
    ajepa.Encoder(EncoderConfig(spec, "tiny", 8_000)).save_pretrained(tmp_path / "micro")
    argv = [str(tmp_path / "micro"), "--data", str(manifest), "--label", "kind", "--test", "fold=1", "--map", "none"]
    micro, log = {"call": "test_probe:main_with_a_micro_model"}, tmp_path / "log"

    def result(out):
        found = json.loads((tmp_path / out / "probe.json").read_text())
        del found["settings"]["out"]
        return {key: value for key, value in found.items() if key not in ("seconds", "sha256")}

    assert forks.run([*argv, "--out", str(tmp_path / "whole")], log, **micro) == 0, log.read_text()
    shutil.rmtree(tmp_path / "cache")
    cached, written = [], 0
    for moment in MOMENTS:
        pid = forks.start([*argv, "--out", str(tmp_path / "cut")], log, **micro, KILL=moment)
        assert forks.wait(pid) == -signal.SIGKILL, (moment, log.read_text())
        cached.append(len(list((tmp_path / "cache" / "features").glob("*.safetensors"))))
        if (tmp_path / "cut" / "probe.json").exists():
            assert result("cut") == result("whole")
            written += 1
    assert len(cached) == 20 and len(set(cached)) > 3 and cached[-1] == 6 and written == 3, (cached, written)
    assert forks.run([*argv, "--out", str(tmp_path / "cut")], log, **micro) == 0, log.read_text()
    assert result("cut") == result("whole") and "damaged" not in log.read_text()


def test_ctrl_c_is_one_line(run, tones, tmp_path, capsys, monkeypatch):
    def pressed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "embed", pressed)
    assert probe.main([str(run), "--data", str(tones), *QUICK, "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_wrong_input_is_named_in_one_line(run, manifest, tones, tmp_path, capsys):
    def refused(*argv):
        assert probe.main([str(a) for a in argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    assert "config.json" in refused(tmp_path, "--data", tones)
    assert "no such column" in refused(run, "--data", manifest, "--label", "kind", "--folds", "speaker")
    assert "give one" in refused(run, "--data", manifest, "--folds", "fold", "--test", "fold=1")
    assert "--float-scale nan: the scale must be" in refused(run, "--data", manifest, "--float-scale", "nan")
    if not torch.cuda.is_available():
        assert "no CUDA device is here" in refused(run, "--data", manifest, "--device", "cuda")
    assert "--label" in refused(run, "--data", manifest)
    masked = tmp_path / "masked"
    shutil.copytree(run, masked, ignore=shutil.ignore_patterns("projector.safetensors"))
    assert "projector of a clip objective" in refused(masked, "--data", tones, "--pooling", "projection")
    assert "classify" in refused(run, "--data", manifest, "--label", "kind", "--test", "fold=0,1,2")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((run / "config.json").read_bytes())
    (broken / "encoder.safetensors").write_bytes(b"\x80\x04.")
    assert "encoder.safetensors" in refused(broken, "--data", tones)
    (broken / "encoder.safetensors").unlink()
    assert "nor a usable checkpoint" in refused(broken, "--data", tones)


def test_lists_of_labels_are_no_classes(run, tones, tmp_path, capsys):
    """The probe refuses lists of labels and names the remedy. The watch in training uses recordings with one label."""
    files = sorted(tones.rglob("*.wav"))
    labels = [["dog"], ["cat"], ["dog", "cat"], "cat"]
    rows = [{"file": str(path), "labels": labels[i % 4]} for i, path in enumerate(files)]
    manifest = tmp_path / "tags.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    assert probe.main([str(run), "--data", str(manifest)]) == 2
    assert "several labels" in (error := capsys.readouterr().err) and "--multi-label" in error
    index = build_index(manifest)
    evaluation = load_evaluation(PRESETS["tiny"], index, None, None, [])
    names = [index.label_names[label] for label in evaluation.labels]
    assert names == [("dog", "cat", "", "cat")[i % 4] for i in range(len(files)) if i % 4 != 2]


def test_a_parquet_manifest_is_read_like_a_csv(manifest, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed, so Parquet cannot be read")
    from pyarrow import csv as arrow_csv

    table = arrow_csv.read_csv(manifest)
    table = table.append_column("sound", [[b"\x00"] * len(table)])
    parquet.write_table(table, tmp_path / "meta.parquet")
    ours, theirs = (build_index(p, label_column="kind") for p in (tmp_path / "meta.parquet", manifest))
    assert ours.entries == theirs.entries and ours.metadata == theirs.metadata
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="the manifest cannot be read"):
        build_index(tmp_path / "bad.parquet")


def test_digits_log_mel_floor(audio_dir):
    """With one speaker held out and every tenth digit, pooled log-mel scores far above chance and far below perfect."""
    index = build_index(audio_dir / "fsdd" / "meta.csv", label_column="digit")
    index = index.subset(range(0, len(index), 10))
    spec = probe.log_mel_spec(PRESETS["tiny"].front_end, "standard")
    items, got = embed(index, {"m": LogMelFeatures(spec)}, 32_000, ["mean"], device=CPU, reading={}, skipped=[])
    labels = torch.from_numpy(index.labels[items.numpy()])
    speaker = np.array(index.metadata["speaker"])
    right = []
    for name in sorted(set(speaker)):
        test = torch.from_numpy(speaker == name)
        rows = (~test).nonzero()[:, 0], test.nonzero()[:, 0]
        right += (predict("knn", got["m"], labels, *rows, seed=0) == labels[test]).tolist()
    assert 0.25 < np.mean(right) < 0.65
