import errno
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from loading import CLIP, OPTIONS, RATE, assert_same, once, take
from make_audio import FORMATS, noise, write, write_set, write_tar
from safetensors.torch import load_file

import ajepa.data.batch
import ajepa.data.dali
import ajepa.data.index
import ajepa.data.resident
from ajepa.data import shards
from ajepa.data.index import DataError, build_index
from ajepa.data.loader import AudioLoader
from ajepa.data.resident import ResidentLoader
from ajepa.data.shards import BLOCK, HEADER, HEADER_SIZE, Header, Shard, ShardError
from ajepa.pack import main
from ajepa.train import main as train

CPU = torch.device("cpu")


@pytest.fixture
def loader():
    """Makes a loader with OPTIONS, which is closed after the test."""
    opened = []

    def make(index, kind=AudioLoader, **options):
        opened.append(kind(index, **{**OPTIONS, **options}))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def pack(source, target: Path, *options, rate: int = RATE) -> Path:
    assert main([str(source), str(target), "--rate", str(rate), *map(str, options)]) == 0
    return target


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file and keep its size and time."""
    times = path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))
    os.utime(path, ns=(times, times))


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder of lossless files of many lengths at RATE, in two classes."""
    for i, frames in enumerate((1, 900, 1599, 1600, 1601, 3200, 3201, 9000, 40_000, 100_001)):
        kind = ("wav16", "flac")[i % 2]
        write(tmp_path / "files" / "ab"[i // 5] / f"{i}{FORMATS[kind][2]}", noise(frames, i), RATE, kind)
    return tmp_path / "files"


@pytest.mark.parametrize("codec", ["pcm", "flac"])
@pytest.mark.parametrize(
    "options", [{}, {"gain_db": 6.0, "pad": "zero"}, {"crop": "center", "rank": 1, "world_size": 2}]
)
def test_folders_tars_and_shards_yield_the_same_batches(tmp_path, mixed, loader, codec, options):
    files = build_index(mixed)
    clips = {f"{i}/{os.path.basename(e.path)}": Path(e.path).read_bytes() for i, e in enumerate(files.entries)}
    notes = {f"{os.path.splitext(name)[0]}.cls": "ab"[i // 5].encode() for i, name in enumerate(clips)}
    tar = build_index(write_tar(tmp_path / "set.tar", {**clips, **notes}))
    packed = build_index(pack(mixed, tmp_path / codec, "--codec", codec))
    packed_tar = build_index(pack(tmp_path / "set.tar", tmp_path / f"{codec}-tar", "--codec", codec))
    wanted = take(loader(files, **options), 8)
    for index in (tar, packed, packed_tar):
        assert_same(take(loader(index, **options), 8), wanted)
    assert_same([once(packed, crop="center")], [once(files, crop="center")])


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_packs_to_what_the_loader_decodes(tmp_path, kind):
    """This includes other sample rates: clips that need no cropping go through the same resampler."""
    for i, rate in enumerate((RATE, 44100, 8000)):
        write(tmp_path / "files" / f"{i}{FORMATS[kind][2]}", noise(rate // 10, i, channels=1 + i % 2), 48000 if
              kind == "opus" else rate, kind)  # fmt: skip
    options = {"clip_samples": 2 * CLIP, "pad": "zero"}
    wanted = once(build_index(tmp_path / "files"), **options)
    got = once(build_index(pack(tmp_path / "files", tmp_path / "packed")), **options)
    assert torch.equal(got.pcm, wanted.pcm)
    assert torch.equal(got.lengths, wanted.lengths)


def test_shards_of_another_rate_are_resampled_as_files_are(tmp_path, loader):
    write_set(tmp_path / "files", 6, frames=30_000)
    files = build_index(tmp_path / "files")
    for codec in ("pcm", "flac"):
        packed = build_index(pack(tmp_path / "files", tmp_path / codec, "--codec", codec))
        for options in ({"sample_rate": 8000}, {"sample_rate": 22050, "gain_db": 3.0}):
            assert_same(take(loader(packed, **options), 4), take(loader(files, **options), 4))


def test_pcm_is_not_decoded(tmp_path, loader, monkeypatch):
    clips = write_set(tmp_path / "files", 5)
    index = build_index(pack(tmp_path / "files", tmp_path / "packed"))
    monkeypatch.setattr(ajepa.data.dali.DaliReader, "_pipeline", lambda *_: pytest.fail("DALI decodes"))
    got = once(index)
    assert np.array_equal(got.pcm, np.stack(clips))
    assert next(loader(index)).pcm.shape == (4, CLIP)


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
@pytest.mark.parametrize("codec", ["pcm", "flac"])
def test_resume_in_mid_epoch_is_exact(tmp_path, loader, cut, codec):
    write_set(tmp_path / "files", 11, frames=5000)
    index = build_index(pack(tmp_path / "files", tmp_path / "packed", "--codec", codec))
    options = {"gain_db": 6.0, "rank": 1, "world_size": 2}
    whole = take(loader(index, **options), 10)
    begun = loader(index, **options)
    take(begun, cut)
    state = json.loads(json.dumps(begun.state_dict()))
    assert_same(take(loader(index, state=state, **options), 10 - cut), whole[cut:])
    begun.load(state)
    assert_same(take(begun, 10 - cut), whole[cut:])


def test_every_bit_of_a_shard_is_guarded(tmp_path):
    """Any flipped bit is noticed when the shard is opened, or when the clip that contains it is read."""
    write_set(tmp_path / "files", 3, frames=700)
    path = pack(tmp_path / "files", tmp_path / "packed") / "000000000.shard"
    end = HEADER_SIZE + Shard(str(path)).header.payload
    rng = np.random.default_rng(0)
    positions = [*range(HEADER_SIZE), *rng.integers(HEADER_SIZE, path.stat().st_size, 400).tolist()]
    for position in positions:
        bit = int(rng.integers(8))
        flip(path, position, bit)
        if HEADER_SIZE <= position < end:
            ((name, reason),) = Shard(str(path)).damaged()
            assert name.endswith(f"{(position - HEADER_SIZE) // 1400:03d}.wav") and "--verify" in reason
        else:
            with pytest.raises(ShardError, match=f"^{path}: "):
                Shard(str(path))
        flip(path, position, bit)
    assert Shard(str(path)).damaged() == []


def test_a_shard_cut_short_anywhere_is_refused(tmp_path):
    write_set(tmp_path / "files", 2, frames=700)
    path = pack(tmp_path / "files", tmp_path / "packed") / "000000000.shard"
    whole = path.read_bytes()
    for size in (0, 1, 8, 100, HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 1, 2000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=f"{path}: .*--verify"):
            build_index(tmp_path / "packed")
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="bytes instead of"):
        build_index(path)


def forge(path: Path, **fields: int) -> None:
    """Write other values into the header, with a valid checksum."""
    data = bytearray(path.read_bytes())
    head = shards.Header(*shards.HEADER.unpack_from(data))._replace(**fields).pack()
    path.write_bytes(head + data[HEADER_SIZE:])


@pytest.mark.parametrize(
    "fields",
    [{"clips": 1 << 40}, {"clips": 1}, {"payload": 1 << 62}, {"tables": 1 << 62}, {"sample_rate": 0}, {"codec": 7},
     {"sample_rate": 0xFFFFFFFF}, {"version": 9}, {"block": 1}, {"clips": (1 << 64) - 1}],
)  # fmt: skip
def test_forged_headers_are_refused_and_allocate_nothing(tmp_path, fields):
    write_set(tmp_path / "files", 2, frames=700)
    path = pack(tmp_path / "files", tmp_path / "packed") / "000000000.shard"
    forge(path, **fields)
    with pytest.raises(DataError, match=f"^{path}: "):
        build_index(tmp_path / "packed")


@pytest.mark.parametrize(
    "field, value",
    [("size", 1 << 60), ("offset", 0), ("frames", 1 << 50), ("first_block", 1 << 40), ("size", -2), ("frames", 0)],
)
def test_forged_records_are_refused(tmp_path, field, value):
    write_set(tmp_path / "files", 2, frames=700)
    path = pack(tmp_path / "files", tmp_path / "packed") / "000000000.shard"
    header = Shard(str(path)).header
    data = bytearray(path.read_bytes())
    start = HEADER_SIZE + header.payload
    records = np.frombuffer(data, shards.RECORD, 2, start).copy()
    records[field][1] = value
    data[start : start + records.nbytes] = records.tobytes()
    path.write_bytes(data)
    forge(path, tables_crc=zlib.crc32(data[start:]))
    with pytest.raises(DataError, match="contradicts itself"):
        build_index(tmp_path / "packed")


@pytest.mark.parametrize("codec", ["pcm", "flac"])
@pytest.mark.parametrize("frames", [1600, 90_000])  # clips that are read whole and clips that are cropped
def test_a_damaged_clip_is_named_and_replaced(tmp_path, loader, codec, frames):
    for i in range(6):
        write(tmp_path / "files" / f"{i}.wav", noise(frames, i))
    index = build_index(pack(tmp_path / "files", tmp_path / "packed", "--codec", codec))
    options = {"shuffle": "none", "clip_samples": min(frames, 40_000), "crop": "center"}
    wanted = take(loader(index, **options), 6)
    bad = index.entries[2]
    flip(Path(bad.path), bad.offset + bad.size // 2, 3)
    batches = loader(build_index(tmp_path / "packed"), **options)
    got = take(batches, 6)
    rows = torch.cat([batch.items for batch in wanted]).tolist()
    assert torch.cat([batch.items for batch in got]).tolist() == [3 if row == 2 else row for row in rows]
    ((name, reason),) = batches.skipped
    assert name == f"{bad.path}!{tmp_path / 'files' / '2.wav'}"
    assert "wrong checksum" in reason and "ajepa.pack" in reason and "--verify" in reason
    clip = {row: pcm for batch in wanted for row, pcm in zip(batch.items.tolist(), batch.pcm, strict=True)}
    for batch in got:
        assert all(torch.equal(pcm, clip[row]) for row, pcm in zip(batch.items.tolist(), batch.pcm, strict=True))
    skipped: list[tuple[str, str]] = []
    assert once(index, skipped=skipped).items.tolist() == [0, 1, 3, 4, 5]
    assert [name for name, _ in skipped] == [bad.name]


def test_only_the_blocks_of_a_crop_are_checked(tmp_path, loader):
    write(tmp_path / "files" / "long.wav", noise(10 * BLOCK))
    index = build_index(pack(tmp_path / "files", tmp_path / "packed"))
    entry = index.entries[0]
    flip(Path(entry.path), entry.offset + entry.size - 1)
    assert np.array_equal(once(index, crop="start").pcm[0], noise(10 * BLOCK)[:CLIP])
    with pytest.raises(DataError, match="no usable file is left"):
        once(index, clip_samples=10 * BLOCK)


def test_a_shard_cut_short_while_in_use_kills_nothing(tmp_path, loader):
    write_set(tmp_path / "files", 4)
    index = build_index(pack(tmp_path / "files", tmp_path / "packed"))
    batches = loader(index, prefetch=1)
    next(batches)
    os.truncate(index.entries[0].path, index.entries[1].offset)
    later = take(batches, 9)  # a few batches were read before the cut
    assert {row for batch in later[-4:] for row in batch.items.tolist()} == {0}
    assert [reason for _, reason in batches.skipped if "truncated: 0 of" in reason and "--verify" in reason]
    assert len(batches.skipped) == 3
    os.truncate(index.entries[0].path, 0)
    with pytest.raises(DataError, match="no usable file is left, 4 went bad"):
        take(batches, 9)


def test_a_disk_that_cannot_read_a_clip_costs_that_clip_alone(tmp_path, loader, monkeypatch):
    write_set(tmp_path / "files", 4)
    packed = pack(tmp_path / "files", tmp_path / "packed")
    index = build_index(packed)
    bad = range(index.entries[2].offset, index.entries[3].offset)
    preadv = os.preadv

    def failing(fd, buffers, offset):
        if offset in bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    batches = loader(index)
    assert {row for batch in take(batches, 6) for row in batch.items.tolist()} == {0, 1, 3}
    assert batches.skipped == [(index.entries[2].name, "input/output error")]
    ((name, reason),) = Shard(str(packed / "000000000.shard")).damaged()
    assert name.endswith("002.wav") and reason == "input/output error"


def test_shards_of_two_packings_do_not_mix(tmp_path):
    write_set(tmp_path / "files", 2)
    pack(tmp_path / "files", tmp_path / "one")
    pack(tmp_path / "files", tmp_path / "two", "--codec", "flac")
    (tmp_path / "two" / "000000000.shard").rename(tmp_path / "one" / "000000001.shard")
    with pytest.raises(DataError, match="come from two packings"):
        build_index(tmp_path / "one")


def version_1(path: Path) -> None:
    """Rewrite a shard's header as the previous version wrote it."""
    data = bytearray(path.read_bytes())
    header = Header(*HEADER.unpack_from(data))._replace(version=1)
    data[:HEADER_SIZE] = header.pack()
    path.write_bytes(data)


def test_shards_that_an_earlier_version_resampled_are_refused_and_made_again(tmp_path, capsys):
    write(tmp_path / "files" / "a.wav", noise(4800), 48_000)
    write(tmp_path / "files" / "b.wav", noise(1600), RATE)
    packed = pack(tmp_path / "files", tmp_path / "packed")
    (path,) = packed.glob("*.shard")
    whole = path.read_bytes()
    version_1(path)
    with pytest.raises(ShardError, match=r"frequencies above 8,000 Hz alias.*pack the recordings again"):
        build_index(packed)
    assert main([str(tmp_path / "files"), str(packed), "--rate", str(RATE)]) == 0
    assert "made again" in capsys.readouterr().err and path.read_bytes() == whole


def test_shards_that_an_earlier_version_packed_at_their_own_rate_are_read(tmp_path):
    write_set(tmp_path / "files", 3)
    packed = pack(tmp_path / "files", tmp_path / "packed")
    wanted = once(build_index(packed))
    version_1(*packed.glob("*.shard"))
    assert torch.equal(once(build_index(packed)).pcm, wanted.pcm)


def test_crc_is_zlib_s(tmp_path):
    """The checksums in the file format are those of zlib, whichever library computes them."""
    data = np.random.default_rng(0).bytes(3 * BLOCK + 5)
    assert shards.block_crcs(data) == [zlib.crc32(data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
    write_set(tmp_path / "files", 1)
    head = (pack(tmp_path / "files", tmp_path / "packed") / "000000000.shard").read_bytes()[:HEADER_SIZE]
    assert struct.unpack("<I", head[-4:])[0] == zlib.crc32(head[:-4])
    assert head[:8] == shards.MAGIC


def test_batch_memory_is_used_again_only_when_nothing_refers_to_it():
    buffers = ajepa.data.batch._Buffers(keep=2)
    first = buffers.take(2, 8)
    address, view = first.data_ptr(), first[1]
    del first
    second = buffers.take(2, 8)
    assert second.data_ptr() != address  # the view still uses the first memory
    del view
    assert buffers.take(2, 8).data_ptr() == address
    held = second.numpy()
    del second
    assert buffers.take(2, 8).data_ptr() != held.ctypes.data
    kept = [buffers.take(2, 8) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in kept}) == 5


def test_two_million_clips_take_little_memory():
    """The index needs less than 110 bytes per clip plus its name, so two million clips with 60-byte names stay under
    400 MB."""
    count = 20_000
    paths = [f"/data/audioset/unbalanced/part-{i // 1000:04d}/{i:016x}.wav" for i in range(count)]
    entries = ajepa.data.index.Entries.of(
        [ajepa.data.index.Entry(p, "", 0, 640_044, i, 640_044, 320_000, 0, 320_000, 32_000, 1, "WAV/PCM_16", i % 527)
         for i, p in enumerate(paths)]
    )  # fmt: skip
    held = entries.numbers.nbytes
    for column in (entries.path, entries.member, entries.format):
        held += column.codes.nbytes + column._ends.nbytes + len(column._blob)
    assert held / count - len(paths[0]) < 110
    assert entries[count - 1].path == paths[-1]
    taken = entries.take(np.array([5, 3]))
    assert [entry.path for entry in taken] == [paths[5], paths[3]]


@pytest.mark.parametrize(
    "options", [{}, {"gain_db": 6.0}, {"pad": "zero"}, {"crop": "center", "rank": 1, "world_size": 2}]
)
def test_resident_batches_are_the_loader_s(tmp_path, mixed, loader, options):
    for index in (build_index(mixed), build_index(pack(mixed, tmp_path / "packed"))):
        wanted = take(loader(index, **options), 9)
        resident = loader(index, ResidentLoader, device=CPU, **options)
        assert_same(take(resident, 4), wanted[:4])
        state = json.loads(json.dumps(resident.state_dict()))
        assert_same(take(loader(index, state=state, **options), 5), wanted[4:])  # from the other's state
        assert_same(take(loader(index, ResidentLoader, device=CPU, state=state, **options), 5), wanted[4:])


def test_resident_leaves_bad_files_out_as_the_loader_does(tmp_path, loader):
    write_set(tmp_path / "files", 9, frames=2000)
    index = build_index(pack(tmp_path / "files", tmp_path / "packed"))
    for row in (2, 3, 8):
        flip(Path(index.entries[row].path), index.entries[row].offset + 7)
    files, resident = loader(index, shuffle="none"), loader(index, ResidentLoader, device=CPU, shuffle="none")
    assert_same(take(resident, 9), take(files, 9))
    assert sorted(resident.skipped) == sorted(files.skipped)
    assert len(resident.skipped) == 3


def test_resident_says_that_it_does_not_fit(tmp_path, monkeypatch):
    write_set(tmp_path / "files", 9)
    monkeypatch.setattr(ajepa.data.resident, "free_memory", lambda _: 50_000_000)
    index = build_index(tmp_path / "files")
    ResidentLoader(index, device=CPU, **OPTIONS)
    monkeypatch.setattr(ajepa.data.resident, "free_memory", lambda _: 40_000)
    with pytest.raises(DataError, match=r"--resident: 0\.00 GB of PCM do not fit on cpu: 0\.00 GB are free"):
        ResidentLoader(index, device=CPU, **OPTIONS)


def test_resident_resamples_whole_recordings(tmp_path, loader):
    time_s = np.arange(44100) / 44100
    pcm = np.rint(8000 * np.sin(2 * np.pi * 500 * time_s)).astype(np.int16)
    write(tmp_path / "x.wav", pcm, 44100)
    batch = next(loader(build_index(tmp_path), ResidentLoader, device=CPU, crop="start", clip_samples=RATE // 2))
    wanted = 8000 * np.sin(2 * np.pi * 500 * np.arange(RATE // 2) / RATE)
    assert np.abs(batch.pcm[0].numpy() - wanted)[50:].max() < 40


def test_training_from_shards_is_training_from_files(tones, tmp_path, small_run, capsys):
    """Training from files, from shards and from resident PCM gives the same weights bit for bit."""
    packed = pack(tones, tmp_path / "packed")
    files = pack_to_files(packed, tmp_path / "same")
    options = small_run[0][4:] + ["--steps", "2", "--warmup-steps", "1", "--compare-steps", "0", "--eval-clips", "8"]
    weights = []
    for data, *extra in ((files,), (packed,), (packed, "--resident")):
        folder = tmp_path / f"run{len(weights)}"
        assert train(["--data", str(data), "--out", str(folder), *options, *extra]) == 0
        assert "data wait" in capsys.readouterr().out
        weights.append(load_file(folder / "encoder.safetensors"))
    for other in weights[1:]:
        assert all(torch.equal(other[name], weights[0][name]) for name in weights[0])


def pack_to_files(packed: Path, target: Path) -> Path:
    """Write the shards' clips as WAV files, in the same order and classes."""
    index = build_index(packed)
    shard = Shard(index.entries[0].path)
    for clip, entry in enumerate(index.entries):
        name = f"{index.label_names[entry.label]}/{os.path.basename(entry.member)}"
        write(target / name, shard.read(clip).view(np.int16), entry.sample_rate)
    return target
