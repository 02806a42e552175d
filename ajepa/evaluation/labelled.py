"""Labelled recordings: the rows that have a label, and which of them an encoder was trained on."""

import contextlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ajepa import config
from ajepa.config import Config
from ajepa.data.contents import content_hashes
from ajepa.data.index import DataError, Index, build_index, was_decoded
from ajepa.data.synthetic import TRAINING_ROWS, default_set
from ajepa.utils.errors import UserError
from ajepa.utils.json_files import read_json
from ajepa.utils.run_folder import run_of

SETTINGS = "arguments.json"  # of a fine-tuning
MOST = 200_000  # recordings whose blocks are read, unless their names agree as well
TOLERANCE = 2e-3  # seconds by which resampling and rounding may change a length


def labelled(index: Index) -> Index:
    """The rows that have a label. Raises DataError if they have fewer than two classes."""
    rows = np.flatnonzero(index.labels >= 0)
    if len(np.unique(index.labels[rows])) < 2:
        raise DataError(f"{index.source}: labels of two or more classes are needed; name their column with --label")
    return index.subset(rows) if len(rows) < len(index) else index


def absent_classes(trained_K: torch.Tensor, wanted_K: torch.Tensor, classes: Sequence[str]) -> str | None:
    """A sentence on the classes that are wanted and that no training row has; None if there are none."""
    absent = [classes[k] for k in (wanted_K & ~trained_K).nonzero()[:, 0].tolist()]
    if not absent:
        return None
    named = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
    return f"{len(absent)} of {len(classes)} classes occur in no training row and cannot be recognised: {named}"


# --- recordings that an encoder was trained on ----------------------------------------------------------------------


class Material(NamedTuple):
    """Recordings that weights were trained on: rows of a source but for those `left_out`."""

    data: str
    where: str | None
    label: str | None
    float_scale: float
    left_out: str | None = None

    def read(self) -> Index:
        """The rows; where this machine has not decoded them yet, by their headers alone.

        Raises DataError if the source is gone or has changed.
        """
        decode = was_decoded(self.data, self.float_scale)
        index = build_index(
            self.data, where=self.where, label_column=self.label, float_scale=self.float_scale, decode=decode
        )
        if self.left_out is None:
            return index
        return index.subset(np.setdiff1d(np.arange(len(index)), index.rows(self.left_out)))


def materials(run: Config | None, file: Path) -> list[Material]:
    """What the weights in `file`, those of a run or of a fine-tuning, were trained on, as far as it is written."""
    return list(dict.fromkeys(_materials(run, run_of(file) if file.is_dir() else file.parent)))


def _materials(run: Config | None, folder: Path) -> Iterator[Material]:
    if run is not None:
        for earlier in filter(None, (run.init_from, run.cooldown_from, run.objective.teacher)):
            source = run_of(Path(earlier).expanduser())
            with contextlib.suppress(UserError):  # not a run, or gone
                yield from _materials(config.load(source / "config.json"), source)
        data, where = run.data.data, run.data.where
        if data is None:
            data, where = str(default_set(run.data.clip_seconds, run.front_end.sample_rate)), TRAINING_ROWS
        yield Material(data, where, run.data.label, run.data.float_scale)
    if (folder / SETTINGS).is_file():
        yield from _of_fine_tuning(read_json(folder / SETTINGS))


def _of_fine_tuning(settings: dict[str, Any]) -> list[Material]:
    try:
        own = Material(*(settings[name] for name in ("data", "where", "label", "float_scale", "test")))
        return [*(Material(*earlier) for earlier in settings.get("trained_on", [])), own]
    except (KeyError, TypeError):  # written by an earlier version
        return []


def seen_in_training(index: Index, known: Iterable[Material]) -> np.ndarray | None:
    """How each row of `index` was recognised as one that was trained on, see `recognise`; None where nothing is known.

    Sources that cannot be read any more are named on stderr.
    """
    how = None
    for material in known:
        try:
            trained = material.read()
        except (DataError, OSError):
            print(f"warning: {material.data} was trained on and cannot be read, so test recordings may be among it",
                  file=sys.stderr)  # fmt: skip
            continue
        found = recognise(index, trained)
        how = found if how is None else np.where(how == "", found, how)
    return how


def recognise(index: Index, trained: Index) -> np.ndarray:
    """How each row of `index` was found among the recordings of `trained`, or "".

    "path": it is the same file, or the same member of a tar or shard. "content": another file, or a member, has as many
    bytes and equal blocks. "name": shards hold a recording of the same name, in a folder of the same name, and of the
    same length. Segments are recognised by their whole recording, except in shards.
    """
    how = np.full(len(index), "", dtype=object)
    origins, theirs = _origins(index), _origins(trained)
    known = set(theirs)
    how[[origin in known for origin in origins]] = "path"
    # Only recordings of equal size are read, which are few unless all are of one length.
    sizes, their_sizes = index.entries.numbers["size"], trained.entries.numbers["size"]
    rows = np.flatnonzero((how == "") & np.isin(sizes, their_sizes))
    candidates = np.flatnonzero(np.isin(their_sizes, sizes[rows]))
    if len(candidates) > MOST:
        names = {_tail(origins[row], 1) for row in rows.tolist()}
        candidates = np.array([row for row in candidates.tolist() if _tail(theirs[row], 1) in names], np.int64)
    contents = set(content_hashes(trained, candidates)) - {None}
    how[[row for row, digest in zip(rows, content_hashes(index, rows), strict=True) if digest in contents]] = "content"
    if _shards(index) or _shards(trained):
        seconds, lengths = _seconds(index), defaultdict(list)
        for origin, length in zip(theirs, _seconds(trained), strict=True):
            lengths[_tail(origin, 2)].append(length)
        for row in np.flatnonzero(how == "").tolist():
            if any(abs(seconds[row] - other) < TOLERANCE for other in lengths.get(_tail(origins[row], 2), ())):
                how[row] = "name"
    return how


def counts_of(how: np.ndarray) -> dict[str, int]:
    """Numbers of recordings recognised in each way."""
    return dict(Counter(way for way in how.tolist() if way))


def ways(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} recognised by {way}" for way, count in counts.items())


def _shards(index: Index) -> bool:
    return bool(len(index)) and index.entries[0].format.startswith("SHARD/")


def _seconds(index: Index) -> list[float]:
    numbers = index.entries.numbers
    return (numbers["frames"] / numbers["sample_rate"]).tolist()


def _origins(index: Index) -> list[tuple[str, str]]:
    """File and member of each recording; for one in a shard, those that it was packed from."""
    origins = []
    packed = _shards(index)
    for path, member in zip(index.entries.path, index.entries.member, strict=True):
        if packed:
            path, _, member = member.partition("#t=")[0].partition("!")
        folder, name = os.path.split(path)
        origins.append((os.path.join(_real(folder), name), member))
    return origins


@cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _tail(origin: tuple[str, str], parts: int) -> tuple[str, ...]:
    """The last parts of a recording's name."""
    path, member = origin
    return Path(member or path).parts[-parts:]
