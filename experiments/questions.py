"""The questions of the experiments as data: each variant changes fields of a scale's base configuration.

A variant is (name, {"section.field": value}). A variant "base" changes nothing. `setting` changes fields of all
variants alike, such as the objective. Both are listed for each scale, because the scales may differ. With `equal_flops`
the batch of a variant shrinks until a step costs as much as a step of the setting, and the number of steps makes up for
the rounding. With `by_share` a variant is named by the share of patches that its masks hide.
"""

from dataclasses import dataclass, field

_FOR_SPEECH = {"objective.view_equaliser_db": 8.0, "objective.view_mix": 0.0}
SCALES = {
    # The tiny preset with fewer steps: less than half a core-minute for the masked objective, without its probes.
    "cpu": ("tiny", {"optim.steps": 200, "optim.warmup_steps": 20, "watch.pooling": "concat+std",
                     "watch.eval_clips": 200, "data.resident_gb": 0.5}),
    # The default run, and the preset for twenty core-minutes, as they are.
    "default": ("tiny", {}),
    "minutes": ("tiny-clip", {}),
    # The same for spoken words: frames of 10 ms, faint sounds kept, and views without background but with a wider
    # equaliser, because voices differ in colour. These settings were chosen on the speakers jackson and george.
    "speech": ("tiny-clip", {"front_end.n_fft": 512, "front_end.win_length": 400, "front_end.hop_length": 160,
                             "front_end.floor": 0.001, "data.clip_seconds": 0.66, "objective.source_seconds": 1.65,
                             **_FOR_SPEECH, "optim.steps": 2_000, "optim.warmup_steps": 200}),
    # The aim is about an hour per run on one H100. This is not yet measured on a GPU.
    "gpu": ("audio-jepa", {"optim.steps": 20_000, "optim.warmup_steps": 2_000, "model.target_layers": 12,
                           "watch.pooling": "concat+std"}),
}  # fmt: skip
PRESETS_AS_THEY_ARE = ("default", "minutes", "speech")  # they show what a preset reaches, by the question `probes`
SMALL = ("cpu", *PRESETS_AS_THEY_ARE)  # scales of the small encoder
TEACHER = "ema"  # as `objective.teacher`: the encoder that the same configuration, seed included, gives without it


@dataclass(frozen=True)
class Question:
    title: str
    expected: str  # written before the run
    variants: dict[str, dict[str, dict]]  # scale -> variant -> overrides
    setting: dict[str, dict] = field(default_factory=lambda: _both({}))  # scale -> overrides
    heads: tuple[str, ...] = ("knn", "linear", "logistic")
    equal_flops: bool = False
    by_share: bool = False


def _both(variants: dict[str, dict]) -> dict[str, dict[str, dict]]:
    return dict.fromkeys(SCALES, variants)


MASKED = _both({"objective.objective": "masked"})
# The pull of SIGReg grows with the batch: its weight times the recordings of a step is about 5.
_CLIPS = {"mask.mask": "random", "mask.mask_ratio": (0.5, 0.5)}
COMPARED = {
    **{scale: {} for scale in PRESETS_AS_THEY_ARE},
    "cpu": {**_CLIPS, "optim.batch_size": 32, "objective.sigreg_weight": 0.15},
    "gpu": {**_CLIPS, "objective.sigreg_weight": 0.02},
}
CLIP = {scale: {**fields, "objective.objective": "clip", "objective.clip_loss": "lejepa"}
        for scale, fields in COMPARED.items()}  # fmt: skip
_CROPS_ONLY = {"objective.view_time": (1.0, 1.0), "objective.view_bands": (1.0, 1.0), "objective.view_gain_db": 0.0,
               "objective.view_equaliser_db": 0.0, "objective.view_mix": 0.0}  # fmt: skip


def _augmentation(clip_seconds: float, every: dict | None = None) -> dict[str, dict]:
    """Without any, all views of a recording in a step show the same section and differ by their masks alone."""
    none = {**_CROPS_ONLY, "objective.source_seconds": clip_seconds}
    return {"none": none, "crops only": _CROPS_ONLY, "all": every or {}, "for speech": _FOR_SPEECH}


_PATCHES = {f"{rows} x {columns}": {"front_end.patch": (rows, columns)} for rows, columns in ((8, 8), (8, 4), (32, 2))}


def _layers(count: int) -> dict[str, dict]:
    return {
        "last": {"model.target_layers": 1},
        f"{count} averaged": {"model.target_layers": count, "model.target_mode": "mean"},
        f"{count} separate": {"model.target_layers": count, "model.target_mode": "separate"},
    }


_FOUR_LAYERS = _layers(4)

QUESTIONS = {
    "masks": Question(
        "random, block, time-frequency, curriculum or inverse-block masks",
        "All families lie within two deviations of each other, because a short run learns little from their geometry.",
        _both({mask: {"mask.mask": mask}
               for mask in ("random", "block", "time-frequency", "curriculum", "inverse-block")}),
        MASKED,
    ),
    "ratio": Question(
        "share of patches masked (random masks)",
        "The lowest ratio scores best, because in a short run the context encoder learns from more patches.",
        _both({f"{low} to {high}": {"mask.mask_ratio": (low, high)}
               for low, high in ((0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 0.9))}),
        _both({**MASKED["cpu"], "mask.mask": "random"}),
        by_share=True,
    ),
    "ema": Question(
        "EMA decay at the first step (cosine to 1)",
        "Decays of 0.9 to 0.99 score best; at 0.999 the targets stay near the untrained encoder's for most of the run.",
        _both({str(decay): {"optim.ema_start": decay} for decay in (0.9, 0.98, 0.99, 0.996, 0.999)}),
        MASKED,
    ),
    "probes": Question(
        "pooled (knn, linear, logistic) or attention-pooled (attentive) probe",
        "The logistic probe of the pooled features beats the attentive probe, which has few recordings to learn from.",
        _both({"base": {}}),
        heads=("knn", "linear", "logistic", "attentive"),
    ),
    "positions": Question(
        "sine-cosine or rotary positions",
        "Rotary positions score higher at `mean`, because they are not added to the latents that are pooled.",
        _both({"sincos": {"model.positions": "sincos"}, "rotary": {"model.positions": "rotary"}}),
        MASKED,
    ),
    "patch": Question(
        "size of a patch (mel bands x frames), at equal FLOPs",
        "Short patches score best, because they resolve time; patches of few rows lose at `concat+std`.",
        {
            **dict.fromkeys(SMALL, _PATCHES),
            "gpu": {"16 x 16": {"front_end.patch": (16, 16)}, "16 x 8": {"front_end.patch": (16, 8)},
                    "64 x 4": {"front_end.patch": (64, 4)}},
        },
        MASKED,
        equal_flops=True,
    ),
    "multimask": Question(
        "masks per clip that share one pass of the target encoder, at equal FLOPs",
        "One mask scores best, because at equal FLOPs more masks leave fewer recordings per step.",
        _both({str(count): {"mask.masks_per_clip": count} for count in (1, 2, 4, 8)}),
        MASKED,
        equal_flops=True,
    ),
    "objective": Question(
        "masked latents, agreement of views, or both; against a Gaussian regulariser (lejepa) or a teacher",
        "`clip` and `both` beat `masked` by more than two deviations; `byol` and `utterance` lie between.",
        _both({
            "masked": {"objective.objective": "masked"},
            "clip": {"objective.objective": "clip", "objective.clip_loss": "lejepa"},
            "both": {"objective.objective": "both", "objective.clip_loss": "lejepa"},
            "byol": {"objective.objective": "clip", "objective.clip_loss": "byol"},
            "utterance": {"objective.objective": "both", "objective.clip_loss": "utterance"},
        }),
        COMPARED,
    ),
    "views": Question(
        "views of a recording at equal visible patches (clip objective)",
        "Two views of half of the patches and four views of a quarter lie within two deviations of each other.",
        _both({
            "2 views": {"objective.views": 2, "mask.mask_ratio": (0.5, 0.5)},
            "4 views": {"objective.views": 4, "mask.mask_ratio": (0.75, 0.75)},
        }),
        CLIP,
    ),
    "augmentation": Question(
        "differences between the views of a recording besides their masks (clip objective)",
        "More augmentation scores better: none is worst, and all beat crops alone. `for speech`, a wider equaliser and "
        "no background, wins on speech and loses elsewhere.",
        {
            **dict.fromkeys(SMALL, _augmentation(2.0)),
            "speech": _augmentation(0.66, {"objective.view_equaliser_db": 4.0, "objective.view_mix": 0.5}),
            "gpu": _augmentation(10.0),
        },
        CLIP,
    ),
    "init": Question(
        "standard deviation of the initial weights",
        "`fan-in` scores better, because at 0.02 a narrow encoder's latents hardly depend on its input.",
        _both({init: {"model.init": init} for init in ("0.02", "fan-in")}),
        MASKED,
    ),
    "teacher": Question(
        "what gives the targets: the EMA encoder, the untrained one, or the trained one of the variant `ema`, frozen",
        "The frozen random teacher loses to the EMA; the frozen trained one matches it or is better.",
        _both({
            "ema": {},
            "frozen random": {"optim.ema_start": 1.0, "optim.ema_end": 1.0},
            "frozen trained": {"objective.teacher": TEACHER},
        }),
        MASKED,
    ),
    "targets": Question(
        "layers of the targets: the last, several averaged, or several predicted separately",
        "Separate layers beat their average, and both beat the last layer, whose targets lose variance.",
        {**dict.fromkeys(SMALL, _FOUR_LAYERS), "gpu": _layers(12)},
        MASKED,
    ),
}  # fmt: skip
