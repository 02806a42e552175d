"""What a listing holds: files with their label, segment and other columns, and what was left out. No file is read here.

A label is text. A list of labels, as JSON and Parquet give it, is the text of a JSON array: `encode_label` writes it
and `decode_label` reads it; every other label is its own text.
"""

import ast
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ajepa.data.columns import fragment

LABEL_COLUMNS = ("label", "target", "category", "class", "class_name", "labels")
MISSING = ("nan", "NaN", "<NA>", "NaT")  # how data frames write a missing value into a column of text
_SCALAR = r"""\s*(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\w.+-]+)\s*"""
PYTHON_LIST = re.compile(rf"\[(?:{_SCALAR}(?:,{_SCALAR})*,?)?\s*\]")  # as data frames write lists into CSV


class DataError(ValueError):
    """A data set that cannot be used; the message names it and the remedy."""


class Listed(NamedTuple):
    """A file, a tar's member, or a segment of one, that may hold audio. Sizes are in bytes, times in seconds."""

    path: str
    member: str
    offset: int
    size: int
    mtime_ns: int
    file_size: int
    label: str | None
    metadata: tuple[str, ...]  # one value per `Listing.columns`
    start: float | None = None  # None: from the beginning
    duration: float | None = None  # None: to the end

    @property
    def name(self) -> str:
        name = f"{self.path}!{self.member}" if self.member else self.path
        if self.start is None:  # a duration alone usually is the whole recording's
            return name
        return name + fragment(self.start, None if self.duration is None else self.start + self.duration)


@dataclass
class Listing:
    files: list[Listed] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    segment_columns: list[str] = field(default_factory=list)  # the columns that segments were read from


def cache_root() -> Path:
    """`AJEPA_CACHE`, else `ajepa` in the user's cache folder (XDG)."""
    if root := os.environ.get("AJEPA_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ajepa"


def find_column(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The column called by the first name in `wanted` that there is; case and blanks around a name do not count."""
    lower = {name.strip().lower(): name for name in reversed(list(names))}
    return next((lower[name] for name in wanted if name in lower), None)


def label_column_of(source: str, names: Sequence[str], wanted: str | None) -> str | None:
    """The column that holds the labels, None where there is none. Raises DataError where `wanted` is missing."""
    if wanted is not None and wanted not in names:
        raise DataError(f"{source}: no column {wanted!r} to take labels from; its columns: {', '.join(names)}")
    return wanted if wanted is not None else find_column(names, LABEL_COLUMNS)


def readable(text: str) -> str:
    """Text that can be shown: bytes that are no UTF-8, kept as surrogates so far, are read as Latin-1."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(errors="surrogateescape").decode("latin-1")
    except UnicodeEncodeError:  # half of a pair, as JSON can hold
        return text.encode(errors="backslashreplace").decode()


def text_of(value: Any) -> str:
    """A cell of a manifest as text; a missing value is empty, and a whole number has no fraction."""
    if isinstance(value, str):
        return readable(value)
    if value is None or isinstance(value, bytes) or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return str(int(value))
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def encode_label(value: Any) -> str | None:
    """The label of a cell, None for no label; a list keeps its order, and its parts are trimmed and distinct."""
    if isinstance(value, str):
        value = _listed_in(value) if value.lstrip().startswith("[") else value
    if not isinstance(value, (list, tuple)):
        text = text_of(value).strip()
        return None if text in MISSING else text or None
    parts = list(dict.fromkeys(part for item in value if (part := encode_label(item)) is not None))
    if len(parts) == 1 and not re.search(r"[,;\[]", parts[0]):
        return parts[0]  # the same class as that text alone
    return json.dumps(parts, ensure_ascii=False) if parts else None


def decode_label(label: str) -> list[str] | None:
    """The parts of a label that is a list, None for any other."""
    if label.startswith("["):
        try:
            parts = json.loads(label)
        except (ValueError, RecursionError):
            return None
        if isinstance(parts, list) and not any(isinstance(part, (list, dict)) for part in parts):
            return [part for item in parts if (part := encode_label(item)) is not None]
    return None


def classes_of(label: str, multi_label: bool) -> list[str]:
    """The classes that a label stands for: the parts of a list; of other text its parts between commas or semicolons
    with `multi_label`, else all of it. Raises DataError for a list of several without `multi_label`."""
    parts = decode_label(label)
    if parts is not None and len(parts) > 1 and not multi_label:
        raise DataError(
            f"a recording has several labels ({', '.join(parts)}): add --multi-label, or take another column"
        )
    if parts is None:
        parts = [part.strip() for part in re.split("[,;]", label)] if multi_label else [label]
    return [part for part in parts if part]


def _listed_in(text: str) -> list | str:
    """The list that a text holds, in JSON's or Python's notation, else the text itself."""
    text = text.strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text) if PYTHON_LIST.fullmatch(text) else text
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return text
    flat = isinstance(value, list) and not any(isinstance(part, (list, dict)) for part in value)
    return value if flat else text
