"""Rows in the registers of a warp, or of several where they are wide: what the operations along a row share."""

# Kernels grow tuples.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch

from ajepa_kernels._triton import jit, power_of_2, tl
from ajepa_kernels._tuned import Rows, tuned

MAX_WIDTH = 4096  # a row, its gradients and their sums in the registers of eight warps


class Chunks(NamedTuple):
    """A row is `number` chunks of `width` channels; of each a thread has `vector` neighbours."""

    width: int
    number: int
    vector: int


def row_chunks(op: str, *tensors: torch.Tensor | None) -> tuple[Chunks, Rows]:
    """How a program takes rows of `tensors`. A warp holds up to 768 channels, 24 a thread: then sums along a row need
    no barrier. Chunks leave no threads idle, where a whole row of 768 would take 1,024; and of every tensor a thread
    has the same channels, 16 bytes of the widest, so that none change threads."""
    present = [t for t in tensors if t is not None]
    C, vector = present[0].shape[1], 16 // max(t.element_size() for t in present)
    apart = power_of_2(-(-C // 768))  # warps of a row
    rows = tuned(present[0], op, power_of_2(C)) or Rows(max(1, 4 // apart), max(4, apart), 3 if C <= 2048 else 2)
    width = min(32 * vector * max(1, rows.num_warps // rows.rows), power_of_2(C))
    return Chunks(width, -(-C // width), min(vector, width)), rows


@jit
def channels(i: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Those of chunk i, `[1, WIDTH]`."""
    return i * WIDTH + tl.max_contiguous(tl.arange(0, WIDTH), VECTOR)[None, :]


@jit
def chunk(i: tl.constexpr, valid, C: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """Channels of chunk i, and the mask of those that there are in `valid` rows."""
    c = channels(i, WIDTH, VECTOR)
    return c, (valid[:, None] if (i + 1) * WIDTH <= C else valid[:, None] & (c < C))


@jit
def load_vector(ptr, c, C: tl.constexpr, ROWS: tl.constexpr):
    """Channels c of a vector, each row's threads for themselves: one row of them would come in a layout of its own."""
    wide = tl.broadcast_to(c, [ROWS, c.shape[1]])
    return tl.load(ptr + wide, mask=wide < C, other=0.0).to(tl.float32)


@jit
def centre(chunks, eps, C: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr):
    """Chunks less their row's mean, zero where there are no channels; the mean; and 1 / sqrt(variance + eps)."""
    total = chunks[0]
    for i in tl.static_range(1, COUNT):
        total += chunks[i]
    mean = tl.sum(total, 1) / C
    total = tl.zeros_like(total)
    centred = ()
    for i in tl.static_range(COUNT):
        x = chunks[i] - mean[:, None]
        if (i + 1) * WIDTH > C:
            x = tl.where(channels(i, WIDTH, VECTOR) < C, x, 0.0)
        centred += (x,)
        total += x * x
    return centred, mean, 1.0 / tl.sqrt_rn(tl.sum(total, 1) / C + eps)
