"""Settings at the limits of their types give either a valid configuration or one error that names the setting."""

import json
import re
from dataclasses import fields, is_dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ajepa import config
from ajepa.config import PRESETS

NUMBERS = [0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 10**30]
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-308,
    5e-324,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    *map(float, NUMBERS),
]
TEXTS = ["", "x", "\0", "fold=1", "../..", "\ud800"]


def limits(value, annotation: str):
    """A strategy for values at the limits of a field's type."""
    if "Literal" in annotation:
        return st.sampled_from(re.findall(r'"([^"]+)"', annotation) or [value])
    if annotation.startswith("bool"):
        return st.booleans()
    if annotation.startswith("tuple"):
        numbers = FLOATS if "float" in annotation else NUMBERS
        return st.tuples(st.sampled_from(numbers), st.sampled_from(numbers))
    choices = FLOATS if "float" in annotation else NUMBERS if "int" in annotation else TEXTS
    return st.sampled_from([*choices, None] if "None" in annotation else choices)


def paths(node, prefix=()):
    for field in fields(node):
        value = getattr(node, field.name)
        if is_dataclass(value):
            yield from paths(value, (*prefix, field.name))
        elif field.name not in ("out", "preset", "data", "eval_data"):
            kind = field.type if isinstance(field.type, str) else str(field.type).replace("'", '"')
            name = kind if "Literal" in kind or "[" in kind or "|" in kind else getattr(field.type, "__name__", kind)
            yield (*prefix, field.name), value, name


def put(node, path, value):
    inner = value if len(path) == 1 else put(getattr(node, path[0]), path[1:], value)
    return replace(node, **{path[0]: inner})


LEAVES = list(paths(PRESETS["tiny"]))


@st.composite
def configurations(draw):
    cfg = PRESETS[draw(st.sampled_from(sorted(PRESETS)))]
    for path, value, kind in draw(st.lists(st.sampled_from(LEAVES), min_size=1, max_size=3)):
        cfg = put(cfg, path, draw(limits(value, kind)))
    return cfg


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_400_configurations_at_the_limits_are_refused_by_name_or_come_back_as_they_were(data, tmp_path_factory):
    try:
        cfg = data.draw(configurations())
    except ValueError as error:  # the front end validates itself on construction
        assert str(error).startswith("LogMelSpec: ")
        return
    try:
        config.validate(cfg)
    except config.ConfigError as error:
        assert "--" in str(error) and "\n" not in str(error)
        return
    path = tmp_path_factory.getbasetemp() / "config.json"
    config.save(cfg, path)
    assert config.load(path) == replace(cfg, resume=False, overwrite=False)


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_30_command_lines_at_the_limits_end_in_a_configuration_or_one_error(data, capsys):
    path, value, kind = data.draw(st.sampled_from(LEAVES))
    drawn = data.draw(limits(value, kind))
    words = [str(x) for x in drawn] if isinstance(drawn, tuple) else [str(drawn)]
    flag = "--" + path[-1].replace("_", "-")
    argv = [flag, *words] if not isinstance(drawn, bool) else [flag if drawn else f"--no-{flag[2:]}"]
    try:
        assert isinstance(config.parse(argv), config.Config)
    except config.ConfigError as error:
        assert "\n" not in str(error)
    except SystemExit as stopped:
        message = "".join(capsys.readouterr().err.split()).replace("_", "-")
        assert stopped.code == 2 and (flag[2:] in message or "LogMelSpec:" in message)


FILES = {
    "nested.yaml": "optim: {steps: 30, lr: 3e-4, warmup-steps: 3}\nmask_ratio: [0.5, 0.6]\nmask: {min-context: 3}\n",
    "flat.yaml": "steps: 30\nlr: 0.0003\nwarmup_steps: 3\nmask_ratio: [0.5, 0.6]\nmin_context: 3\n",
    "flat.json": '{"steps": 30, "lr": 0.0003, "warmup_steps": 3, "mask_ratio": [0.5, 0.6], "min_context": 3}',
}


@pytest.mark.parametrize("name", FILES)
def test_settings_come_from_a_file_and_flags_come_on_top(name, tmp_path):
    path = tmp_path / name
    path.write_text(FILES[name])
    optim = replace(PRESETS["tiny"].optim, steps=30, lr=3e-4, warmup_steps=3)
    mask = replace(PRESETS["tiny"].mask, mask_ratio=(0.5, 0.6), min_context=3)
    whole = replace(PRESETS["tiny"], config=str(path), optim=optim, mask=mask, out="runs/tiny")
    assert config.parse(["--config", str(path)]) == whole
    assert config.preset("tiny", config=str(path)) == whole
    cfg = config.parse(["--config", str(path), "--steps", "40", "--preset", "clip-jepa"])
    assert (cfg.optim.steps, cfg.optim.lr, cfg.model.size, cfg.out) == (40, 3e-4, "S", "runs/clip-jepa")


def test_a_runs_configuration_is_taken_over_without_its_folder(tmp_path):
    old = replace(PRESETS["a-jepa"], out=str(tmp_path), seed=5, init_from="somewhere")
    config.save(old, tmp_path / "config.json")
    cfg = config.parse(["--config", str(tmp_path / "config.json")])
    assert cfg == replace(old, out="runs/a-jepa", config=str(tmp_path / "config.json"))
    path = tmp_path / "mine.yaml"
    path.write_text(f"preset: a-jepa\nout: {tmp_path / 'new'}\n")
    assert config.parse(["--config", str(path)]).folder == tmp_path / "new"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.yaml", "optim: {stepz: 4}", "stepz (did you mean steps?)"),
        ("x.yaml", "optimiser: 4", "no setting optimiser"),
        ("x.yaml", "steps: many", "steps: "),
        ("x.yaml", "steps: " + "9" * 5000, "x.yaml"),
        ("x.yaml", "[" * 100_000, "x.yaml"),
        ("x.yaml", "a: [", "it is not YAML"),
        ("x.yaml", "!!python/object/apply:os.getcwd []", "it is not YAML"),
        ("x.yaml", "", "holds no settings"),
        ("x.yaml", "preset: large", "--preset large"),
        ("x.json", "[" * 100_000, "x.json"),
        ("x.json", '{"lr": NaN}', "--lr nan"),
        ("x.json", '{"clip_seconds": 1e999}', "--clip-seconds inf"),
        ("x.json", '{"steps": ' + "9" * 5000 + "}", "x.json"),
        ("x.json", '{"front_end": {"patch": [1000000000, 1000000000]}}', "patch"),
        ("x.json", '{"front_end": {"n_frames": 1000000000}}', "--n-frames 1000000000"),
        ("x.json", "\x00", "x.json"),
        ("x.json", None, "cannot be read: No such file"),
    ],
)
def test_a_malformed_file_of_settings_is_one_error(name, text, words, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(config.ConfigError) as refused:
        config.parse(["--config", str(tmp_path / name)])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_changed_configuration_of_a_run_is_refused(tmp_path):
    path = tmp_path / "config.json"
    config.save(PRESETS["tiny"], path)
    assert config.load(path) == PRESETS["tiny"]
    content = json.loads(path.read_text())
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(config.ConfigError, match="was changed or damaged"):
        config.load(path)
    path.write_text(json.dumps({key: value for key, value in content.items() if key != "sha256"}))
    assert config.load(path) == PRESETS["tiny"]  # of an earlier version, or edited on purpose


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--schedule", "wsd", "--decay-share", "0.95"], "do not fit in --steps"),
        (["--decay-share", "1"], "--decay-share 1.0"),
        (["--schedule", "constant", "--weight-decay-end", "0.1"], "leave out --weight-decay-end"),
        (["--resume", "--overwrite"], "choose one"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(option, words):
    with pytest.raises(config.ConfigError, match=words):
        config.parse(option)
