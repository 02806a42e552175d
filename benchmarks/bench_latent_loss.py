"""Benchmark latent_l2_loss and its gradient against plain PyTorch, eager and compiled.

A time is milliseconds per call. The floor is the bytes of the prediction, of the gathered targets and of the gradient,
divided by the measured copy rate.
"""

import functools

import pytest
import torch
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa_kernels import latent_l2_loss, latent_l2_loss_reference

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
C = 768
# A step of 1,024 clips predicts 65,536 tokens.
TOKENS = [65536, 4096] if DEVICE == "cuda" else [256] if QUICK else [4096]
KINDS = ["l2", "smooth_l1", "cosine"]
# Four target blocks in each of 128 images, as I-JEPA predicts them, or of two on a CPU.
BLOCKS, SAMPLES, PATCHES, N = 4, 128 if DEVICE == "cuda" else 2, 256, 32
CHECKED = 8192  # tokens that are compared with float64


def both_ways(function, prediction, latents, index):
    loss = function(prediction, latents, index)
    return torch.autograd.grad(loss, prediction)[0]


@pytest.mark.parametrize("kind", KINDS[:1] if QUICK else KINDS)
@pytest.mark.parametrize("T", TOKENS[:1] if QUICK else TOKENS)
def test_latent_loss(T, kind, interleave, record):
    def make(tokens=T):
        prediction, latents = (torch.randn(n, C, device=DEVICE, dtype=DTYPE) for n in (tokens, 2 * tokens))
        return prediction.requires_grad_(), latents, torch.randperm(2 * tokens, device=DEVICE)[:tokens]

    compare(f"{T} x {C}, {kind}", T, {"kind": kind}, make, make(min(T, CHECKED)), interleave, record)


@pytest.mark.skipif(QUICK, reason="a quick run has one case of each operation")
def test_blocks_of_samples(interleave, record):
    """The list of masks of I-JEPA and V-JEPA 2, with the loss of V-JEPA 2."""

    def make():
        blocks = [torch.rand(SAMPLES, PATCHES, device=DEVICE).argsort(1)[:, :N] for _ in range(BLOCKS)]
        shapes = ((BLOCKS * SAMPLES, N, C), (SAMPLES, PATCHES, C))
        prediction, latents = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in shapes)
        return prediction.requires_grad_(), latents, blocks

    shape, T = f"{BLOCKS} blocks of {N} in {SAMPLES} samples x {C}, lp", BLOCKS * SAMPLES * N
    compare(shape, T, {"kind": "lp", "p": 1, "eps": 1e-5}, make, make(), interleave, record)


def compare(shape, T, options, make, checked, interleave, record):
    """Check all implementations on `checked` against float64, and time them on what `make` returns."""
    functions = {
        "ajepa latent_l2_loss": functools.partial(latent_l2_loss, **options),
        "plain PyTorch": functools.partial(latent_l2_loss_reference, **options),
    }
    if QUICK:
        left_out({"torch.compile": "compiled peers are left out of a quick run"})
    else:
        torch.compiler.reset()  # together with dynamic=False, so that each case is compiled for its own shapes
        functions["torch.compile"] = torch.compile(functions["plain PyTorch"], dynamic=False)
    prediction, latents, index = checked
    want = both_ways(functions["plain PyTorch"], prediction.detach().double().requires_grad_(), latents.double(), index)
    for name, function in functions.items():
        got = both_ways(function, prediction, latents, index)
        assert (got.double() - want).norm() < 4 * torch.finfo(DTYPE).eps * want.norm(), name
    size = 3 * T * C * prediction.element_size()
    timed = {name: rotating(functools.partial(both_ways, function), make, size) for name, function in functions.items()}
    record(
        "latent_l2_loss",
        f"{shape}, forward + backward",
        interleave(timed, SECONDS),
        plain="plain PyTorch",
        peers=["torch.compile"],
        floor_ms=size / copy_bytes_per_ms(),
    )
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU; on a CPU latent_l2_loss runs its plain definition"})
