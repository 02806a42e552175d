"""Random numbers as a pure function of what they are for: nothing to save, and no order of drawing to keep."""

import math

import numpy as np
import torch


def hash64(seed: int, purpose: int, epoch: int, counter: np.ndarray) -> np.ndarray:
    """uint64 of the counter's shape: SplitMix64's finaliser over a keyed counter, one-to-one in the counter."""
    key = np.random.SeedSequence([seed, purpose, epoch]).generate_state(1, np.uint64)[0]
    z = counter.astype(np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


class Noise:
    """Uniform numbers of one step's contexts. Those of a context depend on (seed, step, its number in the global batch)
    and on the number of the call, not on how the batch is spread over ranks.

    Rank r of W holds clips r, r + W, r + 2 W... of the global batch, `per_clip` contexts each.
    """

    def __init__(self, seed: int = 0, step: int = 0, *, rank: int = 0, world_size: int = 1, per_clip: int = 1):
        self.seed, self.step, self.rank, self.world_size, self.per_clip = seed, step, rank, world_size, per_clip
        self.calls = 0

    def __call__(self, shape: tuple[int, ...]) -> torch.Tensor:
        """float32 in [0, 1). The leading dimension is the contexts of this rank; shape () is shared by all ranks."""
        contexts, each = (shape[0] if shape else 1), math.prod(shape[1:])
        clip, mask = np.divmod(np.arange(contexts), self.per_clip)
        row = (clip * self.world_size + self.rank) * self.per_clip + mask if shape else np.zeros(1, np.int64)
        bits = hash64(self.seed, self.calls, self.step, row[:, None] * each + np.arange(each))
        self.calls += 1
        bits >>= np.uint64(40)
        return torch.from_numpy(bits.astype(np.float32)).mul_(2**-24).view(shape)
