"""Views of recordings for the clip objective: PCM -> mel power -> crops, stretched, filtered and mixed -> patches.

Every number that is drawn is a pure function of the seed, the step and the recording's place in the global batch.

Shapes: B recordings, V views of each, R = V x B (view after view), S samples, L frames of a recording, W frames of a
view, M mel bands.
"""

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F

from ajepa.config import Config, ObjectiveConfig
from ajepa.utils.counter_rng import Noise
from ajepa_kernels import LogMelSpec, MelViews, augment_mel, log_mel

SILENCE = 0.1  # a crop whose peak is below this share of its recording's peak is silent
KNOTS = 5  # of the equaliser
FIRST_CALL = 1_000  # the masks of a step use the calls of its noise below this


class ViewFrontEnd:
    """Log-mel patches `[V * B, N, P]` of V augmented views of int16 PCM `[B, S]`."""

    def __init__(self, cfg: Config, impl: str = "auto", dtype: torch.dtype = torch.float32):
        self.spec, self.objective, self.seed, self.impl, self.dtype = (
            cfg.front_end, cfg.objective, cfg.seed, impl, dtype
        )  # fmt: skip
        # Peak normalisation is done crop by crop, so only the mean is taken off the whole recording.
        norm: Literal["none", "mean"] = "none" if self.spec.waveform_norm == "none" else "mean"
        self.power_spec = dataclasses.replace(self.spec, n_frames=None, waveform_norm=norm)

    @torch.no_grad()
    def __call__(
        self, pcm: torch.Tensor, lengths: torch.Tensor, step: int, rank: int = 0, world_size: int = 1
    ) -> torch.Tensor:
        noise = Noise(self.seed, step, rank=rank, world_size=world_size)
        noise.calls = FIRST_CALL
        lengths = lengths.clamp(self.spec.min_samples, pcm.shape[1])
        mel = log_mel(pcm, self.power_spec, lengths=lengths, layout="mel", impl=self.impl)
        a, b = self.spec.frame_rule
        frames = (lengths + a) // self.spec.hop_length + b
        peaks = frame_peaks(pcm, lengths, self.spec.hop_length, mel.shape[-1])
        with pcm.device:
            views = draw_views(mel, frames, peaks, self.spec, self.objective, noise)
        return augment_mel(mel, views, self.spec, lengths=frames.int(), dtype=self.dtype, impl=self.impl)


def frame_peaks(pcm: torch.Tensor, lengths: torch.Tensor, hop: int, frames: int) -> torch.Tensor:
    """The largest |sample - mean| in [-1, 1] of each hop, float32 `[B, L]`. The mean is that of every 16th sample."""
    short = max(0, frames * hop - pcm.shape[1])
    x = (F.pad(pcm, (0, short)) if short else pcm[:, : frames * hop]).unflatten(1, (frames, hop))
    low, high = (value.float() / 32768 for value in x.aminmax(dim=2))
    mean = (pcm[:, ::16].sum(1, dtype=torch.float32) / (lengths / 16) / 32768)[:, None]  # padding is zero
    return torch.maximum(high - mean, mean - low)


def draw_views(
    mel: torch.Tensor,
    frames: torch.Tensor,
    peaks: torch.Tensor,
    spec: LogMelSpec,
    objective: ObjectiveConfig,
    noise: Noise,
) -> MelViews:
    """Draw V views of each recording from mel power `[B, M, L]`, real frames `[B]` and `frame_peaks` `[B, L]`."""
    B, M, _ = mel.shape
    V, W = objective.views, spec.n_frames
    assert W is not None
    row = torch.arange(V * B) % B

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * noise((V * B, 1))[:, 0]

    start, peak = _sounding_crops(frames, peaks, W, noise((V * B, 1)).view(V, B))

    # background: the same crop of another recording, from 5 to 20 dB below by the mean power of both crops
    shift = 1 + (noise(()) * max(B - 1, 1)).floor().long()
    other = torch.where(row + shift < B, row + shift, row + shift - B) + torch.arange(V * B) - row
    level = F.pad(mel.mean(1).cumsum(1), (1, 0))[row]
    stop = (start + W).minimum(frames[row])
    power = (level.gather(1, stop[:, None]) - level.gather(1, start[:, None]))[:, 0] / (stop - start)
    mixed = (uniform(0, 1) < objective.view_mix) & (B > 1)
    below = 10 ** (-uniform(*objective.view_mix_db) * spec.power / 20)
    background = torch.where(mixed, below * power / power[other].clamp_min(1e-12), 0)

    gain = 10 ** (uniform(-objective.view_gain_db, objective.view_gain_db) * spec.power / 20)
    if spec.waveform_norm == "peak":
        gain = gain / (peak + 1e-6) ** spec.power
    stretch, offset = uniform(*objective.view_time), noise((V * B, 1))[:, 0]
    first = offset * (1 - stretch) * W + (stretch - 1) / 2  # frame centres stay where they are

    scale, offset = uniform(*objective.view_bands), uniform(-1, 1)
    lowest = (M - 1) / 2 * (1 - scale) + offset * (1 - scale).abs() * M / 2
    equaliser = objective.view_equaliser_db * _normal(noise((V * B, KNOTS)))
    return MelViews(
        clip=torch.stack([row, other % B], 1).int(),
        start=(torch.stack([start, start[other]], 1) + first[:, None]).clamp_min(0),
        rate=stretch,
        band=torch.stack([lowest, scale], 1),
        gain=gain[:, None] * torch.stack([torch.ones_like(background), background], 1),
        equaliser=equaliser,
    )


def _sounding_crops(
    frames: torch.Tensor, peaks: torch.Tensor, W: int, chance_VB: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """First frame, int64, and peak of a crop of W frames that is not silent, each `[V * B]`.

    A recording of fewer frames is repeated, so its crop may start at any of them.
    """
    L = peaks.shape[1]
    frame = torch.arange(L, device=peaks.device)
    peaks = torch.where(frame < frames[:, None], peaks, 0)
    whole = peaks.amax(1, keepdim=True)
    crop = F.max_pool1d(F.pad(peaks, (0, W - 1))[:, None], W, 1)[:, 0]
    crop = torch.where(frames[:, None] < W, whole, crop)
    starts = torch.where(frames < W, frames, frames - W + 1)
    allowed = ((crop >= SILENCE * whole) & (frame < starts[:, None])).cumsum(1)
    wanted = (chance_VB.T * allowed[:, -1:]).floor() + 1
    start = torch.searchsorted(allowed.float(), wanted.contiguous()).T.clamp_max(L - 1)  # [V, B]
    return start.flatten(), crop.gather(1, start.T).T.flatten()


def _normal(uniform: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers from uniform ones in [0, 1)."""
    return math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-1 + 2**-24, 1 - 2**-24))
