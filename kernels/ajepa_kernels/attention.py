"""Attention in which only visible patches take part.

Shapes: B samples, N patches, V visible; R sequences, T packed tokens (all sequences end to end), S longest sequence,
H heads, D head dim. A *slot* is a position in the list of tokens that the sequences run over, a *row* the place of
that token in memory: the same number, unless the layout gathers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ajepa_kernels._triton import arch, jit, launch, power_of_2, register, tl, use_triton

HEAD_DIMS = (32, 64, 96, 128)
SHORT = 128  # longest sequence whose scores fit on chip whole


class Layout(NamedTuple):
    """Which rows attend to which: sequence r is slots `q_start[r]:q_end[r]`, its keys `k_start[r]:k_end[r]`.

    `k_start` None: the keys are those of the queries' slots.
    """

    q_start: torch.Tensor
    q_end: torch.Tensor
    q_rows: torch.Tensor | None  # row of each query slot; None: the slot itself
    k_start: torch.Tensor | None
    k_end: torch.Tensor | None
    k_rows: torch.Tensor | None
    max_q: int
    max_k: int
    slots: int  # query slots in all
    scatter: bool  # the output has a row for each row of q, not one for each slot

    def keys(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self[:3] if self.k_start is None else self[3:6]  # type: ignore[return-value]


# --- forward --------------------------------------------------------------------------------------------------------


@jit
def _rows(rows_ptr, slot, valid):
    if rows_ptr is None:  # noqa: SIM108 (settled when compiling)
        rows = slot.to(tl.int64)
    else:
        rows = tl.load(rows_ptr + slot, mask=valid, other=0).to(tl.int64)
    return rows


@jit
def _load(ptr, rows, valid, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = valid[:, None] if D == BLOCK_D else valid[:, None] & (d < D)
    return tl.load(ptr + rows[:, None] * stride + d, mask=mask, other=0.0)


@jit
def _store(ptr, x, rows, valid, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = valid[:, None] if D == BLOCK_D else valid[:, None] & (d < D)
    tl.store(ptr + rows[:, None] * stride + d, x.to(ptr.dtype.element_ty), mask=mask)


@jit
def _softmax(s):
    """Row softmax in base 2; rows without any key come out as zeros."""
    m = tl.max(s, 1)
    p = tl.exp2(s - tl.where(m == float("-inf"), 0.0, m)[:, None])
    total = tl.sum(p, 1)
    return p / tl.where(total == 0.0, 1.0, total)[:, None]


@jit
def _masked_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_start_ptr, q_end_ptr, q_rows_ptr, k_start_ptr, k_end_ptr, k_rows_ptr,
    stride_q, stride_k, stride_v, slots, scale, H, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SCATTER: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # heads of one sequence run side by side: their rows are neighbours in memory
    pid = tl.program_id(0)
    h, tile, r = pid % H, pid // H % tiles, pid // H // tiles
    q_start, q_end = tl.load(q_start_ptr + r).to(tl.int32), tl.load(q_end_ptr + r).to(tl.int32)
    k_start, k_end = tl.load(k_start_ptr + r).to(tl.int32), tl.load(k_end_ptr + r).to(tl.int32)
    q_slot = q_start + tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_valid = q_slot < q_end
    if q_start + tile * BLOCK_Q >= q_end:
        return
    q_rows = _rows(q_rows_ptr, q_slot, q_valid)
    q = _load(q_ptr + h * D, q_rows, q_valid, stride_q, D, BLOCK_D)
    scale = scale * 1.4426950408889634  # exp2 is the hardware's own
    if ONE_TILE:
        k_slot = k_start + tl.arange(0, BLOCK_K)
        k_valid = k_slot < k_end
        k_rows = _rows(k_rows_ptr, k_slot, k_valid)
        k = _load(k_ptr + h * D, k_rows, k_valid, stride_k, D, BLOCK_D)
        v = _load(v_ptr + h * D, k_rows, k_valid, stride_v, D, BLOCK_D)
        s = tl.where(k_valid[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
        out = tl.dot(_softmax(s).to(v.dtype), v, input_precision=PRECISION)
    else:
        m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for start in range(k_start, k_end, BLOCK_K):
            k_slot = start + tl.arange(0, BLOCK_K)
            k_valid = k_slot < k_end
            k_rows = _rows(k_rows_ptr, k_slot, k_valid)
            k = _load(k_ptr + h * D, k_rows, k_valid, stride_k, D, BLOCK_D)
            s = tl.where(k_valid[None, :], tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))  # finite: every tile holds a key
            p = tl.exp2(s - m_new[:, None])
            shrink = tl.exp2(m - m_new)
            total = total * shrink + tl.sum(p, 1)
            v = _load(v_ptr + h * D, k_rows, k_valid, stride_v, D, BLOCK_D)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
            m = m_new
        total = tl.where(total == 0.0, 1.0, total)
        out = out / total[:, None]
        tl.store(lse_ptr + h.to(tl.int64) * slots + q_slot, m + tl.log2(total), mask=q_valid)
    out_rows = q_rows if SCATTER else q_slot.to(tl.int64)
    _store(out_ptr + h * D, out, out_rows, q_valid, H * D, D, BLOCK_D)


class Config(NamedTuple):
    block_q: int
    block_k: int
    num_warps: int
    num_stages: int = 1


# Warps (forward, backward) of sequences held in one tile, 16-bit dtypes, by rounded length and head dim. Chosen from
# the compiler's registers and shared memory (tests/test_aot.py holds them to it), not yet by timing on each GPU.
_ONE_TILE = {
    (16, 32): (1, 1), (16, 64): (1, 1), (16, 128): (2, 2),
    (32, 32): (2, 2), (32, 64): (2, 4), (32, 128): (4, 4),
    (64, 32): (4, 4), (64, 64): (4, 4), (64, 128): (8, 8),
    (128, 32): (8, 8), (128, 64): (8, 8), (128, 128): (8, 8),
}  # fmt: skip
# what differs by compute capability
_ONE_TILE_BY_ARCH = {(100, 128, 64): (4, 8)}
_LONG_FWD = {(90, 32): Config(128, 64, 8, 2), (90, 64): Config(128, 64, 8, 2)}
_LONG_BWD = {(100, 32): Config(64, 64, 4, 2), (100, 64): Config(64, 64, 4, 2)}
_LONG_BWD_FP32 = {(90, 128): Config(64, 32, 8), (100, 64): Config(16, 32, 8), (100, 128): Config(16, 32, 8)}


def _gpu(q: torch.Tensor) -> int:
    return min(arch(q) // 10 * 10, 100)


def _longest_tile(q: torch.Tensor) -> int:
    """The longest sequence that one tile holds without spilling registers, a power of two."""
    D = power_of_2(q.shape[-1])
    if q.element_size() == 2:
        return 64 if _gpu(q) < 90 and D > 32 else SHORT  # mma operands of a 128 tile do not fit in registers
    return 32 if D <= 64 else 16


def _config(q: torch.Tensor, max_q: int, max_k: int, backward: bool) -> tuple[bool, Config]:
    """(whole sequence in one tile?, its configuration) for this GPU, dtype and rounded size."""
    gpu, half, D = _gpu(q), q.element_size() == 2, power_of_2(q.shape[-1])
    tile = max(power_of_2(max(max_q, max_k)), 16)
    if tile <= _longest_tile(q):
        warps = _ONE_TILE_BY_ARCH.get((gpu, tile, D), _ONE_TILE[tile, D]) if half else (4, 4)
        return True, Config(tile, tile, warps[backward])
    if not half:
        config = Config(32, 32, 8)
        return False, _LONG_BWD_FP32.get((gpu, D), config) if backward else config
    if backward:
        return False, _LONG_BWD.get((gpu, D), Config(32, 64, 4, 2))
    return False, _LONG_FWD.get((gpu, D), Config(64, 64, 4, 2))


def _operands(q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None):
    """q, k, v as `[rows, H, D]` views, heads and channels dense: what the kernels take."""
    tensors = q.unbind(1) if k is None or v is None else (q, k, v)
    return [x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in tensors]


def _masked_attention_fwd_fake(
    q, k, v, q_start, q_end, q_rows, k_start, k_end, k_rows, max_q, max_k, slots, scatter, scale, tf32
):  # fmt: skip
    H, D = q.shape[-2:]
    one_tile = max_q <= _longest_tile(q) and max_k <= _longest_tile(q)
    return q.new_empty(q.shape[0] if scatter else slots, H, D), q.new_empty(
        (0 if one_tile else H, slots), dtype=torch.float32
    )


_LAYOUT = (
    "Tensor q_start, Tensor q_end, Tensor? q_rows, Tensor? k_start, Tensor? k_end, Tensor? k_rows, "
    "SymInt max_q, SymInt max_k, SymInt slots, bool scatter, float scale, bool tf32"
)


@register(
    f"masked_attention_fwd(Tensor q, Tensor? k, Tensor? v, {_LAYOUT}) -> (Tensor out, Tensor lse)",
    _masked_attention_fwd_fake,
)
def _masked_attention_fwd(
    q, k, v, q_start, q_end, q_rows, k_start, k_end, k_rows, max_q, max_k, slots, scatter, scale, tf32
):  # fmt: skip
    """k None: q holds all three, `[rows, 3, H, D]`. lse (base 2, `[H, slots]`) is only written for long sequences."""
    if k_start is None:
        k_start, k_end, k_rows = q_start, q_end, q_rows
    one_tile, config = _config(q, max_q, max_k, backward=False)
    allocate = torch.zeros if scatter else torch.empty  # rows that no sequence owns are zero
    H, D = q.shape[-2:]
    out = allocate(q.shape[0] if scatter else slots, H, D, dtype=q.dtype, device=q.device)
    lse = allocate(0 if one_tile else H, slots, dtype=torch.float32, device=q.device)
    q, k, v = _operands(q, k, v)
    tiles = -(-max_q // config.block_q)
    launch(
        _masked_attention_fwd_kernel, q_start.shape[0] * tiles * H, q,
        q, k, v, out, lse, q_start, q_end, q_rows, k_start, k_end, k_rows,
        q.stride(0), k.stride(0), v.stride(0), slots, scale, H, tiles,
        D, power_of_2(D), config.block_q, config.block_k, scatter, one_tile, "tf32" if tf32 else "ieee",
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, lse


# --- backward -------------------------------------------------------------------------------------------------------


@jit
def _masked_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_start_ptr, q_end_ptr, q_rows_ptr, k_start_ptr, k_end_ptr, k_rows_ptr,
    stride_q, stride_k, stride_v, stride_dq, stride_dk, stride_dv, scale, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence and head whole: the probabilities are recomputed, the forward's output and log-sum-exp not read."""
    pid = tl.program_id(0)
    h, r = pid % H, pid // H
    q_start, q_end = tl.load(q_start_ptr + r).to(tl.int32), tl.load(q_end_ptr + r).to(tl.int32)
    k_start, k_end = tl.load(k_start_ptr + r).to(tl.int32), tl.load(k_end_ptr + r).to(tl.int32)
    q_slot, k_slot = q_start + tl.arange(0, BLOCK_Q), k_start + tl.arange(0, BLOCK_K)
    q_valid, k_valid = q_slot < q_end, k_slot < k_end
    q_rows, k_rows = _rows(q_rows_ptr, q_slot, q_valid), _rows(k_rows_ptr, k_slot, k_valid)
    q = _load(q_ptr + h * D, q_rows, q_valid, stride_q, D, BLOCK_D)
    k = _load(k_ptr + h * D, k_rows, k_valid, stride_k, D, BLOCK_D)
    v = _load(v_ptr + h * D, k_rows, k_valid, stride_v, D, BLOCK_D)
    do_rows = q_rows if SCATTER else q_slot.to(tl.int64)
    do = _load(do_ptr + h * D, do_rows, q_valid, H * D, D, BLOCK_D)

    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
    p = _softmax(tl.where(k_valid[None, :], s, float("-inf")))
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)  # padded queries: do is zero
    _store(dv_ptr + h * D, dv, k_rows, k_valid, stride_dv, D, BLOCK_D)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    # sum(p dp) over the keys equals sum(do out) over the channels
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)
    dq = tl.dot(ds, k, input_precision=PRECISION)
    _store(dq_ptr + h * D, dq, q_rows, q_valid, stride_dq, D, BLOCK_D)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    _store(dk_ptr + h * D, dk, k_rows, k_valid, stride_dk, D, BLOCK_D)


@jit
def _masked_attention_delta_kernel(
    out_ptr, do_ptr, delta_ptr, q_start_ptr, q_end_ptr, q_rows_ptr, slots, H, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """delta = sum(do out) over the channels, for long sequences, whose keys no program sees all at once."""
    pid = tl.program_id(0)
    h, tile, r = pid % H, pid // H % tiles, pid // H // tiles
    q_slot = tl.load(q_start_ptr + r).to(tl.int32) + tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_valid = q_slot < tl.load(q_end_ptr + r).to(tl.int32)
    rows = _rows(q_rows_ptr if SCATTER else None, q_slot, q_valid)
    out = _load(out_ptr + h * D, rows, q_valid, H * D, D, BLOCK_D).to(tl.float32)
    do = _load(do_ptr + h * D, rows, q_valid, H * D, D, BLOCK_D).to(tl.float32)
    tl.store(delta_ptr + h.to(tl.int64) * slots + q_slot, tl.sum(out * do, 1), mask=q_valid)


@jit
def _masked_attention_long_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_start_ptr, q_end_ptr, q_rows_ptr, k_start_ptr, k_end_ptr, k_rows_ptr,
    stride_q, stride_k, stride_v, stride_dq, stride_dk, stride_dv, slots, scale, H, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys against all queries (dk, dv), then one tile of queries against all keys (dq): no atomics."""
    pid = tl.program_id(0)
    h, tile, r = pid % H, pid // H % tiles, pid // H // tiles
    q_start, q_end = tl.load(q_start_ptr + r).to(tl.int32), tl.load(q_end_ptr + r).to(tl.int32)
    k_start, k_end = tl.load(k_start_ptr + r).to(tl.int32), tl.load(k_end_ptr + r).to(tl.int32)
    q_ptr += h * D
    k_ptr += h * D
    v_ptr += h * D
    do_ptr += h * D
    lse_ptr += h.to(tl.int64) * slots
    delta_ptr += h.to(tl.int64) * slots
    log2e_scale = scale * 1.4426950408889634

    k_slot = k_start + tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k_valid = k_slot < k_end
    if k_start + tile * BLOCK_K < k_end:
        k_rows = _rows(k_rows_ptr, k_slot, k_valid)
        k = _load(k_ptr, k_rows, k_valid, stride_k, D, BLOCK_D)
        v = _load(v_ptr, k_rows, k_valid, stride_v, D, BLOCK_D)
        dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        for start in range(q_start, q_end, BLOCK_Q):
            slot = start + tl.arange(0, BLOCK_Q)
            valid = slot < q_end
            rows = _rows(q_rows_ptr, slot, valid)
            q = _load(q_ptr, rows, valid, stride_q, D, BLOCK_D)
            do = _load(do_ptr, rows if SCATTER else slot.to(tl.int64), valid, H * D, D, BLOCK_D)
            lse = tl.load(lse_ptr + slot, mask=valid, other=float("inf"))  # p = 0 for padded queries
            delta = tl.load(delta_ptr + slot, mask=valid, other=0.0)
            # scores transposed, so that both products below read them as they lie; padded keys are not stored
            p_t = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2e_scale - lse[None, :])
            dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=PRECISION)
            dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            dk = tl.dot((p_t * (dp_t - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
        _store(dv_ptr + h * D, dv, k_rows, k_valid, stride_dv, D, BLOCK_D)
        _store(dk_ptr + h * D, dk * scale, k_rows, k_valid, stride_dk, D, BLOCK_D)

    q_slot = q_start + tile * BLOCK_K + tl.arange(0, BLOCK_K)
    q_valid = q_slot < q_end
    if q_start + tile * BLOCK_K < q_end:
        q_rows = _rows(q_rows_ptr, q_slot, q_valid)
        q = _load(q_ptr, q_rows, q_valid, stride_q, D, BLOCK_D)
        do = _load(do_ptr, q_rows if SCATTER else q_slot.to(tl.int64), q_valid, H * D, D, BLOCK_D)
        lse = tl.load(lse_ptr + q_slot, mask=q_valid, other=float("inf"))
        delta = tl.load(delta_ptr + q_slot, mask=q_valid, other=0.0)
        dq = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        for start in range(k_start, k_end, BLOCK_Q):
            slot = start + tl.arange(0, BLOCK_Q)
            valid = slot < k_end
            rows = _rows(k_rows_ptr, slot, valid)
            k = _load(k_ptr, rows, valid, stride_k, D, BLOCK_D)
            v = _load(v_ptr, rows, valid, stride_v, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2e_scale
            p = tl.where(valid[None, :], tl.exp2(s - lse[:, None]), 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
        _store(dq_ptr + h * D, dq * scale, q_rows, q_valid, stride_dq, D, BLOCK_D)


def _masked_attention_bwd_fake(
    do, q, k, v, out, lse, q_start, q_end, q_rows, k_start, k_end, k_rows, max_q, max_k, slots, scatter, scale, tf32
):  # fmt: skip
    if k is None:
        return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(0), q.new_empty(0)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


@register(
    "masked_attention_bwd(Tensor do, Tensor q, Tensor? k, Tensor? v, Tensor? out, Tensor? lse, "
    f"{_LAYOUT}) -> (Tensor dq, Tensor dk, Tensor dv)",
    _masked_attention_bwd_fake,
)
def _masked_attention_bwd(
    do, q, k, v, out, lse, q_start, q_end, q_rows, k_start, k_end, k_rows, max_q, max_k, slots, scatter, scale, tf32
):  # fmt: skip
    """k None: dq holds all three. out and lse are only read for long sequences."""
    if k_start is None:
        k_start, k_end, k_rows = q_start, q_end, q_rows
    one_tile, config = _config(q, max_q, max_k, backward=True)
    # where rows are gathered, those that no sequence owns have zero gradient
    allocate = torch.empty_like if q_rows is None and k_rows is None else torch.zeros_like
    grads = [allocate(x, memory_format=torch.contiguous_format) for x in ([q] if k is None else [q, k, v])]
    dq, dk, dv = grads[0].unbind(1) if k is None else grads
    H, D = q.shape[-2:]
    q_, k_, v_ = _operands(q, k, v)
    do = do.contiguous()
    strides = [x.stride(0) for x in (q_, k_, v_, dq, dk, dv)]
    R, layout = q_start.shape[0], (q_start, q_end, q_rows, k_start, k_end, k_rows)
    consts = (D, power_of_2(D), config.block_q, config.block_k, scatter, "tf32" if tf32 else "ieee")
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if one_tile:
        launch(
            _masked_attention_bwd_kernel, R * H, q_,
            q_, k_, v_, do, dq, dk, dv, *layout, *strides, scale, H, *consts, **options,
        )  # fmt: skip
    else:
        delta = torch.empty_like(lse)
        tiles = -(-max_q // 32)
        launch(
            _masked_attention_delta_kernel, R * tiles * H, q_,
            out, do, delta, q_start, q_end, q_rows, slots, H, tiles, D, power_of_2(D), 32, scatter, num_warps=4,
        )  # fmt: skip
        tiles = -(-max(max_q, max_k) // config.block_k)
        launch(
            _masked_attention_long_bwd_kernel, R * tiles * H, q_,
            q_, k_, v_, do, lse, delta, dq, dk, dv, *layout, *strides, slots, scale, H, tiles, *consts, **options,
        )  # fmt: skip
    return (*grads, q.new_empty(0), q.new_empty(0)) if k is None else tuple(grads)


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, tf32, *layout):
        out, lse = torch.ops.ajepa.masked_attention_fwd(q, k, v, *layout, scale, tf32)
        ctx.scale, ctx.tf32, ctx.numbers = scale, tf32, layout[6:]
        # short sequences recompute their probabilities from q and k alone
        ctx.save_for_backward(q, k, v, *((out, lse) if lse.shape[0] else (None, None)), *layout[:6])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        q, k, v, out, lse, *layout = ctx.saved_tensors
        dq, dk, dv = torch.ops.ajepa.masked_attention_bwd(
            do, q, k, v, out, lse, *layout, *ctx.numbers, ctx.scale, ctx.tf32
        )
        return dq, *((None, None) if k is None else (dk, dv)), *[None] * (2 + len(Layout._fields))


# --- plain definition -----------------------------------------------------------------------------------------------


def _positions(slots: int, start: torch.Tensor, end: torch.Tensor, length: int):
    """Of each slot, its place in `[R * length]` padded tokens (past their end if no sequence owns it); of each place,
    whether a slot fills it, `[R, length]`."""
    R, slot = start.shape[0], torch.arange(slots, device=start.device)
    sequence = torch.searchsorted(start.long(), slot, right=True) - 1
    place = sequence * length + slot - start[sequence]
    real = torch.arange(length, device=start.device) < (end - start)[:, None]
    return place.where(slot < end[sequence], R * length), real


def _pad(x: torch.Tensor, rows: torch.Tensor | None, place: torch.Tensor, R: int, length: int) -> torch.Tensor:
    """x `[rows, H, D]` as `[R, H, length, D]`, zero where there is no token."""
    x = x if rows is None else x.index_select(0, rows)
    flat = x.flatten(1)  # torch copies rows by index ten times faster where they have one axis
    padded = x.new_zeros(R * length + 1, flat.shape[1]).index_copy(0, place, flat)
    return padded[:-1].view(R, length, *x.shape[1:]).transpose(1, 2)


def _attention_reference(q, k, v, layout: Layout, scale: float | None) -> torch.Tensor:
    rows, (H, D) = q.shape[0] if layout.scatter else layout.slots, q.shape[1:]
    R, S = layout.q_start.shape[0], layout.max_q
    if 0 in (layout.slots, R, S, layout.max_k, k.shape[0]):
        return q.new_zeros(rows, H, D) + (q[:0].sum() + k[:0].sum() + v[:0].sum())  # still part of the graph
    k_start, k_end, k_rows = layout.keys()
    if layout.q_rows is None and k_rows is None and R * S == q.shape[0] == k.shape[0] and layout.max_k == S:
        # every sequence full: no padding, no mask
        q, k, v = (x.unflatten(0, (R, S)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(rows, H, D)
    q_place, _ = _positions(layout.slots, layout.q_start, layout.q_end, S)
    k_place, real = _positions(k.shape[0] if k_rows is None else k_rows.shape[0], k_start, k_end, layout.max_k)
    # a sequence without keys attends to its padding, whose values are zero
    keys = (real | ~real.any(1, keepdim=True))[:, None, None, :]
    q = _pad(q, layout.q_rows, q_place, R, S)
    k, v = (_pad(x, k_rows, k_place, R, layout.max_k) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale).transpose(1, 2).reshape(R * S, H, D)
    if layout.q_rows is None:
        return out.index_select(0, q_place)
    out = out.index_select(0, q_place.clamp(max=R * S - 1)).where((q_place < R * S)[:, None, None], 0)
    return out.new_zeros(rows, H, D).index_copy(0, layout.q_rows.long(), out) if layout.scatter else out


def masked_attention_reference(
    qkv_T3HD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None = None
) -> torch.Tensor:
    """Plain PyTorch definition of packed `masked_attention`: pad to the longest, SDPA with a key mask, unpad."""
    return masked_attention(qkv_T3HD, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, impl="reference")


# --- layouts --------------------------------------------------------------------------------------------------------


def _partition(mask_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the True entries of each sample first, in order, then the others; and how many are True. No sync."""
    B, N = mask_BN.shape
    order = torch.argsort(mask_BN.logical_not().byte(), dim=1, stable=True)
    return (order + torch.arange(0, B * N, max(N, 1), device=mask_BN.device)[:, None]).flatten(), mask_BN.sum(1)


def _visible_rows(visible_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the True entries alone and the samples' `cu_seqlens`. Their number is read from the device."""
    cu = F.pad(visible_BN.sum(1).cumsum(0), (1, 0))
    return visible_BN.flatten().nonzero().squeeze(1), cu


def _packed_key_rows(key_mask_T: torch.Tensor, cu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_partition`, for packed sequences: the kept keys of each sequence first, and where each one's keys end."""
    T = key_mask_T.shape[0]
    sequence = torch.searchsorted(cu[1:].contiguous(), torch.arange(T, device=cu.device, dtype=cu.dtype), right=True)
    kept = F.pad(key_mask_T.cumsum(0), (1, 0))[cu.long()]
    return torch.argsort(2 * sequence + ~key_mask_T, stable=True), cu[:-1] + kept.diff()


def _packed_layout(q, cu, max_seqlen, cu_k, max_seqlen_k, key_mask) -> Layout:
    k_start = k_end = k_rows = None
    if key_mask is not None:
        cu_k = cu if cu_k is None else cu_k
        k_rows, k_end = _packed_key_rows(key_mask, cu_k)
    elif cu_k is not None:
        k_end = cu_k[1:]
    if cu_k is not None:
        k_start = cu_k[:-1]
    max_k = max_seqlen if max_seqlen_k is None else max_seqlen_k
    return Layout(cu[:-1], cu[1:], None, k_start, k_end, k_rows, max_seqlen, max_k, q.shape[0], False)


def _dense_layout(q, k, visible, cu, max_seqlen, key_mask, scatter: bool) -> Layout:
    """q `[B, N, ...]`, k `[B, Nk, ...]`; see `masked_attention` for `visible`."""
    (B, N), N_k = q.shape[:2], k.shape[1]
    if visible is not None and visible.dtype == torch.bool:
        if scatter:
            rows, count = _partition(visible)
            start = torch.arange(0, B * N, max(N, 1), device=q.device)
            bound = N if max_seqlen is None else max_seqlen
            return Layout(start, start + count, rows, None, None, None, bound, bound, B * N, True)
        visible, cu = _visible_rows(visible)
        max_seqlen = N if max_seqlen is None else max_seqlen
    elif visible is not None and visible.dim() == 2:
        max_seqlen = visible.shape[1]
        cu = torch.arange(0, B * max_seqlen + 1, max(max_seqlen, 1), device=q.device)[: B + 1]
        visible = (visible + torch.arange(0, B * N, max(N, 1), device=q.device)[:, None]).flatten()
    if visible is not None:
        return Layout(cu[:-1], cu[1:], visible, None, None, None, max_seqlen, max_seqlen, len(visible), scatter)
    start = torch.arange(0, B * N, max(N, 1), device=q.device)
    if key_mask is None and N_k == N:
        return Layout(start, start + N, None, None, None, None, N, N, B * N, False)
    k_start = torch.arange(0, B * N_k, max(N_k, 1), device=q.device)
    k_rows, k_count = (None, N_k) if key_mask is None else _partition(key_mask)
    return Layout(start, start + N, None, k_start, k_start + k_count, k_rows, N, N_k, B * N, False)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"masked_attention: {message}")


def _is_index(x) -> bool:
    return not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool


def _check_arguments(q, k, v, packed, cu, max_seqlen, cu_k, max_seqlen_k, visible, key_mask, output) -> None:
    """What can be known without reading the device."""
    lead, heads = (1, "T") if packed else (2, "B, N")
    if k is None:
        _require(v is None, "k and v must be given together")
        _require(q.dim() == lead + 3 and q.shape[lead] == 3, f"qkv must be [{heads}, 3, H, D], got {list(q.shape)}")
    else:
        _require(v is not None and k.shape == v.shape, "k and v must be given together, with equal shapes")
        _require(q.dim() == k.dim() == lead + 2, f"q, k, v must be [{heads}, H, D], got {list(q.shape)}")
        _require(q.shape[-2:] == k.shape[-2:], f"q and k must share H and D, got {list(q.shape)}, {list(k.shape)}")
        _require(packed or q.shape[0] == k.shape[0], "q and k must share B")
        _require(q.dtype == k.dtype == v.dtype, f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        _require(q.device == k.device == v.device, "q, k, v must share a device")
    _require(q.is_floating_point(), f"floating point expected, got {q.dtype}")
    for name, x in (("cu_seqlens", cu), ("cu_seqlens_k", cu_k), ("visible", visible), ("key_mask", key_mask)):
        _require(x is None or x.device == q.device, f"{name} must be on {q.device}")
    for name, x, bound in (("cu_seqlens", cu, max_seqlen), ("cu_seqlens_k", cu_k, max_seqlen_k)):
        if x is not None:
            offsets = x.dim() == 1 and x.shape[0] >= 1 and _is_index(x)
            _require(offsets, f"{name} must be a 1-D integer tensor of R + 1 offsets")
            _require(bound is not None and bound >= 0, f"{name} needs its max_seqlen")
    _require(output in ("packed", "scattered"), f"output must be 'packed' or 'scattered', got {output!r}")
    if packed:
        _require(visible is None and output == "packed", "visible and output='scattered' are for dense inputs")
        _require(cu_k is None or (k is not None and cu_k.shape == cu.shape), "cu_seqlens_k goes with k, one for each q")
        _require(
            cu_k is not None or k is None or k.shape[0] == q.shape[0], "k of another length than q needs cu_seqlens_k"
        )
    else:
        rows = visible is not None and visible.dim() == 1
        _require(rows == (cu is not None), "visible must be boolean [B, N] or indices [B, V], or [T] with cu_seqlens")
        _require(visible is None or rows or visible.dim() == 2, "visible must have one axis or two")
        _require(cu_k is None, "cu_seqlens_k is for packed inputs")
    if visible is not None:
        _require(key_mask is None, "visible and key_mask exclude each other")
        _require(k is None or k.shape[:2] == q.shape[:2], "visible needs q and k of equal shapes")
        if visible.dtype == torch.bool:
            _require(visible.shape == q.shape[:2], f"a boolean visible must be {list(q.shape[:2])}")
        else:
            _require(_is_index(visible), "visible must be boolean or integer")
            _require(visible.dim() == 1 or visible.shape[0] == q.shape[0], "visible must have a row for each sample")
    if key_mask is not None:
        want = (q if k is None else k).shape[:lead]
        _require(key_mask.dtype == torch.bool and key_mask.shape == want, f"key_mask must be boolean {list(want)}")


def _check_contents(q, k, layout: Layout) -> None:
    """What only the device knows. Reads it, so waits for it."""
    for name, start, end, rows, bound, held in (
        ("cu_seqlens", layout.q_start, layout.q_end, layout.q_rows, layout.max_q, q.shape[0]),
        ("cu_seqlens of the keys", *layout.keys(), layout.max_k, k.shape[0]),
    ):
        if not len(start):
            continue
        slots = held if rows is None else len(rows)
        _require(int(start[0]) == 0 and bool((end >= start).all()), f"{name} must start at 0 and never decrease")
        _require(int(end.max()) <= slots, f"{name} must not pass the {slots} tokens")
        _require(int((end - start).max()) <= bound, f"{name} has a sequence longer than max_seqlen {bound}")
        if rows is None:
            _require(int(end[-1]) == slots, f"{name} must end at the number of tokens, {slots}")
        elif len(rows):
            _require(int(rows.min()) >= 0 and int(rows.max()) < held, "an index of visible is out of range")
            _require(len(rows.unique()) == len(rows), "visible names a patch twice")


# --- public ---------------------------------------------------------------------------------------------------------


def masked_attention(
    qkv: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    visible: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    output: str = "packed",
    scale: float | None = None,
    tf32: bool = False,
    check: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """softmax(scale q k^T) v among the visible patches of each sample; the others are never read.

    *Packed*: `qkv [T, 3, H, D]` holds visible patches only, sequence r being tokens `cu_seqlens[r]:cu_seqlens[r + 1]`
    (equal offsets: an empty sequence). *Dense*: `qkv [B, N, 3, H, D]` holds every patch and `visible` says which take
    part, rows being gathered inside the kernel. In place of `qkv`: `q, k, v`, each without the axis of 3.

    Args:
        qkv: queries, keys, values; or the queries. bfloat16, float16 or float32 on the GPU; under autocast cast to its
            dtype. Kernels exist for head dims 32, 64, 96, 128.
        k, v: keys and values apart from the queries.
        cu_seqlens: int32 or int64 `[R + 1]`, from 0 to T without decreasing.
        max_seqlen: bound on the sequence lengths, known to the host. Up to 128, all scores stay on chip. Optional for a
            boolean `visible`, whose counts the host does not know: N otherwise.
        visible: dense inputs only. Boolean `[B, N]`; or indices `[B, V]` of V patches for each sample; or, with
            `cu_seqlens`, indices `[T]` into the B * N flattened patches. An index may appear once. None: all.
            Booleans are sorted at each call: indices spare a model of many layers that.
        key_mask: boolean `[T]` or `[B, N]`. All patches are queries, but only those marked True are keys (A-JEPA's
            regularised masking, arXiv 2311.15830). A query without any key gives zero.
        cu_seqlens_k, max_seqlen_k: packed keys of other lengths than the queries (cross-attention).
        output: where `visible` is given, "packed" returns visible patches only, `[B, V, H, D]` or `[T, H, D]` (for a
            boolean `visible` T is read from the device); "scattered" returns `[B, N, H, D]`, zero where not visible.
        scale: of the scores; 1 / sqrt(D) by default.
        tf32: let float32 products round their operands to tf32. Otherwise they are true float32.
        check: verify offsets and indices on the device and wait for the answer (ValueError). Otherwise trusted.
        impl: "auto" (Triton on a GPU where it can, aloud once where it cannot), "triton" or "reference".

    Returns:
        `[T, H, D]`, or dense as said above; dtype of the input.

    Saved for backward: q, k, v alone up to 128 tokens (32 in float32), whose backward is one launch; the output and
    `[H, T]` log-sum-exps beyond. The scheme for long sequences is FlashAttention-2's (arXiv 2307.08691).

    Raises:
        ValueError: shapes, dtypes, devices or options that cannot be, before any launch.

    Example::

        cu_seqlens = torch.tensor([0, 64, 101], device="cuda", dtype=torch.int32)
        qkv = torch.randn(101, 3, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = masked_attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=64)  # [101, 12, 64]

        qkv = torch.randn(8, 196, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
        visible = torch.rand(8, 196, device="cuda").argsort(1)[:, :64]
        out = masked_attention(qkv, visible=visible)  # [8, 64, 12, 64]
    """
    q = qkv
    packed = cu_seqlens is not None and visible is None
    _check_arguments(q, k, v, packed, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, visible, key_mask, output)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), None if k is None else k.to(dtype), None if v is None else v.to(dtype)
    shape: tuple = ()
    if packed:
        layout = _packed_layout(q, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, key_mask)
    else:
        scatter = output == "scattered" and visible is not None
        layout = _dense_layout(q, q if k is None else k, visible, cu_seqlens, max_seqlen, key_mask, scatter)
        if visible is None or scatter:
            shape = tuple(q.shape[:2])
        elif visible.dim() == 2 and visible.dtype != torch.bool:
            shape = tuple(visible.shape)
        q, k, v = q.flatten(0, 1), None if k is None else k.flatten(0, 1), None if v is None else v.flatten(0, 1)
    if check:
        if visible is not None and visible.dim() == 2 and visible.numel() and visible.dtype != torch.bool:
            _require(int(visible.min()) >= 0, "an index of visible is out of range")
            _require(int(visible.max()) < qkv.shape[1], "an index of visible is out of range")
        _check_contents(q, q if k is None else k, layout)

    unsupported = ""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        unsupported = f"no kernel for {q.dtype}"
    elif q.shape[-1] not in HEAD_DIMS:
        unsupported = f"no kernel for head dim {q.shape[-1]}, only {', '.join(map(str, HEAD_DIMS))}"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_triton("masked_attention", impl, q, unsupported):
        out = _MaskedAttention.apply(q, k, v, float(scale), tf32, *layout)
    else:
        q, k, v = q.unbind(1) if k is None else (q, k, v)
        out = _attention_reference(q, k, v, layout, scale)
    return out.unflatten(0, shape) if shape else out
