"""One training step, PCM in, updated weights out: the fused engine, and the plain PyTorch one beside it."""

import contextlib
from collections import deque
from typing import Any, NamedTuple

import torch

from ajepa.config import Config
from ajepa.model.frontend import FrontEnd
from ajepa.model.jepa import JEPA
from ajepa.model.masks import Masks, MaskSampler
from ajepa.training.distributed import Ranks
from ajepa.training.flops import step_flops
from ajepa.training.graph import StepGraphs
from ajepa.training.schedules import ema_decay, learning_rate, parameter_groups, weight_decay
from ajepa_kernels import AdamWEMA, ema_update_reference_, latent_l2_loss


class StepResult(NamedTuple):
    """Scalars on the device. Reading one blocks until the step has finished."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    bad: torch.Tensor  # 1 where the loss or a gradient was not finite and no weight was changed


class ScheduleValues(NamedTuple):
    """The schedules' values at one step: numbers, or scalars on the device that a graph reads."""

    lr: float | torch.Tensor
    weight_decay: float | torch.Tensor
    ema_decay: float | torch.Tensor
    share: float | torch.Tensor = 1.0  # weight of this rank's loss


class StepsInFlight:
    """Keeps at most two steps queued on a GPU. Every further step would hold its batch in the device's memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self.events: deque[torch.cuda.Event] = deque()

    def wait_for_room(self) -> None:
        """Block until the step before the previous one has finished."""
        if self.device.type != "cuda":
            return
        self.events.append(torch.cuda.current_stream(self.device).record_event())
        if len(self.events) > 2:
            self.events.popleft().synchronize()


class Engine:
    """Model, optimiser and front end of one implementation.

    `fused` runs on `ajepa_kernels`; an op without a kernel for the device reports that and runs in plain PyTorch. Its
    step is a CUDA graph wherever shapes recur. It skips those outputs of the last layers that nothing reads, and in
    bf16 its linear layers read copies of the weights that the optimiser writes. `reference` is plain PyTorch:
    torchaudio's front end (on a GPU its batched definition), SDPA, torch's fused AdamW and foreach EMA. `compile` is
    `reference` under torch.compile. All three have the same parameters, so weights can move between them. A step whose
    loss or gradient is not finite changes no weight and no moment.

    With several `ranks`, each rank trains on its share of the batch, without CUDA graphs; sharded weights have no
    copies.
    """

    def __init__(self, cfg: Config, device: torch.device, ranks: Ranks | None = None):
        self.cfg, self.device, self.ranks = cfg, device, ranks or Ranks()
        self.plain = cfg.impl != "fused"
        self.impl = "reference" if self.plain else "auto"  # of the ops of ajepa_kernels
        self.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
        self._make_model()
        self._make_optimizer()
        self._make_front_end()
        self.forward = torch.compile(self._forward) if cfg.impl == "compile" else self._forward
        on_gpu = device.type == "cuda"
        graphs = on_gpu and not self.plain and cfg.step.cuda_graph and self.ranks.alone
        self.graphs = StepGraphs(self._train, device) if graphs else None
        self.mask_stream = torch.cuda.Stream(device, priority=-1) if on_gpu else None
        self.in_flight = StepsInFlight(device)

    # --- the parts ------------------------------------------------------------------------------------------------

    def _make_model(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.seed)
            self.model = JEPA(self.cfg.model, self.cfg.front_end, self.impl).to(self.device)
        self.net = self.ranks.wrap(self.model)
        has_copies = self.bf16 and not self.plain and self.ranks.replicated
        self.copies = self.model.add_copies(torch.bfloat16) if has_copies else []
        if not self.plain:
            self.model.configure(self.cfg.step, self.bf16)

    def _make_optimizer(self) -> None:
        optim, local = self.cfg.optim, self.ranks.local
        groups = parameter_groups(self.model, optim.weight_decay)
        for group in groups:
            group["params"] = [local(p) for p in group["params"]]
        self.trained = [p for group in groups for p in group["params"]]
        self.pairs = [(local(p), local(target)) for p, target in self.model.ema_pairs()]
        options: dict[str, Any] = {"lr": optim.lr_start, "betas": optim.betas, "fused": True}
        self.optimizer: torch.optim.AdamW
        if self.plain:
            self.optimizer = torch.optim.AdamW(groups, **options)
        else:
            self.optimizer = AdamWEMA(groups, ema=self.pairs, copies=self.copies, **options)

    def _make_front_end(self) -> None:
        if self.plain:
            # torchaudio's fbank takes one clip at a time: on a GPU its launches would take longer than the whole step.
            impl = "torchaudio" if self.device.type == "cpu" else "reference"
            self.front_end = FrontEnd(self.cfg.front_end, impl)
        else:
            # Layers that read bf16 copies would round the patches at every reading; the front end rounds them once.
            self.front_end = FrontEnd(self.cfg.front_end, dtype=torch.bfloat16 if self.copies else torch.float32)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    # --- the step -------------------------------------------------------------------------------------------------

    def masks(self, sampler: MaskSampler, step: int, batch: int) -> list[Masks]:
        """Masks of a step, one for each micro-batch, drawn on the device."""
        sizes = self.cfg.step.sizes(batch)
        if self.mask_stream is None:
            return sampler.parts(step, self.cfg.optim.steps, sizes)
        # The host needs the token counts. A stream of their own lets it wait for them without waiting for the steps.
        training_stream = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.mask_stream), self.device:
            parts = sampler.parts(step, self.cfg.optim.steps, sizes)
        training_stream.wait_stream(self.mask_stream)
        for tensor in (tensor for masks in parts for tensor in masks.tensors().values()):
            tensor.record_stream(training_stream)
        return parts

    def step(
        self, pcm: torch.Tensor, lengths: torch.Tensor, masks: Masks | list[Masks], step: int, share: float = 1.0
    ) -> StepResult:
        """Train on `pcm` int16 `[B, S]` with the schedules' values at `step`.

        `masks` are those of the batch, or a list with those of each micro-batch; for `share` see `Ranks.share`. Blocks
        only on the step before the previous one, so at most two steps are in flight.
        """
        self.in_flight.wait_for_room()
        parts = [masks] if isinstance(masks, Masks) else masks
        with torch.no_grad():
            padded_by_zeros = self.cfg.data.pad == "zero"  # cyclic padding leaves every clip full
            patches = self.front_end(pcm, lengths if padded_by_zeros else None)
        optim = self.cfg.optim
        values = ScheduleValues(learning_rate(optim, step), weight_decay(optim, step), ema_decay(optim, step), share)
        return StepResult(*(self.graphs or self._train)(patches, parts, values))

    def _train(self, patches: torch.Tensor, parts: list[Masks], values: ScheduleValues) -> tuple[torch.Tensor, ...]:
        """Forward, backward and update, on tensors only: the part that a CUDA graph holds."""
        self.optimizer.zero_grad(set_to_none=True)  # clear gradients left behind by a failed graph capture
        loss = self._gradients(patches, parts, values.share)
        return self._update(loss, values)

    def _forward(self, patches: torch.Tensor, masks: Masks) -> torch.Tensor:
        prediction, latents, rows = self.net(patches, masks, prune=not self.plain)
        return latent_l2_loss(prediction, latents, rows, kind=self.cfg.optim.loss, impl=self.impl)

    def _gradients(self, patches: torch.Tensor, parts: list[Masks], share: float | torch.Tensor) -> torch.Tensor:
        """Return the loss of the batch and leave its gradients in `.grad`. Every target token has the same weight."""
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

    def _update(self, loss: torch.Tensor, values: ScheduleValues) -> tuple[torch.Tensor, ...]:
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = values.lr, values.weight_decay if group["decays"] else 0.0
        loss, norm = self.ranks.reduce(loss, self.trained)
        bad = (~(loss + norm).isfinite()).float()
        # torch's fused AdamW divides gradients by grad_scale, and changes nothing where found_inf is 1.
        limit = self.cfg.optim.clip_norm
        clip = torch.ones_like(norm) if limit is None else (norm / limit).clamp(min=1.0)
        if isinstance(self.optimizer, AdamWEMA):
            self.optimizer.step(ema_decay=values.ema_decay, grad_scale=clip, found_inf=bad)
        else:
            self.optimizer.grad_scale, self.optimizer.found_inf = clip, bad  # type: ignore[attr-defined]
            self.optimizer.step()
            self._average(values.ema_decay)
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm, bad

    def _average(self, decay: float | torch.Tensor) -> None:
        """Update the target encoder of the plain engine."""
        sources, targets = zip(*self.pairs, strict=True)
        ema_update_reference_(targets, sources, decay)

    # --- what a run reads -----------------------------------------------------------------------------------------

    def target_encoder(self) -> torch.nn.Module:
        """The whole EMA target encoder. All ranks must call this."""
        return self.ranks.whole_target_encoder(self.model)

    @torch.no_grad()
    def inspect(self, pcm: torch.Tensor, lengths: torch.Tensor, masks: Masks | list[Masks]) -> dict[str, float]:
        """The variance over tokens, averaged over channels, of layer-normalised targets and of predictions.

        Layer-normalised targets have variance 1 over channels, so their variance over tokens lies in [0, 1]. Near 0 all
        tokens are alike, which means that the encoders have collapsed. Looks at the first micro-batch.
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

    def flops(self, masks: Masks | list[Masks]) -> float:
        """Floating-point operations of a step with these masks; see `ajepa.training.flops`."""
        return step_flops(self.cfg.model, self.cfg.front_end, masks)
