"""The audio of a run: the training recordings, the evaluation clips, and the files that were left out."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ajepa.config import Config
from ajepa.data.batch import Batch
from ajepa.data.decode import resampled_lengths
from ajepa.data.index import DataError, Index, build_index
from ajepa.data.loader import AudioLoader, iterate_once
from ajepa.data.reader import all_stored
from ajepa.data.resident import ResidentLoader, fits
from ajepa.data.shards import is_shards
from ajepa.data.synthetic import TRAINING_ROWS, default_set
from ajepa.evaluation.features import Evaluation
from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.devices import available_memory


@dataclass(frozen=True)
class Corpus:
    index: Index
    evaluation: Evaluation
    skipped: list[tuple[str, str]]  # (path, reason), found while indexing or loading evaluation clips
    description: str
    evaluated: Index | None = None  # the recordings of `evaluation`, where they are not those of `index`
    written: dict[Path, dict[str, str]] = field(default_factory=dict)  # by folder, what its skipped.tsv lists

    def loader(
        self,
        cfg: Config,
        state: dict[str, Any] | None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | None = None,
    ) -> AudioLoader:
        """Loader of batches on `device`, prefetched or kept there (`--resident`). With None they stay on the host."""
        options: dict[str, Any] = {
            **clip_options(cfg),
            **(source_options(cfg, self.index) if cfg.objective.clips else {}),
            "batch_size": cfg.optim.batch_size // world_size,
            "rank": rank,
            "world_size": world_size,
            "seed": cfg.seed,
            "gain_db": cfg.data.gain_db,
            "prefetch": cfg.data.prefetch,
            "state": state,
        }
        rate, samples, limit = options["sample_rate"], options["clip_samples"], cfg.data.resident_gb * 1e9
        if device is not None and (cfg.data.resident or (limit and fits(self.index, rate, samples, limit, device))):
            return ResidentLoader(self.index, device=device, **options)
        return AudioLoader(self.index, device=device, **options)

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


def open_corpus(cfg: Config) -> Corpus:
    """Index the training audio and load the evaluation clips. Raises DataError if nothing is usable."""
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
    skipped = [*index.skipped, *evaluated.skipped]
    evaluation = load_evaluation(cfg, evaluated, eval_test, watch.eval_clips, skipped)
    hours = index.seconds / 3600
    description = f"{len(index):,} recordings, {hours:.2f} hours, from {data.data or 'the synthetic set'}"
    if skipped:
        description += f"; {len(dict(skipped))} files left out, see skipped.tsv"
    rate = cfg.front_end.sample_rate
    if is_shards(index.source) and not all_stored(index, rate):
        description += f"\nevery clip is decoded or resampled anew; ajepa.pack --rate {rate} --codec pcm avoids that"
    return Corpus(index, evaluation, skipped, description, None if evaluated is index else evaluated)


def load_evaluation(
    cfg: Config, index: Index, test: str | None, limit: int | None, skipped: list[tuple[str, str]]
) -> Evaluation:
    """Decode at most `limit` clips into memory, spread evenly over the index, or over its labelled rows if it has any.

    `test` selects the rows to classify; the default is every fourth row.
    """
    labelled = np.flatnonzero(index.single_labels >= 0)
    rows = labelled if len(labelled) else np.arange(len(index))
    if limit is not None and len(rows) > limit:
        rows = rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]
    options = clip_options(cfg)
    need, free = 4 * len(rows) * options["clip_samples"], available_memory()  # once in batches, and once joined
    if need > free:
        raise DataError(
            f"{len(rows):,} evaluation clips of {cfg.data.clip_seconds:,.4g} s need {need / 1e9:,.1f} GB of memory, "
            f"and {free / 1e9:,.1f} GB are free: lower --eval-clips or --clip-seconds"
        )
    chosen = index.subset(rows)
    batches = list(iterate_once(chosen, **options, batch_size=64, skipped=skipped))
    items = torch.cat([batch.items for batch in batches])
    if test is None:
        is_test = torch.arange(len(items)) % 4 == 3
    else:
        is_test = torch.from_numpy(np.isin(rows[items.numpy()], index.rows(test)))
    return Evaluation(
        pcm=torch.cat([batch.pcm for batch in batches]),
        lengths=torch.cat([batch.lengths for batch in batches]),
        labels=torch.from_numpy(index.single_labels[rows[items.numpy()]]),
        is_test=is_test,
        items=torch.from_numpy(rows)[items],
    )
