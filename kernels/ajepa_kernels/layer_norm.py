"""Residual addition and layer norm or RMS norm in one pass over memory.

Shapes: M rows (all leading axes), C width.
"""

# Triton kernels build tuples inside static loops, which mypy cannot type.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._autograd import BiasGradient, Function, autocast_dtype, first_order
from ajepa_kernels._chunks import MAX_WIDTH, centre, channels, chunk, load_vector, row_chunks
from ajepa_kernels._triton import dense_rows, jit, launch, multiprocessors, register, tl, use_triton

# --- forward ----------------------------------------------------------------------------------------------------------


@jit
def sum_rows(
    x_ptr, residual_ptr, sum_ptr, stride_x, stride_r, row, residual_row, valid,
    C: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr,
    layer_scale_ptr=None, row_scale=None,
):  # fmt: skip
    """Float32 chunks of residual + row_scale * layer_scale * x, rounded as they are stored for backward; chunks of x if
    there is no residual."""
    loaded = ()
    for i in tl.static_range(COUNT):  # all loads are issued before the first store
        c, mask = chunk(i, valid, C, WIDTH, VECTOR)
        loaded += (tl.load(x_ptr + row[:, None] * stride_x + c, mask=mask, other=0.0),)
        if residual_ptr is not None:
            loaded += (tl.load(residual_ptr + residual_row[:, None] * stride_r + c, mask=mask, other=0.0),)
    sums = ()
    for i in tl.static_range(COUNT):
        if residual_ptr is None:
            sums += (loaded[i].to(tl.float32),)
        else:
            c, mask = chunk(i, valid, C, WIDTH, VECTOR)
            x = loaded[2 * i].to(tl.float32)
            if layer_scale_ptr is not None:
                x *= load_vector(layer_scale_ptr, c, C, row.shape[0])
            if row_scale is not None:
                x *= row_scale[:, None]
            rounded = (x + loaded[2 * i + 1].to(tl.float32)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row[:, None] * C + c, rounded, mask=mask)
            sums += (rounded.to(tl.float32),)
    return sums


@jit
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr, rows_ptr, weight_ptr, bias_ptr, normed_ptr, sum_ptr, mean_ptr, rstd_ptr, stride_x, stride_r,
    M, eps, C: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    layer_scale_ptr, sample_scale_ptr, rows,
):  # fmt: skip
    """rows: of each sample; all of a sample's share one element of `sample_scale`. RMS norm has no mean_ptr."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < M
    residual_row = row
    if rows_ptr is not None:
        residual_row = tl.load(rows_ptr + row, mask=valid, other=0).to(tl.int64)
    row_scale = None
    if sample_scale_ptr is not None:
        row_scale = tl.load(sample_scale_ptr + row // rows, mask=valid, other=0.0).to(tl.float32)
    sums = sum_rows(
        x_ptr, residual_ptr, sum_ptr, stride_x, stride_r, row, residual_row, valid, C, WIDTH, COUNT, VECTOR,
        layer_scale_ptr, row_scale,
    )  # fmt: skip
    centred, mean, rstd = centre(sums, eps, C, WIDTH, COUNT, VECTOR, mean_ptr is None)
    if mean_ptr is not None:
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


def _add_layer_norm_fwd_fake(
    x, residual, rows, weight, bias, eps, dtype, rms=False, layer_scale=None, sample_scale=None
):
    total = x.new_empty(0)
    if residual is not None:
        dtype_of_sum = torch.promote_types(x.dtype, residual.dtype)
        if layer_scale is not None:
            dtype_of_sum = torch.promote_types(dtype_of_sum, layer_scale.dtype)
        total = torch.empty_like(x, dtype=dtype_of_sum, memory_format=torch.contiguous_format)
    normed = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    return normed, total, *(x.new_empty(n, dtype=torch.float32) for n in (0 if rms else len(x), len(x)))


@register(
    "add_layer_norm_fwd(Tensor x, Tensor? residual, Tensor? rows, Tensor? weight, Tensor? bias, float eps, "
    "ScalarType dtype, bool rms=False, Tensor? layer_scale=None, Tensor? sample_scale=None)"
    " -> (Tensor normed, Tensor sum, Tensor mean, Tensor rstd)",
    _add_layer_norm_fwd_fake,
)
def _add_layer_norm_fwd(x, residual, rows, weight, bias, eps, dtype, rms=False, layer_scale=None, sample_scale=None):
    """x `[M, C]`; mean (empty if `rms`), rstd float32 `[M]`; sample_scale `[B]`, where B divides M. Without a residual
    the sum is x itself and is not returned."""
    M, C = x.shape
    chunks, config = row_chunks("add_layer_norm_fwd", x, residual)
    normed, total, mean, rstd = _add_layer_norm_fwd_fake(
        x, residual, rows, weight, bias, eps, dtype, rms, layer_scale
    )  # fmt: skip
    x, residual = dense_rows(x), None if residual is None else dense_rows(residual)
    vectors = (rows, weight, bias, layer_scale, sample_scale)
    rows, weight, bias, layer_scale, sample_scale = (None if p is None else p.contiguous() for p in vectors)
    launch(
        _add_layer_norm_fwd_kernel, -(-M // config.rows), x,
        x, residual, rows, weight, bias, normed, total, None if rms else mean, rstd,
        x.stride(0), 0 if residual is None else residual.stride(0), M, eps, C, *chunks, config.rows,
        layer_scale, sample_scale, _rows_of_a_sample(M, sample_scale), num_warps=config.num_warps,
    )  # fmt: skip
    return normed, total, mean, rstd


def _rows_of_a_sample(M: int, sample_scale: torch.Tensor | None) -> int | None:
    return None if sample_scale is None else M // max(len(sample_scale), 1)


# --- backward ---------------------------------------------------------------------------------------------------------


@jit
def _add_layer_norm_bwd_kernel(
    sum_ptr, mean_ptr, rstd_ptr, weight_ptr, dnormed_ptr, dsum_ptr, dx_ptr, dresidual_ptr,
    dweight_ptr, dbias_ptr, dx_bias_ptr, stride_s, stride_dn, stride_ds, M, programs,
    C: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr,
    x_ptr, layer_scale_ptr, dlayer_scale_ptr, sample_scale_ptr, stride_x, rows,
):  # fmt: skip
    """A fixed number of programs loops over the rows: few partial sums for the vectors, in a fixed order.

    RMS norm has no mean_ptr. With a scale, dx is the gradient of the sum times the scale; dresidual is that of the sum.
    """
    pid = tl.program_id(0)
    weights = ()
    dweights = ()
    dbiases = ()
    dx_biases = ()
    dlayer_scales = ()
    for i in tl.static_range(COUNT):
        c = channels(i, WIDTH, VECTOR)
        if weight_ptr is not None:
            weights += (load_vector(weight_ptr, c, C, ROWS),)
        dweights += (tl.zeros([ROWS, WIDTH], tl.float32),)
        dbiases += (tl.zeros([ROWS, WIDTH], tl.float32),)
        if dx_bias_ptr is not None:
            dx_biases += (tl.zeros([ROWS, WIDTH], tl.float32),)
        if layer_scale_ptr is not None:
            dlayer_scales += (tl.zeros([ROWS, WIDTH], tl.float32),)
    for start in tl.range(pid * ROWS, M, programs * ROWS, num_stages=STAGES):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        valid = row < M
        if mean_ptr is not None:
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
            if mean_ptr is not None:
                x -= mean[:, None]
            xhat = x * rstd[:, None]
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
        if sample_scale_ptr is not None:
            row_scale = tl.load(sample_scale_ptr + row // rows, mask=valid, other=0.0).to(tl.float32)
        dsums = ()
        dxs = ()
        dxbs = ()
        dlss = ()
        for i in tl.static_range(COUNT):
            c, mask = chunk(i, valid, C, WIDTH, VECTOR)
            dx = dys[i]
            if mean_ptr is not None:
                dx -= mean_dy[:, None]
            dx = (dx - xhats[i] * mean_dy_xhat[:, None]) * rstd[:, None]
            if dsum_ptr is not None:
                dx += tl.load(dsum_ptr + row[:, None] * stride_ds + c, mask=mask, other=0.0).to(tl.float32)
            dsums += (dx,)
            if sample_scale_ptr is not None:
                dx *= row_scale[:, None]
            if layer_scale_ptr is not None:
                x = tl.load(x_ptr + row[:, None] * stride_x + c, mask=mask, other=0.0).to(tl.float32)
                dlss += (dlayer_scales[i] + dx * x,)
                dx *= load_vector(layer_scale_ptr, c, C, ROWS)
            dxs += (dx,)
            if dx_bias_ptr is not None:
                dxbs += (dx_biases[i] + dx,)  # rows beyond M add 0, because their rstd is 0
        if dx_bias_ptr is not None:
            dx_biases = dxbs
        if layer_scale_ptr is not None:
            dlayer_scales = dlss
        for i in tl.static_range(COUNT):
            c, mask = chunk(i, valid, C, WIDTH, VECTOR)
            tl.store(dx_ptr + row[:, None] * C + c, dxs[i].to(dx_ptr.dtype.element_ty), mask=mask)
            if dresidual_ptr is not None:
                tl.store(dresidual_ptr + row[:, None] * C + c, dsums[i].to(dresidual_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(COUNT):
        c = channels(i, WIDTH, VECTOR)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + pid * C + c, tl.sum(dweights[i], 0)[None, :], mask=c < C)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + pid * C + c, tl.sum(dbiases[i], 0)[None, :], mask=c < C)
        if dx_bias_ptr is not None:
            tl.store(dx_bias_ptr + pid * C + c, tl.sum(dx_biases[i], 0)[None, :], mask=c < C)
        if layer_scale_ptr is not None:
            tl.store(dlayer_scale_ptr + pid * C + c, tl.sum(dlayer_scales[i], 0)[None, :], mask=c < C)


@jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


def _add_layer_norm_bwd_fake(
    dnormed, dsum, total, mean, rstd, weight, x_dtype, residual_dtype, bias_dtype, x_bias_dtype,
    rms=False, x=None, layer_scale=None, sample_scale=None,
):  # fmt: skip
    dx = torch.empty_like(total, dtype=x_dtype, memory_format=torch.contiguous_format)
    shared = residual_dtype == x_dtype and layer_scale is None and sample_scale is None
    dresidual = dx.new_empty(0) if residual_dtype is None or shared else torch.empty_like(dx, dtype=residual_dtype)
    dtypes = _dtypes_of_vectors(weight, bias_dtype, x_bias_dtype, layer_scale)
    return dx, dresidual, *(total.new_empty(0 if d is None else total.shape[1], dtype=d) for d in dtypes)


def _dtypes_of_vectors(weight, bias_dtype, x_bias_dtype, layer_scale):
    weight_dtype, layer_scale_dtype = (None if p is None else p.dtype for p in (weight, layer_scale))
    return weight_dtype, bias_dtype, x_bias_dtype, layer_scale_dtype


@register(
    "add_layer_norm_bwd(Tensor dnormed, Tensor? dsum, Tensor sum, Tensor mean, Tensor rstd, Tensor? weight, "
    "ScalarType x_dtype, ScalarType? residual_dtype, ScalarType? bias_dtype, ScalarType? x_bias_dtype, "
    "bool rms=False, Tensor? x=None, Tensor? layer_scale=None, Tensor? sample_scale=None)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dx_bias, Tensor dlayer_scale)",
    _add_layer_norm_bwd_fake,
)
def _add_layer_norm_bwd(
    dnormed, dsum, total, mean, rstd, weight, x_dtype, residual_dtype, bias_dtype, x_bias_dtype,
    rms=False, x=None, layer_scale=None, sample_scale=None,
):  # fmt: skip
    """dresidual is the gradient of the sum, and dx that times the scales, each in its own dtype; dresidual is empty
    where both are the same. A dtype of None: this gradient is not needed. x is needed for the layer scale alone."""
    M, C = total.shape
    if layer_scale is None:
        chunks, config = row_chunks("add_layer_norm_bwd", total, dnormed, dsum)
    else:  # with its sums, 24 channels of a row would not fit the registers of a thread
        chunks, config = row_chunks("scaled_layer_norm_bwd", total, dnormed, dsum, x, widest=512)
    programs = min(2 * multiprocessors(total), -(-M // config.rows))
    scaled = layer_scale is not None or sample_scale is not None
    dx = torch.empty(M, C, dtype=x_dtype, device=total.device)
    apart = residual_dtype is not None and (scaled or residual_dtype != x_dtype)
    dresidual = torch.empty_like(dx, dtype=residual_dtype) if apart else None
    dtypes = _dtypes_of_vectors(weight, bias_dtype, x_bias_dtype, layer_scale)
    partial = [
        None if dtype is None else torch.empty(programs, C, dtype=torch.float32, device=total.device)
        for dtype in dtypes
    ]
    total, dnormed = dense_rows(total), dense_rows(dnormed)
    dsum, x = (None if t is None else dense_rows(t) for t in (dsum, x))
    weight, layer_scale, sample_scale = (
        None if p is None else p.contiguous() for p in (weight, layer_scale, sample_scale)
    )
    launch(
        _add_layer_norm_bwd_kernel, programs, total,
        total, None if rms else mean, rstd, weight, dnormed, dsum, dx, dresidual, *partial[:3],
        total.stride(0), dnormed.stride(0), 0 if dsum is None else dsum.stride(0), M, programs,
        C, *chunks, config.rows, config.num_stages,
        x, layer_scale, partial[3], sample_scale, None if x is None else x.stride(0),
        _rows_of_a_sample(M, sample_scale), num_warps=config.num_warps,
    )  # fmt: skip
    vectors = (
        total.new_empty(0) if sums is None else sums.sum(0).to(dtype)
        for sums, dtype in zip(partial, dtypes, strict=True)
    )
    return dx, dx.new_empty(0) if dresidual is None else dresidual, *vectors


class _AddLayerNorm(Function):
    """Returns normed, mean, rstd; then the sum where there is a residual or an `x_bias`, whose gradient includes that
    of the sum; then the sum's carrier where x or residual has one: see `ResidualStream`."""

    @staticmethod
    def forward(
        x, x_carrier, residual, residual_carrier, rows, weight, bias, x_bias, eps, dtype, rms, layer_scale, sample_scale
    ):
        normed, total, mean, rstd = torch.ops.ajepa.add_layer_norm_fwd(
            x, residual, rows, weight, bias, eps, dtype, rms, layer_scale, sample_scale
        )
        carrier = x_carrier if residual_carrier is None else residual_carrier
        carriers = () if carrier is None else (_carrier(x, carrier.dtype),)
        if residual is None:
            return normed, mean, rstd, *((x.view_as(x),) if x_bias is not None and not carriers else carriers)
        return normed, mean, rstd, total, *carriers

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, x_carrier, residual, residual_carrier, rows, weight, bias, x_bias, _, _, ctx.rms, layer_scale, scale = inputs
        _, mean, rstd, *sums = output
        ctx.set_materialize_grads(False)
        carried = x_carrier is not None or residual_carrier is not None
        ctx.mark_non_differentiable(mean, rstd, *(sums[:-1] if carried else ()))  # a carrier comes last
        total, branch = x if residual is None else sums[0], None if layer_scale is None else x
        ctx.save_for_backward(total, mean, rstd, weight, branch, layer_scale, scale)
        takes_x, takes_residual = x if x_carrier is None else x_carrier, residual
        if rows is not None or residual_carrier is not None:
            takes_residual = residual_carrier
        ctx.dtypes = [None if t is None else t.dtype for t in (takes_x, takes_residual, bias, x_bias)]
        ctx.carriers = x_carrier is not None, residual_carrier is not None

    @staticmethod
    @first_order
    def backward(ctx, saved, dnormed, _mean, _rstd, *dsums):
        total, mean, rstd, weight, x, layer_scale, sample_scale = saved
        x_dtype, residual_dtype, bias_dtype, x_bias_dtype = ctx.dtypes
        dsum = dsums[-1] if dsums else None
        if not ctx.needs_input_grad[2] and not ctx.needs_input_grad[3]:
            residual_dtype = None
        dx = dresidual = dweight = dbias = dx_bias = dlayer_scale = None
        if dnormed is not None:
            dx, dresidual, dweight, dbias, dx_bias, dlayer_scale = torch.ops.ajepa.add_layer_norm_bwd(
                dnormed, dsum, total, mean, rstd, weight, x_dtype, residual_dtype, bias_dtype, x_bias_dtype,
                ctx.rms, x, layer_scale, sample_scale,
            )  # fmt: skip
            shared = residual_dtype == x_dtype and layer_scale is None and sample_scale is None
            dresidual = dx if shared else dresidual
        elif dsum is not None:
            dbranch = dsum
            if sample_scale is not None:
                row_scale = sample_scale.repeat_interleave(_rows_of_a_sample(len(dsum), sample_scale))
                dbranch = dbranch * row_scale[:, None]
            if layer_scale is not None:
                dlayer_scale, dbranch = (dbranch * x).sum(0, dtype=layer_scale.dtype), dbranch * layer_scale
            dx, dresidual = dbranch.to(x_dtype), None if residual_dtype is None else dsum.to(residual_dtype)
            dx_bias = None if x_bias_dtype is None else dbranch.sum(0, dtype=x_bias_dtype)
        x_is_carried, residual_is_carried = ctx.carriers
        return (
            *((None, dx) if x_is_carried else (dx, None)),
            *((None, dresidual) if residual_is_carried else (None if residual_dtype is None else dresidual, None)),
            None,
            None if weight is None else dweight, None if bias_dtype is None else dbias,
            None if x_bias_dtype is None else dx_bias, None, None, None,
            None if layer_scale is None else dlayer_scale, None,
        )  # fmt: skip


# --- public -----------------------------------------------------------------------------------------------------------


class ResidualStream(NamedTuple):
    """A residual stream whose gradient has a dtype of its own.

    Autograd gives every tensor a gradient of the tensor's dtype. Here `values` have no gradient. It goes instead to
    `carrier`, which has the shape of the values and the dtype that their gradient shall have, and no memory.
    """

    values: torch.Tensor  # [..., C]
    carrier: torch.Tensor  # [..., C]; one element, expanded, that nothing reads

    @staticmethod
    def of(values: torch.Tensor, dtype: torch.dtype) -> ResidualStream:
        """A stream of these values, which itself needs no gradient."""
        return ResidualStream(values, _carrier(values, dtype))

    def select(self, rows: torch.Tensor) -> ResidualStream:
        """The stream at `rows` of the first axis, without repeats."""
        return ResidualStream(self.values.index_select(0, rows), _SelectCarrier.apply(self.carrier, rows))

    def joined(self) -> torch.Tensor:
        """The values as one tensor, whose gradient is rounded to the dtype of the stream's gradient."""
        return _Join.apply(self.values, self.carrier)


def _carrier(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((), dtype=dtype).expand(x.shape)


class _Join(Function):
    @staticmethod
    def forward(values, carrier):
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, dvalues):
        return None, dvalues.to(ctx.dtype)


class _Split(Function):
    """The inverse of `_Join`: values without a gradient, and their carrier."""

    @staticmethod
    def forward(x, dtype):
        return x.view_as(x), _carrier(x, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[0])
        ctx.set_materialize_grads(False)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, _, dcarrier):
        return None if dcarrier is None else dcarrier.to(ctx.dtype), None


class _SelectCarrier(Function):
    @staticmethod
    def forward(carrier, rows):
        return carrier.new_empty(()).expand(len(rows), *carrier.shape[1:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        carrier, rows = inputs
        ctx.save_for_backward(rows)
        ctx.length = len(carrier)

    @staticmethod
    def backward(ctx, dy):
        (rows,) = ctx.saved_tensors
        return dy.new_zeros(ctx.length, *dy.shape[1:]).index_copy_(0, rows, dy), None


def add_layer_norm_reference(
    x: torch.Tensor | ResidualStream,
    residual: torch.Tensor | ResidualStream | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    *,
    x_bias: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    rms: bool = False,
    layer_scale: torch.Tensor | None = None,
    sample_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | ResidualStream]:
    """Plain PyTorch definition of `add_layer_norm`: the norm in float32 (float64 for float64), rounded to `dtype`."""
    stream = next((t for t in (residual, x) if isinstance(t, ResidualStream)), None)
    if isinstance(residual, ResidualStream):  # with `rows`, its gradient ends in the first sum
        residual = residual.joined() if rows is None else residual.values
    total = x.joined() if isinstance(x, ResidualStream) else x
    dtype = total.dtype if dtype is None else dtype
    total = total if x_bias is None else BiasGradient.apply(total, x_bias)
    total = total if layer_scale is None else total * layer_scale
    if sample_scale is not None:
        factors = sample_scale.to(total.dtype)
        total = total * factors.reshape(factors.shape + (1,) * (total.dim() - factors.dim()))
    if residual is not None:
        total = total + (residual if rows is None else residual[rows])
    compute = torch.promote_types(total.dtype, torch.float32)
    weight, bias = (None if p is None else p.to(compute) for p in (weight, bias))
    out: Any = total
    if stream is not None:
        out = ResidualStream(*_Split.apply(total, stream.carrier.dtype))
        total = _Join.apply(*out)
    shape = total.shape[-1:]
    if rms:
        return F.rms_norm(total.to(compute), shape, weight, eps).to(dtype), out
    return F.layer_norm(total.to(compute), shape, weight, bias, eps).to(dtype), out


def add_layer_norm(
    x: torch.Tensor | ResidualStream,
    residual: torch.Tensor | ResidualStream | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    rms: bool = False,
    layer_scale: torch.Tensor | None = None,
    sample_scale: torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, Any]:
    """sum = x + residual; normed = (sum - mean) / sqrt(variance + eps) * weight + bias, over the last axis.

    With scales, sum = residual + sample_scale * layer_scale * x. With `rms`, normed = sum / sqrt(mean(sum^2) + eps) *
    weight (RMSNorm, arXiv 1910.07467).

    This is the step between the halves of a pre-norm transformer block (arXiv 2002.04745): x is the output of the
    previous half, and residual is the stream that it is added to.

    Args:
        x: `[..., C]`, floating point. The kernel takes C up to 4,096 in bfloat16, float16 or float32.
        residual: of the shape of x. Its dtype may be wider (a float32 stream and bfloat16 halves). None means zero. A
            `ResidualStream` has a gradient in a dtype of its own; without a residual, x may be one.
        weight, bias: `[C]`. None means 1 and 0.
        eps: added to the variance.
        x_bias: `[C]`, the bias of the layer that made x, which this layer has already added without a gradient
            (`F.linear(h, layer.weight, layer.bias.detach())`). Backward gives it its gradient, the sum of x's gradient
            over all rows, so that no other pass has to read that gradient.
        rows: int64 or int32, of x's shape without C. The residual is then a table `[R, C]` without a gradient, such as
            position embeddings, and residual[rows] is added.
        rms: RMS norm in place of layer norm; bias must be None.
        layer_scale: `[C]`, LayerScale's factor of each channel of x (arXiv 2103.17239). Needs a residual.
        sample_scale: drop path's factor of each sample (stochastic depth, arXiv 1603.09382): 0, or 1 / the probability
            of keeping it. `[B]` for x `[B, ..., C]`, or of x's shape without C, one for each row. It gets no gradient.
            Needs a residual.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.

    Returns:
        normed, in the dtype of x or, under autocast, in autocast's; and sum, in the widest dtype of x, residual and
        layer_scale (without a residual, x itself), or as a `ResidualStream` if one was given. Both are computed in
        float32.

    Saved for backward: sum, weight, and the mean (not with `rms`) and 1 / standard deviation of each row; x, if there
    is a layer_scale; the scales. The gradients of weight, bias, x_bias and layer_scale are summed in a fixed order.
    `torch.func.grad` works; `torch.vmap` needs impl="reference".

    Raises:
        ValueError: shapes or devices are invalid; a residual with `rows`, or sample_scale, requires a gradient; there
            is a bias with `rms`, or a scale without a residual. Raised before any launch.
        TypeError: an argument is no tensor.
        RuntimeError: the gradients are differentiated again.

    Example::

        norm = torch.nn.LayerNorm(768, device="cuda")
        stream = torch.randn(8, 64, 768, device="cuda")
        x = torch.randn(8, 64, 768, device="cuda", dtype=torch.bfloat16)  # output of attention or an MLP
        normed, stream = add_layer_norm(x, stream, norm.weight, norm.bias, norm.eps)

        gamma = torch.full((768,), 1e-5, device="cuda", requires_grad=True)  # LayerScale
        kept = torch.empty(8, device="cuda").bernoulli_(0.9) / 0.9  # drop path
        normed, stream = add_layer_norm(x, stream, norm.weight, rms=True, layer_scale=gamma, sample_scale=kept)
    """
    given = x, residual
    x, x_carrier = x if isinstance(x, ResidualStream) else (x, None)
    residual, carrier = residual if isinstance(residual, ResidualStream) else (residual, None)
    vectors = {"weight": weight, "bias": bias, "x_bias": x_bias, "layer_scale": layer_scale}
    check_tensors("add_layer_norm", x=x, residual=residual, rows=rows, sample_scale=sample_scale, **vectors)
    _check(x, x_carrier, residual, rows, sample_scale, vectors)
    if rms and bias is not None:
        raise ValueError("add_layer_norm: RMS norm has no bias; pass bias=None with rms=True")
    tensors = [t for t in (x, residual, sample_scale, *vectors.values()) if t is not None]
    dtype, unsupported, C = autocast_dtype(x), "", x.shape[-1]
    if others := {t.dtype for t in tensors} - {torch.float32, torch.float16, torch.bfloat16}:
        unsupported = f"no kernel for {', '.join(sorted(map(str, others)))}"
    elif not 1 <= C <= MAX_WIDTH:
        unsupported = f"no kernel for width {C}, only up to {MAX_WIDTH}"
    if not use_triton("add_layer_norm", impl, x, unsupported):
        options: dict[str, Any] = {"x_bias": x_bias, "rows": rows, "rms": rms}
        options |= {"layer_scale": layer_scale, "sample_scale": sample_scale}
        return add_layer_norm_reference(given[0], given[1], weight, bias, eps, dtype, **options)
    flat = [None if t is None else t.reshape(-1, C) for t in (x, x_carrier, residual, carrier)]
    rows, sample_scale = (None if t is None else t.flatten() for t in (rows, sample_scale))
    normed, _, _, *sums = _AddLayerNorm.apply(
        *flat, rows, weight, bias, x_bias, eps, dtype, rms, layer_scale, sample_scale
    )  # fmt: skip
    normed, sums = normed.view(x.shape), [t.view(x.shape) for t in sums]
    if x_carrier is None and carrier is None:
        return normed, sums[0] if sums else x
    return normed, ResidualStream(*(sums if residual is not None else (x, *sums)))


def _check(x, x_carrier, residual, rows, sample_scale, vectors) -> None:
    table = rows is not None
    if x.dim() < 1 or (residual is not None and not table and residual.shape != x.shape):
        raise ValueError(
            f"add_layer_norm: x [..., C] and residual must have equal shapes, "
            f"got {list(x.shape)} and {None if residual is None else list(residual.shape)}"
        )
    if table and (residual is None or residual.dim() != 2 or residual.shape[1:] != x.shape[-1:]):
        raise ValueError("add_layer_norm: rows needs a residual [R, C] that shares C with x")
    if table and (rows.shape != x.shape[:-1] or rows.dtype not in (torch.int64, torch.int32)):
        raise ValueError(f"add_layer_norm: rows must be int64 or int32 {list(x.shape[:-1])}, got {list(rows.shape)}")
    if table and residual.requires_grad:
        raise ValueError("add_layer_norm: a residual that is read by rows gets no gradient; detach it")
    if x_carrier is not None and residual is not None:
        raise ValueError("add_layer_norm: x may be a ResidualStream only where there is no residual")
    for name, p in vectors.items():
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"add_layer_norm: {name} must be [{x.shape[-1]}], got {list(p.shape)}")
    if residual is None and (sample_scale is not None or vectors["layer_scale"] is not None):
        raise ValueError("add_layer_norm: layer_scale and sample_scale need a residual")
    if sample_scale is not None and (x.dim() < 2 or sample_scale.shape not in (x.shape[:1], x.shape[:-1])):
        shapes = " or ".join(dict.fromkeys((str(list(x.shape[:1])), str(list(x.shape[:-1])))))
        raise ValueError(f"add_layer_norm: sample_scale must be {shapes}, got {list(sample_scale.shape)}")
    if sample_scale is not None and sample_scale.requires_grad:
        raise ValueError("add_layer_norm: sample_scale gets no gradient; detach it")
    tensors = [t for t in (x, residual, sample_scale, *vectors.values()) if t is not None]
    if any(t.device != x.device or not t.is_floating_point() for t in tensors):
        raise ValueError("add_layer_norm: all tensors must be floating point and on one device")
