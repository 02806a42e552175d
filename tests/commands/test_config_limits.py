"""Settings at the limits of their types give either a valid configuration or one error that names the setting."""

import re
from dataclasses import fields, is_dataclass, replace

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
    assert config.load(path) == cfg


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
