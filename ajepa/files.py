"""Files that are either whole or absent, also after a kill or a power cut."""

import os
from pathlib import Path


def write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Written beside and moved into place: a reader sees the old contents or the new, never a part."""
    aside = path.with_name(f".{path.name}.partial")
    write_synced(aside, data)
    os.replace(aside, path)
