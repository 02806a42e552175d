"""Imports Triton if it is installed, chooses between Triton and plain PyTorch, and launches every kernel."""

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
except ImportError:  # the plain PyTorch definitions work without Triton
    triton = tl = None

IMPLS = ("auto", "triton", "reference")
INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton's own switch: kernels run on CPU tensors

library = torch.library.Library("ajepa", "FRAGMENT")

_recorded: list[tuple[Any, tuple, dict]] | None = None  # see record_launches
_recorded_arch = 90
_announced: set[tuple[str, str]] = set()


def jit(fn: Callable) -> Any:
    """`triton.jit`; without Triton, `fn` itself, which is then never launched.

    A kernel must not be recompiled when a count changes between steps, or when a scalar moves within its buffer.
    """
    if triton is None:
        return fn
    names = inspect.signature(fn).parameters.keys()
    counts = {"T", "M", "slots", "tiles", "rows", "samples", "programs", "heads"}
    scalars = {"grad_scale_ptr", "found_inf_ptr", "decay_ptr"}
    return triton.jit(
        fn, do_not_specialize=sorted(counts & names), do_not_specialize_on_alignment=sorted(scalars & names)
    )


def register(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Defines `ajepa::<schema>` and its fake kernel. The decorated launcher serves CUDA, and the interpreter on CPU."""
    library.define(schema)
    name = schema[: schema.index("(")]

    def decorate(launcher: Callable) -> Callable:
        for key in ("CUDA", "CPU"):
            library.impl(name, launcher, key)
        torch.library.register_fake(f"ajepa::{name}", fake, lib=library)
        return launcher

    return decorate


def constant(fn: Callable) -> Any:
    """`torch.compiler.assume_constant_result` without its import of torch._dynamo, which adds 1.5 s to every start."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


# --- which implementation -----------------------------------------------------------------------------------------


def cannot_launch(x: torch.Tensor) -> str:
    """The reason why no kernel can run on `x`; empty if one can."""
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
    """Whether `op` launches its kernel on `x`. `unsupported`: why the kernel cannot take these arguments, or empty."""
    check_impl(op, impl)
    if impl == "reference" or (impl == "auto" and not x.is_cuda and _recorded is None):
        return False
    why_not = cannot_launch(x) or unsupported
    if impl == "triton" and why_not:
        raise ValueError(f"{op}: impl='triton' is impossible: {why_not}; use impl='auto' or 'reference'")
    if why_not:
        _announce(op, why_not)
    return not why_not


@constant  # under torch.compile the warning is given while tracing, without a graph break
def _announce(op: str, why_not: str) -> None:
    if (op, why_not) not in _announced:
        _announced.add((op, why_not))
        warnings.warn(f"ajepa_kernels.{op} runs as plain PyTorch on this GPU: {why_not}", stacklevel=4)


# --- launching ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def record_launches(arch: int) -> Iterator[list[tuple[Any, tuple, dict]]]:
    """Collects the launches for a GPU of compute capability `arch` (90 for Hopper) instead of performing them.

    Launchers then accept `meta` tensors, which is how the tests compile every shipped kernel without a GPU.
    `impl="auto"` then also chooses the kernels for CPU tensors, so that the launches of a whole model can be collected.
    """
    global _recorded, _recorded_arch
    _recorded, _recorded_arch = [], arch
    try:
        yield _recorded
    finally:
        _recorded = None


def launch(kernel: Any, programs: int, x: torch.Tensor, *args: Any, **options: Any) -> None:
    """Launches `kernel` on the device and current stream of `x`. `args` follow its signature, constexprs included."""
    if programs == 0:
        return
    if _recorded is not None:
        _recorded.append((kernel, args, options))
        return
    if why_not := cannot_launch(x):
        raise RuntimeError(f"{kernel.__name__} cannot be launched: {why_not}")
    # Triton launches on the current device, which may not be the tensors' device
    with torch.cuda.device_of(x) if x.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](*args, **options)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@constant  # torch.compile cannot trace the query of the device
def _device_arch(index: int) -> int:
    return _capability(index)


@functools.cache
def _device_multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def arch(x: torch.Tensor) -> int:
    """10 x the compute capability of x's GPU; without a GPU, that of `record_launches`, or Hopper's."""
    return _device_arch(x.device.index) if x.is_cuda else _recorded_arch


def multiprocessors(x: torch.Tensor) -> int:
    return _device_multiprocessors(x.device.index) if x.is_cuda else 2


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` `[M, C]` with contiguous rows, as the row kernels need. The stride between rows may have any value."""
    return x if x.stride(1) == 1 else x.contiguous()


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()
