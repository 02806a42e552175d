"""`python -m ajepa.probe ENCODER --data ...`: score the frozen features of an encoder on labelled recordings.

The encoder is compared with two baselines on the same recordings and folds, with the same heads and at the same
pooling: an untrained encoder of its shape (of a run, its own before the first step), and pooled log-mel.
"""

import platform
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table
from sklearn.metrics import classification_report, confusion_matrix

from ajepa.config import SIZES, ConfigError, Pooling
from ajepa.data.decode import resampled_lengths
from ajepa.data.index import DataError, Index, build_index
from ajepa.encoder import Encoder, Opened, open_encoder
from ajepa.evaluation import plots
from ajepa.evaluation.feature_cache import EncoderFeatures, LogMelFeatures, data_hash, embed
from ajepa.evaluation.features import log_mel_pooling
from ajepa.evaluation.labelled import absent_classes, counts_of, labelled, materials, seen_in_training, ways
from ajepa.evaluation.probes import BATCH, BATCH_VALUES, HEADS, Embedded, predict
from ajepa.model.frontend import FrontEnd
from ajepa.model.jepa import JEPA
from ajepa.model.layers import Linear
from ajepa.model.pooling import Layers
from ajepa.model.pretrained import load_weights
from ajepa.utils import cli
from ajepa.utils.command import command
from ajepa.utils.devices import autocast_of, available_memory, choose_device, evaluates_in_bf16
from ajepa.utils.folders import claim, results_folder
from ajepa.utils.json_files import write_json
from ajepa.utils.tensor_files import tensors_hash
from ajepa_kernels import LogMelSpec

TRAINED, UNTRAINED, LOG_MEL = "trained encoder", "untrained encoder", "pooled log-mel"
Head = Literal["knn", "linear", "attentive", "logistic", "knn-xares"]


@dataclass(frozen=True)
class Arguments:
    """Score a frozen encoder on labelled recordings, next to an untrained encoder and pooled log-mel."""

    run: tyro.conf.Positional[str]
    """The encoder: a run folder, one checkpoint in it (RUN/checkpoints/step_...), a fine-tuning, an exported or
    converted encoder, or an id on the Hugging Face hub."""
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
    run: as the run did, or as the encoder is configured."""
    layers: Literal["run"] | Layers = "run"
    """last: the encoder's output. mean: the average of all blocks' outputs, each layer-normalised. run: as the encoder
    is configured, which is last for a run."""
    log_mel: Literal["run", "standard"] = "run"
    """Front end of the log-mel baseline. run: the encoder's own. standard: the same for every encoder, 128 bands of
    25 ms windows every 10 ms."""
    seeds: int = 1
    """Number of trainings of each head, from seed 0 up. The score is their mean."""
    map: Literal["pca", "tsne", "both", "none"] = "both"
    """Method of the two-dimensional picture of the embeddings."""
    out: str | None = None
    """Folder for probe.json and the pictures. None: the folder of the run or encoder; probe/NAME for one of the hub."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that computes the features and trains the heads. auto: the GPU if there is one."""


@dataclass(frozen=True)
class Fold:
    name: str
    train: torch.Tensor  # int64, rows of the features
    test: torch.Tensor
    seen: dict[str, int] | None = None
    """Test recordings that the encoder was trained on, by the way they were recognised; None where it is unknown."""
    absent: str | None = None
    """A sentence on tested classes that no training row has."""


@dataclass(frozen=True)
class Task:
    """Labelled recordings and their division into folds."""

    index: Index
    items: torch.Tensor  # int64 [n], rows of `index`
    labels: torch.Tensor  # int64 [n], numbered over `classes`
    classes: list[str]
    folds: list[Fold] = field(default_factory=list)


def probe(args: Arguments) -> dict[str, Any]:
    """Score the encoder and return the contents of `probe.json`. Raises ConfigError, DataError or CheckpointError."""
    start = time.perf_counter()
    if args.seeds < 1 or not args.heads:
        raise ConfigError("--seeds must be 1 or more, and --heads must name at least one")
    if args.test and args.folds:
        raise ConfigError("--test and --folds are two ways to divide the recordings: give one")
    device = choose_device(args.device)
    asked = {name: None if value == "run" else value for name, value in (("pooling", args.pooling),
                                                                         ("layers", args.layers))}  # fmt: skip
    opened = open_encoder(args.run, **asked)
    config, run = opened.encoder.config, opened.run
    folder = results_folder(args.out, args.run, "probe")
    claim(folder, "probe")
    index = build_index(args.data, where=args.where, label_column=args.label, float_scale=args.float_scale)
    if (index.single_labels != index.labels).any():
        raise DataError(
            f"{args.data}: recordings have several labels; the probe takes one: name another column with --label, or "
            "fine-tune with --multi-label"
        )
    index = labelled(index)
    divide(index, torch.arange(len(index)), args)  # report a wrong division before any work
    check_memory(index, opened.encoder, args)
    seen = seen_in_training(index, materials(run, opened.file))
    precision = run.precision if run else "auto"
    skipped = list(index.skipped)

    kinds = [config.pooling] + ["tokens"] * ("attentive" in args.heads)
    reading = {"threads": run.data.loader_threads if run else 0, "decoder": args.decoder}
    options: dict[str, Any] = {"device": device, "reading": reading, "skipped": skipped}
    features: dict[str, Embedded] = {}
    baseline = LogMelFeatures(log_mel_spec(config.front_end, args.log_mel))
    passes: list[dict[str, Any]] = [{UNTRAINED: untrained(opened)}, {TRAINED: opened.encoder, LOG_MEL: baseline}]
    for encoders in passes:
        sources = {n: source_of(x, device, precision) if isinstance(x, Encoder) else x for n, x in encoders.items()}
        items, made = embed(index, sources, config.clip_samples, kinds, **options)
        features |= made
    if any(len(x.clips) != len(items) for x in features.values()):
        raise DataError(f"{args.data}: its files changed while they were read; run again")
    for name, x in features.items():
        if not x.clips.isfinite().all() or (x.tokens is not None and not x.tokens.isfinite().all()):
            raise ConfigError(f"{args.run}: the {name}'s features are not finite: the run has diverged")
    task = divide(index, items, args, seen)

    guesses = {
        name: {head: torch.stack([_cross_validate(head, features[name], task, seed, device)
                                  for seed in range(1 if head in DETERMINISTIC else args.seeds)])
               for head in args.heads}
        for name in (LOG_MEL, UNTRAINED, TRAINED)
    }  # fmt: skip
    result = {
        "run": str(args.run),
        "checkpoint": {"file": str(opened.file), "sha256": tensors_hash(opened.encoder.vit.state_dict())},
        "data": {
            "source": args.data, "where": args.where, "hash": data_hash(index), "recordings": len(items),
            "seconds": index.seconds, "classes": task.classes, "skipped": [list(pair) for pair in skipped],
        },
        "settings": {**asdict(args), "pooling": config.pooling, "layers": config.layers},
        "dimensions": {name: x.clips.shape[1] for name, x in features.items()},
        "folds": [{"name": f.name, "train": len(f.train), "test": len(f.test), "absent_classes": f.absent,
                   "seen_in_pretraining": None if f.seen is None else sum(f.seen.values()), "seen_by": f.seen}
                  for f in task.folds],
        "scores": {name: {head: scores(g, task) for head, g in heads.items()} for name, heads in guesses.items()},
        "classes": {head: per_class(g, task) for head, g in guesses[TRAINED].items()},
        "seconds": time.perf_counter() - start,
        "versions": versions(),
        "device": str(device),
    }  # fmt: skip
    try:
        write_json(folder / "probe.json", result)
        draw(folder, result, features[TRAINED], task, guesses[TRAINED], args)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}; choose another --out") from error
    return result


def untrained(opened: Opened) -> Encoder:
    """A newly initialised encoder of the same shape: that of a run before its first step, else one of seed 0."""
    run = opened.run
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed if run else 0)
        if run is None:
            return Encoder(opened.encoder.config)
        start = JEPA(run)
    encoder = Encoder(opened.encoder.config)
    load_weights(encoder.vit, start.context_encoder.state_dict(), "the run's initialisation")
    if encoder.projector is not None:
        load_weights(encoder.projector, start.clip.projector.state_dict(), "the run's initialisation")
    return encoder


def source_of(encoder: Encoder, device: torch.device, precision: str) -> EncoderFeatures:
    """The encoder as a source of features, on `device`. Its linear layers and its front end round to bfloat16 once."""
    config, bf16 = encoder.config, evaluates_in_bf16(device, precision)
    encoder.to(device)
    if bf16:
        for module in encoder.vit.modules():
            if isinstance(module, Linear):
                module.add_copies(torch.bfloat16)
    projector = encoder.projector if config.pooling == "projection" else None
    key = f"{tensors_hash(encoder.vit.state_dict())} {config.positions} {'bf16' if bf16 else 'fp32'} {config.layers}"
    key += f" {config.norm_eps}" + (f" {tensors_hash(projector.state_dict())}" if projector else "")
    front_end = FrontEnd(config.front_end, dtype=torch.bfloat16 if bf16 else torch.float32)
    autocast = partial(autocast_of, device, precision)
    return EncoderFeatures(encoder.vit, front_end, config.front_end, key, config.layers, projector, autocast)


def check_memory(index: Index, encoder: Encoder, args: Arguments) -> None:
    """Raise ConfigError if the features that the heads read, or the confusion table, cannot fit in memory."""
    config, log_mel = encoder.config, log_mel_spec(encoder.config.front_end, args.log_mel)
    rows, width = config.front_end.grid[0], SIZES[config.size][0]
    clips = 4 * len(index) * (2 * encoder.output_dim + log_mel.n_mels * len(log_mel_pooling(config.pooling).split("+")))
    samples = resampled_lengths(index, config.front_end.sample_rate)
    tokens = 0.0
    if "attentive" in args.heads:  # float16, of all time patches
        columns, frames = (samples / (x.hop_length * x.patch[1]) + 1 for x in (config.front_end, log_mel))
        of_encoder, of_log_mel = 2 * rows * width * columns.sum(), 4 * log_mel.n_mels * frames.sum()
        tokens = 2 * of_encoder + of_log_mel + 3 * max(of_encoder, of_log_mel)  # joining and caching one takes copies
        tokens += 20 * min(BATCH_VALUES, BATCH * rows * width * columns.max())  # a batch and its gradients, float32
    need, free = clips + tokens + 16 * len(np.unique(index.labels)) ** 2, available_memory()
    if need > free:
        remedy = "leave attentive out of --heads, " if tokens > clips else ""
        raise ConfigError(
            f"--data {args.data}: the features of {len(index):,} recordings need {need / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free: {remedy}choose a narrower --pooling, or fewer recordings with --where"
        )


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


def divide(index: Index, items: torch.Tensor, args: Arguments, seen: np.ndarray | None = None) -> Task:
    """Divide the recordings `items` into folds. `seen` is that of `seen_in_training` for the rows of `index`.

    Raises DataError for a fold with nothing to learn from or classify.
    """
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
    task = Task(index, items, torch.from_numpy(labels), [index.label_names[c] for c in used])
    for name, test in tests.items():
        learnt = torch.from_numpy(np.flatnonzero(~test))
        if len(learnt) == len(at) or len(task.labels[learnt].unique()) < 2:
            raise DataError(f"{args.data}: {name} must leave two or more classes to learn from and some recordings to "
                            "classify; see --test and --folds")  # fmt: skip
        asked = torch.from_numpy(np.flatnonzero(test))
        counts = None if seen is None else counts_of(seen[items[asked].numpy()])
        trained, tested = (torch.bincount(task.labels[rows], minlength=len(used)) > 0 for rows in (learnt, asked))
        absent = absent_classes(trained, tested, task.classes)
        task.folds.append(Fold(name, learnt, asked, counts, absent))
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
            print(f"warning: {what} were pretrained on ({ways(fold['seen_by'])}); leave them out of pretraining with "
                  "--where", file=sys.stderr)  # fmt: skip
        if fold["absent_classes"]:
            print(f"warning: {fold['name']}: {fold['absent_classes']}", file=sys.stderr)
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


@command
def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "python -m ajepa.probe")
    report(probe(args), args, Console(highlight=False))
    return 0


assert set(HEADS) == set(Head.__args__)  # type: ignore[attr-defined]

if __name__ == "__main__":
    sys.exit(main())
