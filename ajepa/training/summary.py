"""The reports of a run: its first lines, its evaluations, its summary and its plots."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ajepa.config import Config
from ajepa.data.reader import default_threads
from ajepa.evaluation import plots
from ajepa.model.masks import MaskSampler, describe_masks
from ajepa.training.compare import table
from ajepa.training.corpus import Corpus
from ajepa.training.engine import Engine
from ajepa.training.run_log import RunLog
from ajepa.utils.json_files import write_json
from ajepa.utils.run_folder import read_metrics
from ajepa.utils.tensor_files import write_tensors

Baselines = dict[str, float | None]


def describe_run(cfg: Config, engine: Engine, corpus: Corpus, start: int) -> str:
    parts = {"encoder": "context_encoder", "predictor": "predictor", "projector": "clip"}
    sizes = ", ".join(
        f"{part} {sum(p.numel() for p in getattr(engine.model, name).parameters()) / 1e6:.1f} M"
        for part, name in parts.items()
        if hasattr(engine.model, name)
    )
    views = f"{cfg.objective.views} views of each recording, " if cfg.objective.clips else ""
    whole = f"{cfg.optim.steps} steps of {cfg.optim.batch_size} recordings"
    threads = f"decoding threads: {cfg.data.loader_threads or default_threads()}"
    if engine.device.type == "cpu":
        threads = f"threads: {torch.get_num_threads()}, {threads}"
    ranks = f"\n{describe_ranks(cfg, engine)}" * (not engine.ranks.alone)
    given = f"\nthe targets are those of {cfg.objective.teacher}" if cfg.objective.teacher else ""
    return (
        f"{corpus.description}\n"
        f"{cfg.preset}: {sizes}, objective {cfg.objective.objective}, {views}"
        f"{cfg.front_end.n_patches} patches a clip, {describe_masks(cfg.mask, cfg.front_end.grid)}, "
        f"engine {cfg.impl} on {engine.device} ({threads}); {f'continuing after step {start}' if start else whole}"
        f"{ranks}{given}"
    )


def describe_ranks(cfg: Config, engine: Engine) -> str:
    """How several ranks share weights, gradients and work."""
    text = f"{engine.ranks.world_size} ranks, --parallel {cfg.parallel}, gradients summed in {cfg.step.reduce}"
    if engine.device.type != "cuda":
        return text
    if engine.graphs is not None:
        return f"{text} between two CUDA graphs, of forward and backward and of the update"
    clips = "a clip objective compares the recordings of all ranks within its forward pass"
    why = clips if cfg.objective.clips and cfg.step.cuda_graph and engine.ranks.captures else "as the settings say"
    return f"{text}, without CUDA graphs ({why})"


def describe_evaluation(step: int, values: dict[str, Any], baselines: Baselines, pooling: str) -> str:
    line = f"  watch at {step}: variance of targets {values['target_variance']:.3f}"
    line += f" (position explains {values['position_share']:.0%}, clip {values['clip_share']:.0%})"
    if "prediction_variance" in values:
        line += f", of predictions {values['prediction_variance']:.3f}"
    line += f", effective rank {values['effective_rank']:.1f}, mean cosine {values['mean_cosine']:.3f}"
    if values["knn_accuracy"] is not None:
        untrained, log_mel = baselines["knn_accuracy_untrained"], baselines["knn_accuracy_log_mel"]
        line += f", kNN at {pooling} {values['knn_accuracy']:.1%} (untrained {untrained:.1%}, log-mel {log_mel:.1%})"
    return line


def make_summary(
    cfg: Config,
    device: torch.device,
    log: RunLog,
    baselines: Baselines,
    rates: dict[str, float],
    skipped: int,
    peak_bytes: int,
) -> dict[str, Any]:
    """The contents of `summary.json`. `rates` are clips/s of the engines in the comparison with plain PyTorch."""
    last = {key: value for record in read_metrics(log.folder) for key, value in record.items()}  # the latest of each
    plain = rates.get("reference")
    return {
        "preset": cfg.preset,
        "impl": cfg.impl,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "steps": cfg.optim.steps,
        "clips_per_second": log.clips / log.seconds if log.clips else last.get("clips_per_second"),
        "data_wait_share": log.waited / log.seconds if log.clips else last.get("data_wait_share"),
        "ranks": len(last.get("rank_wait_shares", [0])),
        "reduce_share": last.get("reduce_share"),
        "rank_wait_share": last.get("rank_wait_share"),
        "peak_memory_gb": peak_bytes / 1e9,
        "final_loss": last.get("loss"),
        "target_variance": last.get("target_variance"),
        "position_share": last.get("position_share"),
        "clip_share": last.get("clip_share"),
        "effective_rank": last.get("effective_rank"),
        "pooling": cfg.watch.pooling,
        "knn_accuracy": last.get("knn_accuracy"),
        **baselines,
        "plain_clips_per_second": plain,
        "speedup_over_plain": rates[cfg.impl] / plain if plain else None,
        "files_skipped": skipped,
        "bad_steps": log.counts["bad_steps"],
    }


def write_summary(summary: dict[str, Any], folder: Path, log: RunLog, rates: dict[str, float]) -> None:
    write_json(folder / "summary.json", summary)
    log.say(describe_summary(summary, folder))
    if rates:
        log.say("same batches through both engines, in alternation:\n" + table(rates))


def describe_summary(summary: dict[str, Any], folder: Path) -> str:
    def show(value, form: str) -> str:
        return "not measured" if value is None else format(value, form)

    reduction, waiting = (show(summary.get(name), ".1%") for name in ("reduce_share", "rank_wait_share"))
    ranks = f"{summary.get('ranks', 1)}; reduction {reduction}, waiting for each other {waiting} of the time"
    return "\n".join(
        [
            f"finished {summary['steps']} steps; results in {folder}",
            f"  final loss             {show(summary['final_loss'], '.4f')}",
            f"  kNN accuracy           {show(summary['knn_accuracy'], '.1%')}  "
            f"(untrained {show(summary['knn_accuracy_untrained'], '.1%')}, "
            f"pooled log-mel {show(summary['knn_accuracy_log_mel'], '.1%')}; pooling {summary.get('pooling', 'mean')})",
            f"  target variance        {show(summary['target_variance'], '.3f')}, of which position explains "
            f"{show(summary.get('position_share'), '.0%')} and the clip {show(summary.get('clip_share'), '.0%')}",
            f"  effective rank         {show(summary['effective_rank'], '.1f')}",
            f"  throughput             {show(summary['clips_per_second'], ',.0f')} clips/s, waiting for data "
            f"{show(summary['data_wait_share'], '.1%')} of the time",
            *([f"  ranks                  {ranks}"] if summary.get("ranks", 1) > 1 else []),
            f"  peak memory            {show(summary.get('peak_memory_gb'), '.1f')} GB",
            f"  against plain PyTorch  x {show(summary['speedup_over_plain'], '.2f')}",
            f"  files skipped          {summary['files_skipped']}",
        ]
    )


def write_encoder(cfg: Config, folder: Path, encoder: torch.nn.Module, projector: torch.nn.Module | None) -> None:
    """Write `encoder.safetensors`, and `projector.safetensors` if the run has a projector."""
    for name, module in (("projector", projector), ("encoder", encoder)):
        if module is not None:
            write_tensors(folder / f"{name}.safetensors", module.state_dict(), preset=cfg.preset)


def draw(cfg: Config, folder: Path, engine: Engine, corpus: Corpus, baselines: Baselines) -> None:
    """Write `curves.png` and `masks.png`."""
    lines = {
        "untrained encoder": baselines["knn_accuracy_untrained"],
        "pooled log-mel": baselines["knn_accuracy_log_mel"],
    }
    plots.plot_curves(read_metrics(folder), lines, folder.resolve().name, folder / "curves.png")
    one = MaskSampler(dataclasses.replace(cfg.mask, masks_per_clip=1), cfg.front_end.grid, seed=cfg.seed)
    masks = one(cfg.optim.steps - 1, cfg.optim.steps, 1)
    clips = corpus.evaluation
    patches = engine.front_end(clips.pcm[:64].to(engine.device), clips.lengths[:64].to(engine.device)).float()
    liveliest = patches.flatten(1).std(1).argmax()  # masks on a silent clip would show nothing
    plots.plot_masks(patches[liveliest], masks, cfg.front_end, folder / "masks.png")
