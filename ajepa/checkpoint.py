"""Checkpoints that are either whole or absent: written beside, synced, renamed; checked by SHA-256 when read.

A checkpoint is a folder `step_<n>` with `model.safetensors`, `optimizer.safetensors`, `state.json` and the checksums of
the three. Nothing in it is a pickle, so loading one cannot run code.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from ajepa.engine import Engine
from ajepa.files import write_synced

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is damaged or foreign."""


def save_checkpoint(folder: Path, step: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step_<step>` after `step` finished steps and drop all but the last `keep`."""
    final = folder / f"step_{step:08d}"
    if final.exists():
        return final
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "model.safetensors": save_bytes({k: v.contiguous().cpu() for k, v in engine.model.state_dict().items()}),
        "optimizer.safetensors": save_bytes(_optimizer_tensors(engine)),
        "state.json": json.dumps({"format": FORMAT, "step": step, **state}).encode(),
    }
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    contents["checksums.json"] = json.dumps(sums, indent=2).encode()
    partial = folder / f".partial_{final.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, data in contents.items():
            write_synced(partial / name, data)
        _sync(partial)
        partial.rename(final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not save {final}: {error}. Earlier checkpoints are intact.") from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def load_latest(folder: Path, engine: Engine) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest whole checkpoint into `engine`.

    Returns its state (None where there is no checkpoint) and a message for each damaged one that was passed over.
    Raises CheckpointError where checkpoints exist and none can be used.
    """
    for leftover in folder.glob(".partial_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return load_checkpoint(path, engine), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(damaged))
    return None, []


def load_checkpoint(path: Path, engine: Engine) -> dict[str, Any]:
    """Verify and load one checkpoint; returns its state. The engine is untouched where this raises CheckpointError."""
    contents = read_verified(path)
    state = json.loads(contents["state.json"])
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {state.get('format')}, this version reads {FORMAT}")
    try:
        model, moments = load_bytes(contents["model.safetensors"]), load_bytes(contents["optimizer.safetensors"])
    except Exception as error:  # safetensors has an exception type of its own
        raise CheckpointError(f"{path}: not safetensors: {error}") from error
    own = engine.model.state_dict()
    wrong = [k for k in own.keys() | model.keys() if k not in own or k not in model or own[k].shape != model[k].shape]
    if wrong:
        raise CheckpointError(f"{path} belongs to another model: {len(wrong)} tensors differ, such as {min(wrong)}")
    engine.model.load_state_dict(model)
    _load_optimizer(engine, moments)
    return state


def read_verified(path: Path) -> dict[str, bytes]:
    """The files of a checkpoint, checked against their SHA-256."""
    try:
        sums = json.loads((path / "checksums.json").read_bytes())
        contents = {name: (path / name).read_bytes() for name in FILES}
        for name, data in contents.items():
            if hashlib.sha256(data).hexdigest() != sums[name]:
                raise CheckpointError(f"{path / name} is damaged: its SHA-256 is not the one it was saved with")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or not a checkpoint of ajepa: {error!r}") from error
    return contents


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _optimizer_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Optimiser state by parameter name, and torch's random state."""
    names: dict[torch.Tensor, str] = {p: name for name, p in engine.model.named_parameters()}
    tensors = {
        f"{key}/{names[p]}": value.contiguous().cpu()
        for p, state in engine.optimizer.state.items()
        for key, value in state.items()
    }
    tensors["rng/cpu"] = torch.get_rng_state()
    if engine.device.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(engine.device)
    return tensors


def _load_optimizer(engine: Engine, tensors: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(tensors.pop("rng/cpu"))
    cuda_state = tensors.pop("rng/cuda", None)
    if cuda_state is not None and engine.device.type == "cuda":
        torch.cuda.set_rng_state(cuda_state, engine.device)
    order = {name: i for i, name in enumerate(_names_in_order(engine))}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        key, parameter = name.split("/", 1)
        state.setdefault(order[parameter], {})[key] = value
    groups = engine.optimizer.state_dict()["param_groups"]
    engine.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _names_in_order(engine: Engine) -> list[str]:
    names: dict[torch.Tensor, str] = {p: name for name, p in engine.model.named_parameters()}
    return [names[p] for group in engine.optimizer.param_groups for p in group["params"]]
