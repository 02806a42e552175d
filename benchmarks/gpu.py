"""`make gpu`: measure on a GPU within a time budget, the most important parts first.

    python benchmarks/gpu.py [--budget 540] [--out build/gpu]    measure; a second call measures what is missing
    python benchmarks/gpu.py --device cpu --budget 60            rehearse every part on a CPU, with small sizes
    python benchmarks/gpu.py --report [--out build/gpu]          write result files, tables and plots from the lines

Every measurement becomes a line of <out>/gpu.jsonl as soon as it exists (`journal.py`). All parts share one time budget
(`budget.py`). At the end the lines update benchmarks/results/<device>.json, the tables of the documentation and the
plots. A rehearsal writes to <out>/results instead. `--report` does the same later, or on another machine.
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
UNPACKED = ROOT / "build" / "unpacked"  # holds packages and Triton's cache
FOR_THE_REPORT = {"gpu": 15.0, "cpu": 6.0}  # seconds of the budget that are reserved for tables and plots

REBUILT = (  # tests of the kernels that were rewritten since a GPU last ran them, at the widths of the step
    "large_and_repeatable or large_and_graph or graph_and_repeats or (value_and_gradient and dtype2 and 768)"
    " or (where_it_is_made and 768) or test_linear or equals_the_cpu_kernel"
    " or (every_size and (400 or 1024 or 2048 or 4096)) or is_its_definition or bits_of_the_whole"
    " or (of_the_layer_before and 96) or half_precision or at_full_size or qkv_bias or replays_follow or change_nothing"
    " or (replayed and (step0-bf16 or step10 or step11 or step12 or step13 or step14 or step15))"
)
KERNEL_TESTS = (
    "add_layer_norm", "masked_attention", "products", "gelu_mlp", "latent_l2_loss", "bias_gelu", "fp8", "engine_gpu",
    "log_mel_gpu", "resample_gpu", "augment_mel", "segment_pool", "sigreg",
)  # fmt: skip
STEP_KERNELS = (
    "layer_norm", "attention", "products", "bias_gelu", "latent_loss", "adamw_ema", "log_mel", "augment_mel",
    "segment_pool", "sigreg",
)  # fmt: skip
ADOPTED_TESTS = (  # of what the trainer does not use, and other models do
    "attention_head_dims", "attention_rotary", "attention_causal", "scaled_residual", "rms_norm", "swiglu", "modules",
    "from_model", "compatibility",
)  # fmt: skip
SHOWN = {  # fields of a record that are printed as soon as it exists
    "clips_per_second": "{:,.4g} clips/s", "mfu": "{:.0%} MFU", "floor_share": "{:.0%} of the floor",
    "ratio_to_best_peer": "{:.2f} x {peer}",
}  # fmt: skip


def benches(*names: str) -> tuple[str, ...]:
    return tuple(f"benchmarks/bench_{name}.py" for name in names)


def tests(*names: str) -> tuple[str, ...]:
    """The files of these tests; `tests/` mirrors the folders of the code."""
    paths = {path.stem: path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    return tuple(paths[f"test_{name}"] for name in names)


# The parts are in the order of their importance. The expected and the longest seconds are those of an H200.
GPU = (
    Part("device", "versions, clocks and ceilings", benches("device"), 10, 40),
    Part("step", "our step at 1,024 and 256 clips, its switches and its kernels", benches("step"), 130, 220, "quick"),
    Part("correctness", "kernels and the replayed step that no GPU has run yet",
         (*tests(*KERNEL_TESTS), "-k", REBUILT), 60, 100, processes=3),
    Part("kernels", "every kernel at the shapes of the step", benches(*STEP_KERNELS), 105, 160, "quick"),
    Part("clip", "the step of the clip objective, beside the masked one",
         (*benches("train_step"), "-k", "clip_step"), 40, 120, "quick"),
    Part("files", "from shards to updated weights", benches("end_to_end"), 50, 100, "quick"),
    Part("training", "the loss curve against plain PyTorch's in bf16",
         (*tests("same_training"), "-k", "on_a_gpu and bf16"), 60, 120),
    Part("ranks", "a group of one rank under NCCL: two graphs and the reduction between them",
         (*tests("ranks_gpu"), *benches("reduction")), 60, 150, "quick"),
    Part("adopted", "the operations that other models use", tests(*ADOPTED_TESTS), 70, 120, processes=3),
    Part("adopted-kernels", "their speed", benches("rotary", "swiglu"), 60, 120, "quick"),
    Part("peers", "our step, plain PyTorch, torch.compile and max-autotune", benches("train_step"), 60, 3600),
    Part("benchmarks", "all benchmarks", ("benchmarks",), 60, 7200),
    Part("tests", "all tests", ("tests",), 60, 3600, processes=6),
)  # fmt: skip
# The same parts for a CPU of two cores, with one or two cases of each kind. Cases that need a GPU are skipped there.
CPU = (
    Part("device", "versions and ceilings", benches("device"), 4, 20),
    Part("step", "our step, tiny", (*benches("step"), "-k", "shipped or profile or in-product"), 14, 60, "quick"),
    Part("correctness", "a few tests of the kernels", (*tests(*KERNEL_TESTS), "-k", f"{REBUILT} or test_first_order"),
         8, 60),
    Part("kernels", "the kernels' plain definitions at small sizes",
         (*benches(*STEP_KERNELS), "-k", "not (77 or 96) or 51"), 12, 60, "quick"),
    Part("clip", "the step of the clip objective, beside the masked one",
         (*benches("train_step"), "-k", "clip_step and not both"), 8, 60, "quick"),
    Part("files", "from shards to updated weights", (*benches("end_to_end"), "-k", "from_shards"), 8, 60, "quick"),
    Part("training", "the loss curve against plain PyTorch's", (*tests("same_training"), "-k", "rehearsal"), 9, 60),
    Part("ranks", "two ranks under gloo, and the reduction between them",
         (*tests("replicas"), *benches("reduction"), "-k", "whole_bucket or three_bfloat16 or reduction"), 14, 90,
         "quick"),
    Part("adopted", "a few tests of the operations that other models use",
         (*tests("attention_rotary", "swiglu"), "-k", "errors"), 6, 60),
    Part("adopted-kernels", "their plain definitions at small sizes", benches("swiglu"), 6, 60, "quick"),
    Part("peers", "our step, plain PyTorch and torch.compile",
         (*benches("train_step"), "-k", "not clip_step"), 14, 90, "quick"),
    Part("benchmarks", "some other benchmarks",
         (*benches("masks", "fp8", "levers", "scaling"), "-k", "not scaling or depth"), 10, 60, "quick"),
    Part("tests", "some other tests", tests("schedules"), 6, 60, processes=2),
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="cpu rehearses the run")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="longest duration (540)")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder for lines, log and results")
    parser.add_argument("--earlier", type=Path, action="append", default=[], metavar="FILE",
                        help="lines of an earlier call; what they hold is not measured again")  # fmt: skip
    parser.add_argument("--parts", default="", help="run only these parts, for example step,kernels")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before")
    parser.add_argument("--prebuilt", type=Path, default=ROOT / "prebuilt", help="folder that `make prebuilt` wrote")
    parser.add_argument("--report", action="store_true", help="measure nothing; write result files, tables and plots")
    args = parser.parse_args(argv)
    if not 0 < args.budget < float("inf"):
        parser.error(f"--budget must be a number of seconds above 0, not {args.budget:g}")
    for file in args.earlier:
        if not file.is_file():
            parser.error(f"--earlier {file}: this file does not exist")
    args.out = args.out.absolute()
    journal = Journal(args.out / "gpu.jsonl")
    if args.report:
        return report(journal, args.earlier, args.out, parser)

    on_gpu = has_gpu() if args.device == "auto" else args.device == "cuda"
    parts = choose(GPU if on_gpu else CPU, args.parts, parser)
    if args.device == "auto" and not on_gpu:
        parser.error("this machine has no GPU; --device cpu rehearses the run")
    signal.signal(signal.SIGTERM, _terminated)
    # The first process imports torch while the prebuilt files are put in place.
    workers = budget.Workers(journal.path, args.out / "gpu.log", environment(on_gpu), on_gpu, say)
    try:
        begin_call(journal, args.earlier, nvidia_smi.query("name").get("name", "") if on_gpu else "cpu", args.again)
        put_in_place(journal, args.prebuilt, workers, on_gpu, args.budget / 2)
        seconds = args.budget - FOR_THE_REPORT["gpu" if on_gpu else "cpu"]
        ended = budget.run(parts, seconds, journal, workers.start, begin=begin, say=say, watch=print_news)
    except KeyboardInterrupt as interrupt:
        say(f"interrupted; {journal.path} holds what was measured, and the same command measures the rest")
        return 143 if interrupt.args else 130
    finally:
        workers.close()
    # The names of torch.compile's kernels do not begin with an underscore.
    compiled = [name for name in prebuilt.new_entries(UNPACKED) if name.startswith("_")]
    say(f"{len(compiled)} kernels and modules were compiled on this machine")
    journal.append({"compiled": compiled})
    write_results(journal.read(), args.out, on_gpu, args.budget - (time.monotonic() - begin))
    bad = [f"{name} {how}" for name, how in ended.items() if how != "passed"]
    hint = f"{', '.join(bad)}; see {args.out / 'gpu.log'}, and repeat the command to measure what is missing"
    say(f"{time.monotonic() - begin:.0f} s of {args.budget:.0f}: {hint if bad else 'all parts passed'}")
    return 1 if bad else 0


def _terminated(*_) -> None:
    raise KeyboardInterrupt("SIGTERM")


def environment(on_gpu: bool) -> dict[str, str]:
    """Return the environment of the parts' processes. The project need not be installed."""
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
    """Return 10 x the compute capability of the GPU, 90 for Hopper, or None if nvidia-smi does not report it."""
    found = nvidia_smi.query("compute_cap").get("compute_cap", "").replace(".", "")
    return int(found) if found.isdigit() else None


def choose(parts: tuple[Part, ...], names: str, parser: argparse.ArgumentParser) -> list[Part]:
    wanted = [name for name in names.split(",") if name]
    unknown = set(wanted) - {part.name for part in parts}
    if unknown:
        parser.error(f"--parts {', '.join(sorted(unknown))}: choose from {', '.join(part.name for part in parts)}")
    return [part for part in parts if not wanted or part.name in wanted]


def begin_call(journal: Journal, earlier: list[Path], device: str, again: bool) -> None:
    """Write the first line of a call, after the lines of earlier calls on the same device.

    A journal that holds lines of another device is kept under another name, as is every journal with `again`.
    """
    found = journal.read()
    kept = [] if again else of_device(found, device)
    missing = [line for file in earlier for line in of_device(Journal(file).read(), device) if line not in kept]
    if kept != found:
        journal.path.rename(journal.path.with_suffix(f".{time.time_ns()}.jsonl"))
        missing = kept + missing
    for line in missing:
        journal.append(line)
    journal.append({"call": {"device": device, "began": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())}})


def of_device(lines: list[dict], device: str) -> list[dict]:
    """Return the lines of calls on `device`. Lines before the first call count as lines of `device`."""
    kept, on_device = [], True
    for line in lines:
        on_device = line["call"]["device"] == device if "call" in line else on_device
        kept += [line] * on_device
    return kept


def put_in_place(journal: Journal, folder: Path, workers: budget.Workers, on_gpu: bool, seconds: float) -> None:
    """Unpack what `make prebuilt` made, and build the rest on this machine, within `seconds`."""
    for step in prebuilt.unpack(folder, UNPACKED, capability() if on_gpu else None, seconds=seconds):
        workers.variables |= {name: value for name, value in step.pop("environment").items() if name != "PYTHONPATH"}
        say(f"{step['what']}, {step['seconds']:.1f} s: {step['note']}")
        journal.append({"prepared": step})


def say(text: str) -> None:
    print(text, flush=True)


def print_news(line: dict) -> None:
    """Print one line for each new measurement of ours, and for each item that failed."""
    if line.get("outcome") == "failed" or (line.get("outcome") == "skipped" and "::" not in line["item"]):
        say(f"  {line['outcome']}: {line['item']}: {line['reason']}")
    for r in filter(is_ours, line.get("records", [])):
        facts = [f"{r['benchmark']}: {r['shape']}: {r['variant'].removeprefix('ajepa ')}: {r['median_ms']:,.4g} ms"]
        for key, form in SHOWN.items():
            if r.get(key):
                facts.append(form.format(r[key], peer=r["best_peer"]))
        say(f"  {', '.join(facts)}")


def write_results(lines: list[dict], out: Path, on_gpu: bool, left: float) -> None:
    """Write result files from all lines, and also tables and plots if there is time for them."""
    folder = result_files.RESULTS if on_gpu else out / "results"
    try:
        for path in result_files.from_journal(lines, folder):
            if on_gpu:
                shutil.copy(path, out)
    except OSError as error:
        say(f"no result files were written: {error.strerror or error}; `make gpu-report` writes them from the lines")
        return
    if left < FOR_THE_REPORT["cpu"] / 2:
        say("no time is left for tables and plots; `make gpu-report` writes them")
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
