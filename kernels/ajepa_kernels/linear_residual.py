"""A linear layer whose matrix product adds its output to a float32 residual stream.

Shapes: M rows (all leading axes), K input and N output features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ajepa_kernels import _hopper, products
from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._autograd import Function, first_order
from ajepa_kernels.layer_norm import ResidualStream


class _LinearResidual(Function):
    """Returns the sum and, where the residual has a carrier, that of the sum: see `ResidualStream`."""

    @staticmethod
    def forward(plain, x, values, carrier, weight, bias, *copies):
        add: Any = products.linear_residual_plain if plain else torch.ops.ajepa.linear_residual
        total = add(x, *(copies or (weight, bias)), values)
        return total if carrier is None else (total, carrier.view_as(carrier))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, _, carrier, weight, bias, *copies = inputs
        ctx.set_materialize_grads(False)
        ctx.carried = carrier is not None
        if ctx.carried:
            ctx.mark_non_differentiable(output[0])
        ctx.save_for_backward(x, copies[0] if copies else weight)
        ctx.dtypes, ctx.copies = (weight.dtype, bias.dtype), len(copies)

    @staticmethod
    @first_order
    def backward(ctx, saved, *totals):
        total = totals[-1]
        if total is None:
            return (None,) * (6 + ctx.copies)
        (x, weight), need = saved, ctx.needs_input_grad[1:]
        dy = total.to(x.dtype)
        return (
            None,
            dy @ weight if need[0] else None,
            *((None, total) if ctx.carried else (total, None)),
            products.weight_gradient(dy, x, ctx.dtypes[0]) if need[3] else None,
            dy.sum(0, dtype=ctx.dtypes[1]) if need[4] else None,
            *[None] * ctx.copies,
        )


def linear_residual_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """Plain PyTorch definition of `linear_residual`."""
    return residual + F.linear(x, weight, bias)


def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | ResidualStream,
    *,
    copies: tuple[torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> Any:
    """residual + x weight^T + bias: a linear layer at the end of a residual branch.

    On a Hopper GPU, bias and residual are the epilogue of the product, whose float32 sums are not rounded before the
    residual is added. The next layer norm then reads the stream alone.

    Args:
        x: `[..., K]`. The fused path needs a Hopper GPU, the compiled products (AJEPA_HOPPER), bfloat16 (directly or by
            autocast), K and N that are multiples of 8, and tensors that start at multiples of 16 bytes.
        weight, bias: `[N, K]`, `[N]`, of a `torch.nn.Linear`. If the bias needs no gradient (`bias.detach()`), backward
            makes no pass for it; `add_layer_norm` may compute it (`x_bias`).
        residual: `[..., N]` float32, or a `ResidualStream` of such values, whose gradient should be in x's dtype: it is
            then the operand of the products of backward as it is.
        copies: weight and bias in a lower precision, with which the product is computed; gradients go to weight and
            bias, in their dtypes.
        impl: "auto" is fused on a GPU, or warns once why it cannot be and runs plain PyTorch; on a CPU it runs plain
            PyTorch. "fused" requires the fused path, and on a CPU runs its steps as plain products. "reference" is
            plain PyTorch.

    Returns:
        The sum, in the residual's dtype, or as a `ResidualStream` if one was given.

    Saved for backward: x and the weight.

    Raises:
        ValueError: shapes, dtypes, devices or options are invalid, or a tensor is not aligned.
        TypeError: an argument is no tensor.
        RuntimeError: a kernel cannot be launched, or the gradients are differentiated again.

    Example::

        proj, norm = torch.nn.Linear(768, 768, device="cuda"), torch.nn.LayerNorm(768, device="cuda")
        stream = torch.randn(8, 64, 768, device="cuda")
        attended = torch.randn(8, 64, 768, device="cuda", dtype=torch.bfloat16)
        with torch.autocast("cuda", torch.bfloat16):
            stream = linear_residual(attended, proj.weight, proj.bias, stream)
            normed, stream = add_layer_norm(stream, None, norm.weight, norm.bias)
    """
    values, carrier = residual if isinstance(residual, ResidualStream) else (residual, None)
    check_tensors("linear_residual", x=x, weight=weight, bias=bias, residual=values)
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1:] != x.shape[-1:] or bias.shape != weight.shape[:1]:
        raise ValueError(
            "linear_residual: x [..., K], weight [N, K] and bias [N] expected, "
            f"got {list(x.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        )
    if impl not in ("auto", "fused", "reference"):
        raise ValueError(f"linear_residual: impl must be auto, fused or reference, got {impl!r}")
    x, (weight, bias) = products.operands("linear_residual", x, {"weight": weight, "bias": bias}, copies, values)
    unfused = products.why_not(x, (products.RESIDUAL,), *weight.shape)
    if impl == "fused" and unfused and x.is_cuda:
        raise ValueError(f"linear_residual: impl='fused' is impossible: {unfused}; use impl='auto' or 'reference'")
    if impl == "auto" and unfused and x.is_cuda:
        _hopper.announce("linear_residual", unfused)
    if impl == "reference" and copies is None and carrier is None:
        return linear_residual_reference(x, weight, bias, values)
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, values, carrier)]
    done = _LinearResidual.apply(impl == "reference", *flat, weight, bias, *(copies or ()))
    if carrier is None:
        return done.view(values.shape)
    return ResidualStream(*(t.view(values.shape) for t in done))
