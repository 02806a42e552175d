"""README and pages: commands parse, examples run, links resolve, figures come from results, quoted messages exist."""

import ast
import dataclasses
import importlib
import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tyro", reason="tyro is not installed: the commands cannot be parsed")

from ajepa import config
from ajepa.training import plan

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MORE_PAGES = [path for folder in ("csrc", "kernels") if (path := ROOT / folder / "README.md").exists()]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
COMMANDS = ("train", "probe", "finetune", "embed", "export", "convert", "pack", "doctor")
EVERYWHERE = {"--help", "--help-all", "--version"}
FOREIGN = {"--standalone", "--nproc-per-node", "--index-url", "--no-deps", "--no-build-isolation", "--check"}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    """The page without its code blocks and without generated tables."""
    text = re.sub(r"<!-- speed:begin.*?speed:end -->", "", page.read_text(), flags=re.DOTALL)
    return FENCE.sub("", text)


def shell_lines(page: Path) -> list[list[str]]:
    """The words of each command line, of all blocks that have no language or a shell's."""
    lines = []
    for body in blocks(page, "", "sh", "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            if re.search(r"(^|[\s/])(python|torchrun|make|pytest|pip|docker|ajepa)(\s|$)", line):
                words = shlex.split(line, comments=True)
                ends = [i for i, word in enumerate(words) if word in ("|", "&&", ">", "&")]
                for begin, end in zip([0, *(i + 1 for i in ends)], [*ends, len(words)], strict=True):
                    lines.append(words[begin:end])
    return [words for words in lines if words]


def experiment_arguments():
    """The arguments of `experiments/run.py`, which imports its neighbours."""
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        return importlib.import_module("run").Arguments
    finally:
        sys.path.remove(str(ROOT / "experiments"))
        for name in ("run", "questions"):  # names too common to stay
            sys.modules.pop(name, None)


def parse(command: str, arguments: list[str]) -> None:
    """Raises SystemExit or ConfigError where the command would not accept the arguments."""
    import tyro

    if EVERYWHERE & set(arguments):
        return
    if command == "train":
        config.parse(arguments)
    elif command == "doctor":
        if arguments:
            assert arguments[0] == "--plan"
            tyro.cli(plan.Arguments, args=arguments[1:], console_outputs=False)
    else:
        tyro.cli(importlib.import_module(f"ajepa.{command}").Arguments, args=arguments, console_outputs=False)


def flags_of(cls) -> set[str]:
    flags = set()
    for f in dataclasses.fields(cls):
        kind = f.default_factory if f.default_factory is not dataclasses.MISSING else None
        value = kind() if kind else f.default
        if dataclasses.is_dataclass(value):
            flags |= flags_of(type(value))
        else:
            flags |= {f"--{f.name.replace('_', '-')}", f"--no-{f.name.replace('_', '-')}"}
    return flags


def all_flags() -> set[str]:
    flags = flags_of(config.Config) | flags_of(plan.Arguments) | EVERYWHERE | FOREIGN | {"--plan"}
    for command in COMMANDS:
        module = importlib.import_module(f"ajepa.{command}")
        flags |= flags_of(module.Arguments) if hasattr(module, "Arguments") else set()
    return flags | flags_of(experiment_arguments())


# --- README -------------------------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


def test_figures_of_the_readme_come_from_the_results():
    """Every speed and time stands in a block that benchmarks/report.py writes."""
    text = re.sub(r"<!-- speed:begin.*?<!-- speed:end -->", "", README.read_text(), flags=re.DOTALL)
    assert not re.findall(r"[\d.,]*\d (?:clips/s|ms|minutes|hours)\b|[\d.]+ times as fast", text)


# --- commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_accepted(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are only the settings of the runs that other runs begin with
    for run in ("mine", "stable"):
        Path("runs", run).mkdir(parents=True)
        config.save(config.PRESETS["tiny"], Path("runs", run, "config.json"))
    for words in shell_lines(ROOT / name):
        line = " ".join(words)
        try:
            check_line(words)
        except (SystemExit, config.ConfigError, AssertionError) as error:
            pytest.fail(f"{name}: {line}: {error}")


def check_line(words: list[str]) -> None:
    modules = [i for i, word in enumerate(words) if word.startswith("ajepa.") and i and words[i - 1] == "-m"]
    if modules:
        name = words[modules[0]].removeprefix("ajepa.")
        assert name in COMMANDS, f"no command {name}"
        parse(name, words[modules[0] + 1 :])
    if words[0] == "ajepa" and len(words) > 1:
        assert words[1] in (*COMMANDS, "--version"), f"no command {words[1]}"
    for script, name in itertools.pairwise(words):
        if script == "ajepa" and name in COMMANDS:
            parse(name, words[words.index(name) + 1 :])
    for i, word in enumerate(words):
        if word.endswith(".py") and i and words[i - 1].endswith(("python", "pytest")):
            assert (ROOT / word).exists(), f"no file {word}"
            if word == "experiments/run.py":
                import tyro

                tyro.cli(experiment_arguments(), args=words[i + 1 :], console_outputs=False)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no target {target}"


@pytest.mark.parametrize("name", NAMES)
def test_flags_extras_and_variables_that_are_named_exist(name):
    text = (ROOT / name).read_text()
    spans = re.findall(r"`([^`\n]+)`", prose(ROOT / name))
    unknown = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", span)} - all_flags()
    assert not unknown, f"{name} names flags that no command has: {unknown}"
    project = (ROOT / "pyproject.toml").read_text()
    for extras in re.findall(r"(?:\.|ajepa)\[([\w,-]+)\]", text):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"{name}: no extra {extra}"
    sources = "".join(path.read_text() for path in source_files("ajepa", "kernels", "benchmarks", "tests"))
    sources += "".join((ROOT / path).read_text() for path in ("setup.py", "csrc/ops.cpp", "csrc/hopper/build.py"))
    for variable in set(re.findall(r"AJEPA_[A-Z_]+", text)):
        assert re.search(rf"\b{variable}\b", sources), f"{name}: nothing reads {variable}"


def source_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]


# --- examples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_python_examples_compile(name):
    for body in blocks(ROOT / name, "python"):
        compile(body, name, "exec")


SHORT = {
    "clip_seconds": 0.5, "n_frames": 16, "hop_length": 480, "min_context": 2, "batch_size": 4, "steps": 8,
    "warmup_steps": 2, "compare_steps": 0, "loader_threads": 1, "device": "cpu",
}  # fmt: skip


def short_preset(name: str, **settings):
    import ajepa

    return ajepa.preset(name, **{**settings, **SHORT})


@pytest.fixture
def workplace(tones, tmp_path, monkeypatch):
    """An empty folder to work in that holds `recordings`, and the names that examples take for granted."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings").symlink_to(tones)
    waveform = torch.randn(2, 44_100, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return {"short_preset": short_preset, "waveform": waveform}


def run_examples(page: Path, names: dict) -> dict:
    """Runs the Python blocks of the page one after the other; training is cut to a few seconds."""
    for body in blocks(page, "python"):
        exec(compile(body.replace("ajepa.preset(", "short_preset("), str(page), "exec"), names)
    return names


def test_examples_of_the_readme_run(workplace):
    names = run_examples(README, workplace)
    assert names["summary"]["steps"] == SHORT["steps"]
    assert names["frames"].shape[0] == 2 and names["frames"].shape[2] == names["encoder"].output_dim
    assert names["out"].shape == (12, 2, 64)
    alone = names["masked_attention"](names["qkv"][:3], cu_seqlens=torch.tensor([0, 3]).int(), max_seqlen=3)
    torch.testing.assert_close(names["out"][:3], alone)  # "no token sees another clip"


def test_examples_of_pretraining_run(workplace, tmp_path, capsys):
    names = run_examples(ROOT / "docs" / "pretrain.md", workplace)
    printed = capsys.readouterr().out.splitlines()[-1].split()
    assert float(printed[0]) == names["summary"]["final_loss"]
    assert (tmp_path / "runs" / "mine" / "encoder.safetensors").exists()


def test_examples_of_the_encoder_run(workplace, run, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run)
    names = run_examples(ROOT / "docs" / "encoder.md", workplace)
    assert names["clip"].shape == (2, names["encoder"].output_dim)
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"config.json", "model.safetensors", "README.md"}


def test_examples_of_evaluation_run(workplace, run, tmp_path):
    from ajepa import finetune

    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(run)
    rows = [f"recordings/{label}/{i:02d}.wav,{label},{i % 2}" for label in ("low", "high") for i in range(8)]
    (tmp_path / "tones.csv").write_text("\n".join(["filename,label,fold", *rows]) + "\n")
    out = str(tmp_path / "runs" / "mine" / "finetune")
    argv = ["runs/mine", "--data", "tones.csv", "--test", "fold=1", "--epochs", "1", "--batch-size", "4", "--out", out]
    assert finetune.main([*argv, "--device", "cpu"]) == 0
    samples = round(config.load(run / "config.json").data.clip_seconds * 16_000)
    pcm = (1000 * torch.randn(3, samples, generator=torch.Generator().manual_seed(0))).short()
    names = run_examples(ROOT / "docs" / "evaluate.md", {"pcm": pcm, "lengths": torch.full((3,), samples)})
    assert names["chances"].shape == (3, len(names["classes"]))
    torch.testing.assert_close(names["chances"].sum(-1), torch.ones(3))


# --- links --------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names of the page's headings, as both GitHub and Python-Markdown write them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", *MORE_PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page):
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name}: {target}: no such file"
        assert file.is_relative_to(ROOT), f"{page.name}: {target} leaves the repository"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}: no such heading"


# --- messages and numbers that pages repeat -----------------------------------------------------------------------

TROUBLE = ROOT / "docs" / "troubleshooting.md"


def texts_of_the_sources() -> list[str]:
    """Every string of the sources; what is filled in when it is printed is a NUL."""
    texts = []
    for path in [*source_files("ajepa", "kernels"), ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                texts.append("".join(map(str, parts)))
    return texts


def quoted_messages() -> list[str]:
    """The first column of the tables whose head is `message`."""
    messages, inside = [], False
    for line in TROUBLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        inside = bool(cells) and (inside or cells[0] == "message")
        if inside and (found := re.fullmatch(r"`(.+)`", cells[0])):
            messages.append(found[1])
    return messages


def test_messages_that_troubleshooting_explains_exist():
    texts, messages = texts_of_the_sources(), quoted_messages()
    assert len(messages) > 60
    assert len(set(messages)) == len(messages)
    missing = []
    for message in messages:
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("...")), re.DOTALL)
        if not any(pattern.search(text) for text in texts):
            missing.append(message)
    assert not missing, "no source says any more:\n" + "\n".join(missing)


def test_recipes_page_states_the_presets():
    def leaves(node) -> dict:
        found: dict = {}
        for f in dataclasses.fields(node):
            value = getattr(node, f.name)
            found |= leaves(value) if dataclasses.is_dataclass(value) else {f.name: value}
        return found

    def number_or_word(text: str):
        try:
            return float(text.replace(",", ""))
        except ValueError:
            return text

    presets = {name: leaves(cfg) for name, cfg in config.PRESETS.items()}
    lines = (ROOT / "docs" / "recipes.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `--")]
    rows = [row for row in rows if len(row) == 1 + len(presets)]
    head = next(line for line in lines if line.startswith("| flag |"))
    names = [cell.strip(" `") for cell in head.strip("|").split("|")[1:]]
    assert len(rows) > 20 and sorted(names) == sorted(presets)
    for flag, *cells in rows:
        field = flag.strip("`").removeprefix("--").replace("-", "_")
        for name, cell in zip(names, cells, strict=True):
            if cell != "not used":
                value = presets[name][field]
                wanted = [number_or_word(str(v)) for v in (value if isinstance(value, tuple) else (value,))]
                assert [number_or_word(word) for word in cell.split()] == wanted, f"{flag} of {name} is {value}"
