"""Labelled recordings: the rows that have a label, and the recordings on which an encoder was pretrained."""

from pathlib import Path

import numpy as np

from ajepa.config import Config
from ajepa.data.index import DataError, Index


def labelled(index: Index) -> Index:
    """The rows that have a label. Raises DataError if they have fewer than two classes."""
    rows = np.flatnonzero(index.labels >= 0)
    if len(np.unique(index.labels[rows])) < 2:
        raise DataError(f"{index.source}: labels of two or more classes are needed; name their column with --label")
    return index.subset(rows) if len(rows) < len(index) else index


def pretrained_on(cfg: Config, index: Index) -> set[tuple[str, str]] | None:
    """(path, member) of those recordings of `index` on which a run of `cfg` was pretrained.

    None if the run was pretrained on another source. A recording counts as seen if any segment of it was trained on.
    """
    source = cfg.data.data
    if source is None or Path(source).expanduser().resolve() != Path(index.source).resolve():
        return None
    try:
        entries = (index.filter(cfg.data.where) if cfg.data.where else index).entries
        return set(zip(entries.path, entries.member, strict=True))
    except DataError:  # the run used none of these rows
        return set()
