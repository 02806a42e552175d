"""One training step, PCM in, updated weights out: ours, and the plain PyTorch one that it is measured against."""

import contextlib
from typing import Any, NamedTuple

import torch

from ajepa.config import SIZES, Config
from ajepa.distributed import Ranks
from ajepa.frontend import FrontEnd
from ajepa.masks import Masks
from ajepa.model import JEPA
from ajepa.optim import ema_decay, learning_rate, parameter_groups, weight_decay
from ajepa_kernels import AdamWEMA, ema_update_reference_, latent_l2_loss


class StepResult(NamedTuple):
    """Scalars on the device: reading one waits for the step."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    bad: torch.Tensor  # 1 where loss or gradient was not finite and the weights were left alone


def choose_device(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


class Engine:
    """Model, optimiser and front end of one implementation.

    `fused` runs on `ajepa_kernels` (each op says aloud where it has no kernel for the device). `reference` is plain
    PyTorch: torchaudio's front end, SDPA, torch's fused AdamW and foreach EMA. `compile` is `reference` under
    torch.compile. All three have the same parameters, so that weights move between them freely. A step whose loss or
    gradient is not finite changes no weight and no moment. With several `ranks` each trains on its share of the batch.
    """

    def __init__(self, cfg: Config, device: torch.device, ranks: Ranks | None = None):
        self.cfg, self.device, self.plain = cfg, device, cfg.impl != "fused"
        self.ranks = ranks or Ranks()
        impl = "reference" if self.plain else "auto"
        bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and device.type == "cuda")
        self.autocast = (lambda: torch.autocast(device.type, torch.bfloat16)) if bf16 else contextlib.nullcontext
        self.front_end = FrontEnd(cfg.front_end, "torchaudio" if self.plain else impl)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            self.model = JEPA(cfg.model, cfg.front_end, impl).to(device)
        self.net = self.ranks.wrap(self.model)
        groups = parameter_groups(self.model, cfg.optim.weight_decay)
        for group in groups:
            group["params"] = [self.ranks.local(p) for p in group["params"]]
        options: dict[str, Any] = {"lr": cfg.optim.lr_start, "betas": cfg.optim.betas, "fused": True}
        self.pairs = [(self.ranks.local(p), self.ranks.local(target)) for p, target in self.model.ema_pairs()]
        self.optimizer: torch.optim.AdamW = (
            torch.optim.AdamW(groups, **options) if self.plain else AdamWEMA(groups, ema=self.pairs, **options)
        )
        self.trained = [p for group in groups for p in group["params"]]
        self.forward = torch.compile(self._forward) if cfg.impl == "compile" else self._forward

    def _forward(self, patches: torch.Tensor, masks: Masks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        prediction, latents = self.net(patches, masks)
        loss = latent_l2_loss(
            prediction, latents, masks.target, kind=self.cfg.optim.loss, impl="reference" if self.plain else "auto"
        )
        return loss, prediction, latents

    def step(self, pcm: torch.Tensor, lengths: torch.Tensor, masks: Masks, step: int, share: float = 1.0) -> StepResult:
        """Train on `pcm` int16 `[B, S]` with the schedules of `step`. No device sync. `share`: see `Ranks.share`."""
        with torch.no_grad():
            patches = self.front_end(pcm, lengths if self.cfg.data.pad == "zero" else None)  # cyclic: all full
        with self.autocast():
            loss, _, _ = self.forward(patches, masks)
        if share != 1.0:
            loss = loss * share
        loss.backward()
        return self._update(loss.detach(), step)

    def _update(self, loss: torch.Tensor, step: int) -> StepResult:
        optim = self.cfg.optim
        lr, decay = learning_rate(optim, step), weight_decay(optim, step)
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, decay if group["decays"] else 0.0
        loss, norm = self.ranks.reduce(loss, self.trained)
        bad = (~(loss + norm).isfinite()).float()
        # torch's fused AdamW divides gradients by grad_scale and leaves everything alone where found_inf is 1.
        clip = torch.ones_like(norm) if optim.clip_norm is None else (norm / optim.clip_norm).clamp(min=1.0)
        average = ema_decay(optim, step)
        if isinstance(self.optimizer, AdamWEMA):
            self.optimizer.step(ema_decay=average, grad_scale=clip, found_inf=bad)
        else:
            self.optimizer.grad_scale, self.optimizer.found_inf = clip, bad  # type: ignore[attr-defined]
            self.optimizer.step()
            sources, targets = zip(*self.pairs, strict=True)
            ema_update_reference_(targets, sources, average)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, norm, bad)

    def target_encoder(self) -> torch.nn.Module:
        """The EMA target encoder, whole; all ranks must call."""
        return self.ranks.whole_target_encoder(self.model)

    @torch.no_grad()
    def inspect(self, pcm: torch.Tensor, lengths: torch.Tensor, masks: Masks) -> dict[str, float]:
        """Variance over tokens, averaged over channels, of layer-normalised targets and of predictions.

        Layer-normalised targets have variance 1 over channels, so theirs lies in [0, 1]; near 0 all tokens are alike:
        the encoders have collapsed.
        """
        with self.autocast():
            loss, prediction, latents = self._forward(self.front_end(pcm, lengths), masks)
        target = torch.nn.functional.layer_norm(latents.float(), latents.shape[-1:])
        return {
            "target_variance": target.var(0).mean().item(),
            "prediction_variance": prediction.float().var(0).mean().item(),
            "watch_loss": loss.item(),
        }

    def flops(self, batch: int, masks: Masks) -> float:
        """2 x multiply-adds of one step with these (ragged) masks: forward, and twice that for each backward."""
        spec, model = self.cfg.front_end, self.cfg.model
        width, depth, _ = SIZES[model.size]
        narrow, tokens = model.predictor_width, batch * spec.n_patches

        def blocks(lengths: torch.Tensor, w: int, layers: int) -> float:
            n, squares = lengths.sum().item(), lengths.double().square().sum().item()
            return layers * (24 * n * w * w + 4 * squares * w)

        full = torch.full((batch,), spec.n_patches)
        target = blocks(full, width, depth) + 2 * tokens * spec.patch_dim * width
        n_context = len(masks.context)
        context = blocks(masks.context_cu.diff(), width, depth) + 2 * n_context * spec.patch_dim * width
        predictor = blocks(masks.predict_cu.diff(), narrow, model.predictor_depth)
        predictor += 2 * width * narrow * (n_context + len(masks.target))
        return target + 3 * (context + predictor)
