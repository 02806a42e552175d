"""The kernel and the registered operation of `AdamWEMA`."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch

from ajepa_kernels._tables import BLOCK, CHUNK, cached, is_aligned, load_pointer, load_size, table, tl_dtype, to_device
from ajepa_kernels._triton import jit, launch, register, tl
from ajepa_kernels.fp8 import note_largest, to_e4m3

# Columns of a table row: 0 first chunk, 1 param, 2 exp_avg, 3 exp_avg_sq, 4 remainder, 5 ema, 6 copy, 7 ema copy,
# 8 step, 9 lr, 10 weight decay, 11 group, 12 state of the ema copy's scaling, 13 size.
# Numbers of a group: 0 beta1, 1 beta2, 2 and 3 their logarithms, 4 eps, 5 lr and 6 weight decay (used if the row has no
# pointers to them), 7 factor of the gradients (-1 to maximise).
# Gradients are new tensors at each step. Their addresses have a separate table, so that the rows can be reused.


@jit
def _rate(pointer_ptr, number_ptr):
    pointer = tl.load(pointer_ptr)
    number = tl.load(number_ptr).to(tl.float32)
    return tl.load(pointer.to(tl.pointer_type(tl.float32)), mask=pointer != 0, other=number)


@jit
def _adamw_ema_kernel(
    table_ptr, grads_ptr, chunk_row_ptr, hyper_ptr, grad_scale_ptr, found_inf_ptr, decay_ptr, decay, done_ptr,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, EMA: tl.constexpr,
    COPY: tl.constexpr, EMA_COPY: tl.constexpr, REMAINDER: tl.constexpr, ALIGNED: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, EMA_ON_SKIP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    if found_inf_ptr is not None and not EMA_ON_SKIP:  # noqa: SIM102 (the outer condition is decided at compile time)
        if tl.load(found_inf_ptr) != 0.0:
            return
    row = tl.load(chunk_row_ptr + pid)
    row_ptr = table_ptr + row * COLUMNS
    param_ptr = load_pointer(row_ptr, 1, PARAM, ALIGNED)
    grad_ptr = load_pointer(grads_ptr + row, 0, GRAD, ALIGNED)
    exp_avg_ptr = load_pointer(row_ptr, 2, STATE, ALIGNED)
    exp_avg_sq_ptr = load_pointer(row_ptr, 3, STATE, ALIGNED)
    has_remainder = tl.load(row_ptr + 4) != 0
    remainder_ptr = load_pointer(row_ptr, 4, tl.int16, ALIGNED)
    has_ema = tl.load(row_ptr + 5) != 0
    ema_ptr = load_pointer(row_ptr, 5, EMA, ALIGNED)
    has_copy = tl.load(row_ptr + 6) != 0
    copy_ptr = load_pointer(row_ptr, 6, COPY, ALIGNED)
    has_ema_copy = tl.load(row_ptr + 7) != 0
    ema_copy_ptr = load_pointer(row_ptr, 7, EMA_COPY, ALIGNED)
    has_grad = tl.load(row_ptr + 8) != 0
    if found_inf_ptr is not None and EMA_ON_SKIP:  # the average moves as that of a parameter without a gradient
        has_grad &= tl.load(found_inf_ptr) == 0.0
    size = load_size(row_ptr + 13, ALIGNED)
    start = (pid - tl.load(row_ptr)) * CHUNK

    if decay_ptr is not None:
        decay = tl.load(decay_ptr).to(tl.float32)
    # float64 scalars, because 1 - beta2^step loses its digits in float32
    hyper_ptr += tl.load(row_ptr + 11) * 8
    beta1, beta2 = tl.load(hyper_ptr), tl.load(hyper_ptr + 1)
    eps = tl.load(hyper_ptr + 4).to(tl.float32)
    inverse_scale = tl.load(hyper_ptr + 7).to(tl.float32)
    if grad_scale_ptr is not None:
        inverse_scale /= tl.load(grad_scale_ptr).to(tl.float32)
    step_size, shrink, root_correction = 0.0, 1.0, 1.0
    if has_grad:
        step = tl.load(load_pointer(row_ptr, 8, tl.float32, False)).to(tl.float64) + 1.0
        lr = _rate(row_ptr + 9, hyper_ptr + 5)
        step_size = (lr.to(tl.float64) / (1.0 - tl.exp(step * tl.load(hyper_ptr + 2)))).to(tl.float32)
        root_correction = tl.sqrt(1.0 - tl.exp(step * tl.load(hyper_ptr + 3))).to(tl.float32)
        shrink = 1.0 - lr * _rate(row_ptr + 10, hyper_ptr + 6)
    lerp1, keep2, lerp2 = (1.0 - beta1).to(tl.float32), beta2.to(tl.float32), (1.0 - beta2).to(tl.float32)
    if tl.float8e4nv == EMA_COPY:
        inverse = tl.div_rn(1.0, tl.load(load_pointer(row_ptr, 12, tl.float32, False)))
        largest = tl.zeros([BLOCK], tl.float32)

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
            exp_avg += lerp1 * (grad - exp_avg)
            exp_avg_sq = keep2 * exp_avg_sq + lerp2 * grad * grad
            param = param * shrink - step_size * exp_avg / (tl.sqrt_rn(exp_avg_sq) / root_correction + eps)
            tl.store(exp_avg_ptr + offsets, exp_avg.to(STATE), mask=mask)
            tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq.to(STATE), mask=mask)
            if REMAINDER:
                # Round to the nearest bfloat16, ties away from zero, so that the remainder fits in 16 signed bits. A
                # NaN keeps its upper half, made quiet, because rounding could carry into its sign bit.
                bits = param.to(tl.int32, bitcast=True)
                high = tl.where(param != param, (bits >> 16) | 0x40, (bits + 0x8000) >> 16)
                low = tl.where(param != param, 0, bits - (high << 16))
                tl.store(param_ptr + offsets, high.to(tl.int16).to(PARAM, bitcast=True), mask=mask)
                tl.store(remainder_ptr + offsets, low.to(tl.int16), mask=mask)
            else:
                tl.store(param_ptr + offsets, param.to(PARAM), mask=mask)
        tl.store(copy_ptr + offsets, param.to(COPY), mask=mask & has_copy)
        ema = param + decay * (ema - param)
        tl.store(ema_ptr + offsets, ema.to(EMA), mask=mask & has_ema)
        if tl.float8e4nv == EMA_COPY:
            largest = tl.maximum(largest, tl.where(mask, tl.abs(ema), 0.0))
            tl.store(ema_copy_ptr + offsets, to_e4m3(ema, inverse), mask=mask)
        else:
            tl.store(ema_copy_ptr + offsets, ema.to(EMA_COPY), mask=mask & has_ema_copy)

    if tl.float8e4nv == EMA_COPY:
        row_ptr = table_ptr + tl.load(chunk_row_ptr + pid) * COLUMNS
        note_largest(load_pointer(row_ptr, 12, tl.float32, False), tl.max(largest, 0))

    # All threads must have read the step before this program counts as done; the row's last program increments it.
    tl.debug_barrier()
    if has_grad:
        row = tl.load(chunk_row_ptr + pid)  # loaded again, so that it occupies no register during the loop
        chunks = tl.maximum(tl.cdiv(tl.load(table_ptr + row * COLUMNS + 13), CHUNK), 1)
        if tl.atomic_add(done_ptr + row, 1) == chunks - 1:
            step_ptr = load_pointer(table_ptr + row * COLUMNS, 8, tl.float32, False)
            tl.store(step_ptr, tl.load(step_ptr) + 1.0)
            tl.store(done_ptr + row, 0)


def _kind(tensors: tuple[torch.Tensor | None, ...]) -> tuple:
    """Returns the kind of a row: rows of one kind share a launch. A missing tensor counts as one of the usual dtype."""
    param, grad, exp_avg, _, remainder, ema, copy, ema_copy = tensors
    p = param.dtype  # type: ignore[union-attr]
    usual = (p, p, p if remainder is None else torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
    own = (param, grad, exp_avg, ema, copy, ema_copy)
    dtypes = (u if x is None else x.dtype for x, u in zip(own, usual, strict=True))
    return *dtypes, remainder is not None, is_aligned(tensors)


def updated_together(
    params, grads, exp_avgs, exp_avg_sqs, remainders, emas, copies, ema_copies, places
) -> list[tuple[torch.Tensor | None, ...]]:
    """For each parameter, the tensors that are updated with it element by element. Arguments as in the operation."""
    of = lambda tensors, i: tensors[i] if 0 <= i < len(tensors) else None  # noqa: E731
    return [
        (
            param, of(grads, i), of(exp_avgs, i), of(exp_avg_sqs, i),
            of(remainders, remainder), of(emas, ema), of(copies, copy), of(ema_copies, ema_copy),
        )
        for i, (param, remainder, ema, copy, ema_copy) in enumerate(
            zip(params, places[0::6], places[1::6], places[2::6], places[3::6], strict=True)
        )
    ]  # fmt: skip


class Rows(NamedTuple):
    """The rows that one launch updates."""

    rows: tuple[tuple[int, ...], ...]  # rows of its table
    grads: tuple[int, ...]  # the index of each row's gradient, -1 if it has none


def launch_rows(together: list[tuple], steps, scalings, rates, places, groups) -> dict[tuple, Rows]:
    """The rows of each kind of launch. `together` is the result of `updated_together`."""
    address = lambda x: 0 if x is None else x.data_ptr()  # noqa: E731
    rate = [0 if i < 0 else rates[i].data_ptr() for i in groups]
    kinds: dict[tuple, list[tuple]] = {}
    for i, ((param, grad, *others), group, scaling) in enumerate(
        zip(together, places[4::6], places[5::6], strict=True)
    ):
        has_grad = i < len(steps)
        step = steps[i].data_ptr() if has_grad else 0
        state = 0 if scaling < 0 else scalings[scaling].data_ptr()
        numbers = (rate[2 * group], rate[2 * group + 1], group, state, param.numel())
        row = (param.data_ptr(), *map(address, others), step, *numbers)
        kinds.setdefault(_kind((param, grad, *others)), []).append((row, i if has_grad else -1))
    return {kind: Rows(*zip(*pairs, strict=True)) for kind, pairs in kinds.items()}


def _array(values: list, dtype: torch.dtype, x: torch.Tensor) -> tuple[torch.Tensor]:
    return (to_device(torch.tensor(values, dtype=dtype), x),)


def launch_adamw_ema(
    kinds: dict[tuple, Rows], grads: list[int], x, hyper, grad_scale, found_inf, decay_tensor, decay, ema_on_skip
) -> None:
    """kinds: result of `launch_rows`; grads: addresses; x: a tensor that is written; the rest as in the operation."""
    logarithms = lambda beta: math.log(beta) if beta else -math.inf  # noqa: E731
    numbers = [
        (b1, b2, logarithms(b1), logarithms(b2), *rest)
        for b1, b2, *rest in (hyper[i : i + 6] for i in range(0, len(hyper), 6))
    ]
    (hyper,) = cached((x.device, "hyper", *hyper), partial(_array, numbers, torch.float64, x), x)
    grads = [*grads, 0]  # for index -1
    for kind, (rows, places) in kinds.items():
        made = cached((x.device, rows), partial(table, rows, x), x)
        addresses = [grads[i] for i in places]
        (grad_table,) = cached((x.device, "grads", *addresses), partial(_array, addresses, torch.int64, x), x)
        launch(
            _adamw_ema_kernel, len(made.chunk_row), x,
            made.rows, grad_table, made.chunk_row, hyper, grad_scale, found_inf, decay_tensor, decay, made.done,
            *map(tl_dtype, kind[:6]), *kind[6:], made.rows.shape[1], CHUNK, BLOCK,
            ema_on_skip, num_warps=4,
        )  # fmt: skip


@register(
    "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] steps, Tensor(e!)[] remainders, Tensor(f!)[] emas, Tensor(g!)[] copies, Tensor(h!)[] ema_copies, "
    "Tensor(i!)[] scalings, Tensor[] rates, int[] places, int[] groups, float[] hyper, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? decay_tensor, float decay, bool ema_on_skip=False) -> ()",
    lambda *args: None,
)
def _adamw_ema(
    params, grads, exp_avgs, exp_avg_sqs, steps, remainders, emas, copies, ema_copies, scalings,
    rates, places, groups, hyper, grad_scale, found_inf, decay_tensor, decay, ema_on_skip=False,
):  # fmt: skip
    """The first `len(grads)` parameters have a gradient and moments; of the rest, only average and copies are updated.

    places: for each parameter, its index in remainders, emas, copies, ema_copies and scalings (-1 if it has none) and
        its group.
    scalings: states of the `Scaling` of float8 copies.
    groups: for each group, the indices in `rates` of its learning rate and weight decay (-1: a number in `hyper`).
    hyper: for each group, beta1, beta2, eps, learning rate, weight decay, and 1, or -1 to maximise.
    ema_on_skip: `found_inf` stops the update of the parameters only, not that of averages and copies.
    """
    together = updated_together(params, grads, exp_avgs, exp_avg_sqs, remainders, emas, copies, ema_copies, places)
    kinds = launch_rows(together, steps, scalings, rates, places, groups)
    addresses = [grad.data_ptr() for grad in grads]
    launch_adamw_ema(kinds, addresses, params[0], hyper, grad_scale, found_inf, decay_tensor, decay, ema_on_skip)
    for mutated in (params, exp_avgs, exp_avg_sqs, steps, remainders, emas, copies, ema_copies, scalings):
        torch.autograd.graph.increment_version(mutated)
