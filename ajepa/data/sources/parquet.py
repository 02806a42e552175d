"""Reads Parquet manifests, whose rows name files or hold the recordings, which are then copied to a tar once."""

import contextlib
import io
import os
import re
import shutil
import sys
import tarfile
import uuid
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ajepa.data.formats.audiofile import BadAudio, reason_of, stat_file
from ajepa.data.sources.listing import DataError, Listing, cache_root, find_column

SUFFIXES: tuple[tuple[bytes, str], ...] = (
    (b"RIFF", ".wav"),
    (b"fLaC", ".flac"),
    (b"OggS", ".ogg"),
    (b"FORM", ".aiff"),
    (b"ID3", ".mp3"),
)
SUFFIXES += ((b"\xff", ".mp3"),)
AT_ONCE = 64  # rows held in memory while recordings are copied


class Stored(NamedTuple):
    """The place in a tar of a recording that was in a Parquet file."""

    path: str
    member: str
    offset: int
    size: int
    mtime_ns: int
    file_size: int


def read_parquet(
    path: str, path_columns: Sequence[str], listing: Listing
) -> tuple[list[str], str | None, list[tuple[int, dict[str, Any]]]]:
    """(columns, the column that names or holds the recordings, (number, row) of each row).

    A row that holds a recording gets a `Stored` in that column. Raises DataError if the file cannot be read.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'ajepa[parquet]'") from None
    try:
        stat_file(path)
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if len(set(schema.names)) < len(schema.names):
                raise DataError(f"{path}: two columns share a name: rename one; they are {', '.join(schema.names)}")
            kinds = {field.name: _kind(pyarrow.types, field.type) for field in schema}
            column = _audio_column(kinds, path_columns)
            names = [name for name, kind in kinds.items() if kind == "plain" or name == column]
            plain = [name for name in names if kinds[name] == "plain"]
            rows: list[dict[str, Any]] = [{} for _ in range(file.metadata.num_rows)]
            if plain:
                rows = file.read(columns=plain).to_pylist()
            if column is not None and kinds[column] != "plain":
                _take_recordings(path, file, column, kinds[column], rows)
    except (OSError, BadAudio, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: the manifest cannot be read: {' '.join(str(error).split())}") from None
    unread = [name for name in kinds if name not in names]
    if unread:
        listing.warnings.append(f"{path}: columns of bytes, vectors or records are not read: {', '.join(unread)}")
    return names, column, list(enumerate(rows, 1))


def _kind(types: Any, kind: Any) -> str:
    """The kind of a column: `plain` values, `audio` (a record of bytes and path), `bytes`, or `other`."""
    if types.is_struct(kind):
        fields = {kind.field(i).name for i in range(kind.num_fields)}
        return "audio" if "bytes" in fields or fields == {"path"} else "other"
    if types.is_binary(kind) or types.is_large_binary(kind) or str(kind) == "binary_view":
        return "bytes"
    if types.is_list(kind) or types.is_large_list(kind):
        item = kind.value_type
        return "other" if types.is_nested(item) or types.is_floating(item) or "binary" in str(item) else "plain"
    return "other" if types.is_nested(kind) or "binary" in str(kind) else "plain"


def _audio_column(kinds: dict[str, str], path_columns: Sequence[str]) -> str | None:
    """The column of the recordings. A column that holds them comes first: paths are often those of another machine."""
    held = [name for name, kind in kinds.items() if kind in ("audio", "bytes")]
    column = find_column(held, path_columns) or find_column([n for n in kinds if kinds[n] == "plain"], path_columns)
    records = [name for name in held if kinds[name] == "audio"]
    return column or (records[0] if len(records) == 1 else None)


def _take_recordings(path: str, file: Any, column: str, kind: str, rows: list[dict[str, Any]]) -> None:
    """Sets `column` of each row to the recording's place in the copy, or to the path of the file that the row names."""
    fields = [field.name for field in file.schema_arrow.field(column).type] if kind == "audio" else []
    records = file.read(columns=[f"{column}.path"]).column(column).to_pylist() if "path" in fields else rows
    for row, held in zip(rows, records, strict=True):
        row[column] = held.get("path") if held and "path" in fields else None
    if kind == "audio" and "bytes" not in fields:
        return
    if kind == "bytes" and (texts := _texts(file, column)):
        for row, text in zip(rows, texts, strict=True):
            row[column] = text
        return
    size, mtime = stat_file(path)
    key = sha256(f"{os.path.abspath(path)}\0{size}\0{mtime}\0{column}".encode(errors="surrogateescape")).hexdigest()
    tar = cache_root() / "parquet" / f"{key[:32]}.tar"
    if not tar.exists():
        names = [os.path.basename(str(row[column] or "").replace("\\", "/")) for row in rows]
        _copy(path, file, column, names, tar, mtime)
    if not tar.exists():  # no row holds bytes
        return
    info = tar.stat()
    try:
        with tarfile.open(tar, "r:") as members:
            for member in members:
                number = int(member.name.partition("-")[0])
                position = (member.offset_data, member.size, info.st_mtime_ns, info.st_size)
                rows[number - 1][column] = Stored(str(tar), member.name, *position)
    except (tarfile.TarError, EOFError, ValueError, IndexError) as error:
        raise DataError(f"{tar}: the copy of the recordings in {path} is damaged ({error}): delete it") from None


def _texts(file: Any, column: str) -> list[str | None] | None:
    """The values of a column of bytes if they are file names, else None. Some writers do not mark text as such."""
    first = next(file.iter_batches(batch_size=1, columns=[column]), None)
    value = first.column(0)[0].as_py() if first is not None and len(first) else None
    if not value or len(value) > 1024 or not re.fullmatch(rb"[^\x00-\x1f\x7f]+\.\w{2,5}", value):
        return None
    return [None if v is None else os.fsdecode(v) for v in file.read(columns=[column]).column(0).to_pylist()]


def _copy(path: str, file: Any, column: str, names: list[str], tar: Path, mtime: int) -> None:
    """Copies the recordings into a tar, which appears complete or not at all. Raises DataError if writing fails."""
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    root = re.compile(re.escape(column) + r"(\.bytes)?")
    need = sum(c.total_uncompressed_size for c in chunks if root.fullmatch(c.path_in_schema)) + 2048 * len(names)
    aside = tar.with_name(f".{tar.name}.{uuid.uuid4().hex[:8]}")
    try:
        tar.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(tar.parent).free
        if need > free:
            raise DataError(
                f"{path}: its recordings are copied to {tar.parent} once, which takes {need / 1e9:,.3g} GB; "
                f"only {free / 1e9:,.3g} GB are free: make room, or set AJEPA_CACHE to a folder on another disk"
            )
        count = 0
        with tarfile.open(aside, "w") as target:
            for number, data in _held(file, column):
                if data is not None:
                    member = tarfile.TarInfo(f"{number:06d}-{names[number - 1] or 'audio' + _suffix(data)}")
                    member.size = len(data)
                    target.addfile(member, io.BytesIO(data))
                    count += 1
        if not count:
            return
        with open(aside, "rb+") as copy:
            os.fsync(copy.fileno())
        os.utime(aside, ns=(mtime, mtime))  # a copy made again counts as the same file
        size = aside.stat().st_size
        print(f"{path}: {count:,} recordings ({size / 1e9:,.3g} GB) were copied to {tar} for all runs", file=sys.stderr)
        os.replace(aside, tar)
    except OSError as error:
        problem = f"{tar}: {reason_of(error)}; set AJEPA_CACHE to a folder that can be written"
        raise DataError(f"{path}: its recordings cannot be copied to {problem}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _held(file: Any, column: str) -> Iterator[tuple[int, bytes | None]]:
    """Yields (row number from 1, the bytes of its recording)."""
    number = 0
    for batch in file.iter_batches(batch_size=AT_ONCE, columns=[column]):
        for value in batch.column(0):
            number += 1
            held = value.as_py()
            yield number, held.get("bytes") if isinstance(held, dict) else held


def _suffix(data: bytes) -> str:
    return next((suffix for magic, suffix in SUFFIXES if data.startswith(magic)), "")
