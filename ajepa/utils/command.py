"""What all commands share: their start before torch loads, output that may vanish, errors in one line, Ctrl-C.

`prepare` runs when `ajepa` is imported by a command, so before torch and the other large packages. `command` wraps each
command's `main`.
"""

import contextlib
import errno
import functools
import itertools
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from ajepa.utils import cores
from ajepa.utils.errors import UserError

# How long OpenMP's threads spin before they sleep. By default they spin for milliseconds, and on busy cores they take
# the time of those that work. If they slept at once, idle cores would have to be woken for every piece of work.
SPINS = ("GOMP_SPINCOUNT", "3000")
FULL = (errno.ENOSPC, errno.EDQUOT)  # a full disk or quota
SCRIPT = re.compile(r"ajepa(-\w+)?(\.exe)?")


def is_command() -> bool:
    """Whether this process was started as `python -m ajepa...` or as one of the console scripts."""
    words = getattr(sys, "orig_argv", [])
    module = next((after for word, after in itertools.pairwise(words) if word == "-m"), "")
    return module.split(".")[0] == "ajepa" or bool(SCRIPT.fullmatch(os.path.basename(sys.argv[0] if sys.argv else "")))


def prepare() -> None:
    """Choose how OpenMP's threads wait, unless the user did, and make Ctrl-C end the imports quietly.

    Left alone, torch takes every core, also where a container may use fewer.
    """
    cores.start = cores.snapshot()
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*SPINS)
    if cores.quota() < math.inf:
        os.environ.setdefault("OMP_NUM_THREADS", str(cores.cores()))
    for descriptor in range(3):  # a file opened later must not get the number of a closed standard stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: Any) -> None:
    with contextlib.suppress(OSError):  # nobody may read stderr any more
        os.write(2, b"stopped\n")
    os._exit(130)


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Wrap a command's `main(argv)`, which returns the exit status.

    A UserError or OSError becomes one line on stderr and status 2. Ctrl-C becomes one line and status 130: the message
    of the KeyboardInterrupt, or "stopped"; with an empty message, none. Output that nobody takes any more is dropped.
    """

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with lasting_output():
            try:
                return main(argv)
            except KeyboardInterrupt as stop:
                message = str(stop.args[0]) if stop.args else "stopped"
                if message:
                    print(message, file=sys.stderr)
                return 130
            except (UserError, OSError, MemoryError) as error:
                print(f"error: {describe(error)}", file=sys.stderr)
                return 2

    return run


def describe(error: BaseException) -> str:
    """An error as one line that names the file, if there is one."""
    if isinstance(error, OSError) and error.filename is not None:
        remedy = ": make room, and repeat the command, a run with --resume" if error.errno in FULL else ""
        return f"{error.filename}: {error.strerror or error}{remedy}"
    if isinstance(error, MemoryError):
        return f"not enough memory: {' '.join(str(error).split()) or 'an allocation failed'}"
    return str(error)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, `sys.stdout` and `sys.stderr` drop what a closed pipe, terminal or full device cannot take."""
    before = sys.stdout, sys.stderr
    streams = [LastingStream(stream) for stream in before]
    sys.stdout, sys.stderr = streams
    try:
        yield
    finally:
        for stream in streams:  # these, because a library may have put others in their places
            stream.finish()
        sys.stdout, sys.stderr = before


# Errors of an output that may take text again later; the last is that of a pipe that must not block but is full.
PASSING = (*FULL, errno.EAGAIN)


class LastingStream:
    """A text stream whose writes never fail. Characters that its encoding lacks are written as escapes.

    A full disk costs the text of that time. An output that is gone for good is replaced by the null device.
    """

    def __init__(self, stream: TextIO | None):
        self._stream: Any = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 (lives as the process)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream is closed
            self._lost(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def finish(self) -> None:
        """Write what the stream still holds, so that Python has nothing left that could fail when it ends."""
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _lost(self, error: Exception) -> None:
        if getattr(error, "errno", None) not in PASSING:
            self._drop()

    def _drop(self) -> None:
        """Send all further output, and what the stream still holds, to the null device."""
        try:
            descriptor = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
        except (AttributeError, OSError, ValueError):  # the stream has no descriptor
            self._stream = open(os.devnull, "w")  # noqa: SIM115 (lives as the process)

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
