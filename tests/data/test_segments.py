"""Every command honours `offset` and `duration` of a manifest, so each row is its own segment of a recording."""

import json

import numpy as np
import pytest
import torch
from conftest import SMALL
from loading import RATE, once, take
from make_audio import FORMATS, noise, write

from ajepa import embed, finetune, pack, probe, train
from ajepa.data.index import build_index
from ajepa.data.loader import AudioLoader
from ajepa.data.shards import Shard
from ajepa.encoder import Encoder

SECONDS, ROWS = 0.25, 12


@pytest.fixture(params=["wav16", "flac", "mp3"])
def manifest(request, tmp_path):
    """A manifest of two recordings that alternate between noise and tone. Every row is a different quarter second."""
    return make(tmp_path, request.param, RATE)


def make(folder, kind, rate):
    rows, step = [], int(SECONDS * rate)
    t = np.arange(step) / rate
    for name in ("train", "test"):
        seeds = range(100 * len(rows), 100 * len(rows) + ROWS)
        parts = [(4000 + i) * np.sin(2 * np.pi * 440 * t) if i % 2 else noise(step, i) for i in seeds]
        write(folder / f"{name}{FORMATS[kind][2]}", np.concatenate(parts).astype(np.int16), rate, kind)
        rows += [
            {"audio_filepath": f"{name}{FORMATS[kind][2]}", "offset": i * SECONDS, "duration": SECONDS,
             "label": "tone" if i % 2 else "noise", "split": name}
            for i in range(ROWS)
        ]  # fmt: skip
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def whole(manifest) -> torch.Tensor:
    """The whole recordings, cut at the bounds of the rows: `[rows, samples]`."""
    files = build_index(manifest.parent, cache_dir=manifest.parent / "other")
    clips = once(files.subset([1, 0]), clip_samples=int(ROWS * SECONDS * RATE), pad="zero").pcm  # train, test
    return clips.view(2 * ROWS, -1)


def test_rows_are_read(manifest):
    index = build_index(manifest)
    assert len(index) == 2 * ROWS and len({entry.name for entry in index.entries}) == 2 * ROWS
    assert abs(index.seconds - 2 * ROWS * SECONDS) < 1e-6
    wanted = whole(manifest)
    for decoder in ("soundfile", "auto"):
        batch = once(index, clip_samples=wanted.shape[1], decoder=decoder)
        assert torch.equal(batch.pcm, wanted)
        assert batch.labels.tolist() == [i % 2 for i in range(ROWS)] * 2
    with AudioLoader(index, sample_rate=RATE, clip_samples=900, batch_size=16, seed=0) as loader:
        for batch in take(loader, 3):
            for clip, item in zip(batch.pcm, batch.items.tolist(), strict=True):
                assert (wanted[item].unfold(0, 900, 1) == clip).all(1).any()


def test_rows_of_another_rate_are_resampled_alone(tmp_path):
    """A row is resampled as a recording of its own, so its neighbours do not ring into it."""
    index = build_index(make(tmp_path, "flac", 44_100))
    clips = once(index, clip_samples=int(SECONDS * RATE), pad="zero").pcm
    samples = np.concatenate([noise(11025, i) for i in range(2)])
    write(tmp_path / "alone" / "0.wav", samples[:11025], 44_100)
    alone = once(build_index(tmp_path / "alone"), clip_samples=int(SECONDS * RATE), pad="zero").pcm
    assert torch.equal(clips[0], alone[0])


def test_pack_keeps_rows(manifest, tmp_path):
    assert pack.main([str(manifest), str(tmp_path / "packed"), "--rate", str(RATE)]) == 0
    index = build_index(tmp_path / "packed")
    shard = Shard(index.entries[0].path)
    wanted = whole(manifest)
    assert [entry.member for entry in index.entries] == [entry.name for entry in build_index(manifest).entries]
    for row in range(2 * ROWS):
        assert np.array_equal(shard.read(row).view(np.int16), wanted[row])


def test_commands_take_rows(manifest, tmp_path, run, capsys):
    """The commands distinguish tone and noise within one file, which a command that reads whole files could not."""
    small = [*SMALL, "--clip-seconds", str(SECONDS), "--n-frames", "8", "--steps", "2", "--warmup-steps", "1"]
    options = ["--data", str(manifest), "--where", "split=train", "--compare-steps", "0"]
    assert train.main([*options, "--out", str(tmp_path / "run"), *small]) == 0
    assert f"{ROWS} recordings" in capsys.readouterr().out
    division = ["--data", str(manifest), "--test", "split=test"]
    assert probe.main([str(run), *division, "--heads", "knn", "--map", "none", "--out", str(tmp_path / "scores")]) == 0
    result = json.loads((tmp_path / "scores" / "probe.json").read_text())
    assert json.dumps(result).count("tone") and "1.0" in json.dumps(result)
    fine = [str(run), *division, "--epochs", "1", "--out", str(tmp_path / "fine")]
    assert finetune.main(fine) == 0
    out = tmp_path / "e.npz"
    assert embed.main([str(run), str(manifest), "--where", "split=test", "--out", str(out)]) == 0
    found = np.load(out)
    index = build_index(manifest, where="split=test")
    assert found["names"].tolist() == [entry.name for entry in index.entries]
    encoder = Encoder.from_pretrained(run)
    clips = once(index, clip_samples=int(SECONDS * RATE), pad="zero").pcm
    wanted = torch.stack([encoder(clip)[0].mean(0) for clip in clips]).detach()
    close = 1e-3 if manifest.parent.glob("*.mp3") else 1e-5
    assert np.abs(found["clips"] - wanted.numpy()).max() < 10 * close
