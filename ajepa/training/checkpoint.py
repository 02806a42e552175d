"""Checkpoints that are either whole or absent: written beside, synced, renamed; checked by SHA-256 when read.

A checkpoint is a folder `step_<n>` with `model.safetensors`, `optimizer.safetensors`, `state.json` and the checksums of
the three. Nothing in it is a pickle, so loading one cannot run code; that is why sharded weights are not left to the
storage of torch.distributed.checkpoint, whose metadata is one. Rank 0 writes whole tensors, gathered one at a time, and
every rank cuts its part out of them again: a checkpoint does not depend on the number of ranks, nor on how they share
the weights. It must lie where all of them can read it.
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

from ajepa.training.engine import Engine
from ajepa.utils.atomic_files import write_synced

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or is damaged or foreign."""


def save_checkpoint(folder: Path, step: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step_<step>` after `step` finished steps and drop all but the last `keep`. All ranks must call.

    Raises CheckpointError (on rank 0; ElsewhereError on the others) where it cannot be written, ReplicaError where
    ranks have drifted apart.
    """
    ranks, final = engine.ranks, folder / f"step_{step:08d}"
    if ranks.first(final.exists):
        return final
    ranks.check_alike(engine.model, step)
    model, optimizer = _model_tensors(engine), _optimizer_tensors(engine)
    ranks.first(lambda: _write(final, model, optimizer, {"format": FORMAT, "step": step, **state}, keep))
    return final


def _write(
    final: Path, model: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor], state: dict[str, Any], keep: int
) -> None:
    folder = final.parent
    contents = {
        "model.safetensors": save_bytes(model),
        "optimizer.safetensors": save_bytes(optimizer),
        "state.json": json.dumps(state).encode(),
    }
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    contents["checksums.json"] = json.dumps(sums, indent=2).encode()
    partial = folder / f".partial_{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
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


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def load_latest(folder: Path, engine: Engine) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest whole checkpoint into `engine`.

    Returns its state (None where there is no checkpoint) and a message for each damaged one that was passed over.
    Raises CheckpointError where checkpoints exist and none can be used, or ranks do not find the same.
    """
    if engine.ranks.is_first:
        for leftover in folder.glob(".partial_*"):
            shutil.rmtree(leftover, ignore_errors=True)
    state, damaged = engine.ranks.together(lambda: _load_newest(folder, engine))
    steps = engine.ranks.gather(state["step"] if state else 0)
    if len(set(steps)) > 1:
        raise CheckpointError(f"{folder}: ranks find different checkpoints (steps {steps}): all nodes must share it")
    return state, damaged


def _load_newest(folder: Path, engine: Engine) -> tuple[dict[str, Any] | None, list[str]]:
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
    try:
        state = json.loads(contents["state.json"])
        model, optimizer = load_bytes(contents["model.safetensors"]), load_bytes(contents["optimizer.safetensors"])
    except Exception as error:  # safetensors has an exception type of its own; a deep JSON raises RecursionError
        raise CheckpointError(f"{path} is not a checkpoint of ajepa, not safetensors or not JSON: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("step"), int):
        found = state.get("format") if isinstance(state, dict) else None
        raise CheckpointError(f"{path}: format {found}, this version reads {FORMAT}")
    own = dict(engine.model.named_parameters())  # its buffers are constants
    wrong = [k for k in own.keys() | model.keys() if k not in own or k not in model or own[k].shape != model[k].shape]
    random = {name: optimizer.pop(name) for name in list(optimizer) if name.startswith("rng/")}
    for name, value in optimizer.items():
        p = own.get(name.partition("/")[2])
        if p is None or (value.ndim and value.shape != p.shape):
            wrong.append(name)
    wrong += [k for k, v in random.items() if v.dtype != torch.uint8 or (k[4:7] == "cpu" and v.shape != _rng_shape())]
    if wrong:
        raise CheckpointError(f"{path} belongs to another model: {len(wrong)} tensors differ, such as {min(wrong)}")
    engine.ranks.load(engine.model, model)
    _load_optimizer(engine, optimizer)
    _load_random(engine, random)
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
    if os.name == "nt":  # Windows opens no folders, and keeps their entries by itself
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _model_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole weights on the CPU of rank 0; nothing on the others."""
    return _on_first(engine, {name: (value, value) for name, value in engine.model.state_dict().items()})


def _optimizer_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Optimiser state by parameter name, and every rank's random state."""
    parameters = dict(engine.model.named_parameters())
    names = {engine.ranks.local(p): name for name, p in parameters.items()}
    tensors = _on_first(
        engine,
        {
            f"{key}/{names[local]}": (parameters[names[local]], value)
            for local, state in engine.optimizer.state.items()
            for key, value in state.items()
        },
    )
    for rank, (cpu, cuda) in enumerate(engine.ranks.gather(_random_state(engine.device))):
        tensors[f"rng/cpu/{rank}"] = cpu
        if cuda is not None:
            tensors[f"rng/cuda/{rank}"] = cuda
    return tensors


def _on_first(engine: Engine, values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """From (parameter, this rank's part): whole tensors on the CPU of rank 0, gathered one after the other."""
    ranks, tensors = engine.ranks, {}
    for name, (parameter, value) in values.items():
        whole = ranks.whole(parameter, value) if value.ndim else value  # a count of steps is the same on all ranks
        if ranks.is_first:
            tensors[name] = whole.detach().contiguous().cpu()
    return tensors


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _rng_shape() -> torch.Size:
    return torch.get_rng_state().shape


def _load_random(engine: Engine, states: dict[str, torch.Tensor]) -> None:
    """A rank that the saved run did not have keeps its fresh random state."""
    rank = engine.ranks.rank
    if (state := states.get(f"rng/cpu/{rank}")) is not None:
        torch.set_rng_state(state)
    if engine.device.type == "cuda" and (state := states.get(f"rng/cuda/{rank}")) is not None:
        torch.cuda.set_rng_state(state, engine.device)


def _load_optimizer(engine: Engine, tensors: dict[str, torch.Tensor]) -> None:
    ranks = engine.ranks
    parameters = dict(engine.model.named_parameters())
    names = {ranks.local(p): name for name, p in parameters.items()}
    order = {names[p]: i for i, p in enumerate(p for group in engine.optimizer.param_groups for p in group["params"])}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        key, parameter = name.split("/", 1)
        part = ranks.part(parameters[parameter], value) if value.ndim else value
        moments.setdefault(order[parameter], {})[key] = part
    groups = engine.optimizer.state_dict()["param_groups"]
    engine.optimizer.load_state_dict({"state": moments, "param_groups": groups})
