import errno
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from make_audio import FORMATS, bad_files, encode, noise, write, write_set, write_tar

import ajepa.pack
from ajepa.data.index import DataError, build_index
from ajepa.data.shards import HEADER_SIZE, Shard
from ajepa.pack import main
from ajepa.utils.lock import locked

RATE = 16000


def run(source, target, *options) -> int:
    return main([str(source), str(target), "--rate", str(RATE), *map(str, options)])


def shards(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(target.iterdir())}


def left_out(target: Path) -> dict[str, str]:
    rows = [line.split("\t") for line in (target / "left_out.tsv").read_text().splitlines()[1:]]
    return {os.path.basename(name): reason for name, reason in rows}


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder of thirty WAV files of half a second, in two classes."""
    write_set(tmp_path / "source" / "a", 15, frames=8000)
    for i in range(15, 30):
        write(tmp_path / "source" / "b" / f"{i:03d}.wav", noise(8000, i))
    return tmp_path / "source"


@pytest.fixture
def small_shards(monkeypatch):
    """Makes shards of about five half-second clips, packed in groups of four."""
    monkeypatch.setattr(ajepa.pack, "MEGABYTE", 80_000)
    monkeypatch.setattr(ajepa.data.decode, "GROUP_CLIPS", 4)


def test_what_is_packed_is_indexed(tmp_path, source, small_shards, capsys):
    assert run(source, tmp_path / "packed", "--shard-mb", 1) == 0
    assert "30 clips, 0.00 hours" in capsys.readouterr().out
    files, packed = build_index(source), build_index(tmp_path / "packed")
    assert [entry.member for entry in packed.entries] == [entry.path for entry in files.entries]
    assert (packed.labels == files.labels).all() and packed.label_names == files.label_names == ["a", "b"]
    assert {entry.frames for entry in packed.entries} == {8000}
    assert len(list((tmp_path / "packed").glob("*.shard"))) == 6
    assert left_out(tmp_path / "packed") == {}
    one = build_index(tmp_path / "packed" / "000000005.shard")
    assert [entry.member for entry in one.entries] == [entry.path for entry in files.entries[5:10]]


def test_manifest_columns_survive(tmp_path):
    write_set(tmp_path, 4)
    rows = [f"{i:03d}.wav,{i},{'xy'[i % 2]},{'pq'[i // 2]}" for i in range(4)]
    (tmp_path / "m.csv").write_text("\n".join(["file,fold,label,who", *rows]))
    assert run(tmp_path / "m.csv", tmp_path / "packed") == 0
    index = build_index(tmp_path / "packed", where="fold=1,2,3")
    assert index.metadata["fold"] == ["1", "2", "3"]
    assert (index.label_names, index.labels.tolist()) == (["x", "y"], [1, 0, 1])
    assert build_index(tmp_path / "packed", label_column="who").labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match="no column 'color' to take labels from; its columns: fold, label, who"):
        build_index(tmp_path / "packed", label_column="color")
    with pytest.raises(DataError, match="no row"):
        build_index(tmp_path / "packed", where="fold=7")


def test_broken_silent_and_duplicate_clips_are_left_out(tmp_path):
    source = tmp_path / "source"
    write_set(source, 3, frames=8000)
    write(source / "again.flac", noise(8000, 1), RATE, "flac")  # the same samples in another container
    write(source / "nothing.wav", np.zeros(8000, np.int16))
    write(source / "faint.wav", (np.arange(8000) % 5 - 2).astype(np.int16))
    write(source / "audible.wav", (np.arange(8000) % 9 - 4).astype(np.int16))
    bad = {name: data for name, (data, _) in bad_files().items()}
    for name, data in bad.items():
        (source / name).write_bytes(data)
    assert run(source, tmp_path / "packed") == 0
    kept = {os.path.basename(entry.member) for entry in build_index(tmp_path / "packed").entries}
    assert kept == {"000.wav", "001.wav", "002.wav", "audible.wav"}
    reasons = left_out(tmp_path / "packed")
    assert set(reasons) == {"again.flac", "nothing.wav", "faint.wav", *bad}
    assert reasons["again.flac"] == f"the same samples as {source / '001.wav'}"
    assert reasons["nothing.wav"].startswith("silent")
    assert "silent" in reasons["faint.wav"]


def test_all_bad_is_one_error(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "x.wav").write_bytes(b"junk")
    assert run(tmp_path / "source", tmp_path / "packed") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'source'}: none of its 1 audio files")


def test_only_silence_packs_and_then_says_so(tmp_path):
    write(tmp_path / "source" / "x.wav", np.zeros(900, np.int16))
    assert run(tmp_path / "source", tmp_path / "packed") == 0
    with pytest.raises(DataError, match="its shards hold no clips"):
        build_index(tmp_path / "packed")


def test_too_long_recordings_are_left_out(tmp_path):
    write_set(tmp_path / "source", 2)
    write(tmp_path / "source" / "long.wav", noise(40_000))
    assert run(tmp_path / "source", tmp_path / "packed", "--max-hours", 2 / 3600) == 0
    assert left_out(tmp_path / "packed") == {"long.wav": "longer than 0.000555556 hours: cut it"}


def test_a_header_that_claims_hours_allocates_nothing(tmp_path):
    """An Ogg file whose last page claims 2^40 samples, and a FLAC file that claims the largest length."""
    write_set(tmp_path / "source", 1)
    ogg = bytearray(encode(noise(8000), kind="vorbis"))
    page = ogg.rfind(b"OggS")
    ogg[page + 6 : page + 14] = (1 << 40).to_bytes(8, "little")
    (tmp_path / "source" / "claim.ogg").write_bytes(ogg)
    flac = bytearray(encode(noise(8000), kind="flac"))
    flac[21] |= 0x0F  # the 36 bits of STREAMINFO's number of samples
    flac[22:26] = b"\xff" * 4
    (tmp_path / "source" / "claim.flac").write_bytes(flac)
    assert run(tmp_path / "source", tmp_path / "packed") == 0
    assert set(left_out(tmp_path / "packed")) == {"claim.ogg", "claim.flac"}


def test_dry_run_writes_nothing_and_estimates(tmp_path, source, capsys):
    assert run(source, tmp_path / "packed", "--dry-run") == 0
    assert not (tmp_path / "packed").exists()
    assert "about 0.00048 GB as pcm" in capsys.readouterr().err
    assert run(source, tmp_path / "flac", "--codec", "flac") == 0
    size = sum(shard.stat().st_size for shard in (tmp_path / "flac").glob("*.shard"))
    assert run(source, tmp_path / "packed", "--codec", "flac", "--dry-run") == 0
    estimate_gb = float(capsys.readouterr().err.split("about ")[1].split(" GB")[0])
    assert abs(estimate_gb * 1e9 / size - 1) < 0.1


def test_an_interrupted_packing_goes_on_and_ends_the_same(tmp_path, source, small_shards, monkeypatch, capsys):
    write(source / "b" / "twin.wav", noise(8000, 3))
    assert run(source, tmp_path / "whole", "--shard-mb", 1) == 0
    calls = 0
    original = ajepa.pack.ShardWriter.add

    def stop(self, *args):
        nonlocal calls
        calls += 1
        if calls == 13:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(ajepa.pack.ShardWriter, "add", stop)
    assert run(source, tmp_path / "cut", "--shard-mb", 1) == 130
    assert "stopped; finished shards are kept, and the same command goes on from there" in capsys.readouterr().err
    assert sorted(shards(tmp_path / "cut")) == ["000000000.shard", "000000005.shard"]
    with pytest.raises(DataError, match=r"rows 10 to 30 of the source are in no shard.*ajepa\.pack"):
        build_index(tmp_path / "cut")
    monkeypatch.setattr(ajepa.pack.ShardWriter, "add", original)
    (tmp_path / "cut" / ".000000010.shard.partial").write_bytes(b"half of it")
    assert run(source, tmp_path / "cut", "--shard-mb", 1) == 0
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")
    assert left_out(tmp_path / "cut") == {"twin.wav": f"the same samples as {source / 'a' / '003.wav'}"}


# Before which call of which function a packing is killed, or so many seconds later.
MOMENTS = """
ajepa.pack.build_index 1
ajepa.utils.lock.os.link 1
ajepa.pack._finished 1
ajepa.pack.ShardWriter.add 1
ajepa.pack.ShardWriter.add 4
ajepa.pack.ShardWriter.add 2 0.003
ajepa.pack.ShardWriter.finish 1
ajepa.utils.atomic_files.os.fsync 1
ajepa.utils.atomic_files.os.replace 1
ajepa.pack.ShardWriter.add 10
ajepa.pack._pack_rows 1
ajepa.pack.ShardWriter.finish 2
ajepa.pack.ShardWriter.add 9 0.002
ajepa.utils.atomic_files.os.replace 2
ajepa.pack.missing_rows 1
ajepa.pack.ShardWriter.add 16
ajepa.pack.ShardWriter.add 8 0.001
ajepa.pack.ShardWriter.finish 2
ajepa.pack.write_atomic 1
ajepa.utils.lock.Lock.release 1
""".strip().splitlines()


def test_killed_at_20_moments_a_packing_goes_on_to_the_same_shards(tmp_path, forks):
    """No half-written shard is taken for a whole one, and no lock of a killed process stops the next one."""
    write_set(tmp_path / "source", 120, frames=80_000)
    whole, cut, log = tmp_path / "whole", tmp_path / "cut", tmp_path / "log"
    argv = [str(tmp_path / "source"), "--rate", str(RATE), "--shard-mb", "1"]
    assert forks.run([*argv, str(whole)], log, call="ajepa.pack:main") == 0, log.read_text()
    finished, partial, stale = [], 0, 0
    for moment in MOMENTS:
        pid = forks.start([*argv, str(cut)], log, call="ajepa.pack:main", KILL=moment)
        assert forks.wait(pid) == -signal.SIGKILL, (moment, log.read_text())
        complete = list(cut.glob("*.shard"))
        finished.append(len(complete))
        assert all(path.read_bytes() == (whole / path.name).read_bytes() for path in complete), moment
        partial += any(cut.glob(".*.shard.partial"))
        stale += (cut / ".lock").exists()
    assert len(finished) == 20 and finished == sorted(finished) and len(set(finished)) > 5, finished
    assert partial >= 8 and stale >= 16, (partial, stale)
    assert forks.run([*argv, str(cut)], log, call="ajepa.pack:main") == 0, log.read_text()
    assert len(shards(whole)) > 8 and shards(cut) == shards(whole)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "header"])
def test_damaged_shards_are_made_again(tmp_path, source, small_shards, harm, capsys):
    assert run(source, tmp_path / "packed", "--shard-mb", 1) == 0
    wanted = shards(tmp_path / "packed")
    path = tmp_path / "packed" / "000000010.shard"
    data = bytearray(path.read_bytes())
    data[{"header": 40}.get(harm, HEADER_SIZE + 5000)] ^= 16
    path.write_bytes(data[:5000] if harm == "cut" else data)
    if harm == "remove":
        path.unlink()
    capsys.readouterr()
    assert run(source, tmp_path / "packed", "--shard-mb", 1, "--verify") == 0
    assert shards(tmp_path / "packed") == wanted
    output = capsys.readouterr().err
    assert "25 recordings to go" not in output and "5 recordings to go" in output
    assert ("made again" in output) == (harm != "remove")


def test_another_packing_s_folder_is_refused(tmp_path, source, capsys):
    assert run(source, tmp_path / "packed") == 0
    before = shards(tmp_path / "packed")
    assert run(source, tmp_path / "packed", "--codec", "flac") == 2
    reason = "holds shards of other settings (000000000.shard)"
    assert reason in capsys.readouterr().err
    write(source / "a" / "new.wav", noise(900))
    assert run(source, tmp_path / "packed") == 2
    assert shards(tmp_path / "packed") == before
    assert run(tmp_path / "packed", tmp_path / "again") == 2
    assert "shards already" in capsys.readouterr().err


def relabel(folder):
    (folder / "m.csv").write_text((folder / "m.csv").read_text().replace("cat", "cow"))


def change_a_column(folder):
    (folder / "m.csv").write_text((folder / "m.csv").read_text().replace(",3\n", ",4\n"))


def replace_a_file(folder):
    write(folder / "002.wav", noise(8000, 77))


def replace_a_file_and_keep_its_time(folder):
    times = (folder / "002.wav").stat()
    replace_a_file(folder)
    os.utime(folder / "002.wav", ns=(times.st_atime_ns, times.st_mtime_ns))


def rename_a_file(folder):
    (folder / "002.wav").rename(folder / "2.wav")
    (folder / "m.csv").write_text((folder / "m.csv").read_text().replace("002.wav", "2.wav"))


@pytest.mark.parametrize("verify", [[], ["--verify"]], ids=["", "verify"])
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (relabel, "other labels or columns"),
        (change_a_column, "other labels or columns"),
        (replace_a_file, "recordings that changed since"),
        (replace_a_file_and_keep_its_time, "recordings that changed since"),
        (rename_a_file, "other recordings"),
    ],
)
def test_shards_of_what_a_source_was_are_not_taken_for_what_it_is(tmp_path, change, kind, verify, capsys):
    write_set(tmp_path / "source", 6, frames=8000)
    rows = [f"{i:03d}.wav,{'cat' if i % 2 else 'dog'},{i}" for i in range(6)]
    (tmp_path / "source" / "m.csv").write_text("\n".join(["file,label,fold", *rows, ""]))
    command = (tmp_path / "source" / "m.csv", tmp_path / "packed", *verify)
    assert run(*command) == 0
    before = shards(tmp_path / "packed")
    assert run(*command) == 0 and shards(tmp_path / "packed") == before
    assert "1 shards are finished; 0 recordings to go" in capsys.readouterr().err
    change(tmp_path / "source")
    assert run(*command) == 2
    assert f"error: {tmp_path / 'packed'} holds shards of {kind} (000000000.shard)" in capsys.readouterr().err
    assert run(*command, "--dry-run") == 2
    assert shards(tmp_path / "packed") == before


def test_the_key_of_a_member_of_a_tar_covers_its_bytes(tmp_path, capsys):
    clips = {f"{i}.wav": encode(noise(8000, i)) for i in range(3)}
    path = write_tar(tmp_path / "set.tar", clips)
    times = path.stat()
    assert run(path, tmp_path / "packed") == 0
    write_tar(path, {**clips, "1.wav": encode(noise(8000, 9))})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(path, tmp_path / "packed") == 2
    assert "recordings that changed since" in capsys.readouterr().err


def test_home_folders_are_expanded(tmp_path, source, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("~/source", "~/packed") == 0
    assert list((tmp_path / "packed").glob("*.shard"))
    assert run("~/packed", "~/again") == 2 and not (tmp_path / "again").exists()


def test_foreign_folders_are_refused(tmp_path, source, capsys):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("x")
    (tmp_path / "papers" / "their.shard").write_text("x")
    assert run(source, tmp_path / "papers") == 2
    assert "holds other files (their.shard, thesis.tex)" in capsys.readouterr().err
    assert run(source, tmp_path / "papers" / "thesis.tex") == 2
    assert "choose another TARGET" in capsys.readouterr().err
    (tmp_path / "papers" / "their.shard").unlink()
    assert run(source, tmp_path / "papers") == 2
    assert "papers holds other files" in capsys.readouterr().err
    assert sorted(shards(tmp_path / "papers")) == ["thesis.tex"]


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk(tmp_path, source, small_shards, monkeypatch, capsys, reason):
    calls = 0
    original = ajepa.pack.ShardWriter.finish

    def fail(self, *args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(reason, os.strerror(reason))
        original(self, *args)

    monkeypatch.setattr(ajepa.pack.ShardWriter, "finish", fail)
    assert run(source, tmp_path / "packed", "--shard-mb", 1) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert str(tmp_path / "packed") in line and os.strerror(reason).lower() in line and "goes on from there" in line
    assert sorted(shards(tmp_path / "packed")) == ["000000000.shard", "000000005.shard"]


def test_too_little_disk_space_is_reported_beforehand(tmp_path, source, monkeypatch, capsys):
    monkeypatch.setattr(ajepa.pack.shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    assert run(source, tmp_path / "packed") == 2
    assert "up to 0.00048 GB, 0.0001 GB are free" in capsys.readouterr().err


def test_two_at_once_are_refused(tmp_path, source, capsys):
    (tmp_path / "packed").mkdir()
    with locked(tmp_path / "packed"):
        assert run(source, tmp_path / "packed") == 2
    assert "packed is in use by process" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--rate", 10], ["--shard-mb", 0], ["--max-hours", 0], ["--threads", -1]])
def test_settings_out_of_range_are_named(tmp_path, source, options, capsys):
    assert main([str(source), str(tmp_path / "packed"), *map(str, options)]) == 2
    assert options[0] in capsys.readouterr().err


def test_tar_members_never_touch_the_disk(tmp_path):
    """Members of a tar with `..`, absolute names or links are read in place or skipped."""
    import tarfile

    home = tmp_path / "in" / "side"
    home.mkdir(parents=True)
    outside = tmp_path / "secret.wav"
    write(outside, noise(8000, 9))
    members = {"../../evil.wav": encode(noise(8000, 0)), str(tmp_path / "abs.wav"): encode(noise(8000, 1))}
    path = write_tar(home / "set.tar", members)
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "soft.wav"), (tarfile.LNKTYPE, "hard.wav"), (tarfile.FIFOTYPE, "f.wav")):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, str(outside)
            tar.addfile(link)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert run(path, home / "packed") == 0
    names = [entry.member.partition("!")[2] for entry in build_index(home / "packed").entries]
    assert names == list(members)
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "packed"}
    assert after == before


def test_formats_and_rates_pack(tmp_path):
    for i, kind in enumerate(FORMATS):
        write(tmp_path / "source" / f"{i}{FORMATS[kind][2]}", noise(24000, i, channels=2), 48000, kind)
    assert run(tmp_path / "source", tmp_path / "packed") == 0
    entries = build_index(tmp_path / "packed").entries
    assert [entry.frames for entry in entries] == [8000] * len(FORMATS)
    shard = Shard(str(tmp_path / "packed" / "000000000.shard"))
    assert shard.records["source_rate"].tolist() == [48000] * len(FORMATS)
    assert shard.records["source_channels"].tolist() == [2] * len(FORMATS)


def test_odd_names(tmp_path):
    for name in ("with space.wav", "new\nline.wav", "音.wav", os.fsdecode(b"latin-\xe9.wav")):
        write(tmp_path / "so urce" / name, noise(800, len(name)))
    assert run(tmp_path / "so urce", tmp_path / "pa ck\ned") == 0
    files, packed = build_index(tmp_path / "so urce"), build_index(tmp_path / "pa ck\ned")
    assert [entry.member for entry in packed.entries] == [entry.path for entry in files.entries]
    assert packed.fingerprint
    json.dumps(packed.entries[0].name)
