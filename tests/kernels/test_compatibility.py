"""Each operation under compile, autocast, checkpointing, DDP, FSDP2, `torch.func.grad`, CUDA graphs and export.

compatibility.py holds the cases, and the table in docs/adopt.md, which names a reason for each cell without a test. On
a CPU the plain definitions run, under Triton's interpreter and on a GPU the kernels.
"""

import copy
import os
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from oracle import CAN_LAUNCH, DEVICE
from torch.utils.checkpoint import checkpoint

from ajepa_kernels._triton import INTERPRET

sys.path.insert(0, str(Path(__file__).parent))
import compatibility as c

IMPL = "triton" if CAN_LAUNCH else "auto"


def having(feature: str) -> list[str]:
    return [name for name, f in c.CELLS if f == feature]


def case(name: str) -> tuple[c.Case, torch.Tensor]:
    module = c.CASES[name](IMPL)
    return module.to(DEVICE), module.draw().to(DEVICE).requires_grad_(module.gradient)


def result(module: c.Case, function, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and all gradients of its sum of squares."""
    out = function(x)
    if not module.gradient:
        return [out]
    leaves = [x, *module.parameters()]
    grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    assert any(g is not None for g in grads)
    return [out, *(g for g in grads if g is not None)]


def update_of(name: str) -> c.Update:
    torch.manual_seed(0)
    update = c.UPDATES[name](torch.nn.Linear(c.C, c.C).to(DEVICE), IMPL)
    for p in update.layer.parameters():
        p.grad = torch.ones_like(p)
    return update


@pytest.mark.parametrize("name", having("compile"))
def test_compile(name):
    if name in c.UPDATES:
        eager, update = update_of(name), update_of(name)
        step = torch.compile(update.step, fullgraph=True, backend="aot_eager")
        for decay in (0.9, 0.8):
            eager.step(torch.tensor(decay, device=DEVICE))
            step(torch.tensor(decay, device=DEVICE))
        torch.testing.assert_close(update.tensors(), eager.tensors())
        return
    module, x = case(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(result(module, compiled, x), result(module, module, x))


@pytest.mark.parametrize("name", having("autocast"))
def test_autocast(name):
    """The products are in low precision, the result is close, and gradients have the dtype of their tensor."""
    dtype = torch.float16 if DEVICE == "cpu" and CAN_LAUNCH else torch.bfloat16  # the interpreter's bfloat16 is wrong
    module, x = case(name)
    want = result(module, module, x)
    with torch.autocast(DEVICE, dtype):
        got = result(module, module, x)
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 0.05 * w.norm() + 1e-6
    for g, w in zip(got[1:], want[1:], strict=True):
        assert g.dtype == w.dtype


@pytest.mark.parametrize("name", having("checkpoint"))
def test_checkpoint(name):
    module, x = case(name)
    recomputed = result(module, lambda x: checkpoint(module, x, use_reentrant=False), x)
    torch.testing.assert_close(recomputed, result(module, module, x), rtol=0, atol=0)


@pytest.mark.parametrize("name", having("func"))
def test_func_grad(name):
    module, x = case(name)
    want = torch.autograd.grad(module.loss(x), x)[0].clone()
    torch.testing.assert_close(torch.func.grad(module.loss)(x.detach()), want)


@pytest.mark.parametrize("name", having("export"))
def test_export(name):
    module, x = case(name)
    program = torch.export.export(module, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), module(x.detach()))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("name", having("graph"))
def test_cuda_graph(name):
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    if name in c.UPDATES:
        eager, update, decay = update_of(name), update_of(name), torch.tensor(0.9, device=DEVICE)
        with torch.cuda.stream(stream):
            update.step(decay)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            update.step(decay)
        for _ in range(2):
            graph.replay()
        for _ in range(3):
            eager.step(decay)
        torch.testing.assert_close(update.tensors(), eager.tensors())
        return
    module, x = case(name)
    with torch.cuda.stream(stream):
        for _ in range(2):
            result(module, module, x)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = result(module, module, x)
    with torch.no_grad():
        x.copy_(module.draw())
    graph.replay()
    torch.testing.assert_close(captured, result(module, module, x))


# --- two processes ----------------------------------------------------------------------------------------------------


class Loss(torch.nn.Module):
    """A module whose forward is the loss, as DDP and FSDP2 need it."""

    def __init__(self, module: c.Case):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module.loss(x)


def share(name: str, feature: str, rank: int) -> None:
    """Two ranks, each with half of the batch, get the gradients or the updates of one process with all of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def spread(module):
        return module if feature == "ddp" else fully_shard(module, mesh=init_device_mesh("cpu", (2,)))

    impl = IMPL if DEVICE == "cpu" else "auto"  # both ranks compute on the CPU
    torch.manual_seed(0)
    if name in c.UPDATES:
        layer, x = torch.nn.Linear(c.C, c.C), torch.randn(4, c.C)
        plain, split = c.UPDATES[name](copy.deepcopy(layer), impl), c.UPDATES[name](layer, impl, spread)
        model = DistributedDataParallel(split.layer) if feature == "ddp" else split.layer
        for decay in (0.9, 0.8):
            plain.layer(x).square().mean().backward()
            model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
            for update in (plain, split):
                update.step(torch.tensor(decay))
        got, want = split.tensors(), plain.tensors()
    else:
        module = Loss(c.CASES[name](impl))
        x, split = module.module.draw(), copy.deepcopy(module)
        if name == "sigreg":
            split.module.group = dist.group.WORLD
        model = DistributedDataParallel(split) if feature == "ddp" else spread(split)
        module(x).backward()
        model(x[rank * len(x) // 2 : (rank + 1) * len(x) // 2]).backward()
        got, want = [p.grad for p in split.parameters()], [p.grad for p in module.parameters()]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g if feature == "ddp" else g.full_tensor(), w)


def run_rank(rank: int, folder: str) -> None:
    """All cells of DDP and FSDP2, one after the other; writes the error of each that fails."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, feature in c.CELLS:
        if feature in ("ddp", "fsdp"):
            try:
                share(name, feature, rank)
            except Exception:
                Path(folder, f"{name} {feature} {rank}").write_text(traceback.format_exc())
            dist.barrier()
    os._exit(0)  # threads of DDP or FSDP2 may outlive the interpreter, which then aborts now and then


@pytest.fixture(scope="module")
def two_processes():
    """A folder with the errors of both ranks."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run_rank, (folder,), nprocs=2)
        yield Path(folder)


@pytest.mark.skipif(INTERPRET, reason="is tested without the interpreter, which is slow in two processes")
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo")
@pytest.mark.parametrize("feature", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", c.NAMES)
def test_two_processes(name, feature, two_processes):
    if (name, feature) not in c.CELLS:
        pytest.skip(c.reason(name, feature))
    errors = [path.read_text() for path in two_processes.glob(f"{name} {feature} *")]
    assert not errors, "\n".join(errors)


# --- the table --------------------------------------------------------------------------------------------------------


def test_table_of_the_documentation_is_that_of_the_tests():
    found = c.BLOCK.search(c.PAGE.read_text())
    assert found and found[0] == found[1] + c.table() + found[2], "run python tests/kernels/compatibility.py"


def test_every_cell_has_a_test_or_a_reason():
    for name in c.NAMES:
        for feature in c.FEATURES:
            assert ((name, feature) in c.CELLS) != bool(c.reason(name, feature))
    tested = {"compile", "autocast", "checkpoint", "func", "export", "graph", "ddp", "fsdp"}
    assert tested == set(c.FEATURES)
