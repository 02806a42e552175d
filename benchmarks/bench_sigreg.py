"""Benchmark sigreg and its gradient against plain PyTorch, eager and compiled.

A time is milliseconds per call, forward and backward. The floor is the floating-point operations of the two products
divided by the measured product rate; the directions, the sines and cosines and their rotations come on top of it.
`peak_bytes` is what a call allocates at most beyond its arguments.
"""

import functools

import pytest
import torch
from bench_segment_pool import peak_bytes
from ceilings import SECONDS, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa.training import roofline
from ajepa_kernels import sigreg, sigreg_reference

DTYPES = [torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float32]
CASES = {  # (views, samples, width, directions)
    "cuda": {"1024 x 768, 1024 directions": (1, 1024, 768, 1024), "2 x 96 x 128, 256 directions": (2, 96, 128, 256)},
    "cpu": {"2 x 16 x 32, 32 directions": (2, 16, 32, 32)}
    if QUICK
    else {"2 x 96 x 128, 256 directions": (2, 96, 128, 256)},
}[DEVICE]


def both_ways(function, z, key):
    value = function(z, key)
    return value, torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", CASES)
def test_sigreg(shape, dtype, interleave, record):
    V, N, D, S = CASES[shape]

    def make():
        z = torch.randn(V, N, D, device=DEVICE, dtype=dtype).requires_grad_()
        return z, torch.randint(2**62, (), device=DEVICE)

    functions = {
        "ajepa sigreg": functools.partial(sigreg, directions=S),
        "plain PyTorch": functools.partial(sigreg_reference, directions=S),
    }
    if QUICK:
        left_out({"torch.compile": "compiled peers are left out of a quick run"})
    else:
        torch.compiler.reset()  # together with dynamic=False, so that each case is compiled for its own shapes
        functions["torch.compile"] = torch.compile(functions["plain PyTorch"], dynamic=False)
    z, key = make()
    want = both_ways(functions["plain PyTorch"], z.detach().double().requires_grad_(), key)
    for name, function in functions.items():
        for got, right in zip(both_ways(function, z, key), want, strict=True):
            # 16-bit directions differ from those of float64 by their rounding, which moves the value too
            bound = 1e-4 if dtype == torch.float32 else 0.02
            assert (got.double() - right).norm() < bound * right.norm(), name
    peaks = {
        name: {"peak_bytes": peak_bytes(functools.partial(both_ways, function, z, key))}
        for name, function in functions.items()
    }
    timed = {
        name: rotating(functools.partial(both_ways, function), make, z.numel() * z.element_size())
        for name, function in functions.items()
    }
    record(
        "sigreg",
        f"{shape}, {str(dtype).removeprefix('torch.')}, forward + backward",
        interleave(timed, SECONDS),
        plain="plain PyTorch",
        peers=["torch.compile"],
        floor_ms=4 * V * N * D * S / roofline.product_flops_per_ms(dtype, DEVICE),
        more=peaks,
    )
    if DEVICE == "cpu":
        left_out({"the kernels": "need a GPU", "peak memory": "needs a GPU"})
