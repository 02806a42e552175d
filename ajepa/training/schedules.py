"""Schedules of learning rate, weight decay and EMA decay, and the optimiser's parameter groups."""

import math

from torch import nn

from ajepa.config import OptimConfig


def cosine(start: float, end: float, step: int, steps: int) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last step."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps - 1))))


def learning_rate(cfg: OptimConfig, step: int) -> float:
    """Linear from lr_start to lr over the warm-up, then as `OptimConfig.schedule` says, to lr_end at the last step."""
    if step < cfg.warmup_steps:
        return cfg.lr_start + (cfg.lr - cfg.lr_start) * step / cfg.warmup_steps
    if cfg.schedule == "cosine":
        return cosine(cfg.lr, cfg.lr_end, step - cfg.warmup_steps, cfg.steps - cfg.warmup_steps)
    lowered = step + 1 - cfg.stable_steps  # steps of the decay, this one included
    if cfg.schedule == "constant" or lowered <= 0:
        return cfg.lr
    return cfg.lr_end + (cfg.lr - cfg.lr_end) * (1 - math.sqrt(min(1.0, lowered / cfg.decay_steps)))


def weight_decay(cfg: OptimConfig, step: int) -> float:
    """A cosine between the ends of a cosine schedule; constant with the others, as in V-JEPA 2 (arXiv 2506.09985)."""
    end = cfg.weight_decay if cfg.weight_decay_end is None or cfg.schedule != "cosine" else cfg.weight_decay_end
    return cosine(cfg.weight_decay, end, step, cfg.steps)


def ema_decay(cfg: OptimConfig, step: int) -> float:
    """From ema_start to ema_end by `OptimConfig.ema_schedule`; ema_start where the learning rate is no cosine."""
    if cfg.schedule != "cosine":
        return cfg.ema_start
    if cfg.ema_schedule == "linear":
        return cfg.ema_start + (cfg.ema_end - cfg.ema_start) * step / max(1, cfg.steps - 1)
    return cosine(cfg.ema_start, cfg.ema_end, step, cfg.steps)


def agree(a: OptimConfig, b: OptimConfig, steps: int) -> bool:
    """Whether the schedules of `a` and `b` have the same values in the first `steps` steps."""
    some = {*range(0, steps, max(1, steps // 1000)), *range(max(0, steps - 2), steps)}
    return all(value(a, s) == value(b, s) for value in (learning_rate, weight_decay, ema_decay) for s in some)


def parameter_groups(model: nn.Module, decay: float) -> list[dict]:
    """Parameter groups with weight decay only on matrices; biases, norms and the mask token have none."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay, "decays": True},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "decays": False},
    ]
