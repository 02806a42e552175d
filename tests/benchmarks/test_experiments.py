"""The questions of experiments/: every variant is valid, none is run twice, and the table lists what was not run."""

import contextlib
import csv
import json
import os
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from ajepa import config
from ajepa.model.masks import MaskSampler

REAL = os.environ.get("AJEPA_TEST_AUDIO")
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


@pytest.mark.parametrize("scale", ["cpu", "speech", "gpu"])
def test_every_variant_is_valid_and_differs_from_its_neighbours(experiments, scale):
    args = experiments.Arguments("all", scale=scale)
    assert {*experiments.QUESTIONS, "all"} == set(get_args(experiments.Name))
    for name, question in experiments.QUESTIONS.items():
        cfgs = experiments.variants(args, name)
        assert len(cfgs) == len(question.variants[scale]), name  # no two of one label
        assert question.expected.endswith(".") and "logistic" in question.heads
        for cfg in cfgs.values():
            config.validate(experiments.override(cfg, {"objective.teacher": None}))
            assert experiments.fingerprints(args) == (None, None)
        assert len({experiments.key(cfg, "", args) for cfg in cfgs.values()}) == len(cfgs), name
    # Both have the same number of visible patches, and the pull of SIGReg is the same at either batch size.
    two, four = experiments.variants(args, "views").values()
    assert [two.objective.views, four.objective.views] == [2, 4]
    assert two.objective.views * (1 - two.mask.mask_ratio[0]) == four.objective.views * (1 - four.mask.mask_ratio[0])
    assert 4 < two.objective.sigreg_weight * two.optim.batch_size < 6


@pytest.mark.parametrize("question", ["masks", "ratio", "views"])
def test_labels_say_which_share_the_drawn_masks_hide(experiments, question):
    for label, cfg in experiments.variants(experiments.Arguments(question), question).items():
        sampler, N = MaskSampler(cfg.mask, cfg.front_end.grid, seed=9), cfg.front_end.n_patches
        shares = [100 - 100 * len(m.context) / (N * m.clips) for m in (sampler(step, 200, 16) for step in range(200))]
        said = [int(end) for end in experiments.masked_share(cfg).rstrip("%").split("-")]
        if len(said) == 2:
            assert abs(min(shares) - said[0]) < 1 and abs(max(shares) - said[1]) < 1
        else:
            assert abs(statistics.mean(shares) - said[0]) < 1.5, label
        assert question != "ratio" or label == experiments.masked_share(cfg)


def test_labels_respect_the_smallest_context(experiments):
    cfg = experiments.base(experiments.Arguments("ratio"))
    assert cfg.front_end.n_patches == 64 and cfg.mask.min_context == 10
    cfg = experiments.override(cfg, {"mask.mask": "random", "mask.mask_ratio": (0.8, 0.9)})
    assert experiments.masked_share(cfg) == "80-84%"
    assert experiments.masked_share(experiments.override(cfg, {"mask.mask": "inverse-block"})) == "84%"
    assert experiments.masked_share(experiments.override(cfg, {"mask.mask_ratio": (0.5, 0.5)})) == "50%"


def test_several_masks_cost_what_one_does(experiments):
    args = experiments.Arguments("multimask")
    cfgs = experiments.variants(args, "multimask")
    flops = [experiments.step_flops(cfg) * cfg.optim.steps for cfg in cfgs.values()]
    assert [cfg.mask.masks_per_clip for cfg in cfgs.values()] == [1, 2, 4, 8]
    assert max(flops) / min(flops) < 1.02 and cfgs["8"].optim.batch_size < cfgs["1"].optim.batch_size / 3
    patches = experiments.variants(experiments.Arguments("patch"), "patch")
    flops = [experiments.step_flops(cfg) * cfg.optim.steps for cfg in patches.values()]
    assert max(flops) / min(flops) < 1.02 and patches["8 x 4"].front_end.n_patches == 128


SMALL = {"optim.batch_size": 4, "front_end.n_frames": 16, "front_end.hop_length": 480, "data.clip_seconds": 0.5,
         "mask.min_context": 2, "watch.pooling": "concat+std"}  # fmt: skip


def results(folder, middle=""):
    """The only result file, and its stem."""
    (store,) = folder.glob(f"cpu-*{middle}.json")
    return json.loads(store.read_text()), store.with_suffix("")


def test_a_question_is_answered_once(experiments, manifest, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(experiments.SCALES, "cpu", ("tiny", SMALL))
    monkeypatch.setattr(experiments, "QUESTIONS", {q: experiments.QUESTIONS[q] for q in ("masks", "positions")})
    monkeypatch.setattr(experiments.train, "draw", lambda *args: None)  # plots take longer than these small runs
    argv = ["positions", "--data", str(manifest), "--label", "label", "--test", "fold=3", "--steps", "4"]
    argv += ["--seeds", "1", "--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert experiments.main(argv) == 0, capsys.readouterr().err
    done, stem = results(tmp_path / "results")
    assert re.fullmatch("cpu-set-[0-9a-f]{8}-fold3-4steps", stem.name)
    assert len(done) == 2 and {r["config"]["model"]["positions"] for r in done.values()} == {"sincos", "rotary"}
    assert all(r["seen_in_pretraining"] == [0] for r in done.values())  # pretraining never sees the scored fold
    assert all(r["config"]["data"]["where"] == "fold!=3" and 0 < r["core_minutes"] < 5 for r in done.values())
    assert str(tmp_path) not in json.dumps(done)
    table = stem.with_suffix(".md").read_text()
    section = table.split("## positions")[1].split("##")[0]
    rows = {line.split(" | ")[0].strip("| "): line for line in section.splitlines() if line.startswith("| ")}
    assert {"sincos", "rotary", "pooled log-mel", "untrained (sincos)", "untrained (rotary)"} <= rows.keys()
    (rotary,) = (r for r in done.values() if r["config"]["model"]["positions"] == "rotary")
    cells = dict(zip(rows["variant"].split(" | "), rows["rotary"].split(" | "), strict=True))
    for pooling in ("concat+std", "mean"):
        for head in ("knn", "linear", "logistic"):
            score = rotary["scores"][pooling]["pretrained"][head]
            assert cells[f"{head}, {pooling}"] == f"{100 * score:.1f}"
    assert cells["seeds"] == "1" and cells["core-minutes |"] == f"{rotary['core_minutes']:.2f} |"
    assert experiments.QUESTIONS["positions"].expected in section and "Came out (logistic, concat+std" in section
    assert "Not run: no run yet" in table.split("## masks")[1].split("##")[0]  # the base run alone is no comparison
    assert Path(f"{stem}-positions.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(experiments, "run", None)  # everything is already done
    assert experiments.main(argv) == 0
    assert results(tmp_path / "results")[0] == done


def test_a_frozen_teacher_is_the_run_with_an_ema_teacher(experiments, manifest, tmp_path, monkeypatch):
    monkeypatch.setitem(experiments.SCALES, "cpu", ("tiny", SMALL))
    args = experiments.Arguments("teacher", data=str(manifest), test="fold=3", runs=str(tmp_path), steps=4)
    cfgs = experiments.variants(args, "teacher")
    trained = []

    def fake_train(cfg):
        trained.append(cfg)
        cfg.folder.mkdir()
        (cfg.folder / "summary.json").write_text("{}")

    monkeypatch.setattr(experiments.train, "run", fake_train)
    monkeypatch.setattr(experiments.config, "validate", lambda cfg: None)  # the fake teacher has no weights
    frozen = experiments.pretrain(cfgs["frozen trained"], "fold=3", args)
    ema = experiments.pretrain(cfgs["ema"], "fold=3", args)
    assert [cfg.folder for cfg in trained] == [ema, frozen]
    assert [cfg.objective.teacher for cfg in trained] == [None, str(ema)]


def fake_run(cfg, test, args, heads):
    """Stands in for `run`: the score of fold n is n / 10."""
    score = int(test[-1]) / 10 if test else 0.7
    scores = {p: {name: dict.fromkeys(heads, score) for name in FEATURES} for p in ("mean", "concat+std")}
    return {"test": test, "scores": scores, "target_variance": None, "minutes": 1.0, "core_minutes": 2.0,
            "heads": heads, "config": {"data": {"where": cfg.data.where}}}  # fmt: skip


@pytest.fixture
def faked(experiments, monkeypatch):
    monkeypatch.setattr(experiments, "run", fake_run)
    monkeypatch.setattr(experiments, "plot", lambda *args: None)
    chosen = ("probes", "masks", "augmentation")
    monkeypatch.setattr(experiments, "QUESTIONS", {q: experiments.QUESTIONS[q] for q in chosen})
    return experiments


def test_each_fold_is_kept_from_a_pretraining_of_its_own(faked, manifest, tmp_path):
    argv = ["probes", "--data", str(manifest), "--folds", "fold", "--seeds", "2", "--results", str(tmp_path)]
    assert faked.main(argv) == 0
    done, stem = results(tmp_path, "-by-fold")
    assert sorted((r["test"], r["config"]["data"]["where"]) for r in done.values()) == sorted(
        2 * [(f"fold={i}", f"fold!={i}") for i in range(4)]
    )
    table = stem.with_suffix(".md").read_text()
    assert "| base | 2 | 16 | 50-70% | 15.0 +- 0.0 |" in table and str(manifest.parent.parent) not in table
    assert "| 15.0 +- 0.0 | - | 1.0 +- 0.0 | 2.00 +- 0.00 |" in table
    assert all(f"| base | fold={i} | {i}0.0 / {i}0.0 / {i}0.0 |" in table for i in range(1, 4))
    argv += ["--score", str(manifest), "--score-label", "label"]
    assert faked.main(argv) == 0  # one pretraining on all of --data
    done, stem = results(tmp_path, "-of-set-*")
    assert [r["config"]["data"]["where"] for r in done.values()] == [None, None]
    assert "| base | 2 | 16 | 50-70% | 70.0 +- 0.0 |" in stem.with_suffix(".md").read_text()
    assert faked.main([*argv[:-6], "--folds", "nothing"]) == 2


@pytest.mark.parametrize("test", ["fold=3", "fold!=3", "fold=1,2"])
def test_the_rows_that_are_scored_are_those_that_are_not_pretrained_on(experiments, manifest, test):
    args = experiments.Arguments("probes", data=str(manifest), test=test)
    ((cfg, scored),) = experiments.trials(experiments.base(args), args)
    whole = experiments.recordings(str(manifest), None)
    trained, tested = whole.rows(cfg.data.where), whole.rows(scored)
    assert trained and tested and sorted(trained + tested) == list(range(len(whole)))


@pytest.mark.skipif(not REAL, reason="AJEPA_TEST_AUDIO names no folder of recordings")
def test_a_fold_of_esc50_is_kept_from_pretraining(experiments):
    args = experiments.Arguments("masks", data=f"{REAL}/esc50/meta.csv", label="category", test="fold=4")
    ((cfg, scored),) = experiments.trials(experiments.base(args), args)
    whole = experiments.recordings(args.data, args.label)
    assert len(whole.label_names) == 50 and scored == "fold=4"
    assert set(whole.filter(cfg.data.where).metadata["fold"]) == {"1", "2", "3"}
    assert re.fullmatch("cpu-esc50-[0-9a-f]{8}-fold4", experiments.result_name(args))


def test_another_set_of_the_same_name_has_results_of_its_own(faked, manifest, tmp_path):
    folder = tmp_path / "results"

    def ask(path):
        argv = ["masks", "--data", str(path), "--test", "fold=3", "--seeds", "1", "--results", str(folder)]
        assert faked.main(argv) == 0
        return {store.stem: set(json.loads(store.read_text())) for store in folder.glob("*.json")}

    first = ask(manifest)
    assert len(first) == 1
    lines = manifest.read_text().splitlines()
    changes = {
        "fewer": lines[:-1],
        "labels": [lines[0], *(line.replace(",", ",other ", 1) for line in lines[1:])],
        "folds": [lines[0], *(line[:-1] + str(3 - int(line[-1])) for line in lines[1:])],
    }
    stores = first
    for name, changed in changes.items():
        other = manifest.with_name(f"{name}.csv")
        other.write_text("\n".join(changed) + "\n")
        before, stores = stores, ask(other)
        assert len(stores) == len(before) + 1 and before.items() <= stores.items(), name
    keys = [k for found in stores.values() for k in found]
    assert len(keys) == len(set(keys)) == 5 * len(stores)

    copy = tmp_path / "elsewhere" / "set"  # the same recordings at another place and of another time
    moved = [lines[0]]
    for line in lines[1:]:
        file, label, fold = line.split(",")
        place = copy / label / Path(file).name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
        os.utime(place, (1, 1))
        moved.append(f"{label}/{place.name},{label},{fold}")
    (copy / "list.csv").write_text("\n".join(moved) + "\n")
    faked.run = None
    assert ask(copy / "list.csv") == stores  # all is answered


def test_a_run_is_probed_with_the_heads_of_all_questions_about_it(faked, manifest, tmp_path):
    argv = ["--data", str(manifest), "--test", "fold=3", "--seeds", "1", "--results", str(tmp_path)]
    masks = faked.plan(faked.Arguments("masks", data=str(manifest), test="fold=3", seeds=1), {})
    attended = {k for k, (*_, heads) in masks.items() if "attentive" in heads}
    assert faked.main(["probes", *argv]) == 0
    done, _ = results(tmp_path)
    (k,) = done
    assert attended == masks.keys() & done.keys()
    assert done[k]["heads"] == ["knn", "linear", "logistic", "attentive"]
    probes = faked.Arguments("probes", data=str(manifest), test="fold=3", seeds=1)
    assert faked.plan(probes, done) == {}
    del done[k]["scores"]["concat+std"]["pretrained"]["attentive"]
    assert list(faked.plan(probes, done)) == [k]  # a head that was not asked for when the run was probed


def test_core_seconds_add_up_over_interruptions_and_are_unknown_after_a_kill(experiments, tmp_path):
    folder, file = tmp_path / "run", tmp_path / "run" / "core_seconds.json"

    def work():
        start = time.process_time()
        while time.process_time() < start + 0.05:
            pass

    with contextlib.suppress(KeyboardInterrupt), experiments.core_seconds(folder):
        folder.mkdir()
        work()
        raise KeyboardInterrupt
    first = json.loads(file.read_text())
    with experiments.core_seconds(folder):
        assert not file.exists()
        work()
    assert 0.05 <= first < json.loads(file.read_text()) - 0.05
    file.unlink()  # as a kill leaves it
    with experiments.core_seconds(folder):
        work()
    assert json.loads(file.read_text()) is None
    assert experiments.spread([1.0, None], 1) == "-"


def test_spread_is_the_sample_deviation(experiments):
    assert experiments.spread([1.0, 2.0, 4.0], 1) == "2.3 +- 1.5" and experiments.spread([3.25], 2) == "3.25"


def test_wrong_input_is_named(experiments, manifest, tmp_path, capsys):
    assert experiments.main(["masks", "--data", str(manifest), "--results", str(tmp_path)]) == 2
    assert "--test" in capsys.readouterr().err
