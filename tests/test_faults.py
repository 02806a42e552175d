"""What goes wrong in long runs and with other people's files, each with a count: nothing is lost, nothing crashes."""

import errno
import json
import os
import pickle
import re
import resource
import signal
import struct
import time
from collections import Counter
from dataclasses import fields, is_dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_audio import encode, noise, write
from mutate import SUFFIXES, mutate, ogg_claiming, originals
from safetensors.torch import load_file

from ajepa import checkpoint, config, train
from ajepa.checkpoint import FILES, CheckpointError, checkpoints, load_checkpoint, read_verified, save_checkpoint
from ajepa.config import PRESETS
from ajepa.data import AudioLoader
from ajepa.engine import Engine
from ajepa.index import build_index
from ajepa.masks import MaskSampler
from ajepa.monitor import RunLog

RATE = 16_000
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
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"steps": 4', '"steps": 8'))
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
        engine.step(pcm, lengths, MaskSampler(cfg.mask, cfg.front_end.grid)(0, 10, 2), 0)  # now there are moments
        yield engine


def shrink(patch) -> None:
    for module in ("config", "model", "engine"):
        patch.setitem(__import__(f"ajepa.{module}").__dict__[module].SIZES, "tiny", (32, 1, 4))


STAGES = ["pathlib.Path.mkdir", "pathlib.Path.rename", "ajepa.checkpoint._sync"]
STAGES += [f"ajepa.checkpoint.write_synced:{n}" for n in range(4)]


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
    whole = {name: (path / name).read_bytes() for name in (*FILES, "checksums.json")}
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
    for name in (*FILES, "checksums.json"):
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
        for other in FILES:
            reseal(path, other, data if other == name else good[other])
        with pytest.raises(CheckpointError, match="step_00000001"):
            load_checkpoint(path, engine)
    assert all(torch.equal(p, old) for p, old in zip(engine.model.parameters(), before, strict=True))


# --- audio that is broken, or lies ------------------------------------------------------------------------------------


def limited(megabytes: int) -> None:
    """No more than that on top of what the process has now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)


def read_all(folder: str, result: str) -> int:
    """In a process of its own: index a folder, read every good file twice as the trainer does, note what was found."""
    limited(2048)
    index = build_index(folder, threads=2)
    options = {"sample_rate": RATE, "clip_samples": 1600, "batch_size": 16, "seed": 0, "threads": 2, "gain_db": 3.0}
    with AudioLoader(index, **options) as loader:
        for _ in range(2 * (len(index) // 16 + 1)):
            batch = next(loader)
            assert batch.pcm.dtype == torch.int16 and batch.pcm.shape == (16, 1600)
        later = loader.skipped
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    found = {"good": [entry.path for entry in index.entries], "bad": index.skipped, "later": later, "peak_mb": peak}
    Path(result).write_text(json.dumps(found))
    return 0


def read_mutants(argv):
    return read_all(*argv)


def read_files_gone_bad(argv):
    """Indexed while they are whole, then broken in place: size and time say nothing, so only the decoder can tell."""
    folder = Path(argv[0])
    build_index(folder, threads=2)
    for path in sorted(folder.iterdir()):
        whole, times = path.read_bytes(), path.stat()
        broken = mutate(whole, np.random.default_rng(int(path.stem)))
        path.write_bytes((broken + bytes(len(whole)))[: len(whole)])
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return read_all(*argv)


def write_mutants(folder: Path, count: int, broken: bool) -> None:
    folder.mkdir()
    whole = originals()
    for seed in range(count):
        kind = list(whole)[seed % len(whole)]
        data = mutate(whole[kind], np.random.default_rng(seed)) if broken else whole[kind]
        (folder / f"{seed:05d}{SUFFIXES[kind]}").write_bytes(data)


def test_1000_mutated_files_crash_nothing_and_each_is_used_or_listed(tmp_path, forks):
    write_mutants(tmp_path / "audio", 1000, broken=True)
    result, log = tmp_path / "result.json", tmp_path / "log"
    status = forks.run([str(tmp_path / "audio"), str(result)], log, call="test_faults:read_mutants")
    assert status == 0, log.read_text()
    found = json.loads(result.read_text())
    bad = dict(found["bad"])
    assert len(bad) == len(found["bad"]) and all(bad.values())
    assert sorted([*found["good"], *bad]) == sorted(str(path) for path in (tmp_path / "audio").iterdir())
    assert len(found["good"]) > 50 and len(bad) > 500  # both ways are taken
    assert found["peak_mb"] < 700


def test_200_files_that_break_in_place_are_replaced_while_training(tmp_path, forks):
    write_mutants(tmp_path / "audio", 200, broken=False)
    result, log = tmp_path / "result.json", tmp_path / "log"
    status = forks.run([str(tmp_path / "audio"), str(result)], log, call="test_faults:read_files_gone_bad")
    assert status == 0, log.read_text()
    found = json.loads(result.read_text())
    assert len(found["good"]) == 200 and len(found["later"]) > 80
    assert found["peak_mb"] < 700


def wav(frames=400, *, tag=1, channels=1, rate=RATE, byte_rate=None, align=2, depth=16, riff=None, data=None) -> bytes:
    body = bytes(2 * frames)
    header = struct.pack("<4sI4s4sI", b"RIFF", 36 + len(body) if riff is None else riff, b"WAVE", b"fmt ", 16)
    header += struct.pack(
        "<HHIIHH", tag, channels, rate, rate * align if byte_rate is None else byte_rate, align, depth
    )
    return header + struct.pack("<4sI", b"data", len(body) if data is None else data) + noise(frames).tobytes()


def flac_claiming(samples: int, rate: int = RATE, channels: int = 1) -> bytes:
    """A FLAC whose STREAMINFO says so: 20 bits rate, 3 channels - 1, 5 bits depth - 1, 36 samples."""
    data = bytearray(encode(noise(2400), RATE, "flac"))
    assert data[:4] == b"fLaC" and data[4] & 0x7F == 0
    data[18:26] = (rate << 44 | (channels - 1) << 41 | 15 << 36 | samples).to_bytes(8, "big")
    return bytes(data)


LIARS = {
    "size_2g.wav": wav(data=0x7FFFFFFE),
    "size_4g.wav": wav(data=0xFFFFFFFE),
    "riff_4g.wav": wav(riff=0xFFFFFFFF, data=0x80000000),
    "rate_0.wav": wav(rate=0),
    "rate_4g.wav": wav(rate=0xFFFFFFFF, byte_rate=0),
    "rate_3.wav": wav(rate=3),
    "channels_0.wav": wav(channels=0),
    "channels_65535.wav": wav(channels=0xFFFF, align=0xFFFF),
    "channels_1024.wav": wav(channels=1024, align=2048),
    "depth_0.wav": wav(depth=0),
    "depth_65535.wav": wav(depth=0xFFFF),
    "align_0.wav": wav(align=0),
    "unknown_codec.wav": wav(tag=0x1234),
    "adpcm.wav": wav(tag=2, depth=4, align=0xFFFF),
    "samples_64g.flac": flac_claiming(2**36 - 1),
    "samples_1.flac": flac_claiming(1),
    "rate_655350.flac": flac_claiming(2400, rate=655_350),
    "rate_0.flac": flac_claiming(2400, rate=0),
    "channels_8.flac": flac_claiming(2400, channels=8),
    "samples_2_62.ogg": ogg_claiming(2**62),
    "samples_-1.ogg": ogg_claiming(-1),
    "samples_2_40.ogg": ogg_claiming(2**40),
}


def test_headers_that_lie_allocate_nothing_and_mislead_nobody(tmp_path, forks):
    folder = tmp_path / "audio"
    folder.mkdir()
    for name, data in LIARS.items():
        (folder / name).write_bytes(data)
    write(folder / "good.wav", noise(2400))
    result, log = tmp_path / "result.json", tmp_path / "log"
    status = forks.run([str(folder), str(result)], log, call="test_faults:read_mutants")
    assert status == 0, log.read_text()
    found = json.loads(result.read_text())
    good = {os.path.basename(path) for path in found["good"]}
    bad = {os.path.basename(path): reason for path, reason in (*found["bad"], *found["later"])}
    assert {*good, *bad} == {*LIARS, "good.wav"} and "good.wav" in good
    claims = {name for name in LIARS if name.startswith(("size", "riff", "rate_0", "rate_4g", "rate_3.", "samples_64"))}
    assert claims <= bad.keys(), claims - bad.keys()
    assert found["peak_mb"] < 700


def test_strange_names_and_looping_links_are_found_once_each(tmp_path, forks):
    folder = tmp_path / "a folder\nof 日本語"
    names = ["with space.wav", "new\nline.wav", "tab\t.wav", "ünïcode 音.wav", "-dash.wav", "'quote\".wav", "%d{}*.wav"]
    names += [os.fsdecode(b"not\xffutf8.wav"), "x" * 240 + ".wav"]
    for i, name in enumerate(names):
        write(folder / name, noise(2400, seed=i))
    (folder / "loop").symlink_to(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to(tmp_path)
    (folder / "self.wav").symlink_to("self.wav")
    (folder / "gone.wav").symlink_to("nowhere.wav")
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    result, log = tmp_path / "result.json", tmp_path / "log"
    status = forks.run([str(folder), str(result)], log, call="test_faults:read_mutants")
    assert status == 0, log.read_text()
    found = json.loads(result.read_text())
    assert sorted(found["good"]) == sorted(str(folder / name) for name in names) and not found["later"]
    assert {os.path.basename(path) for path, _ in found["bad"]} == {"self.wav", "gone.wav", "pipe.wav"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1200, 2399])
def test_samples_that_are_not_finite_are_listed(tmp_path, value, place):
    samples = noise(2400).astype(np.float32) / 32768
    write(tmp_path / "good.wav", samples, kind="wav_float")
    samples[place] = value
    write(tmp_path / "bad.wav", samples, kind="wav_float")
    index = build_index(tmp_path)
    assert [entry.path for entry in index.entries] == [str(tmp_path / "good.wav")]
    assert "not finite" in dict(index.skipped)[str(tmp_path / "bad.wav")]


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
    argv += ["--watch-every", "1000", "--checkpoint-every", "500", "--compare-steps", "0", "--batch-size", "2", *MICRO]
    result, log = tmp_path / "memory.json", tmp_path / "log"
    assert forks.run([str(result), *argv], log, call="test_faults:long_run") == 0, log.read_text()
    seen = dict(json.loads(result.read_text()))
    assert max(seen) == 2000
    late = [megabytes for step, megabytes in seen.items() if step >= 1000]
    assert max(late) - min(late) < 10, seen


# --- settings at their limits -----------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**30]
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-308,
    5e-324,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    *map(float, NUMBERS),
]
TEXTS = ["", "x", "\0", "fold=1", "../..", "\ud800"]


def limits(value, annotation: str):
    """Values of a field's type, at the limits of what the type holds."""
    if "Literal" in annotation:
        return st.sampled_from(re.findall(r'"([^"]+)"', annotation) or [value])
    if annotation.startswith("bool"):
        return st.booleans()
    if annotation.startswith("tuple"):
        numbers = FLOATS if "float" in annotation else NUMBERS
        return st.tuples(st.sampled_from(numbers), st.sampled_from(numbers))
    choices = FLOATS if "float" in annotation else NUMBERS if "int" in annotation else TEXTS
    return st.sampled_from([*choices, None] if "None" in annotation else choices)


def paths(node, prefix=()):
    for field in fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            yield from paths(value, (*prefix, field.name))
        elif field.name not in ("out", "preset", "data", "eval_data"):
            kind = field.type if isinstance(field.type, str) else str(field.type).replace("'", '"')
            name = kind if "Literal" in kind or "[" in kind or "|" in kind else getattr(field.type, "__name__", kind)
            yield (*prefix, field.name), value, name


def put(node, path, value):
    inner = value if len(path) == 1 else put(getattr(node, path[0]), path[1:], value)
    return replace(node, **{path[0]: inner})


LEAVES = list(paths(PRESETS["tiny"]))


@st.composite
def configurations(draw):
    cfg = PRESETS[draw(st.sampled_from(sorted(PRESETS)))]
    for path, value, kind in draw(st.lists(st.sampled_from(LEAVES), min_size=1, max_size=3)):
        cfg = put(cfg, path, draw(limits(value, kind)))
    return cfg


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_400_configurations_at_the_limits_are_refused_by_name_or_come_back_as_they_were(data, tmp_path_factory):
    try:
        cfg = data.draw(configurations())
    except ValueError as error:  # the front end checks itself when it is made
        assert str(error).startswith("LogMelSpec: ")
        return
    try:
        config.validate(cfg)
    except config.ConfigError as error:
        assert "--" in str(error) and "\n" not in str(error)
        return
    path = tmp_path_factory.getbasetemp() / "config.json"
    config.save(cfg, path)
    assert config.load(path) == cfg


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_30_command_lines_at_the_limits_end_in_a_configuration_or_one_error(data, capsys):
    path, value, kind = data.draw(st.sampled_from(LEAVES))
    drawn = data.draw(limits(value, kind))
    words = [str(x) for x in drawn] if isinstance(drawn, tuple) else [str(drawn)]
    flag = "--" + path[-1].replace("_", "-")
    argv = [flag, *words] if not isinstance(drawn, bool) else [flag if drawn else f"--no-{flag[2:]}"]
    try:
        assert isinstance(config.parse(argv), config.Config)
    except config.ConfigError as error:
        assert "\n" not in str(error)
    except SystemExit as stopped:
        said = "".join(capsys.readouterr().err.split()).replace("_", "-")
        assert stopped.code == 2 and (flag[2:] in said or "LogMelSpec:" in said)
