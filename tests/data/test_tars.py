"""WebDataset tars: links, appended tars, damage, and labels stored beside the recordings."""

import io
import json
import os
import tarfile

import pytest
from make_audio import encode, noise, write_tar

from ajepa.data.index import DataError, build_index

RATE = 1000


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))


def clip(seed: int, frames: int = 100) -> bytes:
    return encode(noise(frames + seed, seed), RATE)


def build(path, *members: tuple[str, bytes] | tarfile.TarInfo, mode: str = "w", **options):
    with tarfile.open(path, mode, **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def members(index) -> dict[str, int]:
    return {entry.member: entry.frames for entry in index.entries}


def skipped(index) -> dict[str, str]:
    return {
        os.path.basename(name).partition("!")[2] or os.path.basename(name): reason for name, reason in index.skipped
    }


def classes(index) -> list[str | None]:
    return [index.label_names[label] if label >= 0 else None for label in index.labels]


def test_links_stand_for_the_member_they_name(tmp_path):
    path = build(
        tmp_path / "set.tar",
        special("early.wav", tarfile.SYMTYPE, "a/data.wav"),  # the target is a later member
        ("a/data.wav", clip(1)),
        ("a/data.cls", b"dog"),
        special("b/hard.wav", tarfile.LNKTYPE, "a/data.wav"),
        special("b/hard.cls", tarfile.LNKTYPE, "a/data.cls"),
        special("b/soft.wav", tarfile.SYMTYPE, "../a/data.wav"),
        special("b/chain.wav", tarfile.SYMTYPE, "soft.wav"),
        special("b/out.wav", tarfile.SYMTYPE, "/etc/passwd"),
        special("b/loop.wav", tarfile.SYMTYPE, "loop.wav"),
        special("b/folder.wav", tarfile.SYMTYPE, "../sub"),
        special("sub", tarfile.DIRTYPE),
        special("sub.wav", tarfile.DIRTYPE),
        special("pipe.wav", tarfile.FIFOTYPE),
    )
    index = build_index(path)
    assert members(index) == dict.fromkeys(["early.wav", "a/data.wav", "b/hard.wav", "b/soft.wav", "b/chain.wav"], 101)
    assert len({(entry.offset, entry.size) for entry in index.entries}) == 1
    assert classes(index) == [None, "dog", "dog", None, None]
    reasons = skipped(index)
    assert set(reasons) == {"out.wav", "loop.wav", "folder.wav", "pipe.wav"}
    assert reasons["out.wav"] == "a link to /etc/passwd, which is not in the tar"
    assert reasons["folder.wav"] == reasons["pipe.wav"] == "not a regular file"
    assert "4 rows repeat the recording of an earlier row" in index.warnings[0]


@pytest.mark.parametrize("gap", [0, 512, 10240, 3 << 20])
def test_appended_tars_are_read_to_the_end(tmp_path, gap):
    parts = [
        build(tmp_path / f"{i}.part", (f"{i}.wav", clip(i)), (f"{i}.cls", f"{i}".encode()), ("same.wav", clip(10 + i)),
              ("same.cls", f"s{i}".encode())).read_bytes()
        for i in range(3)
    ]  # fmt: skip
    (tmp_path / "set.tar").write_bytes(bytes(gap).join(parts))
    index = build_index(tmp_path / "set.tar")
    assert [entry.frames for entry in index.entries] == [100, 110, 101, 111, 102, 112]
    assert classes(index) == ["0", "s0", "1", "s1", "2", "s2"]
    assert len(set(index.entries.names())) == 6
    assert [entry.member.partition("@")[0] for entry in index.entries] == [
        "0.wav", "same.wav", "1.wav", "same.wav", "2.wav", "same.wav"]  # fmt: skip
    assert "2 members have the name of an earlier one (same.wav" in index.warnings[0]
    assert not index.skipped


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_other_alphabets(tmp_path, kind):
    names = ["d/" * 60 + "x" * 150 + ".wav", "音" * 60 + ".wav"]
    index = build_index(build(tmp_path / "s.tar", *((n, clip(i)) for i, n in enumerate(names)), format=kind))
    assert members(index) == {names[0]: 100, names[1]: 101}


def test_damage_after_intact_members_is_reported(tmp_path):
    data = bytearray(build(tmp_path / "s.tar", *((f"{i}.wav", clip(i)) for i in range(4))).read_bytes())
    whole = bytes(data)
    third = data.index(b"2.wav")
    data[third : third + 512] = b"\xaa" * 512
    for damaged in (bytes(data), whole.rstrip(b"\0") + bytes(2048) + b"rubbish" * 200):
        (tmp_path / "s.tar").write_bytes(damaged)
        index = build_index(tmp_path / "s.tar")
        assert list(members(index))[:2] == ["0.wav", "1.wav"]
        assert "what follows is not read" in skipped(index)["s.tar"]
    (tmp_path / "s.tar").write_bytes(whole.rstrip(b"\0") + bytes(700))  # an intact tar without its padding
    assert not build_index(tmp_path / "s.tar").skipped


def test_a_sparse_member_is_left_out_with_its_reason(tmp_path):
    info = special("hole.wav", tarfile.GNUTYPE_SPARSE)
    index = build_index(build(tmp_path / "s.tar", ("0.wav", clip(0)), info))
    assert skipped(index) == {"hole.wav": "a sparse member: make the tar without --sparse"}


@pytest.mark.parametrize("mode,suffix", [("gz", ".tar.gz"), ("gz", ".tgz"), ("bz2", ".tar.bz2"), ("xz", ".tar.xz")])
def test_compressed_tars_are_refused_with_the_remedy(tmp_path, mode, suffix):
    path = build(tmp_path / f"set{suffix}", ("0.wav", clip(0)), mode=f"w:{mode}")
    for source in (path, tmp_path / f"*{suffix}"):
        with pytest.raises(DataError, match=r"a compressed file: unpack it first"):
            build_index(source)
    renamed = path.rename(tmp_path / "set.tar")
    with pytest.raises(DataError, match=r"compressed tar: unpack it with (gunzip|bunzip2|unxz)"):
        build_index(renamed)


def test_labels_beside_recordings(tmp_path):
    labels = [["dog", "cat"], ["dog"], 3.0, None, float("nan"), "  bird ", [], True]
    notes = {f"{i}.json": json.dumps({"label": v, "n": i}).encode() for i, v in enumerate(labels)}
    index = build_index(write_tar(tmp_path / "s.tar", {**notes, **{f"{i}.wav": clip(i) for i in range(len(labels))}}))
    assert classes(index) == ['["dog", "cat"]', "dog", "3", None, None, "bird", None, "true"]
    assert list(index.metadata["n"]) == [str(i) for i in range(len(labels))]
    assert not index.warnings


def test_labels_that_cannot_be_read_are_reported(tmp_path, capsys):
    notes = {
        "0.json": b"{" + b" " * (2 << 20) + b"}",
        "1.json": b"[1]",
        "2.cls": b"dog",
        "._2.json": b"\x00\x05\x16\x07",
    }
    index = build_index(write_tar(tmp_path / "s.tar", {**notes, **{f"{i}.wav": clip(i) for i in range(3)}}))
    assert classes(index) == [None, None, "dog"]
    assert "labels or fields of 2 members cannot be read (0.json: 2.1 MB, the limit is 1 MB)" in index.warnings[0]
    assert index.warnings[0] in capsys.readouterr().err


def test_times_beside_a_member_are_columns_not_segments(tmp_path):
    notes = {"0.json": b'{"start_time": 30, "end_time": 40, "duration": 10}', "0.wav": clip(0)}
    index = build_index(write_tar(tmp_path / "s.tar", notes))
    assert (index.entries[0].start, index.entries[0].frames) == (0, 100)
    assert index.metadata["start_time"][0] == "30"
    assert "a member is read whole; the fields start_time, end_time" in index.warnings[0]


def test_a_label_nested_too_deeply_leaves_out_its_recording(tmp_path):
    note = ('{"label": ' + "[" * 200 + "]" * 200 + "}").encode()
    notes = [("0.json", note), ("1.json", b'{"label": "a"}')]
    path = build(tmp_path / "a.tar", ("0.wav", clip(0)), ("1.wav", clip(1)), *notes)
    index = build_index(str(path), label_column="label")
    assert members(index) == {"1.wav": 101} and index.label_names == ["a"]
    assert dict(index.skipped) == {f"{path}!0.wav": "its values are nested too deeply"}
