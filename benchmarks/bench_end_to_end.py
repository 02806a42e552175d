"""Recordings on disk to updated weights: the loader and the whole step, fused beside plain PyTorch.

Milliseconds a step on the trainer's own path, waiting for data included: the loader copies ahead, masks are drawn
beside the step, the host waits for the device at the end of a turn alone. `data_wait_share` is the part of it that the
step stood still. `eager` is the plain step behind the same loader. `published` is how the published code is built:
torch's DataLoader, whose workers read with soundfile and compute the log-mel with torchaudio, the plain step on their
patches, and the EMA one tensor after the other. `resident` shards lie in the device's memory.
The engines' losses are checked against each other in bench_train_step.py's way, on the loader's first batches.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import left_out
from records import DEVICE

from ajepa import pack
from ajepa.ceilings import product_flops_per_ms
from ajepa.config import PRESETS
from ajepa.data import AudioLoader
from ajepa.engine import Engine, wait
from ajepa.frontend import FrontEnd
from ajepa.index import build_index
from ajepa.masks import MaskSampler
from ajepa.resident import ResidentLoader
from ajepa.synthetic import make_synthetic

PRESET, BATCH, CLIPS = ("tiny", 16, 220) if DEVICE == "cpu" else ("audio-jepa", 256, 512)
CFG = dataclasses.replace(PRESETS[PRESET], mask=dataclasses.replace(PRESETS[PRESET].mask, fixed_token_budget=True))
ROUNDS, STEPS = (4, 5) if DEVICE == "cpu" else (5, 20)
KINDS = ["WAV", "FLAC", "shards", "resident"]
RATE, SAMPLES = CFG.front_end.sample_rate, round(CFG.data.clip_seconds * CFG.front_end.sample_rate)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """{format: folder of the same recordings}"""
    root = tmp_path_factory.mktemp("recordings")
    wav = make_synthetic(root / "made", n_clips=CLIPS, seconds=CFG.data.clip_seconds, sample_rate=RATE).parent
    flac = root / "flac"
    flac.mkdir()
    for path in wav.rglob("*.wav"):
        pcm, rate = soundfile.read(path, dtype="int16")
        soundfile.write(flac / f"{path.stem}.flac", pcm, rate)
    shards = root / "shards"
    assert pack.main([str(wav), str(shards), "--rate", str(RATE)]) == 0
    return {"WAV": wav, "FLAC": flac, "shards": shards, "resident": shards}


class Patches(torch.utils.data.Dataset):
    """Recording to log-mel patches, in a worker of torch's DataLoader."""

    def __init__(self, paths: list[str]):
        self.paths, self.front_end = paths, FrontEnd(CFG.front_end, "torchaudio")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        pcm, _ = soundfile.read(self.paths[i], dtype="int16")
        clip = torch.zeros(SAMPLES, dtype=torch.int16)
        clip[: len(pcm)] = torch.from_numpy(pcm[:SAMPLES])
        return self.front_end(clip[None])[0]


class Published(Engine):
    """The plain step on patches, with the published code's EMA: a loop that allocates."""

    def __init__(self, cfg, device: torch.device):
        super().__init__(cfg, device)
        self.front_end = lambda patches, lengths: patches

    @torch.no_grad()
    def _average(self, decay) -> None:
        for source, target in self.pairs:
            target.data = decay * target.data + (1 - decay) * source.data


def ours(index, kind: str, device: torch.device):
    """Batches (pcm, lengths) of the trainer's loader."""
    loader = ResidentLoader if kind == "resident" else AudioLoader
    options = {"sample_rate": RATE, "clip_samples": SAMPLES, "batch_size": BATCH, "seed": 0, "pad": CFG.data.pad}
    with contextlib.closing(loader(index, device=device, **options)) as batches:
        for batch in batches:
            yield batch.pcm, batch.lengths


def published(folder: Path):
    """Batches (patches, lengths) of torch's DataLoader: recordings drawn at random, without end."""
    data = Patches([str(path) for path in sorted(folder.rglob("*.*")) if path.suffix in (".wav", ".flac")])
    context = multiprocessing.get_context("forkserver")  # forks of this process would inherit DALI's and OpenMP's locks
    context.set_forkserver_preload(["pytest", "soundfile", "torch", "ajepa.engine", "ajepa.data"])
    loader = torch.utils.data.DataLoader(
        data, BATCH, sampler=torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**6),
        num_workers=os.cpu_count() or 1, pin_memory=DEVICE == "cuda", multiprocessing_context=context,
    )  # fmt: skip
    lengths = torch.full((BATCH,), SAMPLES, dtype=torch.int32)
    for patches in loader:
        yield patches, lengths


def run(engine: Engine, batches, sampler: MaskSampler) -> tuple[float, float, list[torch.Tensor]]:
    """Seconds and seconds waited of a step, mean of STEPS after two that fill the pipeline; losses of all."""
    losses, waited = [], 0.0
    for step in range(STEPS + 2):
        if step == 2:
            wait(engine.device)
            begin, waited = time.perf_counter(), 0.0
        tick = time.perf_counter()
        data, lengths = (t.to(engine.device, non_blocking=True) for t in next(batches))
        waited += time.perf_counter() - tick
        masks = engine.masks(sampler, step, BATCH)
        losses.append(engine.step(data, lengths, masks, CFG.optim.warmup_steps + step).loss)
    wait(engine.device)
    return (time.perf_counter() - begin) / STEPS, waited / STEPS, losses


@pytest.mark.parametrize("kind", KINDS)
def test_end_to_end(kind, recordings, record):
    if kind == "FLAC":
        pytest.importorskip("nvidia.dali", reason="FLAC is decoded by DALI, which is not installed")
    device, sampler = torch.device(DEVICE), MaskSampler(CFG.mask, CFG.front_end.grid)
    index = build_index(recordings[kind], decode=False, progress=False)
    plain = dataclasses.replace(CFG, impl="reference")
    engines = {"fused": Engine(CFG, device), "eager": Engine(plain, device)}
    if kind in ("WAV", "FLAC"):  # shards are read by our loader alone
        engines["published"] = Published(plain, device)
    seconds, waits = {name: [] for name in engines}, {name: [] for name in engines}
    losses = {}
    for turn in range(ROUNDS + 1):  # in turns, each with the machine to itself; the first compiles and fills caches
        for name, engine in engines.items():
            source = published(recordings[kind]) if name == "published" else ours(index, kind, device)
            with contextlib.closing(source) as batches:
                took, waited, last = run(engine, batches, sampler)
            if turn:
                seconds[name].append(took)
                waits[name].append(waited)
            losses[name] = torch.stack(last).tolist()
    assert losses["fused"] == pytest.approx(losses["eager"], rel=3e-2 if DEVICE == "cuda" else 5e-3)
    if "published" in losses:
        assert losses["published"] == pytest.approx(losses["eager"], rel=0.2), "another order of the same recordings"

    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    floor_ms = engines["fused"].flops(sampler(0, CFG.optim.steps, BATCH)) / product_flops_per_ms(dtype, DEVICE)
    more = {
        name: {
            "model": PRESET,
            "batch": BATCH,
            "clips_per_second": BATCH / statistics.median(seconds[name]),
            "mfu": floor_ms / (1e3 * statistics.median(seconds[name])),
            "data_wait_share": sum(waits[name]) / sum(seconds[name]),
        }
        for name in engines
    }
    times = {name: [1e3 * s for s in values] for name, values in seconds.items()}
    peers = [name for name in engines if name != "fused"]
    shape = f"{PRESET}, batch {BATCH}, {kind}, {os.cpu_count()} cores"
    record("end_to_end", shape, times, plain="eager", peers=peers, floor_ms=floor_ms, more=more)


def test_left_out():
    if DEVICE == "cpu":
        left_out({"audio-jepa": "seconds a step on a CPU; tiny stands for it"})
