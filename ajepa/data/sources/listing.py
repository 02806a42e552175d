"""The listing of a data set: files with their label, segment and other columns, and the files that were left out.

A label is text. A list of labels, as in JSON and Parquet, is stored as the text of a JSON array: `encode_label` writes
it and `decode_label` reads it. Every other label is stored unchanged. This module reads no file.
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
from ajepa.utils.errors import UserError

LABEL_COLUMNS = ("label", "target", "category", "class", "class_name", "labels")
MAX_NESTING = 100  # of lists in a label
MISSING = ("nan", "NaN", "<NA>", "NaT")  # how data frames write a missing value into a text column
_SCALAR = r"""\s*(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\w.+-]+)\s*"""
PYTHON_LIST = re.compile(rf"\[(?:{_SCALAR}(?:,{_SCALAR})*,?)?\s*\]")  # as data frames write lists into CSV


class DataError(UserError, ValueError):
    """The data set cannot be used. The message names it and the remedy."""


class Listed(NamedTuple):
    """A file, a member of a tar, or a segment of either, that may hold audio. Sizes are in bytes, times in seconds."""

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
        if self.start is None:  # a duration without a start usually is that of the whole recording
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
    """The folder `AJEPA_CACHE` if it is set, else `ajepa` in the user's cache folder (XDG)."""
    if root := os.environ.get("AJEPA_CACHE"):
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ajepa"


def find_column(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The column with the first name of `wanted` that exists. Case and surrounding blanks are ignored."""
    lower = {name.strip().lower(): name for name in reversed(list(names))}
    return next((lower[name] for name in wanted if name in lower), None)


def label_column_of(source: str, names: Sequence[str], wanted: str | None) -> str | None:
    """The column that holds the labels, None if there is none. Raises DataError if `wanted` is missing."""
    if wanted is not None and wanted not in names:
        raise DataError(f"{source}: no column {wanted!r} to take labels from; its columns: {', '.join(names)}")
    return wanted if wanted is not None else find_column(names, LABEL_COLUMNS)


def readable(text: str) -> str:
    """Text that can be shown. Bytes that are not UTF-8, held as surrogates until now, are read as Latin-1."""
    if text.isascii():
        return text
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(errors="surrogateescape").decode("latin-1")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return text.encode(errors="backslashreplace").decode()


def text_of(value: Any) -> str:
    """The cell of a manifest as text. A missing value becomes empty, and a whole number loses its fraction."""
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


def encode_label(value: Any, depth: int = 0) -> str | None:
    """The label of a cell, None if it has none. A list keeps its order; its parts are trimmed and made distinct.

    Raises RecursionError for lists nested deeper than MAX_NESTING, whatever depth the interpreter allows.
    """
    if depth > MAX_NESTING:
        raise RecursionError(f"lists nested more than {MAX_NESTING} deep")
    if isinstance(value, str):
        value = _listed_in(value) if value.lstrip().startswith("[") else value
    if not isinstance(value, (list, tuple)):
        text = text_of(value).strip()
        return None if text in MISSING else text or None
    parts = list(dict.fromkeys(part for item in value if (part := encode_label(item, depth + 1)) is not None))
    if len(parts) == 1 and not re.search(r"[,;\[]", parts[0]):
        return parts[0]  # the same class as the text by itself
    return json.dumps(parts, ensure_ascii=False) if parts else None


def decode_label(label: str) -> list[str] | None:
    """The parts of a label that is a list, None for any other label."""
    if label.startswith("["):
        try:
            parts = json.loads(label)
        except (ValueError, RecursionError):
            return None
        if isinstance(parts, list) and not any(isinstance(part, (list, dict)) for part in parts):
            return [part for item in parts if (part := encode_label(item)) is not None]
    return None


def classes_of(label: str, multi_label: bool) -> list[str]:
    """The classes that a label names.

    They are the parts of a list. Any other text is one class, or with `multi_label` one class per part between commas
    or semicolons. Raises DataError for a list of several parts without `multi_label`.
    """
    parts = decode_label(label)
    if parts is not None and len(parts) > 1 and not multi_label:
        raise DataError(
            f"a recording has several labels ({', '.join(parts)}): add --multi-label, or take another column"
        )
    if parts is None:
        parts = [part.strip() for part in re.split("[,;]", label)] if multi_label else [label]
    return [part for part in parts if part]


def _listed_in(text: str) -> list | str:
    """The list that a text holds in the notation of JSON or Python, else the text itself."""
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
