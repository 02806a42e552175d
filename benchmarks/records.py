"""The results file of a device: what was measured where, as flat records that later runs replace test by test.

`results/<device>.json` holds the device, the versions and commit of the last run, the ceilings it measured, and
`records`. Each record keeps the test, the commit and the day it was measured at, so that a run of one file renews its
own records and leaves the others as they are. `left_out` says of each test what it did not measure here, and why.
"""

import functools
import json
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULTS = Path(os.environ.get("AJEPA_BENCH_RESULTS") or ROOT / "benchmarks" / "results")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODE = os.environ.get("AJEPA_BENCH", "")
FULL = MODE == "full"  # also measure what takes minutes
QUICK = MODE == "quick"  # few repetitions and no compiled peers, for a run with a time budget


@functools.cache
def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"cpu {model[1] if model else platform.machine()}"


def results_path() -> Path:
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device_name().lower()).strip('-')}.json"


@functools.cache
def environment() -> dict:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!README.md")
    commit = (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")
    commit = os.environ.get("AJEPA_COMMIT", commit)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("triton", "torchaudio"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": device_name(),
        "cores": torch.get_num_threads(),
        "versions": versions,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


@functools.cache
def ceilings() -> dict[str, float]:
    """The rates of this run: GB/s of a copy, read and written, and TFLOP/s of a matrix product by dtype."""
    from ajepa.ceilings import copy_bytes_per_ms, product_flops_per_ms

    dtypes = (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)
    products = {
        f"product_{str(d).removeprefix('torch.')}_tflops": product_flops_per_ms(d, DEVICE) / 1e9 for d in dtypes
    }
    return {"copy_gb_per_s": copy_bytes_per_ms(DEVICE) / 1e6, **products}


def merge(kept: list[dict], test: str, new: list[dict]) -> list[dict]:
    """`kept` without what `test` gave before and without other records of the same benchmark and shape, and `new`."""
    shapes = {(r["benchmark"], r["shape"]) for r in new}
    rest = [r for r in kept if r.get("test") != test and (r["benchmark"], r["shape"]) not in shapes]
    return sorted(rest + new, key=lambda r: (r["benchmark"], _natural(r["shape"])))


def read(path: Path) -> list[dict]:
    return _load(path).get("records", [])


def _load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, records: list[dict], left_out: dict[str, dict[str, str]] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")
    left_out = _load(path).get("left_out", {}) if left_out is None else left_out
    kept = {"ceilings": ceilings(), "left_out": left_out, "records": records}
    half.write_text(json.dumps({**environment(), **kept}, indent=1) + "\n")
    os.replace(half, path)


def put_left_out(path: Path, test: str, reasons: dict[str, str]) -> None:
    """Make `reasons`, of what was not measured, those of `test`."""
    stored = _load(path)
    before = stored.get("left_out", {})
    after = {**{name: why for name, why in before.items() if name != test}, **({test: reasons} if reasons else {})}
    if stored and after != before:
        write(path, stored["records"], dict(sorted(after.items())))


def put(path: Path, test: str, new: list[dict]) -> None:
    """Make `new` the records of `test`; none where its check failed: a speed-up stands only while its check passes."""
    kept = read(path)
    mark = {"test": test, "commit": environment()["commit"], "date": environment()["date"]}
    merged = merge(kept, test, [{**record, **mark} for record in new])
    if merged != kept:
        write(path, merged)


def left_out_lines(left_out: dict[str, dict[str, str]]) -> list[str]:
    """`left_out` to read, each thing once."""
    named = {test: re.sub(r".*bench_(\w+)\.py.*", r"\1", test) for test in left_out}
    return list(
        dict.fromkeys(f"{named[test]}: {what}: {why}" for test in left_out for what, why in left_out[test].items())
    )


def forget_others(path: Path, tests: set[str]) -> None:
    """Drop records of tests that are no more: after a run of all benchmarks."""
    kept = read(path)
    living = [r for r in kept if r.get("test") in tests]
    if living != kept:
        write(path, living, {name: why for name, why in _load(path).get("left_out", {}).items() if name in tests})


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """Sorts 64 before 256."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", text)]
