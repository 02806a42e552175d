"""The public CI, the container and the citation file: what can be checked without running them."""

import json
import re
from itertools import chain
from pathlib import Path

import pytest

import ajepa

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed, and the workflows are YAML")

ROOT = Path(__file__).parents[2]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
PROJECTS = [(ROOT / folder / "pyproject.toml").read_text() for folder in (".", "kernels")]


def steps(workflow: str) -> list[dict]:
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]


def targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", makefile, re.MULTILINE))


def stages() -> dict[str, str]:
    """{name: instructions} of the Dockerfile's stages, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    parts = re.split(r"^FROM (\S+) AS (\w+)\n", text, flags=re.MULTILINE)[1:]
    return {name: f"FROM {base}\n{body}" for base, name, body in zip(*[iter(parts)] * 3, strict=True)}


# --- workflows --------------------------------------------------------------------------------------------------------


def test_workflows_ask_for_little():
    assert set(WORKFLOWS) == {"tests", "docs", "wheels"}
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]["cancel-in-progress"], name
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 60
            assert "permissions" not in job or job["if"] == "startsWith(github.ref, 'refs/tags/v')"
        for action in (step["uses"] for step in steps(name) if "uses" in step):
            assert re.fullmatch(r"actions/[\w-]+@v\d+", action), action


def test_workflows_run_the_commands_of_the_project():
    """Lint, tests and documentation run the Makefile's targets, so that everyone can run what the CI runs."""
    makefile, readme, local = ((ROOT / name).read_text() for name in ("Makefile", "README.md", ".ci/run"))
    commands = [step["run"].split() for step in chain(steps("tests"), steps("docs")) if "run" in step]
    assert all(command[0] == "make" for command in commands)
    run = {command[1] for command in commands}
    assert run == {"lint", "test", "docs"} <= targets(makefile)
    assert {"lint", "test"} <= set(re.findall(r"^make (\w+)", local, re.MULTILINE)) <= run
    assert "make test" in readme


def test_tests_cover_every_python_and_both_ends_of_torch():
    matrix = WORKFLOWS["tests"]["jobs"]["tests"]["strategy"]["matrix"]
    for project in PROJECTS:
        assert matrix["python"] == re.findall(r"Python :: (3\.\d+)\"", project)
        assert f'requires-python = ">={matrix["python"][0]}"' in project
    torches = {*matrix["torch"], *(case["torch"] for case in matrix["include"])}
    assert torches == {"constraints.txt", ".github/torch-oldest.txt", "newest"}
    oldest = dict(re.findall(r"^(\w+)==([\d.]+)\.\*$", (ROOT / ".github/torch-oldest.txt").read_text(), re.MULTILINE))
    for project in PROJECTS:
        lowest = dict(re.findall(r'"(torch|triton|torchaudio)>=([\d.]+)', project))
        assert lowest["torch"] == oldest["torch"] and lowest["triton"] == oldest["triton"]
        assert lowest.get("torchaudio", oldest["torchaudio"]) == oldest["torchaudio"]
    (command,) = (step["run"] for step in steps("tests") if "make test" in step.get("run", ""))
    assert "CONSTRAINTS=" in command and "CONSTRAINTS ?= constraints.txt" in (ROOT / "Makefile").read_text()


def test_release_takes_what_was_built():
    build, release = (WORKFLOWS["wheels"]["jobs"][name] for name in ("build", "release"))
    assert release["needs"] == "build" and WORKFLOWS["wheels"][True]["push"]["tags"] == [
        "v*"
    ]  # YAML reads `on` as True
    uploads = [step["with"] for step in build["steps"] if "upload-artifact" in step.get("uses", "")]
    (download,) = (step["with"] for step in release["steps"] if "download-artifact" in step.get("uses", ""))
    assert [upload["name"] for upload in uploads] == [download["name"]]
    (command,) = (step["run"] for step in build["steps"] if "docker build" in step.get("run", ""))
    (target,) = re.findall(r"--target (\w+)", command)
    arguments = set(re.findall(r"--build-arg (\w+)=", command))
    assert target in stages() and arguments <= set(re.findall(r"^ARG (\w+)", stages()["build"], re.MULTILINE))


# --- containers -------------------------------------------------------------------------------------------------------


def test_image_builds_both_distributions_and_runs_without_root():
    parts = stages()
    assert list(parts) == ["toolchain", "build", "dist", "runtime"]
    assert "-devel-" in parts["toolchain"].split("\n")[0] and "-base-" in parts["runtime"].split("\n")[0]
    builds = re.findall(r"-m build --no-isolation --outdir /dist (\S+)", parts["build"])
    assert builds == [".", "kernels"] and "AJEPA_EXTENSION=1 AJEPA_CUDA=1" in parts["build"]
    users = re.findall(r"^USER (\S+)", parts["runtime"], re.MULTILINE)
    assert users == re.findall(r"useradd .*--uid (\d+)", parts["runtime"]) and users != ["0"]
    last = parts["runtime"].strip().split("\n")
    assert last[-2:] == ['ENTRYPOINT ["ajepa"]', 'CMD ["--help"]']


def test_image_gets_the_files_that_are_built_and_no_others():
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert lines[1] == "*" and all((ROOT / name).exists() for name in allowed)
    named = re.findall(r"^include (.*)$", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    assert allowed == {
        *("ajepa", "csrc", "kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"),
        *" ".join(named).split(),
    }


def test_dev_container_uses_a_stage_of_the_dockerfile():
    folder = ROOT / ".devcontainer"
    container = json.loads((folder / "devcontainer.json").read_text())
    stage = stages()[container["build"]["target"]]
    assert (folder / container["build"]["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert re.search(rf"useradd .* {container['remoteUser']}\n", stage)
    command, target = container["postCreateCommand"].split()
    assert command == "make" and target in targets((ROOT / "Makefile").read_text())


# --- citation ---------------------------------------------------------------------------------------------------------


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert citation["version"] == ajepa.__version__
    assert all(f'license = "{citation["license"]}"' in project for project in PROJECTS)
    assert all(f'authors = [{{ name = "{citation["authors"][0]["name"]}" }}]' in project for project in PROJECTS)
    papers = {
        entry["value"].removeprefix("arXiv:") for paper in citation["references"] for entry in paper["identifiers"]
    }
    assert papers and all(paper in (ROOT / "README.md").read_text() for paper in papers)
