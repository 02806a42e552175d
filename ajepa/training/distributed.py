"""Many processes, one run: what the ranks agree on, and how gradients and weights are spread over them.

Every rank runs the same loop on its share of each global batch. Clip i of a batch of B goes to rank i mod W, and its
masks depend on (seed, step, i) alone, so W ranks with B / W clips compute what one rank with B computes, up to the
order of additions. Three groups: the default one (NCCL on GPUs, gloo on CPUs) carries gradients; a gloo group of the
same timeout carries each step's small host-side exchange, through which a dead rank shows at once; a patient one is for
waits of unknown length, such as for the first indexing of a large data set.
"""

import contextlib
import copy
import datetime
import hashlib
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ajepa.config import Config, ConfigError

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=2)
GRACE = 5.0  # seconds in which the launcher finds out which rank died first


class ElsewhereError(Exception):
    """Another rank failed and has said why."""


class ReplicaError(RuntimeError):
    """Ranks that must hold the same weights do not."""


class Ranks:
    """This process among the `world_size` of a run, whose weights are replicated (DDP).

    Alone (`Ranks()`), every method does the obvious without torch.distributed.
    """

    replicated = True

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.alone, self.is_first = world_size == 1, rank == 0
        self.steps: Any = None  # gloo, as impatient as the default group
        self.patient: Any = None
        self._stopping = False

    # --- what the ranks agree on ---------------------------------------------------------------------------------

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in their order. Waits as long as it takes."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.patient)
        return values

    def union(self, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
        """(key, value) pairs of all ranks."""
        return {key: value for found in self.gather(list(pairs)) for key, value in found}

    def together(self, work: Callable[[], T]) -> T:
        """`work()` of this rank. Where ranks fail, all stop: the first of them with its error, the others silently."""
        error: BaseException | None = None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        failed = self.gather(error is not None)
        if error is not None and not any(failed[: self.rank]):
            raise error
        if any(failed):
            raise ElsewhereError
        return result

    def first(self, work: Callable[[], T]) -> T | None:
        """`work()` on rank 0, while the others wait; None there. Where it fails, all stop."""
        return self.together(lambda: work() if self.is_first else None)

    def first_alone(self, work: Callable[[], T]) -> T:
        """`work()` on rank 0, and then on all others: what it leaves on disk, they need not do again."""
        done = self.first(work)
        return self.together(lambda: work() if done is None else done)

    def share(self, targets: int, stop: bool) -> float:
        """Weight of this rank's mean loss over `targets` patches, so that the mean over ranks is that over all patches.

        Also carries each rank's wish to stop: `stopping` is then true on all of them, after the same step.
        """
        if self.alone:
            return 1.0
        total = torch.tensor([targets, stop], dtype=torch.float64)
        dist.all_reduce(total, group=self.steps)
        self._stopping = bool(total[1] > 0)
        return targets * self.world_size / total[0].item()

    def stopping(self, wish: object) -> bool:
        return bool(wish) if self.alone else self._stopping

    def check_alike(self, model: nn.Module, step: int) -> None:
        """Raises ReplicaError unless all ranks hold the same bits, target encoder included."""
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
                f"after step {step} the weights of rank {', '.join(map(str, other))} differ from rank 0's: a faulty "
                "device, or code that treats ranks differently. Nothing was saved; resume from the last checkpoint."
            )

    # --- gradients and weights -------------------------------------------------------------------------------------

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call for the forward pass, so that `backward` leaves the mean gradient on every rank."""
        if self.alone:
            return model
        # The positions, its only buffers, are constants: no need to send them at each step.
        options = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"  # torch < 2.13
        chosen: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
        return DistributedDataParallel(model, **chosen)

    def accumulate(self, net: Any, last: bool) -> contextlib.AbstractContextManager:
        """Around forward and backward of a micro-batch: replicas exchange gradients in the last one only."""
        return contextlib.nullcontext() if self.alone or last else net.no_sync()

    def load(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Sets the weights from whole tensors."""
        model.load_state_dict(tensors)

    def local(self, parameter: torch.Tensor) -> torch.Tensor:
        """The plain tensor that the optimiser updates for `parameter`: this rank's part of it."""
        return parameter

    def reduce(self, loss: torch.Tensor, trained: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss over the ranks, and the norm of the mean gradient, the same on every rank; no host sync.

        So is whether they are finite: a step is skipped by all ranks or by none.
        """
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
        return self._mean(loss), norm

    def _mean(self, loss: torch.Tensor) -> torch.Tensor:
        if not self.alone:
            dist.all_reduce(loss := loss.clone())
            loss /= self.world_size
        return loss

    def whole(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The full tensor of which `value` (shaped as `local(parameter)`) is this rank's part. All ranks must call."""
        return value

    def part(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a full tensor shaped as `parameter`."""
        return value

    def whole_target_encoder(self, model: Any) -> nn.Module:
        """The target encoder as a plain module. All ranks must call."""
        return model.target_encoder


class ShardedRanks(Ranks):
    """FSDP2: weights, gradients and moments are cut along their first dimension; blocks are gathered as they are used.

    The optimiser and the EMA work on each rank's plain shards, on which their kernels run as on whole tensors.
    """

    replicated = False

    def wrap(self, model: Any) -> nn.Module:
        self._plain_target = copy.deepcopy(model.target_encoder)
        mesh = init_device_mesh(next(model.parameters()).device.type, (self.world_size,))
        for network in (model.context_encoder, model.predictor, model.target_encoder):
            for block in network.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self._locals = {p: nn.Parameter(p.to_local().detach(), p.requires_grad) for p in model.parameters()}
        return model

    def accumulate(self, net, last):
        return contextlib.nullcontext()  # whole gradients of several micro-batches would take the memory of replicas

    @torch.no_grad()
    def load(self, model, tensors):
        for name, p in model.named_parameters():
            self.local(p).copy_(self.part(p, tensors[name]))

    def local(self, parameter: torch.Tensor) -> torch.Tensor:
        return self._locals[parameter]

    def reduce(self, loss, trained):
        for parameter, local in self._locals.items():
            local.grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None
        own = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
        squares = own.square()
        dist.all_reduce(squares)
        return self._mean(loss), squares.sqrt()

    def check_alike(self, model, step):
        """Nothing to compare: each weight lives on one rank."""

    def whole(self, parameter, value):
        if not isinstance(parameter, DTensor):
            return value
        if not isinstance(value, DTensor):
            mesh, placements, stride = parameter.device_mesh, parameter.placements, parameter.stride()
            value = DTensor.from_local(value, mesh, placements, run_check=False, shape=parameter.shape, stride=stride)
        return value.full_tensor()

    def part(self, parameter, value):
        if not isinstance(parameter, DTensor):
            return value
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()

    def whole_target_encoder(self, model):
        state = {name: self.whole(value, value) for name, value in model.target_encoder.state_dict().items()}
        self._plain_target.load_state_dict(state)
        return self._plain_target


# --- joining and leaving --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(cfg: Config, device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """This process's rank in the group that torchrun, or another launcher with its variables, has started, and its
    own device of the kind of `device`.

    Raises ConfigError where the launcher's variables are incomplete or there are more local ranks than GPUs.
    """
    world_size, local_rank = world(), _variable("LOCAL_RANK", 0)
    if world_size == 1:
        yield Ranks(), device
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {world_size} but {', '.join(missing)} is not set: start with torchrun")
    kind = ShardedRanks if cfg.parallel == "fsdp" else Ranks
    ranks = kind(_variable("RANK", 0), world_size, local_rank)
    timeout = datetime.timedelta(seconds=cfg.rank_timeout)
    if cuda := device.type == "cuda":
        need, have = _variable("LOCAL_WORLD_SIZE", local_rank + 1), torch.cuda.device_count()
        if need > have:
            raise ConfigError(f"{need} ranks for {have} GPUs here: each needs its own, start torchrun with fewer")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout, device_id=device if cuda else None)
    ranks.steps = dist.new_group(backend="gloo", timeout=timeout)
    ranks.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    try:
        yield ranks, device
    except RuntimeError as error:
        if is_lost(error):
            _give_up(ranks, error, cfg)
        raise
    dist.destroy_process_group()


def world() -> int:
    """How many processes this run has, by the launcher's variable."""
    return _variable("WORLD_SIZE", 1)


def speaks_for_node() -> bool:
    """Whether this process says what all ranks of its machine find alike."""
    return _variable("LOCAL_RANK", 0) == 0


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or too late."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _give_up(ranks: Ranks, error: RuntimeError, cfg: Config) -> None:
    """Ends this process: with a gone rank nothing collective can be done, not even leaving in order.

    One rank speaks for all. The others' wait lets the launcher see first whose death it was.
    """
    try:
        speaks = dist.distributed_c10d._get_default_store().add("ajepa/lost", 1) == 1
    except (RuntimeError, ValueError):
        speaks = True  # the store went with the rank that kept it
    if speaks:
        reason = str(error).splitlines()[0]
        print(
            f"error: rank {ranks.rank} lost another rank, or waited more than --rank-timeout {cfg.rank_timeout:g} s "
            f"for it ({reason}). The launcher's report says which one ended and how. Continue from the last checkpoint "
            f"with --out {cfg.out} --resume, on any number of ranks that divides --batch-size {cfg.optim.batch_size}.",
            file=sys.stderr,
            flush=True,
        )
    time.sleep(GRACE)
    os._exit(1)


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}={text}: not a number; the launcher must set it, as torchrun does") from None
