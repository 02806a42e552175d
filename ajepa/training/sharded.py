"""FSDP2 (`--parallel fsdp`): weights, gradients and moments are sharded, for models that do not fit otherwise.

torch's modules for sharding are imported where they are used, because they take half a second that other runs need not
wait.
"""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ajepa.training.ranks import Ranks, joined_scalars, over_ranks, total_norm


class ShardedRanks(Ranks):
    """Weights, gradients and moments are sharded along their first dimension; blocks are gathered when used.

    The optimiser and the EMA work on each rank's shards as plain tensors, so their kernels need no change. Gradients
    are reduced in `dtype`.
    """

    replicated = False
    captures = False  # a block is gathered by a collective within the forward pass

    def __init__(self, rank: int, world_size: int, local_rank: int = 0, dtype: torch.dtype = torch.float32):
        super().__init__(rank, world_size, local_rank)
        self.dtype = dtype

    def wrap(self, model: Any) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self._plain = copy.deepcopy(model.context_encoder).requires_grad_(False)
        mesh = init_device_mesh(next(model.parameters()).device.type, (self.world_size,))
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=self.dtype)}
        for network in model.networks:
            for block in network.blocks:
                fully_shard(block, **options)
        fully_shard(model, **options)
        self._locals = {p: nn.Parameter(p.to_local().detach(), p.requires_grad) for p in model.parameters()}
        return model

    @torch.no_grad()
    def load(self, model, tensors):
        for name, p in model.named_parameters():
            self.local(p).copy_(self.part(p, tensors[name]))
        for name, buffer in model.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])
        model.write_copies()

    def local(self, x):
        return self._locals.get(x, x)

    def exchange(self):
        for parameter, local in self._locals.items():
            local.grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None

    def collect(self, loss, terms, scales):
        self.scalars = joined_scalars(loss, terms, scales)

    def reduced(self, trained, scales):
        square = total_norm([p.grad for p in trained if p.grad is not None]).square()
        every = torch.zeros(self.world_size, 1 + len(self.scalars), device=square.device)
        every[self.rank] = torch.cat([square.view(1), self.scalars])
        del self.scalars
        dist.all_reduce(every)
        loss, terms = over_ranks(every[:, 1:], scales)
        return loss, every[:, 0].sum().sqrt(), terms

    def check_alike(self, model, step):
        """Compare nothing: each weight is on one rank only."""

    def whole_weight(self, weight):
        return self.whole(weight, weight)

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
