"""Every setting of a run, as frozen dataclasses, and the presets. All fields are flags of `python -m ajepa.train`."""

import argparse
import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ajepa.utils.atomic_files import write_atomic
from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec

Impl = Literal["fused", "reference", "compile"]
SIZES = {"tiny": (128, 4, 4), "S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, layers, heads


class ConfigError(ValueError):
    """A setting, or a combination of settings, that cannot be run."""


@dataclass(frozen=True)
class DataConfig:
    data: str | None = None
    """Folder of recordings or of shards (ajepa.pack), CSV/JSONL manifest, or webdataset tars (glob, {000..010}).
    None: the synthetic set."""
    where: str | None = None
    """Rows of the manifest to train on, such as "fold=1,2,3"."""
    label: str | None = None
    """Manifest column that holds the label, where it is not found by its name."""
    clip_seconds: float = 10.0
    """Length of a training clip in seconds."""
    pad: Literal["cyclic", "zero"] = "cyclic"
    """How recordings shorter than a clip are filled."""
    gain_db: float = 0.0
    """Random gain of a clip, uniform in +- this many dB."""
    decoder: Literal["auto", "dali", "soundfile"] = "auto"
    """auto: DALI where it is installed, for the formats that it decodes faster than libsndfile; dali: for all that it
    decodes; soundfile: libsndfile alone."""
    float_scale: float = 1.0
    """Full scale of recordings in floating point, such as 32768 for samples written without scaling."""
    loader_threads: int = 0
    """Decoding threads; 0: one a core."""
    prefetch: int = 2
    """Batches decoded ahead."""
    resident: bool = False
    """Load all audio into the device's memory as PCM before the first step, where it fits."""


@dataclass(frozen=True)
class ModelConfig:
    size: Literal["tiny", "S", "B", "L"] = "B"
    """Encoder: width x layers x heads of 128 x 4 x 4, 384 x 12 x 6, 768 x 12 x 12, 1024 x 24 x 16."""
    predictor_width: int = 384
    predictor_depth: int = 6
    predictor_heads: int = 12
    positions: Literal["sincos", "rotary"] = "sincos"
    """Fixed 2-D sine-cosine positions, or 2-D rotary ones."""
    target_layers: int = 1
    """Targets are the mean of this many top layers, each instance-normalised; 1: the last layer as it is."""


@dataclass(frozen=True)
class MaskConfig:
    mask: Literal["random", "block", "time-frequency", "curriculum"] = "random"
    """Mask family: Audio-JEPA's random, I-JEPA's blocks, A-JEPA's time-frequency blocks, A-JEPA's curriculum."""
    mask_ratio: tuple[float, float] = (0.4, 0.6)
    """Share of patches masked (random), drawn uniformly for each batch."""
    block_targets: int = 4
    block_scale: tuple[float, float] = (0.15, 0.2)
    """Area of a target block as a share of all patches."""
    block_aspect: tuple[float, float] = (0.75, 1.5)
    """Height / width of a target block, in shares of the grid's sides."""
    context_scale: tuple[float, float] = (0.85, 1.0)
    """Area of the context block (block, time-frequency)."""
    tf_targets: int = 3
    tf_scale: tuple[float, float] = (0.05, 0.075)
    """Area of a target block of the time-frequency family."""
    curriculum_c0: float = 0.01
    """Chance of a time-frequency mask at the first step of the curriculum."""
    min_context: int = 10
    """Fewest visible patches of a context."""
    masks_per_clip: int = 1
    """Masks that share one pass of the target encoder."""
    fixed_token_budget: bool = False
    """The same number of visible and target patches in every (micro-)batch: static shapes; clips stay ragged."""


@dataclass(frozen=True)
class OptimConfig:
    batch_size: int = 256
    """Clips a step, of all ranks together."""
    steps: int = 100_000
    lr: float = 3e-4
    """Peak learning rate."""
    lr_start: float = 1e-6
    warmup_steps: int = 1_000
    """Linear warm-up from lr_start to lr; then a cosine to lr_end."""
    lr_end: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    """Last value of the cosine weight-decay schedule; None: constant."""
    ema_start: float = 0.996
    ema_end: float = 1.0
    ema_schedule: Literal["cosine", "linear"] = "cosine"
    loss: Literal["l2", "smooth_l1", "cosine"] = "l2"
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None: no clipping."""
    max_bad_steps: int = 10
    """Non-finite steps in a row after which the run stops."""


@dataclass(frozen=True)
class StepConfig:
    """How the fused engine computes a step: speed and memory, and no result but for rounding."""

    micro_batch: int | None = None
    """Clips at once; their gradients add up to the whole batch's. Less memory. None: the whole batch."""
    recompute: bool = False
    """Compute a block's activations again in backward instead of keeping them. Less memory, about a third slower."""
    cuda_graph: bool = True
    """Replay the step as a CUDA graph where its shapes recur."""
    parallel_encoders: bool = False
    """Target and context encoder on two CUDA streams."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Precision of the residual stream where the step computes in bf16."""
    mlp: Literal["plain", "bias-gelu", "epilogue"] = "plain"
    """bias-gelu: bias and GELU in one kernel, whose backward gives both gradients in one pass. epilogue: within the
    matrix products; with the tanh GELU, which differs from the exact one by less than 5e-4."""
    target_precision: Literal["same", "fp8"] = "same"
    """fp8: the target encoder's blocks multiply in 8 bits (GPUs from compute capability 8.9). Changes the targets."""
    profile: int = 0
    """Steps to profile, after ten: writes trace.json and prints where the time went."""

    def sizes(self, batch: int) -> list[int]:
        """Clips of each micro-batch."""
        size = self.micro_batch or batch
        return [min(size, batch - i) for i in range(0, batch, size)]


@dataclass(frozen=True)
class WatchConfig:
    log_every: int = 10
    watch_every: int = 1_000
    """Steps between looks at variance, effective rank and kNN."""
    eval_data: str | None = None
    """Recordings to watch the features on, labelled ones for the kNN; None: a slice of --data."""
    eval_where: str | None = None
    eval_label: str | None = None
    """Column that holds the labels of --eval-data, where it is not found by its name."""
    eval_test: str | None = None
    """Rows to classify, such as "fold=4"; the others are the neighbours. None: every fourth clip."""
    eval_clips: int = 1_000
    """Most clips to watch the features on."""
    pooling: Literal["mean", "concat"] = "mean"
    """Over frequency patches: their mean (the authors' way), or all of them side by side."""
    checkpoint_every: int = 1_000
    keep: int = 3
    """Checkpoints kept."""
    compare_steps: int = 5
    """Steps of each engine in the comparison with plain PyTorch at the end; 0: none."""


@dataclass(frozen=True)
class Config:
    """Pretrain a JEPA on audio."""

    preset: Literal["tiny", "audio-jepa", "a-jepa"] = "tiny"
    """Where all other settings start: tiny runs on a CPU in about two minutes."""
    out: str | None = None
    """Run folder; None: runs/<preset>."""
    resume: bool = False
    """Continue the run in --out exactly where its last checkpoint stands."""
    impl: Impl = "fused"
    """Engine: ajepa's kernels, plain PyTorch, or plain PyTorch under torch.compile."""
    compare: bool = False
    """Do not train: run the same batches through plain PyTorch and --impl in turn and print clips/s."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: every rank holds the whole model (ddp), or a shard of it (fsdp: FSDP2, for large models)."""
    rank_timeout: float = 50.0
    """Seconds that a rank waits for another within a step before it gives the run up."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    front_end: LogMelSpec = field(default_factory=lambda: LOG_MEL_PRESETS["audio-jepa"])
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    step: StepConfig = field(default_factory=StepConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)


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
        model=ModelConfig(size="tiny", predictor_width=64, predictor_depth=2, predictor_heads=4, target_layers=4),
        mask=MaskConfig(mask_ratio=(0.6, 0.8)),
        # Of batches of 16, 32 and 64 with the same clips in all, the smallest learns most (held-out synthetic set).
        optim=OptimConfig(batch_size=16, steps=1_000, lr=5e-4, warmup_steps=100, ema_start=0.99),
        watch=WatchConfig(log_every=50, watch_every=250, checkpoint_every=250, eval_clips=2_000),
    ),
}

_MAY_CHANGE = {
    "resume", "device", "log_every", "decoder", "loader_threads", "prefetch", "checkpoint_every", "keep", "out",
    "micro_batch", "recompute", "cuda_graph", "parallel_encoders", "profile", "parallel", "rank_timeout", "resident",
    "compare_steps",
}  # fmt: skip


def parse(argv: list[str] | None = None) -> Config:
    """The configuration that a command line asks for: a preset (or, with --resume, the run's own), then its flags."""
    import tyro  # here, as pydantic below: the engines and their benchmarks need neither

    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--preset", default="tiny")
    known.add_argument("--out")
    known.add_argument("--resume", action="store_true")
    first, _ = known.parse_known_args(argv)
    if first.preset not in PRESETS:
        raise ConfigError(f"--preset {first.preset}: unknown; choose one of {', '.join(PRESETS)}")
    base = PRESETS[first.preset]
    saved = Path(first.out or f"runs/{first.preset}") / "config.json"
    resuming = first.resume and saved.exists()
    if resuming:
        base = load(saved)
    options: dict[str, Any] = {"config": (tyro.conf.OmitArgPrefixes,), "prog": "python -m ajepa.train"}
    try:
        cfg = tyro.cli(Config, default=base, args=argv, **options)
    except (ValueError, OverflowError) as error:  # a front end that cannot be
        raise ConfigError(str(error)) from error
    cfg = dataclasses.replace(cfg, out=cfg.out or f"runs/{cfg.preset}")
    if resuming:
        changed = [
            f"--{name.replace('_', '-')} {new!r} (the run has {old!r})"
            for (name, old), (_, new) in zip(_leaves(base), _leaves(cfg), strict=True)
            if old != new and name not in _MAY_CHANGE
        ]
        if changed:
            raise ConfigError(f"--resume continues {cfg.out} as it began; leave out {', '.join(changed)}")
    validate(cfg)
    return cfg


def save(cfg: Config, path: Path) -> None:
    write_atomic(path, (json.dumps(dataclasses.asdict(cfg), indent=2) + "\n").encode())


def load(path: Path) -> Config:
    """The configuration in a run folder. Raises ConfigError for a file that is not one."""
    from pydantic import TypeAdapter, ValidationError

    try:
        raw = json.loads(path.read_text())
        cfg = TypeAdapter(Config).validate_python(raw)
    except (OSError, ValueError, ValidationError, TypeError) as error:
        raise ConfigError(f"{path} is not a configuration of ajepa: {error}") from error
    unknown = _keys(raw) - _keys(dataclasses.asdict(cfg))
    if unknown:
        raise ConfigError(f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}")
    return cfg


def validate(cfg: Config) -> None:
    """Refuse what cannot be run, naming the setting and the remedy. Raises ConfigError."""
    data, spec, model, mask, optim, watch = cfg.data, cfg.front_end, cfg.model, cfg.mask, cfg.optim, cfg.watch

    def need(holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(message)

    for name, value in _leaves(cfg):
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float):
                need(math.isfinite(number), f"--{_flag(name)} {number}: must be a finite number")
            elif isinstance(number, int) and name != "seed":
                need(abs(number) < 2**31, f"--{_flag(name)} {number}: too large")
    need(0 <= cfg.seed < 2**62, f"--seed {cfg.seed}: must be 0 or more, and below 2^62")
    for name, value in {"loader_threads": data.loader_threads, "warmup_steps": optim.warmup_steps,
                        "compare_steps": watch.compare_steps, "curriculum_c0": mask.curriculum_c0}.items():  # fmt: skip
        need(value >= 0, f"--{_flag(name)} {value}: must not be negative")
    need(1 <= spec.sample_rate <= 384_000, f"--sample-rate {spec.sample_rate}: 1 to 384,000 Hz can be resampled to")
    need(cfg.rank_timeout <= 86_400, f"--rank-timeout {cfg.rank_timeout}: a day (86400 s) is the most")
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
        need(value > 0, f"--{_flag(name)} {value}: must be above 0")
    for name, (low, high) in {
        "mask_ratio": mask.mask_ratio, "block_scale": mask.block_scale, "tf_scale": mask.tf_scale,
        "context_scale": mask.context_scale, "block_aspect": mask.block_aspect,
    }.items():  # fmt: skip
        limit = 8.0 if name == "block_aspect" else 1.0
        need(0 < low <= high <= limit, f"--{_flag(name)} {low} {high}: must be 0 < low <= high <= {limit:g}")
    need(cfg.step.micro_batch is None or 0 < cfg.step.micro_batch <= optim.batch_size,
         f"--micro-batch {cfg.step.micro_batch}: must be between 1 and --batch-size {optim.batch_size}")  # fmt: skip
    need(cfg.step.profile >= 0, f"--profile {cfg.step.profile}: a number of steps, 0 for none")
    need(mask.mask_ratio[1] < 1, f"--mask-ratio {mask.mask_ratio}: a ratio of 1 leaves the context empty; stay below 1")
    need(optim.warmup_steps < optim.steps,
         f"--warmup-steps {optim.warmup_steps} does not fit in --steps {optim.steps}: lower it")  # fmt: skip
    need(0 <= optim.ema_start <= optim.ema_end <= 1,
         f"--ema-start {optim.ema_start}, --ema-end {optim.ema_end}: must be 0 <= start <= end <= 1")  # fmt: skip
    need(all(0 <= b < 1 for b in optim.betas), f"--betas {optim.betas}: each must be in [0, 1)")
    need(min(optim.weight_decay, optim.weight_decay_end or 0, optim.lr_start, optim.lr_end, data.gain_db) >= 0,
         "--weight-decay, --weight-decay-end, --lr-start, --lr-end and --gain-db must not be negative")  # fmt: skip
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
    try:
        n_patches = spec.n_patches
    except ValueError as error:  # a patch that does not divide the grid
        raise ConfigError(f"--patch: {error}") from error
    need(n_patches <= 2**16, f"--n-frames {wanted}, --patch {spec.patch}: {n_patches} patches a clip are too many")
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
    need(ranks == "1" or not cfg.compare, "--compare measures one device: start it without torchrun")
    need(not (cfg.compare and cfg.resume), "--compare does not train: leave out --resume")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _leaves(node: Any) -> list[tuple[str, Any]]:
    leaves = []
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        leaves += _leaves(value) if dataclasses.is_dataclass(value) else [(f.name, value)]
    return leaves


def _keys(tree: dict) -> set[str]:
    return {key for k, v in tree.items() for key in ({k} | _keys(v) if isinstance(v, dict) else {k})}
