"""The step as CUDA graphs: captured once for each set of shapes, then replayed with one launch."""

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ajepa.model.masks import Masks

MAX_GRAPHS = 48  # Audio-JEPA draws its ratio per batch, which gives 27 numbers of masked patches
TILES = (16, 32, 64, 80, 96, 128)  # tile lengths of attention, which treats all length bounds within one tile alike


class StepGraphs:
    """Calls `train(patches, parts, schedule_values)`, which returns scalars, through CUDA graphs.

    `parts` are the masks of each micro-batch and `schedule_values` is a named tuple. Shapes seen for the first time run
    eagerly, because a capture must not compile or load kernels. The second time they are captured, and from then on
    replayed. Inputs are copied into tensors at fixed addresses. Schedule values are always scalars on the device, so an
    eager step launches the same kernels as a replay. Steps that cannot be captured, and shapes beyond the first
    `MAX_GRAPHS`, run eagerly, and the reason is printed once. All graphs share one memory pool, so only the copied
    result outlives a replay. Captures use `stream`, whose priority the kernels of a graph keep. `captured` is called in
    place of `train` where a graph must hold something else than an eager step does.
    """

    def __init__(
        self,
        train: Callable,
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
        captured: Callable | None = None,
    ):
        self.train, self.device, self.stream, self.captured = train, device, stream, captured
        self.seen: dict[tuple, _Captured | None] = {}
        self.failed = False
        self.reported: set[str] = set()
        self.schedule_values: torch.Tensor | None = None
        self.pool: Any = None

    def __call__(self, patches: torch.Tensor, parts: list[Masks], schedule_values: Any) -> tuple[torch.Tensor, ...]:
        parts = [_round_bounds(masks) for masks in parts]
        schedule_values = self._on_device(schedule_values)
        key = (patches.shape, patches.dtype, *(_shapes(masks) for masks in parts))
        if key not in self.seen and len(self.seen) == MAX_GRAPHS:
            self._report(f"batches came in more than {MAX_GRAPHS} shapes; --fixed-token-budget gives them one shape")
            return self.train(patches, parts, schedule_values)
        if self.failed or key not in self.seen:
            self.seen.setdefault(key)
            return self.train(patches, parts, schedule_values)
        captured = self.seen[key]
        if captured is None:
            try:
                captured = self.seen[key] = self._capture(patches, parts, schedule_values)
            except RuntimeError as error:
                self.failed = True
                self._report(str(error).splitlines()[0])
                return self.train(patches, parts, schedule_values)
        captured.load(patches, parts)
        captured.replay()
        return tuple(x.clone() for x in captured.result)

    def _on_device(self, schedule_values: Any) -> Any:
        values = torch.tensor(tuple(schedule_values), dtype=torch.float32)
        if self.schedule_values is None:
            self.schedule_values = torch.empty(len(values), dtype=torch.float32, device=self.device)
        self.schedule_values.copy_(values.pin_memory() if self.device.type == "cuda" else values, non_blocking=True)
        return type(schedule_values)(*self.schedule_values.unbind())

    def _capture(self, patches: torch.Tensor, parts: list[Masks], schedule_values: Any) -> "_Captured":
        captured = _Captured(patches, parts)

        def body() -> tuple[torch.Tensor, ...]:
            return (self.captured or self.train)(captured.patches, captured.parts, schedule_values)

        if self.device.type != "cuda":  # without CUDA graphs the same path runs the body instead of a replay
            captured.replay = lambda: setattr(captured, "result", body())
            return captured
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()  # memory cached by eager steps would add to the graphs' pool
        graph = torch.cuda.CUDAGraph()
        with (
            _no_collection(),
            torch.cuda.graph(  # loader threads may call CUDA
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ),
        ):
            captured.result = body()
        captured.replay = graph.replay
        return captured

    def _report(self, reason: str) -> None:
        if reason not in self.reported:
            self.reported.add(reason)
            print(f"the step runs without a CUDA graph: {reason}", file=sys.stderr)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disable garbage collection: collecting a kernel unloads it, which is forbidden during a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Captured:
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
        if kept:  # the update of several ranks reads no masks
            torch._foreach_copy_(kept, given)


def _round_bounds(masks: Masks) -> Masks:
    """Round the length bounds up, so batches that differ only in their bounds share a graph."""
    bounds: dict[str, Any] = {name: round_bound(getattr(masks, name)) for name in Masks.BOUNDS}
    return dataclasses.replace(masks, **bounds)


def round_bound(length: int) -> int:
    return next((tile for tile in TILES if length <= tile), -(-length // TILES[-1]) * TILES[-1])


def _shapes(masks: Masks) -> tuple:
    bounds = (getattr(masks, name) for name in Masks.BOUNDS)
    return (*(tuple(x.shape) for x in masks.tensors().values()), *bounds, masks.clips, masks.disjoint)
