"""A pretrained encoder for use elsewhere: waveforms of any length in, frame embeddings out, on a CPU or a GPU.

Shapes: B clips, T samples, T' frames (time patches or chunks), F frequency patches, C encoder width, D embedding width.
"""

import dataclasses
import difflib
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic import TypeAdapter, ValidationError
from torch import nn

from ajepa.config import MOST_PATCHES, SIZES, Config, ConfigError, ModelConfig, Pooling
from ajepa.model.clip import Projector
from ajepa.model.jepa import Encoder as ViT
from ajepa.model.layers import mean_of_layers
from ajepa.model.pooling import (
    PER_FRAME,
    Layers,
    Statistics,
    check_pooling,
    count_columns,
    embedding_width,
    encode_real,
    pool_recordings,
    statistics,
)
from ajepa.model.pretrained import load_pretrained, load_weights, read_weights
from ajepa.model.waveforms import Waveform, check_waveform
from ajepa.utils.command import describe
from ajepa.utils.folders import claim, is_run
from ajepa.utils.json_files import read_json, write_json
from ajepa.utils.run_folder import is_checkpoint, run_of
from ajepa.utils.tensor_files import read_tensors, write_tensors
from ajepa_kernels import LogMelSpec, log_mel, resample, resampled_length

CONFIG, WEIGHTS = "config.json", "model.safetensors"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_PATIENCE = 3.0  # seconds in which the hub must answer
MOST_WIDTH = 2**16  # of a patch or a projector, so that no configuration asks for too much memory
CHUNKS_AT_ONCE = 16  # bounds the memory that a long recording needs
MODEL_CARD = """---
{{ card_data }}
---

An audio encoder pretrained with ajepa, a joint-embedding predictive architecture on log-mel patches.

```python
import ajepa

encoder = ajepa.Encoder.from_pretrained("<this folder, or its id on the hub>")
frames = encoder(waveform, sampling_rate=44100)  # [B, T', D] of mono [B, T], at any length
clips = encoder.embed(waveform, sampling_rate=44100)  # [B, D]
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
    pooling: Pooling = "mean"
    """mean: over frequency (D = C). concat: the frequency rows side by side (D = F * C). mean+std, concat+std: mean and
    deviation over all patches of a chunk, or over the time of each row. projection: the projector's output."""
    layers: Layers = "last"
    """last: the encoder's output. mean: the average of all blocks' outputs, each layer-normalised."""
    projector: tuple[int, int] | None = None
    """Widths of the hidden layer and of the output of the projector beside the encoder. None: there is none."""
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


def _without_graph(method: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a method of the encoder keep what gradients need in training mode only."""

    @functools.wraps(method)
    def run(self: "Encoder", *arguments: Any, **options: Any) -> torch.Tensor:
        if torch.compiler.is_exporting():  # an exported program has no modes of gradients
            return method(self, *arguments, **options)
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return method(self, *arguments, **options)

    return run


class Encoder(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="ajepa",
    pipeline_tag="feature-extraction",
    tags=["audio", "jepa"],
    model_card_template=MODEL_CARD,
):
    """Front end and encoder of a run: the EMA target encoder, or the trained encoder where there is no average of it.

    With the poolings "mean" and "concat", frame t of the result stands for samples `[t P, (t + 1) P)`, where P = hop *
    frames of a patch. A recording that is longer than a training clip is cut into chunks of that length, and the whole
    frames of each chunk are kept. A shorter chunk is filled up (`EncoderConfig.pad`), and the result holds no frames of
    padding.

    The poolings "mean+std", "concat+std" and "projection" describe a whole chunk, so a chunk has one frame, P is the
    length of a training clip, and padding is not encoded.

    Example::

        encoder = ajepa.Encoder.from_pretrained("runs/mine")  # or a folder of save_pretrained, or an id on the hub
        frames = encoder(waveform, sampling_rate=44100)  # [B, T', D]
        clips = encoder.embed(waveform, sampling_rate=44100)  # [B, D]
    """

    def __init__(self, config: EncoderConfig | dict):
        super().__init__()
        self.config = config if isinstance(config, EncoderConfig) else parse_config(config)
        spec, projector = self.config.front_end, self.config.projector
        with torch.random.fork_rng(devices=[]):
            self.vit = ViT(ModelConfig(size=self.config.size, positions=self.config.positions), spec)
            pooled = embedding_width("concat+std", spec.grid[0], SIZES[self.config.size][0])
            self.projector = Projector(pooled, *projector) if projector else None
        check_pooling(self.config.pooling, has_projector=projector is not None)
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
        cfg = self.config
        return embedding_width(cfg.pooling, cfg.front_end.grid[0], SIZES[cfg.size][0], (cfg.projector or (0, 0))[1])

    @property
    def per_frame(self) -> bool:
        """Whether there is a frame for each time patch. If not, there is one for each chunk."""
        return self.config.pooling in PER_FRAME

    @property
    def frame_samples(self) -> int:
        """Samples from one frame to the next."""
        spec = self.config.front_end
        return spec.patch[1] * spec.hop_length if self.per_frame else self.config.clip_samples

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
        return min(-(-spec.frames(samples) // spec.patch[1]), spec.grid[1] if self.per_frame else 1)

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

    @_without_graph
    def forward(
        self, waveform: Waveform, sampling_rate: int | None = None, lengths: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Frame embeddings `[B, T', D]`, float32, on the device of the weights.

        Gradients of the weights are kept only in training mode, `encoder.train()`. The result may in any mode be the
        input of a network that is trained.

        Args:
            waveform: mono, `[B, T]` or `[T]` (then B = 1), floating point in [-1, 1] or int16: a tensor, a numpy array,
                a list of samples, or a list of clips, which may differ in length and then need no `lengths`.
            sampling_rate: rate of `waveform` in Hz; a waveform of another rate is resampled. None: the encoder's rate.
            lengths: integers `[B]`, the number of samples of each clip. The rest of its row is ignored, and the result
                is zero after the clip's own frames (`sum(c.frames for c in encoder.chunks(n))`). None: all T samples.

        Raises:
            TypeError: the dtype is neither floating point nor int16.
            ValueError: invalid shape, rate or lengths, a clip without samples, or samples that are NaN or infinite.
        """
        pcm, sizes = self._resampled(waveform, sampling_rate, lengths)
        plan = [(b, chunk) for b, n in enumerate(sizes) for chunk in self.chunks(n)]
        parts: list[list[torch.Tensor]] = [[] for _ in sizes]
        for i in range(0, len(plan), CHUNKS_AT_ONCE):
            group = plan[i : i + CHUNKS_AT_ONCE]
            frames = self.encode_chunks([pcm[b, chunk.start : chunk.stop] for b, chunk in group])
            for (b, chunk), x in zip(group, frames, strict=True):
                parts[b].append(x[: chunk.frames])
        return nn.utils.rnn.pad_sequence([torch.cat(x) for x in parts], batch_first=True)

    @_without_graph
    def embed(
        self, waveform: Waveform, sampling_rate: int | None = None, lengths: Sequence[int] | torch.Tensor | None = None
    ) -> torch.Tensor:
        """One embedding per clip, `[B, D]`, float32, pooled over all real time patches of all its chunks.

        These are the features that `python -m ajepa.probe` scores: padding is never encoded. A clip is cut into chunks
        of `clip_samples`, and "projection" is the mean of the chunks' projections. Arguments and errors are those of
        `forward`. The probe rounds resampled recordings to int16.
        """
        pcm, sizes = self._resampled(waveform, sampling_rate, lengths)
        clip, shortest = self.config.clip_samples, self.config.front_end.min_samples
        plan = [(b, i, min(i + clip, n)) for b, n in enumerate(sizes) for i in range(0, n, clip)
                if i == 0 or n - i >= shortest]  # fmt: skip
        groups = [plan[i : i + CHUNKS_AT_ONCE] for i in range(0, len(plan), CHUNKS_AT_ONCE)]
        parts = [self.summarise([pcm[b, start:stop] for b, start, stop in group]) for group in groups]
        owner = torch.tensor([b for b, _, _ in plan], device=pcm.device)
        return self.pool_chunks(Statistics(*map(torch.cat, zip(*parts, strict=True))), owner, len(sizes))

    def _resampled(self, waveform, sampling_rate, lengths) -> tuple[torch.Tensor, list[int]]:
        """The clips `[B, T]` at the encoder's rate and on its device, and the number of samples of each."""
        pcm, sizes = check_waveform(waveform, sampling_rate, lengths)
        if sampling_rate is not None and sampling_rate != self.sampling_rate:
            ends = torch.tensor(sizes, device=pcm.device)
            pcm = resample(pcm, sampling_rate, self.sampling_rate, lengths=ends, dtype=torch.float32)
            sizes = [resampled_length(n, sampling_rate, self.sampling_rate) for n in sizes]
        return pcm.to(self.vit.norm.weight.device), sizes

    def encode_chunks(self, chunks: list[torch.Tensor]) -> torch.Tensor:
        """Frames of n chunks of at most `clip_samples` each, float32: `[n, grid columns, D]`, which include those of
        padding, or `[n, 1, D]` for poolings of a whole chunk."""
        if not self.per_frame:
            return self.pool_chunks(self.summarise(chunks))[:, None]
        spec, pad, clip = self.config.front_end, self.config.pad, self.config.clip_samples
        x = torch.stack([_fill(chunk, clip, pad) for chunk in chunks])
        patches = self._patches(x, [len(chunk) for chunk in chunks] if pad == "zero" else None)
        if self.config.layers == "last":
            latents = self.vit.encode(patches).float()
        else:
            latents = mean_of_layers(self.vit.encode(patches, layers=len(self.vit.blocks)), self.vit.norm.eps)
        grid = latents.unflatten(1, spec.grid)  # [n, F, T', C]
        return grid.mean(1) if self.config.pooling == "mean" else grid.transpose(1, 2).flatten(2)

    def summarise(self, chunks: list[torch.Tensor]) -> Statistics:
        """Statistics of the latents of n chunks of at most `clip_samples` each. Padding is not encoded."""
        spec, sizes = self.config.front_end, [len(chunk) for chunk in chunks]
        x = torch.stack([_fill(chunk, self.config.clip_samples, "zero") for chunk in chunks])
        columns = count_columns(spec, sizes)
        latents = encode_real(self.vit, self._patches(x, sizes), spec, columns, self.config.layers)
        return statistics(latents.unflatten(1, spec.grid), torch.tensor(columns, device=x.device))

    def pool_chunks(self, chunks: Statistics, owner: torch.Tensor | None = None, n: int | None = None) -> torch.Tensor:
        """Embeddings `[n, D]` of clips from the statistics of their chunks; `owner` is the clip of each chunk. None:
        every chunk is a clip."""
        count = len(chunks.columns)
        owner = torch.arange(count, device=chunks.columns.device) if owner is None else owner
        return pool_recordings(chunks, owner, count if n is None else n, self.config.pooling, self.projector)

    def _patches(self, x: torch.Tensor, sizes: list[int] | None) -> torch.Tensor:
        """Log-mel patches of chunks `[n, clip_samples]`; what follows the first `sizes` samples of each is not read."""
        lengths = None if sizes is None else torch.tensor(sizes, device=x.device)
        # An exported program must run where the kernels of ajepa are not installed.
        impl = "reference" if torch.compiler.is_exporting() else "auto"
        return log_mel(x, self.config.front_end, lengths=lengths, dtype=self.vit.embed.weight.dtype, impl=impl)

    # --- files ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, source: str | Path, *, pooling: str | None = None, layers: str | None = None, **hub: Any
    ) -> "Encoder":
        """Load the encoder in `source`, in evaluation mode: `open_encoder` without what it says of the run."""
        return open_encoder(source, pooling=pooling, layers=layers, **hub).encoder

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write `config.json`, `model.safetensors` and a model card, with the options of huggingface_hub.

        Raises ConfigError if the folder holds anything but an exported encoder.
        """
        folder = Path(save_directory).expanduser()
        claim(folder, "encoder", "OUT")
        return super().save_pretrained(folder, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / WEIGHTS).unlink(missing_ok=True)  # so that a kill leaves no configuration of other weights
        write_json(save_directory / CONFIG, dataclasses.asdict(self.config))
        write_tensors(save_directory / WEIGHTS, self.state_dict())


class Opened(NamedTuple):
    """An encoder, and where it comes from."""

    encoder: Encoder
    """With its weights loaded, in evaluation mode."""
    run: Config | None
    """Configuration of the run that it comes from; None for an exported or converted encoder and one of the hub."""
    file: Path
    """Where the weights were read."""


def open_encoder(source: str | Path, *, pooling: str | None = None, layers: str | None = None, **hub: Any) -> Opened:
    """Open the encoder in `source`. No file of it can run code.

    Args:
        source: a run folder of `python -m ajepa.train` (its final encoder, or the one in its last checkpoint), one of
            its checkpoints, a fine-tuning of it, a folder written by `save_pretrained`, `ajepa.export` or
            `ajepa.convert`, or an id on the Hugging Face hub ("owner/name"). A local folder comes before the hub.
        pooling: replaces the configured `EncoderConfig.pooling`.
        layers: replaces the configured `EncoderConfig.layers`.
        hub: `revision`, `cache_dir`, `token` and other arguments of huggingface_hub.

    Raises:
        ConfigError: nothing is there, files are missing or from another program, or the pooling is "projection" and
            the encoder has no projector.
        DamagedError: a file was changed since it was written.
    """
    folder = Path(source).expanduser()
    try:
        if folder.is_dir():
            encoder, run, file = _from_folder(folder)
        else:
            encoder, run, file = _from_hub(str(source), **hub)
    except OSError as error:
        raise ConfigError(f"{source}: no encoder could be loaded: {describe(error)}") from error
    changes = {name: value for name, value in (("pooling", pooling), ("layers", layers)) if value is not None}
    encoder.config = parse_config({**dataclasses.asdict(encoder.config), **changes}, str(source))
    return Opened(encoder, run, file)


def _from_folder(folder: Path) -> Opened:
    home = run_of(folder)
    if not (home / CONFIG).is_file():
        raise ConfigError(f"{folder} holds no {CONFIG}: neither a run nor an encoder of ajepa")
    raw, weights = read_json(home / CONFIG), folder / WEIGHTS
    if "model_type" not in raw:
        return _from_run(folder)
    if not is_checkpoint(folder) and (weights.is_file() or not is_run(folder)):
        return _exported(raw, home / CONFIG, weights)
    found = read_weights(folder)  # of a fine-tuning that has not ended; its checkpoints hold no projector
    encoder = Encoder(parse_config({**raw, "projector": None}, str(home / CONFIG)))
    load_weights(encoder.vit, found.weights, found.file)
    return Opened(encoder, None, found.file)


def _from_run(path: Path) -> Opened:
    """The encoder of a run, or of one of its checkpoints, and its projector. Raises ConfigError."""
    cfg, weights, file, projector = load_pretrained(path)
    config = EncoderConfig(
        front_end=cfg.front_end,
        size=cfg.model.size,
        clip_samples=round(cfg.data.clip_seconds * cfg.front_end.sample_rate),
        positions=cfg.model.positions,
        pooling=cfg.watch.pooling,
        projector=(cfg.objective.projector_hidden, cfg.objective.projector_width) if projector else None,
        pad=cfg.data.pad,
    )
    encoder = Encoder(parse_config(dataclasses.asdict(config), str(run_of(path) / CONFIG)))
    load_weights(encoder.vit, weights, file)
    if encoder.projector is not None:
        load_weights(encoder.projector, projector or {}, file)
    return Opened(encoder, cfg, file)


def _exported(raw: dict[str, Any], about: Path, weights: Path) -> Opened:
    encoder = Encoder(parse_config(raw, str(about)))
    load_weights(encoder, read_tensors(weights), weights)
    return Opened(encoder, None, weights)


def _from_hub(name: str, **hub: Any) -> Opened:
    """An encoder of the hub, or of its cache. Raises ConfigError for a name that looks like a local one."""
    local = Path(name).expanduser()
    if local.exists():
        raise ConfigError(f"{name} is a file: name the folder that holds the encoder")
    near = closest(local)
    hint = f"; did you mean {near}?" if near else ""
    if not HUB_ID.fullmatch(name) or local.parent.is_dir():
        raise ConfigError(f"{name}: no such folder{hint}")
    answered = True
    try:  # the download below tries again and again for half a minute
        if not hub.get("local_files_only"):
            url = hf_hub_url(name, CONFIG, revision=hub.get("revision"))
            get_hf_file_metadata(url, token=hub.get("token"), timeout=HUB_PATIENCE)
    except HfHubHTTPError:
        pass  # the hub answers, and the download says what is wrong
    except Exception:  # each library that connects has errors of its own
        answered, hub["local_files_only"] = False, True
    try:
        about, weights = (Path(hf_hub_download(repo_id=name, filename=file, **hub)) for file in (CONFIG, WEIGHTS))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split()) if answered else "the hub cannot be reached"
        raise ConfigError(
            f"{name}: no local folder has this name, and no encoder of the hub: {reason}{hint}"
        ) from error
    return _exported(read_json(about), about, weights)


def closest(path: Path) -> Path | None:
    """The existing path that resembles `path` most, part by part; None if there is none."""
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if not (found / part).exists():
            if not found.is_dir():
                return None
            with os.scandir(found) as entries:
                names = [entry.name for entry in itertools.islice(entries, 10_000)]
            near = difflib.get_close_matches(part, names, 1)
            if not near:
                return None
            part = near[0]
        found /= part
    return found


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
    spec, (rows, columns), projector = cfg.front_end, grid, cfg.projector or (1, 1)
    unknown = raw.keys() - dataclasses.asdict(cfg).keys()
    for usable, what in (
        (not unknown, f"unknown settings {sorted(unknown)}"),
        (min(grid) >= 1 and rows * columns <= MOST_PATCHES, f"a grid of {rows} x {columns} patches"),
        (spec.patch_dim <= MOST_WIDTH, f"patches of {spec.patch[0]} x {spec.patch[1]}"),
        (spec.min_samples <= cfg.clip_samples <= 86_400 * spec.sample_rate, f"clip_samples {cfg.clip_samples}"),
        (all(1 <= width <= MOST_WIDTH for width in projector), f"a projector of widths {projector}"),
        (0 < cfg.norm_eps < 1, f"norm_eps {cfg.norm_eps}"),
    ):
        if not usable:
            raise ConfigError(f"{name}: this version cannot use {what}")
    check_pooling(cfg.pooling, has_projector=cfg.projector is not None)
    return cfg


def _fill(chunk: torch.Tensor, samples: int, pad: str) -> torch.Tensor:
    """A chunk filled up to `samples`, by repeating it or by silence."""
    if pad == "cyclic" and len(chunk) < samples:
        chunk = chunk.repeat(-(-samples // len(chunk)))[:samples]
    return nn.functional.pad(chunk, (0, samples - len(chunk)))
