"""What the processes of one run agree on. This module knows one process; `replicas` and `sharded` know several.

Every rank runs the same loop on its share of each global batch. Clip i of a batch of B goes to rank i mod W, and its
masks depend only on (seed, step, i), so W ranks with B / W clips each compute the same as one rank with B clips, up to
the order of additions. There are three process groups. The default group (NCCL on GPUs, gloo on CPUs) carries
gradients. A gloo group with the same timeout carries each step's small host-side exchange, which reveals a dead rank at
once. A patient gloo group is for waits of unknown length, such as for the first indexing of a large data set, and for
the evaluation clips that ranks exchange.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ajepa.utils.errors import UserError

T = TypeVar("T")
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class ElsewhereError(Exception):
    """Another rank failed and has reported the reason."""


class ReplicaError(UserError, RuntimeError):
    """The ranks hold different weights although they must hold the same."""


class Ranks:
    """This process as one of the `world_size` ranks of a run.

    With a single process (`Ranks()`), no method uses torch.distributed. Subclasses spread gradients and weights over
    several ranks.
    """

    replicated = True  # every rank holds all weights
    captures = True  # CUDA graphs may hold forward, backward and update

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.alone, self.is_first = world_size == 1, rank == 0
        self.steps: Any = None  # gloo group with the timeout of the default group
        self.patient: Any = None  # gloo group without a short timeout
        self.cores = ""  # a line on the cores that this rank is bound to
        self.exchanging = 0.0  # seconds in `share` since the last `times`
        self._stopping = False

    @property
    def group(self) -> Any:
        """The group over which a step's tensors are reduced; None for a single process."""
        return None if self.alone else dist.group.WORLD

    # --- what the ranks agree on ---------------------------------------------------------------------------------

    def gather(self, value: T, patient: bool = False) -> list[T]:
        """Return the `value` of every rank, in rank order. Waits for --rank-timeout, or two days."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.patient if patient else self.steps)
        return values

    def union(self, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Merge the (key, value) pairs of all ranks."""
        return {key: value for found in self.gather(list(pairs)) for key, value in found}

    def together(self, work: Callable[[], T]) -> T:
        """Run `work()` on every rank and return this rank's result.

        If any rank fails, the first that failed raises its error and all others raise ElsewhereError. All ranks must
        come here within --rank-timeout, but may take any time for the work.
        """
        error: BaseException | None = None
        if not self.alone:
            dist.all_reduce(torch.zeros(1), group=self.steps)  # a rank that hangs is found before the patient wait
        try:
            result = work()
        except BaseException as raised:
            error = raised
        failed = self.gather(error is not None, patient=True)
        if error is not None and not any(failed[: self.rank]):
            raise error
        if any(failed):
            raise ElsewhereError
        return result

    def first(self, work: Callable[[], T]) -> T | None:
        """Return `work()` on rank 0 and None on the others, which wait. If it fails, all ranks stop."""
        return self.together(lambda: work() if self.is_first else None)

    def first_alone(self, work: Callable[[], T]) -> T:
        """Run `work()` on rank 0 and then on all others, which reuse what rank 0 left on disk."""
        done = self.first(work)
        return self.together(lambda: work() if done is None else done)

    def share(self, targets: int, stop: bool) -> float:
        """Weight of this rank's mean loss over `targets` patches.

        With these weights the mean over ranks is the mean over all patches. The call also exchanges each rank's request
        to stop: `stopping` becomes true on all ranks after the same step.
        """
        if self.alone:
            return 1.0
        tick = time.perf_counter()
        total = torch.tensor([targets, stop], dtype=torch.float64)
        dist.all_reduce(total, group=self.steps)
        self.exchanging += time.perf_counter() - tick
        self._stopping = bool(total[1] > 0)
        return targets * self.world_size / total[0].item()

    def stopping(self, wish: object) -> bool:
        return bool(wish) if self.alone else self._stopping

    def times(self) -> dict[str, float]:
        """Seconds since the last call that this rank spent in the steps' host-side exchange, most of them waiting for
        the slowest rank ("ranks"), and, where they can be told from the rest of the step, in the collectives that
        reduce gradients and gather weights ("reduce")."""
        seconds, self.exchanging = self.exchanging, 0.0
        return {"ranks": seconds}

    def check_alike(self, model: nn.Module, step: int) -> None:
        """Raise ReplicaError unless all ranks hold bitwise equal weights, target encoder included."""
        if self.alone:
            return
        digest = hashlib.sha256()
        for value in model.state_dict().values():
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        digests = self.gather(digest.hexdigest())
        other = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
        if other:
            if not self.is_first:
                raise ElsewhereError
            raise ReplicaError(
                f"after step {step} the weights of rank {', '.join(map(str, other))} differ from rank 0's: a device "
                "is faulty, or code treats ranks differently. Nothing was saved; resume from the last checkpoint."
            )

    # --- gradients and weights -------------------------------------------------------------------------------------

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the module for the forward pass."""
        return model

    def spread(self, trained: list[nn.Parameter], pairs: Pairs, copies: Pairs, scalars: int) -> None:
        """Prepare the reduction of the gradients of `trained`. `pairs` and `copies` are those of the optimiser;
        `scalars` is the number of terms and scales that `collect` will get."""

    def local(self, x: torch.Tensor) -> torch.Tensor:
        """The plain tensor that the optimiser reads or writes for a weight, an average or a copy `x`: this rank's part
        of it."""
        return x

    def clear(self, model: nn.Module) -> None:
        """Forget gradients that a failed graph capture has left behind."""
        model.zero_grad(set_to_none=True)

    def backward(self, loss: torch.Tensor, last: bool, eager: bool) -> None:
        """Add the gradient of this rank's `loss` to that of earlier micro-batches.

        In the `last` micro-batch of a step that no graph captures (`eager`), gradients may be reduced as soon as they
        are there.
        """
        loss.backward()

    def collect(self, loss: torch.Tensor, terms: torch.Tensor, scales: torch.Tensor | None) -> None:
        """Put this rank's gradients, its loss, the loss's terms and float8's scales where `exchange` finds them."""
        self.collected = loss, terms

    def exchange(self) -> None:
        """Sum over the ranks what `collect` has put there. CUDA graphs do not hold this part of a step."""

    def reduced(
        self, trained: list[torch.Tensor], scales: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """After `exchange`: the mean loss over the ranks, the norm of the mean gradient, which the `grad` of `trained`
        then holds, and the means of the terms. `scales` is set to its maxima.

        They are the same on every rank, so all ranks skip a non-finite step or none does. No host waits for them.
        """
        loss, terms = self.collected
        del self.collected
        return loss, total_norm([p.grad for p in trained if p.grad is not None]), terms

    def free_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Free the gradients after the update."""
        optimizer.zero_grad(set_to_none=True)

    def distribute(self) -> None:
        """Bring the weights that this rank's optimiser has written to all other ranks. Not part of a CUDA graph."""

    def load(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Set the weights from full tensors."""
        model.load_state_dict(tensors)

    def complete(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The state dict of the model, in which `whole_weight` finds every weight. All ranks must call it."""
        return model.state_dict()

    def whole_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The full tensor of a value of `complete`. All ranks must call it."""
        return weight

    def whole(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The full tensor whose part on this rank is `value`, shaped as `local(parameter)`. All ranks must call it."""
        return value

    def part(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a full tensor shaped as `parameter`."""
        return value

    def encoder(self, model: Any, network: str) -> nn.Module:
        """The encoder called `network` as a plain module. All ranks must call it."""
        return getattr(model, network)


def joined_scalars(loss: torch.Tensor, terms: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """One float32 vector of the scalars that a step exchanges."""
    return torch.cat([x.detach().float().flatten() for x in (loss, terms, scales) if x is not None])


def over_ranks(every: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss and mean terms of all ranks, from the `joined_scalars` of each. `scales` is set to its maxima."""
    n = every.shape[1] - (0 if scales is None else scales.numel())
    if scales is not None:
        scales.copy_(every[:, n:].amax(0).view_as(scales))
    means = every[:, :n].mean(0)
    return means[0], means[1:]


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all elements in float32."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32)))
