"""Safetensors files with a checksum over their tensors and metadata. Equal tensors give equal files."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.json_files import DamagedError

SUM = "sha256"
# Keys of the metadata in files of other programs and of earlier versions, which have no checksum.
UNCHECKED: tuple[set[str], ...] = ({"format"}, {"format", "preset"}, set())


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """Write the tensors, moved to the CPU, and the metadata, with a checksum over both."""
    write_atomic(path, tensors_bytes(tensors, **metadata))


def tensors_bytes(tensors: dict[str, torch.Tensor], **metadata: str) -> bytes:
    """The contents of a file of `write_tensors`."""
    tensors = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
    metadata = {"format": "pt", **metadata}
    data = save_bytes(tensors, {**metadata, SUM: _digest(tensors, metadata)})
    # safetensors writes the metadata in an order that differs between processes
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, checked where it has a checksum. Raises OSError and DamagedError."""
    return parse_tensors(path.read_bytes(), path)


def parse_tensors(data: bytes, path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors in `data`, the contents of `path`. Raises DamagedError."""
    try:
        tensors = load_bytes(data)
        end = 8 + int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8:end]).get("__metadata__", {})
    except (SafetensorError, ValueError, RecursionError, KeyError) as error:
        raise DamagedError(f"{path} is damaged or not a safetensors file: {error}") from None
    stated = metadata.pop(SUM, None)
    if stated is None and set(metadata) in UNCHECKED:
        return tensors
    if stated != _digest(tensors, metadata):
        raise DamagedError(f"{path} is damaged: its SHA-256 is not the one it was saved with")
    return tensors


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and values, whatever the order of the dictionary."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    return hashlib.sha256(f"{tensors_hash(tensors)}{sorted(metadata.items())}".encode()).hexdigest()
