"""JSON files with a checksum: a document written by `write_json` is refused by `read_json` if a bit of it changed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.errors import UserError

SUM = "sha256"  # key of the checksum, the last key of a document


class DamagedError(UserError, ValueError):
    """A file that was changed since it was written. The message names it."""


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with the SHA-256 of its text as its last key."""
    write_atomic(path, _text(content).encode())


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file of `write_json`, without the checksum. Raises OSError, and DamagedError for anything else.

    A file without the key "sha256" is one that a person or an earlier version wrote, and is taken as it is.
    """
    data = path.read_bytes()
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:  # a deep document, or a number of too many digits
        raise DamagedError(f"{path} is damaged or was not written by ajepa: {error}") from None
    stated = content.pop(SUM, None)
    if stated is None and not any(map(_resembles, content)):
        return content
    if data != _text(content).encode():
        raise DamagedError(
            f'{path} was changed or damaged since it was written: restore it, or delete the line "{SUM}" to use it as '
            "it is"
        )
    return content


def _text(content: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(content, indent=2).encode()).hexdigest()
    return json.dumps({**content, SUM: digest}, indent=2) + "\n"


def _resembles(key: str) -> bool:
    """Whether the key is that of the checksum with one wrong character."""
    return len(key) == len(SUM) and sum(a != b for a, b in zip(key, SUM, strict=True)) == 1
