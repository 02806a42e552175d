"""`python -m ajepa.probe RUN --data ...`: the kNN accuracy of a finished run's frozen features on labelled recordings,
beside the untrained encoder's and that of pooled log-mel."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from safetensors.torch import load_file

from ajepa import config
from ajepa.config import ConfigError
from ajepa.corpus import load_evaluation
from ajepa.engine import Engine, choose_device
from ajepa.features import Features, encoder_features, knn_accuracy, log_mel_features
from ajepa.index import DataError, build_index


@dataclass(frozen=True)
class Arguments:
    """Score a run's frozen encoder by k nearest neighbours (k = 10, cosine) on labelled recordings."""

    run: tyro.conf.Positional[str]
    """Run folder, with config.json and encoder.safetensors."""
    data: str
    """Labelled recordings: a folder with a sub-folder a class, a CSV/JSONL manifest, or webdataset tars."""
    where: str | None = None
    """Rows to use, such as "fold=1,2,3,4"."""
    label: str | None = None
    """Column that holds the label, where it is not found by its name."""
    test: str | None = None
    """Rows to classify, such as "fold=4"; the others are the neighbours. None: every fourth clip."""
    folds: str | None = None
    """Or: cross-validate over the values of this column, each in turn classified from all the others."""
    pooling: Literal["run", "mean", "concat"] = "run"
    """Over frequency patches; run: as the run did."""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def probe(args: Arguments) -> dict[str, list[float]]:
    """kNN accuracy of each kind of features, one figure a fold. Raises ConfigError, DataError."""
    folder = Path(args.run)
    cfg = config.load(folder / "config.json")
    weights = load_weights(folder / "encoder.safetensors")
    engine = Engine(cfg, choose_device(args.device))
    encoder = engine.model.target_encoder
    pooling = cfg.watch.pooling if args.pooling == "run" else args.pooling

    index = build_index(args.data, where=args.where, label_column=args.label)
    skipped = list(index.skipped)
    clips = load_evaluation(cfg, index, args.test, None, skipped)
    tests = [clips.is_test]
    if args.folds is not None:
        if args.folds not in index.metadata:
            raise DataError(f"--folds {args.folds}: no such column; there are {', '.join(index.metadata) or 'none'}")
        column = [index.metadata[args.folds][i] for i in clips.items.tolist()]
        tests = [torch.tensor([value == fold for value in column]) for fold in sorted(set(column))]
    if not all(clips.has_labels(test) for test in tests):
        raise DataError(f"{args.data}: labels of two or more classes are needed on both sides; see --label and --test")
    for path, reason in skipped:
        print(f"skipped {path}: {reason}", file=sys.stderr)

    def features() -> Features:
        return encoder_features(encoder, engine.front_end, cfg.front_end, pooling)

    embedded = {"pooled log-mel": clips.embed(log_mel_features(cfg.front_end), engine.device)}
    with engine.autocast():
        embedded["untrained encoder"] = clips.embed(features(), engine.device)
        try:
            encoder.load_state_dict(weights)
        except RuntimeError as error:
            raise ConfigError(f"{folder}: encoder.safetensors does not fit config.json: {error}") from error
        embedded["trained encoder"] = clips.embed(features(), engine.device)
    return {name: [knn_accuracy(x, clips.labels, test) for test in tests] for name, x in embedded.items()}


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a .safetensors file; no other format, for those can run code."""
    try:
        return load_file(path)
    except Exception as error:  # safetensors has an exception type of its own
        raise ConfigError(f"{path} cannot be read as safetensors: {error}. Has the run finished?") from error


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Arguments, args=argv, prog="python -m ajepa.probe")
    try:
        scores = probe(args)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, values in scores.items():
        x = torch.tensor(values)
        spread = f" +- {x.std():.1%} over {len(x)} folds" if len(x) > 1 else ""
        print(f"{name:<18} kNN {x.mean():.1%}{spread}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
