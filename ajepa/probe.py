"""`python -m ajepa.probe RUN --data ...`: score the frozen features of a run on labelled recordings.

The run's encoder is compared with two baselines on the same recordings and folds, with the same heads and at the same
pooling: the encoder before its first step, and pooled log-mel.
"""

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.metrics import classification_report, confusion_matrix

from ajepa.config import Config, ConfigError, Pooling, StepConfig
from ajepa.data.index import DataError, Index, build_index
from ajepa.evaluation import plots
from ajepa.evaluation.feature_cache import EncoderFeatures, LogMelFeatures, data_hash, embed
from ajepa.evaluation.labelled import labelled, pretrained_on
from ajepa.evaluation.probes import HEADS, Embedded, predict
from ajepa.model.pooling import Layers, check_pooling
from ajepa.model.pretrained import load_pretrained, load_weights
from ajepa.training.engine import Engine
from ajepa.utils import cli
from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.devices import choose_device
from ajepa.utils.run_folder import CheckpointError, run_of
from ajepa.utils.tensor_files import tensors_hash
from ajepa_kernels import LogMelSpec

TRAINED, UNTRAINED, LOG_MEL = "trained encoder", "untrained encoder", "pooled log-mel"
Head = Literal["knn", "linear", "attentive", "logistic", "knn-xares"]


@dataclass(frozen=True)
class Arguments:
    """Score a run's frozen encoder on labelled recordings, next to the untrained encoder and pooled log-mel."""

    run: tyro.conf.Positional[str]
    """Run folder, or one checkpoint in it (RUN/checkpoints/step_...)."""
    data: str
    """Labelled recordings: a folder with one sub-folder per class, a manifest (CSV, JSONL, ...), or webdataset tars."""
    where: str | None = None
    """Rows to use, such as "fold=1,2,3,4". None: all rows."""
    label: str | None = None
    """Column that holds the label. None: a column called label, target, category or class."""
    decoder: Literal["auto", "dali", "soundfile"] = "auto"
    """Library that decodes the recordings: see python -m ajepa.train --help-all."""
    float_scale: float = 1.0
    """Full scale of floating-point recordings, such as 32768 for 16-bit values that were stored as floats."""
    test: str | None = None
    """Rows to classify, such as "split=test". The heads learn from all other rows. None: every fourth recording."""
    folds: str | None = None
    """Column to cross-validate over, instead of --test: the rows of each value are classified from all other rows."""
    heads: tuple[Head, ...] = ("knn", "linear", "attentive")
    """knn: cosine similarity of standardised features, 10 neighbours. linear: the linear head of X-ARES. attentive:
    ajepa's own, a learnt query over all tokens. logistic: scikit-learn's, standardised. knn-xares: the kNN of X-ARES
    with its way of normalising, only to compare with published kNN figures."""
    pooling: Literal["run"] | Pooling = "run"
    """How the latents of a recording are pooled, and log-mel with them. mean: over all patches. concat: over the time
    of each frequency row, side by side. +std: also their deviations. projection: the projector of a clip objective.
    run: as the run did."""
    layers: Layers = "last"
    """last: the encoder's output. mean: the average of all blocks' outputs, each layer-normalised."""
    log_mel: Literal["run", "standard"] = "run"
    """Front end of the log-mel baseline. run: the run's own. standard: the same for every run, 128 bands of 25 ms
    windows every 10 ms."""
    seeds: int = 1
    """Number of trainings of each head, from seed 0 up. The score is their mean."""
    map: Literal["pca", "tsne", "both", "none"] = "both"
    """Method of the two-dimensional picture of the embeddings."""
    out: str | None = None
    """Folder for probe.json and the pictures. None: the run folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that computes the features and trains the heads. auto: the GPU if there is one."""


@dataclass(frozen=True)
class Fold:
    name: str
    train: torch.Tensor  # int64, rows of the features
    test: torch.Tensor
    seen: int | None = None
    """Test recordings that the run was pretrained on; None where it was pretrained on other data."""


@dataclass(frozen=True)
class Task:
    """Labelled recordings and their division into folds."""

    index: Index
    items: torch.Tensor  # int64 [n], rows of `index`
    labels: torch.Tensor  # int64 [n], numbered over `classes`
    classes: list[str]
    folds: list[Fold] = field(default_factory=list)


def probe(args: Arguments) -> dict[str, Any]:
    """Score the run and return the contents of `probe.json`. Raises ConfigError or DataError."""
    start = time.perf_counter()
    if args.seeds < 1 or not args.heads:
        raise ConfigError("--seeds must be 1 or more, and --heads must name at least one")
    if args.test and args.folds:
        raise ConfigError("--test and --folds are two ways to divide the recordings: give one")
    cfg, weights, file, projector_weights = load_pretrained(Path(args.run))
    pooling = cfg.watch.pooling if args.pooling == "run" else args.pooling
    check_pooling(pooling, has_projector=projector_weights is not None)
    index = build_index(args.data, where=args.where, label_column=args.label, float_scale=args.float_scale)
    if (index.single_labels != index.labels).any():
        raise DataError(
            f"{args.data}: recordings have several labels; the probe takes one: name another column with --label, or "
            "fine-tune with --multi-label"
        )
    index = labelled(index)
    divide(index, torch.arange(len(index)), args, cfg)  # report a wrong division before any work
    device = choose_device(args.device)
    precision = "fp32" if cfg.precision == "auto" and device.type == "cpu" else cfg.precision
    engine = Engine(replace(cfg, step=StepConfig(), precision=precision), device)
    encoder, spec = engine.model.context_encoder.eval(), cfg.front_end
    projector = engine.projector if pooling == "projection" else None
    skipped = list(index.skipped)

    kinds = [pooling] + ["tokens"] * ("attentive" in args.heads)
    reading = {"threads": cfg.data.loader_threads, "decoder": args.decoder}
    options: dict[str, Any] = {"device": engine.device, "reading": reading, "skipped": skipped}
    samples = round(cfg.data.clip_seconds * spec.sample_rate)

    def encoder_source() -> EncoderFeatures:
        precision = "bf16" if engine.bf16 else "fp32"
        key = f"{tensors_hash(encoder.state_dict())} {cfg.model.positions} {precision} {args.layers}"
        if projector is not None:
            key += f" {tensors_hash(projector.state_dict())}"
        return EncoderFeatures(encoder, engine.front_end, spec, key, args.layers, projector)

    features: dict[str, Embedded] = {}
    with engine.autocast():
        items, made = embed(index, {UNTRAINED: encoder_source()}, samples, kinds, **options)
        features |= made
        load_weights(encoder, weights, file)
        if projector is not None:
            load_weights(projector, projector_weights or {}, file)
        baseline = LogMelFeatures(log_mel_spec(spec, args.log_mel))
        items, made = embed(index, {TRAINED: encoder_source(), LOG_MEL: baseline}, samples, kinds, **options)
        features |= made
    if any(len(x.clips) != len(items) for x in features.values()):
        raise DataError(f"{args.data}: its files changed while they were read; run again")
    for name, x in features.items():
        if not x.clips.isfinite().all():
            raise ConfigError(f"{args.run}: the {name}'s features are not finite: the run has diverged")
    task = divide(index, items, args, cfg)

    guesses = {
        name: {head: torch.stack([_cross_validate(head, features[name], task, seed, engine.device)
                                  for seed in range(1 if head in DETERMINISTIC else args.seeds)])
               for head in args.heads}
        for name in (LOG_MEL, UNTRAINED, TRAINED)
    }  # fmt: skip
    result = {
        "run": str(args.run),
        "checkpoint": {"file": str(file), "sha256": tensors_hash(weights)},
        "data": {
            "source": args.data, "where": args.where, "hash": data_hash(index), "recordings": len(items),
            "seconds": index.seconds, "classes": task.classes, "skipped": [list(pair) for pair in skipped],
        },
        "settings": {**asdict(args), "pooling": pooling},
        "dimensions": {name: x.clips.shape[1] for name, x in features.items()},
        "folds": [{"name": f.name, "train": len(f.train), "test": len(f.test), "seen_in_pretraining": f.seen}
                  for f in task.folds],
        "scores": {name: {head: scores(g, task) for head, g in heads.items()} for name, heads in guesses.items()},
        "classes": {head: per_class(g, task) for head, g in guesses[TRAINED].items()},
        "seconds": time.perf_counter() - start,
        "versions": versions(),
        "device": str(engine.device),
    }  # fmt: skip
    folder = Path(args.out) if args.out else run_of(Path(args.run))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "probe.json", (json.dumps(result, indent=2) + "\n").encode())
        draw(folder, result, features[TRAINED], task, guesses[TRAINED], args)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}; choose another --out") from error
    return result


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("ajepa", "torch", "numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            found[package] = "not installed"
    return found


DETERMINISTIC = ("knn", "logistic", "knn-xares")


def log_mel_spec(spec: LogMelSpec, which: str) -> LogMelSpec:
    if which == "run":
        return replace(spec, n_frames=None)
    window = spec.sample_rate // 40
    n_fft = 2 << (window - 1).bit_length()  # each of 128 bands holds a bin
    return LogMelSpec(spec.sample_rate, n_fft=n_fft, win_length=window, hop_length=spec.sample_rate // 100)


def _cross_validate(head: str, x: Embedded, task: Task, seed: int, device) -> torch.Tensor:
    """The class that each recording gets when it is tested; -1 for a recording that is never tested."""
    guess = torch.full_like(task.labels, -1)
    for fold in task.folds:
        guess[fold.test] = predict(head, x, task.labels, fold.train, fold.test, seed, device)
    return guess


def scores(guesses: torch.Tensor, task: Task) -> dict[str, Any]:
    """Accuracy of each fold (mean over the seeds), their mean and sample deviation, from `guesses` `[seeds, n]`."""
    right = (guesses == task.labels).double()
    folds = [right[:, fold.test].mean().item() for fold in task.folds]
    by_seed = torch.stack([right[:, fold.test].mean(1) for fold in task.folds]).mean(0)
    return {
        "folds": folds,
        "mean": float(np.mean(folds)),
        "deviation": float(np.std(folds, ddof=1)) if len(folds) > 1 else None,
        "seeds": by_seed.tolist(),
    }


def per_class(guesses: torch.Tensor, task: Task) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class, and confusion counts (true x given), over folds and seeds."""
    tested = guesses[0] >= 0
    true, given = task.labels[tested].repeat(len(guesses)).numpy(), guesses[:, tested].flatten().numpy()
    every = list(range(len(task.classes)))
    report = classification_report(
        true, given, labels=every, target_names=task.classes, output_dict=True, zero_division=0
    )
    table = {name: {k: float(v) for k, v in report[name].items()} for name in (*task.classes, "macro avg")}
    for row in table.values():
        row["support"] = round(row["support"] / len(guesses))
    return {"table": table, "confusion": confusion_matrix(true, given, labels=every).tolist()}


def divide(index: Index, items: torch.Tensor, args: Arguments, cfg: Config) -> Task:
    """Divide the recordings `items` into folds. Raises DataError for a fold with nothing to learn from or classify."""
    used, labels = np.unique(index.labels[items.numpy()], return_inverse=True)
    at = {item: row for row, item in enumerate(items.tolist())}
    if args.folds is not None:
        if args.folds not in index.metadata:
            raise DataError(f"--folds {args.folds}: no such column; there are {', '.join(index.metadata) or 'none'}")
        column = np.array([index.metadata[args.folds][i] for i in at])
        tests = {f"{args.folds}={value}": column == value for value in sorted(set(column.tolist()))}
        if len(tests) > 100:
            raise DataError(f"--folds {args.folds}: {len(tests)} different values; a fold column has a few")
    elif args.test is not None:
        tests = {args.test: np.isin(items.numpy(), index.rows(args.test))}
    else:
        tests = {"every fourth": np.arange(len(at)) % 4 == 3}
    known = pretrained_on(cfg, index)
    files = [(entry.path, entry.member) for entry in index.subset(items.tolist()).entries]
    task = Task(index, items, torch.from_numpy(labels), [index.label_names[c] for c in used])
    for name, test in tests.items():
        learnt = torch.from_numpy(np.flatnonzero(~test))
        if len(learnt) == len(at) or len(task.labels[learnt].unique()) < 2:
            raise DataError(f"{args.data}: {name} must leave two or more classes to learn from and some recordings to "
                            "classify; see --test and --folds")  # fmt: skip
        asked = np.flatnonzero(test)
        seen = None if known is None else sum(files[i] in known for i in asked)
        task.folds.append(Fold(name, learnt, torch.from_numpy(asked), seen))
    return task


def draw(folder: Path, result: dict[str, Any], x: Embedded, task: Task, guesses, args: Arguments) -> None:
    head = shown(args)
    accuracy = result["scores"][TRAINED][head]["mean"]
    confusion = np.array(result["classes"][head]["confusion"])
    title = f"{TRAINED}, {head}: {accuracy:.1%}"
    plots.plot_confusion(confusion, task.classes, title, folder / "confusion.png")
    methods = {"both": ("pca", "tsne"), "none": ()}.get(args.map, (args.map,))
    if methods:
        plots.plot_embeddings(x.clips, task.labels, task.classes, methods, folder / "embeddings.png")


def shown(args: Arguments) -> str:
    """The head whose classes are reported one by one."""
    return next((head for head in ("linear", "attentive", "logistic") if head in args.heads), args.heads[0])


def report(result: dict[str, Any], args: Arguments, console: Console) -> None:
    data, folds = result["data"], result["folds"]
    for path, reason in data["skipped"]:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    for fold in folds:
        if fold["seen_in_pretraining"]:
            what = f"{fold['seen_in_pretraining']} of the {fold['test']} test recordings of {fold['name']}"
            print(f"warning: {what} were pretrained on; leave them out of pretraining with --where", file=sys.stderr)
    head = shown(args)
    if len(data["classes"]) <= 60:
        table = Table(title=f"{TRAINED}, {head}, by class", title_justify="left")
        for column in ("class", "precision", "recall", "F1", "support"):
            table.add_column(column, justify="left" if column == "class" else "right")
        for name, row in result["classes"][head]["table"].items():
            figures = (f"{row[key]:.1%}" for key in ("precision", "recall", "f1-score"))
            table.add_row(name, *figures, f"{row['support']:.0f}")
        console.print(table)
    title = f"{data['recordings']:,} recordings, {len(data['classes'])} classes, {len(folds)} test "
    settings = result["settings"]
    title += f"{'fold' if len(folds) == 1 else 'folds'}, pooling {settings['pooling']}, "
    title += f"{'mean of all layers' if settings['layers'] == 'mean' else 'last layer'}; accuracy in %"
    table = Table(title=title, title_justify="left")
    table.add_column("features")
    table.add_column("width", justify="right")
    for name in args.heads:
        table.add_column(name, justify="right")
    for name, heads in result["scores"].items():
        table.add_row(name, str(result["dimensions"][name]), *(show(heads[head]) for head in args.heads))
    console.print(table)


def show(score: dict[str, Any]) -> str:
    spread = "" if score["deviation"] is None else f" +- {100 * score['deviation']:.1f}"
    return f"{100 * score['mean']:.1f}{spread}"


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "python -m ajepa.probe")
    try:
        result = probe(args)
    except (ConfigError, DataError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(result, args, Console(highlight=False))
    return 0


assert set(HEADS) == set(Head.__args__)  # type: ignore[attr-defined]

if __name__ == "__main__":
    sys.exit(main())
