"""`make gpu`: its parts share a time budget, its journal survives any end, and every part is rehearsed on a CPU."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import budget
import gpu
from budget import Part
from journal import Journal

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(
    bool(os.environ.get("AJEPA_JOURNAL")), reason="these tests start gpu.py, which started this run"
)


class Machine:
    """A simulated clock, and simulated processes with given durations and exit codes."""

    def __init__(self, journal: Journal, takes: dict[str, float] | None = None, codes: dict[str, int] | None = None):
        self.now, self.journal, self.takes, self.codes = 100.0, journal, takes or {}, codes or {}
        self.stubborn = 0.0  # seconds that a process survives after it is killed
        self.ran: list[tuple[str, float]] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def start(self, part: Part) -> list["Ran"]:
        return [Ran(self, part) for _ in range(part.processes)]

    def run(self, parts, seconds: float, **options) -> dict[str, str]:
        self.said: list[str] = []
        return budget.run(
            parts, seconds, self.journal, self.start, clock=lambda: self.now, sleep=self.sleep,
            say=self.said.append, **options,
        )  # fmt: skip


class Ran:
    """A simulated process of a part. It ends when its duration is over, or never."""

    def __init__(self, machine: Machine, part: Part):
        self.machine, self.part, self.begin, self.killed = machine, part, machine.now, float("inf")
        machine.ran.append((part.name, machine.now))
        items = [f"{part.name}::{i}" for i in range(3)]
        machine.journal.append({"part": part.name, "collected": items, "of": list(part.items)})
        machine.journal.append({"part": part.name, "started": items[0], "mode": part.mode, "inputs": "x"})

    def poll(self) -> int | None:
        now, takes = self.machine.now, self.machine.takes.get(self.part.name, self.part.expected)
        if now >= self.killed + self.machine.stubborn:
            return -9
        return self.machine.codes.get(self.part.name, 0) if now >= self.begin + takes else None

    def kill(self) -> None:
        self.killed = min(self.killed, self.machine.now)


@pytest.fixture
def lines(tmp_path) -> Journal:
    return Journal(tmp_path / "out" / "gpu.jsonl")


def part(name: str, expected: float = 10.0, limit: float = 20.0, **options) -> Part:
    return Part(name, f"what {name} says", (f"{name}.py",), expected, limit, **options)


def test_a_part_that_does_not_fit_is_named_and_the_next_that_fits_runs(lines):
    machine = Machine(lines)
    ended = machine.run([part("a", 30, 40), part("b", 50, 60), part("c", 20, 30)], 60)
    assert ended == {"a": "passed", "b": "skipped", "c": "passed"}
    assert any("b: skipped: needs about 50 s, and 30 s are left" in line for line in machine.said)
    assert [line["ended"] for line in lines.read() if "ended" in line] == ["passed", "skipped", "passed"]


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_kept_whatever_the_parts_do(lines, seed):
    """Durations are random and some are endless; killed processes may survive for a while."""
    rng = random.Random(seed)
    parts = [part(f"p{i}", expected := rng.uniform(1, 60), expected * rng.uniform(1, 3)) for i in range(9)]
    takes = {p.name: rng.choice([rng.uniform(0, 100), float("inf")]) for p in parts}
    machine, seconds = Machine(lines, takes), rng.uniform(20, 300)
    machine.stubborn = rng.choice([0.0, 1.0, float("inf")])
    begin = machine.now
    ended = machine.run(parts, seconds, begin=begin)
    assert machine.now - begin <= seconds + 5 and set(ended) == {p.name for p in parts}
    for line in lines.read():
        if "ended" in line and line["ended"] != "skipped":
            limit = next(p.limit for p in parts if p.name == line["part"])
            assert line["seconds"] <= limit + 5, f"the part {line['part']} exceeded its limit"


def test_time_that_is_gone_before_the_first_part_counts(lines):
    machine = Machine(lines)
    assert machine.run([part("a", 10, 20)], 60, begin=machine.now - 55) == {"a": "skipped"}


def test_a_part_that_hangs_or_crashes_costs_its_own_time(lines):
    machine = Machine(lines, {"hangs": float("inf"), "raises": 1.0, "crashes": 1.0}, {"raises": 1, "crashes": -11})
    ended = machine.run([part(name) for name in ("hangs", "raises", "crashes", "works")], 200)
    assert ended == {"hangs": "killed", "raises": "failed", "crashes": "failed", "works": "passed"}
    output = "\n".join(machine.said)
    assert "hangs: killed after 20 s: it exceeded its 20 s in hangs::0" in output
    assert "crashes: failed after 1 s: a process ended with status -11 in crashes::0" in output


def test_what_got_stuck_before_comes_after_everything_else(lines, monkeypatch):
    monkeypatch.setattr(budget, "inputs", lambda item: "x")
    machine = Machine(lines, {"hangs": float("inf")})
    parts = [part("hangs"), part("works")]
    machine.run(parts, 25)  # no time is left for the second part
    names = lambda: [(p.name, p.retry) for p in budget.passes(parts, lines.read())]  # noqa: E731
    assert names() == [("hangs", False), ("works", True), ("hangs", True)], "an item that hung comes last"
    for i in range(1, 3):
        lines.append({"part": "hangs", "item": f"hangs::{i}", "mode": "", "inputs": "x", "outcome": "passed"})
    assert names() == [("works", True), ("hangs", True)]
    monkeypatch.setattr(budget, "inputs", lambda item: "y")  # changed sources make another try worthwhile
    assert names() == [("hangs", False), ("works", True)]


def test_a_part_killed_before_it_knew_its_items_tries_all_of_them(lines):
    """One process may start an item before another process has written the list of items."""
    lines.append({"part": "a", "process": 1, "started": "a::1", "mode": "", "inputs": "x"})
    assert [p.retry for p in budget.passes([part("a", processes=2)], lines.read())] == [True]


# --- the journal ------------------------------------------------------------------------------------------------------


def test_a_torn_line_is_skipped_and_the_next_is_read(lines):
    lines.append({"a": 1})
    with open(lines.path, "a") as file:
        file.write('{"torn": ')
    assert lines.news() == [{"a": 1}] and lines.news() == []
    lines.append({"b": 2})
    assert lines.read() == [{"a": 1}, {"b": 2}] and lines.news() == [{"b": 2}]


def test_a_full_disk_loses_no_line(lines, monkeypatch, capsys):
    """The line is printed to standard error instead, and no part of it stays in the file."""
    lines.append({"a": 1})
    write = Journal._write

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if len(data) < 8:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[: len(data) - 4])  # only part of the line fits

        def truncate(self, end):
            self.file.truncate(end)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_write", staticmethod(lambda file, data, end: write(Full(file), data, end)))
        lines.append({"b": 2})
    assert lines.read() == [{"a": 1}]
    output = capsys.readouterr().err
    assert "No space left" in output and json.loads(output.partition("the line is: ")[2]) == {"b": 2}
    lines.append({"c": 3})
    assert lines.read() == [{"a": 1}, {"c": 3}]


def test_a_journal_that_cannot_be_created_prints_its_lines(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    Journal(tmp_path / "file" / "gpu.jsonl").append({"a": 1})
    assert '"a": 1' in capsys.readouterr().err


# --- real processes ---------------------------------------------------------------------------------------------------

ITEMS = """
import time
import pytest

@pytest.mark.parametrize("i", range(6))
def test_item(i, request):
    time.sleep(0.05)
    record = {"benchmark": __file__.split("/")[-2], "variant": "ajepa op", "shape": str(i), "median_ms": 1.0 + i}
    record |= dict.fromkeys(["floor_share", "ratio_to_plain", "ratio_to_best_peer", "best_peer"])
    request.node.user_properties.append(("records", [record]))
"""
TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)

class version:
    cuda = None

__version__, get_num_threads = "0", lambda: 1
"""
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {benchmarks!r})
import gpu
from budget import Part
gpu.prebuilt.unpack, gpu.budget.IMPORTS = lambda *_, **options: [], ()
files = {{name: (f"{here}/{{name}}/bench_device.py",) for name in {names!r}}}
gpu.CPU = tuple(Part(name, name, files[name], 1, {limit}, processes=1 + (name == "two")) for name in files)
sys.exit(gpu.main(["--device", "cpu", "--out", {here!r} + "/out", *sys.argv[1:]]))
"""


@pytest.fixture
def program(tmp_path):
    """Starts gpu.py on {part: source of its items}, with a stand-in torch that imports quickly."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text("from missing import *\n")
    (tmp_path / "stand-ins").mkdir()
    (tmp_path / "stand-ins" / "torch.py").write_text(TORCH)
    path = os.pathsep.join([str(tmp_path / "stand-ins"), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "AJEPA_COMMIT": "abc1234"}

    def start(sources: dict[str, str], *arguments: str, limit: float = 20.0, most_bytes: int | None = None):
        for name, source in sources.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "bench_device.py").write_text(source)
        program = PROGRAM.format(benchmarks=str(BENCHMARKS), here=str(tmp_path), names=list(sources), limit=limit)
        command = [sys.executable, "-c", program, *arguments]
        bound = None if most_bytes is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes,) * 2)
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, preexec_fn=bound
        )

    return start


def items_of(out: Path) -> list[str]:
    return [line["item"] for line in Journal(out / "gpu.jsonl").read() if line.get("outcome") == "passed"]


def result_of(out: Path) -> dict:
    (path,) = (out / "results").glob("*.json")
    return json.loads(path.read_text())


def test_killed_at_ten_points_nothing_is_lost_or_measured_twice(program, tmp_path):
    many = ITEMS.replace("range(6)", "range(12)")
    sources, out = {"one": many, "two": many}, tmp_path / "out"  # part "two" has two processes
    for point in range(10):
        running = program(sources)
        before, end = len(items_of(out)), time.monotonic() + 30
        while len(items_of(out)) <= before and running.poll() is None and time.monotonic() < end:
            time.sleep(0.003)
        running.kill()  # this must end the worker, too
        running.wait(10)
        running.stdout.close()
        measured_items = items_of(out)
        assert len(measured_items) > before, f"run {point} measured nothing"
        time.sleep(0.15)
        assert items_of(out) == measured_items, "a worker survived the program"
    done = program(sources)
    output, _ = done.communicate(timeout=60)
    assert done.returncode == 0, output
    assert sorted(items_of(out)) == sorted(f"{n}/bench_device.py::test_item[{i}]" for n in sources for i in range(12))
    records = result_of(out)["records"]
    assert {(r["benchmark"], r["shape"], r["median_ms"]) for r in records} == {
        (n, str(i), 1.0 + i) for n in sources for i in range(12)
    }
    assert all(r["commit"] == "abc1234" and r["sources"] and r["date"] for r in records)
    again = program(sources)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and output.count("nothing is left to measure") == 2


def test_what_fails_hangs_or_lacks_a_package_is_named_and_the_rest_is_measured(program, tmp_path):
    sources = {
        "raises": ITEMS + "    assert i != 2, 'two is wrong'\n",
        "hangs": ITEMS + "    time.sleep(1000 * (i == 1))\n",
        "exits": ITEMS + "    import os\n    os._exit(7 * (i == 0)) if i == 0 else None\n",
        "lacks": "import no_such_package\n" + ITEMS,
        "works": ITEMS,
    }
    running = program(sources, limit=6.0)
    output, _ = running.communicate(timeout=90)
    out = tmp_path / "out"
    assert running.returncode == 1
    assert "failed: raises/bench_device.py::test_item[2]: AssertionError: two is wrong" in output
    assert "hangs: killed after 6 s: it exceeded its 6 s in hangs/bench_device.py::test_item[1]" in output
    assert "exits: failed" in output and "ended with status 7 in exits/bench_device.py::test_item[0]" in output
    assert "skipped: lacks/bench_device.py: Skipped: needs no_such_package, which is not installed" in output
    measured_items = items_of(out)
    counts = {name: sum(item.startswith(name) for item in measured_items) for name in sources}
    assert counts == {"raises": 5, "hangs": 1, "exits": 0, "lacks": 0, "works": 6}

    second = program({**sources, "exits": ITEMS}, limit=6.0)  # "exits" is repaired; the item that hung comes last
    output, _ = second.communicate(timeout=90)
    counts = {name: sum(item.startswith(name) for item in items_of(out)) for name in sources}
    assert counts == {"raises": 5, "hangs": 5, "exits": 6, "lacks": 0, "works": 6} and second.returncode == 1
    assert output.index("exits: passed") < output.index("hangs: killed"), output


def test_a_full_disk_costs_no_measurement(program, tmp_path):
    """With files limited to 2 KiB, the console shows the lines that do not fit into the journal."""
    full = program({"a": ITEMS}, most_bytes=2048)
    output, _ = full.communicate(timeout=60)
    (tmp_path / "console.log").write_text(output)
    assert "File too large" in output and 0 < len(items_of(tmp_path / "out")) < 6 and "Traceback" not in output
    again = program({"a": ITEMS}, "--earlier", str(tmp_path / "console.log"))
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and len(items_of(tmp_path / "out")) == 6, output
    assert len(result_of(tmp_path / "out")["records"]) == 6


def test_ctrl_c_and_termination_say_how_to_go_on(program, tmp_path):
    endless = "a/bench_device.py::test_item[3]"
    for number, (sign, status) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143)], start=1):
        running = program({"a": ITEMS + "    time.sleep(100 * (i == 3))\n"})
        end, journal = time.monotonic() + 30, Journal(tmp_path / "out" / "gpu.jsonl")
        while sum(line.get("started") == endless for line in journal.read()) < number and time.monotonic() < end:
            time.sleep(0.01)
        running.send_signal(sign)
        output, _ = running.communicate(timeout=20)
        assert running.returncode == status and "the same command measures the rest" in output, output
        assert "Traceback" not in output


def test_lines_of_another_device_do_not_count(tmp_path):
    """The lines of another device are not lost: their file is set aside beside the new one."""
    journal, lines = Journal(tmp_path / "gpu.jsonl"), [{"call": {"device": "one"}}, {"item": "a"}]
    for line in lines:
        journal.append(line)
    gpu.begin_call(journal, [], "one", again=False)
    assert journal.read()[:2] == lines and len(journal.read()) == 3 and len(list(tmp_path.iterdir())) == 1
    gpu.begin_call(journal, [], "two", again=False)
    (aside,) = set(tmp_path.iterdir()) - {journal.path}
    assert Journal(aside).read()[:2] == lines and [*journal.read()[0]] == ["call"]
    gpu.begin_call(journal, [aside], "one", again=False)  # back on the first device, given the set-aside file
    assert journal.read()[:2] == lines and {line["call"]["device"] for line in journal.read() if "call" in line} == {
        "one"
    }
    gpu.begin_call(journal, [], "one", again=True)
    assert len(journal.read()) == 1


def test_wrong_arguments_are_one_line():
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu"]
    for more, message in (
        (["--parts", "step,nothing"], "--parts nothing: choose from device, step"),
        (["--report", "--out", "/nowhere"], "/nowhere/gpu.jsonl holds no measurements"),
        (["--budget", "soon"], "invalid float value: 'soon'"),
        (["--budget", "nan"], "--budget must be a number of seconds above 0, not nan"),
        (["--earlier", "/no/such.jsonl"], "/no/such.jsonl"),
    ):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


# --- the rehearsal ----------------------------------------------------------------------------------------------------


def test_every_part_is_rehearsed_on_a_cpu(tmp_path):
    """Runs the real program with the real benchmarks and tests, at sizes that take seconds."""
    out = tmp_path / "out"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--budget", "400", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=420)
    assert done.returncode == 0 and "all parts passed" in done.stdout, done.stdout + done.stderr
    lines = Journal(out / "gpu.jsonl").read()
    measured = {line["part"] for line in lines if line.get("outcome") == "passed"}
    optional = set() if os.environ.get("AJEPA_TEST_AUDIO") else {"training"}  # skipped without real audio
    assert measured >= {part.name for part in gpu.GPU} - optional
    assert [part.name for part in gpu.CPU] == [part.name for part in gpu.GPU]
    result = result_of(out)
    benchmarks = {r["benchmark"] for r in result["records"]}
    assert benchmarks >= {
        "step",
        "end_to_end",
        "train_step",
        "levers",
        "scaling",
        "masks",
        "masked_attention",
        "log_mel",
    }
    assert result["ceilings"]["copy_gb_per_s"] > 0 and result["tests"]["passed"] > 0 and not result["tests"]["failed"]
    page = (out / "results" / "README.md").read_text()
    assert "### Our training step alone" in page and "masks as drawn" in page and "### Tests on this device" in page
    assert list((out / "results" / "plots").glob("*-rate.png"))

    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.count("nothing is left to measure") == len(gpu.CPU), again.stdout
