import math

import pytest
import torch

from ajepa.config import PRESETS, OptimConfig
from ajepa.training.schedules import ema_decay, learning_rate, parameter_groups, weight_decay

CFG = OptimConfig(steps=1000, warmup_steps=100, lr=3e-4, lr_start=1e-6, ema_start=0.996)


def test_learning_rate_warms_up_linearly_then_follows_a_cosine_to_its_end():
    assert learning_rate(CFG, 0) == 1e-6
    assert learning_rate(CFG, 50) == pytest.approx((1e-6 + 3e-4) / 2)
    assert learning_rate(CFG, 100) == pytest.approx(3e-4)
    assert learning_rate(CFG, 999) == pytest.approx(0.0, abs=1e-12)
    middle = 100 + 899 // 2
    assert learning_rate(CFG, middle) == pytest.approx(1.5e-4 * (1 + math.cos(math.pi * 449 / 899)), rel=1e-6)


def test_ema_decay_goes_to_one_by_cosine_or_line():
    assert ema_decay(CFG, 0) == pytest.approx(0.996) and ema_decay(CFG, 999) == 1.0
    assert ema_decay(CFG, 250) == pytest.approx(1 - 0.004 * (1 + math.cos(math.pi * 250 / 999)) / 2)
    linear = OptimConfig(steps=1001, ema_start=0.5, ema_schedule="linear")
    assert ema_decay(linear, 500) == pytest.approx(0.75)


def test_weight_decay_is_constant_unless_an_end_is_given():
    assert weight_decay(CFG, 0) == weight_decay(CFG, 999) == 0.05
    rising = OptimConfig(steps=101, weight_decay=0.04, weight_decay_end=0.4)
    assert weight_decay(rising, 50) == pytest.approx(0.22) and weight_decay(rising, 100) == pytest.approx(0.4)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decays, spared = parameter_groups(model, 0.1)
    assert [p.ndim for p in decays["params"]] == [2] and decays["weight_decay"] == 0.1
    assert [p.ndim for p in spared["params"]] == [1, 1, 1] and spared["weight_decay"] == 0.0


def test_presets_hold_the_published_numbers():
    audio, a = PRESETS["audio-jepa"].optim, PRESETS["a-jepa"].optim
    assert (audio.batch_size, audio.steps, audio.warmup_steps) == (256, 100_000, 1000)
    assert (audio.lr, audio.lr_start, audio.lr_end) == (3e-4, 1e-6, 0.0)
    assert (audio.betas, audio.weight_decay, audio.ema_start, audio.ema_end) == ((0.9, 0.95), 0.05, 0.996, 1.0)
    assert audio.batch_size * audio.steps == 25_600_000
    assert (a.batch_size, a.lr) == (512, 2e-4)
    assert a.steps == pytest.approx(24 * 1_921_982 / 512, rel=0.01)
    assert PRESETS["a-jepa"].data.gain_db == 6.0 and PRESETS["a-jepa"].mask.mask == "curriculum"
