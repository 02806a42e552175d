"""The audio of a run: the training recordings, the evaluation clips, and the files that were left out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ajepa.config import Config
from ajepa.data.batch import Batch, fill_up
from ajepa.data.decode import open_reader, resampled_lengths
from ajepa.data.index import DataError, Index, build_index
from ajepa.data.loader import AudioLoader
from ajepa.data.reader import Clips, Plan, all_stored, default_threads, to_int16
from ajepa.data.resident import Decoded, ResidentLoader, fits
from ajepa.data.shards import is_shards
from ajepa.data.synthetic import TRAINING_ROWS, default_set
from ajepa.evaluation.features import Evaluation
from ajepa.training.alike import check_data
from ajepa.training.ranks import ElsewhereError, Ranks
from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.cores import local_ranks
from ajepa.utils.devices import available_memory, wait

GROUP_CLIPS = 64  # evaluation clips that are decoded at a time
CHUNK_BYTES = 1 << 26  # bytes of decoded audio that ranks exchange at a time


@dataclass(frozen=True)
class Corpus:
    index: Index
    evaluation: Evaluation
    skipped: list[tuple[str, str]]  # (path, reason), found while indexing or loading evaluation clips
    description: str
    written: dict[Path, dict[str, str]] = field(default_factory=dict)  # by folder, what its skipped.tsv lists

    def loader(
        self,
        cfg: Config,
        state: dict[str, Any] | None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
        ranks: Ranks | None = None,
    ) -> AudioLoader:
        """Loader of batches on `device`, prefetched or kept there (`--resident`). With None they stay on the host.

        `ranks` are those that make their loaders at the same time, and then share the decoding for `--resident`.
        """
        ranks = ranks or Ranks()
        options: dict[str, Any] = {
            **clip_options(cfg),
            **(source_options(cfg, self.index) if cfg.objective.clips else {}),
            "batch_size": cfg.optim.batch_size // world_size,
            "rank": rank,
            "world_size": world_size,
            "seed": cfg.seed,
            "gain_db": cfg.data.gain_db,
            "prefetch": cfg.data.prefetch,
            "shuffle": cfg.data.shuffle,
            "state": state,
        }
        rate, samples, limit = options["sample_rate"], options["clip_samples"], cfg.data.resident_gb * 1e9
        resident = cfg.data.resident or (
            device is not None and limit > 0 and fits(self.index, rate, samples, limit, device)
        )
        if device is not None and all(ranks.gather(resident)):  # their free memory differs
            join = None if ranks.alone else partial(decode_together, ranks)
            return ResidentLoader(self.index, device=device, join=join, **options)
        return ranks.together(lambda: AudioLoader(self.index, device=device, **options))

    def write_skipped(self, folder: Path, found: Iterable[tuple[str, str]]) -> int:
        """List the files left out with their reasons in `skipped.tsv` and return their number.

        `found` holds the files that loaders skipped. A list that has not changed is not written again.
        """
        rows = dict([*self.skipped, *found])
        if self.written.get(folder) != rows:
            lines = [f"{ascii(path)[1:-1]}\t{' '.join(reason.split())}\n" for path, reason in rows.items()]
            write_atomic(folder / "skipped.tsv", ("path\treason\n" + "".join(lines)).encode())
            self.written[folder] = rows
        return len(rows)


def clip_options(cfg: Config) -> dict[str, Any]:
    """Options that turn recordings into clips, in training and evaluation alike."""
    rate = cfg.front_end.sample_rate
    samples = round(cfg.data.clip_seconds * rate)
    return {
        "sample_rate": rate,
        "clip_samples": samples,
        "pad": cfg.data.pad,
        "decoder": cfg.data.decoder,
        "threads": cfg.data.loader_threads,
    }


def source_options(cfg: Config, index: Index) -> dict[str, Any]:
    """Options that read the sections from which the views of the clip objective are cropped.

    They are no longer than the longest recording, but at least a clip. Padding by zeros leaves their real lengths
    known.
    """
    rate = cfg.front_end.sample_rate
    longest = max(round(cfg.data.clip_seconds * rate), int(resampled_lengths(index, rate).max()))
    return {"clip_samples": min(round(cfg.source_seconds * rate), longest), "pad": "zero"}


def to_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """PCM and lengths of a batch on `device`, where the loader has not copied them already."""
    if batch.pcm.device.type == device.type:
        return batch.pcm, batch.lengths
    pcm, lengths = (t.pin_memory().to(device, non_blocking=True) for t in (batch.pcm, batch.lengths))
    return pcm, lengths


def open_corpus(cfg: Config, ranks: Ranks | None = None) -> Corpus:
    """Index the training audio and load the evaluation clips. Raises DataError if nothing is usable.

    Rank 0 checks the files, and the other ranks find its verdicts in the cache. All ranks decode evaluation clips.
    """
    ranks, data = ranks or Ranks(), cfg.data
    index, evaluated, eval_test = ranks.first_alone(lambda: build_indexes(cfg))
    check_data(ranks, index, None if evaluated is index else evaluated)  # before they share any work
    skipped = [*index.skipped, *evaluated.skipped]
    evaluation = load_evaluation(cfg, evaluated, eval_test, cfg.watch.eval_clips, skipped, ranks)
    hours = index.seconds / 3600
    description = f"{len(index):,} recordings, {hours:.2f} hours, from {data.data or 'the synthetic set'}"
    if skipped:
        description += f"; {len(dict(skipped))} files left out, see skipped.tsv"
    rate = cfg.front_end.sample_rate
    if is_shards(index.source) and not all_stored(index, rate):
        description += f"\nevery clip is decoded or resampled anew; ajepa.pack --rate {rate} --codec pcm avoids that"
    return Corpus(index, evaluation, skipped, description)


def build_indexes(cfg: Config) -> tuple[Index, Index, str | None]:
    """The recordings to train on, those to evaluate on, and the condition that selects which of the latter to classify.

    They are the same `Index` where a run has no evaluation data of its own.
    """
    data, watch = cfg.data, cfg.watch
    source, where, eval_source, eval_test = data.data, data.where, watch.eval_data, watch.eval_test
    if source is None:
        source, where = str(default_set(data.clip_seconds, cfg.front_end.sample_rate)), TRAINING_ROWS
        if eval_source is None:
            eval_source, eval_test = source, "split=test"
    scale = data.float_scale
    index = build_index(source, where=where, label_column=data.label, float_scale=scale)
    evaluated = index
    if eval_source is not None:
        column = watch.eval_label or data.label
        evaluated = build_index(eval_source, where=watch.eval_where, label_column=column, float_scale=scale)
    return index, evaluated, eval_test


def load_evaluation(
    cfg: Config,
    index: Index,
    test: str | None,
    limit: int | None,
    skipped: list[tuple[str, str]],
    ranks: Ranks | None = None,
) -> Evaluation:
    """Decode at most `limit` clips into memory, spread evenly over the index, or over its labelled rows if it has any.

    `test` selects the rows to classify; the default is every fourth row. Bad files are added to `skipped`. Each of
    `ranks` decodes a part of the clips, and gets all of them.
    """
    ranks = ranks or Ranks()
    labelled = np.flatnonzero(index.single_labels >= 0)
    rows = labelled if len(labelled) else np.arange(len(index))
    if limit is not None and len(rows) > limit:
        rows = rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]
    chosen = index.subset(rows)

    def decode() -> Decoded:
        shape = len(rows), clip_options(cfg)["clip_samples"]
        need, free = 2 * local_ranks() * shape[0] * shape[1], available_memory()
        if need > free:
            raise DataError(
                f"{len(rows):,} evaluation clips of {cfg.data.clip_seconds:,.4g} s need {need / 1e9:,.1f} GB of "
                f"memory, and {free / 1e9:,.1f} GB are free: lower --eval-clips or --clip-seconds"
            )
        pcm, lengths = torch.zeros(shape, dtype=torch.int16), torch.zeros(len(rows), dtype=torch.int32)
        own = np.arange(ranks.rank, len(rows), ranks.world_size)
        return decode_clips(cfg, chosen, own, pcm, lengths), [pcm, lengths]

    classified = ranks.together(lambda: index.rows(test) if test is not None else None)
    bad, (pcm, lengths) = decode_together(ranks, decode)
    good = lengths.numpy() > 0
    skipped.extend((name, bad[name]) for name in (chosen.entries[i].name for i in np.flatnonzero(~good)))
    rows = rows[good]
    if not len(rows):
        if not ranks.is_first:
            raise ElsewhereError
        raise DataError(f"{index.source}: no usable file is left, {len(bad)} went bad since indexing")
    for i, place in enumerate(np.flatnonzero(good) if bad else ()):  # in place, for they may take most of the memory
        pcm[i], lengths[i] = pcm[place], lengths[place]
    is_test = np.arange(len(rows)) % 4 == 3 if classified is None else np.isin(rows, classified)
    return Evaluation(
        pcm=pcm[: len(rows)],
        lengths=lengths[: len(rows)],
        labels=torch.from_numpy(index.single_labels[rows]),
        is_test=torch.from_numpy(is_test),
        items=torch.from_numpy(rows),
    )


def decode_clips(
    cfg: Config, index: Index, own: np.ndarray, pcm: torch.Tensor, lengths: torch.Tensor
) -> dict[str, str]:
    """Decode the middle of each recording in the rows `own` into its rows of `pcm`, int16 `[len(index), S]`, and of
    `lengths`. Returns the bad files with their reasons; their rows have the length 0."""
    options = clip_options(cfg)
    pad, options["threads"] = options.pop("pad"), options["threads"] or default_threads()
    pcm_rows, clip_lengths = pcm.numpy(), lengths.numpy()

    def plan(batch: int) -> Plan | None:
        items = own[batch * GROUP_CLIPS : (batch + 1) * GROUP_CLIPS]
        return Plan(items, np.full(len(items), 0.5), np.ones(len(items))) if len(items) else None

    def fill(clips: Clips, b: int) -> None:
        row = int(clips.plan.items[b])
        item, clip = clips.clip(b, pcm_rows[row])
        if item >= 0:
            to_int16(clip, 1.0, pcm_rows[row])
            clip_lengths[row] = fill_up(pcm_rows[row], len(clip), pad)

    reader = open_reader(index, plan, batch_size=GROUP_CLIPS, replace=False, **options)
    try:
        while (clips := reader.next()) is not None:
            reader.spread(partial(fill, clips), len(clips.plan.items))
        return reader.skipped
    finally:
        reader.close()


def decode_together(ranks: Ranks, decode: Callable[[], Decoded]) -> Decoded:
    """Run `decode` on every rank, and return what they have decoded together.

    Every rank writes rows of its own into tensors of zeros. Where one rank has a byte, the others have 0, so the sum
    over the ranks holds the bytes of all of them.
    """
    bad, tensors = ranks.together(decode)
    for tensor in tensors if not ranks.alone else ():
        for chunk in tensor.view(-1).view(torch.uint8).split(CHUNK_BYTES):
            dist.all_reduce(chunk, group=ranks.group if tensor.is_cuda else ranks.patient)
            wait(tensor.device)  # the time limit of a collective on a GPU counts from when it is queued
    return ranks.union(bad.items()), tensors
