"""The questions of the experiments as data: each variant changes fields of a scale's base configuration.

A variant is (name, {"section.field": value}). A variant "base" changes nothing. Variants are listed for each scale,
because the scales may differ. With `equal_flops` the batch of a variant shrinks until a step costs as much as a step of
the base configuration, and the number of steps makes up for the rounding.
"""

from dataclasses import dataclass

SCALES = {
    # The tiny preset with fewer steps. A run takes about two minutes on one core, probes included.
    "cpu": ("tiny", {"optim.steps": 600, "optim.warmup_steps": 60, "watch.pooling": "concat"}),
    # The aim is about an hour per run on one H100. This is not yet measured on a GPU.
    "gpu": ("audio-jepa", {"optim.steps": 20_000, "optim.warmup_steps": 2_000, "model.target_layers": 12}),
}


@dataclass(frozen=True)
class Question:
    title: str
    variants: dict[str, dict[str, dict]]  # scale -> variant -> overrides
    heads: tuple[str, ...] = ("knn", "linear", "attentive", "logistic")
    equal_flops: bool = False


def _both(variants: dict[str, dict]) -> dict[str, dict[str, dict]]:
    return dict.fromkeys(SCALES, variants)


QUESTIONS = {
    "masks": Question(
        "random, block, time-frequency or curriculum masks",
        _both({mask: {"mask.mask": mask} for mask in ("random", "block", "time-frequency", "curriculum")}),
    ),
    "ratio": Question(
        "share of patches masked (random masks)",
        _both({f"{low:.0%}-{high:.0%}": {"mask.mask_ratio": (low, high)}
               for low, high in ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.9))}),
    ),
    "ema": Question(
        "EMA decay at the first step (cosine to 1)",
        _both({str(decay): {"optim.ema_start": decay} for decay in (0.9, 0.98, 0.99, 0.996, 0.999)}),
    ),
    "probes": Question("mean-pooled (linear) or attention-pooled (attentive) probe", _both({"base": {}})),
    "positions": Question(
        "sine-cosine or rotary positions",
        _both({"sincos": {}, "rotary": {"model.positions": "rotary"}}),
    ),
    "patch": Question(
        "square patches, or short and tall ones of the same area (mel bands x frames)",
        {
            "cpu": {"8 x 8": {}, "32 x 2": {"front_end.patch": (32, 2)}},
            "gpu": {"16 x 16": {}, "64 x 4": {"front_end.patch": (64, 4)}},
        },
    ),
    "multimask": Question(
        "masks per clip that share one pass of the target encoder, at equal FLOPs",
        _both({str(count): {"mask.masks_per_clip": count} for count in (1, 2, 4, 8)}),
        equal_flops=True,
    ),
}  # fmt: skip
