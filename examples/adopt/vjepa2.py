"""A small V-JEPA 2 (arXiv 2506.09985) on synthetic video: rotary attention in 3-D, two kinds of masks, an L1 loss.

Shapes: B clips, P patches of a clip, V visible and N masked patches, C width; D head dim.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

FRAMES, SIDE, TUBELET, PATCH = 8, 32, 2, 8
TIME, GRID = FRAMES // TUBELET, SIDE // PATCH  # 4 x 4 x 4 patches
WIDTH, HEADS, DEPTH, PREDICTOR_DEPTH = 64, 2, 3, 2
AXIS = 2 * (WIDTH // HEADS // 3 // 2)  # channels of a head that turn with each of time, row and column
STEPS, BATCH, LOSS_EXPONENT = 20, 8, 1


def apply_mask(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The patches of x `[B, P, C]` that the mask `[B, N]` keeps."""
    return x.gather(1, mask[..., None].expand(-1, -1, x.shape[-1]))


def places(mask: torch.Tensor) -> torch.Tensor:
    """Time, row and column of each patch index: `[B, N, 3]`."""
    return torch.stack((mask // GRID**2, mask // GRID % GRID, mask % GRID), -1).float()


def rotate(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Turns pairs of channels of x `[B, H, N, AXIS]` by their position `[B, N]` along one axis."""
    omega = 10_000 ** -(torch.arange(AXIS // 2, device=x.device) / (AXIS / 2))
    angle = (position[:, None, :, None] * omega).repeat(1, 1, 1, 2)  # V-JEPA 2 repeats the frequencies in this order
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * angle.cos() + turned * angle.sin()


def rotate_axes(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Turns the channels of time, row and column; the channels that are left stay as they are."""
    parts = [rotate(x[..., i * AXIS : (i + 1) * AXIS], position[..., i]) for i in range(3)]
    return torch.cat([*parts, x[..., 3 * AXIS :]], -1)


class RoPEAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, position):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate_axes(q, position), rotate_axes(k, position)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(x)


class SwiGLUFFN(nn.Module):
    def __init__(self, in_features: int, hidden_features: int):
        super().__init__()
        hidden_features = -(-(2 * hidden_features // 3) // 8) * 8  # about as many parameters as an MLP's
        self.fc1, self.fc2 = nn.Linear(in_features, hidden_features), nn.Linear(in_features, hidden_features)
        self.fc3 = nn.Linear(hidden_features, in_features)

    def forward(self, x):
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = RoPEAttention(dim, num_heads), SwiGLUFFN(dim, 4 * dim)

    def forward(self, x, position):
        x = x + self.attn(self.norm1(x), position)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        size = (TUBELET, PATCH, PATCH)
        self.patch_embed = nn.Conv3d(3, WIDTH, size, size)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, clips, mask=None):
        x = self.patch_embed(clips).flatten(2).transpose(1, 2)
        if mask is None:
            mask = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        else:
            x = apply_mask(x, mask)
        position = places(mask)
        for block in self.blocks:
            x = block(x, position)
        return self.norm(x)


class Predictor(nn.Module):
    def __init__(self, kinds: int):
        super().__init__()
        self.predictor_embed = nn.Linear(WIDTH, WIDTH)
        self.mask_tokens = nn.ParameterList(0.02 * torch.randn(1, 1, WIDTH) for _ in range(kinds))
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(PREDICTOR_DEPTH))
        self.norm, self.predictor_proj = nn.LayerNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask_enc, mask_pred, kind: int):
        """Predictions for the masked patches from the context x `[B, V, C]`: `[B, N, C]`."""
        context = x.shape[1]
        x = torch.cat([self.predictor_embed(x), self.mask_tokens[kind].expand(*mask_pred.shape, -1)], 1)
        position = places(torch.cat([mask_enc, mask_pred], 1))
        for block in self.blocks:
            x = block(x, position)
        return self.predictor_proj(self.norm(x)[:, context:])


class MaskCollator:
    """Masks blocks that span all frames: many small ones, and few large ones. Each gives one pair of masks."""

    KINDS = ((4, 2), (1, 3))  # number of blocks and their side in patches

    def __call__(self, batch: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        masks_enc, masks_pred = [], []
        for blocks, side in self.KINDS:
            masked = torch.zeros(batch, GRID, GRID)
            for image in masked:
                for i, j in torch.randint(GRID - side + 1, (blocks, 2)).tolist():
                    image[i : i + side, j : j + side] = 1
            masked = masked.flatten(1).repeat(1, TIME)
            order = masked.argsort(dim=1, stable=True)
            hidden = masked.sum(1).int()
            masks_enc.append(order[:, : TIME * GRID**2 - int(hidden.max())])  # as many as the fewest of the batch
            masks_pred.append(order[:, TIME * GRID**2 - int(hidden.min()) :])
        return masks_enc, masks_pred


def synthetic_clips(batch: int) -> torch.Tensor:
    """Squares that move at a constant speed, on noise: `[B, 3, FRAMES, SIDE, SIDE]`."""
    clips = 0.1 * torch.randn(batch, 3, FRAMES, SIDE, SIDE)
    for clip, start, speed in zip(clips, torch.randint(8, (batch, 2)), torch.randint(3, (batch, 2)), strict=True):
        colour = torch.rand(3, 1, 1)
        for t in range(FRAMES):
            i, j = (start + t * speed).tolist()
            clip[:, t, i : i + 12, j : j + 12] += colour
    return clips


def learning_rate(step: int) -> float:
    warmup = 5
    if step < warmup:
        return 1e-3 * (step + 1) / warmup
    return 1e-3 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def weight_decay(step: int) -> float:
    return 0.04


def momentum(step: int) -> float:
    return 0.99925


def train(steps: int = STEPS, device: str = "cpu"):
    """Trains for `steps` steps and returns the losses `[steps]` and the three networks."""
    torch.manual_seed(0)
    collator, losses = MaskCollator(), torch.zeros(steps)
    encoder, predictor = VisionTransformer().to(device), Predictor(len(collator.KINDS)).to(device)
    target_encoder = copy.deepcopy(encoder).requires_grad_(False)
    params = [*encoder.parameters(), *predictor.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in params if p.dim() > 1]},
            {"params": [p for p in params if p.dim() == 1], "weight_decay": 0.0, "exclude": True},
        ]
    )
    for step in range(steps):
        clips = synthetic_clips(BATCH).to(device)
        masks_enc, masks_pred = ([m.to(device) for m in masks] for masks in collator(BATCH))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
            if not group.get("exclude"):
                group["weight_decay"] = weight_decay(step)
        with torch.no_grad():
            h = target_encoder(clips)
            h = F.layer_norm(h, h.shape[-1:])
        loss = 0.0
        for kind, (enc, pred) in enumerate(zip(masks_enc, masks_pred, strict=True)):
            z = predictor(encoder(clips, enc), enc, pred, kind)
            loss += (z - apply_mask(h, pred)).abs().pow(LOSS_EXPONENT).mean() / LOSS_EXPONENT
        loss /= len(masks_enc)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            m, target = momentum(step), list(target_encoder.parameters())
            torch._foreach_mul_(target, m)
            torch._foreach_add_(target, list(encoder.parameters()), alpha=1 - m)
        losses[step] = loss.detach()
    return losses, (encoder, predictor, target_encoder)


if __name__ == "__main__":
    for step, loss in enumerate(train(device="cuda" if torch.cuda.is_available() else "cpu")[0]):
        print(step, f"{loss:.5f}")
