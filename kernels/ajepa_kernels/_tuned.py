"""Launch configurations, by GPU: looked up by its model's name first ("H200"), then by its compute capability.

Entries under `sm_80`, `sm_90`, ... and `any` were chosen from the compiler's registers, spills and shared memory, which
tests/test_aot.py holds them to; they are not timed. Entries under a model's name were timed on it:
`python benchmarks/tune.py` measures candidates on the GPU that it finds and rewrites that part of this file.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

import torch

from ajepa_kernels._triton import arch


class Tiles(NamedTuple):
    """Queries and keys of a program of attention. Fewer queries than the whole tile: one tile after another."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None  # of a thread; with any bound the assembler issues all loads before it waits


class Rows(NamedTuple):
    """Rows of a program of the operations on rows; each has a rule of its own for widths that no table holds."""

    rows: int
    num_warps: int
    num_stages: int = 1  # of the loads of those that walk their rows


LONG = 0  # stands for the lengths above those that one launch holds

# (operation, bits of the dtype, rounded length, rounded head dim); None: not in one launch. Lengths and head dims round
# up to powers of two, lengths to 96 where there is an entry for it.
# Of the operations on rows: (operation, channels of a program).
_UNTIMED: dict[str, dict[tuple, Tiles | Rows | None]] = {
    "any": {
        **{
            (op, 16, S, D): Tiles(S, S, warps)
            for (S, D), both in {
                (16, 32): (1, 1), (16, 64): (1, 1), (16, 128): (2, 2),
                (32, 32): (2, 2), (32, 64): (2, 4), (32, 128): (4, 4),
                (64, 32): (4, 4), (64, 64): (4, 4), (64, 128): (8, 8),
                (128, 32): (8, 8), (128, 64): (8, 8), (128, 128): (8, 8),
            }.items()
            for op, warps in zip(("attention_fwd", "attention_bwd"), both, strict=True)
        },
        **{(op, 32, S, D): Tiles(S, S, 4) for op in ("attention_fwd", "attention_bwd")
           for S, D in ((16, 32), (16, 64), (16, 128), (32, 32), (32, 64))},
        ("attention_bwd", 32, 16, 64): Tiles(16, 16, 4, 1, 80),  # in tf32 it spills to save a few
        **{("attention_fwd", 32, 64, D): Tiles(16, 64, 4) for D in (32, 64)},
        **{("attention_bwd", 32, 64, D): Tiles(16, 64, warps) for D, warps in ((32, 4), (64, 8))},
        **{("attention_fwd", 16, LONG, D): Tiles(64, 64, 4, 2) for D in (32, 64, 128)},
        **{("attention_bwd", 16, LONG, D): Tiles(32, 64, 4, 2) for D in (32, 64, 128)},
        **{(op, 32, LONG, D): Tiles(32, 32, 8) for op in ("attention_fwd", "attention_bwd") for D in (32, 64, 128)},
    },
    "sm_80": {  # operands of the products in registers: whole 128 x 128 scores do not fit beside them
        ("attention_fwd", 16, 64, 64): Tiles(64, 64, 4, 1, 112),
        ("attention_fwd", 16, 96, 64): Tiles(32, 128, 4, 1, 96),
        ("attention_fwd", 16, 128, 64): Tiles(64, 128, 4),
        ("attention_fwd", 16, 128, 128): Tiles(64, 128, 4),
        ("attention_bwd", 16, 128, 64): Tiles(32, 128, 8),
        ("attention_bwd", 16, 128, 128): Tiles(16, 128, 8),
        ("attention_bwd", 16, LONG, 128): Tiles(32, 64, 4),
    },
    "sm_86": {  # as sm_80, but for a block's shared memory, 99 KiB
        ("attention_bwd", 16, 128, 128): None,
    },
    "sm_90": {
        ("attention_fwd", 16, 64, 64): Tiles(64, 64, 4, 1, 80),
        ("attention_fwd", 16, 64, 128): Tiles(64, 64, 8, 1, 80),
        ("attention_fwd", 16, 96, 64): Tiles(64, 128, 4),
        ("attention_fwd", 16, 96, 128): Tiles(64, 128, 8, 1, 112),
        ("attention_fwd", 16, 32, 128): Tiles(32, 32, 2),
        ("attention_fwd", 16, LONG, 32): Tiles(128, 64, 8, 2),
        ("attention_fwd", 16, LONG, 64): Tiles(128, 64, 8, 2),
        ("attention_bwd", 16, 96, 64): Tiles(32, 128, 4),
        ("attention_bwd", 16, LONG, 128): Tiles(32, 64, 4),
        ("attention_bwd", 32, LONG, 128): Tiles(64, 32, 8),
    },
    "sm_100": {
        ("attention_fwd", 16, 64, 64): Tiles(64, 64, 4, 1, 72),
        ("attention_fwd", 16, 64, 128): Tiles(64, 64, 8, 1, 72),
        ("attention_fwd", 16, 128, 128): Tiles(128, 128, 8, 1, 128),
        ("attention_fwd", 16, 128, 64): Tiles(128, 128, 4),
        ("attention_bwd", 16, 32, 32): Tiles(32, 32, 2, 1, 80),
        ("attention_bwd", 16, 128, 32): Tiles(64, 128, 8),
        ("attention_bwd", 16, 128, 64): Tiles(64, 128, 8),
        ("attention_bwd", 16, LONG, 32): Tiles(64, 64, 4, 2),
        ("attention_bwd", 16, LONG, 64): Tiles(64, 64, 4, 2),
        ("attention_bwd", 32, LONG, 64): Tiles(16, 32, 8),
        ("attention_bwd", 32, LONG, 128): Tiles(16, 32, 8),
    },
}  # fmt: skip

# --- timed, written by benchmarks/tune.py: model: {key: configuration} ---
TIMED: dict[str, dict[tuple, Any]] = {}
# --- end ---


@functools.cache
def model(index: int) -> str:
    """ "H200" of "NVIDIA H200", "A100" of "NVIDIA A100-SXM4-80GB"; empty where the name holds no such word."""
    found = re.search(r"\b[A-Z]{1,2}\d{2,4}[A-Z]?\b", torch.cuda.get_device_name(index))
    return found[0] if found else ""


def _capability(arch: int) -> tuple[str, ...]:
    if arch in (86, 87, 88, 89) or arch >= 120:  # RTX, L4, L40: small shared memory, no warp-group products
        return "sm_86", "sm_80"
    return ("sm_80" if arch < 90 else "sm_90" if arch < 100 else "sm_100",)


@functools.cache
def _tables(index: int | None, arch: int) -> tuple[dict, ...]:
    timed = [] if index is None else [TIMED.get(model(index), {})]
    return (*timed, *(_UNTIMED[name] for name in (*_capability(arch), "any")))


def tuned(x: torch.Tensor, *key: Any) -> Any:
    """The configuration of `key` for the GPU that `x` is on; None where there is none."""
    tables = _tables(x.device.index if x.is_cuda else None, arch(x))
    return next((table[key] for table in tables if key in table), None)
