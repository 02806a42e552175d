"""Plots: a run's curves, a spectrogram with its masks, a probe's confusion matrix and a map of the embeddings."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ajepa.model.masks import Masks
from ajepa.utils.atomic_files import write_atomic
from ajepa_kernels import LogMelSpec

CURVES = {  # title of a panel: {key in `metrics.jsonl`: label of its line}
    "Loss": {"loss": "training loss", "masked": "masked patches", "agreement": "agreement", "sigreg": "SIGReg"},
    "Learning rate": {"lr": "learning rate"},
    "Gradient norm": {"grad_norm": "before clipping"},
    "Variance over tokens": {"target_variance": "targets", "prediction_variance": "predictions"},
    "Effective rank": {"effective_rank": "clip embeddings"},
    "kNN accuracy": {"knn_accuracy": "this run"},
}


@contextlib.contextmanager
def drawn(path: Path, width: float, height: float) -> Iterator[Any]:
    """A figure of `width` x `height` inches, which is written to `path` at the end of the block.

    Names of runs and classes are shown as they are: matplotlib would set what stands between two "$" as a formula.
    """
    import matplotlib  # slow to import
    from matplotlib.figure import Figure  # not pyplot, whose backend belongs to the caller, such as a notebook

    with matplotlib.rc_context({"text.parse_math": False}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=110)
    write_atomic(path, image.getvalue())


def printable(name: str) -> str:
    """A name without the lone surrogates that stand for bytes of a file name that are no UTF-8."""
    return name.encode("utf-8", "replace").decode()


def plot_curves(records: list[dict[str, Any]], baselines: dict[str, float | None], name: str, path: Path) -> None:
    """Loss, learning rate, gradient norm, variances, effective rank and kNN accuracy of the run `name` by step."""
    with drawn(path, 13, 8.5) as figure:
        figure.suptitle(printable(name))
        axes = figure.subplots(3, 2, sharex=True)
        for axis, (title, lines) in zip(axes.flat, CURVES.items(), strict=True):
            for key, label in lines.items():
                points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else "")
            if title == "kNN accuracy":
                for style, (baseline, value) in zip((":", "--"), baselines.items(), strict=False):
                    if value is not None:
                        axis.axhline(value, color="gray", linestyle=style, label=baseline)
            axis.set_title(title)
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
            else:
                axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
        for axis in axes[-1]:
            axis.set_xlabel("step")


def plot_masks(patches_NP: torch.Tensor, masks: Masks, spec: LogMelSpec, path: Path) -> None:
    """One clip and its masks (a batch of one): log-mel, patches that the context encoder sees, patches to predict."""
    rows, columns = spec.grid
    image: Any = patches_NP.cpu().view(rows, columns, *spec.patch).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    image = image.float().numpy()

    def cells(index: torch.Tensor) -> torch.Tensor:
        grid = torch.zeros(rows * columns, dtype=torch.bool)
        grid[index] = True
        grid = grid.view(rows, columns)
        return grid.repeat_interleave(spec.patch[0], 0).repeat_interleave(spec.patch[1], 1)

    low, high = np.quantile(image, (0.01, 0.99))  # zero padding must not set the scale
    panels = (("log-mel", None), ("visible to the context encoder", masks.context), ("to be predicted", masks.target))
    seconds = image.shape[1] * spec.hop_length / spec.sample_rate
    place: dict[str, Any] = {"origin": "lower", "aspect": "auto", "extent": (0, seconds, 0, spec.n_mels)}
    with drawn(path, 9, 7.5) as figure:
        axes = figure.subplots(len(panels), 1, sharex=True)
        for axis, (title, index) in zip(axes, panels, strict=True):
            axis.imshow(image, cmap="magma", vmin=low, vmax=high, **place)
            if index is not None:
                grey = np.zeros((*image.shape, 4))
                grey[~cells(index).numpy()] = (0.87, 0.87, 0.87, 1)
                axis.imshow(grey, **place)
                title += f": {len(index.unique())} of {spec.n_patches} patches"
            axis.set_title(title)
            axis.set_ylabel("mel band")
        axes[-1].set_xlabel("seconds")


def plot_confusion(counts: np.ndarray, classes: list[str], title: str, path: Path) -> None:
    """Share of each true class (row) that was predicted as each class (column); `counts` is `[classes, classes]`."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(classes)
    size = 4 + min(n, 100) * 0.22
    names = [printable(name) for name in classes]
    with drawn(path, size + 1, size) as figure:
        axis = figure.subplots()
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
        axis.set(title=printable(title), xlabel="predicted", ylabel="true")
        if n <= 100:
            axis.set_xticks(range(n), names, rotation=90, fontsize=8)
            axis.set_yticks(range(n), names, fontsize=8)
        if n <= 20:
            for (row, column), value in np.ndenumerate(share):
                if counts[row, column]:
                    color = "white" if value > 0.5 else "black"
                    axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color=color)


def plot_embeddings(
    x: torch.Tensor, labels: torch.Tensor, classes: list[str], methods: Sequence[str], path: Path, most: int = 3_000
) -> None:
    """At most `most` clip embeddings in two dimensions, coloured by class; a panel for each method ("pca", "tsne")."""
    from matplotlib import colormaps
    from sklearn.decomposition import PCA  # slow to import, and a training run does not need it
    from sklearn.manifold import TSNE

    rows = torch.linspace(0, len(x) - 1, min(len(x), most)).round().long()
    points, class_of = x[rows].double().numpy(), labels[rows].numpy()
    points = (points - points.mean(0)) / (points.std(0) + 1e-9)
    pca = PCA(min(50, *points.shape), random_state=0).fit(points)
    reduced = pca.transform(points)
    used = np.unique(class_of)
    colors = colormaps["hsv" if len(used) > 20 else "tab20" if len(used) > 10 else "tab10"]
    color = {c: colors(i if len(used) <= 20 else i / len(used)) for i, c in enumerate(used)}
    with drawn(path, 6 * len(methods) + 2, 5.5) as figure:
        axes = figure.subplots(1, len(methods), squeeze=False)
        for axis, method in zip(axes[0], methods, strict=True):
            if method == "pca":
                flat, share = reduced[:, :2], pca.explained_variance_ratio_[:2]
                ends = [f"component {i + 1} ({s:.0%} of the variance)" for i, s in enumerate(share)]
                axis.set(title="principal components", xlabel=ends[0], ylabel=ends[-1])
            else:
                perplexity = min(30.0, (len(reduced) - 1) / 3)
                flat = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)
                axis.set(title=f"t-SNE (perplexity {perplexity:.0f})", xticks=[], yticks=[])
            marks = [
                axis.scatter(*flat[class_of == c].T[:2], s=8, alpha=0.7, color=color[c], linewidths=0) for c in used
            ]
        names = [f" {printable(classes[c])}" for c in used]  # a label that begins with "_" would be left out
        figure.legend(marks, names, loc="outside right center", fontsize=7, ncols=-(-len(names) // 26), markerscale=2)
