"""`rank_worker.py SECONDS BATCH`: one rank of bench_reduction.py, which sets torchrun's variables.

Rank 0 prints JSON. The ranks of a group take the same steps with each way to reduce gradients in turn. A time is that
of rank 0, from a barrier to the end of the step on its device.
"""

import dataclasses
import json
import os
import sys
import time

import torch
import torch.distributed as dist
from bench_step import SIZE, TOLERANCE, config, noise, slices, with_masks
from records import DEVICE
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from ajepa.config import SIZES
from ajepa.training.distributed import ranks_of
from ajepa.training.engine import Engine
from ajepa.training.ranks import Ranks, joined_scalars, over_ranks, total_norm
from ajepa.utils.devices import wait

OURS = {"ajepa ddp": ("ddp", "fp32"), "ajepa ddp, bf16": ("ddp", "bf16"), "ajepa zero1": ("zero1", "fp32")}
OURS["ajepa zero1, bf16"] = ("zero1", "bf16")
PEERS = {"DDP": None, **({"DDP, bf16": bf16_compress_hook} if DEVICE == "cuda" else {})}  # the hook needs NCCL
LEAST = 3 + 2  # rounds; on a GPU the first three run eagerly, capture and replay


class DataParallel(Ranks):
    """torch's DistributedDataParallel, which reduces gradients during backward, and a second collective for scalars."""

    captures = False

    def __init__(self, rank: int, world_size: int, hook):
        super().__init__(rank, world_size)
        self.alone, self.hook = False, hook

    def wrap(self, model):
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if self.hook is not None:
            net.register_comm_hook(None, self.hook)
        return net

    def collect(self, loss, terms, scales):
        self.scalars = joined_scalars(loss, terms, scales)

    def reduced(self, trained, scales):
        dist.all_reduce(self.scalars)
        loss, terms = over_ranks(self.scalars[None] / self.world_size, scales)
        return loss, total_norm([p.grad for p in trained]), terms


def engines(rank: int, world_size: int, device: torch.device) -> dict[str, Engine]:
    made = {}
    for name, (parallel, reduce) in OURS.items():
        cfg = dataclasses.replace(config(reduce=reduce), parallel=parallel)  # type: ignore[arg-type]
        made[name] = Engine(cfg, device, ranks_of(cfg, rank, world_size))
    for name, hook in PEERS.items():
        made[name] = Engine(config(), device, DataParallel(rank, world_size, hook))
    if world_size == 1:
        made["single process"] = Engine(config(), device)
    return made


def main(seconds: float, batch: int) -> None:
    device = torch.device(DEVICE)
    SIZES.setdefault(SIZE, (SIZES["tiny"][0], 1, SIZES["tiny"][2]))  # that of a quick run on a CPU
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo", device_id=device if DEVICE == "cuda" else None)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    runs = engines(rank, world_size, device)
    first = next(iter(runs.values()))
    (mask,) = slices(first.cfg.mask, 1)
    ((pcm, lengths, masks),) = with_masks(first, noise(first.cfg, batch // world_size)[:1], [mask])
    times: dict[str, list[float]] = {name: [] for name in runs}
    reducing = dict.fromkeys(runs, 0.0)
    going, step, start = True, 0, time.perf_counter()
    while going:
        losses = {}
        for name in list(runs)[:: 1 if step % 2 else -1]:
            engine = runs[name]
            dist.barrier()
            wait(device)
            begin = time.perf_counter()
            result = engine.step(pcm, lengths, masks, step)
            wait(device)
            spent = 1e3 * (time.perf_counter() - begin)
            losses[name] = result.loss.item()
            reduction = engine.ranks.times().get("reduce", 0.0)
            if step >= LEAST - 2:
                times[name].append(spent)
                reducing[name] += 1e3 * reduction
        worst = max(abs(loss / losses["DDP"] - 1) for loss in losses.values())
        assert worst < TOLERANCE, f"losses differ at step {step}: {losses}"
        step += 1
        answer = torch.tensor(float(step < LEAST or time.perf_counter() < start + seconds), device=device)
        dist.broadcast(answer, 0)
        going = bool(answer)
    if rank == 0:
        means = {name: total / len(times[name]) for name, total in reducing.items() if name in OURS}
        print(json.dumps({"times": times, "reduction_ms": means}), flush=True)
    dist.barrier()
    os._exit(0)  # threads of the collectives of so many engines may outlive the interpreter, which would then abort


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
