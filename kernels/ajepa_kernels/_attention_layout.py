"""Which rows attend to which, for every way of giving visible patches, and attention over it in plain PyTorch.

Terms as in attention.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


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


def packed_layout(q, cu, max_seqlen, cu_k, max_seqlen_k, key_mask) -> Layout:
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


def dense_layout(q, k, visible, cu, max_seqlen, key_mask, scatter: bool) -> Layout:
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


def attention_reference(q, k, v, layout: Layout, scale: float | None) -> torch.Tensor:
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
