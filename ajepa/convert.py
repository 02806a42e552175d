"""`python -m ajepa.convert JEPA.ckpt OUT`: convert an Audio-JEPA checkpoint (arXiv 2507.02915) to an `ajepa.Encoder`.

The authors' checkpoint is a Lightning file: a pickle of the weights and of other objects of the run. torch's
weights-only unpickler reads it, and classes of the run (hyper-parameters, schedules) become empty stand-ins, so none of
the authors' code is imported or run. The tests make checkpoints of that layout; the published file is not tested.

The authors' spectrogram is an image `[1, frames, mels]` and ours is `[mels, frames]`, so patches are transposed and
tokens reordered. Attention is named `qkv`, `proj` in one release of their code and `Wqkv`, `out_proj` (flash-attn) in
another.
"""

import re
import sys
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import tyro
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ajepa.config import SIZES, ConfigError
from ajepa.encoder import Encoder, EncoderConfig
from ajepa.model.layers import sincos_positions
from ajepa.utils import cli
from ajepa.utils.command import command
from ajepa_kernels import LOG_MEL_PRESETS

CLIP_SECONDS = 10
NAMES = [  # regular expression for the authors' name -> our name
    (r"^patch_embed\.proj\.", "embed."),
    (r"^(blocks\.\d+)\.attn\.W?qkv\.", r"\1.qkv."),
    (r"^(blocks\.\d+)\.attn\.(?:out_)?proj\.", r"\1.proj."),
    (r"^(blocks\.\d+)\.mlp\.(fc[12])\.", r"\1.\2."),
    (r"^(blocks\.\d+\.norm[12]|norm)\.", r"\1."),
]


@dataclass(frozen=True)
class Arguments:
    """Convert an Audio-JEPA checkpoint to a folder that ajepa.Encoder.from_pretrained reads."""

    checkpoint: tyro.conf.Positional[str]
    """Audio-JEPA checkpoint to convert (Lightning, .ckpt)."""
    out: tyro.conf.Positional[str]
    """Folder to write."""
    encoder: Literal["target", "context"] = "target"
    """target is the EMA target encoder, which the authors evaluate; context is the trained context encoder."""
    front_end: Literal["audio-jepa", "audio-jepa-16k"] = "audio-jepa"
    """audio-jepa is the 32 kHz Kaldi filter bank; audio-jepa-16k is the 16 kHz front end of its successor."""
    pooling: Literal["mean", "mean+std", "concat", "concat+std"] = "mean"
    """How the converted encoder pools latents. mean, concat: frames of one time patch, by the mean over frequency or
    with the frequency rows side by side. mean+std, concat+std: one frame per chunk, with deviations."""


class _StandIn:
    """Replaces a foreign class or function of the pickle. It accepts any arguments and state and ignores them."""

    def __new__(cls, *args: Any, **keywords: Any):
        return super().__new__(cls)

    def __init__(self, *args: Any, **keywords: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a Lightning checkpoint by name without running its code. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}; name a checkpoint")
    try:
        if zipfile.is_zipfile(path):  # torch stores without compression: what unpacks to more is a trap
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                    raise ValueError("it is compressed, which torch never does")
        foreign = get_unsafe_globals_in_checkpoint(path)
        with warnings.catch_warnings(), safe_globals([(_StandIn, name) for name in foreign]):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises errors of many kinds for damaged files
        lines = str(error).strip().splitlines() or [type(error).__name__]
        advice = isinstance(error, UnpicklingError) or "weights_only" in lines[0]  # torch's advice is to run the code
        reason = "" if advice else f" ({lines[0].split('. ')[0]})"
        raise ConfigError(
            f"{path} is damaged, or cannot be read without running code{reason}: where it was made and is trusted, "
            "save only its state_dict"
        ) from None
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ConfigError(f"{path} holds no state_dict of tensors, so it is not a Lightning checkpoint")
    return {str(name).replace("_orig_mod.", ""): value for name, value in weights.items()}  # torch.compile's prefix


def plain(name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` as float32, if it is an array of finite numbers. Raises ConfigError for tensors of any other kind."""
    kinds = {
        "quantised": value.is_quantized,
        "nested": value.is_nested,
        "sparse": value.layout != torch.strided,
        "meta": value.is_meta,
        "single-number": not value.is_nested and value.dim() == 0,
        str(value.dtype): not value.is_floating_point(),
    }
    kind = next((kind for kind, wrong in kinds.items() if wrong), None)
    if kind is not None:
        raise ConfigError(f"{name} is a {kind} tensor, not an array of weights: save its plain values")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise ConfigError(f"{name} states the shape {list(value.shape)}, for which the file has too few values")
    value = value.float()
    if not value.isfinite().all():
        raise ConfigError(f"{name} has weights that are NaN or infinite: convert an earlier checkpoint")
    return value


def convert(weights: dict[str, torch.Tensor], args: Arguments) -> Encoder:
    """Build the encoder from the tensors of an Audio-JEPA checkpoint. Raises ConfigError for any other layout."""
    prefix = {"target": "target_encoder.", "context": "encoder."}[args.encoder]
    theirs = {
        name.removeprefix(prefix): plain(f"{args.checkpoint}: {name}", value)
        for name, value in weights.items()
        if name.startswith(prefix)
    }
    try:
        patch, positions = theirs.pop("patch_embed.proj.weight"), theirs.pop("pos_embed")
        width = len(patch)
        depth = 1 + max(int(name.split(".")[1]) for name in theirs if name.startswith("blocks."))
    except (KeyError, ValueError):
        raise ConfigError(
            f"{args.checkpoint} is not laid out as Audio-JEPA's: it needs {prefix}patch_embed.proj.weight, "
            f"{prefix}pos_embed and {prefix}blocks but has {', '.join(sorted(weights)[:3]) or 'nothing'}..."
        ) from None
    size = next((name for name, (w, layers, _) in SIZES.items() if (w, layers) == (width, depth)), None)
    spec = LOG_MEL_PRESETS[args.front_end]
    rows, columns = spec.grid
    if size is None:
        known = ", ".join(f"{w} x {layers}" for w, layers, _ in SIZES.values())
        raise ConfigError(f"{args.checkpoint}: its encoder is {width} wide with {depth} layers; ajepa has {known}")
    if patch.shape[1:] != (1, spec.patch[1], spec.patch[0]) or positions.shape != (1, rows * columns, width):
        raise ConfigError(
            f"{args.checkpoint}: patches {list(patch.shape)} and positions {list(positions.shape)} are not those of "
            f"{spec.n_frames} frames x {spec.n_mels} mels in patches of {spec.patch[1]} x {spec.patch[0]}"
        )
    positions = positions[0].unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
    if not torch.allclose(positions, sincos_positions(width, spec.grid), atol=1e-3):
        raise ConfigError(f"{args.checkpoint}: its positions are not the fixed 2-D sine-cosine positions")

    renamed = {"embed.weight": patch[:, 0].transpose(1, 2).flatten(1)}
    for name, value in theirs.items():
        matches = [re.sub(pattern, new, name) for pattern, new in NAMES if re.search(pattern, name)]
        renamed[matches[0] if matches else name] = value
    for i in range(depth):  # checkpoints without these biases are equivalent to zero biases
        renamed.setdefault(f"blocks.{i}.qkv.bias", torch.zeros(3 * width))
    encoder = Encoder(
        EncoderConfig(
            front_end=spec,
            size=size,  # type: ignore[arg-type]
            clip_samples=CLIP_SECONDS * spec.sample_rate,
            pooling=args.pooling,
            pad="silence",  # as in the authors' code
            norm_eps=1e-5,  # torch's default, which the authors' configuration keeps
        )
    )
    try:
        encoder.vit.load_state_dict(renamed)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{args.checkpoint} is not laid out as Audio-JEPA's: {reason}") from error
    return encoder


@command
def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "python -m ajepa.convert")
    encoder = convert(read_checkpoint(Path(args.checkpoint)), args)
    encoder.save_pretrained(args.out)
    frames = f"frames of width {encoder.output_dim} every {encoder.hop_size_in_ms:g} ms"
    print(f"{args.out}: {args.encoder} encoder, {frames}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
