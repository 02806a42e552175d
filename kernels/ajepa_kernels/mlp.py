"""The MLP of a transformer block, with the GELU in the epilogues of its matrix products (cuBLASLt).

Shapes: M rows (all leading axes), C width, I inner width.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F

from ajepa_kernels import _extension
from ajepa_kernels._triton import library

FORWARD, FORWARD_KEEP, BACKWARD = range(3)  # the values of Gelu in csrc/gelu_product.h
WORKSPACE = 32 << 20  # bytes; cuBLAS recommends this much on Hopper
ALIGNMENT = 8  # row widths are multiples of this many elements, for 16-byte accesses


def _gelu_product(x, weight, bias, z, result, kind: int) -> None:
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=x.device)
    torch.ops.ajepa.gelu_product_(x.contiguous(), weight.contiguous(), bias, z, result, workspace, kind)


# --- forward ----------------------------------------------------------------------------------------------------------

library.define("linear_gelu(Tensor x, Tensor weight, Tensor bias, bool keep) -> (Tensor y, Tensor z)")


@torch.library.register_fake("ajepa::linear_gelu", lib=library)
def _linear_gelu_fake(x, weight, bias, keep):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if keep else y.new_empty(0)


@torch.library.impl(library, "linear_gelu", "CPU")
def _linear_gelu_plain(x, weight, bias, keep):
    """Returns gelu(z) in its tanh form, for z = x weight^T + bias; and z itself, if `keep`."""
    z = F.linear(x, weight, bias)
    return F.gelu(z, approximate="tanh"), z if keep else z.new_empty(0)


@torch.library.impl(library, "linear_gelu", "CUDA")
def _linear_gelu_cuda(x, weight, bias, keep):
    y, z = _linear_gelu_fake(x, weight, bias, keep)
    if len(x):
        _gelu_product(x, weight, bias.contiguous(), z if keep else None, y, FORWARD_KEEP if keep else FORWARD)
    return y, z


# --- backward ---------------------------------------------------------------------------------------------------------

library.define("linear_dgelu(Tensor dy, Tensor weight, Tensor z) -> (Tensor dz, Tensor dbias)")


@torch.library.register_fake("ajepa::linear_dgelu", lib=library)
def _linear_dgelu_fake(dy, weight, z):
    return torch.empty_like(z), z.new_empty(z.shape[1])


@torch.library.impl(library, "linear_dgelu", "CPU")
def _linear_dgelu_plain(dy, weight, z):
    """Returns dz = (dy weight) gelu'(z), where weight `[C, I]` is the next layer's; and the sum of dz over rows."""
    dz = torch.ops.aten.gelu_backward(dy @ weight, z, approximate="tanh")
    return dz, dz.sum(0)


@torch.library.impl(library, "linear_dgelu", "CUDA")
def _linear_dgelu_cuda(dy, weight, z):
    dz, dbias = _linear_dgelu_fake(dy, weight, z)
    if len(z):
        _gelu_product(dy, weight, dbias, z, dz, BACKWARD)
    else:
        dbias.zero_()
    return dz, dbias


def _weight_gradient(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dy^T x in the weight's dtype. On a GPU a float32 result is the product's float32 sums, without rounding."""
    if dy.is_cuda and dy.dtype != dtype == torch.float32:
        return torch.mm(dy.T, x, out_dtype=dtype)
    return (dy.T @ x).to(dtype)


class _GeluMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, keep, x, w1, b1, w2, b2, *copies):
        ctx.fused, ctx.dtypes = fused, [p.dtype for p in (w1, b1, w2, b2)]
        w1, b1, w2, b2 = copies or (w1, b1, w2, b2)
        hidden, z = (torch.ops.ajepa.linear_gelu if fused else _linear_gelu_plain)(x, w1, b1, keep)
        ctx.save_for_backward(*((x, z, hidden, w1, w2) if keep else ()))
        return F.linear(hidden, w2, b2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, z, hidden, w1, w2 = ctx.saved_tensors
        dy = dy.contiguous()
        dz, db1 = (torch.ops.ajepa.linear_dgelu if ctx.fused else _linear_dgelu_plain)(dy, w2, z)
        need, dtypes = ctx.needs_input_grad[2:], ctx.dtypes
        return (
            *(None, None),
            dz @ w1 if need[0] else None,
            _weight_gradient(dz, x, dtypes[0]) if need[1] else None,
            db1.to(dtypes[1]) if need[2] else None,
            _weight_gradient(dy, hidden, dtypes[2]) if need[3] else None,
            dy.sum(0, dtype=dtypes[3]) if need[4] else None,
            *[None] * (len(need) - 5),
        )


# --- public -----------------------------------------------------------------------------------------------------------


def gelu_mlp_reference(
    x: torch.Tensor, w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor
) -> torch.Tensor:
    """Plain PyTorch definition of `gelu_mlp`."""
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2)


def gelu_mlp(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    *,
    copies: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """gelu(x w1^T + b1) w2^T + b2, the MLP of a transformer block, with gelu(z) = z (1 + tanh(sqrt(2 / pi)
    (z + 0.044715 z^3))) / 2 (arXiv 1606.08415).

    Bias and GELU are the epilogue of the first product, which also writes z. In backward, GELU's gradient and the bias
    gradient are the epilogue of the product with w2. No separate pass over `[M, I]` remains. cuBLASLt has these
    epilogues only for the tanh form of GELU, which differs from the exact one by less than 5e-4.

    Args:
        x: `[..., C]`. The fused path needs a GPU, bfloat16 or float16 (directly or by autocast), and C and I that are
            multiples of 8.
        w1, b1, w2, b2: `[I, C]`, `[I]`, `[C', I]`, `[C']`, weights and biases of two `torch.nn.Linear`.
        copies: w1, b1, w2, b2 in a lower precision (`AdamWEMA` writes such copies). The MLP is computed with them in
            their dtype; gradients go to w1, b1, w2, b2, in the dtypes of those.
        impl: "auto" is fused on a GPU, or warns once and runs plain PyTorch if it cannot be; on a CPU it runs plain
            PyTorch. "fused" requires the fused path, and on a CPU runs its steps as plain products. "reference" is
            plain PyTorch.

    Returns:
        `[..., C']` in the dtype of the copies if there are any, else in autocast's, else in x's.

    Saved for backward: x, z and gelu(z), as in PyTorch. The gradient of b1 is summed in float32 and rounded to x's
    dtype.

    Raises:
        ValueError: shapes, dtypes, devices or options are invalid; raised before any launch.
        RuntimeError: cuBLASLt refuses the shape.

    Example::

        y = gelu_mlp(x, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    """
    params: tuple[torch.Tensor, ...] = (w1, b1, w2, b2)
    if x.dim() < 1 or w1.dim() != 2 or w2.dim() != 2 or w1.shape[1:] != x.shape[-1:] or w2.shape[1] != w1.shape[0]:
        raise ValueError(
            "gelu_mlp: x [..., C], w1 [I, C] and w2 [C', I] expected, "
            f"got {list(x.shape)}, {list(w1.shape)} and {list(w2.shape)}"
        )
    if b1.shape != w1.shape[:1] or b2.shape != w2.shape[:1]:
        raise ValueError(
            f"gelu_mlp: b1 [{len(w1)}] and b2 [{len(w2)}] expected, got {list(b1.shape)} and {list(b2.shape)}"
        )
    if copies is not None and [c.shape for c in copies] != [p.shape for p in params]:
        raise ValueError("gelu_mlp: copies must be four tensors of the shapes of w1, b1, w2, b2")
    tensors = (x, *params, *(copies or ()))
    if any(t.device != x.device or not t.is_floating_point() for t in tensors):
        raise ValueError("gelu_mlp: all tensors must be floating point and on one device")
    if impl not in ("auto", "fused", "reference"):
        raise ValueError(f"gelu_mlp: impl must be auto, fused or reference, got {impl!r}")
    if copies is not None:
        x = x.to(copies[0].dtype)
    else:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        params = tuple(p.to(x.dtype) for p in params)
    if any(p.dtype != x.dtype for p in copies or params):
        raise ValueError("gelu_mlp: copies must share a dtype")
    why_not = _cannot_fuse(x, w1)
    if impl == "fused" and why_not and x.is_cuda:
        raise ValueError(f"gelu_mlp: impl='fused' is impossible: {why_not}; use impl='auto' or 'reference'")
    fused = impl == "fused" or (impl == "auto" and x.is_cuda and not why_not)
    if impl == "auto" and x.is_cuda and why_not and not torch.compiler.is_compiling():
        _announce(why_not)
    if not fused and copies is None:
        return gelu_mlp_reference(x, *params)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *params))
    y = _GeluMLP.apply(fused, keep, x.reshape(-1, x.shape[-1]), *params, *(copies or ()))
    return y.view(*x.shape[:-1], len(w2))


def _cannot_fuse(x: torch.Tensor, w1: torch.Tensor) -> str:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"no epilogue for {x.dtype}"
    if w1.shape[0] % ALIGNMENT or w1.shape[1] % ALIGNMENT:
        return f"widths {list(w1.shape)} are not multiples of {ALIGNMENT}"
    if _extension.MISSING:
        return f"ajepa_kernels has no compiled part ({_extension.MISSING})"
    if x.is_cuda and not torch.ops.ajepa.has_gelu_product():
        return "cuBLASLt was not found"
    return ""


@functools.cache
def _announce(why_not: str) -> None:
    warnings.warn(f"ajepa_kernels.gelu_mlp runs as plain PyTorch on this GPU: {why_not}", stacklevel=3)
