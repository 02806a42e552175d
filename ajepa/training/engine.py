"""One training step, PCM in, updated weights out: ours, and the plain PyTorch one that it is measured against."""

import contextlib
import sys
from collections import deque
from typing import Any, NamedTuple

import torch

from ajepa.config import SIZES, Config
from ajepa.model.frontend import FrontEnd
from ajepa.model.jepa import JEPA
from ajepa.model.masks import Masks, MaskSampler
from ajepa.training.distributed import Ranks
from ajepa.training.graph import StepGraphs
from ajepa.training.schedules import ema_decay, learning_rate, parameter_groups, weight_decay
from ajepa_kernels import AdamWEMA, ema_update_reference_, latent_l2_loss

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class StepResult(NamedTuple):
    """Scalars on the device: reading one waits for the step."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    bad: torch.Tensor  # 1 where loss or gradient was not finite and the weights were left alone


class Rates(NamedTuple):
    """What the schedules say of a step: numbers, or scalars on the device for a graph to read."""

    lr: float | torch.Tensor
    weight_decay: float | torch.Tensor
    ema_decay: float | torch.Tensor
    share: float | torch.Tensor = 1.0  # of this rank in the loss


def choose_device(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


def wait(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Engine:
    """Model, optimiser and front end of one implementation.

    `fused` runs on `ajepa_kernels` (each op says aloud where it has no kernel for the device), in a CUDA graph where
    the shapes recur; it leaves out of the last layers what nothing reads, and in bf16 its linear layers read copies
    that the optimiser writes. `reference` is plain PyTorch: torchaudio's front end (on a GPU its batched definition),
    SDPA, torch's fused AdamW and foreach EMA. `compile` is `reference` under torch.compile. All three have the same
    parameters, so that weights move between them freely. A step whose loss or gradient is not finite changes no weight
    and no moment.

    With several `ranks` each trains on its share of the batch, without CUDA graphs; sharded weights have no copies.
    """

    def __init__(self, cfg: Config, device: torch.device, ranks: Ranks | None = None):
        self.cfg, self.device, self.plain = cfg, device, cfg.impl != "fused"
        self.ranks = ranks or Ranks()
        self.impl = "reference" if self.plain else "auto"
        bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
        self.autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else contextlib.nullcontext
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.model = JEPA(cfg.model, cfg.front_end, self.impl).to(device)
        self.net = self.ranks.wrap(self.model)
        groups = parameter_groups(self.model, cfg.optim.weight_decay)
        for group in groups:
            group["params"] = [self.ranks.local(p) for p in group["params"]]
        options: dict[str, Any] = {"lr": cfg.optim.lr_start, "betas": cfg.optim.betas, "fused": True}
        self.pairs = [(self.ranks.local(p), self.ranks.local(target)) for p, target in self.model.ema_pairs()]
        self.optimizer: torch.optim.AdamW
        if self.plain:
            # torchaudio's fbank takes one clip at a time: on a GPU its launches alone would take longer than the step
            self.front_end = FrontEnd(cfg.front_end, "torchaudio" if device.type == "cpu" else "reference")
            self.optimizer = torch.optim.AdamW(groups, **options)
        else:
            copies = self.model.add_copies(torch.bfloat16) if bf16 and self.ranks.replicated else []
            # Rounded where they are made: the layers with copies would round them at every reading.
            self.front_end = FrontEnd(cfg.front_end, dtype=torch.bfloat16 if copies else torch.float32)
            self.optimizer = AdamWEMA(groups, ema=self.pairs, copies=copies, **options)
            self.model.configure(cfg.step, bf16)
        self.trained = [p for group in groups for p in group["params"]]
        self.forward = torch.compile(self._forward) if cfg.impl == "compile" else self._forward
        graphs = not self.plain and cfg.step.cuda_graph and device.type == "cuda" and self.ranks.alone
        self.mask_stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        self.graphs = StepGraphs(self._train, device) if graphs else None
        self.under_way: deque[torch.cuda.Event] = deque()

    def masks(self, sampler: MaskSampler, step: int, batch: int) -> list[Masks]:
        """Masks of a step, drawn on the device, a micro-batch each."""
        sizes = self.cfg.step.sizes(batch)
        if self.mask_stream is None:
            return sampler.parts(step, self.cfg.optim.steps, sizes)
        # The counts must be known to the host, which so waits for this stream, and not for the steps under way.
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.mask_stream), self.device:
            parts = sampler.parts(step, self.cfg.optim.steps, sizes)
        here.wait_stream(self.mask_stream)
        for x in (x for masks in parts for x in masks.tensors().values()):
            x.record_stream(here)
        return parts

    def step(
        self, pcm: torch.Tensor, lengths: torch.Tensor, masks: Masks | list[Masks], step: int, share: float = 1.0
    ) -> StepResult:
        """Train on `pcm` int16 `[B, S]` with the schedules of `step`. `masks`: of the batch, or of each micro-batch in
        turn; `share`: see `Ranks.share`. Waits for the step before the last one alone."""
        self._pace()
        parts = [masks] if isinstance(masks, Masks) else masks
        with torch.no_grad():
            patches = self.front_end(pcm, lengths if self.cfg.data.pad == "zero" else None)  # cyclic: all full
        optim = self.cfg.optim
        rates = Rates(learning_rate(optim, step), weight_decay(optim, step), ema_decay(optim, step), share)
        return StepResult(*(self.graphs or self._train)(patches, parts, rates))

    def _pace(self) -> None:
        """At most two steps under way: more would hold the batches of all of them in the device's memory."""
        if self.device.type != "cuda":
            return
        self.under_way.append(torch.cuda.current_stream(self.device).record_event())
        if len(self.under_way) > 2:
            self.under_way.popleft().synchronize()

    def _train(self, patches: torch.Tensor, parts: list[Masks], rates: Rates) -> tuple[torch.Tensor, ...]:
        """Forward, backward and update, on tensors alone: what a graph holds."""
        self.optimizer.zero_grad(set_to_none=True)  # what a recording that failed has left
        loss = self._gradients(patches, parts, rates.share)
        return self._update(loss, rates)

    def _forward(self, patches: torch.Tensor, masks: Masks) -> torch.Tensor:
        prediction, latents, rows = self.net(patches, masks, prune=not self.plain)
        return latent_l2_loss(prediction, latents, rows, kind=self.cfg.optim.loss, impl=self.impl)

    def _gradients(self, patches: torch.Tensor, parts: list[Masks], share: float | torch.Tensor) -> torch.Tensor:
        """Loss of the batch, its gradient left in `.grad`. Every target token counts the same."""
        tokens = sum(len(masks.target) for masks in parts)
        total = torch.zeros((), device=self.device)
        for chunk, masks in zip(patches.split([masks.clips for masks in parts]), parts, strict=True):
            with self.ranks.accumulate(self.net, last=masks is parts[-1]):
                with self.autocast():
                    loss = self.forward(chunk, masks)
                loss = loss if len(parts) == 1 else loss * (len(masks.target) / max(tokens, 1))
                loss = loss if self.ranks.alone else loss * share
                loss.backward()
            total += loss.detach()
        return total

    def _update(self, loss: torch.Tensor, rates: Rates) -> tuple[torch.Tensor, ...]:
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = rates.lr, rates.weight_decay if group["decays"] else 0.0
        loss, norm = self.ranks.reduce(loss, self.trained)
        bad = (~(loss + norm).isfinite()).float()
        # torch's fused AdamW divides gradients by grad_scale and leaves everything alone where found_inf is 1.
        limit = self.cfg.optim.clip_norm
        clip = torch.ones_like(norm) if limit is None else (norm / limit).clamp(min=1.0)
        if isinstance(self.optimizer, AdamWEMA):
            self.optimizer.step(ema_decay=rates.ema_decay, grad_scale=clip, found_inf=bad)
        else:
            self.optimizer.grad_scale, self.optimizer.found_inf = clip, bad  # type: ignore[attr-defined]
            self.optimizer.step()
            self._average(rates.ema_decay)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, bad

    def _average(self, decay: float | torch.Tensor) -> None:
        """The plain engine's EMA of the target encoder."""
        sources, targets = zip(*self.pairs, strict=True)
        ema_update_reference_(targets, sources, decay)

    def target_encoder(self) -> torch.nn.Module:
        """The EMA target encoder, whole; all ranks must call."""
        return self.ranks.whole_target_encoder(self.model)

    @torch.no_grad()
    def inspect(self, pcm: torch.Tensor, lengths: torch.Tensor, masks: Masks | list[Masks]) -> dict[str, float]:
        """Variance over tokens, averaged over channels, of layer-normalised targets and of predictions.

        Layer-normalised targets have variance 1 over channels, so theirs lies in [0, 1]; near 0 all tokens are alike:
        the encoders have collapsed. Of the first micro-batch.
        """
        masks = masks if isinstance(masks, Masks) else masks[0]
        n = masks.clips
        with self.autocast():
            prediction, latents, rows = self.model(self.front_end(pcm[:n], lengths[:n]), masks)
            loss = latent_l2_loss(prediction, latents, rows, kind=self.cfg.optim.loss, impl=self.impl)
        target = torch.nn.functional.layer_norm(latents.float(), latents.shape[-1:])
        return {
            "target_variance": target.var(0).mean().item(),
            "prediction_variance": prediction.float().var(0).mean().item(),
            "watch_loss": loss.item(),
        }

    def peak_memory(self) -> int:
        """Bytes: most that this process has taken of a GPU's memory, or of a CPU's (0: the system does not tell)."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        if resource is None:
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def flops(self, masks: Masks | list[Masks]) -> float:
        """2 x multiply-adds of one step with these (ragged) masks: forward, and twice that for each backward.

        Of the step as it is defined: what an engine leaves out or computes again does not change the figure.
        """
        if not isinstance(masks, Masks):
            return sum(map(self.flops, masks))
        spec, model = self.cfg.front_end, self.cfg.model
        width, depth, _ = SIZES[model.size]
        narrow, tokens = model.predictor_width, masks.clips * spec.n_patches

        def blocks(lengths: torch.Tensor, w: int, layers: int) -> float:
            n, squares = lengths.sum().item(), lengths.double().square().sum().item()
            return layers * (24 * n * w * w + 4 * squares * w)

        full = torch.full((masks.clips,), spec.n_patches)
        target = blocks(full, width, depth) + 2 * tokens * spec.patch_dim * width
        n_context = len(masks.context)
        context = blocks(masks.context_cu.diff(), width, depth) + 2 * n_context * spec.patch_dim * width
        predictor = blocks(masks.predict_cu.diff(), narrow, model.predictor_depth)
        predictor += 2 * width * narrow * (n_context + len(masks.target))
        return target + 3 * (context + predictor)
