"""Assembles batches as tensors in reused or pinned memory, and copies them to the device during computation."""

import sys
from typing import Literal, NamedTuple

import numpy as np
import torch

from ajepa.data.reader import Reader, to_int16

Pad = Literal["cyclic", "zero"]


class Batch(NamedTuple):
    """A batch that owns its memory and is safe to keep. Shapes: B batch, S samples per clip."""

    pcm: torch.Tensor  # int16 `[B, S]`, on the loader's device
    lengths: torch.Tensor  # int32 `[B]`, samples before zero padding, S if there is none; on the loader's device
    labels: torch.Tensor  # int64 `[B]`, -1 if unknown
    items: torch.Tensor  # int64 `[B]`, rows of the index


class Assembler:
    """Turns the clips of a `Reader` into batches. Not thread-safe: only one thread may use it.

    Args:
        keep: number of arrays kept for reuse.
        device: where batches go. A CUDA device gets them from pinned memory, on a separate copy stream.
    """

    def __init__(self, reader: Reader, pad: Pad, keep: int, device: torch.device | None = None):
        self.reader, self.pad = reader, pad
        self._buffers = _Buffers(keep)
        self._stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    def next(self) -> tuple[Batch, torch.cuda.Event | None] | None:
        """The next batch and the event that marks the end of its copy (see `arrive`); None at the end."""
        clips = self.reader.next()
        if clips is None:
            return None
        size, samples = len(clips.plan.items), self.reader.clip_samples
        pcm = self._buffers.take(size, samples) if self._stream is None else _pinned((size, samples), torch.int16)
        lengths = torch.empty(size, dtype=torch.int32, pin_memory=self._stream is not None)
        items = torch.empty(size, dtype=torch.int64)
        pcm_rows, clip_lengths, item_rows = pcm.numpy(), lengths.numpy(), items.numpy()

        def fill(b: int) -> None:
            item_rows[b], clip = clips.clip(b, pcm_rows[b])
            to_int16(clip, float(clips.plan.gains[b]), pcm_rows[b])
            clip_lengths[b] = fill_up(pcm_rows[b], len(clip), self.pad)

        self.reader.spread(fill, size)
        labels = torch.from_numpy(self.reader.index.labels[item_rows])
        if self._stream is None:
            return Batch(pcm, lengths, labels, items), None
        with torch.cuda.stream(self._stream):
            device = self._stream.device
            # The pinned-memory allocator does not reuse this memory before these copies have finished.
            moved = pcm.to(device, non_blocking=True), lengths.to(device, non_blocking=True)
            return Batch(*moved, labels, items), self._stream.record_event()


def arrive(batch: Batch, event: torch.cuda.Event | None) -> Batch:
    """Makes the caller's current stream wait for the copy; the host does not wait."""
    if event is not None:
        stream = torch.cuda.current_stream(batch.pcm.device)
        stream.wait_event(event)
        for tensor in (batch.pcm, batch.lengths):
            tensor.record_stream(stream)
    return batch


def fill_up(row: np.ndarray, length: int, pad: Pad) -> int:
    """Pads `row` in place after its first `length` samples. Returns the clip length to report in `Batch.lengths`."""
    if length < len(row):
        row[length:] = 0 if pad == "zero" else np.resize(row[:length], len(row) - length)
    return length if pad == "zero" else len(row)


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)


class _Buffers:
    """Reuses arrays that no tensor refers to any more: zeroing fresh pages in the kernel costs more than a copy."""

    def __init__(self, keep: int):
        self._keep = keep
        self._arrays: list[np.ndarray] = []
        self._idle = 0  # what getrefcount returns for an array that only this list refers to

    def take(self, size: int, samples: int) -> torch.Tensor:
        for i in range(len(self._arrays)):
            if sys.getrefcount(self._arrays[i]) == self._idle and self._arrays[i].shape == (size, samples):
                return torch.from_numpy(self._arrays[i])
        if len(self._arrays) >= self._keep:
            return torch.empty(size, samples, dtype=torch.int16)
        self._arrays.append(np.empty((size, samples), np.int16))
        self._idle = sys.getrefcount(self._arrays[-1])
        return torch.from_numpy(self._arrays[-1])
