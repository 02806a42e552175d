"""AdamW and the exponential moving average of the target encoder, as one update."""

from collections.abc import Iterable, Sequence

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


@torch.no_grad()
def ema_update_reference_(
    targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], decay: float | torch.Tensor
) -> None:
    """Plain PyTorch definition of `ema_update_`: torch's own foreach EMA."""
    if isinstance(decay, torch.Tensor):
        torch._foreach_mul_(list(targets), decay)
        torch._foreach_add_(list(targets), torch._foreach_mul(list(sources), 1 - decay))
    else:
        get_ema_multi_avg_fn(decay)(list(targets), list(sources), None)


def ema_update_(targets: Iterable[torch.Tensor], sources: Iterable[torch.Tensor], decay: float | torch.Tensor) -> None:
    """target <- decay * target + (1 - decay) * source, in place, for all tensors at once.

    `decay` is a number or a device scalar. Raises ValueError when the two lists do not match.
    """
    targets, sources = list(targets), list(sources)
    if len(targets) != len(sources) or any(t.shape != s.shape for t, s in zip(targets, sources, strict=False)):
        raise ValueError("ema_update_: targets and sources must be equally many tensors of equal shapes")
    if targets:
        ema_update_reference_(targets, sources, decay)


class AdamWEMA(torch.optim.AdamW):
    """`torch.optim.AdamW` that also moves an EMA copy of its parameters, in the same step.

    p <- AdamW(p, grad / grad_scale); ema <- ema_decay * ema + (1 - ema_decay) * p. Its state dict is AdamW's.

    Args:
        params: parameters or groups, as for `torch.optim.AdamW`.
        ema: pairs (parameter, its EMA tensor). Parameters without a pair have no average.
        **kwargs: AdamW's own. `fused=True` is the default.
    """

    def __init__(self, params, ema: Iterable[tuple[torch.Tensor, torch.Tensor]] = (), **kwargs):
        super().__init__(params, **{"fused": True, **kwargs})
        pairs = list(ema)
        self.ema_sources, self.ema_targets = [p for p, _ in pairs], [t for _, t in pairs]

    @torch.no_grad()
    def step(
        self,
        closure=None,
        *,
        ema_decay: float | torch.Tensor | None = None,
        grad_scale: torch.Tensor | None = None,
        found_inf: torch.Tensor | None = None,
    ):
        """One update. Gradients are divided by `grad_scale`; where `found_inf` is 1 nothing changes (both scalars)."""
        self.grad_scale, self.found_inf = grad_scale, found_inf  # read by torch's fused AdamW
        loss = super().step(closure)
        if ema_decay is not None and self.ema_targets:
            if found_inf is not None:
                ema_decay = torch.where(found_inf > 0, 1.0, ema_decay)
            ema_update_(self.ema_targets, self.ema_sources, ema_decay)
        return loss
