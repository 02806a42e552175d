"""Describes this machine and its ceilings, and writes the records of benchmarks into the result file of the device."""

import functools
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import result_files
import torch
from result_files import ROOT
from sources import fingerprint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODE = os.environ.get("AJEPA_BENCH", "")
FULL = MODE == "full"  # also measure cases that take minutes
QUICK = MODE == "quick"  # few repetitions and no compiled peers, for a run with a time budget
JOURNAL = os.environ.get("AJEPA_JOURNAL", "")  # in a part of gpu.py's run: the journal, which takes the records


@functools.cache
def device_name() -> str:
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"cpu {model[1] if model else platform.machine()}"


def results_path() -> Path:
    return result_files.path_of(device_name())


@functools.cache
def environment() -> dict:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        try:
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!README.md", ":!docs")
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
    """Return the rates of this run: GB/s of a copy, read and written, and TFLOP/s of a matrix product by dtype."""
    from ajepa.training.roofline import copy_bytes_per_ms, product_flops_per_ms

    dtypes = (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)
    products = {
        f"product_{str(d).removeprefix('torch.')}_tflops": product_flops_per_ms(d, DEVICE) / 1e9 for d in dtypes
    }
    return {"copy_gb_per_s": copy_bytes_per_ms(DEVICE) / 1e6, **products}


def read(path: Path) -> list[dict]:
    return result_files.load(path).get("records", [])


def write(path: Path, records: list[dict], left_out: dict[str, dict[str, str]] | None = None) -> None:
    before = result_files.load(path)
    left_out = before.get("left_out", {}) if left_out is None else left_out
    result_files.save(
        path, {**before, **environment(), "ceilings": ceilings(), "left_out": left_out, "records": records}
    )


def put(path: Path, test: str, new: list[dict]) -> None:
    """Replace the records of `test` by `new`.

    `new` is empty if the check of `test` failed, because a speed-up counts only while its check passes.
    """
    kept = read(path)
    mark = {"test": test, **{name: environment()[name] for name in ("commit", "date")}, "sources": fingerprint(test)}
    merged = result_files.merge(kept, test, [{**record, **mark} for record in new])
    if merged != kept:
        write(path, merged)


def put_left_out(path: Path, test: str, reasons: dict[str, str]) -> None:
    """Replace what `test` did not measure, and why, by `reasons`."""
    stored = result_files.load(path)
    after = result_files.with_reasons(stored.get("left_out", {}), test, reasons)
    if stored and after != stored.get("left_out", {}):
        write(path, stored["records"], after)


def forget_others(path: Path, tests: set[str]) -> None:
    """Drop the records of tests that no longer exist, after a run of all benchmarks."""
    stored = result_files.load(path)
    living = [r for r in stored.get("records", []) if r.get("test") in tests]
    if living != stored.get("records", []):
        write(path, living, {name: why for name, why in stored.get("left_out", {}).items() if name in tests})
