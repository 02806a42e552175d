"""Recordings on disk to updated weights: the loader and the whole step, fused beside plain PyTorch.

Milliseconds a step, waiting for data included; `data_wait_share` is the part of it that the step stood still. `eager`
is the plain step behind the same loader. `CPU front end` is how the published code is built: torch's DataLoader, whose
workers read with soundfile and compute the log-mel with torchaudio, then the plain step on their patches.
The engines' losses are checked against each other in bench_train_step.py's way, on the loader's first batches.
"""

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import statistics
import time
from pathlib import Path

import pytest
import soundfile
import torch
from ceilings import left_out
from records import DEVICE

from ajepa.ceilings import product_flops_per_ms
from ajepa.config import PRESETS
from ajepa.data import AudioLoader
from ajepa.engine import Engine
from ajepa.frontend import FrontEnd
from ajepa.index import build_index
from ajepa.masks import MaskSampler
from ajepa.synthetic import make_synthetic

PRESET, BATCH, CLIPS = ("tiny", 16, 220) if DEVICE == "cpu" else ("audio-jepa", 256, 512)
CFG = dataclasses.replace(PRESETS[PRESET], mask=dataclasses.replace(PRESETS[PRESET].mask, fixed_token_budget=True))
ROUNDS, STEPS = (2, 5) if DEVICE == "cpu" else (3, 10)
KINDS = ["WAV", "FLAC"] + ["shards"] * (importlib.util.find_spec("ajepa.pack") is not None)
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
    folders = {"WAV": wav, "FLAC": flac}
    if "shards" in KINDS:
        from ajepa import pack

        folders["shards"] = root / "shards"
        assert pack.main([str(wav), str(folders["shards"]), "--rate", str(RATE)]) == 0
    return folders


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


def ours(index):
    """Batches (pcm, lengths) of the trainer's loader."""
    with contextlib.closing(
        AudioLoader(index, sample_rate=RATE, clip_samples=SAMPLES, batch_size=BATCH, seed=0, pad=CFG.data.pad)
    ) as loader:
        for batch in loader:
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


def run(engine: Engine, batches, sampler: MaskSampler, steps: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds, seconds waited and loss of each step; the first two are not counted: they fill the pipeline."""
    seconds, waits, losses = [], [], []
    for step in range(steps + 2):
        tick = time.perf_counter()
        data, lengths = (t.to(engine.device, non_blocking=True) for t in next(batches))
        waits.append(time.perf_counter() - tick)
        masks = engine.masks(sampler, step, BATCH)
        losses.append(engine.step(data, lengths, masks, CFG.optim.warmup_steps + step).loss)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - tick)
    return seconds[2:], waits[2:], [loss.item() for loss in losses]


@pytest.mark.parametrize("kind", KINDS)
def test_end_to_end(kind, recordings, record):
    if kind == "FLAC":
        pytest.importorskip("nvidia.dali", reason="FLAC is decoded by DALI, which is not installed")
    device, sampler = torch.device(DEVICE), MaskSampler(CFG.mask, CFG.front_end.grid)
    index = build_index(recordings[kind], decode=False, progress=False)
    engines = {"fused": Engine(dataclasses.replace(CFG, impl="fused"), device)}
    engines |= {n: Engine(dataclasses.replace(CFG, impl="reference"), device) for n in ("eager", "CPU front end")}
    engines["CPU front end"].front_end = lambda patches, lengths: patches
    files = recordings["WAV" if kind == "shards" else kind]  # shards are read by our loader alone
    sources = {"fused": lambda: ours(index), "eager": lambda: ours(index), "CPU front end": lambda: published(files)}
    seconds, waits = {name: [] for name in engines}, {name: [] for name in engines}
    losses = {}
    for _ in range(ROUNDS):  # in turns, each with the machine to itself
        for name, engine in engines.items():
            with contextlib.closing(sources[name]()) as batches:
                took, waited, losses[name] = run(engine, batches, sampler, STEPS)
            seconds[name] += took
            waits[name] += waited
    assert losses["fused"] == pytest.approx(losses["eager"], rel=3e-2 if DEVICE == "cuda" else 5e-3)
    assert losses["CPU front end"] == pytest.approx(losses["eager"], rel=0.2), "another order of the same recordings"

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
    peers = ["eager", "CPU front end"]
    shape = f"{PRESET}, batch {BATCH}, {kind}, {os.cpu_count()} cores"
    record("end_to_end", shape, times, plain="eager", peers=peers, floor_ms=floor_ms, more=more)


def test_left_out():
    if DEVICE == "cpu":
        left_out({"audio-jepa": "seconds a step on a CPU; tiny stands for it"})
    left_out({"per-tensor EMA of the published code": "the plain step has the faster foreach EMA"})
