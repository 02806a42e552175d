"""Output that nobody takes: a closed pipe, a full device, no standard streams, an ASCII terminal, a hang-up."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import SMALL

from ajepa import config, train
from ajepa.training.run_log import RunLog
from ajepa.utils.command import LastingStream, command, lasting_output
from ajepa.utils.run_folder import checkpoints

main = command(train.main)


def closed_pipe(**options):
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", **options)


class Terminal(io.TextIOWrapper):
    """A terminal whose window was closed: every write fails with EIO."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)
        self.failed = 0

    def isatty(self):
        return True

    def write(self, text):
        self.failed += 1
        raise OSError(5, "Input/output error")


LOST = {
    "closed pipe": closed_pipe,
    "closed pipe, by lines": lambda: closed_pipe(buffering=1),
    "full device": lambda: open("/dev/full", "w", buffering=1),  # noqa: SIM115 (closed by the test)
    "closed terminal": Terminal,
    "no stream": lambda: None,
    "closed file": lambda: closed(io.StringIO()),
}


def closed(stream):
    stream.close()
    return stream


@pytest.mark.parametrize("kind", LOST)
def test_a_run_without_anyone_to_read_it_finishes(small_run, monkeypatch, kind):
    """With `closed terminal` the progress bar is on, and its thread writes as well."""
    argv, folder = small_run
    streams = LOST[kind](), LOST[kind]()
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert main([*argv, "--compare-steps", "0", "--steps", "4"]) == 0
    assert (sys.stdout, sys.stderr) == streams
    monkeypatch.undo()
    assert (folder / "summary.json").exists() and (folder / "encoder.safetensors").exists()
    assert kind != "closed terminal" or streams[0].failed
    if hasattr(streams[0], "fileno") and not streams[0].closed and kind != "closed terminal":
        streams[0].close()  # what it still holds goes to the null device, as it does when Python ends


def test_a_run_that_a_script_starts_goes_on_without_output(tones, tmp_path, monkeypatch):
    cfg = config.parse(["--data", str(tones), "--out", str(tmp_path / "run"), *SMALL, "--compare-steps", "0"])
    monkeypatch.setattr(sys, "stdout", Terminal())
    train.run(cfg)
    failed = sys.stdout.failed
    monkeypatch.undo()
    assert failed and (tmp_path / "run" / "summary.json").exists()


def test_names_that_are_not_ascii_are_escaped_on_an_ascii_terminal(tones, small_run, monkeypatch, tmp_path):
    data, out = tmp_path / "Gerätschaft", tmp_path / "läuft"
    shutil.copytree(tones, data)
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    argv = [*small_run[0], "--data", str(data), "--out", str(out), "--compare-steps", "0", "--steps", "3"]
    statuses = main(argv), main(argv)  # the second refuses the folder
    monkeypatch.undo()
    said, errors = (stream.buffer.getvalue().decode("ascii") for stream in streams)
    assert statuses == (0, 2), errors
    assert "Ger\\xe4tschaft" in said and "l\\xe4uft" in said and "l\\xe4uft" in errors and "Traceback" not in errors


def test_a_full_disk_costs_only_the_text_of_that_time(tmp_path):
    class Disk(io.StringIO):
        full = False

        def write(self, text):
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    disk = Disk()
    stream = LastingStream(disk)
    stream.write("before\n")
    disk.full = True
    assert stream.write("lost\n") == 5
    disk.full = False
    stream.writelines(["af", "ter\n"])
    assert disk.getvalue() == "before\nafter\n"


def test_a_library_may_replace_the_streams(monkeypatch):
    lost = closed_pipe()
    monkeypatch.setattr(sys, "stdout", lost)
    with lasting_output():
        print("text that waits in the buffer")
        sys.stdout = closed(io.StringIO())  # whose flush would fail
    assert sys.stdout is lost
    lost.close()


SCRIPT = """
import sys
from ajepa.utils.command import command, prepare
prepare()
def main(argv):
    for number in range(20_000):
        print("line", number, "ü")
    print("error: ü", file=sys.stderr)
    import os
    open(os.environ["DONE"], "w").write(repr([os.fstat(i).st_size for i in range(3)]))
    return 0
sys.exit(command(main)())
"""


@pytest.mark.parametrize(
    "line",
    ["{} | head -1", "{} | true", "{} >/dev/full 2>&1", "{} <&- >&- 2>&-", "{} >&-", "{} 2>&-", "{} <&-",
     "LC_ALL=C PYTHONIOENCODING=ascii PYTHONUTF8=0 {} >/dev/null"],
)  # fmt: skip
def test_a_process_ends_with_status_0_whoever_listens(tmp_path, line):
    """The status counts what Python does at its end: it gives 120 where the last flush of a stream fails."""
    (tmp_path / "script.py").write_text(SCRIPT)
    started = line.format(f"{sys.executable} {tmp_path / 'script.py'}")
    environment = {**os.environ, "DONE": str(tmp_path / "done")}
    status = "set -o pipefail; " + started
    ended = subprocess.run(["bash", "-c", status], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "done").exists() and "Traceback" not in ended.stderr and "Exception" not in ended.stderr
    assert "| head" not in line or ended.stdout.startswith("line 0 ")


def test_a_hang_up_saves_and_ends(small_run, tmp_path, forks):
    """A closed terminal sends SIGHUP, often twice, and takes no more output."""
    argv, folder = small_run
    argv = [*argv, "--compare-steps", "0", "--steps", "100000", "--checkpoint-every", "100000", "--log-every", "1"]
    pid = forks.start(argv, tmp_path / "log", call="test_lost_output:main_that_loses_its_terminal")
    end = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_bytes().splitlines()) < 4:
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.01)
    os.kill(pid, signal.SIGHUP)
    time.sleep(0.002)
    os.kill(pid, signal.SIGHUP)
    assert forks.wait(pid) == 130
    (saved,) = checkpoints(folder / "checkpoints")
    assert int(saved.name.split("_")[1]) >= 4 and not (folder / "summary.json").exists()


def main_that_loses_its_terminal(argv):
    """In a process of its own: the terminal is gone after the third line of the log."""
    lines = []
    say = RunLog.say

    def lose(self, text, style=None):
        lines.append(text)
        if len(lines) == 3:
            sys.stdout._stream, sys.stderr._stream = Terminal(), Terminal()
        say(self, text, style)

    RunLog.say = lose
    return main(argv)
