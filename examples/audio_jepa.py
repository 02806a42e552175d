"""A minimal JEPA on spectrograms of unequal length, in plain PyTorch or with the ops: `--ops` changes the marked lines.

Clips differ in their length and in their number of visible tokens. So the tokens are packed end to end, `[T, C]`, with
`cu_seqlens`, and nothing is computed on padding. The plain version pads, masks and unpads around every attention.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import nn

from ajepa_kernels import AdamWEMA, add_layer_norm, latent_l2_loss, masked_attention

BANDS, FRAMES, LONGEST = 64, 4, 48  # a token is 4 frames of 64 mel bands; a clip at most 48 tokens


def padded_attention(qkv_T3HD, cu_seqlens):
    """Plain attention over packed tokens, which `masked_attention` replaces."""
    n = cu_seqlens.diff()
    rows = torch.repeat_interleave(torch.arange(len(n), device=n.device), n)
    places = torch.arange(len(rows), device=n.device) - cu_seqlens[rows]
    padded = qkv_T3HD.new_zeros(len(n), int(n.max()), *qkv_T3HD.shape[1:]).index_put((rows, places), qkv_T3HD)
    mask = torch.arange(padded.shape[1], device=n.device) < n[:, None]
    q, k, v = padded.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2)[rows, places]


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

    def forward(self, x_TC, stream, cu_seqlens):
        x, stream = self.norm(self.norm1, x_TC, stream)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        if self.ops:
            x = masked_attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=LONGEST)  # <- ops
        else:
            x = padded_attention(qkv, cu_seqlens)
        x, stream = self.norm(self.norm2, self.proj(x.flatten(1)), stream)
        return self.mlp(x), stream


class Encoder(nn.Module):
    def __init__(self, width: int, depth: int, heads: int, ops: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, ops) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_TC, cu_seqlens):
        stream = None
        for block in self.blocks:
            x_TC, stream = block(x_TC, stream, cu_seqlens)
        return self.norm(x_TC + stream)


class AudioJEPA(nn.Module):
    def __init__(self, width: int = 64, ops: bool = False):
        super().__init__()
        self.ops = ops
        self.embed = nn.Linear(BANDS * FRAMES, width)
        self.positions = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.context, self.predictor = Encoder(width, 2, 2, ops), Encoder(width, 1, 2, ops)
        self.target = copy.deepcopy(self.context).requires_grad_(False)

    def forward(self, patches_TP, place_T, cu_seqlens, visible_T):
        """visible_T: True for the tokens that the context encoder sees. All other tokens are predicted."""
        x = self.embed(patches_TP) + self.positions[place_T]
        seen = F.pad(visible_T.cumsum(0), (1, 0))[cu_seqlens]  # cu_seqlens of the visible tokens only
        rows, masked = visible_T.nonzero().squeeze(1), (~visible_T).nonzero().squeeze(1)
        context = self.context(x[rows], seen) + self.positions[place_T[rows]]
        queries = (self.query + self.positions[place_T]).index_put((rows,), context)
        prediction = self.predictor(queries, cu_seqlens)[masked]
        with torch.no_grad():
            latents = self.target(x, cu_seqlens)
        if self.ops:
            return latent_l2_loss(prediction, latents, masked)  # <- ops
        return F.mse_loss(prediction, F.layer_norm(latents[masked], latents.shape[-1:], eps=1e-6))


def sweeps(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw spectrograms of rising tones with random pitch, slope and length.

    Returns (patches `[T, P]`, place of each token in its clip `[T]`, cu_seqlens `[batch + 1]`).
    """
    n = torch.randint(LONGEST // 3, LONGEST + 1, (batch,))
    cu_seqlens = F.pad(n.cumsum(0), (1, 0))
    sequence = torch.repeat_interleave(torch.arange(batch), n)
    place = torch.arange(len(sequence)) - cu_seqlens[sequence]
    time = place[:, None] + torch.linspace(0, 1, FRAMES)
    pitch = BANDS * torch.rand(batch)[sequence, None] + torch.rand(batch)[sequence, None] * time
    mel = torch.exp(-0.5 * (torch.arange(BANDS) - pitch[..., None] % BANDS) ** 2)
    return (mel + 0.1 * torch.randn_like(mel)).flatten(1), place, cu_seqlens


def train(steps: int, ops: bool, batch: int = 8, device: str = "cpu") -> list[float]:
    """Train for `steps` steps and return the loss of each step."""
    torch.manual_seed(0)
    model = AudioJEPA(ops=ops).to(device)
    pairs = list(zip(model.context.parameters(), model.target.parameters(), strict=True))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    if ops:
        optimizer = AdamWEMA(trained, ema=pairs, lr=1e-3)  # <- ops
    losses = []
    for _ in range(steps):
        patches, place, cu_seqlens = (x.to(device) for x in sweeps(batch))
        visible = torch.rand(len(patches)).to(device) < 0.5
        loss = model(patches, place, cu_seqlens, visible)
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
