"""Checkpoints that are either whole or absent: written to a temporary folder, synced and renamed.

A checkpoint is a folder `step_<n>` with `model.safetensors`, `optimizer.safetensors`, `state.json` and their SHA-256
checksums, which are verified when it is read. It holds no pickle, so loading it cannot run code; for the same reason
sharded weights do not use torch.distributed.checkpoint, whose metadata is a pickle. Rank 0 gathers whole tensors one at
a time and writes them, and every rank cuts its own part out of them when it loads. A checkpoint therefore depends
neither on the number of ranks nor on how they shard the weights. All ranks must be able to read the folder.
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
from ajepa.utils.run_folder import CheckpointError, checkpoints, read_verified

FORMAT = 1


def save_checkpoint(folder: Path, step: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Write `folder/step_<step>` after `step` finished steps, and delete all but the last `keep` checkpoints.

    All ranks must call this. Raises CheckpointError on rank 0 (ElsewhereError on the other ranks) if the checkpoint
    cannot be written, and ReplicaError if the ranks hold different weights.
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


def load_latest(folder: Path, engine: Engine) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest whole checkpoint into `engine`.

    Returns its state (None if there is no checkpoint) and a message for each damaged checkpoint that was skipped.
    Raises CheckpointError if checkpoints exist but none is usable, or if the ranks find different checkpoints.
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
    """Verify and load one checkpoint; return its state. Where this raises CheckpointError, the engine is unchanged."""
    contents = read_verified(path)
    try:
        state = json.loads(contents["state.json"])
        model, optimizer = load_bytes(contents["model.safetensors"]), load_bytes(contents["optimizer.safetensors"])
    except Exception as error:  # safetensors has an exception type of its own; a deep JSON raises RecursionError
        raise CheckpointError(f"{path} is not a checkpoint of ajepa, not safetensors or not JSON: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("step"), int):
        found = state.get("format") if isinstance(state, dict) else None
        raise CheckpointError(f"{path}: format {found}, this version reads {FORMAT}")
    own = dict(engine.model.named_parameters())  # buffers are constants and are not saved
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


def _sync(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders, and writes their entries without being asked
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _model_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Whole weights on the CPU of rank 0; an empty dictionary on the other ranks."""
    return _on_first(engine, {name: (value, value) for name, value in engine.model.state_dict().items()})


def _optimizer_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """Optimiser state by parameter name, and the random state of every rank."""
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
    """Gather each (parameter, this rank's part) to a whole tensor on the CPU of rank 0, one tensor at a time."""
    ranks, tensors = engine.ranks, {}
    for name, (parameter, value) in values.items():
        whole = ranks.whole(parameter, value) if value.ndim else value  # a step count is the same on all ranks
        if ranks.is_first:
            tensors[name] = whole.detach().contiguous().cpu()
    return tensors


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _rng_shape() -> torch.Size:
    return torch.get_rng_state().shape


def _load_random(engine: Engine, states: dict[str, torch.Tensor]) -> None:
    """Restore this rank's random state. A rank that the saved run did not have keeps its fresh state."""
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
