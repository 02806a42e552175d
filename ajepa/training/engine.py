"""One training step, PCM in, updated weights out: the fused engine, and the plain PyTorch one beside it."""

import contextlib
import copy
import functools
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ajepa.config import Config, ConfigError
from ajepa.evaluation.features import variance_shares
from ajepa.model.clip import Projector
from ajepa.model.frontend import FrontEnd
from ajepa.model.jepa import JEPA
from ajepa.model.masks import Masks, MaskSampler
from ajepa.model.pretrained import load_pretrained, load_weights
from ajepa.model.views import ViewFrontEnd
from ajepa.training.flops import step_flops
from ajepa.training.graph import StepGraphs
from ajepa.training.ranks import Ranks
from ajepa.training.schedules import ema_decay, learning_rate, parameter_groups, weight_decay
from ajepa.utils.devices import trains_in_bf16
from ajepa_kernels import AdamWEMA, advance_scales_, ema_update_reference_, latent_l2_loss


class StepResult(NamedTuple):
    """Scalars on the device. Reading one blocks until the step has finished."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    bad: torch.Tensor  # 1 where the loss or a gradient was not finite and no weight was changed
    masked: torch.Tensor  # the terms of the loss without their weights, 0 where the run has no such objective: masked
    agreement: torch.Tensor  # prediction, agreement of the views and SIGReg
    sigreg: torch.Tensor


TERMS = 3  # the last fields of StepResult


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
        self.inputs: torch.Tensor | None = None

    def wait_for_room(self, inputs: torch.Tensor | None = None) -> None:
        """Block until the step before the previous one has finished.

        `inputs` are those of the step to be queued, if another stream allocated them.
        """
        if self.device.type != "cuda":
            return
        self.events.append(torch.cuda.current_stream(self.device).record_event())
        self.inputs = inputs  # `wait_for_inputs` covers the inputs of earlier steps, so those may be freed
        if len(self.events) > 2:
            self.events.popleft().synchronize()

    def wait_for_inputs(self, stream: torch.cuda.Stream) -> None:
        """Make `stream` wait until no step but the one queued last reads inputs, so that it may reuse their memory."""
        if self.events:
            stream.wait_event(self.events[-1])


class Engine:
    """Model, optimiser and front end of one implementation.

    `fused` runs on `ajepa_kernels`; an op without a kernel for the device reports that and runs in plain PyTorch. Its
    step is a CUDA graph wherever shapes recur. It skips those outputs of the last layers that nothing reads, and in
    bf16 its linear layers read copies of the weights that the optimiser writes. `reference` is plain PyTorch:
    torchaudio's front end (on a GPU its batched definition), SDPA, torch's fused AdamW and foreach EMA. `compile` is
    `reference` under torch.compile. All three have the same parameters, so weights can move between them. A step whose
    loss or gradient is not finite changes no weight and no moment.

    With several `ranks`, each rank trains on its share of the batch. One CUDA graph then holds forward and backward and
    another one the update; the reduction lies between them. A clip objective compares the recordings of all ranks
    within its forward pass, so its step with several ranks is no graph. Sharded weights have neither graphs nor copies.
    """

    def __init__(self, cfg: Config, device: torch.device, ranks: Ranks | None = None):
        self.cfg, self.device, self.ranks = cfg, device, ranks or Ranks()
        self.plain = cfg.impl != "fused"
        self.impl = "reference" if self.plain else "auto"  # of the ops of ajepa_kernels
        self.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and trains_in_bf16(device))
        self._make_model()
        self._make_optimizer()
        self._make_front_end()
        self.forward = torch.compile(self._forward) if cfg.impl == "compile" else self._forward
        on_gpu = device.type == "cuda"
        graphs = on_gpu and not self.plain and cfg.step.cuda_graph and self.ranks.captures
        graphs = graphs and (self.ranks.alone or not cfg.objective.clips)
        # The device prefers streams with lower numbers: the masks, for which the host waits, then the step.
        overlaps = on_gpu and cfg.step.overlap_front_end
        self.front_end_stream = torch.cuda.Stream(device, priority=0) if overlaps else None
        graph_stream = torch.cuda.Stream(device, priority=-1) if graphs and overlaps else None
        self.mask_stream = torch.cuda.Stream(device, priority=-2 if overlaps else -1) if on_gpu else None
        self.graphs: StepGraphs | None = None
        self.update_graph: StepGraphs | None = None  # with several ranks
        if graphs:
            self.use_graphs(graph_stream)
        self.in_flight = StepsInFlight(device)

    # --- the parts ------------------------------------------------------------------------------------------------

    def _make_model(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.cfg.seed)
            self.model = JEPA(self.cfg, self.impl).to(self.device)
        self.key = torch.zeros((), dtype=torch.int64, device=self.device)  # of SIGReg's directions in the present step
        if self.cfg.objective.clips:
            self.model.clip.group = self.ranks.group
        self.net = self.ranks.wrap(self.model)
        if not self.plain:
            self.model.configure(self.cfg.step, self.bf16)
        has_copies = not self.plain and self.ranks.replicated
        self.copies = self.model.add_copies(torch.bfloat16 if self.bf16 else torch.float32) if has_copies else []

    def _make_optimizer(self) -> None:
        optim, local, scales = self.cfg.optim, self.ranks.local, self.model.scales
        pairs, trained = self.model.ema_pairs(), [p for p in self.model.parameters() if p.requires_grad]
        self.ranks.spread(trained, pairs, self.copies, TERMS + (0 if scales is None else scales.numel()))
        groups = parameter_groups(self.model, optim.weight_decay)
        for group in groups:
            group["params"] = [local(p) for p in group["params"]]
        self.trained = [p for group in groups for p in group["params"]]
        self.pairs, copies, scalings = (
            [(local(x), local(y)) for x, y in pairs] for pairs in (pairs, self.copies, self.model.copy_scalings())
        )
        options: dict[str, Any] = {"lr": optim.lr_start, "betas": optim.betas, "fused": True}
        self.optimizer: torch.optim.AdamW
        if self.plain:
            self.optimizer = torch.optim.AdamW(groups, **options)
        else:
            self.optimizer = AdamWEMA(groups, ema=self.pairs, copies=copies, scalings=scalings, **options)

    def _make_front_end(self) -> None:
        if self.plain:
            # torchaudio's fbank takes one clip at a time: on a GPU its launches would take longer than the whole step.
            impl = "torchaudio" if self.device.type == "cpu" else "reference"
            self.front_end = FrontEnd(self.cfg.front_end, impl)
        else:
            # Layers that read bf16 copies would round the patches at every reading; the front end rounds them once.
            rounds = self.copies and self.bf16
            self.front_end = FrontEnd(self.cfg.front_end, dtype=torch.bfloat16 if rounds else torch.float32)
        impl, dtype = ("reference" if self.plain else "auto"), self.front_end.dtype
        self.views = ViewFrontEnd(self.cfg, impl, dtype) if self.cfg.objective.clips else None

    def use_graphs(self, stream: torch.cuda.Stream | None = None) -> None:
        """Replay steps as CUDA graphs wherever shapes recur, captured on `stream`. A CPU takes the same path without
        graphs."""
        if self.ranks.alone:
            self.graphs = StepGraphs(self._train, self.device, stream)
            return
        captured = functools.partial(self._backward, eager=False)  # a graph holds no reduction
        self.graphs = StepGraphs(self._backward, self.device, stream, captured)
        self.update_graph = StepGraphs(self._update, self.device, stream)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    # --- the step -------------------------------------------------------------------------------------------------

    def masks(self, sampler: MaskSampler, step: int, batch: int) -> list[Masks]:
        """Masks of a step on `batch` recordings, one for each micro-batch, drawn on the device."""
        sizes = self.cfg.step.sizes(batch * self.cfg.objective.count)
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

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Queue the enclosed work, which loads a batch and computes its `patches` for `train`.

        With `overlap_front_end` the work gets a stream of its own, where it does not wait for the step queued last. It
        does wait for the step before that one, whose patches it may overwrite.
        """
        if self.front_end_stream is None:
            yield
            return
        training_stream = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.front_end_stream):
            self.in_flight.wait_for_inputs(self.front_end_stream)
            yield
        training_stream.wait_stream(self.front_end_stream)

    def step(
        self, pcm: torch.Tensor, lengths: torch.Tensor, masks: Masks | list[Masks], step: int, share: float = 1.0
    ) -> StepResult:
        """Train on `pcm` int16 `[B, S]`: `patches` and `train` in one."""
        return self.train(self.patches(pcm, lengths, step), masks, step, share)

    def train(self, patches: torch.Tensor, masks: Masks | list[Masks], step: int, share: float = 1.0) -> StepResult:
        """Train on `patches` `[B, N, P]` with the schedules' values at `step`.

        `masks` are those of the batch, or a list with those of each micro-batch; for `share` see `Ranks.share`. Blocks
        only on the step before the previous one, so at most two steps are in flight.
        """
        self.in_flight.wait_for_room(patches if self.front_end_stream else None)
        parts = [masks] if isinstance(masks, Masks) else masks
        if self.cfg.objective.clips:
            self.key.fill_(self.cfg.seed * 1_000_003 + step)
        optim = self.cfg.optim
        values = ScheduleValues(learning_rate(optim, step), weight_decay(optim, step), ema_decay(optim, step), share)
        if self.update_graph is None:
            return StepResult(*(self.graphs or self._train)(patches, parts, values))
        assert self.graphs is not None
        self.graphs(patches, parts, values)
        self.ranks.exchange()
        result = StepResult(*self.update_graph(patches[:0], [], values))
        self.ranks.distribute()
        return result

    @torch.no_grad()
    def patches(self, pcm: torch.Tensor, lengths: torch.Tensor, step: int) -> torch.Tensor:
        """Log-mel patches of a batch: of its clips, or of the views that `step` draws from its recordings."""
        if self.views is not None:
            return self.views(pcm, lengths, step, self.ranks.rank, self.ranks.world_size)
        padded_by_zeros = self.cfg.data.pad == "zero"  # cyclic padding leaves every clip full
        return self.front_end(pcm, lengths if padded_by_zeros else None)

    def _train(self, patches: torch.Tensor, parts: list[Masks], values: ScheduleValues) -> tuple[torch.Tensor, ...]:
        """Forward, backward and update, on tensors only: the part that a CUDA graph of a single process holds."""
        self._backward(patches, parts, values)
        self.ranks.exchange()
        result = self._update(patches, parts, values)
        self.ranks.distribute()
        return result

    def _backward(self, patches, parts: list[Masks], values: ScheduleValues, eager: bool = True) -> tuple[()]:
        """Leave gradients, loss and terms of this rank where the reduction finds them, see `Ranks.collect`."""
        self.ranks.clear(self.model)
        loss, terms = self._gradients(patches, parts, values.share, eager)
        self.ranks.collect(loss, terms, self.model.scales)
        return ()

    def _forward(self, patches: torch.Tensor, masks: Masks, share: float | torch.Tensor | None):
        """The loss, and its terms as in `StepResult`. `share` weights the mean over target patches; None: 1."""
        objective = self.cfg.objective
        out = self.net(patches, masks, prune=not self.plain, key=self.key)
        zero = torch.zeros((), device=self.device)
        loss = masked = agreement = spread = zero
        if objective.masks:
            masked = latent_l2_loss(out.prediction, out.latents, out.rows, kind=self.cfg.optim.loss, impl=self.impl)
            loss = masked if share is None else masked * share
        if objective.clips:
            agreement, spread = out.clip
            weight = objective.sigreg_weight
            clip = (1 - weight) * agreement + weight * spread
            loss = loss + objective.clip_weight * clip if objective.masks else clip
        return loss, torch.stack([x.detach().float() for x in (masked, agreement, spread)])

    def _gradients(self, patches: torch.Tensor, parts: list[Masks], share: float | torch.Tensor, eager: bool):
        """Return the loss of the batch and its terms, and leave the gradients in `.grad`. Every target token has the
        same weight, and so has every recording."""
        tokens = sum(len(masks.target) for masks in parts)
        total, terms = torch.zeros((), device=self.device), torch.zeros(TERMS, device=self.device)
        for chunk, masks in zip(patches.split([masks.clips for masks in parts]), parts, strict=True):
            part = len(masks.target) / max(tokens, 1)
            weight = None if self.ranks.alone and len(parts) == 1 else share * part
            with self.autocast():
                loss, found = self.forward(chunk, masks, weight)
            self.ranks.backward(loss, masks is parts[-1], eager)
            total += loss.detach()
            terms += found if len(parts) == 1 else found * part
        if not self.ranks.alone:
            terms[0] *= share
        return total, terms

    def _update(self, _patches, _parts, values: ScheduleValues) -> tuple[torch.Tensor, ...]:
        """Clip, AdamW and EMA, from what the reduction has left."""
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = values.lr, values.weight_decay if group["decays"] else 0.0
        loss, norm, terms = self.ranks.reduced(self.trained, self.model.scales)
        bad = (~(loss + norm).isfinite()).float()
        # torch's fused AdamW divides gradients by grad_scale, and changes nothing where found_inf is 1.
        limit = self.cfg.optim.clip_norm
        clip = torch.ones_like(norm) if limit is None else (norm / limit).clamp(min=1.0)
        if self.model.scales is not None:
            advance_scales_(self.model.scales.flatten(0, 1), bad)
        if isinstance(self.optimizer, AdamWEMA):
            self.optimizer.step(ema_decay=values.ema_decay, grad_scale=clip, found_inf=bad)
        else:
            self.optimizer.grad_scale, self.optimizer.found_inf = clip, bad  # type: ignore[attr-defined]
            self.optimizer.step()
            self._average(values.ema_decay)
        self.ranks.free_gradients(self.optimizer)
        if self.cfg.objective.clips:
            self.model.clip.update(bad)
        return loss, norm, bad, *terms.unbind()

    def _average(self, decay: float | torch.Tensor) -> None:
        """Update the target encoder of the plain engine."""
        if not self.pairs:
            return
        sources, targets = zip(*self.pairs, strict=True)
        ema_update_reference_(targets, sources, decay)

    # --- what a run reads -----------------------------------------------------------------------------------------

    def encoder(self) -> torch.nn.Module:
        """The whole encoder whose features the run is judged by, see `Config.network`. All ranks must call this."""
        return self.ranks.encoder(self.model, self.cfg.network)

    def finite(self) -> bool:
        """Whether all weights of this rank are finite. Blocks until the queued steps have finished."""
        weights = [p.detach() for p in (*self.trained, *(average for _, average in self.pairs)) if p.numel()]
        return bool(torch.nn.utils.get_total_norm(weights, math.inf, foreach=True).isfinite())

    @property
    def projector(self) -> Projector | None:
        """The projector of the clip objective, for evaluation."""
        if not self.cfg.objective.clips:
            return None
        return copy.deepcopy(self.model.clip.projector).eval()

    def teach(self, source: str) -> None:
        """Load the encoder of another run as the target encoder, which then stays as it is. Raises ConfigError."""
        found = load_pretrained(Path(source))
        if found.cfg.front_end != self.cfg.front_end:
            raise ConfigError(f"--teacher {source} reads another front end than this run: give both the same")
        load_weights(self.model.target_encoder, found.weights, found.file)

    @torch.no_grad()
    def inspect(
        self, pcm: torch.Tensor, lengths: torch.Tensor, masks: Masks | list[Masks], step: int = 0
    ) -> dict[str, float]:
        """The state of the representation on a batch, by its first micro-batch.

        `target_variance` and `prediction_variance`: variance over tokens, averaged over channels, of layer-normalised
        targets and of predictions. Layer-normalised targets have variance 1 over channels, so their variance over
        tokens lies in [0, 1]. Near 0 all tokens are alike, which means that the encoders have collapsed.
        `position_share`, `clip_share`: the shares of the targets' variance that the position of a patch and the clip
        explain. Targets that position explains teach little about the sound. Without a target encoder, the latents of
        all patches take the place of the targets, and there is no `prediction_variance`.
        """
        masks = masks if isinstance(masks, Masks) else masks[0]
        n = masks.clips // self.cfg.objective.count
        patches = self.patches(pcm[:n], lengths[:n], step)
        self.model.eval()
        values: dict[str, float] = {}
        with self.autocast():
            if self.cfg.objective.masks:  # sharded weights are gathered by the model's own forward pass
                out = self.model(patches, masks, key=self.key)
                targets = out.latents.view(patches.shape[0] * patches.shape[1], -1)  # separate layers side by side
                loss = latent_l2_loss(out.prediction, out.latents, out.rows, kind=self.cfg.optim.loss, impl=self.impl)
                values["watch_loss"] = loss.item()
                values["prediction_variance"] = out.prediction.float().var(0).mean().item()
            elif self.cfg.objective.taught:
                targets = self.model.target_encoder.targets(patches)
            else:
                targets = self.model.context_encoder.encode(patches).flatten(0, 1)
        self.model.train()
        target = torch.nn.functional.layer_norm(targets.float(), targets.shape[-1:])
        shares = variance_shares(target.unflatten(0, (masks.clips, -1)))
        return {
            "target_variance": target.var(0).mean().item(),
            **{f"{name}_share": share for name, share in shares.items()},
            **values,
        }

    def flops(self, masks: Masks | list[Masks]) -> float:
        """Floating-point operations of a step with these masks; see `ajepa.training.flops`."""
        return step_flops(self.cfg, masks)
