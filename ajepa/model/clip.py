"""The clip objective: pooled latents of the visible patches, their projections, and the loss between views.

Shapes: B recordings, V views of each, R = V x B pooled clips (view after view), F frequency rows, C width, Q projected
width.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ajepa.config import SIZES, Config
from ajepa.model.layers import Linear
from ajepa.model.masks import Masks
from ajepa_kernels import segment_pool, sigreg


class BatchNorm(nn.Module):
    """Batch normalisation of `[R, C]` over the rows of all ranks in training, by running statistics in evaluation.

    The statistics are parameters without gradients, so checkpoints hold them. `update` moves them towards those of the
    last batch, except after a step that is thrown away.
    """

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.running_mean = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(width), requires_grad=False)
        self.batch: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, group=None) -> torch.Tensor:
        x = x.float()
        mean: torch.Tensor = self.running_mean
        var: torch.Tensor = self.running_var
        if self.training:
            if group is None:
                var, mean = torch.var_mean(x, 0, correction=0)
            else:
                mean = _mean_over(group, x.mean(0))
                var = _mean_over(group, (x - mean).square().mean(0))
            self.batch = mean.detach(), var.detach()
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias

    @torch.no_grad()
    def update(self, skip: torch.Tensor) -> None:
        """Move the running statistics towards the last batch's, unless `skip` is 1."""
        for running, batch in zip((self.running_mean, self.running_var), self.batch or (), strict=False):
            running.copy_(torch.where(skip > 0, running, torch.lerp(running, batch, self.momentum)))


class _SumOverRanks(torch.autograd.Function):
    """The sum of x over the ranks of a group. The gradient of x is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, dy):
        total = dy.clone()
        torch.distributed.all_reduce(total, group=ctx.group)
        return total, None


def _mean_over(group, x: torch.Tensor) -> torch.Tensor:
    """The mean over ranks, through which gradients flow."""
    return _SumOverRanks.apply(x, group) / torch.distributed.get_world_size(group)


class Projector(nn.Module):
    """Pooled latents `[R, P]` -> projections `[R, Q]`: linear, batch norm, GELU, linear."""

    def __init__(self, pooled: int, hidden: int, width: int):
        super().__init__()
        self.fc1 = Linear(pooled, hidden)
        self.norm = BatchNorm(hidden)
        self.fc2 = Linear(hidden, width)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)
        self.fc1.bias.requires_grad_(False)  # batch norm takes it off again

    def forward(self, x: torch.Tensor, group=None) -> torch.Tensor:
        return self.fc2(F.gelu(self.norm(self.fc1(x), group)))


def make_projector(cfg: Config) -> Projector:
    """The projector of a run of `cfg`. It reads mean and deviation of each frequency row."""
    objective = cfg.objective
    pooled = 2 * cfg.front_end.grid[0] * SIZES[cfg.model.size][0]
    return Projector(pooled, objective.projector_hidden, objective.projector_width)


class ClipTerms(NamedTuple):
    """Scalars of the clip objective."""

    agreement: torch.Tensor  # distance between views, or of the pooled prediction from the teacher's targets
    sigreg: torch.Tensor  # about 1.05 where the projections are Gaussian; 0 if it has no weight


class ClipObjective(nn.Module):
    """Projector and loss between views; see `ObjectiveConfig`."""

    def __init__(self, cfg: Config, impl: str = "auto"):
        super().__init__()
        self.cfg, self.grid, self.impl = cfg.objective, cfg.front_end.grid, impl
        self.contexts = cfg.mask.masks_per_clip
        self.group: Any = None  # the process group over whose ranks a batch is spread
        kind, width = self.cfg.clip_loss, self.cfg.projector_width
        self.projector = make_projector(cfg)
        self.head: Projector | None = None
        self.target_projector: Projector | None = None
        if kind == "byol":
            self.head = Projector(width, self.cfg.projector_hidden, width)
            self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)
        elif kind == "utterance":
            pooled = self.projector.fc1.in_features
            self.head = Projector(pooled, self.cfg.projector_hidden, SIZES[cfg.model.size][0])

    def forward(self, latents_TC, masks: Masks, teacher: torch.Tensor | None, key) -> ClipTerms:
        """The terms of a batch from the context latents `[T, C]`.

        `teacher` holds the target encoder's latents of all patches, `[R, N, C]`, for "byol", and the mean over patches
        of its layer-normalised top layers, `[R, C]`, for "utterance". `key` seeds SIGReg's directions. Over the ranks
        of `group`, the gradients are those of the global batch's terms times the number of ranks, which data-parallel
        training averages.
        """
        group = self.group
        pooled = self.pool(latents_TC, masks.context % math.prod(self.grid), masks.context_cu)
        zero = pooled.new_zeros(())
        projected = self.projector(pooled, group).float()
        z = self.by_view(projected)
        spread = zero
        if self.cfg.sigreg_weight:
            spread = sigreg(z, key, directions=self.cfg.sigreg_directions, group=group, impl=self.impl)
            if group is not None:
                spread = spread.detach() + (spread - spread.detach()) * torch.distributed.get_world_size(group)
        if self.cfg.clip_loss == "lejepa":
            return ClipTerms((z - z.mean(0)).square().mean(), spread)
        assert self.head is not None and teacher is not None
        if self.cfg.clip_loss == "utterance":
            wanted = F.layer_norm(teacher, teacher.shape[-1:]).repeat_interleave(self.contexts, 0)
            return ClipTerms((self.head(pooled, group).float() - wanted).square().mean(), spread)
        assert self.target_projector is not None
        with torch.no_grad():
            R, N = teacher.shape[:2]
            every = torch.arange(N, device=teacher.device).repeat(R)
            cu = torch.arange(R + 1, device=teacher.device) * N
            wanted = self.target_projector(self.pool(teacher.flatten(0, 1), every, cu), group)
            wanted = F.normalize(wanted.float(), dim=-1).repeat_interleave(self.contexts, 0)
        guess = self.by_view(F.normalize(self.head(projected, group).float(), dim=-1))
        return ClipTerms(2 - 2 * (guess * self.by_view(wanted).roll(1, 0)).sum(-1).mean(), spread)

    def by_view(self, x_RQ: torch.Tensor) -> torch.Tensor:
        """`[R, Q]` as `[V, B, Q]`. Several masks of a clip are further views of its recording."""
        return x_RQ.unflatten(0, (self.cfg.views, -1, self.contexts)).transpose(1, 2).flatten(0, 1)

    def pool(self, latents_TC, patch_T, cu) -> torch.Tensor:
        """Mean and deviation of each clip's visible latents in each frequency row, `[R, F * 2 * C]`."""
        rows, columns = self.grid
        clips = len(cu) - 1
        clip_T = torch.searchsorted(cu[1:].long(), torch.arange(len(patch_T), device=cu.device), right=True)
        row_T = clip_T * rows + patch_T // columns  # packed contexts list their patches in ascending order
        starts = torch.arange(clips * rows + 1, device=cu.device)
        return segment_pool(latents_TC, torch.searchsorted(row_T, starts).int(), impl=self.impl).view(clips, -1)

    def update(self, skip: torch.Tensor) -> None:
        """Take over the batch statistics of a step, unless `skip` is 1."""
        for module in self.modules():
            if isinstance(module, BatchNorm):
                module.update(skip)

    def ema_pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        if self.target_projector is None:
            return []
        pairs = zip(self.projector.parameters(), self.target_projector.parameters(), strict=True)
        return [(source, target) for source, target in pairs if source.requires_grad]
