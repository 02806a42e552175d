"""Triton where it is installed, the choice between it and plain PyTorch, and the one place that launches a kernel."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the plain definitions work without it
    triton = tl = None

IMPLS = ("auto", "triton", "reference")
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton's own switch: kernels run on CPU tensors

library = torch.library.Library("ajepa", "FRAGMENT")

_recorded: list[tuple[Any, tuple, dict]] | None = None  # see record_launches
_recorded_arch = 90
_announced: set[tuple[str, str]] = set()


def jit(fn: Callable) -> Any:
    """`triton.jit`, or the function itself where there is no Triton and nothing will launch it.

    Counts that change from step to step must not make it compile anew, nor where in a buffer a scalar lies.
    """
    if triton is None:
        return fn
    names = inspect.signature(fn).parameters.keys()
    counts, scalars = {"T", "M", "slots", "tiles", "rows", "programs"}, {"grad_scale_ptr", "found_inf_ptr", "decay_ptr"}
    return triton.jit(
        fn, do_not_specialize=sorted(counts & names), do_not_specialize_on_alignment=sorted(scalars & names)
    )


def register(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Defines `ajepa::<schema>` with its fake kernel; the decorated launcher serves CUDA, and CPU when interpreted."""
    library.define(schema)
    name = schema[: schema.index("(")]

    def decorate(launcher: Callable) -> Callable:
        for key in ("CUDA", "CPU"):
            library.impl(name, launcher, key)
        torch.library.register_fake(f"ajepa::{name}", fake, lib=library)
        return launcher

    return decorate


def constant(fn: Callable) -> Any:
    """`torch.compiler.assume_constant_result`, which would import torch._dynamo: a second and a half of every start."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


# --- which implementation -----------------------------------------------------------------------------------------


def cannot_launch(x: torch.Tensor) -> str:
    """Why no kernel can run on `x`; empty where one can."""
    if _recorded is not None:
        return ""
    if triton is None:
        return "triton is not installed"
    if x.is_cuda:
        if torch.version.hip is not None:
            return "ROCm is not supported"
        if arch(x) < 80:
            return "the GPU is older than compute capability 8.0"
        return ""
    if x.device.type == "cpu":
        return "" if INTERPRET else "the tensors are on the CPU (TRITON_INTERPRET=1 interprets the kernels there)"
    return f"the tensors are on {x.device.type}"


def check_impl(op: str, impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"{op}: impl must be one of {', '.join(IMPLS)}, got {impl!r}")


def use_triton(op: str, impl: str, x: torch.Tensor, unsupported: str = "") -> bool:
    """Resolves `impl` for `op` on `x`. `unsupported`: why its kernel cannot take these arguments, or empty."""
    check_impl(op, impl)
    if impl == "reference" or (impl == "auto" and not x.is_cuda and _recorded is None):
        return False
    why_not = cannot_launch(x) or unsupported
    if impl == "triton" and why_not:
        raise ValueError(f"{op}: impl='triton' is impossible: {why_not}")
    if why_not:
        _announce(op, why_not)
    return not why_not


@constant  # under torch.compile said while tracing, which it does not break
def _announce(op: str, why_not: str) -> None:
    if (op, why_not) not in _announced:
        _announced.add((op, why_not))
        warnings.warn(f"ajepa_kernels.{op} runs as plain PyTorch on this GPU: {why_not}", stacklevel=4)


# --- launching ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def record_launches(arch: int) -> Iterator[list[tuple[Any, tuple, dict]]]:
    """Collects what would be launched on a GPU of compute capability `arch` (90 for Hopper) instead of launching it.

    Launchers run on `meta` tensors then, which is how every shipped kernel is compiled without a GPU. On CPU tensors
    `impl="auto"` takes the kernels, too, so that whole models show what they launch.
    """
    global _recorded, _recorded_arch
    _recorded, _recorded_arch = [], arch
    try:
        yield _recorded
    finally:
        _recorded = None


def launch(kernel: Any, programs: int, x: torch.Tensor, *args: Any, **options: Any) -> None:
    """Starts `kernel` on the device and current stream of `x`; `args` in the kernel's order, constexprs included."""
    if programs == 0:
        return
    if _recorded is not None:
        _recorded.append((kernel, args, options))
        return
    if why_not := cannot_launch(x):
        raise RuntimeError(f"{kernel.__name__} cannot be launched: {why_not}")
    # Triton launches on the current device, which need not be the tensors'
    with torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*args, **options)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@constant  # of which torch.compile could not trace what it asks
def _device_arch(index: int) -> int:
    return _capability(index)


@functools.cache
def _device_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def arch(x: torch.Tensor) -> int:
    """10 x compute capability of the GPU that `x` is on; Hopper's where `x` is not on a GPU."""
    return _device_arch(x.device.index) if x.is_cuda else _recorded_arch


def multiprocessors(x: torch.Tensor) -> int:
    return _device_multiprocessors(x.device.index) if x.is_cuda else 2


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`[M, C]` whose rows are contiguous, as the row kernels read them; a stride between rows stays."""
    return x if x.stride(1) == 1 else x.contiguous()


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()
