"""The estimate of a run's memory is close to what its model takes, and never above it."""

import pytest
import torch

from ajepa import config
from ajepa.model.jepa import JEPA
from ajepa.training.sizes import model_bytes


@pytest.mark.parametrize("name", config.PRESETS)
def test_the_estimate_is_just_below_the_weights_of_a_preset(name):
    cfg = config.preset(name)
    with torch.device("meta"):
        model = JEPA(cfg)
    values = sum(p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())  # with gradient and moments
    assert 0.9 * 4 * values < model_bytes(cfg) <= 4 * values
