"""Every setting of a run, as frozen dataclasses, and the presets. Each field is a flag of `python -m ajepa.train`."""

import argparse
import dataclasses
import difflib
import importlib.util
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ajepa.utils import cli
from ajepa.utils.cli import expanded, flag, leaves
from ajepa.utils.errors import ConfigError, UserError
from ajepa.utils.folders import kind_of
from ajepa.utils.json_files import read_json, write_json
from ajepa.utils.run_folder import run_of
from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec

Impl = Literal["fused", "reference", "compile"]
Pooling = Literal["mean", "mean+std", "concat", "concat+std", "projection"]
LOGGERS = ("tensorboard", "wandb")
MOST_PATCHES = 1 << 16  # of a clip; attention over more would not end
SIZES = {"tiny": (128, 4, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, layers, heads


@dataclass(frozen=True)
class DataConfig:
    """Recordings and how they become clips."""

    data: str | None = None
    """Recordings: a folder, shards of ajepa.pack, a manifest (CSV, TSV, JSONL, Parquet), or webdataset tars (a glob or
    {000..010}). None: the synthetic set."""
    where: str | None = None
    """Rows of the manifest to train on, such as "fold=1,2,3". None: all rows."""
    label: str | None = None
    """Manifest column that holds the label. None: a column called label, target, category or class."""
    clip_seconds: float = 10.0
    """Length of a training clip in seconds."""
    pad: Literal["cyclic", "zero"] = "cyclic"
    """How a recording shorter than a clip is filled up: by repeating it, or by zeros in the log-mel."""
    gain_db: float = 0.0
    """Each clip gets a random gain, uniform between minus and plus this many dB."""
    decoder: Literal["auto", "dali", "soundfile"] = "auto"
    """auto: DALI for the formats that it decodes faster than libsndfile, if it is installed. dali: DALI for every
    format that it decodes. soundfile: only libsndfile."""
    float_scale: float = 1.0
    """Full scale of floating-point recordings, such as 32768 for 16-bit values that were stored as floats."""
    loader_threads: int = 0
    """Number of decoding threads of each rank. 0: one for each of its cores."""
    prefetch: int = 2
    """Number of batches decoded ahead."""
    shuffle: Literal["all", "ranges"] = "all"
    """all: each epoch is a permutation of all recordings. ranges: each rank permutes a part of its own of the
    recordings or shards, so that several machines need not each read all of them."""
    resident: bool = False
    """Load all audio as PCM into the device's memory before the first step. It must fit."""
    resident_gb: float = 0.0
    """Do the same without being asked if all audio takes at most this many GB as PCM, and fits."""


@dataclass(frozen=True)
class ModelConfig:
    """Encoders and predictor."""

    size: Literal["tiny", "S", "B", "L"] = "B"
    """Encoder as width x layers x heads: tiny 128 x 4 x 4, S 384 x 12 x 6, B 768 x 12 x 12, L 1024 x 24 x 16."""
    predictor_width: int = 384
    """Width of the predictor."""
    predictor_depth: int = 6
    """Number of transformer blocks in the predictor."""
    predictor_heads: int = 12
    """Number of attention heads in the predictor."""
    positions: Literal["sincos", "rotary"] = "sincos"
    """Position of a patch: fixed 2-D sine-cosine embeddings, or 2-D rotary embeddings."""
    init: Literal["0.02", "fan-in"] = "0.02"
    """Standard deviation of the initial weights. 0.02: as ViT-B. fan-in: 1 / sqrt(values of a patch) for the embedding
    and 0.68 / sqrt(width) for all other layers, which is 0.02 at width 1,156 and 0.06 at 128."""
    target_layers: int = 1
    """The targets come from this many top layers, each instance-normalised. 1: the last layer, unchanged."""
    target_mode: Literal["mean", "separate"] = "mean"
    """The targets of several layers: their mean, or each layer's own, which the predictor predicts side by side."""


@dataclass(frozen=True)
class MaskConfig:
    """Visible patches of the context encoder and target patches of the predictor."""

    mask: Literal["random", "block", "time-frequency", "curriculum", "inverse-block"] = "random"
    """Mask family: random patches (Audio-JEPA), blocks (I-JEPA), time-frequency blocks (A-JEPA), a curriculum from
    blocks to time-frequency blocks (A-JEPA), or inverse blocks, of which only the blocks are visible (EAT)."""
    mask_ratio: tuple[float, float] = (0.4, 0.6)
    """Random masks: the share of masked patches, drawn uniformly from this range for each batch. Inverse-block masks:
    the middle of the range is the share in every clip. --min-context limits both."""
    inverse_block_size: tuple[int, int] = (5, 5)
    """Inverse-block masks: height and width of a visible block in patches."""
    block_targets: int = 4
    """Block masks: number of target blocks."""
    block_scale: tuple[float, float] = (0.15, 0.2)
    """Block masks: the area of a target block as a share of all patches."""
    block_aspect: tuple[float, float] = (0.75, 1.5)
    """Block masks: height / width of a target block, each as a share of the grid's side."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Block and time-frequency masks: the area of the context block as a share of all patches."""
    tf_targets: int = 3
    """Time-frequency masks: number of target blocks."""
    tf_scale: tuple[float, float] = (0.05, 0.075)
    """Time-frequency masks: the area of a target block as a share of all patches."""
    curriculum_c0: float = 0.01
    """Curriculum: the probability of a time-frequency mask at the first step."""
    min_context: int = 10
    """Smallest number of visible patches in a clip."""
    masks_per_clip: int = 1
    """Number of masks per clip. They share one pass of the target encoder."""
    fixed_token_budget: bool = False
    """Give every (micro-)batch the same number of visible and of target patches, so that shapes are static and all
    ranks have the same number. The clips of a batch may still differ."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted: masked patches, the clip as a whole, or both."""

    objective: Literal["masked", "clip", "both"] = "masked"
    """masked: latents of masked patches (JEPA). clip: views of a recording agree with each other, judged by the pooled
    latents of their visible patches. both: the sum, over one pass of the context encoder."""
    clip_loss: Literal["lejepa", "byol", "utterance"] = "lejepa"
    """Clip objective. lejepa: projections of the views agree, and SIGReg keeps them Gaussian; no teacher (arXiv
    2511.08544). byol: a predictor matches the EMA teacher's projections of the other views. utterance: the pooled
    latents predict the mean of the EMA teacher's targets of the same view (EAT, arXiv 2401.03497)."""
    clip_weight: float = 1.0
    """Weight of the clip objective beside the masked one, whose weight is 1."""
    sigreg_weight: float = 0.05
    """Weight l of SIGReg; the agreement of the views has 1 - l. It grows with the batch: keep l times the number of
    recordings a step near 5."""
    sigreg_directions: int = 256
    """Number of random directions on which SIGReg compares the projections with a Gaussian."""
    projector_hidden: int = 512
    """Width of the projector's hidden layer."""
    projector_width: int = 128
    """Width of the projections."""
    views: int = 2
    """Views of each recording in a step of the clip objective."""
    source_seconds: float | None = None
    """Length in seconds of the section of a recording from which its views of --clip-seconds are cropped. None: two
    and a half times --clip-seconds."""
    view_time: tuple[float, float] = (0.6, 1.0)
    """A view shows this share of a crop, drawn uniformly and stretched to the whole length. 1 1: no stretching."""
    view_bands: tuple[float, float] = (0.8, 1.2)
    """A view shows this share of the mel axis, drawn uniformly and stretched to all bands. 1 1: no stretching."""
    view_gain_db: float = 6.0
    """Each view gets a random gain, uniform between minus and plus this many dB."""
    view_equaliser_db: float = 4.0
    """Standard deviation in dB of a random smooth filter with five knots along the mel axis. 0: none."""
    view_mix: float = 0.5
    """Chance that another recording of the batch is mixed into a view as background."""
    view_mix_db: tuple[float, float] = (5.0, 20.0)
    """Level of the background below the view in dB, drawn uniformly."""
    teacher: str | None = None
    """Run or checkpoint whose encoder gives the targets unchanged, in place of the EMA target encoder (SALT, arXiv
    2509.24317). None: the EMA of the trained encoder."""

    @property
    def masks(self) -> bool:
        """Whether latents of masked patches are predicted."""
        return self.objective != "clip"

    @property
    def clips(self) -> bool:
        """Whether views of a recording are compared."""
        return self.objective != "masked"

    @property
    def taught(self) -> bool:
        """Whether a target encoder exists."""
        return self.masks or self.clip_loss != "lejepa"

    @property
    def count(self) -> int:
        """Views of each recording in a step."""
        return self.views if self.clips else 1


@dataclass(frozen=True)
class OptimConfig:
    """Loss, optimiser and schedules."""

    batch_size: int = 256
    """Recordings per step, counted over all ranks. The masked objective takes one clip of each, the others --views."""
    steps: int = 100_000
    """Number of training steps."""
    lr: float = 3e-4
    """Peak learning rate."""
    lr_start: float = 1e-6
    """Learning rate at the first step of the warm-up."""
    warmup_steps: int = 1_000
    """Steps in which the learning rate rises linearly from --lr-start to --lr. --schedule says what follows."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """Learning rate after the warm-up. cosine: falls to --lr-end along a cosine. constant: stays at --lr. wsd: stays,
    and falls to --lr-end in the last --decay-share of the steps (warm-up, stable, decay; arXiv 2404.06395). With
    constant and wsd nothing before the decay depends on --steps, so that a run can be extended."""
    decay_share: float = 0.2
    """Share of the steps in which --schedule wsd lowers the learning rate, in proportion to 1 - sqrt(progress) (arXiv
    2405.18392)."""
    lr_end: float = 0.0
    """Learning rate at the last step. --schedule constant does not reach it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = 0.05
    """Weight decay of matrices at the first step. Biases, norms and the mask token have none."""
    weight_decay_end: float | None = None
    """Weight decay at the last step, reached by a cosine. None: constant."""
    ema_start: float = 0.996
    """EMA decay of the target encoder at the first step. With --schedule constant or wsd it is that of all steps. With
    1 at both ends the target encoder stays as it is, and the run gives the trained encoder instead."""
    ema_end: float = 1.0
    """EMA decay of the target encoder at the last step. --schedule constant and wsd do not use it."""
    ema_schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the EMA schedule between its two ends."""
    loss: Literal["l2", "smooth_l1", "cosine"] = "l2"
    """Distance between predictions and layer-normalised targets."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. None: no clipping."""
    max_bad_steps: int = 10
    """The run stops after this many non-finite steps in a row."""

    @property
    def decay_steps(self) -> int:
        """Number of steps at the end of --schedule wsd that lower the learning rate."""
        return max(1, round(self.decay_share * self.steps))

    @property
    def stable_steps(self) -> int:
        """Number of steps before the decay of --schedule wsd; all steps with another schedule."""
        return self.steps - (self.decay_steps if self.schedule == "wsd" else 0)


@dataclass(frozen=True)
class StepConfig:
    """How the fused engine computes a step. These settings change speed and memory; results change only by rounding."""

    micro_batch: int | None = None
    """Clips that are computed at once, to save memory. The gradients of a batch's parts are summed. None: the whole
    batch."""
    recompute: bool = False
    """Save memory by computing a block's activations again in backward. About a third slower."""
    cuda_graph: bool = True
    """Replay the step as a CUDA graph wherever its shapes recur."""
    parallel_encoders: bool = False
    """Run target and context encoder on two CUDA streams."""
    overlap_front_end: bool = False
    """Load a batch and compute its patches on a CUDA stream of lower priority, while the step before it still runs.
    Takes memory for one more batch of patches."""
    residual: Literal["fp32", "bf16-gradient", "in-product", "bf16"] = "fp32"
    """Precision of the residual stream if the step computes in bf16. bf16-gradient: a float32 stream, whose gradient is
    rounded to bf16 in each layer. in-product: the same, and the matrix products add to the stream instead of the layer
    norms."""
    mlp: Literal["auto", "plain", "bias-gelu", "epilogue"] = "auto"
    """plain: PyTorch's GELU. bias-gelu: bias and GELU in one kernel, whose backward computes both gradients in one
    pass. epilogue: both within the matrix products. auto: bias-gelu on a GPU, plain on a CPU."""
    target_precision: Literal["same", "fp8"] = "same"
    """fp8: the target encoder's blocks multiply in 8 bits (GPUs from compute capability 8.9). Changes the targets."""
    reduce: Literal["fp32", "bf16"] = "fp32"
    """Precision in which several ranks sum their gradients. bf16 sends half the bytes and rounds every partial sum."""
    profile: int = 0
    """Number of steps to profile, after the first ten. Writes trace.json and prints where the time went. 0: none."""

    def sizes(self, batch: int) -> list[int]:
        """Number of clips in each micro-batch."""
        size = self.micro_batch or batch
        return [min(size, batch - i) for i in range(0, batch, size)]


@dataclass(frozen=True)
class WatchConfig:
    """Log lines, evaluation of the features during training, and checkpoints."""

    log_every: int = 10
    """Steps between two log lines."""
    log_to: str = "tensorboard"
    """Where the metrics go besides metrics.jsonl, separated by commas: tensorboard, wandb. none: nowhere else."""
    watch_every: int = 1_000
    """Steps between two evaluations of the features: variance, effective rank and kNN."""
    eval_data: str | None = None
    """Recordings on which the features are evaluated; the kNN needs labels. None: a part of --data."""
    eval_where: str | None = None
    """Rows of --eval-data to use. None: all rows."""
    eval_label: str | None = None
    """Column that holds the labels of --eval-data. None: as for --label."""
    eval_test: str | None = None
    """Rows that the kNN classifies, such as "fold=4"; the other rows are the neighbours. None: every fourth clip."""
    eval_clips: int = 1_000
    """Largest number of clips in an evaluation."""
    pooling: Pooling = "mean"
    """How the latents of a recording are pooled. mean: over all patches (as the authors do). concat: over the time of
    each frequency row, side by side. +std: also their deviations. projection: the projector of a clip objective."""
    checkpoint_every: int = 1_000
    """Steps between two checkpoints."""
    keep: int = 3
    """Number of checkpoints kept."""
    compare_steps: int = 5
    """Steps of each engine in the comparison with plain PyTorch after the training. 0: no comparison."""

    @property
    def loggers(self) -> tuple[str, ...]:
        """The names in `log_to`, each once."""
        names = (name.strip() for name in self.log_to.split(","))
        return tuple(dict.fromkeys(name for name in names if name and name != "none"))


@dataclass(frozen=True)
class Config:
    """Pretrain a joint-embedding predictive architecture on audio."""

    preset: Literal["tiny", "tiny-clip", "audio-jepa", "a-jepa", "clip-jepa", "eat"] = "tiny"
    """The recipe whose values all other settings take by default. tiny trains on a CPU in about two minutes, tiny-clip
    in about ten. audio-jepa and a-jepa are published recipes; clip-jepa and eat follow LeJEPA and EAT."""
    out: str | None = None
    """Run folder. None: runs/<preset>."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint, exactly as if it had not stopped. With --steps, a run of
    --schedule constant or wsd is extended."""
    overwrite: bool = False
    """Start anew where --out holds a run. The old folder is kept under another name; on a terminal you are asked."""
    config: str | None = None
    """Settings that take the place of the preset's: the config.json of a run, or a YAML file with any of the flags,
    nested or not. Flags come on top."""
    init_from: str | None = None
    """Start from these weights: a run, one of its checkpoints, an exported encoder, or an id on the Hugging Face hub.
    Optimiser, schedules and data start anew."""
    cooldown_from: str | None = None
    """Run or checkpoint of --schedule constant or wsd that this run continues with its weights, optimiser and data, for
    --steps more steps in which the learning rate falls. All other settings are those of that run."""
    impl: Impl = "fused"
    """Engine. fused: the kernels of ajepa. reference: plain PyTorch. compile: plain PyTorch under torch.compile."""
    compare: bool = False
    """Instead of training, send the same batches through plain PyTorch and --impl in turn, and print clips/s."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. auto: the GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the computation; weights are always fp32. auto: bf16 on a GPU and on a CPU with instructions
    for it, else fp32."""
    threads: int = 0
    """CPU threads of torch. 0: as many as there are free cores when the run starts (in a script of your own: torch's
    number). The run keeps their number, because the last bits of its results depend on it."""
    pin_cores: bool = True
    """Under torchrun, bind each rank of a machine to cores of its own, near its GPU, unless the launcher has done so.
    Leave them unbound where several runs share a machine."""
    parallel: Literal["ddp", "zero1", "fsdp"] = "ddp"
    """Under torchrun. ddp: every rank holds and updates the whole model. zero1: every rank updates a part of it, with
    the moments of that part only, and gathers the rest. fsdp: every rank holds a shard of it (FSDP2, for models that do
    not fit otherwise, without CUDA graphs)."""
    rank_timeout: float = 50.0
    """Seconds that a rank waits for another rank within a step before the run ends with an error."""
    seed: int = 0
    """Seed of initialisation, crops, gains and masks."""
    data: DataConfig = field(default_factory=DataConfig)
    front_end: LogMelSpec = field(default_factory=lambda: LOG_MEL_PRESETS["audio-jepa"])
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    step: StepConfig = field(default_factory=StepConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or f"runs/{self.preset}")

    @property
    def network(self) -> str:
        """The network whose features a run is judged by: the EMA target encoder, or the trained one where there is no
        target encoder or it stays as it is."""
        frozen = self.objective.teacher is not None or self.optim.ema_start == self.optim.ema_end == 1
        return "target_encoder" if self.objective.taught and not frozen else "context_encoder"

    @property
    def source_seconds(self) -> float:
        """Length in seconds of what the loader reads of each recording."""
        if not self.objective.clips:
            return self.data.clip_seconds
        return self.objective.source_seconds or 2.5 * self.data.clip_seconds


PRESETS: dict[str, Config] = {
    # arXiv 2507.02915; where paper and code differ, the paper's figure.
    "audio-jepa": Config(preset="audio-jepa"),
    # arXiv 2311.15830: 24 epochs of AudioSet-2M (1.92 M clips) at batch 512. The predictor has 512 / 32 = 16 heads.
    "a-jepa": Config(
        preset="a-jepa",
        data=DataConfig(gain_db=6.0),
        front_end=LOG_MEL_PRESETS["a-jepa"],
        model=ModelConfig(predictor_width=512, predictor_depth=16, predictor_heads=16),
        mask=MaskConfig(mask="curriculum"),
        optim=OptimConfig(batch_size=512, steps=90_000, lr=2e-4, warmup_steps=5_000),
    ),
    # The clip objective of LeJEPA (arXiv 2511.08544). The weight of SIGReg and the number of directions are those of a
    # public implementation, stable-pretraining; weight x recordings is near 5. The other numbers are our own.
    "clip-jepa": Config(
        preset="clip-jepa",
        data=DataConfig(clip_seconds=5.0),
        front_end=dataclasses.replace(LOG_MEL_PRESETS["a-jepa"], n_frames=512),
        model=ModelConfig(size="S", init="fan-in"),
        mask=MaskConfig(mask_ratio=(0.5, 0.5)),
        objective=ObjectiveConfig(
            objective="clip",
            sigreg_weight=0.02,
            sigreg_directions=1_024,
            projector_hidden=2_048,
            projector_width=512,
            source_seconds=10.0,
        ),
        optim=OptimConfig(lr=5e-4, warmup_steps=5_000),
        watch=WatchConfig(pooling="concat+std"),
    ),
    # After EAT (arXiv 2401.03497): 16 masks of inverse blocks a clip, the mean of twelve layers as target, an utterance
    # term of weight 1, 400,000 steps of 48 clips. Its decoder is convolutional, this predictor a transformer.
    "eat": Config(
        preset="eat",
        front_end=LOG_MEL_PRESETS["a-jepa"],
        model=ModelConfig(predictor_width=192, predictor_depth=4, predictor_heads=6, target_layers=12),
        mask=MaskConfig(mask="inverse-block", mask_ratio=(0.8, 0.8), masks_per_clip=16),
        objective=ObjectiveConfig(
            objective="both",
            clip_loss="utterance",
            sigreg_weight=0.0,
            views=1,
            source_seconds=10.0,
            view_time=(1.0, 1.0),
            view_bands=(1.0, 1.0),
            view_gain_db=0.0,
            view_equaliser_db=0.0,
            view_mix=0.0,
        ),
        optim=OptimConfig(
            batch_size=48,
            steps=400_000,
            lr=5e-4,
            warmup_steps=53_000,
            ema_start=0.9998,
            ema_end=0.99999,
            ema_schedule="linear",
        ),
    ),
    "tiny": Config(
        preset="tiny",
        data=DataConfig(clip_seconds=2.0),
        front_end=LogMelSpec(
            sample_rate=16_000,
            n_fft=1024,
            win_length=752,
            hop_length=496,
            n_mels=64,
            f_min=20.0,
            n_frames=64,
            waveform_norm="peak",
            floor=0.05,  # hides faint background, of which a small model would otherwise learn more than of the sound
            std=3.0,
            patch=(8, 8),
        ),
        model=ModelConfig(
            size="tiny", predictor_width=64, predictor_depth=2, predictor_heads=4, init="fan-in", target_layers=4
        ),
        mask=MaskConfig(mask_ratio=(0.5, 0.7)),
        # Views, weights and masks were chosen on a synthetic set of another seed; see docs/recipes.md.
        objective=ObjectiveConfig(
            objective="both",
            sigreg_weight=0.2,
            source_seconds=5.0,
            view_time=(0.8, 1.0),
            view_bands=(0.6, 1.4),
            view_mix=0.3,
        ),
        optim=OptimConfig(batch_size=16, steps=1_000, lr=1e-3, warmup_steps=100, ema_start=0.99),
        watch=WatchConfig(
            log_every=50,
            watch_every=250,
            checkpoint_every=250,
            eval_clips=2_000,
            pooling="concat+std",
            compare_steps=20,  # a step takes a tenth of a second
        ),
    ),
}
_TINY = PRESETS["tiny"]
# The clip objective alone, for about twenty core-minutes. Chosen on fold 3 of ESC-50, by runs of two core-minutes on
# folds 1 and 2; docs/recipes.md says what was compared.
PRESETS["tiny-clip"] = dataclasses.replace(
    _TINY,
    preset="tiny-clip",
    data=dataclasses.replace(_TINY.data, resident_gb=0.5),  # decoding would take longer than the steps
    mask=MaskConfig(mask_ratio=(0.6, 0.8)),
    objective=ObjectiveConfig(objective="clip", sigreg_weight=0.1, view_bands=(0.75, 1.25), source_seconds=5.0),
    optim=OptimConfig(batch_size=48, steps=8_000, lr=1.5e-3, warmup_steps=800),
    watch=dataclasses.replace(_TINY.watch, watch_every=2_000, checkpoint_every=1_000),
)

_MAY_CHANGE = {
    "resume", "device", "log_every", "log_to", "decoder", "loader_threads", "threads", "prefetch", "checkpoint_every",
    "keep", "out",
    "micro_batch", "recompute", "cuda_graph", "parallel_encoders", "profile", "parallel", "rank_timeout", "resident",
    "resident_gb", "compare_steps", "overlap_front_end", "overwrite", "config", "reduce",
    "pin_cores",
}  # fmt: skip
BUDGET = {"steps", "schedule", "decay_share"}  # may change too, where the schedules of all steps done stay as they were
_OF_THE_FOLDER = {"out", "resume", "overwrite", "config", "cooldown_from"}  # not taken over from another run


FIRST_FLAGS = ("preset", "data", "out", "resume", "steps", "batch_size", "size", "eval_data", "device", "compare")


def preset(name: str, **overrides: Any) -> Config:
    """The recipe `name`, with the settings in `overrides` changed.

    Args:
        name: one of `PRESETS`, such as "tiny" or "audio-jepa".
        overrides: any flag of `python -m ajepa.train` by its name with underscores, such as `batch_size=32`.

    Raises:
        ConfigError: an unknown recipe or setting, or an invalid value.

    Example::

        cfg = ajepa.preset("tiny", data="recordings", steps=200, out="runs/mine")
        summary = ajepa.train(cfg)
    """
    source = overrides.get("config")
    values = read_settings(Path(source)) if source else {}
    cfg = _with({**values, "preset": name, **overrides}, _recipe(name))
    cfg = dataclasses.replace(cfg, out=cfg.out or str(cfg.folder))
    validate(cfg)
    return cfg


def parse(argv: list[str] | None = None) -> Config:
    """The configuration of a command line.

    Its flags come on top of the file of --config, and that on top of the settings of a run (with --resume or
    --cooldown-from) or else of a preset.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "out", "config", "cooldown_from"):
        known.add_argument(f"--{name}", flag(name))
    known.add_argument("--resume", action="store_true")
    early = known.parse_known_args(argv)[0]
    values = read_settings(Path(expanded(early.config))) if early.config else {}
    name = early.preset or values.get("preset", "tiny")
    saved = Path(expanded(early.out or values.get("out") or f"runs/{name}")) / "config.json"
    if early.resume and saved.exists():
        base = load(saved)
    elif early.cooldown_from:
        base = cooldown_of(Path(expanded(early.cooldown_from)))
    else:
        base = _recipe(name)
    base = _with(values, base)
    try:
        cfg = cli.parse(Config, argv, "python -m ajepa.train", default=base, first=FIRST_FLAGS)
    except (ValueError, OverflowError) as error:  # raised by an invalid front end
        raise ConfigError(str(error)) from error
    cfg = dataclasses.replace(cfg, out=cfg.out or str(cfg.folder))
    validate(cfg)
    return cfg


def read_settings(path: Path) -> dict[str, Any]:
    """{setting: value} of the file of --config. Raises ConfigError, which names a setting that does not exist."""
    import yaml

    try:
        tree = read_json(path) if path.suffix == ".json" else yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, UserError) else f"it is not YAML: {' '.join(str(error).split())}"
        raise ConfigError(f"--config {path}: {reason}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f'--config {path}: it holds no settings, such as "steps: 1000"')
    values = _flat(tree, PRESETS["tiny"])
    _check_names(values, f"--config {path}: ")
    of_a_run = path.name == "config.json" and kind_of(path.parent) == "run"
    return {name: value for name, value in values.items() if not (of_a_run and name in _OF_THE_FOLDER)}


def _flat(tree: dict, node: Any) -> dict[str, Any]:
    """The leaves of `tree`, whose branches may be the sections of `node`, such as optim."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = str(key).replace("-", "_")
        section = getattr(node, name, None)
        found |= _flat(value, section) if isinstance(value, dict) and _is_section(section) else {name: value}
    return found


def _is_section(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _check_names(names: Iterable[str], where: str = "") -> None:
    known = [name for name, _ in leaves(PRESETS["tiny"])]
    wrong = sorted(set(names) - set(known))
    if wrong:
        near = [difflib.get_close_matches(name, known, 1) for name in wrong]
        hints = [
            f"{name} (did you mean {found[0]}?)" if found else name for name, found in zip(wrong, near, strict=True)
        ]
        raise ConfigError(
            f"{where}there is no setting {', '.join(hints)}: python -m ajepa.train --help-all lists them all"
        )


def _with(values: dict[str, Any], base: Config) -> Config:
    """`base` with the settings in `values` changed. Raises ConfigError for unknown names and invalid values."""
    from pydantic import TypeAdapter, ValidationError

    _check_names(values)
    try:
        return expanded(TypeAdapter(Config).validate_python(dataclasses.asdict(_replace(base, values))))
    except (ValueError, TypeError, OverflowError) as error:
        reasons = [str(error)]
        if isinstance(error, ValidationError):
            reasons = [f"{wrong['loc'][-1]}: {wrong['msg']}" for wrong in error.errors()]
        raise ConfigError("; ".join(reasons)) from error


def cooldown_of(source: Path) -> Config:
    """What a run takes over with --cooldown-from `source`. `steps` is the default number of steps of the cooldown."""
    old = load(run_of(source) / "config.json")
    share = old.optim.decay_share
    steps = max(1, round(old.optim.steps * share / (1 - share)))
    fresh = {f.name: f.default for f in dataclasses.fields(Config) if f.name in {*_OF_THE_FOLDER, "init_from"}}
    return _replace(old, {**fresh, "schedule": "wsd", "steps": steps, "cooldown_from": str(source)})


def changes(old: Config, new: Config, besides: set[str]) -> list[str]:
    """The flags in which a run differs from the one that it continues, and must not. `besides` may differ, too."""
    return [
        f"{flag(name)} {value!r} (the run has {before!r})"
        for (name, before), (_, value) in zip(leaves(old), leaves(new), strict=True)
        if before != value and name not in _MAY_CHANGE | besides
    ]


def check_resume(cfg: Config) -> None:
    """Raise ConfigError where `cfg` continues a run and changes a setting that must stay."""
    saved = cfg.folder / "config.json"
    changed = changes(load(saved), cfg, BUDGET) if cfg.resume and saved.exists() else []
    if changed:
        raise ConfigError(
            f"--resume continues {cfg.out} as it began; leave out {', '.join(changed)}, or start a new run: in its "
            f"place with --overwrite, or from its weights with --init-from {cfg.out} and another --out"
        )


def save(cfg: Config, path: Path) -> None:
    """Write `cfg`. The next start decides anew whether it continues the run or replaces it."""
    write_json(path, dataclasses.asdict(dataclasses.replace(cfg, resume=False, overwrite=False)))


def load(path: Path) -> Config:
    """The configuration in the `config.json` of a run folder. Raises ConfigError for any other file."""
    from pydantic import TypeAdapter, ValidationError

    try:
        raw = read_json(path)
        cfg = TypeAdapter(Config).validate_python(raw)
        _validate_numbers(cfg)
    except UserError as error:
        raise ConfigError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, OverflowError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            reason = "; ".join(f"{wrong['loc'][-1]}: {wrong['msg']}" for wrong in error.errors())
        raise ConfigError(f"{path} is not a configuration of ajepa: {reason}") from error
    unknown = _keys(raw) - _keys(dataclasses.asdict(cfg))
    if unknown:
        raise ConfigError(f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}")
    return cfg


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _validate_numbers(cfg: Config) -> None:
    """Raise ConfigError for numbers that nothing can compute with, whatever they mean."""
    for name, value in leaves(cfg):
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                _need(math.isfinite(number), f"{flag(name)} {number}: must be a finite number")
            elif isinstance(number, int) and name != "seed":
                _need(abs(number) < 2**31, f"{flag(name)} {number}: too large")
    if cfg.front_end.n_frames is not None:
        try:
            patches = cfg.front_end.n_patches
        except ValueError as error:  # a patch that does not divide the grid
            raise ConfigError(f"--patch: {error}") from error
        _need(patches <= MOST_PATCHES,
              f"--n-frames {cfg.front_end.n_frames} gives {patches:,} patches a clip, and {MOST_PATCHES:,} are the "
              "most: lower it or choose a larger --patch")  # fmt: skip


def validate(cfg: Config) -> None:
    """Raise ConfigError for an invalid setting, naming it and the remedy."""
    data, spec, model, mask, optim, watch = cfg.data, cfg.front_end, cfg.model, cfg.mask, cfg.optim, cfg.watch
    need = _need
    _validate_numbers(cfg)
    for name in watch.loggers:
        need(name in LOGGERS, f"--log-to {watch.log_to}: choose of {', '.join(LOGGERS)}, or none")
        found = importlib.util.find_spec(name)  # without an origin, it is only a folder of that name
        need(found is not None and found.origin is not None,
             f"--log-to {name}: the package {name} is not installed: pip install {name}")  # fmt: skip
    need(0 <= cfg.seed < 2**62, f"--seed {cfg.seed}: must be 0 or more, and below 2^62")
    for name, value in {"loader_threads": data.loader_threads, "threads": cfg.threads,
                        "warmup_steps": optim.warmup_steps, "compare_steps": watch.compare_steps,
                        "curriculum_c0": mask.curriculum_c0}.items():  # fmt: skip
        need(value >= 0, f"{flag(name)} {value}: must not be negative")
    need(1 <= spec.sample_rate <= 384_000, f"--sample-rate {spec.sample_rate}: 1 to 384,000 Hz can be resampled to")
    need(cfg.rank_timeout <= 86_400, f"--rank-timeout {cfg.rank_timeout}: a day (86400 s) is the most")
    need(model.predictor_depth <= 1000, f"--predictor-depth {model.predictor_depth}: 1000 blocks are the most")
    need(data.gain_db <= 100, f"--gain-db {data.gain_db}: 100 dB are the most")
    need(mask.curriculum_c0 <= 1, f"--curriculum-c0 {mask.curriculum_c0}: a chance is 1 at most")
    positive = {
        "clip_seconds": data.clip_seconds, "prefetch": data.prefetch, "batch_size": optim.batch_size,
        "steps": optim.steps, "lr": optim.lr, "max_bad_steps": optim.max_bad_steps, "log_every": watch.log_every,
        "watch_every": watch.watch_every, "checkpoint_every": watch.checkpoint_every, "keep": watch.keep,
        "masks_per_clip": mask.masks_per_clip, "min_context": mask.min_context, "block_targets": mask.block_targets,
        "tf_targets": mask.tf_targets, "predictor_depth": model.predictor_depth, "target_layers": model.target_layers,
        "rank_timeout": cfg.rank_timeout, "predictor_width": model.predictor_width, "eval_clips": watch.eval_clips,
        "float_scale": data.float_scale,
    }  # fmt: skip
    for name, value in positive.items():
        need(value > 0, f"{flag(name)} {value}: must be above 0")
    for name, (low, high) in {
        "mask_ratio": mask.mask_ratio, "block_scale": mask.block_scale, "tf_scale": mask.tf_scale,
        "context_scale": mask.context_scale, "block_aspect": mask.block_aspect,
    }.items():  # fmt: skip
        limit = 8.0 if name == "block_aspect" else 1.0
        need(0 < low <= high <= limit, f"{flag(name)} {low} {high}: must be 0 < low <= high <= {limit:g}")
    need(min(mask.inverse_block_size) > 0,
         f"--inverse-block-size {' '.join(map(str, mask.inverse_block_size))}: must be above 0")  # fmt: skip
    need(cfg.step.micro_batch is None or 0 < cfg.step.micro_batch <= optim.batch_size,
         f"--micro-batch {cfg.step.micro_batch}: must be between 1 and --batch-size {optim.batch_size}")  # fmt: skip
    need(cfg.step.profile >= 0, f"--profile {cfg.step.profile}: a number of steps, 0 for none")
    need(mask.mask_ratio[1] < 1, f"--mask-ratio {mask.mask_ratio}: a ratio of 1 leaves the context empty; stay below 1")
    counted = cfg.cooldown_from is None  # of a cooldown, `steps` may not count the run before it yet
    need(not counted or optim.warmup_steps < optim.steps,
         f"--warmup-steps {optim.warmup_steps} does not fit in --steps {optim.steps}: lower it")  # fmt: skip
    need(0 < optim.decay_share < 1, f"--decay-share {optim.decay_share}: must be above 0 and below 1")
    need(not counted or optim.schedule != "wsd" or optim.warmup_steps + optim.decay_steps <= optim.steps,
         f"--warmup-steps {optim.warmup_steps} and {optim.decay_steps} steps of decay do not fit in --steps "
         f"{optim.steps}: lower --warmup-steps or --decay-share")  # fmt: skip
    need(optim.schedule == "cosine" or optim.weight_decay_end is None,
         f"--schedule {optim.schedule} keeps the weight decay as it is: leave out --weight-decay-end")  # fmt: skip
    need(0 <= optim.ema_start <= optim.ema_end <= 1,
         f"--ema-start {optim.ema_start}, --ema-end {optim.ema_end}: must be 0 <= start <= end <= 1")  # fmt: skip
    need(all(0 <= b < 1 for b in optim.betas), f"--betas {optim.betas}: each must be in [0, 1)")
    need(min(optim.weight_decay, optim.weight_decay_end or 0, optim.lr_start, optim.lr_end, data.gain_db,
             data.resident_gb) >= 0,
         "--weight-decay, --weight-decay-end, --lr-start, --lr-end, --gain-db and --resident-gb must not be "
         "negative")  # fmt: skip
    need(optim.clip_norm is None or optim.clip_norm > 0, "--clip-norm must be above 0, or None for no clipping")
    need(data.clip_seconds <= 86_400, f"--clip-seconds {data.clip_seconds}: a day is the most")
    samples = round(data.clip_seconds * spec.sample_rate)
    need(samples >= spec.win_length,
         f"--clip-seconds {data.clip_seconds} holds {samples} samples, less than one window "
         f"(--win-length {spec.win_length}): lengthen the clip")  # fmt: skip
    frames, wanted = spec.frames(samples), spec.n_frames
    if wanted is None:
        raise ConfigError("--n-frames must be set: the encoder has a fixed grid of patches")
    need(frames <= wanted,
         f"--clip-seconds {data.clip_seconds} gives {frames} frames, --n-frames {wanted} would drop {frames - wanted} "
         "of them: shorten the clip or raise --n-frames")  # fmt: skip
    n_patches = spec.n_patches
    need(n_patches >= 8, f"--patch {spec.patch} leaves {spec.n_patches} patches a clip: at least 8 are needed")
    need(mask.min_context <= spec.n_patches // 2,
         f"--min-context {mask.min_context}: a clip has {spec.n_patches} patches; ask for half at most")  # fmt: skip
    width, depth, heads = SIZES[model.size]
    need(model.target_layers <= depth, f"--target-layers {model.target_layers}: --size {model.size} has {depth} layers")
    for what, w, h in (("--size", width, heads), ("--predictor-width", model.predictor_width, model.predictor_heads)):
        need(h > 0 and w % h == 0 and (w // h) % 4 == 0,
             f"{what}: width {w} over {h} heads must give a head dim that is a multiple of 4")  # fmt: skip
    need(cfg.device != "cuda" or torch.cuda.is_available(), "--device cuda: no CUDA device is here; use --device cpu")
    ranks = os.environ.get("WORLD_SIZE", "1")
    need(ranks.isdecimal() and int(ranks) > 0, f"WORLD_SIZE={ranks}: not a number of processes; start with torchrun")
    need(optim.batch_size % int(ranks) == 0,
         f"--batch-size {optim.batch_size} is that of all ranks together: make it a multiple of {ranks}")  # fmt: skip
    need(ranks == "1" or cfg.impl != "compile", "--impl compile trains on one device: use --impl fused with several")
    need(cfg.step.reduce == "fp32" or cfg.impl == "fused",
         f"--reduce bf16: --impl {cfg.impl} takes gradients in the weights' precision; leave it out")  # fmt: skip
    need(ranks == "1" or not cfg.compare, "--compare measures one device: start it without torchrun")
    need(not (cfg.compare and cfg.resume), "--compare does not train: leave out --resume")
    need(not (cfg.overwrite and cfg.resume), "--resume continues the run that --overwrite replaces: choose one")
    need(not (cfg.init_from and cfg.cooldown_from),
         "--cooldown-from continues a run with its weights: leave out --init-from")  # fmt: skip
    _validate_objective(cfg, need)


def _validate_objective(cfg: Config, need: Callable[[bool, str], None]) -> None:
    objective, data, optim = cfg.objective, cfg.data, cfg.optim
    for name in ("views", "sigreg_directions", "projector_hidden", "projector_width"):
        need(getattr(objective, name) > 0, f"{flag(name)} {getattr(objective, name)}: must be above 0")
    for name in ("clip_weight", "sigreg_weight", "view_gain_db", "view_equaliser_db", "view_mix"):
        need(getattr(objective, name) >= 0, f"{flag(name)} {getattr(objective, name)}: must not be negative")
    for name, least, most in (("view_time", 0.05, 1.0), ("view_bands", 0.05, 4.0), ("view_mix_db", 0.0, 100.0)):
        low, high = getattr(objective, name)
        need(least <= low <= high <= most,
             f"{flag(name)} {low} {high}: must be {least:g} <= low <= high <= {most:g}")  # fmt: skip
    need(objective.view_mix <= 1, f"--view-mix {objective.view_mix}: a chance is 1 at most")
    need(objective.sigreg_weight <= 1, f"--sigreg-weight {objective.sigreg_weight}: a share of the loss is 1 at most")
    for name in ("view_gain_db", "view_equaliser_db"):
        need(getattr(objective, name) <= 100, f"{flag(name)} {getattr(objective, name)}: 100 dB are the most")
    need(objective.teacher is None or (objective.masks or objective.clip_loss == "utterance"),
         "--teacher gives targets of masked patches or of utterances: add --objective masked or both")  # fmt: skip
    need(objective.teacher is None or cfg.parallel != "fsdp", "--teacher is loaded whole: leave out --parallel fsdp")
    need(cfg.model.target_mode == "mean" or cfg.model.target_layers > 1,
         "--target-mode separate needs --target-layers above 1")  # fmt: skip
    if cfg.watch.pooling == "projection":
        need(objective.clips, "--pooling projection needs the projector of --objective clip or both")
    if not objective.clips:
        return
    need(
        objective.views > 1 or objective.clip_loss == "utterance", "--views 1: only --clip-loss utterance has one view"
    )
    need(optim.batch_size * objective.views > 2,
         f"--batch-size {optim.batch_size}: the clip objective compares recordings of a batch; raise it")  # fmt: skip
    need(cfg.source_seconds >= data.clip_seconds,
         f"--source-seconds {objective.source_seconds}: views of --clip-seconds {data.clip_seconds} are cropped from "
         "it; lengthen it")  # fmt: skip
    need(cfg.source_seconds <= 86_400, f"--source-seconds {objective.source_seconds}: a day is the most")
    need(
        cfg.front_end.top_db is None, "--top-db: views have no clip maximum; leave it out with --objective clip or both"
    )
    need(cfg.step.micro_batch is None,
         "--micro-batch: the clip objective compares all recordings of a batch; use --recompute to save "
         "memory")  # fmt: skip
    need(
        cfg.parallel != "fsdp",
        "--parallel fsdp shards masked pretraining only; leave it out with --objective clip or both",
    )


def _recipe(name: str) -> Config:
    if name not in PRESETS:
        raise ConfigError(f"--preset {name}: unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _replace(node: Any, values: dict[str, Any]) -> Any:
    """A copy of a dataclass instance, and of those nested in it, with the fields in `values` changed."""
    fields = {}
    for field_ in dataclasses.fields(node):
        old = getattr(node, field_.name)
        fields[field_.name] = _replace(old, values) if dataclasses.is_dataclass(old) else values.get(field_.name, old)
    return dataclasses.replace(node, **fields)


def _keys(tree: dict) -> set[str]:
    return {key for k, v in tree.items() for key in ({k} | _keys(v) if isinstance(v, dict) else {k})}
