import json
import os
import random
import signal
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from make_audio import FORMATS, bad_files, encode, noise, write, write_set, write_tar

import ajepa.data.index
from ajepa.data.index import DataError, build_index

REAL = os.environ.get("AJEPA_TEST_AUDIO")
real_audio = pytest.mark.skipif(not REAL, reason="AJEPA_TEST_AUDIO names no folder of recordings")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("AJEPA_CACHE", str(folder))
    return folder


def names(index):
    return [os.path.basename(entry.name) for entry in index.entries]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_formats(tmp_path, kind, rate):
    write(tmp_path / f"clip{FORMATS[kind][2]}", noise(rate, channels=2), rate, kind)
    (entry,) = build_index(tmp_path).entries
    assert (entry.frames, entry.sample_rate, entry.channels) == (rate, rate, 2)
    assert entry.format == "/".join(FORMATS[kind][:2])


@pytest.mark.parametrize("name", bad_files())
def test_a_bad_file_is_skipped_with_its_reason(tmp_path, name):
    data, reason = bad_files()[name]
    (tmp_path / name).write_bytes(data)
    write(tmp_path / "whole.wav", noise(1600))
    index = build_index(tmp_path)
    assert names(index) == ["whole.wav"]
    ((path, got),) = index.skipped
    assert path == str(tmp_path / name)
    assert got and reason in got


def test_a_bad_member_of_a_tar_is_skipped(tmp_path):
    members = {name: data for name, (data, _) in bad_files().items() if not name.endswith("m4a")}
    index = build_index(write_tar(tmp_path / "set.tar", {**members, "whole.wav": encode(noise(800))}))
    assert [entry.member for entry in index.entries] == ["whole.wav"]
    assert {path.partition("!")[2] for path, _ in index.skipped} == set(members)


def test_special_files_are_skipped(tmp_path):
    write(tmp_path / "whole.wav", noise(800))
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "dangling.wav").symlink_to(tmp_path / "nowhere.wav")
    reasons = {os.path.basename(path): reason for path, reason in build_index(tmp_path).skipped}
    assert reasons == {"pipe.wav": "not a regular file", "dangling.wav": "no such file or directory"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_skipped_until_it_becomes_readable(tmp_path):
    write_set(tmp_path, 2)
    (tmp_path / "000.wav").chmod(0)
    assert build_index(tmp_path).skipped == [(str(tmp_path / "000.wav"), "permission denied")]
    (tmp_path / "000.wav").chmod(0o644)
    assert len(build_index(tmp_path)) == 2


def test_permission_errors_are_not_remembered(tmp_path, monkeypatch):
    write_set(tmp_path, 2)
    original = ajepa.data.index.inspect

    def refuse(path, *args, **kw):
        if path.endswith("000.wav"):
            raise PermissionError(13, "Permission denied")
        return original(path, *args, **kw)

    monkeypatch.setattr(ajepa.data.index, "inspect", refuse)
    assert build_index(tmp_path).skipped == [(str(tmp_path / "000.wav"), "permission denied")]
    monkeypatch.undo()
    assert len(build_index(tmp_path)) == 2


def test_a_wav_of_unstated_length_is_read(tmp_path):
    wav = encode(noise(1600))
    (tmp_path / "piped.wav").write_bytes(wav[:4] + b"\xff" * 4 + wav[8:40] + b"\xff" * 4 + wav[44:])
    assert build_index(tmp_path).entries[0].frames == 1600


def test_folder_is_searched_recursively_in_order_without_loops(tmp_path):
    for name in ("b/2.wav", "a/1.wav", "a/deep/0.FLAC", "top.ogg", ".hidden/x.wav", "a/._1.wav"):
        write(tmp_path / name, noise(800), kind={"F": "flac", "o": "vorbis"}.get(name.rsplit(".")[-1][0], "wav16"))
    (tmp_path / "notes.txt").write_text("not audio")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    index = build_index(tmp_path)
    found = [os.path.relpath(entry.path, tmp_path) for entry in index.entries]
    assert found == ["top.ogg", "a/1.wav", "a/deep/0.FLAC", "b/2.wav"]
    assert index.label_names == ["a", "b"]
    assert index.labels.tolist() == [-1, 0, 0, 1]
    assert not index.skipped


def test_one_sub_folder_is_no_label(tmp_path):
    write_set(tmp_path / "audio", 2)
    index = build_index(tmp_path)
    assert index.labels.tolist() == [-1, -1]
    assert index.label_names == []


@pytest.mark.parametrize(
    "name", ["with space.wav", "new\nline.wav", "ünïcödé-音.wav", "quote'\".wav", b"latin-\xe9.wav"]
)
def test_odd_names(tmp_path, name):
    path = Path(os.fsdecode(name))
    write(tmp_path / path, noise(800))
    for _ in range(2):  # the second time, the index comes from the cache
        (entry,) = build_index(tmp_path).entries
        assert entry.path == str(tmp_path / path)
        assert entry.frames == 800


@pytest.mark.parametrize("column", ["filename", "file", "path", "audio"])
def test_csv_manifest(tmp_path, column):
    write_set(tmp_path / "audio", 3)
    write(tmp_path / "beside.wav", noise(800))
    rows = [
        "audio/001.wav,cat,7",
        "beside.wav,dog,8",
        "000.wav,cat,9",
        f"{tmp_path}/audio/002.wav,,1",
        "gone.wav,dog,1",
    ]
    manifest = tmp_path / "meta.csv"
    manifest.write_text(f"{column},category,fold\n" + "\n".join(rows) + "\n")
    index = build_index(manifest)
    assert names(index) == ["001.wav", "beside.wav", "000.wav", "002.wav"]
    assert index.label_names == ["cat", "dog"]
    assert index.labels.tolist() == [0, 1, 0, -1]
    assert index.metadata["fold"] == ["7", "8", "9", "1"]
    assert index.skipped == [(str(tmp_path / "gone.wav"), "no such file or directory")]


def test_jsonl_manifest(tmp_path):
    write_set(tmp_path, 3)
    lines = [{"audio": "002.wav", "target": 10}, {"audio": "000.wav", "target": 9, "speaker": "theo"}, {"target": 1}]
    manifest = tmp_path / "meta.jsonl"
    manifest.write_text("\n".join([*map(json.dumps, lines), "not json", "[1]"]))
    index = build_index(manifest)
    assert names(index) == ["002.wav", "000.wav"]
    assert index.label_names == ["9", "10"]  # sorted by number
    assert index.labels.tolist() == [1, 0]
    assert index.metadata["speaker"] == ["", "theo"]
    assert sorted(reason for _, reason in index.skipped) == ["not a JSON object"] * 2 + ["the row names no file"]


def test_where_and_label_column(tmp_path):
    write_set(tmp_path, 6)
    manifest = tmp_path / "meta.csv"
    manifest.write_text("file,fold,who\n" + "".join(f"{i:03d}.wav,{i % 3},{'xyz'[i // 2]}\n" for i in range(6)))
    index = build_index(manifest, where="fold=0,2", label_column="who")
    assert names(index) == ["000.wav", "002.wav", "003.wav", "005.wav"]
    assert index.labels.tolist() == [0, 1, 1, 2]
    assert names(build_index(manifest, where="fold!=0; who=x")) == ["001.wav"]
    assert names(build_index(manifest, where=["fold=1", "who!=x"])) == ["004.wav"]
    assert names(index.filter("who=z")) == ["005.wav"]
    one = build_index(manifest, where="who=z", label_column="who")
    assert one.labels.tolist() == [2, 2]  # the same numbers as in the whole set
    with pytest.raises(DataError, match=r"no column 'color'; its columns: fold, who"):
        build_index(manifest, where="color=1")
    with pytest.raises(DataError, match="no row"):
        build_index(manifest, where="fold=9")
    with pytest.raises(DataError, match="not of the form"):
        build_index(manifest, where="fold")
    with pytest.raises(DataError, match="no column 'color' to take labels from"):
        build_index(manifest, label_column="color")


def test_tars_by_path_glob_and_braces(tmp_path):
    for shard in range(3):
        members = {f"clips/{shard}.{i}.wav": encode(noise(800, 10 * shard + i)) for i in range(2)}
        notes = {f"clips/{shard}.{i}.cls": str(i + 9).encode() for i in range(2)}
        write_tar(tmp_path / f"shard-{shard:03d}.tar", {**members, **notes})
    one = build_index(tmp_path / "shard-001.tar")
    assert [entry.member for entry in one.entries] == ["clips/1.0.wav", "clips/1.1.wav"]
    assert one.label_names == ["9", "10"]
    assert one.labels.tolist() == [0, 1]
    by_glob, by_brace = build_index(tmp_path / "shard-*.tar"), build_index(tmp_path / "shard-{000..002}.tar")
    assert by_glob.entries == by_brace.entries
    assert len(by_glob) == 6
    assert len(build_index(tmp_path / "shard-{000,002}.tar")) == 4
    missing = build_index(tmp_path / "shard-{000..003}.tar")
    assert missing.skipped == [(str(tmp_path / "shard-003.tar"), "no such file or directory")]


def test_tar_json_fields_are_columns(tmp_path):
    members = {}
    for i, who in enumerate("aab"):
        members[f"{i}.json"] = json.dumps({"label": who, "fold": i}).encode()
        members[f"{i}.flac"] = encode(noise(800, i), kind="flac")
    index = build_index(write_tar(tmp_path / "set.tar", members), where="fold=1,2")
    assert [entry.member for entry in index.entries] == ["1.flac", "2.flac"]
    assert index.label_names == ["a", "b"]
    assert index.labels.tolist() == [0, 1]


def test_tar_members_are_never_extracted(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    write_tar(inside / "set.tar", {"../evil.wav": encode(noise(800)), "/abs.wav": encode(noise(800))})
    assert len(build_index(inside / "set.tar")) == 2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inside", "set.tar"]


def test_truncated_and_damaged_tars(tmp_path):
    whole = write_tar(tmp_path / "a.tar", {f"{i}.wav": encode(noise(1600, i)) for i in range(3)}).read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "c.tar").write_bytes(np.random.default_rng(0).bytes(4096))
    index = build_index(tmp_path / "*.tar")
    assert [entry.member for entry in index.entries][:3] == ["0.wav", "1.wav", "2.wav"]
    assert {os.path.basename(path.partition("!")[0]) for path, _ in index.skipped} == {"b.tar", "c.tar"}


@pytest.mark.parametrize("source", ["nowhere", "nowhere-*.tar", "nowhere-{0..3}.tar", "empty", "notes.txt", "rows.csv"])
def test_nothing_usable_is_one_clear_error(tmp_path, source):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "rows.csv").write_text("filename,label\n")
    with pytest.raises(DataError, match=str(tmp_path / source).replace("*", r"\*").replace("{", r"\{")):
        build_index(tmp_path / source)


def test_only_bad_files_is_one_clear_error(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"")
    with pytest.raises(DataError, match=r"none of its 1 audio files.*x\.wav: empty"):
        build_index(tmp_path)


def test_a_manifest_without_a_path_column(tmp_path):
    (tmp_path / "m.csv").write_text("name,label\na.wav,1\n")
    with pytest.raises(DataError, match="no column filename, file, path, audio; its columns: name, label"):
        build_index(tmp_path / "m.csv")


@pytest.fixture
def inspected(monkeypatch):
    """The names of the files decoded since the fixture was made."""
    seen: list[str] = []
    original = ajepa.data.index.inspect

    def count(path, *args, **kw):
        seen.append(os.path.basename(path))
        return original(path, *args, **kw)

    monkeypatch.setattr(ajepa.data.index, "inspect", count)
    return seen


def test_cache_rechecks_changed_files_only(tmp_path, inspected):
    write_set(tmp_path, 3)
    (tmp_path / "bad.wav").write_bytes(b"x")
    first = build_index(tmp_path)
    assert len(inspected) == 4
    inspected.clear()
    again = build_index(tmp_path)
    assert inspected == []
    assert (again.entries, again.skipped) == (first.entries, first.skipped)
    write(tmp_path / "001.wav", noise(2000))
    (tmp_path / "002.wav").unlink()
    write(tmp_path / "bad.wav", noise(900))
    changed = build_index(tmp_path)
    assert sorted(inspected) == ["001.wav", "bad.wav"]
    assert [(name, entry.frames) for name, entry in zip(names(changed), changed.entries, strict=True)] == [
        ("000.wav", 1600),
        ("001.wav", 2000),
        ("bad.wav", 900),
    ]
    assert changed.fingerprint != first.fingerprint


def test_every_flipped_bit_of_the_cache_is_noticed(tmp_path, cache, capsys):
    write_set(tmp_path, 3)
    (tmp_path / "bad.wav").write_bytes(b"x")
    first = build_index(tmp_path)
    (file,) = cache.rglob("*.jsonl")
    whole = file.read_bytes()
    draw = random.Random(0)
    for _ in range(100):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        again = build_index(tmp_path)
        assert (again.entries, again.skipped) == (first.entries, first.skipped)
        assert "damaged or outdated, rebuilding it" in capsys.readouterr().err
        assert file.read_bytes() == whole


@pytest.mark.parametrize(
    "damage", [lambda d: d[: len(d) // 2], lambda d: b"\0" * len(d), lambda d: d.replace(b"1600", b"1601")]
)
def test_a_damaged_cache_is_rebuilt(tmp_path, cache, inspected, damage, capsys):
    write_set(tmp_path, 2)
    build_index(tmp_path)
    (file,) = cache.rglob("*.jsonl")
    file.write_bytes(damage(file.read_bytes()))
    inspected.clear()
    assert [entry.frames for entry in build_index(tmp_path).entries] == [1600, 1600]
    assert len(inspected) == 2
    assert "rebuilding" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, capsys):
    write_set(tmp_path / "audio", 1)
    (tmp_path / "file").write_text("")
    assert len(build_index(tmp_path / "audio", cache_dir=tmp_path / "file" / "x")) == 1
    assert "not written" in capsys.readouterr().err


def check_slowly(argv) -> int:
    """Indexes a folder while a line is written to a log for each file that is judged."""
    folder, log = argv
    ajepa.data.index.SAVE_SECONDS = ajepa.data.index.SAVE_RATIO = 0.0
    original = ajepa.data.index.inspect

    def inspect(path, *args, **kw):
        with open(log, "a") as file:
            file.write(f"{path}\n")
        time.sleep(0.005)
        return original(path, *args, **kw)

    ajepa.data.index.inspect = inspect
    build_index(folder, threads=1)
    return 0


def test_what_a_killed_check_has_judged_is_not_judged_again(tmp_path, forks, inspected):
    write_set(tmp_path / "audio", 200, frames=800)
    log = tmp_path / "judged"
    log.write_text("")
    pid = forks.start([str(tmp_path / "audio"), str(log)], tmp_path / "out", call="test_index:check_slowly")
    while len(log.read_text().splitlines()) < 50:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert forks.wait(pid) == -signal.SIGKILL
    judged = len(log.read_text().splitlines())
    assert len(build_index(tmp_path / "audio")) == 200
    assert 50 <= judged < 200 and 200 - judged <= len(inspected) <= 200 - judged + 10


class Clock:
    """Time that passes only while files are checked and the cache is saved."""

    def __init__(self, monkeypatch, check: float, save: float):
        self.now, self.saved = 0.0, 0.0
        monkeypatch.setattr(ajepa.data.index.time, "monotonic", lambda: self.now)
        self.delay(monkeypatch, ajepa.data.index.Progress, "step", check)  # it counts each file that is checked
        self.delay(monkeypatch, ajepa.data.index.os, "replace", save)

    def delay(self, monkeypatch, module, name: str, seconds: float) -> None:
        original = getattr(module, name)

        def slow(*args, **kw):
            self.now += seconds
            self.saved += seconds * (name == "replace")
            return original(*args, **kw)

        monkeypatch.setattr(module, name, slow)


@pytest.mark.parametrize("save", [0.01, 2.0])
def test_saving_the_index_takes_a_small_share_of_the_time(tmp_path, monkeypatch, save):
    write_set(tmp_path, 300, frames=80)
    clock = Clock(monkeypatch, 0.5, save)
    build_index(tmp_path, threads=1)
    # the first saving, at 10 s, and the last are not spread over the time
    assert 4 * save <= clock.saved <= 0.05 * clock.now + 2 * save


def test_progress_is_shown_after_a_second_and_never_of_quick_work(tmp_path, monkeypatch, capsys):
    write_set(tmp_path, 30, frames=80)
    Clock(monkeypatch, 0.03, 0.0)
    build_index(tmp_path, threads=1)
    assert capsys.readouterr().err == ""
    (tmp_path / "bad.wav").write_bytes(b"x")
    write_set(tmp_path, 30, frames=90)
    monkeypatch.undo()
    Clock(monkeypatch, 0.5, 0.0)
    build_index(tmp_path, threads=1)
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("checking audio files: ") and first.endswith(" of 31")
    assert last == "checking audio files: 31 of 31, 1 bad"


def test_header_only_checks_are_kept_apart(tmp_path, inspected):
    flac = bytearray(encode(noise(20000), kind="flac"))
    flac[len(flac) // 2 : len(flac) // 2 + 2000] = bytes(2000)
    (tmp_path / "torn.flac").write_bytes(flac)
    write(tmp_path / "whole.wav", noise(800))
    assert len(build_index(tmp_path, decode=False)) == 2
    assert len(build_index(tmp_path)) == 1


@real_audio
def test_real_recordings():
    index = build_index(os.path.join(REAL, "smoke"))
    assert (len(index), index.skipped) == (40, [])
    assert {entry.format.split("/")[0] for entry in index.entries} == {"WAV", "FLAC", "OGG"}
    assert {entry.sample_rate for entry in index.entries} == {8000, 32000, 44100}


@real_audio
def test_real_damaged_recording(tmp_path):
    write_set(tmp_path, 1)
    (tmp_path / "128.flac").symlink_to(os.path.join(REAL, "corrupt", "128.flac"))
    ((path, reason),) = build_index(tmp_path).skipped
    assert path.endswith("128.flac")
    assert "cannot be decoded" in reason


@real_audio
def test_real_manifest_by_fold():
    manifest = os.path.join(REAL, "esc50", "meta.csv")
    train, test = (
        build_index(manifest, where=f"fold={folds}; esc10=True", label_column="category") for folds in ("1,2", "4")
    )
    assert (len(train), len(test)) == (160, 80)
    assert train.label_names == test.label_names
    assert len(train.label_names) == 50


def test_a_decoder_that_fails_otherwise_is_a_reason_that_is_not_remembered(tmp_path, monkeypatch):
    write_set(tmp_path, 2)
    original = ajepa.data.index.inspect

    def fail(path, *args, **kw):
        if path.endswith("000.wav"):
            raise struct.error("unpack requires 4 bytes")
        return original(path, *args, **kw)

    monkeypatch.setattr(ajepa.data.index, "inspect", fail)
    ((_, reason),) = build_index(tmp_path).skipped
    assert reason == "cannot be checked: error: unpack requires 4 bytes"
    monkeypatch.undo()
    assert len(build_index(tmp_path)) == 2


def test_float_scale_is_passed_on_and_its_verdicts_are_kept_apart(tmp_path, monkeypatch):
    write_set(tmp_path, 1)
    scales = []
    original = ajepa.data.index.inspect

    def note(path, *args, float_scale, **kw):
        scales.append(float_scale)
        return original(path, *args, float_scale=float_scale, **kw)

    monkeypatch.setattr(ajepa.data.index, "inspect", note)
    assert build_index(tmp_path).float_scale == 1.0
    assert build_index(tmp_path, float_scale=32768.0).subset([0]).float_scale == 32768.0
    build_index(tmp_path, float_scale=32768)
    assert scales == [1.0, 32768.0]
