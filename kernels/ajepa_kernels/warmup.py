"""Compilation of the kernels ahead of the first step."""

import functools
from collections.abc import Iterable

import torch

from ajepa_kernels._triton import cannot_launch
from ajepa_kernels.adamw_ema import AdamWEMA
from ajepa_kernels.attention import masked_attention
from ajepa_kernels.bias_gelu import bias_gelu
from ajepa_kernels.ema_update import ema_update_
from ajepa_kernels.latent_loss import latent_l2_loss
from ajepa_kernels.layer_norm import add_layer_norm


def warmup(
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    heads: Iterable[tuple[int, int]] = ((12, 64),),
    max_seqlens: Iterable[int] = (64, 128),
    widths: Iterable[int] = (768,),
    kind: str = "l2",
) -> bool:
    """Compiles, forward and backward, what a model of these sizes will launch, by running each operation on a few rows.

    Token counts are never compiled in, and lengths only through the tile that they round up to, so a handful of runs
    covers a training run. Triton keeps what it compiled on disk.

    Args:
        device: where the model runs.
        dtype: of the activations.
        heads: (heads, head dim) of each transformer.
        max_seqlens: bounds that `masked_attention` will be given.
        widths: of the layer norms, a quarter of those of the MLPs; the first is that of the latents.
        kind: of the loss.

    Returns:
        False where there is nothing to compile for: no GPU, or no Triton.

    Example::

        warmup(heads=[(12, 64), (12, 32)], max_seqlens=[64, 128], widths=[768, 384])
    """
    device = torch.device(device)
    if (device.type == "cuda" and not torch.cuda.is_available()) or cannot_launch(torch.empty(0, device=device)):
        return False
    activations = functools.partial(torch.randn, device=device, dtype=dtype)
    for H, D in heads:
        for S in max_seqlens:
            qkv = activations(2 * S, 3, H, D, requires_grad=True)
            cu_seqlens = torch.tensor([0, S, 2 * S], dtype=torch.int32, device=device)
            masked_attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=S, impl="triton").sum().backward()
    for C in widths:
        x, stream = (activations(16, C, requires_grad=True) for _ in range(2))
        weight, bias = (torch.ones(C, device=device, requires_grad=True) for _ in range(2))
        for residual in (None, stream):
            normed, total = add_layer_norm(x, residual, weight, bias, impl="triton")
            (normed.sum() + total.sum()).backward()
        for approximate in ("none", "tanh"):
            x = activations(16, 4 * C, requires_grad=True)
            bias = torch.zeros(4 * C, device=device, requires_grad=True)
            bias_gelu(x, bias, approximate=approximate, impl="triton").sum().backward()
    C = next(iter(widths))
    prediction = activations(16, C, requires_grad=True)
    latents, index = activations(16, C), torch.arange(16, device=device)
    latent_l2_loss(prediction, latents, index, kind=kind, impl="triton").backward()
    p, ema = torch.nn.Parameter(torch.zeros(16, C, device=device)), torch.zeros(16, C, device=device)
    p.grad = torch.zeros_like(p)
    scalar = torch.ones((), device=device)
    optimizer = AdamWEMA([p], ema=[(p, ema)], lr=scalar, impl="triton")
    for grad_scale in (None, scalar):
        for ema_decay in (0.5, scalar):
            optimizer.step(ema_decay=ema_decay, grad_scale=grad_scale)
    ema_update_([ema], [p], 0.5, impl="triton")
    return True
