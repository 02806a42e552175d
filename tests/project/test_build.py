"""What setup.py does where compilers are absent, too old or broken. Scripts stand in for the compilers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = "kernels/ajepa_kernels/_C.abi3.so"
SOURCES = {path.name for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu")}
# Creates the file that it is asked to compile or link, and logs its command line to $LOG. It fails if $BROKEN occurs in
# the command line.
CXX = """#!/bin/sh
echo "$0 $*" >>"$LOG"
case "$*" in *"${BROKEN:-none}"*) echo "$1: error: $BROKEN is broken" >&2; exit 1;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo >"$2"; shift; done
"""
NVCC = """#!/bin/sh
case "$*" in
  *--list-gpu-arch*) printf 'compute_%s\\n' $KNOWN; exit;;
  *--dryrun*) echo "#\\$ TOP=$(dirname "$0")/.."; exit;;
  *-ccbin=*) ;;
  *) [ -z "$NEEDS_CCBIN" ] || { echo 'host_config.h:1: #error -- unsupported GNU version!' >&2; exit 1; };;
esac
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the sources with an older build in place, a `c++`, and a CUDA folder with an nvcc."""
    built = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__", "build")
    for name in ("csrc", "kernels", "ajepa"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / LIBRARY).write_text("older")
    script(tmp_path / "bin/c++", CXX)
    script(tmp_path / "cuda/bin/nvcc", NVCC + CXX.split("\n", 1)[1])
    (tmp_path / "cuda/lib64").mkdir()
    (tmp_path / "cuda/lib64/libcudart_static.a").touch()
    names = (
        "AJEPA_CUDA",
        "AJEPA_CUDA_ARCHS",
        "AJEPA_NVCC",
        "AJEPA_EXTENSION",
        "AJEPA_CUTLASS",
        "CUDA_PATH",
        "NVCC_CCBIN",
    )
    for name in names:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "cutlass/include/cutlass").mkdir(parents=True)
    (tmp_path / "cutlass/include/cutlass/cutlass.h").write_text("// headers")
    for name, value in {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "CXX": "c++", "CC": "c++", "LOG": tmp_path / "log",
        "CUDA_HOME": tmp_path / "cuda", "KNOWN": "75 80 90 100", "AJEPA_HOPPER": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return tmp_path


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def build(folder: Path, **environment: str) -> tuple[bool, str, str]:
    """Build in place. Returns whether that succeeds, its messages, and the command lines of the compilers."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    log = Path(os.environ["LOG"])
    return done.returncode == 0, done.stderr, log.read_text() if log.exists() else ""


def said(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("ajepa:")]


@pytest.mark.parametrize("broken", ["ops.cpp", "resample_cpu.cpp", "kAvx2Kernel", "-shared"])
def test_failed_compilation_leaves_the_python(checkout, broken):
    if broken == "kAvx2Kernel" and os.uname().machine != "x86_64":
        pytest.skip("x86 only")
    works, errors, _ = build(checkout, BROKEN=broken)
    assert works and not (checkout / LIBRARY).exists()  # the older library has been removed
    (line,) = said(errors)
    assert "plain PyTorch" in line and "failed" in line and "AJEPA_EXTENSION=1" in line
    works, errors, _ = build(checkout, BROKEN=broken, AJEPA_EXTENSION="1")
    assert not works and "AJEPA_EXTENSION=1, but" in errors


def test_no_compiler_and_no_nvcc(checkout):
    (checkout / "bin/c++").unlink()
    works, errors, _ = build(checkout, CXX="no-such-compiler", BROKEN="")
    assert works and "there is no C++ compiler (no-such-compiler)" in errors
    assert not build(checkout, CXX="no-such-compiler", AJEPA_EXTENSION="1")[0]
    assert not build(checkout, CXX="no-such-compiler", AJEPA_HOPPER="1")[0]
    works, errors, _ = build(checkout, AJEPA_NVCC="/no/nvcc", AJEPA_CUDA="1")
    assert not works and "AJEPA_NVCC=/no/nvcc" in errors


def test_failed_nvcc_leaves_the_cpp(checkout):
    works, errors, log = build(checkout, BROKEN="log_mel.cu")
    (line,) = said(errors)
    assert works and "without CUDA kernels" in line and "error: log_mel.cu is broken" in line
    *_, ops, _ = (command for command in log.splitlines() if "ops.cpp" in command or "-shared" in command)
    assert "-DAJEPA_CUDA" not in ops and "libcudart" not in log and (checkout / LIBRARY).read_text() != "older"
    works, errors, _ = build(checkout, BROKEN="log_mel.cu", AJEPA_CUDA="1")
    assert not works and "AJEPA_CUDA=1, but" in errors


@pytest.mark.parametrize(
    ("environment", "built"),
    [
        ({}, ["80,sm_80", "90,sm_90", "100,sm_100", "100,compute_100"]),
        ({"KNOWN": "75 80 90"}, ["80,sm_80", "90,sm_90", "90,compute_90"]),
        ({"AJEPA_CUDA_ARCHS": "8.0 9.0"}, ["80,sm_80", "90,sm_90", "90,compute_90"]),
        ({"AJEPA_CUDA_ARCHS": "75"}, ["75,sm_75", "75,compute_75"]),
    ],
)
def test_architectures(checkout, environment, built):
    works, _, log = build(checkout, **environment)
    for source in ("log_mel.cu", "resample.cu"):
        (command,) = (line for line in log.splitlines() if f"csrc/{source} " in line)
        codes = [word.split("compute_", 1)[1] for word in command.split() if word.startswith("-gencode")]
        assert works and [code.replace("code=", "") for code in codes] == built
    assert str(checkout / "cuda/lib64/libcudart_static.a") in log.replace("bin/../", "")


def test_architectures_that_nvcc_does_not_know(checkout):
    works, errors, _ = build(checkout, AJEPA_CUDA_ARCHS="90;999")
    assert not works and "does not know 999, only 75, 80, 90, 100" in errors
    works, errors, _ = build(checkout, KNOWN="60 75")
    assert works and "no architecture from 80 on" in said(errors)[0]


def test_host_compiler_that_nvcc_takes(checkout):
    """If the default compiler is too new for nvcc, the build uses an older one, or says that there is none."""
    works, errors, _ = build(checkout, NEEDS_CCBIN="1", CXX="env c++", AJEPA_CUDA="auto")
    if not any(shutil.which(f"g++-{version}", path="/usr/bin:/bin") for version in range(9, 17)):
        assert works and "unsupported GNU version" in said(errors)[0] and "NVCC_CCBIN" in said(errors)[0]
    script(checkout / "bin/g++-16", CXX)
    works, errors, log = build(checkout, NEEDS_CCBIN="1", CXX="env c++")
    assert works and not said(errors) and f"-ccbin={checkout}/bin/g++-16" in log


def test_cuda_path(checkout, monkeypatch):
    monkeypatch.delenv("CUDA_HOME")
    works, _, log = build(checkout, CUDA_PATH=str(checkout / "cuda"), AJEPA_CUDA="1")
    assert works and "log_mel.cu.o" in log


def test_wheel_of_a_failed_compilation(checkout):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."],
        check=True, cwd=checkout, env={**os.environ, "BROKEN": "ops.cpp"},
    )  # fmt: skip
    (wheel,) = (checkout / "out").glob("*.whl")
    names = subprocess.check_output([sys.executable, "-m", "zipfile", "-l", wheel], text=True)
    assert "ajepa_kernels/log_mel.py" in names and "_C" not in names


# --- the fused products for Hopper ------------------------------------------------------------------------------------

FUSED = {f"lib{path.stem}.so" for path in (ROOT / "csrc/hopper").glob("*.cu")}


def fused(checkout: Path) -> set[str]:
    return {path.name for path in (checkout / "kernels/ajepa_kernels/_hopper").glob("*")}


def compiled_products(checkout: Path) -> list[str]:
    """The products compiled since the last call."""
    lines = (checkout / "log").read_text().splitlines()
    (checkout / "log").write_text("")
    return [
        Path(word).stem for line in lines for word in line.split() if "/hopper/linear" in word and "/build" not in word
    ]


def test_fused_products_are_compiled_once(checkout):
    """They are found again under a hash of what they are made of, not by the times of files."""
    demanded = {"AJEPA_HOPPER": "1", "AJEPA_CUTLASS": str(checkout / "cutlass")}
    works, errors, log = build(checkout, **demanded)
    assert works and not said(errors) and fused(checkout) == FUSED
    assert log.count("arch=compute_90a,code=sm_90a") == len(FUSED)
    assert sorted(f"lib{name}.so" for name in compiled_products(checkout)) == sorted(FUSED)
    shutil.rmtree(checkout / "kernels/ajepa_kernels/_hopper")
    for path in (checkout / "csrc/hopper").iterdir():
        path.touch()
    assert build(checkout, **demanded)[0] and fused(checkout) == FUSED and not compiled_products(checkout)
    with (checkout / "csrc/hopper/linear_gelu.cu").open("a") as file:
        file.write("// more")
    assert build(checkout, **demanded)[0] and compiled_products(checkout) == ["linear_gelu"]
    (checkout / "cutlass/include/cutlass/cutlass.h").write_text("// other headers")
    assert build(checkout, **demanded)[0] and len(compiled_products(checkout)) == len(FUSED)


def test_fused_products_are_not_waited_for(checkout):
    """Without a Hopper GPU nothing is compiled or downloaded unless demanded; older libraries are not left behind."""
    (checkout / "kernels/ajepa_kernels/_hopper").mkdir(exist_ok=True)
    (checkout / "kernels/ajepa_kernels/_hopper/liblinear_gelu.so").write_text("older")
    script(checkout / "bin/nvidia-smi", "#!/bin/sh\necho 8.0\n")
    works, errors, log = build(checkout, AJEPA_HOPPER="auto", AJEPA_CUTLASS="/no/headers")
    assert works and not said(errors) and "90a" not in log and not fused(checkout)
    script(checkout / "bin/nvidia-smi", "#!/bin/sh\nprintf '8.0\\n9.0\\n'\n")
    works, errors, log = build(checkout, AJEPA_HOPPER="auto", AJEPA_CUTLASS="/no/headers")
    (line,) = said(errors)
    assert works and "without the fused products for Hopper: /no/headers/include has no CUTLASS headers" in line
    works, errors, _ = build(checkout, AJEPA_HOPPER="1", AJEPA_CUTLASS="/no/headers")
    assert not works and "AJEPA_HOPPER=1, but /no/headers/include has no CUTLASS" in errors
    headers = str(checkout / "cutlass")
    works, errors, _ = build(checkout, AJEPA_HOPPER="auto", AJEPA_CUTLASS=headers, BROKEN="linear_gelu.cu")
    assert works and "linear_gelu.cu is broken" in said(errors)[-1] and (checkout / LIBRARY).read_text() != "older"
    works, _, log = build(checkout, AJEPA_HOPPER="auto", AJEPA_CUTLASS=headers)
    assert works and fused(checkout) == FUSED and "sm_90a" in log


def test_wheels_carry_the_fused_products(checkout):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    environment = {**os.environ, "AJEPA_HOPPER": "1", "AJEPA_CUTLASS": str(checkout / "cutlass")}
    subprocess.run(command, check=True, cwd=checkout, env=environment)
    (wheel,) = (checkout / "out").glob("*.whl")
    names = subprocess.check_output([sys.executable, "-m", "zipfile", "-l", wheel], text=True)
    assert all(f"ajepa_kernels/_hopper/{name}" in names for name in FUSED)


# --- the distribution `ajepa-kernels` ---------------------------------------------------------------------------------


def compiled(log: str) -> set[str]:
    """Names of the sources that were compiled, from the command lines of the compilers."""
    return {Path(word).name for word in log.split() if word.endswith((".cpp", ".cu"))}


def test_kernels_alone_are_the_same_build(checkout):
    works, errors, log = build(checkout, AJEPA_EXTENSION="1", AJEPA_CUDA="1")
    assert works and compiled(log) == {
        path.name for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu")
    }
    (checkout / "log").unlink()
    (checkout / LIBRARY).write_text("older")
    works, errors, alone = build(checkout / "kernels", AJEPA_EXTENSION="1", AJEPA_CUDA="1")
    assert works and (checkout / LIBRARY).read_text() != "older", errors
    plain = alone.replace("../csrc/", "csrc/")
    assert sorted(plain.splitlines()) == sorted(log.splitlines())
    works, errors, _ = build(checkout / "kernels", BROKEN="ops.cpp", CXX="env c++")
    assert works and "plain PyTorch" in said(errors)[0] and not (checkout / LIBRARY).exists()


def test_source_archive_of_the_kernels_builds(checkout):
    """The archive is made without a compiler, and still holds everything that one needs."""
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('..')"]
    environment = {**os.environ, "AJEPA_EXTENSION": "0"}
    subprocess.run(command, cwd=checkout / "kernels", env=environment, check=True, capture_output=True)
    (archive,) = checkout.glob("*.tar.gz")
    shutil.unpack_archive(archive, checkout / "archive")
    (folder,) = (checkout / "archive").iterdir()
    works, errors, log = build(folder, AJEPA_EXTENSION="1", AJEPA_CUDA="1")
    assert works and (folder / "ajepa_kernels/_C.abi3.so").exists(), errors
    assert compiled(log) == SOURCES
    assert (checkout / "kernels/setup.py").read_text() == (ROOT / "kernels/setup.py").read_text()
