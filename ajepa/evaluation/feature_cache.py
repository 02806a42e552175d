"""Frozen features of whole recordings, of any length, kept on disk by what they depend on.

A recording is cut into chunks of the encoder's clip length; each is encoded alone, and the pooling runs over the real
time patches of all of them. Shapes: R chunks, n recordings, F x T patches of a chunk, C channels.
"""

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
from ajepa.evaluation.features import encode_real, real_columns
from ajepa.evaluation.probes import Embedded
from ajepa.utils.atomic_files import write_atomic
from ajepa_kernels import LogMelSpec, log_mel

FORMAT = 2  # raise it with any change to what the features are
CHUNKS_AT_ONCE = 64
BATCH_SECONDS = 1200  # of audio decoded at once


class Recordings(NamedTuple):
    """Some recordings, cut into chunks."""

    pcm: torch.Tensor  # int16 [R, S]
    lengths: torch.Tensor  # int64 [R], real samples
    owner: torch.Tensor  # int64 [R], position in `items`
    items: torch.Tensor  # int64 [n], rows of the index


def read_chunks(
    index: Index, spec: LogMelSpec, clip_samples: int, reading: dict[str, Any], skipped: list[tuple[str, str]]
) -> Iterator[Recordings]:
    """Every recording of the index once, the short ones first. Files found bad are left out and added to `skipped`.

    `reading`: `threads` and `decoder` of `iterate_once`.
    """
    rate = spec.sample_rate
    samples = resampled_lengths(index, rate)
    order = np.argsort(samples, kind="stable")
    while len(order):
        group = order[samples[order] <= max(clip_samples, 1.5 * samples[order[0]])]  # little padding is decoded
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
    """Latents of a frozen encoder. `kind`: "mean" or "concat" over frequency, `[n, C or F * C]`; or "tokens"."""

    encoder: torch.nn.Module
    front_end: Callable
    spec: LogMelSpec
    key: str  # names the weights

    def __call__(self, pcm, lengths) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents `[R, F, T, C]`, and how many of the T columns are real, `[R]`."""
        columns = real_columns(self.spec, lengths)
        latents = encode_real(self.encoder, self.front_end(pcm, lengths), self.spec, columns)
        return latents.float().unflatten(1, self.spec.grid), columns

    def pool(self, x_RFTC, columns_R, owner_R, n: int, kind: str) -> list[torch.Tensor]:
        """One tensor a recording."""
        x, owner = _real(x_RFTC.transpose(1, 2), columns_R, owner_R)
        if kind == "tokens":
            return list(x.half().flatten(0, 1).split((torch.bincount(owner, minlength=n) * x.shape[1]).tolist()))
        mean = _mean(x, owner, n)
        return list(mean.mean(1) if kind == "mean" else mean.flatten(1))


@dataclass(frozen=True)
class LogMelFeatures:
    """The baseline: mean and deviation over time of each mel band, `[n, 2 M]`; as tokens, of a patch's frames."""

    spec: LogMelSpec  # with n_frames None
    key: str = "log-mel"

    def __call__(self, pcm, lengths) -> tuple[torch.Tensor, torch.Tensor]:
        x = log_mel(pcm, self.spec, lengths=lengths, layout="spectrogram").float()
        frames = torch.tensor([self.spec.frames(n) for n in lengths.tolist()], device=x.device)
        return x[:, None].transpose(2, 3), frames.clamp(1, x.shape[-1])

    def pool(self, x_RFTC, frames_R, owner_R, n: int, kind: str) -> list[torch.Tensor]:
        if kind == "tokens":
            parts = [x[0, :count].split(self.spec.patch[1]) for x, count in zip(x_RFTC, frames_R, strict=True)]
            tokens = [[torch.cat([p.mean(0), p.std(0, correction=0)]) for p in part] for part in parts]
            of = [[t for r in (owner_R == i).nonzero()[:, 0].tolist() for t in tokens[r]] for i in range(n)]
            return [torch.stack(group).half() for group in of]
        x, owner = _real(x_RFTC.transpose(1, 2), frames_R, owner_R)
        mean = _mean(x, owner, n)
        deviation = _mean((x - mean[owner]).square(), owner, n).sqrt()
        return list(torch.cat([mean, deviation], -1).flatten(1))


def _real(x_RTFC, count_R, owner_R) -> tuple[torch.Tensor, torch.Tensor]:
    """The real columns alone, `[K, F, C]`, and the recording of each, `[K]`."""
    real = torch.arange(x_RTFC.shape[1], device=x_RTFC.device) < count_R[:, None]
    return x_RTFC[real], owner_R[:, None].expand_as(real)[real]


def _mean(x_K, owner_K, n: int) -> torch.Tensor:
    total = x_K.new_zeros(n, *x_K.shape[1:]).index_add(0, owner_K, x_K)
    return total / torch.bincount(owner_K, minlength=n).view(-1, *[1] * (x_K.dim() - 1))


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
    """Features of every recording that can be read: their rows of the index, int64 `[n]`, and by source.

    `kinds`: one pooling, and "tokens" where they are wanted. All that the cache lacks is made in one pass over the
    audio; a damaged file of the cache is made again.
    """
    folder = cache or cache_root() / "features"
    data = data_hash(index)
    paths = {(name, kind): folder / f"{_key(source, kind, data, clip_samples)}.safetensors"
             for name, source in sources.items() for kind in kinds}  # fmt: skip
    have = {which: _load(path) for which, path in paths.items()}
    missing = [which for which, tensors in have.items() if tensors is None]
    if missing:
        made = _embed(index, sources, missing, clip_samples, device, reading, skipped)
        for which, tensors in made.items():
            have[which] = tensors
            _save(paths[which], tensors)
    every = [tensors for tensors in have.values() if tensors is not None]
    items = every[0]["items"]
    if not all(torch.equal(tensors["items"], items) for tensors in every):  # a file has gone bad since some were made
        for path in paths.values():
            path.unlink(missing_ok=True)
        return embed(index, sources, clip_samples, kinds, device=device, reading=reading, skipped=skipped, cache=cache)
    result = {}
    for name in sources:
        parts = {kind: have[name, kind] or {} for kind in kinds}
        tokens = parts.get("tokens", {})
        clips = next((t["x"] for kind, t in parts.items() if kind != "tokens"), torch.zeros(len(items), 0))
        result[name] = Embedded(clips, tokens.get("x"), tokens.get("cu"))
    return items, result


@torch.no_grad()
def _embed(index, sources, missing, clip_samples, device, reading, skipped) -> dict[tuple[str, str], dict]:
    rows: dict[tuple[str, str], list[torch.Tensor]] = {which: [] for which in missing}
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
            for kind in (kind for which, kind in missing if which == name):
                rows[name, kind] += [t.cpu() for t in sources[name].pool(*whole, kind)]
    order = torch.cat(items).argsort()
    made = {}
    for which, parts in rows.items():
        parts = [parts[i] for i in order.tolist()]
        tensors = {"items": torch.cat(items)[order]}
        if which[1] == "tokens":
            tensors["cu"] = F.pad(torch.tensor([len(p) for p in parts]).cumsum(0), (1, 0))
            tensors["x"] = torch.cat(parts)
        else:
            tensors["x"] = torch.stack(parts)
        made[which] = tensors
    return made


def data_hash(index: Index) -> str:
    """Changes with any file's name, size, time or length, and with their order; not with the labels."""
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
    what = [FORMAT, source.key, asdict(source.spec), kind, data, clip_samples]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


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
    print(f"{path}: damaged feature cache ({reason}), making it again", file=sys.stderr)
    return None


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save_bytes(tensors, {"sha256": tensors_hash(tensors)}))
    except OSError as error:
        print(f"features not cached ({error}): they are made again next time", file=sys.stderr)
