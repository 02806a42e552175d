"""A pretrained encoder to take along: waveforms of any length in, frame embeddings out, on a CPU as on a GPU.

Shapes: B clips, T samples, T' frames (time patches), F frequency patches, C encoder width, D embedding width.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

from ajepa import config as run_config
from ajepa.config import SIZES, ConfigError, ModelConfig
from ajepa.model.jepa import Encoder as ViT
from ajepa.training.checkpoint import CheckpointError, checkpoints, read_verified
from ajepa.utils.atomic_files import write_atomic
from ajepa_kernels import LogMelSpec, log_mel, resample, resampled_length

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CHUNKS_AT_ONCE = 16  # bounds the memory that a long recording takes
MODEL_CARD = """---
{{ card_data }}
---

An audio encoder pretrained with ajepa, a joint-embedding predictive architecture on log-mel patches.

```python
import ajepa

encoder = ajepa.Encoder.from_pretrained("<this folder, or its id on the hub>")
frames = encoder(waveform, sampling_rate=44100)  # [B, T', D] of mono [B, T], at any length
```
"""


@dataclass(frozen=True)
class EncoderConfig:
    """What `config.json` beside the weights holds."""

    front_end: LogMelSpec
    size: Literal["tiny", "S", "B", "L"]
    clip_samples: int
    """Length of a training clip in samples; longer recordings are cut into chunks of it."""
    positions: Literal["sincos", "rotary"] = "sincos"
    pooling: Literal["mean", "concat"] = "mean"
    """Over frequency patches: their mean (D = C), or all of them side by side (D = F * C)."""
    pad: Literal["cyclic", "zero", "silence"] = "cyclic"
    """How a short chunk is filled up: by itself over and over, by rows of zeros in the log-mel, or by silence."""
    norm_eps: float = 1e-6
    """Epsilon of the layer norms."""
    model_type: Literal["ajepa-encoder"] = "ajepa-encoder"


class Chunk(NamedTuple):
    """Samples `[start, stop)` of a clip, of which the first `frames` frames are kept."""

    start: int
    stop: int
    frames: int


_ADAPTER = TypeAdapter(EncoderConfig)


class Encoder(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="ajepa",
    pipeline_tag="feature-extraction",
    tags=["audio", "jepa"],
    model_card_template=MODEL_CARD,
):
    """Front end and EMA target encoder of a run.

    Frame t of the result stands for samples `[t P, (t + 1) P)`, P = hop * frames of a patch, at any length: a recording
    longer than a training clip is cut into chunks of that length, of which whole frames are kept. A chunk shorter than
    it is filled up (`EncoderConfig.pad`); frames of the filling never come out.

    Example::

        encoder = ajepa.Encoder.from_pretrained("runs/mine")  # or a folder of save_pretrained, or an id on the hub
        frames = encoder(waveform, sampling_rate=44100)  # [B, T', D]
        clip = frames.mean(1)
    """

    def __init__(self, config: EncoderConfig | dict):
        super().__init__()
        self.config = config if isinstance(config, EncoderConfig) else parse_config(config)
        self._hub_mixin_config = self.config  # what the mixin writes as config.json
        with torch.random.fork_rng(devices=[]):
            self.vit = ViT(ModelConfig(size=self.config.size, positions=self.config.positions), self.config.front_end)
        for module in self.vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = self.config.norm_eps
        self.eval()

    @property
    def sampling_rate(self) -> int:
        """Hz that the encoder works at."""
        return self.config.front_end.sample_rate

    @property
    def output_dim(self) -> int:
        """D."""
        rows = self.config.front_end.grid[0] if self.config.pooling == "concat" else 1
        return SIZES[self.config.size][0] * rows

    @property
    def frame_samples(self) -> int:
        """P, samples from one frame to the next."""
        return self.config.front_end.patch[1] * self.config.front_end.hop_length

    @property
    def hop_size_in_ms(self) -> float:
        return 1000 * self.frame_samples / self.sampling_rate

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change with the weights or the configuration."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:8]

    @property
    def stride(self) -> int:
        """Samples from one chunk to the next: whole frames, so that they stay evenly spaced."""
        clip = self.config.clip_samples
        return min(max(1, clip // self.frame_samples) * self.frame_samples, clip)

    def frames(self, samples: int) -> int:
        """Frames that hold something of a chunk of at most `clip_samples` samples; 0 where it is below one window."""
        spec = self.config.front_end
        return min(-(-spec.frames(samples) // spec.patch[1]), spec.grid[1])

    def chunks(self, samples: int) -> list[Chunk]:
        """How a clip of `samples` samples at `sampling_rate` is cut; the frames of a clip are those of its chunks."""
        clip, kept = self.config.clip_samples, -(-self.stride // self.frame_samples)
        plan, start = [], 0
        while samples - start > clip:
            plan.append(Chunk(start, start + clip, kept))
            start += self.stride
        frames = self.frames(samples - start)
        if frames or not plan:  # a tail shorter than one window has nothing of its own
            plan.append(Chunk(start, samples, max(1, frames)))
        return plan

    def forward(
        self, waveform: torch.Tensor, sampling_rate: int | None = None, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Frame embeddings `[B, T', D]`, float32, on the device of the weights.

        Args:
            waveform: mono, `[B, T]` or `[T]` (then B = 1); floating point in [-1, 1], or int16.
            sampling_rate: of `waveform` in Hz; resampled where it is not the encoder's. None: the encoder's.
            lengths: integers `[B]`, samples of each clip; the rest of its row is ignored, and rows of the result after
                a clip's own frames (`sum(c.frames for c in encoder.chunks(n))`) are zero. None: all T.

        Raises:
            TypeError, ValueError: wrong dtype, shape or rate, or a clip without samples.
        """
        pcm, sizes = _checked(waveform, lengths)
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            ends = torch.tensor(sizes, device=pcm.device)
            pcm = resample(pcm, sampling_rate, self.sampling_rate, lengths=ends, dtype=torch.float32)
            sizes = [resampled_length(n, sampling_rate, self.sampling_rate) for n in sizes]
        pcm = pcm.to(self.vit.norm.weight.device)
        plan = [(b, chunk) for b, n in enumerate(sizes) for chunk in self.chunks(n)]
        parts: list[list[torch.Tensor]] = [[] for _ in sizes]
        for i in range(0, len(plan), CHUNKS_AT_ONCE):
            group = plan[i : i + CHUNKS_AT_ONCE]
            frames = self.encode_chunks([pcm[b, chunk.start : chunk.stop] for b, chunk in group])
            for (b, chunk), x in zip(group, frames, strict=True):
                parts[b].append(x[: chunk.frames])
        return nn.utils.rnn.pad_sequence([torch.cat(x) for x in parts], batch_first=True)

    def encode_chunks(self, chunks: list[torch.Tensor]) -> torch.Tensor:
        """Frames `[n, grid columns, D]` float32 of chunks of at most `clip_samples` each, those of filling included."""
        spec, pad, clip = self.config.front_end, self.config.pad, self.config.clip_samples
        x = torch.stack([_fill(chunk, clip, pad) for chunk in chunks])
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=x.device) if pad == "zero" else None
        # A program that torch.export writes must run where ajepa's kernels are not installed.
        impl = "reference" if torch.compiler.is_exporting() else "auto"
        patches = log_mel(x, spec, lengths=lengths, dtype=self.vit.embed.weight.dtype, impl=impl)
        latents = self.vit.encode(patches).float()
        grid = latents.unflatten(1, spec.grid)  # [n, F, T', C]
        return grid.mean(1) if self.config.pooling == "mean" else grid.transpose(1, 2).flatten(2)

    # --- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | Path, *, pooling: str | None = None, **hub: Any) -> "Encoder":  # type: ignore[override]
        """The encoder in `source`, in evaluation mode; no file of it can run code.

        Args:
            source: a folder written by `save_pretrained`, an id on the Hugging Face hub, a run folder of
                `python -m ajepa.train` (its final encoder, or that of its last checkpoint), or one of its checkpoints.
            pooling: "mean" or "concat" in place of the configured one.
            hub: `revision`, `cache_dir`, `token`... of huggingface_hub.

        Raises:
            ConfigError: nothing there, files missing or damaged, or of another program.
        """
        folder = Path(source)
        try:
            if is_run(folder):
                encoder = from_run(folder)
            elif folder.is_dir():
                if not (folder / CONFIG).is_file():
                    raise ConfigError(f"{folder} holds no {CONFIG}: neither a run nor an encoder of ajepa")
                encoder = cls._from_pretrained(model_id=str(folder), config=json.loads((folder / CONFIG).read_text()))
            else:
                encoder = super().from_pretrained(str(source), **hub)
        except (HfHubHTTPError, HFValidationError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"{source}: no encoder could be loaded from this folder or hub id: {reason}") from error
        if pooling is not None and pooling != encoder.config.pooling:
            encoder.config = parse_config({**dataclasses.asdict(encoder.config), "pooling": pooling})
            encoder._hub_mixin_config = encoder.config
        return encoder

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: dict | None = None, **hub: Any) -> "Encoder":
        """The mixin's loader, made strict: this format or none, safetensors or none."""
        if config is None:
            raise ConfigError(f"{model_id} holds no {CONFIG}")
        encoder = cls(parse_config(config, f"{model_id}/{CONFIG}"))
        path = Path(model_id) / WEIGHTS
        if not path.parent.is_dir():
            path = Path(hf_hub_download(repo_id=model_id, filename=WEIGHTS, **hub))
        load_tensors(encoder, path.read_bytes(), str(path))
        return encoder

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        write_atomic(save_directory / WEIGHTS, save_bytes(weights, {"format": "pt"}))


def parse_config(raw: dict, name: str = "configuration") -> EncoderConfig:
    """Raises ConfigError for one that is not an encoder's of this version."""
    found = raw.get("model_type") if isinstance(raw, dict) else None
    if found != "ajepa-encoder":
        raise ConfigError(f"{name}: model_type is {found!r}, not 'ajepa-encoder': not written by ajepa")
    try:
        cfg = _ADAPTER.validate_python(raw)
        grid = cfg.front_end.grid
    except (ValidationError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} is not an encoder's of ajepa: {reason}") from error
    unknown = raw.keys() - dataclasses.asdict(cfg).keys()
    if unknown or min(grid) < 1 or cfg.clip_samples < cfg.front_end.min_samples:
        what = f"unknown settings {sorted(unknown)}" if unknown else f"clip_samples {cfg.clip_samples} and grid {grid}"
        raise ConfigError(f"{name}: this version cannot use {what}")
    return cfg


def load_tensors(module: nn.Module, data: bytes, name: str, prefix: str = "") -> None:
    """The tensors of a safetensors file whose names begin with `prefix`. Raises ConfigError where they do not fit."""
    try:
        tensors = load_bytes(data)
    except Exception as error:  # safetensors has an exception type of its own
        raise ConfigError(f"{name} is not a safetensors file: {error}") from error
    try:
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} does not fit its {CONFIG}: {reason}") from error


def is_run(folder: Path) -> bool:
    """Whether it is a run folder of `ajepa.train`, or one of a run's checkpoints."""
    if (folder / "state.json").is_file():
        return True
    try:
        raw = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and {"preset", "front_end", "optim"} <= raw.keys()


def from_run(folder: Path) -> Encoder:
    """The EMA target encoder of a run, or of one of its checkpoints. Raises ConfigError."""
    checkpoint = folder if (folder / "state.json").is_file() else None
    run = checkpoint.resolve().parents[1] if checkpoint else folder
    cfg = run_config.load(run / CONFIG)
    config = EncoderConfig(
        front_end=cfg.front_end,
        size=cfg.model.size,
        clip_samples=round(cfg.data.clip_seconds * cfg.front_end.sample_rate),
        positions=cfg.model.positions,
        pooling=cfg.watch.pooling,
        pad=cfg.data.pad,
    )
    encoder = Encoder(parse_config(dataclasses.asdict(config), str(run / CONFIG)))
    final = run / "encoder.safetensors"
    if checkpoint is None and final.is_file():
        load_tensors(encoder.vit, final.read_bytes(), str(final))
        return encoder
    damaged = []
    for path in [checkpoint] if checkpoint else reversed(checkpoints(run / "checkpoints")):
        try:
            data = read_verified(path)["model.safetensors"]
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        load_tensors(encoder.vit, data, str(path), "target_encoder.")
        return encoder
    raise ConfigError("; ".join([f"{run} has neither encoder.safetensors nor a usable checkpoint", *damaged]))


def _fill(chunk: torch.Tensor, samples: int, pad: str) -> torch.Tensor:
    """A chunk filled up to `samples`, by itself over and over or by silence."""
    if pad == "cyclic" and len(chunk) < samples:
        chunk = chunk.repeat(-(-samples // len(chunk)))[:samples]
    return nn.functional.pad(chunk, (0, samples - len(chunk)))


def _checked(waveform: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, list[int]]:
    """The clips `[B, T]`, int16 or float32, and the samples of each."""
    if waveform.dim() not in (1, 2):
        raise ValueError(f"Encoder: waveform must be [B, T] or [T], got {list(waveform.shape)}; average the channels")
    if waveform.dtype != torch.int16 and not waveform.is_floating_point():
        raise TypeError(f"Encoder: waveform must be int16 or floating point, got {waveform.dtype}")
    pcm = waveform[None] if waveform.dim() == 1 else waveform
    sizes = [pcm.shape[1]] * len(pcm)
    if lengths is not None:
        if lengths.shape != pcm.shape[:1] or lengths.is_floating_point():
            raise ValueError(
                f"Encoder: lengths must be integers [{len(pcm)}], got {lengths.dtype} {list(lengths.shape)}"
            )
        sizes = [int(n) for n in lengths.tolist()]
    if not sizes or min(sizes) < 1 or max(sizes) > pcm.shape[1]:
        raise ValueError(f"Encoder: every clip must have 1 to {pcm.shape[1]} samples, got {sizes}")
    return pcm if pcm.dtype == torch.int16 else pcm.float(), sizes
