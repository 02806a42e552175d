"""A pretrained encoder with a linear head, its parameter groups, and the batch augmentations of fine-tuning.

Shapes: B clips, S samples, N = F x T patches, P values per patch, C width, K classes.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ajepa.data.sources.listing import DataError, classes_of
from ajepa.evaluation.features import real_columns
from ajepa.model.jepa import Encoder
from ajepa.model.layers import Sequences
from ajepa.utils.devices import available_memory
from ajepa_kernels import LogMelSpec


class Classifier(nn.Module):
    """Logits `[B, K]`: a linear layer on the mean over the tokens that hold real audio; padding is never encoded."""

    def __init__(self, encoder: Encoder, spec: LogMelSpec, classes: int):
        super().__init__()
        self.spec, self.encoder = spec, encoder
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, patches_BNP, lengths_B, masked_keys: float = 0.0, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """`masked_keys` is the share of A-JEPA's regularised masking (arXiv 2311.15830).

        This share of each clip's tokens act as queries but not as keys. The tokens are drawn anew for each batch and
        are the same in all layers.
        """
        rows, columns = self.spec.grid
        count = real_columns(self.spec, lengths_B)
        real = (torch.arange(columns, device=count.device) < count[:, None])[:, None].expand(-1, rows, -1).flatten(1)
        index, tokens = real.flatten().nonzero()[:, 0], count * rows
        cu = F.pad(tokens.cumsum(0), (1, 0)).int()
        keys = key_mask(real.cpu(), masked_keys, generator).to(real.device) if masked_keys else None
        latents = self.encoder(patches_BNP, index, Sequences(cu, rows * columns, keys))
        total = latents.new_zeros(len(tokens), latents.shape[1], dtype=torch.float32)
        total = total.index_add(0, index // (rows * columns), latents.float())
        return self.head(total / tokens[:, None])


def key_mask(real_BN: torch.Tensor, share: float, generator: torch.Generator | None) -> torch.Tensor:
    """Packed bool `[T]` over the real tokens. For a clip of n real tokens, round(share * n) of them are False."""
    noise = torch.rand(real_BN.shape, generator=generator).masked_fill(~real_BN, torch.inf)
    dropped = (share * real_BN.sum(1)).round()
    return (noise.argsort(1).argsort(1) >= dropped[:, None])[real_BN]


def parameter_groups(model: Classifier, lr_decay: float, weight_decay: float) -> list[dict]:
    """Parameter groups with layer-wise learning-rate factors and weight decay only on matrices.

    The factor is 1 for the head, lr_decay^(L + 1 - l) for block l of L, and lr_decay^(L + 1) for the patch embedding.
    """
    depth = len(model.encoder.blocks)
    groups: dict[tuple[float, bool], dict] = {}
    for name, p in model.named_parameters():
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        layer = int(block[1]) + 1 if block else 0 if name.startswith("encoder.embed.") else depth + 1
        scale, decays = lr_decay ** (depth + 1 - layer), p.ndim > 1
        group = {"params": [], "scale": scale, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((scale, decays), group)["params"].append(p)
    return list(groups.values())


def mixup(
    pcm: torch.Tensor, lengths: torch.Tensor, targets: torch.Tensor, alpha: float, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix each clip and its targets with another: w x + (1 - w) x', w ~ Beta(alpha, alpha) (arXiv 1710.09412).

    pcm int16 `[B, S]`, lengths `[B]`, targets float `[B, K]`; a mixture is as long as the longer of its two clips.
    """
    w = torch.from_numpy(rng.beta(alpha, alpha, len(pcm)).astype(np.float32))[:, None]
    other = torch.from_numpy(rng.permutation(len(pcm)))
    inside = torch.arange(pcm.shape[1]) < lengths[:, None]
    x = pcm.float() * inside
    mixed = (w * x + (1 - w) * x[other]).round().to(torch.int16)
    return mixed, torch.maximum(lengths, lengths[other]), w * targets + (1 - w) * targets[other]


def spec_augment(
    patches_BNP: torch.Tensor, spec: LogMelSpec, bands: int, frames: int, generator: torch.Generator
) -> torch.Tensor:
    """SpecAugment (arXiv 1904.08779): in each clip, one run of U{0..bands} mel bands and one run of U{0..frames} frames
    are set to the clip's mean."""
    (rows, columns), (height, width) = spec.grid, spec.patch
    B = len(patches_BNP)

    def run(size: int, most: int) -> torch.Tensor:
        length = (torch.rand(B, 1, generator=generator) * (min(most, size) + 1)).floor()
        start = (torch.rand(B, 1, generator=generator) * (size - length + 1)).floor()
        position = torch.arange(size)
        return (position >= start) & (position < start + length)

    hidden = run(rows * height, bands)[:, :, None] | run(columns * width, frames)[:, None]  # [B, mel, frame]
    hidden = hidden.view(B, rows, height, columns, width).transpose(2, 3).reshape(patches_BNP.shape)
    mean = patches_BNP.mean((1, 2), keepdim=True)
    return torch.where(hidden.to(patches_BNP.device), mean, patches_BNP)


def split_labels(names: Sequence[str], multi_label: bool) -> tuple[list[str], torch.Tensor]:
    """Return the classes, and the targets, float `[len(names), K]`, of labels as they are written in the data.

    `ajepa.data.sources.listing.classes_of` splits each label. Raises DataError for a label of several classes when
    `multi_label` is off, and for more labels than fit in memory.
    """
    parts = [classes_of(name, multi_label) for name in names]
    found = dict.fromkeys(part for label in parts for part in label)
    classes = sorted(found) if multi_label else list(found)
    need, free = 4 * len(names) * len(classes), available_memory()
    if need > free:
        raise DataError(
            f"{len(names):,} different labels with {len(classes):,} classes need {need / 1e9:.1f} GB of memory and "
            f"{free / 1e9:.1f} GB are free: name the column of the labels with --label"
        )
    number = {c: i for i, c in enumerate(classes)}
    targets = torch.zeros(len(names), len(classes))
    for row, part in zip(targets, parts, strict=True):
        row[[number[p] for p in part]] = 1.0
    return classes, targets
