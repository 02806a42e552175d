"""What a user installs: the wheel's contents, and that it works away from the checkout."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the Python alone (the extension's build has tests of its own)."""
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, ROOT],
        check=True,
        env={**os.environ, "AJEPA_EXTENSION": "0"},
    )
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"ajepa", "ajepa_kernels"}
    for package, folder in (("ajepa", ROOT / "ajepa"), ("ajepa_kernels", ROOT / "kernels/ajepa_kernels")):
        assert {f"{package}/{p.name}" for p in folder.glob("*.py")} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_installs_into_an_empty_environment_and_runs_there(wheel, tmp_path):
    import soundfile  # noqa: F401 (as tyro, what the program needs and not every machine has)
    import tyro  # noqa: F401

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", site, wheel],
        check=True,
    )
    # The dependencies come from the environment of the tests; its own copy of ajepa, if any, lies behind.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(code: str) -> str:
        return subprocess.check_output([python, "-c", code], text=True, env=env, cwd=tmp_path).strip()

    assert run("import ajepa_kernels as a; print(a.__file__)").startswith(str(site))
    assert run("import ajepa.train as t; print(t.__file__)").startswith(str(site))
    out = subprocess.check_output([python, "-m", "ajepa.train", "--help"], text=True, env=env, cwd=tmp_path)
    assert "--masks-per-clip" in out and "--data" in out


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels/__init__.py").exists()


def test_kernels_do_not_import_the_trainer_nor_need_triton_to_import():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import ajepa_kernels\n"
        "assert not [m for m in sys.modules if m == 'ajepa' or m.startswith('ajepa.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
