"""`python -m ajepa.export RUN OUT`: export a run's encoder for use in other programs.

By default OUT is a folder in Hugging Face's layout (`config.json`, `model.safetensors`, a model card), which
`ajepa.Encoder.from_pretrained` reads. With `--xares`, OUT is one Python file for X-ARES that needs only torch. It holds
the source of `ajepa/evaluation/xares_encoder.py`, the configuration, and up to 32 MB of weights; larger weights go into
a .safetensors file beside it. X-ARES stores results by class name, so the class name contains a checksum of the
weights. With `--onnx`, OUT is an ONNX model, front end included, for clips of the training length.
"""

import base64
import dataclasses
import hashlib
import inspect
import keyword
import pprint
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import SafetensorError, safe_open

from ajepa.config import SIZES, ConfigError, Pooling
from ajepa.encoder import Encoder
from ajepa.evaluation import xares_encoder
from ajepa.model.clip import Projector
from ajepa.model.pooling import Layers
from ajepa.utils import cli
from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.command import command
from ajepa.utils.folders import claim_file
from ajepa.utils.tensor_files import tensors_bytes
from ajepa_kernels.log_mel import _tables

PROGRAM = "ajepa.export"  # stands in what is written, so that the next export may replace it
INSIDE = 32 << 20  # largest size in bytes of weights inside the Python file


@dataclass(frozen=True)
class Arguments:
    """Export a run's encoder as a folder in Hugging Face's layout, one file for X-ARES, or an ONNX model."""

    encoder: tyro.conf.Positional[str]
    """Encoder to export: a run folder, a checkpoint, a fine-tuning, an exported or converted folder, or a hub id."""
    out: tyro.conf.Positional[str]
    """Folder to write; with --xares the Python file, with --onnx the model file."""
    xares: bool = False
    """Write one Python file for X-ARES instead of a folder."""
    onnx: bool = False
    """Write an ONNX model instead: float32 clips [batch, samples] of the training length to [batch, frames, width]."""
    pooling: Pooling | None = None
    """How latents are pooled; None uses the encoder's own setting. mean, concat: frames of one time patch, by the mean
    over frequency or with the frequency rows side by side. mean+std, concat+std, projection: one frame per chunk."""
    layers: Layers | None = None
    """last: the encoder's output. mean: the average of all blocks' outputs, each layer-normalised. None uses the
    encoder's own setting."""


def portable_parts(encoder: Encoder) -> tuple[dict[str, Any], bytes]:
    """Configuration and weights (safetensors) for `ajepa.evaluation.xares_encoder.Portable`."""
    cfg = encoder.config
    spec, (width, depth, heads) = cfg.front_end, SIZES[cfg.size]
    bias, add = spec.frame_rule
    front_end: dict[str, Any] = {
        **dataclasses.asdict(spec), "log_floor": spec.log_floor, "first_sample": spec.first_sample,
        "min_samples": spec.min_samples, "frame_bias": bias, "frame_add": add, "grid": spec.grid,
    }  # fmt: skip
    config = {
        **dataclasses.asdict(cfg), "front_end": front_end, "width": width, "depth": depth, "heads": heads,
        "output_dim": encoder.output_dim, "hop_size_in_ms": encoder.hop_size_in_ms, "stride": encoder.stride,
        "frames_kept": encoder.chunks(cfg.clip_samples + 1)[0].frames, "per_frame": encoder.per_frame,
    }  # fmt: skip
    window, mel = _tables(spec, torch.device("cpu"), torch.float32)
    tensors = {**encoder.vit.state_dict(), "window": window, "mel": mel, "positions": encoder.vit.positions}
    if encoder.config.pooling == "projection":
        assert encoder.projector is not None
        tensors |= {f"projector.{name}": value for name, value in folded(encoder.projector).items()}
    weights = tensors_bytes({name: value.float() for name, value in tensors.items()}, program=PROGRAM)
    return {**config, "sha256": hashlib.sha256(weights).hexdigest()}, weights


def folded(projector: Projector) -> dict[str, torch.Tensor]:
    """Weights of two linear layers with a GELU between them, which compute what the projector does in evaluation."""
    norm, fc1, fc2 = projector.norm, projector.fc1, projector.fc2
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = (fc1.bias - norm.running_mean) * scale + norm.bias
    return {"fc1.weight": fc1.weight * scale[:, None], "fc1.bias": bias, "fc2.weight": fc2.weight, "fc2.bias": fc2.bias}


def portable_source(encoder: Encoder) -> tuple[str, str, bytes]:
    """Class name, source without weights, and weights (safetensors) of the file for X-ARES."""
    config, weights = portable_parts(encoder)
    name = f"Ajepa{encoder.fingerprint()}Encoder"
    source = inspect.getsource(xares_encoder)
    source = source.replace("CONFIG: dict = {}", f"CONFIG: dict = {pprint.pformat(config, width=116)}")
    return name, f"{source}\n\nclass {name}(Portable):\n    pass\n", weights


def write_xares(encoder: Encoder, path: Path) -> str:
    """Write the Python file, and large weights into a file beside it. Returns the class name."""
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        raise ConfigError(f"{path}: X-ARES imports the file by its name, so use a module name such as my_encoder.py")
    beside = path.with_suffix(".safetensors")
    claim_file(path, _is_xares, "OUT")
    name, source, weights = portable_source(encoder)
    if len(weights) <= INSIDE:
        source = source.replace('WEIGHTS = ""', f'WEIGHTS = "{base64.b64encode(weights).decode()}"')
    else:
        claim_file(beside, _is_xares_weights, "OUT")
        write_atomic(beside, weights)
    write_atomic(path, source.encode())
    return name


def _is_xares(path: Path) -> bool:
    head = inspect.getsource(xares_encoder).encode().partition(b"\n")[0]
    with open(path, "rb") as file:
        return file.read(len(head)) == head


def _is_xares_weights(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("program") == PROGRAM
    except SafetensorError:
        return False


class _Chunks(torch.nn.Module):
    def __init__(self, encoder: Encoder):
        super().__init__()
        self.portable = xares_encoder.Portable(*portable_parts(encoder))

    def forward(self, audio):
        return self.portable.encode_rows(audio)


def write_onnx(encoder: Encoder, path: Path) -> None:
    """Write a model of any batch size from `audio`, float32 `[batch, clip_samples]`, to `frames` `[batch, T', D]`."""
    try:
        import onnxscript  # noqa: F401 (torch.onnx needs it, but its error is less clear)
    except ImportError as error:
        raise ConfigError("--onnx needs onnx and onnxscript: pip install 'ajepa[onnx]'") from error
    claim_file(path, _is_onnx, "OUT")
    audio = torch.zeros(2, encoder.config.clip_samples)
    program = torch.onnx.export(
        _Chunks(encoder).eval(), (audio,), dynamo=True, verbose=False, input_names=["audio"], output_names=["frames"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )  # fmt: skip
    assert program is not None
    program.model.producer_name = PROGRAM
    write_atomic(path, program.model_proto.SerializeToString())


def _is_onnx(path: Path) -> bool:
    """Whether the first fields of the model, its version and its producer, are those of `write_onnx`."""
    with open(path, "rb") as file:
        return PROGRAM.encode() in file.read(len(PROGRAM) + 16)


@command
def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "python -m ajepa.export")
    if args.xares and args.onnx:
        raise ConfigError("--xares and --onnx write different files: use one at a time")
    encoder = Encoder.from_pretrained(args.encoder, pooling=args.pooling, layers=args.layers)
    out = Path(args.out)
    if args.onnx:
        write_onnx(encoder, out)
        print(f"{out}: [batch, {encoder.config.clip_samples}] at {encoder.sampling_rate} Hz to "
              f"[batch, {encoder.frames(encoder.config.clip_samples)}, {encoder.output_dim}]")  # fmt: skip
    elif args.xares:
        print(f"{out}: class {write_xares(encoder, out)}")
    else:
        encoder.save_pretrained(out)
        print(f"{out}: frames of width {encoder.output_dim} every {encoder.hop_size_in_ms:g} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
