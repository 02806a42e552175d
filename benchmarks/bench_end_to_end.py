"""Benchmark the whole way from recordings on disk to updated weights: the loader together with the training step.

A time is milliseconds per step on the trainer's own path, including the time spent waiting for data. The loader copies
batches ahead, masks are drawn on the device beside the step, and the host waits for the device only at the end of a
turn. `data_wait_share` is the share of the time for which the host waited for a batch.

`test_from_shards` measures how much of the step's speed is left when its audio comes from files. The trainer's loader
reads shards of int16 noise. In alternation, the same engine runs on batches that are already on the device ("step
alone"). `of_the_step` is the first throughput divided by the second. Both runs draw the same masks at each step. The
masked shares are the middles of six equal slices of the recipe's range, in turn (see bench_step.py), so that every
timed step replays a CUDA graph.

`test_end_to_end` compares engines on WAV, FLAC and shards. `eager` is the plain step behind the same loader.
`published` is built like the published code: the workers of torch's DataLoader read with soundfile and compute the
log-mel with torchaudio, the plain step runs on their patches, and the EMA updates one tensor after the other. The kind
`resident` keeps the shards in the device's memory. The engines must agree in their losses on the loader's first
batches, as in bench_train_step.py.
"""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import bench_step
import pytest
import torch
from conftest import left_out
from records import DEVICE, QUICK

from ajepa.config import PRESETS, ObjectiveConfig
from ajepa.data.index import Index, build_index
from ajepa.data.loader import AudioLoader
from ajepa.data.resident import ResidentLoader
from ajepa.data.shards import SUFFIX, Clip, ShardWriter, block_crcs
from ajepa.model._torchaudio import import_torchaudio
from ajepa.model.frontend import FrontEnd
from ajepa.model.masks import MaskSampler
from ajepa.training.engine import Engine, StepResult
from ajepa.training.roofline import product_flops_per_ms
from ajepa.utils.devices import release_memory, wait

PRESET, BATCH, CLIPS = ("tiny", 16, 220) if DEVICE == "cpu" else ("audio-jepa", 256, 512)
CFG = dataclasses.replace(PRESETS[PRESET], mask=dataclasses.replace(PRESETS[PRESET].mask, fixed_token_budget=True))
CFG = dataclasses.replace(CFG, objective=ObjectiveConfig())  # the masked objective, which all engines here compute
ROUNDS, STEPS = (4, 5) if DEVICE == "cpu" else (5, 20)
KINDS = ["WAV", "FLAC", "shards", "resident"]
RATE, SAMPLES = CFG.front_end.sample_rate, round(CFG.data.clip_seconds * CFG.front_end.sample_rate)
# For `test_from_shards`. A turn is long compared with the batches that the loader has ready when the turn begins.
SHARD_CLIPS = 16 if DEVICE == "cpu" else 1024
TURNS, TURN_ROUNDS = (2, 1) if DEVICE == "cpu" else (3, 3) if QUICK else (4, 6)  # rounds of the six slices


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """Return a folder with one shard of noise, and the noise itself, int16 `[clips, S]`."""
    folder = tmp_path_factory.mktemp("shards")
    draw = torch.Generator(DEVICE).manual_seed(0)
    noise = torch.randint(-9999, 9999, (SHARD_CLIPS, SAMPLES), dtype=torch.int16, device=DEVICE, generator=draw).cpu()
    with open(folder / f"{0:09d}{SUFFIX}", "wb") as file:
        writer = ShardWriter(file, [])
        for row, pcm in enumerate(noise.numpy()):
            payload, digest = pcm.tobytes(), row.to_bytes(16, "little")  # no two clips are alike
            clip = Clip(payload, SAMPLES, RATE, 1, digest, block_crcs(payload))
            writer.add(row, f"{row:06d}", None, [], clip)
        writer.finish("pcm", RATE, 0, SHARD_CLIPS, SHARD_CLIPS, bytes(16))
    return folder, noise


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Return {format: folder}. All folders hold the same recordings."""
    import soundfile  # imported here, because `test_from_shards` needs neither soundfile nor tyro

    from ajepa import pack
    from ajepa.data.synthetic import make_synthetic

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
    """Turns a recording into log-mel patches, in a worker of torch's DataLoader."""

    def __init__(self, paths: list[str]):
        import_torchaudio()  # without torchaudio this would not be the published pipeline
        self.paths, self.front_end = paths, FrontEnd(CFG.front_end, "torchaudio")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        import soundfile

        pcm, _ = soundfile.read(self.paths[i], dtype="int16")
        clip = torch.zeros(SAMPLES, dtype=torch.int16)
        clip[: len(pcm)] = torch.from_numpy(pcm[:SAMPLES])
        return self.front_end(clip[None])[0]


class Published(Engine):
    """The plain step on patches, with the EMA of the published code: a loop that allocates a new tensor each time."""

    def __init__(self, cfg, device: torch.device):
        super().__init__(cfg, device)
        self.front_end = lambda patches, lengths: patches

    @torch.no_grad()
    def _average(self, decay) -> None:
        for source, target in self.pairs:
            target.data = decay * target.data + (1 - decay) * source.data


def loader(index: Index, kind: str, batch: int) -> AudioLoader:
    """Return the trainer's loader."""
    loader_class = ResidentLoader if kind == "resident" else AudioLoader
    options = {"sample_rate": RATE, "clip_samples": SAMPLES, "batch_size": batch, "seed": 0, "pad": CFG.data.pad}
    return loader_class(index, device=torch.device(DEVICE), **options)


def ours(index: Index, kind: str, batch: int):
    """Yield batches (pcm, lengths) of a fresh loader. Closing this generator closes the loader."""
    with loader(index, kind, batch) as batches:
        for made in batches:
            yield made.pcm, made.lengths


def published(folder: Path):
    """Yield batches (patches, lengths) of torch's DataLoader, of recordings drawn at random, without end."""
    data = Patches([str(path) for path in sorted(folder.rglob("*.*")) if path.suffix in (".wav", ".flac")])
    context = multiprocessing.get_context("forkserver")  # forks of this process would inherit DALI's and OpenMP's locks
    context.set_forkserver_preload(["pytest", "soundfile", "torch", "ajepa.training.engine", "ajepa.data.loader"])
    loader = torch.utils.data.DataLoader(
        data, BATCH, sampler=torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**6),
        num_workers=os.cpu_count() or 1, pin_memory=DEVICE == "cuda", multiprocessing_context=context,
    )  # fmt: skip
    lengths = torch.full((BATCH,), SAMPLES, dtype=torch.int32)
    for patches in loader:
        yield patches, lengths


def run(
    engine: Engine, batches: Iterator, samplers: list[MaskSampler], batch: int, steps: int
) -> tuple[float, float, list[StepResult]]:
    """Run `steps` steps after two steps that fill the pipeline.

    Returns (mean seconds per step, mean seconds per step of waiting for data, results of all steps).
    """
    results, waited = [], 0.0
    for step in range(steps + 2):
        if step == 2:
            wait(engine.device)
            begin, waited = time.perf_counter(), 0.0
        tick = time.perf_counter()
        with engine.ahead():
            data, lengths = (t.to(engine.device, non_blocking=True) for t in next(batches))
            waited += time.perf_counter() - tick
            patches = engine.patches(data, lengths, step)
        masks = engine.masks(samplers[step % len(samplers)], step, batch)
        results.append(engine.train(patches, masks, CFG.optim.warmup_steps + step))
    wait(engine.device)
    return (time.perf_counter() - begin) / steps, waited / steps, results


@pytest.mark.parametrize("batch", bench_step.BATCHES)
def test_from_shards(batch, shards, record):
    cfg, device, (folder, noise) = bench_step.config(), torch.device(DEVICE), shards
    rate = product_flops_per_ms(bench_step.DTYPE, DEVICE)
    samplers = [MaskSampler(mask, cfg.front_end.grid) for mask in bench_step.slices(cfg.mask)]
    index = build_index(folder, decode=False, progress=False)
    release_memory(device)
    with loader(index, "shards", batch) as made:
        first, second = next(made), next(made)
    assert torch.equal(first.pcm.cpu(), noise[first.items]), "the loader returns other samples than the shard holds"
    held = [(first.pcm, first.lengths), (second.pcm, second.lengths)]

    engine = Engine(cfg, device)
    run(engine, itertools.cycle(held), samplers, batch, bench_step.WARM_UP * len(samplers))
    seconds, waits = {"fused": [], "step alone": []}, {"fused": [], "step alone": []}
    for _ in range(TURNS):
        for name in seconds:
            source = ours(index, "shards", batch) if name == "fused" else (pair for pair in itertools.cycle(held))
            with contextlib.closing(source) as batches:
                took, waited, results = run(engine, batches, samplers, batch, TURN_ROUNDS * len(samplers))
            bench_step.losses(results)
            seconds[name].append(took)
            waits[name].append(waited)
    flops = statistics.mean(engine.flops(engine.masks(sampler, 0, batch)) for sampler in samplers)
    del engine, held, first, second, results
    release_memory(device)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    more = {
        name: {
            "model": bench_step.MODEL,
            "batch": batch,
            "clips_per_second": batch / median,
            "mfu": flops / rate / (1e3 * median),
            "data_wait_share": sum(waits[name]) / sum(seconds[name]),
            "of_the_step": medians["step alone"] / median,
        }
        for name, median in medians.items()
    }
    times = {name: [1e3 * s for s in values] for name, values in seconds.items()}
    shape = f"{bench_step.MODEL}, batch {batch}, int16 shards, {os.cpu_count()} cores, masks as drawn"
    record("end_to_end", shape, times, floor_ms=flops / rate, more=more)


@pytest.mark.skipif(QUICK, reason="making the recordings and timing the engines takes minutes")
@pytest.mark.parametrize("kind", KINDS)
def test_end_to_end(kind, recordings, record):
    device, samplers = torch.device(DEVICE), [MaskSampler(CFG.mask, CFG.front_end.grid)]
    index = build_index(recordings[kind], decode=False, progress=False)
    plain = dataclasses.replace(CFG, impl="reference")
    engines = {"fused": Engine(CFG, device), "eager": Engine(plain, device)}
    if kind in ("WAV", "FLAC"):  # only our loader reads shards
        engines["published"] = Published(plain, device)
    seconds, waits = {name: [] for name in engines}, {name: [] for name in engines}
    losses = {}
    # The engines take turns and run one at a time. The first round compiles and fills caches, and is not counted.
    for turn in range(ROUNDS + 1):
        for name, engine in engines.items():
            source = published(recordings[kind]) if name == "published" else ours(index, kind, BATCH)
            with contextlib.closing(source) as batches:
                took, waited, results = run(engine, batches, samplers, BATCH, STEPS)
            if turn:
                seconds[name].append(took)
                waits[name].append(waited)
            losses[name] = torch.stack([result.loss for result in results]).tolist()
    assert losses["fused"] == pytest.approx(losses["eager"], rel=max(5e-3, bench_step.TOLERANCE))
    if "published" in losses:
        assert losses["published"] == pytest.approx(losses["eager"], rel=0.2), "more than their order explains"

    rate = product_flops_per_ms(bench_step.DTYPE, DEVICE)
    floor_ms = engines["fused"].flops(samplers[0](0, CFG.optim.steps, BATCH)) / rate
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
        left_out({"audio-jepa": "a step takes seconds on a CPU; tiny is timed in its place"})
