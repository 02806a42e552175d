"""Ctrl-C and SIGTERM that let a loop finish its step, and closing of several things."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Protocol


class Closable(Protocol):
    def close(self) -> None: ...


@contextlib.contextmanager
def catch_signals() -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM fills. A loop that reads it ends its step and saves.

    The second signal raises KeyboardInterrupt at once.
    """
    received: list[int] = []

    def note(number, _frame) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping after this step and saving; press Ctrl-C once more to stop at once", file=sys.stderr)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
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
