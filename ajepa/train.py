"""Pretrain a JEPA on audio: files -> PCM -> log-mel patches -> masks -> encoders -> predictor -> loss -> update."""

import contextlib
import dataclasses
import gc
import json
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_bytes

from ajepa import config
from ajepa.config import Config, ConfigError, Impl
from ajepa.data.index import DataError
from ajepa.evaluation import plots
from ajepa.evaluation.features import encoder_features, log_mel_features
from ajepa.model.masks import MaskSampler
from ajepa.training.checkpoint import CheckpointError, load_latest, save_checkpoint
from ajepa.training.compare import Batch, compare, table
from ajepa.training.corpus import Corpus, open_corpus
from ajepa.training.distributed import ElsewhereError, Ranks, ReplicaError, joined, speaks_for_node
from ajepa.training.engine import Engine, choose_device
from ajepa.training.profiling import StepProfile
from ajepa.training.run_log import NonFiniteError, RunLog, read_metrics, warn
from ajepa.utils.atomic_files import write_atomic


def train(cfg: Config, folder: Path, device: torch.device, ranks: Ranks) -> dict[str, Any] | None:
    """Run `cfg` in `folder` to its end, or to Ctrl-C. Returns the summary (None but on rank 0)."""
    torch.manual_seed(cfg.seed + 1_000_003 * ranks.rank)
    corpus = ranks.first_alone(lambda: open_corpus(cfg))  # the others find its verdicts in the cache
    engine = Engine(cfg, device, ranks)
    state, damaged = load_latest(folder / "checkpoints", engine)
    for message in damaged if ranks.is_first else ():
        warn(f"{message}; using the one before")
    start, baselines = (state["step"], state["baselines"]) if state else (0, baseline_scores(cfg, engine, corpus))
    counts = state["counts"] if state else {"bad_steps": 0, "bad_in_a_row": 0}
    loader = corpus.loader(cfg, state["loader"] if state else None, ranks.rank, ranks.world_size, device)
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid, seed=cfg.seed, rank=ranks.rank, world_size=ranks.world_size)
    log = RunLog(folder, cfg.optim, start, device, counts, quiet=not ranks.is_first)
    log.say(describe(cfg, engine, corpus, start))

    def save() -> None:
        place = {**loader.state_dict(), "skipped": ranks.union(loader.skipped)}
        extra = {"loader": place, "baselines": baselines, "counts": counts}
        save_checkpoint(folder / "checkpoints", step, engine, extra, cfg.watch.keep)

    step = start
    profile = StepProfile(folder, cfg.step.profile if ranks.is_first else 0, device, log.say)
    with closing(log, loader, profile), catch_signals() as stop:
        while step < cfg.optim.steps and not ranks.stopping(stop):
            tick = time.perf_counter()
            pcm, lengths = to_device(next(loader), device)
            waited = time.perf_counter() - tick
            masks = engine.masks(sampler, step, len(pcm))
            share = ranks.share(sum(len(part.target) for part in masks), bool(stop))
            result = engine.step(pcm, lengths, masks, step, share)
            step += 1
            flops = partial(engine.flops, masks)
            log.add(result, len(pcm) * ranks.world_size, time.perf_counter() - tick, waited, flops)
            profile.step(flops, log.peak)

            last = step == cfg.optim.steps
            if last or step % cfg.watch.log_every == 0:
                log.flush(step)
            if last or step % cfg.watch.watch_every == 0:
                watch = {**engine.inspect(pcm, lengths, masks), **score(cfg, engine, corpus)}
                log.write({"step": step, **watch})
                log.say(describe_watch(step, watch, baselines))
                log.warn_collapse(watch)
            if last or step % cfg.watch.checkpoint_every == 0:
                save()
            if step == start + 1:
                gc.collect()
                gc.freeze()  # the model lives as long as the process: no need to scan it again and again

        found = ranks.union(loader.skipped)
        skipped = ranks.first(lambda: corpus.write_skipped(folder, found.items()))
        if step < cfg.optim.steps:
            log.flush(step)
            save()
            log.say(f"stopped after step {step}; continue with --out {folder} --resume")
            raise KeyboardInterrupt
        encoder = engine.target_encoder()
        if skipped is None:  # not rank 0, which does the rest
            return None
        write_encoder(cfg, folder, encoder)
        draw(cfg, folder, engine, corpus, baselines)
        peak = engine.peak_memory()
        engine.graphs = None  # their memory is the comparison's
        rates = compare_engines(cfg, device, corpus, min(cfg.watch.compare_steps, cfg.optim.steps), ranks.world_size)
        return finish(cfg, folder, device, log, baselines, rates, skipped, peak)


def baseline_scores(cfg: Config, engine: Engine, corpus: Corpus) -> dict[str, float | None]:
    """kNN accuracy before the first step, and of pooled log-mel."""
    log_mel = corpus.evaluation.score(log_mel_features(cfg.front_end), engine.device)
    return {
        "knn_accuracy_untrained": score(cfg, engine, corpus)["knn_accuracy"],
        "knn_accuracy_log_mel": log_mel["knn_accuracy"],
    }


def score(cfg: Config, engine: Engine, corpus: Corpus) -> dict[str, float | None]:
    """Effective rank, mean cosine and kNN accuracy of the EMA target encoder on the labelled slice."""
    features = encoder_features(engine.target_encoder(), engine.front_end, cfg.front_end, cfg.watch.pooling)
    with engine.autocast():
        return corpus.evaluation.score(features, engine.device)


def to_device(batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if batch.pcm.device.type == device.type:
        return batch.pcm, batch.lengths
    return tuple(t.pin_memory().to(device, non_blocking=True) for t in (batch.pcm, batch.lengths))


def compare_engines(
    cfg: Config, device: torch.device, corpus: Corpus, steps: int, world_size: int = 1
) -> dict[str, float]:
    """Clips per second of plain PyTorch and of this run's engine, on one device and its share of `steps` batches."""
    if steps == 0:
        return {}
    also: list[Impl] = ["compile"] if cfg.compare else []
    impls: list[Impl] = list(dict.fromkeys(["reference", *also, cfg.impl]))
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid, seed=cfg.seed)
    with contextlib.closing(corpus.loader(cfg, None, 0, world_size)) as loader:
        pairs = [to_device(next(loader), device) for _ in range(steps)]
    batches: list[Batch] = []
    for i, (pcm, lengths) in enumerate(pairs):
        parts = sampler.parts(i, cfg.optim.steps, cfg.step.sizes(len(pcm)))
        batches.append((pcm, lengths, [masks.to(device) for masks in parts]))
    try:
        return compare(cfg, device, batches, impls)
    except torch.cuda.OutOfMemoryError:
        warn("no comparison with plain PyTorch: it does not fit into what is left of the GPU's memory")
        return {}


def write_encoder(cfg: Config, folder: Path, encoder: torch.nn.Module) -> None:
    weights = {k: v.contiguous().cpu() for k, v in encoder.state_dict().items()}
    write_atomic(folder / "encoder.safetensors", save_bytes(weights, {"format": "pt", "preset": cfg.preset}))


def finish(
    cfg: Config, folder: Path, device: torch.device, log: RunLog, baselines, rates, skipped: int, peak: int
) -> dict[str, Any]:
    """Write the summary, and say how it went."""
    records = read_metrics(folder)
    last = {key: r[key] for r in records for key in r}  # later records overwrite earlier ones
    plain = rates.get("reference")
    summary = {
        "preset": cfg.preset,
        "impl": cfg.impl,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "steps": cfg.optim.steps,
        "clips_per_second": log.clips / log.seconds if log.clips else last.get("clips_per_second"),
        "data_wait_share": log.waited / log.seconds if log.clips else last.get("data_wait_share"),
        "peak_memory_gb": peak / 1e9,
        "final_loss": last.get("loss"),
        "target_variance": last.get("target_variance"),
        "effective_rank": last.get("effective_rank"),
        "knn_accuracy": last.get("knn_accuracy"),
        **baselines,
        "plain_clips_per_second": plain,
        "speedup_over_plain": rates[cfg.impl] / plain if plain else None,
        "files_skipped": skipped,
        "bad_steps": log.counts["bad_steps"],
    }
    write_atomic(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    log.say(describe_summary(summary, folder))
    if rates:
        log.say("same batches through both engines, in alternation:\n" + table(rates))
    return summary


def draw(cfg: Config, folder: Path, engine: Engine, corpus: Corpus, baselines) -> None:
    lines = {
        "untrained encoder": baselines["knn_accuracy_untrained"],
        "pooled log-mel": baselines["knn_accuracy_log_mel"],
    }
    plots.plot_curves(read_metrics(folder), lines, folder / "curves.png")
    one = MaskSampler(dataclasses.replace(cfg.mask, masks_per_clip=1), cfg.front_end.grid, seed=cfg.seed)
    masks = one(cfg.optim.steps - 1, cfg.optim.steps, 1)
    clips = corpus.evaluation
    patches = engine.front_end(clips.pcm[:64].to(engine.device), clips.lengths[:64].to(engine.device)).float()
    liveliest = patches.flatten(1).std(1).argmax()  # a silent clip would show nothing
    plots.plot_masks(patches[liveliest], masks, cfg.front_end, folder / "masks.png")


def describe(cfg: Config, engine: Engine, corpus: Corpus, start: int) -> str:
    millions = {
        name: sum(p.numel() for p in getattr(engine.model, name).parameters()) / 1e6
        for name in ("context_encoder", "predictor")
    }
    where = f"continuing after step {start}" if start else f"{cfg.optim.steps} steps of {cfg.optim.batch_size} clips"
    return (
        f"{corpus.description}\n"
        f"{cfg.preset}: encoder {millions['context_encoder']:.1f} M, predictor {millions['predictor']:.1f} M, "
        f"{cfg.front_end.n_patches} patches a clip, {cfg.mask.mask} masks, "
        f"engine {cfg.impl} on {engine.device}; {where}"
    )


def describe_watch(step: int, watch: dict[str, Any], baselines: dict[str, float | None]) -> str:
    line = f"  watch at {step}: variance of targets {watch['target_variance']:.3f}"
    line += f", of predictions {watch['prediction_variance']:.3f}"
    line += f", effective rank {watch['effective_rank']:.1f}, mean cosine {watch['mean_cosine']:.3f}"
    if watch["knn_accuracy"] is not None:
        line += f", kNN {watch['knn_accuracy']:.1%}"
        line += (
            f" (untrained {baselines['knn_accuracy_untrained']:.1%}, log-mel {baselines['knn_accuracy_log_mel']:.1%})"
        )
    return line


def describe_summary(summary: dict[str, Any], folder: Path) -> str:
    def show(value, form: str) -> str:
        return "not measured" if value is None else format(value, form)

    return "\n".join(
        [
            f"finished {summary['steps']} steps; results in {folder}",
            f"  final loss             {show(summary['final_loss'], '.4f')}",
            f"  kNN accuracy           {show(summary['knn_accuracy'], '.1%')}  "
            f"(untrained {show(summary['knn_accuracy_untrained'], '.1%')}, "
            f"pooled log-mel {show(summary['knn_accuracy_log_mel'], '.1%')})",
            f"  target variance        {show(summary['target_variance'], '.3f')}",
            f"  effective rank         {show(summary['effective_rank'], '.1f')}",
            f"  throughput             {show(summary['clips_per_second'], ',.0f')} clips/s, waiting for data "
            f"{show(summary['data_wait_share'], '.1%')} of the time",
            f"  peak memory            {show(summary.get('peak_memory_gb'), '.1f')} GB",
            f"  against plain PyTorch  x {show(summary['speedup_over_plain'], '.2f')}",
            f"  files skipped          {summary['files_skipped']}",
        ]
    )


@contextlib.contextmanager
def catch_signals():
    """A list that the first Ctrl-C or SIGTERM fills: the loop ends its step and saves. The second one stops at once."""
    stop: list[int] = []

    def note(number, _frame) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        print("\nstopping after this step and saving; once more to stop at once", file=sys.stderr)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def closing(*things):
    with contextlib.ExitStack() as stack:
        for thing in things:
            stack.callback(thing.close)
        yield


def open_run(cfg: Config) -> Path | None:
    """The run folder, made ready; None where the run in it is finished already."""
    folder = Path(cfg.out or f"runs/{cfg.preset}")
    summary = folder / "summary.json"
    if cfg.resume and summary.exists():
        print(describe_summary(json.loads(summary.read_text()), folder))
        print("this run is finished; choose another --out for a new one")
        return None
    if not cfg.resume and (folder / "config.json").exists():
        raise ConfigError(f"--out {folder} holds a run already: add --resume to continue it, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(cfg, folder / "config.json")
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error}") from error
    return folder


def main(argv: list[str] | None = None) -> int:
    try:
        cfg = config.parse(argv)
        if cfg.compare:
            device = choose_device(cfg.device)
            rates = compare_engines(cfg, device, open_corpus(cfg), max(1, cfg.watch.compare_steps))
            print(table(rates) if rates else "lower --batch-size, or set --micro-batch")
            return 0 if rates else 2
        with joined(cfg, choose_device(cfg.device)) as (ranks, device):
            folder = ranks.gather(ranks.first(lambda: open_run(cfg)))[0]
            if folder is not None:
                train(cfg, folder, device, ranks)
    except KeyboardInterrupt:
        return 130
    except ElsewhereError:
        return 2
    except (ConfigError, NonFiniteError) as error:  # all ranks come to the same
        if speaks_for_node():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (DataError, CheckpointError, ReplicaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
