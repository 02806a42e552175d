"""Ctrl-C, SIGTERM and SIGHUP that let a loop finish its step, and closing of several things."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Protocol


class Closable(Protocol):
    def close(self) -> None: ...


APART = 1.0  # seconds between two signals that a user means to send; launchers repeat each one at once


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that the first Ctrl-C, SIGTERM or SIGHUP fills. A loop that reads it ends its step and saves.

    A closed terminal sends SIGHUP. A second Ctrl-C raises KeyboardInterrupt at once.
    """
    received: list[int] = []
    first = 0.0

    def note(number, _frame) -> None:
        nonlocal first
        if not received:
            received.append(number)
            first = time.monotonic()
            with contextlib.suppress(OSError):  # not print, which the signal may have interrupted
                os.write(2, b"\nstopping after this step and saving; press Ctrl-C once more to stop at once\n")
        elif number == signal.SIGINT and time.monotonic() - first > APART:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def closing(*things: Closable) -> Iterator[None]:
    """Close all `things` at the end, the last one first."""
    with contextlib.ExitStack() as stack:
        for thing in things:
            stack.callback(thing.close)
        yield
