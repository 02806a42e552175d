"""The log of a run: loggers, metrics that were damaged, the collapse warning, curves, and the first lines."""

import importlib.util
import json
import os
import random
import re
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SMALL

from ajepa import config
from ajepa.config import PRESETS, ConfigError, MaskConfig, ObjectiveConfig
from ajepa.evaluation import plots
from ajepa.train import main
from ajepa.training import loggers
from ajepa.training.run_log import COLLAPSE_CLIPS, COLLAPSE_STEPS, RunLog, remedies
from ajepa.utils.run_folder import checkpoints, read_metrics

STAND_IN = """
import types

calls = []

class Error(Exception):
    pass

def init(**given):
    calls.append(("init", given))
    if given["project"] == "refused":
        raise Error("No API key configured.\\n Use `wandb login`")
    return types.SimpleNamespace(
        id=given["id"] or "an id of wandb",
        log=lambda scalars, step: calls.append(("log", step, scalars)),
        finish=lambda: calls.append(("finish",)),
    )
"""


def scalars_by_step(folder):
    """{step: names of the numbers that `metrics.jsonl` has for it}."""
    found = {}
    for record in read_metrics(folder):
        names = {key for key, value in record.items() if value is not None} - {"step"}
        found.setdefault(record["step"], set()).update(names)
    return found


def unfinish(folder):
    """As if the run had been killed after step 7, with its last checkpoint at step 6."""
    (folder / "summary.json").unlink()
    shutil.rmtree(checkpoints(folder / "checkpoints")[-1])


@pytest.fixture
def wandb(tmp_path_factory, monkeypatch):
    """A stand-in for wandb that notes the calls."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield importlib.import_module("wandb")
    sys.modules.pop("wandb", None)


def test_every_logger_that_can_be_named_exists():
    assert set(config.LOGGERS) == {"tensorboard", "wandb"}
    assert all(hasattr(kind, method) for kind in (loggers.TensorBoard, loggers.Wandb) for method in ("add", "close"))


def test_wandb_gets_every_scalar_and_a_resumed_run_keeps_its_id(small_run, wandb):
    argv, folder = small_run
    argv = [*argv, "--compare-steps", "0", "--log-to", "wandb"]
    assert main(argv) == 0
    (_, given), *logged, last = wandb.calls
    assert given["name"] == "run" and given["dir"] == folder and given["id"] is None and given["resume"] == "allow"
    assert given["project"] == "ajepa" and given["config"]["optim"]["steps"] == 8
    assert last == ("finish",) and not (folder / "tensorboard").exists()
    sent = {}
    for _, step, scalars in logged:
        sent.setdefault(step, set()).update(scalars)
        assert all(type(value) in (int, float) for value in scalars.values())
    assert sent == scalars_by_step(folder) and {"loss", "lr", "effective_rank"} <= sent[8]

    unfinish(folder)
    wandb.calls.clear()
    assert main([*argv, "--resume"]) == 0
    (_, given), *logged, _ = wandb.calls
    assert given["id"] == "an id of wandb" and {step for _, step, _ in logged} == {8}


def test_what_wandb_refuses_is_one_line(small_run, wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_PROJECT", "refused")
    assert main([*small_run[0], "--log-to", "wandb"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and "--log-to wandb: No API key configured. Use `wandb login`" in errors[0]


def test_wandb_offline(small_run, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed, so only its stand-in was tested")
    argv, folder = small_run
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    argv = [*argv, "--compare-steps", "0", "--log-to", "wandb"]
    assert main(argv) == 0
    unfinish(folder)
    assert main([*argv, "--resume"]) == 0
    written = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 2 and len({path.name for path in written}) == 1, "a resumed run has the same id"
    for path in written:
        assert b"grad_norm" in path.read_bytes() and b"warmup_steps" in path.read_bytes()


def test_a_missing_or_misspelt_logger_is_told_before_anything_is_written(small_run, monkeypatch, tmp_path, capsys):
    argv, folder = small_run
    assert main([*argv, "--log-to", "tensorbord"]) == 2
    assert "--log-to tensorbord: choose of tensorboard, wandb, or none" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*argv, "--log-to", "tensorboard,wandb"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    monkeypatch.undo()
    if importlib.util.find_spec("wandb") is None:
        (tmp_path / "wandb").mkdir()  # wandb leaves such a folder behind, and Python would import it
        monkeypatch.syspath_prepend(tmp_path)
        assert main([*argv, "--log-to", "wandb"]) == 2
        assert "pip install wandb" in capsys.readouterr().err
    assert not folder.exists()


def test_a_folder_name_that_tensorboard_cannot_take_is_one_line(small_run, tmp_path, capsys):
    argv, out = [*small_run[0], "--compare-steps", "0", "--steps", "3"], os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    assert main([*argv, "--out", out]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and "--log-to tensorboard" in errors[0] and "caf\\udce9" in errors[0]
    assert main([*argv, "--out", out, "--resume", "--log-to", "none"]) == 0


def test_tensorboard_shows_each_step_of_a_resumed_run_once(small_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    argv, folder = small_run
    argv = [*argv, "--compare-steps", "0"]
    assert main(argv) == 0
    unfinish(folder)
    assert main([*argv, "--resume"]) == 0
    shown = EventAccumulator(str(folder / "tensorboard")).Reload()
    for name in ("loss", "lr"):
        assert [event.step for event in shown.Scalars(name)] == [2, 4, 6, 8]
    assert [event.step for event in shown.Scalars("effective_rank")] == [4, 8]


# --- metrics that were damaged ----------------------------------------------------------------------------------------

FOREIGN = [b"[1, 2]", b"7", b"null", b'{"loss": 1.0}', b'{"step": "4", "loss": 1.0}', b'{"step": 4, "loss": "low"}',
           b'{"step": 4, "lo', b"\xff\xfe\x00", b"", b"[" * 100_000, b'{"step": ' + b"9" * 5_000 + b"}",
           b'{"step": true}', b'{"step": 4, "loss": {"a": 1}}', b'{"step": 4, "loss": 1' + b"0" * 400 + b"}",
           b'{"step": 4, "loss": Infinity, "lr": []}']  # fmt: skip


def test_lines_that_are_no_records_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [{"step": step, "loss": 1.0 / step, "knn_accuracy": None} for step in (1, 2, 3)]
    lines = [json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join([*FOREIGN, lines[0], *FOREIGN, lines[1] + b"\r", lines[2], *FOREIGN]))
    assert read_metrics(tmp_path) == records
    whole = b"\n".join(lines)
    for seed in range(200):  # damaged at random: never an exception
        damaged, rng = bytearray(whole), random.Random(seed)
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        assert all(type(record["step"]) is int for record in read_metrics(tmp_path))


def test_a_run_goes_on_with_damaged_metrics(small_run, capsys):
    argv, folder = small_run
    argv = [*argv, "--compare-steps", "0"]
    assert main(argv) == 0
    unfinish(folder)
    path = folder / "metrics.jsonl"
    path.write_bytes(b"\n".join([*FOREIGN, path.read_bytes(), *FOREIGN]))
    assert main([*argv, "--resume"]) == 0
    assert [r["step"] for r in read_metrics(folder) if "lr" in r] == [2, 4, 6, 8]
    assert len(path.read_bytes().splitlines()) == len(read_metrics(folder)), "what is no record is gone"


# --- the collapse warning ---------------------------------------------------------------------------------------------

HEALTHY = {"target_variance": 0.9, "effective_rank": 20.0, "mean_cosine": 0.9}


@pytest.fixture
def log(tmp_path):
    tiny = PRESETS["tiny"]
    log = RunLog(tmp_path, tiny, 0, torch.device("cpu"), {}, quiet=True)
    yield log
    log.close()


@pytest.mark.parametrize("sign", [{"target_variance": 0.04}, {"effective_rank": 2.9}, {"mean_cosine": 0.996}])
def test_collapse_is_judged_after_the_warm_up_and_on_enough_clips(log, sign):
    after, collapsed = max(COLLAPSE_STEPS, log.optim.warmup_steps) + 1, {**HEALTHY, **sign}
    assert log.warn_collapse(after, collapsed, COLLAPSE_CLIPS)
    assert not log.warn_collapse(after, HEALTHY, COLLAPSE_CLIPS)
    assert not log.warn_collapse(after - 1, collapsed, COLLAPSE_CLIPS)
    assert log.warn_collapse(after, collapsed, COLLAPSE_CLIPS - 1) == ("target_variance" in sign)
    log.optim = replace(log.optim, warmup_steps=5_000)
    assert not log.warn_collapse(5_000, collapsed, 1_000) and log.warn_collapse(5_001, collapsed, 1_000)


def test_random_embeddings_of_enough_clips_pass(log):
    """Few random clips have an effective rank below the threshold, which therefore must not judge them."""
    from ajepa.evaluation.features import effective_rank, mean_cosine

    def values(clips):
        x = torch.randn(clips, 128)
        return {**HEALTHY, "effective_rank": effective_rank(x), "mean_cosine": mean_cosine(x)}

    assert values(3)["effective_rank"] < 3 and not log.warn_collapse(10**6, values(3), 3)
    assert not log.warn_collapse(10**6, values(COLLAPSE_CLIPS), COLLAPSE_CLIPS)


MICRO = ["--predictor-width", "16", "--predictor-heads", "2", "--predictor-depth", "1", "--target-layers", "1"]


@pytest.mark.parametrize(
    ("flags", "collapses"),
    [(["--eval-clips", "4"], False), (["--ema-start", "0", "--ema-end", "0", "--lr", "0.01"], True)],
)
def test_a_healthy_tiny_run_is_not_warned_and_a_collapsed_one_is(small_run, capsys, flags, collapses):
    last = COLLAPSE_STEPS + 20
    every = ["--steps", str(last), "--log-every", "60", "--watch-every", "20", "--checkpoint-every", str(last)]
    assert main([*small_run[0], *every, *MICRO, *flags, "--objective", "masked", "--compare-steps", "0"]) == 0
    said = capsys.readouterr().out
    watch = read_metrics(small_run[1])[-1]
    assert ("WARNING: the features are collapsing" in said) == collapses, watch


@pytest.mark.parametrize(
    ("objective", "mask", "expected"),
    [
        ({"objective": "masked"}, "random", {"--target-layers", "--ema-start", "--mask-ratio", "--lr"}),
        ({"objective": "masked"}, "block", {"--target-layers", "--ema-start", "--block-scale", "--lr"}),
        ({"objective": "masked"}, "time-frequency", {"--target-layers", "--ema-start", "--tf-scale", "--lr"}),
        ({"objective": "masked", "teacher": "runs/a"}, "random", {"--mask-ratio", "--lr"}),
        ({"objective": "clip"}, "random", {"--sigreg-weight", "--lr"}),
        ({"objective": "clip", "clip_loss": "byol"}, "random", {"--ema-start", "--lr"}),
        ({"objective": "both"}, "random",
         {"--target-layers", "--ema-start", "--sigreg-weight", "--mask-ratio", "--lr"}),
        ({"objective": "both", "clip_loss": "utterance"}, "inverse-block",
         {"--target-layers", "--ema-start", "--mask-ratio", "--lr"}),
    ],
)  # fmt: skip
def test_remedies_fit_the_objective(objective, mask, expected):
    cfg = replace(PRESETS["audio-jepa"], objective=ObjectiveConfig(**objective), mask=MaskConfig(mask=mask))
    assert set(re.findall(r"--[\w-]+", remedies(cfg))) == expected
    deep = replace(cfg, model=replace(cfg.model, target_layers=12))
    assert "--target-layers" not in remedies(deep), "no more than the encoder has"


# --- the first lines and the curves -----------------------------------------------------------------------------------


def test_the_first_lines_tell_the_true_share_of_the_masks_and_the_threads(small_run, capsys):
    argv = [*small_run[0], "--mask-ratio", "0.95", "0.95", "--steps", "3", "--compare-steps", "0"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert "random masks of 88% (--min-context 2 of 16 patches limits --mask-ratio 0.95 0.95)" in said
    assert f"(threads: {torch.get_num_threads()}, decoding threads: 1)" in said


def test_curves_are_whole_and_named_after_the_run(tmp_path, monkeypatch):
    """Panels of all keys; a name with "$", which would be a formula, one without a glyph, and one that is no UTF-8."""
    from matplotlib.figure import Figure

    records = [{"step": step, "loss": 1.0, "lr": 1e-3, "grad_norm": 2.0, "masked": 0.5} for step in range(1, 100)]
    records.append({"step": 100, "target_variance": 0.9, "prediction_variance": None, "knn_accuracy": 0.5})
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    for name in ("run", "a $\\frac$ b", "x" * 80, b"caf\xe9".decode("utf-8", "surrogateescape")):
        plots.plot_curves(records, {"untrained encoder": 0.4, "pooled log-mel": None}, name, tmp_path / "c.png")
        assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
        figure = figures[-1]
        assert figure.get_suptitle() == plots.printable(name)
        drawn, whole = figure.get_tightbbox(), figure.bbox_inches.padded(0.01)
        assert (drawn.min >= whole.min).all() and (drawn.max <= whole.max).all()
    panels = {axis.get_title(): axis for axis in figures[0].axes}
    assert panels.keys() == plots.CURVES.keys()
    lines = {title: [line.get_label() for line in axis.lines] for title, axis in panels.items()}
    assert lines["Loss"] == ["training loss", "masked patches"] and lines["Learning rate"] == ["learning rate"]
    assert lines["kNN accuracy"] == ["this run", "untrained encoder"] and not lines["Effective rank"]
    assert panels["Effective rank"].texts[0].get_text() == "not measured"
    for axis in figures[0].axes:
        if legend := axis.get_legend():
            assert legend.get_window_extent().x0 >= axis.get_window_extent().x1 - 1, "the legend covers the curves"


def test_classes_with_odd_names_are_all_in_the_legend(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    classes = ["_background_noise_", "a$b$c", "yes"]
    x, labels = torch.randn(30, 4), torch.arange(30) % 3
    plots.plot_embeddings(x, labels, classes, ("pca",), tmp_path / "e.png")
    assert [text.get_text().strip() for text in figures[0].legends[0].get_texts()] == classes
    plots.plot_confusion(torch.eye(3).numpy(), classes, "a $title", tmp_path / "f.png")
    assert (tmp_path / "f.png").exists()


def test_an_unknown_logger_is_refused_by_the_library_as_well():
    with pytest.raises(ConfigError, match="--log-to comet: choose of"):
        config.preset("tiny", log_to="comet")
    assert config.preset("tiny", log_to=" tensorboard, tensorboard,none").watch.loggers == ("tensorboard",)


def test_small_is_small():
    assert int(SMALL[SMALL.index("--steps") + 1]) < COLLAPSE_STEPS  # the runs of other tests are never warned
