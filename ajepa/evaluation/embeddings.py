"""Embeddings of recordings in files: those of unfinished work, which outlive a kill, and the formats of the result."""

import contextlib
import hashlib
import itertools
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ajepa.config import ConfigError
from ajepa.utils.atomic_files import atomic_file

RECORDS, CLIPS, FRAMES = "done.jsonl", "clips.f32", "frames.f32"
AT_ONCE = 1 << 22  # values written at once
HEADER = 90_000_000  # bytes of names that fit into the header of a safetensors file


class Embedded(NamedTuple):
    """The embeddings of one recording."""

    name: str
    clip: np.ndarray  # [D]
    frames: np.ndarray  # [T', D]


class Spool:
    """Embeddings in a folder. Those of an earlier process that was killed are found again, each with a checksum.

    Recordings are known by a key of 16 bytes, which the caller makes of all that identifies their samples.
    """

    def __init__(self, folder: Path, width: int, with_frames: bool):
        self.folder, self.width, self.with_frames = folder, width, with_frames
        self.rows: dict[bytes, int] = {}
        self.names: list[str] = []
        self.offsets = [0]
        folder.mkdir(parents=True, exist_ok=True)
        self.files = {name: open(folder / name, "ab+", buffering=0) for name in (RECORDS, CLIPS, FRAMES)}  # noqa: SIM115
        self._recover()

    def add(self, done: Sequence[tuple[bytes, Embedded]]) -> None:
        """Append recordings. Their values are written before their records, so that a kill leaves no record without."""
        clips = [one.clip.astype("<f4").tobytes() for _, one in done]
        frames = [one.frames.astype("<f4").tobytes() if self.with_frames else b"" for _, one in done]
        records = [
            _record(key, one.name, len(one.frames), clip, part)
            for (key, one), clip, part in zip(done, clips, frames, strict=True)
        ]
        for name, parts in ((FRAMES, frames), (CLIPS, clips), (RECORDS, records)):
            _write_all(self.files[name], b"".join(parts))
        for key, one in done:
            self._note(key, one.name, len(one.frames))

    def close(self) -> None:
        """Close the files. What was added stays; if there is nothing, the folder is removed."""
        for file in self.files.values():
            file.close()
        if not self.rows:
            shutil.rmtree(self.folder)

    def _note(self, key: bytes, name: str, frames: int) -> None:
        self.rows[key] = len(self.names)
        self.names.append(name)
        self.offsets.append(self.offsets[-1] + frames)

    def _recover(self) -> None:
        """Read the whole records, and cut off what follows the last of them."""
        length, dropped = 0, 0
        for file in self.files.values():
            file.seek(0)
        with open(self.folder / RECORDS, "rb") as records:
            for line in records:
                try:
                    key, name, frames = _parsed(line)
                    values = 4 * self.width * (frames if self.with_frames else 0)
                    clip, part = self.files[CLIPS].read(4 * self.width), _read_all(self.files[FRAMES], values)
                    if _record(key, name, frames, clip, part) != line:
                        raise ValueError("another checksum")
                except (ValueError, TypeError, KeyError):
                    dropped = 1 + sum(1 for _ in records)
                    break
                self._note(key, name, frames)
                length += len(line)
        if dropped > 1:  # the last record may be one that a kill cut short
            print(f"warning: {self.folder} is damaged: {dropped} recordings are embedded again", file=sys.stderr)
        clips, frames = len(self.names), self.offsets[-1] if self.with_frames else 0
        for name, size in ((RECORDS, length), (CLIPS, 4 * self.width * clips), (FRAMES, 4 * self.width * frames)):
            self.files[name].truncate(size)


def _record(key: bytes, name: str, frames: int, clip: bytes, values: bytes) -> bytes:
    text = json.dumps({"key": key.hex(), "frames": frames, "name": name})
    digest = hashlib.sha256(text.encode() + clip + values).hexdigest()[:16]
    return f"{digest} {text}\n".encode()


def _parsed(line: bytes) -> tuple[bytes, str, int]:
    content = json.loads(line[17:])
    return bytes.fromhex(content["key"]), content["name"], min(int(content["frames"]), 1 << 40)


def _write_all(file: Any, data: bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _read_all(file: Any, size: int) -> bytes:
    parts = []
    while size and (part := file.read(min(size, 1 << 26))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class Result:
    """The rows of a spool that a file of embeddings gets, in its order."""

    def __init__(self, spool: Spool, rows: Sequence[int], about: dict[str, Any]):
        self.rows, self.about, self.width = list(rows), about, spool.width
        self.names = [spool.names[row] for row in rows]
        starts = np.asarray(spool.offsets, np.int64)
        self.starts, self.counts = starts[self.rows], np.diff(starts)[self.rows]
        self.offsets = np.concatenate([[0], self.counts.cumsum()])
        self._clips = np.memmap(spool.folder / CLIPS, "<f4", "r", shape=(len(spool.names), spool.width))
        self._frames = None
        if spool.with_frames:
            self._frames = np.memmap(spool.folder / FRAMES, "<f4", "r", shape=(spool.offsets[-1], spool.width))

    @property
    def with_frames(self) -> bool:
        return self._frames is not None

    def clips(self) -> Iterator[np.ndarray]:
        """Blocks of clips, those of `slices`, which together are `[n, D]`."""
        for rows in self.slices():
            yield self._clips[self.rows[rows]]

    def slices(self) -> Iterator[slice]:
        """The recordings in parts whose embeddings fit into memory."""
        first, size = 0, 0
        for i, count in enumerate(self.counts):
            size += int(count) if self.with_frames else 1
            if size * self.width >= AT_ONCE or i + 1 == len(self.counts):
                yield slice(first, i + 1)
                first, size = i + 1, 0

    def frames(self) -> Iterator[np.ndarray]:
        """The frames `[T', D]` of each recording."""
        assert self._frames is not None
        for start, count in zip(self.starts, self.counts, strict=True):
            yield self._frames[start : start + count]


# --- output formats -------------------------------------------------------------------------------------------------


def check_format(out: Path, names: Sequence[str] = ()) -> None:
    """Raise ConfigError if no file of the suffix of `out` can be written, or not one with so many names."""
    if out.suffix not in FORMATS:
        raise ConfigError(f"--out {out}: the suffix must be one of {', '.join(FORMATS)}")
    if out.suffix == ".parquet":
        _pyarrow()
    if out.suffix == ".safetensors" and sum(len(json.dumps(name)) + 2 for name in names) > HEADER:
        raise ConfigError(
            f"--out {out}: {len(names):,} names do not fit into a .safetensors file: use .npz or .parquet"
        )


def write_result(out: Path, result: Result) -> None:
    """Write the file, in the format that its suffix names. It is whole or absent."""
    with atomic_file(out) as file:
        FORMATS[out.suffix](file, result)


def is_result(path: Path) -> bool:
    """Whether `path` is a file of `write_result`."""
    wanted = {"clips", "offsets", "names", "hop_size_in_ms", "encoder"}
    with contextlib.suppress(zipfile.BadZipFile, SafetensorError):
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return wanted <= {name.removesuffix(".npy") for name in archive.namelist()}
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as tensors:
                return wanted <= {*tensors.keys(), *(tensors.metadata() or {})}
        pa, parquet = _pyarrow()
        with contextlib.suppress(pa.ArrowInvalid):
            return {b"hop_size_in_ms", b"encoder"} <= (parquet.read_schema(path).metadata or {}).keys()
    return False


def _write_npz(file: BinaryIO, result: Result) -> None:
    about = {key: np.asarray(value) for key, value in result.about.items()}
    arrays = {"offsets": result.offsets, "names": np.asarray(result.names), **about}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        parts = [("clips", len(result.names), result.clips())]
        if result.with_frames:
            parts.append(("frames", int(result.offsets[-1]), result.frames()))
        for name, length, blocks in parts:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": (length, result.width)}
                np.lib.format.write_array_header_2_0(member, header)
                for block in blocks:
                    member.write(block.tobytes())


def _write_safetensors(file: BinaryIO, result: Result) -> None:
    """Write the length of the header, the header and the values by hand, so frames need not be in memory."""
    about = {**result.about, "names": result.names}
    header: dict[str, Any] = {"__metadata__": {key: json.dumps(value) for key, value in about.items()}}
    n, position = len(result.names), 0
    shapes: list[tuple[str, str, list[int]]] = [("clips", "F32", [n, result.width]), ("offsets", "I64", [n + 1])]
    if result.with_frames:
        shapes.append(("frames", "F32", [int(result.offsets[-1]), result.width]))
    for name, dtype, shape in shapes:
        end = position + int(np.prod(shape)) * int(dtype[1:]) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    frames = result.frames() if result.with_frames else ()
    for block in itertools.chain(result.clips(), [result.offsets.astype("<i8")], frames):
        file.write(block.tobytes())


def _write_parquet(file: BinaryIO, result: Result) -> None:
    pa, parquet = _pyarrow()
    vector = pa.list_(pa.float32(), result.width)
    fields = [("file", pa.string()), ("clip", vector)]
    if result.with_frames:
        fields.append(("frames", pa.list_(vector)))
    metadata = {key: json.dumps(value) for key, value in result.about.items()}
    frames = result.frames() if result.with_frames else iter(())

    def vectors(blocks: Sequence[np.ndarray]) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(blocks).ravel()), result.width)

    with parquet.ParquetWriter(file, pa.schema(fields, metadata=metadata)) as writer:
        for rows, clips in zip(result.slices(), result.clips(), strict=True):
            columns = [pa.array(result.names[rows]), vectors([clips])]
            if result.with_frames:
                offsets = pa.array(np.concatenate([[0], result.counts[rows].cumsum()]), pa.int32())
                columns.append(pa.ListArray.from_arrays(offsets, vectors(list(itertools.islice(frames, len(clips))))))
            writer.write_batch(pa.record_batch(columns, schema=pa.schema(fields)))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("--out .parquet needs pyarrow: pip install 'ajepa[parquet]'") from None
    return pyarrow, pyarrow.parquet


FORMATS: dict[str, Callable[[BinaryIO, Result], None]] = {
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
    ".parquet": _write_parquet,
}
