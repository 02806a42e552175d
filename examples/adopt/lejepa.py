"""A small LeJEPA (arXiv 2511.08544) on synthetic audio: views of a recording agree, and SIGReg spreads them out.

There is no target encoder. Shapes: B recordings, V views, P patches of a view, C width, S samples.
"""

import torch
import torch.nn.functional as F
from torch import nn

RATE, VIEW, VIEWS = 16_000, 8_000, 4  # samples per second, samples of a view, views of a recording
N_FFT, WINDOW, HOP, MELS, FRAMES, PATCH = 512, 400, 160, 64, 48, 16
WIDTH, HEADS, DEPTH, PROJECTION = 64, 2, 3, 16
STEPS, BATCH, LAMBDA = 20, 8, 0.05


class LogMel(nn.Module):
    """ln of the mel power of waveforms `[B, S]`, by the HTK scale: `[B, MELS, FRAMES]`."""

    def __init__(self):
        super().__init__()
        top = 2595 * torch.tensor(1 + RATE / 2 / 700).log10()
        edges = 700 * (10 ** (torch.linspace(0, float(top), MELS + 2) / 2595) - 1)
        bins = torch.linspace(0, RATE / 2, N_FFT // 2 + 1)
        up = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
        down = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
        self.register_buffer("filters", torch.minimum(up, down).clamp(min=0))
        self.register_buffer("window", torch.hann_window(WINDOW))

    def forward(self, waveforms):
        spectrum = torch.stft(waveforms, N_FFT, HOP, WINDOW, self.window, center=True, return_complex=True)
        mel = spectrum.abs().square().transpose(1, 2) @ self.filters
        return mel.transpose(1, 2).clamp(min=1e-10).log()[..., :FRAMES]


class SIGReg(nn.Module):
    """How far projections are from a standard Gaussian along random directions, by the characteristic function."""

    def __init__(self, knots: int = 17):
        super().__init__()
        t, step = torch.linspace(0, 3, knots), 3 / (knots - 1)
        weights = torch.full((knots,), 2 * step)
        weights[[0, -1]] = step
        self.register_buffer("t", t)
        self.register_buffer("phi", (-t.square() / 2).exp())
        self.register_buffer("weights", weights * self.phi)

    def forward(self, z, step: int):
        A = directions(z, step)
        y = (z @ A.T)[..., None] * self.t
        error = (y.cos().mean(-3) - self.phi).square() + y.sin().mean(-3).square()
        return (error @ self.weights).mean() * z.shape[-2]


def directions(z: torch.Tensor, step: int) -> torch.Tensor:
    """256 random unit vectors `[256, C]`, the same on every rank."""
    A = torch.randn(256, z.shape[-1], generator=torch.Generator().manual_seed(step))
    return F.normalize(A, dim=1).to(z)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), nn.GELU()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float = 0.1):
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim, 4 * dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """A transformer over patches of the log-mel spectrogram, whose mean goes through a projector."""

    def __init__(self):
        super().__init__()
        self.log_mel = LogMel()
        self.patch_embed = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, MELS * FRAMES // PATCH**2, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        layers = nn.Linear(WIDTH, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, PROJECTION)
        self.projector = nn.Sequential(*layers)

    def forward(self, views):
        """Embeddings `[V * B, C]` and projections `[V, B, PROJECTION]` of views `[V, B, S]`."""
        with torch.no_grad():
            mel = (self.log_mel(views.flatten(0, 1)) + 5) / 5
        x = self.patch_embed(mel[:, None]).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        embeddings = self.norm(x).mean(1)
        return embeddings, self.projector(embeddings).unflatten(0, views.shape[:2])


def synthetic_views(batch: int) -> torch.Tensor:
    """Sections of chords of random pitch, each with a gain and noise of its own: `[V, B, S]`."""
    pitch = 100 * 2 ** (4 * torch.rand(1, batch, 3, 1))
    time = (torch.arange(VIEW) + RATE * torch.rand(VIEWS, batch, 1, 1)) / RATE
    chords = (2 * torch.pi * pitch * time).sin().sum(2)
    return (0.1 + 0.2 * torch.rand(VIEWS, batch, 1)) * chords + 0.01 * torch.randn(VIEWS, batch, VIEW)


def train(steps: int = STEPS, device: str = "cpu"):
    """Trains for `steps` steps and returns the losses `[steps]` and the network."""
    torch.manual_seed(0)
    encoder, sigreg = Encoder().to(device), SIGReg().to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3, weight_decay=0.05)
    losses = torch.zeros(steps)
    for step in range(steps):
        _, z = encoder(synthetic_views(BATCH).to(device))
        invariance = (z.mean(0) - z).square().mean()
        loss = LAMBDA * sigreg(z, step) + (1 - LAMBDA) * invariance
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[step] = loss.detach()
    return losses, (encoder,)


if __name__ == "__main__":
    for step, loss in enumerate(train(device="cuda" if torch.cuda.is_available() else "cpu")[0]):
        print(step, f"{loss:.5f}")
