"""Benchmark our loader on shards, WAV and FLAC against soundfile in a torch DataLoader, with clips of 10 s at 32 kHz.

A time is milliseconds for 1,000 clips. All variants are timed in turn. A turn is one pass over the variant's clips that
starts with nothing read ahead, for our loader and for the DataLoader, which keeps its workers between turns. So no
variant reads ahead during the turn of another.
"""

import os
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from records import QUICK

from ajepa import pack
from ajepa.data.formats.audiofile import read_into
from ajepa.data.index import build_index
from ajepa.data.loader import iterate_once
from ajepa.data.shards import Shard

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # appended: tests/ has a conftest.py as well
from make_audio import noise, write

RATE, SAMPLES, FILES, BATCH = 32_000, 320_000, 8 if QUICK else 32, 16
PEER = "soundfile + DataLoader, "
WORKERS = len(os.sched_getaffinity(0))


class Recordings(torch.utils.data.Dataset):
    def __init__(self, folder: Path, clips: int):
        self.paths = sorted(folder.iterdir()) * (clips // FILES)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(sf.read(self.paths[i], dtype="int16")[0])


def unchecked(self: Shard, clip: int, start: int, stop: int, out: np.ndarray) -> np.ndarray:
    assert self._file is not None
    read_into(out, self._file.fileno(), int(self.records["offset"][clip]) + start)
    return out


def test_loader(tmp_path, monkeypatch, interleave, record):
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path / "cache"))
    for i in range(FILES):
        for kind, suffix in (("wav16", "wav"), ("flac", "flac")):
            write(tmp_path / suffix / f"{i:03d}.{suffix}", noise(SAMPLES, i, level=0.05), RATE, kind)
    assert pack.main([str(tmp_path / "wav"), str(tmp_path / "shards"), "--rate", str(RATE)]) == 0
    indexes = {kind: build_index(tmp_path / kind) for kind in ("shards", "wav", "flac")}
    options = {"sample_rate": RATE, "clip_samples": SAMPLES, "batch_size": BATCH}
    firsts = [next(iterate_once(index, **options)).pcm for index in indexes.values()]
    assert all(torch.equal(pcm, firsts[0]) for pcm in firsts[1:])

    def ours(kind: str):
        index = indexes[kind].subset(list(range(FILES)) * (clips[kind] // FILES))

        def turn() -> None:
            assert sum(len(batch.items) for batch in iterate_once(index, **options)) == len(index)

        return turn

    def without_checksums() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Shard, "read", unchecked)
            variants["shards"]()

    def peer(kind: str):
        data = Recordings(tmp_path / kind, clips[PEER + kind])
        loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True)

        def turn() -> None:
            assert sum(len(batch) for batch in loader) == len(data)

        return turn

    clips = {"shards": 1024, "shards, checksums left out": 1024, "wav": 256, "flac": 128}
    clips |= {PEER + "wav": 256, PEER + "flac": 128}
    if QUICK:
        clips = {name: count // 4 for name, count in clips.items()}
    variants = {PEER + kind: peer(kind) for kind in ("wav", "flac")}
    variants |= {kind: ours(kind) for kind in indexes}
    variants["shards, checksums left out"] = without_checksums
    raw = interleave(variants, *((0.5, 2) if QUICK else (10.0, 4)))
    times = {name: [1e3 * t / clips[name] for t in raw[name]] for name in raw}
    for kind in ("wav", "flac"):
        beside = {name: times[name] for name in times if name.endswith(kind) or name.startswith("shards")}
        record(f"loader, {kind}", f"{BATCH} x {SAMPLES}", beside, plain=PEER + kind, peers=[PEER + kind])
    rate = {name: 1e6 / statistics.median(values) for name, values in times.items()}
    best = {name: 1e6 / min(values) for name, values in times.items()}
    for name in rate:
        print(f"  {name:34} {rate[name]:8,.0f} clips/s, at best {best[name]:8,.0f}", file=sys.stderr)
    for kind in ("wav", "flac"):
        ratios = sorted(b / a for a, b in zip(times[kind], times[PEER + kind], strict=True))
        print(f"  {kind} is {statistics.median(ratios):.2f} x as fast as {PEER}{kind} (from turn to turn: "
              f"{ratios[0]:.2f} to {ratios[-1]:.2f})", file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-s"]))
