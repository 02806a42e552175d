"""Residual addition and layer norm in one pass over memory.

Shapes: M rows (all leading axes), C width.
"""

# Triton kernels build tuples inside static loops, which mypy cannot type.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import torch
import torch.nn.functional as F

from ajepa_kernels._autograd import Function, autocast_dtype, first_order
from ajepa_kernels._chunks import MAX_WIDTH, centre, channels, chunk, load_vector, row_chunks
from ajepa_kernels._triton import dense_rows, jit, launch, multiprocessors, register, tl, use_triton

# --- forward ----------------------------------------------------------------------------------------------------------


@jit
def sum_rows(
    x_ptr, residual_ptr, sum_ptr, stride_x, stride_r, row, valid,
    C: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Float32 chunks of x + residual, rounded as they are stored for backward; chunks of x if there is no residual."""
    loaded = ()
    for i in tl.static_range(COUNT):  # all loads are issued before the first store
        c, mask = chunk(i, valid, C, WIDTH, VECTOR)
        loaded += (tl.load(x_ptr + row[:, None] * stride_x + c, mask=mask, other=0.0),)
        if residual_ptr is not None:
            loaded += (tl.load(residual_ptr + row[:, None] * stride_r + c, mask=mask, other=0.0),)
    sums = ()
    for i in tl.static_range(COUNT):
        if residual_ptr is None:
            sums += (loaded[i].to(tl.float32),)
        else:
            c, mask = chunk(i, valid, C, WIDTH, VECTOR)
            rounded = (loaded[2 * i].to(tl.float32) + loaded[2 * i + 1].to(tl.float32)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row[:, None] * C + c, rounded, mask=mask)
            sums += (rounded.to(tl.float32),)
    return sums


@jit
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, sum_ptr, mean_ptr, rstd_ptr, stride_x, stride_r, M, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < M
    sums = sum_rows(x_ptr, residual_ptr, sum_ptr, stride_x, stride_r, row, valid, C, WIDTH, COUNT, VECTOR)
    centred, mean, rstd = centre(sums, eps, C, WIDTH, COUNT, VECTOR)
    tl.store(mean_ptr + row[:, None], mean[:, None], mask=valid[:, None])
    tl.store(rstd_ptr + row[:, None], rstd[:, None], mask=valid[:, None])
    normed = ()
    for i in tl.static_range(COUNT):
        c = channels(i, WIDTH, VECTOR)
        x = centred[i] * rstd[:, None]
        if weight_ptr is not None:
            x = x * load_vector(weight_ptr, c, C, ROWS)
        if bias_ptr is not None:
            x += load_vector(bias_ptr, c, C, ROWS)
        normed += (x.to(normed_ptr.dtype.element_ty),)
    for i in tl.static_range(COUNT):
        c, mask = chunk(i, valid, C, WIDTH, VECTOR)
        tl.store(normed_ptr + row[:, None] * C + c, normed[i], mask=mask)


def _add_layer_norm_fwd_fake(x, residual, weight, bias, eps, dtype):
    total = x.new_empty(0) if residual is None else _sum_like(x, residual)
    normed = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return normed, total, *(x.new_empty(len(x), dtype=torch.float32) for _ in range(2))


def _sum_like(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@register(
    "add_layer_norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, ScalarType dtype)"
    " -> (Tensor normed, Tensor sum, Tensor mean, Tensor rstd)",
    _add_layer_norm_fwd_fake,
)
def _add_layer_norm_fwd(x, residual, weight, bias, eps, dtype):
    """x, residual `[M, C]`; mean, rstd float32 `[M]`. Without a residual the sum is x itself and is not returned."""
    M, C = x.shape
    chunks, config = row_chunks("add_layer_norm_fwd", x, residual)
    normed, total, mean, rstd = _add_layer_norm_fwd_fake(x, residual, weight, bias, eps, dtype)
    x, residual = dense_rows(x), None if residual is None else dense_rows(residual)
    weight, bias = (None if p is None else p.contiguous() for p in (weight, bias))
    launch(
        _add_layer_norm_fwd_kernel, -(-M // config.rows), x,
        x, residual, weight, bias, normed, total, mean, rstd,
        x.stride(0), 0 if residual is None else residual.stride(0), M, eps, C, *chunks, config.rows,
        num_warps=config.num_warps,
    )  # fmt: skip
    return normed, total, mean, rstd


# --- backward ---------------------------------------------------------------------------------------------------------


@jit
def _add_layer_norm_bwd_kernel(
    sum_ptr, mean_ptr, rstd_ptr, weight_ptr, dnormed_ptr, dsum_ptr, dtotal_ptr, dx_ptr, dweight_ptr, dbias_ptr,
    stride_s, stride_dn, stride_ds, M, programs,
    C: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A fixed number of programs loops over the rows: few partial sums for weight and bias, in a fixed order."""
    pid = tl.program_id(0)
    weights = ()
    dweights = ()
    dbiases = ()
    for i in tl.static_range(COUNT):
        c = channels(i, WIDTH, VECTOR)
        if weight_ptr is not None:
            weights += (load_vector(weight_ptr, c, C, ROWS),)
        dweights += (tl.zeros([ROWS, WIDTH], tl.float32),)
        dbiases += (tl.zeros([ROWS, WIDTH], tl.float32),)
    for start in tl.range(pid * ROWS, M, programs * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < M
        mean = tl.load(mean_ptr + row, mask=valid, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=valid, other=0.0)
        sum_dy_xhat = tl.zeros([ROWS, WIDTH], tl.float32)
        sum_dy = tl.zeros([ROWS, WIDTH], tl.float32)
        xhats = ()
        dys = ()
        dws = ()
        dbs = ()
        for i in tl.static_range(COUNT):
            c, mask = chunk(i, valid, C, WIDTH, VECTOR)
            x = tl.load(sum_ptr + row[:, None] * stride_s + c, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dnormed_ptr + row[:, None] * stride_dn + c, mask=mask, other=0.0).to(tl.float32)
            xhat = (x - mean[:, None]) * rstd[:, None]
            dws += (dweights[i] + dy * xhat,)
            dbs += (dbiases[i] + dy,)
            if weight_ptr is not None:
                dy = dy * weights[i]
            sum_dy_xhat += dy * xhat
            sum_dy += dy
            xhats += (xhat,)
            dys += (dy,)
        dweights = dws
        dbiases = dbs
        sum_dy_xhat, sum_dy = tl.reduce((sum_dy_xhat, sum_dy), 1, _add_pairs)
        mean_dy_xhat = sum_dy_xhat / C
        mean_dy = sum_dy / C
        dxs = ()
        for i in tl.static_range(COUNT):
            c, mask = chunk(i, valid, C, WIDTH, VECTOR)
            dx = (dys[i] - mean_dy[:, None] - xhats[i] * mean_dy_xhat[:, None]) * rstd[:, None]
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + row[:, None] * stride_ds + c, mask=mask, other=0.0).to(tl.float32)
            dxs += (dx,)
        for i in tl.static_range(COUNT):
            c, mask = chunk(i, valid, C, WIDTH, VECTOR)
            tl.store(dtotal_ptr + row[:, None] * C + c, dxs[i].to(dtotal_ptr.dtype.element_ty), mask=mask)
            if dx_ptr is not None:
                tl.store(dx_ptr + row[:, None] * C + c, dxs[i].to(dx_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(COUNT):
        c = channels(i, WIDTH, VECTOR)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + pid * C + c, tl.sum(dweights[i], 0)[None, :], mask=c < C)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + pid * C + c, tl.sum(dbiases[i], 0)[None, :], mask=c < C)


@jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


def _add_layer_norm_bwd_fake(dnormed, dsum, total, mean, rstd, weight, bias_dtype, x_dtype):
    dtotal = torch.empty_like(total, memory_format=torch.contiguous_format)
    dx = dtotal.new_empty(0) if x_dtype == total.dtype else torch.empty_like(dtotal, dtype=x_dtype)
    C = total.shape[1]
    dweight = total.new_empty(0) if weight is None else weight.new_empty(C)
    return dtotal, dx, dweight, total.new_empty(0) if bias_dtype is None else total.new_empty(C, dtype=bias_dtype)


@register(
    "add_layer_norm_bwd(Tensor dnormed, Tensor? dsum, Tensor sum, Tensor mean, Tensor rstd, Tensor? weight, "
    "ScalarType? bias_dtype, ScalarType x_dtype) -> (Tensor dtotal, Tensor dx, Tensor dweight, Tensor dbias)",
    _add_layer_norm_bwd_fake,
)
def _add_layer_norm_bwd(dnormed, dsum, total, mean, rstd, weight, bias_dtype, x_dtype):
    """dtotal is the gradient of x and of the residual. dx is the same in x's dtype; empty if that is dtotal's dtype."""
    M, C = total.shape
    chunks, config = row_chunks("add_layer_norm_bwd", total, dnormed, dsum)
    programs = min(2 * multiprocessors(total), -(-M // config.rows))
    dtotal = torch.empty(M, C, dtype=total.dtype, device=total.device)
    dx = None if x_dtype == total.dtype else torch.empty_like(dtotal, dtype=x_dtype)
    partial = [
        None if dtype is None else torch.empty(programs, C, dtype=torch.float32, device=total.device)
        for dtype in (None if weight is None else weight.dtype, bias_dtype)
    ]
    total, dnormed = dense_rows(total), dense_rows(dnormed)
    dsum = None if dsum is None else dense_rows(dsum)
    launch(
        _add_layer_norm_bwd_kernel, programs, total,
        total, mean, rstd, None if weight is None else weight.contiguous(), dnormed, dsum, dtotal, dx, *partial,
        total.stride(0), dnormed.stride(0), 0 if dsum is None else dsum.stride(0), M, programs,
        C, *chunks, config.rows, config.num_stages, num_warps=config.num_warps,
    )  # fmt: skip
    dweight, dbias = (
        dtotal.new_empty(0) if sums is None else sums.sum(0).to(dtype)
        for sums, dtype in zip(partial, (None if weight is None else weight.dtype, bias_dtype), strict=True)
    )
    return dtotal, dtotal.new_empty(0) if dx is None else dx, dweight, dbias


class _AddLayerNorm(Function):
    @staticmethod
    def forward(x, residual, weight, bias, eps, dtype):
        normed, total, mean, rstd = torch.ops.ajepa.add_layer_norm_fwd(x, residual, weight, bias, eps, dtype)
        return (normed, mean, rstd) if residual is None else (normed, mean, rstd, total)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, weight, bias, *_ = inputs
        _, mean, rstd, *total = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x if residual is None else total[0], mean, rstd, weight)
        ctx.dtypes = [None if t is None else t.dtype for t in (x, residual, bias)]

    @staticmethod
    @first_order
    def backward(ctx, saved, dnormed, _mean, _rstd, dsum=None):
        (total, mean, rstd, weight), (x_dtype, residual_dtype, bias_dtype) = saved, ctx.dtypes
        dx = dtotal = dsum
        dweight = dbias = None
        if dnormed is not None:
            dtotal, dx, dweight, dbias = torch.ops.ajepa.add_layer_norm_bwd(
                dnormed, dsum, total, mean, rstd, weight, bias_dtype, x_dtype
            )
            dx = dtotal if x_dtype == total.dtype else dx
            dweight, dbias = None if weight is None else dweight, None if bias_dtype is None else dbias
        return (
            None if dx is None else dx.to(x_dtype),
            None if dtotal is None or residual_dtype is None else dtotal.to(residual_dtype),
            dweight, dbias, None, None,
        )  # fmt: skip


# --- public -----------------------------------------------------------------------------------------------------------


def add_layer_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch definition of `add_layer_norm`: the norm in float32 (float64 for float64), rounded to `dtype`."""
    total = x if residual is None else x + residual
    compute = torch.promote_types(total.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(compute) for p in (weight, bias))
    normed = F.layer_norm(total.to(compute), total.shape[-1:], weight, bias, eps)
    return normed.to(x.dtype if dtype is None else dtype), total


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum = x + residual; normed = (sum - mean) / sqrt(variance + eps) * weight + bias, over the last axis.

    This is the step between the halves of a pre-norm transformer block (arXiv 2002.04745): x is the output of the
    previous half, and residual is the stream that it is added to.

    Args:
        x: `[..., C]`, floating point. The kernel takes C up to 4,096 in bfloat16, float16 or float32.
        residual: of the shape of x. Its dtype may be wider (a float32 stream and bfloat16 halves). None means zero.
        weight, bias: `[C]`. None means 1 and 0.
        eps: added to the variance.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.

    Returns:
        normed, in the dtype of x or, under autocast, in autocast's; and sum, in the wider dtype of x and residual
        (without a residual, x itself). Both are computed in float32.

    Saved for backward: sum, weight, and the mean and 1 / standard deviation of each row. Weight and bias gradients are
    summed in a fixed order.
    `torch.func.grad` works; `torch.vmap` needs impl="reference".

    Raises:
        ValueError: shapes or devices are invalid; raised before any launch.
        RuntimeError: the gradients are differentiated again.

    Example::

        norm = torch.nn.LayerNorm(768, device="cuda")
        stream = torch.randn(8, 64, 768, device="cuda")
        x = torch.randn(8, 64, 768, device="cuda", dtype=torch.bfloat16)  # output of attention or an MLP
        normed, stream = add_layer_norm(x, stream, norm.weight, norm.bias, norm.eps)
    """
    if x.dim() < 1 or (residual is not None and residual.shape != x.shape):
        raise ValueError(
            f"add_layer_norm: x [..., C] and residual must have equal shapes, "
            f"got {list(x.shape)} and {None if residual is None else list(residual.shape)}"
        )
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"add_layer_norm: {name} must be [{x.shape[-1]}], got {list(p.shape)}")
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    if any(t.device != x.device or not t.is_floating_point() for t in tensors):
        raise ValueError("add_layer_norm: all tensors must be floating point and on one device")
    dtype, unsupported, C = autocast_dtype(x), "", x.shape[-1]
    if others := {t.dtype for t in tensors} - {torch.float32, torch.float16, torch.bfloat16}:
        unsupported = f"no kernel for {', '.join(sorted(map(str, others)))}"
    elif not 1 <= C <= MAX_WIDTH:
        unsupported = f"no kernel for width {C}, only up to {MAX_WIDTH}"
    if not use_triton("add_layer_norm", impl, x, unsupported):
        return add_layer_norm_reference(x, residual, weight, bias, eps, dtype)
    if residual is None:
        return _AddLayerNorm.apply(x.reshape(-1, C), None, weight, bias, eps, dtype)[0].view(x.shape), x
    normed, _, _, total = _AddLayerNorm.apply(x.reshape(-1, C), residual.reshape(-1, C), weight, bias, eps, dtype)
    return normed.view(x.shape), total.view(x.shape)
