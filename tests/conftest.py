import os
from pathlib import Path

# Before torch is loaded: threads that spin while they wait take the cores from each other on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from forks import Forks

if os.environ.get("AJEPA_TEST_MISSING") == "skip":
    from missing import *  # noqa: F403

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seed():
    """torch draws a seed of its own in every process: what fails once in a hundred runs would fail on another day."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Tests neither read nor fill the user's cache."""
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def audio_dir() -> Path:
    """Real recordings, named by AJEPA_TEST_AUDIO."""
    folder = os.environ.get("AJEPA_TEST_AUDIO")
    if not folder:
        pytest.skip("AJEPA_TEST_AUDIO is not set: no folder of real audio to test on")
    return Path(folder)


@pytest.fixture(scope="session")
def tones(tmp_path_factory) -> Path:
    """Forty short WAV files of two classes (low and high tones) in two folders, 16 kHz, half a second to one long."""
    import soundfile  # here, so that the kernels' tests run without it

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
]  # a run of a few seconds: 16 patches a clip


@pytest.fixture
def small_run(tones, tmp_path):
    """Command line of a small run on `tones` in a new folder, and that folder."""
    return ["--data", str(tones), "--out", str(tmp_path / "run"), *SMALL], tmp_path / "run"


@pytest.fixture(scope="session")
def run(tones, tmp_path_factory) -> Path:
    """Folder of a small finished run on `tones`; tests add results to it and change nothing."""
    from ajepa import train

    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(["--data", str(tones), "--out", str(folder), *SMALL, "--compare-steps", "0"]) == 0
    return folder


@pytest.fixture(scope="session")
def forks():
    """Runs `ajepa.train.main` in processes of their own, without importing torch anew in each."""
    import pydantic  # noqa: F401 (here, so that their absence is known before a process ends of it)
    import soundfile  # noqa: F401
    import tyro  # noqa: F401

    with Forks() as server:
        yield server
