"""Context encoder, predictor and target encoder, on packed tokens.

Shapes: B clips, N patches per clip, P values per patch, T packed tokens, C width, H heads, D head dim.
"""

import copy
import math
from functools import lru_cache

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ajepa.config import SIZES, ModelConfig, StepConfig
from ajepa.model.layers import (
    Block,
    Linear,
    Sequences,
    Wanted,
    add_norm,
    rotary_positions,
    sincos_positions,
    unique_rows,
)
from ajepa.model.masks import Masks
from ajepa_kernels import LogMelSpec


class Transformer(nn.Module):
    """Transformer blocks and a final layer norm, with position embeddings for a patch grid."""

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
        self.stream_dtype: torch.dtype | None = None  # of the residual stream; None means float32
        self.recompute = False  # recompute each block's activations in backward instead of keeping them

    def forward(self, x_TC, patch_T, sequences: Sequences, keep_layers: int = 0, wanted: Wanted | None = None):
        """Return the layer-normalised output of all tokens, or only of the `wanted` tokens.

        `patch_T` is the grid cell of each token. With `keep_layers`, return a list of the outputs of that many last
        blocks instead, without the final layer norm.
        """
        position = self.positions[patch_T]
        rotary = position if self.rotary else None
        stream = torch.zeros_like(x_TC, dtype=position.dtype) if self.rotary else position
        addend, stream = x_TC, stream.to(self.stream_dtype or position.dtype)
        kept = []
        for i, block in enumerate(self.blocks):
            last = i + 1 == len(self.blocks)
            arguments = (addend, stream, sequences, rotary, self.impl, wanted if last else None)
            if self.recompute and torch.is_grad_enabled():
                addend, stream = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                addend, stream = block(*arguments)
            if len(self.blocks) - i <= keep_layers:
                kept.append(addend + stream)
        return kept if keep_layers else add_norm(addend, stream, self.norm, self.impl)[0]

    def initialise(self) -> None:
        """Truncated normal weights of std 0.02; residual outputs of layer l are divided by sqrt(2 l), as in I-JEPA."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for layer, block in enumerate(self.blocks, start=1):
                for residual in (block.get_parameter("proj.weight"), block.get_parameter("fc2.weight")):
                    residual.div_(math.sqrt(2 * layer))


class Encoder(Transformer):
    """ViT over log-mel patches without a class token. It encodes only the patches that `index_T` selects."""

    def __init__(self, cfg: ModelConfig, spec: LogMelSpec, impl: str = "auto"):
        width, depth, heads = SIZES[cfg.size]
        super().__init__(width, depth, heads, spec.grid, cfg.positions, impl)
        self.embed = Linear(spec.patch_dim, width)
        self.target_layers = cfg.target_layers
        self.initialise()

    def forward(self, patches_BNP, index_T, sequences: Sequences):  # type: ignore[override]
        """Latents `[T, C]` of the visible patches `index_T` (clip * N + patch), packed by `sequences`."""
        x = self.embed(patches_BNP.flatten(0, 1).index_select(0, index_T))
        return super().forward(x, index_T % self.n_patches, sequences)

    def encode(self, patches_BNP, layers: int = 0, wanted: Wanted | None = None):
        """Return the latents of every patch, `[B, N, C]`, or only of the `wanted` patches, `[Tw, C]`.

        The rows of `wanted` are clip * N + patch. With `layers`, return a list of the outputs of that many last blocks
        instead.
        """
        B, N, _ = patches_BNP.shape
        cu = torch.arange(B + 1, device=patches_BNP.device, dtype=torch.int32) * N
        x = self.embed(patches_BNP).flatten(0, 1)
        patch = torch.arange(N, device=x.device).repeat(B)
        out = super().forward(x, patch, Sequences(cu, N), layers, wanted)
        if wanted is not None:
            return out
        return [o.unflatten(0, (B, N)) for o in out] if layers else out.unflatten(0, (B, N))

    def targets(self, patches_BNP, wanted: Wanted | None = None):
        """Return the latents that the predictor learns to predict: the last layer's output, or the mean of the top
        layers (data2vec).

        They cover every patch, `[B * N, C]`, or only the `wanted` patches, `[Tw, C]` (last layer only).
        """
        if self.target_layers == 1:
            return self.encode(patches_BNP, wanted=wanted) if wanted else self.encode(patches_BNP).flatten(0, 1)
        outputs = [o.float() for o in self.encode(patches_BNP, self.target_layers)]
        normed = [nn.functional.instance_norm(o.transpose(1, 2), eps=1e-5) for o in outputs]
        return torch.stack(normed).mean(0).transpose(1, 2).flatten(0, 1)


class Predictor(Transformer):
    """Narrow transformer over the context latents and one mask token for each patch to predict."""

    def __init__(self, cfg: ModelConfig, spec: LogMelSpec, impl: str = "auto"):
        width, heads = cfg.predictor_width, cfg.predictor_heads
        super().__init__(width, cfg.predictor_depth, heads, spec.grid, cfg.positions, impl)
        encoder_width = SIZES[cfg.size][0]
        self.embed = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.head = Linear(width, encoder_width)
        self.initialise()
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context_TC, masks: Masks, prune: bool = False):  # type: ignore[override]
        """Predicted latents `[Tt, C]`, in the order of `masks.target`.

        With `prune`, the last layer computes outputs only for the mask tokens.
        """
        embedded = self.embed(context_TC)
        tokens = torch.cat([embedded, self.mask_token.to(embedded.dtype).expand(len(masks.target), -1)])
        patch = torch.cat([masks.context, masks.target]) % self.n_patches
        # Contexts may repeat. On a CPU the gradient of index_select adds in a fixed order; that of [] does not.
        no_repeats = prune and masks.disjoint
        x = unique_rows(tokens, masks.predict) if no_repeats else tokens.index_select(0, masks.predict)
        patch, sequences = patch[masks.predict], Sequences(masks.predict_cu, masks.max_predict)
        if prune:
            wanted = Wanted(masks.predicted, Sequences(masks.target_cu, masks.max_target))
            return self.head(super().forward(x, patch, sequences, wanted=wanted))
        return self.head(super().forward(x, patch, sequences).index_select(0, masks.predicted))


@lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class JEPA(nn.Module):
    """The three networks. `forward` returns predictions and targets; targets carry no gradient."""

    def __init__(self, cfg: ModelConfig, spec: LogMelSpec, impl: str = "auto"):
        super().__init__()
        self.context_encoder = Encoder(cfg, spec, impl)
        self.predictor = Predictor(cfg, spec, impl)
        self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        self.parallel = False  # run the target and the context encoder on two CUDA streams

    def forward(
        self, patches_BNP: torch.Tensor, masks: Masks, prune: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return predictions `[Tt, C]` at the target patches, the target encoder's latents, and each prediction's row
        of the latents.

        The latents cover every patch, `[B * N, C]`. With `prune`, the last layers compute only outputs that are read:
        if target patches do not overlap, the latents then cover only the target patches.
        """
        sequences = Sequences(masks.context_cu, masks.max_context)

        def predict() -> torch.Tensor:
            return self.predictor(self.context_encoder(patches_BNP, masks.context, sequences), masks, prune)

        if not self.parallel:
            return predict(), *self._targets(patches_BNP, masks, prune)
        main_stream, side_stream = torch.cuda.current_stream(patches_BNP.device), _side_stream(patches_BNP.device)
        side_stream.wait_stream(main_stream)
        with torch.cuda.stream(side_stream):
            latents, rows = self._targets(patches_BNP, masks, prune)
        prediction = predict()
        main_stream.wait_stream(side_stream)
        for x in (latents, rows):
            x.record_stream(main_stream)
        return prediction, latents, rows

    @torch.no_grad()
    def _targets(self, patches_BNP, masks: Masks, prune: bool) -> tuple[torch.Tensor, torch.Tensor]:
        if not (prune and masks.disjoint and self.target_encoder.target_layers == 1):
            return self.target_encoder.targets(patches_BNP), masks.target
        wanted = Wanted(masks.target, Sequences(masks.target_cu, masks.max_target))
        return self.target_encoder.targets(patches_BNP, wanted), torch.arange(
            len(masks.target), device=patches_BNP.device
        )

    def ema_pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.context_encoder.parameters(), self.target_encoder.parameters(), strict=True))

    def add_copies(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Make every linear layer compute with copies of its parameters. Returns the pairs (parameter, copy)."""
        return [pair for m in self.modules() if isinstance(m, Linear) for pair in m.add_copies(dtype)]

    def write_copies(self) -> None:
        """Refresh the copies after something other than the optimiser has set the parameters."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.write_copies()

    def configure(self, step: StepConfig, bf16: bool) -> None:
        """Set how the three networks compute."""
        self.parallel = step.parallel_encoders and next(self.parameters()).is_cuda
        for network in (self.context_encoder, self.predictor, self.target_encoder):
            network.recompute = step.recompute
            network.stream_dtype = torch.bfloat16 if bf16 and step.residual == "bf16" else None
            for block in network.modules():
                if isinstance(block, Block):
                    block.mlp = step.mlp
        for module in self.target_encoder.blocks.modules():
            if isinstance(module, Linear):
                module.fp8 = step.target_precision == "fp8"
