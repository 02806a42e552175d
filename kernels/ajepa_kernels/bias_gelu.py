"""Bias and GELU in one pass over memory, and their gradients in another.

Shapes: M rows (all leading axes), C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._autograd import Function, autocast_dtype, first_order
from ajepa_kernels._triton import dense_rows, jit, launch, multiprocessors, power_of_2, register, tl, use_triton
from ajepa_kernels._tuned import Rows, tuned


def tile_config(x: torch.Tensor, op: str) -> tuple[int, int, int, int]:
    """Returns (channels, rows, warps, stages) of a program.

    A program has at most 1,024 channels; their number divides C if a divisor of at least 128 exists. A thread has 16
    elements, but 8 float32 elements in backward, where more would not fit the registers together with the sums.
    """
    C = x.shape[1]
    divisor = min(C & -C, 1024)
    block_c = divisor if divisor >= 128 else min(power_of_2(C), 1024)
    backward = op.endswith("_bwd")
    elements = 8192 // x.element_size() if backward else 4096
    if op == "swiglu_bwd":  # it keeps two sums
        elements //= 2
    rows = Rows(max(1, min(elements // block_c, 16)), 8, 3 if backward else 1)
    return block_c, *(tuned(x, op, block_c) or rows)


# --- forward ----------------------------------------------------------------------------------------------------------


@jit
def _gelu(x, TANH: tl.constexpr):
    """Returns gelu(x) / x and its derivative, from which callers compute the value and the gradient.

    The tanh form computes (1 + tanh u) / 2 as the logistic function of 2u, from exp(-|2u|), which is accurate in both
    tails. The exact form computes Phi(-|x|) = 2^P(|x|). The polynomial P minimises the largest error in Phi and in
    x Phi, which is 1.4e-8 and so below float32 rounding. This takes a third of erff's instructions, which would take
    longer than the memory accesses.
    """
    if TANH:
        x2 = x * x
        q = tl.exp2(tl.abs(x) * (-2.302208198144325 - 0.1029432395800235 * x2))
        p = 1.0 / (1.0 + q)
        cdf = tl.where(x < 0, q * p, p)
        slope = q * p * p * (1.5957691216057308 + 0.2140644488178007 * x2)
    else:
        a = tl.abs(x)
        p = -2.27586005e-06 * a + 3.29678748e-05
        p = p * a - 1.57278103e-04
        p = p * a - 2.02480618e-04
        p = p * a + 7.14278409e-03
        p = p * a - 5.25464377e-02
        p = p * a - 4.59193057e-01
        p = p * a - 1.15110694e00
        q = tl.exp2(p * a - 0.999999959)
        cdf = tl.where(x < 0, q, 1.0 - q)
        slope = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
    return cdf, slope


@jit
def _bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr, stride_x, M, tiles,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // tiles * ROWS + tl.arange(0, ROWS)
    c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < M)[:, None] if C % BLOCK_C == 0 else (row < M)[:, None] & (c < C)
    row = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * stride_x + c, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    cdf, _ = _gelu(x, TANH)
    tl.store(y_ptr + row * C + c, (x * cdf).to(y_ptr.dtype.element_ty), mask=mask)


@register(
    "bias_gelu_fwd(Tensor x, Tensor bias, bool tanh, ScalarType dtype) -> Tensor",
    lambda x, bias, tanh, dtype: torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format),
)
def _bias_gelu_fwd(x, bias, tanh, dtype):
    """x `[M, C]`."""
    M, C = x.shape
    block_c, rows, num_warps, _ = tile_config(x, "bias_gelu_fwd")
    y, tiles = torch.empty(M, C, dtype=dtype, device=x.device), -(-C // block_c)
    x = dense_rows(x)
    launch(
        _bias_gelu_fwd_kernel, -(-M // rows) * tiles, x,
        x, bias.contiguous(), y, x.stride(0), M, tiles, C, block_c, rows, tanh, num_warps=num_warps,
    )  # fmt: skip
    return y


# --- backward ---------------------------------------------------------------------------------------------------------


@jit
def _bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr, dx_ptr, dbias_ptr, stride_dy, stride_x, M, tiles, programs,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, TANH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A fixed number of programs loops over the rows of each tile of channels: few partial sums, in a fixed order."""
    pid = tl.program_id(0)
    first = pid // tiles
    c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in tl.range(first * ROWS, M, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        mask = (row < M)[:, None] if C % BLOCK_C == 0 else (row < M)[:, None] & (c < C)
        row = row.to(tl.int64)[:, None]
        x = tl.load(x_ptr + row * stride_x + c, mask=mask, other=0.0).to(tl.float32) + bias
        dy = tl.load(dy_ptr + row * stride_dy + c, mask=mask, other=0.0).to(tl.float32)
        cdf, slope = _gelu(x, TANH)
        dx = dy * (cdf + x * slope)
        dbias += dx
        tl.store(dx_ptr + row * C + c, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dbias_ptr + first * C + c, tl.sum(dbias, 0)[None, :], mask=c < C)


@register(
    "bias_gelu_bwd(Tensor dy, Tensor x, Tensor bias, bool tanh) -> (Tensor dx, Tensor dbias)",
    lambda dy, x, bias, tanh: (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(bias, memory_format=torch.contiguous_format),
    ),
)
def _bias_gelu_bwd(dy, x, bias, tanh):
    """Returns dx `[M, C]` and dbias `[C]` for dy `[M, C]`."""
    M, C = x.shape
    block_c, rows, num_warps, stages = tile_config(x, "bias_gelu_bwd")
    tiles = -(-C // block_c)
    programs = min(max(1, 4 * multiprocessors(x) // tiles), -(-M // rows))
    dx = torch.empty(M, C, dtype=x.dtype, device=x.device)
    dbias = torch.empty(programs, C, dtype=torch.float32, device=x.device)
    dy, x = dense_rows(dy), dense_rows(x)
    launch(
        _bias_gelu_bwd_kernel, programs * tiles, x,
        dy, x, bias.contiguous(), dx, dbias, dy.stride(0), x.stride(0), M, tiles, programs,
        C, block_c, rows, tanh, stages, num_warps=num_warps,
    )  # fmt: skip
    return dx, dbias.sum(0).to(bias.dtype)


class _BiasGelu(Function):
    @staticmethod
    def forward(x, bias, tanh, dtype):
        return torch.ops.ajepa.bias_gelu_fwd(x, bias, tanh, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, bias, ctx.tanh, _ = inputs
        ctx.save_for_backward(x, bias)

    @staticmethod
    @first_order
    def backward(ctx, saved, dy):
        return *torch.ops.ajepa.bias_gelu_bwd(dy, *saved, ctx.tanh), None, None


# --- public -----------------------------------------------------------------------------------------------------------


def bias_gelu_reference(
    x: torch.Tensor, bias: torch.Tensor, approximate: str = "none", dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Plain PyTorch definition of `bias_gelu`: computed in float32 (float64 for float64), rounded to `dtype`."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return F.gelu(x.to(compute) + bias.to(compute), approximate=approximate).to(x.dtype if dtype is None else dtype)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor, *, approximate: str = "none", impl: str = "auto") -> torch.Tensor:
    """gelu(x + bias) over the last axis: gelu(z) = z Phi(z), or z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2.

    In a transformer's MLP it follows the first linear layer, called without its bias (GELU: arXiv 1606.08415). Backward
    computes the gradients of x and of the bias in one pass, whereas PyTorch reads the gradient of z again to sum it.

    Args:
        x: `[..., C]`. The kernel takes bfloat16, float16 or float32, and computes in float32.
        bias: `[C]`.
        approximate: "none" or "tanh", as in `torch.nn.functional.gelu`.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.

    Returns:
        A tensor of the shape of x, in its dtype or, under autocast, in autocast's.

    Saved for backward: x and bias; z is recomputed. The gradient of the bias is summed in a fixed order.
    `torch.func.grad` works; `torch.vmap` needs impl="reference".

    Raises:
        ValueError: shapes, dtypes, devices or options are invalid; raised before any launch.
        TypeError: an argument is no tensor.
        RuntimeError: the gradients are differentiated again.

    Example::

        x = F.linear(x, mlp.fc1.weight)  # without its bias
        x = bias_gelu(x, mlp.fc1.bias)
        x = mlp.fc2(x)
    """
    check_tensors("bias_gelu", x=x, bias=bias)
    if x.dim() < 1 or bias.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: x [..., C] and bias [C] must share C, got {list(x.shape)} and {list(bias.shape)}")
    if x.device != bias.device or not (x.is_floating_point() and bias.is_floating_point()):
        raise ValueError("bias_gelu: x and bias must be floating point and on one device")
    if approximate not in ("none", "tanh"):
        raise ValueError(f"bias_gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    C, dtype = x.shape[-1], autocast_dtype(x)
    unsupported = ""
    if not {x.dtype, bias.dtype} <= {torch.float32, torch.float16, torch.bfloat16}:
        unsupported = f"no kernel for {x.dtype} and {bias.dtype}"
    elif not C:
        unsupported = "no kernel for width 0"
    if not use_triton("bias_gelu", impl, x, unsupported):
        return bias_gelu_reference(x, bias, approximate, dtype)
    return _BiasGelu.apply(x.reshape(-1, C), bias, approximate == "tanh", dtype).view(x.shape)
