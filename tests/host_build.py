"""Builds CUDA sources for the CPU through `tests/cuda_on_host/<name>.cpp` and reads the compiler report of ptxas."""

import ctypes
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "c++").split()[0]


def build_on_host(name: str, folder: Path) -> ctypes.CDLL:
    """Build the library in `folder` and load it. Skips the test if there is no C++ compiler."""
    if shutil.which(CXX) is None:
        pytest.skip(f"the C++ compiler {CXX} is not installed")
    library, source = folder / f"{name}.so", ROOT / f"tests/cuda_on_host/{name}.cpp"
    command = [CXX, "-std=c++17", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", str(source)]
    if platform.machine() == "x86_64":
        command += ["-mfma", "-ffp-contract=fast"]  # fused multiply-adds round as on a GPU
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def ptxas_report(name: str, folder: Path) -> list[tuple[str, str, str, str]]:
    """(kernel, stack bytes, spill bytes, registers) of `csrc/<name>.cu`, compiled for AJEPA_TEST_ARCH (default 90)."""
    arch = os.environ.get("AJEPA_TEST_ARCH", "90")
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas=-v", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin"]
    report = subprocess.run(
        [*command, str(ROOT / f"csrc/{name}.cu"), "-o", str(folder / f"{name}.cubin")],
        check=True, capture_output=True, text=True,
    ).stderr  # fmt: skip
    line = r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill.*?Used (\d+) registers"
    return re.findall(line, report, re.DOTALL)
