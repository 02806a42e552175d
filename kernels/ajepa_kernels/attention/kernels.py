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
def _memory_rows(rows_ptr, first, rows):
    """The rows in memory of the rows of `_tile`."""
    return rows + first if rows_ptr is None else rows


@jit
def _table_rows(rows, period):
    """The rows of the rotary tables, which repeat with a period where one is given."""
    rows = rows.to(tl.int32)
    return rows if period is None else rows % period


@jit
def _table(ptr, rows, valid, other, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr):
    """The entries of the pairs' first and second channels, `[S, BLOCK_D // 2]` each. `other` where no pair is."""
    PAIRS: tl.constexpr = ROTARY[0]
    WIDTH: tl.constexpr = ROTARY[1]
    INTERLEAVED: tl.constexpr = ROTARY[2]
    p = tl.arange(0, BLOCK_D // 2)[None, :]
    row = rows[:, None] * WIDTH
    mask = valid[:, None] & (p < PAIRS)
    if WIDTH == PAIRS:
        first = tl.load(ptr + (row + p), mask=mask, other=other)
        second = first
    elif INTERLEAVED:
        d = tl.arange(0, BLOCK_D)[None, :]
        both = tl.load(ptr + (row + d), mask=valid[:, None] & (d < WIDTH), other=other)
        first, second = tl.split(tl.reshape(both, [rows.shape[0], BLOCK_D // 2, 2]))
    else:
        first = tl.load(ptr + (row + p), mask=mask, other=other)
        second = tl.load(ptr + (row + p + PAIRS), mask=mask, other=other)
    return first, second


@jit
def _halves(D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr):
    """The channels that stand first and second in a tile whose pairs are channels p and PAIRS + p. Channels that do not
    turn follow in pairs of their own."""
    p = tl.arange(0, BLOCK_D // 2)[None, :]
    if 2 * PAIRS == D:
        first = p
        second = p + D // 2
    else:
        first = tl.where(p < PAIRS, p, p + PAIRS)
        second = tl.where(p < PAIRS, p + PAIRS, p + D // 2)
    return first, second


@jit
def _load_turned(ptr, rows, valid, stride, turns, D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr):
    """A tile of q or k, whose pairs are turned in float32 and then rounded. Its channels are in the order of the pairs,
    which the scores do not notice, because q and k share it."""
    if turns[0] is None:
        x = _load(ptr, rows, valid, stride, D, BLOCK_D)
    else:
        S: tl.constexpr = rows.shape[0]
        PAIRS: tl.constexpr = ROTARY[0]
        INTERLEAVED: tl.constexpr = ROTARY[2]
        if INTERLEAVED:
            x = _load(ptr, rows, valid, stride, D, BLOCK_D)
            x1, x2 = tl.split(tl.reshape(x, [S, BLOCK_D // 2, 2]))
        else:
            d1, d2 = _halves(D, BLOCK_D, PAIRS)
            mask = valid[:, None] & (tl.arange(0, BLOCK_D // 2)[None, :] < D // 2)
            x1 = tl.load(ptr + rows[:, None] * stride + d1, mask=mask, other=0.0)
            x2 = tl.load(ptr + rows[:, None] * stride + d2, mask=mask, other=0.0)
        cos1, cos2 = _table(turns[0], turns[2], valid, 1.0, BLOCK_D, ROTARY)
        sin1, sin2 = _table(turns[1], turns[2], valid, 0.0, BLOCK_D, ROTARY)
        x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
        y = tl.join(x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2)
        # The maximum of one element each is no instruction. It keeps the compiler from turning the tile anew for each
        # product, in the layout of its operand.
        x = tl.max(tl.reshape(y, [S, BLOCK_D, 1]), 2).to(ptr.dtype.element_ty)
    return x


@jit
def _store_turned(ptr, dy, rows, valid, stride, turns, D: tl.constexpr, BLOCK_D: tl.constexpr, ROTARY: tl.constexpr):
    """Store the gradient of a tile of `_load_turned`: dy, float32, times the transpose of the turns."""
    if turns[0] is None:
        _store(ptr, dy, rows, valid, stride, D, BLOCK_D)
    else:
        S: tl.constexpr = rows.shape[0]
        PAIRS: tl.constexpr = ROTARY[0]
        INTERLEAVED: tl.constexpr = ROTARY[2]
        dy1, dy2 = tl.split(tl.reshape(dy, [S, BLOCK_D // 2, 2]))
        cos1, cos2 = _table(turns[0], turns[2], valid, 1.0, BLOCK_D, ROTARY)
        sin1, sin2 = _table(turns[1], turns[2], valid, 0.0, BLOCK_D, ROTARY)
        dx1 = (dy1 * cos1 + dy2 * sin2).to(ptr.dtype.element_ty)
        dx2 = (dy2 * cos2 - dy1 * sin1).to(ptr.dtype.element_ty)
        if INTERLEAVED:
            _store(ptr, tl.reshape(tl.join(dx1, dx2), [S, BLOCK_D]), rows, valid, stride, D, BLOCK_D)
        else:
            d1, d2 = _halves(D, BLOCK_D, PAIRS)
            mask = valid[:, None] & (tl.arange(0, BLOCK_D // 2)[None, :] < D // 2)
            tl.store(ptr + rows[:, None] * stride + d1, dx1, mask=mask)
            tl.store(ptr + rows[:, None] * stride + d2, dx2, mask=mask)


@jit
def _limits(order_ptr, causal, rows, places, valid):
    """For each query, the largest number of a key that counts: its own, or the last place of its block of tokens."""
    if order_ptr is None:
        limits = places if causal is None else (places // causal + 1) * causal - 1
    else:
        limits = tl.load(order_ptr + rows, mask=valid, other=0)
    return limits


@jit
def _numbers(order_ptr, rows, places, valid):
    return places if order_ptr is None else tl.load(order_ptr + rows, mask=valid, other=0)


@jit
def _store_sum(ptr, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    tl.store(ptr + d, x, mask=d < D)


@jit
def _scores(q, k, mask, scale, PRECISION: tl.constexpr):
    """Scores in base 2. mask: which keys are valid; or 0 for a key and -inf for none, because adding that costs no
    instruction of its own, but registers."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    return tl.where(mask[None, :], s, float("-inf")) if mask.dtype == tl.int1 else s + mask[None, :]


@jit
def _causal_scores(s, numbers, limits, CAUSAL: tl.constexpr):
    return tl.where(numbers[None, :] <= limits[:, None], s, float("-inf")) if CAUSAL else s


@jit
def _mask(valid):
    return tl.where(valid, 0.0, float("-inf"))


@jit
def _finite(m):
    """The largest scores of each row; 0 for a row without any key, whose probabilities are then 0 and not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@jit
def _inverse(total):
    return 1.0 / tl.where(total == 0.0, 1.0, total)


@jit
def _head_group(H, heads):
    """The programs of one sequence run side by side, because their heads are neighbours in memory. Returns this
    program's first head, the head after its last, and the number of the sequence or of the tile of queries."""
    groups = tl.cdiv(H, heads)
    first = tl.program_id(0) % groups * heads
    return first, tl.minimum(first + heads, H), tl.program_id(0) // groups


@jit
def _tile(rows_ptr, first, start, end, BLOCK: tl.constexpr):
    """Slots `start:start + BLOCK` of a sequence whose first slot is `first`: which of them hold a token, and its row.

    Rows that are not gathered count from `first`, see `_origin`: the compiler then knows their distances, and all rows
    of a thread share one address.
    """
    i = tl.arange(0, BLOCK)
    valid = i < end - start
    if rows_ptr is None:
        rows = i.to(tl.int64) + (start - first)
    else:
        rows = tl.load(rows_ptr + start + i, mask=valid, other=0).to(tl.int64)
    return valid, rows


@jit
def _origin(rows_ptr, first, stride: tl.constexpr):
    """The offset of the row from which the rows of `_tile` count."""
    if rows_ptr is None:  # noqa: SIM108 (decided at compile time)
        origin = first.to(tl.int64) * stride
    else:
        origin = 0
    return origin


@jit
def _masked_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,
    q_start_ptr, q_end_ptr, q_rows_ptr, k_start_ptr, k_end_ptr, k_rows_ptr,
    order_ptr, causal, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr, q_period, k_period,
    scale, heads, tiles,
    H: tl.constexpr, stride_q: tl.constexpr, stride_k: tl.constexpr, stride_v: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """All keys of a sequence at once: BLOCK_K of them, and TAIL more, as tiles have powers of two as edges.

    A program takes `heads` heads one after the other. With several stages, the tiles of the next head arrive while
    those of this head are multiplied.
    """
    WHOLE: tl.constexpr = BLOCK_Q >= BLOCK_K + TAIL
    CAUSAL: tl.constexpr = causal is not None or order_ptr is not None
    first, last, r = _head_group(H, heads)
    tile = 0 if WHOLE else r % tiles
    r = r if WHOLE else r // tiles
    q_start, q_end = _span(q_start_ptr, q_end_ptr, r)
    k_start, k_end = (q_start, q_end) if k_start_ptr is None else _span(k_start_ptr, k_end_ptr, r)
    q_first = q_start + tile * BLOCK_Q
    if q_first >= q_end:
        return
    q_valid, q_rows = _tile(q_rows_ptr, q_first, q_first, q_end, BLOCK_Q)
    _, out_rows = _tile(q_rows_ptr if SCATTER else None, q_first, q_first, q_end, BLOCK_Q)
    q_ptr += _origin(q_rows_ptr, q_first, stride_q)
    out_ptr += _origin(q_rows_ptr if SCATTER else None, q_first, H * D)
    k_valid, k_rows = q_valid, q_rows
    if k_start_ptr is not None or BLOCK_Q != BLOCK_K:
        k_valid, k_rows = _tile(k_rows_ptr, k_start, k_start, k_end, BLOCK_K)
    k_ptr += _origin(k_rows_ptr, k_start, stride_k)
    v_ptr += _origin(k_rows_ptr, k_start, stride_v)
    if TAIL:
        tail_valid, tail_rows = _tile(k_rows_ptr, k_start, k_start + BLOCK_K, k_end, TAIL)
    q_places = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_memory, k_memory = _memory_rows(q_rows_ptr, q_first, q_rows), _memory_rows(k_rows_ptr, k_start, k_rows)
    limits = _limits(order_ptr, causal, q_memory, q_places, q_valid)
    numbers = _numbers(order_ptr, k_memory, tl.arange(0, BLOCK_K), k_valid)
    q_turns = (q_cos_ptr, q_sin_ptr, _table_rows(q_memory, q_period))
    k_turns = (k_cos_ptr, k_sin_ptr, _table_rows(k_memory, k_period))
    mask = _mask(k_valid)
    if TAIL:
        tail_mask = _mask(tail_valid)
        tail_memory = _memory_rows(k_rows_ptr, k_start, tail_rows)
        tail_numbers = _numbers(order_ptr, tail_memory, BLOCK_K + tl.arange(0, TAIL), tail_valid)
        tail_turns = (k_cos_ptr, k_sin_ptr, _table_rows(tail_memory, k_period))
    scale = scale * 1.4426950408889634  # GPUs have an instruction for exp2, but none for exp
    for h in range(first, last):
        q = _load_turned(q_ptr + h * D, q_rows, q_valid, stride_q, q_turns, D, BLOCK_D, ROTARY)
        k = _load_turned(k_ptr + h * D, k_rows, k_valid, stride_k, k_turns, D, BLOCK_D, ROTARY)
        v = _load(v_ptr + h * D, k_rows, k_valid, stride_v, D, BLOCK_D)
        s = _causal_scores(_scores(q, k, mask, scale, PRECISION), numbers, limits, CAUSAL)
        if TAIL:
            k_tail = _load_turned(k_ptr + h * D, tail_rows, tail_valid, stride_k, tail_turns, D, BLOCK_D, ROTARY)
            v_tail = _load(v_ptr + h * D, tail_rows, tail_valid, stride_v, D, BLOCK_D)
            s_tail = _scores(q, k_tail, tail_mask, scale, PRECISION)
            s_tail = _causal_scores(s_tail, tail_numbers, limits, CAUSAL)
            m = _finite(tl.maximum(tl.max(s, 1), tl.max(s_tail, 1)))
            p, p_tail = tl.exp2(s - m[:, None]), tl.exp2(s_tail - m[:, None])
            total = tl.sum(p, 1) + tl.sum(p_tail, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            out = tl.dot(p_tail.to(v.dtype), v_tail, out, input_precision=PRECISION)
        else:
            p = tl.exp2(s - _finite(tl.max(s, 1))[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        out = out * _inverse(total)[:, None]
        _store(out_ptr + h * D, out, out_rows, q_valid, H * D, D, BLOCK_D)


@jit
def _masked_attention_long_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    q_start_ptr, q_end_ptr, q_rows_ptr, k_start_ptr, k_end_ptr, k_rows_ptr,
    order_ptr, causal, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr, q_period, k_period,
    stride_q, stride_k, stride_v, slots, scale, H, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Keys tile by tile, with a running maximum and sum. lse `[H, slots]` is in base 2."""
    CAUSAL: tl.constexpr = causal is not None or order_ptr is not None
    pid = tl.program_id(0)  # the heads of one sequence run side by side, because their rows are neighbours in memory
    h, tile, r = pid % H, pid // H % tiles, pid // H // tiles
    if causal is not None:
        tile = tiles - 1 - tile  # tiles with more keys begin first
    q_start, q_end = _span(q_start_ptr, q_end_ptr, r)
    k_start, k_end = _span(k_start_ptr, k_end_ptr, r)
    q_slot = q_start + tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_valid = q_slot < q_end
    if q_start + tile * BLOCK_Q >= q_end:
        return
    q_rows = _rows(q_rows_ptr, q_slot, q_valid)
    limits = _limits(order_ptr, causal, q_rows, q_slot - q_start, q_valid)
    q_turns = (q_cos_ptr, q_sin_ptr, _table_rows(q_rows, q_period))
    q = _load_turned(q_ptr + h * D, q_rows, q_valid, stride_q, q_turns, D, BLOCK_D, ROTARY)
    scale = scale * 1.4426950408889634  # GPUs have an instruction for exp2, but none for exp
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if causal is not None:  # the blocks of tokens up to that of the last query
        k_end = tl.minimum(k_end, k_start + ((tile * BLOCK_Q + BLOCK_Q - 1) // causal + 1) * causal)
    for start in range(k_start, k_end, BLOCK_K):
        k_slot = start + tl.arange(0, BLOCK_K)
        k_valid = k_slot < k_end
        k_rows = _rows(k_rows_ptr, k_slot, k_valid)
        k_turns = (k_cos_ptr, k_sin_ptr, _table_rows(k_rows, k_period))
        k = _load_turned(k_ptr + h * D, k_rows, k_valid, stride_k, k_turns, D, BLOCK_D, ROTARY)
        s = _scores(q, k, _mask(k_valid), scale, PRECISION)
        s = _causal_scores(s, _numbers(order_ptr, k_rows, k_slot - k_start, k_valid), limits, CAUSAL)
        m_new = tl.maximum(m, tl.max(s, 1))  # finite, because every tile holds a key, of which causal may leave none
        m_finite = _finite(m_new) if CAUSAL else m_new
        p = tl.exp2(s - m_finite[:, None])
        shrink = tl.exp2(m - m_finite)
        total = total * shrink + tl.sum(p, 1)
        v = _load(v_ptr + h * D, k_rows, k_valid, stride_v, D, BLOCK_D)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        m = m_new
    total = tl.where(total == 0.0, 1.0, total)
    out = out / total[:, None]
    if CAUSAL:
        m = tl.where(m == float("-inf"), float("inf"), m)  # so that the probabilities of backward are 0
    tl.store(lse_ptr + h.to(tl.int64) * slots + q_slot, m + tl.log2(total), mask=q_valid)
    out_rows = q_rows if SCATTER else q_slot.to(tl.int64)
    _store(out_ptr + h * D, out, out_rows, q_valid, H * D, D, BLOCK_D)


# --- backward ------------------------------------------------------------------------------------------------------


@jit
def _sum_rows(x, dtype: tl.constexpr):
    """The sum of x, rounded to dtype, over its rows: a product, because shuffles would take longer."""
    ones = tl.full([x.shape[0], 16], 1.0, dtype)
    return tl.sum(tl.dot(tl.trans(x.to(dtype)), ones), 1) * (1 / 16)


@jit
def _masked_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, sums_ptr,
    q_start_ptr, q_end_ptr, q_rows_ptr, k_start_ptr, k_end_ptr, k_rows_ptr,
    order_ptr, causal, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr, q_period, k_period,
    scale, heads, H: tl.constexpr,
    stride_q: tl.constexpr, stride_k: tl.constexpr, stride_v: tl.constexpr,
    stride_dq: tl.constexpr, stride_dk: tl.constexpr, stride_dv: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr, ROTARY: tl.constexpr, SUM_BY_PRODUCT: tl.constexpr,
):  # fmt: skip
    """All queries and keys of a sequence at once; keys and heads as in the forward pass. The probabilities are computed
    again, without the output and log-sum-exp.

    sums `[R, 2, H, D]`, if it is given, gets the sums of dq and dv over the tokens of each sequence, where rows without
    a token are zero. The sum of dk is zero: a vector added to all keys does not change the probabilities.
    """
    CAUSAL: tl.constexpr = causal is not None or order_ptr is not None
    first, last, r = _head_group(H, heads)
    q_start, q_end = _span(q_start_ptr, q_end_ptr, r)
    k_start, k_end = (q_start, q_end) if k_start_ptr is None else _span(k_start_ptr, k_end_ptr, r)
    q_ptr += _origin(q_rows_ptr, q_start, stride_q)
    dq_ptr += _origin(q_rows_ptr, q_start, stride_dq)
    do_ptr += _origin(q_rows_ptr if SCATTER else None, q_start, H * D)
    k_ptr += _origin(k_rows_ptr, k_start, stride_k)
    v_ptr += _origin(k_rows_ptr, k_start, stride_v)
    dk_ptr += _origin(k_rows_ptr, k_start, stride_dk)
    dv_ptr += _origin(k_rows_ptr, k_start, stride_dv)
    q_valid, q_rows = _tile(q_rows_ptr, q_start, q_start, q_end, BLOCK_Q)
    _, do_rows = _tile(q_rows_ptr if SCATTER else None, q_start, q_start, q_end, BLOCK_Q)
    k_valid, k_rows = q_valid, q_rows
    if k_start_ptr is not None or BLOCK_Q != BLOCK_K:
        k_valid, k_rows = _tile(k_rows_ptr, k_start, k_start, k_end, BLOCK_K)
    if TAIL:
        tail_valid, tail_rows = _tile(k_rows_ptr, k_start, k_start + BLOCK_K, k_end, TAIL)
    mask = _mask(k_valid) if k_start_ptr is None else k_valid  # keys of their own leave fewer registers
    if TAIL:
        tail_mask = _mask(tail_valid)
    q_memory, k_memory = _memory_rows(q_rows_ptr, q_start, q_rows), _memory_rows(k_rows_ptr, k_start, k_rows)
    limits = _limits(order_ptr, causal, q_memory, tl.arange(0, BLOCK_Q), q_valid)
    numbers = _numbers(order_ptr, k_memory, tl.arange(0, BLOCK_K), k_valid)
    q_turns = (q_cos_ptr, q_sin_ptr, _table_rows(q_memory, q_period))
    k_turns = (k_cos_ptr, k_sin_ptr, _table_rows(k_memory, k_period))
    if TAIL:
        tail_memory = _memory_rows(k_rows_ptr, k_start, tail_rows)
        tail_numbers = _numbers(order_ptr, tail_memory, BLOCK_K + tl.arange(0, TAIL), tail_valid)
        tail_turns = (k_cos_ptr, k_sin_ptr, _table_rows(tail_memory, k_period))
    log2e_scale = scale * 1.4426950408889634
    for h in range(first, last):
        q = _load_turned(q_ptr + h * D, q_rows, q_valid, stride_q, q_turns, D, BLOCK_D, ROTARY)
        k = _load_turned(k_ptr + h * D, k_rows, k_valid, stride_k, k_turns, D, BLOCK_D, ROTARY)
        v = _load(v_ptr + h * D, k_rows, k_valid, stride_v, D, BLOCK_D)
        do = _load(do_ptr + h * D, do_rows, q_valid, H * D, D, BLOCK_D)  # zero for padded queries
        s = _causal_scores(_scores(q, k, mask, log2e_scale, PRECISION), numbers, limits, CAUSAL)
        if TAIL:
            k_tail = _load_turned(k_ptr + h * D, tail_rows, tail_valid, stride_k, tail_turns, D, BLOCK_D, ROTARY)
            v_tail = _load(v_ptr + h * D, tail_rows, tail_valid, stride_v, D, BLOCK_D)
            s_tail = _scores(q, k_tail, tail_mask, log2e_scale, PRECISION)
            s_tail = _causal_scores(s_tail, tail_numbers, limits, CAUSAL)
            m = _finite(tl.maximum(tl.max(s, 1), tl.max(s_tail, 1)))
            p, p_tail = tl.exp2(s - m[:, None]), tl.exp2(s_tail - m[:, None])
            inverse = _inverse(tl.sum(p, 1) + tl.sum(p_tail, 1))
        else:
            p = tl.exp2(s - _finite(tl.max(s, 1))[:, None])
            inverse = _inverse(tl.sum(p, 1))
        dv = tl.dot(tl.trans((p * inverse[:, None]).to(do.dtype)), do, input_precision=PRECISION)
        _store(dv_ptr + h * D, dv, k_rows, k_valid, stride_dv, D, BLOCK_D)
        if sums_ptr is not None:
            # a query spreads its do over the keys, if there are any
            if SUM_BY_PRODUCT:  # noqa: SIM108 (decided at compile time)
                dv_sum = tl.where(k_start < k_end, _sum_rows(do, do.dtype), 0.0)
            else:
                dv_sum = tl.sum(dv, 0)
        if TAIL:
            p_tail_rounded = (p_tail * inverse[:, None]).to(do.dtype)
            dv_tail = tl.trans(tl.dot(tl.trans(do), p_tail_rounded, input_precision=PRECISION))
            _store(dv_ptr + h * D, dv_tail, tail_rows, tail_valid, stride_dv, D, BLOCK_D)
            if sums_ptr is not None and not SUM_BY_PRODUCT:
                dv_sum += tl.sum(dv_tail, 0)
        if sums_ptr is not None:
            _store_sum(sums_ptr + ((2 * r.to(tl.int64) + 1) * H + h) * D, dv_sum, D, BLOCK_D)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        delta = tl.sum(p * dp, 1)  # with the division that follows it equals sum(do out) over the channels
        factor = inverse * scale
        if TAIL:
            dp_tail = tl.dot(do, tl.trans(v_tail), input_precision=PRECISION)
            delta = (delta + tl.sum(p_tail * dp_tail, 1)) * inverse * factor
            ds_tail = (p_tail * (dp_tail * factor[:, None] - delta[:, None])).to(q.dtype)
        else:
            delta = delta * inverse * factor
        ds = (p * (dp * factor[:, None] - delta[:, None])).to(q.dtype)
        dq = tl.dot(ds, k, input_precision=PRECISION)
        if TAIL:
            dq = tl.dot(ds_tail, k_tail, dq, input_precision=PRECISION)
        _store_turned(dq_ptr + h * D, dq, q_rows, q_valid, stride_dq, q_turns, D, BLOCK_D, ROTARY)
        if sums_ptr is not None:
            dq_sum = _sum_rows(dq, q.dtype) if SUM_BY_PRODUCT else tl.sum(dq, 0)
            _store_sum(sums_ptr + (2 * r.to(tl.int64) * H + h) * D, dq_sum, D, BLOCK_D)
        dk = tl.dot(tl.trans(ds), q, input_precision=PRECISION)
        _store_turned(dk_ptr + h * D, dk, k_rows, k_valid, stride_dk, k_turns, D, BLOCK_D, ROTARY)
        if TAIL:
            dk_tail = tl.trans(tl.dot(tl.trans(q), ds_tail, input_precision=PRECISION))
            _store_turned(dk_ptr + h * D, dk_tail, tail_rows, tail_valid, stride_dk, tail_turns, D, BLOCK_D, ROTARY)


@jit
def _masked_attention_tiled_bwd_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, sums_ptr,
    q_start_ptr, q_end_ptr, q_rows_ptr, k_start_ptr, k_end_ptr, k_rows_ptr,
    order_ptr, causal, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr, q_period, k_period,
    stride_q, stride_k, stride_v, stride_dq, stride_dk, stride_dv, scale, H,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """As above, for scores that do not fit the registers: a loop over tiles of queries accumulates dk and dv."""
    CAUSAL: tl.constexpr = causal is not None or order_ptr is not None
    pid = tl.program_id(0)
    h, r = pid % H, pid // H
    q_start, q_end = _span(q_start_ptr, q_end_ptr, r)
    k_start, k_end = (q_start, q_end) if k_start_ptr is None else _span(k_start_ptr, k_end_ptr, r)
    k_slot = k_start + tl.arange(0, BLOCK_K)
    k_valid = k_slot < k_end
    k_rows = _rows(k_rows_ptr, k_slot, k_valid)
    numbers = _numbers(order_ptr, k_rows, k_slot - k_start, k_valid)
    k_turns = (k_cos_ptr, k_sin_ptr, _table_rows(k_rows, k_period))
    k = _load_turned(k_ptr + h * D, k_rows, k_valid, stride_k, k_turns, D, BLOCK_D, ROTARY)
    v = _load(v_ptr + h * D, k_rows, k_valid, stride_v, D, BLOCK_D)
    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dq_sum = tl.zeros([BLOCK_D], tl.float32)
    for start in range(q_start, q_end, BLOCK_Q):
        q_slot = start + tl.arange(0, BLOCK_Q)
        q_valid = q_slot < q_end
        q_rows = _rows(q_rows_ptr, q_slot, q_valid)
        limits = _limits(order_ptr, causal, q_rows, q_slot - q_start, q_valid)
        q_turns = (q_cos_ptr, q_sin_ptr, _table_rows(q_rows, q_period))
        q = _load_turned(q_ptr + h * D, q_rows, q_valid, stride_q, q_turns, D, BLOCK_D, ROTARY)
        do = _load(do_ptr + h * D, q_rows if SCATTER else q_slot.to(tl.int64), q_valid, H * D, D, BLOCK_D)
        s = _scores(q, k, _mask(k_valid), scale * 1.4426950408889634, PRECISION)
        s = _causal_scores(s, numbers, limits, CAUSAL)
        p = tl.exp2(s - _finite(tl.max(s, 1))[:, None])
        p = p * _inverse(tl.sum(p, 1))[:, None]
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        dq = tl.dot(ds, k, input_precision=PRECISION)
        _store_turned(dq_ptr + h * D, dq, q_rows, q_valid, stride_dq, q_turns, D, BLOCK_D, ROTARY)
        if sums_ptr is not None:
            dq_sum += tl.sum(dq, 0)
    k_rows = _rows(k_rows_ptr, k_slot, k_valid)  # loaded again, so that they occupy no registers during the products
    _store(dv_ptr + h * D, dv, k_rows, k_valid, stride_dv, D, BLOCK_D)
    _store_turned(dk_ptr + h * D, dk, k_rows, k_valid, stride_dk, k_turns, D, BLOCK_D, ROTARY)
    if sums_ptr is not None:
        sums_ptr += (r.to(tl.int64) * 2 * H + h) * D
        _store_sum(sums_ptr, dq_sum, D, BLOCK_D)
        _store_sum(sums_ptr + H * D, tl.sum(dv, 0), D, BLOCK_D)


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
    order_ptr, causal, q_cos_ptr, q_sin_ptr, k_cos_ptr, k_sin_ptr, q_period, k_period,
    stride_q, stride_k, stride_v, stride_dq, stride_dk, stride_dv, slots, scale, H, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SCATTER: tl.constexpr, PRECISION: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """One tile of keys with all queries (dk, dv), then one tile of queries with all keys (dq), without atomics."""
    CAUSAL: tl.constexpr = causal is not None or order_ptr is not None
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
        numbers = _numbers(order_ptr, k_rows, k_slot - k_start, k_valid)
        k_turns = (k_cos_ptr, k_sin_ptr, _table_rows(k_rows, k_period))
        k = _load_turned(k_ptr, k_rows, k_valid, stride_k, k_turns, D, BLOCK_D, ROTARY)
        v = _load(v_ptr, k_rows, k_valid, stride_v, D, BLOCK_D)
        dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        first = (
            q_start if causal is None else q_start + tile * BLOCK_K // causal * causal
        )  # the first query of the block
        for start in range(first, q_end, BLOCK_Q):
            slot = start + tl.arange(0, BLOCK_Q)
            valid = slot < q_end
            rows = _rows(q_rows_ptr, slot, valid)
            q_turns = (q_cos_ptr, q_sin_ptr, _table_rows(rows, q_period))
            q = _load_turned(q_ptr, rows, valid, stride_q, q_turns, D, BLOCK_D, ROTARY)
            do = _load(do_ptr, rows if SCATTER else slot.to(tl.int64), valid, H * D, D, BLOCK_D)
            lse = tl.load(lse_ptr + slot, mask=valid, other=float("inf"))  # p = 0 for padded queries
            delta = tl.load(delta_ptr + slot, mask=valid, other=0.0)
            # transposed scores, so that both products below need no transpose; padded keys are not stored
            p_t = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * log2e_scale - lse[None, :])
            if CAUSAL:
                limits = _limits(order_ptr, causal, rows, slot - q_start, valid)
                p_t = tl.where(numbers[:, None] <= limits[None, :], p_t, 0.0)
            dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=PRECISION)
            dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            dk = tl.dot((p_t * (dp_t - delta[None, :])).to(q.dtype), q, dk, input_precision=PRECISION)
        _store(dv_ptr + h * D, dv, k_rows, k_valid, stride_dv, D, BLOCK_D)
        _store_turned(dk_ptr + h * D, dk * scale, k_rows, k_valid, stride_dk, k_turns, D, BLOCK_D, ROTARY)

    q_slot = q_start + tile * BLOCK_K + tl.arange(0, BLOCK_K)
    q_valid = q_slot < q_end
    if q_start + tile * BLOCK_K < q_end:
        q_rows = _rows(q_rows_ptr, q_slot, q_valid)
        limits = _limits(order_ptr, causal, q_rows, q_slot - q_start, q_valid)
        q_turns = (q_cos_ptr, q_sin_ptr, _table_rows(q_rows, q_period))
        q = _load_turned(q_ptr, q_rows, q_valid, stride_q, q_turns, D, BLOCK_D, ROTARY)
        do = _load(do_ptr, q_rows if SCATTER else q_slot.to(tl.int64), q_valid, H * D, D, BLOCK_D)
        lse = tl.load(lse_ptr + q_slot, mask=q_valid, other=float("inf"))
        delta = tl.load(delta_ptr + q_slot, mask=q_valid, other=0.0)
        dq = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        if causal is not None:
            k_end = tl.minimum(k_end, k_start + ((tile * BLOCK_K + BLOCK_K - 1) // causal + 1) * causal)
        for start in range(k_start, k_end, BLOCK_Q):
            slot = start + tl.arange(0, BLOCK_Q)
            valid = slot < k_end
            rows = _rows(k_rows_ptr, slot, valid)
            k_turns = (k_cos_ptr, k_sin_ptr, _table_rows(rows, k_period))
            k = _load_turned(k_ptr, rows, valid, stride_k, k_turns, D, BLOCK_D, ROTARY)
            v = _load(v_ptr, rows, valid, stride_v, D, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * log2e_scale
            p = tl.where(valid[None, :], tl.exp2(s - lse[:, None]), 0.0)
            if CAUSAL:
                numbers = _numbers(order_ptr, rows, slot - k_start, valid)
                p = tl.where(numbers[None, :] <= limits[:, None], p, 0.0)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision=PRECISION)
        _store_turned(dq_ptr + h * D, dq * scale, q_rows, q_valid, stride_dq, q_turns, D, BLOCK_D, ROTARY)
