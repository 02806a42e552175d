"""Shards: files of recordings decoded once to mono int16 PCM (or FLAC), read by position and checked when read.

The layout of a shard, in which all numbers are little-endian:

    header    256 bytes: `HEADER`, zeros, and the CRC-32 of the 252 bytes before it
    payload   the clips one after the other, each divided into blocks of `BLOCK` bytes; its last block may be shorter
    records   one `RECORD` per clip
    CRCs      CRC-32 of each block of each clip, uint32
    notes     JSON: names, labels and other columns of the clips, and the recordings left out with the reason

The header holds the CRC-32 of records, CRCs and notes. A set of shards covers all rows of its source.
"""

import contextlib
import json
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ajepa.data.columns import NUMBERS, Entries, Entry, Strings
from ajepa.data.formats.audiofile import BadAudio, Truncated, read_into, reason_of, stat_file
from ajepa.data.sources.source import DataError

try:
    from isal.isal_zlib import crc32  # the same CRC-32, several times faster
except ImportError:
    from zlib import crc32

SUFFIX = ".shard"
MAGIC = b"AJEPAPCM"
VERSION = 2  # version 1 has the same layout, but its resampled clips contain aliases
HEADER_SIZE = 256
BLOCK = 1 << 16
OPEN_FILES = 512  # a process is often limited to 1,024 open files
CODECS = ("pcm", "flac")
FORMATS = {codec: f"SHARD/{codec.upper()}" for codec in CODECS}  # `Entry.format`
HEADER = struct.Struct("<8sIIIIQQQQ16sQQI")
RECORD = np.dtype(
    [("row", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("frames", "<i8"), ("first_block", "<i8")]
    + [("source_rate", "<i4"), ("source_channels", "<i4"), ("digest", "V16")]
)
REMEDY = "run `python -m ajepa.pack SOURCE TARGET --verify` with the same options as before: it repairs damaged shards"


class ShardError(DataError):
    """The shard cannot be used. The message names it and the remedy."""


class Header(NamedTuple):
    magic: bytes
    version: int
    codec: int  # row of CODECS
    sample_rate: int  # Hz
    block: int  # bytes
    clips: int
    first_row: int  # this shard holds rows [first_row, end_row) of the source
    end_row: int
    rows: int  # number of rows in the whole source
    key: bytes  # hash of the source and the packing options, the same in all shards of a set
    payload: int  # bytes of the payload
    tables: int  # bytes of records, CRCs and notes
    tables_crc: int

    def pack(self) -> bytes:
        head = HEADER.pack(*self).ljust(HEADER_SIZE - 4, b"\0")
        return head + struct.pack("<I", crc32(head))


class Clip(NamedTuple):
    """A clip to store."""

    payload: bytes
    frames: int
    source_rate: int
    source_channels: int
    digest: bytes  # 16-byte digest of the PCM
    crcs: list[int]


def block_crcs(payload: bytes) -> list[int]:
    view = memoryview(payload)
    return [crc32(view[i : i + BLOCK]) for i in range(0, len(view), BLOCK)]


class ShardWriter:
    """Appends clips to `file`. `finish` writes the tables and then the header."""

    def __init__(self, file: BinaryIO, columns: Sequence[str]):
        self.file, self.position = file, HEADER_SIZE
        self.records: list[tuple] = []
        self.crcs: list[int] = []
        self.notes: dict[str, Any] = {"names": [], "labels": [], "columns": {c: [] for c in columns}, "left_out": []}
        file.write(bytes(HEADER_SIZE))

    def add(self, row: int, name: str, label: str | None, values: Sequence[str], clip: Clip) -> None:
        self.file.write(clip.payload)
        size = len(clip.payload)
        self.records.append((row, self.position, size, clip.frames, len(self.crcs), *clip[2:5]))
        self.crcs.extend(clip.crcs)
        self.position += size
        self.notes["names"].append(name)
        self.notes["labels"].append(label)
        for column, value in zip(self.notes["columns"].values(), values, strict=True):
            column.append(value)

    def leave_out(self, name: str, reason: str) -> None:
        self.notes["left_out"].append((name, reason))

    def finish(self, codec: str, sample_rate: int, first_row: int, end_row: int, rows: int, key: bytes) -> None:
        tables = np.array(self.records, RECORD).tobytes() + np.array(self.crcs, "<u4").tobytes()
        tables += json.dumps(self.notes).encode()
        self.file.write(tables)
        self.file.seek(0)
        payload = self.position - HEADER_SIZE
        sizes = (payload, len(tables), crc32(tables))
        shape = (BLOCK, len(self.records), first_row, end_row, rows, key)
        self.file.write(Header(MAGIC, VERSION, CODECS.index(codec), sample_rate, *shape, *sizes).pack())


class Shard:
    """A shard; every byte read from it is checked before use. Raises ShardError if the shard is damaged.

    The file is read with pread directly into the caller's memory. It is not memory-mapped: a disk error, or a file cut
    short while in use, would then raise a signal that kills the process.

    Args:
        stay_open: keeps the file open between reads.
    """

    def __init__(self, path: str, stay_open: bool = False):
        self.path, self._file = path, None
        try:
            with contextlib.ExitStack() as stack:
                stat_file(path)
                file = stack.enter_context(open(path, "rb", buffering=0))
                head = file.read(HEADER_SIZE)
                self.size = os.fstat(file.fileno()).st_size  # bytes
                self.header = header = self._check_header(head, self.size)
                tables = np.empty(header.tables, np.uint8)
                read_into(tables, file.fileno(), HEADER_SIZE + header.payload)
                if stay_open:
                    self._file = file
                    stack.pop_all()
        except OSError as error:
            raise ShardError(f"{path}: {reason_of(error)}") from None
        except BadAudio as error:
            raise ShardError(f"{path}: {error}; {REMEDY}") from None
        if crc32(tables) != header.tables_crc:
            raise ShardError(f"{path}: the shard's index is damaged; {REMEDY}")
        # The CRC of the tables is right. Their sizes are checked nevertheless, because a CRC can be forged.
        end = header.clips * RECORD.itemsize
        self.records = tables[:end].view(RECORD) if end <= len(tables) else np.empty(0, RECORD)
        offsets, sizes, first = (self.records[name].astype(np.int64) for name in ("offset", "size", "first_block"))
        blocks = int((-(-sizes // BLOCK)).sum())
        self._notes = tables[end + 4 * blocks :]
        consistent = len(self.records) == header.clips and blocks >= 0 and end + 4 * blocks <= len(tables)
        limits = np.concatenate([np.full(1, HEADER_SIZE), offsets + sizes])
        consistent = consistent and bool((sizes > 0).all() and (offsets == limits[:-1]).all())
        consistent = consistent and limits[-1] == HEADER_SIZE + header.payload
        consistent = consistent and bool((first == np.cumsum(-(-sizes // BLOCK)) - -(-sizes // BLOCK)).all())
        if consistent and header.codec == CODECS.index("pcm"):
            consistent = bool((sizes == 2 * self.records["frames"]).all())
        if not consistent or bool((self.records["frames"] <= 0).any()):
            raise ShardError(f"{path}: the shard's index contradicts itself; {REMEDY}")
        if header.version == 1 and bool((self.records["source_rate"] != header.sample_rate).any()):
            raise ShardError(
                f"{path}: an earlier version resampled these clips and let frequencies above "
                f"{header.sample_rate // 2:,} Hz alias into them: pack the recordings again, into the same folder "
                "or a new one, with `python -m ajepa.pack SOURCE TARGET`"
            )
        self.crcs = tables[end : end + 4 * blocks].view("<u4")
        self.offsets = offsets

    def _check_header(self, head: bytes, size: int) -> Header:
        if head[: len(MAGIC)] != MAGIC or len(head) < HEADER_SIZE:
            raise ShardError(f"{self.path}: not a shard, or its header is damaged; {REMEDY}")
        header = Header(*HEADER.unpack_from(head))
        if crc32(head[:-4]) != int.from_bytes(head[-4:], "little"):
            raise ShardError(f"{self.path}: the shard's header is damaged; {REMEDY}")
        if not 1 <= header.version <= VERSION or header.block != BLOCK or header.codec >= len(CODECS):
            raise ShardError(
                f"{self.path}: the shard has format {header.version}, this version reads {VERSION}: pack it again"
            )
        if size != HEADER_SIZE + header.payload + header.tables:
            expected = HEADER_SIZE + header.payload + header.tables
            raise ShardError(f"{self.path}: the shard has {size:,} bytes instead of {expected:,}; {REMEDY}")
        if not 1_000 <= header.sample_rate <= 384_000:
            raise ShardError(f"{self.path}: implausible sample rate of {header.sample_rate} Hz; {REMEDY}")
        return header

    @property
    def codec(self) -> str:
        return CODECS[self.header.codec]

    def notes(self) -> dict[str, Any]:
        try:
            notes = json.loads(self._notes.tobytes())
            columns = [notes["names"], notes["labels"], *notes["columns"].values()]
            if any(len(column) != self.header.clips for column in columns):
                raise ValueError("columns of unequal length")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{self.path}: the shard's notes cannot be read ({error}); {REMEDY}") from None
        return notes

    def find(self, offset: int, size: int) -> int:
        """Number of the clip whose payload is bytes `[offset, offset + size)` of the file."""
        clip = int(np.searchsorted(self.offsets, offset))
        if clip == len(self.offsets) or (self.offsets[clip], self.records["size"][clip]) != (offset, size):
            raise BadAudio("the shard was replaced since it was indexed: start again")
        return clip

    def read(self, clip: int, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Bytes `[start, stop)` of a clip's payload, uint8, in `out` if given. Raises BadAudio, OSError."""
        record = self.records[clip]
        offset, size, first_block = int(record["offset"]), int(record["size"]), int(record["first_block"])
        stop = size if stop is None else stop
        out = np.empty(stop - start, np.uint8) if out is None else out
        # A checksum covers a whole block, so a block that is only partly wanted at either end is read separately.
        first, last = -(-start // BLOCK) * BLOCK, stop if stop == size else stop // BLOCK * BLOCK
        inside = out[first - start : last - start] if first < last else None
        with contextlib.nullcontext(self._file) if self._file else open(self.path, "rb", buffering=0) as file:
            try:
                if inside is not None:
                    read_into(inside, file.fileno(), offset + first)
                for low in range(start // BLOCK * BLOCK, stop, BLOCK):
                    high = min(size, low + BLOCK)
                    if inside is not None and first <= low < last:
                        data = inside[low - first : high - first]
                    else:
                        data = np.empty(high - low, np.uint8)
                        read_into(data, file.fileno(), offset + low)
                        left, right = max(low, start), min(high, stop)
                        out[left - start : right - start] = data[left - low : right - low]
                    if crc32(data) != self.crcs[first_block + low // BLOCK]:
                        raise BadAudio(f"wrong checksum at byte {offset + low:,} of the shard; {REMEDY}")
            except Truncated as error:
                raise BadAudio(f"the shard was cut short while in use, {error}; {REMEDY}") from None
        return out

    def damaged(self) -> list[tuple[str, str]]:
        """Reads all clips and returns (name, reason) of those whose payload is damaged."""
        found = []
        for clip, name in enumerate(self.notes()["names"]):
            try:
                self.read(clip)
            except (BadAudio, OSError) as error:
                found.append((name, reason_of(error)))
        return found

    def close(self) -> None:
        """Closes the file. Later reads are possible, but open it each time."""
        if self._file is not None:
            self._file.close()
            self._file = None


class OpenShards:
    """The shards of an index, opened at their first read. The first `OPEN_FILES` of them stay open. Thread-safe."""

    def __init__(self) -> None:
        self._open: dict[str, Shard] = {}
        self._lock = threading.Lock()

    def read(self, entry: Entry, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Checked bytes `[start, stop)` of the entry's payload; result and errors are those of `Shard.read`."""
        shard = self._open.get(entry.path)
        if shard is None:
            with self._lock:
                try:
                    keep = len(self._open) < OPEN_FILES
                    shard = self._open.setdefault(entry.path, Shard(entry.path, stay_open=keep))
                except ShardError as error:
                    raise BadAudio(str(error)) from None
        return shard.read(shard.find(entry.offset, entry.size), start, stop, out)

    def close(self) -> None:
        """Closes all shards. Call it only when no thread reads any more."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()


def is_shards(source: str) -> bool:
    """Whether `source` is a folder of shards, or a file whose header or name is that of a shard."""
    if os.path.isdir(source):
        return bool(_shard_paths(source))
    if not os.path.isfile(source):  # to open a named pipe would block forever
        return False
    try:
        with open(source, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC or source.endswith(SUFFIX)
    except OSError:
        return False


def _shard_paths(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).glob(f"*{SUFFIX}") if not path.name.startswith("."))


class ShardSet(NamedTuple):
    entries: Entries  # `label` is a row of `label_names`
    label_names: list[str]
    metadata: dict[str, Strings]


def read_shards(source: str, label_column: str | None, order: Any) -> ShardSet:
    """The clips of a shard or of a folder of shards, in the source's order.

    Args:
        label_column: column that replaces the labels found when the shards were packed.
        order: function that sorts the distinct labels.

    Raises:
        ShardError: a shard is damaged or from another packing, or rows of the source are in no shard.
    """
    shards = [Shard(path) for path in (_shard_paths(source) if os.path.isdir(source) else [source])]
    shards.sort(key=lambda shard: shard.header.first_row)
    if os.path.isdir(source):
        _check_whole(source, shards)
    tables, labels, columns = [], [], {}  # type: ignore[var-annotated]
    for shard in shards:
        notes = shard.notes()
        if label_column is not None and label_column not in notes["columns"]:
            known = ", ".join(notes["columns"]) or "none"
            raise DataError(f"{source}: no column {label_column!r} to take labels from; its columns: {known}")
        tables.append(_entries(shard, notes["names"]))
        chosen = notes["labels"] if label_column is None else notes["columns"][label_column]
        labels.append(Strings("" if label is None else str(label) for label in chosen))
        for name, values in notes["columns"].items():
            columns.setdefault(name, []).append(Strings(map(str, values)))
    joined = Strings.concatenate(labels)
    names = order({label for label in joined if label})
    number = {"": -1, **{name: i for i, name in enumerate(names)}}
    entries = Entries.concatenate(tables)
    entries.numbers["label"] = np.fromiter((number[label] for label in joined), np.int32, len(joined))
    return ShardSet(entries, names, {name: Strings.concatenate(parts) for name, parts in columns.items()})


def _entries(shard: Shard, names: Sequence[str]) -> Entries:
    clips = len(names)
    numbers = np.zeros(clips, NUMBERS)
    for name in ("offset", "size", "frames"):
        numbers[name] = shard.records[name]
    numbers["total"] = numbers["frames"]
    numbers["mtime_ns"], numbers["file_size"] = os.stat(shard.path).st_mtime_ns, shard.size
    numbers["sample_rate"], numbers["channels"] = shard.header.sample_rate, 1
    return Entries(numbers, _repeat(shard.path, clips), Strings(map(str, names)), _repeat(FORMATS[shard.codec], clips))


def _repeat(value: str, count: int) -> Strings:
    return Strings([value]).take(np.zeros(count, np.int64))


def _check_whole(folder: str, shards: list[Shard]) -> None:
    """Raises ShardError unless the shards come from one packing and cover all rows of the source."""
    first = shards[0]
    for shard in shards:
        if shard.header.key != first.header.key:
            raise ShardError(f"{folder}: {shard.path} and {first.path} come from two packings: use a folder for each")
    gaps = list(missing_rows(shards, first.header.rows))
    if gaps:
        start, end = gaps[0]
        raise ShardError(
            f"{folder}: rows {start:,} to {end - 1:,} of the source are in no shard: a shard is missing, or packing "
            "has not finished; run `python -m ajepa.pack SOURCE TARGET` again to make them"
        )


def missing_rows(shards: Sequence[Shard], rows: int) -> Iterator[tuple[int, int]]:
    """Yields the rows [start, end) of the source that no shard covers. `shards` must be sorted by `first_row`."""
    covered = 0
    for shard in shards:
        if shard.header.first_row > covered:
            yield covered, shard.header.first_row
        covered = max(covered, shard.header.end_row)
    if covered < rows:
        yield covered, rows
