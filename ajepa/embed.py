"""`python -m ajepa.embed ENCODER sources... --out OUT`: embed recordings of any length into one file.

A source is a recording, or a set of recordings as in `ajepa.train --data`: a folder, a manifest, tars or shards. Every
row of a set is one clip.

OUT's suffix chooses the format. `.npz` and `.safetensors` hold `clips` `[n, D]`, each the mean of its frames or, with
the poolings that describe a whole chunk, `ajepa.Encoder.embed`; `frames` `[sum T', D]`; `offsets` `[n + 1]`, where clip
i has frames `offsets[i]:offsets[i + 1]`; the files' names; and `hop_size_in_ms`. `.parquet` has one row per clip.
Recordings are streamed and frames go to a temporary file, so memory is bounded by one recording's frames. Bad files are
left out and listed at the end and in `OUT.bad.tsv`; the exit status is then 1.
"""

import contextlib
import glob
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from ajepa.config import ConfigError, Pooling
from ajepa.data.columns import Entry
from ajepa.data.formats.audiofile import BadAudio, inspect, reason_of, stat_file
from ajepa.data.index import DataError, build_index
from ajepa.data.reader import iterate_resampled
from ajepa.data.shards import SUFFIX as SHARD
from ajepa.data.sources.source import MANIFESTS
from ajepa.encoder import CHUNKS_AT_ONCE, Encoder
from ajepa.model.pooling import Layers, Statistics
from ajepa.utils import cli
from ajepa.utils.atomic_files import write_atomic

SUFFIXES = (".npz", ".safetensors", ".parquet")


@dataclass(frozen=True)
class Arguments:
    """Write clip and frame embeddings of audio files into one file."""

    encoder: tyro.conf.Positional[str]
    """Encoder to use: a run folder, a checkpoint, a folder written by ajepa.export, or a hub id."""
    files: tyro.conf.Positional[list[str]]
    """Recordings, or folders, manifests, tars or shards of them; - reads names from standard input (by line or NUL)."""
    out: str = "embeddings.npz"
    """File to write; its suffix (.npz, .safetensors or .parquet) chooses the format."""
    where: str | None = None
    """Embed only these rows of manifests, such as "split=test"."""
    float_scale: float = 1.0
    """Full scale of floating-point recordings; 32768 if 16-bit samples were written without scaling."""
    frames: bool = True
    """Write every frame in addition to one embedding per clip."""
    pooling: Pooling | None = None
    """How latents are pooled; None uses the encoder's own setting. mean, concat: frames of one time patch, by the mean
    over frequency or with the frequency rows side by side. mean+std, concat+std, projection: one frame per chunk."""
    layers: Layers | None = None
    """last: the encoder's output. mean: the average of all blocks' outputs, each layer-normalised. None uses the
    encoder's own setting."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that computes; auto uses a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the encoder; auto is bf16 on a GPU and fp32 on a CPU."""


class Piece(NamedTuple):
    """One chunk of a recording that waits for the encoder."""

    name: str
    samples: torch.Tensor  # float32 [<= clip_samples]
    frames: int  # how many of the chunk's first frames are kept
    last: bool


class Spool:
    """Collects embeddings: clips in memory, frames in a temporary file in the folder of the result."""

    def __init__(self, file: BinaryIO | None):
        self.file = file
        self.names: list[str] = []
        self.clips: list[np.ndarray] = []
        self.offsets = [0]

    def add(self, name: str, frames: np.ndarray, clip: np.ndarray) -> None:
        self.names.append(name)
        self.clips.append(clip.astype(np.float32))
        self.offsets.append(self.offsets[-1] + len(frames))
        if self.file is not None:
            self.file.write(frames.astype("<f4").tobytes())


def embed(args: Arguments, paths: list[str]) -> tuple[int, dict[str, str]]:
    """Embed `paths` into `args.out`. Returns the number of recordings, and the reason for each that was left out.

    Raises ConfigError, DataError, OSError.
    """
    out = Path(args.out)
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: the suffix must be one of {', '.join(SUFFIXES)}")
    writer = {".npz": _write_npz, ".safetensors": _write_safetensors, ".parquet": _write_parquet}[out.suffix]
    if out.suffix == ".parquet":
        _pyarrow()  # report a missing package before the work
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is here; use --device cpu")
    encoder = Encoder.from_pretrained(args.encoder, pooling=args.pooling, layers=args.layers).to(device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    out.parent.mkdir(parents=True, exist_ok=True)
    bad: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        spool = Spool(stack.enter_context(tempfile.TemporaryFile(dir=out.parent)) if args.frames else None)
        with _progress() as progress, torch.inference_mode(), autocast:
            entries = list(list_recordings(paths, args, bad))
            found = progress.track(entries, description="embedding")
            _fill(spool, encoder, found, args.float_scale, bad)
        if spool.names:
            about = {"hop_size_in_ms": encoder.hop_size_in_ms, "encoder": encoder.fingerprint()}
            _write(out, writer, spool, about)
    return len(spool.names), bad


def list_recordings(sources: list[str], args: Arguments, bad: dict[str, str]) -> Iterator[Entry]:
    """Yield every recording that the sources name once. Bad recordings are added to `bad` with the reason."""
    seen = set()
    for source in dict.fromkeys(sources):
        try:
            if is_listing(source):
                index = build_index(source, where=args.where, decode=False, float_scale=args.float_scale)
                bad |= dict(index.skipped)
                entries: Iterable[Entry] = index.entries
            else:
                size, mtime = stat_file(source)
                info = inspect(source, 0, size, decode=False, float_scale=args.float_scale)
                entries = [Entry(source, "", 0, size, mtime, size, info.frames, 0, *info, -1)]
        except (BadAudio, DataError, OSError) as error:
            bad[source] = reason_of(error)
            continue
        for entry in entries:
            if entry.name not in seen:
                seen.add(entry.name)
                yield entry


def is_listing(source: str) -> bool:
    """Whether `source` is a set of recordings: a folder, a manifest, tars or shards."""
    suffix = Path(source).suffix.lower()
    many = os.path.isdir(source) or suffix in (*MANIFESTS, ".tar", SHARD)
    return many or (glob.has_magic(source) and not os.path.exists(source))


def _fill(spool: Spool, encoder: Encoder, entries: Iterable[Entry], float_scale: float, bad: dict[str, str]) -> None:
    """Embed recordings into the spool, with chunks of several in one batch. Bad recordings are added to `bad`."""
    waiting: list[Piece] = []
    done: list[Any] = []  # frames or statistics of the recording whose last chunk is not encoded yet
    device = encoder.vit.norm.weight.device

    def encode(pieces: list[Piece]) -> list[Any]:
        chunks = [piece.samples.to(device) for piece in pieces]
        if encoder.per_frame:
            frames = encoder.encode_chunks(chunks).cpu().numpy()
            return [x[: piece.frames] for x, piece in zip(frames, pieces, strict=True)]
        return [Statistics(*parts) for parts in zip(*(x.split(1) for x in encoder.summarise(chunks)), strict=True)]

    def finish(name: str, parts: list[Any]) -> None:
        if encoder.per_frame:
            frames = np.concatenate(parts)
            spool.add(name, frames, frames.mean(0, dtype=np.float64))
        else:
            whole = Statistics(*map(torch.cat, zip(*parts, strict=True)))
            clip = encoder.pool_chunks(whole, torch.zeros_like(whole.columns), 1)
            spool.add(name, encoder.pool_chunks(whole).cpu().numpy(), clip[0].cpu().numpy())

    def run() -> None:
        if not waiting:
            return
        for piece, encoded in zip(waiting, encode(waiting), strict=True):
            done.append(encoded)
            if piece.last:
                finish(_text(piece.name), done)
                done.clear()
        waiting.clear()

    for entry in entries:
        try:
            for piece in read_pieces(entry, encoder, float_scale):
                waiting.append(piece)
                if len(waiting) == CHUNKS_AT_ONCE:
                    run()
        except (BadAudio, OSError) as error:
            bad[entry.name] = reason_of(error)
            waiting[:] = [piece for piece in waiting if piece.name != entry.name]
            if not any(piece.last for piece in waiting):  # `done` holds frames of this recording
                done.clear()
    run()


def _write(out: Path, writer: Callable[[BinaryIO, Spool, dict], None], spool: Spool, about: dict[str, Any]) -> None:
    """Write a temporary file beside `out` and move it into place, so `out` is never incomplete."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        with open(partial, "wb") as file:
            writer(file, spool, about)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def read_pieces(entry: Entry, encoder: Encoder, float_scale: float = 1.0) -> Iterator[Piece]:
    """Yield the chunks of a recording at the encoder's sample rate, with channels averaged. They are read on demand.

    Raises BadAudio where the recording is damaged, possibly after some chunks, and OSError if it cannot be read.
    """
    name, clip, stride = entry.name, encoder.config.clip_samples, encoder.stride
    kept = encoder.chunks(clip + 1)[0].frames
    buffer, held = np.empty(0, np.float32), None
    for block in iterate_resampled(entry, encoder.sampling_rate, float_scale):
        buffer = np.concatenate([buffer, block])
        while len(buffer) > clip:
            if held is not None:
                yield Piece(name, held, kept, False)
            held, buffer = torch.from_numpy(buffer[:clip]), buffer[stride:]
    frames = encoder.frames(len(buffer))
    if held is not None:
        yield Piece(name, held, kept, last=not frames)
    if frames or held is None:
        if not len(buffer):
            raise BadAudio("no samples")
        yield Piece(name, torch.from_numpy(buffer), max(1, frames), True)


# --- output formats -------------------------------------------------------------------------------------------------


def _arrays(spool: Spool) -> dict[str, np.ndarray]:
    return {"clips": np.stack(spool.clips), "offsets": np.asarray(spool.offsets, np.int64)}


def _frames_shape(spool: Spool) -> tuple[int, int]:
    return spool.offsets[-1], len(spool.clips[0])


def _copy_frames(spool: Spool, file) -> None:
    assert spool.file is not None
    spool.file.seek(0)
    shutil.copyfileobj(spool.file, file, 1 << 20)


def _write_npz(file: BinaryIO, spool: Spool, about: dict[str, Any]) -> None:
    arrays = {**_arrays(spool), "names": np.asarray(spool.names), **{k: np.asarray(v) for k, v in about.items()}}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
        if spool.file is not None:
            with archive.open("frames.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": _frames_shape(spool)}
                np.lib.format.write_array_header_2_0(member, header)
                _copy_frames(spool, member)


def _write_safetensors(file: BinaryIO, spool: Spool, about: dict[str, Any]) -> None:
    """Write the length of the header, the header and the values by hand, so frames need not be in memory."""
    arrays, position = _arrays(spool), 0
    header: dict[str, Any] = {"__metadata__": {k: json.dumps(v) for k, v in {**about, "names": spool.names}.items()}}
    shapes = [(name, {4: "F32", 8: "I64"}[a.itemsize], a.shape) for name, a in arrays.items()]
    if spool.file is not None:
        shapes.append(("frames", "F32", _frames_shape(spool)))
    for name, dtype, shape in shapes:
        end = position + int(np.prod(shape)) * int(dtype[1:]) // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in arrays.values():
        file.write(array.tobytes())
    if spool.file is not None:
        _copy_frames(spool, file)


def _write_parquet(file: BinaryIO, spool: Spool, about: dict[str, Any]) -> None:
    pa, parquet = _pyarrow()
    D = len(spool.clips[0])
    vector = pa.list_(pa.float32(), D)
    fields = [("file", pa.string()), ("clip", vector)]
    if spool.file is not None:
        spool.file.seek(0)
        fields.append(("frames", pa.list_(vector)))
    metadata = {k: json.dumps(v) for k, v in about.items()}
    with parquet.ParquetWriter(file, pa.schema(fields, metadata=metadata)) as writer:
        for i, (name, clip) in enumerate(zip(spool.names, spool.clips, strict=True)):
            row = [pa.array([name]), pa.FixedSizeListArray.from_arrays(pa.array(clip), D)]
            if spool.file is not None:
                count = spool.offsets[i + 1] - spool.offsets[i]
                frames = np.frombuffer(spool.file.read(4 * count * D), "<f4")
                row.append(pa.ListArray.from_arrays([0, count], pa.FixedSizeListArray.from_arrays(pa.array(frames), D)))
            writer.write_batch(pa.record_batch(row, schema=pa.schema(fields)))


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError("--out .parquet needs pyarrow: pip install 'ajepa[parquet]'") from None
    return pyarrow, pyarrow.parquet


# --- command line ---------------------------------------------------------------------------------------------------


def _text(path: str) -> str:
    """A file name as valid Unicode; bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _progress() -> Progress:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def read_names(data: bytes) -> list[str]:
    """Split a list of file names, one per line or separated by NUL (`find -print0`)."""
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(name) for name in names if name]


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "python -m ajepa.embed")
    try:
        paths = [p for name in args.files for p in (read_names(sys.stdin.buffer.read()) if name == "-" else [name])]
        if not paths:
            raise ConfigError("no files to embed: name some, or use - to read names from standard input")
        good, bad = embed(args, paths)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    listing = Path(f"{args.out}.bad.tsv")
    listing.unlink(missing_ok=True)
    if bad:
        lines = [f"{_text(path)}\t{' '.join(reason.split())}\n" for path, reason in bad.items()]
        write_atomic(listing, "".join(["file\treason\n", *lines]).encode())
        print(f"bad files: {len(bad)}, also listed in {listing}", file=sys.stderr)
        print("".join(f"  {line}" for line in lines), end="", file=sys.stderr)
    print(f"{good} recordings embedded" + (f" into {args.out}" if good else "; nothing written"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
