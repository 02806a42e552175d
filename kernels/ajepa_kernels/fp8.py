"""Matrix products in 8-bit floats with one scale per tensor, for networks without gradients, such as a target encoder.

A scale that depends on the present values needs a pass over them before the pass that quantises. A delayed scale comes
from the largest magnitudes of the last steps, so the kernel that makes a tensor also quantises it: the layer norm or
the GELU for an input, the optimiser for a weight (`AdamWEMA`). The format e4m3 is that of arXiv 2209.05433.
Shapes: M rows (all leading axes), K input and N output features.
"""

# Triton kernels build tuples inside static loops, which mypy cannot type.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ajepa_kernels import products
from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._chunks import MAX_WIDTH, centre, channels, chunk, load_vector, row_chunks
from ajepa_kernels._triton import arch, dense_rows, jit, launch, register, tl, use_triton
from ajepa_kernels.bias_gelu import _gelu
from ajepa_kernels.layer_norm import sum_rows

E4M3_MAX = 448.0
LEAST = 1e-12  # lower limit of a largest magnitude, so that the scale of zeros is not zero
MARGIN = 1.5  # of a delayed scale: values may grow by half before they are clamped. It costs half a bit of range only
HISTORY = 6  # steps that a delayed scale looks back
STATE = 2 + HISTORY  # float32 numbers of a `Scaling`; 32 bytes keep the rows of a table aligned
LANES = 16  # `torch._scaled_mm` takes only widths that are multiples of this
BLOCK = 4096  # elements of a program
GELUS = (None, "none", "tanh")  # None for no GELU, else `approximate` of torch.nn.functional.gelu


class Quantized(NamedTuple):
    """The matrix values x scale."""

    values: torch.Tensor  # float8_e4m3fn [..., K]
    scale: torch.Tensor  # float32 []

    def rows(self, index: torch.Tensor) -> Quantized:
        bits = self.values.view(torch.uint8).index_select(0, index)  # torch has no index_select for float8
        return Quantized(bits.view(torch.float8_e4m3fn), self.scale)


class Scaling:
    """The delayed scale of one tensor that is quantised at every step. All of it is on the device.

    scale = 1.5 x (largest magnitude of the last 6 steps) / 448. It stays the same within a step: `quantize` only notes
    the largest magnitude, and `advance_scales_` computes the next step's scale. The first use sets the scale from the
    present values; this needs no synchronization, but is a branch of the host, which a CUDA graph must not capture.

    Args:
        state: float32 `[8]`, zeros at first: the scale, the largest magnitude in this step, and those of the 6 steps
            before, the latest first. The states of many tensors may be the rows of one.

    Raises:
        ValueError: the shape or the dtype of the state is another.

    Example::

        states = torch.zeros(2, 8, device="cuda")  # of two tensors
        first, second = map(Scaling, states)
        for _ in range(3):
            x = torch.randn(512, 768, device="cuda")
            y = fp8_linear(quantize(x, first), weight)
            z = fp8_linear(quantize(y, second, gelu="none"), next_weight)
            advance_scales_(states)
    """

    def __init__(self, state: torch.Tensor):
        if state.shape != (STATE,) or state.dtype != torch.float32:
            raise ValueError(f"Scaling: state must be float32 [{STATE}], got {state.dtype} {list(state.shape)}")
        self.state = state
        self.calibrated = False

    @property
    def scale(self) -> torch.Tensor:
        return self.state[0]

    def calibrate(self, x: torch.Tensor) -> None:
        """Set the scale from x, with the margin."""
        self.state[0] = _present_scale(x) * MARGIN
        self.calibrated = True

    def loaded(self, x: torch.Tensor | None = None) -> None:
        """Take over a state that was set, unless it is empty or its scale is too small for x. It reads the device."""
        self.calibrated = bool(self.state[0] > 0)
        if self.calibrated and x is not None:
            self.calibrated = bool(x.detach().abs().amax() <= E4M3_MAX * self.scale)


def _present_scale(x: torch.Tensor) -> torch.Tensor:
    """Of finite values. The scale of values that are not is any finite number, because the step will be dropped."""
    largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    return largest.nan_to_num(0.0, 0.0, 0.0).clamp_min(LEAST) * (1.0 / E4M3_MAX)


def round_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x * (1.0 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def note_largest_(state: torch.Tensor, x: torch.Tensor) -> None:
    """Note the largest magnitude of x in the state of a `Scaling`."""
    if x.numel():
        state[1] = torch.maximum(state[1], x.abs().amax())


# --- kernels ----------------------------------------------------------------------------------------------------------


@jit
def to_e4m3(x, inverse):
    """x times the inverse of the scale, clamped and rounded. NaN stays NaN.

    Callers invert the scale by `div_rn`, so that kernels and plain definitions agree to the bit.
    """
    x = tl.clamp(x * inverse, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return x.to(tl.float8e4nv)


@jit
def note_largest(state_ptr, largest):
    """The atomic maximum of bits does not depend on the order of the programs. Almost all programs can omit it."""
    amax_ptr = (state_ptr + 1).to(tl.pointer_type(tl.int32))
    bits = largest.to(tl.int32, bitcast=True)  # the bits of numbers >= 0 have the order of the numbers
    tl.atomic_max(amax_ptr, bits, mask=bits > tl.load(amax_ptr), sem="relaxed")


@jit
def _quantize_kernel(
    x_ptr, state_ptr, out_ptr, size, BLOCK: tl.constexpr, GELU: tl.constexpr, NOTE: tl.constexpr
):  # fmt: skip
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        cdf, _ = _gelu(x, GELU == 2)
        x = x * cdf
    tl.store(out_ptr + offsets, to_e4m3(x, tl.div_rn(1.0, tl.load(state_ptr))), mask=mask)
    if NOTE:
        note_largest(state_ptr, tl.max(tl.abs(x), 0))


def _e4m3_like(x):
    return torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)


@register(
    "quantize(Tensor x, Tensor? scale, Tensor(a!)? state, int gelu) -> Tensor",
    lambda x, scale, state, gelu: _e4m3_like(x),
)
def _quantize(x, scale, state, gelu):
    """Either the scale or the state of a `Scaling` is given. gelu: index in GELUS of the GELU that is applied to x."""
    values, x = _e4m3_like(x), x.contiguous()
    launch(
        _quantize_kernel, -(-x.numel() // BLOCK), x,
        x, scale if state is None else state, values, x.numel(), BLOCK, gelu, state is not None, num_warps=8,
    )  # fmt: skip
    if state is not None:
        torch.autograd.graph.increment_version(state)
    return values


@jit
def _norm_quantize_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, state_ptr, out_ptr, sum_ptr, stride_x, stride_r, M, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < M
    inverse = tl.div_rn(1.0, tl.load(state_ptr))
    sums = sum_rows(x_ptr, residual_ptr, sum_ptr, stride_x, stride_r, row, row, valid, K, WIDTH, COUNT, VECTOR)
    centred, _, rstd = centre(sums, eps, K, WIDTH, COUNT, VECTOR)
    largest = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.static_range(COUNT):
        k, mask = chunk(i, valid, K, WIDTH, VECTOR)
        c = channels(i, WIDTH, VECTOR)
        weight, bias = load_vector(weight_ptr, c, K, ROWS), load_vector(bias_ptr, c, K, ROWS)
        normed = centred[i] * rstd[:, None] * weight + bias  # zero beyond channel K
        largest = tl.maximum(largest, tl.abs(normed))
        tl.store(out_ptr + row[:, None] * K + k, to_e4m3(normed, inverse), mask=mask)
    # a row beyond the last one is the bias alone
    note_largest(state_ptr, tl.max(tl.where(valid, tl.max(largest, 1), 0.0), 0))


def _norm_quantize_fake(x, residual, weight, bias, state, eps):
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return _e4m3_like(x), torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@register(
    "norm_quantize(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor(a!) state, float eps)"
    " -> (Tensor values, Tensor sum)",
    _norm_quantize_fake,
)
def _norm_quantize(x, residual, weight, bias, state, eps):
    M, K = x.shape
    chunks, config = row_chunks("norm_quantize", x, residual)
    values, total = _norm_quantize_fake(x, residual, weight, bias, state, eps)
    x, residual = dense_rows(x), dense_rows(residual)
    launch(
        _norm_quantize_kernel, -(-M // config.rows), x,
        x, residual, weight.contiguous(), bias.contiguous(), state, values, total,
        x.stride(0), residual.stride(0), M, eps, K, *chunks, config.rows,
        num_warps=config.num_warps,
    )  # fmt: skip
    torch.autograd.graph.increment_version(state)
    return values, total


# --- public -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def advance_scales_(states: torch.Tensor, skip: torch.Tensor | None = None) -> None:
    """End a step for the rows of `states` `[n, 8]`, each the state of a `Scaling`: compute the next step's scales.

    A row keeps its scale and history if `skip` (a scalar on the device) is not 0, or if its tensor did not occur in
    this step or was zero or not finite. In training it is called before the optimiser's step, so that a weight that
    the optimiser quantises keeps its scale until the optimiser quantises it again.

    Raises:
        ValueError: the shape or the dtype of the states is another.

    Example::

        states = torch.zeros(1, 8, device="cuda")
        scaling = Scaling(states[0])
        quantize(torch.randn(512, 768, device="cuda"), scaling)
        advance_scales_(states)
    """
    if states.dim() != 2 or states.shape[1] != STATE or states.dtype != torch.float32:
        raise ValueError(f"advance_scales_: states must be float32 [n, {STATE}], got {states.dtype} {[*states.shape]}")
    amax, history = states[:, 1], states[:, 2:]
    counts = (amax > 0) & amax.isfinite()
    if skip is not None:
        counts &= skip == 0
    history = torch.where(counts[:, None], states[:, 1:-1], history)
    scale = torch.where(counts, history.amax(1).clamp_min(LEAST) * (MARGIN / E4M3_MAX), states[:, 0])
    states.copy_(torch.cat([scale[:, None], torch.zeros_like(scale)[:, None], history], 1))


def quantize_reference(x: torch.Tensor, scaling: Scaling | None = None, *, gelu: str | None = None) -> Quantized:
    """Plain PyTorch definition of `quantize`."""
    x = x.detach().float()
    x = x if gelu is None else F.gelu(x, approximate=gelu)
    if scaling is None:
        scale = _present_scale(x)
        return Quantized(round_e4m3(x, scale), scale)
    if not scaling.calibrated:
        scaling.calibrate(x)
    note_largest_(scaling.state, x)
    return Quantized(round_e4m3(x, scaling.scale), scaling.scale)


def quantize(
    x: torch.Tensor, scaling: Scaling | None = None, *, gelu: str | None = None, impl: str = "auto"
) -> Quantized:
    """values = x / scale, clamped to +-448 and rounded to float8 e4m3; x or gelu(x) is computed in float32.

    Args:
        x: bfloat16, float16 or float32 of any shape. The kernel needs compute capability 8.9 or later.
        scaling: gives the scale, and notes max |x| (or max |gelu(x)|), values beyond the clamp included. None: the
            scale is that of the present values, max |x| / 448, which takes two passes.
        gelu: None to quantise x; "none" or "tanh" to quantise gelu(x), as `approximate` of `torch.nn.functional.gelu`.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.

    Returns:
        Values in the shape of x, float8_e4m3fn, and the scale, a float32 scalar, without gradients. The scale is a view
        of the scaling's state.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: dtypes, devices or options are invalid; raised before any launch.

    Example::

        scaling = Scaling(torch.zeros(8, device="cuda"))
        x = torch.randn(512, 768, device="cuda", dtype=torch.bfloat16)
        values, scale = quantize(x, scaling)
    """
    check_tensors("quantize", x=x)
    if not x.is_floating_point() or (scaling is not None and scaling.state.device != x.device):
        raise ValueError(f"quantize: x must be floating point, on the device of its scaling, got {x.dtype} {x.device}")
    if gelu not in GELUS:
        raise ValueError(f"quantize: gelu must be None, 'none' or 'tanh', got {gelu!r}")
    x = x.detach()
    if not use_triton("quantize", impl, x, _unsupported(x)):
        return quantize_reference(x, scaling, gelu=gelu)
    if scaling is None or not scaling.calibrated:
        y = x if gelu is None else F.gelu(x.float(), approximate=gelu)
        if scaling is None:
            scale = _present_scale(y)
            return Quantized(torch.ops.ajepa.quantize(x, scale, None, GELUS.index(gelu)), scale)
        scaling.calibrate(y)
    return Quantized(torch.ops.ajepa.quantize(x, None, scaling.state, GELUS.index(gelu)), scaling.scale)


def norm_quantize_reference(
    x_MK: torch.Tensor,
    residual_MK: torch.Tensor,
    weight_K: torch.Tensor,
    bias_K: torch.Tensor,
    eps: float = 1e-5,
    scaling: Scaling | None = None,
) -> tuple[Quantized, torch.Tensor]:
    """Plain PyTorch definition of `norm_quantize`."""
    x, residual, weight, bias = (t.detach() for t in (x_MK, residual_MK, weight_K, bias_K))
    total = x + residual
    normed = F.layer_norm(total.float(), total.shape[-1:], weight.float(), bias.float(), eps)
    return quantize_reference(normed, scaling), total


def norm_quantize(
    x_MK: torch.Tensor,
    residual_MK: torch.Tensor,
    weight_K: torch.Tensor,
    bias_K: torch.Tensor,
    eps: float = 1e-5,
    scaling: Scaling | None = None,
    *,
    impl: str = "auto",
) -> tuple[Quantized, torch.Tensor]:
    """Returns the normed output of `add_layer_norm`, quantised as by `quantize`, and the sum x + residual.

    Args:
        x_MK, residual_MK: `[M, K]` bfloat16, float16 or float32. The kernel takes K up to 4,096.
        weight_K, bias_K: `[K]`, weight and bias of the layer norm.
        eps: added to the variance.
        scaling, impl: as in `quantize`. Without a scaling, and at its first use, the norm is plain PyTorch's.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices are invalid; raised before any launch.

    Example::

        norm, scaling = torch.nn.LayerNorm(768, device="cuda"), Scaling(torch.zeros(8, device="cuda"))
        x = torch.randn(512, 768, device="cuda", dtype=torch.bfloat16)
        stream = torch.randn(512, 768, device="cuda")
        quantized, stream = norm_quantize(x, stream, norm.weight, norm.bias, norm.eps, scaling)
    """
    given = {"x": x_MK, "residual": residual_MK, "weight": weight_K, "bias": bias_K}
    check_tensors("norm_quantize", **given)
    tensors = tuple(t.detach() for t in given.values())
    x, residual, weight, bias = tensors
    if x.dim() != 2 or residual.shape != x.shape or not weight.shape == bias.shape == x.shape[1:]:
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise ValueError(f"norm_quantize: x, residual must be [M, K] and weight, bias [K], got {shapes}")
    devices = {t.device for t in tensors} | ({scaling.state.device} if scaling is not None else set())
    if len(devices) > 1 or not all(t.is_floating_point() for t in tensors):
        raise ValueError("norm_quantize: all tensors must be floating point and on one device")
    unsupported = "" if 1 <= x.shape[1] <= MAX_WIDTH else f"no kernel for width {x.shape[1]}, only up to {MAX_WIDTH}"
    if not use_triton("norm_quantize", impl, x, unsupported or _unsupported(*tensors)):
        return norm_quantize_reference(x, residual, weight, bias, eps, scaling)
    if scaling is None or not scaling.calibrated:
        total = x + residual
        normed = F.layer_norm(total.float(), total.shape[-1:], weight.float(), bias.float(), eps)
        return quantize(normed, scaling, impl=impl), total
    values, total = torch.ops.ajepa.norm_quantize(*tensors, scaling.state, eps)
    return Quantized(values, scaling.scale), total


def _unsupported(*tensors: torch.Tensor) -> str:
    x = tensors[0]
    for t in tensors:
        if t.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"no kernel for {t.dtype}"
    return "float8 needs compute capability 8.9" if x.is_cuda and arch(x) < 89 else ""


def fp8_linear(
    x: torch.Tensor | Quantized,
    weight_NK: torch.Tensor | Quantized,
    bias_N: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """x W^T + b by one float8 product, torch's `_scaled_mm` with fast accumulation.

    On a CPU the same product is computed from the e4m3 values in float32. It has no backward. The error is about 3 to
    4 % of an output's standard deviation.

    Args:
        x: `[..., K]`, or a `Quantized` of it. K and N must be multiples of 16.
        weight_NK, bias_N: weight and bias of a `torch.nn.Linear`. The weight may be a `Quantized` as well. Tensors are
            quantised here, with the scale of their present values.
        impl: as in `quantize`.

    Returns:
        bfloat16 `[..., N]`.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: K or N is not a multiple of 16, or x and the weight have different K.

    Example::

        with torch.no_grad():
            y = fp8_linear(x, layer.weight, layer.bias)
            z = fp8_linear(quantize(y, gelu="none"), next_layer.weight, next_layer.bias)
    """
    values, weight = (t.values if isinstance(t, Quantized) else t for t in (x, weight_NK))
    check_tensors("fp8_linear", x=values, weight=weight, bias=bias_N)
    (N, K), shape = weight.shape, values.shape
    if K % LANES or N % LANES or shape[-1] != K:
        raise ValueError(
            f"fp8_linear: x must be [..., K] and weight [N, K], with N and K multiples of {LANES}, "
            f"got {list(shape)} and {[N, K]}"
        )
    values, scale = x if isinstance(x, Quantized) else quantize(x, impl=impl)
    weight, weight_scale = weight_NK if isinstance(weight_NK, Quantized) else quantize(weight_NK, impl=impl)
    values = values.reshape(-1, K)
    if values.is_cuda and len(values):
        bias = None if bias_N is None else bias_N.detach().to(torch.bfloat16)
        y = torch._scaled_mm(
            values, weight.T, scale, weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    else:
        with torch.autocast(values.device.type, enabled=False):  # it would round the sums to its dtype
            y = values.float() @ weight.float().T * (scale * weight_scale)
        y = (y if bias_N is None else y + bias_N.detach().to(torch.bfloat16)).to(torch.bfloat16)
    return y.view(*shape[:-1], N)


def fp8_linear_gelu(
    x: Quantized,
    weight_NK: Quantized,
    bias_N: torch.Tensor,
    scaling: Scaling | None = None,
    *,
    impl: str = "auto",
) -> Quantized:
    """gelu(x W^T + b), quantised as by `quantize`, with the exact gelu(z) = z Phi(z).

    On a Hopper GPU with the compiled products (AJEPA_HOPPER), bias, GELU, the note of the largest magnitude and the
    rounding to e4m3 are the epilogue of the product. Elsewhere, without a scaling and at its first use, `quantize`
    follows `fp8_linear`. It has no backward.

    Args:
        x, weight_NK: float8 `[M, K]` and `[N, K]`. K and N must be multiples of 16.
        bias_N: bias of the `torch.nn.Linear`.
        scaling: of the result, as in `quantize`.
        impl: as in `quantize`; "reference" and "triton" are `fp8_linear` and `quantize`.

    Returns:
        float8 `[M, N]` and the scale.

    Raises:
        ValueError: K or N is not a multiple of 16, or x and the weight have different K.

    Example::

        fc1, scaling = torch.nn.Linear(768, 3072, device="cuda"), Scaling(torch.zeros(8, device="cuda"))
        x = torch.randn(512, 768, device="cuda", dtype=torch.bfloat16)
        hidden = fp8_linear_gelu(quantize(x), quantize(fc1.weight), fc1.bias, scaling)
    """
    ready = impl == "auto" and scaling is not None and scaling.calibrated
    if ready and not products.why_not(x.values, (products.FP8,), *weight_NK.values.shape):
        assert scaling is not None
        scales, bias = (x.scale, weight_NK.scale), bias_N.detach().to(torch.bfloat16)
        y = torch.ops.ajepa.fp8_linear_gelu(x.values, weight_NK.values, *scales, bias, None, scaling.state)
        return Quantized(y, scaling.scale)
    return quantize(fp8_linear(x, weight_NK, bias_N, impl=impl), scaling, gelu="none", impl=impl)
