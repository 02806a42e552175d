"""Kills, full disks and damaged checkpoints, each with a count: nothing is lost, nothing runs that should not."""

import errno
import json
import os
import pickle
import resource
import signal
import struct
import time
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

from ajepa import config, train
from ajepa.config import PRESETS, SIZES
from ajepa.model.masks import MaskSampler
from ajepa.training import checkpoint
from ajepa.training.checkpoint import load_checkpoint, save_checkpoint
from ajepa.training.engine import Engine
from ajepa.training.run_log import RunLog
from ajepa.utils.run_folder import CHECKPOINT_FILES, CheckpointError, checkpoints, read_verified

ENDLESS = ["--keep", "1000", "--checkpoint-every", "1", "--compare-steps", "0", "--eval-clips", "8"]


MICRO = ["--predictor-width", "16", "--predictor-heads", "2", "--predictor-depth", "1", "--target-layers", "1"]


def bits(path: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": value
        for name in ("model.safetensors", "optimizer.safetensors")
        for key, value in load_file(path / name).items()
    }


# --- a run that is killed, or cannot save -----------------------------------------------------------------------------


def test_killed_at_20_random_moments_every_resume_is_exact_to_the_bit(tones, tmp_path, forks):
    """Each start is killed and gets on by a few steps. Every checkpoint must be the undisturbed run's own."""
    argv = ["--data", str(tones), *SMALL, *ENDLESS, *MICRO, "--steps", "50", "--watch-every", "50"]
    micro = {"call": "test_faults:main_with_a_micro_model"}
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    began = time.monotonic()
    assert forks.run([*argv, "--out", str(whole)], log, **micro) == 0, log.read_text()
    seconds = time.monotonic() - began
    again = [*argv, "--out", str(broken), "--resume"]
    rng = np.random.default_rng(20)
    while_saving, resumed_at = 0, []
    for kill in range(20):
        saved = broken / "checkpoints"
        goal = len(checkpoints(saved)) + rng.integers(1, 4)
        resumed_at.append(len(checkpoints(saved)))
        pid = forks.start(again, log, **micro)
        if kill % 5 == 1:  # before it has made a step
            time.sleep(rng.uniform(0, 0.15) * seconds)
        else:
            while len(checkpoints(saved)) < goal or (kill % 5 == 3 and not list(saved.glob(".partial_*"))):
                time.sleep(0.0005)
            time.sleep(0 if kill % 5 == 3 else rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert forks.wait(pid) == -signal.SIGKILL, log.read_text()
        while_saving += bool(list(saved.glob(".partial_*")))
    assert while_saving >= 2 and len(set(resumed_at)) > 8, (while_saving, resumed_at)
    assert forks.run(again, log, **micro) == 0, log.read_text()
    ours, theirs = (checkpoints(folder / "checkpoints") for folder in (broken, whole))
    assert [path.name for path in ours] == [path.name for path in theirs] and len(ours) == 50
    for a, b in zip(map(bits, ours), map(bits, theirs), strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], value) for key, value in b.items())


def main_with_a_micro_model(argv):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return train.main(argv)


def main_with_little_room(argv):
    """In a process of its own: no file can grow beyond 2 MB, as on a disk that fills up."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
    return train.main(argv)


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_loses_nothing(small_run, tmp_path, forks):
    argv, folder = small_run
    log, argv = tmp_path / "log", [*argv, "--compare-steps", "0"]
    assert forks.run([*argv, "--steps", "4"], log) == 0, log.read_text()
    (folder / "summary.json").unlink()
    planned = config.load(folder / "config.json")
    config.save(replace(planned, optim=replace(planned.optim, steps=8)), folder / "config.json")
    before = {path.name: bits(path) for path in checkpoints(folder / "checkpoints")}
    log = tmp_path / "log2"
    assert forks.run([*argv, "--resume"], log, call="test_faults:main_with_little_room") == 2
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "could not save" in errors[0] and "Earlier checkpoints are intact" in errors[0]
    assert "Traceback" not in log.read_text()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == before.keys()
    for path in checkpoints(folder / "checkpoints"):
        now = bits(path)
        assert all(torch.equal(now[key], value) for key, value in before[path.name].items())
    assert forks.run([*argv, "--resume"], tmp_path / "log3") == 0
    assert (folder / "summary.json").exists()


@pytest.fixture(scope="module")
def engine():
    """As small as they come."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        cfg = PRESETS["tiny"]
        model = replace(cfg.model, predictor_width=16, predictor_depth=1, predictor_heads=2, target_layers=1)
        engine = Engine(replace(cfg, model=model), torch.device("cpu"))
        pcm, lengths = torch.ones(2, 32_000, dtype=torch.int16), torch.full((2,), 32_000, dtype=torch.int32)
        masks = MaskSampler(cfg.mask, cfg.front_end.grid)(0, 10, 2 * cfg.objective.count)
        engine.step(pcm, lengths, masks, 0)  # now there are moments
        yield engine


def shrink(patch) -> None:
    patch.setitem(SIZES, "tiny", (32, 1, 4))


STAGES = ["pathlib.Path.mkdir", "pathlib.Path.rename", "ajepa.training.checkpoint._sync"]
STAGES += [f"ajepa.training.checkpoint.write_synced:{n}" for n in range(4)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
def test_a_save_that_fails_at_any_point_leaves_the_one_before(engine, tmp_path, monkeypatch, stage, number):
    save_checkpoint(tmp_path, 1, engine, {}, keep=1)
    target, _, after = stage.partition(":")
    real, calls = checkpoint.write_synced, iter(range(9))

    def fail(*arguments, **_):
        if after and next(calls) < int(after):
            return real(*arguments)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(CheckpointError, match=os.strerror(number)):
            save_checkpoint(tmp_path, 2, engine, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert load_checkpoint(tmp_path / "step_00000001", engine)["step"] == 1
    save_checkpoint(tmp_path, 2, engine, {}, keep=1)  # and once there is room again
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


# --- checkpoints that others have damaged, or made --------------------------------------------------------------------


def test_400_damaged_checkpoints_are_all_refused(engine, tmp_path):
    path = save_checkpoint(tmp_path, 1, engine, {"loader": {}}, keep=1)
    whole = {name: (path / name).read_bytes() for name in (*CHECKPOINT_FILES, "checksums.json")}
    before = [p.clone() for p in engine.model.parameters()]
    rng = np.random.default_rng(0)
    refused = Counter()
    for i in range(400):
        name = list(whole)[i % 4]
        data = bytearray(whole[name])
        if i % 8 < 4:
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        else:
            del data[rng.integers(len(data)) :]
        (path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match="step_00000001"):
            load_checkpoint(path, engine)
        refused[name] += 1
        (path / name).write_bytes(whole[name])
    assert dict(refused) == dict.fromkeys(whole, 100)
    assert all(torch.equal(p, old) for p, old in zip(engine.model.parameters(), before, strict=True))
    assert load_checkpoint(path, engine)["step"] == 1


def reseal(path: Path, name: str, data: bytes) -> None:
    """As somebody would who means harm: the checksum is right."""
    (path / name).write_bytes(data)
    sums = json.loads((path / "checksums.json").read_text())
    sums[name] = sha256(data).hexdigest()
    (path / "checksums.json").write_text(json.dumps(sums))


class Bomb:
    def __init__(self, fuse: Path):
        self.fuse = str(fuse)

    def __reduce__(self):
        return os.mkdir, (self.fuse,)


def test_pickles_in_4_places_never_run(engine, tmp_path):
    fuse = tmp_path / "exploded"
    bomb = pickle.dumps(Bomb(fuse))
    for name in (*CHECKPOINT_FILES, "checksums.json"):
        path = save_checkpoint(tmp_path / name, 1, engine, {}, keep=1)
        torch.save(Bomb(fuse), path / "model.pt")
        if name == "checksums.json":
            (path / name).write_bytes(bomb)
        else:
            reseal(path, name, bomb)
        with pytest.raises(CheckpointError, match="step_00000001"):
            load_checkpoint(path, engine)
    assert not fuse.exists()
    pickle.loads(bomb)  # it does work
    assert fuse.exists()


def test_well_sealed_nonsense_is_refused_and_touches_nothing(engine, tmp_path):
    path = save_checkpoint(tmp_path / "good", 1, engine, {}, keep=1)
    good = read_verified(path)
    tensors = load_file(path / "optimizer.safetensors")
    assert "exp_avg/predictor.mask_token" in tensors
    shapes = {**tensors, "exp_avg/predictor.mask_token": torch.zeros(3)}
    no_rng = {**tensors, "rng/cpu/0": torch.zeros(5)}
    strangers = {**tensors, "exp_avg/nobody": torch.zeros(3)}
    nameless = {**tensors, "nothing": torch.zeros(3)}
    cases = [("state.json", text) for text in (b"[]", b"{}", b"null", b"[" * 100_000, b'{"format": 1}', b"\xff")]
    cases += [("optimizer.safetensors", checkpoint.save_bytes(t)) for t in (shapes, strangers, nameless, no_rng)]
    cases += [
        ("optimizer.safetensors", struct.pack("<Q", 2**63)),
        ("model.safetensors", b""),
        ("model.safetensors", b"{}"),
    ]
    cases += [("model.safetensors", good["optimizer.safetensors"])]
    before = [p.clone() for p in engine.model.parameters()]
    for name, data in cases:
        for other in CHECKPOINT_FILES:
            reseal(path, other, data if other == name else good[other])
        with pytest.raises(CheckpointError, match="step_00000001"):
            load_checkpoint(path, engine)
    assert all(torch.equal(p, old) for p, old in zip(engine.model.parameters(), before, strict=True))


# --- long runs --------------------------------------------------------------------------------------------------------


def long_run(argv):
    """In a process of its own: a run of a micro model; resident megabytes at every logged step into `argv[0]`."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        flush, seen = RunLog.flush, []

        def measured(self, step, *rest):
            flush(self, step, *rest)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((step, pages * resource.getpagesize() / 2**20))

        patch.setattr(RunLog, "flush", measured)
        status = train.main(argv[1:])
    Path(argv[0]).write_text(json.dumps(seen))
    return status


@pytest.mark.slow
def test_memory_is_flat_over_2000_steps(tones, tmp_path, forks):
    argv = ["--data", str(tones), "--out", str(tmp_path / "run"), *SMALL, "--steps", "2000", "--log-every", "100"]
    argv += ["--watch-every", "1000", "--checkpoint-every", "500", "--compare-steps", "0", "--batch-size", "1", *MICRO]
    argv += ["--objective", "masked"]
    result, log = tmp_path / "memory.json", tmp_path / "log"
    pid = forks.start([str(result), *argv], log, call="test_faults:long_run")
    assert forks.wait(pid, 900) == 0, log.read_text()
    seen = dict(json.loads(result.read_text()))
    assert max(seen) == 2000
    late = [megabytes for step, megabytes in seen.items() if step >= 1000]
    assert max(late) - min(late) < 10, seen
