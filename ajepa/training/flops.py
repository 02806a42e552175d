"""Floating-point operations of a training step, counted from its definition."""

import torch

from ajepa.config import SIZES, ModelConfig
from ajepa.model.masks import Masks
from ajepa_kernels import LogMelSpec


def step_flops(model: ModelConfig, spec: LogMelSpec, masks: Masks | list[Masks]) -> float:
    """2 x multiply-adds of one step with these (ragged) masks: each forward, and twice that for each backward.

    The count follows the definition of the step. An engine that skips or recomputes work does not change it.
    """
    if not isinstance(masks, Masks):
        return sum(step_flops(model, spec, part) for part in masks)
    width, depth, _ = SIZES[model.size]
    narrow, tokens, visible = model.predictor_width, masks.clips * spec.n_patches, len(masks.context)
    embedding = 2 * spec.patch_dim * width  # of one patch
    whole = torch.full((masks.clips,), spec.n_patches)
    target = _blocks(whole, width, depth) + tokens * embedding
    context = _blocks(masks.context_cu.diff(), width, depth) + visible * embedding
    predictor = _blocks(masks.predict_cu.diff(), narrow, model.predictor_depth)
    predictor += 2 * width * narrow * (visible + len(masks.target))
    return target + 3 * (context + predictor)


def _blocks(lengths: torch.Tensor, width: int, layers: int) -> float:
    """FLOPs of the forward pass of `layers` transformer blocks over sequences of `lengths`."""
    tokens, pairs = lengths.sum().item(), lengths.double().square().sum().item()
    return layers * (24 * tokens * width * width + 4 * pairs * width)
