"""Benchmark AdamWEMA against torch's fused AdamW with a foreach EMA and foreach casts, on the parameters of a ViT.

A time is milliseconds per step. The floor is 38 bytes per parameter divided by the measured copy rate: p, m, v and ema
are read and written, the gradient is read, and the bfloat16 copy of p is written.
"""

import pytest
import torch
from ceilings import SECONDS, copy_bytes_per_ms
from conftest import left_out
from records import DEVICE, QUICK

from ajepa_kernels import AdamWEMA

WIDTH, DEPTH = (768, 12) if DEVICE == "cuda" else (128, 2) if QUICK else (384, 4)


def parameters() -> list[torch.nn.Parameter]:
    block = [(3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,), (4 * WIDTH, WIDTH), (4 * WIDTH,)]
    block += [(WIDTH, 4 * WIDTH), (WIDTH,), *[(WIDTH,)] * 4]
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, device=DEVICE)  # noqa: E731
    made = [torch.nn.Parameter(draw(shape)) for shape in block * DEPTH]
    for p in made:
        p.grad = draw(p.shape)
    return made


def tensors() -> tuple[list, list, list]:
    params = parameters()
    return params, [p.detach().clone() for p in params], [torch.empty_like(p, dtype=torch.bfloat16) for p in params]


def test_adamw_ema(interleave, record):
    options = {"lr": torch.tensor(1e-3, device=DEVICE), "weight_decay": 0.05}
    decay, scale = torch.tensor(0.999, device=DEVICE), torch.ones((), device=DEVICE)

    def ours(impl):
        params, emas, copies = tensors()
        optimizer = AdamWEMA(
            params, ema=zip(params, emas, strict=True), copies=zip(params, copies, strict=True), impl=impl, **options
        )
        return params, emas, lambda: optimizer.step(ema_decay=decay, grad_scale=scale)

    def torch_fused():
        params, emas, copies = tensors()
        optimizer = torch.optim.AdamW(params, fused=True, capturable=DEVICE == "cuda", **options)
        optimizer.grad_scale, optimizer.found_inf = scale, None

        @torch.no_grad()
        def step():
            optimizer.step()
            torch._foreach_lerp_(emas, params, 1e-3)
            torch._foreach_copy_(copies, params)

        return params, emas, step

    made = {"ajepa AdamWEMA": ours("auto"), "torch fused AdamW + foreach": torch_fused()}
    for *_, step in made.values():
        step()
    (ours_params, ours_emas, _), (params, emas, _) = made.values()
    for a, b in zip([*ours_params, *ours_emas], [*params, *emas], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    n = sum(p.numel() for p in params)
    times = interleave({name: step for name, (*_, step) in made.items()}, SECONDS)
    peer = "torch fused AdamW + foreach"
    floor = 38 * n / copy_bytes_per_ms()
    record("adamw_ema", f"{n / 1e6:.1f} M parameters", times, plain=peer, peers=[peer], floor_ms=floor)
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU; on a CPU AdamWEMA runs torch's own operations"})


@pytest.mark.skipif(QUICK, reason="the training step has no remainder, so a quick run leaves it out")
@pytest.mark.skipif(DEVICE != "cuda", reason="the remainder is only used with bfloat16 weights on a GPU")
def test_remainder(interleave, record):
    """Time bfloat16 weights with a 16-bit remainder. No compute copy is needed, and 34 bytes per parameter move."""
    params = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters()]
    for p in params:
        p.grad = torch.randn_like(p)
    emas = [p.detach().float() for p in params]
    optimizer = AdamWEMA(params, ema=zip(params, emas, strict=True), remainder=True, lr=1e-3)
    n = sum(p.numel() for p in params)
    times = interleave({"ajepa AdamWEMA, remainder": lambda: optimizer.step(ema_decay=0.999)}, SECONDS)
    record("adamw_ema", f"{n / 1e6:.1f} M parameters, remainder", times, floor_ms=34 * n / copy_bytes_per_ms())
