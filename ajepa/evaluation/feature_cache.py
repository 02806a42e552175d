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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as save_bytes

from ajepa.data.decode import resampled_lengths
from ajepa.data.index import Index, cache_root
from ajepa.data.loader import iterate_once
from ajepa.evaluation.features import log_mel_frames, log_mel_pooling
from ajepa.evaluation.probes import Embedded
from ajepa.model.jepa import Encoder
from ajepa.model.pooling import encode_real, pool_recordings, real_columns, statistics
from ajepa.utils.atomic_files import write_atomic
from ajepa_kernels import LogMelSpec

FORMAT = 3  # increase it with every change that alters the features
CHUNKS_AT_ONCE = 64
BATCH_SECONDS = 1200  # seconds of audio decoded at once


class Recordings(NamedTuple):
    """Several recordings, cut into chunks."""

    pcm: torch.Tensor  # int16 [R, S]
    lengths: torch.Tensor  # int64 [R], real samples
    owner: torch.Tensor  # int64 [R], position of the chunk's recording in `items`
    items: torch.Tensor  # int64 [n], rows of the index


def read_chunks(
    index: Index, spec: LogMelSpec, clip_samples: int, reading: dict[str, Any], skipped: list[tuple[str, str]]
) -> Iterator[Recordings]:
    """Read every recording of the index once, short recordings first. Bad files are added to `skipped`.

    `reading` holds the arguments `threads` and `decoder` of `iterate_once`.
    """
    rate = spec.sample_rate
    samples = resampled_lengths(index, rate)
    order = np.argsort(samples, kind="stable")
    while len(order):
        # Recordings of similar length are read together, so little padding is decoded.
        group = order[samples[order] <= max(clip_samples, 1.5 * samples[order[0]])]
        order = order[len(group) :]
        longest = int(samples[group[-1]])
        rows = torch.from_numpy(group)
        batch = max(1, min(CHUNKS_AT_ONCE, BATCH_SECONDS * rate // longest))
        options = {"sample_rate": rate, "clip_samples": longest, "batch_size": batch, **reading}
        for got in iterate_once(index.subset(group), **options, pad="zero", crop="start", skipped=skipped):
            pcm = F.pad(got.pcm, (0, -longest % clip_samples)).unflatten(1, (-1, clip_samples))
            lengths = (got.lengths[:, None] - torch.arange(pcm.shape[1]) * clip_samples).clamp(0, clip_samples)
            kept = lengths >= spec.min_samples  # a tail shorter than a window has no frame
            kept[:, 0] = True
            yield Recordings(pcm[kept], lengths[kept].long(), kept.nonzero()[:, 0], rows[got.items])


@dataclass(frozen=True)
class EncoderFeatures:
    """Latents of a frozen encoder. `kind` is a pooling (`pool_recordings`), or "tokens" for every latent."""

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

    def pool(self, x_RFTC, columns_R, owner_R, n: int, kind: str) -> list[torch.Tensor]:
        """Return one tensor per recording."""
        if kind != "tokens":
            with self.autocast():
                return list(pool_recordings(statistics(x_RFTC, columns_R), owner_R, n, kind, self.projector))
        real = torch.arange(x_RFTC.shape[2], device=x_RFTC.device) < columns_R[:, None]
        x = x_RFTC.transpose(1, 2)[real].half()  # [real columns, F, C]
        counts = columns_R.new_zeros(n).index_add(0, owner_R, columns_R) * x.shape[1]
        return list(x.flatten(0, 1).split(counts.tolist()))


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

    def pool(self, x_RFTC, frames_R, owner_R, n: int, kind: str) -> list[torch.Tensor]:
        if kind != "tokens":
            return list(pool_recordings(statistics(x_RFTC, frames_R), owner_R, n, log_mel_pooling(kind)))
        parts = [x[0, :count].split(self.spec.patch[1]) for x, count in zip(x_RFTC, frames_R, strict=True)]
        tokens = [[torch.cat([p.mean(0), p.std(0, correction=0)]) for p in part] for part in parts]
        chunks = [(owner_R == i).nonzero()[:, 0].tolist() for i in range(n)]
        return [torch.stack([token for r in own for token in tokens[r]]).half() for own in chunks]


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
    items = []
    spec = next(iter(sources.values())).spec
    for batch in read_chunks(index, spec, clip_samples, reading, skipped):
        items.append(batch.items)
        for name in {name for name, _ in missing}:
            x, count = [], []
            for pcm, lengths in zip(batch.pcm.split(CHUNKS_AT_ONCE), batch.lengths.split(CHUNKS_AT_ONCE), strict=True):
                part, real = sources[name](pcm.to(device), lengths.to(device))
                x.append(part)
                count.append(real)
            whole = torch.cat(x), torch.cat(count), batch.owner.to(device), len(batch.items)
            for kind in (kind for source, kind in missing if source == name):
                rows[name, kind] += [t.cpu() for t in sources[name].pool(*whole, kind)]
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


def tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(source, kind: str, data: str, clip_samples: int) -> str:
    dependencies = [FORMAT, source.key, asdict(source.spec), kind, data, clip_samples]
    return hashlib.sha256(json.dumps(dependencies).encode()).hexdigest()[:32]


def _load(path: Path) -> dict[str, torch.Tensor] | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if file.metadata()["sha256"] == tensors_hash(tensors):
                return tensors
            reason = "wrong checksum"
    except Exception as error:  # safetensors has an exception type of its own
        reason = str(error)
    print(f"warning: {path} is damaged ({reason}); its features are computed again", file=sys.stderr)
    return None


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save_bytes(tensors, {"sha256": tensors_hash(tensors)}))
    except OSError as error:
        print(f"warning: the features cannot be cached ({error}), so the next run computes them again", file=sys.stderr)
