"""Batches of int16 mono clips from an index: shuffled, sharded, cropped, padded, and resumable to the sample.

A run reads one endless stream of samples: one fresh permutation of the index per epoch, joined end to end. Sample g of
the stream goes to rank g mod world_size. The ranks therefore never share a sample, one of them alone decodes each clip,
and every batch is full. Where sizes do not divide, nothing is dropped or repeated: a batch may hold the end of one
epoch and the start of the next. Everything random about sample g (its row, its crop, its gain) is a hash of (seed, g).

With `shuffle="ranges"` each rank reads a part of the index of its own. Sample g comes from lane g mod L, where L is the
largest power of two that divides the global batch and is at most the number of rows. In each epoch the index is cut
into L consecutive ranges, one for each lane and as long as the number of samples that the lane has in this epoch, and
each range is permuted by itself. An epoch therefore still holds every row once, and the stream does not depend on
world_size. The ranges follow each other in bit-reversed order of their lanes. A rank has the lanes that are equal
mod world_size, so where world_size is a power of two (at most L) its ranges are neighbours: the rank reads one part of
the index, apart from those of other ranks. From epoch to epoch the borders between these parts move by at most
log2(world_size) rows. With other numbers of ranks, those that are equal mod gcd(L, world_size) share a part.

Shapes: B batch, S samples per clip.
"""

import atexit
import base64
import itertools
import math
import queue
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch

from ajepa.data.batch import Assembler, Batch, Pad, arrive
from ajepa.data.decode import Decoder, open_reader
from ajepa.data.index import DataError, Index
from ajepa.data.reader import Plan, Reader, default_threads
from ajepa.utils.cores import local_ranks
from ajepa.utils.counter_rng import hash64
from ajepa.utils.devices import available_memory

Crop = Literal["random", "start", "center"]
Shuffle = Literal["all", "ranges", "none"]
STATE_FORMAT = 2
SPARE = 3  # batches besides the `prefetch` that are ready: one is being assembled, the caller holds one, one is spare
# The order of the samples depends on these fields: a state with other values describes another stream.
STREAM_FIELDS = ("seed", "global_batch", "shuffle")
PERMUTATION, CROP, GAIN = range(3)  # purposes of the hash


class AudioLoader:
    """Iterates over batches without end.

    A bad file never stops the run: the loader lists it in `skipped` and reads the next good row of the index instead.
    A resumed run makes the same replacements.

    Args:
        index: the recordings to read (`ajepa.data.index.build_index`).
        sample_rate: rate of the clips in Hz. Recordings at other rates are resampled, and channels are averaged. A clip
            is a slice of the resampled recording.
        clip_samples: S.
        batch_size: B, for this rank. It may exceed the number of recordings.
        seed: seed of the stream, the same on every rank.
        rank, world_size: this process's share of the stream.
        pad: a recording shorter than the clip is repeated ("cyclic") or followed by silence ("zero").
        crop: where the clip is cut from a longer recording: "random", "start" or "center".
        gain_db: each clip gets a gain drawn uniformly from +-gain_db dB; samples saturate at full scale.
        decoder: the library that decodes, see `ajepa.data.decode.open_reader`.
        threads: threads that read and decode; 0 is one for each core, divided among the ranks that use the same cores.
        prefetch: number of finished batches kept ready; up to two more are being decoded.
        shuffle: "all" permutes the index in every epoch. "ranges" permutes ranges of it, so that each rank reads a part
            of the files of its own. "none" reads the index in its own order.
        device: where `pcm` and `lengths` go. The copy to a CUDA device runs ahead, during computation.
        state: `state_dict()` of the loader that this one continues.

    Raises:
        DataError: an argument is out of range, `state` is of another stream, the batches do not fit into memory, the
            index is empty, or (from `next`) no usable file is left. The message names the argument or field.
    """

    def __init__(
        self,
        index: Index,
        *,
        sample_rate: int,
        clip_samples: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pad: Pad = "cyclic",
        crop: Crop = "random",
        gain_db: float = 0.0,
        decoder: Decoder = "auto",
        threads: int = 0,
        prefetch: int = 2,
        shuffle: Shuffle = "all",
        device: torch.device | None = None,
        state: dict[str, Any] | None = None,
    ):
        _check_arguments(index, sample_rate, clip_samples, batch_size, pad, crop)
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} is not in 0..world_size - 1 = {world_size - 1}")
        if shuffle not in ("all", "ranges", "none"):
            raise DataError(f"shuffle must be 'all', 'ranges' or 'none', got {shuffle!r}")
        if gain_db < 0 or prefetch < 1 or seed < 0:
            raise DataError(
                f"gain_db and seed must be 0 or more and prefetch 1 or more, got {gain_db}, {seed} and {prefetch}"
            )
        self.index = index
        self.batch_size = batch_size
        self._clip: dict[str, Any] = {"sample_rate": sample_rate, "clip_samples": clip_samples, "decoder": decoder}
        self._pad: Pad = pad
        self._device = device
        self._threads, self._prefetch = threads or default_threads(), prefetch
        self._stream = _Stream(len(index), batch_size, seed, rank, world_size, shuffle, crop, gain_db)
        self._check_memory()
        self._worker: _Worker | None = None
        self._last: dict[str, Any] = {"batches": 0, "first": 0, "dali": None, "skipped": {}}
        if state is not None:
            self.load(state)

    def __iter__(self) -> "AudioLoader":
        return self

    def __next__(self) -> Batch:
        if self._worker is None:
            self._worker = self._start()
            weakref.finalize(self, self._worker.close)
        (batch, event), self._last = self._worker.get()
        return arrive(batch, event)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(path, reason) of the files that have become bad since indexing, up to the last batch returned."""
        return list(self._last["skipped"].items())

    @property
    def epoch(self) -> float:
        """Number of passes over the data set so far, counting all ranks."""
        return self._last["batches"] * self.batch_size * self._stream.world_size / len(self.index)

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch returned, ready for JSON. Only `skipped` differs between ranks.

        Any number of ranks with the same global batch can resume from it.
        """
        dali = self._last["dali"]
        return {
            **self._last,
            "dali": None if dali is None else base64.b64encode(dali).decode(),
            "skipped": dict(self._last["skipped"]),
            "format": STATE_FORMAT,
            "fingerprint": self.index.fingerprint,
            "world_size": self._stream.world_size,
            **{name: getattr(self._stream, name) for name in STREAM_FIELDS},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continues after the batch at which `state` was saved. Raises DataError for a state of another stream."""
        if state.get("format") != STATE_FORMAT:
            raise DataError(f"the data state has format {state.get('format')}, expected format {STATE_FORMAT}")
        shuffle = state.get("shuffle", True)  # older states say only whether the whole index was permuted
        state = {**state, "shuffle": {True: "all", False: "none"}.get(shuffle, shuffle)}
        for name in STREAM_FIELDS:
            if state[name] != getattr(self._stream, name):
                raise DataError(
                    f"the data state was saved with {name}={state[name]}, this run has {getattr(self._stream, name)}: "
                    f"keep {name} to resume"
                )
        if state["fingerprint"] != self.index.fingerprint:
            warnings.warn("the data set changed since the checkpoint: samples from here on differ", stacklevel=2)
        self.close()
        if state["world_size"] == self._stream.world_size and state["dali"] is not None:
            self._last = {"first": state["first"], "dali": base64.b64decode(state["dali"])}
        else:  # DALI's checkpoint counts other batches. Its source is stateless, so starting at this batch is exact.
            self._last = {"first": state["batches"], "dali": None}
        self._last["batches"] = state["batches"]
        self._last["skipped"] = dict(state["skipped"])

    def close(self) -> None:
        """Stops the background thread. Iterating again continues after the last batch returned."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> "AudioLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _check_memory(self) -> None:
        """Raise DataError if the batches that are held at once, by all ranks of this machine, exceed its memory."""
        ranks, batches, samples = local_ranks(), self._prefetch + SPARE, self._clip["clip_samples"]
        need, free = 2 * ranks * batches * self.batch_size * samples, available_memory()
        if need > free:
            raise DataError(
                f"{batches} batches of {self.batch_size:,} clips of {samples / self._clip['sample_rate']:,.4g} s"
                f"{f' for each of {ranks} ranks' * (ranks > 1)} need {need / 1e9:,.1f} GB of memory, and "
                f"{free / 1e9:,.1f} GB are free: lower --batch-size, --prefetch, or the length of the clips "
                "(--clip-seconds, --source-seconds)"
            )

    def _start(self) -> "_Worker":
        last = self._last
        reader = open_reader(
            self.index,
            self._stream.plan,
            batch_size=self.batch_size,
            threads=self._threads,
            first=last["first"],
            batches=last["batches"],
            checkpoint=last["dali"],
            skipped=last["skipped"],
            **self._clip,
        )
        return _Worker(reader, Assembler(reader, self._pad, self._prefetch + SPARE, self._device), self._prefetch)


def iterate_once(
    index: Index,
    *,
    sample_rate: int,
    clip_samples: int,
    batch_size: int,
    pad: Pad = "cyclic",
    crop: Literal["start", "center"] = "center",
    decoder: Decoder = "auto",
    threads: int = 0,
    skipped: list[tuple[str, str]] | None = None,
) -> Iterator[Batch]:
    """Yields every row of the index once, in order, for evaluation. The last batch may be short.

    A bad file is left out without a substitute and appended to `skipped`. The other arguments and the errors are those
    of `AudioLoader`.
    """
    _check_arguments(index, sample_rate, clip_samples, batch_size, pad, crop)
    fraction = _fraction(crop)

    def plan(batch: int) -> Plan | None:
        items = np.arange(batch * batch_size, min(len(index), (batch + 1) * batch_size))
        return Plan(items, np.full(len(items), fraction), np.ones(len(items))) if len(items) else None

    reader = open_reader(
        index,
        plan,
        sample_rate=sample_rate,
        clip_samples=clip_samples,
        batch_size=batch_size,
        decoder=decoder,
        threads=threads or default_threads(),
    )
    assembler = Assembler(reader, pad, keep=2)
    try:
        for first in itertools.count(step=batch_size):
            assembled = assembler.next()
            if assembled is None:
                break
            batch, _ = assembled
            kept = batch.items == torch.arange(first, first + len(batch.items))
            if kept.any():
                yield batch if kept.all() else Batch(*(field[kept] for field in batch))
    finally:
        reader.close()
        if skipped is not None:
            skipped.extend(reader.skipped.items())


def _check_arguments(index: Index, sample_rate: int, clip_samples: int, batch_size: int, pad: str, crop: str) -> None:
    if not len(index):
        raise DataError(f"{index.source}: the index is empty")
    for name, value in (("sample_rate", sample_rate), ("clip_samples", clip_samples), ("batch_size", batch_size)):
        if value < 1:
            raise DataError(f"{name} must be 1 or more, got {value}")
    if pad not in ("cyclic", "zero"):
        raise DataError(f"pad must be 'cyclic' or 'zero', got {pad!r}")
    if crop not in ("random", "start", "center"):
        raise DataError(f"crop must be 'random', 'start' or 'center', got {crop!r}")


def _fraction(crop: str) -> float:
    return 0.5 if crop == "center" else 0.0


def _uniform(seed: int, purpose: int, counter: np.ndarray) -> np.ndarray:
    """Uniform float64 numbers in [0, 1), one per element of `counter`."""
    return (hash64(seed, purpose, 0, counter) >> np.uint64(11)) * 2.0**-53


class _Stream:
    """This rank's part of the endless stream of samples."""

    def __init__(self, rows, batch_size, seed, rank, world_size, shuffle, crop, gain_db):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.global_batch = batch_size * world_size
        self.crop, self.gain_db = crop, gain_db
        # Without ranges there is one lane, whose range is the whole index.
        self.lanes = math.gcd(self.global_batch, 1 << (rows.bit_length() - 1)) if shuffle == "ranges" else 1
        self._orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def plan(self, batch: int) -> Plan:
        local = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        sample = local * self.world_size + self.rank
        epoch, position = np.divmod(sample, self.rows)
        items = np.empty_like(position)
        for number in np.unique(epoch).tolist():
            order, starts = self._order(number)
            now = epoch == number
            items[now] = order[starts[sample[now] % self.lanes] + position[now] // self.lanes]
        random = self.crop == "random"
        fractions = _uniform(self.seed, CROP, sample) if random else np.full(len(sample), _fraction(self.crop))
        decibel = self.gain_db * (2 * _uniform(self.seed, GAIN, sample) - 1)
        return Plan(items, fractions, 10 ** (decibel / 20))

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an epoch, range after range, and where in them the range of each lane starts."""
        if epoch not in self._orders:
            if len(self._orders) > 2:
                self._orders.clear()
            first = (np.arange(self.lanes) - epoch * self.rows) % self.lanes  # position of each lane's first sample
            counts = -(-(self.rows - first) // self.lanes)  # samples of each lane
            lanes = _bit_reversed(self.lanes)
            ends = np.cumsum(counts[lanes])
            starts = (ends - counts[lanes])[lanes]  # reversing bits twice restores their order
            order = np.arange(self.rows)
            if self.shuffle != "none":
                keys = hash64(self.seed, PERMUTATION, epoch, order)
                parts = zip(ends - counts[lanes], ends, strict=True)
                order = np.concatenate([start + keys[start:end].argsort() for start, end in parts])
            self._orders[epoch] = order, starts
        return self._orders[epoch]


def _bit_reversed(size: int) -> np.ndarray:
    """The numbers below `size`, a power of two, in the order of their bits read backwards: 0, 2, 1, 3 for 4."""
    numbers = np.zeros(1, np.int64)
    while len(numbers) < size:
        numbers = np.concatenate([2 * numbers, 2 * numbers + 1])
    return numbers


class _Worker:
    """Decodes ahead in a background thread. It holds no reference to the loader, so deleting the loader stops it."""

    def __init__(self, reader: Reader, assembler: Assembler, prefetch: int):
        self._reader, self._assembler = reader, assembler
        self._ready: queue.Queue = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ajepa-data", daemon=True)
        # Registered after DALI's import, so it stops the thread before DALI's own clean-up destroys the pipeline.
        atexit.register(self.close)
        self._thread.start()

    def get(self) -> tuple[tuple[Batch, torch.cuda.Event | None], dict[str, Any]]:
        got = self._ready.get()
        if isinstance(got, BaseException):
            self._ready.put(got)  # a later call raises it again
            raise got
        return got

    def close(self) -> None:
        atexit.unregister(self.close)
        self._stop.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        reader = self._reader
        try:
            while not self._stop.is_set():
                batch = self._assembler.next()
                assert batch is not None  # the stream is endless
                position = {"batches": reader.batches, "first": reader.first, "dali": reader.checkpoint}
                self._put((batch, {**position, "skipped": dict(reader.skipped)}))
                del batch  # drop the reference, so that the memory can be reused
        except BaseException as error:
            self._put(error)
        finally:
            reader.close()

    def _put(self, value: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._ready.put(value, timeout=0.1)
            except queue.Full:
                continue
        return None
