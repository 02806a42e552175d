"""Fast joint-embedding predictive pretraining on audio.

`preset` makes a configuration, `train` pretrains it, and `Encoder` loads the result. Each is imported on first use, so
that `import ajepa` stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ajepa.utils import command as _command
from ajepa.utils.version import VERSION as __version__

if TYPE_CHECKING:
    from ajepa.config import Config, ConfigError, preset
    from ajepa.encoder import Encoder
    from ajepa.train import run as train

__all__ = ["Config", "ConfigError", "Encoder", "__version__", "preset", "train"]

if _command.is_command():
    _command.prepare()

_HOMES = {"Config": "config", "ConfigError": "config", "Encoder": "encoder", "preset": "config"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"ajepa.{_HOMES[name]}"), name)
    if name == "train":  # a module that can be called; see ajepa/train.py
        return import_module("ajepa.train")
    raise AttributeError(f"module 'ajepa' has no attribute {name!r}")
