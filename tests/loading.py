"""Helpers shared by the loader tests: options for small clips and a bit-for-bit comparison of batches."""

import torch

from ajepa.data.loader import Batch, iterate_once

RATE, CLIP = 16000, 1600
OPTIONS = {"sample_rate": RATE, "clip_samples": CLIP, "batch_size": 4, "seed": 0, "threads": 2}


def take(batches, count: int) -> list[Batch]:
    return [next(batches) for _ in range(count)]


def once(index, **options) -> Batch:
    """The whole index as one batch."""
    keep = {name: OPTIONS[name] for name in ("sample_rate", "clip_samples", "threads")}
    batches = list(iterate_once(index, **{**keep, "batch_size": 3, **options}))
    return Batch(*map(torch.cat, zip(*batches, strict=True)))


def assert_same(got: list[Batch], wanted: list[Batch]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        for name, x, y in zip(Batch._fields, a, b, strict=True):
            assert torch.equal(x, y), name
