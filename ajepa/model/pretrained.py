"""The pretrained weights in a run folder."""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load as load_bytes

from ajepa import config
from ajepa.config import Config, ConfigError
from ajepa.utils.run_folder import CheckpointError, checkpoints, is_checkpoint, read_verified, run_of

ENCODER, PROJECTOR = "encoder.safetensors", "projector.safetensors"


class Pretrained(NamedTuple):
    """A run's configuration, and the weights of its encoder by parameter name."""

    cfg: Config
    weights: dict[str, torch.Tensor]
    """Those of the EMA target encoder, or of the trained encoder where the run keeps no average of it."""
    file: Path
    """Where the weights were read: `encoder.safetensors`, or a checkpoint folder."""
    projector: dict[str, torch.Tensor] | None
    """Weights of the projector of a clip objective (`ajepa.model.clip.Projector`); None for a run without one."""


def load_pretrained(path: Path) -> Pretrained:
    """The encoder and the projector of `path`: a run folder, or one of its checkpoints.

    A finished run gives its `encoder.safetensors` and `projector.safetensors`, an unfinished one its newest whole
    checkpoint. Nothing that is read can run code. Raises ConfigError.
    """
    run = run_of(path)
    cfg = config.load(run / "config.json")
    final = run / ENCODER
    if not is_checkpoint(path) and final.is_file():
        beside = run / PROJECTOR
        projector = read_safetensors(beside.read_bytes(), beside) if beside.is_file() else None
        return Pretrained(cfg, read_safetensors(final.read_bytes(), final), final, projector)
    reasons = []
    for folder in [path] if is_checkpoint(path) else reversed(checkpoints(run / "checkpoints")):
        try:
            model = read_safetensors(read_verified(folder)["model.safetensors"], folder)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        weights = _part(model, f"{cfg.network}.")
        return Pretrained(cfg, weights, folder, _part(model, "clip.projector.") or None)
    raise ConfigError("; ".join([f"{path} has neither {ENCODER} nor a usable checkpoint", *reasons]))


def _part(model: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): x for name, x in model.items() if name.startswith(prefix)}


def load_weights(module: torch.nn.Module, weights: dict[str, torch.Tensor], file: Path | str) -> None:
    """Copy `weights`, read from `file`, into `module`. Raises ConfigError if names or shapes differ."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ConfigError(f"{file} does not fit its config.json: {' '.join(str(error).split())}") from error


def read_safetensors(data: bytes, file: Path) -> dict[str, torch.Tensor]:
    """The tensors in `data`, the contents of `file`. Raises ConfigError."""
    try:
        return load_bytes(data)
    except Exception as error:  # safetensors has an exception type of its own
        raise ConfigError(f"{file} is not a safetensors file: {error}") from error
