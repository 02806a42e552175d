"""Selects what tables and plots show of the result files: which records, which of them are ours, and their dates."""

import json
import re
from pathlib import Path

from sources import fingerprint

WHOLE = {
    "step": "Our training step alone",
    "train_step": "Training step",
    "clip_step": "Training step of the clip objective",
    "end_to_end": "From files to updated weights",
    "reduction": "A step of several ranks and its reduction",
    "scaling": "As the work grows",
    "levers": "Levers of the step",
}


def load(folder: Path) -> list[dict]:
    """Return the result files, GPUs first. Raises SystemExit that names a file which is no result file."""
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            result["slug"], result["gpu"] = path.stem, result["versions"]["cuda"] is not None
            for r in result["records"]:
                r["benchmark"], r["variant"], r["shape"], float(r["median_ms"])
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is no result file ({error!r}): delete it and run `make bench`") from error
        results.append(result)
    return sorted(results, key=lambda r: not r["gpu"])


def of(result: dict, *benchmarks: str) -> list[dict]:
    return [r for r in result["records"] if r["benchmark"] in benchmarks]


def kernels(result: dict) -> list[dict]:
    """Return the records of single operations that are compared with a measured rate."""
    return [r for r in result["records"] if r["benchmark"] not in WHOLE and r.get("floor_share")]


def is_ours(r: dict) -> bool:
    return r["variant"] == "fused" or r["variant"].startswith("ajepa")


def groups(records: list[dict]) -> list[list[dict]]:
    """Group the records by benchmark and shape."""
    found: dict[tuple, list[dict]] = {}
    for r in records:
        found.setdefault((r["benchmark"], r["shape"]), []).append(r)
    return list(found.values())


def when(result: dict, records: list[dict] | None = None) -> str:
    """Return the days and commits of the measurements."""
    records = result["records"] if records is None else records
    marks = {(r.get("date", "undated"), r.get("commit", "unknown")) for r in records}
    dates = sorted({date for date, _ in marks})
    commits = sorted({commit for _, commit in marks})
    shown = ", ".join(commits) if len(commits) < 4 else f"{len(commits)} commits"
    return f"{dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}, at {shown}" if dates else "nothing"


def measured(r: dict) -> str:
    """Return the day and commit of a record, with a note if the code that it measured has changed since."""
    at = f"{r.get('date', 'undated')}, {r.get('commit', 'unknown')}"
    return at + ", before a rebuild" * is_old(r)


def is_old(r: dict) -> bool:
    """Return whether the code that gave this record has changed since. The code of other libraries never does."""
    return is_ours(r) and r.get("sources") not in (None, fingerprint(r.get("test", "")))


def number(value: float | None, form: str = ",.3g") -> str:
    """Format `value` with three significant digits and no exponent."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if form == ",.3g" and abs(value) >= 99.5 else format(value, form)


def plots_of(result: dict, name: str) -> list[str]:
    """Return the file names of the plots that can be drawn from the results of `name`."""
    given = {
        "train_step": [("phases", any(r.get("phases_ms") for r in of(result, "train_step")))],
        "scaling": [("scaling", bool(of(result, "scaling")))],
        "rate": [("rate", bool(kernels(result)))],
    }.get(name, [])
    if name == "train_step":
        given.append(("throughput", bool(throughput_lines(result))))
    return [f"{result['slug']}-{plot}.png" for plot, there in given if there]


def throughput_lines(result: dict) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Return {(case, variant): [(batch, clips/s)]} for those of which more than one batch was timed."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for r in of(result, "step", "train_step"):
        case = re.sub(r", batch \d+", "", r["shape"])
        lines.setdefault((case, r["variant"]), []).append((r["batch"], r["clips_per_second"]))
    for r in of(result, "scaling"):
        if r["grows"] == "batch":
            case = f"{r['model']}, 128 tokens"
            lines.setdefault((case, r["variant"]), []).append((r["batch"], r["clips_per_second"]))
    return {key: sorted(points) for key, points in lines.items() if len(points) > 1}
