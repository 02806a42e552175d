"""Batches as tensors: samples into reused or pinned memory, and on to the device beside the computation."""

import sys
from typing import Literal, NamedTuple

import numpy as np
import torch

from ajepa.data.reader import Reader, to_int16

Pad = Literal["cyclic", "zero"]


class Batch(NamedTuple):
    """Memory of its own, safe to keep. Shapes: B batch, S samples a clip."""

    pcm: torch.Tensor  # int16 `[B, S]`, on the loader's device
    lengths: torch.Tensor  # int32 `[B]`, samples before the padding; S where full or cyclic; on the loader's device
    labels: torch.Tensor  # int64 `[B]`, -1 where unknown
    items: torch.Tensor  # int64 `[B]`, rows of the index


class Assembler:
    """Turns what a `Reader` reads into batches; used by one thread.

    Args:
        keep: arrays held for reuse.
        device: where batches go; on CUDA from pinned memory, by a stream of its own.
    """

    def __init__(self, reader: Reader, pad: Pad, keep: int, device: torch.device | None = None):
        self.reader, self.pad = reader, pad
        self._buffers = _Buffers(keep)
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    def next(self) -> tuple[Batch, torch.cuda.Event | None] | None:
        """The next batch, and the event after which it is on the device (see `arrive`); None at the end."""
        clips = self.reader.next()
        if clips is None:
            return None
        size, samples = len(clips.plan.items), self.reader.clip_samples
        pcm = self._buffers.take(size, samples) if self._stream is None else _pinned((size, samples), torch.int16)
        lengths = torch.empty(size, dtype=torch.int32, pin_memory=self._stream is not None)
        items = torch.empty(size, dtype=torch.int64)
        rows, ends, names = pcm.numpy(), lengths.numpy(), items.numpy()

        def fill(b: int) -> None:
            names[b], clip = clips.clip(b, rows[b])
            to_int16(clip, float(clips.plan.gains[b]), rows[b])
            ends[b] = fill_up(rows[b], len(clip), self.pad)

        self.reader.spread(fill, size)
        labels = torch.from_numpy(self.reader.index.labels[names])
        if self._stream is None:
            return Batch(pcm, lengths, labels, items), None
        with torch.cuda.stream(self._stream):
            device = self._stream.device
            # The allocator of pinned memory does not hand it out again before these copies are done.
            moved = pcm.to(device, non_blocking=True), lengths.to(device, non_blocking=True)
            return Batch(*moved, labels, items), self._stream.record_event()


def arrive(batch: Batch, event: torch.cuda.Event | None) -> Batch:
    """Orders the caller's stream behind the copy; the host does not wait."""
    if event is not None:
        stream = torch.cuda.current_stream(batch.pcm.device)
        stream.wait_event(event)
        for tensor in (batch.pcm, batch.lengths):
            tensor.record_stream(stream)
    return batch


def fill_up(row: np.ndarray, length: int, pad: Pad) -> int:
    """Pads `row` behind its first `length` samples, in place. Returns the clip's length."""
    if length < len(row):
        row[length:] = 0 if pad == "zero" else np.resize(row[:length], len(row) - length)
    return length if pad == "zero" else len(row)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class _Buffers:
    """Arrays used again once no tensor refers to them: the kernel's clearing of fresh pages costs more than a copy."""

    def __init__(self, keep: int):
        self._keep = keep
        self._arrays: list[np.ndarray] = []
        self._idle = 0  # references to an array that only this list holds, as getrefcount counts them

    def take(self, size: int, samples: int) -> torch.Tensor:
        for i in range(len(self._arrays)):
            if sys.getrefcount(self._arrays[i]) == self._idle and self._arrays[i].shape == (size, samples):
                return torch.from_numpy(self._arrays[i])
        if len(self._arrays) >= self._keep:
            return torch.empty(size, samples, dtype=torch.int16)
        self._arrays.append(np.empty((size, samples), np.int16))
        self._idle = sys.getrefcount(self._arrays[-1])
        return torch.from_numpy(self._arrays[-1])
