"""The questions, as data: what each variant changes in the base configuration of a scale.

A variant is (name, {"section.field": value}); "base" is the scale's own configuration. What differs between the scales
is given by scale. `equal_flops` shrinks the batch until a step costs what the base's does, rounding made up by steps.
"""

from dataclasses import dataclass

SCALES = {
    # The tiny preset with fewer steps: about two minutes a run on one core, probes included.
    "cpu": ("tiny", {"optim.steps": 600, "optim.warmup_steps": 60, "watch.pooling": "concat"}),
    # About an hour a run on one H100 is the aim; not yet measured on a GPU.
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
