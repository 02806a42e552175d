"""Rotary position embeddings: the tables of angles, and their plain PyTorch definition. Terms as in `__init__.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ajepa_kernels._arguments import check_tensors
from ajepa_kernels.attention.inputs import Inputs, is_packed


class Rotary(NamedTuple):
    """Tables that turn pairs of channels of q and k by angles (rotary position embedding, arXiv 2104.09864).

    Pair p is the channels (x1, x2) = (2p, 2p + 1), or (p, P + p) where `interleaved` is False, and becomes

        x1 cos1 - x2 sin1, x2 cos2 + x1 sin2

    Channels from 2 P on stay as they are. Values and channels are no part of it. `masked_attention(rotary=...)` turns
    in float32 and rounds the result to the dtype of q, as public code that turns before SDPA does.

    Attributes:
        cos, sin: float32 `[rows, P]`, one angle for each pair (cos1 = cos2), or `[rows, 2 P]`, one angle for each
            channel. For dense inputs also `[B, N, .]`. They receive no gradient.
        interleaved: which channels make a pair.
        pairs: P. None: a table of at most D / 2 columns has one column for each pair, and a wider one has one column
            for each channel. Pass it where a table of channels has at most D / 2 columns.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    interleaved: bool = True
    pairs: int | None = None

    @staticmethod
    def of(angles: torch.Tensor, interleaved: bool = True, pairs: int | None = None) -> Rotary:
        """The tables of `angles`, in radians, of the shapes that `cos` may have. All layers can share them.

        Example::

            angles = torch.arange(100)[:, None] * 10_000 ** (-torch.arange(16) / 16)
            rotary = Rotary.of(angles)  # for 100 places and head dim 32
        """
        check_tensors("Rotary.of", angles=angles)
        with torch.autocast(angles.device.type, enabled=False):
            angles = angles.double() if angles.dtype == torch.float64 else angles.float()
            return Rotary(angles.cos().float(), angles.sin().float(), interleaved, pairs)


def axial_angles(
    positions: torch.Tensor, dims: Sequence[int], *, base: float = 10_000.0, tiled: bool = False
) -> torch.Tensor:
    """The angles of tokens on a grid, axis after axis: pair p of an axis of d channels turns by position / base^(2p/d).

    Args:
        positions: `[..., A]`, the place of each token on each of A axes, e.g. (frame, row, column).
        dims: how many channels each axis turns; even, at most the head dim together.
        base: the pairs' wavelengths run from 2 pi to almost 2 pi base.
        tiled: one angle for each channel instead of each pair. The d / 2 angles of an axis come twice, one sequence
            after the other. With interleaved pairs, this is the form of V-JEPA 2's public code (arXiv 2506.09985),
            in which the two channels of a pair turn by different angles. Its `dims` are `[2 * (D // 3 // 2)] * 3`.

    Returns:
        float32 angles in radians `[..., sum(dims) / 2]`, or `[..., sum(dims)]` if tiled. They are computed in float64.

    Raises:
        ValueError: `dims` does not fit `positions`, or has an odd entry.

    Example::

        positions = torch.cartesian_prod(*map(torch.arange, (8, 14, 14)))  # frames, rows and columns
        angles = axial_angles(positions, [20, 20, 20], tiled=True)  # [1568, 60], for V-JEPA 2's head dim 64
        rotary = Rotary.of(angles)
    """
    check_tensors("axial_angles", positions=positions)
    axes = positions.shape[-1] if positions.dim() else 0
    if len(dims) != axes:
        raise ValueError(f"axial_angles: dims has {len(dims)} entries, but positions has {axes} axes")
    if any(d < 0 or d % 2 for d in dims):
        raise ValueError(f"axial_angles: each entry of dims must be an even number of channels, got {list(dims)}")
    angles = []
    for position, d in zip(positions.double().unbind(-1), dims, strict=True):
        pair = torch.arange(d // 2, device=positions.device, dtype=torch.float64)
        angle = position[..., None] * base ** (-2 * pair / max(d, 1))
        angles += [angle, angle] if tiled else [angle]
    return torch.cat(angles, -1).float()


class Tables(NamedTuple):
    """The tables of a call as its operations take them: contiguous `[rows, P]` or `[rows, 2 P]`. k without tables of
    its own turns by those of q."""

    q_cos: torch.Tensor | None = None
    q_sin: torch.Tensor | None = None
    k_cos: torch.Tensor | None = None
    k_sin: torch.Tensor | None = None
    interleaved: bool = True
    pairs: int = 0


def make_tables(x: Inputs, rotary: Rotary | None, rotary_k: Rotary | None) -> Tables:
    """Check the tables of a call. Raises ValueError, or TypeError for what is no tensor."""
    if rotary is None:
        _require(rotary_k is None, "rotary_k goes with rotary")
        return Tables()
    q_cos, q_sin, pairs = _check("rotary", rotary, x.qkv, x)
    k_cos = k_sin = None
    if rotary_k is not None and rotary_k is not rotary:
        _require(x.k is not None, "rotary_k is for k that is separate from q")
        k_cos, k_sin, pairs_k = _check("rotary_k", rotary_k, x.k, x)
        same = (bool(rotary.interleaved), pairs, q_cos.shape[1]) == (
            bool(rotary_k.interleaved), pairs_k, k_cos.shape[1],
        )  # fmt: skip
        _require(same, "rotary and rotary_k must have equal columns, pairs and interleaved")
    elif x.k is not None and x.k.shape[:-2] != x.qkv.shape[:-2]:
        _check("rotary_k", rotary, x.k, x, ", or pass rotary_k")
    return Tables(q_cos, q_sin, k_cos, k_sin, bool(rotary.interleaved), pairs)


def _check(name: str, rotary: Rotary, rows: torch.Tensor | None, x: Inputs, remedy: str = ""):
    assert rows is not None
    if not isinstance(rotary, tuple):
        raise TypeError(f"masked_attention: {name} must be a Rotary, got {type(rotary).__name__}; see Rotary.of")
    cos, sin, _, pairs = rotary
    check_tensors("masked_attention", **{f"{name}.cos": cos, f"{name}.sin": sin})
    _require(cos.shape == sin.shape and cos.dim() in (2, 3), f"{name}.cos and .sin must be [rows, P] or [rows, 2 P]")
    both_float32 = cos.dtype == sin.dtype == torch.float32
    _require(both_float32, f"{name} must be float32, got {cos.dtype}, {sin.dtype}; see Rotary.of")
    _require(cos.device == sin.device == rows.device, f"{name} must be on {rows.device}")
    _require(not (cos.requires_grad or sin.requires_grad), f"{name} receives no gradient: detach its tables")
    D, columns = rows.shape[-1], cos.shape[-1]
    pairs = (columns if columns <= D // 2 else columns // 2) if pairs is None else pairs
    fits = columns in (pairs, 2 * pairs) and 0 < 2 * pairs <= D
    _require(fits, f"{name} has {columns} columns, which is neither P nor 2 P of P pairs of the {D} channels")
    count = cos.shape[:-1].numel()
    if is_packed(x):
        _require(count == rows.shape[0], f"{name} must have a row for each of the {rows.shape[0]} tokens, got {count}")
    else:
        B, N = rows.shape[:2]
        fits = count == B * N or (count == N and cos.dim() == 2)
        _require(fits, f"{name} must have {N} rows, or {B} x {N}, got {list(cos.shape)}{remedy}")
    _require(cos.numel() < 2**31, f"{name} has {cos.numel()} elements, more than the kernels count")
    return cos.reshape(count, columns).contiguous(), sin.reshape(count, columns).contiguous(), pairs


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"masked_attention: {message}")


def turn_both(q: torch.Tensor, k: torch.Tensor, tables: Tables) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k `[rows, H, D]`, turned in plain PyTorch. Differentiable."""
    q_cos, q_sin, k_cos, k_sin, interleaved, pairs = tables
    if q_cos is None or q_sin is None:
        return q, k
    turned_q = turn(q, q_cos, q_sin, interleaved, pairs)
    if k_cos is None or k_sin is None:
        return turned_q, turn(k, q_cos, q_sin, interleaved, pairs)
    return turned_q, turn(k, k_cos, k_sin, interleaved, pairs)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, pairs: int) -> torch.Tensor:
    """x with its pairs turned. The tables repeat where they have fewer rows than x."""
    if not len(x):
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (-1, len(cos)))  # [samples, rows, H, D]
    turned, rest = wide[..., : 2 * pairs], wide[..., 2 * pairs :]
    shape = (pairs, 2) if interleaved else (2, pairs)
    axis = -1 if interleaved else -2
    x1, x2 = turned.unflatten(-1, shape).unbind(axis)
    if cos.shape[1] == pairs:
        cos1 = cos2 = cos[:, None]
        sin1 = sin2 = sin[:, None]
    else:
        (cos1, cos2), (sin1, sin2) = (t[:, None].unflatten(-1, shape).unbind(axis) for t in (cos, sin))
    turned = torch.stack([x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2], axis).flatten(-2)
    return torch.cat([turned, rest], -1).flatten(0, 1).to(x.dtype)
