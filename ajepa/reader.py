"""What readers of clips share, and the reader of stored PCM: samples straight from the file into the batch."""

import math
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ajepa.audiofile import BadAudio, cores, inspect, read_int16, reason_of, stat_file
from ajepa.columns import Entry
from ajepa.index import DataError, Index
from ajepa.shards import FORMATS, OpenShards

# `Entry.format` of what needs no decoder.
STORED = {FORMATS["pcm"], *(f"{kind}/PCM_16" for kind in ("WAV", "WAVEX", "RF64", "W64", "AIFF", "AU"))}
BLOCK = 1 << 15  # samples scaled at a time
T = TypeVar("T")


class Plan(NamedTuple):
    """One batch to be: rows of the index, where to crop (0 start .. 1 end) and a linear gain, `[B]` each."""

    items: np.ndarray
    fractions: np.ndarray
    gains: np.ndarray


class Clips(NamedTuple):
    """A batch read."""

    plan: Plan
    # clip(b, out) -> its row of the index, and its samples, mono at the loader's rate: float32, or int16 where stored
    # so, and then perhaps in `out` (int16 and long enough, or None). May be called by any thread, and is valid until
    # the next batch.
    clip: Callable[[int, np.ndarray | None], tuple[int, np.ndarray]]


class Reader:
    """Batches 0, 1, 2... of `plan(i)`, until it returns None.

    Args:
        plan: the batch's rows, crops and gains; called with growing i, sometimes again.
        first, checkpoint: DALI's place, for `ajepa.decode.Decoder`.
        batches: number of the batch to begin with.
        skipped: name -> reason of files not to be read; files found bad are added.
        replace: the next good row of the index takes a bad one's place; False: a bad one is row -1, one zero sample.
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
        self._unchanged: set[tuple[str, int]] = set()  # (name, mtime) of touched files found to be the same recording
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="ajepa-read")

    def next(self) -> Clips | None:
        """The next batch, None at the end. Raises DataError when no usable file is left."""
        raise NotImplementedError

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.shards.close()

    def spread(self, work: Callable[[int], T], size: int) -> list[T]:
        """`[work(0), ..., work(size - 1)]` by all threads, the caller's one of them."""
        results: list[Any] = [None] * size
        left = iter(range(size))  # shared: whoever is free takes the next

        def run() -> None:
            for i in left:
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
        """`read(item)`, or of the next row that is good: the same one in every run that skips the same files."""
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

    def window(self, frames: int, rate: int, fraction: float) -> tuple[int, int]:
        """Where in a recording of `frames` samples the clip is cut: start and length, at the recording's rate."""
        count = min(frames, math.ceil(self.clip_samples * rate / self.sample_rate))
        return min(int(fraction * (frames - count + 1)), frames - count), count

    def size(self, entry: Entry) -> int:
        """Bytes of a recording in a file of its own or in a tar. Raises BadAudio where it is no longer what it was."""
        file_size, mtime = stat_file(entry.path)
        size = entry.size if entry.member else file_size
        if (file_size, mtime) != (entry.file_size, entry.mtime_ns) and (entry.name, mtime) not in self._unchanged:
            info = inspect(entry.path, entry.offset, size, in_tar=bool(entry.member))
            if info != (entry.frames, entry.sample_rate, entry.channels, entry.format):
                raise BadAudio("changed since it was indexed")
            self._unchanged.add((entry.name, mtime))
        return size

    def stored(self, entry: Entry) -> bool:
        """Whether it is mono 16-bit PCM at the loader's rate: there is nothing to decode."""
        return entry.format in STORED and (entry.channels, entry.sample_rate) == (1, self.sample_rate)

    def read_stored(self, entry: Entry, fraction: float, out: np.ndarray | None = None) -> np.ndarray:
        """The clip of such a recording, int16, in `out` where given."""
        start, count = self.window(entry.frames, entry.sample_rate, fraction)
        out = np.empty(count, np.int16) if out is None else out[:count]
        if entry.format in FORMATS.values():
            self.shards.read(entry, 2 * start, 2 * (start + count), out.view(np.uint8))
        else:
            read_int16(out, entry.path, entry.offset, self.size(entry), start, in_tar=bool(entry.member))
        return out


class PcmReader(Reader):
    """A `Reader` of recordings that are all `stored`."""

    def next(self) -> Clips | None:
        plan = self.plan(self.batches)
        if plan is None:
            return None
        self.batches += 1
        self.first, self.checkpoint = self.batches, None  # where DALI would begin to count

        def clip(b: int, out: np.ndarray | None) -> tuple[int, np.ndarray]:
            def read(row: int) -> tuple[int, np.ndarray]:
                return row, self.read_stored(self.index.entries[row], float(plan.fractions[b]), out)

            return self.good_row(int(plan.items[b]), read, (-1, np.zeros(1, np.int16)))

        return Clips(plan, clip)


def all_stored(index: Index, sample_rate: int, formats: Collection[str] = STORED) -> bool:
    """Whether every row is mono, at this rate and in one of these formats."""
    numbers = index.entries.numbers
    alike = (numbers["sample_rate"] == sample_rate) & (numbers["channels"] == 1)
    return bool(alike.all()) and all(value in formats for value in index.entries.format.distinct())


def to_int16(samples: np.ndarray, gain: float, out: np.ndarray) -> None:
    """`out[:n] = round(32768 gain x)`, saturated, for float x in [-1, 1) or int16 samples that stand for x * 32768.

    The samples may be `out[:n]` itself.
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
    """The cores this process may use, shared among the ranks of this machine."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
