"""What a folder is for, and whether a command may write into it. Every command that writes a folder asks `claim`."""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ajepa.utils.errors import ConfigError
from ajepa.utils.lock import locked
from ajepa.utils.run_folder import run_of

Kind = Literal["run", "fine-tuning", "checkpoint", "encoder", "shards", "probe", "headless run", "other"]
WHAT = {
    "run": "a pretraining run",
    "fine-tuning": "a fine-tuning",
    "checkpoint": "a checkpoint",
    "encoder": "an exported encoder",
    "shards": "packed shards",
    "probe": "results of a probe",
    "headless run": "checkpoints without the config.json of their run",
    "other": "other files",
}
# A probe adds files of its own names to these.
BESIDE: dict[str, tuple[str, ...]] = {"probe": ("run", "fine-tuning", "encoder")}


def kind_of(folder: Path) -> Kind | None:
    """What a folder is for, judged by the files that only one command writes; None if it is missing or empty.

    Hidden files, such as a lock, are not counted.
    """
    try:
        names = {name for name in os.listdir(folder) if not name.startswith(".")}
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return "other"
    if not names:
        return None
    if names & {"state.json", "checksums.json"}:
        return "checkpoint"
    if names & {"arguments.json", "finetune.json", "classifier.safetensors"}:
        return "fine-tuning"
    if any(name.endswith(".shard") for name in names) or names == {"left_out.tsv"}:
        return "shards"
    config = _config(folder / "config.json")
    if config.get("model_type") == "ajepa-encoder":
        return "encoder"
    if {"preset", "front_end", "optim"} <= config.keys():
        return "run"
    if any(folder.glob("checkpoints/step_*")) or names & {"metrics.jsonl", "summary.json", "encoder.safetensors"}:
        return "headless run"
    return "probe" if "probe.json" in names else "other"


def is_run(folder: Path) -> bool:
    """Whether an encoder can be read from `folder` as from a run: a run, a fine-tuning or a checkpoint of either."""
    return kind_of(folder) in ("run", "fine-tuning", "checkpoint")


def results_folder(out: str | None, source: str, command: str, below: str = "") -> Path:
    """Where a command puts its results: in `out`, or else in the folder of `source`, or `below` in it.

    The results of an encoder of the hub, which has no folder here, go to a folder of the command's name.
    """
    path = Path(source).expanduser()
    if out:
        return Path(out).expanduser()
    return run_of(path) / below if path.is_dir() else Path(command, path.name)


def claim(folder: Path, purpose: Kind, flag: str = "--out") -> bool:
    """Make `folder` if need be, for a command that writes files of the kind `purpose` into it.

    Returns whether it already holds files of that kind. Raises ConfigError if it holds something else, or cannot be
    written; `flag` is the setting that names the folder.
    """
    try:
        kind = kind_of(folder)
        if kind is not None and kind != purpose and kind not in BESIDE.get(purpose, ()):
            where = f"{flag} {folder}".strip()
            if not folder.is_dir():
                raise ConfigError(f"{where} is a file: choose another {flag}")
            if kind == "headless run":
                raise ConfigError(f"{where} holds {WHAT[kind]}: restore that file, or choose another {flag}")
            raise ConfigError(f"{where} holds {WHAT[kind]}, which this command would damage: choose another {flag}")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{flag} {folder} cannot be written: {error.strerror}; choose another {flag}") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{flag} {folder} cannot be written: permission denied; choose another {flag}")
    return kind == purpose


def overwrite(folder: Path, purpose: Kind, description: str, flag: str = "--out") -> None:
    """Make way in `folder`, if it holds files of the kind `purpose`: they are kept beside it, see `set_aside`.

    On a terminal the user is asked first; `description` says what would be replaced. Raises ConfigError if the user
    declines, or if a living process writes into the folder.
    """
    if kind_of(folder) != purpose:
        return
    with locked(folder, flag):
        if (
            sys.stdin
            and sys.stdin.isatty()
            and not _agrees(f"{folder} holds {WHAT[purpose]} ({description}). Replace it? [y/N] ")
        ):
            raise ConfigError(f"{flag} {folder} is left as it is: choose another {flag}")
    print(f"{folder} held {WHAT[purpose]} ({description}), which is kept as {set_aside(folder)}")


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def claim_file(path: Path, own: Callable[[Path], bool], flag: str = "--out") -> None:
    """Make the folder of `path` if need be, for a command that writes this file.

    Raises ConfigError if `path` is anything but an earlier output of the command, which `own` recognises, or cannot be
    written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not (path.is_file() and own(path)):
            what = "a file of another kind" if path.is_file() else "not a file"
            raise ConfigError(f"{flag} {path} is {what}: delete it, or choose another {flag}")
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error.strerror}; choose another {flag}") from error
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path} cannot be written: permission denied; choose another {flag}")


def set_aside(folder: Path) -> Path:
    """Rename `folder`, so that a new one can take its place. Returns the new path, `<folder>.old-<time>`."""
    if folder.name in ("", ".."):
        raise ConfigError(f"{folder} cannot be set aside under this name: give its path from another folder")
    name = f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    aside = next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
    try:
        folder.rename(aside)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be set aside as {aside}: {error.strerror}") from error
    return aside


def _config(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
