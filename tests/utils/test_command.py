"""What all commands share: how they start, what they do with errors and Ctrl-C, and output that nobody takes."""

import errno
import io
import os
import signal
import subprocess
import sys
import time

import pytest

from ajepa.utils import command as commands
from ajepa.utils import cores, devices
from ajepa.utils.command import SPINS, LastingStream, command, lasting_output
from ajepa.utils.errors import ConfigError

SHOW = "import os, ajepa; print({k: v for k, v in os.environ.items() if 'OMP' in k or 'KMP' in k})"


def start(words: list[str], **settings: str) -> subprocess.Popen:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    return subprocess.Popen([sys.executable, *words], env={**kept, "PYTHONPATH": os.pathsep.join(sys.path), **settings},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def test_commands_choose_how_threads_wait_and_libraries_leave_the_environment_alone(tmp_path):
    (tmp_path / "ajepa-probe").write_text(SHOW)
    as_script = [str(tmp_path / "ajepa-probe")]
    assert eval(start(as_script).communicate()[0]) == dict([SPINS])
    assert eval(start(["-c", SHOW]).communicate()[0]) == {}
    for chosen in ({"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}):
        assert eval(start(as_script, **chosen).communicate()[0]) == chosen


@pytest.mark.parametrize(("argv", "script", "expected"), [
    (["python", "-m", "ajepa.train"], "-m", True),
    (["python", "-u", "-m", "ajepa"], "-m", True),
    (["python", "/bin/ajepa-pack", "x"], "/bin/ajepa-pack", True),
    (["python", "-m", "pytest", "ajepa"], "/lib/pytest.py", False),
    (["python", "train.py"], "train.py", False),
])  # fmt: skip
def test_a_command_is_known_by_how_it_was_started(argv, script, expected, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", argv)
    monkeypatch.setattr(sys, "argv", [script])
    assert commands.is_command() is expected


@pytest.mark.parametrize(("quota", "threads"), [("150000 100000", "2"), ("max 100000", None), ("50000 100000", "1")])
def test_a_container_gets_as_many_threads_as_it_may_use(quota, threads, tmp_path, monkeypatch):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(cores, "QUOTAS", (str(tmp_path / "cpu.max"),))
    monkeypatch.setattr(cores, "start", None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", {})
    commands.prepare()
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert cores.cores() == int(threads or 64)


def test_free_cores_are_those_that_others_leave(monkeypatch):
    """Four processors for ten seconds: two idle, one used by this process, and one by another."""
    moments = iter([cores.Snapshot(100, 5, dict.fromkeys(range(4), 50.0)),
                    cores.Snapshot(110, 15, {0: 60.0, 1: 60.0, 2: 50.0, 3: 50.0})])  # fmt: skip
    monkeypatch.setattr(cores, "snapshot", lambda: next(moments))
    assert cores.free_cores(cores.snapshot()) == pytest.approx(3.0)


@pytest.mark.parametrize(("asked", "free", "ranks", "threads"), [
    (0, 7.8, "1", 8), (0, 5.4, "1", 6), (0, 1.1, "1", 1), (0, 0.1, "1", 1), (0, 99, "1", 8), (0, 7.8, "4", 2),
    (3, 1.0, "1", 3), (0, None, "1", 8),
])  # fmt: skip
def test_a_run_takes_the_free_cores(asked, free, ranks, threads, monkeypatch):
    monkeypatch.setattr(devices, "free_cores", lambda _: free)
    monkeypatch.setattr(devices.torch, "get_num_threads", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert devices.choose_threads(asked) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "8")  # the user's choice
    assert devices.choose_threads(asked) == (asked or 8)


def test_ctrl_c_during_the_imports_gives_one_line_and_130():
    process = start(["-m", "ajepa.train", "--help"])
    time.sleep(0.4)  # torch takes longer to import
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (process.returncode, said) == (130, "stopped\n")


def raising(error: BaseException):
    @command
    def main(argv=None) -> int:
        raise error

    return main


@pytest.mark.parametrize(("error", "status", "said"), [
    (KeyboardInterrupt(), 130, "stopped\n"),
    (KeyboardInterrupt("stopped after step 3"), 130, "stopped after step 3\n"),
    (KeyboardInterrupt(""), 130, ""),  # another rank has said it
    (ConfigError("--lr 0: must be above 0"), 2, "error: --lr 0: must be above 0\n"),
    (OSError(errno.EIO, "Input/output error", "/x/y"), 2, "error: /x/y: Input/output error\n"),
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2,
     "error: /x/y: No space left on device: make room, and repeat the command, a run with --resume\n"),
    (MemoryError(), 2, "error: not enough memory: an allocation failed\n"),
])  # fmt: skip
def test_errors_and_ctrl_c_are_one_line_and_a_status(error, status, said, capsys):
    assert raising(error)([]) == status
    assert capsys.readouterr().err == said


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        raising(ZeroDivisionError())([])


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, *_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    flush = write


def test_output_that_nobody_takes_is_dropped(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    with lasting_output():
        print("lost")
        print("lost as well", flush=True)
        assert not sys.stdout.isatty()
    assert isinstance(sys.stdout, Broken)


def test_a_closed_standard_stream_is_no_stream_for_others(tmp_path):
    (tmp_path / "ajepa-x").write_text("import sys, ajepa; print(open(sys.argv[0]).fileno(), file=sys.stderr)")
    line = f'exec "{sys.executable}" "{tmp_path}/ajepa-x" <&- >&-'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert int(done.stderr) > 2


def test_characters_that_an_encoding_lacks_are_escaped():
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("caf\u00e9")
    stream.flush()
    assert raw.getvalue() == b"caf\\xe9"
