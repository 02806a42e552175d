"""Benchmark augment_mel against plain PyTorch, eager and compiled, and against `grid_sample`.

A time is milliseconds per call. The floor is the bytes of the mel power, read once, and of the patches, divided by the
measured copy rate. The views start so early that none wraps around its clip's end, which `grid_sample` could not do.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa_kernels import LogMelSpec, MelViews, augment_mel, augment_mel_reference

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
VIEWS = 2  # of a clip
TINY = LogMelSpec(n_mels=64, n_frames=64, patch=(8, 8))
CASES = {  # (clips, frames of a clip, front end)
    "cuda": {"2048 x 128 x 256": (1024, 400, LogMelSpec(n_frames=256)), "192 x 64 x 64": (96, 162, TINY)},
    "cpu": {"16 x 64 x 64": (8, 162, TINY)} if QUICK else {"192 x 64 x 64": (96, 162, TINY)},
}[DEVICE]
CHECKED = 16  # views that are compared with float64


def draw(clips: int, frames: int, spec: LogMelSpec) -> tuple[torch.Tensor, MelViews]:
    """Mel power, and views as in training: half of them have a background."""
    R = VIEWS * clips
    on = functools.partial(torch.rand, device=DEVICE)
    rate = 0.6 + 0.6 * on(R)
    gain = torch.stack((0.25 + on(R), (on(R) < 0.5) * 0.3 * on(R)), 1)
    views = MelViews(
        clip=torch.randint(clips, (R, 2), device=DEVICE, dtype=torch.int32),
        start=on(R, 2) * (frames - 1 - rate[:, None] * (spec.n_frames - 1)),
        rate=rate,
        band=torch.stack((0.1 * spec.n_mels * on(R), 0.8 + 0.2 * on(R)), 1),
        gain=gain,
        equaliser=8 * on(R, 5) - 4,
    )
    return on(clips, spec.n_mels, frames).square(), views


def by_grid_sample(mel: torch.Tensor, views: MelViews, spec: LogMelSpec, dtype: torch.dtype) -> torch.Tensor:
    """The views as eager code usually makes them: a copy of each clip, an image of positions, one pass a step."""
    (rows, columns), (height, width), M, T = spec.grid, spec.patch, spec.n_mels, spec.n_frames
    R, shape = len(views.rate), (len(views.rate), M, T)
    band = (views.band[:, :1] + views.band[:, 1:] * torch.arange(M, device=mel.device)).clamp(0, M - 1)
    y = (band * (2 / (M - 1)) - 1)[:, :, None].expand(shape)
    value: torch.Tensor | float = 0.0
    for i in range(2):
        frame = views.start[:, i, None] + views.rate[:, None] * torch.arange(T, device=mel.device)
        x = (frame * (2 / (mel.shape[2] - 1)) - 1)[:, None].expand(shape)
        source = F.grid_sample(mel[views.clip[:, i].long()][:, None], torch.stack((x, y), -1), align_corners=True)
        value = value + views.gain[:, i, None, None] * source[:, 0]
    level = 10 ** (F.interpolate(views.equaliser[:, None], M, mode="linear", align_corners=True) / 10)
    out = ((value * level.transpose(1, 2)).clamp_min(spec.log_floor).log() - spec.mean) / spec.std
    out = out.to(dtype).view(R, rows, height, columns, width).transpose(2, 3)
    return out.reshape(R, rows * columns, height * width)


@pytest.mark.parametrize("shape", CASES)
def test_augment_mel(shape, interleave, record):
    clips, frames, spec = CASES[shape]
    functions = {
        "ajepa augment_mel": functools.partial(augment_mel, spec=spec, dtype=DTYPE),
        "plain PyTorch": functools.partial(augment_mel_reference, spec=spec, dtype=DTYPE),
        "grid_sample": functools.partial(by_grid_sample, spec=spec, dtype=DTYPE),
    }
    if QUICK:
        left_out({"torch.compile": "compiled peers are left out of a quick run"})
    else:
        torch.compiler.reset()  # together with dynamic=False, so that each case is compiled for its own shapes
        for name, plain in (("torch.compile", "plain PyTorch"), ("grid_sample, compiled", "grid_sample")):
            functions[name] = torch.compile(functions[plain], dynamic=False)
    mel, views = draw(clips, frames, spec)
    few = MelViews(*(x[:CHECKED] for x in views))
    want = augment_mel_reference(mel.double(), few, spec)
    for name, function in functions.items():
        got = function(mel, views)[:CHECKED]
        assert (got.double() - want).norm() < 4 * max(torch.finfo(DTYPE).eps, 1e-5) * want.norm(), name
    bytes_each = 4 * mel.numel() + VIEWS * clips * math.prod(spec.grid) * spec.patch_dim * DTYPE.itemsize
    timed = {
        name: rotating(function, functools.partial(draw, clips, frames, spec), bytes_each)
        for name, function in functions.items()
    }
    record(
        "augment_mel",
        shape,
        interleave(timed, SECONDS),
        plain="plain PyTorch",
        peers=[name for name in functions if name not in ("ajepa augment_mel", "plain PyTorch")],
        floor_ms=bytes_each / copy_bytes_per_ms(),
    )
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU; on a CPU augment_mel runs its plain definition"})
