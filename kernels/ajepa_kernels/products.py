"""Matrix products that also do what follows them: bias and GELU, GELU's gradient, or bias and residual.

On a Hopper GPU each is one kernel, whose epilogue runs while the next tile is multiplied (csrc/hopper). Elsewhere, and
without the compiled kernels, the ops run their plain definitions. Shapes: M rows, K and N widths.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from ajepa_kernels import _hopper
from ajepa_kernels._triton import library

NOTHING, Z, SLOPE = range(3)  # what `linear_gelu` keeps for backward
FORWARD = {NOTHING: "linear_gelu", Z: "linear_gelu_keep", SLOPE: "linear_gelu_slope"}
BACKWARD = {Z: "linear_dgelu", SLOPE: "linear_dslope"}
RESIDUAL = "linear_residual"
ALL = (*FORWARD.values(), *BACKWARD.values(), RESIDUAL)  # of bfloat16
FP8 = "linear_gelu_fp8"
_E4M3_MAX = 448.0


def why_not(x: torch.Tensor, names: tuple[str, ...], *widths: int) -> str:
    """The reason why a GPU's kernels `names` cannot compute these products of `x`; empty if they can.

    Args:
        x: an operand, of which device and dtype count.
        names: of `FORWARD`, `BACKWARD` and `RESIDUAL`, or `FP8` alone.
        widths: K and N of the products.
    """
    dtype = torch.float8_e4m3fn if FP8 in names else torch.bfloat16
    return _hopper.why_not(x, names, *widths, dtype=dtype)


def _fused(op: str, name: str, x: torch.Tensor, *widths: int) -> bool:
    reason = why_not(x, (name,), *widths)
    if reason:
        _hopper.announce(op, reason)
    return not reason


def gelu_slope(z: torch.Tensor) -> torch.Tensor:
    """The derivative of the exact GELU: Phi(z) + z phi(z)."""
    return (1 + torch.erf(z * math.sqrt(0.5))) / 2 + z * torch.exp(-z * z / 2) * (2 * math.pi) ** -0.5


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dy^T x in the weight's dtype. On a GPU a float32 result is the product's float32 sums, without rounding."""
    if dy.is_cuda and dy.dtype != dtype == torch.float32:
        return torch.mm(dy.T, x, out_dtype=dtype)
    return (dy.T @ x).to(dtype)


def operands(op: str, x: torch.Tensor, params: dict[str, torch.Tensor], copies: Any, residual: Any) -> tuple:
    """Checks what the ops with copies and a residual share. Returns x and the parameters in the products' dtype.

    That is the copies' dtype, else autocast's, else x's. The last parameter is the bias of the output.
    """
    own, shape = tuple(params.values()), [*x.shape[:-1], *next(reversed(params.values())).shape]
    if copies is not None and [c.shape for c in copies] != [p.shape for p in own]:
        raise ValueError(f"{op}: copies must be {len(own)} tensors of the shapes of {', '.join(params)}")
    if residual is not None and list(residual.shape) != shape:
        raise ValueError(f"{op}: the residual must be {shape}, got {list(residual.shape)}")
    tensors = (x, *own, *(copies or ()), *(() if residual is None else (residual,)))
    if any(t.device != x.device or not t.is_floating_point() for t in tensors):
        raise ValueError(f"{op}: all tensors must be floating point and on one device")
    dtype = x.dtype if copies is None else copies[0].dtype
    if any(c.dtype != dtype for c in copies or ()):
        raise ValueError(f"{op}: copies must share a dtype")
    if copies is None and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), own if copies is not None else tuple(p.to(dtype) for p in own)


# --- bias and GELU ----------------------------------------------------------------------------------------------------

library.define("linear_gelu(Tensor x, Tensor weight, Tensor bias, int keep) -> (Tensor y, Tensor kept)")


@torch.library.register_fake("ajepa::linear_gelu", lib=library)
def _linear_gelu_fake(x, weight, bias, keep):
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y) if keep else y.new_empty(0)


@torch.library.impl(library, "linear_gelu", "CPU")
def linear_gelu_plain(x, weight, bias, keep):
    """Returns gelu(z), for z = x weight^T + bias and gelu(z) = z Phi(z); and nothing, z or gelu'(z), as `keep` says.

    x `[M, K]`, weight `[N, K]` and bias `[N]` have one dtype, which is that of the results `[M, N]`.
    """
    z = F.linear(x, weight, bias)
    if keep == SLOPE:
        return F.gelu(z), gelu_slope(z.to(_compute_dtype(z))).to(z.dtype)
    return F.gelu(z), z if keep else z.new_empty(0)


def _linear_gelu_fused(x, weight, bias, keep):
    y, kept = _linear_gelu_fake(x, weight, bias, keep)
    if len(x):
        more = {"kept": kept} if keep else {}
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        _hopper.launch(FORWARD[keep], len(weight), x, weight, bias=bias, result=y, **more)
    return y, kept


@torch.library.impl(library, "linear_gelu", "CUDA")
def _linear_gelu_cuda(x, weight, bias, keep):
    fused = _fused("linear_gelu", FORWARD[keep], x, *weight.shape)
    return (_linear_gelu_fused if fused else linear_gelu_plain)(x, weight, bias, keep)


# --- GELU's gradient and the bias gradient ----------------------------------------------------------------------------

library.define("linear_dgelu(Tensor dy, Tensor weight, Tensor kept, bool slope) -> (Tensor dz, Tensor dbias)")


@torch.library.register_fake("ajepa::linear_dgelu", lib=library)
def _linear_dgelu_fake(dy, weight, kept, slope):
    dz = kept.new_empty(kept.shape)
    return dz, dz.new_empty(kept.shape[1], dtype=_compute_dtype(dz))


@torch.library.impl(library, "linear_dgelu", "CPU")
def linear_dgelu_plain(dy, weight, kept, slope):
    """Returns dz = (dy weight) gelu'(z), and its sum over rows in float32 (float64 for float64).

    dy `[M, K]` is the gradient of the next layer's output, and weight `[K, N]` that layer's weight. `kept` `[M, N]` is
    gelu'(z) if `slope`, else z. dz has their dtype.
    """
    dh = dy @ weight
    dz = dh * kept if slope else torch.ops.aten.gelu_backward(dh, kept)
    return dz, dz.sum(0, dtype=_compute_dtype(dz))


def _linear_dgelu_fused(dy, weight, kept, slope):
    dz, dbias = _linear_dgelu_fake(dy, weight, kept, slope)
    if not len(dy):
        return dz, dbias.zero_()
    dy, weight, kept, partial = dy.contiguous(), weight.contiguous(), kept.contiguous(), _hopper.partial_sums(dz)
    name = BACKWARD[SLOPE if slope else Z]
    _hopper.launch(name, weight.shape[1], dy, weight, source=kept, result=dz, partial=partial)
    return dz, torch.sum(partial, 0, out=dbias)


@torch.library.impl(library, "linear_dgelu", "CUDA")
def _linear_dgelu_cuda(dy, weight, kept, slope):
    fused = _fused("linear_dgelu", BACKWARD[SLOPE if slope else Z], dy, *weight.shape)
    return (_linear_dgelu_fused if fused else linear_dgelu_plain)(dy, weight, kept, slope)


# --- bias and residual ------------------------------------------------------------------------------------------------

library.define("linear_residual(Tensor x, Tensor weight, Tensor bias, Tensor residual) -> Tensor")


@torch.library.register_fake("ajepa::linear_residual", lib=library)
def _linear_residual_fake(x, weight, bias, residual):
    return residual.new_empty(residual.shape)


@torch.library.impl(library, "linear_residual", "CPU")
def linear_residual_plain(x, weight, bias, residual):
    """Returns residual + x weight^T + bias in the residual's dtype, float32.

    x `[M, K]`, weight `[N, K]` and bias `[N]` have one dtype; the residual is `[M, N]`. The kernel does not round the
    product to that dtype before it adds the residual. This definition does, as plain PyTorch would.
    """
    return residual + F.linear(x, weight, bias)


def _linear_residual_fused(x, weight, bias, residual):
    result = _linear_residual_fake(x, weight, bias, residual)
    if len(x):
        x, weight, bias, residual = (t.contiguous() for t in (x, weight, bias, residual))
        _hopper.launch(RESIDUAL, len(weight), x, weight, bias=bias, source=residual, result=result)
    return result


@torch.library.impl(library, "linear_residual", "CUDA")
def _linear_residual_cuda(x, weight, bias, residual):
    fused = _fused("linear_residual", RESIDUAL, x, *weight.shape)
    return (_linear_residual_fused if fused else linear_residual_plain)(x, weight, bias, residual)


# --- bias and GELU in float8 ------------------------------------------------------------------------------------------

library.define(
    "fp8_linear_gelu(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor bias, Tensor? scale, "
    "Tensor(a!)? state) -> Tensor"
)


@torch.library.register_fake("ajepa::fp8_linear_gelu", lib=library)
def _fp8_linear_gelu_fake(x, weight, x_scale, weight_scale, bias, scale, state):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.impl(library, "fp8_linear_gelu", "CPU")
def fp8_linear_gelu_plain(x, weight, x_scale, weight_scale, bias, scale, state):
    """Returns gelu(x weight^T x_scale weight_scale + bias) / scale, clamped to +-448 and rounded to float8 e4m3.

    x `[M, K]` and weight `[N, K]` are float8_e4m3fn with one scale a tensor, a float32 scalar; bias `[N]` is bfloat16.
    K and N are multiples of 16. Either `scale`, a float32 scalar, or `state` is given: float32 `[8]`, of which the
    first element is the scale, and the second is raised to the largest |gelu(..)|, values beyond the clamp included.
    """
    if x.is_cuda:
        z = torch._scaled_mm(
            x, weight.T, x_scale, weight_scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
        ).float()
    else:
        with torch.autocast(x.device.type, enabled=False):  # it would round the sums to its dtype
            z = x.float() @ weight.float().T * (x_scale * weight_scale) + bias.float()
    y = F.gelu(z)
    if state is not None:
        scale = state[0].clone()
        if y.numel():
            state[1] = torch.maximum(state[1], y.abs().amax())
    return (y * (1.0 / scale)).clamp(-_E4M3_MAX, _E4M3_MAX).to(x.dtype)


def _fp8_linear_gelu_fused(x, weight, x_scale, weight_scale, bias, scale, state):
    result = _fp8_linear_gelu_fake(x, weight, x_scale, weight_scale, bias, scale, state)
    if len(x):
        scalars = {
            "x_scale": x_scale,
            "weight_scale": weight_scale,
            "result_scale": scale if state is None else state[0],
        }
        if state is not None:
            scalars["largest"] = state[1]
        x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
        _hopper.launch(FP8, len(weight), x, weight, bias=bias, result=result, **scalars)
    return result


@torch.library.impl(library, "fp8_linear_gelu", "CUDA")
def _fp8_linear_gelu_cuda(x, weight, x_scale, weight_scale, bias, scale, state):
    fused = _fused("fp8_linear_gelu", FP8, x, *weight.shape)
    result = (_fp8_linear_gelu_fused if fused else fp8_linear_gelu_plain)(
        x, weight, x_scale, weight_scale, bias, scale, state
    )
    if fused and state is not None:
        torch.autograd.graph.increment_version(state)
    return result
