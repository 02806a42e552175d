"""Benchmark DALI against libsndfile as the decoder behind our reader, and against soundfile + soxr in a DataLoader.

Recordings of 10 s become mono clips at 32 kHz. A time is milliseconds for 1,000 clips. All variants are timed in turn,
and each turn is one pass over the recordings that starts with nothing read ahead. `ajepa.data.dali.FASTER` names the
formats that DALI decoded faster in this benchmark.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import soxr
import torch
from records import QUICK

from ajepa.data.index import build_index
from ajepa.data.loader import iterate_once

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # appended: tests/ has a conftest.py as well
from make_audio import FORMATS, noise, write

RATE, SAMPLES, FILES, BATCH = 32_000, 320_000, 4 if QUICK else 16, 8
PEER = "soundfile + soxr HQ + DataLoader"
WORKERS = len(os.sched_getaffinity(0))
CASES = [
    ("wav16", 44_100, 2), ("wav24", 44_100, 2), ("wav_float", 44_100, 1), ("flac", 44_100, 2), ("flac", 32_000, 1),
    ("vorbis", 44_100, 2), ("opus", 48_000, 2), ("mp3", 44_100, 2),
]  # fmt: skip


class Recordings(torch.utils.data.Dataset):
    def __init__(self, folder: Path):
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        samples, rate = sf.read(self.paths[i], dtype="float32", always_2d=True)
        mono = samples.mean(1) if samples.shape[1] > 1 else samples[:, 0]
        clip = soxr.resample(mono, rate, RATE)[:SAMPLES] if rate != RATE else mono[:SAMPLES]
        return torch.from_numpy(np.pad(clip, (0, SAMPLES - len(clip))))


@pytest.mark.parametrize(("kind", "rate", "channels"), CASES)
def test_decode(kind, rate, channels, tmp_path, monkeypatch, interleave, record):
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path / "cache"))
    for i in range(FILES):
        write(tmp_path / "audio" / f"{i:03d}{FORMATS[kind][2]}", noise(10 * rate, i, channels, 0.05), rate, kind)
    index = build_index(tmp_path / "audio")
    options = {"sample_rate": RATE, "clip_samples": SAMPLES, "batch_size": BATCH, "pad": "zero"}

    def ours(decoder: str):
        def turn() -> None:
            assert sum(len(batch.items) for batch in iterate_once(index, decoder=decoder, **options)) == FILES

        return turn

    data = Recordings(tmp_path / "audio")
    loader = torch.utils.data.DataLoader(data, BATCH, num_workers=WORKERS, persistent_workers=True)

    def peer() -> None:
        assert sum(len(batch) for batch in loader) == FILES

    variants = {"ajepa, libsndfile": ours("soundfile"), PEER: peer}
    if kind != "mp3":  # DALI does not decode MP3
        variants["ajepa, DALI"] = ours("dali")
    times = interleave(variants, *((0.5, 2) if QUICK else (4.0, 5)))
    per_clip = {name: [t / FILES * 1e3 for t in values] for name, values in times.items()}
    record(f"decode, {kind}", f"{rate:,} Hz, {channels} channels", per_clip, plain=PEER, peers=[PEER])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
