import os
from pathlib import Path

# Set before torch is loaded: on a busy machine, threads that spin while waiting take the cores from working threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core, and its runs in other processes must have as many
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from forks import Forks

if os.environ.get("AJEPA_TEST_MISSING") == "skip":
    from missing import *  # noqa: F403

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seed():
    """Fixes torch's seed, which otherwise differs in every process and would make rare failures unrepeatable."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Gives the tests a cache of their own, so that they neither read nor fill the user's."""
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def audio_dir() -> Path:
    """The folder of real recordings that AJEPA_TEST_AUDIO names."""
    folder = os.environ.get("AJEPA_TEST_AUDIO")
    if not folder:
        pytest.skip("AJEPA_TEST_AUDIO is not set, so there is no folder of real audio to test on")
    return Path(folder)


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """Forty WAV files at 16 kHz, of 0.5 to 1 s, in two folders that are two classes: low and high tones."""
    import soundfile  # imported here, so that the kernels' tests run without it

    root = tmp_path_factory.mktemp("tones")
    rng = np.random.default_rng(0)
    for label, base in (("low", 200), ("high", 2500)):
        (root / label).mkdir()
        for i in range(20):
            t = np.arange(rng.integers(8_000, 16_000)) / 16_000
            x = 0.3 * np.sin(2 * np.pi * base * rng.uniform(0.8, 1.2) * t) + 0.01 * rng.standard_normal(len(t))
            soundfile.write(root / label / f"{i:02d}.wav", x.astype(np.float32), 16_000, subtype="PCM_16")
    return root


SMALL = [
    *("--clip-seconds", "0.5", "--n-frames", "16", "--hop-length", "480", "--size", "tiny"),
    *("--batch-size", "4", "--steps", "8", "--warmup-steps", "2", "--log-every", "2", "--watch-every", "4"),
    *("--checkpoint-every", "3", "--compare-steps", "1", "--loader-threads", "1", "--min-context", "2"),
]  # a run that takes a few seconds, with 16 patches a clip


@pytest.fixture
def small_run(tones, tmp_path):
    """(command line, output folder) of a small run on `tones`."""
    return ["--data", str(tones), "--out", str(tmp_path / "run"), *SMALL], tmp_path / "run"


@pytest.fixture(scope="session")
def run(tones, tmp_path_factory) -> Path:
    """The folder of a small finished run on `tones`. Tests may add results to it, but must not change its files."""
    from ajepa import train

    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(["--data", str(tones), "--out", str(folder), *SMALL, "--compare-steps", "0"]) == 0
    return folder


@pytest.fixture(scope="session")
def forks():
    """Runs `ajepa.train.main` in separate processes without importing torch again in each."""
    import pydantic  # noqa: F401 (a missing package is reported here, before it ends a process)
    import soundfile  # noqa: F401
    import tyro  # noqa: F401

    with Forks() as server:
        yield server
