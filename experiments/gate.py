"""`python experiments/gate.py --switch residual=bf16-gradient`: does a run with a switch of the step train as well as
one without it?

Both runs of a seed take the same recordings and masks. The gate is passed if, at the end of every run with the switch:

- the targets point where those of the same weights without the switch do (cosine over tokens),
- the targets' variance over tokens and their effective rank are those of the other run, and
- the loss over the last tenth of the steps is that of the other run,

each within a limit below. The result is `results/gate-<switch>-<preset>-<precision>.json` with every curve, and a plot
of it. With --target-layers the number is part of the name.
"""

import contextlib
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
import tyro

from ajepa import config
from ajepa.evaluation.features import effective_rank
from ajepa.model.masks import MaskSampler
from ajepa.train import score
from ajepa.training.corpus import Corpus, open_corpus, to_device
from ajepa.training.engine import Engine
from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.devices import choose_device
from ajepa_kernels.fp8 import E4M3_MAX

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {False: "tab:blue", True: "tab:orange"}  # without the switch, with it
# Written before the first run. Cosine: the mean over tokens and its lowest value at a measurement; else the ratio of
# both runs, minus one.
LIMITS = {"cosine": 0.99, "variance": 0.05, "effective_rank": 0.05, "loss": 0.02}


@dataclass(frozen=True)
class Arguments:
    """Train with a switch of the step and without it, and compare."""

    switch: str = "target_precision=fp8"
    """A setting of the step, and its value."""
    preset: Literal["tiny", "audio-jepa", "a-jepa"] = "tiny"
    """The recipe, with the masked objective."""
    steps: int = 2_000
    """Training steps of each run."""
    seeds: int = 1
    """Pairs of runs. The difference between two seeds shows how much of a difference is chance."""
    batch_size: int | None = None
    """Clips of a step; by default the preset's."""
    target_layers: int | None = None
    """Top layers that give the targets; by default the preset's. The average of several, each normalised, varies more
    than the last layer alone, which may collapse."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the step. bf16 is slow on a CPU without instructions for it."""
    data: str | None = None
    """Recordings; by default the synthetic set."""
    every: int = 50
    """Steps between two measurements of the targets."""
    report: bool = False
    """Run nothing, but judge the existing result and draw its plot again."""
    results: str = str(Path(__file__).parent / "results")
    """Folder for the result and its plot."""


def configuration(args: Arguments, seed: int, switched: bool) -> config.Config:
    cfg = config.PRESETS[args.preset]
    name, _, value = args.switch.partition("=")
    optim = dataclasses.replace(
        cfg.optim, steps=args.steps, warmup_steps=args.steps // 10, batch_size=args.batch_size or cfg.optim.batch_size
    )
    cfg = dataclasses.replace(
        cfg, optim=optim, seed=seed, precision=args.precision, data=dataclasses.replace(cfg.data, data=args.data),
        model=dataclasses.replace(cfg.model, target_layers=args.target_layers or cfg.model.target_layers),
        objective=dataclasses.replace(cfg.objective, objective="masked"),
        step=dataclasses.replace(cfg.step, **({name: value} if switched else {})),
    )  # fmt: skip
    config.validate(cfg)
    return cfg


def train(args: Arguments, seed: int, switched: bool, corpus: Corpus) -> dict[str, Any]:
    """Train one run, and return its curves."""
    cfg, every = configuration(args, seed, switched), args.every
    torch.manual_seed(cfg.seed)
    device = choose_device(cfg.device)
    engine, sampler = Engine(cfg, device), MaskSampler(cfg.mask, cfg.front_end.grid, seed=cfg.seed)
    without = Engine(configuration(args, seed, False), device)  # takes the weights of `engine` at each measurement
    clips, held_out = 2 * cfg.optim.batch_size, corpus.evaluation
    pcm, lengths = held_out.pcm[:clips].to(device), held_out.lengths[:clips].to(device)
    losses: list[float] = []
    measured: list[dict[str, float]] = []
    clamped = torch.zeros((), device=device)
    tick = time.perf_counter()
    with contextlib.closing(corpus.loader(cfg, None, device=device)) as loader:
        for step in range(cfg.optim.steps):
            batch = to_device(next(loader), device)
            scales = engine.model.scales
            before = None if scales is None else scales[:, 0, 0].clone()
            losses.append(engine.step(*batch, engine.masks(sampler, step, len(batch[0])), step).loss)
            if before is not None and step > 0:  # the first use has no scale before it
                clamped += (scales[:, 0, 2] > E4M3_MAX * before).sum()
            if (step + 1) % every == 0 or step + 1 == cfg.optim.steps:
                measured.append({"step": step + 1, **measure(engine, without, pcm, lengths)})
                print(f"seed {seed}, {args.switch if switched else 'without'}: step {step + 1}, "
                      f"loss {torch.stack(losses[-every:]).mean().item():.4f}, {measured[-1]}", flush=True)  # fmt: skip
    return {
        "seed": seed,
        "switched": switched,
        "losses": [round(loss, 5) for loss in torch.stack(losses).tolist()],
        "measured": measured,
        "clamped": clamped.item(),  # in float8: how often a tensor of activations had values beyond its delayed scale
        "seconds": time.perf_counter() - tick,
        "features": score(cfg, engine, corpus),
    }


@torch.no_grad()
def measure(engine: Engine, without: Engine, pcm: torch.Tensor, lengths: torch.Tensor) -> dict[str, float]:
    """Describe the targets of clips as in training, and compare them with those that `without` gives by the same
    weights."""
    weights, patches = engine.model.state_dict(), engine.patches(pcm, lengths, 0)
    without.model.load_state_dict(weights)
    scales = engine.model.scales
    saved = None if scales is None else scales.clone()
    with engine.autocast():
        targets, exact = (e.model.target_encoder.targets(patches).float() for e in (engine, without))
    if saved is not None:
        scales.copy_(saved)  # the measurement leaves no trace in the run
    normed = torch.nn.functional.layer_norm(targets, targets.shape[-1:])
    cosine = torch.cosine_similarity(targets, exact, dim=-1)
    return {
        "cosine": cosine.mean().item(),
        "lowest_cosine": cosine.min().item(),
        "variance": normed.var(0).mean().item(),
        "effective_rank": effective_rank(normed),
    }


def end(run: dict[str, Any]) -> dict[str, float]:
    """The numbers that the gate compares: the loss over the last tenth of the steps, and the last measurement."""
    losses = run["losses"]
    return {**run["measured"][-1], "loss": statistics.mean(losses[-max(1, len(losses) // 10) :])}


def judge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare each run with the switch with the other of its seed."""
    ends = {(run["seed"], run["switched"]): end(run) for run in runs}
    found: dict[str, Any] = {"cosine": min(m["cosine"] for run in runs for m in run["measured"])}
    pairs = [(ends[seed, False], ends[seed, True]) for seed, switched in ends if switched]
    for name in ("variance", "effective_rank", "loss"):
        found[name] = max(abs(switched[name] / without[name] - 1) for without, switched in pairs)
        others = [without[name] for without, _ in pairs]
        found[f"{name}_between_seeds"] = max(others) / min(others) - 1
    passed = found["cosine"] >= LIMITS["cosine"]
    return {**found, "passed": passed and all(found[name] <= limit for name, limit in list(LIMITS.items())[1:])}


def draw(result: dict[str, Any], path: Path) -> None:
    """Plot the curves of every run; the loss as the mean of neighbouring steps."""
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for run in result["runs"]:
        losses, colour = torch.tensor(run["losses"]), COLOURS[run["switched"]]
        width = max(1, len(losses) // 100)
        means = losses[: len(losses) // width * width].view(-1, width).mean(1)
        label = f"{result['settings']['switch'] if run['switched'] else 'without'}, seed {run['seed']}"
        style = "-" if run["seed"] == 0 else "--"
        axes[0].plot(width * torch.arange(1, len(means) + 1), means, style, color=colour, label=label)
        steps = [m["step"] for m in run["measured"]]
        for axis, name in zip(axes[1:], ("cosine", "variance", "effective_rank"), strict=True):
            if name != "cosine" or run["switched"]:
                axis.plot(steps, [m[name] for m in run["measured"]], style, color=colour, label=label)
    titles = (
        "loss",
        "cosine to targets without the switch",
        "variance of the targets",
        "effective rank of the targets",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="step")
        axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    args = tyro.cli(Arguments)
    layers = f"-{args.target_layers}layers" if args.target_layers else ""
    name = f"gate-{args.switch.replace('=', '-')}-{args.preset}-{args.precision}{layers}"
    path = Path(args.results) / f"{name}.json"
    if args.report:
        result = json.loads(path.read_text())
        result |= {"limits": LIMITS, "judged": judge(result["runs"])}
    else:
        cfg = configuration(args, 0, False)
        corpus = open_corpus(cfg)
        runs = [train(args, seed, switched, corpus) for seed in range(args.seeds) for switched in (False, True)]
        settings = {k: v for k, v in dataclasses.asdict(args).items() if k not in ("report", "results")}
        settings["batch_size"] = cfg.optim.batch_size
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        result = {"settings": settings, "device": device, "limits": LIMITS, "judged": judge(runs), "runs": runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(result) + "\n").encode())
    draw(result, path.with_suffix(".png"))
    print(json.dumps({"limits": result["limits"], "judged": result["judged"]}, indent=2))
    return 0 if result["judged"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
