"""A pretrained encoder for use elsewhere: waveforms of any length in, frame embeddings out, on a CPU or a GPU.

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
from safetensors.torch import save as save_bytes
from torch import nn

from ajepa.config import SIZES, ConfigError, ModelConfig
from ajepa.model.jepa import Encoder as ViT
from ajepa.model.pretrained import load_pretrained, load_weights, read_safetensors
from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.run_folder import is_run, run_of
from ajepa_kernels import LogMelSpec, log_mel, resample, resampled_length

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CHUNKS_AT_ONCE = 16  # bounds the memory that a long recording needs
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
    """The contents of the `config.json` beside the weights."""

    front_end: LogMelSpec
    size: Literal["tiny", "S", "B", "L"]
    clip_samples: int
    """Length of a training clip in samples. Longer recordings are cut into chunks of this length."""
    positions: Literal["sincos", "rotary"] = "sincos"
    pooling: Literal["mean", "concat"] = "mean"
    """How frequency patches are pooled: their mean (D = C), or all of them side by side (D = F * C)."""
    pad: Literal["cyclic", "zero", "silence"] = "cyclic"
    """How a short chunk is filled up: by repeating it, by zeros in the log-mel, or by silence."""
    norm_eps: float = 1e-6
    """Epsilon of the layer norms."""
    model_type: Literal["ajepa-encoder"] = "ajepa-encoder"


class Chunk(NamedTuple):
    """Samples `[start, stop)` of a clip. Only the first `frames` frames of the chunk are kept."""

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

    Frame t of the result stands for samples `[t P, (t + 1) P)`, where P = hop * frames of a patch. A recording that is
    longer than a training clip is cut into chunks of that length, and the whole frames of each chunk are kept. A
    shorter chunk is filled up (`EncoderConfig.pad`), and the result holds no frames of padding.

    Example::

        encoder = ajepa.Encoder.from_pretrained("runs/mine")  # or a folder of save_pretrained, or an id on the hub
        frames = encoder(waveform, sampling_rate=44100)  # [B, T', D]
        clip = frames.mean(1)
    """

    def __init__(self, config: EncoderConfig | dict):
        super().__init__()
        self.config = config if isinstance(config, EncoderConfig) else parse_config(config)
        self._hub_mixin_config = self.config  # the mixin writes it as config.json
        with torch.random.fork_rng(devices=[]):
            self.vit = ViT(ModelConfig(size=self.config.size, positions=self.config.positions), self.config.front_end)
        for module in self.vit.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = self.config.norm_eps
        self.eval()

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the encoder in Hz."""
        return self.config.front_end.sample_rate

    @property
    def output_dim(self) -> int:
        """D, the width of an embedding."""
        rows = self.config.front_end.grid[0] if self.config.pooling == "concat" else 1
        return SIZES[self.config.size][0] * rows

    @property
    def frame_samples(self) -> int:
        """Samples from one frame to the next."""
        return self.config.front_end.patch[1] * self.config.front_end.hop_length

    @property
    def hop_size_in_ms(self) -> float:
        """Milliseconds from one frame to the next."""
        return 1000 * self.frame_samples / self.sampling_rate

    def fingerprint(self) -> str:
        """Eight hexadecimal digits, a hash of the weights and the configuration."""
        digest = hashlib.sha256(repr(self.config).encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:8]

    @property
    def stride(self) -> int:
        """Samples from one chunk to the next. A multiple of a frame, so that frames stay evenly spaced."""
        clip = self.config.clip_samples
        return min(max(1, clip // self.frame_samples) * self.frame_samples, clip)

    def frames(self, samples: int) -> int:
        """Frames that hold part of a chunk of at most `clip_samples` samples; 0 if it is shorter than one window."""
        spec = self.config.front_end
        return min(-(-spec.frames(samples) // spec.patch[1]), spec.grid[1])

    def chunks(self, samples: int) -> list[Chunk]:
        """The chunks of a clip of `samples` samples at `sampling_rate`. A clip has the frames of all its chunks."""
        clip, kept = self.config.clip_samples, -(-self.stride // self.frame_samples)
        plan, start = [], 0
        while samples - start > clip:
            plan.append(Chunk(start, start + clip, kept))
            start += self.stride
        frames = self.frames(samples - start)
        if frames or not plan:  # a tail shorter than one window adds no frame
            plan.append(Chunk(start, samples, max(1, frames)))
        return plan

    def forward(
        self, waveform: torch.Tensor, sampling_rate: int | None = None, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Frame embeddings `[B, T', D]`, float32, on the device of the weights.

        Args:
            waveform: mono, `[B, T]` or `[T]` (then B = 1); floating point in [-1, 1], or int16.
            sampling_rate: rate of `waveform` in Hz; a waveform of another rate is resampled. None: the encoder's rate.
            lengths: integers `[B]`, the number of samples of each clip. The rest of its row is ignored, and the result
                is zero after the clip's own frames (`sum(c.frames for c in encoder.chunks(n))`). None: all T samples.

        Raises:
            TypeError: the dtype is neither floating point nor int16.
            ValueError: invalid shape, rate or lengths, or a clip without samples.
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
        """Frames `[n, grid columns, D]`, float32, of n chunks of at most `clip_samples` each. Includes padding."""
        spec, pad, clip = self.config.front_end, self.config.pad, self.config.clip_samples
        x = torch.stack([_fill(chunk, clip, pad) for chunk in chunks])
        lengths = torch.tensor([len(chunk) for chunk in chunks], device=x.device) if pad == "zero" else None
        # An exported program must run where the kernels of ajepa are not installed.
        impl = "reference" if torch.compiler.is_exporting() else "auto"
        patches = log_mel(x, spec, lengths=lengths, dtype=self.vit.embed.weight.dtype, impl=impl)
        latents = self.vit.encode(patches).float()
        grid = latents.unflatten(1, spec.grid)  # [n, F, T', C]
        return grid.mean(1) if self.config.pooling == "mean" else grid.transpose(1, 2).flatten(2)

    # --- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, source: str | Path, *, pooling: str | None = None, **hub: Any) -> "Encoder":  # type: ignore[override]
        """Load the encoder in `source`, in evaluation mode. No file of it can run code.

        Args:
            source: a folder written by `save_pretrained`, an id on the Hugging Face hub, a run folder of
                `python -m ajepa.train` (its final encoder, or the one in its last checkpoint), or one of its
                checkpoints.
            pooling: "mean" or "concat", replacing the configured pooling.
            hub: `revision`, `cache_dir`, `token` and other arguments of huggingface_hub.

        Raises:
            ConfigError: nothing is there, or files are missing, damaged or from another program.
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
        """The mixin's loader, restricted to this format and to safetensors."""
        if config is None:
            raise ConfigError(f"{model_id} holds no {CONFIG}")
        encoder = cls(parse_config(config, f"{model_id}/{CONFIG}"))
        path = Path(model_id) / WEIGHTS
        if not path.parent.is_dir():
            path = Path(hf_hub_download(repo_id=model_id, filename=WEIGHTS, **hub))
        load_weights(encoder, read_safetensors(path.read_bytes(), path), path)
        return encoder

    def _save_pretrained(self, save_directory: Path) -> None:
        weights = {name: value.contiguous().cpu() for name, value in self.state_dict().items()}
        write_atomic(save_directory / WEIGHTS, save_bytes(weights, {"format": "pt"}))


def parse_config(raw: dict, name: str = "configuration") -> EncoderConfig:
    """The configuration in `raw`, read from `name`. Raises ConfigError if this version cannot use it."""
    found = raw.get("model_type") if isinstance(raw, dict) else None
    if found != "ajepa-encoder":
        raise ConfigError(f"{name}: model_type is {found!r}, not 'ajepa-encoder': not written by ajepa")
    try:
        cfg = _ADAPTER.validate_python(raw)
        grid = cfg.front_end.grid
    except (ValidationError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} is not the configuration of an encoder: {reason}") from error
    unknown = raw.keys() - dataclasses.asdict(cfg).keys()
    if unknown or min(grid) < 1 or cfg.clip_samples < cfg.front_end.min_samples:
        what = f"unknown settings {sorted(unknown)}" if unknown else f"clip_samples {cfg.clip_samples} and grid {grid}"
        raise ConfigError(f"{name}: this version cannot use {what}")
    return cfg


def from_run(path: Path) -> Encoder:
    """The EMA target encoder of a run, or of one of its checkpoints. Raises ConfigError."""
    cfg, weights, file = load_pretrained(path)
    config = EncoderConfig(
        front_end=cfg.front_end,
        size=cfg.model.size,
        clip_samples=round(cfg.data.clip_seconds * cfg.front_end.sample_rate),
        positions=cfg.model.positions,
        pooling=cfg.watch.pooling,
        pad=cfg.data.pad,
    )
    encoder = Encoder(parse_config(dataclasses.asdict(config), str(run_of(path) / CONFIG)))
    load_weights(encoder.vit, weights, file)
    return encoder


def _fill(chunk: torch.Tensor, samples: int, pad: str) -> torch.Tensor:
    """A chunk filled up to `samples`, by repeating it or by silence."""
    if pad == "cyclic" and len(chunk) < samples:
        chunk = chunk.repeat(-(-samples // len(chunk)))[:samples]
    return nn.functional.pad(chunk, (0, samples - len(chunk)))


def _checked(waveform: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, list[int]]:
    """The clips `[B, T]`, int16 or float32, and the number of samples of each."""
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
