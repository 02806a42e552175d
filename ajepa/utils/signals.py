"""Ctrl-C, SIGTERM and SIGHUP that let a loop finish its step, and closing of several things."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Protocol


class Closable(Protocol):
    def close(self) -> None: ...


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that the first Ctrl-C, SIGTERM or SIGHUP fills. A loop that reads it ends its step and saves.

    A closed terminal sends SIGHUP, and often twice. A Ctrl-C after any of them raises KeyboardInterrupt at once.
    """
    received: list[int] = []

    def note(number, _frame) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        if len(received) > 1:
            return
        print("\nstopping after this step and saving; press Ctrl-C once more to stop at once", file=sys.stderr)

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
