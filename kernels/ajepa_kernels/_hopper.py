"""Loads the fused products that csrc/hopper was compiled to, and calls them on the current stream.

Each library has one C function, `ajepa_product`, and does not depend on torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ajepa_kernels._triton import arch, constant, multiprocessors

FOLDER = Path(__file__).parent / "_hopper"
TILE = 128  # rows of a tile; each of its four warps writes a row of partial column sums
NEXT_WEIGHT = ("linear_dgelu", "linear_dslope")  # the products with the next layer's weight, `[K, n]`
_ALIGNMENT = 16  # bytes, of a row and of where a matrix starts
_ROWS = 2**31 - TILE  # the kernels count rows in 32 bits


class _Call(ctypes.Structure):
    """The struct Call of csrc/hopper/products.cuh."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("m", "n", "k")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "source", "result", "kept", "partial")),
        *((name, ctypes.c_void_p) for name in ("x_scale", "weight_scale", "result_scale", "largest")),
    ]


@functools.cache
def _load(name: str) -> tuple[Callable | None, str]:
    """The function of a library, or None and the reason why there is none."""
    if os.environ.get("AJEPA_HOPPER") == "0":
        return None, "AJEPA_HOPPER=0 disables the fused products"
    path = FOLDER / f"lib{name}.so"
    if not path.exists():
        return None, "the fused products were not built; AJEPA_HOPPER=1 pip install -v shows why"
    try:
        function = ctypes.CDLL(str(path)).ajepa_product
    except (OSError, AttributeError) as error:
        return None, f"{path.name} does not load: {error}"
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.POINTER(_Call), ctypes.c_int, ctypes.c_void_p]
    return function, ""


@constant  # torch.compile cannot trace the loading of a library
def _missing(names: tuple[str, ...]) -> str:
    return next((reason for name in names if (reason := _load(name)[1])), "")


def why_not(x: torch.Tensor, names: tuple[str, ...], *widths: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """The reason why kernels cannot compute these products, which take `dtype`, for `x`; empty if they can."""
    if not x.is_cuda:
        return f"the tensors are on {x.device.type}"
    if torch.version.hip is not None or arch(x) != 90:
        return "the fused products need a Hopper GPU (compute capability 9.0)"
    if x.dtype != dtype:
        return f"the fused products take {dtype}, not {x.dtype}"
    lanes = _ALIGNMENT // dtype.itemsize
    if any(width % lanes or not width for width in widths):
        return f"the fused products need widths that are multiples of {lanes}, got {', '.join(map(str, widths))}"
    return _missing(names)


@constant  # under torch.compile the warning is given while tracing, without a graph break
def announce(op: str, reason: str) -> None:
    """Warns once that an op runs unfused on this GPU, with the reason."""
    _announce(op, reason)


@functools.cache
def _announce(op: str, reason: str) -> None:
    warnings.warn(f"ajepa_kernels.{op} runs unfused on this GPU: {reason}", stacklevel=4)


def partial_sums(result: torch.Tensor) -> torch.Tensor:
    """Uninitialised rows for the column sums of a result `[M, n]`. The kernel writes every element of them."""
    return torch.empty(4 * -(-len(result) // TILE), result.shape[1], dtype=torch.float32, device=result.device)


def launch(name: str, n: int, x: torch.Tensor, weight: torch.Tensor, **others: torch.Tensor) -> None:
    """Computes one product.

    Args:
        name: of the library.
        n: width of the result.
        x: `[M, K]`, M > 0.
        weight: `[n, K]`, or `[K, n]` of the next layer, in x's dtype.
        others: `bias` `[n]` in bfloat16, `source`, `result` and `kept` `[M, n]`, `partial` as from `partial_sums`, and
            the scalars of `linear_gelu_fp8` in float32.

    Raises:
        ValueError: a tensor has another shape or dtype, is not contiguous or not on x's device, or a matrix does not
            start at a multiple of 16 bytes; or there are too many rows.
        RuntimeError: CUTLASS refuses the shape or the launch fails.
    """
    tensors = {"x": x, "weight": weight, **others}
    (m, k), source = x.shape, torch.float32 if name == "linear_residual" else torch.bfloat16
    expected = {
        "x": ((m, k), x.dtype), "weight": ((k, n) if name in NEXT_WEIGHT else (n, k), x.dtype),
        "bias": ((n,), torch.bfloat16), "source": ((m, n), source), "kept": ((m, n), torch.bfloat16),
        "result": ((m, n), source if name == "linear_residual" else x.dtype),
        "partial": ((4 * -(-m // TILE), n), torch.float32),
    }  # fmt: skip
    for which, t in tensors.items():
        shape, dtype = expected.get(which, ((), torch.float32))
        if t.shape != shape or t.dtype != dtype:
            raise ValueError(f"{name}: {which} must be {dtype} {list(shape)}, got {t.dtype} {list(t.shape)}")
        if t.device != x.device or not t.is_contiguous():
            raise ValueError(f"{name}: {which} must be contiguous and on {x.device}")
        if t.data_ptr() % _ALIGNMENT and t.dim() == 2:  # others are read element by element
            raise ValueError(f"{name}: {which} must start at a multiple of 16 bytes, for the tensor memory accelerator")
    if m > _ROWS:
        raise ValueError(f"{name}: at most {_ROWS} rows are supported, got {m}")
    function, reason = _load(name)
    if function is None:
        raise RuntimeError(f"{name} cannot be launched: {reason}")
    call = _Call(m=m, n=n, k=k, **{which: t.data_ptr() for which, t in tensors.items()})
    with torch.cuda.device_of(x):  # CUTLASS launches on the current device
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None  # the tests call it on the host
        error = function(ctypes.byref(call), multiprocessors(x), stream)
    if error is not None:
        raise RuntimeError(f"{name}: {error.decode()} for {m} rows of {k} to {n}")
