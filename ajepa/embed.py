"""`python -m ajepa.embed ENCODER files... --out OUT`: embeddings of recordings of any length, in one file.

OUT's suffix says how. `.npz` and `.safetensors` hold `clips` `[n, D]`, each the mean of its frames, `frames`
`[sum T', D]`, `offsets` `[n + 1]` (clip i has frames `offsets[i]:offsets[i + 1]`), the files' names and
`hop_size_in_ms`; `.parquet` has a row a file. Recordings are read as streams and frames wait on disk, so memory is
bounded by one recording's frames. Bad files are left out, named at the end and in `OUT.bad.tsv`; exit code 1.
"""

import contextlib
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
import soundfile as sf
import soxr
import torch
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from ajepa.audiofile import BadAudio, inspect, open_sound, reason_of, stat_file
from ajepa.config import ConfigError
from ajepa.encoder import CHUNKS_AT_ONCE, Encoder
from ajepa.files import write_atomic

SUFFIXES = (".npz", ".safetensors", ".parquet")
BLOCK = 1 << 17  # samples a channel decoded at a time


@dataclass(frozen=True)
class Arguments:
    """Write clip and frame embeddings of audio files into one file."""

    encoder: tyro.conf.Positional[str]
    """Run folder, checkpoint, folder of an encoder, or hub id."""
    files: tyro.conf.Positional[list[str]]
    """Recordings; - reads their names from the standard input, one a line or separated by NUL."""
    out: str = "embeddings.npz"
    """What to write: .npz, .safetensors or .parquet."""
    frames: bool = True
    """Also write every frame, not the clip's mean alone."""
    pooling: Literal["mean", "concat"] | None = None
    """Over frequency patches; None: as the encoder is configured."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""


class Piece(NamedTuple):
    """One chunk of one file, on its way to the encoder."""

    path: str
    samples: torch.Tensor  # float32 [<= clip_samples]
    frames: int  # that are its own
    last: bool


class Spool:
    """Embeddings so far: clips in memory, frames in a temporary file beside the result."""

    def __init__(self, file: BinaryIO | None):
        self.file = file
        self.names: list[str] = []
        self.clips: list[np.ndarray] = []
        self.offsets = [0]

    def add(self, name: str, frames: np.ndarray) -> None:
        self.names.append(name)
        self.clips.append(frames.mean(0, dtype=np.float64).astype(np.float32))
        self.offsets.append(self.offsets[-1] + len(frames))
        if self.file is not None:
            self.file.write(frames.astype("<f4").tobytes())


def embed(args: Arguments, paths: list[str]) -> dict[str, str]:
    """Embed `paths` into `args.out`; returns the reason of each file left out. Raises ConfigError, OSError."""
    out = Path(args.out)
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: the suffix must be one of {', '.join(SUFFIXES)}")
    writer = {".npz": _write_npz, ".safetensors": _write_safetensors, ".parquet": _write_parquet}[out.suffix]
    if out.suffix == ".parquet":
        _pyarrow()  # a missing package is best told before the work
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: no CUDA device is here; use --device cpu")
    encoder = Encoder.from_pretrained(args.encoder, pooling=args.pooling).to(device)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()

    out.parent.mkdir(parents=True, exist_ok=True)
    bad: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        spool = Spool(stack.enter_context(tempfile.TemporaryFile(dir=out.parent)) if args.frames else None)
        with _progress() as progress, torch.inference_mode(), autocast:
            _fill(spool, encoder, progress.track(list(dict.fromkeys(paths)), description="embedding"), bad)
        if spool.names:
            about = {"hop_size_in_ms": encoder.hop_size_in_ms, "encoder": encoder.fingerprint()}
            _write(out, writer, spool, about)
    return bad


def _fill(spool: Spool, encoder: Encoder, paths: Iterable[str], bad: dict[str, str]) -> None:
    """Embed the files into the spool, chunks of several in one batch; those that turn out broken go to `bad`."""
    waiting: list[Piece] = []
    done: list[np.ndarray] = []  # frames so far of the file whose last chunk is yet to come
    device = encoder.vit.norm.weight.device

    def run() -> None:
        if not waiting:
            return
        latents = encoder.encode_chunks([piece.samples.to(device) for piece in waiting]).cpu().numpy()
        for piece, x in zip(waiting, latents, strict=True):
            done.append(x[: piece.frames])
            if piece.last:
                spool.add(_text(piece.path), np.concatenate(done))
                done.clear()
        waiting.clear()

    for path in paths:
        try:
            for piece in read_pieces(path, encoder):
                waiting.append(piece)
                if len(waiting) == CHUNKS_AT_ONCE:
                    run()
        except (BadAudio, OSError) as error:
            bad[path] = reason_of(error)
            waiting[:] = [piece for piece in waiting if piece.path != path]
            if not any(piece.last for piece in waiting):  # what is done so far is of this file
                done.clear()
    run()


def _write(out: Path, writer: Callable[[BinaryIO, Spool, dict], None], spool: Spool, about: dict[str, Any]) -> None:
    """Written beside and moved into place, as a whole."""
    aside = out.with_name(f".{out.name}.partial")
    try:
        with open(aside, "wb") as file:
            writer(file, spool, about)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


def read_pieces(path: str, encoder: Encoder) -> Iterator[Piece]:
    """The chunks of a file at the encoder's rate, channels averaged, read as they are asked for.

    Raises BadAudio where it turns out broken, however late; OSError where it cannot be read.
    """
    size, _ = stat_file(path)
    info = inspect(path, 0, size, decode=False)
    if info.format.startswith("MP3/"):  # whose header may but estimate the length
        info = inspect(path, 0, size)
    clip, stride = encoder.config.clip_samples, encoder.stride
    kept = encoder.chunks(clip + 1)[0].frames
    buffer, held = np.empty(0, np.float32), None
    for block in _resampled(path, size, info.frames, encoder.sampling_rate):
        buffer = np.concatenate([buffer, block])
        while len(buffer) > clip:
            if held is not None:
                yield Piece(path, held, kept, False)
            held, buffer = torch.from_numpy(buffer[:clip]), buffer[stride:]
    frames = encoder.frames(len(buffer))
    if held is not None:
        yield Piece(path, held, kept, last=not frames)
    if frames or held is None:
        if not len(buffer):
            raise BadAudio("no samples")
        yield Piece(path, torch.from_numpy(buffer), max(1, frames), True)


def _resampled(path: str, size: int, expected: int, rate: int) -> Iterator[np.ndarray]:
    """Blocks of mono float32 at `rate` Hz."""
    try:
        with open_sound(path, 0, size, in_tar=False) as sound:
            stream = soxr.ResampleStream(sound.samplerate, rate, 1) if sound.samplerate != rate else None
            decoded = 0
            for block in sound.blocks(BLOCK, dtype="float32", always_2d=True):
                decoded += len(block)
                mono = block.mean(1)
                if not np.isfinite(mono).all():
                    raise BadAudio("samples that are not finite (NaN or infinity)")
                yield mono if stream is None else stream.resample_chunk(mono)
            if decoded < expected:
                raise BadAudio(f"truncated: {decoded} of {expected} samples decode")
            if stream is not None:
                yield stream.resample_chunk(np.empty(0, np.float32), last=True)
    except sf.LibsndfileError as error:
        raise BadAudio(f"cannot be decoded: {error.error_string.strip().removeprefix('Error : ')}") from None


# --- what is written ------------------------------------------------------------------------------------------------


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
    """By hand, for the frames need not be in memory: length of the header, header, values."""
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
    """A file name as valid Unicode; bytes that are none are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _progress() -> Progress:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def read_names(data: bytes) -> list[str]:
    """File names one a line, or separated by NUL (`find -print0`)."""
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(name) for name in names if name]


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Arguments, args=argv, prog="python -m ajepa.embed")
    try:
        paths = [p for name in args.files for p in (read_names(sys.stdin.buffer.read()) if name == "-" else [name])]
        if not paths:
            raise ConfigError("no files to embed: name some, or - to read their names from the standard input")
        bad = embed(args, paths)
    except KeyboardInterrupt:
        return 130
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    good = len(dict.fromkeys(paths)) - len(bad)
    listing = Path(f"{args.out}.bad.tsv")
    listing.unlink(missing_ok=True)
    if bad:
        lines = [f"{_text(path)}\t{' '.join(reason.split())}\n" for path, reason in bad.items()]
        write_atomic(listing, "".join(["file\treason\n", *lines]).encode())
        print(f"bad files: {len(bad)}, also listed in {listing}", file=sys.stderr)
        print("".join(f"  {line}" for line in lines), end="", file=sys.stderr)
    print(f"{good} files embedded" + (f" into {args.out}" if good else "; nothing written"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
