"""Fast joint-embedding predictive pretraining on audio. `ajepa.Encoder` takes a pretrained encoder along."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ajepa.encoder import Encoder

__all__ = ["Encoder"]


def __getattr__(name: str):
    if name == "Encoder":  # imported when asked for: `import ajepa` stays light
        from ajepa.encoder import Encoder

        return Encoder
    raise AttributeError(f"module 'ajepa' has no attribute {name!r}")
