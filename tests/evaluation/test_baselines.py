"""Scores of features that do not train are computed once for the same clips and settings."""

import torch

from ajepa.data.index import cache_root
from ajepa.evaluation.baselines import kept_scores
from ajepa.evaluation.features import Evaluation


def clips(seed: int) -> Evaluation:
    pcm = torch.randint(-99, 99, (4, 50), dtype=torch.int16, generator=torch.Generator().manual_seed(seed))
    lengths, labels = torch.full((4,), 50, dtype=torch.int32), torch.tensor([0, 1, 0, 1])
    return Evaluation(pcm, lengths, labels, torch.tensor([False, False, True, True]), torch.arange(4))


def test_scores_are_kept_for_the_same_clips_and_settings_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path))
    calls = []

    def compute():
        calls.append(1)
        return {"knn_accuracy": 0.1 + len(calls) / 3, "none": None}

    first = kept_scores(clips(0), ["weights", 1], compute)
    assert kept_scores(clips(0), ["weights", 1], compute) == first and len(calls) == 1
    assert kept_scores(clips(1), ["weights", 1], compute) != first and len(calls) == 2
    assert kept_scores(clips(0), ["weights", 2], compute) != first and len(calls) == 3
    for path in (cache_root() / "baselines").iterdir():  # a damaged file is not believed
        path.write_bytes(path.read_bytes().replace(b"0.4", b"0.5"))
    assert kept_scores(clips(0), ["weights", 1], compute)["knn_accuracy"] == 0.1 + 4 / 3
    assert "computed again" in capsys.readouterr().err
