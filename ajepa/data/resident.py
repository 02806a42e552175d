"""Keeps the whole data set as PCM in device memory: a batch is then one gather, without file reads or decoding."""

import math
from typing import Any

import numpy as np
import torch

from ajepa.data.batch import Batch, fill_up
from ajepa.data.decode import read_whole, resampled_lengths
from ajepa.data.index import DataError, Index
from ajepa.data.loader import AudioLoader
from ajepa.data.reader import to_int16
from ajepa.utils.devices import free_memory

SHARE = 0.5  # the PCM may take this share of the free memory; the rest is left for the training step


class ResidentLoader(AudioLoader):
    """An `AudioLoader` that decodes every recording once, into PCM held in the memory of `device`.

    Its batches equal those of `AudioLoader` bit for bit, and each loader resumes from the state of the other.

    Raises:
        DataError: the PCM does not fit; the message states its size and the free memory.
    """

    def __init__(self, index: Index, *, device: torch.device, **options: Any):
        state = options.pop("state", None)
        super().__init__(index, device=device, **options)
        rate, samples = self._clip["sample_rate"], self._clip["clip_samples"]
        slots = _slots(index, rate, samples)
        need, free = 2 * float(slots.sum()), free_memory(device)
        if need > SHARE * free:
            raise DataError(
                f"--resident: {need / 1e9:,.2f} GB of PCM do not fit on {device}: {free / 1e9:,.2f} GB are free, of "
                f"which the data may take {SHARE:.0%}. Leave out --resident, or choose fewer recordings with --where"
            )
        self._starts = np.concatenate([np.zeros(1), np.cumsum(slots)]).astype(np.int64)
        self._frames = np.zeros(len(index), np.int64)  # samples stored per recording; 0 if it is bad
        self._bank = torch.empty(int(self._starts[-1]), dtype=torch.int16, device=device)
        self._lengths = np.zeros(len(index), np.int32)  # `Batch.lengths` of each recording
        self._bad: dict[str, str] = {}
        whole = read_whole(
            index, self._store, sample_rate=rate, max_samples=math.inf, threads=self._threads,
            decoder=self._clip["decoder"],
        )  # fmt: skip
        for row, reason in enumerate(whole):
            if reason is not None:
                self._bad[index.entries[row].name] = reason
        if not self._frames.any():
            raise DataError(f"{index.source}: no usable file is left, {len(self._bad)} went bad since indexing")
        self._last["skipped"] = dict(self._bad)
        if state is not None:
            self.load(state)

    def _check_memory(self) -> None:
        """No batches are held on the host."""

    def _store(self, row: int, samples: np.ndarray) -> None:
        """Writes a recording into the bank, padded to the length of a clip if it is shorter."""
        start, end = self._starts[row : row + 2].tolist()
        frames = min(len(samples), end - start)
        pcm = np.empty(max(frames, self._clip["clip_samples"]), np.int16)
        to_int16(samples[:frames], 1.0, pcm)
        self._lengths[row] = min(fill_up(pcm, frames, self._pad), self._clip["clip_samples"])
        self._bank[start : start + len(pcm)] = torch.from_numpy(pcm)
        self._frames[row] = len(pcm)

    def __next__(self) -> Batch:
        batch_number, samples = self._last["batches"], self._clip["clip_samples"]
        plan = self._stream.plan(batch_number)
        skipped = self._last["skipped"]
        items = np.array([self._good(int(item), skipped) for item in plan.items], np.int64)
        surplus = self._frames[items] - samples
        starts = self._starts[items] + np.minimum((plan.fractions * (surplus + 1)).astype(np.int64), surplus)
        pcm = self._bank.unfold(0, samples, 1)[self._to_device(starts)]  # [B, S]
        if (plan.gains != 1).any():
            gains = self._to_device((32768 * plan.gains).astype(np.float32))
            pcm = (pcm.float() / 32768 * gains[:, None]).round_().clamp_(-32768, 32767).to(torch.int16)
        self._last = {"batches": batch_number + 1, "first": batch_number + 1, "dali": None, "skipped": skipped}
        lengths = self._to_device(self._lengths[items])
        return Batch(pcm, lengths, torch.from_numpy(self.index.labels[items]), torch.from_numpy(items))

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        """Copies `values` from pinned memory, so that the host does not wait for the queued steps."""
        host = torch.from_numpy(values)
        if self._bank.device.type != "cuda":
            return host
        return host.pin_memory().to(self._bank.device, non_blocking=True)

    def _good(self, item: int, skipped: dict[str, str]) -> int:
        """The row `item`, or the next good row if it is bad; `Reader.good_row` chooses the same one."""
        if not skipped:
            return item
        for row in range(item, item + len(self.index)):
            row %= len(self.index)
            if self._frames[row] and self.index.entries[row].name not in skipped:
                return row
        raise DataError(f"{self.index.source}: no usable file is left, {len(skipped)} went bad since indexing")

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._last["skipped"].update(self._bad)


def fits(index: Index, rate: int, clip_samples: int, limit: float, device: torch.device) -> bool:
    """Whether all recordings take at most `limit` bytes as PCM, and a `ResidentLoader` would take them."""
    need = 2 * float(_slots(index, rate, clip_samples).sum())
    return need <= min(limit, SHARE * free_memory(device))


def _slots(index: Index, rate: int, clip_samples: int) -> np.ndarray:
    """Samples that each recording takes."""
    return np.maximum(resampled_lengths(index, rate), clip_samples)
