"""A process of `gpu.py`: imports the given modules, waits for a part on standard input, and runs its pytest items.

Each item's outcome and measurements become a line of the journal when the item ends.

Items that the journal already holds for the same sources and mode are left out. So are items that were tried before and
did not pass, unless the part retries them.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from journal import CONSOLE, Journal, Key, settled, tried
from sources import fingerprint, inputs

ROOT = Path(__file__).parent.parent
OPTIONS = ("-q", "-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors")


class Recorder:
    """The pytest plugin that writes the lines. It imports `records` late, which reads the mode and looks for a GPU."""

    def __init__(self, work: dict):
        self.part, self.mode, self.of, self.retry = (work[name] for name in ("part", "mode", "items", "retry"))
        self.process, self.processes = work["share"]
        self.journal = Journal(Path(work["journal"]))
        self.began: dict[str, float] = {}

    def _key(self, item: str) -> Key:
        return item, self.mode, inputs(item)

    @pytest.hookimpl(trylast=True)  # after -k has made its choice
    def pytest_collection_modifyitems(self, config, items) -> None:
        from records import environment

        lines = self.journal.read()
        if self.process == 0:
            self._append(run=environment())
            self._append(collected=[item.nodeid for item in items], of=self.of)
        out = settled(lines) | (set() if self.retry else tried(lines))
        # All items are divided, because the journal may already have outcomes of the other processes.
        share = items[self.process :: self.processes]
        kept = [item for item in share if self._key(item.nodeid) not in out]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_collectreport(self, report) -> None:
        """Name a file that cannot be imported. Only its own items are lost."""
        if not report.passed and self.process == 0:
            self._append(item=report.nodeid, mode=self.mode, outcome=report.outcome, reason=_reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began[nodeid] = time.perf_counter()
        self._append(started=nodeid, mode=self.mode, inputs=self._key(nodeid)[2])

    def pytest_runtest_logreport(self, report) -> None:
        """Write the outcome when the call has ended, or when the set-up or tear-down did not pass."""
        if report.when != "call" and report.passed:
            return
        from records import environment

        line = {
            "item": report.nodeid,
            "mode": self.mode,
            "inputs": self._key(report.nodeid)[2],
            "outcome": report.outcome,
            "seconds": round(time.perf_counter() - self.began.get(report.nodeid, 0.0), 2),
            **{name: environment()[name] for name in ("device", "commit", "date")},
        }
        if report.passed:
            kept = dict(report.user_properties)
            line |= {name: kept[name] for name in ("records", "left_out", "facts") if name in kept}
            line["sources"] = fingerprint(report.nodeid)
        else:
            line["reason"] = _reason(report)
        self._append(**line)

    def _append(self, **line) -> None:
        self.journal.append({"part": self.part, "process": self.process, **line})


def _reason(report) -> str:
    """Return in one line why an item failed or was skipped."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return (crash.message.strip().splitlines() or ["no message"])[0][:300]
    return (str(report.longrepr).strip().splitlines() or ["no message"])[-1][:300]


def die_with_parent() -> None:
    """Have the kernel end this process when the process that started it is killed (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> int:
    die_with_parent()
    for module in sys.argv[1:]:  # importing them takes seconds, during which another part runs
        importlib.import_module(module)
    line = sys.stdin.readline()
    if not line:  # no part is left
        return 0
    work = json.loads(line)
    os.environ |= {"AJEPA_BENCH": work["mode"], "AJEPA_JOURNAL": work["journal"], **work["environment"]}
    os.chdir(ROOT)
    import torch

    if work["on_gpu"] and not torch.cuda.is_available():
        print(f"{CONSOLE}torch {torch.__version__} sees no GPU, so nothing is measured", flush=True)
        return 3  # a CPU must not be measured in place of a GPU
    return int(pytest.main([*work["items"], *OPTIONS], plugins=[Recorder(work)]))


if __name__ == "__main__":
    sys.exit(main())
