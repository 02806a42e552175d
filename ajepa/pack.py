"""`python -m ajepa.pack SOURCE TARGET`: decode recordings once, into shards of PCM to train on from then on."""

import contextlib
import hashlib
import io
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile as sf
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ajepa.data.decode import Decoder, read_whole, resampled_lengths
from ajepa.data.formats.audiofile import reason_of
from ajepa.data.index import DataError, Index, build_index
from ajepa.data.reader import to_int16
from ajepa.data.shards import SUFFIX, VERSION, Clip, Shard, ShardError, ShardWriter, block_crcs, is_shards, missing_rows
from ajepa.utils.atomic_files import atomic_file, write_atomic

try:
    import fcntl

    def lock(file) -> None:
        """Raises OSError where another process holds it. The system releases it when the process ends."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

except ImportError:  # Windows
    import msvcrt

    def lock(file) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]


LEFT_OUT = "left_out.tsv"
OWN = re.compile(rf"\d+{SUFFIX}|\.\d+{SUFFIX}\.partial|\.?{LEFT_OUT}(\.partial)?|\.lock")  # what packing writes
MEGABYTE = 1_000_000
SAMPLED = 32  # clips that `--dry-run` compresses, to tell the size of FLAC shards


class PackError(Exception):
    """Packing cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Arguments:
    """Decode recordings once, into shards of mono 16-bit PCM that `ajepa.train --data TARGET` reads.

    Broken, silent and duplicate recordings are left out and listed in TARGET/left_out.tsv. Run it again to go on after
    an interruption: finished shards are kept.
    """

    source: tyro.conf.Positional[str]
    """Folder, CSV/JSONL manifest, or webdataset tars: what `ajepa.train --data` takes."""
    target: tyro.conf.Positional[str]
    """Folder for the shards: a new or an empty one, or one that this packing was interrupted in."""
    where: str | None = None
    """Rows of the manifest to pack, such as "split=train"."""
    label: str | None = None
    """Column that holds the label, where it is not found by its name."""
    rate: int = 32_000
    """Sample rate of the shards in Hz; best the one of the front end (--sample-rate) that is to be trained."""
    codec: Literal["pcm", "flac"] = "pcm"
    """flac: smaller (--dry-run tells by how much), lossless, but decoded at every reading."""
    shard_mb: int = 1024
    """Size of a shard in MB, about."""
    silence_db: float = -80.0
    """A recording whose peak is below this, in dB of full scale, is silent."""
    max_hours: float = 2.0
    """Longer recordings are left out: each is decoded in memory."""
    decoder: Decoder = "auto"
    """Who decodes: DALI the formats at which it is faster (auto) or all that it can (dali), else libsndfile."""
    float_scale: float = 1.0
    """Full scale of recordings in floating point, such as 32768 for samples written without scaling."""
    threads: int = 0
    """Readers and decoders; 0: one a core."""
    dry_run: bool = False
    """Only say what there is and how large the shards would be."""
    verify: bool = False
    """Read finished shards from end to end, and make damaged ones again."""


@dataclass(frozen=True)
class Packed:
    """Of the whole target."""

    clips: int
    seconds: float
    bytes: int
    shards: int
    left_out: list[tuple[str, str]]  # (name, reason)


def pack(args: Arguments, console: Console) -> Packed:
    """Raises PackError, DataError, OSError."""
    if not 1_000 <= args.rate <= 384_000:
        raise PackError(f"--rate {args.rate}: a rate of 1,000 to 384,000 Hz is needed")
    if args.shard_mb < 1 or not 0 < args.max_hours < 1_000 or args.threads < 0:
        raise PackError("--shard-mb must be 1 or more, --max-hours above 0 and below 1,000, --threads 0 or more")
    if is_shards(args.source):
        raise PackError(f"{args.source}: these are shards already; give the recordings they were made of")
    if not 0 < args.float_scale < np.inf:
        raise PackError(f"--float-scale {args.float_scale}: must be a finite number above 0")
    index = build_index(
        args.source, where=args.where, label_column=args.label, threads=args.threads, decode=False,
        float_scale=args.float_scale,
    )  # fmt: skip
    target = Path(args.target).expanduser()
    key = _key(index, args)
    done = _finished(target, key, args, console)
    gaps = list(missing_rows(done, len(index)))
    todo = index.subset(row for start, end in gaps for row in range(start, end))
    _announce(args, index, todo, done, console)
    if args.dry_run:
        return _summary(index, done)
    target.mkdir(parents=True, exist_ok=True)
    with _alone(target), _progress(console, len(index), len(index) - len(todo)) as step:
        whole = {shard.path for shard in done}
        for path in target.iterdir():
            if path.name.endswith(".partial") or (path.suffix == SUFFIX and str(path) not in whole):
                path.unlink()
        need, free = _pcm_bytes(todo, args), shutil.disk_usage(target).free
        if args.codec == "pcm" and need > free:
            raise PackError(f"{target}: the shards take up to {_gb(need)}, {_gb(free)} are free; see --codec flac")
        seen: dict[bytes, int] = {}
        for shard in done:
            seen.update(zip(shard.records["digest"].tolist(), shard.records["row"].tolist(), strict=True))
        for start, end in gaps:
            for path in _pack_rows(index, start, end, args, target, key, seen, step):
                done.append(Shard(str(path)))
        packed = _summary(index, done)
        lines = [f"{ascii(name)[1:-1]}\t{' '.join(reason.split())}\n" for name, reason in packed.left_out]
        write_atomic(target / LEFT_OUT, ("name\treason\n" + "".join(lines)).encode())
    return packed


def _pack_rows(index: Index, start: int, end: int, args: Arguments, target: Path, key: bytes,
               seen: dict[bytes, int], step) -> Iterator[Path]:  # fmt: skip
    """Packs rows [start, end) of the index. Yields the shards; each is complete on the disk when it appears."""
    entries, columns = index.entries, list(index.metadata)
    clips = enumerate(_clips(index.subset(range(start, end)), args), start)
    first = start
    while first < end:
        path = target / f"{first:09d}{SUFFIX}"
        with atomic_file(path) as file:
            writer = ShardWriter(file, columns)
            for row, clip in clips:
                name = entries[row].name
                if isinstance(clip, str):
                    writer.leave_out(name, clip)
                elif (twin := seen.setdefault(clip.digest, row)) != row:
                    writer.leave_out(name, f"the same samples as {entries[twin].name}")
                else:
                    label = int(index.labels[row])
                    values = [index.metadata[column][row] for column in columns]
                    writer.add(row, name, index.label_names[label] if label >= 0 else None, values, clip)
                step()
                if writer.position >= args.shard_mb * MEGABYTE:
                    break
            writer.finish(args.codec, args.rate, first, row + 1, len(index), key)
        first = row + 1
        yield path


def _clips(index: Index, args: Arguments) -> Iterator[Clip | str]:
    """Every recording ready to be stored, or the reason why it is left out."""
    work = partial(_clip, index, args)
    most = args.max_hours * 3600 * args.rate
    return read_whole(index, work, sample_rate=args.rate, max_samples=most, threads=args.threads, decoder=args.decoder)


def _clip(index: Index, args: Arguments, row: int, samples: np.ndarray) -> Clip | str:
    if samples.dtype != np.int16 and not np.isfinite(samples).all():
        return "samples that are not finite (NaN or infinity)"
    pcm = np.empty(len(samples), np.int16)
    to_int16(samples, 1.0, pcm)
    peak = max(int(pcm.max(initial=0)), -int(pcm.min(initial=0)))
    if peak == 0 or 20 * np.log10(peak / 32768) < args.silence_db:
        return f"silent: its peak is {peak} of 32768"
    digest = hashlib.blake2b(pcm.data, digest_size=16).digest()
    payload = pcm.tobytes() if args.codec == "pcm" else _flac(pcm, args.rate)
    numbers = index.entries.numbers[row]
    return Clip(payload, len(pcm), numbers["sample_rate"], numbers["channels"], digest, block_crcs(payload))


def _flac(pcm: np.ndarray, rate: int) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, pcm, rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _key(index: Index, args: Arguments) -> bytes:
    """Shards of equal keys belong together: the same recordings, packed alike."""
    options = (VERSION, index.fingerprint, args.rate, args.codec, args.silence_db, args.max_hours, args.label,
               args.float_scale)  # fmt: skip
    return hashlib.blake2b(repr(options).encode(), digest_size=16).digest()


def _finished(target: Path, key: bytes, args: Arguments, console: Console) -> list[Shard]:
    """The target's whole shards, by their rows; damaged ones are left for packing to replace."""
    if not target.exists():
        return []
    if not target.is_dir():
        raise PackError(f"{target} is not a folder: give a new or empty one")
    names = sorted(os.listdir(target))
    foreign = [name for name in names if not OWN.fullmatch(name)]
    if foreign:
        raise PackError(f"{target} holds other files ({', '.join(foreign[:3])}): give a new or empty folder")
    shards: list[Shard] = []
    for name in names:
        if not name.endswith(SUFFIX):
            continue
        try:
            shard = Shard(str(target / name))
        except ShardError as error:
            console.print(f"made again: {error}", markup=False)
            continue
        if shard.header.key != key:
            raise PackError(
                f"{target} holds shards of other recordings, of other settings or of an earlier version ({name}): give "
                "the source and the settings they were made with, or a new folder"
            )
        damaged = shard.damaged() if args.verify else []
        if damaged:
            console.print(f"made again: {shard.path}: {len(damaged)} clips, {damaged[0][0]} first", markup=False)
        else:
            shards.append(shard)
    return sorted(shards, key=lambda shard: shard.header.first_row)


def _summary(index: Index, shards: list[Shard]) -> Packed:
    left_out = [*index.skipped]
    for shard in sorted(shards, key=lambda shard: shard.header.first_row):
        left_out += [(str(name), str(reason)) for name, reason in shard.notes()["left_out"]]
    seconds = sum(int(shard.records["frames"].sum()) / shard.header.sample_rate for shard in shards)
    size = sum(shard.size for shard in shards)
    return Packed(sum(shard.header.clips for shard in shards), seconds, size, len(shards), left_out)


def _announce(args: Arguments, index: Index, todo: Index, done: list[Shard], console: Console) -> None:
    console.print(f"{args.source}: {len(index):,} recordings, {index.seconds / 3600:.2f} hours; "
                  f"{len(index.skipped):,} files cannot be read", markup=False)  # fmt: skip
    if done:
        console.print(f"{len(done):,} shards are finished; {len(todo):,} recordings to go", markup=False)
    if args.dry_run and len(todo):
        size = _pcm_bytes(todo, args)
        if args.codec == "flac":
            rows = np.unique(np.linspace(0, len(todo) - 1, SAMPLED).astype(int))
            clips = [clip for clip in _clips(todo.subset(rows), args) if isinstance(clip, Clip)]
            size *= sum(len(c.payload) for c in clips) / max(1, sum(2 * c.frames for c in clips))
        console.print(f"they would take about {_gb(size)} as {args.codec} at {args.rate} Hz; broken, silent and "
                      "duplicate ones less", markup=False)  # fmt: skip


def _pcm_bytes(index: Index, args: Arguments) -> float:
    samples = resampled_lengths(index, args.rate)
    return 2 * float(samples[samples <= 3600 * args.max_hours * args.rate].sum())


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Two packings into one folder would take each other's half-written shards away."""
    with open(target / ".lock", "w") as file:
        try:
            lock(file)
        except OSError:
            raise PackError(f"{target}: another process is packing into it") from None
        yield
    (target / ".lock").unlink(missing_ok=True)


@contextlib.contextmanager
def _progress(console: Console, total: int, done: int):
    bar = Progress(
        TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda: bar.advance(task)


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Arguments, args=argv, prog="python -m ajepa.pack")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        packed = pack(args, console)
    except KeyboardInterrupt:
        print("stopped; finished shards are kept: the same command goes on from there", file=sys.stderr)
        return 130
    except (PackError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.target}: {reason_of(error)}; finished shards are kept: once that is "
              "mended, the same command goes on from there", file=sys.stderr)  # fmt: skip
        return 2
    if not args.dry_run:
        print(f"{packed.clips:,} clips, {packed.seconds / 3600:.2f} hours, {_gb(packed.bytes)} in {packed.shards:,} "
              f"shards; {len(packed.left_out):,} recordings left out, see {Path(args.target) / LEFT_OUT}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
