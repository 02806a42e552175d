"""What each operation is tried with in test_compatibility.py, and the table that docs/adopt.md shows of it.

python tests/kernels/compatibility.py    # writes the table into docs/adopt.md
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import ajepa_kernels as k

PAGE = Path(__file__).parents[2] / "docs" / "adopt.md"
BLOCK = re.compile(r"(<!-- works-with:begin[^\n]*-->\n).*?(<!-- works-with:end -->)", re.DOTALL)
B, N, C = 4, 6, 32  # samples, tokens, width

FEATURES = {
    "compile": "`torch.compile`",
    "autocast": "autocast",
    "checkpoint": "checkpointing",
    "ddp": "DDP",
    "fsdp": "FSDP2",
    "func": "`torch.func.grad`",
    "graph": "CUDA graph",
    "export": "`torch.export`",
}


class Case(nn.Module):
    """A layer that uses an operation: `forward(x)` for x `[B, N, C]`, and a loss that is a mean over samples."""

    gradient = True

    def __init__(self, impl: str = "auto"):
        super().__init__()
        self.impl = impl
        self.build()

    def build(self) -> None:
        self.linear = nn.Linear(C, C)

    def draw(self) -> torch.Tensor:
        return torch.randn(B, N, C)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        out = self(x)
        return out.float().square().mean()


class Attention(Case):
    def build(self):
        self.qkv = nn.Linear(C, 3 * C)
        self.register_buffer("visible", torch.tensor([5, 0, 2, 3]))

    def forward(self, x):
        visible = self.visible.expand(len(x), -1)
        return k.masked_attention(self.qkv(x).unflatten(-1, (3, 1, C)), visible=visible, impl=self.impl)


class RotaryAttention(Case):
    """Rotary tables of two axes, and blocks of two tokens, each of which sees itself and those before it."""

    def build(self):
        self.qkv = nn.Linear(C, 3 * C)
        places = torch.stack((torch.arange(N) // 2, torch.arange(N) % 2), -1)
        rotary = k.Rotary.of(k.axial_angles(places, (C // 2, C // 2)))
        self.register_buffer("cos", rotary.cos)
        self.register_buffer("sin", rotary.sin)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, 1, C))
        return k.masked_attention(qkv, rotary=k.Rotary(self.cos, self.sin), causal=2, impl=self.impl)


class LatentLoss(Case):
    """Two masks of four and of three patches in each sample."""

    def build(self):
        self.linear = nn.Linear(C, C)
        self.register_buffer("four", torch.tensor([3, 1, 0, 5]))
        self.register_buffer("three", torch.tensor([2, 4, 3]))

    def forward(self, x):
        masks = [mask.expand(len(x), -1) for mask in (self.four, self.three)]
        prediction = torch.cat([self.linear(x[:, : mask.shape[1]]).flatten(0, 1) for mask in masks])
        return k.latent_l2_loss(prediction, x.detach(), masks, kind="smooth_l1", impl=self.impl)

    def loss(self, x):
        return self(x)


class WeightedLatentLoss(Case):
    def forward(self, x):
        index = torch.arange(N, device=x.device).flip(0).expand(len(x), -1)
        weights = torch.arange(1.0, N + 1, device=x.device).expand(len(x), -1)
        return k.latent_l2_loss(self.linear(x), x.detach(), index, kind="lp", p=1, weights=weights, impl=self.impl)

    def loss(self, x):
        return self(x)


class AddLayerNorm(Case):
    def build(self):
        self.linear, self.norm = nn.Linear(C, C), nn.LayerNorm(C)

    def forward(self, x):
        normed, total = k.add_layer_norm(self.linear(x), x, self.norm.weight, self.norm.bias, impl=self.impl)
        return normed * total


class ScaledNorm(Case):
    """RMS norm of a stream to which LayerScale and drop path scale what is added."""

    def build(self):
        self.linear, self.weight, self.scale = (
            nn.Linear(C, C), nn.Parameter(torch.ones(C)), nn.Parameter(0.1 * torch.ones(C))
        )  # fmt: skip

    def forward(self, x):
        kept = 2.0 * (x.detach()[:, 0, 0] > 0)  # drop path's draw, here one that each rank can repeat
        normed, total = k.add_layer_norm(
            self.linear(x), x, self.weight, rms=True, layer_scale=self.scale, sample_scale=kept, impl=self.impl
        )
        return normed * total


class BiasGELU(Case):
    def forward(self, x):
        return k.bias_gelu(nn.functional.linear(x, self.linear.weight), self.linear.bias, impl=self.impl)


class GeluMLP(Case):
    def build(self):
        self.fc1, self.fc2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)

    def forward(self, x):
        return k.gelu_mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, impl=self.impl)


class SwiGLU(Case):
    def build(self):
        self.fc1, self.fc2 = nn.Linear(C, 2 * C), nn.Linear(C, 2 * C)

    def forward(self, x):
        gate, value = (nn.functional.linear(x, layer.weight) for layer in (self.fc1, self.fc2))
        return k.swiglu(gate, value, self.fc1.bias, self.fc2.bias, impl=self.impl)


class Modules(Case):
    """A block of the package's modules."""

    def build(self):
        mlps = k.MLP(C, 2 * C, impl=self.impl), k.SwiGLU(C, 2 * C, impl=self.impl)
        self.block = k.PreNormResidual(*((nn.LayerNorm(C), mlp) for mlp in mlps), impl=self.impl)
        self.layer = k.LinearGELU(C, C, impl=self.impl)

    def forward(self, x):
        return self.layer(k.PreNormResidual.chain([self.block], x))


class LinearResidual(Case):
    def forward(self, x):
        return k.linear_residual(x, self.linear.weight, self.linear.bias, x)


class SegmentPool(Case):
    def forward(self, x):
        offsets = torch.arange(0, len(x) * N + 1, N, dtype=torch.int32, device=x.device)
        return k.segment_pool(self.linear(x).flatten(0, 1), offsets, impl=self.impl)


class SigReg(Case):
    group = None  # over which the statistic is computed

    def forward(self, x):
        return k.sigreg(self.linear(x).mean(1), 3, directions=16, knots=5, group=self.group, impl=self.impl)

    def loss(self, x):
        return self(x) * (1 if self.group is None else torch.distributed.get_world_size(self.group))


class LogMel(Case):
    gradient = False

    def build(self):
        self.log_mel = k.LogMel(k.LogMelSpec(n_mels=16, n_frames=16))

    def draw(self):
        return torch.randn(B, 3200).clamp(-1, 1)

    def forward(self, x):
        return self.log_mel(x)


class AugmentMel(Case):
    gradient = False
    spec = k.LogMelSpec(n_mels=8, n_frames=16, patch=(8, 8))

    def build(self):
        self.register_buffer("clip", torch.tensor([[0, 1], [1, 0]], dtype=torch.int32))
        self.register_buffer("halves", torch.full((2, 2), 0.5))
        self.register_buffer("band", torch.tensor([[0.5, 1.0], [0.0, 0.9]]))

    def draw(self):
        return torch.rand(B, 8, 24)

    def forward(self, x):
        views = k.MelViews(self.clip, self.halves, self.band[:, 1], self.band, self.halves, self.halves)
        return k.augment_mel(x, views, self.spec, impl=self.impl)


class Resample(Case):
    gradient = False

    def draw(self):
        return torch.randn(B, 3200).clamp(-1, 1)

    def forward(self, x):
        return k.resample(x, 16_000, 8_000)


class Update:
    """An in-place update of the weights of a layer, which has no gradient of its own.

    `spread` shards the layer and the copy that follows its weights.
    """

    def __init__(self, layer: nn.Module, impl: str = "auto", spread: Callable[[nn.Module], nn.Module] = lambda m: m):
        target = copy.deepcopy(layer).requires_grad_(False)
        self.layer, self.target, self.impl = spread(layer), spread(target), impl
        self.build()

    def build(self) -> None:
        pass

    def tensors(self) -> list[torch.Tensor]:
        return [*self.layer.parameters(), *self.target.parameters()]

    def step(self, decay: torch.Tensor) -> None:
        raise NotImplementedError


class AdamWithAverage(Update):
    def build(self):
        pairs = zip(self.layer.parameters(), self.target.parameters(), strict=True)
        lr = torch.tensor(0.01, device=next(self.layer.parameters()).device)
        self.optimizer = k.AdamWEMA(self.layer.parameters(), ema=pairs, lr=lr, impl=self.impl)

    def step(self, decay):
        self.optimizer.step(ema_decay=decay)


class Average(Update):
    def step(self, decay):
        with torch.no_grad():
            for p in self.layer.parameters():
                p.sub_(p.grad)
        k.ema_update_(self.target.parameters(), self.layer.parameters(), decay, impl=self.impl)


CASES: dict[str, type[Case]] = {
    "masked_attention": Attention,
    "masked_attention, rotary and causal": RotaryAttention,
    "latent_l2_loss, a list of masks": LatentLoss,
    "latent_l2_loss, weights": WeightedLatentLoss,
    "add_layer_norm": AddLayerNorm,
    "add_layer_norm, RMS and scales": ScaledNorm,
    "bias_gelu": BiasGELU,
    "gelu_mlp": GeluMLP,
    "swiglu": SwiGLU,
    "linear_residual": LinearResidual,
    "PreNormResidual, with MLP, SwiGLU and LinearGELU": Modules,
    "segment_pool": SegmentPool,
    "sigreg": SigReg,
    "LogMel, by log_mel": LogMel,
    "augment_mel": AugmentMel,
    "resample": Resample,
}
UPDATES: dict[str, type[Update]] = {"AdamWEMA": AdamWithAverage, "ema_update_": Average}


def reason(name: str, feature: str) -> str:
    """Why a cell of the table has no test: the feature does not apply, or the operation does not support it."""
    if name in UPDATES and feature in ("autocast", "checkpoint", "func", "export"):
        return "in-place update"
    if name in CASES and not CASES[name].gradient and feature in ("checkpoint", "ddp", "fsdp", "func"):
        return "no gradient"
    return LIMITS.get((name, feature), "")


# What is not supported, in words for the table.
LIMITS: dict[tuple[str, str], str] = {}
NOT_RUN = {"graph"}  # tests that need a GPU, and that nobody has run on one yet
NAMES = [*CASES, *UPDATES]
CELLS = [(name, feature) for name in NAMES for feature in FEATURES if not reason(name, feature)]


def table() -> str:
    lines = [f"| operation | {' | '.join(FEATURES.values())} |", "|---" * (1 + len(FEATURES)) + "|"]
    for name in NAMES:
        cells = (reason(name, feature) or ("not yet run" if feature in NOT_RUN else "yes") for feature in FEATURES)
        operation, comma, form = name.partition(",")
        form = re.sub(r"\b(?:MLP|SwiGLU|LinearGELU|log_mel)\b", lambda found: f"`{found[0]}`", form)
        lines.append(f"| `{operation}`{comma}{form} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda found: found[1] + table() + found[2], PAGE.read_text()))
