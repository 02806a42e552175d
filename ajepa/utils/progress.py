"""A line on stderr that counts work which takes long; quick work prints nothing."""

import sys
import time

PATIENCE = 1.0  # seconds before the first line


class Progress:
    """Counts `total` things, some of them bad. `doing` is what the line says, such as "checking audio files"."""

    def __init__(self, total: int, doing: str, show: bool = True):
        self.total, self.doing, self.count, self.bad, self.shown = total, doing, 0, 0, False
        self.next = time.monotonic() + PATIENCE if show else float("inf")

    def step(self, bad: bool = False) -> None:
        self.count += 1
        self.bad += bad
        if time.monotonic() >= self.next:
            terminal = sys.stderr.isatty()
            self.next, self.shown = time.monotonic() + (0.5 if terminal else 15), True
            self._print("" if terminal else "\n")

    def close(self) -> None:
        """End the line, if there is one."""
        if self.shown:
            self._print("\n")

    def _print(self, end: str) -> None:
        bad = f", {self.bad:,} bad" if self.bad else ""
        start = "\r" if sys.stderr.isatty() else ""
        text = f"{start}{self.doing}: {self.count:,} of {self.total:,}{bad}"
        print(text, end=end, file=sys.stderr, flush=True)
