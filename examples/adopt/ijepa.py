"""A small I-JEPA (arXiv 2301.08243) on synthetic images: block masks, a context and a target encoder, a predictor.

Shapes: B images, P patches of an image, V visible patches, N patches of a target block, K target blocks, C width.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

SIDE, PATCH, GRID = 32, 4, 8
WIDTH, HEADS, DEPTH, PREDICTOR_DEPTH = 64, 2, 3, 2
STEPS, BATCH = 20, 16


def sincos_positions(width: int) -> torch.Tensor:
    """Fixed 2-D position embeddings `[1, P, width]`: half of the channels for the row, half for the column."""
    omega = 10_000 ** -(torch.arange(width // 4) / (width / 4))
    angles = torch.arange(GRID)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.cat([axis.repeat_interleave(GRID, 0), axis.repeat(GRID, 1)], 1)[None]


def apply_masks(x: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """The patches of x `[B, P, C]` that each mask `[B, N]` keeps, one mask after the other: `[K * B, N, C]`."""
    return torch.cat([x.gather(1, mask[..., None].expand(-1, -1, x.shape[-1])) for mask in masks])


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        x = (weights @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class MLP(nn.Module):
    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), nn.GELU()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads), MLP(dim, 4 * dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.pos_embed = nn.Parameter(sincos_positions(WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, images, masks=None):
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        if masks is not None:
            x = apply_masks(x, masks)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Predictor(nn.Module):
    def __init__(self):
        super().__init__()
        self.predictor_embed = nn.Linear(WIDTH, WIDTH)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(sincos_positions(WIDTH), requires_grad=False)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(PREDICTOR_DEPTH))
        self.norm, self.predictor_proj = nn.LayerNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, masks_enc, masks_pred):
        """Predictions for each target block from the context x `[B, V, C]`: `[K * B, N, C]`."""
        positions = self.pos_embed.expand(len(x), -1, -1)
        x = self.predictor_embed(x) + apply_masks(positions, masks_enc)
        queries = self.mask_token + apply_masks(positions, masks_pred)
        context = x.shape[1]
        x = torch.cat([x.repeat(len(masks_pred), 1, 1), queries], 1)
        for block in self.blocks:
            x = block(x)
        return self.predictor_proj(self.norm(x)[:, context:])


class MaskCollator:
    """Draws four target blocks and one context block for each image, of equal sizes in the whole batch."""

    def __call__(self, batch: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        height, width = (int(torch.randint(2, 4, ())) for _ in range(2))
        targets = [self._block(batch, height, width) for _ in range(4)]
        free = torch.zeros(batch, GRID**2).scatter(1, self._block(batch, 7, 7), 1.0)
        free = free.scatter(1, torch.cat(targets, 1), 0.0)
        kept = int(free.sum(1).min())  # the smallest context of the batch
        order = (free + 0.5 * torch.rand_like(free)).argsort(1, descending=True)
        return [order[:, :kept].sort(1).values], targets

    @staticmethod
    def _block(batch: int, height: int, width: int) -> torch.Tensor:
        """The patches of a block at a random place in each image, `[B, height * width]`."""
        top = torch.randint(GRID - height + 1, (batch, 1, 1)) + torch.arange(height)[:, None]
        left = torch.randint(GRID - width + 1, (batch, 1, 1)) + torch.arange(width)
        return (top * GRID + left).flatten(1)


def synthetic_images(batch: int) -> torch.Tensor:
    """Squares of random place and colour on noise."""
    images = 0.1 * torch.randn(batch, 3, SIDE, SIDE)
    for image, (i, j) in zip(images, torch.randint(SIDE // 2, (batch, 2)).tolist(), strict=True):
        image[:, i : i + SIDE // 2, j : j + SIDE // 2] += torch.rand(3, 1, 1)
    return images


def learning_rate(step: int) -> float:
    warmup = 5
    if step < warmup:
        return 1e-3 * (step + 1) / warmup
    return 1e-3 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def weight_decay(step: int) -> float:
    return 0.4 + (0.04 - 0.4) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def momentum(step: int) -> float:
    return 0.996 + (1.0 - 0.996) * step / STEPS


def train(steps: int = STEPS, device: str = "cpu"):
    """Trains for `steps` steps and returns the losses `[steps]` and the three networks."""
    torch.manual_seed(0)
    encoder, predictor = VisionTransformer().to(device), Predictor().to(device)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    named = [*encoder.named_parameters(), *predictor.named_parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in named if p.dim() > 1]},
            {"params": [p for _, p in named if p.dim() == 1], "weight_decay": 0.0, "exclude": True},
        ]
    )
    collator, losses = MaskCollator(), torch.zeros(steps)
    for step in range(steps):
        images = synthetic_images(BATCH).to(device)
        masks_enc, masks_pred = ([m.to(device) for m in masks] for masks in collator(BATCH))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
            if not group.get("exclude"):
                group["weight_decay"] = weight_decay(step)
        with torch.no_grad():
            h = target_encoder(images)
            h = F.layer_norm(h, h.shape[-1:])
            h = apply_masks(h, masks_pred)
        z = predictor(encoder(images, masks_enc), masks_enc, masks_pred)
        loss = F.smooth_l1_loss(z, h)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            m = momentum(step)
            for q, k in zip(encoder.parameters(), target_encoder.parameters(), strict=True):
                k.mul_(m).add_(q, alpha=1 - m)
        losses[step] = loss.detach()
    return losses, (encoder, predictor, target_encoder)


if __name__ == "__main__":
    for step, loss in enumerate(train(device="cuda" if torch.cuda.is_available() else "cpu")[0]):
        print(step, f"{loss:.5f}")
