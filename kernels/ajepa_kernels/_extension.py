"""Loads the compiled ops if the package was built with them."""

import os
import warnings
from functools import cache
from pathlib import Path

import torch


def _load() -> str:
    """Registers the ops of `_C` as `torch.ops.ajepa.*`; returns "" or the reason why they are missing."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return "it was installed without them; AJEPA_EXTENSION=1 pip install -v shows why"
    if os.environ.get("AJEPA_EXTENSION") == "0":
        return "AJEPA_EXTENSION=0 disables them"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"{libraries[0].name} does not load: {error}"
    return ""


MISSING = _load()
AVAILABLE = not MISSING
CUDA = AVAILABLE and torch.ops.ajepa.has_cuda()


@cache
def warn_plain(op: str, reason: str) -> None:
    """Warns once that an op runs in plain PyTorch, with the reason."""
    warnings.warn(f"{op} runs in plain PyTorch: {reason}", stacklevel=3)
