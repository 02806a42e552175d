"""The log of a run: one line per interval on the screen, `metrics.jsonl`, other loggers, MFU, the collapse warning."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ajepa.config import SIZES, Config
from ajepa.training.loggers import open_loggers
from ajepa.training.ranks import Ranks
from ajepa.training.schedules import ema_decay, learning_rate
from ajepa.utils.atomic_files import naming, write_atomic
from ajepa.utils.command import LastingStream
from ajepa.utils.errors import UserError
from ajepa.utils.run_folder import read_metrics
from ajepa.utils.signals import closing

# Dense bf16 tensor-core peak in FLOP/s from the vendor's data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
WARM_UP_STEPS = 3  # not counted in the throughput: compilation, allocation and a cold file cache
# When the collapse warning judges. In the warm-up and in the first steps of any run, features still look like those of
# an untrained encoder. The embeddings of n clips have an effective rank of n - 1 at most, and may well be alike.
COLLAPSE_STEPS, COLLAPSE_CLIPS = 100, 32


class NonFiniteError(UserError, RuntimeError):
    """The loss or the gradient was not finite for many steps in a row."""


class RunLog:
    """Log of one run in `folder`. Values stay on the device until an interval ends, so single steps do not synchronize.

    A quiet log (of ranks other than 0) keeps the counts and writes nothing.
    """

    def __init__(
        self,
        folder: Path,
        cfg: Config,
        start: int,
        device: torch.device,
        counts: dict[str, int],
        quiet: bool = False,
        saved: dict[str, Any] | None = None,
    ):
        self.quiet, self.folder, self.optim, self.steps, self.counts = quiet, folder, cfg.optim, cfg.optim.steps, counts
        self.cfg, self.objective = cfg, cfg.objective
        columns = {"masked": cfg.objective.objective == "both", "agreement": cfg.objective.clips,
                   "sigreg": cfg.objective.clips and cfg.objective.sigreg_weight > 0}  # fmt: skip
        self.terms = {name: column for column, (name, shown) in enumerate(columns.items(), start=3) if shown}
        self.jsonl = folder / "metrics.jsonl"
        if not quiet:
            _cut(self.jsonl, start, saved)
        self.written = 0 if quiet else self.jsonl.stat().st_size
        self.digest = hashlib.sha256(b"" if quiet else self.jsonl.read_bytes())
        self.file = open(os.devnull if quiet else self.jsonl, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self.loggers = [] if quiet else open_loggers(folder, cfg, start)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
        self.output = LastingStream(sys.stdout)  # a run that a script started goes on without output, too
        # In a notebook rich would write HTML, and would take the notebook for a terminal.
        self.console = Console(
            file=cast(TextIO, self.output),
            highlight=False,
            soft_wrap=True,
            quiet=quiet,
            force_terminal=self.output.isatty(),
            force_jupyter=False,
        )
        self.progress = Progress(
            TextColumn("pretraining"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console
        )
        self.task = self.progress.add_task("", total=self.steps, completed=start)
        if self.console.is_terminal and not quiet:
            self.progress.start()
        self.pending = [torch.tensor(values, device=device) for values in (saved or {}).get("pending", [])]
        self.flops: list[Callable[[], float]] = []
        self.seconds = self.waited = 0.0  # sums over all counted steps
        self.clips = self.seen = 0
        self._open_window()

    def _open_window(self) -> None:
        self.window = {"seconds": 0.0, "waited": 0.0, "clips": 0, "steps": 0}

    def add(
        self, result: Iterable[torch.Tensor], clips: int, seconds: float, waited: float, flops: Callable[[], float]
    ) -> None:
        """Add one step: its device scalars (an engine's `StepResult`) and its host times in seconds.

        `flops()` is called when the interval ends, because it reads the masks from the device.
        """
        self.pending.append(torch.stack(list(result)))
        if self.peak:
            self.flops.append(flops)
        self.seen += 1
        for key, value in (("seconds", seconds), ("waited", waited), ("clips", clips), ("steps", 1)):
            self.window[key] += value
        if self.seen > WARM_UP_STEPS:
            self.seconds, self.waited, self.clips = self.seconds + seconds, self.waited + waited, self.clips + clips
        if self.console.is_terminal:
            self.progress.advance(self.task)

    def flush(self, step: int, ranks: Ranks) -> None:
        """End an interval after `step` finished steps: read the device and write the line. All ranks must call it.

        Raises NonFiniteError if the last `max_bad_steps` steps were all non-finite.
        """
        if not self.pending:
            return
        lr, ema = learning_rate(self.optim, step - 1), ema_decay(self.optim, step - 1)
        tick = time.perf_counter()
        values = torch.stack(self.pending).cpu()
        self.window["seconds"] += time.perf_counter() - tick
        self.seconds += time.perf_counter() - tick
        self.pending.clear()
        waits = {"all": self.window["seconds"], "data": self.window["waited"], **ranks.times()}
        where = describe_waits(ranks.gather(waits)) if not ranks.alone else {}
        non_finite = values[:, 2] > 0
        for skipped in non_finite.tolist():
            self.counts["bad_in_a_row"] = self.counts["bad_in_a_row"] + 1 if skipped else 0
        self.counts["bad_steps"] += int(non_finite.sum())
        finite = values[~non_finite]
        rate = self.window["clips"] / self.window["seconds"]
        per_step = self.window["seconds"] / self.window["steps"]
        record: dict[str, Any] = {
            "step": step,
            "loss": finite[:, 0].mean().item() if len(finite) else float("nan"),
            "grad_norm": finite[:, 1].mean().item() if len(finite) else float("nan"),
            **self._terms(finite),
            "lr": lr,
            "ema_decay": ema,
            "clips_per_second": rate,
            "data_wait_share": self.window["waited"] / self.window["seconds"],
            "bad_steps": self.counts["bad_steps"],
            **where,
        }
        if self.peak:
            record["mfu"] = sum(flops() for flops in self.flops) / self.window["seconds"] / self.peak
            self.flops.clear()
        line = f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {record['loss']:.4f}"
        line += "".join(f"  {name} {record[name]:.4f}" for name in self.terms if name in record)
        line += f"  lr {lr:.2e}  ema {ema:.5f}" if self.objective.taught else f"  lr {lr:.2e}"
        line += f"  {rate:,.0f} clips/s  data wait {record['data_wait_share']:.1%}"
        if where:
            line += f"  reduction {record['reduce_share']:.1%}" if "reduce_share" in record else ""
            line += f"  waiting for ranks {record['rank_wait_share']:.1%}"
            line += f" (slowest {record['slowest_rank']})"
        line += f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
        line += f"  skipped {self.counts['bad_steps']} steps" if self.counts["bad_steps"] else ""
        self.say(f"{line}  ETA {timedelta(seconds=round((self.steps - step) * per_step))}")
        self.write(record)
        self._open_window()
        if self.counts["bad_in_a_row"] >= self.optim.max_bad_steps:
            raise NonFiniteError(
                f"the loss or gradient was not finite for {self.counts['bad_in_a_row']} steps in a row up to step "
                f"{step} (learning rate {lr:.2e}, last finite loss {_last_finite(self.jsonl)}). The weights are those "
                "of the last finite step. Start again, in another --out or with --overwrite: lower --lr, lengthen "
                "--warmup-steps, set --clip-norm, or use --precision fp32."
            )

    def _terms(self, finite: torch.Tensor) -> dict[str, float]:
        """Means of the loss's terms over the finite steps, for a run that has several."""
        if not len(finite):
            return {}
        return {name: finite[:, column].mean().item() for name, column in self.terms.items()}

    def write(self, record: dict[str, Any]) -> None:
        """Write one JSON line, with non-finite numbers as null, and give its scalars to the loggers."""
        clean = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in record.items()}
        line = json.dumps(clean) + "\n"
        with naming(self.jsonl):
            self.file.write(line)
        self.written += len(line)
        self.digest.update(line.encode())
        scalars = {k: v for k, v in clean.items() if k != "step" and isinstance(v, int | float)}
        for logger in self.loggers:
            logger.add(record["step"], scalars)

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def warn_collapse(self, step: int, watch: dict[str, Any], clips: int) -> bool:
        """Warn when the features become too alike. Healthy runs stay far from these thresholds.

        Nothing is judged in the first `COLLAPSE_STEPS` steps and in the warm-up. Effective rank and cosine are judged
        on `COLLAPSE_CLIPS` evaluation `clips` or more; the target variance, over the patches of a batch, always is.
        """
        if step <= max(COLLAPSE_STEPS, self.optim.warmup_steps):
            return False
        signs = []
        if watch["target_variance"] < 0.05:
            signs.append(f"target variance {watch['target_variance']:.3f} < 0.05")
        if clips >= COLLAPSE_CLIPS and watch["effective_rank"] < 3:
            signs.append(f"effective rank {watch['effective_rank']:.1f} < 3")
        if clips >= COLLAPSE_CLIPS and watch["mean_cosine"] > 0.995:
            signs.append(f"mean cosine between clips {watch['mean_cosine']:.4f} > 0.995")
        if signs:
            self.say(
                f"WARNING: the features are collapsing ({'; '.join(signs)}). A falling loss is no sign of "
                f"progress now. {remedies(self.cfg)}",
                style="bold red",
            )
        return bool(signs)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that the run that continues it logs what an undisturbed one does.

        `pending` are the values of the steps that no line has shown yet. `length` and `sha256` are those of
        `metrics.jsonl`.
        """
        if not self.quiet:
            with naming(self.jsonl):
                os.fsync(self.file.fileno())
        pending = torch.stack(self.pending).tolist() if self.pending else []
        return {"pending": pending, "length": self.written, "sha256": self.digest.hexdigest()}

    def close(self) -> None:
        self.progress.stop()
        self.output.finish()
        with closing(*self.loggers), naming(self.jsonl):
            self.file.close()


def describe_waits(waits: list[dict[str, float]]) -> dict[str, Any]:
    """The fields of a log record that tell where ranks wait. `waits` has the seconds of each rank: in all, waiting for
    data, and those of `Ranks.times`.

    `reduce_share` and `rank_wait_share` are means over the ranks, and the lists hold a number for each rank. A rank
    waits for others in a step's host-side exchange, and on the device in the reduction. The slowest rank is the one
    that waits least, because all others wait for it.
    """
    shares = {name: [rank[name] / rank["all"] for rank in waits] for name in waits[0] if name != "all"}
    idle = [sum(values) for values in zip(*(shares[name] for name in shares if name != "data"), strict=True)]
    reduced = {"reduce_share": sum(shares["reduce"]) / len(waits)} if "reduce" in shares else {}
    return {
        **reduced,
        "rank_wait_share": sum(shares["ranks"]) / len(waits),
        "data_wait_share": max(shares["data"]),
        "slowest_rank": idle.index(min(idle)),
        "data_wait_shares": [round(share, 4) for share in shares["data"]],
        "rank_wait_shares": [round(share, 4) for share in idle],
    }


def remedies(cfg: Config) -> str:
    """What helps against a collapse with this objective, first what helps most."""
    objective, model = cfg.objective, cfg.model
    moving = objective.taught and cfg.network == "target_encoder"  # a frozen target encoder cannot collapse
    mask = {
        "block": "larger --block-scale",
        "time-frequency": "larger --tf-scale",
        "curriculum": "larger --block-scale and --tf-scale",
    }
    what = []
    if objective.masks and moving and model.target_layers < SIZES[model.size][1]:
        what.append("raise --target-layers")
    if moving:
        what.append("raise --ema-start")
    if objective.clips and objective.clip_loss == "lejepa":
        what.append("raise --sigreg-weight")
    if objective.masks:
        what.append(f"mask more ({mask.get(cfg.mask.mask, 'larger --mask-ratio')})")
    what.append("lower --lr")
    text = ", ".join(what[:-1]) + " or " * (len(what) > 1) + what[-1]
    return text[0].upper() + text[1:] + "."


def _cut(jsonl: Path, step: int, saved: dict[str, Any] | None) -> None:
    """Cut the metrics to what they were at the checkpoint after `step` steps, whose `RunLog.state` is `saved`.

    Metrics that were changed since are kept as far as they can be read and are of no later step.
    """
    data = jsonl.read_bytes() if step and jsonl.exists() else b""
    if saved is not None:
        kept = data[: saved["length"]]
        if hashlib.sha256(kept).hexdigest() == saved["sha256"]:
            write_atomic(jsonl, kept)
            return
        warn(f"{jsonl} was changed or damaged since the checkpoint; its readable lines up to step {step} are kept")
    records = [r for r in read_metrics(jsonl.parent) if r["step"] <= step] if step else []
    write_atomic(jsonl, "".join(json.dumps(r) + "\n" for r in records).encode())


def _last_finite(jsonl: Path) -> str:
    losses = [r["loss"] for r in read_metrics(jsonl.parent) if r.get("loss") is not None]
    return f"{losses[-1]:.4f}" if losses else "none"


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
