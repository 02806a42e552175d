"""Pairs of the tensors of two modules, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}  # parts of names that wrappers add


def _named(module: nn.Module, buffers: bool) -> dict[str, torch.Tensor]:
    """All parameters and persistent buffers under all their names, without the parts that wrappers add."""
    named: dict[str, torch.Tensor] = {}
    for prefix, part in module.named_modules(remove_duplicate=False):
        tensors = dict(part._parameters)
        if buffers:
            tensors |= {k: x for k, x in part._buffers.items() if k not in part._non_persistent_buffers_set}
        for name, x in tensors.items():
            if x is not None:
                named[".".join(w for w in (*prefix.split("."), name) if w and w not in WRAPPERS)] = x
    while named and all(name.startswith("module.") for name in named):  # DistributedDataParallel
        named = {name.removeprefix("module."): x for name, x in named.items()}
    return named


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)


def named_pairs(model: nn.Module, target: nn.Module, buffers: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs (tensor of the model, tensor of the target) of the same name, each once. A shared tensor has no pair."""
    op = "AdamWEMA.from_model"
    sources, targets = _named(model, buffers), _named(target, buffers)
    trained = [name for name, x in targets.items() if x.requires_grad]
    if trained:
        raise ValueError(
            f"{op}: {len(trained)} parameters of the target require a gradient ({_some(trained)}); "
            "call target.requires_grad_(False)"
        )
    problems = []
    for where, names in (
        ("only in the model", [name for name in sources if name not in targets]),
        ("only in the target", [name for name in targets if name not in sources]),
        (
            "of different shapes",
            [
                f"{name} {list(x.shape)} and {list(targets[name].shape)}"
                for name, x in sources.items()
                if name in targets and x.shape != targets[name].shape
            ],
        ),
    ):
        if names:
            problems.append(f"{len(names)} are {where} ({_some(names)})")
    if problems:
        raise ValueError(
            f"{op}: the tensors of model and target do not match: {'; '.join(problems)}; "
            "make the target by copy.deepcopy(model), or pass the part of the model that has an average, "
            "and the rest after the target"
        )
    pairs = dict.fromkeys((x, targets[name]) for name, x in sources.items() if x is not targets[name])
    for side, whole in zip(zip(*pairs, strict=True), ("model", "target"), strict=False):
        if len(set(side)) < len(side):
            raise ValueError(f"{op}: the {whole} shares a parameter between two names, and the other module does not")
    return list(pairs)
