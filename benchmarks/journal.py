"""A journal of JSON lines that survives a crash: every measurement is appended as soon as it exists.

A line is written completely or not at all. A reader skips lines that a crash has torn. Several processes may append to
one file. A run of `gpu.py` writes these lines:

    {"call": {device, began}}                               the program was called on this device
    {"run": {device, versions, commit, date, cores}}        the machine, as the process of a part found it
    {"prepared": {what, seconds, note}}                     something was unpacked or had to be built
    {"part": name, "collected": [item], "of": [argument]}   a part has begun and knows its items
    {"part": name, "started": item, "mode", "inputs"}       an item has begun; it was killed if no outcome follows
    {"part": name, "item": item, "mode", "inputs": hash, "outcome": passed | failed | skipped, "reason", "seconds",
     "device", "commit", "date", "sources": hash, "records": [...], "left_out": {...}, "facts": {...}}
    {"part": name, "ended": passed | failed | killed | skipped, "seconds": s, "note": why}
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

CONSOLE = "gpu.py: "  # a line of a part's process that begins so is also printed on the console
LOST = "; the line is: "  # precedes a line that is printed because it could not be written


class Journal:
    def __init__(self, path: Path):
        self.path = Path(path)
        self.read_to = 0  # bytes that `news` has returned so far

    def append(self, line: dict) -> None:
        """Append `line`. If the disk is full, print it to standard error, whose text can be read as a journal, too."""
        data = (json.dumps(line) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                end = os.fstat(file.fileno()).st_size
                if end and not self._ends_a_line():
                    data = b"\n" + data  # a crash has left half a line
                self._write(file, data, end)
        except OSError as error:
            lost = data.decode().strip()
            print(f"{self.path} cannot be written ({error.strerror or error}){LOST}{lost}", file=sys.stderr, flush=True)

    def _ends_a_line(self) -> bool:
        with open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    @staticmethod
    def _write(file, data: bytes, end: int) -> None:
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise

    def read(self) -> list[dict]:
        """Return all complete lines."""
        return _parse(self.path.read_bytes().splitlines()) if self.path.exists() else []

    def news(self) -> list[dict]:
        """Return the lines that were written since the last call."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.read_to)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.read_to += len(whole)
        return _parse(whole.splitlines())


def _parse(lines: Iterable[bytes]) -> list[dict]:
    parsed = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = json.loads(line.partition(LOST.encode())[2] or line)
            if isinstance(value, dict):
                parsed.append(value)
    return parsed


Key = tuple[str, str, str]  # item, mode and inputs identify a measurement


def settled(lines: Iterable[dict]) -> set[Key]:
    """Return the items that need not run again, because they passed or were skipped with a reason."""
    return {_key(line, line["item"]) for line in lines if line.get("outcome") in ("passed", "skipped")}


def tried(lines: Iterable[dict]) -> set[Key]:
    """Return the items that began, whether they passed, failed or were killed."""
    return {_key(line, line["started"]) for line in lines if "started" in line}


def _key(line: dict, item: str) -> Key:
    return item, line.get("mode", ""), line.get("inputs", "")
