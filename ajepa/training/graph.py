"""The step as CUDA graphs: recorded once for each set of shapes, then replayed with one launch."""

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ajepa.model.masks import Masks

MAX_GRAPHS = 48  # Audio-JEPA's ratio, drawn for each batch, gives 27 counts of masked patches
TILES = (16, 32, 64, 96, 128)  # of attention: bounds on sequence lengths within one are alike to it


class StepGraphs:
    """Calls `train(patches, parts, rates)` through CUDA graphs: patches and masks to scalars, rates a named tuple.

    Shapes seen for the first time run eagerly, which compiles and loads what a recording may not; the second time they
    are recorded, from then on replayed. Inputs are copied into tensors that stay where they are; rates are scalars on
    the device, always, so that both ways launch the same kernels. What cannot be recorded, and shapes beyond the first
    `MAX_GRAPHS`, run eagerly, the reason said once. All graphs share one memory pool: nothing of one graph outlives its
    replay but the copied result.
    """

    def __init__(self, train: Callable, device: torch.device):
        self.train, self.device = train, device
        self.seen: dict[tuple, _Recorded | None] = {}
        self.failed = False
        self.said: set[str] = set()
        self.rates: torch.Tensor | None = None
        self.pool: Any = None

    def __call__(self, patches: torch.Tensor, parts: list[Masks], rates: Any) -> tuple[torch.Tensor, ...]:
        parts = [_round_bounds(masks) for masks in parts]
        rates = self._on_device(rates)
        key = (patches.shape, patches.dtype, *(_shapes(masks) for masks in parts))
        if key not in self.seen and len(self.seen) == MAX_GRAPHS:
            self._say(f"batches came in more than {MAX_GRAPHS} shapes; --fixed-token-budget gives them one")
            return self.train(patches, parts, rates)
        if self.failed or key not in self.seen:
            self.seen.setdefault(key)
            return self.train(patches, parts, rates)
        recorded = self.seen[key]
        if recorded is None:
            try:
                recorded = self.seen[key] = self._record(patches, parts, rates)
            except RuntimeError as error:
                self.failed = True
                self._say(str(error).splitlines()[0])
                return self.train(patches, parts, rates)
        recorded.load(patches, parts)
        recorded.replay()
        return tuple(x.clone() for x in recorded.result)

    def _on_device(self, rates: Any) -> Any:
        values = torch.tensor(tuple(rates), dtype=torch.float32)
        if self.rates is None:
            self.rates = torch.empty(len(values), dtype=torch.float32, device=self.device)
        self.rates.copy_(values.pin_memory() if self.device.type == "cuda" else values, non_blocking=True)
        return type(rates)(*self.rates.unbind())

    def _record(self, patches: torch.Tensor, parts: list[Masks], rates: Any) -> "_Recorded":
        recorded = _Recorded(patches, parts)

        def body() -> tuple[torch.Tensor, ...]:
            return self.train(recorded.patches, recorded.parts, rates)

        if self.device.type != "cuda":  # no graphs here: the same path, run instead of replayed
            recorded.replay = lambda: setattr(recorded, "result", body())
            return recorded
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # what eager steps held would stand beside the graphs' pool
        graph = torch.cuda.CUDAGraph()
        with (
            _no_collection(),
            torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),  # loader threads go on
        ):
            recorded.result = body()
        recorded.replay = graph.replay
        return recorded

    def _say(self, reason: str) -> None:
        if reason not in self.said:
            self.said.add(reason)
            print(f"the step runs without a CUDA graph: {reason}", file=sys.stderr)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A collected kernel would be unloaded, which a recording forbids."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Recorded:
    """One graph and the tensors that it reads and writes."""

    result: tuple[torch.Tensor, ...]
    replay: Callable[[], None]

    def __init__(self, patches: torch.Tensor, parts: list[Masks]):
        self.patches = patches.clone()
        self.parts = [masks.map(torch.Tensor.clone) for masks in parts]

    def load(self, patches: torch.Tensor, parts: list[Masks]) -> None:
        self.patches.copy_(patches)
        kept = [x for masks in self.parts for x in masks.tensors().values()]
        given = [x for masks in parts for x in masks.tensors().values()]
        torch._foreach_copy_(kept, given)


def _round_bounds(masks: Masks) -> Masks:
    """Bounds on lengths, rounded up, so that batches which differ in these alone share a graph."""
    bounds: dict[str, Any] = {name: round_bound(getattr(masks, name)) for name in Masks.BOUNDS}
    return dataclasses.replace(masks, **bounds)


def round_bound(length: int) -> int:
    return next((tile for tile in TILES if length <= tile), -(-length // TILES[-1]) * TILES[-1])


def _shapes(masks: Masks) -> tuple:
    bounds = (getattr(masks, name) for name in Masks.BOUNDS)
    return (*(tuple(x.shape) for x in masks.tensors().values()), *bounds, masks.clips, masks.disjoint)
