"""One process at a time in a folder, on one machine or over a shared file system.

The lock is the file `.lock`, which names its holder and counts the holder's heartbeats. A lock is stale if its process
has ended, or, where the process runs elsewhere, if its heart does not beat for `PATIENCE` seconds. Clocks are not
compared, because those of two machines may differ.
"""

import contextlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ajepa.utils.errors import ConfigError

NAME = ".lock"
BEAT = 10.0  # seconds between two heartbeats
PATIENCE = 3.5  # heartbeats that a living process of another machine cannot miss


class Lock:
    """A lock that this process holds."""

    def __init__(self, folder: Path):
        self.path, self.token, self.beats = folder / NAME, uuid.uuid4().hex, 0
        self.since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._ended = threading.Event()

    def check(self) -> None:
        """Raise ConfigError if another process took the lock, because this one was suspended for long."""
        holder = _read(self.path)
        if holder.get("token") != self.token:
            raise ConfigError(f"{self.path.parent} was taken over by {_name(holder)} while this process was suspended")

    def take(self, flag: str) -> None:
        warned = False
        while not self._create():
            holder = _read(self.path)
            if not holder or _ended(holder) or (not _here(holder) and not self._beats(holder, warned)):
                self._remove(holder)
                continue
            raise ConfigError(
                f"{self.path.parent} is in use by {_name(holder)}: wait for its end, stop it, or choose another {flag}"
            )
        threading.Thread(target=self._beat, name="ajepa-lock", daemon=True).start()

    def release(self) -> None:
        self._ended.set()
        if _read(self.path).get("token") == self.token:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Make the lock file, complete from the start, unless there is one."""
        aside = self._write()
        try:
            os.link(aside, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                with open(self.path, "xb") as file:
                    file.write(aside.read_bytes())
            except FileExistsError:
                return False
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _write(self) -> Path:
        holder = {"host": platform.node(), "machine": _machine(), "pid": os.getpid(), "start": _start(os.getpid()),
                  "since": self.since, "beats": self.beats, "token": self.token}  # fmt: skip
        aside = self.path.with_name(f"{NAME}.{self.token}")
        aside.write_text(json.dumps(holder))
        return aside

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            self.beats += 1
            with contextlib.suppress(OSError):  # a full disk: the next beat may succeed
                if _read(self.path).get("token") != self.token:
                    return
                os.replace(self._write(), self.path)

    def _beats(self, holder: dict[str, Any], warned: bool) -> bool:
        """Whether the heart of a process of another machine beats."""
        print(f"{self.path.parent} is locked by {_name(holder)}; waiting {PATIENCE * BEAT:.0f} s for a sign of life",
              file=sys.stderr)  # fmt: skip
        end = time.monotonic() + PATIENCE * BEAT
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT / 10))
            os.listdir(self.path.parent)  # makes a network file system look again
            if _read(self.path) != holder:
                return True
        return False

    def _remove(self, holder: dict[str, Any]) -> None:
        """Remove the lock of `holder`. Of several processes that try, one succeeds."""
        aside = self.path.with_name(f"{NAME}.{uuid.uuid4().hex}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if _read(aside) != holder:  # another process was faster, and this is its new lock
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, flag: str = "--out") -> Iterator[Lock]:
    """Hold the lock of `folder`, which must exist. Raises ConfigError if a living process holds it."""
    lock = Lock(folder)
    lock.take(flag)
    try:
        yield lock
    finally:
        lock.release()


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _here(holder: dict[str, Any]) -> bool:
    return holder.get("machine") == _machine()


def _ended(holder: dict[str, Any]) -> bool:
    return _here(holder) and _start(holder.get("pid")) != holder.get("start")


def _machine() -> str:
    """This machine since its start; a container with processes of its own is another one."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _start(pid: Any) -> str | None:
    """When the process started, as the system counts; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except OSError:
        if os.path.exists("/proc/self/stat") or not isinstance(pid, int):
            return None
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"
