"""Reads planned batches of clips in several threads: only the crop, through libsndfile or directly from stored PCM.

A clip is a slice of its recording resampled to the loader's rate, however much of the file is read for it. A recording
therefore gives the same samples from its own file, from a tar, from a shard packed from it and by another decoder.
"""

import io
import math
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import numpy as np
import soundfile as sf
import torch

from ajepa.data.columns import Entry
from ajepa.data.formats.audiofile import BadAudio, inspect, iterate_samples, read_samples, reason_of, stat_file
from ajepa.data.index import DataError, Index
from ajepa.data.shards import FORMATS, OpenShards, Shard
from ajepa.utils.cores import cores, local_ranks, quota, sharers
from ajepa_kernels import Resampler, input_span, resample, resampled_length

# The values of `Entry.format` that need no decoder.
STORED = {FORMATS["pcm"], *(f"{kind}/PCM_16" for kind in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU"))}
BLOCK = 1 << 15  # samples that are scaled at a time
SEGMENT = 1 << 22  # samples of a segment that are read at a time
T = TypeVar("T")


class Plan(NamedTuple):
    """A batch to read: rows of the index, crop positions (0 start .. 1 end) and linear gains, `[B]` each."""

    items: np.ndarray
    fractions: np.ndarray
    gains: np.ndarray


class Clips(NamedTuple):
    """A batch whose clips can be read."""

    plan: Plan
    # clip(b, out) returns the index row of clip b and its samples: mono, at the loader's rate, before the plan's gain.
    # The samples are int16 if they need no conversion or were converted from int16 with a gain of 1, else float32.
    # `out` is None or an int16 array long enough for a clip; the returned samples may be a view of it. Any thread may
    # call `clip`, until the next batch is read.
    clip: Callable[[int, np.ndarray | None], tuple[int, np.ndarray]]


class Cut(NamedTuple):
    """Where a clip lies in its recording."""

    first: int  # the clip's first sample, at the loader's rate
    samples: int  # length of the clip, at the loader's rate
    start: int  # the clip depends on samples [start, stop) of the recording at its own rate
    stop: int


class Reader:
    """Reads the batches `plan(0)`, `plan(1)`... until `plan` returns None.

    Args:
        plan: returns the rows, crops and gains of batch i. It is called with increasing i; DALI may repeat an i.
        first, checkpoint: DALI's position, for `ajepa.data.dali.DaliReader`.
        batches: number of the first batch to read.
        skipped: name -> reason of files that are not read; bad files found while reading are added.
        replace: True reads the next good row of the index in place of a bad one. False returns row -1 and a single zero
            sample for a bad one.
    """

    def __init__(
        self,
        index: Index,
        plan: Callable[[int], Plan | None],
        *,
        sample_rate: int,
        clip_samples: int,
        threads: int,
        first: int = 0,
        batches: int = 0,
        checkpoint: bytes | None = None,
        skipped: dict[str, str] | None = None,
        replace: bool = True,
    ):
        self.index, self.plan, self.sample_rate, self.clip_samples = index, plan, sample_rate, clip_samples
        self.threads, self.replace = threads, replace
        self.first, self.batches, self.checkpoint = first, batches, checkpoint
        self.skipped = dict(skipped or {})
        self.shards = OpenShards()
        self._unchanged: set[tuple[str, int]] = set()  # (name, mtime) of files with a new mtime and the same recording
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="ajepa-read")

    def next(self) -> Clips | None:
        """The next batch, None at the end. Raises DataError when no usable file is left."""
        plan = self.plan(self.batches)
        if plan is None:
            return None
        self.batches += 1
        self.first, self.checkpoint = self.batches, None  # the batch at which a DALI reader would start to count

        def clip(b: int, out: np.ndarray | None) -> tuple[int, np.ndarray]:
            def read(row: int) -> tuple[int, np.ndarray]:
                return row, self.read_clip(self.index.entries[row], float(plan.fractions[b]), float(plan.gains[b]), out)

            return self.good_row(int(plan.items[b]), read, (-1, np.zeros(1, np.int16)))

        return Clips(plan, clip)

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.shards.close()

    def spread(self, work: Callable[[int], T], size: int) -> list[T]:
        """Computes `[work(0), ..., work(size - 1)]` in the pool's threads and the caller's."""
        results: list[Any] = [None] * size
        remaining = iter(range(size))  # shared by the threads: each takes the next number when it is free

        def run() -> None:
            for i in remaining:
                results[i] = work(i)

        others = [self.pool.submit(run) for _ in range(min(size, self.threads) - 1)]
        try:
            run()
        finally:
            wait(others)
        for other in others:
            other.result()
        return results

    def good_row(self, item: int, read: Callable[[int], T], missing: T) -> T:
        """`read` of row `item`, or of the next good row. Runs that skip the same files choose the same row."""
        for row in range(item, item + (len(self.index) if self.replace else 1)):
            row %= len(self.index)
            if self.skipped and self.index.entries[row].name in self.skipped:
                continue
            try:
                return read(row)
            except (BadAudio, OSError) as error:
                self.skipped[self.index.entries[row].name] = reason_of(error)
        if self.replace:
            raise DataError(f"{self.index.source}: no usable file is left, {len(self.skipped)} went bad since indexing")
        return missing

    def cut(self, entry: Entry, fraction: float) -> Cut:
        """The clip whose start lies at `fraction` (0 .. 1) of the possible starts in the recording."""
        same_rate = entry.sample_rate == self.sample_rate
        total = entry.frames if same_rate else resampled_length(entry.frames, entry.sample_rate, self.sample_rate)
        count = min(total, self.clip_samples)
        first = min(int(fraction * (total - count + 1)), total - count)
        if same_rate:
            return Cut(first, count, first, first + count)
        start, stop = input_span(first, count, entry.sample_rate, self.sample_rate)
        return Cut(first, count, max(0, start), min(entry.frames, stop))

    def size(self, entry: Entry) -> int:
        """Bytes of a recording in its own file or in a tar. Raises BadAudio if it has changed since indexing."""
        file_size, mtime = stat_file(entry.path)
        size = entry.size if entry.member else file_size
        if (file_size, mtime) != (entry.file_size, entry.mtime_ns) and (entry.name, mtime) not in self._unchanged:
            in_tar, scale = bool(entry.member), self.index.float_scale
            info = inspect(entry.path, entry.offset, size, in_tar=in_tar, float_scale=scale)
            if info != (entry.total, entry.sample_rate, entry.channels, entry.format):
                raise BadAudio("changed since it was indexed")
            self._unchanged.add((entry.name, mtime))
        return size

    def stored(self, entry: Entry) -> bool:
        """Whether the recording is mono 16-bit PCM at the loader's rate, which needs no decoding."""
        return entry.format in STORED and (entry.channels, entry.sample_rate) == (1, self.sample_rate)

    def read_clip(self, entry: Entry, fraction: float, gain: float, out: np.ndarray | None = None) -> np.ndarray:
        """Reads a clip; the samples are those of `Clips.clip`."""
        cut = self.cut(entry, fraction)
        if self.stored(entry):
            return self._read_int16(entry, cut, np.empty(cut.samples, np.int16) if out is None else out[: cut.samples])
        return self.convert(self._read(entry, cut), entry, cut, gain)

    def convert(self, samples: np.ndarray, entry: Entry, cut: Cut, gain: float) -> np.ndarray:
        """Makes the samples of `Clips.clip` from the decoded samples `[cut.start:cut.stop, channels]`."""
        # Round to int16 here only if no gain follows. Samples of a float format stay float32: they may be non-finite.
        dtype = torch.int16 if samples.dtype == np.int16 and gain == 1 else torch.float32
        clip = resample(
            torch.from_numpy(samples), entry.sample_rate, self.sample_rate, first=cut.first, count=cut.samples,
            offset=cut.start, downmix=True, dtype=dtype,
        )  # fmt: skip
        return clip.numpy()

    def _read(self, entry: Entry, cut: Cut) -> np.ndarray:
        """Samples `[cut.start, cut.stop)` of all channels, int16 or float32 `[n, channels]`."""
        count = cut.stop - cut.start
        if entry.format == FORMATS["pcm"]:
            return self._read_int16(entry, cut, np.empty(count, np.int16))[:, None]
        if entry.format == FORMATS["flac"]:
            data = self.shards.read(entry)  # the whole payload: the checksums cover compressed bytes
            return _decode_flac(data, cut.start, count)
        return read_samples(
            entry.path, entry.offset, self.size(entry), entry.start + cut.start, count,
            in_tar=bool(entry.member), format=entry.format, float_scale=self.index.float_scale,
        )  # fmt: skip

    def _read_int16(self, entry: Entry, cut: Cut, out: np.ndarray) -> np.ndarray:
        """Reads samples `[cut.start, cut.stop)` of mono 16-bit PCM into `out`."""
        if entry.format in FORMATS.values():
            self.shards.read(entry, 2 * cut.start, 2 * cut.stop, out.view(np.uint8))
        else:
            read_samples(
                entry.path, entry.offset, self.size(entry), entry.start + cut.start, len(out),
                in_tar=bool(entry.member), format=entry.format, out=out,
            )  # fmt: skip
        return out


def iterate_entry(entry: Entry, float_scale: float) -> Iterator[np.ndarray]:
    """Yields a whole row in blocks `[n, channels]` at its own rate, int16 or float32. Raises BadAudio, OSError."""
    if entry.format in FORMATS.values():
        shard = Shard(entry.path)
        clip = shard.find(entry.offset, entry.size)
        packed = shard.read(clip) if entry.format == FORMATS["flac"] else None  # checksums cover compressed bytes
        for start in range(0, entry.frames, SEGMENT):
            stop = min(start + SEGMENT, entry.frames)
            if packed is None:
                yield shard.read(clip, 2 * start, 2 * stop).view(np.int16)[:, None]
            else:
                yield _decode_flac(packed, start, stop - start)
        return
    options: dict[str, Any] = {"in_tar": bool(entry.member), "format": entry.format, "float_scale": float_scale}
    if entry.frames == entry.total:
        frames = 0
        for block in iterate_samples(entry.path, entry.offset, entry.size, **options):
            frames += len(block)
            yield block
        if frames != entry.frames:
            raise BadAudio(f"truncated: {frames} of {entry.frames} samples decode")
        return
    for start in range(entry.start, entry.start + entry.frames, SEGMENT):
        count = min(SEGMENT, entry.start + entry.frames - start)
        yield read_samples(entry.path, entry.offset, entry.size, start, count, **options)


def iterate_resampled(entry: Entry, rate: int, float_scale: float, *, pcm: bool = False) -> Iterator[np.ndarray]:
    """Yields a whole row as blocks `[n]` at `rate` Hz with channels averaged. Raises BadAudio, OSError.

    The blocks are float32, or with `pcm` int16. The joined samples are those of the row as one clip.
    """
    stream = None
    for block in iterate_entry(entry, float_scale):
        exact = block.dtype == np.int16
        if not exact and not np.isfinite(block).all():
            raise BadAudio("samples that are not finite (NaN or infinity)")
        if stream is None:
            dtype = torch.int16 if pcm and exact else torch.float32
            stream = Resampler(entry.sample_rate, rate, downmix=True, dtype=dtype)
        yield _as_pcm(stream.push(torch.from_numpy(block)).numpy(), pcm)
    if stream is not None:
        yield _as_pcm(stream.finish().numpy(), pcm)


def _as_pcm(samples: np.ndarray, pcm: bool) -> np.ndarray:
    if not pcm or samples.dtype == np.int16:
        return samples
    rounded = np.empty(len(samples), np.int16)
    to_int16(samples, 1.0, rounded)
    return rounded


def _decode_flac(data: np.ndarray, start: int, count: int) -> np.ndarray:
    """Samples `[start, start + count)` of a FLAC file in memory, int16 `[count, channels]`. Raises BadAudio."""
    try:
        with sf.SoundFile(io.BytesIO(data.data)) as sound:
            sound.seek(start)
            samples = sound.read(count, dtype="int16", always_2d=True)
    except sf.LibsndfileError as error:
        raise BadAudio(f"cannot be decoded: {error.error_string.strip()}") from None
    if len(samples) < count:
        raise BadAudio(f"truncated: {start + len(samples)} of {start + count} samples decode")
    return samples


def all_stored(index: Index, sample_rate: int, formats: Collection[str] = STORED) -> bool:
    """Whether every row is mono, at `sample_rate`, and in one of `formats`."""
    numbers = index.entries.numbers
    fits = (numbers["sample_rate"] == sample_rate) & (numbers["channels"] == 1)
    return bool(fits.all()) and all(value in formats for value in index.entries.format.distinct())


def to_int16(samples: np.ndarray, gain: float, out: np.ndarray) -> None:
    """`out[:n] = round(32768 gain x)`, saturated, for n samples x: float in [-1, 1), or int16 that hold 32768 x.

    `samples` may be `out[:n]` itself.
    """
    n = len(samples)
    if samples.dtype == np.int16 and gain == 1:
        if not np.may_share_memory(samples, out):
            out[:n] = samples
        return
    scaled = np.empty(min(n, BLOCK), np.float32)  # small: fresh memory costs more than the arithmetic
    for start in range(0, n, BLOCK):
        x = samples[start : min(n, start + BLOCK)]
        y = scaled[: len(x)]
        if x.dtype == np.int16:
            x = np.divide(x, np.float32(32768), out=y, dtype=np.float32)
        np.multiply(x, np.float32(32768 * gain), out=y)
        np.rint(y, out=y)
        out[start : start + len(y)] = np.clip(y, -32768, 32767, out=y)


def default_threads() -> int:
    """This rank's part of the cores that it may use, and of its container's quota."""
    own, limit = cores() // sharers(), quota()
    if limit < math.inf:  # all ranks of the machine share the quota, also where each has cores of its own
        own = min(own, math.ceil(limit) // local_ranks())
    return max(1, own)
