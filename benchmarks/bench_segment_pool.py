"""Benchmark segment_pool against plain PyTorch, eager and compiled, and against torch.segment_reduce.

A time is milliseconds per call. The floor is the bytes that must move, divided by the measured copy rate: the forward
pass reads x and writes the result, the backward pass reads x, the result and its gradient, and writes that of x.
`peak_bytes` is what a call allocates at most beyond its arguments.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa_kernels import segment_pool, segment_pool_reference

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# (clips of two views, frequency rows, time patches, width). Half of the patches are visible.
CASES = {
    "cuda": {"2048 x 64 of 128, width 768": (2048, 8, 16, 768), "192 x 32 of 64, width 128": (192, 8, 8, 128)},
    "cpu": {"16 x 32 of 64, width 128": (16, 8, 8, 128)} if QUICK else {"192 x 32 of 64, width 128": (192, 8, 8, 128)},
}[DEVICE]
CHECKED = 16  # clips that are compared with float64


def draw(clips: int, rows: int, columns: int, C: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Visible tokens, drawn at random of every clip, and the offsets of the clips' frequency rows."""
    patches = rows * columns
    visible = torch.rand(clips, patches, device=DEVICE).argsort(1) < patches // 2
    lengths = visible.view(clips * rows, columns).sum(1)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return torch.randn(clips * patches // 2, C, device=DEVICE, dtype=DTYPE).requires_grad_(), cu


def by_segment_reduce(x: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    offsets, x = cu.long(), x.float()
    mean = torch.segment_reduce(x, "mean", offsets=offsets, initial=0)
    centred = x - mean.repeat_interleave(offsets.diff(), 0, output_size=len(x))
    variance = torch.segment_reduce(centred.square(), "mean", offsets=offsets, initial=0)
    return torch.stack([mean, (variance + 1e-5).sqrt()], 1)


def peak_bytes(function: Callable[[], object]) -> int | None:
    """Return the bytes of GPU memory that a call of `function` allocates at most, in its second call."""
    if DEVICE != "cuda":
        return None
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def both_ways(function, x, cu):
    pooled = function(x, cu)
    return pooled, torch.autograd.grad(pooled, x, torch.ones_like(pooled))[0]


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("way", ["forward", "forward + backward"])
def test_segment_pool(shape, way, interleave, record):
    functions = {
        "ajepa segment_pool": segment_pool,
        "plain PyTorch": segment_pool_reference,
        "segment_reduce": by_segment_reduce,
    }
    if QUICK:
        left_out({"torch.compile": "compiled peers are left out of a quick run"})
    else:
        torch.compiler.reset()  # together with dynamic=False, so that each case is compiled for its own shapes
        functions["torch.compile"] = torch.compile(segment_pool_reference, dynamic=False)
    clips, *sizes = CASES[shape]
    x, cu = draw(CHECKED, *sizes)
    want = both_ways(segment_pool_reference, x.detach().double().requires_grad_(), cu)
    for name, function in functions.items():
        for got, right in zip(both_ways(function, x, cu), want, strict=True):
            assert (got.double() - right).norm() < 4 * torch.finfo(DTYPE).eps * right.norm(), name
    make = functools.partial(draw, clips, *sizes)
    x, cu = make()
    moved = x.numel() * x.element_size(), 2 * 4 * x.shape[1] * (len(cu) - 1)
    bytes_each = sum(moved) if way == "forward" else 3 * sum(moved)
    run = {
        name: functools.partial(both_ways, function) if "backward" in way else function
        for name, function in functions.items()
    }
    peaks = {name: {"peak_bytes": peak_bytes(functools.partial(function, x, cu))} for name, function in run.items()}
    record(
        "segment_pool",
        f"{shape}, {way}",
        interleave({name: rotating(function, make, bytes_each) for name, function in run.items()}, SECONDS),
        plain="plain PyTorch",
        peers=[name for name in functions if name in ("segment_reduce", "torch.compile")],
        floor_ms=bytes_each / copy_bytes_per_ms(),
        more=peaks,
    )
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU", "peak memory": "needs a GPU"})
