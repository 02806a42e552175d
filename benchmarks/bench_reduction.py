"""Benchmark a training step of several ranks: flat buckets between two CUDA graphs against DistributedDataParallel.

On a CPU two processes of one thread each run under gloo. A GPU runs a group of one rank under NCCL, captured, beside
the step of a single process, so that the difference is the cost of the flat buckets. DistributedDataParallel runs the
same kernels eagerly, because it cannot be split into graphs around its reduction; its bf16 variant is torch's hook
`bf16_compress_hook`. All take the same batches in turn, and a time counts only if their losses agree at every step.
`reduction_ms` is the time in collectives that backward does not hide.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from bench_step import MODEL
from conftest import left_out
from records import DEVICE, QUICK

WORKER = str(Path(__file__).with_name("rank_worker.py"))
WORLD_SIZE, BATCHES = (1, (256, 32)) if DEVICE == "cuda" else (2, (4,) if QUICK else (16,))
SECONDS = (4 if QUICK else 12) if DEVICE == "cuda" else (0.5 if QUICK else 20)


@pytest.mark.parametrize("batch", BATCHES)
def test_reduction(batch, record):
    found = run_ranks(WORLD_SIZE, batch)
    more: dict[str, dict] = {}
    for name, times in found["times"].items():
        median = sorted(times)[len(times) // 2]
        more[name] = {"model": MODEL, "batch": batch, "clips_per_second": 1e3 * batch / median}
        if name in found["reduction_ms"]:
            more[name]["reduction_ms"] = found["reduction_ms"][name]
    group = "a group of one rank, NCCL" if DEVICE == "cuda" else f"{WORLD_SIZE} ranks on one machine, gloo"
    peers = [name for name in found["times"] if not name.startswith("ajepa")]
    record("reduction", f"{MODEL}, batch {batch}, {group}", found["times"], plain="DDP", peers=peers, more=more)


def run_ranks(world_size: int, batch: int) -> dict:
    """Return what rank 0 of a group of new processes has measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= {"PYTHONPATH": os.pathsep.join(sys.path), "AJEPA_JOURNAL": ""}
    ranks = [
        subprocess.Popen([sys.executable, WORKER, str(SECONDS), str(batch)], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, env={**os.environ, **group, "RANK": str(rank)})
        for rank in range(world_size)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert not any(rank.returncode for rank in ranks), outputs[0][1] + outputs[-1][1]
    return json.loads(outputs[0][0].splitlines()[-1])


def test_left_out():
    left_out({"several GPUs": "NCCL between GPUs is not yet measured"})
    if DEVICE == "cpu":
        left_out({"DDP, bf16": "torch's hook needs NCCL"})
