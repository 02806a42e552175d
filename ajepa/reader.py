"""What readers of clips share, and the reader of shards: int16 samples straight from the memory map."""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ajepa.audiofile import BadAudio, cores, os_reason
from ajepa.index import DataError, Index
from ajepa.shards import FORMATS, OpenShards

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
    # clip(b) -> its row of the index, and its samples, mono at the loader's rate: float32, or int16 where stored so.
    # May be called by any thread, and is valid until the next batch.
    clip: Callable[[int], tuple[int, np.ndarray]]


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
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="ajepa-read")

    def next(self) -> Clips | None:
        """The next batch, None at the end. Raises DataError when no usable file is left."""
        raise NotImplementedError

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def spread(self, work: Callable[[int], T], size: int) -> list[T]:
        """`[work(0), ..., work(size - 1)]` by all threads; a few tasks, as a future costs more than a short clip."""
        tasks = min(size, 4 * self.threads)
        results: list[Any] = [None] * size

        def run(first: int) -> None:
            for i in range(first, size, tasks):
                results[i] = work(i)

        list(self.pool.map(run, range(tasks)))
        return results

    def good_row(self, item: int, read: Callable[[int], T], missing: T) -> T:
        """`read(item)`, or of the next row that is good: the same one in every run that skips the same files."""
        for row in range(item, item + (len(self.index) if self.replace else 1)):
            row %= len(self.index)
            name = self.index.entries[row].name
            if name not in self.skipped:
                try:
                    return read(row)
                except BadAudio as error:
                    self.skipped[name] = str(error)
                except OSError as error:
                    self.skipped[name] = os_reason(error)
        if self.replace:
            raise DataError(f"{self.index.source}: no usable file is left, {len(self.skipped)} went bad since indexing")
        return missing

    def window(self, frames: int, rate: int, fraction: float) -> tuple[int, int]:
        """Where in a recording of `frames` samples the clip is cut: start and length, at the recording's rate."""
        count = min(frames, math.ceil(self.clip_samples * rate / self.sample_rate))
        return min(int(fraction * (frames - count + 1)), frames - count), count


class ShardReader(Reader):
    """Reads PCM shards of the loader's rate: nothing is decoded, and a clip is checked just before it is copied."""

    def next(self) -> Clips | None:
        plan = self.plan(self.batches)
        if plan is None:
            return None
        self.batches += 1
        self.first, self.checkpoint = self.batches, None  # where DALI would begin to count

        def clip(b: int) -> tuple[int, np.ndarray]:
            fraction = float(plan.fractions[b])
            return self.good_row(int(plan.items[b]), lambda row: self._read(row, fraction), (-1, np.zeros(1, np.int16)))

        return Clips(plan, clip)

    def _read(self, row: int, fraction: float) -> tuple[int, np.ndarray]:
        entry = self.index.entries[row]
        start, count = self.window(entry.frames, entry.sample_rate, fraction)
        return row, self.shards.read(entry, 2 * start, 2 * (start + count)).view(np.int16)


def holds_pcm(index: Index, sample_rate: int) -> bool:
    """Whether every row is PCM in a shard at this rate: there is nothing to decode."""
    pcm = all(value == FORMATS["pcm"] for value in index.entries.format.distinct())
    return pcm and bool((index.entries.numbers["sample_rate"] == sample_rate).all())


def to_int16(samples: np.ndarray, gain: float, out: np.ndarray) -> None:
    """`out[:n] = round(32768 gain x)`, saturated, for float x in [-1, 1) or int16 samples that stand for x * 32768."""
    n = len(samples)
    if samples.dtype == np.int16 and gain == 1:
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
