"""The questions of experiments/: every variant is valid, none is run twice, and the table lists what was not run."""

import csv
import json
import sys
from pathlib import Path

import pytest

from ajepa import config

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FEATURES = ("pooled log-mel", "untrained", "pretrained")


@pytest.fixture
def experiments(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    for name in ("run", "questions"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    yield run
    for name in ("run", "questions"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def manifest(tones, tmp_path):
    path = tmp_path / "set" / "meta.csv"
    path.parent.mkdir()
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file", "label", "fold"])
        rows.writerows([wav, wav.parent.name, i % 4] for i, wav in enumerate(sorted(tones.rglob("*.wav"))))
    return path


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_every_variant_is_valid_and_differs_from_its_neighbours(experiments, scale):
    args = experiments.Arguments("all", scale=scale)
    for name, question in experiments.QUESTIONS.items():
        cfgs = {v: experiments.override(experiments.base(args), c) for v, c in question.variants[scale].items()}
        for cfg in cfgs.values():
            config.validate(cfg)
        assert len({experiments.key(cfg, "", args) for cfg in cfgs.values()}) == len(cfgs), name
    patches = experiments.variants(args, "patch").values()
    assert len({cfg.front_end.patch_dim for cfg in patches}) == len({cfg.front_end.n_patches for cfg in patches}) == 1


def test_several_masks_cost_what_one_does(experiments):
    args = experiments.Arguments("multimask")
    cfgs = experiments.variants(args, "multimask")
    flops = [experiments.step_flops(cfg) * cfg.optim.steps for cfg in cfgs.values()]
    assert [cfg.mask.masks_per_clip for cfg in cfgs.values()] == [1, 2, 4, 8]
    assert max(flops) / min(flops) < 1.02 and cfgs["8"].optim.batch_size < cfgs["1"].optim.batch_size / 3


def test_a_question_is_answered_once(experiments, manifest, tmp_path, monkeypatch, capsys):
    small = {"optim.batch_size": 4, "front_end.n_frames": 16, "front_end.hop_length": 480, "data.clip_seconds": 0.5,
             "mask.min_context": 2}  # fmt: skip
    monkeypatch.setitem(experiments.SCALES, "cpu", ("tiny", small))
    monkeypatch.setattr(experiments, "QUESTIONS", {q: experiments.QUESTIONS[q] for q in ("masks", "positions")})
    monkeypatch.setattr(experiments.train, "draw", lambda *args: None)  # plots take longer than these small runs
    argv = ["positions", "--data", str(manifest), "--label", "label", "--test", "fold=3", "--steps", "4"]
    argv += ["--seeds", "1", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert experiments.main(argv) == 0, capsys.readouterr().err
    stem = tmp_path / "results" / "cpu-set-fold3-4steps"
    done = json.loads(stem.with_suffix(".json").read_text())
    assert len(done) == 2 and {r["config"]["model"]["positions"] for r in done.values()} == {"sincos", "rotary"}
    assert all(r["seen_in_pretraining"] == [0] for r in done.values())  # pretraining never sees the scored fold
    table = stem.with_suffix(".md").read_text()
    section = table.split("## positions")[1].split("##")[0]
    rows = {line.split(" | ")[0].strip("| "): line for line in section.splitlines() if line.startswith("| ")}
    assert {"sincos", "rotary", "pooled log-mel", "untrained (sincos)", "untrained (rotary)"} <= rows.keys()
    (rotary,) = (r["scores"] for r in done.values() if r["config"]["model"]["positions"] == "rotary")
    assert f"| 1 | 4 | {100 * rotary['pretrained']['knn']:.1f} |" in rows["rotary"]
    assert "Not run: no run yet" in table.split("## masks")[1].split("##")[0]  # the base run alone is no comparison
    assert Path(f"{stem}-positions.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(experiments, "run", None)  # everything is already done
    assert experiments.main(argv) == 0
    assert json.loads(stem.with_suffix(".json").read_text()) == done


def fake_run(cfg, test, args):
    """Stands in for `run`: the score of fold n is n / 10."""
    score = int(test[-1]) / 10 if test else 0.7
    scores = {name: dict.fromkeys(("knn", "linear", "attentive", "logistic"), score) for name in FEATURES}
    return {"test": test, "scores": scores, "target_variance": 1.0, "clips_per_second": 60.0,
            "config": {"optim": {"steps": 60, "batch_size": 60}, "data": {"where": cfg.data.where}}}  # fmt: skip


def test_each_fold_is_kept_from_a_pretraining_of_its_own(experiments, manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "run", fake_run)
    argv = ["probes", "--data", str(manifest), "--folds", "fold", "--seeds", "2", "--results", str(tmp_path)]
    assert experiments.main(argv) == 0
    done = json.loads((tmp_path / "cpu-set-by-fold.json").read_text()).values()
    assert sorted((r["test"], r["config"]["data"]["where"]) for r in done) == sorted(
        2 * [(f"fold={i}", f"fold!={i}") for i in range(4)]
    )
    table = (tmp_path / "cpu-set-by-fold.md").read_text()
    assert "| base | 2 | 16 | 15.0 +- 0.0 |" in table and str(manifest.parent.parent) not in table
    argv += ["--score", str(manifest), "--score-label", "label"]
    assert experiments.main(argv) == 0  # one pretraining on all of --data
    done = json.loads((tmp_path / "cpu-set-by-fold-of-set.json").read_text()).values()
    assert [r["config"]["data"]["where"] for r in done] == [None, None]
    assert "| base | 2 | 16 | 70.0 +- 0.0 |" in (tmp_path / "cpu-set-by-fold-of-set.md").read_text()
    assert experiments.main([*argv[:-6], "--folds", "nothing"]) == 2


def test_spread_is_the_sample_deviation(experiments):
    assert experiments.spread([1.0, 2.0, 4.0], 1) == "2.3 +- 1.5" and experiments.spread([3.25], 2) == "3.25"


def test_wrong_input_is_named(experiments, manifest, tmp_path, capsys):
    assert experiments.main(["masks", "--data", str(manifest), "--results", str(tmp_path)]) == 2
    assert "--test" in capsys.readouterr().err
