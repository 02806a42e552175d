"""The exponential moving average of many tensors in one launch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ajepa_kernels._tables import (
    BLOCK,
    CHUNK,
    all_tensors,
    cached,
    is_aligned,
    load_pointer,
    load_size,
    own_part,
    split_alike,
    table,
    tl_dtype,
    unsupported,
)
from ajepa_kernels._triton import jit, launch, register, tl, use_triton


@jit
def _ema_update_kernel(
    table_ptr, chunk_row_ptr, decay_ptr, decay,
    TARGET: tl.constexpr, SOURCE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    table_ptr += tl.load(chunk_row_ptr + pid) * 4
    target_ptr = load_pointer(table_ptr, 1, TARGET, ALIGNED)
    source_ptr = load_pointer(table_ptr, 2, SOURCE, ALIGNED)
    size = load_size(table_ptr + 3, ALIGNED)
    start = (pid - tl.load(table_ptr)) * CHUNK
    if decay_ptr is not None:
        decay = tl.load(decay_ptr).to(tl.float32)
    for i in tl.static_range(0, CHUNK, BLOCK):
        offsets = start + i + tl.arange(0, BLOCK)
        mask = offsets < size
        target = tl.load(target_ptr + offsets, mask=mask).to(tl.float32)
        source = tl.load(source_ptr + offsets, mask=mask).to(tl.float32)
        tl.store(target_ptr + offsets, (source + decay * (target - source)).to(TARGET), mask=mask)


@register(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor? decay_tensor, float decay) -> ()",
    lambda *args: None,
)
def _ema_update(targets, sources, decay_tensor, decay):
    x = targets[0]
    kinds: dict[tuple, list[tuple[int, ...]]] = {}
    for t, s in zip(targets, sources, strict=True):
        kinds.setdefault((t.dtype, s.dtype, is_aligned((t, s))), []).append((t.data_ptr(), s.data_ptr(), t.numel()))
    for (target, source, aligned), rows in kinds.items():
        made = cached((x.device, *rows), partial(table, rows, x), x)
        launch(
            _ema_update_kernel, len(made.chunk_row), x,
            made.rows, made.chunk_row, decay_tensor, decay,
            tl_dtype(target), tl_dtype(source), aligned, CHUNK, BLOCK, num_warps=4,
        )  # fmt: skip
    torch.autograd.graph.increment_version(targets)


def scalar(op: str, name: str, x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` without axes. Raises ValueError if it is not a scalar on the device."""
    if not isinstance(x, torch.Tensor) or x.numel() != 1 or x.device != device:
        raise ValueError(f"{op}: {name} must be a scalar on {device}")
    return x.reshape(())


def checked_decay(op: str, decay: float | torch.Tensor, device: torch.device) -> float | torch.Tensor:
    """The decay: a number in [0, 1], or a scalar on the device, whose value is not read. Else raises ValueError."""
    if isinstance(decay, torch.Tensor):
        return scalar(op, "a decay tensor", decay, device)
    if not 0.0 <= float(decay) <= 1.0:
        raise ValueError(f"{op}: a decay must be in [0, 1], got {decay}")
    return float(decay)


def _split(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor]) -> tuple[list, list]:
    """Pairs to average, and pairs of integers, which are copied because an average of counters means nothing."""
    pairs = list(zip(targets, sources, strict=True))
    averages = [(t, s) for t, s in pairs if t.is_floating_point() or t.is_complex()]
    return averages, [(t, s) for t, s in pairs if not (t.is_floating_point() or t.is_complex())]


@torch.no_grad()
def ema_update_reference_(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], decay: float | torch.Tensor
) -> None:
    """Plain PyTorch definition of `ema_update_`: torch's own foreach EMA."""
    averages, counters = _split(targets, sources)
    for t, s in counters:
        t.copy_(s)
    if not averages:
        return
    targets, sources = [t for t, _ in averages], [s.to(t.dtype) for t, s in averages]
    if isinstance(decay, torch.Tensor) and decay.device.type == "cpu":
        torch._foreach_lerp_(targets, sources, [1 - decay] * len(targets))
    elif isinstance(decay, torch.Tensor):  # saves a launch for each tensor, and the host need not read the decay
        torch._foreach_mul_(targets, decay)
        torch._foreach_add_(targets, torch._foreach_mul(sources, 1 - decay))
    else:
        get_ema_multi_avg_fn(decay)(targets, sources, None)


@torch.no_grad()
def ema_update_(
    targets: Iterable[torch.Tensor],
    sources: Iterable[torch.Tensor],
    decay: float | torch.Tensor,
    *,
    impl: str = "auto",
) -> None:
    """target <- decay * target + (1 - decay) * source, in place, for all tensors at once.

    On a GPU this is one launch for each pair of dtypes, computed in float32. Integer and boolean targets (the
    num_batches_tracked of a batch norm) are copied from their sources.

    Args:
        targets: tensors to update. The kernel takes tensors that are dense in memory and have their sources' strides,
            and the parts that a rank has of DTensors (FSDP2) that are split like their sources.
        sources: tensors of the same shapes and devices.
        decay: a number, or a scalar tensor on the device, which a captured CUDA graph reads again at each replay.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.

    Raises:
        TypeError: a target or a source is not a tensor.
        ValueError: the lists do not match, a target is listed twice, or the decay is outside [0, 1] or on another
            device.

    Example::

        import copy
        encoder = torch.nn.Linear(8, 8, device="cuda")
        target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        ema_update_(target_encoder.parameters(), encoder.parameters(), decay=0.999)
    """
    targets, sources = list(targets), list(sources)
    all_tensors("ema_update_", "targets", targets)
    all_tensors("ema_update_", "sources", sources)
    if len(targets) != len(sources) or any(t.shape != s.shape for t, s in zip(targets, sources, strict=False)):
        raise ValueError("ema_update_: targets and sources must be equally many tensors of equal shapes")
    if any(t.device != s.device for t, s in zip(targets, sources, strict=True)):
        raise ValueError("ema_update_: a target and its source must share a device")
    if len(set(targets)) < len(targets):
        raise ValueError("ema_update_: a target is listed twice; list each target once")
    if not targets:
        return
    decay = checked_decay("ema_update_", decay, targets[0].device)
    averages, counters = _split(targets, sources)
    if not torch.compiler.is_compiling() and split_alike(averages):  # of DTensors, this rank's parts
        averages = [(own_part(t), own_part(s)) for t, s in averages]
    if not use_triton("ema_update_", impl, own_part(targets[0]), unsupported(averages)):
        ema_update_reference_(targets, sources, decay)
        return
    for t, s in counters:
        t.copy_(s)
    if averages:
        tensor, number = (decay, 0.0) if isinstance(decay, torch.Tensor) else (None, decay)
        torch.ops.ajepa.ema_update_([t for t, _ in averages], [s.detach() for _, s in averages], tensor, number)
        if split := [t for t in targets if own_part(t) is not t]:
            torch.autograd.graph.increment_version(split)
