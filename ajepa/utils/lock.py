"""One process at a time in a folder, on one machine or over a shared file system.

The lock is the file `.lock`, which names its holder and counts the holder's heartbeats. A lock is stale if its process
has ended, or, where the process runs elsewhere, if its heart does not beat for `PATIENCE` heartbeats. Clocks are not
compared, because those of two machines may differ. A holder that was suspended for longer than that may lose its lock,
and calls `Lock.check` before it writes what others must not overwrite.
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

from ajepa.utils.atomic_files import naming
from ajepa.utils.errors import ConfigError

NAME = ".lock"
BEAT = 10.0  # seconds between two heartbeats
PATIENCE = 3.5  # heartbeats that a living process of another machine cannot miss

Holder = dict[str, Any]  # the contents of a lock; empty if they cannot be read, as while they are written


class Lock:
    """A lock that this process holds."""

    def __init__(self, folder: Path):
        self.path, self.token, self.beats = folder / NAME, uuid.uuid4().hex, 0
        self.since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._ended = threading.Event()
        self._writes = threading.Lock()  # held by the one of two threads that writes the file

    def check(self) -> None:
        """Raise ConfigError if another process took the lock, because this one was suspended for long."""
        with self._writes:
            if not self._holds() and not self._create():
                name = _name(_read(self.path) or {})
                raise ConfigError(f"{self.path.parent} was taken over by {name} while this process was suspended")

    def take(self, flag: str) -> None:
        while not self._create():
            holder = _read(self.path)
            if holder is None:  # released in the meantime
                time.sleep(0.01)
            elif _ended(holder) or (not _here(holder) and not self._beats(holder)):
                self._remove(holder)
            else:
                raise ConfigError(
                    f"{self.path.parent} is in use by {_name(holder)}: wait for its end, stop it, or choose another "
                    f"{flag}"
                )
        for leftover in self.path.parent.glob(f"{NAME}.*"):  # of processes killed while they wrote
            leftover.unlink(missing_ok=True)
        threading.Thread(target=self._beat, name="ajepa-lock", daemon=True).start()

    def release(self) -> None:
        with self._writes:
            self._ended.set()
            with contextlib.suppress(OSError):  # a stale lock is recognised
                if self._holds():
                    self.path.unlink()

    def _holds(self) -> bool:
        return (_read(self.path) or {}).get("token") == self.token

    def _create(self) -> bool:
        """Make the lock file, complete from the start, unless there is one."""
        aside = self._write()
        try:
            os.link(aside, self.path)
        except FileExistsError:
            return self._holds()  # a network file system may report a link that it made as one that failed
        except FileNotFoundError:  # `aside` was cleared away by a process that took the lock
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
        try:
            with naming(self.path):
                aside.write_text(json.dumps(holder))
        except OSError:  # a full disk
            aside.unlink(missing_ok=True)
            raise
        return aside

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with self._writes, contextlib.suppress(OSError):  # a full disk: the next beat may succeed
                if self._ended.is_set():
                    return
                self.beats += 1
                if self._holds():
                    os.replace(self._write(), self.path)
                elif not self._create():  # a missing lock is made again, another process's is left alone
                    return

    def _beats(self, holder: Holder) -> bool:
        """Whether the heart of a process of another machine beats."""
        print(f"{self.path.parent} is locked by {_name(holder)}; waiting {PATIENCE * BEAT:.0f} s for a sign of life",
              file=sys.stderr, flush=True)  # fmt: skip
        end = time.monotonic() + PATIENCE * BEAT
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT / 10))
            os.listdir(self.path.parent)  # makes a network file system look again
            if _read(self.path) != holder:
                return True
        return False

    def _remove(self, holder: Holder) -> None:
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


def _read(path: Path) -> Holder | None:
    """The contents of a lock; None if there is none."""
    try:
        holder = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) and holder["pid"] > 0 else {}


def _name(holder: Holder) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"


def _here(holder: Holder) -> bool:
    """Whether this machine can tell if the holder lives. Windows cannot, so heartbeats decide there."""
    return holder.get("machine") == _machine() and os.name != "nt"


def _ended(holder: Holder) -> bool:
    if not _here(holder):
        return False
    start = _start(holder["pid"])
    return start is None or (start != UNKNOWN and start != holder.get("start"))


def _machine() -> str:
    """This machine since its start; a container with processes of its own is another one."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


UNKNOWN = "running"  # where the system does not tell when a process started: without /proc, or one of another user


def _start(pid: int) -> str | None:
    """When the process started, as the system counts; None if it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    if os.name == "nt":  # os.kill would send Ctrl-C
        return UNKNOWN
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    return UNKNOWN
