"""bias_gelu against F.gelu(x + bias), eager and compiled.

Milliseconds a call, both ways, with the gradients of x and bias. The floor is the bytes that must move over the
measured copy rate: x and y forward; dy, x and dx backward.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import DEVICE, left_out

from ajepa_kernels import bias_gelu

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def both_ways(function, x, bias, upstream):
    return torch.autograd.grad(function(x, bias), (x, bias), upstream)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("M", "C"), [(65536, 3072), (131072, 1536)] if DEVICE == "cuda" else [(2048, 3072)])
def test_bias_gelu(M, C, approximate, interleave, record):
    def make():
        x, upstream = (torch.randn(M, C, device=DEVICE, dtype=DTYPE) for _ in range(2))
        return x.requires_grad_(), torch.randn(C, device=DEVICE, dtype=DTYPE).requires_grad_(), upstream

    plain = lambda x, bias: F.gelu(x + bias, approximate=approximate)  # noqa: E731
    functions = {
        "ajepa bias_gelu": functools.partial(bias_gelu, approximate=approximate),
        "plain PyTorch": plain,
        "torch.compile": torch.compile(plain),
    }
    inputs = make()
    want = both_ways(plain, *(t.detach().double().requires_grad_(t.requires_grad) for t in inputs))
    for name, function in functions.items():
        for got, right in zip(both_ways(function, *inputs), want, strict=True):
            assert (got.double() - right).norm() < 64 * torch.finfo(DTYPE).eps * right.norm(), name
    size = inputs[0].element_size()
    timed = {
        name: rotating(functools.partial(both_ways, function), make, 2 * M * C * size)
        for name, function in functions.items()
    }
    floor = 5 * M * C * size / copy_bytes_per_ms()
    shape = f"{M} x {C}, {approximate}, forward + backward"
    record(
        "bias_gelu", shape, interleave(timed, SECONDS), plain="plain PyTorch", peers=["torch.compile"], floor_ms=floor
    )
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU: bias_gelu is its plain definition here"})
