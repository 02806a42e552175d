"""Pooling: from the latents of a recording to one embedding. Padding is neither encoded nor pooled.

A recording is one or several chunks. Statistics are kept for each chunk and merged exactly, so that any number of
chunks can be pooled without their latents in memory.

Shapes: R chunks, n recordings, F x T patches per chunk, N = F T, P values per patch, C width, D embedding width.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from ajepa.config import ConfigError
from ajepa.model.jepa import Encoder
from ajepa.model.layers import Sequences, mean_of_layers
from ajepa_kernels import LogMelSpec

Layers = Literal["last", "mean"]
PER_FRAME = ("mean", "concat")  # poolings over frequency alone, which exist for each time patch
EPS = 1e-5  # added to the variance of what a projector reads


def real_columns(spec: LogMelSpec, lengths_R: torch.Tensor) -> torch.Tensor:
    """Number of time patches of each chunk that hold a real frame, int64 `[R]`, at least 1."""
    return torch.tensor(count_columns(spec, lengths_R.tolist()), device=lengths_R.device)


def count_columns(spec: LogMelSpec, lengths: Sequence[int]) -> list[int]:
    frames = [spec.frames(n) for n in lengths]
    wanted = spec.n_frames or max(frames)
    return [-(-min(max(count, 1), wanted) // spec.patch[1]) for count in frames]


def encode_real(
    encoder: Encoder,
    patches_RNP: torch.Tensor,
    spec: LogMelSpec,
    columns_R: torch.Tensor | Sequence[int],
    layers: str = "last",
) -> torch.Tensor:
    """Latents `[R, N, C]` of the first `columns_R` time patches. Padding is not encoded, and its latents are zero.

    `layers` is "last" for the encoder's output, or "mean" for the average of all blocks' outputs, each layer-normalised
    over its channels without affine parameters.
    """
    rows, columns = spec.grid
    counts = np.array(columns_R.tolist() if isinstance(columns_R, torch.Tensor) else columns_R)
    real = np.broadcast_to(np.arange(columns) < counts[:, None, None], (len(counts), rows, columns))
    index = torch.tensor(np.flatnonzero(real), device=patches_RNP.device)
    starts = torch.tensor(np.cumsum([0, *counts * rows]), dtype=torch.int32, device=patches_RNP.device)
    sequences = Sequences(starts, spec.n_patches)
    if layers == "last":
        latents = encoder(patches_RNP, index, sequences)
    else:
        outputs = encoder(patches_RNP, index, sequences, layers=len(encoder.blocks))
        latents = mean_of_layers(outputs, encoder.norm.eps)
    full = latents.new_zeros(real.size, latents.shape[-1]).index_copy(0, index, latents)
    return full.unflatten(0, (len(counts), spec.n_patches))


class Statistics(NamedTuple):
    """Mean and biased variance of each frequency row over the real time patches of a chunk."""

    mean: torch.Tensor  # float32 [R, F, C]
    variance: torch.Tensor  # float32 [R, F, C]
    columns: torch.Tensor  # int64 [R], the number of these patches


def statistics(x_RFTC: torch.Tensor, columns_R: torch.Tensor) -> Statistics:
    """The statistics of latents of which the first `columns_R` time patches are real, in two passes."""
    real = (torch.arange(x_RFTC.shape[2], device=x_RFTC.device) < columns_R[:, None])[:, None, :, None]
    count = columns_R[:, None, None]
    mean = torch.where(real, x_RFTC.float(), 0).sum(2) / count
    squares = torch.where(real, x_RFTC.float() - mean[:, :, None], 0).square().sum(2)
    return Statistics(mean, squares / count, columns_R)


def pool_recordings(
    chunks: Statistics, owner_R: torch.Tensor, n: int, pooling: str, projector: nn.Module | None = None
) -> torch.Tensor:
    """Embeddings of n recordings, float32 `[n, D]`, over all real time patches of all their chunks.

    Args:
        chunks: statistics of each chunk.
        owner_R: int64, the recording of each chunk. Every recording has one chunk at least.
        pooling: "mean" over all patches (D = C); "mean+std", that and the biased standard deviation over all patches
            (D = 2 C); "concat", the mean over time of each frequency row (D = F C); "concat+std", mean and deviation
            over time of each frequency row, laid out `[F, 2, C]` (D = 2 F C); "projection", the output of `projector`
            for the "concat+std" of each chunk, with deviation sqrt(variance + 1e-5), averaged over the chunks.
        projector: `ajepa.model.clip.Projector` in evaluation mode, for "projection".

    Raises:
        ConfigError: the pooling is "projection" and there is no projector.
    """
    if pooling == "projection":
        check_pooling(pooling, projector is not None)
        assert projector is not None
        x = torch.stack([chunks.mean, (chunks.variance + EPS).sqrt()], 2).flatten(1)
        weights = {name: value.float() for name, value in projector.named_parameters()}  # also of a bfloat16 encoder
        projected = functional_call(projector, weights, x).float()
        return _sum_by_owner(projected, owner_R, n) / _sum_by_owner(torch.ones_like(owner_R), owner_R, n)[:, None]
    mean, variance = merge(chunks, owner_R, n)[:2]
    if pooling.startswith("mean"):
        whole = mean.mean(1, keepdim=True)
        mean, variance = whole, (variance + (mean - whole).square()).mean(1, keepdim=True)
    return torch.stack([mean, variance.sqrt()], 2).flatten(1) if pooling.endswith("+std") else mean.flatten(1)


def merge(chunks: Statistics, owner_R: torch.Tensor, n: int) -> Statistics:
    """The statistics of n recordings from those of their chunks. Large common offsets lose no precision."""
    total = _sum_by_owner(chunks.columns, owner_R, n)
    weight = (chunks.columns / total[owner_R])[:, None, None]
    mean = _sum_by_owner(weight * chunks.mean, owner_R, n)
    variance = _sum_by_owner(weight * (chunks.variance + (chunks.mean - mean[owner_R]).square()), owner_R, n)
    return Statistics(mean, variance, total)


def _sum_by_owner(x_R: torch.Tensor, owner_R: torch.Tensor, n: int) -> torch.Tensor:
    return x_R.new_zeros(n, *x_R.shape[1:]).index_add(0, owner_R, x_R)


def check_pooling(pooling: str, has_projector: bool) -> None:
    """Raise ConfigError for the pooling "projection" of an encoder without a projector."""
    if pooling == "projection" and not has_projector:
        raise ConfigError(
            "pooling projection needs the projector of a clip objective, and this encoder has none: choose mean, "
            "mean+std, concat or concat+std"
        )


def embedding_width(pooling: str, rows: int, width: int, projected: int = 0) -> int:
    """D, for `rows` frequency rows of latents `width` wide and a projector to `projected` values."""
    if pooling == "projection":
        return projected
    return width * (rows if pooling.startswith("concat") else 1) * (2 if pooling.endswith("+std") else 1)
