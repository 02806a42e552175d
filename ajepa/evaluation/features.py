"""Frozen features and measures of their quality: pooling, kNN accuracy, effective rank."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ajepa.model.layers import Sequences
from ajepa_kernels import LogMelSpec, log_mel

Features = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def real_columns(spec: LogMelSpec, lengths_B: torch.Tensor) -> torch.Tensor:
    """Number of time patches of each clip that hold a real frame, int64 `[B]`, at least 1."""
    frames = torch.tensor([spec.frames(n) for n in lengths_B.tolist()], device=lengths_B.device)
    wanted = spec.n_frames or int(frames.max())
    return -(-frames.clamp(1, wanted) // spec.patch[1])


def encode_real(encoder, patches_BNP: torch.Tensor, spec: LogMelSpec, columns_B: torch.Tensor) -> torch.Tensor:
    """Latents `[B, N, C]` of the first `columns_B` time patches. Padding is not encoded, and its latents are zero."""
    rows, columns = spec.grid
    real = (torch.arange(columns, device=columns_B.device) < columns_B[:, None])[:, None].expand(-1, rows, -1)
    index = real.flatten().nonzero()[:, 0]
    cu = F.pad((columns_B * rows).cumsum(0), (1, 0)).int()
    latents = encoder(patches_BNP, index, Sequences(cu, spec.n_patches))
    full = latents.new_zeros(real.numel(), latents.shape[-1]).index_copy(0, index, latents)
    return full.unflatten(0, (len(patches_BNP), spec.n_patches))


def pool(latents_BNC: torch.Tensor, spec: LogMelSpec, lengths_B: torch.Tensor, pooling: str) -> torch.Tensor:
    """Clip embedding `[B, C]` (mean) or `[B, F * C]` (concat): the mean over the time patches that hold real audio."""
    rows, columns = spec.grid
    x = latents_BNC.float().unflatten(1, (rows, columns))
    count = real_columns(spec, lengths_B.to(x.device))[:, None]
    real = torch.arange(columns, device=x.device) < count
    x = (x * real[:, None, :, None]).sum(2) / count[..., None]
    return x.mean(1) if pooling == "mean" else x.flatten(1)


def encoder_features(encoder, front_end, spec: LogMelSpec, pooling: str) -> Features:
    """Embedding function (pcm, lengths) -> `[B, D]` of a frozen encoder."""

    def features(pcm: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        latents = encode_real(encoder, front_end(pcm, lengths), spec, real_columns(spec, lengths))
        return pool(latents, spec, lengths, pooling)

    return features


def log_mel_features(spec: LogMelSpec) -> Features:
    """The baseline that a trained encoder must beat: mean and standard deviation over time of each mel band."""

    def features(pcm: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        x = log_mel(pcm, spec, lengths=lengths, layout="spectrogram").float()
        frames = torch.tensor([spec.frames(int(n)) for n in lengths.tolist()], device=x.device).clamp(1, x.shape[-1])
        real = (torch.arange(x.shape[-1], device=x.device) < frames[:, None])[:, None]
        mean = (x * real).sum(-1) / frames[:, None]
        variance = ((x - mean[..., None]).square() * real).sum(-1) / frames[:, None]
        return torch.cat([mean, variance.sqrt()], dim=-1)

    return features


def knn_predict(
    train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, k: int = 10, temperature: float = 0.07
) -> torch.Tensor:
    """X-ARES's kNN: the k nearest rows by cosine similarity vote with weight softmax(similarity / temperature)."""
    train_x, test_x = F.normalize(train_x, dim=-1), F.normalize(test_x, dim=-1)
    similarity, nearest = (test_x @ train_x.T).topk(min(k, len(train_x)), dim=-1)
    votes = F.one_hot(train_y[nearest], int(train_y.max()) + 1) * (similarity / temperature).softmax(-1)[..., None]
    return votes.sum(1).argmax(-1)


def knn_accuracy(features: torch.Tensor, labels: torch.Tensor, is_test: torch.Tensor) -> float:
    """Share of the test rows that their nearest other rows classify correctly, after `standardised`."""
    train_x, test_x = standardised(features[~is_test], features[is_test])
    return (knn_predict(train_x, labels[~is_test], test_x) == labels[is_test]).float().mean().item()


def standardised(train_x: torch.Tensor, test_x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre and scale both by the mean and standard deviation of the training rows.

    Log-mel features and latents have offsets that would otherwise dominate the cosine. X-ARES does not do this.
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
