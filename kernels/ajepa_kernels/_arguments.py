"""Checks of arguments that the operations share."""

from __future__ import annotations

from typing import Any

import torch


def check_tensors(op: str, **tensors: Any) -> None:
    """Raises TypeError for the first argument that is neither a tensor nor None."""
    for name, x in tensors.items():
        if x is None or isinstance(x, torch.Tensor):
            continue
        kind = f"{type(x).__module__}.{type(x).__name__}".removeprefix("builtins.")
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {kind}; convert it with torch.as_tensor")
