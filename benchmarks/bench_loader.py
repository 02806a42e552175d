"""Clips of 10 s at 32 kHz a second: our loader from shards, WAV and FLAC against soundfile in a torch DataLoader.

Milliseconds for 1,000 clips, all variants in turns. A turn of ours takes a fixed number of batches and waits until as
many new ones lie ready; one of DataLoader's is an epoch, its workers kept. So the work of a turn is its own.
"""

import contextlib
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from ajepa import pack
from ajepa.data import AudioLoader
from ajepa.index import build_index
from ajepa.shards import Shard

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from make_audio import noise, write

RATE, SAMPLES, FILES, BATCH = 32_000, 320_000, 32, 16
PEER = "soundfile + DataLoader, "
WORKERS = len(os.sched_getaffinity(0))


class Recordings(torch.utils.data.Dataset):
    def __init__(self, folder: Path, clips: int):
        self.paths = sorted(folder.iterdir()) * (clips // FILES)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(sf.read(self.paths[i], dtype="int16")[0])


def unchecked(self: Shard, clip: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    offset = int(self.records["offset"][clip])
    return self.bytes[offset + start : offset + stop]


def test_loader(tmp_path, monkeypatch, interleave, record):
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path / "cache"))
    for i in range(FILES):
        for kind, suffix in (("wav16", "wav"), ("flac", "flac")):
            write(tmp_path / suffix / f"{i:03d}.{suffix}", noise(SAMPLES, i, level=0.05), RATE, kind)
    assert pack.main([str(tmp_path / "wav"), str(tmp_path / "shards"), "--rate", str(RATE)]) == 0
    loaders = {
        kind: AudioLoader(
            build_index(tmp_path / kind), sample_rate=RATE, clip_samples=SAMPLES, batch_size=BATCH, seed=0
        )
        for kind in ("shards", "wav", "flac")
    }
    firsts = [next(loader).pcm for loader in loaders.values()]
    assert all(torch.equal(pcm, firsts[0]) for pcm in firsts[1:])
    for loader in loaders.values():
        loader.close()  # DataLoader forks: no thread of ours may hold a lock then

    def ours(kind: str):
        def turn() -> None:
            for _ in range(clips[kind] // BATCH):
                next(loaders[kind])
            ready = loaders[kind]._worker._ready
            while not ready.full():
                time.sleep(1e-4)

        return turn

    def without_checksums() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Shard, "read", unchecked)
            ours("shards")()

    def peer(kind: str):
        data = Recordings(tmp_path / kind, clips[PEER + kind])
        loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)

        def turn() -> None:
            assert sum(len(batch) for batch in loader) == len(data)

        return turn

    clips = {"shards": 1024, "shards, checksums left out": 1024, "wav": 256, "flac": 64}
    clips |= {PEER + "wav": 256, PEER + "flac": 64}
    with contextlib.ExitStack() as stack:
        for loader in loaders.values():
            stack.callback(loader.close)
        variants = {PEER + kind: peer(kind) for kind in ("wav", "flac")}  # forks, best before our threads start
        variants |= {kind: ours(kind) for kind in loaders}
        variants["shards, checksums left out"] = without_checksums
        raw = interleave(variants, seconds=10.0, rounds=4)
    times = {name: [1e3 * t / clips[name] for t in raw[name]] for name in raw}
    record("loader", f"{BATCH} x {SAMPLES}", times, peers=[PEER + "wav", PEER + "flac"])
    rate = {name: 1e6 / statistics.median(values) for name, values in times.items()}
    best = {name: 1e6 / min(values) for name, values in times.items()}
    for name in rate:
        print(f"  {name:34} {rate[name]:8,.0f} clips/s, at best {best[name]:8,.0f}", file=sys.stderr)
    for kind in ("wav", "flac"):
        ratios = sorted(b / a for a, b in zip(times[kind], times[PEER + kind], strict=True))
        print(f"  {kind} x {statistics.median(ratios):.2f} of {PEER}{kind} (turns beside each other: "
              f"{ratios[0]:.2f} to {ratios[-1]:.2f})", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
