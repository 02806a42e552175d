"""What a user installs: the contents of both distributions, and that they work away from the checkout."""

import ast
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from pathlib import Path

import pytest

import ajepa
import ajepa_kernels
from ajepa import __main__ as listing

ROOT = Path(__file__).parents[2]
BUILT = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "build")
# What the trainer needs beside torch; `ajepa_kernels` must do without each of them.
TRAINER = [
    "ajepa", "huggingface_hub", "isal", "matplotlib", "numpy", "nvidia", "pyarrow", "pydantic", "rich", "safetensors",
    "scipy", "sklearn", "soundfile", "soxr", "tensorboard", "torchaudio", "tyro",
]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the files that are built, beside the remains of a build of an older version."""
    folder = tmp_path_factory.mktemp("source")
    for name in ("csrc", "kernels", "ajepa"):
        shutil.copytree(ROOT / name, folder / name, ignore=BUILT)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, folder)
    for package in ("build/lib/ajepa", "kernels/build/lib/ajepa_kernels"):
        (folder / package).mkdir(parents=True)
        (folder / package / "removed.py").touch()
    return folder


def build_wheel(folder: Path, out: Path) -> Path:
    """Build a wheel of the Python modules alone: tests/project/test_build.py tests the build of the extension."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, folder],
        check=True,
        env={**os.environ, "AJEPA_EXTENSION": "0"},
    )
    (path,) = out.glob("*.whl")
    return path


def build_archive(folder: Path, out: Path) -> tarfile.TarFile:
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    environment = {**os.environ, "AJEPA_EXTENSION": "0"}  # as on a machine without a compiler
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, env=environment, capture_output=True)
    (path,) = out.glob("*.tar.gz")
    return tarfile.open(path)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def kernels_wheel(source, tmp_path_factory) -> Path:
    return build_wheel(source / "kernels", tmp_path_factory.mktemp("kernels_wheel"))


def modules(*packages: str) -> set[str]:
    """The files that a wheel of these packages must hold."""
    folders = {"ajepa": ROOT, "ajepa_kernels": ROOT / "kernels"}
    paths = [(folders[package], path) for package in packages for path in (folders[package] / package).rglob("*")]
    packed = [(folder, p) for folder, p in paths if p.suffix in (".py", ".json") or p.name == "py.typed"]
    return {p.relative_to(folder).as_posix() for folder, p in packed}


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def metadata(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    return message_from_bytes(archive.read(name))


def console_scripts(wheel: Path) -> dict[str, str]:
    archive, parser = zipfile.ZipFile(wheel), ConfigParser()
    (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
    parser.read_string(archive.read(name).decode())
    return dict(parser["console_scripts"])


class Installed:
    """An environment that holds a wheel, and takes the wheel's dependencies from the environment of the tests."""

    def __init__(self, wheel: Path, folder: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.bin, self.folder = folder / "bin", folder
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-compile", wheel], check=True)
        self.env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.site = Path(self.run("python", "-c", code).stdout.strip())
        # A path in a .pth file is searched last, and .pth files there, such as an editable install's, are not read.
        (self.site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess:
        command = [self.bin / program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=self.env, cwd=self.folder)


# --- contents ---------------------------------------------------------------------------------------------------------


def test_wheels_hold_every_module_and_nothing_else(wheel, kernels_wheel):
    assert contents(wheel) == modules("ajepa", "ajepa_kernels")
    assert contents(kernels_wheel) == modules("ajepa_kernels")
    for path in (wheel, kernels_wheel):
        assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(path).namelist())


@pytest.mark.parametrize("folder", [".", "kernels"])
def test_source_archives_build_alone(source, wheel, kernels_wheel, folder, tmp_path):
    """An archive holds the C++ and CUDA sources, also if it is made where there is no compiler."""
    archive = build_archive(source / folder, tmp_path / "archive")
    top = archive.getnames()[0]
    files = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    csrc = [path for pattern in ("*", "hopper/*") for path in (ROOT / "csrc").glob(pattern) if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in csrc} <= files
    assert archive.extractfile(f"{top}/setup.py").read() == (ROOT / "setup.py").read_bytes()
    assert not [name for name in files if name.startswith("tests/") or name.endswith((".so", ".pyc"))]
    archive.extractall(tmp_path)
    rebuilt = build_wheel(tmp_path / top, tmp_path / "wheel")
    assert contents(rebuilt) == contents(wheel if folder == "." else kernels_wheel)


def test_both_distributions_agree(wheel, kernels_wheel):
    whole, kernels = metadata(wheel), metadata(kernels_wheel)
    for field in ("Requires-Python", "License-Expression"):
        assert whole[field] == kernels[field]
    needed = set(kernels.get_all("Requires-Dist"))
    assert {re.split(r"[>=<;!~ ]", line)[0] for line in needed} == {"torch", "triton"}
    assert needed <= set(whole.get_all("Requires-Dist"))
    assert (ROOT / "kernels/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    builds = [(ROOT / folder / "pyproject.toml").read_text().split("[project]")[0] for folder in (".", "kernels")]
    assert len({re.search(r"^requires = .*$", text, re.MULTILINE)[0] for text in builds}) == 1
    assert whole["Version"] == ajepa.__version__
    assert kernels["Version"] == ajepa_kernels.__version__


# --- use --------------------------------------------------------------------------------------------------------------


def test_wheel_installs_into_an_empty_environment_and_runs_there(wheel, tmp_path):
    import soundfile  # noqa: F401 (the program needs it and tyro, which not every machine has)
    import tyro  # noqa: F401

    installed = Installed(wheel, tmp_path / "venv")
    scripts = console_scripts(wheel)
    assert set(scripts) == {"ajepa", *(f"ajepa-{command}" for command in listing.COMMANDS)}
    assert all((installed.bin / name).exists() for name in scripts)
    code = "import ajepa_kernels, importlib.metadata as m; print(ajepa_kernels.__file__)\n" + "".join(
        f"print(m.EntryPoint('', {target!r}, '').load().__code__.co_filename)\n" for target in scripts.values()
    )
    files = installed.run("python", "-c", code).stdout.split()
    assert len(files) == len(scripts) + 1 and all(name.startswith(str(installed.site)) for name in files)

    done = installed.run("ajepa", "--version")
    assert (done.returncode, done.stdout) == (0, f"ajepa {metadata(wheel)['Version']}\n")
    done = installed.run("ajepa-train", "--help")
    assert done.returncode == 0 and "--data" in done.stdout
    missing = tmp_path / "missing"
    done = installed.run("ajepa-pack", missing, tmp_path / "shards")  # the status of main() is that of the script
    assert done.returncode == 2 and str(missing) in done.stderr


@pytest.fixture(scope="module")
def kernels_installed(kernels_wheel, tmp_path_factory) -> Installed:
    return Installed(kernels_wheel, tmp_path_factory.mktemp("kernels") / "venv")


@pytest.mark.parametrize("triton", [True, False], ids=["with triton", "without triton"])
def test_kernels_work_without_the_trainer(kernels_installed, triton, tmp_path):
    """The examples of kernels/README.md run where none of the trainer's dependencies can be imported, on a machine
    without a compiler, a GPU and the extension, and without Triton, too."""
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "kernels/README.md").read_text(), re.DOTALL | re.MULTILINE)
    absent = TRAINER if triton else [*TRAINER, "triton"]
    (tmp_path / "examples.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
        "import ajepa_kernels\n"
        f"assert ajepa_kernels.__file__.startswith({str(kernels_installed.site)!r}), ajepa_kernels.__file__\n"
        "import ajepa_kernels._extension\nassert not ajepa_kernels._extension.AVAILABLE\n"
        f"for example in {examples!r}:\n    exec(example, {{}})\n"
    )
    done = kernels_installed.run("python", tmp_path / "examples.py")
    assert len(examples) >= 6 and done.returncode == 0, done.stderr


def test_types_of_the_installed_kernels_reach_a_users_checker(kernels_installed, tmp_path):
    """mypy reads the signatures of the installed package, because of its py.typed, and reports a wrong argument."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-torch.*,triton.*]\nfollow_imports = skip\n")
    (tmp_path / "script.py").write_text(
        "import torch\n"
        "from ajepa_kernels import LogMelSpec, masked_attention\n"
        "reveal_type(LogMelSpec().n_mels)\n"
        "masked_attention(torch.ones(5, 3, 2, 8), max_seqlen='three')\n"
    )
    command = [sys.executable, "-m", "mypy", "--python-executable", kernels_installed.bin / "python"]
    done = subprocess.run(
        [*command, "--cache-dir", tmp_path / "cache", "script.py"], cwd=tmp_path, capture_output=True, text=True,
        env=kernels_installed.env,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith("script.py:")]
    assert len(said) == 2, done.stdout + done.stderr
    assert said[0].startswith("script.py:3: note") and '"int"' in said[0]
    assert said[1].startswith("script.py:4: error") and "arg-type" in said[1]


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_kernels_do_not_import_the_trainer_nor_need_triton_to_import():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import ajepa_kernels\n"
        "assert not [m for m in sys.modules if m == 'ajepa' or m.startswith('ajepa.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the Kernel Hub ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder in the layout of the Hugging Face Kernel Hub."""
    folder = tmp_path_factory.mktemp("hub")
    subprocess.run([sys.executable, ROOT / "kernels/hub_layout.py", folder], check=True, capture_output=True)
    return folder


USE = """
import torch
import ajepa_kernels

assert kernel.__name__ not in ("ajepa_kernels", "ajepa") and kernel.__all__ == ajepa_kernels.__all__
assert kernel.masked_attention is not ajepa_kernels.masked_attention
torch.manual_seed(0)
for module in (kernel, ajepa_kernels):  # each with operators of its own
    z, qkv = torch.randn(8, 16, requires_grad=True), torch.randn(5, 3, 2, 32, requires_grad=True)
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    loss = torch.compile(module.sigreg, fullgraph=True, backend="aot_eager")(z, 0)
    (loss + module.masked_attention(qkv, cu_seqlens=cu, max_seqlen=3).sum()).backward()
    assert z.grad.isfinite().all() and qkv.grad.isfinite().all()
"""


def test_hub_build_is_whole_and_loads_beside_the_package(hub, tmp_path):
    """Every module is there with its digest, imports its neighbours relatively and has operators of its own."""
    folders = sorted((hub / "build").iterdir())
    assert [folder.name for folder in folders] == ["torch-cpu", "torch-cuda"] and (hub / "LICENSE").exists()
    sources = {path.removeprefix("ajepa_kernels/") for path in modules("ajepa_kernels") if path.endswith(".py")}
    for folder in folders:
        metadata = json.loads((folder / "metadata.json").read_text())
        digests = metadata["digest"]["files"]
        assert digests.keys() == sources and metadata["backend"] == {"type": folder.name.removeprefix("torch-")}
        for name, digest in digests.items():
            data = (folder / name).read_bytes()
            assert base64.b64encode(hashlib.sha256(data).digest()).decode() == digest
            assert not re.search(rb"^\s*(from|import) ajepa_kernels|ops\.ajepa\b|[\"']ajepa::", data, re.MULTILINE), (
                name
            )
    load = f"""
import importlib.util, json, sys
id = json.load(open({str(folders[0] / "metadata.json")!r}))["id"]
spec = importlib.util.spec_from_file_location(id, {str(folders[0] / "__init__.py")!r})
sys.modules[id] = kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
"""
    subprocess.run([sys.executable, "-c", load + USE], check=True, cwd=tmp_path)


def test_hub_build_loads_through_the_library(hub, tmp_path):
    """The library `kernels` resolves the build for this machine, and checks its metadata and its digests."""
    pytest.importorskip("kernels._rust", reason="the library `kernels` is not installed: pip install 'kernels>=0.17'")
    load = f"""
from pathlib import Path
from kernels import get_loaded_kernels, get_local_kernel
from kernels._rust import Digest, DigestAlgorithm
kernel = get_local_kernel(Path({str(hub)!r}), backend="cpu")
(loaded,) = get_loaded_kernels()
assert loaded.metadata.name.python_name == "ajepa_kernels"
loaded.metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, Path(kernel.__file__).parent))
"""
    subprocess.run([sys.executable, "-c", load + USE], check=True, cwd=tmp_path)


# --- the list of commands ---------------------------------------------------------------------------------------------


def test_every_command_is_listed():
    trees = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "ajepa").glob("*.py")}
    with_main = {name for name, tree in trees.items() if "main" in {getattr(node, "name", "") for node in tree.body}}
    assert with_main == {*listing.COMMANDS, "__main__"}
    for command in listing.COMMANDS:
        assert 10 < len(listing.summary(command)) < 100 and "ajepa." not in listing.summary(command).split("`")[0]


def test_the_list_needs_no_torch():
    code = "import sys; from ajepa.__main__ import main; assert main([]) == 0 and 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("  ")] == list(listing.COMMANDS)


def test_unknown_command(capsys):
    assert listing.main(["trian"]) == 2
    assert "trian is not a command; did you mean train?" in capsys.readouterr().err


def test_a_command_gets_its_own_arguments(monkeypatch):
    from types import SimpleNamespace

    seen = []
    fake = SimpleNamespace(main=lambda: seen.append(sys.argv) or 3)
    monkeypatch.setattr(listing.importlib, "import_module", lambda name: seen.append(name) or fake)
    monkeypatch.setattr(sys, "argv", ["ajepa", "embed", "model", "--out", "x"])
    assert listing.main() == 3
    assert seen == ["ajepa.embed", ["ajepa embed", "model", "--out", "x"]]
