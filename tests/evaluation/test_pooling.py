"""The poolings, against loops in float64 over the real patches of ragged recordings of several chunks."""

import math
from typing import get_args

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from ajepa.config import ConfigError, ModelConfig, Pooling
from ajepa.data.index import build_index
from ajepa.encoder import Encoder as Portable
from ajepa.encoder import EncoderConfig
from ajepa.evaluation import feature_cache
from ajepa.evaluation.feature_cache import EncoderFeatures, LogMelFeatures
from ajepa.evaluation.features import encoder_features, pool
from ajepa.model.clip import Projector
from ajepa.model.frontend import FrontEnd
from ajepa.model.jepa import Encoder
from ajepa.model.layers import Sequences
from ajepa.model.pooling import embedding_width, merge, pool_recordings, statistics
from ajepa_kernels import LogMelSpec, log_mel

POOLINGS = get_args(Pooling)
SPEC = LogMelSpec(n_fft=512, win_length=400, hop_length=160, n_mels=32, n_frames=64, patch=(8, 8))  # 4 x 8 patches
SAMPLES = 400 + 63 * 160  # samples of a chunk
LENGTHS = [SAMPLES * 2 + SAMPLES // 2, SAMPLES // 3, SAMPLES * 2 + 100, 50]  # tails of 100 and 50 samples have no frame
ROWS, WIDTH = 4, 128


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder(ModelConfig(size="tiny"), SPEC).eval()


@pytest.fixture(scope="module")
def projector():
    torch.manual_seed(1)
    one = Projector(ROWS * 2 * WIDTH, 32, 16).eval()
    with torch.no_grad():
        for p in one.norm.parameters():
            p.add_(0.3 * torch.rand_like(p))
    return one


@pytest.fixture(scope="module")
def recordings():
    """Int16 samples at 16 kHz, of LENGTHS."""
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(-9999, 9999, length).astype(np.int16)) for length in LENGTHS]


@pytest.fixture(scope="module")
def index(recordings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    for i, pcm in enumerate(recordings):
        soundfile.write(folder / f"{i}.wav", pcm.numpy(), 16_000)
    return build_index(folder)


def real_latents(encoder, pcm, layers) -> list[torch.Tensor]:
    """Latents of a recording's chunks, float64 `[F, real columns, C]` each, from the real patches alone."""
    found: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []  # of the blocks
    hooks = [
        block.register_forward_hook(lambda _, __, pair: outputs.append(pair[0].plus(pair[1])))
        for block in encoder.blocks
    ]
    for piece in pcm.split(SAMPLES):
        if len(piece) < SPEC.min_samples and found:
            continue
        patches = FrontEnd(SPEC)(F.pad(piece, (0, SAMPLES - len(piece)))[None], torch.tensor([len(piece)]))
        columns = max(1, math.ceil(SPEC.frames(len(piece)) / 8))
        index_T = torch.tensor([f * 8 + t for f in range(ROWS) for t in range(columns)])
        outputs.clear()
        with torch.no_grad():
            latents = encoder(patches, index_T, Sequences(torch.tensor([0, len(index_T)], dtype=torch.int32), 32))
        if layers == "mean":
            assert len(outputs) == 4
            normed = [(o - o.mean(1, keepdim=True)) / (o.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
                      for o in map(torch.Tensor.double, outputs)]  # fmt: skip
            latents = torch.stack(normed).mean(0)
        found.append(latents.double().view(ROWS, columns, WIDTH))
    for hook in hooks:
        hook.remove()
    return found


def by_loop(chunks: list[torch.Tensor], pooling: str, projector) -> torch.Tensor:
    """The embedding of one recording, by loops over its frequency rows and patches."""

    def mean_and_deviation(patches: list[torch.Tensor], eps: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        mean = sum(patches) / len(patches)
        return mean, (sum((p - mean) ** 2 for p in patches) / len(patches) + eps).sqrt()

    def patches_of(chunks, row) -> list[torch.Tensor]:
        return [chunk[row, t] for chunk in chunks for t in range(chunk.shape[1])]

    if pooling == "projection":
        projections = []
        for chunk in chunks:
            x = torch.cat([s for row in range(ROWS) for s in mean_and_deviation(patches_of([chunk], row), 1e-5)])
            fc1, norm, fc2 = ({k: v.detach().double() for k, v in layer.named_parameters()}
                              for layer in (projector.fc1, projector.norm, projector.fc2))  # fmt: skip
            hidden = fc1["weight"] @ x + fc1["bias"]
            hidden = (hidden - norm["running_mean"]) / (norm["running_var"] + 1e-5).sqrt()
            hidden = F.gelu(hidden * norm["weight"] + norm["bias"])
            projections.append(fc2["weight"] @ hidden + fc2["bias"])
        return sum(projections) / len(projections)
    if pooling.startswith("mean"):
        mean, deviation = mean_and_deviation([p for row in range(ROWS) for p in patches_of(chunks, row)])
        return torch.cat([mean, deviation]) if pooling == "mean+std" else mean
    rows = [mean_and_deviation(patches_of(chunks, row)) for row in range(ROWS)]
    return torch.cat([torch.cat(pair) if pooling == "concat+std" else pair[0] for pair in rows])


@pytest.mark.parametrize("layers", ["last", "mean"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_of_the_probe_are_those_of_a_loop(encoder, projector, index, recordings, pooling, layers):
    source = EncoderFeatures(encoder, FrontEnd(SPEC), SPEC, f"e {layers}", layers, projector)
    options = {"device": torch.device("cpu"), "reading": {}, "skipped": []}
    items, got = feature_cache.embed(index, {"e": source}, SAMPLES, [pooling], **options)
    assert items.tolist() == [0, 1, 2, 3]
    assert got["e"].clips.shape == (4, embedding_width(pooling, ROWS, WIDTH, 16))
    for row, pcm in zip(got["e"].clips, recordings, strict=True):
        wanted = by_loop(real_latents(encoder, pcm, layers), pooling, projector)
        torch.testing.assert_close(row.double(), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_log_mel_of_the_probe_is_pooled_over_all_chunks(index, recordings, pooling):
    spec = LogMelSpec(n_fft=512, win_length=400, hop_length=160, n_mels=32, patch=(8, 8))
    options = {"device": torch.device("cpu"), "reading": {}, "skipped": []}
    _, got = feature_cache.embed(index, {"m": LogMelFeatures(spec)}, SAMPLES, [pooling], **options)
    for row, pcm in zip(got["m"].clips[:3], recordings, strict=False):
        pieces = [piece for piece in pcm.split(SAMPLES) if len(piece) >= 400]
        x = torch.cat([log_mel(piece[None], spec, layout="spectrogram")[0] for piece in pieces], 1).double()
        wanted = [x.mean(1)] if pooling in ("mean", "concat") else [x.mean(1), x.std(1, correction=0)]
        torch.testing.assert_close(row.double(), torch.cat(wanted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", ["last", "mean"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_exported_encoder_embeds_what_the_probe_scores(encoder, projector, index, recordings, pooling, layers):
    config = EncoderConfig(SPEC, "tiny", SAMPLES, pooling=pooling, layers=layers, projector=(32, 16))
    one = Portable(config)
    one.vit.load_state_dict(encoder.state_dict())
    one.projector.load_state_dict(projector.state_dict())
    source = EncoderFeatures(encoder, FrontEnd(SPEC), SPEC, f"e {layers}", layers, projector)
    options = {"device": torch.device("cpu"), "reading": {}, "skipped": []}
    _, got = feature_cache.embed(index, {"e": source}, SAMPLES, [pooling], **options)
    lengths = torch.tensor(LENGTHS)
    padded = torch.full((4, max(LENGTHS)), 30_000, dtype=torch.int16)  # what follows a clip is never read
    for row, pcm in zip(padded, recordings, strict=True):
        row[: len(pcm)] = pcm
    with torch.inference_mode():
        torch.testing.assert_close(one.embed(padded, lengths=lengths), got["e"].clips, rtol=1e-4, atol=1e-5)
        alone = one.embed(recordings[0].float() / 32768, one.sampling_rate)
    torch.testing.assert_close(alone[0], got["e"].clips[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_watch_scores_the_features_of_the_probe(encoder, projector, index, recordings, pooling):
    """On recordings of one chunk. The latents of padding are not read."""
    pcm = torch.stack([F.pad(r[:SAMPLES], (0, SAMPLES - len(r[:SAMPLES]))) for r in recordings])
    lengths = torch.tensor(LENGTHS).clamp(max=SAMPLES)
    with torch.no_grad():
        got = encoder_features(encoder, FrontEnd(SPEC), SPEC, pooling, projector)(pcm, lengths)
    for row, x in zip(got, recordings, strict=True):
        wanted = by_loop(real_latents(encoder, x[:SAMPLES], "last"), pooling, projector)
        torch.testing.assert_close(row.double(), wanted, rtol=1e-4, atol=2e-5)
    latents = torch.randn(4, 32, WIDTH)
    spoilt = latents.unflatten(1, SPEC.grid).clone()
    spoilt[1, :, 3:] = torch.nan
    clean, leaky = (pool(x, SPEC, lengths, pooling, projector) for x in (latents, spoilt.flatten(1, 2)))
    assert torch.equal(clean, leaky)


def test_large_offsets_lose_no_precision():
    """Statistics of chunks and of recordings at an offset of 1,000 agree with float64."""
    x = torch.randn(7, 3, 40, 5) + 1000 * torch.tensor([1.0, -1.0, 1.0, 0.5, 1.0])
    columns, owner = torch.tensor([40, 1, 17, 40, 3, 40, 40]), torch.tensor([0, 0, 1, 2, 2, 2, 0])
    whole = merge(statistics(x, columns), owner, 3)
    flat = pool_recordings(statistics(x, columns), owner, 3, "mean+std")
    for i in range(3):
        parts = [x[r, :, : columns[r]].double() for r in range(7) if owner[r] == i]
        real = torch.cat(parts, 1)
        torch.testing.assert_close(whole.mean[i].double(), real.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(whole.variance[i].double(), real.var(1, correction=0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(flat[i, 5:].double(), real.std((0, 1), correction=0), rtol=1e-4, atol=1e-6)
    assert whole.columns.tolist() == [81, 17, 83]


def test_a_projection_needs_a_projector():
    chunks = statistics(torch.randn(1, 4, 8, 16), torch.tensor([8]))
    with pytest.raises(ConfigError, match="has none: choose mean"):
        pool_recordings(chunks, torch.tensor([0]), 1, "projection")
