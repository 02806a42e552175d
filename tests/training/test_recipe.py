"""Both engines compute the Audio-JEPA recipe (arXiv 2507.02915), which this file restates in full.

The restatement takes only the configuration and the initial weights from ajepa. It is plain and slow on purpose: the
filter bank runs in NumPy, one clip and one frame at a time; patches are a convolution of the spectrogram; visible
patches are gathered into a dense batch; attention is a softmax over all of them; AdamW, the schedules and the EMA of
the target encoder are written as their formulas.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ajepa.config import PRESETS, SIZES, Config
from ajepa.model.masks import Masks
from ajepa.training.engine import Engine

CPU = torch.device("cpu")
RECIPE = PRESETS["audio-jepa"]
CFG = replace(  # the recipe's own front end, patches, loss and optimiser; small networks and few steps
    RECIPE,
    device="cpu",
    precision="fp32",
    model=replace(RECIPE.model, size="tiny", predictor_width=96, predictor_heads=3, predictor_depth=2),
    optim=replace(RECIPE.optim, batch_size=2, steps=40, warmup_steps=8, clip_norm=0.5),  # clips about half of the steps
)
CLIPS, RATE, SAMPLES = 6, 32_000, 320_000
ROWS, COLUMNS, SIDE = 8, 16, 16  # patches over frequency and over time, each of SIDE mel bands x SIDE frames

# Each bound is two to five times the largest error seen, over both engines and both sets of clips.
SPECTROGRAM = {"synthetic": 6e-4, "real": 1.4e-3}  # nat; float32 rounds the weak bands of a frame beside a loud one
SPECTROGRAM_TAIL = {"synthetic": 1.2e-4, "real": 4e-4}  # nat, of all but a thousandth of the values
GRADIENT = 2e-6  # relative, of each parameter
LOSS = 1e-6  # relative, of each step
WEIGHTS = 5e-7  # relative, of all weights of a network
MOVEMENT = 1e-5  # relative to how far the network's weights moved during the run


# --- the front end: Kaldi's filter bank, frame by frame ---------------------------------------------------------------


def mel(hertz):
    return np.float32(1127.0) * np.log(np.float32(1.0) + hertz / np.float32(700.0))


def mel_bank(bands: int = 128, points: int = 4096, lowest: float = 20.0) -> np.ndarray:
    """Triangles on the mel scale `[bands, bins]`. Kaldi computes them in float32, which shows in the log."""
    low, high = mel(np.float32(lowest)), mel(np.float32(RATE / 2))
    step = (high - low) / np.float32(bands + 1)
    bins = mel(np.float32(RATE / points) * np.arange(points // 2, dtype=np.float32))
    bank = np.zeros((bands, points // 2), np.float32)
    for band in range(bands):
        left, centre, right = (low + np.float32(band + i) * step for i in range(3))
        rising, falling = (bins - left) / (centre - left), (right - bins) / (right - centre)
        bank[band] = np.maximum(0, np.minimum(rising, falling))
    return bank.astype(np.float64)


def spectrogram(pcm: np.ndarray, window: int = 3125, hop: int = 1250, points: int = 4096) -> np.ndarray:
    """Natural log of the mel power `[128, 256]` of int16 samples, in float64."""
    wave = pcm / 32768.0
    wave = wave - wave.mean()
    wave = wave / (np.abs(wave).max() + 1e-6)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / (window - 1))
    bank, frames = mel_bank(points=points), []
    for start in range(0, len(wave) - window + 1, hop):
        frame = wave[start : start + window]
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * hann, points)) ** 2
        frames.append(np.log(np.maximum(bank @ power[:-1], np.finfo(np.float32).eps)))
    return np.pad(np.stack(frames, 1), ((0, 0), (0, 256 - len(frames))))


# --- the networks, as functions of a dictionary of weights ------------------------------------------------------------


@lru_cache
def positions(width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions `[ROWS * COLUMNS, width]`: frequency in the first half, time in the second."""
    table = np.zeros((ROWS * COLUMNS, width))
    quarter = width // 4
    for row in range(ROWS):
        for column in range(COLUMNS):
            for i in range(quarter):
                for half, place in enumerate((row, column)):
                    angle = place / 10_000 ** (i / quarter)
                    table[row * COLUMNS + column, 2 * half * quarter + i] = math.sin(angle)
                    table[row * COLUMNS + column, (2 * half + 1) * quarter + i] = math.cos(angle)
    return torch.tensor(table, dtype=torch.float32)


class Network:
    """Transformer whose weights are those entries of `weights` that begin with `name`."""

    def __init__(self, weights: dict[str, torch.Tensor], name: str, depth: int, heads: int):
        self.weights = {k.removeprefix(f"{name}."): w for k, w in weights.items() if k.startswith(f"{name}.")}
        self.depth, self.heads = depth, heads

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def attention(self, x, name):
        B, N, C = x.shape
        q, k, v = self.linear(x, f"{name}.qkv").view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        chances = (q @ k.transpose(-1, -2) / math.sqrt(C // self.heads)).softmax(-1)
        return self.linear((chances @ v).transpose(1, 2).reshape(B, N, C), f"{name}.proj")

    def blocks(self, x):
        for i in range(self.depth):
            x = x + self.attention(self.norm(x, f"blocks.{i}.norm1"), f"blocks.{i}")
            hidden = self.linear(self.norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.fc1")
            x = x + self.linear(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2))), f"blocks.{i}.fc2")
        return self.norm(x, "norm")


def gather(x, index):
    """x `[B, N, C]`, index `[B, K]` -> `[B, K, C]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def encode(encoder: Network, mels, visible=None):
    weight = encoder.weights["embed.weight"].view(-1, 1, SIDE, SIDE)
    x = F.conv2d(mels[:, None], weight, encoder.weights["embed.bias"], stride=SIDE).flatten(2).transpose(1, 2)
    x = x + positions(x.shape[-1])
    return encoder.blocks(x if visible is None else gather(x, visible))


def predict(predictor: Network, latents, visible, masked):
    context = predictor.linear(latents, "embed")
    place = positions(context.shape[-1])
    asked = predictor.weights["mask_token"] + place[masked]
    x = predictor.blocks(torch.cat([context + place[visible], asked], 1))
    return predictor.linear(x[:, visible.shape[1] :], "head")


# --- training ---------------------------------------------------------------------------------------------------------


def half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


class Restatement:
    def __init__(self, cfg: Config, weights: dict[str, torch.Tensor]):
        self.optim = cfg.optim
        self.weights = {name: w.clone() for name, w in weights.items()}
        self.trained = {k: w.requires_grad_() for k, w in self.weights.items() if not k.startswith("target_encoder.")}
        self.moments = {k: (torch.zeros_like(w), torch.zeros_like(w)) for k, w in self.trained.items()}
        _, depth, heads = SIZES[cfg.model.size]
        self.context_encoder = Network(self.weights, "context_encoder", depth, heads)
        self.target_encoder = Network(self.weights, "target_encoder", depth, heads)
        self.predictor = Network(self.weights, "predictor", cfg.model.predictor_depth, cfg.model.predictor_heads)

    def loss(self, mels, visible, masked):
        with torch.no_grad():
            target = gather(encode(self.target_encoder, mels), masked)
            target = target - target.mean(-1, keepdim=True)
            target = target / (target.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        prediction = predict(self.predictor, encode(self.context_encoder, mels, visible), visible, masked)
        if self.optim.loss == "cosine":
            return (2 - 2 * (prediction * target).sum(-1) / (prediction.norm(dim=-1) * target.norm(dim=-1))).mean()
        return (prediction - target).square().mean()

    def step(self, mels, visible, masked, step: int) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss, and the gradients of it."""
        optim, last = self.optim, self.optim.steps - 1
        loss = self.loss(mels, visible, masked)
        grads = dict(zip(self.trained, torch.autograd.grad(loss, list(self.trained.values())), strict=True))

        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
        rate = optim.lr_start + (optim.lr - optim.lr_start) * step / optim.warmup_steps
        if step >= optim.warmup_steps:
            rate = half_cosine(optim.lr, 0.0, (step - optim.warmup_steps) / (last - optim.warmup_steps))
        beta1, beta2 = optim.betas
        with torch.no_grad():
            for name, w in self.trained.items():
                grad, (first, second) = grads[name] / max(1.0, norm / optim.clip_norm), self.moments[name]
                first.copy_(beta1 * first + (1 - beta1) * grad)
                second.copy_(beta2 * second + (1 - beta2) * grad**2)
                w *= 1 - rate * (optim.weight_decay if name.endswith("weight") and "norm" not in name else 0.0)
                unbiased = (second / (1 - beta2 ** (step + 1))).sqrt()
                w -= rate * (first / (1 - beta1 ** (step + 1))) / (unbiased + 1e-8)
            decay = half_cosine(optim.ema_start, optim.ema_end, step / last)
            for name, w in self.context_encoder.weights.items():
                target = self.target_encoder.weights[name]
                target += (1 - decay) * (w - target)
        return loss.item(), grads


# --- both sides on the same clips, weights and masks ------------------------------------------------------------------


@dataclass
class Training:
    losses: list[float]
    gradients: dict[str, torch.Tensor]  # of the first step
    weights: dict[str, torch.Tensor]  # after the last


def batches(cfg: Config):
    """For each step the clips, and the visible and masked patches of each clip: one ratio a batch, random patches."""
    generator = torch.Generator().manual_seed(1)
    low, high = cfg.mask.mask_ratio
    for _ in range(cfg.optim.steps):
        clips = torch.randperm(CLIPS, generator=generator)[: cfg.optim.batch_size]
        masked = round(ROWS * COLUMNS * (low + (high - low) * torch.rand((), generator=generator).item()))
        patches = torch.stack([torch.randperm(ROWS * COLUMNS, generator=generator) for _ in clips])
        yield clips, patches[:, masked:].sort(1)[0], patches[:, :masked].sort(1)[0]


@lru_cache
def initial_weights() -> dict[str, torch.Tensor]:
    """The engine's, with noise added: no bias is zero and the target encoder differs from the context encoder."""
    generator = torch.Generator().manual_seed(2)
    weights = Engine(CFG, CPU).model.state_dict()
    return {name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


def engine_with_weights(cfg: Config) -> Engine:
    engine = Engine(cfg, CPU)
    engine.model.load_state_dict(initial_weights())
    return engine


def train_engine(cfg: Config, pcm: np.ndarray) -> Training:
    engine, losses, gradients = engine_with_weights(cfg), [], {}

    def keep_first_gradients(*_):
        if not gradients:
            gradients.update({k: p.grad.clone() for k, p in engine.model.named_parameters() if p.requires_grad})

    engine.optimizer.register_step_pre_hook(keep_first_gradients)
    lengths = torch.full((cfg.optim.batch_size,), SAMPLES, dtype=torch.int32)
    for step, (clips, visible, _) in enumerate(batches(cfg)):
        context = torch.zeros(len(clips), ROWS * COLUMNS, dtype=torch.bool).scatter(1, visible, True)
        masks = Masks.pack(context, ~context[:, None], masks_per_clip=1)
        losses.append(engine.step(torch.from_numpy(pcm)[clips], lengths, masks, step).loss.item())
    return Training(losses, gradients, engine.model.state_dict())


def train_restatement(cfg: Config, pcm: np.ndarray) -> Training:
    mels = torch.tensor(np.stack([spectrogram(clip) for clip in pcm]), dtype=torch.float32)
    restatement, steps = Restatement(cfg, initial_weights()), []
    for step, (clips, visible, masked) in enumerate(batches(cfg)):
        steps.append(restatement.step(mels[clips], visible, masked, step))
    return Training([loss for loss, _ in steps], steps[0][1], {k: w.detach() for k, w in restatement.weights.items()})


def synthetic_clips() -> np.ndarray:
    """Chirps that come and go in noise that swells, int16 `[CLIPS, SAMPLES]`."""
    rng, t, clips = np.random.default_rng(0), np.arange(SAMPLES) / RATE, []
    for i in range(1, CLIPS + 1):
        chirp = 0.2 * np.sin(2 * np.pi * i * (100 * t + 40 * t**2)) * np.exp(-(((t - 1 - i) / 2) ** 2))
        noise = 0.05 * rng.standard_normal(SAMPLES) * (1.1 + np.sin(2 * np.pi * i * t / 3))
        clips.append(chirp + noise)
    return np.round(30_000 * np.stack(clips) / np.abs(clips).max()).astype(np.int16)


def real_clips(folder) -> np.ndarray:
    """Twelve recordings of five seconds, two in a clip; some end in digital silence."""
    import soundfile  # here, so that the synthetic clips need no file reader

    paths = sorted(folder.rglob("*.ogg"))
    chosen = paths[:: max(1, len(paths) // (2 * CLIPS))][: 2 * CLIPS]
    return np.concatenate([np.resize(soundfile.read(path, dtype="int16")[0], SAMPLES // 2) for path in chosen]).reshape(
        CLIPS, SAMPLES
    )


@pytest.fixture(scope="module", params=["synthetic", "real"])
def audio(request) -> tuple[str, np.ndarray]:
    if request.param == "synthetic":
        return request.param, synthetic_clips()
    return request.param, real_clips(request.getfixturevalue("audio_dir") / "esc50")


@pytest.fixture(scope="module")
def restated(audio) -> Training:
    return train_restatement(CFG, audio[1])


@pytest.fixture(scope="module", params=["fused", "reference"])
def trained(request, audio) -> Training:
    return train_engine(replace(CFG, impl=request.param), audio[1])


def apart(got, want) -> float:
    """||got - want|| / ||want|| of tensors, or of lists of tensors taken together."""
    got, want = (torch.cat([x.double().flatten() for x in xs]) for xs in (got, want))
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_spectrogram(audio, impl):
    kind, pcm = audio
    patches = Engine(replace(CFG, impl=impl), CPU).front_end(torch.from_numpy(pcm))
    got = patches.view(CLIPS, ROWS, COLUMNS, SIDE, SIDE).transpose(2, 3).reshape(CLIPS, ROWS * SIDE, COLUMNS * SIDE)
    error = (got.double() - torch.tensor(np.stack([spectrogram(clip) for clip in pcm]))).abs()
    assert error.max() <= SPECTROGRAM[kind]
    assert error.flatten().quantile(0.999) <= SPECTROGRAM_TAIL[kind]
    assert (got[..., 254:] == 0).all(), "the two frames that a clip does not fill are zeros"


def test_gradients_of_the_first_step(trained, restated):
    assert trained.gradients.keys() == restated.gradients.keys()
    errors = {name: apart([grad], [restated.gradients[name]]) for name, grad in trained.gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= GRADIENT, worst


def test_loss_of_every_step(trained, restated):
    assert trained.losses == pytest.approx(restated.losses, rel=LOSS, abs=0)
    assert sum(restated.losses[-10:]) < 0.9 * sum(restated.losses[:10]), "nothing was learnt"


@pytest.mark.parametrize("network", ["target_encoder", "context_encoder", "predictor"])
def test_weights_after_the_last_step(trained, restated, network):
    names = [name for name in restated.weights if name.startswith(network)]
    got, want, start = ([w[name] for name in names] for w in (trained.weights, restated.weights, initial_weights()))
    assert apart(got, want) <= WEIGHTS
    moved = ([b - a for a, b in zip(start, weights, strict=True)] for weights in (got, want))
    assert apart(*moved) <= MOVEMENT


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_cosine_loss(audio, impl):
    """The loss of the authors' code, where the paper has the mean square."""
    cfg = replace(CFG, impl=impl, optim=replace(CFG.optim, loss="cosine", steps=3, warmup_steps=1))
    got, want = (train(cfg, audio[1]) for train in (train_engine, train_restatement))
    assert got.losses == pytest.approx(want.losses, rel=LOSS, abs=0)
