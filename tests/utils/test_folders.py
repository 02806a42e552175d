"""What folders are for, who may write into them, and how an old one makes way."""

import json
import re

import pytest

from ajepa import config
from ajepa.config import PRESETS
from ajepa.utils import folders
from ajepa.utils.errors import ConfigError
from ajepa.utils.folders import claim, kind_of, overwrite
from ajepa.utils.lock import locked


@pytest.fixture
def old(tmp_path):
    """A folder that looks like a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    config.save(PRESETS["tiny"], folder / "config.json")
    return folder


def files(**contents):
    return {name.replace("__", "."): text for name, text in contents.items()}


@pytest.mark.parametrize(
    ("kind", "contents"),
    [
        (None, {}),
        (None, {".lock": ""}),
        ("headless run", files(metrics__jsonl="")),
        ("headless run", {"config.json": "{", "encoder.safetensors": ""}),
        ("checkpoint", files(state__json="")),
        ("fine-tuning", files(arguments__json="", config__json="{}")),
        ("encoder", {"config.json": '{"model_type": "ajepa-encoder"}', "model.safetensors": ""}),
        ("shards", {"00000.shard": ""}),
        ("probe", files(probe__json="")),
        ("other", files(thesis__tex="")),
    ],
)
def test_a_folder_is_known_by_its_files_and_claimed_by_its_own_command_alone(kind, contents, tmp_path):
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    assert kind_of(tmp_path) == kind
    if kind is None:
        assert claim(tmp_path, "run") is False
    else:
        with pytest.raises(ConfigError, match=f"--out {tmp_path} holds {folders.WHAT[kind]}.*choose another --out"):
            claim(tmp_path, "run")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == contents


def test_a_run_is_claimed_again_and_through_a_link(old, tmp_path):
    (tmp_path / "link").symlink_to(old)
    assert claim(old, "run") and claim(tmp_path / "link", "run")


def test_files_and_links_to_nowhere_are_no_folders(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=f"--out {folder} is a file|--out {folder} cannot be written"):
            claim(folder, "run")
    with pytest.raises(ConfigError, match="cannot be written"):
        claim(tmp_path / "link", "run")


def test_a_folder_without_write_permission_is_refused(old, monkeypatch):
    monkeypatch.setattr(folders.os, "access", lambda path, mode: False)  # the tests may run as root
    with pytest.raises(ConfigError, match="permission denied; choose another --out"):
        claim(old, "run")


def test_an_old_folder_is_kept_under_another_name(old, capsys):
    for _ in range(2):  # within one second
        overwrite(old, "run", "tiny, 8 of 8 steps")
        assert not old.exists()
        kept = re.search(r"\(tiny, 8 of 8 steps\), which is kept as (\S+)", capsys.readouterr().out)[1]
        assert re.fullmatch(rf"{old}\.old-\d{{8}}-\d{{6}}(-2)?", kept)
        assert json.loads((folders.Path(kept) / "config.json").read_text())["preset"] == "tiny"
        folders.Path(kept, ".lock").touch()
        old.mkdir()
        config.save(PRESETS["tiny"], old / "config.json")
    assert len(list(old.parent.glob("run.old-*"))) == 2


@pytest.mark.parametrize(("answer", "kept"), [("", True), ("n", True), (EOFError, True), ("y", False), ("Yes ", False)])
def test_on_a_terminal_the_user_is_asked_once(old, monkeypatch, answer, kept):
    asked = []

    def reply(question):
        asked.append(question)
        if answer is EOFError:
            raise EOFError
        return answer

    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", reply)
    if kept:
        with pytest.raises(ConfigError, match="is left as it is: choose another --out"):
            overwrite(old, "run", "tiny, 3 steps done")
    else:
        overwrite(old, "run", "tiny, 3 steps done")
    assert old.exists() == kept
    assert len(asked) == 1 and "tiny, 3 steps done" in asked[0] and str(old) in asked[0]


def test_a_folder_in_use_or_of_another_kind_is_not_set_aside(old, tmp_path):
    with locked(old), pytest.raises(ConfigError, match="in use by process"):
        overwrite(old, "run", "tiny")
    overwrite(old, "fine-tuning", "tiny")
    overwrite(tmp_path / "missing", "run", "tiny")
    assert old.exists()


def test_the_working_folder_is_not_set_aside(old, monkeypatch):
    monkeypatch.chdir(old)
    with pytest.raises(ConfigError, match="give its path"):
        overwrite(folders.Path("."), "run", "tiny")
    assert (old / "config.json").exists()
