"""Where the scalars of a run go besides `metrics.jsonl` (`--log-to`): a class for each library, which imports it."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ajepa.config import Config, ConfigError
from ajepa.utils.atomic_files import naming
from ajepa.utils.json_files import read_json, write_json


class Logger(Protocol):
    def add(self, step: int, scalars: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `tensorboard/`. A resumed run hides what a killed one wrote after step `start`."""

    def __init__(self, folder: Path, cfg: Config, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder / "tensorboard"
        try:
            with naming(self.folder):
                self.writer = SummaryWriter(str(self.folder), purge_step=start + 1 if start else None)
        except UnicodeEncodeError:
            raise ConfigError(
                f"--log-to tensorboard: {str(folder)!a} is no UTF-8, which TensorBoard needs: choose another --out, or "
                "--log-to none"
            ) from None

    def add(self, step: int, scalars: dict[str, float]) -> None:
        with naming(self.folder):
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        with naming(self.folder):
            self.writer.close()


class Wandb:
    """A run of Weights & Biases, named after the run folder. Its id stays in `wandb.json`, so that it can be resumed.

    Its own variables apply, such as WANDB_MODE=offline and WANDB_PROJECT. It ignores the steps that a killed run logged
    already; a resumed run repeats them with the same values.
    """

    def __init__(self, folder: Path, cfg: Config, start: int):
        import wandb

        file = folder / "wandb.json"
        try:
            self.run: Any = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ajepa"),
                id=read_json(file)["id"] if file.exists() else None,
                name=folder.resolve().name,
                config=dataclasses.asdict(cfg),
                dir=folder,
                resume="allow",
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"--log-to wandb: {reason} (WANDB_MODE=offline logs without an account)") from None
        write_json(file, {"id": self.run.id})

    def add(self, step: int, scalars: dict[str, float]) -> None:
        self.run.log(scalars, step=step)

    def close(self) -> None:
        self.run.finish()


def open_loggers(folder: Path, cfg: Config, start: int) -> list[Logger]:
    """The loggers that `--log-to` names, for a run that continues after step `start`."""
    classes: dict[str, Callable[[Path, Config, int], Logger]] = {"tensorboard": TensorBoard, "wandb": Wandb}
    return [classes[name](folder, cfg, start) for name in cfg.watch.loggers]
