"""`python experiments/run.py masks --scale cpu --seeds 3`: answer a question by pretraining and probing its variants.

Every variant is pretrained with every seed, and every run is probed. A finished run is never repeated, and a killed run
is resumed. The results are `results/<scale>-<data>.json` (the scores of every run), `.md` (the tables) and
`-<question>.png` (the plots). <data> is the name of the folder and a fingerprint of the recordings, so that two sets of
one name have different results.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
import tyro
from questions import PRESETS_AS_THEY_ARE, QUESTIONS, SCALES, TEACHER

from ajepa import config, probe, train
from ajepa.config import Config, ConfigError
from ajepa.data.index import DataError, Index, build_index
from ajepa.data.synthetic import default_set
from ajepa.model.masks import MaskSampler, hidden_shares, percent
from ajepa.training import flops
from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.json_files import read_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FEATURES = {probe.LOG_MEL: "pooled log-mel", probe.UNTRAINED: "untrained", probe.TRAINED: "pretrained"}
Name = Literal["masks", "ratio", "ema", "probes", "positions", "patch", "multimask", "objective", "views",
               "augmentation", "init", "teacher", "targets", "all"]  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Answer a question by pretraining and probing its variants."""

    question: tyro.conf.Positional[Name]
    """The question of questions.py to answer, or "all"."""
    scale: Literal["cpu", "default", "minutes", "speech", "gpu"] = "cpu"
    """Size of the runs. cpu: the tiny preset, shortened. default: the tiny preset. minutes: the tiny-clip preset.
    speech: the same for spoken words. gpu: the audio-jepa preset, shortened, on a GPU."""
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
    tests = [args.test] if args.test else [f"{args.folds}={value}" for value in fold_values(args)]
    return [(override(cfg, {"data.where": others(test), "watch.eval_clips": 64}), test) for test in tests]


def others(test: str) -> str:
    """Return the condition on all rows that `test`, "column=values" or "column!=values", leaves out."""
    return test.replace("!=", "=", 1) if "!=" in test else test.replace("=", "!=", 1)


def fold_values(args: Arguments) -> list[str]:
    metadata = recordings(args.data, args.label).metadata
    if args.folds not in metadata:
        raise DataError(f"--folds {args.folds}: no such column; the columns are {', '.join(metadata) or 'none'}")
    return sorted(set(metadata[args.folds]))


@functools.cache
def recordings(data: str, label: str | None) -> Index:
    return build_index(data, label_column=label)


@functools.cache
def fingerprint(data: str, label: str | None, column: str | None) -> str:
    """Return a hash of the recordings' names, sizes, lengths, labels and cells of `column`.

    It leaves out folders and times of modification, so it is the same for every copy of the recordings.
    """
    index = recordings(data, label)
    numbers = (index.entries.numbers[name].tolist() for name in ("size", "start", "frames", "sample_rate"))
    names = (member or Path(path).name for path, member in zip(index.entries.path, index.entries.member, strict=True))
    labels = (index.label_names[number] if number >= 0 else None for number in index.labels)
    cells = index.metadata[column] if column in index.metadata else [None] * len(index)
    rows = list(zip(names, *numbers, labels, cells, strict=True))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def fingerprints(args: Arguments) -> tuple[str | None, str | None]:
    """Return the fingerprints of --data and of --score, each with the column that divides it."""
    divided = args.folds or (re.split("!?=", args.test)[0].strip() if args.test else None)
    if args.score:
        return fingerprint(args.data, args.label, None), fingerprint(args.score, args.score_label, args.folds)
    return (fingerprint(args.data, args.label, divided) if args.data else None), None


def override(cfg: Config, changes: dict[str, Any]) -> Config:
    """Return the configuration with each "section.field" of `changes` set, those of a section together."""
    sections: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        section, _, name = path.rpartition(".")
        sections.setdefault(section, {})[name] = value
    whole = sections.pop("", {})
    inner = {section: dataclasses.replace(getattr(cfg, section), **fields) for section, fields in sections.items()}
    return dataclasses.replace(cfg, **whole, **inner)


def variants(args: Arguments, name: str) -> dict[str, Config]:
    """Return the configuration of each variant of a question, without a seed."""
    question = QUESTIONS[name]
    start = override(base(args), question.setting[args.scale])
    cfgs = {variant: override(start, changes) for variant, changes in question.variants[args.scale].items()}
    if question.equal_flops:
        wanted = step_flops(start)
        cfgs = {v: equal_work(cfg, wanted) for v, cfg in cfgs.items()}
    return {masked_share(cfg): cfg for cfg in cfgs.values()} if question.by_share else cfgs


@functools.cache
def masked_share(cfg: Config) -> str:
    """Return the share of patches that the masks really hide, such as "60-80%"."""
    return percent(hidden_shares(cfg.mask, cfg.front_end.grid))


@functools.cache
def step_flops(cfg: Config) -> float:
    mask = dataclasses.replace(cfg.mask, mask_ratio=(sum(cfg.mask.mask_ratio) / 2,) * 2)
    masks = MaskSampler(mask, cfg.front_end.grid)(0, 1, cfg.optim.batch_size * cfg.objective.count)
    return flops.step_flops(cfg, masks)


def equal_work(cfg: Config, wanted: float) -> Config:
    """Set the batch size so that a step costs about `wanted` FLOPs, and the steps to make up for the rounding."""
    batch = max(1, round(cfg.optim.batch_size * wanted / step_flops(cfg)))
    cut = override(cfg, {"optim.batch_size": batch})
    return override(cut, {"optim.steps": max(1, round(cfg.optim.steps * wanted / step_flops(cut)))})


def key(cfg: Config, test: str, args: Arguments) -> str:
    """Return a hash of everything that the result of a run depends on."""
    _, scored = fingerprints(args)
    inputs = named(cfg, args), test, scored, args.score_label, args.folds if args.score else None
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def named(cfg: Config, args: Arguments) -> dict[str, Any]:
    """Return the configuration with the fingerprint of its recordings in place of their path."""
    fields = dataclasses.asdict(override(cfg, {"out": None, "data.data": fingerprints(args)[0]}))
    del fields["data"]["decoder"]  # all decoders give the same samples
    return fields


def set_name(data: str) -> str:
    """Return the name of the folder `data`, or of the folder that holds the manifest `data`."""
    path = Path(data).resolve()
    return (path if path.is_dir() else path.parent).name


def result_name(args: Arguments) -> str:
    """Return the stem of the result files, such as "cpu-esc50-1b7f03a9-fold4"."""
    sets = [f"-{set_name(data)}-{mark[:8]}" if data and mark else ""
            for data, mark in zip((args.data, args.score), fingerprints(args), strict=True)]  # fmt: skip
    rows = f"-{args.test.replace('!', '-not-')}" if args.test else f"-by-{args.folds}" if args.folds else ""
    steps = f"-{args.steps}steps" if args.steps else ""
    return re.sub(r"[^\w,.-]", "", f"{args.scale}{sets[0] or '-synthetic'}{rows}{sets[1] and '-of'}{sets[1]}{steps}")


def pretrain(cfg: Config, test: str, args: Arguments) -> Path:
    """Pretrain one configuration, or resume it, and return its run folder."""
    folder = Path(args.runs) / key(cfg, test, args)
    if (folder / "summary.json").exists():
        return folder
    if cfg.objective.teacher == TEACHER:
        teacher = pretrain(override(cfg, {"objective.teacher": None}), test, args)
        cfg = override(cfg, {"objective.teacher": str(teacher)})
    cfg = dataclasses.replace(cfg, out=str(folder), resume=True)
    config.validate(cfg)
    if args.data is None:
        synthetic(cfg)  # made beforehand, because this is no part of the pretraining
    with core_seconds(folder):
        train.run(cfg)
    return folder


@contextlib.contextmanager
def core_seconds(folder: Path) -> Iterator[None]:
    """Add the CPU time of all threads of this process to `core_seconds.json`.

    The file is absent while the process works. If it is killed, the time is lost, and the file says null from then on.
    """
    file = folder / "core_seconds.json"
    before = json.loads(file.read_text()) if file.exists() else None if folder.exists() else 0.0
    file.unlink(missing_ok=True)
    start = time.process_time()
    try:
        yield
    finally:
        if folder.exists():
            total = None if before is None else before + time.process_time() - start
            write_atomic(file, (json.dumps(total) + "\n").encode())


def run(cfg: Config, test: str, args: Arguments, heads: tuple[str, ...]) -> dict[str, Any]:
    """Pretrain (or resume) one configuration, and probe it at its own pooling and at `mean`."""
    with contextlib.redirect_stdout(io.StringIO()):
        folder = pretrain(cfg, test, args)
    start = time.perf_counter()
    if args.score:
        rows = {"data": args.score, "folds": args.folds, "label": args.score_label}
    else:
        rows = {"data": args.data or synthetic(cfg), "test": test, "label": args.label}
    scores = {}
    for pooling in dict.fromkeys((cfg.watch.pooling, "mean")):
        asked = tuple(head for head in heads if (head, pooling) in columns(heads, cfg.watch.pooling))
        scored = probe.probe(probe.Arguments(str(folder), **rows, heads=asked, pooling=pooling, map="none"))
        scores[pooling] = {FEATURES[name]: {head: s["mean"] for head, s in found.items()}
                           for name, found in scored["scores"].items()}  # fmt: skip
    summary = read_json(folder / "summary.json")
    spent = folder / "core_seconds.json"
    seconds = json.loads(spent.read_text()) if spent.exists() else None
    clips = cfg.optim.steps * cfg.optim.batch_size * cfg.objective.count
    return {
        "test": test,
        "scores": scores,
        "seen_in_pretraining": [fold["seen_in_pretraining"] for fold in scored["folds"]],
        "target_variance": summary["target_variance"],
        "effective_rank": summary["effective_rank"],
        "clips_per_second": summary["clips_per_second"],
        "minutes": clips / summary["clips_per_second"] / 60,  # so that a resumed run counts in full
        "core_minutes": None if seconds is None else seconds / 60,
        "probe_seconds": time.perf_counter() - start,
        "device": summary["device"],
        "commit": commit(),
        "torch": torch.__version__,
        "recordings": set_name(args.data) if args.data else "synthetic",
        "config": named(cfg, args),
    }


def columns(heads: tuple[str, ...], pooling: str) -> list[tuple[str, str]]:
    """Return the scored pairs of head and pooling. `attentive` does not pool, so it is scored once."""
    return [(head, p) for p in dict.fromkeys((pooling, "mean")) for head in heads
            if p == pooling or head != "attentive"]  # fmt: skip


def mean(records: list[dict[str, Any]], scored: list[tuple[str, str]]) -> dict[str, Any]:
    """Return one record for the trials of a variant and seed, the mean over the folds; None where one has no value."""

    def average(get) -> float | None:
        values = [get(r) for r in records]
        return None if None in values else statistics.mean(values)

    return {
        "scores": {f: {(head, p): average(lambda r, f=f, head=head, p=p: r["scores"][p][f][head]) for head, p in scored}
                   for f in FEATURES.values()},
        "target_variance": average(lambda r: r["target_variance"]),
        "minutes": average(lambda r: r["minutes"]),
        "core_minutes": average(lambda r: r["core_minutes"]),
    }  # fmt: skip


def synthetic(cfg: Config) -> str:
    """Return the synthetic set that the run was trained on. `open_corpus` makes the same set."""
    return str(default_set(cfg.data.clip_seconds, cfg.front_end.sample_rate))


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
        f"Preset {preset}, {start.optim.steps:,} steps. Accuracy in % {scored_on(args)}: mean +- sample deviation over "
        f"the seeds, at the pooling {start.watch.pooling} and at mean. `masked` is the share of patches that the drawn "
        "masks hide, and `core-minutes` is the CPU time of a pretraining, all threads together. `docs/evaluate.md` "
        "describes the heads. Written by `python experiments/run.py`.",
    ]
    for name, question in QUESTIONS.items():
        cfgs = variants(args, name)
        scored = columns(question.heads, start.watch.pooling)
        found = {
            v: [r for seed in range(args.seeds) if (r := finished(override(c, {"seed": seed}), args, done, scored))]
            for v, c in cfgs.items()
        }
        unanswered = sum(map(bool, found.values())) < min(2, len(found))  # the base run does not compare anything
        if unanswered and args.scale in PRESETS_AS_THEY_ARE:
            continue
        lines += ["", f"## {name}: {question.title}", "", f"Expected: {question.expected}", ""]
        if unanswered:
            why = "no run yet" if args.scale != "gpu" or torch.cuda.is_available() else "no GPU on this machine"
            hint = "" if args.data else f" `python experiments/run.py {name} --scale {args.scale}`"
            lines.append(f"Not run: {why}.{hint}")
            continue
        heads = [f"{head}, {pooling}" for head, pooling in scored]
        ends = ["target variance", "minutes", "core-minutes"]
        titles = ["variant", "seeds", "recordings a step", "masked", *heads, *ends]
        lines += [came_out(found, start.watch.pooling), "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        ran = [(v, records) for v, records in found.items() if records]
        rows = [("pooled log-mel", ran[0][1], "pooled log-mel", None)]
        shown = []
        for v, records in ran:  # variants may already differ before training
            level = [r["scores"]["untrained"] for r in records]
            if level not in shown:
                shown.append(level)
                rows.append((f"untrained ({v})", records, "untrained", None))
        rows += [(v, records, "pretrained", cfgs[v]) for v, records in found.items()]
        for label, records, features, cfg in rows:
            if not records:
                lines.append(f"| {label} | not run |" + " |" * (len(titles) - 2))
                continue
            cells = [spread([100 * r["scores"][features][pair] for r in records], 1) for pair in scored]
            batch, share, last = "", "", [""] * len(ends)
            if cfg:
                batch, share = cfg.optim.batch_size, masked_share(cfg)
                last = [spread([r[k] for r in records], digits)
                        for k, digits in (("target_variance", 3), ("minutes", 1), ("core_minutes", 2))]  # fmt: skip
            lines.append(f"| {label} | {len(records)} | {batch} | {share} | {' | '.join([*cells, *last])} |")
        if args.folds and not args.score:
            lines += by_fold({v: c for v, c in cfgs.items() if found[v]}, args, done, scored)
        plot(question, found, start.watch.pooling, stem.with_name(f"{stem.name}-{name}.png"))
        lines += ["", f"![{name}]({stem.name}-{name}.png)"]
    return "\n".join(lines) + "\n"


def by_fold(cfgs: dict[str, Config], args: Arguments, done: dict[str, dict], scored) -> list[str]:
    """Return a table of the folds of the variants `cfgs`, whose runs are all done: the mean over the seeds."""
    titles = ["variant", "fold", *(f"{head}, {pooling}" for head, pooling in scored)]
    lines = ["", f"By fold: {' / '.join(FEATURES.values())}.", ""]
    lines += [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for v, cfg in cfgs.items():
        runs = [trials(override(cfg, {"seed": seed}), args) for seed in range(args.seeds)]
        for trial in zip(*runs, strict=True):
            records = [r for c, test in trial if (r := done.get(key(c, test, args)))]
            cells = [" / ".join(f"{100 * statistics.mean(r['scores'][pooling][f][head] for r in records):.1f}"
                                for f in FEATURES.values()) for head, pooling in scored]  # fmt: skip
            lines.append(f"| {v} | {trial[0][1]} | {' | '.join(cells)} |")
    return lines


def came_out(found: dict[str, list[dict]], pooling: str) -> str:
    """Return the variants from the best logistic score to the worst, to be read beside what was expected."""
    levels = {v: [100 * r["scores"]["pretrained"]["logistic", pooling] for r in records]
              for v, records in found.items() if records}  # fmt: skip
    order = sorted(levels, key=lambda v: -statistics.mean(levels[v]))
    text = ", ".join(f"{v} {spread(levels[v], 1)}" for v in order)
    return f"Came out (logistic, {pooling}, best first): {text}."


def scored_on(args: Arguments) -> str:
    if args.score:
        return f"on {set_name(args.score)}, cross-validated by {args.folds}; no run was pretrained on any of it"
    if args.folds:
        return f"on each {args.folds}, of an encoder that was not pretrained on it, averaged"
    return f"on {args.test or 'split=test'}, on which no run was pretrained"


def finished(cfg: Config, args: Arguments, done: dict[str, dict], scored) -> dict[str, Any] | None:
    """Return the result of a variant and seed, or None if a part of it is missing. `scored` is from `columns`."""
    records = [done.get(key(c, test, args)) for c, test in trials(cfg, args)]
    return mean([r for r in records if r], scored) if all(r and has(r, scored) for r in records) else None


def has(record: dict[str, Any], scored: list[tuple[str, str]]) -> bool:
    """Return whether all pairs of head and pooling in `scored` have a score."""
    return all(head in record["scores"].get(pooling, {}).get("pretrained", {}) for head, pooling in scored)


def spread(values: list[float | None], digits: int) -> str:
    if None in values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean + (f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def plot(question, found: dict[str, list[dict]], pooling: str, path: Path) -> None:
    """Plot each seed as a dot and the mean as a bar, with lines for the untrained encoder and for pooled log-mel."""
    figure, axes = plt.subplots(1, len(question.heads), figsize=(4.2 * len(question.heads), 3.6), layout="constrained")
    for axis, head in zip(axes, question.heads, strict=True):
        for i, records in enumerate(found.values()):
            if not records:
                continue
            values = {f: [100 * r["scores"][f][head, pooling] for r in records] for f in FEATURES.values()}
            axis.bar(i, statistics.mean(values["pretrained"]), width=0.6, color="tab:blue", alpha=0.35)
            axis.plot([i] * len(records), values["pretrained"], "o", color="tab:blue", markersize=4)
            for features, style in (("untrained", "--"), ("pooled log-mel", ":")):
                axis.hlines(statistics.mean(values[features]), i - 0.4, i + 0.4, "black", style, label=features)
        axis.set_xticks(range(len(found)), list(found), rotation=20)
        axis.set_xlim(-0.6, len(found) - 0.4)
        axis.set(title=f"{head}, {pooling}", ylabel="accuracy in %")
        axis.grid(axis="y", alpha=0.3)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles[:2], names[:2], fontsize=8, ncols=2, loc="outside upper right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plan(args: Arguments, done: dict[str, dict]) -> dict[str, tuple[str, Config, str, tuple[str, ...]]]:
    """Return what is still to be run: key -> title, configuration, scored rows, and the heads of all questions."""
    asked: dict[str, tuple[str, Config, str]] = {}
    heads: dict[str, tuple[str, ...]] = {}
    every = [(q, v, cfg) for q in QUESTIONS for v, cfg in variants(args, q).items()]
    for seed, (q, v, cfg) in itertools.product(range(args.seeds), every):
        for c, test in trials(override(cfg, {"seed": seed}), args):
            k = key(c, test, args)
            heads[k] = tuple(dict.fromkeys((*heads.get(k, ()), *QUESTIONS[q].heads)))
            if args.question in ("all", q):
                asked.setdefault(k, (f"{q}: {v}, seed {seed} {test}", c, test))
    return {k: (*what, heads[k]) for k, what in asked.items()
            if k not in done or not has(done[k], columns(heads[k], what[1].watch.pooling))}  # fmt: skip


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
        stem = Path(args.results) / result_name(args)
        stem.parent.mkdir(parents=True, exist_ok=True)
        store = stem.with_name(stem.name + ".json")
        done = json.loads(store.read_text()) if store.exists() else {}
        todo = {} if args.report else plan(args, done)
        for i, (k, (title, cfg, test, heads)) in enumerate(todo.items(), start=1):
            print(f"{i} of {len(todo)}  {title}", flush=True)
            done[k] = run(cfg, test, args, heads)
            write_atomic(store, (json.dumps(done, indent=1) + "\n").encode())
            got = done[k]["scores"][cfg.watch.pooling]["pretrained"]
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
