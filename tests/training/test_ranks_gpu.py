"""Ranks on a GPU: a group of one under NCCL takes the captured step of a single process; two ranks need two GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_engine import make, run
from test_replicas import same, weights

from ajepa.training import replicas
from ajepa.training.distributed import ranks_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
CASES = [("ddp", "fp32"), ("ddp", "bf16"), ("zero1", "fp32"), ("zero1", "bf16")]


def group_of_one(argv) -> int:
    """Both graphs are replayed around NCCL's collectives, and an eager step reduces during backward."""
    torch.cuda.set_device(CUDA)
    dist.init_process_group("nccl", rank=0, world_size=1, init_method=f"file://{argv[0]}", device_id=CUDA)
    replicas.BUCKET_BYTES = 1 << 18
    mask = {"fixed_token_budget": True}
    for precision in ("fp32", "bf16"):
        plain, one = run(make(mask=mask, precision=precision), 8, 16, device=CUDA)
        for parallel, reduce in CASES:
            for graph in (True, False):
                cfg = make({"cuda_graph": graph, "reduce": reduce}, mask, precision=precision, parallel=parallel)
                ranks = ranks_of(cfg, 0, 1)
                losses, group = run(cfg, 8, 16, device=CUDA, ranks=ranks)
                case = (precision, parallel, reduce, graph)
                assert losses == pytest.approx(plain, rel=1e-2 if reduce == "bf16" else 1e-4), case
                assert not graph or (any(group.graphs.seen.values()) and any(group.update_graph.seen.values())), case
                assert graph or group.graphs is None, case
                assert ranks.times()["reduce"] > 0, case
                if case == ("fp32", "ddp", "fp32", True):
                    print("equal bits:", same(weights(one), weights(group)))
    dist.destroy_process_group()
    return 0


def start(command: list[str], **environment: str) -> subprocess.Popen:
    """A process of its own: CUDA may not be used in a fork of a process that has asked for it."""
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )  # fmt: skip


def call(function: str, argument: Path) -> list[str]:
    return ["-c", f"import sys, test_ranks_gpu; sys.exit(test_ranks_gpu.{function}([sys.argv[1]]))", str(argument)]


def test_a_group_of_one_takes_the_captured_step_of_a_single_process(tmp_path):
    process = start(call("group_of_one", tmp_path / "store"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "without a CUDA graph" not in output
    print(output, file=sys.stderr)


def two_on_one(argv) -> int:
    """What NCCL says of two ranks on one GPU."""
    rank = int(os.environ["RANK"])
    try:
        dist.init_process_group("nccl", rank=rank, world_size=2, init_method=f"file://{argv[0]}", device_id=CUDA)
        x = torch.ones(1, device=CUDA)
        dist.all_reduce(x)
        print(f"two ranks on one GPU work: the sum is {x.item():g}", flush=True)
    except RuntimeError as error:
        print(
            f"two ranks on one GPU do not work: {str(error).splitlines()[0]} {str(error).splitlines()[-1]}", flush=True
        )
    os._exit(0)


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs a machine with one GPU")
def test_two_ranks_on_one_gpu_are_refused(tmp_path):
    """The run says that each rank needs a GPU. NCCL's own answer is printed, whatever it is."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    command = ["-m", "ajepa.train", "--device", "cuda", "--out", str(tmp_path / "run")]
    ranks = [start(command, RANK=r, LOCAL_RANK=r, **group) for r in "01"]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    assert "2 ranks on a machine with 1 GPUs" in outputs[0]
    ranks = [start(call("two_on_one", tmp_path / "store"), RANK=r) for r in "01"]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert all("two ranks on one GPU" in output for output in outputs), outputs
    print(*outputs, file=sys.stderr)
