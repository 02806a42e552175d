"""add_layer_norm against an addition and torch's layer norm, compiled and not.

Milliseconds a call, both ways. The floor is the bytes that must move over the measured copy rate: x, residual,
sum and normed forward; sum, two incoming gradients and one outgoing backward.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import DEVICE, left_out

from ajepa_kernels import add_layer_norm

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def plain(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


def both_ways(function, x, residual, weight, bias, upstream):
    outputs = function(x, residual, weight, bias)
    return torch.autograd.grad(outputs, (x, residual, weight, bias), (upstream, upstream))


@pytest.mark.parametrize(("M", "C"), [(65536, 768), (131072, 384)] if DEVICE == "cuda" else [(4096, 768), (8192, 384)])
def test_layer_norm(M, C, interleave, record):
    def make():
        x, residual, upstream = (torch.randn(M, C, device=DEVICE, dtype=DTYPE) for _ in range(3))
        weight, bias = (torch.randn(C, device=DEVICE, dtype=DTYPE).requires_grad_() for _ in range(2))
        return x.requires_grad_(), residual.requires_grad_(), weight, bias, upstream

    functions = {"ajepa add_layer_norm": add_layer_norm, "plain PyTorch": plain, "torch.compile": torch.compile(plain)}
    inputs = make()
    want = both_ways(plain, *(t.detach().double().requires_grad_(t.requires_grad) for t in inputs))
    for name, function in functions.items():
        for got, right in zip(both_ways(function, *inputs), want, strict=True):
            assert (got.double() - right).norm() < 64 * torch.finfo(DTYPE).eps * right.norm(), name
    size = inputs[0].element_size()
    timed = {
        name: rotating(functools.partial(both_ways, function), make, 3 * M * C * size)
        for name, function in functions.items()
    }
    times = interleave(timed, SECONDS)
    floor = 8 * M * C * size / copy_bytes_per_ms()
    peers = ["torch.compile"]
    record(
        "add_layer_norm", f"{M} x {C}, forward + backward", times, plain="plain PyTorch", peers=peers, floor_ms=floor
    )
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU: add_layer_norm is its plain definition here"})
