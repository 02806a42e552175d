"""Launch configurations of each GPU, looked up by its model name ("H200") first, then by its compute capability.

The entries under `sm_80`, `sm_90`, ... and `any` were chosen from the registers, spills and shared memory that the
compiler reports, with triton 3.7 and 3.8. They are not timed; tests/kernels/test_aot.py checks these reports. The
entries under a model name were timed on that GPU: `python benchmarks/tune.py` measures candidates on the GPU that it
finds and rewrites that part of this file.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import torch

from ajepa_kernels._triton import arch


class Tiles(NamedTuple):
    """Tile sizes of attention. Programs with fewer queries than keys go through the queries tile by tile."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None  # per thread; given any bound, ptxas issues all loads before it waits for one
    tail: int = 0  # keys of a second tile beside the first, because the edges of a tile are powers of two
    heads: int = 1  # most heads that a program takes one after the other


class Rows(NamedTuple):
    """Rows that one program of a row-wise operation handles. Each operation has its own rule for widths without an
    entry."""

    rows: int
    num_warps: int
    num_stages: int = 1  # software pipelining of the loads, in kernels that loop over rows


LONG = 0  # the length in the key of sequences that are too long for one tile

# Keys of attention: (operation, bits of the dtype, length, head dim). Lengths and head dims are rounded up to powers of
# two from 16 and from 32, but a head dim's own entry comes first, as do lengths of 80 and 96. None, or no entry, means
# that this length does not fit in one tile.
# Keys of row-wise operations: (operation, channels of a program).
_UNTIMED: dict[str, dict[tuple, Tiles | Rows | None]] = {
    "any": {
        **{
            (op, 16, S, D): Tiles(S, S, warps)
            for (S, D), both in {
                (16, 32): (1, 1), (16, 64): (1, 1), (16, 128): (2, 2), (16, 256): (4, 4),
                (32, 32): (2, 2), (32, 64): (2, 4), (32, 128): (4, 4), (32, 256): (4, 4),
            }.items()
            for op, warps in zip(("attention_fwd", "attention_bwd"), both, strict=True)
        },
        # two stages: the tiles of a program's next head arrive while those of this head are multiplied
        **{("attention_fwd", 16, 64, D): Tiles(64, 64, warps, 2, None, 0, 12)
           for D, warps in ((32, 4), (64, 4), (128, 8))},
        **{("attention_bwd", 16, 64, D): Tiles(64, 64, warps) for D, warps in ((32, 4), (64, 4), (128, 8))},
        ("attention_fwd", 16, 64, 256): Tiles(64, 64, 8),
        ("attention_bwd", 16, 64, 256): Tiles(32, 64, 8),
        **{("attention_fwd", 16, 64 + tail, D): Tiles(128, 64, 8, 2, None, tail, 12)
           for tail in (16, 32) for D in (32, 64, 128)},
        **{("attention_fwd", 16, 128, D): Tiles(128, 128, 8, 2, None, 0, 12) for D in (32, 64, 128)},
        **{("attention_bwd", 16, 128, D): Tiles(128, 128, 8, 2, None, 0, 12) for D in (32, 64)},
        ("attention_bwd", 16, 128, 128): Tiles(32, 128, 8),
        **{(op, 32, S, D): Tiles(S, S, 4) for op in ("attention_fwd", "attention_bwd")
           for S, D in ((16, 32), (16, 64), (16, 128), (32, 32), (32, 64))},
        ("attention_bwd", 32, 16, 64): Tiles(16, 16, 4, 1, 112),  # unbounded, the tf32 kernel spills
        **{("attention_fwd", 32, 64, D): Tiles(16, 64, 4) for D in (32, 64)},
        **{("attention_bwd", 32, 64, D): Tiles(16, 64, warps) for D, warps in ((32, 4), (64, 8))},
        **{("attention_fwd", 16, LONG, D): Tiles(64, 64, 4, 2) for D in (32, 64, 128)},
        **{("attention_bwd", 16, LONG, D): Tiles(32, 64, 4, 2) for D in (32, 64, 128)},
        **{(op, 32, LONG, D): Tiles(32, 32, 8) for op in ("attention_fwd", "attention_bwd") for D in (32, 64, 128)},
        ("attention_fwd", 32, 16, 256): Tiles(16, 16, 4),
        ("attention_bwd", 32, 16, 256): Tiles(16, 16, 8),
        ("attention_fwd", 16, LONG, 256): Tiles(128, 32, 8, 2),
        ("attention_bwd", 16, LONG, 256): Tiles(32, 64, 8),
        ("attention_fwd", 32, LONG, 256): Tiles(32, 16, 8),
        ("attention_bwd", 32, LONG, 256): Tiles(16, 16, 8),
        # kernels that turn q and k, where the entries above leave too few registers; tune.py does not tune them
        ("attention_rotary_fwd", 16, 32, 128): Tiles(32, 32, 4),
        ("attention_rotary_bwd", 16, 16, 128): Tiles(16, 16, 4),
        ("attention_rotary_bwd", 16, 32, 128): Tiles(32, 32, 8),
        **{("attention_rotary_bwd", 16, 64, D): Tiles(64, 64, 8, 1, None, 0, 12) for D in (32, 64)},
        ("attention_rotary_bwd", 16, 64, 128): Tiles(32, 64, 8),
        **{("attention_rotary_bwd", 16, S, D): Tiles(D // 2, 128, 8) for S in (80, 96, 128) for D in (32, 64)},
        ("attention_rotary_fwd", 16, LONG, 128): Tiles(64, 64, 8, 2),
        ("attention_rotary_fwd", 16, LONG, 256): Tiles(64, 32, 8),
        ("attention_rotary_bwd", 16, LONG, 256): Tiles(32, 32, 8),
        ("attention_rotary_bwd", 32, LONG, 256): Tiles(16, 16, 16),
    },
    "sm_80": {  # products take their operands from registers, which leaves no room for 128 x 128 scores
        ("attention_fwd", 16, 128, 64): Tiles(64, 128, 4, 2, None, 0, 12),
        ("attention_fwd", 16, 128, 128): Tiles(64, 128, 8, 2, None, 0, 12),
        **{("attention_fwd", 16, S, 128): None for S in (80, 96)},  # as 128
        ("attention_bwd", 16, 128, 32): Tiles(16, 128, 4),
        ("attention_bwd", 16, 128, 64): Tiles(32, 128, 8),
        ("attention_bwd", 16, 128, 128): Tiles(16, 128, 8),
        ("attention_bwd", 16, LONG, 128): Tiles(32, 64, 4),
        ("attention_bwd", 16, 64, 256): Tiles(64, 64, 8),
        ("attention_fwd", 16, LONG, 256): Tiles(64, 64, 8, 2),
        ("attention_fwd", 32, LONG, 256): Tiles(16, 32, 8),
        ("attention_rotary_fwd", 16, 64, 64): Tiles(64, 64, 8, 2, None, 0, 12),
        ("attention_rotary_fwd", 16, 64, 128): Tiles(64, 64, 16, 1, None, 0, 12),
        **{("attention_rotary_fwd", 16, 64 + tail, D): Tiles(128, 64, 8, 1, None, tail, 12)
           for tail in (16, 32) for D in (32, 64)},
        **{("attention_rotary_fwd", 16, 128, D): Tiles(64, 128, 8, 1, None, 0, 12) for D in (32, 64)},
        **{("attention_rotary_bwd", 16, LONG, D): Tiles(32, 64, 8) for D in (64, 128)},
    },
    "sm_86": {  # differs from sm_80 in the shared memory of a block: 99 KiB
        ("attention_bwd", 16, 128, 128): None,
        ("attention_bwd", 16, 64, 256): None,
        ("attention_fwd", 16, LONG, 256): Tiles(64, 32, 8, 2),
        ("attention_bwd", 16, LONG, 256): Tiles(16, 64, 8, 2),
        ("attention_rotary_fwd", 16, 64, 64): Tiles(64, 64, 8, 1, None, 0, 12),
        ("attention_rotary_fwd", 16, LONG, 128): Tiles(64, 64, 8),
    },
    "sm_120": {  # differs from sm_86 in the compiler, which spills some of its float32 products
        ("attention_bwd", 32, 32, 64): Tiles(32, 32, 8),
        ("attention_bwd", 32, LONG, 128): Tiles(16, 32, 8),
    },
    "sm_90": {
        ("attention_fwd", 16, 32, 128): Tiles(32, 32, 2),
        ("attention_fwd", 16, LONG, 32): Tiles(128, 64, 8, 2),
        ("attention_fwd", 16, LONG, 64): Tiles(128, 64, 8, 2),
        **{("attention_bwd", 16, 64 + tail, D): Tiles(128, 64, 8, 2, None, tail, 12)
           for tail in (16, 32) for D in (32, 64)},
        ("attention_bwd", 16, LONG, 128): Tiles(32, 64, 4),
        ("attention_bwd", 32, LONG, 128): Tiles(64, 32, 8),
        ("attention_bwd", 16, LONG, 256): Tiles(16, 64, 8, 2),
        ("attention_rotary_bwd", 16, LONG, 128): Tiles(32, 32, 8),
    },
    "sm_100": {
        ("attention_fwd", 16, 16, 64): Tiles(16, 16, 1, 1, 128),
        ("attention_fwd", 16, 128, 32): Tiles(128, 128, 8, 3, None, 0, 12),
        ("attention_fwd", 32, 64, 64): Tiles(16, 64, 4, 1, 168),
        ("attention_bwd", 16, 64, 64): Tiles(64, 64, 4, 1, 208),
        **{(op, 16, 32, 32): Tiles(32, 32, 2, 1, 128) for op in ("attention_fwd", "attention_bwd")},
        ("attention_bwd", 16, LONG, 32): Tiles(64, 64, 4, 2),
        ("attention_bwd", 16, LONG, 64): Tiles(64, 64, 4, 2),
        ("attention_bwd", 32, LONG, 64): Tiles(16, 32, 8),
        ("attention_bwd", 32, LONG, 128): Tiles(16, 32, 8),
        **{("attention_bwd", 16, 128, D): Tiles(64, 128, 8) for D in (40, 48, 56)},  # masks need registers of their own
        ("attention_fwd", 16, 64, 256): Tiles(64, 64, 8, 1, 255),
        ("attention_bwd", 16, LONG, 256): Tiles(64, 64, 8),
        ("attention_rotary_fwd", 16, 16, 64): Tiles(16, 16, 2),
        ("attention_rotary_fwd", 16, LONG, 32): Tiles(64, 64, 8, 2),
        ("attention_causal_bwd", 16, 128, 64): Tiles(32, 128, 8),
        ("attention_rotary_fwd", 16, 128, 64): Tiles(64, 128, 8, 1, None, 0, 12),
        ("attention_rotary_bwd", 16, 64, 64): Tiles(64, 64, 8, 1, 208, 0, 12),
        ("attention_rotary_fwd", 16, 32, 32): Tiles(32, 32, 2),
        ("attention_rotary_bwd", 16, 32, 32): Tiles(32, 32, 4),
        ("attention_rotary_bwd", 16, 32, 128): Tiles(16, 32, 8),
        **{("attention_rotary_bwd", 16, 16, D): Tiles(16, 16, 2) for D in (32, 64)},
        ("attention_rotary_fwd", 16, 64, 128): Tiles(64, 64, 16, 1, None, 0, 12),
        ("attention_rotary_bwd", 16, LONG, 64): Tiles(32, 64, 8, 2),
        ("attention_rotary_bwd", 16, LONG, 128): Tiles(32, 64, 8),
        ("attention_rotary_fwd", 32, 64, 64): Tiles(16, 64, 4),
    },
}  # fmt: skip

# --- timed, written by benchmarks/tune.py: model: {key: configuration} ---
TIMED: dict[str, dict[tuple, Any]] = {}
# --- end ---


@functools.cache
def model(index: int) -> str:
    """Model name within the device name: "H200" for "NVIDIA H200", "A100" for "NVIDIA A100-SXM4-80GB", else ""."""
    found = re.search(r"\b[A-Z]{1,2}\d{2,4}[A-Z]?\b", torch.cuda.get_device_name(index))
    return found[0] if found else ""


def _capability(arch: int) -> tuple[str, ...]:
    if arch >= 120:  # RTX 50: as below
        return "sm_120", "sm_86", "sm_80"
    if arch in (86, 87, 88, 89):  # RTX, L4, L40: less shared memory, no warp-group products
        return "sm_86", "sm_80"
    return ("sm_80" if arch < 90 else "sm_90" if arch < 100 else "sm_100",)


@functools.cache
def _tables(index: int | None, arch: int) -> tuple[dict, ...]:
    timed = [] if index is None else [TIMED.get(model(index), {})]
    return (*timed, *(_UNTIMED[name] for name in (*_capability(arch), "any")))


def tuned(x: torch.Tensor, *key: Any) -> Any:
    """Return the configuration of `key` for the GPU that holds `x`, or None where no table has one."""
    tables = _tables(x.device.index if x.is_cuda else None, arch(x))
    return next((table[key] for table in tables if key in table), None)
