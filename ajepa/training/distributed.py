"""Joining and leaving the group of processes that a launcher has started."""

import contextlib
import datetime
import os
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ajepa.config import Config, ConfigError
from ajepa.training.ranks import Ranks
from ajepa.training.replicas import Replicas, Zero1
from ajepa.training.sharded import ShardedRanks
from ajepa.utils.errors import UserError
from ajepa.utils.pinning import pin, place

PATIENCE = datetime.timedelta(days=2)
GRACE = 5.0  # seconds that the launcher gets to find out which rank died first
KINDS = {"ddp": Replicas, "zero1": Zero1, "fsdp": ShardedRanks}


class LoneRankError(UserError, RuntimeError):
    """The other ranks of the run did not start."""


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
    ranks = ranks_of(cfg, _variable("RANK", 0), world_size, local_rank)
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
        ranks.cores = pin(ranks.gather(place(device)), ranks.rank, cfg.pin_cores)
        yield ranks, device
    except RuntimeError as error:
        if is_lost(error):
            _give_up(ranks, error, cfg)
        raise
    dist.destroy_process_group()


def ranks_of(cfg: Config, rank: int, world_size: int, local_rank: int = 0) -> Ranks:
    """A rank that shares weights and reduces gradients as `cfg` says. It has no process groups for exchanges yet."""
    dtype = torch.bfloat16 if cfg.step.reduce == "bf16" else torch.float32
    return KINDS[cfg.parallel](rank, world_size, local_rank, dtype)


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
