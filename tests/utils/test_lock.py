"""One process at a time in a folder: living, killed and foreign holders, half-written locks, lost locks."""

import json
import os
import signal
import threading
import time

import pytest

from ajepa.utils import lock as module
from ajepa.utils.errors import ConfigError
from ajepa.utils.lock import Lock, locked


def hold(argv):
    """In a process of its own: hold the lock of `argv[0]` until the process is killed."""
    with locked(module.Path(argv[0])):
        time.sleep(60)


@pytest.fixture
def holder(tmp_path, forks):
    """The id of a process that holds the lock of `tmp_path`."""
    pid = forks.start([str(tmp_path)], tmp_path.with_suffix(".log"), call="test_lock:hold")
    while not (tmp_path / module.NAME).exists():
        time.sleep(0.01)
    yield pid
    os.kill(pid, signal.SIGKILL)
    forks.wait(pid)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.02)


def names(folder):
    return [path.name for path in folder.iterdir()]


def elsewhere(folder, beats=0):
    """A lock as a process of another machine leaves it."""
    content = {"host": "other", "machine": "other 1", "pid": 7, "start": "1", "since": "then", "beats": beats,
               "token": "theirs"}  # fmt: skip
    aside = folder.parent / "aside"
    aside.write_text(json.dumps(content))
    os.replace(aside, folder / module.NAME)


def test_a_lock_is_held_within_the_block_and_leaves_nothing(tmp_path):
    with locked(tmp_path) as lock:
        lock.check()
        assert names(tmp_path) == [module.NAME]
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on .* choose another --cache"):
            Lock(tmp_path).take("--cache")
    assert names(tmp_path) == []
    with locked(tmp_path):  # again, in the same process
        pass


def test_a_living_process_keeps_its_lock_and_a_killed_one_loses_it_at_once(tmp_path, holder, monkeypatch):
    with pytest.raises(ConfigError, match=f"in use by process {holder} on .* since .*: wait for its end"):
        Lock(tmp_path).take("--out")
    os.kill(holder, signal.SIGSTOP)  # suspended, but not dead
    with pytest.raises(ConfigError, match=f"process {holder}"):
        Lock(tmp_path).take("--out")
    monkeypatch.setattr(Lock, "_beats", None)  # nothing to wait for on one machine
    os.kill(holder, signal.SIGKILL)
    while module._start(holder) is not None:
        time.sleep(0.01)
    with locked(tmp_path) as lock:
        lock.check()


def test_another_process_with_the_number_of_the_holder_is_not_the_holder(tmp_path):
    with locked(tmp_path) as lock:
        old = json.loads(lock.path.read_text())
    (tmp_path / module.NAME).write_text(json.dumps({**old, "start": "1", "token": "old"}))
    with locked(tmp_path) as lock:
        lock.check()


def test_a_process_that_hides_its_start_counts_as_living(tmp_path, monkeypatch):
    with locked(tmp_path) as lock:
        old = json.loads(lock.path.read_text())
    (tmp_path / module.NAME).write_text(json.dumps({**old, "token": "old"}))
    monkeypatch.setattr(module, "_start", lambda pid: module.UNKNOWN)
    with pytest.raises(ConfigError, match="in use"):
        Lock(tmp_path).take("--out")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', '{"pid": -1}', "[" * 100_000])
def test_an_unreadable_lock_is_waited_for_and_then_taken(tmp_path, content, quick, capsys):
    (tmp_path / module.NAME).write_text(content)
    with locked(tmp_path) as lock:
        lock.check()
    assert capsys.readouterr().err.count("unknown process; waiting") == 1


def test_a_lock_of_another_machine_is_taken_once_its_heart_stands_still(tmp_path, quick, capsys):
    elsewhere(tmp_path)
    with locked(tmp_path) as lock:
        lock.check()
    assert "is locked by process 7 on other since then; waiting" in capsys.readouterr().err


def test_a_lock_of_another_machine_with_a_heartbeat_is_respected(tmp_path, monkeypatch):
    elsewhere(tmp_path)
    monkeypatch.setattr(module, "BEAT", 1.0)
    waits = iter(range(1, 100))
    monkeypatch.setattr(module.time, "sleep", lambda _: elsewhere(tmp_path, next(waits)))
    with pytest.raises(ConfigError, match="in use by process 7 on other"):
        for _ in range(3):  # each look finds a beat, and then the same holder with another count
            Lock(tmp_path).take("--out")


def test_the_heart_beats(tmp_path, quick):
    with locked(tmp_path) as lock:
        first = json.loads(lock.path.read_text())["beats"]
        end = time.monotonic() + 20
        while json.loads(lock.path.read_text())["beats"] < first + 3:
            assert time.monotonic() < end
            time.sleep(0.005)
    assert names(tmp_path) == []


def test_a_process_that_lost_its_lock_finds_out_and_leaves_the_new_one_alone(tmp_path, quick):
    with pytest.raises(ConfigError, match="was taken over by process 7 on other"), locked(tmp_path) as lock:
        elsewhere(tmp_path)
        time.sleep(0.1)  # several heartbeats
        lock.check()
    assert json.loads((tmp_path / module.NAME).read_text())["token"] == "theirs"


def test_a_lock_that_was_deleted_is_made_again(tmp_path):
    with locked(tmp_path) as lock:
        lock.path.unlink()
        lock.check()
        with pytest.raises(ConfigError, match="in use"):
            Lock(tmp_path).take("--out")


def test_of_many_that_find_a_dead_holder_one_takes_the_lock(tmp_path, quick):
    elsewhere(tmp_path)
    taken, refused, everyone = [], [], threading.Barrier(8)

    def attempt():
        lock = Lock(tmp_path)
        everyone.wait()
        try:
            lock.take("--out")
            taken.append(lock)
        except ConfigError:
            refused.append(lock)

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holding = [lock for lock in taken if lock._holds()]
    assert len(holding) == 1 and len(taken) + len(refused) == 8
    for lock in taken:
        lock.release()
    assert names(tmp_path) == []


def test_leftovers_of_kills_are_cleared_and_links_are_not_needed(tmp_path, monkeypatch):
    (tmp_path / f"{module.NAME}.123").write_text("{}")

    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    with locked(tmp_path):
        assert names(tmp_path) == [module.NAME]
        with pytest.raises(ConfigError, match="in use"):
            Lock(tmp_path).take("--out")
