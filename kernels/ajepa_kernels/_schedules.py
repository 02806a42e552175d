"""Schedules that `AdamWEMA` evaluates at each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

NAMES = ("lr", "weight_decay", "ema_decay")


class Schedules:
    """Functions of the number of finished steps, that number, and the decay of the average that they gave last."""

    def __init__(self, functions: Mapping[str, Callable[[int], float]], groups: list[dict]):
        for name, function in functions.items():
            if name not in NAMES:
                raise ValueError(f"AdamWEMA: schedules are of {', '.join(NAMES)}, got {name!r}")
            if not callable(function):
                raise TypeError(f"AdamWEMA: the schedule of {name} must be a function of the number of finished steps")
        self.functions = dict(functions)
        self.finished_steps = 0
        self._decay: float | torch.Tensor | None = None
        self._decays: list[bool] = []  # whether each group's weight decay was not zero when it was made
        self._note_groups(groups)
        if "weight_decay" in functions and not any(self._decays):
            raise ValueError("AdamWEMA: the weight decay of every group is zero, so its schedule has nothing to set")

    def _note_groups(self, groups: list[dict]) -> None:
        if "weight_decay" in self.functions:  # reads weight decays that are tensors
            self._decays += [bool(group["weight_decay"] != 0) for group in groups[len(self._decays) :]]

    def set_values(self, groups: list[dict]) -> None:
        """Sets the values of the next step in the groups, without counting it."""
        n = self.finished_steps
        values = {name: float(function(n)) for name, function in self.functions.items()}
        for name, value in values.items():
            if not 0.0 <= value < float("inf") or (name == "ema_decay" and value > 1.0):
                raise ValueError(f"AdamWEMA: the schedule of {name} gave {value} after {n} steps")
        self._note_groups(groups)
        for name in NAMES[:2]:
            for i, group in enumerate(groups):
                if name not in values or (name == "weight_decay" and not self._decays[i]):
                    continue
                if isinstance(group[name], torch.Tensor):
                    group[name].fill_(values[name])
                else:
                    group[name] = values[name]
        if "ema_decay" in values:
            self._set_decay(values["ema_decay"], groups)

    def _set_decay(self, value: float, groups: list[dict]) -> None:
        """As a number, or, where a learning rate is a tensor, as a tensor, which stays the same for captured graphs."""
        if not any(isinstance(group["lr"], torch.Tensor) for group in groups):
            self._decay = value
        elif isinstance(self._decay, torch.Tensor):
            self._decay.fill_(value)
        else:
            device = next(p.device for group in groups for p in group["params"])
            self._decay = torch.full((), value, dtype=torch.float32, device=device)

    def ema_decay(self) -> float | torch.Tensor | None:
        """The decay of the present step; None without a schedule of it."""
        if "ema_decay" in self.functions and self._decay is None:
            raise ValueError("AdamWEMA: call advance() before a captured or compiled step, which cannot call it")
        return self._decay

    def loaded(self, finished_steps: int | None, state: dict) -> None:
        """Continues after `finished_steps`, or, without it, after the largest step count of the parameters."""
        if finished_steps is None:
            finished_steps = max((int(s["step"]) for s in state.values() if "step" in s), default=0)
        self.finished_steps = finished_steps
