"""Tables of pointers on the device, through which one launch updates many tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ajepa_kernels._triton import jit, tl

BLOCK = 1024  # elements of a tensor in flight in a program
CHUNK = 4 * BLOCK  # elements that a program updates
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Table(NamedTuple):
    """One row of int64 for each tensor to update; its first column is the first of the chunks that it is cut into."""

    rows: torch.Tensor
    chunk_row: torch.Tensor  # int32, the row of each chunk
    counter: torch.Tensor  # int32, zero between launches


_cached: OrderedDict[tuple, tuple[tuple[torch.Tensor, ...], set[int]]] = OrderedDict()
_captured: list = []  # a graph holds their addresses for as long as it may be replayed


def cached(key: tuple, make: Callable[[], tuple[torch.Tensor, ...]], device: torch.device) -> Any:
    """`make()`, tensors on the device that launches read; or what it made for an equal `key` lately."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    value, streams = _cached.pop(key) if key in _cached else (make(), set())
    if capturing:
        _captured.append(value)
        if not streams:  # made here: filled by the graph's replays alone, so no one else's to read
            return value
    _cached[key] = value, streams
    if len(_cached) > 32:
        _cached.popitem(last=False)
    if device.type == "cuda" and not capturing:
        stream = torch.cuda.current_stream(device)
        if stream.cuda_stream not in streams:  # when evicted, their memory waits for every stream that read it
            streams.add(stream.cuda_stream)
            for x in value:
                x.record_stream(stream)
    return value


def to_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`values` on the device, without waiting for it."""
    host = torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host
    host = host.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)  # a replay copies from it again
    return host.to(device, non_blocking=True)


def table(rows: Iterable[Sequence[int]], device: torch.device) -> Table:
    """`rows`: pointers and other numbers of each tensor, its size last."""
    chunk_row: list[int] = []
    numbered = []
    for i, row in enumerate(rows):
        numbered.append([len(chunk_row), *row])
        chunk_row += [i] * -(-row[-1] // CHUNK)
    return Table(
        to_device(numbered, torch.int64, device),
        to_device(chunk_row, torch.int32, device),
        torch.zeros((), dtype=torch.int32, device=device),
    )


def is_aligned(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Fit for 16-byte accesses: a tensor that is not goes to a launch of its own."""
    return all(x is None or (x.data_ptr() % 16 == 0 and x.numel() % 16 == 0) for x in tensors)


def unsupported(tensors: Iterable[torch.Tensor]) -> str:
    """Why no kernel can update these together; empty where one can."""
    device = None
    for x in tensors:
        device = x.device if device is None else device
        if x.dtype not in KERNEL_DTYPES:
            return f"no kernel for {x.dtype}"
        if x.device != device:
            return "the tensors are on several devices"
        if not x.is_contiguous():
            return "a tensor is not contiguous"
        if is_traceable_wrapper_subclass(x):
            return f"no kernel for {type(x).__name__}"
    return ""


def tl_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


@jit
def load_pointer(table_ptr, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(dtype))
    if ALIGNED:  # else the accesses would be one element wide
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def load_size(size_ptr, ALIGNED: tl.constexpr):
    size = tl.load(size_ptr)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return size
