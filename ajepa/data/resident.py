"""Keeps the whole data set as PCM in device memory: a batch is then one gather, without file reads or decoding."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ajepa.data.batch import Batch, fill_up
from ajepa.data.decode import read_whole, resampled_lengths
from ajepa.data.index import DataError, Index
from ajepa.data.loader import AudioLoader
from ajepa.data.reader import to_int16
from ajepa.utils.cores import local_ranks
from ajepa.utils.devices import free_memory

Decoded = tuple[dict[str, str], list[torch.Tensor]]  # bad files with their reasons, and what the others have filled
Join = Callable[[Callable[[], Decoded]], Decoded]  # runs it on all ranks, and returns what they have decoded together
SHARE = 0.5  # the PCM may take this share of the free memory; the rest is left for the training step


class ResidentLoader(AudioLoader):
    """An `AudioLoader` that decodes every recording once, into PCM held in the memory of `device`.

    Its batches equal those of `AudioLoader` bit for bit (with a gain, up to the last bit of recordings that need
    conversion), and each loader resumes from the state of the other.

    Args:
        join: with it, every rank decodes recordings rank, rank + world_size and so on, and gets the others from the
            ranks that decode them. All ranks must make their loaders at the same time.

    Raises:
        DataError: the PCM does not fit; the message states its size and the free memory.
    """

    def __init__(self, index: Index, *, device: torch.device, join: Join | None = None, **options: Any):
        state = options.pop("state", None)
        super().__init__(index, device=device, **options)
        slots = _slots(index, self._clip["sample_rate"], self._clip["clip_samples"])
        self._starts = np.concatenate([np.zeros(1), np.cumsum(slots)]).astype(np.int64)
        self._frames = np.zeros(len(index), np.int64)  # samples stored per recording; 0 if it is bad
        self._lengths = np.zeros(len(index), np.int32)  # `Batch.lengths` of each recording
        if join is None:
            bad, _ = self._decode(np.arange(len(index)), device)
        else:
            own = np.arange(self._stream.rank, len(index), self._stream.world_size)
            bad, _ = join(lambda: self._decode(own, device))
        names = (index.entries[row].name for row in np.flatnonzero(self._frames == 0))
        self._bad = {name: bad[name] for name in names}  # in the order of the index, on any number of ranks
        if not self._frames.any():
            raise DataError(f"{index.source}: no usable file is left, {len(self._bad)} went bad since indexing")
        self._last["skipped"] = dict(self._bad)
        if state is not None:
            self.load(state)

    def _check_memory(self) -> None:
        """No batches are held on the host."""

    def _decode(self, own: np.ndarray, device: torch.device) -> Decoded:
        """Allocate the bank, filled with zeros, and decode the rows `own` into it."""
        need, free = 2 * float(self._starts[-1]), free_memory(device)
        if _copies(device) * need > SHARE * free:
            raise DataError(
                f"--resident: {need / 1e9:,.2f} GB of PCM do not fit on {device}: {free / 1e9:,.2f} GB are free, of "
                f"which the data may take {SHARE:.0%}. Leave out --resident, or choose fewer recordings with --where"
            )
        self._bank = torch.zeros(int(self._starts[-1]), dtype=torch.int16, device=device)
        chosen = self.index.subset(own)
        whole = read_whole(
            chosen, lambda row, samples: self._store(int(own[row]), samples), sample_rate=self._clip["sample_rate"],
            max_samples=math.inf, threads=self._threads, decoder=self._clip["decoder"],
        )  # fmt: skip
        bad = {chosen.entries[row].name: reason for row, reason in enumerate(whole) if reason is not None}
        return bad, [self._bank, torch.from_numpy(self._frames), torch.from_numpy(self._lengths)]

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
    return need <= min(limit, SHARE * free_memory(device) / _copies(device))


def _copies(device: torch.device) -> int:
    """Number of ranks that keep their PCM in this memory: one on a GPU, all of the machine's on a CPU."""
    return local_ranks() if device.type == "cpu" else 1


def _slots(index: Index, rate: int, clip_samples: int) -> np.ndarray:
    """Samples that each recording takes."""
    return np.maximum(resampled_lengths(index, rate), clip_samples)
