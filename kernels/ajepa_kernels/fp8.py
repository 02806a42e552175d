"""Matrix products in 8-bit floats with one scale per row, for networks without gradients, such as a target encoder.

The layer norm or GELU before such a product quantises its own output, which saves a pass over memory.
Shapes: M rows (all leading axes), K input and N output features.
"""

# Triton kernels build tuples inside static loops, which mypy cannot type.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ajepa_kernels._chunks import MAX_WIDTH as MAX_NORM_WIDTH
from ajepa_kernels._chunks import centre, channels, chunk, load_vector, row_chunks
from ajepa_kernels._triton import arch, dense_rows, jit, launch, register, tl, use_triton
from ajepa_kernels.bias_gelu import _gelu
from ajepa_kernels.layer_norm import sum_rows

E4M3_MAX = 448.0
LEAST = 1e-12  # lower limit of a row's largest magnitude, so that the scale of a row of zeros is not zero
MAX_WIDTH = 8192
LANES = 16  # `torch._scaled_mm` takes only widths that are multiples of this
GELUS = (None, "none", "tanh")  # None for no GELU, else `approximate` of torch.nn.functional.gelu


class Quantized(NamedTuple):
    """The matrix values x scale."""

    values: torch.Tensor  # float8_e4m3fn [..., K]
    scale: torch.Tensor  # float32 [..., 1]

    def rows(self, index: torch.Tensor) -> Quantized:
        bits = self.values.view(torch.uint8).index_select(0, index)  # torch has no index_select for float8
        return Quantized(bits.view(torch.float8_e4m3fn), self.scale.index_select(0, index))


@jit
def _store_quantized(
    out_ptr, scale_ptr, chunks, row, valid,
    K: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Quantises and stores rows. Their `chunks` are zero beyond channel K."""
    largest = tl.abs(chunks[0])
    for i in tl.static_range(1, COUNT):
        largest = tl.maximum(largest, tl.abs(chunks[i]))
    scale = tl.maximum(tl.max(largest, 1), 1e-12) * (1.0 / 448.0)
    inverse = (1.0 / scale)[:, None]
    for i in tl.static_range(COUNT):
        k, mask = chunk(i, valid, K, WIDTH, VECTOR)
        x = tl.minimum(tl.maximum(chunks[i] * inverse, -448.0), 448.0)  # rounding may exceed the largest number
        tl.store(out_ptr + row[:, None] * K + k, x.to(tl.float8e4nv), mask=mask)
    tl.store(scale_ptr + row, scale, mask=valid)


@jit
def _quantize_rows_kernel(
    x_ptr, out_ptr, scale_ptr, stride, M,
    K: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    GELU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < M
    chunks = ()
    for i in tl.static_range(COUNT):
        k, mask = chunk(i, valid, K, WIDTH, VECTOR)
        x = tl.load(x_ptr + row[:, None] * stride + k, mask=mask, other=0.0).to(tl.float32)
        if GELU:
            cdf, _ = _gelu(x, GELU == 2)
            x = x * cdf
        chunks += (x,)
    _store_quantized(out_ptr, scale_ptr, chunks, row, valid, K, WIDTH, COUNT, VECTOR)


def _quantized_like(x):
    return torch.empty_like(x, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format), x.new_empty(
        len(x), 1, dtype=torch.float32
    )


@register("quantize_rows(Tensor x, int gelu) -> (Tensor values, Tensor scale)", lambda x, gelu: _quantized_like(x))
def _quantize_rows(x, gelu):
    """gelu: index in GELUS of the GELU that is applied to x."""
    M, K = x.shape
    chunks, config = row_chunks("quantize_rows", x)
    values, scale = _quantized_like(x)
    x = dense_rows(x)
    launch(
        _quantize_rows_kernel, -(-M // config.rows), x,
        x, values, scale, x.stride(0), M, K, *chunks, config.rows, gelu, num_warps=config.num_warps,
    )  # fmt: skip
    return values, scale


@jit
def _norm_quantize_rows_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, scale_ptr, sum_ptr, stride_x, stride_r, M, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < M
    sums = sum_rows(x_ptr, residual_ptr, sum_ptr, stride_x, stride_r, row, row, valid, K, WIDTH, COUNT, VECTOR)
    centred, _, rstd = centre(sums, eps, K, WIDTH, COUNT, VECTOR)
    chunks = ()
    for i in tl.static_range(COUNT):
        k = channels(i, WIDTH, VECTOR)
        weight, bias = load_vector(weight_ptr, k, K, ROWS), load_vector(bias_ptr, k, K, ROWS)
        chunks += (centred[i] * rstd[:, None] * weight + bias,)
    _store_quantized(out_ptr, scale_ptr, chunks, row, valid, K, WIDTH, COUNT, VECTOR)


def _norm_quantize_rows_fake(x, residual, weight, bias, eps):
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return *_quantized_like(x), torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@register(
    "norm_quantize_rows(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor values, Tensor scale, Tensor sum)",
    _norm_quantize_rows_fake,
)
def _norm_quantize_rows(x, residual, weight, bias, eps):
    M, K = x.shape
    chunks, config = row_chunks("norm_quantize_rows", x, residual)
    values, scale, total = _norm_quantize_rows_fake(x, residual, weight, bias, eps)
    x, residual = dense_rows(x), dense_rows(residual)
    launch(
        _norm_quantize_rows_kernel, -(-M // config.rows), x,
        x, residual, weight.contiguous(), bias.contiguous(), values, scale, total,
        x.stride(0), residual.stride(0), M, eps, K, *chunks, config.rows,
        num_warps=config.num_warps,
    )  # fmt: skip
    return values, scale, total


# --- public -----------------------------------------------------------------------------------------------------------


def quantize_rows_reference(x_MK: torch.Tensor, *, gelu: str | None = None) -> Quantized:
    """Plain PyTorch definition of `quantize_rows`."""
    x = x_MK.float()
    x = x if gelu is None else F.gelu(x, approximate=gelu)
    scale = x.abs().amax(-1, keepdim=True).clamp_min(LEAST) * (1.0 / E4M3_MAX)
    return Quantized((x * (1.0 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale)


def quantize_rows(x_MK: torch.Tensor, *, gelu: str | None = None, impl: str = "auto") -> Quantized:
    """scale = max |row| / 448; values = x / scale, rounded to float8 e4m3; x or gelu(x) is computed in float32.

    Args:
        x_MK: `[M, K]` bfloat16, float16 or float32. The kernel takes K up to 8,192, on compute capability 8.9 up.
        gelu: None to quantise x; "none" or "tanh" to quantise gelu(x), as `approximate` of `torch.nn.functional.gelu`.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.

    Returns:
        Values `[M, K]` float8_e4m3fn and scale `[M, 1]` float32, without gradients. A row of zeros has values of zero.

    Raises:
        ValueError: shapes, dtypes or options are invalid; raised before any launch.

    Example::

        x = torch.randn(512, 768, device="cuda", dtype=torch.bfloat16)
        values, scale = quantize_rows(x)
    """
    if x_MK.dim() != 2 or not x_MK.is_floating_point():
        raise ValueError(f"quantize_rows: x must be floating point [M, K], got {list(x_MK.shape)} {x_MK.dtype}")
    if gelu not in GELUS:
        raise ValueError(f"quantize_rows: gelu must be None, 'none' or 'tanh', got {gelu!r}")
    x = x_MK.detach()
    if use_triton("quantize_rows", impl, x, _unsupported((x,), MAX_WIDTH)):
        return Quantized(*torch.ops.ajepa.quantize_rows(x, GELUS.index(gelu)))
    return quantize_rows_reference(x, gelu=gelu)


def norm_quantize_rows(
    x_MK: torch.Tensor,
    residual_MK: torch.Tensor,
    weight_K: torch.Tensor,
    bias_K: torch.Tensor,
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> tuple[Quantized, torch.Tensor]:
    """Returns the normed output of `add_layer_norm`, quantised as by `quantize_rows`, and the sum x + residual.

    Args:
        x_MK, residual_MK: `[M, K]` bfloat16, float16 or float32. The kernel takes K up to 4,096.
        weight_K, bias_K: `[K]`, weight and bias of the layer norm.
        eps: added to the variance.
        impl: as in `quantize_rows`.

    Raises:
        ValueError: shapes or dtypes are invalid; raised before any launch.

    Example::

        norm = torch.nn.LayerNorm(768, device="cuda")
        x = torch.randn(512, 768, device="cuda", dtype=torch.bfloat16)
        stream = torch.randn(512, 768, device="cuda")
        quantized, stream = norm_quantize_rows(x, stream, norm.weight, norm.bias, norm.eps)
    """
    tensors = tuple(t.detach() for t in (x_MK, residual_MK, weight_K, bias_K))
    x, residual, weight, bias = tensors
    if x.dim() != 2 or residual.shape != x.shape or not weight.shape == bias.shape == x.shape[1:]:
        shapes = ", ".join(str(list(t.shape)) for t in tensors)
        raise ValueError(f"norm_quantize_rows: x, residual must be [M, K] and weight, bias [K], got {shapes}")
    if any(t.device != x.device or not t.is_floating_point() for t in tensors):
        raise ValueError("norm_quantize_rows: all tensors must be floating point and on one device")
    if use_triton("norm_quantize_rows", impl, x, _unsupported(tensors, MAX_NORM_WIDTH)):
        values, scale, total = torch.ops.ajepa.norm_quantize_rows(x, residual, weight, bias, eps)
        return Quantized(values, scale), total
    total = x + residual
    normed = F.layer_norm(total.float(), total.shape[-1:], weight.float(), bias.float(), eps)
    return quantize_rows_reference(normed), total


def _unsupported(tensors: tuple[torch.Tensor, ...], widest: int) -> str:
    x = tensors[0]
    if any(t.dtype not in (torch.float32, torch.float16, torch.bfloat16) for t in tensors):
        return f"no kernel for {x.dtype}"
    if not 1 <= x.shape[1] <= widest:
        return f"no kernel for width {x.shape[1]}, only up to {widest}"
    return "float8 needs compute capability 8.9" if x.is_cuda and arch(x) < 89 else ""


def fp8_linear(
    x: torch.Tensor | Quantized, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """x W^T + b by one float8 product, torch's `_scaled_mm`. Rows of x and W are e4m3 with a scale; sums are float32.

    It has no backward. The error is about 2 to 4 % of an output's standard deviation.

    Args:
        x: `[..., K]`, or a `Quantized` of it. K and N must be multiples of 16.
        weight_NK, bias_N: weight and bias of a `torch.nn.Linear`.
        impl: as in `quantize_rows`.

    Returns:
        bfloat16 `[..., N]`.

    Raises:
        ValueError: K or N is not a multiple of 16, or x and the weight have different K.

    Example::

        with torch.no_grad():
            y = fp8_linear(x, layer.weight, layer.bias)
            z = fp8_linear(quantize_rows(y, gelu="none"), next_layer.weight, next_layer.bias)
    """
    N, K = weight_NK.shape
    shape = (x.values if isinstance(x, Quantized) else x).shape
    if K % LANES or N % LANES or shape[-1] != K:
        raise ValueError(
            f"fp8_linear: x must be [..., K] and weight [N, K], with N and K multiples of {LANES}, "
            f"got {list(shape)} and {list(weight_NK.shape)}"
        )
    values, scale = x if isinstance(x, Quantized) else quantize_rows(x.reshape(-1, K), impl=impl)
    weight, weight_scale = quantize_rows(weight_NK, impl=impl)
    bias = None if bias_N is None else bias_N.detach().to(torch.bfloat16)
    if values.is_cuda:
        y = torch._scaled_mm(values, weight.T, scale, weight_scale.T, bias=bias, out_dtype=torch.bfloat16)
    else:  # on a CPU, `_scaled_mm` has one scale per row only from torch 2.12 on
        y = (values.float() @ weight.float().T * scale * weight_scale.T).to(torch.bfloat16)
        y = y if bias is None else y + bias
    return y.unflatten(0, shape[:-1]) if len(shape) != 2 else y
