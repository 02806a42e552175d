"""`python -m ajepa.embed ENCODER sources... --out OUT`: embed recordings of any length into one file.

A source is a recording, or a set of recordings as in `ajepa.train --data`: a folder, a manifest, tars or shards. Every
row of a set is one clip.

OUT's suffix chooses the format. `.npz` and `.safetensors` hold `clips` `[n, D]`, each the mean of its frames or, with
the poolings that describe a whole chunk, `ajepa.Encoder.embed`; `frames` `[sum T', D]`; `offsets` `[n + 1]`, where clip
i has frames `offsets[i]:offsets[i + 1]`; the files' names; and `hop_size_in_ms`. `.parquet` has one row per clip.
Recordings are streamed and embeddings go to files, so memory is bounded by one recording's frames. Bad files are left
out and listed at the end and in `OUT.bad.tsv`; the exit status is then 1.

Until all recordings are embedded, the embeddings lie in the hidden folder `.OUT.unfinished`. The same command goes on
from there after Ctrl-C or a kill, also with other sources; a recording that changed is embedded again.
"""

import contextlib
import glob
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from ajepa.config import ConfigError, Pooling
from ajepa.data.columns import Entry
from ajepa.data.formats.audiofile import BadAudio, inspect, reason_of, stat_file
from ajepa.data.index import DataError, build_index
from ajepa.data.reader import iterate_resampled
from ajepa.data.shards import SUFFIX as SHARD
from ajepa.data.sources.source import MANIFESTS
from ajepa.encoder import CHUNKS_AT_ONCE, Encoder
from ajepa.evaluation.embeddings import Embedded, Result, Spool, check_format, is_result, write_result
from ajepa.model.pooling import Layers, Statistics
from ajepa.utils import cli
from ajepa.utils.command import command
from ajepa.utils.devices import autocast_of, choose_device, evaluates_in_bf16
from ajepa.utils.folders import claim_file
from ajepa.utils.lock import locked

T = TypeVar("T")


@dataclass(frozen=True)
class Arguments:
    """Write clip and frame embeddings of audio files into one file."""

    encoder: tyro.conf.Positional[str]
    """Encoder to use: a run folder, a checkpoint, a fine-tuning, an exported or converted folder, or a hub id."""
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
    """One chunk of a recording."""

    samples: torch.Tensor  # float32 [<= clip_samples]
    frames: int  # how many of the chunk's first frames are kept


class BadFiles:
    """The recordings that are left out, with the reasons, and the list of them at `path`, which grows with them."""

    def __init__(self, path: Path):
        self.path, self.reasons = path, dict[str, str]()
        path.unlink(missing_ok=True)

    def add(self, name: str, reason: str) -> None:
        if name not in self.reasons:
            head = "" if self.reasons else "file\treason\n"
            self.reasons[name] = " ".join(reason.split())
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{head}{_text(name)}\t{self.reasons[name]}\n")


def embed(args: Arguments, paths: list[str]) -> tuple[int, dict[str, str]]:
    """Embed `paths` into `args.out`. Returns the number of recordings, and the reason for each that was left out.

    Raises ConfigError, DataError, OSError, and KeyboardInterrupt after Ctrl-C, which keeps what was embedded.
    """
    out = Path(args.out)
    check_format(out)
    device = choose_device(args.device)
    encoder = Encoder.from_pretrained(args.encoder, pooling=args.pooling, layers=args.layers).to(device)
    bf16, autocast = evaluates_in_bf16(device, args.precision), autocast_of(device, args.precision)
    fingerprint = encoder.fingerprint()

    claim_file(out, is_result)
    work = out.with_name(f".{out.name}.unfinished")
    work.mkdir(exist_ok=True)
    settings = f"{fingerprint} {bf16} {args.float_scale} {args.frames}"
    folder = work / sha256(settings.encode()).hexdigest()[:16]
    try:
        with locked(work) as lock, autocast, torch.inference_mode():
            bad = BadFiles(Path(f"{out}.bad.tsv"))
            with contextlib.closing(Spool(folder, encoder.output_dim, args.frames)) as spool:
                rows = _fill(spool, encoder, args, paths, bad, lock.check)
            if rows:
                about = {"hop_size_in_ms": encoder.hop_size_in_ms, "encoder": fingerprint}
                write_result(out, Result(spool, rows, about))
                if len(rows) == len(spool.rows):  # otherwise it holds embeddings of other sources as well
                    shutil.rmtree(folder)
    finally:
        with contextlib.suppress(OSError):
            work.rmdir()
    if work.exists():
        print(f"{work} keeps unfinished embeddings of other sources or settings: delete it if you do not need them",
              file=sys.stderr)  # fmt: skip
    return len(rows), bad.reasons


def _fill(
    spool: Spool, encoder: Encoder, args: Arguments, paths: list[str], bad: BadFiles, check: Callable[[], None]
) -> list[int]:
    """Embed what the spool lacks, and return the rows of all recordings. `check` is called before anything is added."""
    entries: dict[bytes, Entry] = {}
    try:
        with _progress() as progress:
            entries = {key_of(entry): entry for entry in list_recordings(paths, args, bad)}
            check_format(Path(args.out), [_text(entry.name) for entry in entries.values()])
            missing = {key: entry for key, entry in entries.items() if key not in spool.rows}
            task = progress.add_task("embedding", total=len(entries), completed=len(entries) - len(missing))
            for done in embedded(encoder, _counted(missing.items(), progress, task), args.float_scale, bad):
                check()
                spool.add(done)
    except KeyboardInterrupt:
        count = sum(key in spool.rows for key in entries)
        if not count:
            raise
        raise KeyboardInterrupt(
            f"stopped after {count:,} of {len(entries):,} recordings; the same command goes on from there"
        ) from None
    return [spool.rows[key] for key in entries if key in spool.rows]


def key_of(entry: Entry) -> bytes:
    """What identifies the samples of a recording."""
    parts = (entry.name, entry.offset, entry.size, entry.mtime_ns, entry.start, entry.frames)
    return sha256(repr(parts).encode(errors="surrogateescape")).digest()[:16]


def list_recordings(sources: list[str], args: Arguments, bad: BadFiles) -> Iterator[Entry]:
    """Yield every recording that the sources name once. Bad recordings are added to `bad` with the reason."""
    seen = set()
    for source in dict.fromkeys(sources):
        try:
            if is_listing(source):
                index = build_index(source, where=args.where, decode=False, float_scale=args.float_scale)
                for name, reason in index.skipped:
                    bad.add(name, reason)
                entries: Iterable[Entry] = index.entries
            else:
                size, mtime = stat_file(source)
                info = inspect(source, 0, size, decode=False, float_scale=args.float_scale)
                entries = [Entry(source, "", 0, size, mtime, size, info.frames, 0, *info, -1)]
        except (BadAudio, DataError, OSError) as error:
            bad.add(source, reason_of(error))
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


def embedded(
    encoder: Encoder, entries: Iterable[tuple[bytes, Entry]], float_scale: float, bad: BadFiles
) -> Iterator[list[tuple[bytes, Embedded]]]:
    """Yield the recordings of each batch, with their keys. Bad recordings are added to `bad`.

    A batch has chunks of several recordings, and ends with a recording, so that the recordings that follow are computed
    in the same batches after an interruption, and thus bit for bit as without one.
    """
    batch: list[tuple[bytes, str, list[torch.Tensor], list[int]]] = []  # with the frames of each chunk that are kept
    for key, entry in entries:
        whole: list[Any] = []  # the encoded chunks of a recording that is longer than a batch
        chunks: list[torch.Tensor] = []
        frames: list[int] = []
        try:
            for piece in read_pieces(entry, encoder, float_scale):
                if len(chunks) == CHUNKS_AT_ONCE:
                    whole += encode(encoder, chunks, frames)
                    chunks, frames = [], []
                chunks.append(piece.samples)
                frames.append(piece.frames)
        except (BadAudio, OSError) as error:
            bad.add(entry.name, reason_of(error))
            continue
        if whole:
            yield [(key, pooled(encoder, _text(entry.name), whole + encode(encoder, chunks, frames)))]
            continue
        batch.append((key, _text(entry.name), chunks, frames))
        if sum(len(parts) for _, _, parts, _ in batch) >= CHUNKS_AT_ONCE:
            yield _together(encoder, batch)
            batch = []
    if batch:
        yield _together(encoder, batch)


def _together(encoder: Encoder, batch: list) -> list[tuple[bytes, Embedded]]:
    """Recordings of a few chunks, encoded as one batch."""
    chunks = [chunk for _, _, parts, _ in batch for chunk in parts]
    parts = iter(encode(encoder, chunks, [count for *_, frames in batch for count in frames]))
    return [(key, pooled(encoder, name, list(islice(parts, len(own))))) for key, name, own, _ in batch]


def encode(encoder: Encoder, chunks: list[torch.Tensor], frames: list[int]) -> list[Any]:
    """The first `frames` frames of each chunk, or its statistics for the poolings of a whole chunk."""
    chunks = [chunk.to(encoder.vit.norm.weight.device) for chunk in chunks]
    if encoder.per_frame:
        rows = encoder.encode_chunks(chunks).cpu().numpy()
        return [x[:count] for x, count in zip(rows, frames, strict=True)]
    return [Statistics(*parts) for parts in zip(*(x.split(1) for x in encoder.summarise(chunks)), strict=True)]


def pooled(encoder: Encoder, name: str, parts: list[Any]) -> Embedded:
    """The embeddings of a recording from what `encode` gives for its chunks."""
    if encoder.per_frame:
        frames = np.concatenate(parts)
        return Embedded(name, frames.mean(0, dtype=np.float64), frames)
    whole = Statistics(*map(torch.cat, zip(*parts, strict=True)))
    clip = encoder.pool_chunks(whole, torch.zeros_like(whole.columns), 1)
    return Embedded(name, clip[0].cpu().numpy(), encoder.pool_chunks(whole).cpu().numpy())


def read_pieces(entry: Entry, encoder: Encoder, float_scale: float = 1.0) -> Iterator[Piece]:
    """Yield the chunks of a recording at the encoder's sample rate, with channels averaged. They are read on demand.

    Raises BadAudio where the recording is damaged, possibly after some chunks, and OSError if it cannot be read.
    """
    clip, stride = encoder.config.clip_samples, encoder.stride
    kept = encoder.chunks(clip + 1)[0].frames
    buffer, held = np.empty(0, np.float32), None
    for block in iterate_resampled(entry, encoder.sampling_rate, float_scale):
        buffer = np.concatenate([buffer, block])
        while len(buffer) > clip:
            if held is not None:
                yield Piece(held, kept)
            held, buffer = torch.from_numpy(buffer[:clip]), buffer[stride:]
    frames = encoder.frames(len(buffer))
    if held is not None:
        yield Piece(held, kept)
    if frames or held is None:
        if not len(buffer):
            raise BadAudio("no samples")
        yield Piece(torch.from_numpy(buffer), max(1, frames))


# --- command line ---------------------------------------------------------------------------------------------------


def _text(path: str) -> str:
    """A file name as valid Unicode; bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _progress() -> Progress:
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _counted(items: Iterable[T], progress: Progress, task: TaskID) -> Iterator[T]:
    for item in items:
        yield item
        progress.advance(task)


def read_names(data: bytes) -> list[str]:
    """Split a list of file names, one per line or separated by NUL (`find -print0`)."""
    names = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(name) for name in names if name]


def read_stdin() -> bytes:
    try:
        return sys.stdin.buffer.read()
    except (AttributeError, ValueError, OSError):  # there is none, or it is closed
        raise ConfigError("- reads names from the standard input, which is closed: pipe a list into it") from None


@command
def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "python -m ajepa.embed")
    paths = [path for name in args.files for path in (read_names(read_stdin()) if name == "-" else [name])]
    if not paths:
        raise ConfigError("no files to embed: name some, or use - to read names from standard input")
    good, bad = embed(args, paths)
    if bad:
        print(f"bad files: {len(bad)}, also listed in {args.out}.bad.tsv", file=sys.stderr)
        for path, reason in bad.items():
            print(f"  {_text(path)}\t{reason}", file=sys.stderr)
    print(f"{good} recordings embedded" + (f" into {args.out}" if good else "; nothing written"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
