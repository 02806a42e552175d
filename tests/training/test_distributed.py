"""Several ranks on one CPU train as one process does, with replicated or sharded weights and any number of ranks."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

from ajepa import train
from ajepa.config import PRESETS, SIZES, ObjectiveConfig
from ajepa.model.masks import MaskSampler
from ajepa.training import distributed
from ajepa.training.distributed import joined
from ajepa.training.engine import Engine
from ajepa.training.ranks import ElsewhereError, Ranks, ReplicaError
from ajepa.utils.run_folder import checkpoints

# Two ranks sum gradients in a different order than one. After 8 float32 steps, every logged loss must agree within the
# first tolerance, and all weights together (likewise all moments) within the second in relative RMS. Single tensors may
# differ more: the gradient of a key bias is only rounding error, which Adam scales up to the size of any other step.
LOSS_TOLERANCE = 1e-5
RMS_TOLERANCE = 1e-4

# Block masks are ragged: ranks have different numbers of targets, so their losses must be weighted.
RUN = [*SMALL, "--mask", "block", "--block-targets", "2", "--compare-steps", "0", "--watch-every", "8"]
MICRO = ["--predictor-width", "16", "--predictor-heads", "2", "--predictor-depth", "1", "--target-layers", "1"]
RUN += ["--objective", "masked", "--precision", "fp32", "--init", "0.02", "--lr", "5e-4"]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"lr"' in line]


def final(folder, step=8):
    last = checkpoints(folder / "checkpoints")[-1]
    assert last.name == f"step_{step:08d}"
    return load_file(last / "model.safetensors"), load_file(last / "optimizer.safetensors")


def assert_same_run(folder, reference, count=4, step=8):
    """Compare the last `count` logged losses, the final weights and the optimizer state."""
    np.testing.assert_allclose(losses(folder)[-count:], losses(reference)[-count:], rtol=LOSS_TOLERANCE)
    for ours, theirs in zip(final(folder, step), final(reference, step), strict=True):
        ours, theirs = ({k: v for k, v in t.items() if not k.startswith("rng/")} for t in (ours, theirs))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].shape == value.shape for name, value in theirs.items())
        a, b = (torch.cat([t[name].flatten() for name in sorted(theirs)]) for t in (ours, theirs))
        assert (a - b).norm() <= RMS_TOLERANCE * b.norm()


@pytest.fixture(scope="module")
def alone(tones, forks, tmp_path_factory):
    """The folder of a run in one process with the whole batch."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    log = folder.with_suffix(".log")
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AJEPA_CACHE", cache)
        assert forks.run(["--data", str(tones), "--out", str(folder), *RUN], log) == 0, log.read_text()
    return folder


@pytest.fixture
def command(tones, tmp_path):
    return ["--data", str(tones), "--out", str(tmp_path / "run"), *RUN], tmp_path / "run"


@pytest.mark.parametrize("parallel", ["ddp", "zero1", "fsdp"])
def test_two_ranks_with_half_the_batch_are_one_rank_with_all_of_it(parallel, alone, command, forks):
    """The two micro-batches of a rank also have different numbers of targets."""
    argv, folder = command
    argv = [*argv, "--micro-batch", "1"]
    log = folder.with_suffix(".log")
    assert forks.run_ranks(2, [*argv, "--parallel", parallel], log) == [0, 0], log.with_suffix(".1").read_text()
    assert_same_run(folder, alone)
    rank_1_output = log.with_suffix(".1").read_text()
    assert not rank_1_output.strip(), rank_1_output  # only rank 0 prints
    assert "finished 8 steps" in log.with_suffix(".0").read_text()
    encoder, same = load_file(folder / "encoder.safetensors"), load_file(alone / "encoder.safetensors")
    assert encoder.keys() == same.keys()
    assert all(torch.allclose(encoder[name], value, atol=1e-4) for name, value in same.items())


def test_two_ranks_in_bf16_are_one_rank_in_bf16(command, forks):
    """Layers read bf16 copies of the weights. With fp8 targets, replicas agree on the scales, or saving would find them
    to differ; sharded weights are gathered before they are quantised. The loss is exact however gradients are sent."""
    argv, folder = command
    argv = [*argv, *MICRO, "--precision", "bf16", "--steps", "6", "--watch-every", "6", "--checkpoint-every", "6"]
    log, call = folder.with_suffix(".log"), "test_distributed:main_of_a_micro_model"
    assert forks.run(argv, log, call=call) == 0, log.read_text()
    fp8, bf16 = ["--target-precision", "fp8"], ["--reduce", "bf16"]
    for tolerance, parallel, options in (
        (2e-4, "ddp", []), (1e-3, "ddp", [*fp8, *bf16]), (2e-4, "zero1", bf16), (1e-3, "zero1", fp8),
        (1e-3, "fsdp", [*fp8, *bf16]),
    ):  # fmt: skip
        ranks = folder.with_name(parallel + "".join(options))
        chosen = [*argv, "--out", str(ranks), "--parallel", parallel, *options]
        assert forks.run_ranks(2, chosen, log, call=call) == [0, 0], log.with_suffix(".1").read_text()
        np.testing.assert_allclose(losses(ranks), losses(folder), rtol=tolerance)


def test_a_run_moves_between_numbers_of_ranks_and_ways_to_share_weights(alone, command, forks):
    """Three steps run in one process, three on two ranks with sharded weights, and two in one process again."""
    argv, folder = command
    log = folder.with_suffix(".log")
    shutil.copytree(alone, folder)

    def forget(*steps):
        (folder / "summary.json").unlink()
        for step in steps:
            shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")

    forget(6, 8)
    assert forks.run_ranks(2, [*argv, "--resume", "--parallel", "fsdp"], log) == [0, 0]
    assert "after step 3" in log.with_suffix(".0").read_text()
    assert_same_run(folder, alone, 2)
    forget(8)
    assert forks.run([*argv, "--resume"], log) == 0
    assert "after step 6" in log.read_text()
    assert_same_run(folder, alone, 1)


def test_a_signal_to_one_rank_stops_all_ranks_at_the_same_step(command, forks):
    argv, folder = command
    log = folder.with_suffix(".log")
    pids = forks.start_ranks(2, [*argv, "--steps", "100000"], log)
    while not (folder / "checkpoints" / "step_00000003").exists():
        time.sleep(0.01)
    os.kill(pids[1], signal.SIGTERM)
    assert [forks.wait(pid) for pid in pids] == [130, 130]
    step = int(re.search(r"stopped after step (\d+); continue", log.with_suffix(".0").read_text())[1])
    assert checkpoints(folder / "checkpoints")[-1].name == f"step_{step:08d}"


@pytest.mark.parametrize(
    ("world_size", "extra", "words"),
    [(3, [], "--batch-size 4"), (2, ["--data", "/no/such/folder"], "/no/such/folder")],
)
def test_a_run_that_cannot_start_prints_one_error_and_stops_all_ranks(world_size, extra, words, command, forks):
    argv, folder = command
    log = folder.with_suffix(".log")
    assert forks.run_ranks(world_size, [*argv, *extra], log) == [2] * world_size
    outputs = [log.with_suffix(f".{rank}").read_text() for rank in range(world_size)]
    assert outputs[0].startswith("error: ") and words in outputs[0] and outputs[0].count("\n") == 1
    assert not any(outputs[1:])


def non_finite_on_one_rank(argv):
    """The body of `test_a_step_that_is_non_finite_on_one_rank_is_skipped_by_all`, run by each rank."""
    cfg = replace(PRESETS["tiny"], parallel=argv[0], objective=ObjectiveConfig())
    with joined(cfg, torch.device("cpu")) as (ranks, device):
        engine = Engine(cfg, device, ranks)
        masks = MaskSampler(cfg.mask, cfg.front_end.grid, rank=ranks.rank, world_size=2)(0, 10, 2)
        pcm = torch.randint(-9999, 9999, (2, 32_000), dtype=torch.int16)
        lengths = torch.full((2,), 32_000, dtype=torch.int32)

        def step(share):
            before = [p.clone() for p in engine.trained]
            result = engine.step(pcm, lengths, masks, 300, share)
            same = all(torch.equal(p, old) for p, old in zip(engine.trained, before, strict=True))
            return ranks.gather((result.bad.item(), same))

        assert step(1.0) == [(0, False), (0, False)]
        assert step(math.nan if ranks.rank == 1 else 1.0) == [(1, True), (1, True)]
        ranks.check_alike(engine.model, 2)
        if argv[0] != "fsdp":
            with torch.no_grad():
                engine.model.target_encoder.norm.bias[0] += ranks.rank
            with pytest.raises(ElsewhereError if ranks.rank else ReplicaError, match="" if ranks.rank else "rank 1"):
                ranks.check_alike(engine.model, 2)
    return 0


@pytest.mark.parametrize("parallel", ["ddp", "zero1", "fsdp"])
def test_a_step_that_is_non_finite_on_one_rank_is_skipped_by_all(parallel, forks, tmp_path):
    log = tmp_path / "log"
    assert forks.run_ranks(2, [parallel], log, call="test_distributed:non_finite_on_one_rank") == [0, 0], [
        log.with_suffix(f".{rank}").read_text() for rank in range(2)
    ]


def test_a_rank_that_dies_ends_the_run_with_one_message_and_it_resumes(alone, command, forks):
    argv, folder = command
    slow = [*argv, "--checkpoint-every", "1", "--keep", "100"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ajepa.train",
         *slow],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    first = folder / "checkpoints" / "step_00000001"
    while not first.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    ranks = [int(pid) for pid in subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True).stdout.split()]
    os.kill(ranks[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert len(re.findall("^error: .*lost another rank.*--resume", output, re.MULTILINE)) == 1, output
    assert forks.run([*argv, "--resume"], folder.with_suffix(".log")) == 0
    assert_same_run(folder, alone, 1)


# Which rank kills itself before which call of which function, or so many seconds later. With "both", the other rank is
# killed at once, too; otherwise it must end by itself. Each phase of a step is there: capture and replay of both
# graphs, reduction, update, gathering of weights, save.
MOMENTS = """
both ajepa.train.open_corpus 1
1 ajepa.training.corpus.decode_clips 1
0 ajepa.training.engine.Engine.train 2
0 ajepa.training.checkpoint.write_synced 1
1 ajepa.train.joined 1
1 ajepa.training.graph.StepGraphs._capture 1
1 ajepa.training.ranks.Ranks.check_alike 1
0 ajepa.training.graph.StepGraphs._capture 2
1 ajepa.training.graph._Captured.load 1
0 ajepa.training.checkpoint.write_synced 6
0 ajepa.training.checkpoint.load_checkpoint 1
both ajepa.training.replicas.Replicas.exchange 2
0 ajepa.training.replicas.Replicas.distribute 2
1 ajepa.train.Engine.train 3 0.01
0 ajepa.training.graph._Captured.load 2
1 ajepa.training.engine.AdamWEMA.step 2
both ajepa.training.checkpoint.write_synced 4
1 ajepa.training.replicas.Bucket.pack 3
0 ajepa.training.replicas.Replicas._begin 2
1 ajepa.training.checkpoint._optimizer_tensors 2
0 ajepa.training.checkpoint._sync 2
both ajepa.train.write_encoder 1
""".strip().splitlines()


def main_of_a_micro_model(argv):
    """With steps that are captured and replayed, without pictures, and without the time that a launcher gets."""
    made = Engine.__init__

    def make(engine, *args):
        made(engine, *args)
        if not engine.ranks.alone:
            engine.use_graphs()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", (32, 1, 4))
        patch.setattr(Engine, "__init__", make)
        patch.setattr(distributed, "GRACE", 0.0)
        patch.setattr(train, "draw", lambda *_: None)
        return train.main(argv)


def test_ranks_hold_the_weights_of_one_rank_after_50_steps(tones, tmp_path, forks):
    """Two and four ranks, of every kind, most of whose steps are replayed."""
    argv = ["--data", str(tones), *RUN, *MICRO, "--steps", "50", "--checkpoint-every", "50", "--watch-every", "50"]
    argv += ["--log-every", "5", "--eval-clips", "8"]
    call = "test_distributed:main_of_a_micro_model"
    assert forks.run([*argv, "--out", str(tmp_path / "one")], tmp_path / "one.log", call=call) == 0
    for world_size, parallel in ((2, "ddp"), (2, "zero1"), (2, "fsdp"), (4, "zero1")):
        folder = tmp_path / f"{parallel}_{world_size}"
        log = folder.with_suffix(".log")
        codes = forks.run_ranks(world_size, [*argv, "--parallel", parallel, "--out", str(folder)], log, call=call)
        assert codes == [0] * world_size, log.with_suffix(".0").read_text()
        assert_same_run(folder, tmp_path / "one", 10, step=50)
        record = json.loads((folder / "metrics.jsonl").read_text().splitlines()[5])
        assert ("reduce_share" in record) == (parallel != "fsdp") and 0 < record.get("reduce_share", 0.5) < 1
        assert 0 < record["rank_wait_share"] < 1
        assert len(record["rank_wait_shares"]) == len(record["data_wait_shares"]) == world_size
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["ranks"] == world_size and summary["final_loss"] == pytest.approx(losses(folder)[-1])
        assert f"ranks                  {world_size}; " in log.with_suffix(".0").read_text()
        assert record["slowest_rank"] == record["rank_wait_shares"].index(min(record["rank_wait_shares"]))


@pytest.mark.parametrize("parallel", ["ddp", "zero1"])
def test_ranks_killed_at_22_moments_resume_to_the_same_bits(parallel, tones, tmp_path, forks):
    """Before the first step, in every phase of a step, and while saving. A rank that has lost the other says so and
    ends."""
    moments = MOMENTS if parallel == "ddp" else MOMENTS[11:14]
    if parallel == "zero1":
        moments = [moment.replace("Replicas.distribute", "Zero1.distribute") for moment in moments]
    argv = ["--data", str(tones), *SMALL, *MICRO, "--steps", "18", "--checkpoint-every", "1", "--keep", "100"]
    argv += ["--watch-every", "18", "--eval-clips", "8", "--compare-steps", "0", "--objective", "masked"]
    argv += ["--mask-ratio", "0.5", "0.5", "--parallel", parallel]  # one shape, so that all steps but two are replayed
    argv += ["--steps", "6", "--watch-every", "6"] if parallel == "zero1" else []
    whole, broken, call = tmp_path / "whole", tmp_path / "broken", "test_distributed:main_of_a_micro_model"
    assert forks.run_ranks(2, [*argv, "--out", str(whole)], tmp_path / "whole.log", call=call) == [0, 0]
    again, done = [*argv, "--out", str(broken), "--resume"], []
    for number, moment in enumerate(moments):
        victim, _, kill = moment.partition(" ")
        rank, log = int(victim == "1"), tmp_path / f"{number}.log"
        patience = ["--rank-timeout", "1" if "joined" in kill else "50"]
        pids = forks.start_ranks(2, [*again, *patience], log, call=call, KILL=kill, KILL_RANK=str(rank))
        assert forks.wait(pids[rank]) == -signal.SIGKILL, (moment, log.with_suffix(f".{rank}").read_text())
        if victim == "both":
            os.kill(pids[1 - rank], signal.SIGKILL)
        status, output = forks.wait(pids[1 - rank]), log.with_suffix(f".{1 - rank}").read_text()
        if victim != "both":
            assert status in (1, 2), (moment, status, output)
            assert output.count("error: ") == 1 and "Traceback" not in output, (moment, output)
        done.append(len(checkpoints(broken / "checkpoints")))
    if parallel == "ddp":
        assert len(done) == 22 and len(set(done)) > 8 and done[-1] == 18, done
    assert forks.run_ranks(2, again, tmp_path / "end.log", call=call) == [0, 0]
    for ours, theirs in zip(*(checkpoints(folder / "checkpoints") for folder in (broken, whole)), strict=True):
        for name in ("model.safetensors", "optimizer.safetensors"):
            a, b = load_file(ours / name), load_file(theirs / name)
            assert ours.name == theirs.name and a.keys() == b.keys()
            assert all(torch.equal(a[key], value) for key, value in b.items())
    assert (broken / "encoder.safetensors").read_bytes() == (whole / "encoder.safetensors").read_bytes()


def test_a_single_process_exchanges_nothing():
    ranks = Ranks()
    assert ranks.share(7, True) == 1.0 and ranks.stopping([1]) and not ranks.stopping([])
    assert ranks.gather("x") == ["x"] and ranks.first(lambda: 3) == 3
    assert not torch.distributed.is_initialized()
