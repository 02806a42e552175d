"""`python -m ajepa.probe RUN --data ...`: what a run's frozen features are worth on labelled recordings.

The EMA target encoder stands beside two baselines on the same recordings and folds, under the same heads: the encoder
before its first step, and pooled log-mel.
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
from safetensors.torch import load as load_bytes
from sklearn.metrics import classification_report, confusion_matrix

from ajepa import config
from ajepa.config import Config, ConfigError, StepConfig
from ajepa.data.index import DataError, Index, build_index
from ajepa.evaluation import plots
from ajepa.evaluation.feature_cache import EncoderFeatures, LogMelFeatures, data_hash, embed, tensors_hash
from ajepa.evaluation.probes import HEADS, Embedded, predict
from ajepa.training.checkpoint import CheckpointError, checkpoints, read_verified
from ajepa.training.engine import Engine, choose_device
from ajepa.utils.atomic_files import write_atomic
from ajepa_kernels import LogMelSpec

TRAINED, UNTRAINED, LOG_MEL = "trained encoder", "untrained encoder", "pooled log-mel"
Head = Literal["knn", "knn-standardised", "linear", "attentive", "logistic"]


@dataclass(frozen=True)
class Arguments:
    """Score a run's frozen encoder on labelled recordings, beside the untrained encoder and pooled log-mel."""

    run: tyro.conf.Positional[str]
    """Run folder, or one checkpoint in it (RUN/checkpoints/step_...)."""
    data: str
    """Labelled recordings: a folder with a sub-folder a class, a manifest (CSV, JSONL, ...), or webdataset tars."""
    where: str | None = None
    """Rows to use, such as "fold=1,2,3,4"."""
    label: str | None = None
    """Column that holds the label, where it is not found by its name."""
    decoder: Literal["auto", "dali", "soundfile"] = "auto"
    """Who decodes the recordings: see ajepa.train."""
    float_scale: float = 1.0
    """Full scale of recordings in floating point, such as 32768 for samples written without scaling."""
    test: str | None = None
    """Rows to classify, such as "split=test"; the others are learnt from. None: every fourth recording."""
    folds: str | None = None
    """Or: cross-validate over the values of this column, each in turn classified from all the others."""
    heads: tuple[Head, ...] = ("knn", "linear", "attentive")
    """knn, linear: X-ARES's. attentive: a learnt query over all tokens. knn-standardised: each feature scaled by its
    mean and deviation first, as the watch in training does. logistic: scikit-learn's, standardised."""
    pooling: Literal["run", "mean", "concat"] = "run"
    """Over frequency patches: their mean, all of them side by side, or as the run did."""
    log_mel: Literal["run", "standard"] = "run"
    """The log-mel baseline: of the run's own front end, what the encoder reads; or the same for every run, 128 bands of
    25 ms windows every 10 ms."""
    seeds: int = 1
    """Times that each head is trained, from seed 0 up; its score is their mean."""
    map: Literal["pca", "tsne", "both", "none"] = "both"
    """Picture of the embeddings in two dimensions."""
    out: str | None = None
    """Folder for probe.json and the pictures; None: the run folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Fold:
    name: str
    train: torch.Tensor  # int64, rows of the features
    test: torch.Tensor
    seen: int | None = None
    """Test recordings that the run was pretrained on; None where it was pretrained on other data."""


@dataclass(frozen=True)
class Task:
    """Labelled recordings and how they are divided."""

    index: Index
    items: torch.Tensor  # int64 [n], rows of `index`
    labels: torch.Tensor  # int64 [n], numbered over `classes`
    classes: list[str]
    folds: list[Fold] = field(default_factory=list)


def probe(args: Arguments) -> dict[str, Any]:
    """Everything that probe.json holds. Raises ConfigError, DataError, CheckpointError."""
    start = time.perf_counter()
    if args.seeds < 1 or not args.heads:
        raise ConfigError("--seeds must be 1 or more, and --heads must name at least one")
    if args.test and args.folds:
        raise ConfigError("--test and --folds are two ways to divide the recordings: give one")
    cfg, weights, checkpoint = load_run(Path(args.run))
    index = build_index(args.data, where=args.where, label_column=args.label, float_scale=args.float_scale)
    if (index.single_labels != index.labels).any():
        raise DataError(
            f"{args.data}: recordings have several labels; the probe takes one: name another column with --label, or "
            "fine-tune with --multi-label"
        )
    index = labelled(index)
    divide(index, torch.arange(len(index)), args, cfg)  # what is wrong is said before any work
    engine = Engine(replace(cfg, step=StepConfig()), choose_device(args.device))
    encoder, spec = engine.model.target_encoder.eval(), cfg.front_end
    skipped = list(index.skipped)

    pooling = cfg.watch.pooling if args.pooling == "run" else args.pooling
    kinds = [pooling] + ["tokens"] * ("attentive" in args.heads)
    reading = {"threads": cfg.data.loader_threads, "decoder": args.decoder}
    options: dict[str, Any] = {"device": engine.device, "reading": reading, "skipped": skipped}
    samples = round(cfg.data.clip_seconds * spec.sample_rate)

    def encoder_source() -> EncoderFeatures:
        auto = "bf16" if engine.device.type == "cuda" else "fp32"
        precision = auto if cfg.precision == "auto" else cfg.precision
        key = f"{tensors_hash(encoder.state_dict())} {cfg.model.positions} {precision}"
        return EncoderFeatures(encoder, engine.front_end, spec, key)

    features: dict[str, Embedded] = {}
    with engine.autocast():
        items, made = embed(index, {UNTRAINED: encoder_source()}, samples, kinds, **options)
        features |= made
        load_weights(encoder, weights, checkpoint)
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
        "checkpoint": checkpoint | {"sha256": tensors_hash(weights)},
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
    folder = Path(args.out) if args.out else checkpoint_folder(Path(args.run))
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


DETERMINISTIC = ("knn", "knn-standardised", "logistic")


def log_mel_spec(spec: LogMelSpec, which: str) -> LogMelSpec:
    if which == "run":
        return replace(spec, n_frames=None)
    window = spec.sample_rate // 40
    n_fft = 2 << (window - 1).bit_length()  # each of 128 bands holds a bin
    return LogMelSpec(spec.sample_rate, n_fft=n_fft, win_length=window, hop_length=spec.sample_rate // 100)


def _cross_validate(head: str, x: Embedded, task: Task, seed: int, device) -> torch.Tensor:
    """The class that each recording is given when it is tested, -1 where it never is."""
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
    """Precision, recall, F1 and support of each class and the confusion counts (true x given), over folds and seeds."""
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


def labelled(index: Index) -> Index:
    """The rows that have a label. Raises DataError where there are not two classes."""
    rows = np.flatnonzero(index.labels >= 0)
    if len(np.unique(index.labels[rows])) < 2:
        raise DataError(f"{index.source}: labels of two or more classes are needed; name their column with --label")
    return index.subset(rows) if len(rows) < len(index) else index


def divide(index: Index, items: torch.Tensor, args: Arguments, cfg: Config) -> Task:
    """Folds of the recordings `items`. Raises DataError where one has nothing to learn from or to classify."""
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


def pretrained_on(cfg: Config, index: Index) -> set[tuple[str, str]] | None:
    """(path, member) of the recordings of `index` that `cfg` trains on, where it trains on the same source; else None.

    A recording counts as a whole, whichever segments of it are trained on.
    """
    source = cfg.data.data
    if source is None or Path(source).expanduser().resolve() != Path(index.source).resolve():
        return None
    try:
        entries = (index.filter(cfg.data.where) if cfg.data.where else index).entries
        return set(zip(entries.path, entries.member, strict=True))
    except DataError:  # none of the rows probed
        return set()


def load_run(path: Path) -> tuple[Config, dict[str, torch.Tensor], dict[str, Any]]:
    """Configuration, weights of the EMA target encoder, and where they came from.

    `path`: a run folder (its encoder.safetensors, or where it is not finished its newest whole checkpoint) or one of
    its checkpoints. Nothing in them can run code. Raises ConfigError, CheckpointError.
    """
    folder = checkpoint_folder(path)
    cfg = config.load(folder / "config.json")
    file = folder / "encoder.safetensors"
    if folder == path and file.exists():
        try:
            return cfg, load_bytes(file.read_bytes()), {"file": str(file)}
        except Exception as error:  # safetensors has an exception type of its own
            raise ConfigError(f"{file} cannot be read as safetensors: {error}") from error
    found = [path] if folder != path else checkpoints(folder / "checkpoints")[::-1]
    reasons = []
    for one in found:
        try:
            model = load_bytes(read_verified(one)["model.safetensors"])
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        prefix = "target_encoder."
        weights = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
        return cfg, weights, {"file": str(one)}
    raise ConfigError(f"{path} has neither encoder.safetensors nor a whole checkpoint: {'; '.join(reasons) or 'none'}")


def checkpoint_folder(path: Path) -> Path:
    """The run folder that `path`, itself a run folder or a checkpoint in one, belongs to."""
    return path.parent.parent if (path / "checksums.json").exists() else path


def load_weights(encoder: torch.nn.Module, weights: dict[str, torch.Tensor], checkpoint: dict[str, Any]) -> None:
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{checkpoint['file']} does not fit the run's config.json: {error}") from error


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
    """The head whose classes are told one by one."""
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
    title += f"{'fold' if len(folds) == 1 else 'folds'}, {result['settings']['pooling']} over frequency; accuracy in %"
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
    args = tyro.cli(Arguments, args=argv, prog="python -m ajepa.probe")
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
