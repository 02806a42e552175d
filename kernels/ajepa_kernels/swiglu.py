"""The gate of a SwiGLU MLP in one pass over memory, and its gradients in another.

Shapes: M rows (all leading axes), I inner width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._autograd import Function, autocast_dtype, first_order
from ajepa_kernels._triton import dense_rows, jit, launch, multiprocessors, register, tl, use_triton
from ajepa_kernels.bias_gelu import tile_config

# --- forward ----------------------------------------------------------------------------------------------------------


@jit
def _load(x_ptr, bias_ptr, place, c, mask, C: tl.constexpr):
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return x


@jit
def _sigmoid(x):
    """From exp(-|x|), which cannot overflow."""
    q = tl.exp2(tl.abs(x) * -1.4426950408889634)
    return tl.where(x < 0, q, 1.0) / (1.0 + q)


@jit
def _swiglu_fwd_kernel(
    gate_ptr, value_ptr, gate_bias_ptr, value_bias_ptr, y_ptr, stride_g, stride_v, M, tiles,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid // tiles * ROWS + tl.arange(0, ROWS)
    c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask = (row < M)[:, None] if C % BLOCK_C == 0 else (row < M)[:, None] & (c < C)
    row = row.to(tl.int64)[:, None]
    gate = _load(gate_ptr, gate_bias_ptr, row * stride_g + c, c, mask, C)
    value = _load(value_ptr, value_bias_ptr, row * stride_v + c, c, mask, C)
    tl.store(y_ptr + row * C + c, (gate * _sigmoid(gate) * value).to(y_ptr.dtype.element_ty), mask=mask)


def _halves(gate, value):
    """Both operands with dense rows; without a value, they are the halves of the gate."""
    return (dense_rows(x) for x in (gate.chunk(2, 1) if value is None else (gate, value)))


def _swiglu_fwd_fake(gate, value, gate_bias, value_bias, dtype):
    return gate.new_empty(len(gate), gate.shape[1] // (2 if value is None else 1), dtype=dtype)


@register(
    "swiglu_fwd(Tensor gate, Tensor? value, Tensor? gate_bias, Tensor? value_bias, ScalarType dtype) -> Tensor",
    _swiglu_fwd_fake,
)
def _swiglu_fwd(gate, value, gate_bias, value_bias, dtype):
    """gate, value `[M, I]`, or gate `[M, 2 I]` alone."""
    y = _swiglu_fwd_fake(gate, value, gate_bias, value_bias, dtype)
    gate, value = _halves(gate, value)
    biases = (None if b is None else b.contiguous() for b in (gate_bias, value_bias))
    M, C = gate.shape
    block_c, rows, num_warps, _ = tile_config(gate, "swiglu_fwd")
    tiles = -(-C // block_c)
    launch(
        _swiglu_fwd_kernel, -(-M // rows) * tiles, gate,
        gate, value, *biases, y, gate.stride(0), value.stride(0), M, tiles, C, block_c, rows, num_warps=num_warps,
    )  # fmt: skip
    return y


# --- backward ---------------------------------------------------------------------------------------------------------


@jit
def _swiglu_bwd_kernel(
    dy_ptr, gate_ptr, value_ptr, gate_bias_ptr, value_bias_ptr, dgate_ptr, dvalue_ptr, dgate_bias_ptr, dvalue_bias_ptr,
    stride_dy, stride_g, stride_v, stride_d, M, tiles, programs,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A fixed number of programs loops over the rows of each tile of channels: few partial sums, in a fixed order."""
    pid = tl.program_id(0)
    first = pid // tiles
    c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    dgate_bias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    dvalue_bias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in tl.range(first * ROWS, M, programs * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        mask = (row < M)[:, None] if C % BLOCK_C == 0 else (row < M)[:, None] & (c < C)
        row = row.to(tl.int64)[:, None]
        gate = _load(gate_ptr, gate_bias_ptr, row * stride_g + c, c, mask, C)
        value = _load(value_ptr, value_bias_ptr, row * stride_v + c, c, mask, C)
        dy = tl.load(dy_ptr + row * stride_dy + c, mask=mask, other=0.0).to(tl.float32)
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        dvalue = dy * silu
        dgate = dy * value * (sigmoid + silu * (1.0 - sigmoid))
        dgate_bias += dgate
        dvalue_bias += dvalue
        tl.store(dgate_ptr + row * stride_d + c, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        tl.store(dvalue_ptr + row * stride_d + c, dvalue.to(dvalue_ptr.dtype.element_ty), mask=mask)
    if dgate_bias_ptr is not None:
        tl.store(dgate_bias_ptr + first * C + c, tl.sum(dgate_bias, 0)[None, :], mask=c < C)
    if dvalue_bias_ptr is not None:
        tl.store(dvalue_bias_ptr + first * C + c, tl.sum(dvalue_bias, 0)[None, :], mask=c < C)


def _swiglu_bwd_fake(dy, gate, value, gate_bias, value_bias):
    none = dy.new_empty(0)
    operands = (none if x is None else x for x in (gate, value, gate_bias, value_bias))
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands)


@register(
    "swiglu_bwd(Tensor dy, Tensor gate, Tensor? value, Tensor? gate_bias, Tensor? value_bias)"
    " -> (Tensor dgate, Tensor dvalue, Tensor dgate_bias, Tensor dvalue_bias)",
    _swiglu_bwd_fake,
)
def _swiglu_bwd(dy, gate, value, gate_bias, value_bias):
    """The gradients of all operands; empty for an operand that is None. Without a value, dgate is `[M, 2 I]`."""
    dgate, dvalue, *_ = gradients = _swiglu_bwd_fake(dy, gate, value, gate_bias, value_bias)
    left, right = dgate.chunk(2, 1) if value is None else (dgate, dvalue)
    gate, value = _halves(gate, value)
    biases = [None if b is None else b.contiguous() for b in (gate_bias, value_bias)]
    M, C = gate.shape
    block_c, rows, num_warps, stages = tile_config(gate, "swiglu_bwd")
    tiles = -(-C // block_c)
    programs = min(max(1, 4 * multiprocessors(gate) // tiles), -(-M // rows))
    sums = [None if b is None else dy.new_empty(programs, C, dtype=torch.float32) for b in biases]
    dy = dense_rows(dy)
    launch(
        _swiglu_bwd_kernel, programs * tiles, gate,
        dy, gate, value, *biases, left, right, *sums,
        dy.stride(0), gate.stride(0), value.stride(0), left.stride(0), M, tiles, programs,
        C, block_c, rows, stages, num_warps=num_warps,
    )  # fmt: skip
    for gradient, partial in zip(gradients[2:], sums, strict=True):
        if partial is not None:
            gradient.copy_(partial.sum(0))
    return gradients


class _SwiGLU(Function):
    @staticmethod
    def forward(gate, value, gate_bias, value_bias, dtype):
        return torch.ops.ajepa.swiglu_fwd(gate, value, gate_bias, value_bias, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    @first_order
    def backward(ctx, saved, dy):
        gradients = torch.ops.ajepa.swiglu_bwd(dy, *saved)
        return *(None if x is None else d for x, d in zip(saved, gradients, strict=True)), None


# --- public -----------------------------------------------------------------------------------------------------------


def swiglu_reference(
    gate: torch.Tensor,
    value: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    value_bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Plain PyTorch definition of `swiglu`: computed in float32 (float64 for float64), rounded to `dtype`."""
    compute, dtype = torch.promote_types(gate.dtype, torch.float32), gate.dtype if dtype is None else dtype
    gate, value = gate.chunk(2, -1) if value is None else (gate, value)
    gate, value = (
        x.to(compute) if bias is None else x.to(compute) + bias.to(compute)
        for x, bias in ((gate, gate_bias), (value, value_bias))
    )
    return (F.silu(gate) * value).to(dtype)


def swiglu(
    gate: torch.Tensor,
    value: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    value_bias: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """silu(gate + gate_bias) * (value + value_bias), where silu(z) = z / (1 + exp(-z)).

    The gate of a SwiGLU MLP (arXiv 2002.05202), between its first linear layers, called without their biases, and its
    last. Backward computes all gradients in one pass, those of the biases included.

    Args:
        gate, value: `[..., I]` in one dtype. They may be strided, such as the halves of one tensor `[..., 2 I]`. If
            such a tensor is passed as the gate alone, its first half is the gate and its second half the value, and its
            gradient is written without the copy that joins two halves. The kernel takes bfloat16, float16 or float32,
            and computes in float32.
        gate_bias, value_bias: `[I]`. None means 0.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.

    Returns:
        `[..., I]` in the dtype of the gate or, under autocast, in autocast's.

    Saved for backward: the arguments; the gate is recomputed. The gradients of the biases are summed in a fixed order.
    `torch.func.grad` works; `torch.vmap` needs impl="reference".

    Raises:
        ValueError: shapes, dtypes, devices or options are invalid; raised before any launch.
        TypeError: an argument is no tensor.
        RuntimeError: the gradients are differentiated again.

    Example::

        both, last = torch.nn.Linear(768, 2 * 2048, device="cuda"), torch.nn.Linear(2048, 768, device="cuda")
        x = torch.randn(8, 64, 768, device="cuda")
        y = last(swiglu(F.linear(x, both.weight), None, *both.bias.chunk(2)))  # [8, 64, 768]
    """
    check_tensors("swiglu", gate=gate, value=value, gate_bias=gate_bias, value_bias=value_bias)
    if gate.dim() < 1 or (value is None and gate.shape[-1] % 2) or (value is not None and value.shape != gate.shape):
        raise ValueError(
            "swiglu: gate and value must both be [..., I], or gate [..., 2 I] alone, "
            f"got {list(gate.shape)} and {None if value is None else list(value.shape)}"
        )
    inner = gate.shape[-1] // (2 if value is None else 1)
    for name, bias in (("gate_bias", gate_bias), ("value_bias", value_bias)):
        if bias is not None and bias.shape != (inner,):
            raise ValueError(f"swiglu: {name} must be [{inner}], got {list(bias.shape)}")
    tensors = [t for t in (gate, value, gate_bias, value_bias) if t is not None]
    if any(t.device != gate.device or not t.is_floating_point() for t in tensors):
        raise ValueError("swiglu: all tensors must be floating point and on one device")
    if value is not None and value.dtype != gate.dtype:
        raise ValueError(f"swiglu: gate and value must have one dtype, got {gate.dtype} and {value.dtype}")
    dtype, unsupported = autocast_dtype(gate), ""
    if others := {t.dtype for t in tensors} - {torch.float32, torch.float16, torch.bfloat16}:
        unsupported = f"no kernel for {', '.join(sorted(map(str, others)))}"
    elif not inner:
        unsupported = "no kernel for width 0"
    if not use_triton("swiglu", impl, gate, unsupported):
        return swiglu_reference(gate, value, gate_bias, value_bias, dtype)
    rows = (None if x is None else x.reshape(-1, x.shape[-1]) for x in (gate, value))
    return _SwiGLU.apply(*rows, gate_bias, value_bias, dtype).view(*gate.shape[:-1], inner)
