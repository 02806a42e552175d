"""`python benchmarks/report.py [--check]`: the README's speed tables, `results/README.md` and plots, from result files.

`--check` writes nothing and exits with 1 where README.md or results/README.md is not what the result files give.
"""

import argparse
import sys
from pathlib import Path

from result_files import left_out_lines
from selection import WHOLE, groups, is_old, is_ours, kernels, load, measured, number, of, plots_of, when

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- speed:begin, written by benchmarks/report.py -->", "<!-- speed:end -->"
UNMEASURED = (
    "**Not yet measured on a GPU**: no result file of one is there. `make gpu` on a machine with one writes it."
)


def about(result: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    rates = result.get("ceilings", {})
    names = {"copy_gb_per_s": "copy {:,.0f} GB/s", "product_bfloat16_tflops": "bf16 product {:,.3g} TFLOP/s"}
    names["product_float32_tflops"] = "fp32 product {:,.3g} TFLOP/s"
    measured = ", ".join(form.format(rates[name]) for name, form in names.items() if name in rates)
    cores = "" if result["gpu"] else f", {result['cores']} cores"
    text = f"{result['device']}{cores}; {versions}; measured {when(result)}"
    text += f". Ceilings: {measured}" * bool(measured)
    if clocks := result.get("clocks"):
        text += f". Under products: {clocks['clocks.sm']} of {clocks['clocks.max.sm']}, {clocks['power.draw']} of "
        text += f"{clocks['power.limit']}, memory {clocks['clocks.mem']}; driver {clocks['driver_version']}"
    return text


def table(head: str, rows: list[list[str]]) -> str:
    columns = head.split(" | ")
    lines = [f"| {head} |", "|" + "---|" * len(columns), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def whole_rows(records: list[dict]) -> list[list[str]]:
    return [
        [
            r["shape"], r["variant"], number(r["median_ms"]), f"{number(r['p20_ms'])} - {number(r['p80_ms'])}",
            number(r.get("clips_per_second")), number(r["ratio_to_plain"], ".2f"), number(r.get("mfu"), ".0%"),
            gib(r), number(r.get("data_wait_share"), ".0%"), number(r.get("of_the_step"), ".1%"), measured(r),
        ]
        for r in records
    ]  # fmt: skip


ON_A_CPU = (
    "On a CPU `log_mel` and `resample` have kernels; the floor of `log_mel` is a bare rfft of its frames, which does\n"
    "less. The other ops are their plain definitions there, which torch.compile may beat."
)
WHOLE_HEAD = (
    "case | engine | ms | p20 - p80 | clips/s | x eager | MFU | peak GiB | waiting for data | of the step alone"
    " | measured"
)
KERNEL_HEAD = "op | case | ms | of the floor | x plain PyTorch | x best peer | best peer | measured"


def prune(head: str, rows: list[list[str]]) -> str:
    """The table without columns that hold nothing."""
    columns = head.split(" | ")
    kept = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    return table(" | ".join(columns[i] for i in kept), [[row[i] for i in kept] for row in rows])


def kernel_rows(records: list[dict]) -> list[list[str]]:
    return [
        [
            f"`{r['variant'].removeprefix('ajepa ')}`", r["shape"], number(r["median_ms"]),
            number(r["floor_share"], ".0%"), number(r["ratio_to_plain"], ".2f"),
            number(r["ratio_to_best_peer"], ".2f"), r["best_peer"] or "-", measured(r),
        ]
        for r in records if is_ours(r)
    ]  # fmt: skip


def side_by_side(records: list[dict]) -> str:
    """A row a case: every engine's milliseconds, then what the fused step does with them."""
    variants = list(dict.fromkeys(r["variant"] for r in sorted(records, key=lambda r: r["variant"] == "fused")))
    head = ["case", *(f"{variant} ms" for variant in variants), "fused clips/s", "x eager", "x compile", "MFU"]
    rows = []
    for group in groups(records):
        of_variant = {r["variant"]: r for r in group}
        ms = {variant: r["median_ms"] for variant, r in of_variant.items()}
        fused = of_variant.get("fused", {})
        ratios = [ms[peer] / ms["fused"] if {peer, "fused"} <= ms.keys() else None for peer in ("eager", "compile")]
        row = [group[0]["shape"], *(number(ms.get(variant)) for variant in variants)]
        row += [number(fused.get("clips_per_second")), *(number(ratio, ".2f") for ratio in ratios)]
        row += [number(fused.get("mfu"), ".0%"), *(gib(r) for r in map(of_variant.get, ("eager", "fused")))]
        rows.append([*row, number(fused.get("data_wait_share"), ".0%"), measured(fused or group[0])])
    return prune(" | ".join([*head, "eager GiB", "fused GiB", "waiting for data", "measured"]), rows)


def gib(r: dict | None) -> str:
    return number(r["peak_bytes"] / 2**30, ".1f") if r and r.get("peak_bytes") else "-"


def profile_table(r: dict) -> str:
    """Where the time of a step goes: by kind, then the kernels that take most of it."""
    kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in r["kinds"].items())
    rows = [
        [
            f"`{k['name'][:70]}`",
            k["kind"],
            number(k["ms"], ",.2f"),
            number(k["calls"], ",.0f"),
            number(k["share"], ".1%"),
        ]
        for k in r["kernels"]
    ]
    return f"{r['shape']}, {measured(r)}: {kinds}.\n\n" + table("kernel | kind | ms a step | calls | share", rows)


def tests_text(tested: dict) -> str:
    text = f"{tested['passed']:,} passed, {len(tested['failed'])} failed, {tested['skipped']:,} skipped "
    text += f"({', '.join(tested['dates'])}, at {', '.join(tested['commits'])})."
    return "\n".join([text, *(f"- {test}: {reason}" for test, reason in tested["failed"].items())])


def largest(records: list[dict]) -> list[dict]:
    """Of each benchmark, the case that takes plain PyTorch (or all variants) longest."""
    best: dict[str, list[dict]] = {}
    for group in groups(records):
        name = group[0]["benchmark"]
        if name not in best or max(r["median_ms"] for r in group) > max(r["median_ms"] for r in best[name]):
            best[name] = group
    return [r for group in best.values() for r in group]


def readme_section(results: list[dict]) -> str:
    parts = [] if any(result["gpu"] for result in results) else [UNMEASURED]
    for result in results:
        old = " Figures *before a rebuild* are of code that has changed since." * any(map(is_old, result["records"]))
        parts.append(f"**{result['device']}** ({when(result)}).{old}")
        parts += [side_by_side(steps) for name in ("step", "train_step", "end_to_end") if (steps := of(result, name))]
        if ops := kernel_rows(largest(kernels(result))):
            parts += [table(KERNEL_HEAD, ops)] + [ON_A_CPU] * (not result["gpu"])
    plots = "[all cases and plots](benchmarks/results/README.md)"
    parts.append(f"Of each op the largest case; {plots}.")
    return "\n\n".join(parts)


def results_page(results: list[dict]) -> str:
    parts = ["# Benchmark results", "Written by `benchmarks/report.py` from the JSON files beside it. "
             "Ratios above 1: faster than plain PyTorch, or than the best peer, in the same run. The floor of an op is "
             "the time of its least bytes at the copy rate measured then; MFU is the share of the matrix product rate "
             "measured then. A figure *before a rebuild* is of code that has changed since."]  # fmt: skip
    if not any(result["gpu"] for result in results):
        parts.append(UNMEASURED)
    for result in results:
        parts += [f"## {result['device']}", about(result) + "."]
        for name, title in WHOLE.items():
            if records := of(result, name):
                head = WHOLE_HEAD if name != "levers" else WHOLE_HEAD.replace("x eager", "x as shipped")
                parts += [f"### {title}", prune(head, whole_rows(records))]
                parts += [f"![{title}](plots/{path})" for path in plots_of(result, name)]
        if ops := kernels(result):
            parts += ["### Ops", table(KERNEL_HEAD, kernel_rows(ops))] + [ON_A_CPU] * (not result["gpu"])
            parts += [f"![Share of the floor by op](plots/{path})" for path in plots_of(result, "floor")]
        told = (*WHOLE, "step_profile")
        others = [r for r in result["records"] if r["benchmark"] not in told and not r.get("floor_share")]
        if others:
            rows = [[f"`{r['benchmark']}`", r["shape"], r["variant"], number(r["median_ms"]),
                     number(r["ratio_to_plain"], ".2f")] for r in others]  # fmt: skip
            parts += ["### Others", table("benchmark | case | variant | ms | x plain", rows)]
        if kernel_table := of(result, "step_profile"):
            parts += ["### The kernels of a step", profile_table(kernel_table[0])]
        if tested := result.get("tests"):
            parts += ["### Tests on this device", tests_text(tested)]
        if lines := left_out_lines(result.get("left_out", {})):
            parts += ["### Left out", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def replaced(readme: str, section: str) -> str:
    try:
        head, rest = readme.split(BEGIN)
        _, tail = rest.split(END)
    except ValueError:
        raise SystemExit(f"README.md must hold the line `{BEGIN}` and then `{END}`, once each") from None
    return f"{head}{BEGIN}\n{section}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--no-readme", action="store_true", help="the page and plots of --results alone")
    options = parser.parse_args(argv)
    results = load(options.results)
    pages = {options.results / "README.md": results_page(results)}
    if not options.no_readme:
        pages[options.readme] = replaced(options.readme.read_text(), readme_section(results))
    if options.check:
        old = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
        for path in old:
            print(f"{path} is not what the results give: run `python benchmarks/report.py`", file=sys.stderr)
        return 1 if old else 0
    for path, text in pages.items():
        path.write_text(text)
    try:
        import plots
    except ModuleNotFoundError as error:
        print(f"tables written, no plots: {error.name} is not installed", file=sys.stderr)
        return 0
    for result in results:
        plots.draw(result, options.results / "plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
