"""Benchmark masked_attention with rotary tables against a rotation in plain PyTorch, eager and compiled, before SDPA.

A time is milliseconds per call with V-JEPA 2's tables, forward, or forward and backward, in bfloat16 on a GPU and in
float32 on a CPU. Dense clips hold the 8 x 14 x 14 tokens of 16 frames of 224 x 224 pixels, or the visible tokens only,
packed end to end, of equal numbers, so that SDPA needs no padding. ViT-L has 16 heads of 64 channels, ViT-H of 80. The
floor is the bytes that must move, divided by the copy rate measured in the same run.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa_kernels import Rotary, axial_angles, masked_attention

H = 16 if DEVICE == "cuda" else 2
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# (clips, frames, rows and columns, visible tokens, head dim)
CASES = {
    "cuda": [(8, 8, 14, 1568, 64), (32, 8, 14, 256, 64), (64, 8, 14, 96, 64), (8, 8, 14, 1568, 80)],
    "cpu": [(2, 2, 6, 72, 64)] if QUICK else [(2, 4, 14, 784, 64), (8, 4, 14, 96, 64)],
}[DEVICE]


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x `[B, N, H, D]` with its first channels turned in float32, as public code does. cos, sin: `[B, N, 1, 2 P]`."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turned = turned.to(torch.promote_types(x.dtype, torch.float32))
    x1, x2 = turned.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([(turned * cos + torch.stack([-x2, x1], -1).flatten(-2) * sin).to(x.dtype), rest], -1)


def plain(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    q, k, v = qkv.unbind(2)
    q, k, v = (x.transpose(1, 2) for x in (turn(q, cos, sin), turn(k, cos, sin), v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def both_ways(function, qkv, *rest):
    out = function(qkv, *rest)
    return out, torch.autograd.grad(out, qkv, out.detach())[0]


@pytest.mark.parametrize(("clips", "frames", "side", "visible", "D"), CASES)
@pytest.mark.parametrize("way", ["forward", "forward + backward"])
def test_rotary(clips, frames, side, visible, D, way, interleave, record):
    grid = torch.cartesian_prod(*(torch.arange(n, device=DEVICE) for n in (frames, side, side)))
    index = torch.rand(clips, len(grid), device=DEVICE).argsort(1)[:, :visible]
    rotary = Rotary.of(axial_angles(grid[index], [2 * (D // 3 // 2)] * 3, tiled=True))
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None]
    functions = {
        "ajepa masked_attention": lambda x: masked_attention(x, rotary=rotary),
        "plain PyTorch": lambda x: plain(x, cos, sin),
        "SDPA without rotation": lambda x: plain(x, cos[..., :0], sin[..., :0]),
    }
    if QUICK:
        left_out({"torch.compile": "compiled peers are left out of a quick run"})
    else:
        torch.compiler.reset()
        compiled = torch.compile(plain, dynamic=False)
        functions["torch.compile"] = lambda x: compiled(x, cos, sin)

    def make(clips=clips, dtype=DTYPE):
        return (torch.randn(clips, visible, 3, H, D, device=DEVICE, dtype=dtype).requires_grad_(),)

    (x,) = make()
    sample = x[:2].detach().requires_grad_()
    want = both_ways(plain, sample.detach().double().requires_grad_(), cos[:2].double(), sin[:2].double())
    for name in ("ajepa masked_attention", "plain PyTorch", "torch.compile"):
        if name in functions:
            for got, right in zip(both_ways(functions[name], x), want, strict=True):
                assert (got[:2].double() - right).norm() < 8 * torch.finfo(DTYPE).eps * right.norm(), name
    tensors = {"forward": 4, "forward + backward": 11}[way]
    moved = tensors * clips * visible * H * D * x.element_size()
    run = {n: functools.partial(both_ways, f) if "backward" in way else f for n, f in functions.items()}
    record(
        "rotary_attention",
        f"{clips} x {visible} tokens, {H} heads of {D}, {way}",
        interleave({name: rotating(function, make, moved) for name, function in run.items()}, SECONDS),
        plain="plain PyTorch",
        peers=[name for name in run if name == "torch.compile"],
        floor_ms=moved / copy_bytes_per_ms(),
    )
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU; on a CPU masked_attention runs its plain definition"})
