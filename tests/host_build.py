"""A CUDA source compiled for the CPU, one fiber a thread, by `tests/cuda_on_host/<name>.cpp`."""

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CXX = os.environ.get("CXX", "c++").split()[0]


def build_on_host(name: str, folder: Path) -> ctypes.CDLL:
    """The library, built in `folder`. Skips the test where there is no C++ compiler."""
    if shutil.which(CXX) is None:
        pytest.skip(f"no C++ compiler ({CXX})")
    library, source = folder / f"{name}.so", ROOT / f"tests/cuda_on_host/{name}.cpp"
    command = [CXX, "-std=c++17", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}", str(source)]
    if platform.machine() == "x86_64":
        command += ["-mfma", "-ffp-contract=fast"]  # it rounds as a GPU does
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
