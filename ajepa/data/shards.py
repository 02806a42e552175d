"""Shards: recordings decoded once, as mono int16 PCM (or FLAC), in files read by position and checked when read.

A shard, little-endian throughout:

    header    256 bytes, `HEADER`, zeros, CRC-32 of the 252 bytes before
    payload   the clips, one after the other; each is divided into blocks of `BLOCK` bytes, its last one shorter
    records   `RECORD`, one a clip
    CRCs      CRC-32 of each block of each clip, uint32
    notes     JSON: names, labels and other columns of the clips, and what was left out, with the reason

The header holds the CRC-32 of records, CRCs and notes. A set of shards covers its source's rows without a gap.
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
from ajepa.data.formats.audiofile import BadAudio, Truncated, read_into, reason_of
from ajepa.data.sources.source import DataError

try:
    from isal.isal_zlib import crc32  # the same CRC-32, several times as fast
except ImportError:
    from zlib import crc32

SUFFIX = ".shard"
MAGIC = b"AJEPAPCM"
VERSION = 2  # 1 is laid out alike, but clips resampled for it hold aliases of all above the new Nyquist frequency
HEADER_SIZE = 256
BLOCK = 1 << 16
OPEN_FILES = 512  # the limit of a process is often 1,024
CODECS = ("pcm", "flac")
FORMATS = {codec: f"SHARD/{codec.upper()}" for codec in CODECS}  # `Entry.format`
HEADER = struct.Struct("<8sIIIIQQQQ16sQQI")
RECORD = np.dtype(
    [("row", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("frames", "<i8"), ("first_block", "<i8")]
    + [("source_rate", "<i4"), ("source_channels", "<i4"), ("digest", "V16")]
)
REMEDY = "run `python -m ajepa.pack SOURCE TARGET --verify` as when it was packed: it makes damaged shards again"


class ShardError(DataError):
    """A shard that cannot be used; the message names it and the remedy."""


class Header(NamedTuple):
    magic: bytes
    version: int
    codec: int  # row of CODECS
    sample_rate: int  # Hz
    block: int  # bytes
    clips: int
    first_row: int  # of the source: this shard stands for rows [first_row, end_row)
    end_row: int
    rows: int  # of the whole source
    key: bytes  # of the source and of how it was packed: the same in all shards of a set
    payload: int  # bytes
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
    digest: bytes  # of the PCM, 16 bytes
    crcs: list[int]


def block_crcs(payload: bytes) -> list[int]:
    view = memoryview(payload)
    return [crc32(view[i : i + BLOCK]) for i in range(0, len(view), BLOCK)]


class ShardWriter:
    """Appends clips to `file`; `finish` writes the tables and then the header."""

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
    """One shard; every byte of it is checked before use. Raises ShardError where it is damaged.

    Read with pread straight into the caller's memory, not through a map: there, a disk's read error or a file cut short
    while in use is a signal that kills the process.

    Args:
        stay_open: keep the file open between reads.
    """

    def __init__(self, path: str, stay_open: bool = False):
        self.path, self._file = path, None
        try:
            with contextlib.ExitStack() as stack:
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
        # The CRC has vouched for what follows; the sizes are looked at all the same, for a CRC can be forged.
        end = header.clips * RECORD.itemsize
        self.records = tables[:end].view(RECORD) if end <= len(tables) else np.empty(0, RECORD)
        offsets, sizes, first = (self.records[name].astype(np.int64) for name in ("offset", "size", "first_block"))
        blocks = int((-(-sizes // BLOCK)).sum())
        self._notes = tables[end + 4 * blocks :]
        sound = len(self.records) == header.clips and blocks >= 0 and end + 4 * blocks <= len(tables)
        limits = np.concatenate([np.full(1, HEADER_SIZE), offsets + sizes])
        sound = sound and bool((sizes > 0).all() and (offsets == limits[:-1]).all())
        sound = sound and limits[-1] == HEADER_SIZE + header.payload
        sound = sound and bool((first == np.cumsum(-(-sizes // BLOCK)) - -(-sizes // BLOCK)).all())
        if sound and header.codec == CODECS.index("pcm"):
            sound = bool((sizes == 2 * self.records["frames"]).all())
        if not sound or bool((self.records["frames"] <= 0).any()):
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
            raise ShardError(f"{self.path}: shard format {header.version}, this version reads {VERSION}: pack it again")
        if size != HEADER_SIZE + header.payload + header.tables:
            expected = HEADER_SIZE + header.payload + header.tables
            raise ShardError(f"{self.path}: {size:,} bytes instead of {expected:,}, cut short; {REMEDY}")
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
        """The clip whose payload is bytes `[offset, offset + size)` of the file."""
        clip = int(np.searchsorted(self.offsets, offset))
        if clip == len(self.offsets) or (self.offsets[clip], self.records["size"][clip]) != (offset, size):
            raise BadAudio("the shard was replaced since it was indexed: start again")
        return clip

    def read(self, clip: int, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Bytes `[start, stop)` of a clip's payload, uint8, in `out` where given. Raises BadAudio, OSError."""
        record = self.records[clip]
        offset, size, first_block = int(record["offset"]), int(record["size"]), int(record["first_block"])
        stop = size if stop is None else stop
        out = np.empty(stop - start, np.uint8) if out is None else out
        # Checksums are of whole blocks: those that stick out at either end are read apart.
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
        """(name, reason) of the clips whose payload is damaged, after reading all of it."""
        found = []
        for clip, name in enumerate(self.notes()["names"]):
            try:
                self.read(clip)
            except (BadAudio, OSError) as error:
                found.append((name, reason_of(error)))
        return found

    def close(self) -> None:
        """Reading goes on, but opens the file each time."""
        if self._file is not None:
            self._file.close()
            self._file = None


class OpenShards:
    """The shards of an index, each opened when first read, the first `OPEN_FILES` for good; used by many threads."""

    def __init__(self) -> None:
        self._open: dict[str, Shard] = {}
        self._lock = threading.Lock()

    def read(self, entry: Entry, start: int = 0, stop: int | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Checked bytes `[start, stop)` of the entry's payload, uint8, in `out` where given; errors as `Shard.read`."""
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
        """When no thread reads any more."""
        for shard in self._open.values():
            shard.close()
        self._open.clear()


def is_shards(source: str) -> bool:
    """Whether `source` is a folder that holds shards, or a shard itself, by its header or by its name."""
    if os.path.isdir(source):
        return bool(_shard_paths(source))
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
        label_column: take labels from this column instead of those found when packing.
        order: sorts distinct labels.

    Raises:
        ShardError: a damaged or foreign shard, or rows of the source that no shard holds.
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
    """Shards of one packing, and all of them."""
    first = shards[0]
    for shard in shards:
        if shard.header.key != first.header.key:
            raise ShardError(f"{folder}: {shard.path} and {first.path} come from two packings: give each its folder")
    gaps = list(missing_rows(shards, first.header.rows))
    if gaps:
        start, end = gaps[0]
        raise ShardError(
            f"{folder}: rows {start:,} to {end - 1:,} of the source are in no shard: a shard is missing, or packing "
            "has not finished; run `python -m ajepa.pack SOURCE TARGET` again to make them"
        )


def missing_rows(shards: Sequence[Shard], rows: int) -> Iterator[tuple[int, int]]:
    """Rows [start, end) of the source that none of the shards stands for; the shards sorted by `first_row`."""
    done = 0
    for shard in shards:
        if shard.header.first_row > done:
            yield done, shard.header.first_row
        done = max(done, shard.header.end_row)
    if done < rows:
        yield done, rows
