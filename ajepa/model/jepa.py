"""Context encoder, predictor, target encoder and clip objective, on packed tokens.

Shapes: B clips, N patches per clip, P values per patch, T packed tokens, C width, H heads, D head dim.
"""

import copy
import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ajepa.config import SIZES, Config, ModelConfig, StepConfig
from ajepa.model.clip import ClipObjective, ClipTerms
from ajepa.model.layers import (
    Addend,
    Block,
    Linear,
    Sequences,
    Table,
    Wanted,
    add_norm,
    mean_of_layers,
    rotary_positions,
    sincos_positions,
    unique_rows,
)
from ajepa.model.masks import Masks
from ajepa_kernels import LogMelSpec, ResidualStream
from ajepa_kernels.fp8 import STATE


class Transformer(nn.Module):
    """Transformer blocks and a final layer norm, with position embeddings for a patch grid."""

    positions: torch.Tensor

    def __init__(self, width: int, depth: int, heads: int, grid: tuple[int, int], positions: str, impl: str):
        super().__init__()
        self.impl, self.n_patches = impl, math.prod(grid)
        rotary = positions == "rotary"
        table = rotary_positions(width // heads, grid) if rotary else sincos_positions(width, grid)
        self.register_buffer("positions", table, persistent=False)
        self.rotary, self.width = rotary, width
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.stream_dtype: torch.dtype | None = None  # of the residual stream; None means the positions'
        self.stream_gradient: torch.dtype | None = None  # dtype of the stream's gradient; None means the stream's
        self.recompute = False  # recompute each block's activations in backward instead of keeping them

    def forward(
        self, addend: Addend, patch_T, sequences: Sequences, keep_layers: int = 0, wanted: Wanted | None = None
    ):
        """Return the layer-normalised output of all tokens, or only of the `wanted` tokens.

        `addend`: the embedded tokens `[T, C]`. `patch_T`: the grid cell of each token. With `keep_layers`, return a
        list of the outputs of that many last blocks instead, without the final layer norm.
        """
        rotary = self.positions[patch_T] if self.rotary else None
        table, rows = self.positions, patch_T
        if self.rotary:  # no position is added
            table, rows = self.positions.new_zeros(1, self.width), torch.zeros_like(patch_T)
        table = table.to(self.stream_dtype or table.dtype)
        dtype = self.stream_gradient if torch.is_grad_enabled() else None
        start = table if dtype is None else ResidualStream.of(table, dtype)
        stream = Table(start, rows)
        kept = []
        for i, block in enumerate(self.blocks):
            last = i + 1 == len(self.blocks)
            arguments = (addend, stream, sequences, rotary, self.impl, wanted if last else None)
            if self.recompute and torch.is_grad_enabled():
                addend, stream = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                addend, stream = block(*arguments)
            if len(self.blocks) - i <= keep_layers:
                kept.append(addend.plus(stream))
        return kept if keep_layers else add_norm(addend, stream, self.norm, self.impl)[0]

    def initialise(self, kind: str) -> None:
        """Truncated normal weights; residual outputs of layer l are divided by sqrt(2 l), as in I-JEPA.

        Their std is 0.02, or by "fan-in" (`ModelConfig.init`) such that the patches enter a narrow encoder as strongly
        as the positions.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                fan_in = module.in_features**-0.5 if name == "embed" else 0.68 * self.width**-0.5
                nn.init.trunc_normal_(module.weight, std=0.02 if kind == "0.02" else fan_in)
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
        self.target_layers, self.target_mode = cfg.target_layers, cfg.target_mode
        self.initialise(cfg.init)

    def forward(self, patches_BNP, index_T, sequences: Sequences, layers: int = 0):  # type: ignore[override]
        """Latents `[T, C]` of the visible patches `index_T` (clip * N + patch), packed by `sequences`. With `layers`, a
        list of the outputs of that many last blocks instead."""
        x = self.embed.addend(patches_BNP.flatten(0, 1).index_select(0, index_T))
        return super().forward(x, index_T % self.n_patches, sequences, layers)

    def encode(self, patches_BNP, layers: int = 0, wanted: Wanted | None = None):
        """Return the latents of every patch, `[B, N, C]`, or only of the `wanted` patches, `[Tw, C]`.

        The rows of `wanted` are clip * N + patch. With `layers`, return a list of the outputs of that many last blocks
        instead.
        """
        B, N, _ = patches_BNP.shape
        cu = torch.arange(B + 1, device=patches_BNP.device, dtype=torch.int32) * N
        x = self.embed.addend(patches_BNP.flatten(0, 1))
        patch = torch.arange(N, device=patches_BNP.device).repeat(B)
        out = super().forward(x, patch, Sequences(cu, N), layers, wanted)
        if wanted is not None:
            return out
        return [o.unflatten(0, (B, N)) for o in out] if layers else out.unflatten(0, (B, N))

    def targets(self, patches_BNP, wanted: Wanted | None = None):
        """Return the latents that the predictor learns to predict: the last layer's output, or the top layers' by
        `join`.

        They cover every patch, `[B * N, C]`, or only the `wanted` patches, `[Tw, C]` (last layer only).
        """
        if self.target_layers == 1:
            return self.encode(patches_BNP, wanted=wanted) if wanted else self.encode(patches_BNP).flatten(0, 1)
        return self.join(self.encode(patches_BNP, self.target_layers))

    def join(self, outputs_BNC: list[torch.Tensor]) -> torch.Tensor:
        """Targets from the outputs of the top layers, each instance-normalised over the patches of a clip: their mean
        `[B * N, C]` (data2vec), or side by side, `[B * N, K * C]`."""
        normed = [nn.functional.instance_norm(o.float().transpose(1, 2), eps=1e-5) for o in outputs_BNC]
        joined = torch.cat(normed, 1) if self.target_mode == "separate" else torch.stack(normed).mean(0)
        return joined.transpose(1, 2).flatten(0, 1)


class Predictor(Transformer):
    """Narrow transformer over the context latents and one mask token for each patch to predict."""

    def __init__(self, cfg: ModelConfig, spec: LogMelSpec, impl: str = "auto"):
        width, heads = cfg.predictor_width, cfg.predictor_heads
        super().__init__(width, cfg.predictor_depth, heads, spec.grid, cfg.positions, impl)
        encoder_width = SIZES[cfg.size][0]
        self.embed = Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.head = Linear(width, encoder_width * (cfg.target_layers if cfg.target_mode == "separate" else 1))
        self.initialise(cfg.init)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context_TC, masks: Masks, prune: bool = False):  # type: ignore[override]
        """Predicted latents `[Tt, C]`, or `[Tt, K * C]` of K separate layers, in the order of `masks.target`.

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
            return self.head(super().forward(Addend(x), patch, sequences, wanted=wanted))
        return self.head(super().forward(Addend(x), patch, sequences).index_select(0, masks.predicted))


_NO_TARGETS = (None, None, None)


@lru_cache(maxsize=8)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Outputs(NamedTuple):
    """What the loss is made of. Targets carry no gradient."""

    prediction: torch.Tensor | None  # [Tt, C], of the target patches; with K separate target layers [Tt * K, C]
    latents: torch.Tensor | None  # [rows, C], of the target encoder
    rows: torch.Tensor | None  # int64 [Tt], the row of `latents` of each prediction
    clip: ClipTerms | None


class JEPA(nn.Module):
    """The networks of a run: a context encoder, and what its objectives need of predictor, target encoder, clip
    objective."""

    predictor: Predictor
    target_encoder: Encoder
    clip: ClipObjective
    scales: torch.Tensor | None  # float32 [layers, 2, 8]: the state of each `Scaling` of a float8 target encoder

    def __init__(self, cfg: Config, impl: str = "auto"):
        super().__init__()
        self.objective, model, spec = cfg.objective, cfg.model, cfg.front_end
        self.context_encoder = Encoder(model, spec, impl)
        if self.objective.masks:
            self.predictor = Predictor(model, spec, impl)
        if self.objective.taught:
            self.target_encoder = copy.deepcopy(self.context_encoder).requires_grad_(False)
        if self.objective.clips:
            self.clip = ClipObjective(cfg, impl)
        self.register_buffer("scales", None)
        self.parallel = False  # run the target and the context encoder on two CUDA streams

    @property
    def networks(self) -> list[Transformer]:
        return [child for child in self.children() if isinstance(child, Transformer)]

    def forward(
        self, patches_BNP: torch.Tensor, masks: Masks, prune: bool = False, key: torch.Tensor | None = None
    ) -> Outputs:
        """Return predictions at the target patches with the target encoder's latents, and the terms of the clip
        objective, as far as the run has these objectives.

        The latents cover every patch, `[B * N, C]`. With `prune`, the last layers compute only outputs that are read:
        if target patches do not overlap, the latents then cover only the target patches. `key` seeds SIGReg.
        """
        targets = self._beside(self._targets, patches_BNP, masks, prune) if self.objective.taught else _NO_TARGETS
        context = self.context_encoder(patches_BNP, masks.context, Sequences(masks.context_cu, masks.max_context))
        prediction = self.predictor(context, masks, prune) if self.objective.masks else None
        latents, rows, summary = self._arrived(*targets)
        clip = self.clip(context, masks, summary, key) if self.objective.clips else None
        layers = 1 if prediction is None or latents is None else prediction.shape[-1] // self.context_encoder.width
        if layers > 1:
            assert prediction is not None and latents is not None and rows is not None
            prediction, latents = (x.unflatten(-1, (layers, -1)).flatten(0, 1) for x in (prediction, latents))
            rows = (rows[:, None] * layers + torch.arange(layers, device=rows.device)).flatten()
        return Outputs(prediction, latents, rows, clip)

    def _beside(self, work, patches_BNP, *arguments):
        """Run `work` on a side stream if the encoders run in parallel; `_arrived` then waits for its results."""
        if not self.parallel:
            return work(patches_BNP, *arguments)
        side_stream = _side_stream(patches_BNP.device)
        side_stream.wait_stream(torch.cuda.current_stream(patches_BNP.device))
        with torch.cuda.stream(side_stream):
            return work(patches_BNP, *arguments)

    def _arrived(self, *results: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        tensors = [x for x in results if x is not None]
        if self.parallel and tensors:
            main_stream = torch.cuda.current_stream(tensors[0].device)
            main_stream.wait_stream(_side_stream(tensors[0].device))
            for x in tensors:
                x.record_stream(main_stream)
        return results

    @torch.no_grad()
    def _targets(self, patches_BNP, masks: Masks, prune: bool) -> tuple[torch.Tensor | None, ...]:
        """Latents, rows (see `Outputs`), and what the clip objective takes from the teacher."""
        encoder, clip = self.target_encoder, self.objective.clip_loss if self.objective.clips else "lejepa"
        if clip != "lejepa":
            outputs = encoder.encode(patches_BNP, encoder.target_layers)
            last = encoder.norm(outputs[-1])
            summary = last if clip == "byol" else mean_of_layers(outputs, 1e-5).mean(1)
            if not self.objective.masks:
                return None, None, summary
            latents = last.flatten(0, 1) if encoder.target_layers == 1 else encoder.join(outputs)
            return latents, masks.target, summary
        if not (prune and masks.disjoint and encoder.target_layers == 1):
            return encoder.targets(patches_BNP), masks.target, None
        wanted = Wanted(masks.target, Sequences(masks.target_cu, masks.max_target))
        rows = torch.arange(len(masks.target), device=patches_BNP.device)
        return encoder.targets(patches_BNP, wanted), rows, None

    def ema_pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(trained parameter, target parameter) of everything that follows by EMA; a given teacher does not."""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self.objective.taught and self.objective.teacher is None:
            pairs += zip(self.context_encoder.parameters(), self.target_encoder.parameters(), strict=True)
        return pairs + (self.clip.ema_pairs() if self.objective.clips else [])

    def add_copies(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Make every linear layer compute with copies of its parameters. Returns the pairs (parameter, copy).

        In float32 only layers that multiply in float8 need copies.
        """
        layers = [m for m in self.modules() if isinstance(m, Linear) and (dtype != torch.float32 or m.scalings)]
        pairs = [pair for layer in layers for pair in layer.add_copies(dtype)]
        averages = {average for _, average in self.ema_pairs()}  # a given teacher's float8 copies are never rewritten
        return [(p, copy) for p, copy in pairs if copy.dtype != torch.float8_e4m3fn or p in averages]

    def copy_scalings(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs (float8 copy, state of its scaling) for the optimiser, after `add_copies`."""
        if self.scales is None or self.objective.teacher is not None:
            return []
        layers = [m for m in self.target_encoder.blocks.modules() if isinstance(m, Linear)]
        return [(m.copies[0], m.scalings[1].state) for m in layers if m.copies and m.scalings]

    def write_copies(self) -> None:
        """Refresh the copies after something other than the optimiser has set the parameters."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.write_copies()

    def configure(self, step: StepConfig, bf16: bool) -> None:
        """Set how the three networks compute."""
        on_gpu = next(self.parameters()).is_cuda
        self.parallel = step.parallel_encoders and on_gpu
        for network in self.networks:
            network.recompute = step.recompute
            network.stream_dtype = torch.bfloat16 if bf16 and step.residual == "bf16" else None
            halves = bf16 and step.residual in ("bf16-gradient", "in-product")
            network.stream_gradient = torch.bfloat16 if halves else None
            for block in network.modules():
                if isinstance(block, Block):
                    block.adds_in_product = bf16 and step.residual == "in-product"
                    block.mlp = ("bias-gelu" if on_gpu else "plain") if step.mlp == "auto" else step.mlp
        if self.objective.taught and step.target_precision == "fp8":
            layers = [m for m in self.target_encoder.blocks.modules() if isinstance(m, Linear)]
            self.scales = torch.zeros(len(layers), 2, STATE, device=next(self.parameters()).device)
            for layer, states in zip(layers, self.scales, strict=True):
                layer.use_fp8(states)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Weights move between models with and without float8; without saved scales, they are computed anew."""
        if self.scales is None:
            state_dict.pop(f"{prefix}scales", None)
        else:
            state_dict.setdefault(f"{prefix}scales", torch.zeros_like(self.scales))
        super()._load_from_state_dict(state_dict, prefix, *args)
