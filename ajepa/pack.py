"""`python -m ajepa.pack SOURCE TARGET`: decode recordings once into shards of PCM for training."""

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

from ajepa.data.contents import content_hashes
from ajepa.data.decode import Decoder, read_whole, resampled_lengths
from ajepa.data.formats.audiofile import reason_of
from ajepa.data.index import Index, build_index
from ajepa.data.reader import to_int16
from ajepa.data.shards import SUFFIX, VERSION, Clip, Shard, ShardError, ShardWriter, block_crcs, is_shards, missing_rows
from ajepa.utils import cli
from ajepa.utils.atomic_files import atomic_file, write_atomic
from ajepa.utils.command import command
from ajepa.utils.errors import UserError
from ajepa.utils.folders import claim
from ajepa.utils.lock import locked

LEFT_OUT = "left_out.tsv"
# The files that packing writes.
OWN = re.compile(rf"\d+{SUFFIX}|\.\d+{SUFFIX}\.partial|\.?{LEFT_OUT}(\.partial)?|\.lock(\.\w+)?")
MEGABYTE = 1_000_000
# What a packing depends on: the parts of its key.
KINDS = ["other settings", "other recordings", "recordings that changed since", "other labels or columns"]
PART = 4  # bytes of a part
SAMPLED = 32  # clips that `--dry-run` compresses to estimate the size of FLAC shards


class PackError(UserError):
    """Packing cannot continue; the message gives the reason and the remedy."""


@dataclass(frozen=True)
class Arguments:
    """Decode recordings once into shards of mono 16-bit PCM that `ajepa.train --data TARGET` reads.

    Bad, silent and duplicate recordings are left out and listed in TARGET/left_out.tsv. After an interruption, run the
    same command again to continue: finished shards are kept.
    """

    source: tyro.conf.Positional[str]
    """Recordings to pack: a folder, a CSV or JSONL manifest, or webdataset tars, as for `ajepa.train --data`."""
    target: tyro.conf.Positional[str]
    """Folder for the shards. It must be new, empty, or left by an interrupted run of the same packing."""
    where: str | None = None
    """Pack only these rows of the manifest, such as "split=train"."""
    label: str | None = None
    """Column that holds the label; by default it is found by its name."""
    rate: int = 32_000
    """Sample rate of the shards in Hz. Use the --sample-rate that training will use."""
    codec: Literal["pcm", "flac"] = "pcm"
    """flac is lossless and smaller (--dry-run estimates the size), but every reading decodes it again."""
    shard_mb: int = 1024
    """Approximate size of a shard in MB."""
    silence_db: float = -80.0
    """A recording is silent if its peak is below this level, in dB relative to full scale."""
    max_hours: float = 2.0
    """Longer recordings are left out, because each recording is decoded in memory."""
    decoder: Decoder = "auto"
    """auto uses DALI for formats where it is faster, dali for all that it can decode; soundfile decodes the rest."""
    float_scale: float = 1.0
    """Full scale of floating-point recordings; 32768 if 16-bit samples were written without scaling."""
    threads: int = 0
    """Number of reading and decoding threads; 0 means one per core."""
    dry_run: bool = False
    """Only print what would be packed and how large the shards would be."""
    verify: bool = False
    """Read finished shards from end to end and make damaged shards again."""


@dataclass(frozen=True)
class Packed:
    """Totals over the whole target folder."""

    clips: int
    seconds: float
    bytes: int
    shards: int
    left_out: list[tuple[str, str]]  # (name, reason)


def pack(args: Arguments, console: Console) -> Packed:
    """Pack the recordings of `args.source`. Raises PackError, DataError, ConfigError, OSError."""
    if not 1_000 <= args.rate <= 384_000:
        raise PackError(f"--rate {args.rate}: the sample rate must be from 1,000 to 384,000 Hz")
    if args.shard_mb < 1 or not 0 < args.max_hours < 1_000 or args.threads < 0:
        raise PackError("--shard-mb must be at least 1, --max-hours above 0 and below 1,000, and --threads at least 0")
    if is_shards(os.path.expanduser(args.source)):
        raise PackError(f"{args.source}: these are shards already; give the recordings from which they were made")
    if not -np.inf < args.silence_db <= 0:
        raise PackError(f"--silence-db {args.silence_db}: the level must be a finite number, 0 at most")
    if not 0 < args.float_scale < np.inf:
        raise PackError(f"--float-scale {args.float_scale}: the scale must be a finite number above 0")
    index = build_index(
        args.source, where=args.where, label_column=args.label, threads=args.threads, decode=False,
        float_scale=args.float_scale,
    )  # fmt: skip
    target = Path(args.target).expanduser()
    if args.dry_run:
        return _pack(index, args, target, console)
    claim(target, "shards", "TARGET")
    with locked(target, "TARGET"):
        return _pack(index, args, target, console)


def _pack(index: Index, args: Arguments, target: Path, console: Console) -> Packed:
    key = _key(index, args)
    done = _finished(target, key, args, console)
    gaps = list(missing_rows(done, len(index)))
    todo = index.subset(row for start, end in gaps for row in range(start, end))
    _announce(args, index, todo, done, console)
    if args.dry_run:
        return _summary(index, done)
    with _progress(console, len(index), len(index) - len(todo)) as step:
        whole = {shard.path for shard in done}
        for path in target.iterdir():
            if path.name.endswith(".partial") or (path.suffix == SUFFIX and str(path) not in whole):
                path.unlink()
        need, free = _pcm_bytes(todo, args), shutil.disk_usage(target).free
        if args.codec == "pcm" and need > free:
            raise PackError(f"{target}: the shards need up to {_gb(need)}, {_gb(free)} are free; try --codec flac")
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
    """Pack rows [start, end) of the index. Yields the path of each shard once the shard is complete on disk."""
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
    """Yield each recording as a clip for a shard, or the reason why it is left out."""
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
    """Shards with equal keys belong together: they hold the same recordings, packed with the same settings.

    A key is the hashes of four things, in the order of `KINDS`, so that a difference can be named.
    """
    options = (VERSION, args.rate, args.codec, args.silence_db, args.max_hours, args.float_scale)
    labels = [*index.label_names, None]  # the last is that of the label -1
    columns = [[labels[label] for label in index.labels], *index.metadata.values()]
    notes = hashlib.blake2b(repr(list(index.metadata)).encode())
    for row in zip(*columns, strict=True):
        notes.update(repr(row).encode())
    contents, times = hashlib.blake2b(), index.entries.numbers["mtime_ns"].tolist()
    for row in zip(content_hashes(index, threads=args.threads), times, strict=True):
        contents.update(repr(row).encode())
    parts = (repr(options).encode(), index.fingerprint.encode(), contents.digest(), notes.digest())
    return b"".join(hashlib.blake2b(part, digest_size=PART).digest() for part in parts)


def _parts(key: bytes) -> list[bytes]:
    return [key[i : i + PART] for i in range(0, len(key), PART)]


def _finished(target: Path, key: bytes, args: Arguments, console: Console) -> list[Shard]:
    """The complete shards of the target, ordered by their rows. Packing replaces damaged shards."""
    names = sorted(os.listdir(target)) if target.is_dir() else []
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
            console.print(f"this shard is made again: {error}", markup=False)
            continue
        if shard.header.key != key:
            parts = zip(KINDS, _parts(shard.header.key), _parts(key), strict=True)
            others = [kind for kind, theirs, ours in parts if theirs != ours]
            what = " and ".join(others) if len(others) < len(KINDS) else "another source or of an earlier version"
            raise PackError(
                f"{target} holds shards of {what} ({name}): give the source and the settings with which they were "
                "made, or a new folder"
            )
        damaged = shard.damaged() if args.verify else []
        if damaged:
            console.print(
                f"this shard is made again: {shard.path}: {len(damaged)} damaged clips, the first is {damaged[0][0]}",
                markup=False,
            )
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
        console.print(f"their shards would take about {_gb(size)} as {args.codec} at {args.rate} Hz, and less if "
                      "some are bad, silent or duplicate", markup=False)  # fmt: skip


def _pcm_bytes(index: Index, args: Arguments) -> float:
    samples = resampled_lengths(index, args.rate)
    return 2 * float(samples[samples <= 3600 * args.max_hours * args.rate].sum())


def _gb(size: float) -> str:
    return f"{size / 1e9:,.3g} GB"


@contextlib.contextmanager
def _progress(console: Console, total: int, done: int):
    bar = Progress(
        TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    with bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda: bar.advance(task)


@command
def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "python -m ajepa.pack")
    try:
        packed = pack(args, Console(stderr=True, highlight=False, soft_wrap=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; finished shards are kept, and the same command goes on from there") from None
    except OSError as error:
        raise PackError(
            f"{error.filename or args.target}: {reason_of(error)}; finished shards are kept: fix the cause, and the "
            "same command goes on from there"
        ) from error
    if not args.dry_run:
        print(f"{packed.clips:,} clips, {packed.seconds / 3600:.2f} hours, {_gb(packed.bytes)} in {packed.shards:,} "
              f"shards; {len(packed.left_out):,} recordings left out, see {Path(args.target) / LEFT_OUT}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
