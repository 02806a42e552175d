"""Replicated weights: gradients are reduced in flat buckets (`--parallel ddp`), and the update is shared (`zero1`).

A bucket is one tensor that holds the gradients of many parameters, so few collectives reduce them all. A step that runs
eagerly reduces a bucket as soon as backward has filled it. A CUDA graph of forward and backward fills all buckets, and
they are reduced after its replay. Both make the same calls in the same order, so a rank that replays meets a rank that
does not. torch's DistributedDataParallel orders its calls by the first backward pass that it sees, which a rank whose
step is a graph cannot follow. The loss, the logged terms and the scales of float8 ride in the last bucket. The norm of
the mean gradient, with its check for NaN, follows from the reduced buckets without a collective.
"""

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import nn

from ajepa.training.ranks import Ranks, joined_scalars, over_ranks, total_norm

ALIGNED = 128  # elements; tensors in a flat tensor, and the slices of the ranks, begin at multiples of it
BUCKET_BYTES = 64 << 20  # of the gradients in a bucket


class Layout:
    """Places of the parameters of a bucket in flat tensors, each of which is cut into one slice for every rank."""

    def __init__(self, parameters: list[nn.Parameter], rank: int, world_size: int):
        self.parameters = parameters
        *self.starts, end = accumulate((_ceil(p.numel(), ALIGNED) for p in parameters), initial=0)
        each = _ceil(end, ALIGNED * world_size) // world_size
        self.size, self.own = each * world_size, slice(each * rank, each * (rank + 1))

    def views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in `flat`, shaped as the parameters."""
        places = zip(self.parameters, self.starts, strict=True)
        return [flat[start : start + p.numel()].view(p.shape) for p, start in places]

    def spans(self) -> list[tuple[int, int]]:
        """Where the part of each parameter that lies in this rank's slice begins and ends within the parameter."""
        return [
            (min(max(self.own.start - start, 0), p.numel()), min(max(self.own.stop - start, 0), p.numel()))
            for p, start in zip(self.parameters, self.starts, strict=True)
        ]

    def parts(self, own: torch.Tensor) -> list[torch.Tensor]:
        """The parts `[n]` of the parameters in `own`, this rank's slice of a flat tensor; many are empty."""
        places = zip(self.starts, self.spans(), strict=True)
        return [own[max(start - self.own.start, 0) :][: stop - first] for start, (first, stop) in places]

    def move(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Move the memory of `tensors`, one for each parameter, into a flat tensor and return that."""
        flat = torch.zeros(self.size, dtype=tensors[0].dtype, device=tensors[0].device)
        for x, view in zip(tensors, self.views(flat), strict=True):
            view.copy_(x.detach())
            x.data = view
        return flat


class Bucket:
    """The gradients of some parameters, and their reduction."""

    def __init__(self, layout: Layout, dtype: torch.dtype, extra: int):
        self.layout, self.parameters = layout, layout.parameters
        self.flat = torch.zeros(layout.size + extra, dtype=dtype, device=self.parameters[0].device)
        self.extra = self.flat[layout.size :]
        self.views = layout.views(self.flat)
        self.own = self.flat[:0]  # zero1: this rank's slice of the mean gradients
        self.missing = len(self.views)  # gradients that backward has not finished yet in this step
        self.work: dist.Work | None = None

    def pack(self) -> None:
        """Copy the gradients into the bucket and free them. A parameter without a gradient counts as zero."""
        places = list(zip(self.views, self.parameters, strict=True))
        empty = [view for view, p in places if p.grad is None]
        filled = [(view, p.grad) for view, p in places if p.grad is not None]
        if empty:
            torch._foreach_zero_(empty)
        if filled:
            torch._foreach_copy_([view for view, _ in filled], [grad for _, grad in filled])
        for p in self.parameters:
            p.grad = None


class Replicas(Ranks):
    """Every rank holds all weights and makes the same update, from gradients that are summed in `dtype`."""

    def __init__(self, rank: int, world_size: int, local_rank: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__(rank, world_size, local_rank)
        self.alone = False  # a group of one rank takes the same path, so that a single GPU can test it
        self.dtype = dtype
        self.buckets: list[Bucket] = []
        self.locals: dict[torch.Tensor, torch.Tensor] = {}
        self._last = self._eager = False  # of the present call of `backward`
        self._packed = self._begun = 0  # buckets that are full, and whose reduction has begun, in the present step
        self._waited = 0.0  # seconds of the host in `_timed`
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    # --- the buckets ------------------------------------------------------------------------------------------------

    def spread(self, trained, pairs, copies, scalars):
        averages, smaller = dict(pairs), dict(copies)
        kinds: dict[Hashable, list[nn.Parameter]] = {}
        for p in reversed(trained):  # backward reaches the last layers first
            kinds.setdefault(self.kind(p, averages, smaller), []).append(p)
        chunks = [chunk for members in kinds.values() for chunk in self._chunks(members)]
        self._scale = torch.tensor(1 / self.world_size, device=trained[0].device)  # so that a sum is a mean
        extra = self._make_slots(1 + scalars, trained[0].device)
        for i, chunk in enumerate(chunks, start=1):
            layout = Layout(chunk, self.rank, self.world_size)
            bucket = Bucket(layout, self.dtype, extra if i == len(chunks) else 0)
            for p in chunk:
                p.register_post_accumulate_grad_hook(partial(self._arrived, bucket))
            self.buckets.append(bucket)
            self._make_locals(bucket, averages, smaller)

    def kind(self, p: torch.Tensor, averages: dict, copies: dict) -> Hashable:
        """Only parameters of one kind share a bucket."""
        return None

    def _chunks(self, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        chunk: list[nn.Parameter] = []
        for p in parameters:
            if chunk and sum(q.numel() for q in (*chunk, p)) * self.dtype.itemsize > BUCKET_BYTES:
                yield chunk
                chunk = []
            chunk.append(p)
        yield chunk

    def _make_locals(self, bucket: Bucket, averages: dict, copies: dict) -> None:
        for p, view in zip(bucket.parameters, bucket.views, strict=True):
            self.locals[p] = _with_gradient(p.detach(), view)

    def local(self, x):
        return self.locals.get(x, x)

    # --- scalars, which stay exact in any dtype --------------------------------------------------------------------

    def _make_slots(self, scalars: int, device: torch.device) -> int:
        """Lay out one slot for each rank. Every other rank adds zeros to it. Returns the slots' elements."""
        self.pieces = 1 if self.dtype == torch.float32 else 3
        return self.world_size * scalars * self.pieces

    @property
    def slots(self) -> torch.Tensor:
        return self.buckets[-1].extra.view(self.world_size, -1)

    def collect(self, loss, terms, scales):
        for bucket in self.buckets[self._packed :]:
            bucket.pack()
        self._packed = 0
        own, slots = joined_scalars(loss, terms, scales), self.slots
        slots.zero_()
        slots[self.rank, : len(own) * self.pieces] = split(own, slots.dtype, self.pieces)

    def reduced(self, trained, scales):
        every = self.slots.unflatten(1, (self.pieces, -1)).float().sum(1)
        loss, terms = over_ranks(every, scales)
        return loss, total_norm([p.grad for p in trained]), terms

    # --- a step -----------------------------------------------------------------------------------------------------

    def clear(self, model):
        super().clear(model)
        self._packed = 0
        for bucket in self.buckets:
            bucket.missing = len(bucket.views)

    def backward(self, loss, last, eager):
        self._last, self._eager = last, eager
        loss.backward(self._scale)

    def _arrived(self, bucket: Bucket, _: torch.Tensor) -> None:
        """Backward has finished a gradient of `bucket`. The last bucket holds the loss, so it waits for `collect`."""
        if not self._last:
            return
        bucket.missing -= 1
        while self._packed < len(self.buckets) - 1 and not self.buckets[self._packed].missing:
            self.buckets[self._packed].pack()
            if self._eager:
                self._begin(self.buckets[self._packed])
            self._packed += 1

    def _begin(self, bucket: Bucket) -> None:
        bucket.work = self._reduce(bucket)
        self._begun += 1

    def _reduce(self, bucket: Bucket) -> dist.Work:
        return dist.all_reduce(bucket.flat, async_op=True)

    def exchange(self):
        with self._timed():
            for bucket in self.buckets[self._begun :]:
                self._begin(bucket)
            for bucket in self.buckets:
                assert bucket.work is not None
                bucket.work.wait()
                bucket.work = None
            self._begun = 0

    def free_gradients(self, optimizer):
        """Nothing is freed: the gradients that the optimiser reads are the buckets."""

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Add the time of the enclosed collectives to `times`: that of the stream on a GPU, else that of the host."""
        tick, device = time.perf_counter(), self._scale.device
        begin = torch.cuda.current_stream(device).record_event(_timing_event()) if device.type == "cuda" else None
        yield
        if begin is None:
            self._waited += time.perf_counter() - tick
        else:
            self._events.append((begin, torch.cuda.current_stream(device).record_event(_timing_event())))

    def times(self):
        for begin, end in self._events:
            end.synchronize()
            self._waited += begin.elapsed_time(end) / 1e3
        seconds, self._waited, self._events = self._waited, 0.0, []
        return {**super().times(), "reduce": seconds}


class Zero1(Replicas):
    """Each rank updates its slice of every bucket, with moments of that slice only, and gathers the other slices.

    What the layers read is gathered after every step: the low-precision copies of weights and averages where there are
    any, else weights and averages themselves. Their float32 values are whole on every rank after `complete`.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.read: list[tuple[Layout, torch.Tensor]] = []  # flat tensors that the layers read
        self.masters: list[tuple[Layout, torch.Tensor]] = []  # flat float32 weights and averages with copies
        self.spans: dict[torch.Tensor, tuple[int, int]] = {}

    def kind(self, p, averages, copies):
        small, average = copies.get(p), averages.get(p)
        small_average = copies.get(average)
        return average is not None, small is not None and small.dtype, small_average is not None and small_average.dtype

    def _make_locals(self, bucket, averages, copies):
        layout, parameters = bucket.layout, bucket.parameters
        bucket.own = torch.zeros(layout.size // self.world_size, dtype=self.dtype, device=bucket.flat.device)
        self.spans.update(zip(parameters, layout.spans(), strict=True))
        weights: list[torch.Tensor] = [*parameters]
        families = [weights]
        if parameters[0] in averages:
            families.append([averages[p] for p in parameters])
        for tensors in families:
            flat = self._move(layout, tensors)
            if tensors[0] in copies:
                self.masters.append((layout, flat))
                flat = self._move(layout, [copies[x] for x in tensors])
            self.read.append((layout, flat))
        for p, grad in zip(parameters, layout.parts(bucket.own), strict=True):
            self.locals[p] = _with_gradient(self.locals[p], grad)

    def _move(self, layout: Layout, tensors: list[torch.Tensor]) -> torch.Tensor:
        flat = layout.move(tensors)
        self.locals.update(zip(tensors, layout.parts(flat[layout.own]), strict=True))
        return flat

    def _make_slots(self, scalars, device):
        """The squared norm of a slice is known after the reduction, so it needs a small collective of its own."""
        self.pieces = 1
        self._slots = torch.zeros(self.world_size, scalars + 1, device=device)
        return 0

    @property
    def slots(self):
        return self._slots

    def _reduce(self, bucket):
        return _named("reduce_scatter_single", "reduce_scatter_tensor")(bucket.own, bucket.flat, async_op=True)

    def exchange(self):
        super().exchange()
        with self._timed():
            self._slots[self.rank, -1] = total_norm([bucket.own for bucket in self.buckets]).square()
            dist.all_reduce(self._slots)

    def reduced(self, trained, scales):
        loss, terms = over_ranks(self.slots[:, :-1], scales)
        return loss, self.slots[:, -1].sum().sqrt(), terms

    def distribute(self):
        with self._timed():
            self._gather(self.read)

    def complete(self, model):
        self._gather(self.masters)
        if model.scales is not None:  # each rank has noted the largest values of its own parts
            dist.all_reduce(model.scales, dist.ReduceOp.MAX)
        return super().complete(model)

    def _gather(self, flats: list[tuple[Layout, torch.Tensor]]) -> None:
        gather = _named("all_gather_single", "all_gather_into_tensor")
        bytes_of = [(flat.view(torch.uint8), flat[layout.own].view(torch.uint8)) for layout, flat in flats]
        for work in [gather(whole, own, async_op=True) for whole, own in bytes_of]:
            work.wait()

    def check_alike(self, model, step):
        self.complete(model)
        super().check_alike(model, step)

    def encoder(self, model, network):
        self.complete(model)
        return super().encoder(model, network)

    def whole(self, parameter, value):
        """The parts of all ranks, added as integers, which keeps every bit."""
        if parameter not in self.spans:
            return value
        first, stop = self.spans[parameter]
        bits = torch.zeros(parameter.numel(), dtype=torch.int32, device=value.device)
        bits[first:stop] = value.view(torch.int32)
        dist.all_reduce(bits)
        return bits.view(value.dtype).view(parameter.shape)

    def part(self, parameter, value):
        return value.flatten()[slice(*self.spans[parameter])] if parameter in self.spans else value


def split(values: torch.Tensor, dtype: torch.dtype, pieces: int) -> torch.Tensor:
    """Float32 `values` `[k]` as `pieces` summands `[pieces * k]` in `dtype`: three bfloat16 hold the 24 bits of one."""
    summands = []
    for _ in range(pieces):
        summands.append(values.to(dtype))
        values = values - summands[-1].float()
    return torch.cat(summands)


def _with_gradient(values: torch.Tensor, gradient: torch.Tensor) -> nn.Parameter:
    """A parameter that shares its memory with `values` and has a lasting gradient, which may have another dtype."""
    p = nn.Parameter(values)
    p.grad_dtype = gradient.dtype
    p.grad = gradient
    return p


def _named(name: str, older: str) -> Callable[..., dist.Work]:
    """The collective `name`, which torch calls `older` before version 2.13."""
    return getattr(dist, name if hasattr(dist, name) else older)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
