"""Runs that begin with what another run has learned: --cooldown-from, --init-from, and extensions of a run."""

import dataclasses
from pathlib import Path

import torch

from ajepa import config
from ajepa.config import BUDGET, Config, ConfigError
from ajepa.training.engine import Engine
from ajepa.training.schedules import agree
from ajepa.utils.run_folder import checkpoints, is_checkpoint, run_of, steps_of

PARTS = {"context_encoder": "context encoder", "target_encoder": "target encoder", "predictor": "predictor",
         "clip": "clip objective"}  # fmt: skip


def check_extension(old: Config, new: Config, done: int) -> None:
    """Raise ConfigError unless a run of `old` that did `done` steps is, so far, one of `new`, which has other --steps.

    Learning rate, weight decay and EMA decay must have had the same values, and so must the chance of a mask.
    """
    if new.optim.steps < done:
        raise ConfigError(f"--steps {new.optim.steps}: the run in {new.folder} has done {done} steps already")
    if agree(old.optim, new.optim, done) and (old.mask.mask != "curriculum" or old.optim.steps == new.optim.steps):
        return
    if old.optim.schedule == "wsd" and old.mask.mask != "curriculum":
        reason = f"has lowered its learning rate since step {old.optim.stable_steps}"
    else:
        reason = f"has followed schedules that end at step {old.optim.steps}"
    raise ConfigError(
        f"--steps {new.optim.steps}, --schedule {new.optim.schedule}: the run in {new.folder} {reason}, so it cannot "
        f"be extended. Start a new one from its weights, with --init-from {new.folder} and another --out; a run of "
        "--schedule constant can be extended, and cooled down with --cooldown-from"
    )


def cooldown(cfg: Config) -> Config:
    """`cfg` as the run of --schedule wsd whose decay --cooldown-from begins: its steps are those of both runs."""
    assert cfg.cooldown_from is not None
    saved = cfg.folder / "config.json"
    if cfg.resume and saved.exists():  # the flags may still count the steps of the cooldown alone
        optim = config.load(saved).optim
        return dataclasses.replace(cfg, optim=optim) if cfg.optim.steps == optim.decay_steps else cfg
    source = Path(cfg.cooldown_from)
    old = config.load(run_of(source) / "config.json")
    done = steps_of(checkpoint_of(source, old))
    steps = done + cfg.optim.steps
    optim = dataclasses.replace(cfg.optim, schedule="wsd", steps=steps, decay_share=cfg.optim.steps / steps)
    new = dataclasses.replace(cfg, optim=optim)
    changed = config.changes(old, new, {*BUDGET, "lr_end", "cooldown_from", "init_from"})
    if changed:
        raise ConfigError(f"--cooldown-from {source} continues that run as it is: leave out {', '.join(changed)}")
    if done < old.optim.warmup_steps or not agree(old.optim, optim, done) or old.mask.mask == "curriculum":
        raise ConfigError(
            f"--cooldown-from {source}: schedules of that run end at its step {old.optim.steps}; it takes a run of "
            "--schedule constant or wsd after its warm-up and before its decay, without --mask curriculum"
        )
    config.validate(new)
    return new


def checkpoint_of(source: Path, cfg: Config, step: int | None = None) -> Path:
    """The checkpoint from which a run of `cfg` in `source` is cooled down: the last before a decay, or that of `step`.

    `source` may also be the checkpoint itself.
    """
    found = [source] if is_checkpoint(source) else checkpoints(source / "checkpoints")
    found = [p for p in found if steps_of(p) <= cfg.optim.stable_steps and step in (None, steps_of(p))]
    if not found:
        wanted = "before its decay" if step is None else f"of step {step}"
        raise ConfigError(f"--cooldown-from {source}: it holds no checkpoint {wanted}; name a run that has one")
    return found[-1]


def begin_with(engine: Engine, weights: dict[str, torch.Tensor], source: str) -> str:
    """Set every weight of `engine` that `weights` has with the same name and shape. Returns what was found, in words.

    A target encoder that is missing becomes equal to the context encoder; one that --teacher gives is left alone.
    Raises ConfigError where the context encoder does not fit.
    """
    encoder = {name: value for name, value in weights.items() if name.startswith("context_encoder.")}
    weights = {**{name.replace("context", "target", 1): value for name, value in encoder.items()}, **weights}
    own = engine.model.state_dict()
    fits = {name for name, value in own.items() if name in weights and weights[name].shape == value.shape}
    wrong = [name for name in encoder.keys() | own.keys() if name.startswith("context_encoder.") and name not in fits]
    if wrong:
        name = min(wrong)
        mine, theirs = (list(x[name].shape) if name in x else "missing" for x in (own, weights))
        raise ConfigError(
            f"--init-from {source}: {len(wrong)} tensors of its encoder differ from this run's, such as {name}, here "
            f"{mine} and there {theirs}: give this run its --size, --patch and --n-mels"
        )
    if engine.cfg.objective.teacher:
        fits = {name for name in fits if not name.startswith("target_encoder.")}
    ranks = engine.ranks
    ranks.load(engine.model, {n: weights[n] if n in fits else ranks.whole(x, x) for n, x in own.items()})
    found, new = [], []
    for part, words in PARTS.items():
        names = {name for name in own if name.startswith(f"{part}.")}
        if names & fits:
            found.append(words)
        if names - fits and not (part == "target_encoder" and engine.cfg.objective.teacher):
            new.append(f"{len(names - fits)} tensors of the {words}")
    return f"weights from {source}: {', '.join(found)}; not there, so new: {', '.join(new) or 'nothing'}"
