"""Drills with several ranks, each with a count: hangs, restarts, other code or data, wrong clocks, full disks."""

import os
import platform
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file
from test_distributed import RUN as EXACT
from test_distributed import assert_same_run

import ajepa
from ajepa.config import PRESETS
from ajepa.data.index import build_index
from ajepa.training import alike, distributed
from ajepa.training.alike import UnlikeError
from ajepa.training.ranks import ElsewhereError, Ranks
from ajepa.utils.run_folder import checkpoints, steps_of

CALL = {"call": "test_distributed:main_of_a_micro_model"}
MICRO = ["--predictor-width", "16", "--predictor-heads", "2", "--predictor-depth", "1", "--target-layers", "1"]
RUN = [*SMALL, *MICRO, "--checkpoint-every", "1", "--keep", "100", "--watch-every", "8", "--eval-clips", "8"]
RUN += ["--compare-steps", "0", "--objective", "masked", "--log-to", "none"]


@pytest.fixture(scope="module")
def argv(tones) -> list[str]:
    return ["--data", str(tones), *RUN]


@pytest.fixture(scope="module")
def whole(argv, forks, tmp_path_factory) -> Path:
    """The folder of an undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    log = folder.with_suffix(".log")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AJEPA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert forks.run_ranks(2, [*argv, "--out", str(folder)], log, **CALL) == [0, 0], outputs(log, 2)
    return folder


def outputs(log: Path, world_size: int) -> list[str]:
    return [log.with_suffix(f".{rank}").read_text() for rank in range(world_size)]


def bits(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = ("model.safetensors", "optimizer.safetensors")
    return {f"{name}/{key}": value for name in files for key, value in load_file(checkpoint / name).items()}


def assert_same_bits(folder: Path, reference: Path) -> None:
    """Every checkpoint of `folder` is the one of `reference` after the same step, and so are its encoder and losses."""
    ours, theirs = ({p.name: p for p in checkpoints(run / "checkpoints")} for run in (folder, reference))
    assert max(ours) == max(theirs)
    for name, path in ours.items():
        a, b = bits(path), bits(theirs[name])
        assert a.keys() == b.keys() and all(torch.equal(a[key], value) for key, value in b.items()), name
    assert (folder / "encoder.safetensors").read_bytes() == (reference / "encoder.safetensors").read_bytes()


def assert_one_error(said: list[str], *words: str) -> str:
    """The only error that the ranks print, which must hold `words`. TensorBoard's thread prints a traceback before."""
    errors = [line for text in said for line in text.splitlines() if "error: " in line]
    assert len(errors) == 1 and all(word in errors[0] for word in words), said
    assert all("Traceback" not in text or "tensorboard" in errors[0] for text in said), said
    return errors[0]


# --- ranks that were started differently ------------------------------------------------------------------------------


def main_with_other_code(argv):
    """Rank 1 has another version of the kernels."""
    from test_distributed import main_of_a_micro_model

    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(alike.ajepa_kernels, "__version__", "0.0.1")
        return main_of_a_micro_model(argv)


def main_with_other_files(argv):
    """`argv[0]` is a folder with a working folder for each rank."""
    from test_distributed import main_of_a_micro_model

    os.chdir(Path(argv[0]) / os.environ["RANK"])
    return main_of_a_micro_model(argv[1:])


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (["--steps", "16"], ["has other settings", "--steps 16 instead of 8", "same flags"]),
        (["--lr", "0.1", "--parallel", "fsdp"], ["--lr 0.1 instead of", "--parallel 'fsdp' instead of 'ddp'"]),
        (["--data", "elsewhere"], ["has other settings", "--data 'elsewhere' instead of"]),
        ("code", ["runs other code", "ajepa_kernels 0.0.1 ", " instead of ", "install the same"]),
    ],
)
def test_4_ranks_with_other_settings_or_code_are_refused(own, words, argv, tmp_path, forks):
    out, log, call = tmp_path / "run", tmp_path / "log", dict(CALL)
    if own == "code":
        own, call = [], {"call": "test_rank_drills:main_with_other_code"}
    assert forks.run_ranks(2, [*argv, "--out", str(out)], log, own={1: own}, **call) == [2, 2], outputs(log, 2)
    host = platform.node()
    assert_one_error(outputs(log, 2), f"error: rank 1 ({host}) ", f"than rank 0 ({host}): ", *words)
    assert not out.exists()


@pytest.mark.parametrize("flag", ["--data", "--eval-data"])
def test_2_ranks_that_find_other_files_are_refused(flag, argv, tones, tmp_path, forks):
    """The same path leads to other files on the machine of rank 1: one recording is missing there."""
    log, out = tmp_path / "log", tmp_path / "run"
    for rank in ("0", "1"):
        shutil.copytree(tones, tmp_path / rank / "tones")
    (tmp_path / "1" / "tones" / "low" / "00.wav").unlink()
    call = {"call": "test_rank_drills:main_with_other_files"}
    command = [str(tmp_path), *argv, flag, "tones", "--out", str(out)]
    assert forks.run_ranks(2, command, log, **call) == [2, 2], outputs(log, 2)
    words = f"{flag} 39 recordings (", "instead of 40 recordings (", "AJEPA_CACHE"
    assert_one_error(outputs(log, 2), "rank 1 (", ") finds other recordings than rank 0 (", *words)
    assert not (out / "metrics.jsonl").exists()


def test_what_belongs_to_a_machine_may_differ(argv, whole, tones, tmp_path, forks):
    """Threads, and the folder on which a relative path is based."""
    out, log = tmp_path / "run", tmp_path / "log"
    for rank in ("0", "1"):
        shutil.copytree(tones, tmp_path / rank / "tones")
    own = {1: ["--loader-threads", "2", "--device", "cpu", "--threads", "1"]}
    call = {"call": "test_rank_drills:main_with_other_files"}
    command = [str(tmp_path), *argv, "--data", "tones", "--out", str(out)]
    assert forks.run_ranks(2, command, log, own=own, **call) == [0, 0], outputs(log, 2)
    assert_same_bits(out, whole)


class Answers(Ranks):
    """Rank `rank` of as many as there are other answers; `gather` puts its own before them."""

    def __init__(self, rank, *others):
        super().__init__(rank, 1 + len(others))
        self.others = others

    def gather(self, value):
        return [value, *self.others]


def test_an_error_names_ranks_machines_and_what_differs():
    mine = alike.describe_code()
    old = ("b", {**mine, "torch": "2.9.0"})
    with pytest.raises(UnlikeError) as raised:
        alike.check_code(Answers(0, ("a", mine), old, old, ("c", {**mine, "Python": "3.9"})))
    ours = f"{torch.__version__}; rank 4 (c) runs other code than rank 0 ({platform.node()}): Python 3.9 instead of "
    assert str(raised.value).startswith(f"rank 2, 3 (b) runs other code than rank 0 ({platform.node()}): torch 2.9.0")
    assert ours in str(raised.value)
    with pytest.raises(UnlikeError, match="; and 2 others; install"):
        alike.check_code(Answers(0, *((host, {}) for host in "abcde")))
    with pytest.raises(ElsewhereError):
        alike.check_code(Answers(1, old))
    alike.check_code(Answers(0, ("b", mine), ("c", mine)))


def test_code_is_recognised_by_its_files_and_versions(tmp_path, monkeypatch):
    """A single process asks for neither."""
    before = alike.describe_code()
    shutil.copytree(ajepa.__path__[0], tmp_path / "ajepa", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(ajepa, "__path__", [str(tmp_path / "ajepa")])
    assert alike.describe_code() == before
    (tmp_path / "ajepa" / "train.py").open("a").write("\n")
    edited = alike.describe_code()
    assert edited.pop("ajepa") != before.pop("ajepa") and edited == before
    monkeypatch.setattr(alike, "describe_code", None)
    alike.check_code(Ranks())
    alike.check_settings(Ranks(), PRESETS["tiny"])
    alike.check_data(Ranks(), None, None)


# --- ranks that hang --------------------------------------------------------------------------------------------------

# Where rank 1 stops for good: before it computes a step, after it has exchanged gradients, and before it saves.
STOPS = ["ajepa.train.Engine.train 3", "ajepa.training.engine.AdamWEMA.step 4", "ajepa.train.save_checkpoint 3"]


@pytest.mark.parametrize("stop", STOPS)
def test_3_ranks_that_hang_are_given_up_and_the_run_resumes_to_the_same_bits(stop, argv, whole, tmp_path, forks):
    out, log = tmp_path / "run", tmp_path / "log"
    again = [*argv, "--out", str(out), "--resume"]
    pids = forks.start_ranks(2, [*again, "--rank-timeout", "3"], log, HANG=stop, HANG_RANK="1", **CALL)
    assert forks.wait(pids[0]) == 1, outputs(log, 2)
    assert_one_error(outputs(log, 2), "error: rank 0 lost another rank, or waited more than --rank-timeout 3 s")
    os.kill(pids[1], signal.SIGKILL)
    assert forks.wait(pids[1]) == -signal.SIGKILL
    assert 0 < len(checkpoints(out / "checkpoints")) < 8
    assert forks.run_ranks(2, again, tmp_path / "log2", **CALL) == [0, 0], outputs(tmp_path / "log2", 2)
    assert_same_bits(out, whole)


def test_2_waits_of_unknown_length_are_not_cut_short(argv, whole, tmp_path, forks):
    """Rank 0 indexes for longer than --rank-timeout, and saves for longer."""
    out, log = tmp_path / "run", tmp_path / "log"
    slow = "ajepa.training.corpus.build_indexes 1 3.5, ajepa.training.checkpoint.write_synced 5 3.5"
    command = [*argv, "--out", str(out), "--rank-timeout", "3"]
    assert forks.run_ranks(2, command, log, HANG=slow, HANG_RANK="0", **CALL) == [0, 0], outputs(log, 2)
    assert_same_bits(out, whole)


# --- clocks that are wrong --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, where another process is about to write an index."""
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def unfinished(cache: Path, data: Path) -> Path:
    """What another process has written so far of an index of `data`."""
    build_index(data, progress=False)
    (index,) = (cache / "index").glob("*.jsonl")
    index.unlink()
    aside = index.with_suffix(".0123abcd")
    aside.write_text("being written")
    return aside


@pytest.mark.parametrize("skew", ["3601", "-3601"])
def test_2_clocks_that_are_off_by_an_hour_change_nothing(skew, argv, whole, tones, cache, tmp_path, forks):
    """The clock of rank 0 is wrong until all ranks are killed, and that of rank 1 after their new start. Files are as
    old as the clocks say, and no verdict, lock, checkpoint or partial file counts as stale."""
    out, log, theirs = tmp_path / "run", tmp_path / "log", unfinished(cache, tones)
    again, kill = [*argv, "--out", str(out), "--resume"], {"KILL": "ajepa.train.Engine.train 5"}
    status = forks.run_ranks(2, again, log, SKEW=skew, SKEW_RANK="0", **kill, **CALL)
    assert status == [-signal.SIGKILL] * 2 and (out / ".lock").exists(), outputs(log, 2)
    (index,) = (cache / "index").glob("*.jsonl")
    before = index.stat()
    assert abs(before.st_mtime - time.time() - float(skew)) < 1800  # so the clock was wrong
    log = tmp_path / "log2"
    assert forks.run_ranks(2, again, log, SKEW=skew, SKEW_RANK="1", **CALL) == [0, 0], outputs(log, 2)
    assert "continuing after step 4" in outputs(log, 2)[0] and "warning" not in "".join(outputs(log, 2))
    assert (index.stat().st_ino, index.stat().st_mtime) == (before.st_ino, before.st_mtime) and theirs.exists()
    assert_same_bits(out, whole)


# --- a shared disk that is full ---------------------------------------------------------------------------------------

# Files of a run that can no longer be written, and what the error must name.
FULL = {
    "the lock": ("*/.lock.*", [".lock"]),
    "config.json": ("*/.config.json.partial", ["config.json"]),
    "skipped.tsv": ("*/.skipped.tsv.partial", ["skipped.tsv"]),
    "the metrics of a resumed run": ("*/.metrics.jsonl.partial", ["metrics.jsonl"]),
    "metrics.jsonl": ("*/metrics.jsonl", ["metrics.jsonl"]),
    "tensorboard": ("*/events.out.*", ["tensorboard"]),
    "a checkpoint": ("*/.partial_step_00000006/optimizer.safetensors", ["could not save", "step_00000006", "intact"]),
    "the encoder": ("*/.encoder.safetensors.partial", ["encoder.safetensors"]),
    "the summary": ("*/.summary.json.partial", ["summary.json"]),
}


def test_9_files_that_a_full_disk_refuses_end_all_ranks_with_one_error_each(argv, whole, tmp_path, forks):
    """One start after the other finds room for one file more, and the last one finishes the run to the same bits. A
    folder called "igloo" shows that no path makes an error look like one of gloo, which would mean a lost rank."""
    out = tmp_path / "igloo" / "run"
    shutil.copytree(whole, out)
    for name in ("summary.json", "encoder.safetensors"):
        (out / name).unlink()
    for path in checkpoints(out / "checkpoints")[3:]:
        shutil.rmtree(path)
    before = {path.name: bits(path) for path in checkpoints(out / "checkpoints")}
    again = [*argv, "--out", str(out), "--resume", "--log-to"]
    for what, (pattern, words) in FULL.items():
        log, logger = tmp_path / what, "tensorboard" if what == "tensorboard" else "none"
        status = forks.run_ranks(2, [*again, logger], log, FULL=pattern, **CALL)
        assert status == ([2, 0] if what in ("the encoder", "the summary") else [2, 2]), outputs(log, 2)  # see train()
        assert_one_error(outputs(log, 2), "No space left on device", *words)
        left = {path.name: bits(path) for path in checkpoints(out / "checkpoints")}
        assert all(torch.equal(left[name][key], x) for name, tensors in before.items() for key, x in tensors.items())
    log = tmp_path / "log"
    assert forks.run_ranks(2, [*again, "none"], log, **CALL) == [0, 0], outputs(log, 2)
    assert_same_bits(out, whole)
    ours, theirs = ((run / "metrics.jsonl").read_bytes().count(b"\n") for run in (out, whole))
    assert ours == theirs and not [path for path in out.iterdir() if path.name.startswith(".")]


def test_a_full_cache_costs_a_second_check_of_the_files(argv, whole, cache, tmp_path, forks):
    out, log = tmp_path / "run", tmp_path / "log"
    assert forks.run_ranks(2, [*argv, "--out", str(out)], log, FULL=f"{cache}/*", **CALL) == [0, 0], outputs(log, 2)
    said = "".join(outputs(log, 2))
    assert said.count(f"the index cache was not written ({cache}/index/") == 2 and "error: " not in said
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert_same_bits(out, whole)


# --- launches that start the ranks again ------------------------------------------------------------------------------


def torchrun(argv):
    """`torchrun argv -m ajepa.train ...` with workers that are forked, as they then need not import torch again.

    Each worker leaves its process id in the folder PIDS, in a file named after the start and the rank.
    """
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    options = run.parse_args(argv)
    config, _, _ = run.config_from_args(options)
    config.start_method, config.monitor_interval = "fork", 0.05
    elastic_launch(config, worker)(options.training_script_args)
    return 0


def worker(argv):
    from test_distributed import main_of_a_micro_model

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a process of its own
    start, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    (Path(os.environ["PIDS"]) / f"{start}.{rank}").write_text(str(os.getpid()))
    status = main_of_a_micro_model(argv)
    if status:
        os._exit(status)


def test_2_killed_ranks_are_started_again_and_the_run_finishes_by_itself(argv, whole, tmp_path, forks):
    """First rank 1 is killed, and then rank 0, whose lock the next rank 0 takes over."""
    out, log, pids = tmp_path / "run", tmp_path / "log", tmp_path / "pids"
    pids.mkdir()
    launch = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--nproc-per-node=2", "--max-restarts=3"]
    launch += ["-m", "ajepa.train"]
    command = [*launch, *argv, "--out", str(out), "--resume"]
    pid = forks.start(command, log, call="test_rank_drills:torchrun", PIDS=str(pids))
    for start, (rank, step) in enumerate([(1, 2), (0, 5)]):
        end = time.monotonic() + 60
        while not (out / "checkpoints" / f"step_{step:08d}").exists() or not (pids / f"{start}.{rank}").exists():
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.005)
        os.kill(int((pids / f"{start}.{rank}").read_text()), signal.SIGKILL)
    assert forks.wait(pid) == 0, log.read_text()
    assert sorted(path.name for path in pids.iterdir()) == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]
    said = log.read_text()
    assert said.count("continuing after step") == 2 and said.count("finished 8 steps") == 1, said
    assert said.count("error: ") == 2 == said.count("lost another rank"), said
    assert_same_bits(out, whole)


def test_3_starts_with_one_store_meet_under_3_words():
    """Rank 0 comes last, so the others find what earlier starts have left."""
    store, words = torch.distributed.HashStore(), []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(distributed._meet, store, rank, 3, 20.0) for rank in (2, 1)]
            time.sleep(0.05)
            word = distributed._meet(store, 0, 3, 20.0)
            assert [other.result() for other in others] == [word] * 2
            words.append(word)
    assert len(set(words)) == 3
    with pytest.raises(RuntimeError, match="only ranks of an earlier start"):
        distributed._meet(store, 1, 3, 0.1)


def test_a_run_goes_from_2_ranks_to_4_and_to_1(tones, tmp_path, forks):
    """It is killed in its fourth step and in its seventh, and agrees with a run of one process."""
    command, log = ["--data", str(tones), *EXACT, *MICRO, "--log-to", "none"], tmp_path / "log"
    out, alone = tmp_path / "run", tmp_path / "alone"
    assert forks.run([*command, "--out", str(alone)], log, **CALL) == 0, log.read_text()
    again, kill = [*command, "--out", str(out), "--resume"], {"KILL": "ajepa.train.Engine.train 4"}
    for world_size, saved in ((2, [3]), (4, [3, 6])):
        log = tmp_path / f"log{world_size}"
        assert forks.run_ranks(world_size, again, log, **kill, **CALL) == [-signal.SIGKILL] * world_size
        assert [steps_of(path) for path in checkpoints(out / "checkpoints")] == saved, outputs(log, world_size)
    assert forks.run(again, tmp_path / "log1", **CALL) == 0, (tmp_path / "log1").read_text()
    assert "continuing after step 6" in (tmp_path / "log1").read_text()
    assert_same_run(out, alone)
