"""latent_l2_loss with its gradient against plain PyTorch, compiled and not.

Milliseconds a call. The floor is the bytes of prediction, gathered targets and gradient over the measured copy rate.
"""

import functools

import pytest
import torch
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import DEVICE, left_out

from ajepa_kernels import latent_l2_loss, latent_l2_loss_reference

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
C = 768


def both_ways(function, prediction, latents, index):
    loss = function(prediction, latents, index)
    return torch.autograd.grad(loss, prediction)[0]


@pytest.mark.parametrize("kind", ["l2", "smooth_l1", "cosine"])
@pytest.mark.parametrize("T", [4096, 65536] if DEVICE == "cuda" else [4096])
def test_latent_loss(T, kind, interleave, record):
    def make():
        prediction, latents = (torch.randn(n, C, device=DEVICE, dtype=DTYPE) for n in (T, 2 * T))
        return prediction.requires_grad_(), latents, torch.randperm(2 * T, device=DEVICE)[:T]

    functions = {
        "ajepa latent_l2_loss": functools.partial(latent_l2_loss, kind=kind),
        "plain PyTorch": functools.partial(latent_l2_loss_reference, kind=kind),
        "torch.compile": torch.compile(functools.partial(latent_l2_loss_reference, kind=kind)),
    }
    prediction, latents, index = make()
    want = both_ways(functions["plain PyTorch"], prediction.detach().double().requires_grad_(), latents.double(), index)
    for name, function in functions.items():
        got = both_ways(function, prediction, latents, index)
        assert (got.double() - want).norm() < 4 * torch.finfo(DTYPE).eps * want.norm(), name
    size = prediction.element_size()
    timed = {
        name: rotating(functools.partial(both_ways, function), make, 3 * T * C * size)
        for name, function in functions.items()
    }
    floor = 3 * T * C * size / copy_bytes_per_ms()
    shape = f"{T} x {C}, {kind}, forward + backward"
    record(
        "latent_l2_loss",
        shape,
        interleave(timed, SECONDS),
        plain="plain PyTorch",
        peers=["torch.compile"],
        floor_ms=floor,
    )
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU: latent_l2_loss is its plain definition here"})
