"""`python experiments/run.py masks --scale cpu --seeds 3`: answer a question by pretraining and probing its variants.

Every variant is pretrained with every seed, and every run is probed. A finished run is never repeated, and a killed run
is resumed. The results are `results/<scale>-<data>.json` (the scores of every run), `.md` (the tables) and
`-<question>.png` (the plots).
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
import tyro
from questions import QUESTIONS, SCALES

from ajepa import config, probe, train
from ajepa.config import Config, ConfigError
from ajepa.data.index import DataError, build_index, cache_root
from ajepa.data.synthetic import make_synthetic
from ajepa.model.masks import MaskSampler
from ajepa.training.engine import Engine
from ajepa.utils.atomic_files import write_atomic

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEATURES = {probe.LOG_MEL: "pooled log-mel", probe.UNTRAINED: "untrained", probe.TRAINED: "pretrained"}
Name = Literal["masks", "ratio", "ema", "probes", "positions", "patch", "multimask", "all"]


@dataclass(frozen=True)
class Arguments:
    """Answer a question by pretraining and probing its variants."""

    question: tyro.conf.Positional[Name]
    """The question of questions.py to answer, or "all"."""
    scale: Literal["cpu", "gpu"] = "cpu"
    """Size of the runs: the tiny preset on a CPU, or the audio-jepa preset on a GPU."""
    seeds: int = 3
    """Number of seeds, each of which pretrains every variant once."""
    data: str | None = None
    """Labelled recordings to pretrain on and to probe; by default the synthetic set."""
    label: str | None = None
    """Column of --data that holds the label; by default one called label, target, category or class."""
    test: str | None = None
    """Rows for scoring, such as "fold=4"; no run is pretrained on them. The alternative is --folds."""
    folds: str | None = None
    """Column whose values are the folds: each is scored by an encoder not pretrained on it; the mean counts."""
    score: str | None = None
    """Other recordings to score instead, by cross-validation over --folds; all of --data is pretrained on."""
    score_label: str | None = None
    """Column of --score that holds the label; by default one called label, target, category or class."""
    steps: int | None = None
    """Number of pretraining steps, instead of that of the scale."""
    report: bool = False
    """Run nothing, and write tables and plots of the existing results."""
    runs: str = "runs/experiments"
    """Folder for the run folders, which may be deleted afterwards."""
    results: str = str(Path(__file__).parent / "results")
    """Folder for the scores, the tables and the plots."""


def base(args: Arguments) -> Config:
    """Return the configuration of the scale. `trials` decides which rows of --data are left out."""
    preset, overrides = SCALES[args.scale]
    cfg = override(config.PRESETS[preset], {**overrides, "watch.compare_steps": 0, "watch.keep": 1})
    if args.steps is not None:
        cfg = override(cfg, {"optim.steps": args.steps, "optim.warmup_steps": max(1, args.steps // 8)})
    often = max(1, cfg.optim.steps // 4)
    cfg = override(cfg, {"watch.watch_every": cfg.optim.steps, "watch.checkpoint_every": often})
    return override(cfg, {"data.data": args.data, "data.label": args.label}) if args.data else cfg


def trials(cfg: Config, args: Arguments) -> list[tuple[Config, str]]:
    """Return the pretraining runs of one variant and seed, each with the rows that it is scored on."""
    if args.data is None:
        return [(cfg, "split=test")]
    if args.score is not None:
        return [(override(cfg, {"watch.eval_clips": 64}), "")]
    tests = [args.test] if args.test else [f"{args.folds}={value}" for value in fold_values(args.data, args.folds)]
    return [(override(cfg, {"data.where": test.replace("=", "!=", 1), "watch.eval_clips": 64}), test) for test in tests]


@functools.cache
def fold_values(data: str, column: str) -> list[str]:
    index = build_index(data)
    if column not in index.metadata:
        raise DataError(f"--folds {column}: no such column; the columns are {', '.join(index.metadata) or 'none'}")
    return sorted(set(index.metadata[column]))


def override(cfg: Config, changes: dict[str, Any]) -> Config:
    """Return the configuration with each "section.field" of `changes` set."""
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        inner = dataclasses.replace(getattr(cfg, section), **{name: value}) if section else value
        cfg = dataclasses.replace(cfg, **{section or name: inner})
    return cfg


def variants(args: Arguments, name: str) -> dict[str, Config]:
    """Return the configuration of each variant of a question, without a seed."""
    question, start = QUESTIONS[name], base(args)
    cfgs = {variant: override(start, changes) for variant, changes in question.variants[args.scale].items()}
    if question.equal_flops:
        wanted = step_flops(start)
        cfgs = {v: equal_work(cfg, wanted) for v, cfg in cfgs.items()}
    return cfgs


def step_flops(cfg: Config) -> float:
    masks = MaskSampler(dataclasses.replace(cfg.mask, mask_ratio=(sum(cfg.mask.mask_ratio) / 2,) * 2),
                        cfg.front_end.grid)(0, 1, cfg.optim.batch_size)  # fmt: skip
    return _engine(cfg.model, cfg.front_end).flops(masks)


@functools.cache
def _engine(model, front_end) -> Engine:
    return Engine(Config(model=model, front_end=front_end, impl="reference"), torch.device("cpu"))


def equal_work(cfg: Config, flops: float) -> Config:
    """Set the batch size so that a step costs about `flops`, and the number of steps to make up for the rounding."""
    batch = max(1, round(cfg.optim.batch_size * flops / step_flops(cfg)))
    cut = override(cfg, {"optim.batch_size": batch})
    return override(cut, {"optim.steps": max(1, round(cfg.optim.steps * flops / step_flops(cut)))})


def key(cfg: Config, test: str, args: Arguments) -> str:
    """Return a hash of everything that the result of a run depends on."""
    inputs = named(cfg), test, args.score and set_name(args.score), args.folds if args.score else None
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def named(cfg: Config) -> dict[str, Any]:
    """Return the configuration with the name of its recordings in place of their path."""
    data = cfg.data.data and set_name(cfg.data.data)
    fields = dataclasses.asdict(override(cfg, {"out": None, "data.data": data}))
    del fields["data"]["decoder"]  # all decoders give the same samples
    if cfg.data.float_scale == 1:
        del fields["data"]["float_scale"]
    return fields


def set_name(data: str) -> str:
    """Return the name of the folder `data`, or of the folder that holds the manifest `data`."""
    path = Path(data).resolve()
    return (path if path.is_dir() else path.parent).name


def run(cfg: Config, test: str, args: Arguments) -> dict[str, Any]:
    """Pretrain (or resume) and probe one configuration."""
    folder = Path(args.runs) / key(cfg, test, args)
    cfg = dataclasses.replace(cfg, out=str(folder), resume=True)
    config.validate(cfg)
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet):
        if not (folder / "summary.json").exists():
            train.run(cfg)
    start = time.perf_counter()
    if args.score:
        rows = {"data": args.score, "folds": args.folds, "label": args.score_label}
    else:
        rows = {"data": args.data or synthetic(cfg), "test": test, "label": args.label}
    heads = tuple(dict.fromkeys(head for q in QUESTIONS.values() for head in q.heads))
    scored = probe.probe(probe.Arguments(str(folder), **rows, heads=heads, map="none"))
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "test": test,
        "scores": {FEATURES[name]: {head: s["mean"] for head, s in heads.items()}
                   for name, heads in scored["scores"].items()},
        "seen_in_pretraining": [fold["seen_in_pretraining"] for fold in scored["folds"]],
        "target_variance": summary["target_variance"],
        "effective_rank": summary["effective_rank"],
        "clips_per_second": summary["clips_per_second"],
        "probe_seconds": time.perf_counter() - start,
        "device": summary["device"],
        "commit": commit(),
        "torch": torch.__version__,
        "config": named(cfg),
    }  # fmt: skip


def mean(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one record for the trials of a variant and seed, the mean over the folds."""

    def average(get) -> float:
        return statistics.mean(map(get, records))

    return {
        "scores": {f: {h: average(lambda r, f=f, h=h: r["scores"][f][h]) for h in heads}
                   for f, heads in records[0]["scores"].items()},
        "target_variance": average(lambda r: r["target_variance"]),
        "minutes": average(pretraining_minutes),
    }  # fmt: skip


def synthetic(cfg: Config) -> str:
    """Return the synthetic set that the run was trained on. `open_corpus` makes the same set."""
    seconds = cfg.data.clip_seconds
    return str(make_synthetic(cache_root() / "synthetic", n_clips=max(220, round(4_000 / seconds)),
                              seconds=max(0.5, seconds), sample_rate=cfg.front_end.sample_rate))  # fmt: skip


def commit() -> str:
    got = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return got.stdout.strip() or "unknown"


def report(args: Arguments, done: dict[str, dict], stem: Path) -> str:
    """Return all questions of a scale as markdown. It names questions and seeds that were not run."""
    preset, _ = SCALES[args.scale]
    start = base(args)
    lines = [
        f"# {args.scale} scale on {set_name(args.data) if args.data else 'the synthetic set'}",
        "",
        f"Preset {preset}, {start.optim.steps:,} steps of {start.optim.batch_size} clips, {start.watch.pooling} over "
        f"frequency. Accuracy in % {scored_on(args)}: mean +- sample deviation over the seeds. `knn`, `linear` and "
        "`attentive` are X-ARES's heads of ten epochs, `logistic` is scikit-learn's. Written by `python "
        "experiments/run.py`.",
    ]
    for name, question in QUESTIONS.items():
        cfgs = variants(args, name)
        found = {
            v: [r for seed in range(args.seeds) if (r := finished(override(c, {"seed": seed}), args, done))]
            for v, c in cfgs.items()
        }
        lines += ["", f"## {name}: {question.title}", ""]
        if sum(map(bool, found.values())) < min(2, len(found)):  # the base run does not compare anything
            why = "no run yet" if args.scale == "cpu" or torch.cuda.is_available() else "no GPU on this machine"
            hint = "" if args.data else f" `python experiments/run.py {name} --scale {args.scale}`"
            lines.append(f"Not run: {why}.{hint}")
            continue
        lines += ["| variant | seeds | clips a step | " + " | ".join(question.heads) + " | target variance | minutes |",
                  "|---" * (5 + len(question.heads)) + "|"]  # fmt: skip
        ran = [(v, records) for v, records in found.items() if records]
        rows = [("pooled log-mel", ran[0][1], "pooled log-mel", "")]
        shown = []
        for v, records in ran:  # variants may already differ before training
            level = [r["scores"]["untrained"] for r in records]
            if level not in shown:
                shown.append(level)
                rows.append((f"untrained ({v})", records, "untrained", ""))
        rows += [(v, records, "pretrained", cfgs[v].optim.batch_size) for v, records in found.items()]
        for label, records, features, batch in rows:
            if not records:
                lines.append(f"| {label} | not run |" + " |" * (3 + len(question.heads)))
                continue
            cells = [spread([100 * r["scores"][features][head] for r in records], 1) for head in question.heads]
            trained = features == "pretrained"
            variance = spread([r["target_variance"] for r in records], 3) if trained else ""
            minutes = f"{statistics.mean(r['minutes'] for r in records):.1f}" if trained else ""
            lines.append(f"| {label} | {len(records)} | {batch} | " + " | ".join([*cells, variance, minutes]) + " |")
        plot(question, found, stem.with_name(f"{stem.name}-{name}.png"))
        lines += ["", f"![{name}]({stem.name}-{name}.png)"]
    return "\n".join(lines) + "\n"


def scored_on(args: Arguments) -> str:
    if args.score:
        return f"on {set_name(args.score)}, cross-validated by {args.folds}; no run was pretrained on any of it"
    if args.folds:
        return f"on each {args.folds}, of an encoder that was not pretrained on it, averaged"
    return f"on {args.test or 'split=test'}, on which no run was pretrained"


def finished(cfg: Config, args: Arguments, done: dict[str, dict]) -> dict[str, Any] | None:
    """Return the result of a variant and seed, or None if a part of it is missing."""
    records = [done.get(key(c, test, args)) for c, test in trials(cfg, args)]
    return mean([r for r in records if r]) if all(records) else None


def pretraining_minutes(record: dict[str, Any]) -> float:
    """Return the minutes computed from the throughput, so that a resumed run counts in full."""
    optim = record["config"]["optim"]
    return optim["steps"] * optim["batch_size"] / record["clips_per_second"] / 60


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def plot(question, found: dict[str, list[dict]], path: Path) -> None:
    """Plot each seed as a dot and the mean as a bar, with lines for the untrained encoder and for pooled log-mel."""
    figure, axes = plt.subplots(1, len(question.heads), figsize=(4.2 * len(question.heads), 3.6), layout="constrained")
    for axis, head in zip(axes, question.heads, strict=True):
        for i, records in enumerate(found.values()):
            if not records:
                continue
            values = {f: [100 * r["scores"][f][head] for r in records] for f in FEATURES.values()}
            axis.bar(i, statistics.mean(values["pretrained"]), width=0.6, color="tab:blue", alpha=0.35)
            axis.plot([i] * len(records), values["pretrained"], "o", color="tab:blue", markersize=4)
            for features, style in (("untrained", "--"), ("pooled log-mel", ":")):
                axis.hlines(statistics.mean(values[features]), i - 0.4, i + 0.4, "black", style, label=features)
        axis.set_xticks(range(len(found)), list(found), rotation=20)
        axis.set_xlim(-0.6, len(found) - 0.4)
        axis.set(title=head, ylabel="accuracy in %")
        axis.grid(axis="y", alpha=0.3)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles[:2], names[:2], fontsize=8, ncols=2, loc="outside upper right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Arguments, args=argv, prog="python experiments/run.py")
    try:
        single = args.test and "=" in args.test and ";" not in args.test
        if args.data and not (args.folds or single):
            raise ConfigError(
                '--data needs --test column=value, rows that are not pretrained on such as "fold=4", or --folds column'
            )
        if (args.test and args.folds) or (args.score and not (args.data and args.folds)):
            raise ConfigError("give either --test or --folds; --score needs --data and --folds")
        if args.scale == "gpu" and not args.report and not torch.cuda.is_available():
            raise ConfigError("--scale gpu needs a CUDA device, and this machine has none; use --scale cpu")
        name = f"{args.scale}-{set_name(args.data) if args.data else 'synthetic'}"
        name += f"-{args.test.replace('=', '')}" if args.test else f"-by-{args.folds}" if args.folds else ""
        name += f"-of-{set_name(args.score)}" if args.score else ""
        stem = Path(args.results) / (name + (f"-{args.steps}steps" if args.steps else ""))
        stem.parent.mkdir(parents=True, exist_ok=True)
        store = stem.with_name(stem.name + ".json")
        done = json.loads(store.read_text()) if store.exists() else {}
        names = list(QUESTIONS) if args.question == "all" else [args.question]
        todo = {} if args.report else {
            key(c, test, args): (f"{q}: {v}, seed {seed} {test}", c, test)
            for seed in range(args.seeds) for q in names for v, cfg in variants(args, q).items()
            for c, test in trials(override(cfg, {"seed": seed}), args) if key(c, test, args) not in done
        }  # fmt: skip
        for i, (k, (title, cfg, test)) in enumerate(todo.items(), start=1):
            print(f"{i} of {len(todo)}  {title}", flush=True)
            done[k] = run(cfg, test, args)
            write_atomic(store, (json.dumps(done, indent=1) + "\n").encode())
            got = done[k]["scores"]["pretrained"]
            print("   " + "  ".join(f"{head} {100 * value:.1f}" for head, value in got.items()), flush=True)
        text = report(args, done, stem)
        write_atomic(stem.with_name(stem.name + ".md"), text.encode())
        print(f"{stem}.md")
    except KeyboardInterrupt:
        return 130
    except (ConfigError, DataError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
