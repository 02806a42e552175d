import csv

import numpy as np
import pytest
import soundfile as sf
import torch

import ajepa.data.synthetic
import ajepa.utils.progress
from ajepa.data.index import build_index
from ajepa.data.loader import iterate_once
from ajepa.data.synthetic import CLASSES, make_synthetic

SMALL = {"n_clips": 2 * len(CLASSES), "seconds": 1.0}


def read(manifest):
    with open(manifest, newline="") as file:
        return [(row, sf.read(manifest.parent / row["filename"], dtype="int16")) for row in csv.DictReader(file)]


def test_contents(tmp_path):
    rows = read(make_synthetic(tmp_path, **SMALL))
    assert len(CLASSES) >= 12
    assert len(rows) == SMALL["n_clips"]
    assert {row["label"] for row, _ in rows} == set(CLASSES)
    assert all(rate == 16000 and pcm.shape == (16000,) for _, (pcm, rate) in rows)
    peaks = 20 * np.log10([np.abs(pcm.astype(float)).max() / 32768 for _, (pcm, _) in rows])
    assert peaks.min() < -20 and -3 < peaks.max() < 0
    padded = np.mean([(pcm[:50] == 0).all() or (pcm[-50:] == 0).all() for _, (pcm, _) in rows])
    assert 0.02 < padded < 0.4


def test_making_it_is_reported_if_it_takes_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ajepa.utils.progress.time, "monotonic", lambda: 0.0)
    make_synthetic(tmp_path / "quick", **SMALL)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ajepa.utils.progress, "PATIENCE", 0.0)
    make_synthetic(tmp_path / "slow", **SMALL)
    count = SMALL["n_clips"]
    assert capsys.readouterr().err.splitlines()[-1] == f"making the synthetic set: {count} of {count}"


@pytest.mark.parametrize("rate", [8000, 44100])
def test_other_rates(tmp_path, rate):
    rows = read(make_synthetic(tmp_path, **SMALL, sample_rate=rate))
    assert all(got == rate and np.abs(pcm.astype(int)).max() > 500 for _, (pcm, got) in rows)


def test_reused_while_whole_and_made_anew_when_damaged(tmp_path, monkeypatch):
    manifest = make_synthetic(tmp_path, **SMALL)
    wanted = {path: path.read_bytes() for path in manifest.parent.rglob("*.*")}
    original, calls = ajepa.data.synthetic._write, []
    monkeypatch.setattr(ajepa.data.synthetic, "_write", lambda *args: [calls.append(1), original(*args)])
    assert make_synthetic(tmp_path, **SMALL) == manifest
    assert not calls
    clip = next(path for path in wanted if path.suffix == ".wav")
    for harm in (clip.unlink, lambda: clip.write_bytes(b"RIFF"), manifest.unlink, lambda: manifest.write_bytes(b"\0")):
        harm()
        assert make_synthetic(tmp_path, **SMALL) == manifest
        assert {path: path.read_bytes() for path in manifest.parent.rglob("*.*")} == wanted
    assert len(calls) == 4
    assert [path.name for path in tmp_path.iterdir()] == [manifest.parent.name]  # no other folder is left


def test_other_arguments_make_another_set(tmp_path):
    first, second = make_synthetic(tmp_path, **SMALL), make_synthetic(tmp_path, **SMALL, seed=1)
    assert first.parent != second.parent
    assert any(not np.array_equal(a, b) for (_, (a, _)), (_, (b, _)) in zip(read(first), read(second), strict=True))


def test_an_interrupted_writer_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ajepa.data.synthetic, "_render", fail)
    with pytest.raises(KeyboardInterrupt):
        make_synthetic(tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", [{"n_clips": 3}, {"seconds": 0.1}, {"sample_rate": 4000}])
def test_arguments_out_of_range_are_named(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        make_synthetic(tmp_path, **option)


def test_the_average_spectrum_does_not_give_the_class_away(tmp_path):
    """Nearest neighbours of the pooled log spectrum score far better than chance, but far from perfectly."""
    index = build_index(make_synthetic(tmp_path, n_clips=30 * len(CLASSES)), cache_dir=tmp_path / "cache")
    pooled, labels = [], []
    for batch in iterate_once(index, sample_rate=16000, clip_samples=32000, batch_size=64):
        clips = batch.pcm.float() / batch.pcm.float().abs().amax(1, keepdim=True)
        power = torch.stft(clips, 512, 256, window=torch.hann_window(512), return_complex=True).abs().square()
        log_bands = power[:, :256].unflatten(1, (64, 4)).mean(2).add(1e-6).log()
        pooled.append(torch.cat([log_bands.mean(2), log_bands.std(2)], 1))
        labels.append(batch.labels)
    features, label = torch.cat(pooled), torch.cat(labels)
    train = torch.tensor([split == "train" for split in index.metadata["split"]])
    features = torch.nn.functional.normalize((features - features[train].mean(0)) / features[train].std(0), dim=1)
    nearest = (features[~train] @ features[train].T).topk(5).indices
    accuracy = (label[train][nearest].mode(1).values == label[~train]).float().mean().item()
    assert 2 / len(CLASSES) < accuracy < 0.6
