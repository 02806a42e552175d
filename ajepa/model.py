"""Context encoder, predictor and target encoder, on packed tokens.

Shapes: B clips, N patches a clip, P values a patch, T packed tokens, C width, H heads, D head dim.
"""

import copy
import math

import torch
from torch import nn

from ajepa.config import SIZES, ModelConfig
from ajepa.masks import Masks
from ajepa_kernels import LogMelSpec, masked_attention


def sincos_positions(width: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions `[F * T, width]`: the first half tells the frequency row, the second the time."""
    half = [_angles(width // 2, size) for size in grid]
    axes = [torch.cat([a.sin(), a.cos()], dim=1) for a in half]
    rows = axes[0][:, None].expand(-1, grid[1], -1)
    columns = axes[1][None].expand(grid[0], -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()


def rotary_positions(head_dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """2-D rotary angles (cos, sin), `[F * T, 2, head_dim / 2]`: half the pairs turn with frequency, half with time."""
    rows, columns = (_angles(head_dim // 2, size) for size in grid)
    angles = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], dim=-1).flatten(
        0, 1
    )
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def _angles(width: int, size: int) -> torch.Tensor:
    frequencies = 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.arange(size, dtype=torch.float64)[:, None] * frequencies


def rotate(x_THD: torch.Tensor, rotary_T2D: torch.Tensor) -> torch.Tensor:
    cos, sin = rotary_T2D.to(x_THD.dtype)[:, :, None].unbind(1)
    a, b = x_THD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Pre-LN transformer block on packed tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_TC, cu_seqlens, max_seqlen: int, rotary, impl: str):
        qkv = self.qkv(self.norm1(x_TC)).unflatten(-1, (3, self.heads, -1))
        if rotary is not None:
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([rotate(q, rotary), rotate(k, rotary), v], dim=1)
        attended = masked_attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, impl=impl)
        x_TC = x_TC + self.proj(attended.flatten(1))
        return x_TC + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x_TC))))


class Transformer(nn.Module):
    """Blocks and a last layer norm, with the positions of a patch grid."""

    positions: torch.Tensor

    def __init__(self, width: int, depth: int, heads: int, grid: tuple[int, int], positions: str, impl: str):
        super().__init__()
        self.impl, self.n_patches = impl, math.prod(grid)
        rotary = positions == "rotary"
        table = rotary_positions(width // heads, grid) if rotary else sincos_positions(width, grid)
        self.register_buffer("positions", table, persistent=False)
        self.rotary = rotary
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x_TC, patch_T, cu_seqlens, max_seqlen: int, keep_layers: int = 0):
        """`patch_T`: the grid cell of each token. Returns the normed output, or the last `keep_layers` blocks' own."""
        place = self.positions[patch_T]
        rotary = place if self.rotary else None
        if not self.rotary:
            x_TC = x_TC + place
        kept = []
        for i, block in enumerate(self.blocks):
            x_TC = block(x_TC, cu_seqlens, max_seqlen, rotary, self.impl)
            if len(self.blocks) - i <= keep_layers:
                kept.append(x_TC)
        return kept if keep_layers else self.norm(x_TC)

    def initialise(self) -> None:
        """Truncated normal of std 0.02, residual outputs of layer l scaled by 1 / sqrt(2 l), as in I-JEPA."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for layer, block in enumerate(self.blocks, start=1):
                for residual in (block.get_parameter("proj.weight"), block.get_parameter("fc2.weight")):
                    residual.div_(math.sqrt(2 * layer))


class Encoder(Transformer):
    """ViT over log-mel patches: no class token; only the patches named by `index` enter."""

    def __init__(self, cfg: ModelConfig, spec: LogMelSpec, impl: str = "auto"):
        width, depth, heads = SIZES[cfg.size]
        super().__init__(width, depth, heads, spec.grid, cfg.positions, impl)
        self.embed = nn.Linear(spec.patch_dim, width)
        self.target_layers = cfg.target_layers
        self.initialise()

    def forward(self, patches_BNP, index_T, cu_seqlens, max_seqlen: int):  # type: ignore[override]
        """Latents `[T, C]` of the visible patches `index_T` (clip * N + patch), packed by `cu_seqlens`."""
        x = self.embed(patches_BNP.flatten(0, 1)[index_T])
        return super().forward(x, index_T % self.n_patches, cu_seqlens, max_seqlen)

    def encode(self, patches_BNP, layers: int = 0):
        """Latents of every patch, `[B, N, C]`; with `layers`, a list of the last blocks' outputs instead."""
        B, N, _ = patches_BNP.shape
        cu = torch.arange(B + 1, device=patches_BNP.device, dtype=torch.int32) * N
        x = self.embed(patches_BNP).flatten(0, 1)
        patch = torch.arange(N, device=x.device).repeat(B)
        out = super().forward(x, patch, cu, N, keep_layers=layers)
        return [o.unflatten(0, (B, N)) for o in out] if layers else out.unflatten(0, (B, N))

    def targets(self, patches_BNP):
        """What the predictor must give: the last layer's output, or the mean of the top layers (data2vec)."""
        if self.target_layers == 1:
            return self.encode(patches_BNP)
        outputs = [o.float() for o in self.encode(patches_BNP, self.target_layers)]
        normed = [nn.functional.instance_norm(o.transpose(1, 2), eps=1e-5) for o in outputs]
        return torch.stack(normed).mean(0).transpose(1, 2)


class Predictor(Transformer):
    """Narrow transformer on the context's latents and one mask token for each patch to predict."""

    def __init__(self, cfg: ModelConfig, spec: LogMelSpec, impl: str = "auto"):
        width, heads = cfg.predictor_width, cfg.predictor_heads
        super().__init__(width, cfg.predictor_depth, heads, spec.grid, cfg.positions, impl)
        encoder_width = SIZES[cfg.size][0]
        self.embed = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, encoder_width)
        self.initialise()
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context_TC, masks: Masks):  # type: ignore[override]
        """Predicted latents `[Tt, C]`, in the order of `masks.target`."""
        embedded = self.embed(context_TC)
        tokens = torch.cat([embedded, self.mask_token.to(embedded.dtype).expand(len(masks.target), -1)])
        patch = torch.cat([masks.context, masks.target]) % self.n_patches
        x = super().forward(tokens[masks.predict], patch[masks.predict], masks.predict_cu, masks.max_predict)
        return self.head(x[masks.predicted])


class JEPA(nn.Module):
    """The three networks. `forward` gives the predictions; targets carry no gradient."""

    def __init__(self, cfg: ModelConfig, spec: LogMelSpec, impl: str = "auto"):
        super().__init__()
        self.context_encoder = Encoder(cfg, spec, impl)
        self.predictor = Predictor(cfg, spec, impl)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)

    def forward(self, patches_BNP: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions `[Tt, C]` at the target patches, and the target encoder's latents of every patch `[B * N, C]`."""
        with torch.no_grad():
            latents = self.target_encoder.targets(patches_BNP).flatten(0, 1)
        context = self.context_encoder(patches_BNP, masks.context, masks.context_cu, masks.max_context)
        return self.predictor(context, masks), latents

    def ema_pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.context_encoder.parameters(), self.target_encoder.parameters(), strict=True))
