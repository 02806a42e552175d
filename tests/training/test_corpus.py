"""The list of skipped files, sizes that cannot fit in memory, and decoding that ranks share."""

import os
from pathlib import Path

import pytest
import torch
from make_audio import noise, write

import ajepa
from ajepa.config import Config
from ajepa.data import loader, resident
from ajepa.data.index import DataError, build_index
from ajepa.data.loader import AudioLoader
from ajepa.data.reader import Reader
from ajepa.data.resident import ResidentLoader
from ajepa.evaluation.features import Evaluation
from ajepa.training import corpus
from ajepa.training.corpus import Corpus, load_evaluation, open_corpus
from ajepa.training.distributed import joined
from ajepa.training.ranks import ElsewhereError
from ajepa.utils import devices

CPU = torch.device("cpu")
SMALL = {"clip_seconds": 0.5, "n_frames": 16, "hop_length": 480, "min_context": 2}


@pytest.fixture(scope="module")
def opened(tones) -> Corpus:
    return open_corpus(ajepa.preset("tiny", data=str(tones), **SMALL))


def test_the_list_of_skipped_files_is_kept_current_and_written_only_when_it_changes(opened, tmp_path, monkeypatch):
    one = Corpus(opened.index, opened.evaluation, [("a.wav", "empty file")], "")
    written: list[bytes] = []
    original = corpus.write_atomic
    monkeypatch.setattr(corpus, "write_atomic", lambda path, data: (written.append(data), original(path, data)))
    assert one.write_skipped(tmp_path, []) == 1
    assert (tmp_path / "skipped.tsv").read_text() == "path\treason\na.wav\tempty file\n"
    found = {"a.wav": "empty file"}
    assert one.write_skipped(tmp_path, found.items()) == 1 and len(written) == 1
    found["b\n.wav"] = "truncated:\t1 of 2"
    assert one.write_skipped(tmp_path, found.items()) == one.write_skipped(tmp_path, found.items()) == 2
    assert (tmp_path / "skipped.tsv").read_text() == "path\treason\na.wav\tempty file\nb\\n.wav\ttruncated: 1 of 2\n"
    assert len(written) == 2
    (tmp_path / "other").mkdir()
    assert one.write_skipped(tmp_path / "other", found.items()) == 2 and (tmp_path / "other" / "skipped.tsv").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "skipped.tsv"]  # no partial file is left


def options(**changes):
    return {"sample_rate": 16_000, "clip_samples": 8_000, "batch_size": 4, "seed": 0, **changes}


@pytest.mark.parametrize("change", [{"batch_size": 10**9}, {"clip_samples": 10**10}, {"prefetch": 10**9}])
def test_batches_that_cannot_fit_are_refused_before_they_are_allocated(opened, change):
    with pytest.raises(DataError, match=r"GB of memory, and .* GB are free: lower --batch-size, --prefetch"):
        AudioLoader(opened.index, **options(**change))


def test_the_batches_of_all_ranks_of_a_machine_count(opened, monkeypatch):
    need = 5 * 4 * 8_000 * 2  # two batches are ready, and three more are held
    monkeypatch.setattr(loader, "available_memory", lambda: need)
    next(AudioLoader(opened.index, **options()))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(DataError, match="for each of 2 ranks"):
        AudioLoader(opened.index, **options())


def test_evaluation_clips_that_cannot_fit_are_refused(tones, monkeypatch):
    cfg = ajepa.preset("tiny", data=str(tones), **SMALL)
    index = build_index(tones)
    monkeypatch.setattr(corpus, "available_memory", lambda: 2 * 20 * 8_000)
    assert len(load_evaluation(cfg, index, None, 20, []).pcm) == 20
    with pytest.raises(DataError, match=r"21 evaluation clips of 0.5 s need .*: lower --eval-clips"):
        load_evaluation(cfg, index, None, 21, [])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each rank of a machine holds all clips
    with pytest.raises(DataError, match="20 evaluation clips"):
        load_evaluation(cfg, index, None, 20, [])


def shared_set(folder: Path) -> Config:
    """A run on FLAC files of several lengths. Three go bad after their indexing, with the same size and time."""
    for i in range(13):
        write(folder / ("even", "odd")[i % 2] / f"{i:02d}.flac", noise(5_000 + 900 * i, i), kind="flac")
    cfg = ajepa.preset("tiny", data=str(folder), resident=True, decoder="soundfile", batch_size=4, **SMALL)
    index = build_index(folder)
    for row in (0, 5, 6):
        path = Path(index.entries[row].path)
        times, data = path.stat().st_mtime_ns, path.read_bytes()
        path.write_bytes(data[:200] + bytes(len(data) - 200))
        os.utime(path, ns=(times, times))
    return cfg


def contents(evaluation: Evaluation) -> dict[str, torch.Tensor]:
    names = ("pcm", "lengths", "labels", "is_test", "items")
    return {name: getattr(evaluation, name).clone() for name in names}


def sharing(argv) -> int:
    """Open the corpus and the loader of `shared_set`, and save what they hold and the names of what was decoded."""
    cfg = ajepa.config.load(Path(argv[0]))
    read: list[str] = []
    whole = Reader.read_clip
    with joined(cfg, CPU) as (ranks, device), pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "CHUNK_BYTES", 4_000)  # fewer bytes than a clip has, and no divisor of them
        patch.setattr(Reader, "read_clip", lambda self, e, *args: (read.append(e.name), whole(self, e, *args))[1])
        one = open_corpus(cfg, ranks)
        evaluated = read.copy()
        read.clear()
        loader = one.loader(cfg, None, ranks.rank, 2, device, ranks)
        assert isinstance(loader, ResidentLoader)
        batches = [tuple(next(loader)) for _ in range(8)]
        result = {"evaluation": contents(one.evaluation), "skipped": one.skipped, "evaluated": evaluated, "read": read}
        torch.save({**result, "batches": batches, "bad": loader.skipped}, f"{argv[1]}.{ranks.rank}")
    return 0


def test_ranks_decode_each_clip_once_and_hold_what_one_rank_holds(forks, tmp_path):
    cfg, log = shared_set(tmp_path / "set"), tmp_path / "log"
    ajepa.config.save(cfg, tmp_path / "config.json")
    codes = forks.run_ranks(2, [str(tmp_path / "config.json"), str(tmp_path / "out")], log, call="test_corpus:sharing")
    assert codes == [0, 0], [log.with_suffix(f".{rank}").read_text() for rank in range(2)]
    results = [torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2)]
    alone = open_corpus(cfg)
    files = list(alone.index.entries.names())
    for kind in ("evaluated", "read"):
        assert sorted(name for result in results for name in result[kind]) == sorted(files)
        assert {len(result[kind]) for result in results} == {6, 7}
    bad = ResidentLoader(alone.index, device=CPU, **corpus.clip_options(cfg), batch_size=2, seed=0).skipped
    assert [name for name, _ in bad] == [files[row] for row in (0, 5, 6)]
    for rank, result in enumerate(results):
        wanted = contents(alone.evaluation)
        assert all(torch.equal(result["evaluation"][name], x) for name, x in wanted.items())
        assert result["skipped"] == alone.skipped == bad and result["bad"] == bad
        host = alone.loader(cfg, None, rank, 2)  # decodes each batch by itself
        for got in result["batches"]:
            assert all(map(torch.equal, got, next(host)))
        host.close()


def failing(argv) -> int:
    """What is wrong on one rank ends the work of both, with one reason."""
    cfg = ajepa.config.load(Path(argv[0]))
    files = build_index(cfg.data.data)
    with joined(cfg, CPU) as (ranks, device):
        second = not ranks.is_first

        def refused(work, reason: str, reporter: int = 1) -> None:
            expected = DataError if ranks.rank == reporter else ElsewhereError
            with pytest.raises(expected, match=reason if ranks.rank == reporter else None):
                work()

        with pytest.MonkeyPatch.context() as patch:
            if second:
                patch.setattr(corpus, "available_memory", lambda: 0)
            refused(lambda: open_corpus(cfg, ranks), "13 evaluation clips of 0.5 s need")
        one = open_corpus(cfg, ranks)
        with pytest.MonkeyPatch.context() as patch:
            if second:
                patch.setattr(resident, "free_memory", lambda _: 0)
            refused(lambda: one.loader(cfg, None, ranks.rank, 2, device, ranks), "--resident: .* do not fit on cpu")
            small = ajepa.config.load(Path(argv[1]))  # its audio is held on the device if it fits on all ranks
            assert type(one.loader(small, None, ranks.rank, 2, device, ranks)) is AudioLoader
            if second:
                patch.setattr(loader, "available_memory", lambda: 0)
            refused(lambda: one.loader(small, None, ranks.rank, 2, device, ranks), "batches of 2 clips")
        assert type(one.loader(small, None, ranks.rank, 2, device, ranks)) is ResidentLoader

        test = "split=x" if second else None
        refused(lambda: load_evaluation(cfg, files, test, None, [], ranks), "no column 'split'")
        none = files.subset([0, 5, 6])
        refused(lambda: load_evaluation(cfg, none, None, None, [], ranks), "no usable file is left, 3 went bad", 0)

        skipped: list[tuple[str, str]] = []
        found = load_evaluation(cfg, files.subset([0, 1, 6, 2, 5]), None, None, skipped, ranks)
        assert found.items.tolist() == [1, 3] and len(skipped) == 3  # all files that rank 0 reads are bad
        found = load_evaluation(cfg, files.subset([3]), None, None, [], ranks)
        assert found.items.tolist() == [0] and found.pcm.any()  # rank 1 reads nothing
    return 0


def test_a_failure_on_one_rank_while_clips_are_shared_ends_both(forks, tmp_path):
    cfg, log = shared_set(tmp_path / "set"), tmp_path / "log"
    small = ajepa.preset("tiny", data=cfg.data.data, resident_gb=1.0, batch_size=4, **SMALL)
    paths = [tmp_path / "config.json", tmp_path / "small.json"]
    for one, path in zip((cfg, small), paths, strict=True):
        ajepa.config.save(one, path)
    codes = forks.run_ranks(2, [str(path) for path in paths], log, call="test_corpus:failing")
    assert codes == [0, 0], [log.with_suffix(f".{rank}").read_text() for rank in range(2)]


@pytest.mark.parametrize("controller", ["", "memory"])
def test_available_memory_is_what_the_control_groups_leave(tmp_path, monkeypatch, controller):
    limit, usage = (
        ("memory.max", "memory.current") if not controller else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    place = tmp_path / controller / "job" / "step"
    place.mkdir(parents=True)
    (place / limit).write_text("max" if not controller else str(1 << 62))
    (place / usage).write_text("5000")
    (place.parent / limit).write_text("9000")
    (place.parent / usage).write_text("7000")
    (place.parent / "memory.stat").write_text("anon 6000\ninactive_file 1000\n")
    monkeypatch.setattr(devices, "GROUPS", tmp_path)
    assert devices._group_memory(controller, "job/step") == 3000
    (place.parent / usage).write_text("99000")
    assert devices._group_memory(controller, "job/step") == 0


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the system does not report its free memory")
def test_available_memory_is_part_of_the_machine_s():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < devices.available_memory() < total
    assert devices.free_memory(torch.device("cpu")) < total
