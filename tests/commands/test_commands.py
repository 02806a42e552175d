"""What the commands have in common: flags with descriptions, help, version; and the Python API below them."""

import dataclasses
import importlib
import sys

import pytest
from conftest import SMALL

import ajepa
from ajepa import config
from ajepa.config import Config, ConfigError
from ajepa.utils import cli
from ajepa.utils.json_files import read_json

COMMANDS = ("probe", "finetune", "embed", "export", "convert", "pack")


def arguments(command: str) -> type:
    return Config if command == "train" else importlib.import_module(f"ajepa.{command}").Arguments


def exits(capsys, command: str, *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(f"ajepa.{command}").main(list(argv))
    assert not exit_.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ("train", *COMMANDS))
def test_every_flag_has_a_description(command):
    described = cli.describe(arguments(command))
    assert described and not [name for name, _, text in described if len(text.split()) < 3]
    assert not [name for name, _, text in described if text[-1] not in ".)"], "a description is a sentence"


@pytest.mark.parametrize("command", ("train", *COMMANDS, "doctor"))
def test_every_command_has_help_and_a_version(command, capsys):
    assert exits(capsys, command, "--version") == f"ajepa {ajepa.__version__}\n"
    assert f"python -m ajepa.{command}" in exits(capsys, command, "--help")


def test_short_help_shows_ten_flags_and_long_help_all(capsys):
    short, long = exits(capsys, "train", "--help"), exits(capsys, "train", "--help-all")
    every = [cli.flag(name) for name, *_ in cli.describe(Config)]
    heads = [line.split()[0] for line in short.splitlines() if line.startswith("  --")]
    assert heads == [cli.flag(name) for name in config.FIRST_FLAGS]
    assert f"{len(every) - 10} more flags" in short and len(config.FIRST_FLAGS) == 10
    assert not [name for name in every if name not in long]
    assert "(default: 256)" in exits(capsys, "train", "--preset", "audio-jepa", "-h")  # of the recipe that is named


def test_presets_take_any_setting():
    cfg = ajepa.preset("tiny", data="recordings", steps=300, mask_ratio=[0.5, 0.6], n_mels=32, out="x")
    assert (cfg.data.data, cfg.optim.steps, cfg.mask.mask_ratio) == ("recordings", 300, (0.5, 0.6))
    assert cfg.front_end == dataclasses.replace(config.PRESETS["tiny"].front_end, n_mels=32)
    assert ajepa.preset("a-jepa") == dataclasses.replace(config.PRESETS["a-jepa"], out="runs/a-jepa")


@pytest.mark.parametrize(
    ("name", "overrides", "match"),
    [
        ("large", {}, "choose one of"),
        ("tiny", {"stepz": 3}, "no setting stepz"),
        ("tiny", {"steps": "many"}, "steps: "),
        ("tiny", {"steps": 0}, "--steps 0"),
        ("tiny", {"mask": "spiral"}, "mask: "),
        ("tiny", {"patch": (7, 7)}, "patch"),
    ],
)
def test_wrong_presets_are_refused(name, overrides, match):
    with pytest.raises(ConfigError, match=match):
        ajepa.preset(name, **overrides)


def test_train_is_a_function_and_the_command(tmp_path, capsys):
    import ajepa.train  # as other code does, which makes the module the attribute

    small = {k.removeprefix("--").replace("-", "_"): v for k, v in zip(SMALL[::2], SMALL[1::2], strict=True)}
    small = {k: float(v) if "." in v else int(v) if v.isdecimal() else v for k, v in small.items()}
    small |= {"steps": 2, "warmup_steps": 1, "compare_steps": 0, "out": str(tmp_path / "run")}
    cfg = ajepa.preset("tiny", **small)
    summary = ajepa.train(cfg)
    assert summary == read_json(tmp_path / "run" / "summary.json") and summary["steps"] == 2
    with pytest.raises(ConfigError, match="holds a run already"):
        ajepa.train(cfg)
    assert ajepa.train(dataclasses.replace(cfg, resume=True)) == summary
    with pytest.raises(ConfigError, match="leave out --lr"):
        ajepa.train(ajepa.preset("tiny", **small, lr=1.0, resume=True))
    assert sys.modules["ajepa.train"].main(["--out", cfg.out, "--resume"]) == 0
