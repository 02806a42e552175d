"""Benchmark gelu_mlp, whose GELU runs in the epilogues of its products, against plain PyTorch and torch.compile.

A time is milliseconds per call: forward without a gradient, as in the target encoder; and forward and backward, with
the gradients of x and of the four parameters. The floor is the FLOPs of the two or six products divided by the rate of
a large product measured in the same run. `ajepa bias_gelu` has the same GELU in passes of its own, which is also how
`gelu_mlp` runs where the fused products are missing.

`linear_residual` is the product that ends each half of a block, here beside a float32 residual stream. Its floor is the
larger of its FLOPs at that rate and its bytes at the copy rate.
"""

import functools

import pytest
import torch
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa.training.roofline import product_flops_per_ms
from ajepa_kernels import bias_gelu, gelu_mlp, gelu_mlp_reference
from ajepa_kernels.products import BACKWARD, FORWARD, RESIDUAL, linear_residual_plain, why_not

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


# (tokens, K, N) of the context encoder's and of the predictor's products at 1,024 clips
RESIDUAL_SIZES = [(65536, 768, 768), (65536, 3072, 768), (131072, 384, 384), (131072, 1536, 384)]


@pytest.mark.parametrize(
    ("M", "K", "N"), RESIDUAL_SIZES[: 1 if QUICK else None] if DEVICE == "cuda" else [(64, 64, 64)]
)
def test_linear_residual(M, K, N, interleave, record):
    def make(rows=M):
        shapes = [((rows, K), 1.0), ((N, K), K**-0.5), ((N,), 1.0)]
        operands = [(s * torch.randn(shape, device=DEVICE)).to(DTYPE) for shape, s in shapes]
        return *operands, torch.randn(rows, N, device=DEVICE)

    functions = {"ajepa linear_residual": torch.ops.ajepa.linear_residual, "plain PyTorch": linear_residual_plain}
    operands = make(min(M, 4096))
    want = linear_residual_plain(*(t.double() for t in operands))
    for name, function in functions.items():
        assert (function(*operands) - want).norm() < 2 * torch.finfo(DTYPE).eps * want.norm(), name
    if reason := why_not(operands[0], (RESIDUAL,), N, K):
        left_out({"linear_residual": reason})
        return
    size = operands[0].element_size()
    bytes_each = M * (K * size + 2 * N * 4)
    timed = {name: rotating(function, make, bytes_each) for name, function in functions.items()}
    floor = max(2 * M * N * K / product_flops_per_ms(DTYPE, DEVICE), bytes_each / copy_bytes_per_ms())
    record("linear_residual", f"{M} x {K} to {N}", interleave(timed, SECONDS), plain="plain PyTorch", floor_ms=floor)
