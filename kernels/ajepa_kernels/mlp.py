"""The MLP of a transformer block, with bias, GELU and their gradients in the epilogues of its matrix products.

Shapes: M rows (all leading axes), C width, I inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ajepa_kernels import _hopper, products
from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._autograd import Function, first_order
from ajepa_kernels._triton import cannot_launch, use_triton
from ajepa_kernels.bias_gelu import bias_gelu
from ajepa_kernels.layer_norm import ResidualStream

# Up to this C, forward keeps gelu'(z) instead of z. The epilogue of backward's product is then a multiplication. With
# gelu'(z) to compute, it would take longer than so short a product, and could not hide behind it.
SLOPE_WIDTH = 512


def _kept(x: torch.Tensor) -> int:
    return products.SLOPE if x.shape[1] <= SLOPE_WIDTH else products.Z


class _GeluMLP(Function):
    """`how` is "fused"; "triton", where the kernels of `bias_gelu` follow plain products; or "plain".

    Returns the output, or its sum with `residual`, if that is given; the carrier of the sum, if one is given; and what
    backward needs, if `keep`, as outputs so that differentiating them raises an error.
    """

    @staticmethod
    def forward(how, keep, residual, carrier, x, w1, b1, w2, b2, *copies):
        own_b1 = b1
        w1, b1, w2, b2 = copies or (w1, b1, w2, b2)
        if how == "triton":  # the kernel rounds the gradient to the dtype of the bias that it is given
            kept = F.linear(x, w1)
            hidden = torch.ops.ajepa.bias_gelu_fwd(kept, own_b1, False, x.dtype)
        else:
            forward = torch.ops.ajepa.linear_gelu if how == "fused" else products.linear_gelu_plain
            hidden, kept = forward(x, w1, b1, _kept(x) if keep else products.NOTHING)
        saved = (kept, hidden) if keep else ()
        if residual is None:
            return F.linear(hidden, w2, b2), *saved
        add = products.linear_residual_plain if how == "plain" else torch.ops.ajepa.linear_residual
        total = add(hidden, w2, b2, residual)
        return (total, *saved) if carrier is None else (total, carrier.view_as(carrier), *saved)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.how, keep, residual, carrier, x, w1, b1, w2, b2, *copies = inputs
        ctx.dtypes = [p.dtype for p in (w1, b1, w2, b2)]
        ctx.adds, ctx.carried = residual is not None, carrier is not None
        ctx.set_materialize_grads(False)
        if ctx.carried:
            ctx.mark_non_differentiable(output[0])
        if keep:
            w1, b1, w2 = (copies[0], b1 if ctx.how == "triton" else copies[1], copies[2]) if copies else (w1, b1, w2)
            ctx.save_for_backward(x, *output[-2:], w1, b1, w2)

    @staticmethod
    @first_order
    def backward(ctx, saved, *totals):
        total = totals[1 if ctx.carried else 0]
        if total is None:
            return (None,) * len(ctx.needs_input_grad)
        x, kept, hidden, w1, b1, w2 = saved
        need, dtypes, dy = ctx.needs_input_grad[4:], ctx.dtypes, total.to(x.dtype).contiguous()
        dz: Any = None
        db1: Any = None
        if any(need[:3]):
            if ctx.how == "triton":
                dz, db1 = torch.ops.ajepa.bias_gelu_bwd(dy @ w2, kept, b1, False)
            else:
                backward = torch.ops.ajepa.linear_dgelu if ctx.how == "fused" else products.linear_dgelu_plain
                dz, db1 = backward(dy, w2, kept, _kept(x) == products.SLOPE)
        return (
            *(None, None, total if ctx.adds and not ctx.carried else None, total if ctx.carried else None),
            dz @ w1 if need[0] else None,
            products.weight_gradient(dz, x, dtypes[0]) if need[1] else None,
            db1.to(dtypes[1]) if need[2] else None,
            products.weight_gradient(dy, hidden, dtypes[2]) if need[3] else None,
            dy.sum(0, dtype=dtypes[3]) if need[4] else None,
            *[None] * (len(need) - 5),
        )


class _LinearGELU(Function):
    """gelu(x weight^T + bias) and z = x weight^T + bias, which is kept for backward, from one product."""

    @staticmethod
    def forward(x, weight, bias):
        return torch.ops.ajepa.linear_gelu(x, weight, bias, products.Z)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    @first_order
    def backward(ctx, saved, dy, _):
        if dy is None:
            return None, None, None
        x, weight, bias, z = saved
        if cannot_launch(x):
            dz = torch.ops.aten.gelu_backward(dy, z)
            db = dz.sum(0)
        else:
            dz, db = torch.ops.ajepa.bias_gelu_bwd(dy, z, torch.zeros_like(bias), False)  # z holds the bias
        return dz @ weight, products.weight_gradient(dz, x, weight.dtype), db


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, approximate: str, impl: str) -> torch.Tensor:
    """gelu(x weight^T + bias), of `LinearGELU`. "auto" is fused where the product's epilogue can be."""
    if impl in ("auto", "fused") and approximate == "none":
        half, params = products.operands("LinearGELU", x, {"weight": weight, "bias": bias}, None, None)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (half, *params))
        name = products.FORWARD[products.Z if keep else products.NOTHING]
        unfused = products.why_not(half, (name,), *weight.shape)
        if impl == "fused" and unfused and x.is_cuda:
            raise ValueError(f"LinearGELU: impl='fused' is impossible: {unfused}; use impl='auto' or 'reference'")
        if impl == "fused" or not unfused:
            half = half.reshape(-1, half.shape[-1])
            y = (_LinearGELU.apply if keep else _without_gradient)(half, *params)[0]
            return y.view(*x.shape[:-1], len(weight))
    return bias_gelu(F.linear(x, weight), bias, approximate=approximate, impl=impl)


def _without_gradient(x, weight, bias):
    return torch.ops.ajepa.linear_gelu(x, weight, bias, products.NOTHING)


# --- public -----------------------------------------------------------------------------------------------------------


def gelu_mlp_reference(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """Plain PyTorch definition of `gelu_mlp`."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def gelu_mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    residual: torch.Tensor | ResidualStream | None = None,
    copies: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> Any:
    """gelu(x w1^T + b1) w2^T + b2, the MLP of a transformer block, with the exact GELU, z Phi(z) (arXiv 1606.08415).

    On a Hopper GPU, bias and GELU are the epilogue of the first product, which also writes z or gelu'(z). In backward,
    GELU's gradient and the bias gradient are the epilogue of the product with w2. No separate pass over `[M, I]`
    remains.

    Args:
        x: `[..., C]`. The fused path needs a Hopper GPU, the compiled products (AJEPA_HOPPER), bfloat16 (directly or
            by autocast), C and I that are multiples of 8, and tensors that start at multiples of 16 bytes.
        w1, b1, w2, b2: `[I, C]`, `[I]`, `[C', I]`, `[C']`, weights and biases of two `torch.nn.Linear`. If b2 needs no
            gradient (`b2.detach()`), backward does not read dy for it; the next op may compute it.
        residual: `[..., C']` float32, or a `ResidualStream`, to which the second product adds; see `linear_residual`.
        copies: w1, b1, w2, b2 in a lower precision (`AdamWEMA` writes such copies). The MLP is computed with them in
            their dtype; gradients go to w1, b1, w2, b2, in the dtypes of those.
        impl: "auto" is fused on a GPU, or warns once why it cannot be and runs as "triton"; on a CPU it runs plain
            PyTorch. "fused" requires the fused path, and on a CPU runs its steps as plain products. "triton" requires
            the kernels of `bias_gelu` beside plain products. "reference" is plain PyTorch.

    Returns:
        `[..., C']` in the dtype of the copies if there are any, else in autocast's, else in x's. With a residual, the
        sum in its dtype, or as a `ResidualStream` if one was given.

    Saved for backward: x, gelu(z), and z or, up to C = 512 and only if fused, gelu'(z). The gradient of b1 is summed in
    float32. `torch.func.grad` works.

    Raises:
        ValueError: shapes, dtypes, devices or options are invalid, or a tensor is not aligned.
        TypeError: an argument is no tensor.
        RuntimeError: a kernel cannot be launched, or the gradients are differentiated again.

    Example::

        y = gelu_mlp(x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    """
    check_tensors("gelu_mlp", x=x, w1=w1, b1=b1, w2=w2, b2=b2)
    if x.dim() < 1 or w1.dim() != 2 or w2.dim() != 2 or w1.shape[1:] != x.shape[-1:] or w2.shape[1] != w1.shape[0]:
        raise ValueError(
            "gelu_mlp: x [..., C], w1 [I, C] and w2 [C', I] expected, "
            f"got {list(x.shape)}, {list(w1.shape)} and {list(w2.shape)}"
        )
    if b1.shape != w1.shape[:1] or b2.shape != w2.shape[:1]:
        raise ValueError(
            f"gelu_mlp: b1 [{len(w1)}] and b2 [{len(w2)}] expected, got {list(b1.shape)} and {list(b2.shape)}"
        )
    if impl not in ("auto", "fused", "triton", "reference"):
        raise ValueError(f"gelu_mlp: impl must be auto, fused, triton or reference, got {impl!r}")
    values, carrier = residual if isinstance(residual, ResidualStream) else (residual, None)
    shape = (*x.shape[:-1], len(w2))
    x, params = products.operands("gelu_mlp", x, {"w1": w1, "b1": b1, "w2": w2, "b2": b2}, copies, values)
    how = _choose(impl, x, w1, w2)
    if how == "plain" and copies is None and carrier is None:
        y = gelu_mlp_reference(x, *params)
        return y if values is None else values + y
    tensors = tuple(t for t in (x, values, carrier, *params) if t is not None)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    flat = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (values, carrier, x)]
    done = _GeluMLP.apply(how, keep, *flat, *params, *(copies or ()))
    return done[0].view(shape) if carrier is None else ResidualStream(*(t.view(shape) for t in done[:2]))


def _choose(impl: str, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> str:
    """`how` of `_GeluMLP`."""
    if impl == "reference":
        return "plain"
    kept = products.SLOPE if w1.shape[1] <= SLOPE_WIDTH else products.Z
    names = (products.FORWARD[products.NOTHING], products.FORWARD[kept], products.BACKWARD[kept])
    unfused = products.why_not(x, names, *w1.shape, len(w2))
    if impl == "fused":
        if unfused and x.is_cuda:
            raise ValueError(f"gelu_mlp: impl='fused' is impossible: {unfused}; use impl='auto' or 'reference'")
        return "fused"
    if impl == "auto" and not unfused:
        return "fused"
    if impl == "auto" and x.is_cuda:
        _hopper.announce("gelu_mlp", unfused)
    supported = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    unsupported = "" if supported else f"bias_gelu has no kernel for {x.dtype}"
    return "triton" if use_triton("gelu_mlp", impl, x, unsupported) else "plain"
