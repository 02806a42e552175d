"""Tables of pointers on the device, with which one launch updates many tensors."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ajepa_kernels._triton import jit, tl

BLOCK = 1024  # elements that a program updates at a time
CHUNK = 4 * BLOCK  # elements that a program updates in all
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int16)  # int16: the remainder of a bfloat16


class Table(NamedTuple):
    """The tensors that one launch updates, one row for each. A tensor is cut into chunks, one for each program."""

    rows: torch.Tensor  # int64; the first column is the number of the row's first chunk
    chunk_row: torch.Tensor  # int32, the row of each chunk
    done: torch.Tensor  # int32, how many chunks of each row a launch has updated; zero between launches


class _Made(NamedTuple):
    value: tuple[torch.Tensor, ...]
    ready: torch.cuda.Event | None  # recorded after the copies to the device
    streams: set[int]  # the streams whose launches read the value


_cached: OrderedDict[tuple, _Made] = OrderedDict()
_captured: list[tuple[StorageWeakRef, Any]] = []


def capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _keep(value: Any, x: torch.Tensor) -> None:
    """Keeps `value` alive for captured graphs that hold its address, until the memory of `x` is freed.

    The graphs write `x`, so none of them is replayed after that.
    """
    owner = StorageWeakRef(x.untyped_storage())
    _captured[:] = [(o, v) for o, v in _captured if not o.expired() and not (v is value and o == owner)]
    _captured.append((owner, value))


def cached(key: tuple, make: Callable[[], tuple[torch.Tensor, ...]], x: torch.Tensor) -> Any:
    """Returns `make()`, tensors that launches read, or the result of a recent call with an equal `key`.

    x: a tensor that the launch writes.
    """
    captured = capturing(x)
    if captured and key not in _cached:
        return make()  # not cached: only replays fill these tensors, and the graph owns their memory
    made = _cached.pop(key, None)
    stream = None if captured or not x.is_cuda else torch.cuda.current_stream(x.device)
    if made is None:
        value = make()
        made = _Made(value, None if stream is None else stream.record_event(), set())
    _cached[key] = made
    if len(_cached) > 32:
        _cached.popitem(last=False)
    if captured:
        _keep(made.value, x)  # needs no wait: torch.cuda.graph synchronizes the device before it captures
    elif stream is not None and stream.cuda_stream not in made.streams:
        assert made.ready is not None
        stream.wait_event(made.ready)  # the copies may be on another stream
        made.streams.add(stream.cuda_stream)
        for tensor in made.value:  # after eviction, the memory is reused only when these streams have read it
            tensor.record_stream(stream)
    return made.value


def to_device(host: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Copies `host` to the device of `x` without waiting for the copy."""
    if not x.is_cuda:
        return host
    host = host.pin_memory()
    if capturing(x):
        _keep(host, x)  # each replay copies from it again
    return host.to(x.device, non_blocking=True)


def table(rows: Sequence[Sequence[int]], x: torch.Tensor) -> Table:
    """Builds a `Table` from `rows`: the pointers and other numbers of each tensor, with its size last."""
    chunks = [max(-(-row[-1] // CHUNK), 1) for row in rows]  # an empty tensor also needs a program to count its step
    first = itertools.accumulate(chunks, initial=0)
    numbered = [(chunk, *row) for chunk, row in zip(first, rows, strict=False)]
    row = torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(chunks))
    return Table(
        to_device(torch.tensor(numbered, dtype=torch.int64), x),
        to_device(row, x),
        torch.zeros(len(rows), dtype=torch.int32, device=x.device),
    )


def is_aligned(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether all tensors allow 16-byte accesses. Other tensors are updated in a launch of their own."""
    return all(x is None or (x.data_ptr() % 16 == 0 and x.numel() % 16 == 0) for x in tensors)


def split_alike(rows: Iterable[Sequence[torch.Tensor | None]]) -> bool:
    """Whether the tensors of each row are DTensors that are split alike over the ranks, or none is one. An update
    element by element is then that of the parts."""
    for row in rows:
        splits = {(getattr(x, "device_mesh", None), getattr(x, "placements", ())) for x in row if x is not None}
        if len(splits) > 1 or any(placement.is_partial() for _, placements in splits for placement in placements):
            return False
    return True


def own_part(x: Any) -> Any:
    """The part of a DTensor that this rank holds; anything else as it is."""
    return getattr(x, "_local_tensor", x)


def _axes(x: torch.Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the axes that have a stride."""
    return [(stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements have no gaps in memory, in any order of the axes. Kernels process them in memory order."""
    end = 1
    for stride, size in sorted(_axes(x)):
        if stride != end:
            return False
        end *= size
    return True


def all_tensors(op: str, name: str, xs: Iterable[Any]) -> None:
    """Raises TypeError for the first of `xs` that is not a tensor."""
    for i, x in enumerate(xs):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{op}: number {i} of {name} must be a torch.Tensor, got {type(x).__name__}")


def unsupported(rows: Iterable[Sequence[torch.Tensor | None]], dtypes: Sequence[torch.dtype] = KERNEL_DTYPES) -> str:
    """The reason why no kernel can update the tensors of each row element by element; empty if one can."""
    device = None
    for row in rows:
        first = None
        for x in row:
            if x is None:
                continue
            device = x.device if device is None else device
            if x.dtype not in dtypes:
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
                    return "tensors that are updated together have different strides"
    return ""


def tl_dtype(dtype: torch.dtype) -> Any:
    return tl.float8e4nv if dtype == torch.float8_e4m3fn else getattr(tl, str(dtype).removeprefix("torch."))


@jit
def load_pointer(table_ptr, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(dtype))
    if ALIGNED:  # without this hint, each access is one element wide
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def load_size(size_ptr, ALIGNED: tl.constexpr):
    size = tl.load(size_ptr)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return size
