"""Random numbers as a pure function of what they are for: nothing to save, and no order of drawing to keep."""

import math

import numpy as np
import torch


def hash64(seed: int, purpose: int, epoch: int, counter: np.ndarray) -> np.ndarray:
    """uint64 of the counter's shape: SplitMix64's finaliser over a keyed counter, one-to-one in the counter."""
    key = _key(seed, purpose, epoch)
    z = counter.astype(np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def mix64(counter: torch.Tensor, key: int) -> torch.Tensor:
    """`hash64` on tensors of any device: int64 that hold the bits of its uint64."""
    z = counter * _signed(0x9E3779B97F4A7C15) + _signed(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, 31)


def _signed(bits: int) -> int:
    return bits - (bits >> 63 << 64)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # without the sign


def _key(seed: int, purpose: int, epoch: int) -> np.uint64:
    return np.random.SeedSequence([seed, purpose, epoch]).generate_state(1, np.uint64)[0]


class Noise:
    """Uniform numbers of one step's contexts. Those of a context depend on (seed, step, its number in the global batch)
    and on the number of the call, not on how the batch is spread over ranks.

    Rank r of W holds clips r, r + W, r + 2 W... of the global batch, `per_clip` contexts each.
    """

    def __init__(self, seed: int = 0, step: int = 0, *, rank: int = 0, world_size: int = 1, per_clip: int = 1):
        self.seed, self.step, self.rank, self.world_size, self.per_clip = seed, step, rank, world_size, per_clip
        self.calls = 0

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        """float32 in [0, 1), on torch's default device and the same on each. The leading dimension is the contexts of
        this rank; shape () is shared by all ranks."""
        contexts, each = (shape[0] if shape else 1), math.prod(shape[1:])
        row = torch.arange(contexts)
        clip, mask = row // self.per_clip, row % self.per_clip
        row = (clip * self.world_size + self.rank) * self.per_clip + mask if shape else row
        bits = mix64(row[:, None] * each + torch.arange(each), int(_key(self.seed, self.calls, self.step)))
        self.calls += 1
        return (_shifted(bits, 40).float() * 2**-24).view(shape)
