import math
from dataclasses import replace

import pytest
import torch

from ajepa.config import PRESETS, OptimConfig
from ajepa.training.schedules import agree, ema_decay, learning_rate, parameter_groups, weight_decay

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


def test_a_constant_schedule_stays_and_wsd_falls_by_one_minus_the_square_root_to_its_end():
    constant = replace(CFG, schedule="constant", lr_end=1e-5)
    assert learning_rate(constant, 50) == learning_rate(CFG, 50)
    assert {learning_rate(constant, step) for step in range(100, 1000)} == {3e-4}
    wsd = replace(constant, schedule="wsd", decay_share=0.25)
    assert (wsd.stable_steps, wsd.decay_steps) == (750, 250)
    assert {learning_rate(wsd, step) for step in range(100, 750)} == {3e-4}
    assert learning_rate(wsd, 999) == 1e-5
    quarter = 750 + 250 // 4  # 63 steps of the decay are done with this one
    assert learning_rate(wsd, quarter - 1) == pytest.approx(1e-5 + 2.9e-4 * (1 - math.sqrt(62 / 250)))
    falls = [learning_rate(wsd, step) for step in range(749, 1000)]
    assert falls == sorted(falls, reverse=True) and len(set(falls)) == 251


def test_without_a_cosine_nothing_but_the_decay_depends_on_the_number_of_steps():
    for schedule in ("constant", "wsd"):
        cfg = replace(CFG, schedule=schedule, weight_decay=0.04)
        assert {ema_decay(cfg, step) for step in range(1000)} == {0.996}
        assert {weight_decay(cfg, step) for step in range(1000)} == {0.04}
    constant, wsd = replace(CFG, schedule="constant"), replace(CFG, schedule="wsd", decay_share=0.2)
    assert agree(constant, replace(constant, steps=5000), 1000)
    assert agree(constant, wsd, 800) and not agree(constant, wsd, 801)
    assert agree(wsd, replace(wsd, steps=2000), 800) and not agree(wsd, replace(wsd, steps=2000), 1000)
    assert not agree(CFG, replace(CFG, steps=1001), 1000) and agree(CFG, replace(CFG, steps=1001), 0)
    assert agree(CFG, CFG, 1000)


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
