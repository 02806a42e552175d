"""A minimal I-JEPA (arXiv 2301.08243) on images, in plain PyTorch or with the ops: `--ops` changes the marked lines.

Every image has the same number of visible patches, so the visible patches are a dense tensor, `[B, V, C]`.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn

from ajepa_kernels import AdamWEMA, add_layer_norm, latent_l2_loss, masked_attention

SIDE, PATCH, N = 32, 4, 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int, ops: bool):
        super().__init__()
        self.heads, self.ops = heads, ops
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def norm(self, layer, x, stream):
        if self.ops:
            return add_layer_norm(x, stream, layer.weight, layer.bias, layer.eps)  # <- ops
        stream = x if stream is None else x + stream
        return layer(stream), stream

    def forward(self, x_BVC, stream=None):
        x, stream = self.norm(self.norm1, x_BVC, stream)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if self.ops:
            x = masked_attention(qkv)  # <- ops
        else:
            x = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2)
        x, stream = self.norm(self.norm2, self.proj(x.flatten(2)), stream)
        return self.mlp(x), stream


class Encoder(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, ops: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, ops) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BVC):
        stream = None
        for block in self.blocks:
            x_BVC, stream = block(x_BVC, stream)
        return self.norm(x_BVC + stream)


class IJEPA(nn.Module):
    def __init__(self, width: int = 64, ops: bool = False):
        super().__init__()
        self.ops = ops
        self.embed = nn.Linear(3 * PATCH**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn(N, width))
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.context, self.predictor = Encoder(width, 2, 2, ops), Encoder(width, 1, 2, ops)
        self.target = copy.deepcopy(self.context).requires_grad_(False)

    def forward(self, images, visible_BV, masked_BM):
        patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2)
        x = self.embed(patches) + self.positions
        rows = torch.arange(len(x), device=x.device)[:, None]
        context = self.context(x[rows, visible_BV]) + self.positions[visible_BV]
        prediction = self.predictor(torch.cat([context, self.query + self.positions[masked_BM]], 1))
        prediction = prediction[:, visible_BV.shape[1] :].flatten(0, 1)
        with torch.no_grad():
            latents = self.target(x).flatten(0, 1)
        index = (rows * N + masked_BM).flatten()
        if self.ops:
            return latent_l2_loss(prediction, latents, index)  # <- ops
        return F.mse_loss(prediction, F.layer_norm(latents[index], latents.shape[-1:], eps=1e-6))


def train(steps: int, ops: bool, batch: int = 16, device: str = "cpu") -> list[float]:
    """Train for `steps` steps on squares of random place and colour, and return the loss of each step."""
    torch.manual_seed(0)
    model = IJEPA(ops=ops).to(device)
    pairs = list(zip(model.context.parameters(), model.target.parameters(), strict=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    if ops:
        optimizer = AdamWEMA(trained, ema=pairs, lr=1e-3)  # <- ops
    losses = []
    for _ in range(steps):
        colour, corner = torch.rand(batch, 3, 1, 1), torch.randint(SIDE // 2, (batch, 2))
        images = 0.1 * torch.randn(batch, 3, SIDE, SIDE)
        for image, (i, j), c in zip(images, corner.tolist(), colour, strict=True):
            image[:, i : i + SIDE // 2, j : j + SIDE // 2] += c
        order = torch.rand(batch, N).argsort(1).to(device)
        loss = model(images.to(device), order[:, :24], order[:, 24:])
        optimizer.zero_grad()
        loss.backward()
        if ops:
            optimizer.step(ema_decay=0.99)  # <- ops
        else:
            optimizer.step()
            with torch.no_grad():
                for p, target in pairs:
                    target.lerp_(p, 0.01)
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", action="store_true", help="use the ops in place of plain PyTorch")
    parser.add_argument("--steps", type=int, default=100, help="number of training steps (100)")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for step, value in enumerate(train(arguments.steps, arguments.ops, device=device)):
        if step % 10 == 0:
            print(step, f"{value:.4f}")
