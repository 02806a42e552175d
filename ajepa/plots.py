"""The two pictures of a run: its curves, and a spectrogram with its masks."""

from pathlib import Path
from typing import Any

import matplotlib
import torch

from ajepa.masks import Masks
from ajepa_kernels import LogMelSpec

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap


def plot_curves(records: list[dict[str, Any]], baselines: dict[str, float | None], path: Path) -> None:
    """Loss, variance of targets and predictions, effective rank and kNN accuracy over the steps."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")

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
    plt.close(figure)


def plot_masks(patches_NP: torch.Tensor, masks: Masks, spec: LogMelSpec, path: Path) -> None:
    """One clip and its masks (a batch of one): log-mel, what the context encoder sees, what the predictor must give."""
    rows, columns = spec.grid
    image = patches_NP.cpu().view(rows, columns, *spec.patch).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)

    def cells(index: torch.Tensor) -> torch.Tensor:
        grid = torch.zeros(rows * columns, dtype=torch.bool)
        grid[index] = True
        grid = grid.view(rows, columns)
        return grid.repeat_interleave(spec.patch[0], 0).repeat_interleave(spec.patch[1], 1)

    low, high = image.float().quantile(torch.tensor([0.01, 0.99])).tolist()  # zero padding must not set the scale
    panels = (("log-mel", None), ("visible to the context encoder", masks.context), ("to be predicted", masks.target))
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 7.5), sharex=True, layout="constrained")
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
    plt.close(figure)
