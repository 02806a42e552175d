"""Benchmark how OpenMP's threads wait for work: a training step on idle cores, and beside other work on every core.

`spinning` is OpenMP's default. `ajepa` waits as the commands do, see `ajepa.utils.command.prepare`. `one thread` has
nobody to wait for. OpenMP reads its settings once, so that every measurement is a process of its own.
"""

import contextlib
import os
import subprocess
import sys
import time

import pytest
from conftest import left_out
from records import DEVICE, QUICK

from ajepa.utils.command import WAITING
from ajepa.utils.cores import cores

SECONDS, LEAST, ROUNDS = (0.5, 2, 1) if QUICK else (4.0, 3, 2)  # of a measurement; its least number of steps; turns
PASSIVE = {"AJEPA_PREPARE": "1"}
VARIANTS = {"ajepa": PASSIVE, "spinning": {}, "one thread": {**PASSIVE, "OMP_NUM_THREADS": "1"}}


@pytest.mark.parametrize("load", ["idle cores", "busy cores"])
def test_waiting(load, record):
    if DEVICE != "cpu":
        left_out({"waiting threads": "they matter where the step runs on the CPU"})
        pytest.skip("the step does not run on the CPU")
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with hogs(cores() if load == "busy cores" else 0):
        for i in range(ROUNDS):
            for name in list(VARIANTS)[:: 1 if i % 2 else -1]:
                times[name] += steps(VARIANTS[name])
    record("busy_cores", f"tiny, {load}", times, peers=["spinning"])


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
    """Milliseconds of each step in a new process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    path = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, __file__], env={**kept, "PYTHONPATH": path, **settings}, check=True,
                          capture_output=True, text=True)  # fmt: skip
    return [float(word) for word in done.stdout.split()]


def measure() -> None:
    """In a process of its own: print the times of its steps."""
    if os.environ.get("AJEPA_PREPARE"):
        from ajepa.utils.command import prepare

        prepare()
        assert os.environ.items() >= WAITING.items()
    import torch

    from ajepa.config import PRESETS
    from ajepa.model.masks import MaskSampler
    from ajepa.training.engine import Engine

    cfg = PRESETS["tiny"]
    engine, batch = Engine(cfg, torch.device("cpu")), cfg.optim.batch_size
    samples = round(cfg.source_seconds * cfg.front_end.sample_rate)
    pcm = torch.randint(-9999, 9999, (batch, samples), dtype=torch.int16)
    lengths = torch.full((batch,), samples, dtype=torch.int32)
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid)
    end, step = None, 0
    while end is None or step <= LEAST or time.perf_counter() < end:
        begin = time.perf_counter()
        masks = engine.masks(sampler, step, batch)
        engine.step(pcm, lengths, masks, step)
        step += 1
        if step > 1:  # the first step allocates
            print(1e3 * (time.perf_counter() - begin))
            end = end or begin + SECONDS


if __name__ == "__main__":
    measure()
