"""Broken audio files and files with false headers cause neither a crash nor a hang, and every bad file is listed."""

import json
import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from make_audio import encode, noise, write
from mutate import SUFFIXES, mutate, ogg_claiming, originals

from ajepa.data.index import build_index
from ajepa.data.loader import AudioLoader

RATE = 16_000


def limited(megabytes: int) -> None:
    """Limit the process's address space to `megabytes` more than it uses now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)


def read_all(folder: str, result: str) -> int:
    """Index a folder, read every good file twice as the trainer does, and write the findings to `result`. Runs in a
    separate process."""
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
    """Index, read, pack and embed the mutated files in one process."""
    from ajepa import embed, pack

    folder, result, packed, encoder = argv
    read_all(folder, result)
    assert pack.main([folder, packed, "--rate", str(RATE)]) == 0
    files = sorted(str(path) for path in Path(folder).iterdir())
    assert embed.main([encoder, *files, "--out", f"{packed}.npz"]) == 1  # some of them are bad
    found = json.loads(Path(result).read_text())
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    Path(result).write_text(json.dumps(found))
    return 0


def read_files_gone_bad(argv):
    """Index intact files, then break them in place with size and time unchanged, so that only a decoder notices."""
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


def test_1000_mutated_files_crash_nothing_and_each_is_used_or_listed(tmp_path, forks, run):
    write_mutants(tmp_path / "audio", 1000, broken=True)
    result, log, packed = tmp_path / "result.json", tmp_path / "log", tmp_path / "packed"
    arguments = [str(x) for x in (tmp_path / "audio", result, packed, run)]
    status = forks.run(arguments, log, call="test_broken_audio:read_mutants")
    assert status == 0, log.read_text()
    found = json.loads(result.read_text())
    bad = dict(found["bad"])
    assert len(bad) == len(found["bad"]) and all(bad.values())
    assert sorted([*found["good"], *bad]) == sorted(str(path) for path in (tmp_path / "audio").iterdir())
    assert len(found["good"]) > 50 and len(bad) > 500  # the mutations produce both kinds
    assert found["peak_mb"] < 900
    left_out = (packed / "left_out.tsv").read_text()
    shards = build_index(str(packed))
    assert all(Path(path).name in left_out for path in bad) and 0 < len(shards) <= len(found["good"])
    embedded = np.load(f"{packed}.npz")
    refused = Path(f"{packed}.npz.bad.tsv").read_text()
    assert len(embedded["names"]) + len(refused.splitlines()) - 1 == 1000


def test_200_files_that_break_in_place_are_replaced_while_training(tmp_path, forks):
    write_mutants(tmp_path / "audio", 200, broken=False)
    result, log = tmp_path / "result.json", tmp_path / "log"
    status = forks.run([str(tmp_path / "audio"), str(result)], log, call="test_broken_audio:read_files_gone_bad")
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
    """A FLAC whose STREAMINFO states these values (20 bits rate, 3 channels - 1, 5 depth - 1, 36 samples)."""
    data = bytearray(encode(noise(2400), RATE, "flac"))
    assert data[:4] == b"fLaC" and data[4] & 0x7F == 0
    data[18:26] = (rate << 44 | (channels - 1) << 41 | 15 << 36 | samples).to_bytes(8, "big")
    return bytes(data)


LIARS = {
    "size_1g.wav": wav(data=0x40000000),
    "size_3g.wav": wav(data=0xC0000000),
    "riff_4g.wav": wav(riff=0xFFFFFFFF, data=0x8000CAFE),
    "piped.wav": wav(riff=0xFFFFFFFF, data=0x80000000),
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


def test_headers_that_lie_allocate_nothing_and_mislead_nobody(tmp_path, forks, run):
    folder = tmp_path / "audio"
    folder.mkdir()
    for name, data in LIARS.items():
        (folder / name).write_bytes(data)
    write(folder / "good.wav", noise(2400))
    result, log = tmp_path / "result.json", tmp_path / "log"
    arguments = [str(x) for x in (folder, result, tmp_path / "packed", run)]
    status = forks.run(arguments, log, call="test_broken_audio:read_mutants")
    assert status == 0, log.read_text()
    found = json.loads(result.read_text())
    good = {os.path.basename(path) for path in found["good"]}
    bad = {os.path.basename(path): reason for path, reason in (*found["bad"], *found["later"])}
    assert {*good, *bad} == {*LIARS, "good.wav"} and {"good.wav", "piped.wav"} <= good
    claims = {name for name in LIARS if name.startswith(("size", "riff", "rate_0", "rate_4g", "rate_3.", "samples_64"))}
    assert claims <= bad.keys(), claims - bad.keys()
    assert found["peak_mb"] < 700


def test_strange_names_and_looping_links_are_found_once_each(tmp_path, forks, run):
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
    arguments = [str(x) for x in (folder, result, tmp_path / "packed", run)]
    status = forks.run(arguments, log, call="test_broken_audio:read_mutants")
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
