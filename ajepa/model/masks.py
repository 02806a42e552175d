"""Which patches the context encoder sees and which the predictor predicts: five mask families, drawn without loops.

A mask family draws booleans; `Masks.pack` turns them into the packed, ragged indices that the model reads. Shapes:
B clips, R contexts (B x masks per clip), K target groups per context, N = F x T patches (frequency-major), G groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from ajepa.config import MaskConfig
from ajepa.utils.counter_rng import Noise


@dataclass(frozen=True)
class Masks:
    """Packed masks of one batch. Indices count patches over the whole batch: clip * N + patch.

    Predictor sequence g is the context `context_of[g]` followed by the mask tokens of target group g.
    """

    context: torch.Tensor  # int64 [Tc], visible patches, context after context
    context_cu: torch.Tensor  # int32 [R + 1]
    target: torch.Tensor  # int64 [Tt], patches to predict, group after group
    target_cu: torch.Tensor  # int32 [G + 1]
    predict: torch.Tensor  # int64 [Tp], rows of (context tokens ++ mask tokens), packed per predictor sequence
    predict_cu: torch.Tensor  # int32 [G + 1]
    predicted: torch.Tensor  # int64 [Tt], the predictor's output rows for the patches of `target`
    max_context: int
    max_predict: int
    max_target: int
    clips: int
    disjoint: bool  # group g holds the targets of clip g, so no patch is predicted twice

    BOUNDS: ClassVar = ("max_context", "max_predict", "max_target")

    @classmethod
    def pack(cls, context_RN: torch.Tensor, targets_RKN: torch.Tensor, masks_per_clip: int, present_RK=None) -> "Masks":
        """Pack boolean masks. Groups that are False in `present_RK` (default: empty ones) get no predictor sequence."""
        R, N = context_RN.shape
        present = targets_RKN.any(-1) if present_RK is None else present_RK
        groups_GN, context_of = targets_RKN[present], present.nonzero()[:, 0]
        clip_R = torch.arange(R) // masks_per_clip

        row, patch = context_RN.nonzero(as_tuple=True)
        context = clip_R[row] * N + patch
        context_len = context_RN.sum(-1)
        context_cu = _offsets(context_len)

        group, patch = groups_GN.nonzero(as_tuple=True)
        target = clip_R[context_of][group] * N + patch
        target_len = groups_GN.sum(-1)
        target_cu = _offsets(target_len)

        visible_len = context_len[context_of]
        predict_len = visible_len + target_len
        predict_cu = _offsets(predict_len)
        sequence = torch.repeat_interleave(predict_len)
        offset = torch.arange(len(sequence)) - predict_cu[sequence]
        is_context = offset < visible_len[sequence]
        bounds = torch.stack([_longest(context_len), _longest(predict_len), _longest(target_len)]).tolist()
        from_context = context_cu[context_of[sequence]] + offset
        from_target = len(context) + target_cu[sequence] + offset - visible_len[sequence]
        return cls(
            context=context,
            context_cu=context_cu.int(),
            target=target,
            target_cu=target_cu.int(),
            predict=torch.where(is_context, from_context, from_target),
            predict_cu=predict_cu.int(),
            predicted=(~is_context).nonzero()[:, 0],
            max_context=bounds[0],
            max_predict=bounds[1],
            max_target=bounds[2],
            clips=R // masks_per_clip,
            disjoint=masks_per_clip == 1 and targets_RKN.shape[1] == 1 and len(groups_GN) == R,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.type is torch.Tensor}

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Masks":
        """The same masks with `function` applied to each tensor."""
        changed: dict[str, Any] = {name: function(x) for name, x in self.tensors().items()}
        return replace(self, **changed)

    def to(self, device: torch.device) -> "Masks":
        if device.type == "cpu":
            return self
        return self.map(lambda x: x.pin_memory().to(device, non_blocking=True))


def _longest(lengths: torch.Tensor) -> torch.Tensor:
    return lengths.max() if len(lengths) else lengths.new_zeros(())


def _offsets(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def random_masks(R, grid, ratio, noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Audio-JEPA's random masks: one masked share U(ratio) per batch, and a separate permutation for each context."""
    N = math.prod(grid)
    masked = round(N * _uniform((), ratio, noise).item())
    rank = noise((R, N)).argsort(-1).argsort(-1)
    context = rank >= min(max(masked, 1), N - 1)
    return context, ~context[:, None]


def block_masks(R, grid, n_targets, target_scale, aspect, context_scale, noise) -> tuple[torch.Tensor, torch.Tensor]:
    """I-JEPA's multi-block masks: K target blocks, one large context block without them (arXiv 2301.08243, sec. 3)."""
    targets = _blocks(R, n_targets, grid, target_scale, aspect, noise)
    context = _blocks(R, 1, grid, context_scale, (1.0, 1.0), noise)[:, 0]
    return (context & ~targets.any(1)).flatten(1), targets.flatten(2)


def time_frequency_masks(
    R, grid, n_targets, target_scale, aspect, context_scale, min_context, noise
) -> tuple[torch.Tensor, torch.Tensor]:
    """A-JEPA's time-frequency masks: the context also loses every row and column that a target block touches.

    The geometry is our reading of arXiv 2311.15830. A context with fewer than `min_context` patches keeps the targets'
    rows (frequencies); if it still has too few, it keeps their columns as well.
    """
    targets = _blocks(R, n_targets, grid, target_scale, aspect, noise)
    context = _blocks(R, 1, grid, context_scale, (1.0, 1.0), noise)[:, 0]
    union = targets.any(1)
    rows, columns = union.any(2, keepdim=True), union.any(1, keepdim=True)
    chosen = context & ~rows & ~columns
    for relaxed in (context & ~columns, context & ~union):
        short = chosen.sum((1, 2)) < min_context
        chosen = torch.where(short[:, None, None], relaxed, chosen)
    return chosen.flatten(1), targets.flatten(2)


def inverse_block_masks(R, grid, size, visible, noise) -> tuple[torch.Tensor, torch.Tensor]:
    """EAT's inverse block masks: the union of blocks is seen, and all else is a target (arXiv 2401.03497, sec. 3).

    Blocks of `size` patches, cut off at the borders, are placed in random order until they cover `visible` patches. Of
    the last block only as many patches are seen, at random, as the count lacks. Each place has a random number, so the
    largest number among the blocks that cover a patch says when it is covered. All patches are equally likely in the
    first block, because blocks may begin outside of the grid.
    """
    F, T = grid
    height, width = min(size[0], F), min(size[1], T)
    places = noise((R, F + height - 1, T + width - 1))
    covered = torch.nn.functional.max_pool2d(places[:, None], (height, width), stride=1).flatten(1).double()
    order = (covered + noise((R, F * T)) * 2**-24).argsort(dim=-1, descending=True, stable=True)  # 24 bits each
    context = torch.zeros(R, F * T, dtype=torch.bool).scatter_(1, order[:, :visible], True)
    return context, ~context[:, None]


def curriculum_probability(step: int, steps: int, c0: float = 0.01) -> float:
    """A-JEPA's probability of a time-frequency mask at step s of S: f(s) = min(1, sqrt(s (1 - c0^2) / S + c0^2))."""
    return min(1.0, math.sqrt(step * (1 - c0**2) / steps + c0**2))


def _uniform(shape: tuple[int, ...], span: tuple[float, float], noise: Noise) -> torch.Tensor:
    low, high = span
    return low + (high - low) * noise(shape)


def _blocks(R, K, grid, scale, aspect, noise) -> torch.Tensor:
    """K rectangles per context, bool [R, K, F, T], with a share U(scale) of the grid and height / width U(aspect).

    Height and width are shares of the grid's sides, so a block of aspect 1 has the proportions of the grid. On a square
    grid this is I-JEPA's definition; on an 8 x 64 grid every block still fits.
    """
    F, T = grid
    area, ratio = _uniform((R, K), scale, noise), _uniform((R, K), aspect, noise)
    height = (F * (area * ratio).sqrt()).round().clamp(1, F)
    width = (F * T * area / height).round().clamp(1, T)
    top = (noise((R, K)) * (F - height + 1)).floor()
    left = (noise((R, K)) * (T - width + 1)).floor()

    def span(start, length, size):
        cell = torch.arange(size)
        return (cell >= start[..., None]) & (cell < (start + length)[..., None])

    return span(top, height, F)[..., :, None] & span(left, width, T)[..., None, :]


def _keep_minimum(context_RN, targets_RKN, minimum, noise):
    """Fill contexts of fewer than `minimum` patches with unused patches first, then with patches taken from targets."""
    short = context_RN.sum(-1) < minimum
    if not short.any():
        return context_RN, targets_RKN
    tier = torch.where(context_RN, 0.0, torch.where(targets_RKN.any(1), 2.0, 1.0))
    order = (tier + noise(tuple(tier.shape))).argsort(-1).argsort(-1)
    context = torch.where(short[:, None], order < minimum, context_RN)
    return context, targets_RKN & ~context[:, None]


def unit_count(clips: int) -> int:
    """Units of a batch of `clips`: the largest power of two that cuts it into equal units of 8 clips or more, or 1.

    Clip i belongs to unit i mod U. If W divides U, each of W ranks holds whole units, so that ranks are as equal as
    units are. Many ranks need small units, but contexts differ too much in size for fewer than 8 clips to be equal.
    """
    units = clips & -clips
    while units > 1 and clips // units < 8:
        units //= 2
    return units


def deal(cost_R: torch.Tensor, units: int) -> torch.Tensor:
    """Deal R contexts out to units whose sums of `cost_R` (integers) differ little: int64 [units, R / units].

    Sorted contexts are dealt back and forth. Then, in four rounds, the most costly and the least costly unit swap the
    two contexts that even them out best, as do the second most and the second least costly unit, and so on. Units, and
    the contexts of a unit, are listed in the order of their numbers, so that a place says nothing about the size.
    """
    if units == 1:
        return torch.arange(len(cost_R))[None]
    rows = cost_R.sort(stable=True).indices.view(-1, units)
    rows[1::2] = rows[1::2].flip(1)
    dealt = rows.t().contiguous()
    pool = dealt[:, :: math.ceil(len(rows) / 64)]  # a view of `dealt`; large units compare 64 contexts with 64
    for _ in range(4):
        total, order = cost_R[dealt].sum(1).sort(stable=True)
        light, heavy = order[: units // 2], order[units // 2 :].flip(0)
        gap = total[units // 2 :].flip(0) - total[: units // 2]
        moved = cost_R[pool[heavy], None] - cost_R[pool[light]][:, None]
        remaining = (gap[:, None, None] - 2 * moved).abs().flatten(1)
        swap = remaining.argmin(1)
        better = remaining.gather(1, swap[:, None])[:, 0] < gap
        give, take = swap // pool.shape[1], swap % pool.shape[1]
        given, taken = pool[heavy, give], pool[light, take]
        pool[heavy, give], pool[light, take] = torch.where(better, taken, given), torch.where(better, given, taken)
    dealt = dealt.sort(1).values
    return dealt[dealt[:, 0].argsort()]


def _fix_counts(context_RN, targets_RKN, units, per_clip, n_context, n_target, minimum, noise):
    """Select exactly `n_context` visible and `n_target` target patches in each unit, still ragged from clip to clip.

    Surplus patches are dropped at random, but each context keeps `minimum` patches. Missing patches are taken from
    unused patches first; contexts take targets only after those.
    """

    def smallest(score, count):
        by_unit = score.view(-1, units, per_clip * score[0].numel()).transpose(0, 1)
        order = by_unit.flatten(1).argsort(dim=-1, stable=True)  # ties must not depend on the number of units
        chosen = torch.zeros(order.shape, dtype=torch.bool).scatter_(1, order[:, :count], True)
        return chosen.view(by_unit.shape).transpose(0, 1).reshape(score.shape)

    tier = torch.where(context_RN, 0.0, torch.where(targets_RKN.any(1), 2.0, 1.0)) + noise(context_RN.shape)
    guaranteed = tier.argsort(-1).argsort(-1) < minimum
    context = smallest(torch.where(guaranteed, tier - 3.0, tier), n_context)
    free = ~context[:, None].expand_as(targets_RKN)
    tier = torch.where(targets_RKN & free, 0.0, torch.where(free, 1.0, 2.0)) + noise(targets_RKN.shape)
    return context, smallest(tier, n_target) & free


class MaskSampler:
    """Draws the masks of step s as a pure function of (seed, s) and of each clip's place in the global batch.

    The masks are drawn on torch's default device. The sampler has no state to save, and W ranks with B / W clips each
    draw together the masks that one rank draws for B clips.

    Contexts of ragged families differ in size. All ranks draw those of the whole batch and deal them out to its units,
    so that ranks have nearly equal work. A fixed token budget is met by each unit, and so by each rank. Its units are
    those of the micro-batch of all ranks: W ranks with micro-batches of m clips draw what one rank draws with
    micro-batches of W m clips. Where W does not divide the number of units, ranks have less equal work, and each meets
    a budget on its own clips, with masks that depend on W.
    """

    RAGGED: ClassVar = ("block", "time-frequency", "curriculum")

    def __init__(self, cfg: MaskConfig, grid: tuple[int, int], *, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.cfg, self.grid, self.seed, self.rank, self.world_size = cfg, grid, seed, rank, world_size
        self.n_patches = math.prod(grid)
        self.minimum = min(cfg.min_context, self.n_patches // 2)  # `config.validate` refuses more
        self.budget = self._budget() if cfg.fixed_token_budget else None

    def __call__(self, step: int, steps: int, batch: int) -> Masks:
        return self.parts(step, steps, [batch])[0]

    def parts(self, step: int, steps: int, sizes: list[int]) -> list[Masks]:
        """Masks of this rank's part of one batch, packed separately for micro-batches of `sizes` clips."""
        cfg, rows = self.cfg, [size * self.cfg.masks_per_clip for size in sizes]
        noise = Noise(self.seed, step, rank=self.rank, world_size=self.world_size, per_clip=cfg.masks_per_clip)
        if cfg.mask in self.RAGGED:
            whole = Noise(self.seed, step)
            drawn = self._draw(cfg.mask, sum(rows) * self.world_size, step, steps, whole)
            own = self._own(*drawn, [sum(sizes)] if self.budget is None else sizes)
            context, targets = (x[own] for x in drawn)
            noise.calls = whole.calls  # no number serves twice
        else:
            context, targets = self._draw(cfg.mask, sum(rows), step, steps, noise)
        if self.budget is None:
            context, targets = _keep_minimum(context, targets, self.minimum, noise)
        pieces = zip(context.split(rows), targets.split(rows), strict=True)
        return [self._pack(*piece, noise) for piece in pieces]

    def _own(self, context: torch.Tensor, targets: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Numbers of this rank's contexts, of which `sizes` clips at a time are dealt out, among those of all ranks."""
        visible, asked = context.sum(-1).clamp(min=self.minimum), targets.sum(-1)
        # Tokens of the context encoder and of the predictor. In a-jepa the former cost 1.7 times as many operations.
        cost = 2 * visible + (asked + visible[:, None] * (asked > 0)).sum(-1)
        own, start, per_clip = [], 0, self.cfg.masks_per_clip
        for size in sizes:
            clips = size * self.world_size
            dealt = deal(cost[start : start + clips * per_clip], unit_count(clips)) + start
            places = dealt.view(len(dealt), -1, per_clip).transpose(0, 1).reshape(clips, per_clip)
            own.append(places[self.rank :: self.world_size].flatten())
            start += clips * per_clip
        return torch.cat(own)

    def _pack(self, context: torch.Tensor, targets: torch.Tensor, noise: Noise) -> Masks:
        per_clip = self.cfg.masks_per_clip
        if self.budget is None:
            return Masks.pack(context, targets, per_clip)
        units = unit_count(len(context) // per_clip * self.world_size)
        own = 1 if units % self.world_size else units // self.world_size
        contexts = len(context) // own
        n_context, n_target = (round(contexts * share) for share in self.budget)
        if self.cfg.mask == "random":
            n_target = contexts * self.n_patches - n_context
        context, targets = _fix_counts(context, targets, own, per_clip, n_context, n_target, self.minimum, noise)
        present = torch.ones(targets.shape[:2], dtype=torch.bool)  # static shapes: empty groups keep their sequence
        return Masks.pack(context, targets, per_clip, present)

    def _draw(self, mask, R, step, steps, noise) -> tuple[torch.Tensor, torch.Tensor]:
        cfg = self.cfg
        if mask == "random":
            if not cfg.fixed_token_budget:
                return random_masks(R, self.grid, cfg.mask_ratio, noise)
            masked = self.n_patches * _uniform((R, 1), cfg.mask_ratio, noise)
            context = noise((R, self.n_patches)).argsort(-1).argsort(-1) >= masked.round()
            return context, ~context[:, None]
        if mask == "block":
            return block_masks(
                R, self.grid, cfg.block_targets, cfg.block_scale, cfg.block_aspect, cfg.context_scale, noise
            )
        if mask == "time-frequency":
            return time_frequency_masks(
                R, self.grid, cfg.tf_targets, cfg.tf_scale, cfg.block_aspect, cfg.context_scale, self.minimum, noise
            )
        if mask == "inverse-block":
            visible = round(self.n_patches * (1 - sum(cfg.mask_ratio) / 2))
            visible = min(max(visible, self.minimum, 1), self.n_patches - 1)
            return inverse_block_masks(R, self.grid, cfg.inverse_block_size, visible, noise)
        is_tf = noise((R,)) < curriculum_probability(step, steps, cfg.curriculum_c0)
        easy, hard = (self._draw(kind, R, step, steps, noise) for kind in ("block", "time-frequency"))
        K = max(easy[1].shape[1], hard[1].shape[1])
        easy_targets, hard_targets = (
            torch.nn.functional.pad(targets, (0, 0, 0, K - targets.shape[1])) for _, targets in (easy, hard)
        )
        context = torch.where(is_tf[:, None], hard[0], easy[0])
        return context, torch.where(is_tf[:, None, None], hard_targets, easy_targets)

    def _budget(self) -> tuple[float, float]:
        """Mean visible and target patches per context in pilot draws; the smallest means over the families in use."""
        if self.cfg.mask == "random":
            visible = max(self.n_patches * (1 - sum(self.cfg.mask_ratio) / 2), self.minimum)
            return visible, self.n_patches - visible
        families = ("block", "time-frequency") if self.cfg.mask == "curriculum" else (self.cfg.mask,)
        noise = Noise()
        pilots = [self._draw(family, 1024, 0, 1, noise) for family in families]
        visible = min(context.sum().item() for context, _ in pilots) / 1024
        return max(visible, self.minimum), min(targets.sum().item() for _, targets in pilots) / 1024


def hidden_shares(cfg: MaskConfig, grid: tuple[int, int]) -> list[float]:
    """Shares of the patches that the masks hide: the means at both ends of --mask-ratio, or one mean over the run.

    The shares are those of masks as drawn, in which --min-context patches stay visible. Masks that do not draw their
    ratio have one share.
    """
    drawn = cfg.mask == "random" and not cfg.fixed_token_budget
    rows = 1 if drawn else max(4, min(128, 2**18 // math.prod(grid)))  # all random masks of one ratio hide as many
    shares = []
    for ratio in cfg.mask_ratio if drawn else [sum(cfg.mask_ratio) / 2]:
        sampler = MaskSampler(replace(cfg, mask_ratio=(ratio, ratio), masks_per_clip=1), grid)
        visible = sum(len(sampler(step, 16, rows).context) for step in range(1, 16, 2))
        shares.append(1 - visible / (8 * rows * math.prod(grid)))
    return shares


def describe_masks(cfg: MaskConfig, grid: tuple[int, int]) -> str:
    """The mask family and what it hides, such as "random masks of 50-70%", and what --min-context changes about it."""
    N, shares = math.prod(grid), hidden_shares(cfg, grid)
    text = f"{cfg.mask} masks of {percent(shares)}"
    highest = cfg.mask_ratio[1] if cfg.mask == "random" and len(shares) == 2 else sum(cfg.mask_ratio) / 2
    if cfg.mask in ("random", "inverse-block") and N - round(N * highest) < cfg.min_context:
        ratio = " ".join(f"{end:g}" for end in cfg.mask_ratio)
        text += f" (--min-context {cfg.min_context} of {N} patches limits --mask-ratio {ratio})"
    return text


def percent(shares: list[float]) -> str:
    """Shares as text, such as "80-84%"."""
    return "-".join(dict.fromkeys(f"{100 * share:.0f}" for share in shares)) + "%"
