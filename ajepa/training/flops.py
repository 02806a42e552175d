"""Floating-point operations of a training step, counted from its definition."""

import torch

from ajepa.config import SIZES, Config
from ajepa.model.masks import Masks


def step_flops(cfg: Config, masks: Masks | list[Masks]) -> float:
    """2 x multiply-adds of one step with these (ragged) masks: each forward, and twice that for each backward.

    The count follows the definition of the step. An engine that skips or recomputes work does not change it.
    """
    if not isinstance(masks, Masks):
        return sum(step_flops(cfg, part) for part in masks)
    model, spec, objective = cfg.model, cfg.front_end, cfg.objective
    width, depth, _ = SIZES[model.size]
    narrow, tokens, visible = model.predictor_width, masks.clips * spec.n_patches, len(masks.context)
    embedding = 2 * spec.patch_dim * width  # of one patch
    whole = torch.full((masks.clips,), spec.n_patches)
    target = _blocks(whole, width, depth) + tokens * embedding
    context = _blocks(masks.context_cu.diff(), width, depth) + visible * embedding
    predicted = model.target_layers if model.target_mode == "separate" else 1
    predictor = _blocks(masks.predict_cu.diff(), narrow, model.predictor_depth)
    predictor += 2 * width * narrow * (visible + predicted * len(masks.target))
    hidden, pooled = objective.projector_hidden, 2 * spec.grid[0] * width
    projector = 2 * (len(masks.context_cu) - 1) * hidden * (pooled + objective.projector_width)
    trained = context + predictor * objective.masks + projector * objective.clips
    return target * objective.taught + 3 * trained


def _blocks(lengths: torch.Tensor, width: int, layers: int) -> float:
    """FLOPs of the forward pass of `layers` transformer blocks over sequences of `lengths`."""
    tokens, pairs = lengths.sum().item(), lengths.double().square().sum().item()
    return layers * (24 * tokens * width * width + 4 * pairs * width)
