"""Triton kernels of `masked_attention`. Shapes and terms as in `__init__.py`."""

from __future__ import annotations

from ajepa_kernels._triton import jit, tl


@jit
def _rows(rows_ptr, slot, valid):
    if rows_ptr is None:  # noqa: SIM108 (decided at compile time)
        rows = slot.to(tl.int64)
    else:
        rows = tl.load(rows_ptr + slot, mask=valid, other=0).to(tl.int64)
    return rows


@jit
def _span(start_ptr, end_ptr, r):
    return tl.load(start_ptr + r).to(tl.int32), tl.load(end_ptr + r).to(tl.int32)


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
    """Row softmax in base 2; rows without any key give zeros."""
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
    # the heads of one sequence run side by side, because their rows are neighbours in memory
    WHOLE: tl.constexpr = ONE_TILE and BLOCK_Q == BLOCK_K
    h, r = tl.program_id(0) % H, tl.program_id(0) // H
    tile = 0 if WHOLE else r % tiles
    r = r if WHOLE else r // tiles
    q_start, q_end = _span(q_start_ptr, q_end_ptr, r)
    k_start, k_end = (q_start, q_end) if k_start_ptr is None else _span(k_start_ptr, k_end_ptr, r)
    q_slot = q_start + tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_valid = q_slot < q_end
    if q_start + tile * BLOCK_Q >= q_end:
        return
    q_rows = _rows(q_rows_ptr, q_slot, q_valid)
    q = _load(q_ptr + h * D, q_rows, q_valid, stride_q, D, BLOCK_D)
    scale = scale * 1.4426950408889634  # GPUs have an instruction for exp2, but none for exp
    if ONE_TILE:
        k_valid, k_rows = q_valid, q_rows
        if not WHOLE or k_start_ptr is not None:
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
            m_new = tl.maximum(m, tl.max(s, 1))  # finite, because every tile holds a key
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


# --- backward ------------------------------------------------------------------------------------------------------


@jit
def _masked_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_start_ptr, q_end_ptr, q_rows_ptr, k_start_ptr, k_end_ptr, k_rows_ptr,
    stride_q, stride_k, stride_v, stride_dq, stride_dk, stride_dv, scale, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence and head per program. It recomputes the probabilities, without the output and log-sum-exp."""
    pid = tl.program_id(0)
    h, r = pid % H, pid // H
    q_start, q_end = _span(q_start_ptr, q_end_ptr, r)
    k_start, k_end = (q_start, q_end) if k_start_ptr is None else _span(k_start_ptr, k_end_ptr, r)
    q_slot = q_start + tl.arange(0, BLOCK_Q)
    q_valid = q_slot < q_end
    q_rows = _rows(q_rows_ptr, q_slot, q_valid)
    k_valid, k_rows = q_valid, q_rows
    if k_start_ptr is not None:
        k_slot = k_start + tl.arange(0, BLOCK_K)
        k_valid = k_slot < k_end
        k_rows = _rows(k_rows_ptr, k_slot, k_valid)
    q = _load(q_ptr + h * D, q_rows, q_valid, stride_q, D, BLOCK_D)
    k = _load(k_ptr + h * D, k_rows, k_valid, stride_k, D, BLOCK_D)
    v = _load(v_ptr + h * D, k_rows, k_valid, stride_v, D, BLOCK_D)
    do_rows = q_rows if SCATTER else q_slot.to(tl.int64)
    do = _load(do_ptr + h * D, do_rows, q_valid, H * D, D, BLOCK_D)

    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
    p = _softmax(tl.where(k_valid[None, :], s, float("-inf")))
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)  # do is zero for padded queries
    _store(dv_ptr + h * D, dv, k_rows, k_valid, stride_dv, D, BLOCK_D)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    # sum(p dp) over the keys equals sum(do out) over the channels
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)
    dq = tl.dot(ds, k, input_precision=PRECISION)
    _store(dq_ptr + h * D, dq, q_rows, q_valid, stride_dq, D, BLOCK_D)
    dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    _store(dk_ptr + h * D, dk, k_rows, k_valid, stride_dk, D, BLOCK_D)


@jit
def _masked_attention_tiled_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,
    q_start_ptr, q_end_ptr, q_rows_ptr, k_start_ptr, k_end_ptr, k_rows_ptr,
    stride_q, stride_k, stride_v, stride_dq, stride_dk, stride_dv, scale, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As above, for scores that do not fit the registers: a loop over tiles of queries accumulates dk and dv."""
    pid = tl.program_id(0)
    h, r = pid % H, pid // H
    q_start, q_end = _span(q_start_ptr, q_end_ptr, r)
    k_start, k_end = (q_start, q_end) if k_start_ptr is None else _span(k_start_ptr, k_end_ptr, r)
    k_slot = k_start + tl.arange(0, BLOCK_K)
    k_valid = k_slot < k_end
    k_rows = _rows(k_rows_ptr, k_slot, k_valid)
    k = _load(k_ptr + h * D, k_rows, k_valid, stride_k, D, BLOCK_D)
    v = _load(v_ptr + h * D, k_rows, k_valid, stride_v, D, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(q_start, q_end, BLOCK_Q):
        q_slot = start + tl.arange(0, BLOCK_Q)
        q_valid = q_slot < q_end
        q_rows = _rows(q_rows_ptr, q_slot, q_valid)
        q = _load(q_ptr + h * D, q_rows, q_valid, stride_q, D, BLOCK_D)
        do = _load(do_ptr + h * D, q_rows if SCATTER else q_slot.to(tl.int64), q_valid, H * D, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        p = _softmax(tl.where(k_valid[None, :], s, float("-inf")))
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        dq = tl.dot(ds, k, input_precision=PRECISION)
        _store(dq_ptr + h * D, dq, q_rows, q_valid, stride_dq, D, BLOCK_D)
    k_rows = _rows(k_rows_ptr, k_slot, k_valid)  # loaded again, so that they occupy no registers during the products
    _store(dv_ptr + h * D, dv, k_rows, k_valid, stride_dv, D, BLOCK_D)
    _store(dk_ptr + h * D, dk, k_rows, k_valid, stride_dk, D, BLOCK_D)


@jit
def _masked_attention_delta_kernel(
    out_ptr, do_ptr, delta_ptr, q_start_ptr, q_end_ptr, q_rows_ptr, slots, H, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """delta = sum(do out) over the channels, for long sequences, where no program holds all keys at once."""
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
    """One tile of keys with all queries (dk, dv), then one tile of queries with all keys (dq), without atomics."""
    pid = tl.program_id(0)
    h, tile, r = pid % H, pid // H % tiles, pid // H // tiles
    q_start, q_end = _span(q_start_ptr, q_end_ptr, r)
    k_start, k_end = _span(k_start_ptr, k_end_ptr, r)
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
            # transposed scores, so that both products below need no transpose; padded keys are not stored
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
