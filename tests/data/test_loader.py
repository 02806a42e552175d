import gc
import io
import json
import math
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile as sf
import torch
from loading import CLIP, OPTIONS, RATE, assert_same, once, take
from make_audio import FORMATS, encode, noise, write, write_set, write_tar

import ajepa.data.dali
import ajepa.data.formats.audiofile
import ajepa.data.formats.containers
from ajepa import config, pack
from ajepa.data.index import DataError, build_index
from ajepa.data.loader import AudioLoader, Batch, iterate_once
from ajepa.data.reader import Reader
from ajepa.data.resident import ResidentLoader
from ajepa.data.shards import OpenShards
from ajepa.training.corpus import Corpus
from ajepa.utils.counter_rng import hash64

REAL = os.environ.get("AJEPA_TEST_AUDIO")
# In steps of int16. DALI and soundfile use different builds of the lossy decoders, which may round differently.
TOLERANCE = {"vorbis": 1, "opus": 1, **dict.fromkeys(("wav8", "wav16", "wav24", "wav_float", "flac", "mp3"), 0)}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("AJEPA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def loader():
    """Makes an `AudioLoader` with OPTIONS, which is closed after the test."""
    opened = []

    def make(index, **options):
        opened.append(AudioLoader(index, **{**OPTIONS, **options}))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def pcm_of(file) -> np.ndarray:
    """A file's samples decoded by libsndfile, in steps of int16 but as float32."""
    return np.rint(sf.read(file, dtype="float32")[0] * 32768.0)


def items(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.items for batch in batches]).tolist()


def test_batch_types(tmp_path, loader):
    write_set(tmp_path / "a", 3)
    write_set(tmp_path / "b", 3)
    index = build_index(tmp_path)
    batch = next(loader(index))
    assert (batch.pcm.dtype, batch.pcm.shape) == (torch.int16, (4, CLIP))
    assert (batch.lengths.dtype, batch.labels.dtype, batch.items.dtype) == (torch.int32, torch.int64, torch.int64)
    assert batch.labels.tolist() == [int(item >= 3) for item in batch.items]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_decodes_as_libsndfile_does(tmp_path, kind):
    path = write(tmp_path / f"x{FORMATS[kind][2]}", noise(CLIP), RATE, kind)
    got = once(build_index(tmp_path)).pcm[0].numpy()
    assert np.abs(got - pcm_of(path)).max() <= TOLERANCE[kind]
    if kind in ("wav16", "wav24", "wav_float", "flac"):
        assert np.array_equal(got, noise(CLIP))


@pytest.mark.parametrize("kind", ["vorbis", "wav_float"])
def test_samples_past_full_scale_saturate(tmp_path, kind):
    square = 1.3 * np.sign(np.sin(np.arange(CLIP) * 0.1))
    path = write(tmp_path / f"x{FORMATS[kind][2]}", square if kind == "wav_float" else square / 1.3, RATE, kind)
    peak = sf.read(path, dtype="float32")[0]
    got = once(build_index(tmp_path)).pcm[0].numpy()
    assert np.abs(peak).max() > 1.05
    assert (got[peak > 1] == 32767).all()
    assert (got[peak < -1] == -32768).all()


def test_stereo_is_averaged(tmp_path):
    stereo = noise(CLIP, channels=2)
    write(tmp_path / "x.wav", stereo)
    assert np.abs(once(build_index(tmp_path)).pcm[0].numpy() - stereo.mean(1)).max() <= 0.5


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("seconds", [0.1, 1.0, 5.0])  # a whole file, a crop of a decoded file, a segment read by itself
def test_other_rates_are_resampled(tmp_path, rate, seconds):
    time_s = np.arange(int(seconds * rate)) / rate
    write(tmp_path / "x.flac", np.rint(8000 * np.sin(2 * np.pi * 500 * time_s)).astype(np.int16), rate, "flac")
    batch = once(build_index(tmp_path), crop="start")
    wanted = 8000 * np.sin(2 * np.pi * 500 * np.arange(CLIP) / RATE)
    assert batch.lengths.tolist() == [CLIP]
    assert np.abs(batch.pcm[0].numpy() - wanted)[50:-50].max() < 40  # the filter rings at the edges


@pytest.mark.parametrize("frames", [1, 7, 600, 1599, 1600])
def test_short_clips_are_padded(tmp_path, frames):
    pcm = noise(frames)
    write(tmp_path / "x.wav", pcm)
    index = build_index(tmp_path)
    zero, cyclic = once(index, pad="zero"), once(index, pad="cyclic")
    assert zero.lengths.tolist() == [frames]
    assert np.array_equal(zero.pcm[0], np.concatenate([pcm, np.zeros(CLIP - frames, np.int16)]))
    assert cyclic.lengths.tolist() == [CLIP]
    assert np.array_equal(cyclic.pcm[0], np.resize(pcm, CLIP))


@pytest.mark.parametrize("kind", ["wav16", "flac", "vorbis", "mp3"])
@pytest.mark.parametrize("frames", [2000, 3200, 3201, 8000])  # segments are read from 3201 frames on
def test_crops(tmp_path, kind, frames, loader):
    path = write(tmp_path / f"x{FORMATS[kind][2]}", noise(frames), RATE, kind)
    index = build_index(tmp_path)
    windows = np.lib.stride_tricks.sliding_window_view(pcm_of(path), CLIP)

    def start(clip: torch.Tensor) -> int:
        return np.flatnonzero((np.abs(windows - clip.numpy()) <= TOLERANCE[kind]).all(1)).item()

    assert start(once(index, crop="start").pcm[0]) == 0
    assert start(once(index, crop="center").pcm[0]) == len(windows) // 2
    assert len({start(clip) for clip in next(loader(index)).pcm}) > 2


def test_random_crops_reach_both_ends(tmp_path, loader):
    write(tmp_path / "x.wav", np.arange(CLIP + 3, dtype=np.int16))
    batches = take(loader(build_index(tmp_path), batch_size=64), 2)
    assert {clip[0].item() for batch in batches for clip in batch.pcm} == {0, 1, 2, 3}


@pytest.mark.parametrize("subtype", ["PCM_24", "PCM_16"])
def test_a_long_recording_is_not_read_whole(tmp_path, loader, monkeypatch, subtype):
    with sf.SoundFile(tmp_path / "x.wav", "w", RATE, 1, subtype) as long:
        for _ in range(60):
            long.write(noise(RATE * 10))
    index = build_index(tmp_path)
    monkeypatch.setattr(ajepa.data.dali, "audio_bytes", lambda *_: pytest.fail("read whole"))
    sizes = []
    read, read_at = sf.SoundFile.read, ajepa.data.formats.containers.read_at

    def counted(*args, **options):
        sizes.append(len(samples := read(*args, **options)))
        return samples

    def counted_bytes(fd, buffer, position):
        sizes.append(len(buffer) if position > 100 else 0)  # without the reads of the header
        return read_at(fd, buffer, position)

    monkeypatch.setattr(sf.SoundFile, "read", counted)
    monkeypatch.setattr(ajepa.data.formats.containers, "read_at", counted_bytes)
    next(loader(index))
    assert max(sizes) == CLIP and 0 < sum(sizes) <= 16 * CLIP  # four batches of four are read ahead


def test_tar_members_read_in_place(tmp_path):
    clips = {f"{i}{FORMATS[kind][2]}": encode(noise(4 * CLIP, i), RATE, kind) for i, kind in enumerate(FORMATS)}
    index = build_index(write_tar(tmp_path / "set.tar", clips))
    got = once(index, crop="start").pcm.numpy()
    for clip, kind, data in zip(got, FORMATS, clips.values(), strict=True):
        assert np.abs(clip - pcm_of(io.BytesIO(data))[:CLIP]).max() <= TOLERANCE[kind]


def test_gain_is_drawn_within_its_range_and_saturates(tmp_path, loader):
    write(tmp_path / "a.wav", np.full(CLIP, 1000, np.int16))
    batch = next(loader(build_index(tmp_path), gain_db=6.0, batch_size=200))
    decibel = 20 * np.log10(batch.pcm[:, 0].numpy() / 1000)
    assert -6.01 < decibel.min() < -5 and 5 < decibel.max() < 6.01
    assert abs(decibel.mean()) < 0.8
    assert (batch.pcm == batch.pcm[:, :1]).all()
    write(tmp_path / "a.wav", np.array([-32768, 32767] * (CLIP // 2), np.int16))
    batch = next(loader(build_index(tmp_path), gain_db=6.0, batch_size=200))
    assert (batch.pcm[:, 0::2] < 0).all() and (batch.pcm[:, 1::2] > 0).all()
    assert batch.pcm.min() == -32768 and batch.pcm.max() == 32767


def test_an_epoch_is_a_permutation_and_the_next_another(tmp_path, loader):
    write_set(tmp_path, 12)
    index = build_index(tmp_path)
    order = items(take(loader(index), 9))
    epochs = [order[:12], order[12:24], order[24:]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert items(take(loader(index, seed=1), 3)) != epochs[0]
    assert items(take(loader(index, shuffle="none"), 6)) == [*range(12), *range(12)]


def test_same_seed_same_batches_whatever_the_threads(tmp_path, loader):
    write_set(tmp_path, 7, frames=5000)
    index = build_index(tmp_path)
    first = take(loader(index, gain_db=6.0), 6)
    assert_same(take(loader(index, gain_db=6.0, threads=4, prefetch=1), 6), first)


def test_the_order_of_an_epoch_is_that_of_earlier_versions(tmp_path, loader):
    """Older runs go on with the samples that they would have had."""
    write_set(tmp_path, 12)
    order = items(take(loader(build_index(tmp_path), seed=7), 6))
    assert order == [i for epoch in (0, 1) for i in np.argsort(hash64(7, 0, epoch, np.arange(12)))]


@pytest.mark.parametrize("shuffle", ["all", "ranges"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_an_epoch_without_overlap(tmp_path, loader, world, shuffle):
    write_set(tmp_path, 13)
    index = build_index(tmp_path)
    options = {"batch_size": 12 // world, "world_size": world, "shuffle": shuffle}
    ranks = [items(take(loader(index, rank=rank, **options), 13)) for rank in range(world)]
    stream = np.array(ranks).T.reshape(-1).tolist()  # sample g belongs to rank g mod world
    assert stream == items(take(loader(index, batch_size=12, shuffle=shuffle), 13))
    assert all(sorted(stream[i : i + 13]) == list(range(13)) for i in range(0, len(stream), 13))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Makes an index of so many short recordings."""
    folder = tmp_path_factory.mktemp("rows")
    write_set(folder, 67, frames=40)
    index = build_index(folder)
    return lambda count: index.subset(np.arange(count))


@pytest.mark.parametrize(
    ("count", "batch", "lanes"), [(64, 16, 16), (67, 16, 16), (67, 48, 16), (13, 64, 8), (5, 3, 1)]
)
def test_ranges_belong_to_one_rank_and_cover_every_epoch(rows, loader, count, batch, lanes):
    index, epochs = rows(count), 9
    for world in (1, 2, 4, 8, 16):
        if lanes % world:
            continue
        options = {"batch_size": batch // world, "world_size": world, "shuffle": "ranges", "clip_samples": 40}
        plans = [loader(index, rank=rank, **options)._stream.plan for rank in range(world)]
        steps = -(-count * epochs // batch)
        parts = np.stack([np.concatenate([plan(i).items for i in range(steps)]) for plan in plans], 1)
        stream, owner = parts.ravel(), np.arange(parts.size) % world
        edges, orders = [], set()
        for first in range(0, count * epochs, count):
            epoch, ranks = stream[first : first + count], owner[first : first + count]
            assert sorted(epoch) == list(range(count))
            of_row = ranks[np.argsort(epoch)]  # which rank reads each row
            assert (np.diff(of_row) != 0).sum() == world - 1  # a rank's rows are neighbours
            assert np.ptp(np.bincount(of_row)) <= 1  # and as many as another's
            edges.append(np.flatnonzero(np.diff(of_row)))
            orders.add(tuple(epoch))
        assert np.ptp(edges, axis=0).max(initial=0) <= math.log2(world)
        assert len(orders) == epochs
        if world == 1:
            alone = stream
        assert np.array_equal(stream, alone)  # the stream of one rank


def test_ranges_that_ranks_share_are_as_few_as_the_batch_allows(rows, loader):
    """A batch of 48 has 16 lanes. Those of twelve ranks that are equal mod 4 share a quarter of the rows."""
    options = {"batch_size": 4, "world_size": 12, "shuffle": "ranges", "clip_samples": 40}
    seen = []
    for rank in range(12):
        plan = loader(rows(64), rank=rank, **options)._stream.plan
        seen.append({int(row) // 16 for batch in range(8) for row in plan(batch).items})
    assert seen == [{0}, {2}, {1}, {3}] * 3


def test_each_rank_reads_its_own_shards(tmp_path, loader, monkeypatch):
    """Eight shards of eight clips, of which each of 8, 4 or 2 ranks opens its own ones and no others."""
    monkeypatch.setattr(pack, "MEGABYTE", 2 * CLIP * 8)
    write_set(tmp_path / "files", 64, frames=CLIP)
    assert pack.main([str(tmp_path / "files"), str(tmp_path / "packed"), "--rate", str(RATE), "--shard-mb", "1"]) == 0
    index = build_index(tmp_path / "packed")
    files = sorted({entry.path for entry in index.entries})
    assert [sum(entry.path == file for entry in index.entries) for file in files] == [8] * 8
    opened: list[str] = []
    read = OpenShards.read
    monkeypatch.setattr(
        OpenShards, "read", lambda self, entry, *args: opened.append(entry.path) or read(self, entry, *args)
    )
    for world in (8, 4, 2):
        sets = []
        for rank in range(world):
            opened.clear()
            with loader(index, batch_size=16 // world, rank=rank, world_size=world, shuffle="ranges") as batches:
                take(batches, 12)  # three epochs
            sets.append(set(opened))
        assert sorted(file for own in sets for file in own) == files
        assert {len(own) for own in sets} == {8 // world}


@pytest.mark.parametrize(("decoder", "kind"), [("soundfile", "wav16"), ("dali", "flac")])
@pytest.mark.parametrize("shuffle", ["all", "ranges"])
def test_one_rank_alone_decodes_a_clip_and_only_once(tmp_path, loader, monkeypatch, decoder, kind, shuffle):
    """The batches that four ranks decode ahead are counted too, and those of a run that two ranks resume."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    for i in range(8):
        write(tmp_path / f"{i}{FORMATS[kind][2]}", noise(2000, i), RATE, kind)
    index = build_index(tmp_path)
    decoded: list[tuple[str, float]] = []  # the file and the place of the crop, which differs between epochs
    owner, name = (ajepa.data.dali.DaliReader, "_read_row") if decoder == "dali" else (Reader, "read_clip")
    work = getattr(owner, name)

    def counted(self, what, fraction, *args):
        decoded.append((index.entries[what].name if isinstance(what, int) else what.name, float(fraction)))
        return work(self, what, fraction, *args)

    monkeypatch.setattr(owner, name, counted)

    def run(world, steps, state=None):
        """What the ranks decode in so many steps and ahead of them, and the state after the steps."""
        decoded.clear()
        loaders = [
            loader(
                index, batch_size=8 // world, rank=r, world_size=world, decoder=decoder, shuffle=shuffle, state=state
            )
            for r in range(world)
        ]
        plans = [[one._stream.plan(loaders[0]._last["batches"] + i) for one in loaders] for i in range(steps)]
        for one in loaders:
            take(one, steps)
        for one in loaders:
            one.close()
        wanted = {
            (index.entries[item].name, fraction)
            for step in plans
            for plan in step
            for item, fraction in zip(plan.items.tolist(), plan.fractions.tolist(), strict=True)
        }
        assert len(wanted) == 8 * steps
        assert wanted <= set(decoded)
        assert len(decoded) == len(set(decoded))
        return wanted, loaders[0].state_dict()

    first, state = run(4, 3)
    second, _ = run(2, 2, state)
    again, _ = run(4, 2, state)
    assert second == again and not first & second


@pytest.mark.parametrize("decoder", ["soundfile", "auto"])
@pytest.mark.parametrize("world", [2, 12])  # 12 are more than there are recordings
def test_resident_loaders_of_several_ranks_decode_once_and_hold_the_same(tmp_path, loader, monkeypatch, world, decoder):
    """Rows of ranks differ in format, so a rank alone would choose another sample type for DALI than all together."""
    kinds = ["flac", "wav24", "flac", "vorbis"]
    for i in range(10):
        rate = 22050 if i % 3 else RATE
        write(tmp_path / f"{i}{FORMATS[kinds[i % 4]][2]}", noise(900 + 400 * i, i), rate, kinds[i % 4])
    index = build_index(tmp_path)
    for i in (2, 5):
        os.remove(index.entries[i].path)
    asked: list[str] = []
    good_row = Reader.good_row

    def counted(self, item, *args):
        asked.append(self.index.entries[item].name)
        return good_row(self, item, *args)

    barrier, parts = threading.Barrier(world, timeout=60), {}

    def join_as(rank):
        def join(decode):
            parts[rank] = decode()
            barrier.wait()
            sums = [sum(tensors) for tensors in zip(*(tensors for _, tensors in parts.values()), strict=True)]
            barrier.wait()
            for tensor, total in zip(parts[rank][1], sums, strict=True):
                tensor.copy_(total)
            return {name: reason for bad, _ in parts.values() for name, reason in bad.items()}, parts[rank][1]

        return join

    options = {"decoder": decoder, "world_size": world, "batch_size": 24 // world}
    resident = {**OPTIONS, **options, "device": torch.device("cpu")}
    with monkeypatch.context() as patch, ThreadPoolExecutor(world) as pool:
        patch.setattr(Reader, "good_row", counted)
        made = [pool.submit(ResidentLoader, index, **resident, rank=r, join=join_as(r)) for r in range(world)]
        shared = [one.result() for one in made]
    assert sorted(asked) == sorted(index.entries.names())
    alone = ResidentLoader(index, **resident)
    assert [name for name, _ in alone.skipped] == [index.entries[i].name for i in (2, 5)]
    for rank, one in enumerate(shared):
        assert one.skipped == alone.skipped
        assert torch.equal(one._bank, alone._bank) and np.array_equal(one._lengths, alone._lengths)
        assert_same(take(one, 3), take(loader(index, **options, rank=rank), 3))


def test_a_batch_larger_than_the_data_set_wraps(tmp_path, loader):
    write_set(tmp_path, 3)
    batch = next(loader(build_index(tmp_path), batch_size=8))
    assert np.bincount(batch.items).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_batches_own_their_memory(tmp_path, loader):
    write_set(tmp_path, 9)
    batches = loader(build_index(tmp_path))
    kept = take(batches, 3)
    copies = [batch.pcm.clone() for batch in kept]
    take(batches, 6)
    assert all(torch.equal(batch.pcm, copy) for batch, copy in zip(kept, copies, strict=True))


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_resume_in_mid_epoch_is_exact(tmp_path, loader, cut):
    write_set(tmp_path, 11, frames=5000)
    index = build_index(tmp_path)
    options = {"gain_db": 6.0, "rank": 1, "world_size": 2}
    whole = take(loader(index, **options), 10)
    begun = loader(index, **options)
    take(begun, cut)
    time.sleep(0.05)  # let the loader prefetch: the state must count only the returned batches
    state = json.loads(json.dumps(begun.state_dict()))
    resumed = loader(index, state=state, **options)
    assert resumed.epoch == begun.epoch == cut * 8 / 11
    assert_same(take(resumed, 10 - cut), whole[cut:])
    begun.load(state)  # a loader can also go back to an earlier state
    assert_same(take(begun, 10 - cut), whole[cut:])


@pytest.mark.parametrize("shuffle", ["all", "ranges"])
def test_resume_on_another_number_of_ranks_goes_on_with_the_same_global_batches(tmp_path, loader, shuffle):
    write_set(tmp_path, 11, frames=5000)
    index = build_index(tmp_path)

    def ranks(world, **options):
        size = {"batch_size": 12 // world, "world_size": world, "gain_db": 6.0, "shuffle": shuffle}
        return [loader(index, **size, **options, rank=rank) for rank in range(world)]

    def global_batches(loaders, count):
        """Clip i of a global batch of W ranks is clip i // W of rank i mod W."""
        parts = [take(each, count) for each in loaders]
        return [torch.stack([part[i].pcm for part in parts], 1).flatten(0, 1) for i in range(count)]

    whole = global_batches(ranks(1), 6)
    begun = ranks(3)
    got = global_batches(begun, 2)
    resumed = ranks(2, state=json.loads(json.dumps(begun[0].state_dict())))
    got += global_batches(resumed, 2)
    got += global_batches(ranks(1, state=resumed[0].state_dict()), 2)
    assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


def test_resume_without_dali_s_checkpoint_is_exact_too(tmp_path, loader):
    write_set(tmp_path, 11, frames=5000)
    index = build_index(tmp_path)
    begun = loader(index)
    take(begun, 3)
    state = {**begun.state_dict(), "dali": "bm90IGEgY2hlY2twb2ludA=="}
    wanted = take(begun, 6)
    resumed = loader(index, state=state)
    assert_same(take(resumed, 3), wanted[:3])
    assert_same(take(loader(index, state=resumed.state_dict()), 3), wanted[3:])


def test_closing_loses_no_batch(tmp_path, loader):
    write_set(tmp_path, 11)
    index = build_index(tmp_path)
    wanted = take(loader(index), 4)
    batches = loader(index)
    got = take(batches, 2)
    batches.close()
    assert_same(got + take(batches, 2), wanted)


def test_a_state_of_another_stream_is_refused(tmp_path, loader):
    write_set(tmp_path, 5)
    index = build_index(tmp_path)
    state = loader(index).state_dict()
    for change in ({"seed": 1}, {"batch_size": 2}, {"world_size": 2}, {"shuffle": "none"}, {"shuffle": "ranges"}):
        name = "shuffle|seed|global_batch"
        with pytest.raises(ValueError, match=f"({name}).*to resume"):
            loader(index, state=state, **change)
    ranges = loader(index, shuffle="ranges").state_dict()
    with pytest.raises(DataError, match="saved with shuffle=ranges, this run has all: keep shuffle to resume"):
        loader(index, state=ranges)
    write(tmp_path / "more.wav", noise(900))
    with pytest.warns(UserWarning, match="data set changed"):
        next(loader(build_index(tmp_path), state=state))


def test_a_run_s_loader_has_its_order(rows):
    for shuffle in ("all", "ranges"):
        cfg = config.preset("tiny", shuffle=shuffle)
        with Corpus(rows(8), None, [], "").loader(cfg, None, rank=1, world_size=2) as batches:
            assert batches.state_dict()["shuffle"] == shuffle


def test_states_of_earlier_versions_are_those_of_whole_permutations(tmp_path, loader):
    write_set(tmp_path, 5)
    index = build_index(tmp_path)
    begun = loader(index)
    take(begun, 2)
    state = begun.state_dict()
    wanted = take(begun, 3)
    without = {name: value for name, value in state.items() if name != "shuffle"}
    for old in ({**state, "shuffle": True}, without):
        assert_same(take(loader(index, state=old), 3), wanted)
        with pytest.raises(DataError, match="saved with shuffle=all, this run has ranges"):
            loader(index, state=old, shuffle="ranges")
    ordered = {**state, "shuffle": False}
    assert items(take(loader(index, state=ordered, shuffle="none"), 1)) == [3, 4, 0, 1]


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def lengthen(path):
    path.write_bytes(encode(noise(5000)))


@pytest.mark.parametrize("harm", [remove, empty, cut_short, overwrite, lengthen])
@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_a_file_that_goes_bad_is_replaced(tmp_path, loader, harm, suffix):
    for i in range(6):
        write(tmp_path / f"{i}.{suffix}", noise(CLIP, i), RATE, {"wav": "wav16", "ogg": "vorbis"}.get(suffix, suffix))
    index = build_index(tmp_path)
    wanted = take(loader(index, shuffle="none"), 6)
    harm(tmp_path / f"2.{suffix}")
    batches = loader(index, shuffle="none")
    got = take(batches, 6)
    assert items(got) == [3 if item == 2 else item for item in items(wanted)]
    ((path, reason),) = batches.skipped
    assert path == str(tmp_path / f"2.{suffix}")
    assert reason
    clip = {item: pcm for batch in wanted for item, pcm in zip(batch.items.tolist(), batch.pcm, strict=True)}
    for batch in got:
        for item, pcm in zip(batch.items.tolist(), batch.pcm, strict=True):
            assert torch.equal(pcm, clip[item])


@pytest.mark.parametrize("decoder", ["soundfile", "dali"])
@pytest.mark.parametrize("kind", ["flac", "wav16", "vorbis"])
def test_damage_that_only_decoding_finds(tmp_path, loader, kind, decoder):
    """The damaged file has the size and time of the indexed one, so only the decoder notices. DALI's pipeline is then
    rebuilt."""
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    suffix = FORMATS[kind][2]
    for i in range(9):
        write(tmp_path / f"{i}{suffix}", noise(20000, i), RATE, kind)
    index = build_index(tmp_path)
    options = {"shuffle": "none", "clip_samples": 20000, "gain_db": 3.0, "decoder": decoder}
    wanted = take(loader(index, **options), 8)
    for name in ("5", "6"):
        path = tmp_path / f"{name}{suffix}"
        times = path.stat().st_mtime_ns
        data = path.read_bytes()
        path.write_bytes(data[:100] + bytes(len(data) - 100) if kind != "wav16" else data[:40] + bytes(len(data) - 40))
        os.utime(path, ns=(times, times))
    batches = loader(index, **options)
    got = take(batches, 8)
    assert items(got) == [7 if item in (5, 6) else item for item in items(wanted)]
    assert sorted(os.path.basename(path)[0] for path, _ in batches.skipped) == ["5", "6"]  # two threads find them
    assert torch.equal(got[0].pcm, wanted[0].pcm)
    assert torch.equal(got[-1].pcm[-1], wanted[-1].pcm[-1])


def test_a_substitution_is_part_of_the_state(tmp_path, loader):
    write_set(tmp_path, 7, frames=5000)
    index = build_index(tmp_path)
    data, times = (tmp_path / "003.wav").read_bytes(), (tmp_path / "003.wav").stat().st_mtime_ns
    (tmp_path / "003.wav").unlink()
    begun = loader(index)
    take(begun, 3)
    state = json.loads(json.dumps(begun.state_dict()))
    assert list(state["skipped"].values()) == ["no such file or directory"]
    wanted = take(begun, 6)
    (tmp_path / "003.wav").write_bytes(data)  # the file is back, but the run has already dropped it
    os.utime(tmp_path / "003.wav", ns=(times, times))
    resumed = loader(index, state=state)
    assert_same(take(resumed, 6), wanted)
    assert resumed.skipped == begun.skipped


def test_a_touched_file_is_still_read(tmp_path, loader):
    write_set(tmp_path, 4)
    index = build_index(tmp_path)
    os.utime(tmp_path / "001.wav")
    batches = loader(index)
    assert set(items(take(batches, 3))) == {0, 1, 2, 3}
    assert batches.skipped == []


def test_when_no_file_is_left_the_run_ends_with_one_error(tmp_path, loader):
    write_set(tmp_path, 3)
    index = build_index(tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
    batches = loader(index)
    for _ in range(2):
        with pytest.raises(DataError, match="no usable file is left, 3 went bad"):
            next(batches)


def test_iterate_once_yields_each_row_once_in_order(tmp_path):
    clips = write_set(tmp_path, 7)
    index = build_index(tmp_path)
    batches = list(iterate_once(index, sample_rate=RATE, clip_samples=CLIP, batch_size=3))
    assert [len(batch.items) for batch in batches] == [3, 3, 1]
    assert items(batches) == list(range(7))
    assert np.array_equal(torch.cat([batch.pcm for batch in batches]).numpy(), np.stack(clips))


def test_iterate_once_leaves_bad_files_out(tmp_path):
    write_set(tmp_path, 7)
    index = build_index(tmp_path)
    for i in (0, 3, 6):
        (tmp_path / f"00{i}.wav").unlink()
    skipped: list[tuple[str, str]] = []
    batch = once(index, skipped=skipped)
    assert batch.items.tolist() == [1, 2, 4, 5]
    assert sorted(os.path.basename(path) for path, _ in skipped) == ["000.wav", "003.wav", "006.wav"]


@pytest.mark.parametrize(
    "option",
    [{"batch_size": 0}, {"clip_samples": 0}, {"sample_rate": 0}, {"pad": "wrap"}, {"crop": "end"}, {"gain_db": -1.0},
     {"rank": 2, "world_size": 2}, {"prefetch": 0}, {"seed": -1}, {"shuffle": True}],
)  # fmt: skip
def test_arguments_out_of_range_are_named(tmp_path, loader, option):
    write_set(tmp_path, 1)
    with pytest.raises(ValueError, match=next(iter(option))):
        loader(build_index(tmp_path), **option)


def test_a_dropped_loader_leaves_no_thread(tmp_path):
    write_set(tmp_path, 3)
    batches = AudioLoader(build_index(tmp_path), **OPTIONS)
    next(batches)
    del batches
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ajepa")]


@pytest.mark.skipif(not REAL, reason="AJEPA_TEST_AUDIO names no folder of recordings")
def test_real_recordings(loader):
    index = build_index(os.path.join(REAL, "smoke"))
    options = {"sample_rate": 16000, "clip_samples": 32000, "batch_size": 20}
    batches = loader(index, **options)
    epoch = take(batches, 2)
    assert sorted(items(epoch)) == list(range(40))
    assert batches.skipped == []
    assert all((batch.pcm.float().std(1) > 1).all() for batch in epoch)
