"""The pretrained weights in a run folder."""

from pathlib import Path
from typing import NamedTuple

import torch

from ajepa import config
from ajepa.config import Config, ConfigError
from ajepa.utils.errors import UserError
from ajepa.utils.run_folder import checkpoints, is_checkpoint, read_verified, run_of
from ajepa.utils.tensor_files import parse_tensors, read_tensors

ENCODER, PROJECTOR = "encoder.safetensors", "projector.safetensors"


class Weights(NamedTuple):
    """Weights of an encoder by parameter name."""

    weights: dict[str, torch.Tensor]
    """Those of the EMA target encoder, or of the trained encoder where the run keeps no average of it."""
    file: Path
    """Where the weights were read: `encoder.safetensors`, or a checkpoint folder."""
    projector: dict[str, torch.Tensor] | None
    """Weights of the projector of a clip objective (`ajepa.model.clip.Projector`); None for a run without one."""


class Pretrained(NamedTuple):
    """A run's configuration, and what `Weights` has."""

    cfg: Config
    weights: dict[str, torch.Tensor]
    file: Path
    projector: dict[str, torch.Tensor] | None


def load_pretrained(path: Path) -> Pretrained:
    """The encoder and the projector of `path`: a run folder, or one of its checkpoints.

    Nothing that is read can run code. Raises ConfigError, and DamagedError for a file that changed.
    """
    cfg = config.load(run_of(path) / "config.json")
    return Pretrained(cfg, *read_weights(path, cfg.network))


def read_weights(path: Path, network: str = "target_encoder") -> Weights:
    """The weights in `path`: the folder of a run or of a fine-tuning, or one of its checkpoints.

    A finished run gives its `encoder.safetensors` and `projector.safetensors`, an unfinished one `network` in its
    newest whole checkpoint. Raises ConfigError and DamagedError.
    """
    final, beside = path / ENCODER, path / PROJECTOR
    if not is_checkpoint(path) and final.is_file():
        return Weights(read_tensors(final), final, read_tensors(beside) if beside.is_file() else None)
    reasons = []
    for folder in [path] if is_checkpoint(path) else reversed(checkpoints(path / "checkpoints")):
        try:
            model = parse_tensors(read_verified(folder)["model.safetensors"], folder / "model.safetensors")
        except UserError as error:
            reasons.append(str(error))
            continue
        weights = _part(model, f"{network}.") or _part(model, "encoder.")  # the latter in a fine-tuning
        return Weights(weights, folder, _part(model, "clip.projector.") or None)
    raise ConfigError("; ".join([f"{path} has neither {ENCODER} nor a usable checkpoint", *reasons]))


def _part(model: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in model.items() if name.startswith(prefix)}


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], file: Path | str) -> None:
    """Copy `weights`, read from `file`, into `module`. Raises ConfigError if names or shapes differ."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{file} does not fit its config.json: {' '.join(str(error).split())}") from error
