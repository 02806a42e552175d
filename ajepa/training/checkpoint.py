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
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from ajepa.training.ranks import Ranks
from ajepa.utils.atomic_files import write_synced
from ajepa.utils.run_folder import CheckpointError, checkpoints, read_verified, steps_of

FORMAT = 1


class Trainer(Protocol):
    """The part of an engine, or of the fine-tuning, that a checkpoint holds."""

    @property
    def device(self) -> torch.device: ...
    @property
    def ranks(self) -> Ranks: ...
    @property
    def model(self) -> torch.nn.Module: ...
    @property
    def optimizer(self) -> torch.optim.Optimizer: ...


def save_checkpoint(
    folder: Path, step: int, trainer: Trainer, state: dict[str, Any], keep: int, spare: int | None = None
) -> Path:
    """Write `folder/step_<step>` after `step` finished steps, and delete all but the last `keep` checkpoints.

    The checkpoint of step `spare` is not deleted. All ranks must call this. Raises CheckpointError on rank 0
    (ElsewhereError on the other ranks) if the checkpoint cannot be written, and ReplicaError if the ranks hold
    different weights.
    """
    ranks, final = trainer.ranks, folder / f"step_{step:08d}"
    if ranks.first(final.exists):
        return final
    ranks.check_alike(trainer.model, step)
    model, optimizer = _model_tensors(trainer), _optimizer_tensors(trainer)
    ranks.first(lambda: _write(final, model, optimizer, {"format": FORMAT, "step": step, **state}))
    for old in checkpoints(folder)[:-keep] if ranks.is_first else ():
        if steps_of(old) != spare:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _write(
    final: Path, model: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor], state: dict[str, Any]
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


def load_latest(folder: Path, trainer: Trainer) -> tuple[dict[str, Any] | None, list[str]]:
    """Load the newest whole checkpoint into `trainer`.

    Returns its state (None if there is no checkpoint) and a message for each damaged checkpoint that was skipped.
    Raises CheckpointError if checkpoints exist but none is usable, or if the ranks find different checkpoints.
    """
    if trainer.ranks.is_first:
        for leftover in folder.glob(".partial_*"):
            shutil.rmtree(leftover, ignore_errors=True)
    state, damaged = trainer.ranks.together(lambda: _load_newest(folder, trainer))
    steps = trainer.ranks.gather(state["step"] if state else 0)
    if len(set(steps)) > 1:
        raise CheckpointError(f"{folder}: ranks find different checkpoints (steps {steps}): all nodes must share it")
    return state, damaged


def _load_newest(folder: Path, trainer: Trainer) -> tuple[dict[str, Any] | None, list[str]]:
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return load_checkpoint(path, trainer), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    if damaged:
        raise CheckpointError("no checkpoint can be used: " + "; ".join(damaged))
    return None, []


def load_checkpoint(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Verify and load one checkpoint; return its state. Where this raises CheckpointError, the trainer is unchanged."""
    contents = read_verified(path)
    try:
        state = json.loads(contents["state.json"])
        model, optimizer = load_bytes(contents["model.safetensors"]), load_bytes(contents["optimizer.safetensors"])
    except Exception as error:  # safetensors has an exception type of its own; a deep JSON raises RecursionError
        raise CheckpointError(f"{path} is not a checkpoint of ajepa, not safetensors or not JSON: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("step"), int):
        found = state.get("format") if isinstance(state, dict) else None
        raise CheckpointError(f"{path}: format {found}, this version reads {FORMAT}")
    own = trainer.model.state_dict()
    wrong = [k for k in own.keys() | model.keys() if k not in own or k not in model or own[k].shape != model[k].shape]
    random = {name: optimizer.pop(name) for name in list(optimizer) if name.startswith("rng/")}
    for name, value in optimizer.items():
        p = own.get(name.partition("/")[2])
        if p is None or (value.ndim and value.shape != p.shape):
            wrong.append(name)
    wrong += [k for k, v in random.items() if v.dtype != torch.uint8 or (k[4:7] == "cpu" and v.shape != _rng_shape())]
    if wrong:
        raise CheckpointError(f"{path} belongs to another model: {len(wrong)} tensors differ, such as {min(wrong)}")
    trainer.ranks.load(trainer.model, model)
    _load_optimizer(trainer, optimizer)
    _load_random(trainer, random)
    return state


def _sync(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders, and writes their entries without being asked
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _model_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Whole weights on the CPU of rank 0; an empty dictionary on the other ranks."""
    ranks = trainer.ranks
    return _on_first(
        ranks, ((name, ranks.whole_weight(value)) for name, value in ranks.complete(trainer.model).items())
    )


def _optimizer_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Optimiser state by parameter name, and the random state of every rank."""
    parameters = dict(trainer.model.named_parameters())
    names = {trainer.ranks.local(p): name for name, p in parameters.items()}
    ranks = trainer.ranks
    states = [
        (p, trainer.optimizer.state.get(p, {})) for group in trainer.optimizer.param_groups for p in group["params"]
    ]
    tensors = _on_first(
        ranks,
        (  # in one order on all ranks, whatever order they were loaded in; a step count is the same on all ranks
            (f"{key}/{names[p]}", ranks.whole(parameters[names[p]], state[key]) if state[key].ndim else state[key])
            for p, state in states
            for key in sorted(state)
        ),
    )
    # Rank 0 may still be copying the tensors.
    for rank, (cpu, cuda) in enumerate(ranks.gather(_random_state(trainer.device), patient=True)):
        tensors[f"rng/cpu/{rank}"] = cpu
        if cuda is not None:
            tensors[f"rng/cuda/{rank}"] = cuda
    return tensors


def _on_first(ranks: Ranks, tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Copy whole tensors, which all ranks gather one at a time, to the CPU of rank 0."""
    return {name: whole.detach().contiguous().cpu() for name, whole in tensors if ranks.is_first}


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _rng_shape() -> torch.Size:
    return torch.get_rng_state().shape


def _load_random(trainer: Trainer, states: dict[str, torch.Tensor]) -> None:
    """Restore this rank's random state. A rank that the saved run did not have keeps its fresh state."""
    rank = trainer.ranks.rank
    if (state := states.get(f"rng/cpu/{rank}")) is not None:
        torch.set_rng_state(state)
    if trainer.device.type == "cuda" and (state := states.get(f"rng/cuda/{rank}")) is not None:
        torch.cuda.set_rng_state(state, trainer.device)


def _load_optimizer(trainer: Trainer, tensors: dict[str, torch.Tensor]) -> None:
    ranks = trainer.ranks
    parameters = dict(trainer.model.named_parameters())
    names = {ranks.local(p): name for name, p in parameters.items()}
    order = {names[p]: i for i, p in enumerate(p for group in trainer.optimizer.param_groups for p in group["params"])}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        key, parameter = name.split("/", 1)
        part = ranks.part(parameters[parameter], value) if value.ndim else value
        moments.setdefault(order[parameter], {})[key] = part
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": moments, "param_groups": groups})
