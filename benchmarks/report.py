"""`python benchmarks/report.py [--check]`: every speed table and plot of the documentation, from the result files.

The tables of README.md and of `docs/*.md` stand between marker lines that name a section (`SECTIONS`); the page
`results/README.md` is written whole, and so are the figures of single GPUs from which `ajepa.doctor --plan` predicts.
`--check` writes nothing and exits with 1 where a file differs from what the result files give.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from result_files import left_out_lines
from selection import WHOLE, groups, is_old, is_ours, kernels, load, measured, number, of, plots_of, when

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "ajepa" / "training" / "measured.json"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BEGIN, END = "<!-- speed:begin{name}, written by benchmarks/report.py -->", "<!-- speed:end -->"
BLOCK = re.compile(
    rf"(?P<begin>{BEGIN.format(name='(?: (?P<name>[a-zA-Z0-9_]+))?')}\n)(?P<old>.*?)(?P<end>{END})", flags=re.DOTALL
)
UNMEASURED = (
    "**Not yet measured on a GPU**: no result file of one is there. `make gpu` on a machine with one writes it."
)
# The benchmarks of each op of `ajepa_kernels`, by its public name.
OPS = {
    "masked_attention": ("masked_attention",),
    "rotary_attention": ("rotary_attention",),
    "latent_l2_loss": ("latent_l2_loss",),
    "segment_pool": ("segment_pool",),
    "sigreg": ("sigreg",),
    "AdamWEMA": ("adamw_ema",),
    "add_layer_norm": ("add_layer_norm",),
    "bias_gelu": ("bias_gelu",),
    "swiglu": ("swiglu",),
    "gelu_mlp": ("gelu_mlp", "linear_gelu", "linear_dgelu"),
    "linear_residual": ("linear_residual",),
    "fp8_linear": ("fp8_linear", "fp8_mlp"),
    "log_mel": ("log_mel",),
    "augment_mel": ("augment_mel",),
    "resample": ("resample",),
}
CPU_KERNELS = ("log_mel", "resample")
ENGINES = ("eager", "compile", "fused")
PUBLISHED = {"audio-jepa": "56 V100-hours"}


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
    "On a CPU, `log_mel` and `resample` have kernels of their own. `log_mel` is compared with the rate of a bare rfft "
    "of its frames, which does less work. Every other op runs its plain definition there, and torch.compile may beat "
    "that. An op that updates its inputs in place may move more bytes a second than a copy, which also has to fetch "
    "the lines that it overwrites."
)
RESULTS_INTRODUCTION = (
    "`benchmarks/report.py` writes this page from the JSON files beside it. A ratio above 1 means faster than plain "
    "PyTorch, or than the best peer, in the same run. *Of the measured rate* is the time that the least memory "
    "traffic of an op takes at the copy rate measured in that run, or its products at the product rate, divided by the "
    "op's time. It may exceed 100 % on a CPU. MFU is the share of the matrix product rate measured in that run. A "
    "figure *before a rebuild* was measured on code that has changed since."
)
WHOLE_HEAD = (
    "case | engine | ms | p20 - p80 | clips/s | x eager | MFU | peak GiB | waiting for data | of the step alone"
    " | measured"
)
BASES = {"levers": "as shipped", "reduction": "DDP"}  # what a ratio compares with, where it is not plain PyTorch
HEADLINE_HEAD = (
    "device | training step | plain PyTorch, clips/s | torch.compile, clips/s | ajepa, clips/s | x plain PyTorch"
    " | x torch.compile | measured"
)
MEAN_RATIO = "Every batch has the preset's mean mask ratio, unless the case says *masks as drawn*."
BEFORE = " A figure *before a rebuild* was measured on code that has changed since."
KERNEL_HEAD = "op | case | ms | of the measured rate | x plain PyTorch | x best peer | best peer | measured"


def prune(head: str, rows: list[list[str]]) -> str:
    """The table without the columns that are empty in every row."""
    columns = head.split(" | ")
    kept = [i for i in range(len(columns)) if any(row[i] != "-" for row in rows)]
    return table(" | ".join(columns[i] for i in kept), [[row[i] for i in kept] for row in rows])


def kernel_rows(records: list[dict]) -> list[list[str]]:
    return [
        [
            f"`{r['variant'].removeprefix('ajepa ')}`", r["shape"], number(r["median_ms"]),
            number(r.get("floor_share"), ".0%"), number(r["ratio_to_plain"], ".2f"),
            number(r["ratio_to_best_peer"], ".2f"), r["best_peer"] or "-", measured(r),
        ]
        for r in records if is_ours(r)
    ]  # fmt: skip


def side_by_side(records: list[dict]) -> str:
    """One row for each case: milliseconds of every engine, then speed, ratios and memory of the fused step."""
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
    """Where the time of a step goes: the share of each kind of kernel, then the kernels that take most of it."""
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
    """The records of one case for each benchmark: the case with the slowest variant."""
    best: dict[str, list[dict]] = {}
    for group in groups(records):
        name = group[0]["benchmark"]
        if name not in best or max(r["median_ms"] for r in group) > max(r["median_ms"] for r in best[name]):
            best[name] = group
    return [r for group in best.values() for r in group]


def compared_step(result: dict) -> dict[str, dict]:
    """The training step of every engine by its name, in the slowest case that most of them ran; empty without one."""
    compared = [
        {r["variant"]: r for r in group}
        for group in groups(of(result, "train_step"))
        if {"eager", "fused"} <= {r["variant"] for r in group}
    ]
    return max(compared, key=lambda step: ("compile" in step, step["eager"]["median_ms"]), default={})


def claim(results: list[dict]) -> str:
    """One sentence: how fast the training step is on the first GPU that was measured, else on the first device."""
    for result in sorted(results, key=lambda result: not result["gpu"]):
        if step := compared_step(result):
            fused = step["fused"]
            peers = {"plain PyTorch": step["eager"], "`torch.compile`": step.get("compile")}
            ratios = [
                f"{r['median_ms'] / fused['median_ms']:.2f} times as fast as {name}" for name, r in peers.items() if r
            ]
            return (
                f"On one {result['device']}, a training step of {fused['shape']} takes {number(fused['median_ms'])} "
                f"ms, which is {number(fused['clips_per_second'])} clips/s: {' and '.join(ratios)}."
            )
    return UNMEASURED


def costs(results: list[dict]) -> str:
    """What the budget of each preset takes: as published, and at the speeds in the result files."""
    from ajepa.config import PRESETS, SIZES

    rows = []
    for name, cfg in PRESETS.items():
        width, depth, _ = SIZES[cfg.model.size]
        clips = cfg.optim.steps * cfg.optim.batch_size * cfg.objective.count
        model = (
            f"{depth} layers of width {width}; clips of {cfg.data.clip_seconds:g} s at {cfg.front_end.sample_rate:,} Hz"
        )
        objective = cfg.objective.objective
        times = [text for result in results if (text := time_of(name, clips, result, objective))]
        times = times or ["not yet measured"]
        rows.append([f"`{name}`", model, f"{clips:,} clips", PUBLISHED.get(name, "-"), "; ".join(times)])
    return table("preset | model and data | budget | published | at the measured speed", rows)


def time_of(preset: str, clips: int, result: dict, objective: str = "masked") -> str:
    """How long `clips`, or as many views, take on a device: from files if that was measured, else the steps alone.

    Empty where nothing was measured, or where nobody would wait for the end: it would take longer than a day.
    """
    whole = [r for r in of(result, "end_to_end") if r["variant"] == "fused" and "shards" in r["shape"]]
    steps = [r for r in of(result, "train_step") if r["variant"] == "fused"]
    case = rf"{preset}\b"
    if objective != "masked":
        whole, steps = [], [r for r in of(result, "clip_step") if r["variant"] == "fused"]
        case = rf"{preset}\b[^,]*, {objective} objective"
    for records, what in ((whole, "from shards to weights"), (steps, "for the steps alone, without data,")):
        ours = [r for r in records if re.match(case, r["shape"])]
        if ours:
            seconds = clips / max(r["clips_per_second"] for r in ours)
            cores = "" if result["gpu"] else f" ({result['cores']} cores)"
            if seconds > 86_400:
                return ""
            length = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} minutes"
            return f"{length} {what} on {result['device']}{cores}"
    return ""


def headline(results: list[dict]) -> str:
    """One row for each device: a training step of plain PyTorch, torch.compile and ajepa.

    The case is one that all three ran, where there is such a case, and the slowest of those.
    """
    rows = []
    for result in results:
        if step := compared_step(result):
            speeds = [step[name]["clips_per_second"] if name in step else None for name in ENGINES]
            ratios = [speeds[2] / peer if peer else None for peer in speeds[:2]]
            row = [result["device"], step["fused"]["shape"], *map(number, speeds)]
            rows.append([*row, *(number(ratio, ".2f") for ratio in ratios), measured(step["fused"])])
    parts = [] if any(result["gpu"] for result in results) else [UNMEASURED]
    if rows:
        parts += [prune(HEADLINE_HEAD, rows), MEAN_RATIO + BEFORE * any("before" in row[-1] for row in rows)]
    return "\n\n".join(parts)


def step_tables(results: list[dict]) -> str:
    """The training step on each device: alone, beside other engines, and from files to weights."""
    parts = [] if any(result["gpu"] for result in results) else [UNMEASURED]
    for result in results:
        tables = [
            side_by_side(steps)
            for name in ("step", "train_step", "clip_step", "end_to_end")
            if (steps := of(result, name))
        ]
        parts += [f"**{result['device']}** ({when(result, of(result, *WHOLE))})", *tables] if tables else []
    return "\n\n".join(parts)


def reduction(results: list[dict]) -> str:
    """A step of several ranks with each way to reduce gradients, on each device."""
    head = "device | case | variant | ms | x DDP | in collectives, ms | measured"
    rows = [
        [
            result["device"], r["shape"], r["variant"], number(r["median_ms"]), number(r["ratio_to_plain"], ".2f"),
            number(r.get("reduction_ms")), measured(r),
        ]
        for result in results
        for r in of(result, "reduction")
    ]  # fmt: skip
    return table(head, rows) if rows else "Not yet measured: `pytest benchmarks/bench_reduction.py` does."


def op_tables(results: list[dict]) -> str:
    """The largest case of each op on each device."""
    parts = [] if any(result["gpu"] for result in results) else [UNMEASURED]
    for result in results:
        if rows := kernel_rows(largest(kernels(result))):
            parts += [f"**{result['device']}** ({when(result, kernels(result))})", table(KERNEL_HEAD, rows)]
            parts += [ON_A_CPU] * (not result["gpu"])
    return "\n\n".join(parts)


def op_table(op: str, results: list[dict]) -> str:
    """Every case of one op, on every device for which it has a kernel."""
    rows, on_a_gpu = [], False
    for result in results:
        if result["gpu"] or op in CPU_KERNELS:
            found = kernel_rows(of(result, *OPS[op]))
            rows += [[result["device"], *row] for row in found]
            on_a_gpu |= bool(found) and result["gpu"]
    head = f"device | {KERNEL_HEAD}"
    if len({row[1] for row in rows}) == 1:
        head, rows = head.replace("op | ", ""), [row[:1] + row[2:] for row in rows]
    parts = [] if on_a_gpu else ["**Not yet measured on a GPU.**"]
    return "\n\n".join(parts + [prune(head, rows)] * bool(rows))


# --- predictions for many GPUs ----------------------------------------------------------------------------------------

# A recipe at one batch, without a switch, as `bench_train_step.py` and `bench_step.py` name it.
STEP = re.compile(
    r"(?P<preset>[\w-]+) ViT-(?P<size>\w+), batch (?P<batch>\d+)"
    r"(?P<masks>, masks as drawn|, \d+ visible)?(?P<shipped>, as shipped)?"
)
DEVIATIONS = 1.683  # between the 20th and the 80th percentile of a normal distribution


def figures(results: list[dict]) -> dict[str, list[dict]]:
    """What `ajepa.training.plan` knows of single machines: steps and updates of GPUs, and clips/s of the loader."""
    found: dict[str, list[dict]] = {"steps": [], "updates": [], "loaders": []}
    for result in results:
        device = {"device": result["device"]}
        if not result["gpu"]:
            rates = {
                r["variant"]: 1e6 / r["median_ms"]
                for r in of(result, "loader, wav", "loader, flac")
                if r["variant"] in ("shards", "wav", "flac")
            }
            if rates:
                (r, *_), cores = of(result, "loader, flac"), result["cores"]
                samples = int(r["shape"].split(" x ")[1])
                found["loaders"].append(
                    {**device, "cores": cores, "samples": samples, "clips_per_second": rates, "when": measured(r)}
                )
            continue
        peaks = {r["shape"]: r for r in of(result, "train_step") if r["variant"] == "eager"}
        steps: dict[tuple, dict] = {}
        for r in of(result, "train_step", "step"):  # a step that does not wait after each step takes precedence
            if r["variant"] == "fused" and (case := STEP.fullmatch(r["shape"])):
                peak = next((p for p in (r, peaks.get(r["shape"])) if p and p.get("peak_bytes")), None)
                masks = "drawn" if "drawn" in (case["masks"] or "") else "mean"
                step = {
                    **device, "preset": case["preset"], "size": case["size"], "masks": masks, "batch": r["batch"],
                    "ms": r["median_ms"], "spread": (r["p80_ms"] - r["p20_ms"]) / DEVIATIONS / r["median_ms"],
                    "product_share": r["mfu"], "peak_bytes": peak and peak["peak_bytes"],
                    "peak_of": peak and peak["variant"], "when": measured(r), "old": is_old(r),
                }  # fmt: skip
                steps[tuple(step[key] for key in ("preset", "size", "masks", "batch"))] = step
        found["steps"] += steps.values()
        for r in of(result, "adamw_ema"):
            if r["variant"] == "ajepa AdamWEMA":
                update = {"parameters": round(1e6 * float(r["shape"].split()[0])), "ms": r["median_ms"]}
                found["updates"].append({**device, **update, "when": measured(r)})
    return found


BATCHES = {  # clips of a step on so many GPUs, by the title of their table
    "256 clips in all, the batch of the recipe": lambda gpus: 256,
    "32 clips on each GPU": lambda gpus: 32 * gpus,
    "256 clips on each GPU": lambda gpus: 256 * gpus,
}
COLUMNS = [(gpu, reduce) for gpu in ("H100", "H200") for reduce in ("fp32", "bf16")]


def scaling(results: list[dict]) -> str:
    """Tables of what `ajepa.training.plan` predicts for audio-jepa, and where and why GPUs become less efficient."""
    from ajepa.config import PRESETS
    from ajepa.training.plan import Arguments, OneGpu, Plan

    known, cfg = figures(results), PRESETS["audio-jepa"]
    if not known["steps"]:
        return UNMEASURED
    budget = cfg.optim.steps * cfg.optim.batch_size
    ones = {gpu: OneGpu(cfg, gpu, known) for gpu, _ in COLUMNS}
    steps = ones["H200"].steps
    sizes = " and ".join(f"{step['batch']:,}" for step in steps)
    masked = "with masks as drawn" if steps[0]["masks"] == "drawn" else "with the mean mask ratio"
    parts = [
        f"Predicted, **not yet measured on several GPUs**, from steps of {sizes} clips {masked} on one "
        f"{steps[0]['device']} ({steps[-1]['when']}). A cell has clips/s, the time of the {budget:,} clips of "
        "`audio-jepa`, and efficiency."
    ]
    if len(steps) == 1:
        parts[0] += " One batch is measured, so that the least time of the kernels, which decides the step of few "
        parts[0] += "clips, is an assumption."
    for title, batch in BATCHES.items():
        whole = batch(2) == batch(1)
        plans = {
            (gpus, gpu, reduce): Plan(Arguments(gpus=gpus, gpu=gpu, reduce=reduce), ones[gpu], batch(gpus), budget)
            for gpus in (2**i for i in range(9))
            for gpu, reduce in COLUMNS
        }
        share = {key: plan.efficiency if whole else plan.efficiency_each for key, plan in plans.items()}
        rows = [
            [str(gpus), f"{batch(gpus):,}", *(cell(plans[gpus, g, r], share[gpus, g, r]) for g, r in COLUMNS)]
            for gpus in (2**i for i in range(9))
        ]
        head = "GPUs | batch | " + " | ".join(f"{gpu}, {reduce}" for gpu, reduce in COLUMNS)
        alone = "the whole batch" if whole else "their own clips"
        parts.append(f"**{title}.** Efficiency is the share of the clips/s of GPUs that train {alone} alone.")
        parts += [table(head, rows), "\n".join(turn(*column, plans, share, whole) for column in COLUMNS)]
    return "\n\n".join(parts)


def cell(plan: Any, efficiency: float) -> str:
    length = f"{number(plan.hours)} h" if plan.hours >= 1 else f"{number(60 * plan.hours)} min"
    return f"{number(plan.clips_per_second)}, {length}, {efficiency:.0%}"


def turn(gpu: str, reduce: str, plans: dict[tuple, Any], share: dict[tuple, float], whole: bool) -> str:
    """From how many GPUs on efficiency is below 90 %, and what costs most there."""
    name = f"- {gpu}, `--reduce {reduce}`: "
    below = [key for key, efficiency in share.items() if key[1:] == (gpu, reduce) and efficiency < 0.9]
    if not below:
        return name + f"at least 90 % on up to {max(plans)[0]} GPUs."
    plan, efficiency = plans[below[0]], share[below[0]]
    lost = plan.lost(whole)
    reasons = " and ".join(f"{number(ms)} ms to {reason}" for ms, reason in lost[:2])
    name += f"below 90 % from {plan.at.gpus} GPUs on ({int(1000 * efficiency) / 10} %)"
    return f"{name}. A step of {number(plan.ms)} ms there loses {reasons}."


SECTIONS: dict[str, Callable[[list[dict]], str]] = {"headline": headline, "steps": step_tables, "ops": op_tables}
SECTIONS |= {"claim": claim, "costs": costs, "scaling": scaling, "reduction": reduction}
SECTIONS |= {op: partial(op_table, op) for op in OPS}


def results_page(results: list[dict]) -> str:
    parts = ["# Benchmark results", RESULTS_INTRODUCTION]
    if not any(result["gpu"] for result in results):
        parts.append(UNMEASURED)
    for result in results:
        parts += [f"## {result['device']}", about(result) + "."]
        for name, title in WHOLE.items():
            if records := of(result, name):
                head = WHOLE_HEAD.replace("x eager", f"x {BASES.get(name, 'eager')}")
                parts += [f"### {title}", prune(head, whole_rows(records))]
                parts += [f"![{title}](plots/{path})" for path in plots_of(result, name)]
        if ops := kernels(result):
            parts += ["### Ops", table(KERNEL_HEAD, kernel_rows(ops))] + [ON_A_CPU] * (not result["gpu"])
            parts += [f"![Share of the measured rate by op](plots/{path})" for path in plots_of(result, "rate")]
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


def renewed(page: Path, results: list[dict]) -> str:
    """The text of `page` with each of its blocks as the results give it. A block without a name is the headline."""
    text = page.read_text()

    def block(found: re.Match) -> str:
        name = found["name"] or "headline"
        if name not in SECTIONS:
            raise SystemExit(f"{page}: no section is called {name!r}; there are {', '.join(SECTIONS)}")
        return f"{found['begin']}{SECTIONS[name](results)}\n{found['end']}"

    blocks = len(BLOCK.findall(text))
    if not blocks == text.count("<!-- speed:begin") == text.count(END):
        begin = BEGIN.format(name=" NAME")
        raise SystemExit(f"{page}: every table must stand between the lines `{begin}` and `{END}`")
    return BLOCK.sub(block, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="file of the figures of single GPUs")
    parser.add_argument("--pages", type=Path, nargs="*", default=PAGES, help="pages that hold tables between markers")
    parser.add_argument("--no-readme", action="store_true", help="only the page and the plots in the --results folder")
    options = parser.parse_args(argv)
    results = load(options.results)
    texts = {options.results / "README.md": results_page(results)}
    if not options.no_readme:
        texts[options.figures] = json.dumps(figures(results), indent=1) + "\n"
        texts |= {page: renewed(page, results) for page in options.pages}
    if options.check:
        old = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
        for path in old:
            print(f"{path} differs from the result files: run `python benchmarks/report.py`", file=sys.stderr)
        return 1 if old else 0
    for path, text in texts.items():
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
