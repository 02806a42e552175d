"""The list of skipped files, and sizes that cannot fit in memory."""

import os
from pathlib import Path

import pytest
import torch

import ajepa
from ajepa.data import loader
from ajepa.data.index import DataError, build_index
from ajepa.data.loader import AudioLoader
from ajepa.training import corpus
from ajepa.training.corpus import Corpus, load_evaluation, open_corpus
from ajepa.utils import devices

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
    monkeypatch.setattr(corpus, "available_memory", lambda: 2 * 2 * 20 * 8_000)
    assert len(load_evaluation(cfg, index, None, 20, []).pcm) == 20
    with pytest.raises(DataError, match=r"21 evaluation clips of 0.5 s need .*: lower --eval-clips"):
        load_evaluation(cfg, index, None, 21, [])


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
