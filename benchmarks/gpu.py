"""`make gpu`: measure on a GPU within a budget of time, the most important things first.

    python benchmarks/gpu.py [--budget 540] [--out build/gpu]    measure; a second call goes on with what is missing
    python benchmarks/gpu.py --device cpu --budget 60            rehearse every part on a CPU, with small sizes
    python benchmarks/gpu.py --report [--out build/gpu]          result files, tables and plots from the lines

Every measurement is a line of <out>/gpu.jsonl the moment it exists (`journal.py`); the parts run under one clock
(`budget.py`). At the end the lines renew benchmarks/results/<device>.json, the README's tables and the plots; those of
a rehearsal stay in <out>/results. `--report` does the same later, or on another machine.
"""

import argparse
import functools
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import budget
import nvidia_smi
import prebuilt
import result_files
from budget import Part
from journal import Journal
from selection import is_ours

ROOT = Path(__file__).parent.parent
UNPACKED = ROOT / "build" / "unpacked"  # packages and Triton's cache
FOR_THE_REPORT = {"gpu": 15.0, "cpu": 6.0}  # seconds of the budget that are kept for tables and plots

REBUILT = (  # the kernels that were written anew since a GPU last ran them, at the step's own widths
    "large_and_repeatable or graph_and_repeats or (value_and_gradient and dtype2 and 768)"
    " or (where_it_is_made and 768) or test_linear or equals_the_cpu_kernel"
    " or (every_size and (400 or 1024 or 2048 or 4096)) or is_its_definition or bits_of_the_whole"
    " or (replayed and (step0-bf16 or step8 or step11 or step12))"
)
KERNEL_TESTS = ("add_layer_norm", "latent_l2_loss", "bias_gelu", "fp8", "engine_gpu", "log_mel_gpu", "resample_gpu")
STEP_KERNELS = ("layer_norm", "attention", "bias_gelu", "latent_loss", "adamw_ema", "log_mel")
SHOWN = {  # fields of a record that are printed as soon as it exists
    "clips_per_second": "{:,.4g} clips/s", "mfu": "{:.0%} MFU", "floor_share": "{:.0%} of the floor",
    "ratio_to_best_peer": "{:.2f} x {peer}",
}  # fmt: skip


def benches(*names: str) -> tuple[str, ...]:
    return tuple(f"benchmarks/bench_{name}.py" for name in names)


def tests(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{name}.py" for name in names)


# Expected and largest seconds are those of an H200; in the order of what is asked first.
GPU = (
    Part("device", "versions, clocks and ceilings", benches("device"), 10, 40),
    Part("step", "our step at 1,024 and 256 clips, its switches and its kernels", benches("step"), 110, 200, "quick"),
    Part("correctness", "kernels and the replayed step that no GPU has run yet",
         (*tests(*KERNEL_TESTS), "-k", REBUILT), 60, 100, processes=3),
    Part("kernels", "every kernel at the shapes of the step", benches(*STEP_KERNELS), 60, 100, "quick"),
    Part("files", "from shards to updated weights", benches("end_to_end"), 50, 100, "quick"),
    Part("training", "the same curve as plain PyTorch's in bf16",
         (*tests("same_training"), "-k", "on_a_gpu and bf16"), 60, 120),
    Part("peers", "the step beside plain PyTorch, torch.compile and max-autotune", benches("train_step"), 60, 3600),
    Part("benchmarks", "all benchmarks", ("benchmarks",), 60, 7200),
    Part("tests", "all tests", ("tests",), 60, 3600, processes=6),
)  # fmt: skip
# The same parts on a CPU of two cores, one or two cases of each kind. What a GPU alone can run is skipped there.
CPU = (
    Part("device", "versions and ceilings", benches("device"), 4, 20),
    Part("step", "our step, tiny", benches("step"), 14, 60, "quick"),
    Part("correctness", "a few tests of the kernels", (*tests(*KERNEL_TESTS), "-k", f"{REBUILT} or test_first_order"),
         8, 60),
    Part("kernels", "the kernels' plain definitions at small sizes",
         (*benches(*STEP_KERNELS), "-k", "not (77 or 96) or 51"), 10, 60, "quick"),
    Part("files", "from shards to updated weights", (*benches("end_to_end"), "-k", "from_shards"), 8, 60, "quick"),
    Part("training", "the same curve as plain PyTorch's", (*tests("same_training"), "-k", "rehearsal"), 9, 60),
    Part("peers", "the step beside plain PyTorch and torch.compile", benches("train_step"), 14, 90, "quick"),
    Part("benchmarks", "some other benchmarks",
         (*benches("masks", "fp8", "levers", "scaling"), "-k", "not scaling or depth"), 10, 60, "quick"),
    Part("tests", "some other tests", tests("masks"), 8, 60, processes=2),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="cpu: a rehearsal")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="never exceeded (540)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of lines, log and results")
    parser.add_argument("--earlier", type=Path, action="append", default=[], metavar="FILE",
                        help="lines of an earlier call that lie elsewhere; they count as there")  # fmt: skip
    parser.add_argument("--parts", default="", help="only these, as in step,kernels")
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    parser.add_argument("--prebuilt", type=Path, default=ROOT / "prebuilt", help="folder that `make prebuilt` wrote")
    parser.add_argument("--report", action="store_true", help="measure nothing: result files, tables and plots")
    args = parser.parse_args(argv)
    if not 0 < args.budget < float("inf"):
        parser.error(f"--budget {args.budget:g}: a number of seconds above 0")
    for file in args.earlier:
        if not file.is_file():
            parser.error(f"--earlier {file}: there is no such file")
    args.out = args.out.absolute()
    journal = Journal(args.out / "gpu.jsonl")
    if args.report:
        return report(journal, args.earlier, args.out, parser)

    on_gpu = has_gpu() if args.device == "auto" else args.device == "cuda"
    parts = choose(GPU if on_gpu else CPU, args.parts, parser)
    if args.device == "auto" and not on_gpu:
        parser.error("there is no GPU here; --device cpu rehearses the run")
    signal.signal(signal.SIGTERM, _terminated)
    # The first process imports torch while the rest is put in place.
    workers = budget.Workers(journal.path, args.out / "gpu.log", environment(on_gpu), on_gpu, say)
    try:
        begin_call(journal, args.earlier, nvidia_smi.query("name").get("name", "") if on_gpu else "cpu", args.again)
        put_in_place(journal, args.prebuilt, workers, on_gpu, args.budget / 2)
        seconds = args.budget - FOR_THE_REPORT["gpu" if on_gpu else "cpu"]
        ended = budget.run(parts, seconds, journal, workers.start, begin=begin, say=say, watch=tell)
    except KeyboardInterrupt as interrupt:
        say(f"interrupted; {journal.path} has what was measured, and the same command goes on")
        return 143 if interrupt.args else 130
    finally:
        workers.close()
    compiled = [name for name in prebuilt.new_entries(UNPACKED) if name.startswith("_")]  # torch.compile's do not
    say(f"{len(compiled)} kernels and modules were compiled here")
    journal.append({"compiled": compiled})
    write_results(journal.read(), args.out, on_gpu, args.budget - (time.monotonic() - begin))
    bad = [f"{name} {how}" for name, how in ended.items() if how != "passed"]
    hint = f"{', '.join(bad)}; see {args.out / 'gpu.log'}, and run it again for what is missing"
    say(f"{time.monotonic() - begin:.0f} s of {args.budget:.0f}: {hint if bad else 'all parts passed'}")
    return 1 if bad else 0


def _terminated(*_) -> None:
    raise KeyboardInterrupt("SIGTERM")


def environment(on_gpu: bool) -> dict[str, str]:
    """The environment of the parts' processes, in which the project need not be installed."""
    (UNPACKED / "site").mkdir(parents=True, exist_ok=True)
    places = (ROOT, ROOT / "kernels", ROOT / "benchmarks", UNPACKED / "site", os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(str(place) for place in places if place)
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "AJEPA_TEST_MISSING": "skip"}
    kept = {name: value for name, value in os.environ.items() if name != "AJEPA_BENCH_RESULTS"}
    return {**kept, **own, **({} if on_gpu else {"CUDA_VISIBLE_DEVICES": "", "OMP_WAIT_POLICY": "PASSIVE"})}


def has_gpu() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and (
        any(Path("/dev").glob("nvidia[0-9]*")) or capability() is not None
    )


@functools.cache
def capability() -> int | None:
    """10 x compute capability of the GPU, such as 90 for Hopper; None where nvidia-smi does not say."""
    found = nvidia_smi.query("compute_cap").get("compute_cap", "").replace(".", "")
    return int(found) if found.isdigit() else None


def choose(parts: tuple[Part, ...], names: str, parser: argparse.ArgumentParser) -> list[Part]:
    wanted = [name for name in names.split(",") if name]
    unknown = set(wanted) - {part.name for part in parts}
    if unknown:
        parser.error(f"--parts {', '.join(sorted(unknown))}: choose from {', '.join(part.name for part in parts)}")
    return [part for part in parts if not wanted or part.name in wanted]


def begin_call(journal: Journal, earlier: list[Path], device: str, again: bool) -> None:
    """Begin a call's lines, after those of earlier calls on the same device. Lines of another device are put aside."""
    own = journal.read()
    there = [] if again else of_device(own, device)
    missing = [line for file in earlier for line in of_device(Journal(file).read(), device) if line not in there]
    if there != own:
        journal.path.rename(journal.path.with_suffix(f".{time.time_ns()}.jsonl"))
        missing = there + missing
    for line in missing:
        journal.append(line)
    journal.append({"call": {"device": device, "began": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())}})


def of_device(lines: list[dict], device: str) -> list[dict]:
    """The lines of calls on `device`. Lines before the first call belong to it, too."""
    kept, here = [], True
    for line in lines:
        here = line["call"]["device"] == device if "call" in line else here
        kept += [line] * here
    return kept


def put_in_place(journal: Journal, folder: Path, workers: budget.Workers, on_gpu: bool, seconds: float) -> None:
    """Unpack what was made beforehand, and build the rest here, within `seconds`."""
    for step in prebuilt.unpack(folder, UNPACKED, capability() if on_gpu else None, seconds=seconds):
        workers.more |= {name: value for name, value in step.pop("environment").items() if name != "PYTHONPATH"}
        say(f"{step['what']}, {step['seconds']:.1f} s: {step['note']}")
        journal.append({"prepared": step})


def say(text: str) -> None:
    print(text, flush=True)


def tell(line: dict) -> None:
    """Print our new measurements, a line for each, and the items that failed."""
    if line.get("outcome") == "failed" or (line.get("outcome") == "skipped" and "::" not in line["item"]):
        say(f"  {line['outcome']}: {line['item']}: {line['reason']}")
    for r in filter(is_ours, line.get("records", [])):
        said = [f"{r['benchmark']}: {r['shape']}: {r['variant'].removeprefix('ajepa ')}: {r['median_ms']:,.4g} ms"]
        for key, form in SHOWN.items():
            if r.get(key):
                said.append(form.format(r[key], peer=r["best_peer"]))
        say(f"  {', '.join(said)}")


def write_results(lines: list[dict], out: Path, on_gpu: bool, left: float) -> None:
    """Result files from all lines; tables and plots too, where there is time for them."""
    folder = result_files.RESULTS if on_gpu else out / "results"
    try:
        for path in result_files.from_journal(lines, folder):
            if on_gpu:
                shutil.copy(path, out)
    except OSError as error:
        say(f"no result files: {error.strerror or error}; `make gpu-report` makes them from the lines")
        return
    if left < FOR_THE_REPORT["cpu"] / 2:
        say("no time is left for tables and plots: `make gpu-report` makes them")
        return
    import report as pages

    pages.main(["--results", str(folder), *([] if on_gpu else ["--no-readme"])])


def report(journal: Journal, earlier: list[Path], out: Path, parser: argparse.ArgumentParser) -> int:
    lines = [line for file in (*earlier, journal.path) for line in Journal(file).read()]
    runs = [line["run"] for line in lines if "run" in line]
    if not runs:
        parser.error(f"{journal.path} holds no measurements; `make gpu` writes them, and OUT names its folder")
    write_results(lines, out, bool(runs[-1]["versions"]["cuda"]), float("inf"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
