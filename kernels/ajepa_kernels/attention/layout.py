"""Which rows attend to which, for every way to name the visible patches, and plain PyTorch attention over them.

Shapes and terms as in `__init__.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ajepa_kernels.attention.inputs import Inputs, is_packed
from ajepa_kernels.attention.rotary import Tables, turn_both


class Layout(NamedTuple):
    """Sequence r has its queries in slots `q_start[r]:q_end[r]` and its keys in slots `k_start[r]:k_end[r]`.

    Where `k_start` is None, the queries' slots hold the keys, too.
    """

    q_start: torch.Tensor
    q_end: torch.Tensor
    q_rows: torch.Tensor | None  # row of each query slot; None: the slot itself
    k_start: torch.Tensor | None
    k_end: torch.Tensor | None
    k_rows: torch.Tensor | None
    max_q: int
    max_k: int
    slots: int  # number of query slots
    scatter: bool  # True: the output has a row for each row of q; False: a row for each slot
    causal: int = 0  # tokens of a block, which sees itself and earlier blocks by their place in the sequence; 0: all
    order: torch.Tensor | None = None  # a number for each row; a key counts where its number is at most the query's

    def keys(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self[:3] if self.k_start is None else self[3:6]  # type: ignore[return-value]


def make_layout(x: Inputs) -> Layout:
    """The layout of checked inputs. It stays on the device, except for a boolean `visible` with packed output."""
    if is_packed(x):
        layout = _packed_layout(x)
    elif x.visible is not None:
        layout = _visible_layout(x, x.visible)
    else:
        layout = _dense_layout(x)
    if isinstance(x.causal, torch.Tensor):
        tokens = x.qkv.shape[: 1 if is_packed(x) else 2]
        return layout._replace(order=x.causal.expand(tokens).reshape(-1))
    if not x.causal:
        return layout
    if x.key_mask is None:
        return layout._replace(causal=int(x.causal) if isinstance(x.causal, bool) else x.causal)
    return layout._replace(order=_places(x) // x.causal)  # slots of kept keys are not their places


def _places(x: Inputs) -> torch.Tensor:
    """The place of each row in its sequence, where all rows of the sequence are queries."""
    if not is_packed(x):
        B, N = x.qkv.shape[:2]
        return torch.arange(N, device=x.qkv.device).repeat(B)
    assert x.cu_seqlens is not None
    row = torch.arange(x.qkv.shape[0], device=x.qkv.device)
    return row - x.cu_seqlens[:-1].long()[_sequences(x.cu_seqlens, len(row))]


def rows(x: Inputs) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`qkv`, `k` and `v` with one axis of rows in front."""
    if is_packed(x):
        return x.qkv, x.k, x.v
    k, v = (None if t is None else t.flatten(0, 1) for t in (x.k, x.v))
    return x.qkv.flatten(0, 1), k, v


def cast(x: Inputs, dtype: torch.dtype) -> Inputs:
    k, v = (None if t is None else t.to(dtype) for t in (x.k, x.v))
    return x._replace(qkv=x.qkv.to(dtype), k=k, v=v)


def shape_of_result(x: Inputs) -> tuple[int, ...]:
    """The leading axes `(B, N)` or `(B, V)` of a dense result; empty where the result has one axis of tokens."""
    if is_packed(x):
        return ()
    if x.visible is None or x.output == "scattered":
        return tuple(x.qkv.shape[:2])
    return tuple(x.visible.shape) if x.visible.dim() == 2 and x.visible.dtype != torch.bool else ()


def _packed_layout(x: Inputs) -> Layout:
    cu, cu_k = x.cu_seqlens, x.cu_seqlens_k
    assert cu is not None and x.max_seqlen is not None
    k_start = k_end = k_rows = None
    if x.key_mask is not None:
        cu_k = cu if cu_k is None else cu_k
        k_rows, k_end = _packed_key_rows(x.key_mask, cu_k)
    elif cu_k is not None:
        k_end = cu_k[1:]
    if cu_k is not None:
        k_start = cu_k[:-1]
    max_k = x.max_seqlen if x.max_seqlen_k is None else x.max_seqlen_k
    return Layout(cu[:-1], cu[1:], None, k_start, k_end, k_rows, x.max_seqlen, max_k, x.qkv.shape[0], False)


def _visible_layout(x: Inputs, visible: torch.Tensor) -> Layout:
    B, N = x.qkv.shape[:2]
    cu, longest, scatter = x.cu_seqlens, x.max_seqlen, x.output == "scattered"
    first_row = _first_rows(B, N, visible.device)
    if visible.dtype == torch.bool:
        longest = N if longest is None else longest
        if scatter:
            rows, count = _partition(visible)
            return Layout(first_row, first_row + count, rows, None, None, None, longest, longest, B * N, True)
        visible, cu = _visible_rows(visible)
    elif visible.dim() == 2:
        longest = visible.shape[1]
        cu = torch.arange(0, B * longest + 1, max(longest, 1), device=visible.device)[: B + 1]
        visible = (visible + first_row[:, None]).flatten()
    assert cu is not None and longest is not None
    return Layout(cu[:-1], cu[1:], visible, None, None, None, longest, longest, len(visible), scatter)


def _dense_layout(x: Inputs) -> Layout:
    """All patches are queries; the keys are all patches of `k`, or those that `key_mask` marks."""
    (B, N), N_k, device = x.qkv.shape[:2], (x.qkv if x.k is None else x.k).shape[1], x.qkv.device
    start = _first_rows(B, N, device)
    if x.key_mask is None and N_k == N:
        return Layout(start, start + N, None, None, None, None, N, N, B * N, False)
    k_start = _first_rows(B, N_k, device)
    k_rows, k_count = (None, N_k) if x.key_mask is None else _partition(x.key_mask)
    return Layout(start, start + N, None, k_start, k_start + k_count, k_rows, N, N_k, B * N, False)


def _first_rows(B: int, N: int, device: torch.device) -> torch.Tensor:
    """The row of each sample's first patch, `[B]`."""
    return torch.arange(0, B * N, max(N, 1), device=device)


def _partition(mask_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each sample, the rows of its True entries in order and then the rows of the False ones; and the number of
    True entries. Does not read the device."""
    B, N = mask_BN.shape
    order = torch.argsort(mask_BN.logical_not().byte(), dim=1, stable=True)
    return (order + _first_rows(B, N, mask_BN.device)[:, None]).flatten(), mask_BN.sum(1)


def _visible_rows(visible_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of the True entries and the samples' `cu_seqlens`. Reads the number of rows from the device."""
    cu = F.pad(visible_BN.sum(1).cumsum(0), (1, 0))
    return visible_BN.flatten().nonzero().squeeze(1), cu


def _sequences(cu: torch.Tensor, T: int) -> torch.Tensor:
    """The sequence of each of T packed tokens."""
    return torch.searchsorted(cu[1:].contiguous(), torch.arange(T, device=cu.device, dtype=cu.dtype), right=True)


def _packed_key_rows(key_mask_T: torch.Tensor, cu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`_partition` for packed sequences: rows with the kept keys of each sequence first, and the end of those keys."""
    sequence = _sequences(cu, key_mask_T.shape[0])
    kept = F.pad(key_mask_T.cumsum(0), (1, 0))[cu.long()]
    return torch.argsort(2 * sequence + ~key_mask_T, stable=True), cu[:-1] + kept.diff()


def _positions(slots: int, start: torch.Tensor, end: torch.Tensor, length: int):
    """For each slot, its place among the `[R * length]` padded tokens, or R * length if no sequence owns the slot. For
    each place, whether a slot fills it, `[R, length]`."""
    R, slot = start.shape[0], torch.arange(slots, device=start.device)
    sequence = torch.searchsorted(start.long(), slot, right=True) - 1
    place = sequence * length + slot - start[sequence]
    real = torch.arange(length, device=start.device) < (end - start)[:, None]
    return place.where(slot < end[sequence], R * length), real


def _pad(x: torch.Tensor, rows: torch.Tensor | None, place: torch.Tensor, R: int, length: int) -> torch.Tensor:
    """x `[rows, H, D]` as `[R, H, length, D]`, zero where there is no token."""
    x = x if rows is None else x.index_select(0, rows)
    flat = x.flatten(1)  # torch copies rows by index ten times faster if a row has one axis
    padded = x.new_zeros(R * length + 1, flat.shape[1]).index_copy(0, place, flat)
    return padded[:-1].view(R, length, *x.shape[1:]).transpose(1, 2)


def attention_reference(q, k, v, layout: Layout, scale: float | None, tables: Tables | None = None) -> torch.Tensor:
    """Attention over a layout in plain PyTorch. `k` None: `q` is `[rows, 3, H, D]`. Differentiable."""
    if k is None:
        q, k, v = q.unbind(1)
    q, k = (q, k) if tables is None else turn_both(q, k, tables)
    rows, (H, D) = q.shape[0] if layout.scatter else layout.slots, q.shape[1:]
    R, S = layout.q_start.shape[0], layout.max_q
    if 0 in (layout.slots, R, S, layout.max_k, k.shape[0]):
        return q.new_zeros(rows, H, D) + (q[:0].sum() + k[:0].sum() + v[:0].sum())  # stays in the autograd graph
    k_start, k_end, k_rows = layout.keys()
    if layout.q_rows is None and k_rows is None and q.shape[0] == R * S and R * layout.max_k == k.shape[0]:
        # every sequence is full, so there is nothing to pad or mask
        order = None if layout.order is None else layout.order.view(R, 1, S, 1)
        keys = _causal_keys(layout, order, order, q.device)
        q = q.unflatten(0, (R, S)).transpose(1, 2)
        k, v = (x.unflatten(0, (R, layout.max_k)).transpose(1, 2) for x in (k, v))
        return _attend(q, k, v, keys, scale).transpose(1, 2).reshape(rows, H, D)
    q_place, _ = _positions(layout.slots, layout.q_start, layout.q_end, S)
    k_place, real = _positions(k.shape[0] if k_rows is None else k_rows.shape[0], k_start, k_end, layout.max_k)
    keys, none = real[:, None, None, :], None
    if layout.causal or layout.order is not None:
        order = None if layout.order is None else layout.order[:, None, None]
        q_order = None if order is None else _pad(order, layout.q_rows, q_place, R, S)
        k_order = None if order is None else _pad(order, k_rows, k_place, R, layout.max_k)
        keys = keys & _causal_keys(layout, q_order, k_order, q.device)
        none = ~keys.any(-1, keepdim=True)
    # a sequence without keys attends to its padding, whose values are zero, so that the result is zero and not NaN
    keys = keys | ~keys.any(-1, keepdim=True)
    q = _pad(q, layout.q_rows, q_place, R, S)
    k, v = (_pad(x, k_rows, k_place, R, layout.max_k) for x in (k, v))
    out = _attend(q, k, v, keys, scale)
    out = (out if none is None else out.where(~none, 0)).transpose(1, 2).reshape(R * S, H, D)
    if layout.q_rows is None:
        return out.index_select(0, q_place)
    out = out.index_select(0, q_place.clamp(max=R * S - 1)).where((q_place < R * S)[:, None, None], 0)
    return out.new_zeros(rows, H, D).index_copy(0, layout.q_rows.long(), out) if layout.scatter else out


def _causal_keys(layout: Layout, q_order, k_order, device) -> torch.Tensor | None:
    """Which keys a query sees, `[R or 1, 1, S, S_k]`, by their numbers `[R, 1, ., 1]` or their places."""
    if layout.causal:
        q_order, k_order = (
            torch.arange(n, device=device)[:, None] // layout.causal for n in (layout.max_q, layout.max_k)
        )
        return (k_order.mT <= q_order)[None, None]
    return None if layout.order is None else k_order.mT <= q_order


def _attend(q, k, v, keys: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """SDPA over `[R, H, S, D]`; `keys` is boolean `[R, 1, 1 or S, S_k]`, or None where every key counts.

    On a CPU, SDPA's backward in half precision takes six times as long as two batched products and a softmax, whose
    scores of short sequences stay in the cache.
    """
    if q.device.type != "cpu" or q.dtype not in (torch.bfloat16, torch.float16) or k.shape[2] > 256:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale)
    shape, scale = q.shape, q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    if keys is not None:
        scores = scores.unflatten(0, shape[:2]).masked_fill(~keys, -torch.inf).flatten(0, 1)
    return torch.bmm(scores.softmax(-1), v).view(shape)
