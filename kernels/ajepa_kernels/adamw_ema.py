"""AdamW and the exponential moving average of the target encoder, as one update of every parameter in one launch."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim.adam import adam
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ajepa_kernels._triton import jit, launch, power_of_2, register, tl, use_triton

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]

BLOCK = 1024  # elements of a tensor in flight in a program
CHUNK = 4 * BLOCK  # elements that a program updates
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# --- tables of pointers -----------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """One row of int64 for each tensor to update; its first column is the first of the chunks that it is cut into."""

    rows: torch.Tensor
    chunk_row: torch.Tensor  # int32, the row of each chunk
    host: tuple[torch.Tensor, ...]  # what a captured graph copies from


def _table(rows: list[list[int]], device: torch.device) -> _Table:
    """`rows`: pointers and other numbers of each tensor, its size last."""
    chunk_row: list[int] = []
    table = []
    for i, row in enumerate(rows):
        table.append([len(chunk_row), *row])
        chunk_row += [i] * -(-row[-1] // CHUNK)
    host = (torch.tensor(table, dtype=torch.int64), torch.tensor(chunk_row, dtype=torch.int32))
    if device.type != "cuda":
        return _Table(*host, host)
    host = (host[0].pin_memory(), host[1].pin_memory())
    return _Table(host[0].to(device, non_blocking=True), host[1].to(device, non_blocking=True), host)


def _is_aligned(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Fit for 16-byte accesses: a tensor that is not goes to a launch of its own."""
    return all(x is None or (x.data_ptr() % 16 == 0 and x.numel() % 16 == 0) for x in tensors)


# --- EMA --------------------------------------------------------------------------------------------------------------


@jit
def _pointer(table_ptr, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(dtype))
    if ALIGNED:  # else the accesses would be one element wide
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@jit
def _size(size_ptr, ALIGNED: tl.constexpr):
    size = tl.load(size_ptr)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return size


@jit
def _ema_update_kernel(
    table_ptr, chunk_row_ptr, decay_ptr, decay,
    TARGET: tl.constexpr, SOURCE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    table_ptr += tl.load(chunk_row_ptr + pid) * 4
    target_ptr = _pointer(table_ptr, 1, TARGET, ALIGNED)
    source_ptr = _pointer(table_ptr, 2, SOURCE, ALIGNED)
    size = _size(table_ptr + 3, ALIGNED)
    start = (pid - tl.load(table_ptr)) * CHUNK
    if decay_ptr is not None:
        decay = tl.load(decay_ptr).to(tl.float32)
    for i in tl.static_range(0, CHUNK, BLOCK):
        offsets = start + i + tl.arange(0, BLOCK)
        mask = offsets < size
        target = tl.load(target_ptr + offsets, mask=mask).to(tl.float32)
        source = tl.load(source_ptr + offsets, mask=mask).to(tl.float32)
        tl.store(target_ptr + offsets, (source + decay * (target - source)).to(TARGET), mask=mask)


_ema_tables: OrderedDict[tuple, _Table] = OrderedDict()
_captured_tables: list[_Table] = []  # a graph holds their addresses for as long as it may be replayed


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@register(
    "ema_update_(Tensor(a!)[] targets, Tensor[] sources, Tensor? decay_tensor, float decay) -> ()",
    lambda *args: None,
)
def _ema_update(targets, sources, decay_tensor, decay):
    kinds: dict[tuple, list[list[int]]] = {}
    for t, s in zip(targets, sources, strict=True):
        kinds.setdefault((t.dtype, s.dtype, _is_aligned((t, s))), []).append([t.data_ptr(), s.data_ptr(), t.numel()])
    for (target, source, aligned), rows in kinds.items():
        device = targets[0].device
        key = (device, *map(tuple, rows))
        table = _ema_tables.pop(key, None) or _table(rows, device)
        _ema_tables[key] = table
        if len(_ema_tables) > 16:
            _ema_tables.popitem(last=False)
        if _is_capturing():
            _captured_tables.append(table)
        launch(
            _ema_update_kernel, len(table.chunk_row), targets[0],
            table.rows, table.chunk_row, decay_tensor, decay,
            _tl_dtype(target), _tl_dtype(source), aligned, CHUNK, BLOCK, num_warps=4,
        )  # fmt: skip


def _tl_dtype(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


@torch.no_grad()
def ema_update_reference_(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], decay: float | torch.Tensor
) -> None:
    """Plain PyTorch definition of `ema_update_`: torch's own foreach EMA."""
    targets, sources = list(targets), [s.to(t.dtype) for t, s in zip(targets, sources, strict=True)]
    if isinstance(decay, torch.Tensor) and decay.device.type == "cpu":
        torch._foreach_lerp_(targets, sources, [1 - decay] * len(targets))
    elif isinstance(decay, torch.Tensor):  # without a launch for each tensor, and without reading the decay back
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

    On a GPU this is one launch for each pair of dtypes, computed in float32.

    Args:
        targets: floating-point tensors, contiguous for the kernel.
        sources: tensors of the same shapes and devices.
        decay: a number, or a scalar on the device, which a captured CUDA graph reads again at each replay.
        impl: "auto" (Triton on a GPU where it can, aloud once where it cannot), "triton" or "reference".

    Raises:
        ValueError: the two lists do not match.

    Example::

        ema_update_(target_encoder.parameters(), context_encoder.parameters(), decay=0.999)
    """
    targets, sources = list(targets), list(sources)
    if len(targets) != len(sources) or any(t.shape != s.shape for t, s in zip(targets, sources, strict=False)):
        raise ValueError("ema_update_: targets and sources must be equally many tensors of equal shapes")
    if any(t.device != s.device for t, s in zip(targets, sources, strict=True)):
        raise ValueError("ema_update_: a target and its source must share a device")
    if not targets:
        return
    if use_triton("ema_update_", impl, targets[0], _unsupported(targets + sources)):
        tensor = decay if isinstance(decay, torch.Tensor) else None
        if tensor is not None and tensor.device != targets[0].device:
            raise ValueError(f"ema_update_: a decay tensor must be on {targets[0].device}")
        sources = [s.detach() for s in sources]
        torch.ops.ajepa.ema_update_(targets, sources, tensor, 0.0 if tensor is not None else float(decay))
    else:
        ema_update_reference_(targets, sources, decay)


def _unsupported(tensors: Sequence[torch.Tensor]) -> str:
    for x in tensors:
        if x.dtype not in _KERNEL_DTYPES:
            return f"no kernel for {x.dtype}"
        if x.device != tensors[0].device:
            return "the tensors are on several devices"
        if not x.is_contiguous():
            return "a tensor is not contiguous"
    return ""


# --- AdamW + EMA ------------------------------------------------------------------------------------------------------

# columns of a row: 0 first chunk, 1 param, 2 grad, 3 exp_avg, 4 exp_avg_sq, 5 remainder, 6 ema, 7 copy, 8 ema copy,
# 9 step, 10 lr, 11 weight decay, 12 group, 13 size; of a group: 0 beta1, 1 beta2, 2 and 3 their logarithms, 4 eps,
# 5 lr, 6 weight decay


@jit
def _adamw_ema_kernel(
    table_ptr, chunk_row_ptr, hyper_ptr, grad_scale_ptr, found_inf_ptr, decay_ptr, decay, counter_ptr, rows,
    MAXIMIZE: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, EMA: tl.constexpr,
    COPY: tl.constexpr, EMA_COPY: tl.constexpr, REMAINDER: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if found_inf_ptr is not None:  # noqa: SIM102 (the outer one is settled when compiling)
        if tl.load(found_inf_ptr) != 0.0:
            return
    row_ptr = table_ptr + tl.load(chunk_row_ptr + pid) * COLUMNS
    param_ptr = _pointer(row_ptr, 1, PARAM, ALIGNED)
    has_grad = tl.load(row_ptr + 2) != 0
    grad_ptr = _pointer(row_ptr, 2, GRAD, ALIGNED)
    exp_avg_ptr = _pointer(row_ptr, 3, STATE, ALIGNED)
    exp_avg_sq_ptr = _pointer(row_ptr, 4, STATE, ALIGNED)
    has_remainder = tl.load(row_ptr + 5) != 0
    remainder_ptr = _pointer(row_ptr, 5, tl.int16, ALIGNED)
    has_ema = tl.load(row_ptr + 6) != 0
    ema_ptr = _pointer(row_ptr, 6, EMA, ALIGNED)
    has_copy = tl.load(row_ptr + 7) != 0
    copy_ptr = _pointer(row_ptr, 7, COPY, ALIGNED)
    has_ema_copy = tl.load(row_ptr + 8) != 0
    ema_copy_ptr = _pointer(row_ptr, 8, EMA_COPY, ALIGNED)
    size = _size(row_ptr + 13, ALIGNED)
    start = (pid - tl.load(row_ptr)) * CHUNK

    inverse_scale = 1.0
    if grad_scale_ptr is not None:
        inverse_scale = 1.0 / tl.load(grad_scale_ptr).to(tl.float32)
    if decay_ptr is not None:
        decay = tl.load(decay_ptr).to(tl.float32)
    # float64 scalars: 1 - beta2^step loses its digits in float32
    hyper_ptr += tl.load(row_ptr + 12) * 7
    beta1, beta2 = tl.load(hyper_ptr), tl.load(hyper_ptr + 1)
    eps = tl.load(hyper_ptr + 4).to(tl.float32)
    step_size, shrink, root_correction = 0.0, 1.0, 1.0
    if has_grad:
        step = tl.load(_pointer(row_ptr, 9, tl.float32, False)).to(tl.float64) + 1.0
        lr = tl.load(_pointer(row_ptr, 10, tl.float32, False))
        step_size = (lr.to(tl.float64) / (1.0 - tl.exp(step * tl.load(hyper_ptr + 2)))).to(tl.float32)
        root_correction = tl.sqrt(1.0 - tl.exp(step * tl.load(hyper_ptr + 3))).to(tl.float32)
        shrink = 1.0 - lr * tl.load(_pointer(row_ptr, 11, tl.float32, False))
    lerp1, keep2, lerp2 = (1.0 - beta1).to(tl.float32), beta2.to(tl.float32), (1.0 - beta2).to(tl.float32)

    for i in range(0, CHUNK, BLOCK):
        offsets = start + i + tl.arange(0, BLOCK)
        mask = offsets < size
        if REMAINDER:
            high = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32) << 16
            low = tl.load(remainder_ptr + offsets, mask=mask & has_remainder, other=0).to(tl.int32)
            param = (high + low).to(tl.float32, bitcast=True)
        else:
            param = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        ema = tl.load(ema_ptr + offsets, mask=mask & has_ema, other=0.0).to(tl.float32)
        if has_grad:
            grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * inverse_scale
            exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if MAXIMIZE:
                grad = -grad
            exp_avg += lerp1 * (grad - exp_avg)
            exp_avg_sq = keep2 * exp_avg_sq + lerp2 * grad * grad
            param = param * shrink - step_size * exp_avg / (tl.sqrt_rn(exp_avg_sq) / root_correction + eps)
            tl.store(exp_avg_ptr + offsets, exp_avg.to(STATE), mask=mask)
            tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq.to(STATE), mask=mask)
            if REMAINDER:
                # the nearest bfloat16, halves away from zero, so that what is left fits in 16 signed bits
                bits = param.to(tl.int32, bitcast=True)
                high = (bits + 0x8000) >> 16
                tl.store(param_ptr + offsets, high.to(tl.int16).to(PARAM, bitcast=True), mask=mask)
                tl.store(remainder_ptr + offsets, (bits - (high << 16)).to(tl.int16), mask=mask)
            else:
                tl.store(param_ptr + offsets, param.to(PARAM), mask=mask)
        tl.store(copy_ptr + offsets, param.to(COPY), mask=mask & has_copy)
        ema = param + decay * (ema - param)
        tl.store(ema_ptr + offsets, ema.to(EMA), mask=mask & has_ema)
        tl.store(ema_copy_ptr + offsets, ema.to(EMA_COPY), mask=mask & has_ema_copy)

    # every thread has read its step before this program counts as done; the last one moves them all
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1) == tl.num_programs(0) - 1:
        row = tl.arange(0, ROWS)
        steps = tl.load(table_ptr + row * COLUMNS + 9, mask=row < rows, other=0)
        step_ptr = steps.to(tl.pointer_type(tl.float32))
        tl.store(step_ptr, tl.load(step_ptr, mask=steps != 0, other=0.0) + 1.0, mask=steps != 0)
        tl.store(counter_ptr, 0)


class _Row(NamedTuple):
    """What the kernel updates together. No gradient: only the average and the copies move."""

    param: torch.Tensor
    grad: torch.Tensor | None
    exp_avg: torch.Tensor | None
    exp_avg_sq: torch.Tensor | None
    remainder: torch.Tensor | None
    ema: torch.Tensor | None
    copy: torch.Tensor | None
    ema_copy: torch.Tensor | None
    step: torch.Tensor | None
    group: int

    def kind(self) -> tuple:
        """Rows of one kind share a launch; what a row lacks counts as the usual dtype."""
        p = self.param.dtype
        with_remainder = self.remainder is not None
        usual = (p, p, torch.float32 if with_remainder else p, torch.float32, torch.bfloat16, torch.bfloat16)
        own = (self.param, self.grad, self.exp_avg, self.ema, self.copy, self.ema_copy)
        dtypes = (u if x is None else x.dtype for x, u in zip(own, usual, strict=True))
        return *dtypes, with_remainder, _is_aligned(self[:8])


def _tensor(x: float | torch.Tensor) -> torch.Tensor | None:
    return x if isinstance(x, torch.Tensor) else None


def join_remainder(param: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The float32 values that a bfloat16 tensor and its int16 remainder hold between them."""
    return ((param.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def split_remainder(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 as the nearest bfloat16 (halves away from zero) and the int16 that `join_remainder` needs."""
    bits = value.contiguous().view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


class AdamWEMA(torch.optim.AdamW):
    """`torch.optim.AdamW` that also moves an EMA copy of its parameters and writes low-precision copies, in one launch.

    p <- p (1 - lr weight_decay) - lr m^ / (sqrt(v^) + eps), where m and v average grad / grad_scale (arXiv 1711.05101);
    ema <- ema_decay ema + (1 - ema_decay) p. Param groups, hooks and closures are torch's. The state dict is AdamW's:
    either loads the other's.

    On a GPU all parameters of equal dtypes are updated by one kernel, in float32. The learning rate, `ema_decay`,
    `grad_scale`, `found_inf` and a group's weight decay may be scalars on the device, which a captured CUDA graph reads
    again at each replay; numbers are frozen into the graph. The kernel leaves `.grad` as it was, while torch's fused
    AdamW divides it by the scale.

    Args:
        params: parameters or groups, as for `torch.optim.AdamW`.
        ema: pairs (parameter, its EMA tensor). Parameters without a pair have no average; pairs whose parameter has no
            gradient are averaged all the same.
        copies: pairs (parameter or EMA tensor, low-precision tensor of its shape) that each step writes.
        remainder: keep bfloat16 parameters to float32 precision by 16 more bits in the state ("remainder"), beside
            moments in float32. Such a state dict loads into AdamWEMA alone; AdamW's loads, with remainders of zero.
        impl: "auto" (Triton on a GPU where it can, aloud once where it cannot), "triton" or "reference".
        **kwargs: AdamW's own. `fused=True` is the default, and what the kernel stands in for.

    Raises:
        ValueError: a pair's shapes or devices differ, or AdamW's own reasons.

    Example::

        lr = torch.tensor(1e-3, device="cuda")
        ema = zip(context_encoder.parameters(), target_encoder.parameters())
        optimizer = AdamWEMA(context_encoder.parameters(), ema=ema, lr=lr, weight_decay=0.05)
        loss.backward()
        optimizer.step(ema_decay=0.999)
    """

    def __init__(self, params, ema: Pairs = (), copies: Pairs = (), *, remainder=False, impl="auto", **kwargs):
        ema, copies = list(ema), list(copies)
        for source, target in ema + copies:
            if source.shape != target.shape or source.device != target.device:
                raise ValueError("AdamWEMA: the tensors of a pair must have equal shapes and devices")
        super().__init__(params, **{"fused": True, **kwargs})
        self.ema_sources, self.ema_targets = [p for p, _ in ema], [t for _, t in ema]
        self.copies, self.remainder, self.impl = copies, remainder, impl
        self._pointers: tuple | None = None
        self._launches: list[tuple[tuple, _Table]] = []
        self._why_not = ""
        self._numbers: tuple | None = None

    @torch.no_grad()
    def step(
        self,
        closure=None,
        *,
        ema_decay: float | torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ):
        """One update. Gradients are divided by `grad_scale`; where `found_inf` is 1 nothing changes (both scalars).

        Without `ema_decay` the averages stay as they are.
        """
        # GradScaler hands its tensors over as attributes
        grad_scale = getattr(self, "grad_scale", None) if grad_scale is None else grad_scale
        found_inf = getattr(self, "found_inf", None) if found_inf is None else found_inf
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        if not params:
            return loss
        groups = [self._group(group) for group in self.param_groups]
        self._plan(groups, ema_decay is not None)
        if use_triton("AdamWEMA", self.impl, params[0], self._why_not):
            self._step_triton(ema_decay, grad_scale, found_inf)
        else:
            self._step_reference(groups, ema_decay, grad_scale, found_inf)
        return loss

    def _group(self, group: dict) -> tuple[list, ...]:
        """Parameters with a gradient, their gradients and state tensors, created where missing."""
        for p in group["params"]:
            if self.remainder and p.dtype == torch.bfloat16 and p.grad is not None and not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p, dtype=torch.float32),
                    exp_avg_sq=torch.zeros_like(p, dtype=torch.float32),
                    remainder=torch.zeros_like(p, dtype=torch.int16),
                )
        lists: tuple[list, ...] = ([], [], [], [], [], [])
        self._init_group(group, *lists)
        return lists

    # --- plain definition ---

    def _step_reference(self, groups, ema_decay, grad_scale, found_inf) -> None:
        masters: dict[torch.Tensor, torch.Tensor] = {}  # float32 values of the parameters that have a remainder
        for p in self.state:
            if "remainder" in self.state[p]:
                masters[p] = join_remainder(p, self.state[p]["remainder"])
        for group, (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps) in zip(
            self.param_groups, groups, strict=True
        ):
            adam(
                [masters.get(p, p) for p in params],
                [g.float() if p in masters else g for p, g in zip(params, grads, strict=True)],
                exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps,
                amsgrad=group["amsgrad"], beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=float(group["weight_decay"]), eps=group["eps"], maximize=group["maximize"],
                foreach=group["foreach"], capturable=group["capturable"], differentiable=group["differentiable"],
                fused=group["fused"], grad_scale=grad_scale, found_inf=found_inf, decoupled_weight_decay=True,
                has_complex=any(torch.is_complex(p) for p in params),
            )  # fmt: skip
        for p, master in masters.items():
            high, low = split_remainder(master)
            p.copy_(high)
            self.state[p]["remainder"].copy_(low)
        if ema_decay is not None and self.ema_targets:
            if found_inf is not None:
                ema_decay = torch.where(found_inf > 0, 1.0, ema_decay)
            ema_update_reference_(self.ema_targets, [masters.get(p, p) for p in self.ema_sources], ema_decay)
        averages = set(self.ema_targets) if ema_decay is None else set()  # have not moved
        copies = [(c, masters.get(s, s)) for s, c in self.copies if s not in averages]
        if copies:
            torch._foreach_copy_([c for c, _ in copies], [s for _, s in copies])

    # --- one launch ---

    def _rows(self, groups, with_ema: bool) -> list[_Row]:
        ema = dict(zip(self.ema_sources, self.ema_targets, strict=True)) if with_ema else {}
        copies, averages = dict(self.copies), set(self.ema_targets)
        grads = {p: (g, i) for i, lists in enumerate(groups) for p, g in zip(*lists[:2], strict=True)}
        rows = []
        for p in dict.fromkeys([*grads, *ema, *(s for s in copies if s not in averages)]):
            state, (grad, group), average = self.state.get(p, {}), grads.get(p, (None, 0)), ema.get(p)
            row = _Row(
                p, grad, state.get("exp_avg"), state.get("exp_avg_sq"), state.get("remainder"), average, copies.get(p),
                None if average is None else copies.get(average), None if grad is None else state["step"], group,
            )  # fmt: skip
            rows.append(row)
        return rows

    def _plan(self, groups, with_ema: bool) -> None:
        """The tables of what to launch, made again only where an address has changed."""
        rows = self._rows(groups, with_ema)
        pointers = tuple(0 if x is None else x.data_ptr() for row in rows for x in row[:9])
        rates = [tuple(_tensor(group[name]) for name in ("lr", "weight_decay")) for group in self.param_groups]
        pointers += tuple(0 if rate is None else rate.data_ptr() for pair in rates for rate in pair)
        if pointers == self._pointers:
            return
        self._pointers, self._launches = pointers, []
        self._why_not = self._unsupported(rows)
        if self._why_not or not rows:
            return
        device = rows[0].param.device
        self._rates = torch.zeros(len(rates), 2, dtype=torch.float32, device=device)  # where those that are numbers go
        self._numbers = None
        kinds: dict[tuple, list[list[int]]] = {}
        for row in rows:
            data = [0 if x is None else x.data_ptr() for x in row[:9]]
            for rate, slot in zip(rates[row.group], self._rates[row.group], strict=True):
                data.append((slot if rate is None else rate).data_ptr())
            kinds.setdefault((self.param_groups[row.group]["maximize"], *row.kind()), []).append(
                [*data, row.group, row.param.numel()]
            )
        self._launches = [(kind, _table(data, device)) for kind, data in kinds.items()]
        self._counter = torch.zeros((), dtype=torch.int32, device=device)
        if _is_capturing():
            _captured_tables.extend(table for _, table in self._launches)

    def _unsupported(self, rows: list[_Row]) -> str:
        for group in self.param_groups:
            if group["amsgrad"] or group["differentiable"] or not (group["fused"] or group["capturable"]):
                return "no kernel for amsgrad, differentiable or fused=False"
            if any(isinstance(beta, torch.Tensor) for beta in group["betas"]):
                return "no kernel for betas that are tensors"
            for rate in (_tensor(group["lr"]), _tensor(group["weight_decay"])):
                if rate is not None and (rate.dtype, rate.device) != (torch.float32, group["params"][0].device):
                    return "learning rates and weight decays that are tensors must be float32 beside the parameters"
        return _unsupported([x for row in rows for x in (*row[:4], *row[5:8]) if x is not None])

    def _step_triton(self, ema_decay, grad_scale, found_inf) -> None:
        if not self._launches:
            return
        device = self._counter.device
        numbers = tuple(
            (*group["betas"], *(math.log(beta) if beta else -math.inf for beta in group["betas"]), group["eps"],
             *(0.0 if _tensor(group[name]) is not None else group[name] for name in ("lr", "weight_decay")))
            for group in self.param_groups
        )  # fmt: skip
        if numbers != self._numbers:  # one copy to the device where a number has changed
            hyper = torch.tensor(numbers, dtype=torch.float64)
            hyper = hyper.pin_memory() if device.type == "cuda" else hyper
            self._hyper = hyper.to(device, non_blocking=True)
            self._rates.copy_(self._hyper[:, 5:])
            self._numbers = numbers
        decay = ema_decay if isinstance(ema_decay, torch.Tensor) else None
        number = 0.0 if ema_decay is None or decay is not None else float(ema_decay)
        for kind, table in self._launches:
            launch(
                _adamw_ema_kernel, len(table.chunk_row), self._counter,
                table.rows, table.chunk_row, self._hyper, grad_scale, found_inf, decay, number, self._counter,
                len(table.rows), kind[0], *map(_tl_dtype, kind[1:7]), *kind[7:], table.rows.shape[1],
                power_of_2(len(table.rows)), CHUNK, BLOCK, num_warps=4,
            )  # fmt: skip

    # --- state ---

    def load_state_dict(self, state_dict) -> None:
        """torch's, but what it would round to the parameter's bfloat16 beside a remainder is restored."""
        super().load_state_dict(state_dict)
        self._pointers = None
        if not self.remainder:
            return
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            if p.dtype != torch.bfloat16 or i not in state_dict["state"]:
                continue
            state = state_dict["state"][i]
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[p][name] = state[name].to(p.device, torch.float32, copy=True)
            remainder = state.get("remainder")
            self.state[p]["remainder"] = (
                torch.zeros_like(p, dtype=torch.int16) if remainder is None else remainder.to(p.device, copy=True)
            )
