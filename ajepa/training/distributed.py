"""One run on many processes: what the ranks agree on, and how gradients and weights are spread over the ranks.

Every rank runs the same loop on its share of each global batch. Clip i of a batch of B goes to rank i mod W, and its
masks depend only on (seed, step, i), so W ranks with B / W clips each compute the same as one rank with B clips, up to
the order of additions. There are three process groups. The default group (NCCL on GPUs, gloo on CPUs) carries
gradients. A gloo group with the same timeout carries each step's small host-side exchange, which reveals a dead rank at
once. A patient gloo group is for waits of unknown length, such as for the first indexing of a large data set.
"""

import contextlib
import copy
import datetime
import hashlib
import inspect
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ajepa.config import Config, ConfigError
from ajepa.utils.errors import UserError

T = TypeVar("T")
PATIENCE = datetime.timedelta(days=2)
GRACE = 5.0  # seconds that the launcher gets to find out which rank died first


class ElsewhereError(Exception):
    """Another rank failed and has reported the reason."""


class LoneRankError(UserError, RuntimeError):
    """The other ranks of the run did not start."""


class ReplicaError(UserError, RuntimeError):
    """The ranks hold different weights although they must hold the same."""


class Ranks:
    """This process as one of the `world_size` ranks of a run with replicated weights (DDP).

    With a single process (`Ranks()`), no method uses torch.distributed.
    """

    replicated = True

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.alone, self.is_first = world_size == 1, rank == 0
        self.steps: Any = None  # gloo group with the timeout of the default group
        self.patient: Any = None  # gloo group with the timeout PATIENCE
        self._stopping = False

    @property
    def group(self) -> Any:
        """The group over which a step's tensors are reduced; None for a single process."""
        return None if self.alone else dist.group.WORLD

    # --- what the ranks agree on ---------------------------------------------------------------------------------

    def gather(self, value: T, patient: bool = False) -> list[T]:
        """Return the `value` of every rank, in rank order. Waits for --rank-timeout, or up to PATIENCE."""
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
        total = torch.tensor([targets, stop], dtype=torch.float64)
        dist.all_reduce(total, group=self.steps)
        self._stopping = bool(total[1] > 0)
        return targets * self.world_size / total[0].item()

    def stopping(self, wish: object) -> bool:
        return bool(wish) if self.alone else self._stopping

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
        """Return the module for the forward pass, after which `backward` leaves the mean gradient on every rank."""
        if self.alone:
            return model
        # The buffers need not be sent at each step: positions are constant, and `maximum` makes float8 scales alike.
        options = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in options else "broadcast_buffers"  # torch < 2.13
        chosen: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
        return DistributedDataParallel(model, **chosen)

    def accumulate(self, net: Any, last: bool) -> contextlib.AbstractContextManager:
        """Context of a micro-batch's forward and backward; replicas exchange gradients only in the last one."""
        return contextlib.nullcontext() if self.alone or last else net.no_sync()

    def load(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Set the weights from full tensors."""
        model.load_state_dict(tensors)

    def local(self, parameter: torch.Tensor) -> torch.Tensor:
        """The plain tensor that the optimiser updates for `parameter`: this rank's part of it."""
        return parameter

    def reduce(self, loss: torch.Tensor, trained: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss over the ranks, and the norm of the mean gradient, without a synchronization of the host.

        Both are the same on every rank, so all ranks skip a non-finite step or none does.
        """
        norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None], foreach=True)
        return self._mean(loss), norm

    def _mean(self, loss: torch.Tensor) -> torch.Tensor:
        if not self.alone:
            dist.all_reduce(loss := loss.clone())
            loss /= self.world_size
        return loss

    def maximum(self, x: torch.Tensor) -> torch.Tensor:
        """Set the elements of x to their maxima over the ranks, and return x."""
        if not self.alone:
            dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def whole(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The full tensor whose part on this rank is `value`, shaped as `local(parameter)`. All ranks must call it."""
        return value

    def part(self, parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """This rank's part of a full tensor shaped as `parameter`."""
        return value

    def encoder(self, model: Any, network: str) -> nn.Module:
        """The encoder called `network` as a plain module. All ranks must call it."""
        return getattr(model, network)


class ShardedRanks(Ranks):
    """FSDP2: weights, gradients and moments are sharded along their first dimension; blocks are gathered when used.

    The optimiser and the EMA work on each rank's shards as plain tensors, so their kernels need no change. torch's
    modules for sharding are imported here, because they take half a second that other runs need not wait.
    """

    replicated = False

    def wrap(self, model: Any) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._plain = copy.deepcopy(model.context_encoder).requires_grad_(False)
        mesh = init_device_mesh(next(model.parameters()).device.type, (self.world_size,))
        for network in model.networks:
            for block in network.blocks:
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self._locals = {p: nn.Parameter(p.to_local().detach(), p.requires_grad) for p in model.parameters()}
        return model

    def accumulate(self, net, last):
        return contextlib.nullcontext()  # unsharded gradients would take as much memory as replicas

    @torch.no_grad()
    def load(self, model, tensors):
        for name, p in model.named_parameters():
            self.local(p).copy_(self.part(p, tensors[name]))
        for name, buffer in model.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])
        model.write_copies()

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
        """Compare nothing: each weight is on one rank only."""

    def whole(self, parameter, value):
        from torch.distributed.tensor import DTensor

        if not isinstance(parameter, DTensor):
            return value
        if not isinstance(value, DTensor):
            mesh, placements, stride = parameter.device_mesh, parameter.placements, parameter.stride()
            value = DTensor.from_local(value, mesh, placements, run_check=False, shape=parameter.shape, stride=stride)
        return value.full_tensor()

    def part(self, parameter, value):
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(parameter, DTensor):
            return value
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()

    def encoder(self, model, network):
        state = {name: self.whole(value, value) for name, value in getattr(model, network).state_dict().items()}
        self._plain.load_state_dict(state)
        return self._plain


# --- joining and leaving --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(cfg: Config, device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the group started by torchrun or a launcher with the same variables. Yields this process's rank and device.

    The device is of the type of `device`; each rank has its own. Raises ConfigError if the launcher's variables are
    incomplete or there are more local ranks than GPUs.
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
            raise ConfigError(
                f"{need} ranks on a machine with {have} GPUs: each needs its own, start torchrun with fewer ranks"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = dist.PrefixStore(_meet(store, rank, world_size, cfg.rank_timeout), store)
        options: dict[str, Any] = {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, **options)
        ranks.steps = dist.new_group(backend="gloo", timeout=timeout)
        ranks.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise LoneRankError(
            f"rank {ranks.rank} of {world_size} met no other within --rank-timeout {cfg.rank_timeout:g} s "
            f"({str(error).splitlines()[0]}): start all ranks, as torchrun does, or unset WORLD_SIZE for one process"
        ) from error
    try:
        yield ranks, device
    except RuntimeError as error:
        if is_lost(error):
            _give_up(ranks, error, cfg)
        raise
    dist.destroy_process_group()


def _meet(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """A word that the ranks of this start share, and that no earlier start had. Raises RuntimeError after `timeout` s.

    torchrun has one store for all its restarts, where ranks would find what those of the last start left behind, such
    as addresses at which nobody listens any more. Hence each rank leaves a mark in it, and believes the answer of rank
    0 that repeats this mark. The mark of rank 0 is the word.
    """
    mark, end = uuid.uuid4().hex, time.monotonic() + timeout
    store.set(f"ajepa/mark/{rank}", mark)
    while time.monotonic() < end:
        if rank == 0:
            marks = [mark.decode() for mark in store.multi_get([f"ajepa/mark/{r}" for r in range(world_size)])]
            store.set("ajepa/marks", " ".join(marks))
        marks = store.get("ajepa/marks").decode().split()
        if len(marks) == world_size and marks[rank] == mark:
            store.set(f"ajepa/met/{marks[0]}/{rank}", "")
            if rank or store.check([f"ajepa/met/{mark}/{r}" for r in range(world_size)]):
                return marks[0]
        time.sleep(0.01)
    raise RuntimeError("only ranks of an earlier start have left marks")


def world() -> int:
    """Number of processes of this run, from the launcher's variable."""
    return _variable("WORLD_SIZE", 1)


def speaks_for_node() -> bool:
    """Whether this process prints the messages that all ranks of its machine share."""
    return _variable("LOCAL_RANK", 0) == 0


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank has ended or is too late."""
    if isinstance(error, UserError):  # whose message may hold any path
        return False
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _give_up(ranks: Ranks, error: RuntimeError, cfg: Config) -> None:
    """End this process: once a rank is lost, no collective can complete, not even an orderly shutdown.

    One rank prints the error for all. The wait lets the launcher find out which rank died first.
    """
    try:
        is_reporter = dist.distributed_c10d._get_default_store().add("ajepa/lost", 1) == 1
    except (RuntimeError, ValueError):
        is_reporter = True  # the store ended with the rank that hosted it
    if is_reporter:
        reason = str(error).splitlines()[0]
        print(
            f"error: rank {ranks.rank} lost another rank, or waited more than --rank-timeout {cfg.rank_timeout:g} s "
            f"for it ({reason}). The launcher's report says which rank ended and how. Continue from the last "
            f"checkpoint with --out {cfg.out} --resume, on any number of ranks that divides "
            f"--batch-size {cfg.optim.batch_size}.",
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
        raise ConfigError(f"{name}={text} is not a number; start the run with torchrun, which sets it") from None
