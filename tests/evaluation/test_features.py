from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ajepa.config import Pooling
from ajepa.evaluation.features import (
    Evaluation,
    effective_rank,
    knn_accuracy,
    knn_predict,
    knn_xares_predict,
    log_mel_features,
    mean_cosine,
    pool,
    variance_shares,
)
from ajepa_kernels import LogMelSpec, log_mel

POOLINGS = get_args(Pooling)
SPEC = LogMelSpec(n_mels=32, n_frames=64, patch=(8, 8))  # 16 kHz, hop 160, window 400: 4 x 8 patches


def test_knn_is_a_vote_by_cosine_similarity():
    generator = torch.Generator().manual_seed(0)
    train_x, test_x = torch.randn(60, 5, generator=generator), torch.randn(20, 5, generator=generator)
    train_y = torch.randint(0, 4, (60,), generator=generator)
    wanted = []
    for x in test_x:
        similarity = torch.stack([F.cosine_similarity(x, t, dim=0) for t in train_x])
        nearest = similarity.argsort(descending=True)[:10]
        weight = (similarity[nearest] / 0.07).softmax(0)
        votes = [weight[train_y[nearest] == c].sum().item() for c in range(4)]
        wanted.append(votes.index(max(votes)))
    assert knn_predict(train_x, train_y, test_x).tolist() == wanted


def xares_knn(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> list[int]:
    """X-ARES's kNN, step by step: `normalize(train.T, dim=-1)`, products, the top ten, softmax, votes."""
    transposed = train_x.T / np.linalg.norm(train_x.T, axis=-1, keepdims=True)  # [D, n]: over the clips, not over D
    guesses = []
    for x in test_x:
        similarity = x / np.linalg.norm(x) @ transposed
        nearest = np.argsort(-similarity)[:10]
        weight = np.exp(similarity[nearest] / 0.07)
        votes = [weight[train_y[nearest] == c].sum() for c in range(train_y.max() + 1)]
        guesses.append(int(np.argmax(votes)))
    return guesses


def test_the_knn_of_x_ares_normalises_features_over_the_clips():
    """Clips of a loud class have large features, which X-ARES's normalisation does not remove: it gives every clip to
    that class, where the cosine similarity tells the classes apart."""
    generator = torch.Generator().manual_seed(0)
    train_y, test_y = torch.arange(90) % 3, torch.arange(30) % 3
    loudness = torch.tensor([1.0, 3.0, 40.0])
    directions = torch.eye(3).repeat(1, 2) + 0.5
    train_x, test_x = (
        loudness[y][:, None] * (directions[y] + 0.1 * torch.randn(len(y), 6, generator=generator))
        for y in (train_y, test_y)
    )
    guesses = knn_xares_predict(train_x, train_y, test_x)
    assert guesses.tolist() == xares_knn(train_x.double().numpy(), train_y.numpy(), test_x.double().numpy())
    assert (knn_predict(train_x, train_y, test_x) == test_y).all()
    assert (guesses == test_y).float().mean() < 0.5


def test_knn_accuracy_is_perfect_on_separate_classes_and_chance_on_noise():
    labels = torch.arange(400) % 4
    test = torch.arange(400) % 5 == 0
    noise = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    assert knn_accuracy(F.one_hot(labels).float().repeat(1, 2) * 50 + noise, labels, test) == 1.0
    assert knn_accuracy(noise, labels, test) < 0.45


def test_effective_rank_counts_directions():
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0))
    assert effective_rank(x) == pytest.approx(5, abs=0.05)
    assert effective_rank(x[:, :1] * torch.ones(5) + 3) == pytest.approx(1, abs=1e-3)


def test_mean_cosine_is_the_mean_over_pairs():
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    pairs = [F.cosine_similarity(x[i], x[j], dim=0).item() for i in range(7) for j in range(7) if i != j]
    assert mean_cosine(x) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert mean_cosine(torch.ones(5, 3)) == pytest.approx(1)


def test_variance_shares_of_positions_and_clips():
    generator = torch.Generator().manual_seed(0)
    position = torch.randn(1, 12, 5, generator=generator)
    clip, noise = (torch.randn(n, m, 5, generator=generator) for n, m in ((40, 1), (40, 12)))
    assert variance_shares(position.expand(40, -1, -1)) == pytest.approx({"position": 1, "clip": 0}, abs=1e-6)
    assert variance_shares(clip.expand(-1, 12, -1) + 100) == pytest.approx({"position": 0, "clip": 1}, abs=1e-4)
    assert variance_shares(torch.ones(4, 3, 2)) == {"position": 0, "clip": 0}
    x = (position + 2 * clip + noise).double()
    m = x.mean((0, 1))
    total = (x - m).square().sum(-1).mean()
    by_hand = {
        "position": sum((x[:, n].mean(0) - m).square().sum() for n in range(12)) / 12 / total,
        "clip": sum((x[b].mean(0) - m).square().sum() for b in range(40)) / 40 / total,
    }
    assert variance_shares(x.float()) == pytest.approx({k: v.item() for k, v in by_hand.items()}, rel=1e-5)


def test_pooling_takes_real_frames_only_and_can_keep_the_frequency_axis():
    latents = torch.randn(2, 32, 6)
    lengths = torch.tensor([400 + 160 * 16, 400 + 160 * 63])  # 17 and 64 frames: three and eight patch columns
    grid = latents.view(2, 4, 8, 6)
    means = torch.stack([grid[0, :, :3].mean(1), grid[1].mean(1)])
    torch.testing.assert_close(pool(latents, SPEC, lengths, "concat"), means.flatten(1))
    torch.testing.assert_close(pool(latents, SPEC, lengths, "mean"), means.mean(1))
    assert pool(latents, SPEC, torch.tensor([3, 3]), "mean").isfinite().all()  # shorter than a window


@pytest.mark.parametrize("pooling", POOLINGS)
def test_log_mel_is_pooled_as_the_encoder_is(pooling):
    """Mean over the real frames of each band, and the deviation for the poolings that have one."""
    pcm = torch.randint(-9999, 9999, (2, 10480), dtype=torch.int16)
    lengths = torch.tensor([2960, 10480])
    got = log_mel_features(SPEC, pooling)(pcm, lengths)
    for row, (clip, n) in zip(got, zip(pcm, lengths.tolist(), strict=True), strict=True):
        x = log_mel(clip[None, :n], SPEC, layout="spectrogram")[0][:, : SPEC.frames(n)]
        parts = [x.mean(1)] if pooling in ("mean", "concat") else [x.mean(1), x.std(1, unbiased=False)]
        torch.testing.assert_close(row, torch.cat(parts), rtol=1e-4, atol=1e-4)


def test_scores_without_labels_have_no_knn():
    n = 8
    clips = Evaluation(
        pcm=torch.randint(-99, 99, (n, 10480), dtype=torch.int16),
        lengths=torch.full((n,), 10480),
        labels=torch.full((n,), -1),
        is_test=torch.arange(n) % 4 == 3,
        items=torch.arange(n),
    )
    scores = clips.score(log_mel_features(SPEC), torch.device("cpu"))
    assert scores["knn_accuracy"] is None and scores["effective_rank"] > 1
