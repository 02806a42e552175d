"""Reads and writes result files: `results/<device>.json` holds what was measured on a device, as flat records.

A file holds the device, the versions and commit of the last run, the ceilings that this run measured, and `records`.
Each record keeps its test, the commit and the day of the measurement, and a hash of the measured code (`sources.py`).
So a run of one benchmark updates its own records and leaves the others unchanged. `left_out` says for each test what it
did not measure on this device, and why. `tests` holds the outcome of the tests of the last `make gpu`.
"""

import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(os.environ.get("AJEPA_BENCH_RESULTS") or ROOT / "benchmarks" / "results")


def path_of(device: str, folder: Path = RESULTS) -> Path:
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def save(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".tmp")
    half.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(half, path)


def merge(kept: list[dict], test: str, new: list[dict]) -> list[dict]:
    """Return `kept` with `new` as the records of `test`.

    The former records of `test` are dropped, and so are other records of the same benchmark and shape.
    """
    shapes = {(r["benchmark"], r["shape"]) for r in new}
    rest = [r for r in kept if r.get("test") != test and (r["benchmark"], r["shape"]) not in shapes]
    return sorted(rest + new, key=lambda r: (r["benchmark"], _natural(r["shape"])))


def with_reasons(before: dict, test: str, reasons: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return `before`, which says what was left out and why, with `reasons` as the entry of `test`."""
    others = {name: why for name, why in before.items() if name != test}
    return dict(sorted({**others, **({test: reasons} if reasons else {})}.items()))


def left_out_lines(left_out: dict[str, dict[str, str]]) -> list[str]:
    """Return `left_out` as lines to read, without repetitions."""
    named = {test: re.sub(r".*bench_(\w+)\.py.*", r"\1", test) for test in left_out}
    return list(
        dict.fromkeys(f"{named[test]}: {what}: {why}" for test in left_out for what, why in left_out[test].items())
    )


def from_journal(lines: list[dict], folder: Path = RESULTS) -> list[Path]:
    """Update the result file of each device that the lines of a journal name. Returns the files."""
    abouts = {line["run"]["device"]: line["run"] for line in lines if "run" in line}
    for device, about in abouts.items():
        path = path_of(device, folder)
        result = {"ceilings": {}, "left_out": {}, "records": [], **load(path), **about}
        items = [line for line in lines if line.get("device") == device and line.get("outcome") in ("passed", "failed")]
        for line in items:
            test = line["item"]
            mark = {"test": test, **{name: line.get(name) for name in ("commit", "date", "sources")}}
            new = [{**record, **mark} for record in line.get("records", [])]
            if new or line["outcome"] == "failed":  # a speed-up counts only while its check passes
                result["records"] = merge(result["records"], test, new)
            if "left_out" in line:
                result["left_out"] = with_reasons(result["left_out"], test, line["left_out"])
            result |= line.get("facts", {})
        of_tests = [line for line in lines if line.get("device") == device and line["item"].startswith("tests/")]
        if last := {line["item"]: line for line in of_tests}:
            result["tests"] = _tests(list(last.values()))
        save(path, result)
    return [path_of(device, folder) for device in abouts]


def _tests(last: list[dict]) -> dict:
    """Summarise the last outcome of each test: how many passed and were skipped, which failed, and why."""
    outcomes = [line["outcome"] for line in last]
    return {
        "passed": outcomes.count("passed"),
        "skipped": outcomes.count("skipped"),
        "failed": {line["item"]: line.get("reason", "") for line in last if line["outcome"] == "failed"},
        "commits": sorted({line["commit"] for line in last}),
        "dates": sorted({line["date"] for line in last}),
    }


def _natural(text: str) -> list[tuple[bool, int, str]]:
    """Return a sort key that puts 64 before 256."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", text)]
