"""Tables of pointers on the device, through which one launch updates many tensors."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ajepa_kernels._triton import jit, tl

BLOCK = 1024  # elements of a tensor in flight in a program
CHUNK = 4 * BLOCK  # elements that a program updates
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int16)  # int16: the remainder of a bfloat16


class Table(NamedTuple):
    """One row of int64 for each tensor to update; its first column is the first of the chunks that it is cut into."""

    rows: torch.Tensor
    chunk_row: torch.Tensor  # int32, the row of each chunk
    done: torch.Tensor  # int32, of each row the chunks that a launch has updated; zero between launches


class _Made(NamedTuple):
    value: tuple[torch.Tensor, ...]
    ready: torch.cuda.Event | None  # after the copies to the device
    streams: set[int]  # whose launches read it


_cached: OrderedDict[tuple, _Made] = OrderedDict()
_captured: list[tuple[StorageWeakRef, Any]] = []


def _capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _keep(value: Any, x: torch.Tensor) -> None:
    """For graphs that hold its address: none is replayed once the memory of `x`, which they write, is gone."""
    owner = StorageWeakRef(x.untyped_storage())
    _captured[:] = [(o, v) for o, v in _captured if not o.expired() and not (v is value and o == owner)]
    _captured.append((owner, value))


def cached(key: tuple, make: Callable[[], tuple[torch.Tensor, ...]], x: torch.Tensor) -> Any:
    """`make()`, tensors that launches read; or what it made for an equal `key` lately.

    x: a tensor that the launch writes.
    """
    capturing = _capturing(x)
    if capturing and key not in _cached:
        return make()  # filled by the graph's replays alone, so no one else's to read; the memory is the graph's
    made = _cached.pop(key, None)
    stream = None if capturing or not x.is_cuda else torch.cuda.current_stream(x.device)
    if made is None:
        value = make()
        made = _Made(value, None if stream is None else stream.record_event(), set())
    _cached[key] = made
    if len(_cached) > 32:
        _cached.popitem(last=False)
    if capturing:
        _keep(made.value, x)  # ready: before it captures, torch.cuda.graph waits for the device
    elif stream is not None and stream.cuda_stream not in made.streams:
        assert made.ready is not None
        stream.wait_event(made.ready)  # another stream may have made it
        made.streams.add(stream.cuda_stream)
        for tensor in made.value:  # when evicted, their memory waits for every stream that read it
            tensor.record_stream(stream)
    return made.value


def to_device(host: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`host` on the device of `x`, without waiting for it."""
    if not x.is_cuda:
        return host
    host = host.pin_memory()
    if _capturing(x):
        _keep(host, x)  # a replay copies from it again
    return host.to(x.device, non_blocking=True)


def table(rows: Sequence[Sequence[int]], x: torch.Tensor) -> Table:
    """`rows`: pointers and other numbers of each tensor, its size last."""
    chunks = [max(-(-row[-1] // CHUNK), 1) for row in rows]  # an empty tensor's step counts, too
    first = itertools.accumulate(chunks, initial=0)
    numbered = [(chunk, *row) for chunk, row in zip(first, rows, strict=False)]
    row = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(chunks))
    return Table(
        to_device(torch.tensor(numbered, dtype=torch.int64), x),
        to_device(row, x),
        torch.zeros(len(rows), dtype=torch.int32, device=x.device),
    )


def is_aligned(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Fit for 16-byte accesses: a tensor that is not goes to a launch of its own."""
    return all(x is None or (x.data_ptr() % 16 == 0 and x.numel() % 16 == 0) for x in tensors)


def _axes(x: torch.Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the axes that have a stride."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements fill their memory, whatever the order of the axes: kernels take them as they lie there."""
    end = 1
    for stride, size in sorted(_axes(x)):
        if stride != end:
            return False
        end *= size
    return True


def unsupported(rows: Iterable[Sequence[torch.Tensor | None]]) -> str:
    """Why no kernel can update these together, a row's tensors element by element; empty where one can."""
    device = None
    for row in rows:
        first = None
        for x in row:
            if x is None:
                continue
            device = x.device if device is None else device
            if x.dtype not in KERNEL_DTYPES:
                return f"no kernel for {x.dtype}"
            if x.device != device:
                return "the tensors are on several devices"
            if is_traceable_wrapper_subclass(x):
                return f"no kernel for {type(x).__name__}"
            first = x if first is None else first
            if not (x.is_contiguous() and first.is_contiguous()):
                if not _is_dense(x):
                    return "a tensor is not dense in its memory"
                if _axes(x) != _axes(first):
                    return "tensors to update together have other strides"
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
