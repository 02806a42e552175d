"""From the same seed and on real audio, the fused engine and plain PyTorch give the same training curve."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ajepa.config import PRESETS, Config, ObjectiveConfig
from ajepa.evaluation.features import encoder_features
from ajepa.model.masks import MaskSampler
from ajepa.training.corpus import open_corpus
from ajepa.training.engine import Engine

AUDIO = os.environ.get("AJEPA_TEST_AUDIO")
needs_audio = pytest.mark.skipif(AUDIO is None, reason="AJEPA_TEST_AUDIO names no folder of recordings")
TRAINED_ON, SCORED = "index=10,11,12,13,14,15,16,17,18,19", "index=0,1,2,3"
BAND = 0.01  # largest relative difference between the losses of a step


def digits(size: str, batch: int, steps: int, **changes) -> Config:
    """A run on spoken digits. The watch scores other digits: one speaker's, by the digits of the other speakers."""
    meta, cfg = str(Path(str(AUDIO)) / "fsdd" / "meta.csv"), replace(PRESETS["tiny"], objective=ObjectiveConfig())
    return replace(
        cfg,
        data=replace(
            cfg.data, data=meta, where="speaker=george,jackson,lucas,nicolas", label="digit", clip_seconds=1.0
        ),
        model=replace(cfg.model, size=size),
        optim=replace(cfg.optim, batch_size=batch, steps=steps, warmup_steps=max(1, steps // 10), lr=1e-3),
        watch=replace(cfg.watch, eval_data=meta, eval_where=SCORED, eval_test="speaker=theo"),
        **changes,
    )


def made(size: str, batch: int, steps: int, **changes) -> Config:
    """A run on the synthetic data set, used when there is no real audio."""
    cfg = replace(PRESETS["tiny"], objective=ObjectiveConfig())
    return replace(
        cfg,
        model=replace(cfg.model, size=size),
        optim=replace(cfg.optim, batch_size=batch, steps=steps, warmup_steps=max(1, steps // 10), lr=1e-3),
        **changes,
    )


def train(cfg: Config, device: torch.device, nudge: float = 0.0) -> tuple[list[float], float]:
    """(losses, final kNN accuracy of the EMA target encoder). `nudge` is a relative change of the initial weights."""
    corpus, engine = open_corpus(cfg), Engine(cfg, device)
    with torch.no_grad():
        for p in engine.model.parameters():
            p.mul_(1 + nudge * torch.randn_like(p))
    sampler, losses = MaskSampler(cfg.mask, cfg.front_end.grid, seed=cfg.seed), []
    loader = corpus.loader(cfg, None)
    for step in range(cfg.optim.steps):
        batch = next(loader)
        masks = engine.masks(sampler, step, len(batch.pcm))
        losses.append(engine.step(batch.pcm.to(device), batch.lengths.to(device), masks, step).loss)
    loader.close()
    features = encoder_features(engine.model.target_encoder, engine.front_end, cfg.front_end, "concat")
    return torch.stack(losses).tolist(), corpus.evaluation.score(features, device)["knn_accuracy"]


def compare(cfg: Config, device: torch.device, band: float, points: float) -> None:
    fused, fused_knn = train(cfg, device)
    plain, plain_knn = train(replace(cfg, impl="reference"), device)
    assert fused == pytest.approx(plain, rel=band)
    assert fused[-1] < 0.95 * fused[0], "the loss did not fall"
    assert abs(fused_knn - plain_knn) <= points


@needs_audio
@pytest.mark.parametrize(("size", "batch", "steps"), [("tiny", 16, 24), ("S", 4, 6)])
def test_on_a_cpu(size, batch, steps):
    compare(digits(size, batch, steps, precision="fp32"), torch.device("cpu"), BAND, points=0.04)


def apart(losses: list[float], others: list[float], window: int = 10) -> float:
    """Largest relative difference between two loss curves, each averaged over windows of `window` steps."""
    a, b = (torch.tensor(x[: len(x) // window * window]).view(-1, window).mean(1) for x in (losses, others))
    return (a / b - 1).abs().max().item()


def compare_long(cfg: Config, device: torch.device) -> None:
    """After the loss leaves its first plateau, a change in the last bit moves even plain PyTorch's curve by percents.
    So the fused engine must follow plain float32 step by step only until then. Over the whole run it may be at most
    twice as far from plain float32 as nudged plain PyTorch runs in cfg's precision (two nudges are a small sample)."""
    plain = replace(cfg, impl="reference")
    fused, fused_knn = train(cfg, device)
    exact, _ = train(replace(plain, precision="fp32"), device)
    nudged = [train(plain, device, nudge=size) for size in (1e-7, 3e-7)]
    assert apart(fused, exact) <= max(0.03, 2 * max(apart(losses, exact) for losses, _ in nudged))
    start = cfg.optim.steps // 6
    assert fused[:start] == pytest.approx(exact[:start], rel=BAND)
    assert fused[-1] < 0.95 * fused[0], "the loss did not fall"
    assert fused_knn >= min(knn for _, knn in nudged) - 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("size", "batch"), [("tiny", 64), ("S", 64)])
def test_on_a_gpu(size, batch, precision):
    compare_long((digits if AUDIO else made)(size, batch, 300, precision=precision), torch.device("cuda"))


@needs_audio
def test_rehearsal():
    """The comparison of the GPU test, with little enough data and few enough steps for a CPU."""
    cfg = digits("tiny", 8, 12, precision="fp32")
    data = replace(cfg.data, where="speaker=george", clip_seconds=0.5)
    watch = replace(cfg.watch, eval_where="index=0,1", eval_test="speaker=theo")
    compare_long(replace(cfg, data=data, watch=watch), torch.device("cpu"))
