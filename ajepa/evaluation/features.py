"""Frozen features and measures of their quality: kNN accuracy, effective rank, variance shares."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ajepa.model.pooling import PER_FRAME, encode_real, pool_recordings, real_columns, statistics
from ajepa_kernels import LogMelSpec, log_mel

Features = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pool(
    latents_BNC: torch.Tensor,
    spec: LogMelSpec,
    lengths_B: torch.Tensor,
    pooling: str,
    projector: nn.Module | None = None,
) -> torch.Tensor:
    """Clip embeddings `[B, D]` over the time patches that hold real audio; see `pool_recordings`."""
    columns = real_columns(spec, lengths_B.to(latents_BNC.device))
    chunks = statistics(latents_BNC.unflatten(1, spec.grid), columns)
    return pool_recordings(chunks, torch.arange(len(columns), device=columns.device), len(columns), pooling, projector)


def encoder_features(
    encoder, front_end: Callable, spec: LogMelSpec, pooling: str, projector: nn.Module | None = None
) -> Features:
    """Embedding function (pcm, lengths) -> `[B, D]` of a frozen encoder. Pooling "projection" needs `projector`."""

    def features(pcm: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        latents = encode_real(encoder, front_end(pcm, lengths), spec, real_columns(spec, lengths))
        return pool(latents, spec, lengths, pooling, projector)

    return features


def log_mel_features(spec: LogMelSpec, pooling: str = "mean+std") -> Features:
    """The baseline that a trained encoder must beat, pooled as the encoder is; see `log_mel_pooling`."""

    def features(pcm: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x, frames = log_mel_frames(spec, pcm, lengths)
        owner = torch.arange(len(x), device=x.device)
        return pool_recordings(statistics(x, frames), owner, len(x), log_mel_pooling(pooling))

    return features


def log_mel_pooling(pooling: str) -> str:
    """The pooling of log-mel that is compared with an encoder's: the mean over time of each band for "mean" and
    "concat", and also the deviation for the poolings that have one."""
    return "mean" if pooling in PER_FRAME else "mean+std"


def log_mel_frames(spec: LogMelSpec, pcm: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mel frames `[B, 1, T, M]`, float32, and the number of real ones of each clip, `[B]`, at least 1."""
    x = log_mel(pcm, spec, lengths=lengths, layout="spectrogram").float()
    frames = torch.tensor([spec.frames(n) for n in lengths.tolist()], device=x.device)
    return x.transpose(1, 2)[:, None], frames.clamp(1, x.shape[-1])


def variance_shares(targets_BNC: torch.Tensor) -> dict[str, float]:
    """Shares of the targets' variance that the mean of each patch position and the mean of each clip explain.

    With m the mean over clips and patches, the variance is `mean_bn |t_bn - m|^2`. `position` is the share
    `mean_n |mean_b t_bn - m|^2`, and `clip` is the share `mean_b |mean_n t_bn - m|^2`. Both are 0 for constant targets.
    Targets that depend on the position alone have `position` 1, and teach nothing of the sound.
    """
    x = targets_BNC.float()
    x = x - x.mean((0, 1))
    total = x.square().mean((0, 1)).sum().clamp_min(torch.finfo(x.dtype).tiny)
    means = {"position": x.mean(0), "clip": x.mean(1)}
    return {name: (mean.square().mean(0).sum() / total).item() for name, mean in means.items()}


def knn_predict(
    train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, k: int = 10, temperature: float = 0.07
) -> torch.Tensor:
    """The k nearest rows by cosine similarity vote with weight softmax(similarity / temperature)."""
    return _vote(F.normalize(test_x, dim=-1) @ F.normalize(train_x, dim=-1).T, train_y, k, temperature)


def knn_xares_predict(
    train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, k: int = 10, temperature: float = 0.07
) -> torch.Tensor:
    """The kNN of X-ARES as its code computes it: `knn_predict` with another normalisation of the training rows.

    X-ARES normalises the transposed training matrix along its last axis, so each feature has length 1 over the clips,
    where a cosine similarity needs length 1 of each clip over the features. Clips with large features are then near to
    everything. Published kNN figures carry this.
    """
    return _vote(F.normalize(test_x, dim=-1) @ F.normalize(train_x, dim=0).T, train_y, k, temperature)


def _vote(similarity: torch.Tensor, train_y: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    similarity, nearest = similarity.topk(min(k, len(train_y)), dim=-1)
    votes = F.one_hot(train_y[nearest], int(train_y.max()) + 1) * (similarity / temperature).softmax(-1)[..., None]
    return votes.sum(1).argmax(-1)


def knn_accuracy(features: torch.Tensor, labels: torch.Tensor, is_test: torch.Tensor) -> float:
    """Share of the test rows that their nearest other rows classify correctly, after `standardised`."""
    train_x, test_x = standardised(features[~is_test], features[is_test])
    return (knn_predict(train_x, labels[~is_test], test_x) == labels[is_test]).float().mean().item()


def standardised(train_x: torch.Tensor, test_x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and scale both by the mean and standard deviation of the training rows.

    Log-mel features and latents have offsets that would otherwise dominate the cosine.
    """
    mean, scale = train_x.mean(0), train_x.std(0) + 1e-6
    return (train_x - mean) / scale, (test_x - mean) / scale


def effective_rank(features: torch.Tensor) -> float:
    """exp(entropy of the normalised singular values) of the centred features (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals((features - features.mean(0)).double())
    p = values / values.sum().clamp(min=1e-12)
    return torch.special.entr(p).sum().exp().item()


def mean_cosine(features: torch.Tensor) -> float:
    """Mean cosine similarity between different clips; it is 1 if all clips are alike."""
    x = F.normalize(features.double(), dim=-1)
    n = len(x)
    return ((x.sum(0).square().sum() - n) / max(1, n * (n - 1))).item()


@dataclass(frozen=True)
class Evaluation:
    """Clips in memory with their labels. The test clips are classified by their neighbours among the other clips."""

    pcm: torch.Tensor  # int16 [n, S]
    lengths: torch.Tensor  # int32 [n]
    labels: torch.Tensor  # int64 [n], -1 where unknown
    is_test: torch.Tensor  # bool [n]
    items: torch.Tensor  # int64 [n], rows of the index

    @torch.no_grad()
    def embed(self, features: Features, device: torch.device, batch: int = 64) -> torch.Tensor:
        rows = zip(self.pcm.split(batch), self.lengths.split(batch), strict=True)
        return torch.cat([features(pcm.to(device), lengths.to(device)).cpu() for pcm, lengths in rows])

    def has_labels(self, is_test: torch.Tensor) -> bool:
        """Whether kNN accuracy is defined.

        It needs test clips, a label for every clip, and at least two classes among the other clips.
        """
        both = 0 < int(is_test.sum()) < len(is_test)
        return both and bool((self.labels >= 0).all()) and len(self.labels[~is_test].unique()) > 1

    def score(self, features: Features, device: torch.device) -> dict[str, float | None]:
        x = self.embed(features, device)
        if not x.isfinite().all():
            return dict.fromkeys(("knn_accuracy", "effective_rank", "mean_cosine"), float("nan"))
        return {
            "knn_accuracy": knn_accuracy(x, self.labels, self.is_test) if self.has_labels(self.is_test) else None,
            "effective_rank": effective_rank(x),
            "mean_cosine": mean_cosine(x),
        }
