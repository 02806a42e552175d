"""Runs parts of work within one time budget. Each part has an expected and a longest duration.

A part runs in processes of its own, which are killed when its time is over. So a part that hangs, crashes or uses up
the memory costs only its own time. A part that no longer fits into the budget is skipped and named, and the next part
that fits runs. The parts write their measurements to the journal, line by line. A later run measures what is missing
there.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from journal import CONSOLE, LOST, Journal, Key, settled, tried
from sources import inputs

IMPORTS = ("ajepa.training.engine",)
TICK = 0.05  # seconds between two checks of a part's processes
GRACE = 3.0  # seconds to wait for killed processes, since one inside the GPU driver may not end at once


@dataclass(frozen=True)
class Part:
    """Describes what one part runs, and for how long."""

    name: str
    about: str
    items: tuple[str, ...]  # arguments of pytest: files, node ids, options
    expected: float  # seconds; the part begins only if this much time is left
    limit: float  # seconds after which the part is killed
    mode: str = ""  # the value of AJEPA_BENCH
    processes: int = 1  # how many processes share the items
    retry: bool = False  # whether to try items again that did not pass before


class Process(Protocol):
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...


class Worker:
    """A process that has imported the slow modules and waits for its part. It starts while another part runs.

    Its output is copied to the log. If the log cannot be written, the process still goes on measuring.
    """

    def __init__(self, log: Path, environment: dict[str, str], say: Callable[[str], None], imports: Sequence[str]):
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), *imports]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._copy, args=(log, say), daemon=True).start()

    def _copy(self, log: Path, say: Callable[[str], None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(OSError), open(log, "ab") as file:
                file.write(line)
            if LOST.encode() in line or line.startswith(CONSOLE.encode()):
                say(line.decode().strip())

    def begin(self, work: dict[str, Any]) -> "Worker":
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process died while it waited, which `poll` reports
            self.process.stdin.write((json.dumps(work) + "\n").encode())
            self.process.stdin.close()
        return self

    def poll(self) -> int | None:
        return self.process.poll()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Workers:
    """Starts the processes of a part. The first of them is a spare process that is waiting already."""

    def __init__(self, journal: Path, log: Path, environment: dict[str, str], on_gpu: bool, say: Callable[[str], None]):
        self.journal, self.on_gpu = journal, on_gpu
        self.make = lambda *imports: Worker(log, environment, say, ("torch", *imports))
        self.variables: dict[str, str] = {}  # of the environment, known only after the first process has started
        self.spare = self.make()  # imports torch only, because the project's extension may not be in place yet

    def start(self, part: Part) -> list[Worker]:
        work = {"part": part.name, "items": part.items, "mode": part.mode, "retry": part.retry}
        work |= {"journal": str(self.journal), "environment": self.variables, "on_gpu": self.on_gpu}
        spares = [self.spare, *(self.make() for _ in range(part.processes - 1))]
        begun = [worker.begin({**work, "share": [i, part.processes]}) for i, worker in enumerate(spares)]
        self.spare = self.make(*IMPORTS)
        return begun

    def close(self) -> None:
        self.spare.kill()


class Progress(NamedTuple):
    """Says how far earlier runs got with a part, judged by the sources as they are now."""

    items: int
    missing: set[Key]
    ended_well: bool  # whether its last run reached the end; a killed run may not have started all its items

    @property
    def complete(self) -> bool:
        return self.ended_well and not self.missing


def progress(part: Part, lines: Sequence[dict]) -> Progress | None:
    """Return the progress of a part, or None if it has not run yet with these items."""
    of_part = [line for line in lines if line.get("part") == part.name]
    known = [line for line in of_part if "collected" in line]
    if not known or known[-1]["of"] != list(part.items):
        return None
    items = {(item, part.mode, inputs(item)) for item in known[-1]["collected"]}
    ends = [line["ended"] for line in of_part if line.get("ended", "skipped") != "skipped"]
    return Progress(len(items), items - settled(lines), bool(ends) and ends[-1] == "passed")


def passes(parts: Sequence[Part], lines: Sequence[dict]) -> list[Part]:
    """Return `parts` in order, followed by those that have items which failed or were killed before.

    Such items are tried only in the second pass. If the items of a part are unknown, for example because it was killed
    before it had collected them, all of them are tried in the first pass.
    """
    first, again = [], []
    for part in parts:
        before = progress(part, lines)
        if before is None:
            first.append(dataclasses.replace(part, retry=True))
            continue
        stuck = before.missing & tried(lines)
        if before.missing - stuck or not stuck:
            first.append(part)
        if stuck:
            again.append(dataclasses.replace(part, retry=True))
    return first + again


def run(
    parts: Sequence[Part],
    budget: float,
    journal: Journal,
    start: Callable[[Part], Sequence[Process]],
    *,
    begin: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = print,
    watch: Callable[[dict], None] = lambda line: None,
) -> dict[str, str]:
    """Run `parts` in order within `budget` seconds of `begin`. Returns {part: how it ended}.

    start: starts a part's processes; each exits with pytest's status.
    watch: called with every new line of the journal.
    """
    begin = clock() if begin is None else begin
    ended = {}
    journal.news()
    for part in passes(parts, journal.read()):
        before = progress(part, journal.read())
        if before is not None and before.complete:
            ended[part.name] = "passed"
            say(f"{part.name}: nothing is left to measure")
            continue
        remaining = budget - (clock() - begin)
        expected = part.expected * (len(before.missing) / max(before.items, 1) if before is not None else 1)
        tick = clock()
        if expected > remaining:
            how, note = "skipped", f"needs about {expected:.0f} s, and {max(remaining, 0):.0f} s are left"
        else:
            say(f"{part.name}: {part.about} (at {tick - begin:.0f} s)")
            how, note = _run_one(part, min(part.limit, remaining), journal, start, clock, sleep, watch)
        seconds = clock() - tick
        say(f"{part.name}: {how}{f' after {seconds:.0f} s' * (how != 'skipped')}{': ' * bool(note)}{note}")
        journal.append({"part": part.name, "ended": how, "seconds": round(seconds, 1), "note": note})
        ended[part.name] = how
    return ended


def _run_one(part: Part, seconds: float, journal, start, clock, sleep, watch) -> tuple[str, str]:
    """Run one part and return how it ended, and why. None of its processes is left afterwards."""
    end = clock() + seconds
    processes = list(start(part))
    under_way: dict[int, str] = {}
    counts: Counter[str] = Counter()

    def read_news() -> None:
        for line in journal.news():
            if "started" in line:
                under_way[line.get("process", 0)] = line["started"]
            elif "item" in line:
                under_way.pop(line.get("process", 0), None)
                counts[line["outcome"]] += 1
            watch(line)

    def summary(why: str = "") -> str:
        at = f" in {', '.join(under_way.values())}" if why and under_way else ""
        return ", ".join([*([why + at] if why else []), *(f"{n} {outcome}" for outcome, n in counts.items())])

    try:
        while any(process.poll() is None for process in processes):
            read_news()
            if clock() >= end:
                for process in processes:
                    process.kill()
                _wait_for(processes, clock, sleep)
                read_news()
                return "killed", summary(f"it exceeded its {seconds:.0f} s")
            sleep(TICK)
        read_news()
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()  # this also ends child processes that are left
    if all(code in (0, 5) for code in codes):  # pytest exits with 5 if no item was left to run
        return "passed", summary()
    crashed = [code for code in codes if code not in (0, 1, 5)]
    return "failed", summary(f"a process ended with status {crashed[0]}" if crashed else "")


def _wait_for(processes: Sequence[Process], clock, sleep) -> None:
    end = clock() + GRACE
    while clock() < end and any(process.poll() is None for process in processes):
        sleep(TICK)
