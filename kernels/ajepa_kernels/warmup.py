"""Compiles the kernels before the first training step."""

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch

from ajepa_kernels._triton import cannot_launch
from ajepa_kernels.adamw_ema import AdamWEMA
from ajepa_kernels.attention import masked_attention
from ajepa_kernels.attention.rotary import Rotary
from ajepa_kernels.bias_gelu import bias_gelu
from ajepa_kernels.ema_update import ema_update_
from ajepa_kernels.latent_loss import latent_l2_loss
from ajepa_kernels.layer_norm import add_layer_norm
from ajepa_kernels.segment_pool import segment_pool
from ajepa_kernels.sigreg import sigreg
from ajepa_kernels.swiglu import swiglu


def warmup(
    *,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    heads: Iterable[tuple[int, int]] = ((12, 64),),
    max_seqlens: Iterable[int] = (64, 128),
    widths: Iterable[int] = (768,),
    kind: str = "l2",
    offsets: Iterable[torch.dtype] = (torch.int32,),
    gathered: bool = False,
    projection: tuple[int, int, int] | None = None,
    rotary: Iterable[Rotary] = (),
    causal: Iterable[int] = (),
    rms: bool = False,
    scaled: bool = False,
    gated: Iterable[int] = (),
) -> bool:
    """Compiles the forward and backward kernels of a model of these sizes, by running each operation on a few rows.

    Compiled kernels do not depend on the number of tokens or parameters, and depend on sequence lengths only through
    the tile size that they round up to. A few runs therefore cover a training run, eager or in CUDA graphs. Triton
    caches compiled kernels on disk. The kernels for `key_mask`, for `fp8_linear` and for the bias gradients, the rows
    and the `ResidualStream` of `add_layer_norm` are not compiled here.

    Args:
        device: device that the model runs on.
        dtype: dtype of the activations and of the low-precision copies; parameters and EMA are float32.
            `add_layer_norm` is compiled for residual streams of this dtype and of float32, with and without a gradient
            of the sum.
        heads: (heads, head dim) of each transformer.
        max_seqlens: values of `max_seqlen` that `masked_attention` will receive.
        widths: widths of the layer norms; the MLPs are four times as wide. The first is also the latents' width.
        kind: `kind` of `latent_l2_loss`.
        offsets: dtypes of `cu_seqlens`.
        gathered: also compile attention on dense inputs with int64 indices `visible`, for both outputs.
        projection: also compile `segment_pool` for the first width with int32 offsets, and `sigreg` for two views of
            this (width, directions, knots), in `dtype` and in float32, on one rank.
        rotary: also compile packed attention with tables of these columns, pairs and orders, whatever their rows.
        causal: also compile packed attention with these integers, alone and with each of `rotary`.
        rms: compile `add_layer_norm` as an RMS norm instead.
        scaled: also compile it with a LayerScale and drop path, both float32, for samples of 8 rows.
        gated: also compile `swiglu` with biases for these inner widths.

    Returns:
        False if there is no GPU or no Triton to compile for, else True.

    Raises:
        ValueError: an operation has no kernel for one of these sizes, or `kind` is invalid.

    Example::

        warmup(heads=[(12, 64), (12, 32)], max_seqlens=[64, 128], widths=[768, 384])
    """
    device = torch.device(device)
    if (device.type == "cuda" and not torch.cuda.is_available()) or cannot_launch(torch.empty(0, device=device)):
        return False
    heads, max_seqlens, widths, offsets = tuple(heads), tuple(max_seqlens), tuple(widths), tuple(offsets)
    rotary, causal = tuple(rotary), tuple(causal)
    ones = functools.partial(torch.ones, device=device)  # not random, so the caller's generator does not advance
    leaf = functools.partial(ones, dtype=dtype, requires_grad=True)
    for (H, D), S in itertools.product(heads, max_seqlens):
        for offset in offsets:
            cu_seqlens = torch.tensor([0, S, 2 * S], dtype=offset, device=device)
            qkv = leaf(2 * S, 3, H, D)
            for bias in (None, ones(3, H, D, requires_grad=True)):
                out = masked_attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=S, qkv_bias=bias, impl="triton")
                out.sum().backward()
        for output in ("packed", "scattered") if gathered else ():
            visible = torch.arange(S, device=device).expand(2, S)
            masked_attention(leaf(2, S, 3, H, D), visible=visible, output=output, impl="triton").sum().backward()
        for turn, block in itertools.product((None, *rotary), (0, *causal)):
            if turn is not None or block:
                cu_seqlens = torch.tensor([0, S, 2 * S], dtype=offsets[0], device=device)
                if turn is not None:
                    turn = turn._replace(cos=ones(2 * S, turn.cos.shape[-1]), sin=ones(2 * S, turn.sin.shape[-1]))
                out = masked_attention(
                    leaf(2 * S, 3, H, D), cu_seqlens=cu_seqlens, max_seqlen=S, rotary=turn, causal=block, impl="triton"
                )
                out.sum().backward()
    for C in widths:
        weight, bias, gamma = (ones(C, requires_grad=True) for _ in range(3))
        norm = functools.partial(add_layer_norm, weight=weight, bias=None if rms else bias, rms=rms, impl="triton")
        scales: dict[str, Any] = {"layer_scale": gamma, "sample_scale": ones(2)}
        streams = [leaf(2, 8, C), ones(2, 8, C, requires_grad=True)]
        for residual, summed in ((None, False), *itertools.product(streams, (False, True))):
            for options in [{}, scales] if scaled and residual is not None else [{}]:
                x = leaf(2, 8, C)  # x has the output's dtype even if the stream is float32, as under autocast
                normed, total = norm(x, residual, **options)
                (normed.sum() + total.sum() if summed else normed.sum()).backward()
        for approximate in ("none", "tanh"):
            bias_gelu(leaf(16, 4 * C), ones(4 * C), approximate=approximate, impl="triton").sum().backward()
    for inner in gated:
        biases = (ones(inner, requires_grad=True) for _ in range(2))
        swiglu(leaf(16, inner), leaf(16, inner), *biases, impl="triton").sum().backward()
    C = widths[0]
    prediction, latents, index = leaf(16, C), ones(16, C, dtype=dtype), torch.arange(16, device=device)
    latent_l2_loss(prediction, latents, index, kind=kind, impl="triton").backward()
    with torch.no_grad():
        latent_l2_loss(prediction, latents, index, kind=kind, impl="triton")
    if projection is not None:
        (D, S, J), cu_segments = projection, torch.tensor([0, 16], dtype=torch.int32, device=device)
        segment_pool(leaf(16, C), cu_segments, impl="triton").sum().backward()
        for half in {dtype, torch.float32}:
            z, key = ones(2, 16, D, dtype=half, requires_grad=True), torch.zeros((), dtype=torch.int64, device=device)
            sigreg(z, key, directions=S, knots=J, impl="triton").backward()
    scalar = ones(())
    params = [torch.nn.Parameter(ones(shape)) for shape in ((16, C), (3,))]  # the second cannot use 16-byte accesses
    emas = [p.detach().clone() for p in params]
    copies = [] if dtype == torch.float32 else [(x, x.detach().to(dtype)) for x in (*params, *emas)]
    optimizer = AdamWEMA(params, ema=zip(params, emas, strict=True), copies=copies, impl="triton")
    for p in params:
        p.grad = torch.ones_like(p)
    for scales in ({}, {"grad_scale": scalar}, {"grad_scale": scalar, "found_inf": torch.zeros_like(scalar)}):
        for decay in (0.5, scalar):
            optimizer.step(ema_decay=decay, **scales)
    for decay in (0.5, scalar):
        ema_update_(emas, params, decay, impl="triton")
    return True
