"""Benchmark gelu_mlp, whose GELU runs in the epilogues of its products, against plain PyTorch and torch.compile.

A time is milliseconds per call: forward without a gradient, as in the target encoder; and forward and backward, with
the gradients of x and of the four parameters. The floor is the FLOPs of the two or six products divided by the rate of
a large product measured in the same run. `ajepa bias_gelu` has the same GELU in passes of its own, which is also how
`gelu_mlp` runs where the fused products are missing.
"""

import functools

import pytest
import torch
from ceilings import SECONDS, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa.training.roofline import product_flops_per_ms
from ajepa_kernels import bias_gelu, gelu_mlp, gelu_mlp_reference
from ajepa_kernels.products import BACKWARD, FORWARD, why_not

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# (tokens, width) of the context encoder, of the target encoder and of the predictor at 1,024 clips, with half of the
# predictor's tokens too; and of the context encoder at 64 clips
GPU_SIZES = [(65536, 768), (131072, 384), (131072, 768), (65536, 384), (4096, 768)]
SIZES = GPU_SIZES if DEVICE == "cuda" else [(64, 64)] if QUICK else [(1024, 384)]


def two_passes(x, w1, b1, w2, b2):
    """Compute the GELU outside the products, in one pass forward and one pass backward."""
    hidden = bias_gelu(torch.nn.functional.linear(x, w1), b1)
    return torch.nn.functional.linear(hidden, w2, b2)


def both_ways(function, upstream, *leaves):
    return torch.autograd.grad(function(*leaves), leaves, upstream)


def forward_alone(function, upstream, *leaves):
    with torch.no_grad():
        return (function(*leaves),)


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
@pytest.mark.parametrize(("M", "C"), SIZES[:1] if QUICK else SIZES)
def test_gelu_mlp(M, C, direction, interleave, record):
    run, products = (forward_alone, 2) if direction == "forward" else (both_ways, 6)
    options = {"device": DEVICE, "dtype": DTYPE}

    def make(rows=M):
        shapes = {(rows, C): 1.0, (4 * C, C): C**-0.5, (4 * C,): 1.0, (C, 4 * C): (4 * C) ** -0.5, (C,): 1.0}
        leaves = [(s * torch.randn(shape, **options)).requires_grad_() for shape, s in shapes.items()]
        return torch.randn(rows, C, **options), *leaves

    functions = {
        "ajepa gelu_mlp": gelu_mlp,
        "ajepa bias_gelu": two_passes,
        "plain PyTorch": gelu_mlp_reference,
    }
    if QUICK:
        left_out({"torch.compile": "compiled peers are left out of a quick run"})
    else:
        torch.compiler.reset()  # together with dynamic=False, so that each case is compiled for its own shapes
        functions["torch.compile"] = torch.compile(gelu_mlp_reference, dynamic=False)
    upstream, *leaves = make(min(M, 2048))  # with more rows the float64 products would take long
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    want = run(gelu_mlp_reference, upstream.double(), *doubles)
    for name, function in functions.items():
        for got, right in zip(run(function, upstream, *leaves), want, strict=True):
            assert (got.double() - right).norm() < 16 * torch.finfo(DTYPE).eps * right.norm(), name
    size = upstream.element_size()
    timed = {
        name: rotating(functools.partial(run, function), make, 2 * M * C * size) for name, function in functions.items()
    }
    floor = products * 2 * M * C * 4 * C / product_flops_per_ms(DTYPE, DEVICE)
    shape = f"{M} x {C}, {direction}"
    record(
        "gelu_mlp", shape, interleave(timed, SECONDS), plain="plain PyTorch", peers=["torch.compile"], floor_ms=floor
    )
    names = (*FORWARD.values(), *BACKWARD.values())
    if reason := why_not(upstream, names, C):
        left_out({"the epilogues": f"{reason}; gelu_mlp runs unfused"})
