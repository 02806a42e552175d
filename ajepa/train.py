"""Pretrain a JEPA on audio: files -> PCM -> log-mel patches -> masks -> encoders -> predictor -> loss -> update."""

import contextlib
import dataclasses
import gc
import hashlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ajepa import config
from ajepa.config import Config, ConfigError
from ajepa.encoder import Encoder
from ajepa.evaluation.baselines import kept_scores
from ajepa.evaluation.features import encoder_features, log_mel_features
from ajepa.model.masks import MaskSampler
from ajepa.training import alike, origin
from ajepa.training.checkpoint import load_checkpoint, load_latest, save_checkpoint
from ajepa.training.compare import compare_engines, table
from ajepa.training.corpus import Corpus, open_corpus, to_device
from ajepa.training.distributed import joined, speaks_for_node
from ajepa.training.engine import Engine
from ajepa.training.profiling import StepProfile
from ajepa.training.ranks import ElsewhereError, Ranks
from ajepa.training.run_log import NonFiniteError, RunLog, warn
from ajepa.training.sizes import check_memory
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
from ajepa.utils.command import command
from ajepa.utils.cores import local_ranks
from ajepa.utils.devices import choose_device, choose_threads, peak_memory
from ajepa.utils.errors import UserError
from ajepa.utils.folders import claim, kind_of, overwrite
from ajepa.utils.json_files import DamagedError, read_json
from ajepa.utils.lock import locked
from ajepa.utils.run_folder import checkpoints, is_checkpoint, read_metrics, read_verified, run_of, steps_of
from ajepa.utils.signals import catch_signals, closing
from ajepa.utils.tensor_files import parse_tensors, tensors_hash


def train(
    cfg: Config, folder: Path, device: torch.device, ranks: Ranks, check_lock: Callable[[], None]
) -> dict[str, Any] | None:
    """Run `cfg` in `folder` until its last step or Ctrl-C. Returns the summary (None on ranks other than 0).

    `check_lock()` raises an error on rank 0 if another process has taken the folder.
    """
    torch.manual_seed(cfg.seed + 1_000_003 * ranks.rank)
    ranks.together(lambda: check_memory(cfg, device, ranks.world_size))
    with announced("listing the recordings and loading the evaluation clips", ranks):
        corpus = open_corpus(cfg, ranks)
    engine = Engine(cfg, device, ranks)
    state = first_state(cfg, folder, engine, corpus)
    start, baselines, counts = state["step"], state["baselines"], state["counts"]
    loader = corpus.loader(cfg, state["loader"], ranks.rank, ranks.world_size, device, ranks)
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid, seed=cfg.seed, rank=ranks.rank, world_size=ranks.world_size)
    per_recording = cfg.objective.count * ranks.world_size
    quiet, saved = not ranks.is_first, state.get("log")
    log = ranks.together(lambda: RunLog(folder, cfg, start, device, counts, quiet, saved))
    log.say(describe_run(cfg, engine, corpus, start))
    for line in ranks.gather(ranks.cores)[: local_ranks()] if not ranks.alone else ():  # of this machine
        log.say(line)
    for message in state["messages"]:
        log.say(message)

    def save() -> None:
        require_finite(engine, step)
        ranks.first(check_lock)
        place = {**loader.state_dict(), "skipped": ranks.union(loader.skipped)}
        extra = {"loader": place, "baselines": baselines, "counts": counts, "log": ranks.together(log.state)}
        save_checkpoint(folder / "checkpoints", step, engine, extra, cfg.watch.keep, spare=cfg.optim.stable_steps)

    def list_skipped() -> int | None:
        found = ranks.union(loader.skipped)
        return ranks.first(lambda: corpus.write_skipped(folder, found.items()))

    step = start
    profile = StepProfile(folder, cfg.step.profile if ranks.is_first else 0, device, log.say)
    with catch_signals() as stop, closing(log, loader, profile):  # a signal must not cut the closing short
        skipped = list_skipped()
        if start and not checkpoints(folder / "checkpoints"):
            save()  # of a cooldown: from here on its folder stands alone
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
                ranks.together(partial(log.flush, step, ranks))
                require_finite(engine, step)
                skipped = list_skipped()
            if last or step % cfg.watch.watch_every == 0:
                values = {**engine.inspect(pcm, lengths, masks, step), **score(cfg, engine, corpus)}
                ranks.together(partial(log.write, {"step": step, **values}))
                log.say(describe_evaluation(step, values, baselines, cfg.watch.pooling))
                log.warn_collapse(step, values, len(corpus.evaluation.items))
                require_finite(engine, step, values)
            if last or step == cfg.optim.stable_steps or step % cfg.watch.checkpoint_every == 0:
                save()
            if step == start + 1:
                gc.collect()
                gc.freeze()  # the model lives as long as the process, so the collector need not scan it again

        # after the last step, or after Ctrl-C
        if step < cfg.optim.steps:
            save()
            stopped = f"stopped after step {step}; continue with --out {folder} --resume"
            raise KeyboardInterrupt(stopped if ranks.is_first else "")
        encoder = engine.encoder()
        if skipped is None:  # the rest is the work of rank 0
            return None
        write_encoder(cfg, folder, encoder, engine.projector)
        draw(cfg, folder, engine, corpus, baselines)
        peak = peak_memory(device)
        engine.graphs = engine.update_graph = None  # free the memory of the graphs for the comparison
        rates = compare_engines(cfg, device, corpus, min(cfg.watch.compare_steps, cfg.optim.steps), ranks.world_size)
        summary = make_summary(cfg, device, log, baselines, rates, skipped, peak)
        write_summary(summary, folder, log, rates)
        return summary


def first_state(cfg: Config, folder: Path, engine: Engine, corpus: Corpus) -> dict[str, Any]:
    """Bring `engine` to where the run begins. Returns the state of the checkpoint that it continues, or that of step 0.

    `messages` are lines for the log.
    """
    ranks = engine.ranks
    if cfg.objective.teacher:
        engine.teach(cfg.objective.teacher)
    state, damaged = load_latest(folder / "checkpoints", engine)
    for message in damaged if ranks.is_first else ():
        warn(f"{message}; using the one before")
    if state is None and cfg.cooldown_from:
        source = Path(cfg.cooldown_from)
        old = config.load(run_of(source) / "config.json")
        path = origin.checkpoint_of(source, old, cfg.optim.stable_steps)
        state = ranks.together(lambda: load_checkpoint(path, engine))
        if "log" in state:  # the lines of that run stay there
            state["log"] |= {"length": 0, "sha256": hashlib.sha256(b"").hexdigest()}
        state["messages"] = [f"cooling down from {path}"]
    if state is not None:
        return {"messages": [], **state}
    with announced("scoring the encoder before its first step", ranks):
        baselines = ranks.together(lambda: baseline_scores(cfg, engine, corpus))  # which some find in their caches
    messages = []
    if cfg.init_from:
        weights = ranks.first_alone(lambda: read_weights(cfg.init_from or ""))
        messages.append(origin.begin_with(engine, weights, cfg.init_from))
    counts = {"bad_steps": 0, "bad_in_a_row": 0}
    return {"step": 0, "baselines": baselines, "counts": counts, "loader": None, "messages": messages}


def read_weights(source: str) -> dict[str, torch.Tensor]:
    """Weights of --init-from `source` by the names of a run's model. Raises ConfigError, CheckpointError."""
    path = Path(source)
    if kind_of(run_of(path)) == "run":
        found = [path] if is_checkpoint(path) else checkpoints(path / "checkpoints")[-1:]
        if found:
            return parse_tensors(read_verified(found[0])["model.safetensors"], found[0])
    encoder = Encoder.from_pretrained(source)
    weights = {f"context_encoder.{name}": value for name, value in encoder.vit.state_dict().items()}
    projector = encoder.projector.state_dict() if encoder.projector is not None else {}
    return {**weights, **{f"clip.projector.{name}": value for name, value in projector.items()}}


@contextlib.contextmanager
def announced(work: str, ranks: Ranks) -> Iterator[None]:
    """Say what the enclosed work is, if it takes more than a second."""
    timer = threading.Timer(1.0, print, [f"{work} ..."], {"flush": True})
    if ranks.is_first:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def require_finite(engine: Engine, step: int, values: dict[str, Any] | None = None) -> None:
    """Raise NonFiniteError on all ranks if a weight is not finite after `step` steps, or one of `values`."""
    wrong = [name for name, x in (values or {}).items() if isinstance(x, float) and not math.isfinite(x)]
    if not engine.finite():
        wrong.append("weights")
    wrong = [name for names in engine.ranks.gather(wrong) for name in names]
    if wrong:
        raise NonFiniteError(
            f"after step {step} there are NaN or infinities in: {', '.join(dict.fromkeys(wrong))}. Nothing was saved "
            "since the last checkpoint. Start again, in another --out or with --overwrite: lower --lr, lengthen "
            "--warmup-steps, or set --clip-norm."
        )


def baseline_scores(cfg: Config, engine: Engine, corpus: Corpus) -> Baselines:
    """kNN accuracy of the encoder before its first step, and of pooled log-mel. Kept between runs that begin alike."""
    encoder, projector = engine.encoder(), engine.projector
    weights = [tensors_hash(module.state_dict()) for module in (encoder, projector) if module is not None]

    def compute() -> Baselines:
        log_mel = corpus.evaluation.score(log_mel_features(cfg.front_end, cfg.watch.pooling), engine.device)
        return {
            "knn_accuracy_untrained": score(cfg, engine, corpus, encoder)["knn_accuracy"],
            "knn_accuracy_log_mel": log_mel["knn_accuracy"],
        }

    settings = [weights, cfg.model, cfg.front_end, cfg.watch.pooling, engine.device.type, engine.bf16]
    return kept_scores(corpus.evaluation, settings, compute)


def score(
    cfg: Config, engine: Engine, corpus: Corpus, encoder: torch.nn.Module | None = None
) -> dict[str, float | None]:
    """Effective rank, mean cosine and kNN accuracy of the run's encoder on the evaluation clips."""
    front_end, pooling = engine.front_end, cfg.watch.pooling
    encoder = engine.encoder() if encoder is None else encoder
    features = encoder_features(encoder, front_end, cfg.front_end, pooling, engine.projector)
    with engine.autocast():
        return corpus.evaluation.score(features, engine.device)


def open_run(cfg: Config) -> dict[str, Any] | None:
    """Prepare the run folder, which this process has locked, and return the summary of the run in it if `cfg` adds
    nothing to it.

    Raises ConfigError where the folder holds a run that has begun, and that `cfg` does not continue.
    """
    folder, summary, saved = cfg.folder, cfg.folder / "summary.json", cfg.folder / "config.json"
    begun = claim(folder, "run") and bool(checkpoints(folder / "checkpoints") or read_metrics(folder))
    if begun or (cfg.resume and saved.exists()):  # a run that failed before its first step leaves nothing to lose
        if not cfg.resume:
            raise ConfigError(
                f"--out {folder} holds a run already: add --resume to continue it, --overwrite to replace it, or "
                "choose another --out"
            )
        old = config.load(saved)
        if old.optim != cfg.optim:
            done = [steps_of(path) for path in checkpoints(folder / "checkpoints")]
            origin.check_extension(old, cfg, done[-1] if done else 0)
            summary.unlink(missing_ok=True)
        elif summary.exists():
            return read_summary(summary)
    config.save(cfg, saved)
    return None


def read_summary(path: Path) -> dict[str, Any]:
    """The summary of a finished run. Raises DamagedError, which says how to get it back."""
    try:
        summary = read_json(path)
        describe_summary(summary, path.parent)
    except (UserError, KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else f"{path} is damaged: {error!r}"
        raise DamagedError(f"{reason}; or delete it, and --resume writes it again") from None
    return summary


def describe_old(folder: Path) -> str:
    """What --overwrite replaces: the preset of a run, its steps, and when it was last written."""
    try:
        cfg = config.load(folder / "config.json")
        what = f"preset {cfg.preset}, {cfg.optim.steps:,} steps planned"
    except ConfigError:
        what = "with a damaged config.json"
    saved = checkpoints(folder / "checkpoints")
    done = max([steps_of(path) for path in saved[-1:]] + [record["step"] for record in read_metrics(folder)[-1:]] + [0])
    date = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(path.stat().st_mtime for path in folder.iterdir())))
    return f"{what}, {done:,} done, last written {date}"


@contextlib.contextmanager
def opened(cfg: Config, ranks: Ranks) -> Iterator[tuple[Callable[[], None], dict[str, Any] | None]]:
    """Hold the lock of the run folder on rank 0. Yields its `check`, and the summary of a run that has finished."""
    with contextlib.ExitStack() as stack:

        def take() -> tuple[Callable[[], None], dict[str, Any] | None]:
            if cfg.overwrite and kind_of(cfg.folder) == "run":
                overwrite(cfg.folder, "run", describe_old(cfg.folder))
            claim(cfg.folder, "run")
            lock = stack.enter_context(locked(cfg.folder))
            return lock.check, open_run(cfg)

        check_lock, finished = ranks.first(take) or (lambda: None, None)
        yield check_lock, ranks.gather(finished)[0]


def run(cfg: Config) -> dict[str, Any] | None:
    """Pretrain `cfg` in its run folder. This is `ajepa.train(cfg)`.

    Returns:
        The contents of `summary.json`; None on ranks other than 0. A finished run that is resumed trains no further.

    Raises:
        ConfigError: an invalid setting, or a run folder that holds another run.
        DataError: no usable recording.
        CheckpointError: checkpoints exist, but none is usable; or a new one cannot be written.
        NonFiniteError: the loss or the gradients were not finite for `max_bad_steps` steps in a row, or weights or
            measures of the features were not.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP, after the step has ended and its checkpoint is saved.

    Example::

        cfg = ajepa.preset("tiny", data="recordings", steps=200, out="runs/mine")
        summary = ajepa.train(cfg)
        print(summary["knn_accuracy"])
    """
    config.validate(cfg)
    if cfg.cooldown_from:
        cfg = origin.cooldown(cfg)
    config.check_resume(cfg)
    with joined(cfg, choose_device(cfg.device)) as (ranks, device):
        cfg = dataclasses.replace(cfg, threads=choose_threads(cfg.threads))  # of the cores that the rank is bound to
        torch.set_num_threads(cfg.threads)
        alike.check_code(ranks)
        alike.check_settings(ranks, cfg)
        with opened(cfg, ranks) as (check_lock, finished):
            if finished is None:
                return train(cfg, cfg.folder, device, ranks, check_lock)
            if ranks.is_first:
                print(describe_summary(finished, cfg.folder))
                print("this run is finished; add more --steps if it has --schedule constant, or choose another --out")
            return finished if ranks.is_first else None


@command
def main(argv: list[str] | None = None) -> int:
    try:
        cfg = config.parse(argv)
        if cfg.compare:
            rates = compare_engines(cfg, choose_device(cfg.device), open_corpus(cfg), max(1, cfg.watch.compare_steps))
            print(table(rates) if rates else "lower --batch-size, or set --micro-batch")
            return 0 if rates else 2
        run(cfg)
    except ElsewhereError:
        return 2
    except (ConfigError, NonFiniteError):  # raised on all ranks alike
        if speaks_for_node():
            raise
        return 2
    return 0


class _Callable(ModuleType):
    """`ajepa.train` is this module as soon as anything imports it, so the module itself must be callable."""

    def __call__(self, cfg: Config) -> dict[str, Any] | None:
        return run(cfg)


if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = _Callable
