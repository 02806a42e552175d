"""Plots: a run's curves, a spectrogram with its masks, a probe's confusion matrix and a map of the embeddings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure  # not pyplot, whose backend belongs to the caller, such as a notebook

from ajepa.model.masks import Masks
from ajepa_kernels import LogMelSpec


def plot_curves(records: list[dict[str, Any]], baselines: dict[str, float | None], path: Path) -> None:
    """Loss, variance of targets and predictions, effective rank and kNN accuracy over the steps."""
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)

    def draw(axis, key: str, label: str, **style) -> None:
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), label=label, **style)

    draw(axes[0, 0], "loss", "training loss")
    draw(axes[0, 1], "target_variance", "targets", marker=".")
    draw(axes[0, 1], "prediction_variance", "predictions", marker=".")
    draw(axes[1, 0], "effective_rank", "clip embeddings", marker=".")
    draw(axes[1, 1], "knn_accuracy", "EMA target encoder", marker=".")
    for style, (name, value) in zip((":", "--"), baselines.items(), strict=False):
        if value is not None:
            axes[1, 1].axhline(value, color="gray", linestyle=style, label=name)
    for axis, title in zip(axes.flat, ("Loss", "Variance over tokens", "Effective rank", "kNN accuracy"), strict=True):
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.savefig(path, dpi=110)


def plot_masks(patches_NP: torch.Tensor, masks: Masks, spec: LogMelSpec, path: Path) -> None:
    """One clip and its masks (a batch of one): log-mel, patches that the context encoder sees, patches to predict."""
    rows, columns = spec.grid
    image = patches_NP.cpu().view(rows, columns, *spec.patch).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)

    def cells(index: torch.Tensor) -> torch.Tensor:
        grid = torch.zeros(rows * columns, dtype=torch.bool)
        grid[index] = True
        grid = grid.view(rows, columns)
        return grid.repeat_interleave(spec.patch[0], 0).repeat_interleave(spec.patch[1], 1)

    low, high = image.float().quantile(torch.tensor([0.01, 0.99])).tolist()  # zero padding must not set the scale
    panels = (("log-mel", None), ("visible to the context encoder", masks.context), ("to be predicted", masks.target))
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    seconds = image.shape[1] * spec.hop_length / spec.sample_rate
    extent = (0, seconds, 0, spec.n_mels)
    for axis, (title, index) in zip(axes, panels, strict=True):
        axis.imshow(image, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=low, vmax=high)
        if index is not None:
            hidden = (~cells(index)).float()
            axis.imshow(
                hidden, origin="lower", aspect="auto", extent=extent, cmap=ListedColormap(["#00000000", "#dddddd"])
            )
            title += f": {len(index.unique())} of {spec.n_patches} patches"
        axis.set_title(title)
        axis.set_ylabel("mel band")
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=110)


def plot_confusion(counts: np.ndarray, classes: list[str], title: str, path: Path) -> None:
    """Share of each true class (row) that was predicted as each class (column); `counts` is `[classes, classes]`."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(classes)
    size = 4 + min(n, 100) * 0.22
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    axis.set(title=title, xlabel="predicted", ylabel="true")
    if n <= 100:
        axis.set_xticks(range(n), classes, rotation=90, fontsize=8)
        axis.set_yticks(range(n), classes, fontsize=8)
    if n <= 20:
        for (row, column), value in np.ndenumerate(share):
            if counts[row, column]:
                color = "white" if value > 0.5 else "black"
                axis.text(column, row, f"{value:.0%}", ha="center", va="center", fontsize=7, color=color)
    figure.savefig(path, dpi=110)


def plot_embeddings(
    x: torch.Tensor, labels: torch.Tensor, classes: list[str], methods: Sequence[str], path: Path, most: int = 3_000
) -> None:
    """At most `most` clip embeddings in two dimensions, coloured by class; a panel for each method ("pca", "tsne")."""
    from sklearn.decomposition import PCA  # slow to import, and a training run does not need it
    from sklearn.manifold import TSNE

    rows = torch.linspace(0, len(x) - 1, min(len(x), most)).round().long()
    points, class_of = x[rows].double().numpy(), labels[rows].numpy()
    points = (points - points.mean(0)) / (points.std(0) + 1e-9)
    pca = PCA(min(50, *points.shape), random_state=0).fit(points)
    reduced = pca.transform(points)
    figure = Figure(figsize=(6 * len(methods) + 2, 5.5), layout="constrained")
    axes = figure.subplots(1, len(methods), squeeze=False)
    used = np.unique(class_of)
    colors = colormaps["hsv" if len(used) > 20 else "tab20" if len(used) > 10 else "tab10"]
    color = {c: colors(i if len(used) <= 20 else i / len(used)) for i, c in enumerate(used)}
    for axis, method in zip(axes[0], methods, strict=True):
        if method == "pca":
            flat, share = reduced[:, :2], pca.explained_variance_ratio_[:2]
            names = [f"component {i + 1} ({s:.0%} of the variance)" for i, s in enumerate(share)]
            axis.set(title="principal components", xlabel=names[0], ylabel=names[-1])
        else:
            perplexity = min(30.0, (len(reduced) - 1) / 3)
            flat = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(reduced)
            axis.set(title=f"t-SNE (perplexity {perplexity:.0f})", xticks=[], yticks=[])
        for c in used:
            axis.scatter(*flat[class_of == c].T[:2], s=8, alpha=0.7, color=color[c], label=classes[c], linewidths=0)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", fontsize=7, ncols=-(-len(names) // 26), markerscale=2)
    figure.savefig(path, dpi=110)
