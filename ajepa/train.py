"""Pretrain a JEPA on audio: files -> PCM -> log-mel patches -> masks -> encoders -> predictor -> loss -> update."""

import gc
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ajepa import config
from ajepa.config import Config, ConfigError
from ajepa.data.index import DataError
from ajepa.evaluation.features import encoder_features, log_mel_features
from ajepa.model.masks import MaskSampler
from ajepa.training.checkpoint import load_latest, save_checkpoint
from ajepa.training.compare import compare_engines, table
from ajepa.training.corpus import Corpus, open_corpus, to_device
from ajepa.training.distributed import ElsewhereError, Ranks, ReplicaError, joined, speaks_for_node
from ajepa.training.engine import Engine
from ajepa.training.profiling import StepProfile
from ajepa.training.run_log import NonFiniteError, RunLog, warn
from ajepa.training.summary import (
    Baselines,
    describe_evaluation,
    describe_run,
    describe_summary,
    draw,
    make_summary,
    write_encoder,
    write_summary,
)
from ajepa.utils.devices import choose_device, peak_memory
from ajepa.utils.run_folder import CheckpointError
from ajepa.utils.signals import catch_signals, closing


def train(cfg: Config, folder: Path, device: torch.device, ranks: Ranks) -> dict[str, Any] | None:
    """Run `cfg` in `folder` until its last step or Ctrl-C. Returns the summary (None on ranks other than 0)."""
    torch.manual_seed(cfg.seed + 1_000_003 * ranks.rank)
    corpus = ranks.first_alone(lambda: open_corpus(cfg))  # the other ranks find its verdicts in the cache
    engine = Engine(cfg, device, ranks)
    if cfg.objective.teacher:
        engine.teach(cfg.objective.teacher)
    state, damaged = load_latest(folder / "checkpoints", engine)
    for message in damaged if ranks.is_first else ():
        warn(f"{message}; using the one before")
    start, baselines = (state["step"], state["baselines"]) if state else (0, baseline_scores(cfg, engine, corpus))
    counts = state["counts"] if state else {"bad_steps": 0, "bad_in_a_row": 0}
    loader = corpus.loader(cfg, state["loader"] if state else None, ranks.rank, ranks.world_size, device)
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid, seed=cfg.seed, rank=ranks.rank, world_size=ranks.world_size)
    per_recording = cfg.objective.count * ranks.world_size
    log = RunLog(folder, cfg, start, device, counts, quiet=not ranks.is_first)
    log.say(describe_run(cfg, engine, corpus, start))

    def save() -> None:
        place = {**loader.state_dict(), "skipped": ranks.union(loader.skipped)}
        extra = {"loader": place, "baselines": baselines, "counts": counts}
        save_checkpoint(folder / "checkpoints", step, engine, extra, cfg.watch.keep)

    step = start
    profile = StepProfile(folder, cfg.step.profile if ranks.is_first else 0, device, log.say)
    with catch_signals() as stop, closing(log, loader, profile):  # a signal must not cut the closing short
        while step < cfg.optim.steps and not ranks.stopping(stop):
            tick = time.perf_counter()
            with engine.ahead():  # on a GPU, earlier steps may still be running
                pcm, lengths = to_device(next(loader), device)
                waited = time.perf_counter() - tick
                patches = engine.patches(pcm, lengths, step)
            masks = engine.masks(sampler, step, len(pcm))
            share = ranks.share(sum(len(part.target) for part in masks), bool(stop))
            result = engine.train(patches, masks, step, share)
            step += 1
            flops = partial(engine.flops, masks)
            log.add(result, len(pcm) * per_recording, time.perf_counter() - tick, waited, flops)
            profile.step(flops, log.peak)

            # once in a while: log, evaluate the features, save
            last = step == cfg.optim.steps
            if last or step % cfg.watch.log_every == 0:
                log.flush(step)
            if last or step % cfg.watch.watch_every == 0:
                values = {**engine.inspect(pcm, lengths, masks, step), **score(cfg, engine, corpus)}
                log.write({"step": step, **values})
                log.say(describe_evaluation(step, values, baselines, cfg.watch.pooling))
                log.warn_collapse(step, values, len(corpus.evaluation.items))
            if last or step % cfg.watch.checkpoint_every == 0:
                save()
            if step == start + 1:
                gc.collect()
                gc.freeze()  # the model lives as long as the process, so the collector need not scan it again

        # after the last step, or after Ctrl-C
        found = ranks.union(loader.skipped)
        skipped = ranks.first(lambda: corpus.write_skipped(folder, found.items()))
        if step < cfg.optim.steps:
            log.flush(step)
            save()
            log.say(f"stopped after step {step}; continue with --out {folder} --resume")
            raise KeyboardInterrupt
        encoder = engine.encoder()
        if skipped is None:  # the rest is the work of rank 0
            return None
        write_encoder(cfg, folder, encoder, engine.projector)
        draw(cfg, folder, engine, corpus, baselines)
        peak = peak_memory(device)
        engine.graphs = None  # free the memory of the graphs for the comparison
        rates = compare_engines(cfg, device, corpus, min(cfg.watch.compare_steps, cfg.optim.steps), ranks.world_size)
        summary = make_summary(cfg, device, log, baselines, rates, skipped, peak)
        write_summary(summary, folder, log, rates)
        return summary


def baseline_scores(cfg: Config, engine: Engine, corpus: Corpus) -> Baselines:
    """kNN accuracy of the encoder before its first step, and of pooled log-mel."""
    log_mel = corpus.evaluation.score(log_mel_features(cfg.front_end, cfg.watch.pooling), engine.device)
    return {
        "knn_accuracy_untrained": score(cfg, engine, corpus)["knn_accuracy"],
        "knn_accuracy_log_mel": log_mel["knn_accuracy"],
    }


def score(cfg: Config, engine: Engine, corpus: Corpus) -> dict[str, float | None]:
    """Effective rank, mean cosine and kNN accuracy of the run's encoder on the evaluation clips."""
    front_end, pooling = engine.front_end, cfg.watch.pooling
    features = encoder_features(engine.encoder(), front_end, cfg.front_end, pooling, engine.projector)
    with engine.autocast():
        return corpus.evaluation.score(features, engine.device)


def open_run(cfg: Config) -> tuple[Path, dict[str, Any] | None]:
    """The run folder, created if need be, and the summary of the run in it if that run has finished.

    Raises ConfigError where the folder holds a run that `cfg` does not continue, or cannot be written.
    """
    folder = cfg.folder
    summary = folder / "summary.json"
    if cfg.resume and summary.exists():
        return folder, json.loads(summary.read_text())
    if not cfg.resume and (folder / "config.json").exists():
        raise ConfigError(f"--out {folder} holds a run already: add --resume to continue it, or choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save(cfg, folder / "config.json")
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error}") from error
    return folder, None


def run(cfg: Config) -> dict[str, Any] | None:
    """Pretrain `cfg` in its run folder. This is `ajepa.train(cfg)`.

    Returns:
        The contents of `summary.json`; None on ranks other than 0. A finished run that is resumed trains no further.

    Raises:
        ConfigError: an invalid setting, or a run folder that holds another run.
        DataError: no usable recording.
        CheckpointError: checkpoints exist, but none is usable; or a new one cannot be written.
        NonFiniteError: the loss or the gradients were not finite for `max_bad_steps` steps in a row.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the step has ended and its checkpoint is saved.

    Example::

        cfg = ajepa.preset("tiny", data="recordings", steps=200, out="runs/mine")
        summary = ajepa.train(cfg)
        print(summary["knn_accuracy"])
    """
    config.validate(cfg)
    config.check_resume(cfg)
    with joined(cfg, choose_device(cfg.device)) as (ranks, device):
        opened = ranks.gather(ranks.first(lambda: open_run(cfg)))[0]
        assert opened is not None
        folder, finished = opened
        if finished is None:
            return train(cfg, folder, device, ranks)
        if ranks.is_first:
            print(describe_summary(finished, folder))
            print("this run is finished; choose another --out for a new one")
        return finished if ranks.is_first else None


def main(argv: list[str] | None = None) -> int:
    try:
        cfg = config.parse(argv)
        if cfg.compare:
            rates = compare_engines(cfg, choose_device(cfg.device), open_corpus(cfg), max(1, cfg.watch.compare_steps))
            print(table(rates) if rates else "lower --batch-size, or set --micro-batch")
            return 0 if rates else 2
        run(cfg)
    except KeyboardInterrupt:
        return 130
    except ElsewhereError:
        return 2
    except (ConfigError, NonFiniteError) as error:  # raised on all ranks alike
        if speaks_for_node():
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (DataError, CheckpointError, ReplicaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class _Callable(ModuleType):
    """`ajepa.train` is this module as soon as anything imports it, so the module itself must be callable."""

    def __call__(self, cfg: Config) -> dict[str, Any] | None:
        return run(cfg)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Callable
