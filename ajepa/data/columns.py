"""The columns of an index. They store a recording in little more than its name, a tenth of what Python objects need."""

import operator
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

CHUNK = 1 << 16  # values encoded at a time; equal values within a chunk are stored once
NUMBERS = np.dtype(
    [(name, np.int64) for name in ("offset", "size", "mtime_ns", "file_size", "frames", "start", "total")]
    + [(name, np.int32) for name in ("sample_rate", "channels", "label")]
)


class Entry(NamedTuple):
    """A recording, or a segment of it. The recording is bytes `[offset, offset + size)` of the file `path`."""

    path: str
    member: str  # name inside a tar or shard, else ""
    offset: int
    size: int
    mtime_ns: int  # of the whole file at `path`
    file_size: int  # of the whole file at `path`
    frames: int  # samples of this row: of the segment if the row is a segment
    start: int  # the row's first sample within the recording
    total: int  # samples of the whole recording
    sample_rate: int
    channels: int
    format: str
    label: int  # row of `Index.label_names`, -1 if unknown

    @property
    def name(self) -> str:
        return row_name(self.path, self.member, self.start, self.frames, self.total, self.sample_rate)


def row_name(path: str, member: str, start: int, frames: int, total: int, rate: int) -> str:
    """`path` or `tar!member`; a segment has its times in seconds appended as a media fragment, `a.wav#t=1.5,2.5`."""
    name = f"{path}!{member}" if member else path
    return name if frames >= total else name + fragment(start / rate, (start + frames) / rate)


def fragment(start: float, end: float | None) -> str:
    """`#t=START,END` in seconds. Microseconds are fine enough to distinguish any two samples."""
    return "#t=" + ",".join("" if t is None else f"{t:.6f}".rstrip("0").rstrip(".") for t in (start, end)).rstrip(",")


class _Column(Sequence):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self[:3])}{' and more' * (len(self) > 3)}, {len(self)} in all)"


class Strings(_Column):
    """Read-only column of text, stored as UTF-8 in one blob. Surrogates, as in undecodable file names, are kept."""

    def __init__(self, values: Iterable[str]):
        values, parts = iter(values), []
        while chunk := list(islice(values, CHUNK)):
            distinct = {value: code for code, value in enumerate(dict.fromkeys(chunk))}
            encoded = [value.encode(errors="surrogatepass") for value in distinct]
            codes = np.fromiter((distinct[value] for value in chunk), np.int32, len(chunk))
            parts.append((codes, np.fromiter(map(len, encoded), np.int64, len(encoded)), b"".join(encoded)))
        self._join(parts)

    def _join(self, parts: list[tuple[np.ndarray, np.ndarray, bytes]]) -> None:
        """Joins parts, each of them (codes, lengths of the distinct values, bytes of the distinct values)."""
        base = np.cumsum([0] + [len(lengths) for _, lengths, _ in parts])
        codes = [codes + np.int32(first) for (codes, _, _), first in zip(parts, base[:-1], strict=True)]
        self.codes = np.concatenate([np.empty(0, np.int32), *codes])
        self._ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *(lengths for _, lengths, _ in parts)]))
        self._blob = b"".join(blob for _, _, blob in parts)

    @classmethod
    def concatenate(cls, columns: Iterable["Strings"]) -> "Strings":
        joined = cls.__new__(cls)
        joined._join([(column.codes, np.diff(column._ends), column._blob) for column in columns])
        return joined

    def take(self, rows: np.ndarray) -> "Strings":
        """The given rows. The text itself is shared, not copied."""
        taken = type(self).__new__(type(self))
        taken.codes, taken._ends, taken._blob = self.codes[rows], self._ends, self._blob
        return taken

    def distinct(self) -> set[str]:
        return {self._text(code) for code in np.unique(self.codes)}

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return self._text(self.codes[row])

    def _text(self, code: int) -> str:
        return self._blob[self._ends[code] : self._ends[code + 1]].decode(errors="surrogatepass")


class Entries(_Column):
    """Read-only sequence of `Entry`. `numbers`, `[len(self)]` of dtype `NUMBERS`, holds the integers of the entries."""

    def __init__(self, numbers: np.ndarray, path: Strings, member: Strings, format: Strings):
        self.numbers, self.path, self.member, self.format = numbers, path, member, format

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Entries":
        numbers = np.fromiter(((*e[2:11], e.label) for e in entries), NUMBERS, len(entries))
        return cls(numbers, *(Strings(getattr(e, name) for e in entries) for name in ("path", "member", "format")))

    @classmethod
    def concatenate(cls, tables: Sequence["Entries"]) -> "Entries":
        text = (Strings.concatenate(getattr(t, name) for t in tables) for name in ("path", "member", "format"))
        return cls(np.concatenate([np.empty(0, NUMBERS), *(t.numbers for t in tables)]), *text)

    def take(self, rows: np.ndarray) -> "Entries":
        return Entries(self.numbers[rows], self.path.take(rows), self.member.take(rows), self.format.take(rows))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        numbers = self.numbers[row].item()
        return Entry._make((self.path[row], self.member[row], *numbers[:-1], self.format[row], numbers[-1]))

    def names(self) -> Iterable[str]:
        positions = (self.numbers[name].tolist() for name in ("start", "frames", "total", "sample_rate"))
        return map(row_name, self.path, self.member, *positions)
