"""Batches of int16 mono clips from an index: shuffled, sharded, cropped, padded, and resumable to the sample.

The run is one endless stream: a fresh permutation of the index for every epoch, end to end. Sample g of the stream goes
to rank g mod world_size, so the ranks never share a sample, every rank always has full batches, and nothing is dropped
or repeated where sizes do not divide: a batch may hold the end of one epoch and the start of the next. Everything
random about sample g (its row, its crop, its gain) is a hash of (seed, g).

Shapes: B batch, S samples a clip.
"""

import atexit
import base64
import itertools
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
from ajepa.utils.counter_rng import hash64

Crop = Literal["random", "start", "center"]
STATE_FORMAT = 2
# What the order of the samples depends on: a state of other values describes another stream.
STREAM_FIELDS = ("seed", "global_batch", "shuffle")
PERMUTATION, CROP, GAIN = range(3)  # purposes of the hash


class AudioLoader:
    """Iterates over batches for ever.

    A file found bad while reading never stops the run: it is listed in `skipped`, and the next good row of the index
    takes its place, in this run as in a resumed one.

    Args:
        index: what to read (`ajepa.data.index.build_index`).
        sample_rate: Hz of the clips; recordings at other rates are resampled, channels averaged. A clip is a slice of
            the resampled recording.
        clip_samples: S.
        batch_size: B, for this rank. May exceed the data set.
        seed: the stream's; the same on every rank.
        rank, world_size: this process's share of the stream.
        pad: a recording shorter than the clip is repeated ("cyclic") or followed by silence ("zero").
        crop: where a longer one is cut: "random", "start" or "center".
        gain_db: gain drawn from +-gain_db dB for each clip; saturates at full scale.
        decoder: who decodes, see `ajepa.data.decode.open_reader`.
        threads: readers and decoders; 0 takes the cores, shared among this machine's ranks (`LOCAL_WORLD_SIZE`).
        prefetch: finished batches held ready; two more are being decoded.
        shuffle: False reads the index in its order, over and over.
        device: where `pcm` and `lengths` go; to CUDA they are copied ahead, beside the computation.
        state: `state_dict()` of the loader to continue.

    Raises:
        ValueError: an argument out of range, or a state of another stream; names the field.
        DataError: an empty index, or (from `next`) no usable file left.
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
        shuffle: bool = True,
        device: torch.device | None = None,
        state: dict[str, Any] | None = None,
    ):
        _check_arguments(index, sample_rate, clip_samples, batch_size, pad, crop)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..world_size - 1 = {world_size - 1}")
        if gain_db < 0 or prefetch < 1 or seed < 0:
            raise ValueError(
                f"gain_db and seed must be 0 or more and prefetch 1 or more, got {gain_db}, {seed} and {prefetch}"
            )
        self.index = index
        self.batch_size = batch_size
        self._clip: dict[str, Any] = {"sample_rate": sample_rate, "clip_samples": clip_samples, "decoder": decoder}
        self._pad: Pad = pad
        self._device = device
        self._threads, self._prefetch = threads or default_threads(), prefetch
        self._stream = _Stream(len(index), batch_size, seed, rank, world_size, shuffle, crop, gain_db)
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
        """(path, reason) of files gone bad since they were indexed, as of the last batch returned."""
        return list(self._last["skipped"].items())

    @property
    def epoch(self) -> float:
        """Passes over the data set so far, all ranks together."""
        return self._last["batches"] * self.batch_size * self._stream.world_size / len(self.index)

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch returned, ready for JSON; the same for all ranks but for `skipped`.

        It holds for any number of ranks with the same global batch.
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
        """Continues after the batch at which `state` was taken. Raises ValueError for a state of another stream."""
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"data state of format {state.get('format')}, expected {STATE_FORMAT}")
        for name in STREAM_FIELDS:
            if state[name] != getattr(self._stream, name):
                raise ValueError(
                    f"the data state was saved with {name}={state[name]}, this run has {getattr(self._stream, name)}: "
                    f"keep {name} to resume"
                )
        if state["fingerprint"] != self.index.fingerprint:
            warnings.warn("the data set changed since the checkpoint: samples from here on differ", stacklevel=2)
        self.close()
        if state["world_size"] == self._stream.world_size and state["dali"] is not None:
            self._last = {"first": state["first"], "dali": base64.b64decode(state["dali"])}
        else:  # DALI's own count is of other batches; its source is stateless, so counting on is just as exact
            self._last = {"first": state["batches"], "dali": None}
        self._last["batches"] = state["batches"]
        self._last["skipped"] = dict(state["skipped"])

    def close(self) -> None:
        """Stops the background work; iterating again continues after the last batch returned."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> "AudioLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

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
        # One batch in the making, `prefetch` ready, one at work on, one to spare.
        return _Worker(reader, Assembler(reader, self._pad, self._prefetch + 3, self._device), self._prefetch)


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
    """Every row of the index once, in order; the last batch may be short. For evaluation.

    A file found bad is left out (no substitute) and appended to `skipped`. Arguments and errors as for `AudioLoader`.
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
            made = assembler.next()
            if made is None:
                break
            batch, _ = made
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
            raise ValueError(f"{name} must be 1 or more, got {value}")
    if pad not in ("cyclic", "zero"):
        raise ValueError(f"pad must be 'cyclic' or 'zero', got {pad!r}")
    if crop not in ("random", "start", "center"):
        raise ValueError(f"crop must be 'random', 'start' or 'center', got {crop!r}")


def _fraction(crop: str) -> float:
    return 0.5 if crop == "center" else 0.0


def _uniform(seed: int, purpose: int, counter: np.ndarray) -> np.ndarray:
    """float64 in [0, 1)."""
    return (hash64(seed, purpose, 0, counter) >> np.uint64(11)) * 2.0**-53


class _Stream:
    """The endless stream of samples, as this rank sees it."""

    def __init__(self, rows, batch_size, seed, rank, world_size, shuffle, crop, gain_db):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle
        self.global_batch = batch_size * world_size
        self.crop, self.gain_db = crop, gain_db
        self._permutations: dict[int, np.ndarray] = {}

    def plan(self, batch: int) -> Plan:
        local = np.arange(batch * self.batch_size, (batch + 1) * self.batch_size)
        sample = local * self.world_size + self.rank
        epoch, place = np.divmod(sample, self.rows)
        items = np.empty_like(place)
        for number in np.unique(epoch).tolist():
            items[epoch == number] = self._permutation(number)[place[epoch == number]]
        random = self.crop == "random"
        fractions = _uniform(self.seed, CROP, sample) if random else np.full(len(sample), _fraction(self.crop))
        decibel = self.gain_db * (2 * _uniform(self.seed, GAIN, sample) - 1)
        return Plan(items, fractions, 10 ** (decibel / 20))

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.rows)
        if epoch not in self._permutations:
            if len(self._permutations) > 2:
                self._permutations.clear()
            self._permutations[epoch] = np.argsort(hash64(self.seed, PERMUTATION, epoch, np.arange(self.rows)))
        return self._permutations[epoch]


class _Worker:
    """Decodes ahead in a thread of its own; holds no reference to the loader, so a dropped loader stops it."""

    def __init__(self, reader: Reader, assembler: Assembler, prefetch: int):
        self._reader, self._assembler = reader, assembler
        self._ready: queue.Queue = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ajepa-data", daemon=True)
        # Registered after DALI's import, so it runs before DALI's own clean-up takes the pipeline from the thread.
        atexit.register(self.close)
        self._thread.start()

    def get(self) -> tuple[tuple[Batch, torch.cuda.Event | None], dict[str, Any]]:
        got = self._ready.get()
        if isinstance(got, BaseException):
            self._ready.put(got)  # a later call finds it too
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
                made = self._assembler.next()
                assert made is not None  # the stream is endless
                place = {"batches": reader.batches, "first": reader.first, "dali": reader.checkpoint}
                self._put((made, {**place, "skipped": dict(reader.skipped)}))
                del made  # its memory may serve again
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
