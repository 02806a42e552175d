"""8-bit floats with a scale a row: products for networks that need no gradient, such as an EMA target encoder.

Shapes: M rows (all leading axes), K input and N output features.
"""

from __future__ import annotations

import torch

from ajepa_kernels._triton import arch, dense_rows, jit, launch, power_of_2, register, tl, use_triton

E4M3_MAX = 448.0
LEAST = 1e-12  # largest magnitude of a row of zeros, instead of zero
MAX_WIDTH = 8192
LANES = 16  # `torch._scaled_mm` takes multiples of it


@jit
def _quantize_rows_kernel(
    x_ptr, out_ptr, scale_ptr, stride, M, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)[None, :]
    valid = row < M
    mask = valid[:, None] if K == BLOCK_K else valid[:, None] & (k < K)
    x = tl.load(x_ptr + row[:, None] * stride + k, mask=mask, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-12) * (1.0 / 448.0)
    x = x * (1.0 / scale)[:, None]
    x = tl.minimum(tl.maximum(x, -448.0), 448.0)  # rounding may pass the largest number
    tl.store(out_ptr + row[:, None] * K + k, x.to(tl.float8e4nv), mask=mask)
    tl.store(scale_ptr + row, scale, mask=valid)


def _quantize_rows_fake(x):
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)


@register("quantize_rows(Tensor x) -> (Tensor values, Tensor scale)", _quantize_rows_fake)
def _quantize_rows(x):
    M, K = x.shape
    block_k = power_of_2(K)
    rows = max(1, min(4096 // block_k, 16))
    values = torch.empty(M, K, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(M, 1, dtype=torch.float32, device=x.device)
    x = dense_rows(x)
    launch(_quantize_rows_kernel, -(-M // rows), x, x, values, scale, x.stride(0), M, K, block_k, rows, num_warps=8)
    return values, scale


def quantize_rows_reference(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch definition of `quantize_rows`."""
    x = x_MK.float()
    scale = x.abs().amax(-1, keepdim=True).clamp_min(LEAST) * (1.0 / E4M3_MAX)
    return (x * (1.0 / scale)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def quantize_rows(x_MK: torch.Tensor, *, impl: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """scale = max |row| / 448; values = x / scale, rounded to float8 e4m3.

    Args:
        x_MK: `[M, K]` bfloat16, float16 or float32; K up to 8,192 has a kernel, on compute capability 8.9 and later.
        impl: "auto" (Triton on a GPU where it can, aloud once where it cannot), "triton" or "reference".

    Returns:
        `[M, K]` float8_e4m3fn and `[M, 1]` float32; a row of zeros has values of zero. No gradient.

    Raises:
        ValueError: shapes or dtypes that cannot be, before any launch.
    """
    if x_MK.dim() != 2 or not x_MK.is_floating_point():
        raise ValueError(f"quantize_rows: [M, K] floating point expected, got {list(x_MK.shape)} {x_MK.dtype}")
    x, unsupported = x_MK.detach(), ""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        unsupported = f"no kernel for {x.dtype}"
    elif not 1 <= x.shape[1] <= MAX_WIDTH:
        unsupported = f"no kernel for width {x.shape[1]}, only up to {MAX_WIDTH}"
    elif x.is_cuda and arch(x) < 89:
        unsupported = "float8 needs compute capability 8.9"
    if use_triton("quantize_rows", impl, x, unsupported):
        return torch.ops.ajepa.quantize_rows(x)
    return quantize_rows_reference(x)


def fp8_linear(
    x: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None, *, impl: str = "auto"
) -> torch.Tensor:
    """x W^T + b by one float8 product: rows of x and of W in e4m3 with a scale each, sums in float32.

    Forward only; relative error about 2 to 4 % of an output's standard deviation. torch's `_scaled_mm` multiplies.

    Args:
        x: `[..., K]`; K and N are multiples of 16.
        weight_NK, bias_N: as of `torch.nn.Linear`.
        impl: as of `quantize_rows`.

    Returns:
        bfloat16 `[..., N]`.

    Raises:
        ValueError: K or N are no multiples of 16.

    Example::

        with torch.no_grad():
            y = fp8_linear(x, layer.weight, layer.bias)
    """
    N, K = weight_NK.shape
    if K % LANES or N % LANES or x.shape[-1] != K:
        raise ValueError(
            f"fp8_linear: x [..., K] and weight [N, K] with N and K multiples of {LANES} expected, "
            f"got {list(x.shape)} and {list(weight_NK.shape)}"
        )
    values, scale = quantize_rows(x.reshape(-1, K), impl=impl)
    weight, weight_scale = quantize_rows(weight_NK, impl=impl)
    bias = None if bias_N is None else bias_N.detach().to(torch.bfloat16)
    if x.is_cuda:
        y = torch._scaled_mm(values, weight.T, scale, weight_scale.T, bias=bias, out_dtype=torch.bfloat16)
    else:  # `_scaled_mm` has scales a row there from torch 2.12 on
        y = (values.float() @ weight.float().T * scale * weight_scale.T).to(torch.bfloat16)
        y = y if bias is None else y + bias
    return y.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y
