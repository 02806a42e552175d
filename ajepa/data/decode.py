"""Chooses the reader for an index, and decodes whole recordings."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import numpy as np

from ajepa.data.dali import DaliReader, formats_for
from ajepa.data.index import Index
from ajepa.data.reader import Clips, Plan, Reader, default_threads

GROUP_CLIPS, GROUP_SAMPLES = 64, 1 << 24  # limits on the recordings, and roughly on the samples, decoded per batch

Decoder = Literal["auto", "dali", "soundfile"]
T = TypeVar("T")


def open_reader(
    index: Index, plan: Callable[[int], Plan | None], *, batch_size: int, decoder: Decoder = "auto", **options
) -> Reader:
    """The reader for this index.

    Args:
        plan: the batch's rows, crops and gains, see `Reader`.
        batch_size: number of clips in the largest plan.
        decoder: "auto" uses DALI for the formats that it decodes faster than libsndfile, "dali" uses it for every
            format that it can decode, and "soundfile" never uses it. The samples of lossless recordings are the same
            bit for bit.
        options: see `Reader`.
    """
    formats = formats_for(decoder, index)
    if formats:
        return DaliReader(index, plan, batch_size=batch_size, formats=formats, **options)
    return Reader(index, plan, **options)


def read_whole(
    index: Index,
    work: Callable[[int, np.ndarray], T],
    *,
    sample_rate: int,
    max_samples: float,
    threads: int = 0,
    decoder: Decoder = "auto",
) -> Iterator[T | str]:
    """Yields, in row order, `work(row, samples)` of every whole recording, or the reason why it cannot be read.

    Several threads call `work`; its samples are those of `Clips.clip`. A recording of more than `max_samples` (at
    `sample_rate`) is refused, which bounds the memory.
    """
    samples = resampled_lengths(index, sample_rate)
    too_long = samples > max_samples
    limit = f"longer than {max_samples / sample_rate / 3600:g} hours: cut it"
    refused = {index.entries[row].name: limit for row in np.flatnonzero(too_long)}
    samples[too_long] = 1
    bounds = _groups(samples)

    def plan(batch: int) -> Plan | None:
        if batch + 1 >= len(bounds):
            return None
        items = np.arange(bounds[batch], bounds[batch + 1])
        return Plan(items, np.zeros(len(items)), np.ones(len(items)))

    reader = open_reader(
        index,
        plan,
        batch_size=GROUP_CLIPS,
        decoder=decoder,
        sample_rate=sample_rate,
        clip_samples=int(samples.max(initial=1)),
        threads=threads or default_threads(),
        skipped=refused,
        replace=False,
    )

    def one(clips: Clips, b: int) -> T | str:
        item, samples = clips.clip(b, None)
        return work(item, samples) if item >= 0 else reader.skipped[index.entries[int(clips.plan.items[b])].name]

    try:
        while (clips := reader.next()) is not None:
            yield from reader.spread(lambda b: one(clips, b), len(clips.plan.items))
    finally:
        reader.close()


def resampled_lengths(index: Index, sample_rate: int) -> np.ndarray:
    """Length of every recording in samples at `sample_rate`, int64: `ajepa_kernels.resampled_length` of each row."""
    numbers = index.entries.numbers
    return -(-numbers["frames"] * sample_rate // numbers["sample_rate"])


def _groups(samples: Sequence[float] | np.ndarray) -> list[int]:
    """Bounds of the runs of rows that are decoded together."""
    bounds, held = [0], 0.0
    for row, count in enumerate(samples):
        if row > bounds[-1] and (held + count > GROUP_SAMPLES or row - bounds[-1] == GROUP_CLIPS):
            bounds.append(row)
            held = 0.0
        held += count
    return [*bounds, len(samples)]
