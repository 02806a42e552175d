"""Draws the plots of `report.py`: shares of measured rates, throughput, phases of a step, cost as the work grows."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from selection import groups, is_ours, kernels, number, of, plots_of, throughput_lines, when

COLOURS = {"fused": "#1f5fbf", "eager": "#8a8a8a", "compile": "#d9822b", "CPU front end": "#b04a5a"}
PHASES = {"front end": "#5aa469", "forward": "#1f5fbf", "backward": "#7fa8de", "update": "#d9822b"}
AXES = {
    "tokens": "tokens a clip", "visible": "visible share of the tokens", "batch": "clips a batch",
    "depth": "encoder layers",
}  # fmt: skip


def draw(result: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in [path for name in ("train_step", "scaling", "rate") for path in plots_of(result, name)]:
        plot = path.removesuffix(".png").rsplit("-", 1)[1]
        figure = {"rate": rate, "throughput": throughput, "phases": phases, "scaling": scaling}[plot](result)
        figure.savefig(folder / path, dpi=90, metadata={"Software": None})
        plt.close(figure)


def _title(figure, title: str, result: dict, benchmarks: tuple[str, ...]) -> None:
    records = of(result, *benchmarks) if benchmarks else kernels(result)
    figure.suptitle(f"{title}\n{result['device']}, {when(result, records)}", fontsize=11)


def rate(result: dict):
    """Draw a bar for each op and case, its share of the measured rate, with marks for plain PyTorch and the best peer.

    The rate is that of copies, of matrix products or, for log_mel on a CPU, of a bare rfft. It is no bound on a CPU,
    where caches and updates in place beat a large copy.
    """
    cases = [g for g in groups(kernels(result)) if any(map(is_ours, g))]
    marks = {
        "plain PyTorch": {"marker": "|", "s": 110, "color": "black"},
        "best peer": {"marker": "D", "s": 22, "color": "#d9822b"},
    }
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.3 * len(cases)), layout="constrained")
    widest = max([1.0, *(r["floor_share"] for group in cases for r in group)])  # the axis always shows the whole rate
    for y, group in enumerate(cases):
        ours = next(r for r in group if is_ours(r))
        axes.barh(y, 100 * ours["floor_share"], color=COLOURS["fused"], height=0.62, label="ajepa" if y == 0 else None)
        plain = [r for r in group if r["ratio_to_plain"] == 1.0 and r is not ours]
        peer = [r for r in group if r["variant"] == r["best_peer"]]
        share = ours["floor_share"]
        # The text stands right of the bar, and of the marks that it would cover.
        near = (r["floor_share"] for r in (*plain, *peer) if -0.02 < (r["floor_share"] - share) / widest < 0.055)
        axes.text(100 * max(share, *near, 0) + 1.2 * widest, y, f"{share:.0%}", va="center", fontsize=8)
        for r in plain:
            axes.scatter(100 * r["floor_share"], y, **marks["plain PyTorch"], zorder=3)
        for r in peer:
            axes.scatter(100 * r["floor_share"], y, **marks["best peer"], zorder=3)
    for label, mark in marks.items():
        axes.scatter([], [], **mark, label=label)
    axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(cases)), [f"{g[0]['benchmark']}: {g[0]['shape']}" for g in cases], fontsize=8)
    axes.set_xlim(0, 108 * widest)
    axes.invert_yaxis()
    other = "the issue rate" if result["gpu"] else "a bare rfft"
    rates = f"a large copy or matrix product; log_mel: of {other}"
    axes.set_xlabel(f"% of the rate of {rates} (longer is faster)", loc="right")
    axes.margins(y=0.01)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    _title(figure, "How near each op comes to a measured rate", result, ())
    return figure


def throughput(result: dict):
    lines = throughput_lines(result)
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    models = list(dict.fromkeys(model for model, _ in lines))
    for (model, variant), points in lines.items():
        x, y = zip(*points, strict=True)
        style = ["-", "--", ":", "-."][models.index(model) % 4]
        axes.plot(x, y, style, marker="o", color=COLOURS.get(variant), label=f"{model}, {variant}")
    ticks = sorted({batch for points in lines.values() for batch, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    if max(y for p in lines.values() for _, y in p) > 5 * min(y for p in lines.values() for _, y in p):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("clips a batch")
    axes.set_ylabel("clips a second")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    _title(figure, "Throughput of the training step", result, ("step", "train_step", "scaling"))
    return figure


def phases(result: dict):
    cases = [g for g in groups(of(result, "train_step")) if any(r.get("phases_ms") for r in g)]
    columns = min(3, len(cases))
    rows = math.ceil(len(cases) / columns)
    wide = max(6.5, 4.2 * columns)  # room for the title and the legend
    figure, grid = plt.subplots(rows, columns, figsize=(wide, 1.2 + 2.0 * rows), layout="constrained", squeeze=False)
    for axes, group in zip(grid.flat, cases, strict=False):
        for y, r in enumerate(group):
            left = 0.0
            for phase, colour in PHASES.items():
                width = r["phases_ms"].get(phase, 0.0)
                axes.barh(y, width, left=left, color=colour, height=0.65)
                left += width
            axes.text(left, y, f" {number(left)} ms", va="center", fontsize=8)
        axes.set_yticks(range(len(group)), [r["variant"] for r in group], fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.22)
        axes.set_xlim(left=0)
        axes.set_title(group[0]["shape"], fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
    for axes in list(grid.flat)[len(cases) :]:
        axes.axis("off")
    for axes in list(grid.flat)[: len(cases)][-columns:]:  # those with nothing below them
        axes.set_xlabel("ms a step", fontsize=9)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in PHASES.values()]
    figure.legend(handles, PHASES, loc="outside lower center", ncols=len(PHASES), fontsize=9)
    how = "each phase waited for" + ", outside CUDA graphs" * result["gpu"]
    _title(figure, f"Where the time of a step goes ({how})", result, ("train_step",))
    return figure


def scaling(result: dict):
    records = of(result, "scaling")
    figure, grid = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axes, grows in zip(grid.flat, AXES, strict=True):
        for variant in dict.fromkeys(r["variant"] for r in records):
            points = sorted(
                (r["x"], r["median_ms"]) for r in records if r["grows"] == grows and r["variant"] == variant
            )
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker="o", color=COLOURS.get(variant), label=variant)
        ticks = sorted({r["x"] for r in records if r["grows"] == grows})
        if grows != "visible":
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: number(y)))
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.set_xlabel(AXES[grows])
        axes.set_ylabel("ms a step")
        others = next((r["shape"].split("; ", 1)[1] for r in records if r["grows"] == grows), "not measured")
        axes.set_title(others, fontsize=9)
        axes.grid(alpha=0.3)
    lines = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(lines), fontsize=9)
    model = records[0]["model"]
    _title(figure, f"Step time as the work grows: {model}", result, ("scaling",))
    return figure
