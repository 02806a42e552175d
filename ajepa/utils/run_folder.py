"""A run folder read without an engine: which checkpoints it holds, and their bytes, verified."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ajepa.utils.errors import UserError

CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, is damaged, or belongs to another model or program."""


def is_checkpoint(folder: Path) -> bool:
    return (folder / "state.json").is_file() or (folder / "checksums.json").is_file()


def run_of(path: Path) -> Path:
    """The run folder of `path`, which is a run folder or one of its checkpoints."""
    return path.resolve().parents[1] if is_checkpoint(path) else path


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders in `folder`, oldest first."""
    return sorted((p for p in folder.glob("step_*") if p.is_dir() and p.name[5:].isdecimal()), key=steps_of)


def steps_of(checkpoint: Path) -> int:
    """The number of steps after which a checkpoint was saved, from its name."""
    digits = checkpoint.resolve().name.removeprefix("step_")
    if not digits.isdecimal():
        raise CheckpointError(f"{checkpoint}: the folder of a checkpoint is called step_ and a number; rename it so")
    return int(digits)


def read_verified(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint, checked against their SHA-256. Raises CheckpointError."""
    try:
        sums = json.loads((path / "checksums.json").read_bytes())
        contents = {name: (path / name).read_bytes() for name in CHECKPOINT_FILES}
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != sums[name]:
                raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the one it was saved with")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint of ajepa: {error!r}") from error
    return contents


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's `metrics.jsonl`. A line that a kill cut short, or that is no record, is left out."""
    records = []
    path = folder / "metrics.jsonl"
    for line in path.read_text("utf-8", "replace").split("\n") if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: also a number of too many digits
            continue
        if _is_record(record):
            records.append(record)
    return records


def _is_record(value: Any) -> bool:
    """Whether a line of `metrics.jsonl` is an object with a step, whose other values are numbers or null; the lists of
    a number for each rank are called "..._shares"."""
    if not isinstance(value, dict) or type(value.get("step")) is not int:
        return False
    return all(
        all(map(_is_number, x)) if isinstance(x, list) and name.endswith("_shares") else _is_number(x)
        for name, x in value.items()
    )


def _is_number(x: Any) -> bool:
    return x is None or isinstance(x, float) or (isinstance(x, int) and abs(x) < 2**63)
