"""Frozen features of whole recordings of any length, cached on disk under a hash of everything they depend on.

A recording is cut into chunks of the encoder's clip length. Each chunk is encoded separately, and pooling runs over the
real time patches of all chunks. Shapes: R chunks, n recordings, F x T patches per chunk, C channels.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from ajepa.data.columns import Entry
from ajepa.data.decode import resampled_lengths
from ajepa.data.formats.audiofile import BadAudio, reason_of
from ajepa.data.index import Index, cache_root
from ajepa.data.loader import iterate_once
from ajepa.data.reader import iterate_resampled
from ajepa.evaluation.features import log_mel_frames, log_mel_pooling
from ajepa.evaluation.probes import Embedded
from ajepa.model.jepa import Encoder
from ajepa.model.pooling import Statistics, encode_real, merge, pool_recordings, real_columns, statistics
from ajepa.utils.json_files import DamagedError
from ajepa.utils.tensor_files import read_tensors, write_tensors
from ajepa_kernels import LogMelSpec

FORMAT = 4  # increase it with every change that alters the features
CHUNKS_AT_ONCE = 64
BATCH_SECONDS = 1200  # seconds of audio decoded at once; a longer recording is read in several groups of chunks
DENSE_RATE = 96_000  # values per second; a recording with more, over its channels, counts as a longer one


class Recordings(NamedTuple):
    """Several recordings, cut into chunks; or a group of the chunks of a long one."""

    pcm: torch.Tensor  # int16 [R, S]
    lengths: torch.Tensor  # int64 [R], real samples
    owner: torch.Tensor  # int64 [R], position of the chunk's recording in `items`
    items: torch.Tensor  # int64 [n], rows of the index
    complete: bool = True  # False: more chunks of the recording follow, unless the rest of it cannot be read


def read_chunks(
    index: Index, spec: LogMelSpec, clip_samples: int, reading: dict[str, Any], skipped: list[tuple[str, str]]
) -> Iterator[Recordings]:
    """Read every recording of the index once, short recordings first. Bad files are added to `skipped`.

    Memory is bounded whatever the recordings' lengths. `reading` holds the arguments `threads` and `decoder` of
    `iterate_once`.
    """
    rate = spec.sample_rate
    samples = resampled_lengths(index, rate)
    values = index.entries.numbers["frames"] * index.entries.numbers["channels"]
    seconds = np.maximum(samples / rate, values / DENSE_RATE)
    order = np.argsort(samples, kind="stable")
    long = seconds[order] > BATCH_SECONDS / 2
    order, streamed = order[~long], order[long]
    while len(order):
        # Recordings of similar length are read together, so little padding is decoded.
        group = order[samples[order] <= max(clip_samples, 1.5 * samples[order[0]])]
        order = order[len(group) :]
        longest = int(samples[group[-1]])
        rows = torch.from_numpy(group)
        batch = max(1, min(CHUNKS_AT_ONCE, int(BATCH_SECONDS // seconds[group].max())))
        options = {"sample_rate": rate, "clip_samples": longest, "batch_size": batch, **reading}
        for got in iterate_once(index.subset(group), **options, pad="zero", crop="start", skipped=skipped):
            yield _cut(got.pcm, got.lengths, rows[got.items], spec, clip_samples)
    for row in streamed.tolist():
        entry = index.entries[row]
        try:
            yield from _stream(entry, row, spec, clip_samples, index.float_scale)
        except (BadAudio, OSError) as error:
            skipped.append((entry.name, reason_of(error)))


def _stream(entry: Entry, row: int, spec: LogMelSpec, clip_samples: int, float_scale: float) -> Iterator[Recordings]:
    """Read one long recording in groups of `CHUNKS_AT_ONCE` chunks. The last group is never empty."""
    items, size = torch.tensor([row]), CHUNKS_AT_ONCE * clip_samples
    held: list[np.ndarray] = []
    for block in iterate_resampled(entry, spec.sample_rate, float_scale, pcm=True):
        held.append(block)
        while sum(map(len, held)) >= size + spec.min_samples:
            pcm = np.concatenate(held)
            held = [pcm[size:].copy()]
            group = torch.from_numpy(pcm[None, :size])
            yield _cut(group, torch.tensor([size]), items, spec, clip_samples)._replace(complete=False)
    pcm = np.concatenate(held)[None]
    yield _cut(torch.from_numpy(pcm), torch.tensor([pcm.size]), items, spec, clip_samples)


def _cut(pcm_nS, lengths_n, items: torch.Tensor, spec: LogMelSpec, clip_samples: int) -> Recordings:
    pcm = F.pad(pcm_nS, (0, -pcm_nS.shape[1] % clip_samples)).unflatten(1, (-1, clip_samples))
    lengths = (lengths_n[:, None] - torch.arange(pcm.shape[1]) * clip_samples).clamp(0, clip_samples)
    kept = lengths >= spec.min_samples  # a tail shorter than a window has no frame
    kept[:, 0] = True
    return Recordings(pcm[kept], lengths[kept].long(), kept.nonzero()[:, 0], items)


@dataclass(frozen=True)
class EncoderFeatures:
    """Latents of a frozen encoder, and what is made of them."""

    encoder: Encoder
    front_end: Callable
    spec: LogMelSpec
    key: str  # identifies the weights
    layers: str = "last"  # see `encode_real`
    projector: torch.nn.Module | None = None  # in evaluation mode, for the pooling "projection"
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # of its computations

    def __call__(self, pcm, lengths) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[R, F, T, C]`, and the number of real columns among the T, `[R]`."""
        columns = real_columns(self.spec, lengths)
        with self.autocast():
            latents = encode_real(self.encoder, self.front_end(pcm, lengths), self.spec, columns, self.layers)
        return latents.float().unflatten(1, self.spec.grid), columns

    def tokens(self, x_RFTC, columns_R) -> list[torch.Tensor]:
        """The latents of the real columns of each chunk, float16 `[tokens, C]` on the CPU."""
        real = torch.arange(x_RFTC.shape[2], device=x_RFTC.device) < columns_R[:, None]
        x = x_RFTC.transpose(1, 2)[real].half().cpu()  # [real columns, F, C]
        return list(x.flatten(0, 1).split((columns_R * x.shape[1]).tolist()))

    def pool(self, chunks: Statistics, owner_R, n: int, kind: str) -> torch.Tensor:
        """Features `[n, D]` of the recordings that own the chunks; `kind` is a pooling of `pool_recordings`."""
        with self.autocast():
            return pool_recordings(chunks, owner_R, n, kind, self.projector)


@dataclass(frozen=True)
class LogMelFeatures:
    """The baseline: mean over time of each mel band, `[n, M]`, with the deviation for poolings that have one, `[n, 2
    M]`.

    A token holds mean and deviation over the frames of one time patch.
    """

    spec: LogMelSpec  # its n_frames is None
    key: str = "log-mel"

    def __call__(self, pcm, lengths) -> tuple[torch.Tensor, torch.Tensor]:
        return log_mel_frames(self.spec, pcm, lengths)

    def tokens(self, x_RFTC, frames_R) -> list[torch.Tensor]:
        parts = [x[0, :n].split(self.spec.patch[1]) for x, n in zip(x_RFTC.cpu(), frames_R.tolist(), strict=True)]
        return [torch.stack([torch.cat([p.mean(0), p.std(0, correction=0)]) for p in part]).half() for part in parts]

    def pool(self, chunks: Statistics, owner_R, n: int, kind: str) -> torch.Tensor:
        return pool_recordings(chunks, owner_R, n, log_mel_pooling(kind))


def embed(
    index: Index,
    sources: dict[str, EncoderFeatures | LogMelFeatures],
    clip_samples: int,
    kinds: Sequence[str],
    *,
    device: torch.device,
    reading: dict[str, Any],
    skipped: list[tuple[str, str]],
    cache: Path | None = None,
) -> tuple[torch.Tensor, dict[str, Embedded]]:
    """Return the index rows, int64 `[n]`, of the recordings that can be read, and their features by source.

    `kinds` holds one pooling, and "tokens" if tokens are needed. Features that the cache lacks are computed in one pass
    over the audio, and damaged cache files are replaced.
    """
    folder = cache or cache_root() / "features"
    data = data_hash(index)
    paths = {(name, kind): folder / f"{_key(source, kind, data, clip_samples)}.safetensors"
             for name, source in sources.items() for kind in kinds}  # fmt: skip
    features = {wanted: _load(path) for wanted, path in paths.items()}
    missing = [wanted for wanted, tensors in features.items() if tensors is None]
    if missing:
        computed = _embed(index, sources, missing, clip_samples, device, reading, skipped)
        for wanted, tensors in computed.items():
            features[wanted] = tensors
            _save(paths[wanted], tensors)
    every = [tensors for tensors in features.values() if tensors is not None]
    items = every[0]["items"]
    if not all(torch.equal(tensors["items"], items) for tensors in every):  # a file became unreadable between runs
        for path in paths.values():
            path.unlink(missing_ok=True)
        return embed(index, sources, clip_samples, kinds, device=device, reading=reading, skipped=skipped, cache=cache)
    result = {}
    for name in sources:
        parts = {kind: features[name, kind] or {} for kind in kinds}
        tokens = parts.get("tokens", {})
        clips = next((t["x"] for kind, t in parts.items() if kind != "tokens"), torch.zeros(len(items), 0))
        result[name] = Embedded(clips, tokens.get("x"), tokens.get("cu"))
    return items, result


@torch.no_grad()
def _embed(index, sources, missing, clip_samples, device, reading, skipped) -> dict[tuple[str, str], dict]:
    rows: dict[tuple[str, str], list[torch.Tensor]] = {wanted: [] for wanted in missing}
    items: list[torch.Tensor] = []
    held: dict[tuple[str, str], list] = {wanted: [] for wanted in missing}  # of the chunks of `current`
    current: list[int] = []
    spec = next(iter(sources.values())).spec
    for batch in read_chunks(index, spec, clip_samples, reading, skipped):
        if batch.items.tolist() != current:  # also after a long recording whose rest cannot be read
            current = batch.items.tolist()
            held = {wanted: [] for wanted in missing}
        for pcm, lengths in zip(batch.pcm.split(CHUNKS_AT_ONCE), batch.lengths.split(CHUNKS_AT_ONCE), strict=True):
            for name in dict.fromkeys(name for name, _ in missing):
                x, real = sources[name](pcm.to(device), lengths.to(device))
                for kind in (kind for source, kind in missing if source == name):
                    if kind == "tokens":
                        held[name, kind] += sources[name].tokens(x, real)
                    else:
                        held[name, kind].append(statistics(x, real))
        for (name, kind), parts in held.items():
            if kind == "tokens":
                if batch.complete:
                    chunks = iter(parts)
                    counts = batch.owner.bincount().tolist() if len(current) > 1 else [len(parts)]
                    rows[name, kind] += [torch.cat(list(islice(chunks, count))) for count in counts]
                continue
            whole = Statistics(*map(torch.cat, zip(*parts, strict=True)))
            owner = batch.owner.to(device) if len(current) > 1 else torch.zeros_like(whole.columns)
            if batch.complete:
                rows[name, kind] += list(sources[name].pool(whole, owner, len(current), kind).cpu())
            elif kind != "projection":  # which needs the statistics of each chunk
                parts[:] = [merge(whole, owner, 1)]
        if batch.complete:
            items.append(batch.items)
            current = []
    order = torch.cat(items).argsort()
    computed = {}
    for wanted, parts in rows.items():
        parts = [parts[i] for i in order.tolist()]
        tensors = {"items": torch.cat(items)[order]}
        if wanted[1] == "tokens":
            tensors["cu"] = F.pad(torch.tensor([len(p) for p in parts]).cumsum(0), (1, 0))
            tensors["x"] = torch.cat(parts)
        else:
            tensors["x"] = torch.stack(parts)
        computed[wanted] = tensors
    return computed


def data_hash(index: Index) -> str:
    """Hash of the files' names, sizes, modification times and lengths, and of their order. Labels do not change it."""
    digest = hashlib.sha256(f"{index.float_scale}\n".encode())
    for e in index.entries:
        digest.update(f"{e.name}\0{e.offset}\0{e.size}\0{e.mtime_ns}\0{e.frames}\0{e.sample_rate}\n".encode(
            errors="surrogateescape"))  # fmt: skip
    return digest.hexdigest()


def _key(source, kind: str, data: str, clip_samples: int) -> str:
    dependencies = [FORMAT, source.key, asdict(source.spec), kind, data, clip_samples]
    return hashlib.sha256(json.dumps(dependencies).encode()).hexdigest()[:32]


def _load(path: Path) -> dict[str, torch.Tensor] | None:
    try:
        return read_tensors(path)
    except FileNotFoundError:
        return None
    except (OSError, DamagedError) as error:
        print(f"warning: {error}; its features are computed again", file=sys.stderr)
        return None


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors)
    except OSError as error:
        print(f"warning: the features cannot be cached ({error}), so the next run computes them again", file=sys.stderr)
