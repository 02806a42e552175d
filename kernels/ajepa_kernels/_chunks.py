"""Code that the row operations share. A row is held in the registers of one warp, or of several if it is wide."""

# Triton kernels build tuples inside static loops, which mypy cannot type.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from typing import NamedTuple

import torch

from ajepa_kernels._triton import jit, power_of_2, tl
from ajepa_kernels._tuned import Rows, tuned

MAX_WIDTH = 4096  # channels of a row that fits the registers of eight warps with its gradients and their sums


class Chunks(NamedTuple):
    """A row is `number` chunks of `width` channels. A thread holds `vector` neighbouring channels of each chunk."""

    width: int
    number: int
    vector: int


def row_chunks(op: str, *tensors: torch.Tensor | None, widest: int = 768) -> tuple[Chunks, Rows]:
    """Chooses the chunks of a row, and how many rows and warps a program has.

    A warp holds up to `widest` channels; sums along such a row need no barrier. 768 channels are 24 per thread. A block
    of 768 would be padded to 1,024, whereas chunks leave no thread idle. A thread holds the same channels of every
    tensor, 16 bytes of the widest one, so that values never move between threads.
    """
    present = [t for t in tensors if t is not None]
    C, vector = present[0].shape[1], 16 // max(t.element_size() for t in present)
    warps_per_row = power_of_2(-(-C // widest))
    rows = tuned(present[0], op, power_of_2(C)) or Rows(
        max(1, 4 // warps_per_row), max(4, warps_per_row), 3 if C <= 2048 else 2
    )
    width = min(32 * vector * max(1, rows.num_warps // rows.rows), power_of_2(C))
    return Chunks(width, -(-C // width), min(vector, width)), rows


@jit
def channels(i: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """The channel indices of chunk i, `[1, WIDTH]`."""
    return i * WIDTH + tl.max_contiguous(tl.arange(0, WIDTH), VECTOR)[None, :]


@jit
def chunk(i: tl.constexpr, valid, C: tl.constexpr, WIDTH: tl.constexpr, VECTOR: tl.constexpr):
    """The channel indices of chunk i, and the mask of the existing channels in `valid` rows."""
    c = channels(i, WIDTH, VECTOR)
    return c, (valid[:, None] if (i + 1) * WIDTH <= C else valid[:, None] & (c < C))


@jit
def load_vector(ptr, c, C: tl.constexpr, ROWS: tl.constexpr):
    """Loads channels c of a vector once for each row's threads. A single row would have a layout of its own."""
    wide = tl.broadcast_to(c, [ROWS, c.shape[1]])
    return tl.load(ptr + wide, mask=wide < C, other=0.0).to(tl.float32)


@jit
def centre(
    chunks, eps, C: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr,
    RMS: tl.constexpr = False,
):  # fmt: skip
    """Returns chunks minus their row's mean (zero beyond channel C), the mean, and 1 / sqrt(variance + eps).

    With RMS, the mean is taken to be zero: chunks stay as they are, and the variance is their mean square.
    """
    total = chunks[0]
    for i in tl.static_range(1, COUNT):
        total += chunks[i]
    mean = tl.sum(total, 1) / C
    total = tl.zeros_like(total)
    centred = ()
    for i in tl.static_range(COUNT):
        if RMS:
            x = chunks[i]
        else:
            x = chunks[i] - mean[:, None]
            if (i + 1) * WIDTH > C:
                x = tl.where(channels(i, WIDTH, VECTOR) < C, x, 0.0)
        centred += (x,)
        total += x * x
    return centred, mean, 1.0 / tl.sqrt_rn(tl.sum(total, 1) / C + eps)
