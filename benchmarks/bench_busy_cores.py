"""Benchmark how many CPU threads a step takes and how they wait, on idle cores and beside processes that never wait.

`default` is what torch and OpenMP do by themselves: a thread for each core, which spins for milliseconds while it
waits. `sleeping` threads do not spin. `ajepa` starts as the commands do (`ajepa.utils.command.prepare`,
`ajepa.utils.devices.choose_threads`): a thread for each free core, which spins for a moment. OpenMP reads its settings
once, so that every measurement is a process of its own.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import left_out
from records import DEVICE, QUICK

from ajepa.utils.cores import cores

ROUNDS = 1 if QUICK else 3
WORKER = str(Path(__file__).with_name("busy_worker.py"))
VARIANTS = {"ajepa": {"AJEPA_PREPARE": "1"}, "default": {}, "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}}
BUSY = {"idle cores": 0, "one busy core": 1, "all cores busy": cores()}


@pytest.mark.parametrize("load", BUSY)
def test_waiting(load, record):
    if DEVICE != "cpu":
        left_out({"waiting threads": "they matter where the step runs on the CPU"})
        pytest.skip("the step does not run on the CPU")
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with hogs(BUSY[load]):
        for i in range(ROUNDS):
            for name in list(VARIANTS)[:: 1 if i % 2 else -1]:
                times[name] += steps(VARIANTS[name])
    record("busy_cores", f"tiny, {load}", times, peers=["default", "sleeping"])


@contextlib.contextmanager
def hogs(count: int):
    """`count` processes that never wait."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def steps(settings: dict[str, str]) -> list[float]:
    """Milliseconds of each step in a new process, which imports torch after OpenMP's settings are made."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    path = os.pathsep.join(sys.path)
    seconds = "0.5" if QUICK else "4"
    done = subprocess.run([sys.executable, WORKER, seconds], env={**kept, "PYTHONPATH": path, **settings}, check=True,
                          capture_output=True, text=True)  # fmt: skip
    return [float(word) for word in done.stdout.split()]
