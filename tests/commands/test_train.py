"""The program as a user meets it: a run to its end, interruption and exact resume, wrong input."""

import contextlib
import functools
import json
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

from ajepa.config import PRESETS, ObjectiveConfig
from ajepa.model.masks import MaskSampler
from ajepa.train import main
from ajepa.training import compare
from ajepa.training.checkpoint import load_checkpoint, load_latest, save_checkpoint
from ajepa.training.engine import Engine
from ajepa.utils.json_files import write_json
from ajepa.utils.run_folder import CheckpointError, checkpoints, read_metrics, read_verified

SUMMARY_KEYS = {
    "steps", "clips_per_second", "data_wait_share", "final_loss", "target_variance", "effective_rank", "knn_accuracy",
    "knn_accuracy_untrained", "knn_accuracy_log_mel", "plain_clips_per_second", "speedup_over_plain", "files_skipped",
}  # fmt: skip
TINY = replace(PRESETS["tiny"], objective=ObjectiveConfig())  # with the masked objective


def weights(folder):
    last = checkpoints(folder / "checkpoints")[-1]
    return {name: load_file(last / name) for name in ("model.safetensors", "optimizer.safetensors")}


def logged(folder):
    """What the log says of the training at each step."""
    return [{key: r[key] for key in ("step", "loss", "grad_norm", "lr", "bad_steps")} for r in read_metrics(folder)
            if "lr" in r]  # fmt: skip


def assert_same_bits(a, b):
    for name in a:
        assert a[name].keys() == b[name].keys()
        for key in a[name]:
            assert torch.equal(a[name][key], b[name][key]), key


@pytest.fixture(scope="module")
def finished(tones, tmp_path_factory):
    """A small run that was never interrupted."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(["--data", str(tones), "--out", str(folder), *SMALL]) == 0
    return folder


def test_a_run_leaves_everything_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 8 and summary["files_skipped"] == 0
    assert summary["clips_per_second"] > 0 and 0 <= summary["data_wait_share"] < 1
    assert summary["speedup_over_plain"] > 0
    assert summary["knn_accuracy_log_mel"] > 0.85  # low against high tones, of which ten are classified
    config = json.loads((finished / "config.json").read_text())
    assert config["optim"]["steps"] == 8 and config["front_end"]["n_frames"] == 16
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "lr" in r] == [2, 4, 6, 8]
    assert [r["step"] for r in records if "target_variance" in r] == [4, 8]
    for name in ("curves.png", "masks.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    assert any((finished / "tensorboard").iterdir())
    assert len(checkpoints(finished / "checkpoints")) == 3
    assert (finished / "skipped.tsv").read_text() == "path\treason\n"


def test_exported_encoder_is_the_ema_target_encoder(finished):
    encoder = load_file(finished / "encoder.safetensors")
    model = load_file(checkpoints(finished / "checkpoints")[-1] / "model.safetensors")
    assert encoder.keys() == {k.split(".", 1)[1] for k in model if k.startswith("target_encoder.")}
    assert all(torch.equal(value, model[f"target_encoder.{key}"]) for key, value in encoder.items())


def test_the_same_command_trains_the_same_weights(finished, small_run):
    argv, folder = small_run
    assert main(argv) == 0
    assert_same_bits(weights(folder), weights(finished))


def run_process(argv):
    return subprocess.Popen(
        [sys.executable, "-m", "ajepa.train", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: os.nice(15),  # the test must see what happens before the next thing does
    )


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None and not condition():
            pytest.fail(f"ended early:\n{process.communicate()[0]}")
        assert time.monotonic() < end, "nothing happened in time"
        time.sleep(0.01)


@pytest.mark.parametrize("first", [3, 6])
def test_a_killed_run_resumes_to_the_same_bits(finished, small_run, first):
    argv, folder = small_run
    process = run_process(argv)
    wait_for(lambda: (folder / "checkpoints" / f"step_{first:08d}").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "summary.json").exists(), "the run ended before it could be killed"
    assert main([*argv, "--resume"]) == 0
    assert_same_bits(weights(folder), weights(finished))
    assert logged(folder) == logged(finished)


def test_ctrl_c_saves_and_resume_continues_to_the_same_bits(finished, small_run):
    argv, folder = small_run
    slow = [*argv, "--checkpoint-every", "1000"]  # only the interruption saves
    process = run_process(slow)
    wait_for(lambda: '"step": 2' in (folder / "metrics.jsonl").read_text() if folder.exists() and
             (folder / "metrics.jsonl").exists() else False, process)  # fmt: skip
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "--resume" in output and "Traceback" not in output
    assert len(checkpoints(folder / "checkpoints")) == 1
    assert main([*argv, "--resume"]) == 0
    assert_same_bits(weights(folder), weights(finished))
    assert logged(folder) == logged(finished)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_closed_terminal_saves_and_ends_even_if_it_signals_twice(small_run, forks, number):
    argv, folder = small_run
    log = folder.with_suffix(".log")
    pid = forks.start([*argv, "--steps", "100000", "--checkpoint-every", "100000"], log)
    while not read_metrics(folder):
        time.sleep(0.01)
    os.kill(pid, number)
    os.kill(pid, number)
    assert forks.wait(pid) == 130
    step = int(re.findall(r"stopped after step (\d+); continue with --out \S+ --resume", log.read_text())[0])
    assert [path.name for path in checkpoints(folder / "checkpoints")] == [f"step_{step:08d}"]
    assert not (folder / ".lock").exists()


def test_a_second_process_in_a_run_folder_gets_one_message(small_run, forks, capsys):
    argv, folder = small_run
    pid = forks.start([*argv, "--steps", "100000"], folder.with_suffix(".log"))
    while not checkpoints(folder / "checkpoints"):
        time.sleep(0.01)
    for option in ("--resume", "--overwrite"):
        assert main([*argv, "--steps", "100000", option]) == 2
        error = capsys.readouterr().err.strip()
        assert f"{folder} is in use by process {pid}" in error and "\n" not in error
    os.kill(pid, signal.SIGKILL)
    forks.wait(pid)
    saved = {path.name for path in folder.iterdir()}
    assert ".lock" in saved and main([*argv, "--steps", "100001", "--resume"]) == 2  # not the lock is in the way
    assert "cannot be extended" in capsys.readouterr().err


def test_metrics_are_cut_where_the_checkpoint_was_saved_and_edits_are_told(finished, small_run, capsys):
    argv, folder = small_run
    shutil.copytree(finished, folder)
    metrics = folder / "metrics.jsonl"
    whole = metrics.read_text()

    def again():
        (folder / "summary.json").unlink(missing_ok=True)
        for path in checkpoints(folder / "checkpoints")[-1:]:
            shutil.rmtree(path)
        assert main([*argv, "--resume", "--compare-steps", "0"]) == 0
        return capsys.readouterr().err

    metrics.write_text(whole + '{"step": 7, "loss": 1}\n')
    assert "metrics.jsonl" not in again()
    assert logged(folder) == logged(finished)
    lines = whole.splitlines()
    metrics.write_text("\n".join([lines[0].replace("2", "1", 1), "[]", "null", "[" * 100_000, *lines[1:]]) + "\n\xff{")
    assert "metrics.jsonl was changed or damaged since the checkpoint" in again()
    assert len(logged(folder)) == 4 and logged(folder)[1:] == logged(finished)[1:]


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(finished, small_run, capsys):
    argv, folder = small_run
    process = run_process(argv)
    wait_for(lambda: (folder / "checkpoints" / "step_00000006").exists(), process)
    process.kill()
    process.wait()
    newest = checkpoints(folder / "checkpoints")[-1] / "model.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert main([*argv, "--resume"]) == 0
    assert str(newest) in capsys.readouterr().err
    assert_same_bits(weights(folder), weights(finished))


def test_a_run_killed_after_its_last_step_is_finished_by_resume(finished, tones, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("summary.json", "encoder.safetensors", "curves.png", "masks.png"):
        (folder / name).unlink()
    assert main(["--data", str(tones), "--out", str(folder), *SMALL, "--resume"]) == 0
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, finished))
    for key in ("final_loss", "knn_accuracy", "target_variance"):
        assert ours[key] == theirs[key]
    assert ours["clips_per_second"] > 0
    encoder, same = (load_file(f / "encoder.safetensors") for f in (folder, finished))
    assert all(torch.equal(encoder[key], value) for key, value in same.items())
    assert (folder / "masks.png").exists()


def test_resuming_a_finished_run_says_so(finished, tones, capsys):
    before = (finished / "summary.json").read_bytes()
    assert main(["--data", str(tones), "--out", str(finished), *SMALL, "--resume"]) == 0
    assert "finished" in capsys.readouterr().out
    assert (finished / "summary.json").read_bytes() == before


def test_bad_files_are_skipped_listed_and_counted(tones, tmp_path, small_run):
    argv, folder = small_run
    data = tmp_path / "mixed data\nset"
    shutil.copytree(tones, data)
    (data / "low" / "empty.wav").touch()
    (data / "low" / "garbage.flac").write_bytes(np.random.default_rng(0).bytes(5000))
    (data / "high" / "cut.wav").write_bytes((tones / "high" / "00.wav").read_bytes()[:3000])
    argv[1] = str(data)
    assert main(argv) == 0
    assert json.loads((folder / "summary.json").read_text())["files_skipped"] == 3
    listed = (folder / "skipped.tsv").read_text().splitlines()[1:]
    assert len(listed) == 3 and all("\t" in line for line in listed)
    assert {line.split("\t")[0].rsplit("/", 1)[1] for line in listed} == {"empty.wav", "garbage.flac", "cut.wav"}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preset", "huge"], ["--preset huge", "audio-jepa"]),
        (["--data", "/no/such/folder"], ["/no/such/folder"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--steps", "10"], ["--warmup-steps", "--steps 10"]),
        (["--mask-ratio", "0.9", "0.2"], ["--mask-ratio"]),
        (["--mask-ratio", "0.5", "1.0"], ["--mask-ratio"]),
        (["--clip-seconds", "0.01"], ["--clip-seconds", "--win-length"]),
        (["--clip-seconds", "9"], ["--clip-seconds", "--n-frames"]),
        (["--target-layers", "9"], ["--target-layers 9"]),
        (["--predictor-heads", "5"], ["--predictor-width"]),
        (["--ema-start", "1.5"], ["--ema-start"]),
        (["--min-context", "60"], ["--min-context"]),
        (["--compare", "--resume"], ["--compare"]),
        (["--out", "/proc/nowhere"], ["--out /proc/nowhere"]),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_in_one_line_that_names_it(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    assert all(word in error for word in words), error


@pytest.mark.parametrize("argv", [["--no-such-flag", "1"], ["--steps", "many"], ["--mask", "spiral"]])
def test_unknown_flags_and_values_are_refused_by_name(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert argv[0].lstrip("-") in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_cuda_is_refused_where_there_is_none(capsys):
    assert main(["--device", "cuda"]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten_nor_resumed_with_other_settings(finished, tones, capsys):
    argv = ["--data", str(tones), "--out", str(finished), *SMALL]
    assert main(argv) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*argv, "--resume", "--lr", "0.5"]) == 2
    assert "--lr 0.5" in capsys.readouterr().err


def test_ways_out_of_a_folder_that_holds_a_run_are_named(finished, tones, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    argv = ["--data", str(tones), "--out", str(folder), *SMALL, "--compare-steps", "0", "--lr", "1e-4"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert all(way in error for way in ("--resume", "--overwrite", "another --out"))
    assert main([*argv, "--resume"]) == 2
    error = capsys.readouterr().err
    assert all(way in error for way in ("leave out --lr", "--overwrite", "--init-from"))
    assert main([*argv, "--overwrite", "--resume"]) == 2
    assert main([*argv, "--overwrite"]) == 0
    assert "preset tiny, 8 steps planned, 8 done" in capsys.readouterr().out
    kept = next(tmp_path.glob("run.old-*"))
    assert_same_bits(weights(kept), weights(finished))
    assert json.loads((folder / "config.json").read_text())["optim"]["lr"] == 1e-4


def test_a_run_that_failed_before_its_first_step_is_in_nobodys_way(small_run, capsys):
    argv, folder = small_run
    assert main([*argv, "--init-from", str(folder / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err and (folder / "config.json").exists()
    assert main([*argv, "--steps", "3", "--compare-steps", "0"]) == 0


def test_checkpoints_without_a_configuration_are_not_continued(finished, small_run, capsys):
    argv, folder = small_run
    shutil.copytree(finished, folder)
    (folder / "config.json").unlink()
    for options in ([], ["--resume"], ["--overwrite"]):
        assert main([*argv, *options]) == 2
        assert "checkpoints without the config.json of their run: restore that file" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished.iterdir()} - {"config.json"}


@pytest.mark.parametrize("content", [b"", b"{", b'{"steps": 8}', b"[" * 100_000, b"\xff", "flip"])
def test_a_damaged_summary_is_one_error_with_a_remedy(finished, small_run, capsys, content):
    argv, folder = small_run
    shutil.copytree(finished, folder)
    summary = folder / "summary.json"
    summary.write_bytes(summary.read_bytes().replace(b'"steps": 8', b'"steps": 9') if content == "flip" else content)
    assert main([*argv, "--resume"]) == 2
    error = capsys.readouterr().err.strip()
    assert str(summary) in error and "delete it, and --resume writes it again" in error and "\n" not in error
    summary.unlink()
    assert main([*argv, "--resume", "--compare-steps", "0"]) == 0


@pytest.mark.parametrize("done", [4, 8])
def test_a_constant_run_is_extended_to_the_bits_of_one_that_was_longer_from_the_start(small_run, tmp_path, done):
    argv, folder = small_run
    argv = [*argv, "--compare-steps", "0", "--schedule", "constant"]
    longer = tmp_path / "longer"
    assert main([*argv, "--steps", "12", "--out", str(longer)]) == 0
    assert main([*argv, "--steps", str(done)]) == 0
    assert main(["--out", str(folder), "--resume", "--steps", "12"]) == 0
    assert_same_bits(weights(folder), weights(longer))
    assert [r for r in logged(folder) if r["step"] != done] == [r for r in logged(longer) if r["step"] != done]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 12
    assert json.loads((folder / "config.json").read_text())["optim"]["steps"] == 12


def test_one_stable_run_is_cooled_down_to_the_bits_of_a_run_with_a_decay(small_run, tmp_path, capsys, monkeypatch):
    """The cooldown continues with the saved moments and at the saved place in the data; its source stays as it is."""
    argv, folder = small_run
    argv = [*argv, "--compare-steps", "0", "--checkpoint-every", "100"]
    decayed, cooled = tmp_path / "decayed", tmp_path / "cooled"
    assert main([*argv, "--schedule", "wsd", "--steps", "12", "--decay-share", "0.5", "--out", str(decayed)]) == 0
    assert [path.name for path in checkpoints(decayed / "checkpoints")] == ["step_00000006", "step_00000012"]
    assert main([*argv, "--schedule", "constant", "--steps", "6"]) == 0
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    started, train_step = [], Engine.train

    def first_step(engine, patches, masks, step, share):
        if not started:
            moments = {k: v for k, v in weights(folder)["optimizer.safetensors"].items() if k.startswith("exp_avg_sq/")}
            names = {p: f"exp_avg_sq/{name}" for name, p in engine.model.named_parameters()}
            own = {names[p]: state["exp_avg_sq"] for p, state in engine.optimizer.state.items()}
            assert own.keys() == moments.keys() and all(torch.equal(own[key], moments[key]) for key in own)
            started.append(step)
        return train_step(engine, patches, masks, step, share)

    monkeypatch.setattr(Engine, "train", first_step)
    cooldown = ["--cooldown-from", str(folder), "--steps", "6", "--out", str(cooled)]
    assert main(cooldown) == 0
    assert started == [6]
    assert_same_bits(weights(cooled), weights(decayed))
    assert logged(cooled) == [record for record in logged(decayed) if record["step"] > 6]
    assert logged(cooled)[-1]["lr"] == 0 and 0 < logged(cooled)[0]["lr"] < 1e-3
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    capsys.readouterr()
    assert main([*cooldown, "--resume"]) == 0  # the same command again, as a scheduler gives it
    assert "this run is finished" in capsys.readouterr().out
    for source in (decayed, decayed / "checkpoints" / "step_00000006"):  # a run with a decay has kept what is needed
        other = tmp_path / f"from-{source.name}"
        assert main(["--cooldown-from", str(source), "--steps", "6", "--out", str(other)]) == 0
        assert_same_bits(weights(other), weights(decayed))
    for wrong, words in (
        (["--cooldown-from", str(decayed / "checkpoints" / "step_00000012"), "--out", "x"], "before its decay"),
        (["--cooldown-from", str(folder), "--steps", "2", "--lr", "0.5", "--out", "x"], "leave out --lr 0.5"),
        (["--cooldown-from", str(folder), "--init-from", str(folder), "--out", "x"], "leave out --init-from"),
        (["--out", str(decayed), "--resume", "--steps", "20"], "has lowered its learning rate since step 6"),
        (["--out", str(folder), "--resume", "--steps", "3"], "has done 6 steps already"),
    ):
        assert main(wrong) == 2
        assert words in capsys.readouterr().err


def test_a_cosine_run_is_neither_extended_nor_cooled_down(finished, small_run, capsys):
    argv, _ = small_run
    assert main(["--out", str(finished), "--resume", "--steps", "20"]) == 2
    error = capsys.readouterr().err
    assert "schedules that end at step 8" in error and "--init-from" in error and "--schedule constant" in error
    assert main(["--cooldown-from", str(finished), "--steps", "4", "--out", argv[3]]) == 2
    assert "takes a run of --schedule constant or wsd" in capsys.readouterr().err
    assert (finished / "summary.json").exists()


def test_a_run_starts_from_the_weights_of_another(finished, small_run, tmp_path, capsys):
    argv, folder = small_run
    argv = [*argv, "--compare-steps", "0", "--steps", "1", "--warmup-steps", "0", "--lr", "0", "--lr-start", "0"]
    argv = [*argv, "--lr", "1e-30", "--weight-decay", "0"]  # so that the first step changes nothing
    theirs = weights(finished)["model.safetensors"]

    def start(*options, whole=True):
        expected = dict(theirs)
        shutil.rmtree(folder, ignore_errors=True)
        assert main([*argv, *options]) == 0, capsys.readouterr().err
        ours = weights(folder)["model.safetensors"]
        for name, x in theirs.items() if whole else ():
            if name.startswith("target_encoder."):  # it has made one step towards the context encoder
                expected[name] = torch.lerp(x, theirs[name.replace("target", "context", 1)], 0.01)
        shared = {name for name, x in ours.items() if name in expected and x.shape == expected[name].shape}
        same = {name for name in shared if torch.allclose(ours[name], expected[name], atol=1e-8)}
        return {name.partition(".")[0] for name in ours.keys() - same}, capsys.readouterr().out

    changed, said = start("--init-from", str(finished))
    assert changed <= {"clip"}  # the running statistics of its batch norms
    assert "context encoder, target encoder, predictor, clip objective; not there, so new: nothing" in said
    own, here = (json.loads((f / "summary.json").read_text())["knn_accuracy_untrained"] for f in (folder, finished))
    assert own == here  # the baseline is an untrained encoder
    assert json.loads((folder / "config.json").read_text())["init_from"] == str(finished)
    changed, said = start("--init-from", str(checkpoints(finished / "checkpoints")[-1]), "--predictor-width", "32")
    assert changed <= {"clip", "predictor"} and "tensors of the predictor" in said
    export(finished, tmp_path / "encoder")
    changed, said = start("--init-from", str(tmp_path / "encoder"), "--objective", "masked", whole=False)
    assert "context_encoder" in changed and "target_encoder" not in changed  # both are the exported target encoder
    assert main([*argv, "--out", str(tmp_path / "x"), "--init-from", str(finished), "--patch", "16", "8"]) == 2
    error = capsys.readouterr().err
    assert "tensors of its encoder differ" in error and "--patch" in error


def export(run, folder):
    from ajepa import Encoder

    Encoder.from_pretrained(run).save_pretrained(folder)


def test_nan_in_weights_or_measures_ends_a_run(small_run, capsys, monkeypatch):
    argv, folder = small_run
    assert main([*argv, "--lr", "1e30"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "after step 4 there are NaN or infinities in: target_variance" in error and "lower --lr" in error
    assert not (folder / "summary.json").exists()
    train_step = Engine.train

    def spoil(engine, patches, masks, step, share):
        result = train_step(engine, patches, masks, step, share)
        if step == 4:
            with torch.no_grad():
                engine.model.target_encoder.norm.bias[0] = torch.inf
        return result

    monkeypatch.setattr(Engine, "train", spoil)
    assert main([*argv, "--overwrite"]) == 2
    assert "after step 6 there are NaN or infinities in: weights" in capsys.readouterr().err
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["step_00000003"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--predictor-width", "2000000"], "--predictor-width"),
        (["--predictor-width", "2147483584", "--predictor-heads", "4"], "--predictor-width"),
        (["--batch-size", "2000000000"], "--batch-size"),
        (["--predictor-depth", "2147483"], "--predictor-depth"),
        (["--n-frames", "1000000000", "--hop-length", "1"], "--n-frames"),
    ],
)
def test_sizes_that_cannot_fit_are_refused_before_anything_is_allocated(option, words, capsys, tmp_path):
    assert main([*SMALL, "--out", str(tmp_path / "run"), *option]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and ("GB" in error or "the most" in error)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_lone_rank_gives_up_after_the_timeout(small_run, forks, rank):
    argv, folder = small_run
    log = folder.with_suffix(".log")
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    assert forks.run([*argv, "--rank-timeout", "1"], log, RANK=rank, LOCAL_RANK=rank, **launcher) == 2
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"rank {rank} of 2 met no other within --rank-timeout 1 s" in errors[0]
    assert "Traceback" not in log.read_text()


def test_a_foreign_configuration_is_refused(finished, tmp_path, capsys):
    raw = json.loads((finished / "config.json").read_text())
    for broken in ("{", json.dumps({**raw, "seed": 5}), "[" * 100_000):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(broken)
        assert main(["--out", str(folder), "--resume"]) == 2
        assert str(folder / "config.json") in capsys.readouterr().err
    del raw["sha256"]
    for change in ({"secret": 1}, {"seed": "x"}, {"data": {"clip_seconds": float("nan")}},
                   {"front_end": {**raw["front_end"], "patch": [1_000_000_000, 1_000_000_000]}}):  # fmt: skip
        write_json(folder / "config.json", {**raw, **change})
        assert main(["--out", str(folder), "--resume"]) == 2
        error = capsys.readouterr().err.strip()
        assert str(folder / "config.json") in error and "\n" not in error and error.startswith("error: ")
    text = (finished / "config.json").read_text().replace('"seed": 0', '"seed": ' + "9" * 5000)
    (folder / "config.json").write_text(text)
    assert main(["--out", str(folder), "--resume"]) == 2
    assert str(folder / "config.json") in capsys.readouterr().err


def test_non_finite_steps_leave_the_weights_alone_and_end_the_run_with_a_diagnosis(small_run, capsys):
    argv, folder = small_run
    assert main([*argv, "--std", "1e-38", "--max-bad-steps", "4"]) == 2  # patches overflow to infinity
    error = capsys.readouterr().err
    assert "not finite for 4 steps in a row" in error and "--lr" in error
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["bad_steps"] == 4 and records[-1]["loss"] is None


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_bad_step_changes_nothing(impl):
    cfg = replace(TINY, impl=impl)
    engine = Engine(cfg, torch.device("cpu"))
    masks = MaskSampler(cfg.mask, cfg.front_end.grid)(0, 10, 2)
    pcm = torch.randint(-9999, 9999, (2, 32_000), dtype=torch.int16)
    lengths = torch.full((2,), 32_000, dtype=torch.int32)
    assert engine.step(pcm, lengths, masks, 300).bad == 0
    with torch.no_grad():
        engine.model.predictor.mask_token[0] = torch.inf
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    moments = [s["exp_avg"].clone() for s in engine.optimizer.state.values()]
    assert engine.step(pcm, lengths, masks, 301).bad == 1
    if impl == "reference":  # swa_utils' average knows of no bad steps: it moves towards the unchanged weights
        before = {name: p for name, p in before.items() if not name.startswith("target_encoder")}
    now = dict(engine.model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in before.items())
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(engine.optimizer.state.values(), moments, strict=True))


def test_engines_train_alike(tones):
    """From one seed, plain PyTorch (torchaudio, torch's AdamW and EMA) and ours go through the same losses."""
    losses = {}
    for impl in ("reference", "fused"):
        cfg = replace(TINY, impl=impl, precision="fp32")
        engine = Engine(cfg, torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        pcm = torch.randint(-9999, 9999, (4, 32_000), dtype=torch.int16, generator=generator)
        lengths = torch.full((4,), 32_000, dtype=torch.int32)
        sampler = MaskSampler(cfg.mask, cfg.front_end.grid)
        losses[impl] = [engine.step(pcm, lengths, sampler(s, 600, 4), s * 20).loss.item() for s in range(8)]
    assert losses["fused"][-1] < losses["fused"][0]
    np.testing.assert_allclose(losses["fused"], losses["reference"], rtol=2e-3)


def test_steps_are_deterministic_where_contexts_repeat():
    """Block masks put a context into four predictor sequences: their gradients must add up in one order."""
    cfg = replace(TINY, mask=replace(TINY.mask, mask="block", masks_per_clip=2))
    pcm = torch.randint(-9999, 9999, (24, 32_000), dtype=torch.int16)
    lengths = torch.full((24,), 32_000, dtype=torch.int32)
    sampler, states = MaskSampler(cfg.mask, cfg.front_end.grid), []
    for _ in range(2):
        engine = Engine(cfg, torch.device("cpu"))
        for step in range(2):
            engine.step(pcm, lengths, sampler(step, 600, 24), 100)
        states.append(engine.model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_compare_prints_both_engines_and_trains_nothing(small_run, capsys, monkeypatch):
    traced = functools.partial(torch.compile, backend="aot_eager")  # generating code takes a minute
    monkeypatch.setattr(torch, "compile", traced)
    argv, folder = small_run
    warmed, step = [], Engine.step

    def noted(self, *batch):
        warmed.append((self.cfg.impl, batch[-1]))
        return step(self, *batch)

    monkeypatch.setattr(Engine, "step", noted)
    assert main([*argv, "--compare", "--compare-steps", "2", "--impl", "reference"]) == 0
    out, err = capsys.readouterr()
    assert "reference" in out and "compile" in out and "clips/s" in out
    assert "warming up compile: 2 steps that do not count" in err
    # each engine sees every shape before the clock runs, and in turns with the others afterwards
    before = [(impl, i) for impl in ("reference", "compile") for i in range(2)]
    assert warmed == [*before, *((impl, i) for i in (2, 3) for impl in ("reference", "compile"))]
    assert not folder.exists()


def test_the_comparison_takes_the_runs_micro_batches(small_run, monkeypatch):
    seen = []
    record = lambda cfg, device, batches, impls: seen.extend(batches) or {}  # noqa: E731
    monkeypatch.setattr("ajepa.training.compare.compare", record)
    options = ["--objective", "masked", "--compare", "--compare-steps", "2", "--micro-batch", "3"]
    assert main([*small_run[0], *options]) == 2  # nothing measured
    assert [[part.clips for part in masks] for *_, masks in seen] == [[3, 1], [3, 1]]


def test_engines_that_do_not_fit_together_are_timed_apart(monkeypatch):
    cfg = replace(TINY, precision="fp32")
    together, calls = compare._time_together, []

    def small_device(configs, *rest):
        calls.append(list(configs))
        if len(configs) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return together(configs, *rest)

    monkeypatch.setattr(compare, "_time_together", small_device)
    pcm, masks = (
        torch.randint(-9, 9, (2, 32_000), dtype=torch.int16),
        MaskSampler(cfg.mask, cfg.front_end.grid)(0, 9, 2),
    )
    batches = [(pcm, torch.full((2,), 32_000, dtype=torch.int32), masks)]
    configs = {impl: replace(cfg, impl=impl) for impl in ("reference", "fused")}
    timings = compare.time_engines(configs, torch.device("cpu"), batches)
    assert calls == [["reference", "fused"], ["reference"], ["fused"]]
    assert timings["fused"].losses == pytest.approx(timings["reference"].losses, rel=1e-3)


def test_a_run_of_two_steps_knows_its_throughput(small_run):
    argv, folder = small_run
    assert main([*argv, "--steps", "2", "--warmup-steps", "1", "--compare-steps", "0"]) == 0
    assert json.loads((folder / "summary.json").read_text())["clips_per_second"] > 0


class TestCheckpoint:
    @pytest.fixture
    def engine(self):
        return Engine(PRESETS["tiny"], torch.device("cpu"))

    def test_round_trip_and_pruning(self, engine, tmp_path):
        for step in (1, 2, 3, 4):
            save_checkpoint(tmp_path, step, engine, {"counts": step}, keep=2)
        assert [p.name for p in checkpoints(tmp_path)] == ["step_00000003", "step_00000004"]
        state, damaged = load_latest(tmp_path, engine)
        assert state["step"] == 4 and state["counts"] == 4 and not damaged

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"])
    @pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
    def test_any_damage_is_caught(self, engine, tmp_path, name, damage):
        path = save_checkpoint(tmp_path, 1, engine, {}, keep=1) / name
        data = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            flipped = bytearray(data)
            flipped[len(data) // 3] ^= 4
            path.write_bytes({"flip": bytes(flipped), "truncate": data[:-1], "empty": b""}[damage])
        with pytest.raises(CheckpointError, match="step_00000001"):
            load_checkpoint(path.parent, engine)

    def test_a_pickle_never_runs(self, engine, tmp_path):
        import hashlib
        import pickle

        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "exploded"),)

        path = save_checkpoint(tmp_path, 1, engine, {}, keep=1)
        bomb = pickle.dumps(Bomb())
        (path / "model.safetensors").write_bytes(bomb)
        sums = json.loads((path / "checksums.json").read_text())
        sums["model.safetensors"] = hashlib.sha256(bomb).hexdigest()
        (path / "checksums.json").write_text(json.dumps(sums))
        with pytest.raises(CheckpointError, match="not safetensors"):
            load_checkpoint(path, engine)
        torch.save(Bomb(), tmp_path / "step_00000002.pt")
        assert read_verified(path) and not (tmp_path / "exploded").exists()

    def test_another_models_checkpoint_is_refused_untouched(self, engine, tmp_path):
        path = save_checkpoint(tmp_path, 1, engine, {}, keep=1)
        cfg = PRESETS["tiny"]
        other = Engine(replace(cfg, model=replace(cfg.model, predictor_width=48)), torch.device("cpu"))
        before = {k: v.clone() for k, v in other.model.state_dict().items()}
        with pytest.raises(CheckpointError, match="another model"):
            load_checkpoint(path, other)
        assert all(torch.equal(v, before[k]) for k, v in other.model.state_dict().items())

    def test_a_full_disk_leaves_earlier_checkpoints(self, engine, tmp_path, monkeypatch):
        save_checkpoint(tmp_path, 1, engine, {}, keep=1)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("ajepa.training.checkpoint.write_synced", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save_checkpoint(tmp_path, 2, engine, {}, keep=1)
        assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
        assert load_latest(tmp_path, engine)[0]["step"] == 1

    def test_leftovers_of_a_kill_while_saving_are_cleared(self, engine, tmp_path):
        save_checkpoint(tmp_path, 1, engine, {}, keep=1)
        (tmp_path / ".partial_step_00000002").mkdir()
        assert load_latest(tmp_path, engine)[0]["step"] == 1
        assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("preset", ["audio-jepa", "a-jepa"])
def test_the_published_recipes_run(preset, tones, tmp_path):
    """Front end, masks, loader and loop as published; a small encoder and batch, so that a CPU gets through."""
    folder = tmp_path / "run"
    argv = ["--preset", preset, "--data", str(tones), "--out", str(folder), "--size", "S", "--predictor-depth", "1"]
    argv += ["--batch-size", "2", "--steps", "2", "--warmup-steps", "1", "--compare-steps", "0", "--eval-clips", "8"]
    assert main(argv) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["preset"] == preset and np.isfinite(summary["final_loss"])


class FakeStream:
    """A CUDA stream that knows which work has finished before anything queued on it from now on starts."""

    current: "FakeStream"
    Event = type("Event", (frozenset,), {"synchronize": lambda event: None})

    def __init__(self):
        self.finished: set[str] = set()

    def record_event(self):
        return self.Event(self.finished)

    def wait_event(self, event):
        self.finished |= event

    def wait_stream(self, other):
        self.finished |= other.finished


def test_the_front_end_runs_beside_the_step_before_and_changes_no_bit(finished, small_run, monkeypatch):
    """The patches of a step wait for the step before the previous one alone, and their step waits for them."""
    argv, folder = small_run
    training, side = FakeStream(), FakeStream()
    FakeStream.current = training
    before, made = {}, []  # the work that must have finished before each piece of work starts; all patches

    @contextlib.contextmanager
    def on(stream):
        FakeStream.current = stream
        yield
        FakeStream.current = training

    def build(engine, *arguments, init=Engine.__init__):
        init(engine, *arguments)
        engine.front_end_stream = side
        engine.in_flight.device = torch.device("cuda")  # so that it records events
        engine._train = functools.partial(work, "step", engine._train)

    def work(kind, function, *arguments):
        number = len(made) if kind == "patches" else len(made) - 1
        before[f"{kind} {number}"] = set(FakeStream.current.finished)
        result = function(*arguments)
        FakeStream.current.finished.add(f"{kind} {number}")
        return result

    def patches(engine, pcm, lengths, step, function=Engine.patches):
        if FakeStream.current is training:  # an evaluation reads its own patches
            return function(engine, pcm, lengths, step)
        assert engine.in_flight.inputs is (made[-1] if made else None), "the patches of a queued step may be freed"
        made.append(work("patches", function, engine, pcm, lengths, step))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream.current)
    monkeypatch.setattr(Engine, "__init__", build)
    monkeypatch.setattr(Engine, "patches", patches)
    assert main([*argv, "--compare-steps", "0"]) == 0
    for step in range(8):
        assert f"patches {step}" in before[f"step {step}"]
        assert f"step {step - 1}" not in before[f"patches {step}"]
        assert step < 2 or f"step {step - 2}" in before[f"patches {step}"]
    assert_same_bits(weights(folder), weights(finished))
