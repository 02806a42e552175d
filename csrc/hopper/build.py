"""Compiles the fused products of this folder for Hopper, each to a shared library of its own.

`python csrc/hopper/build.py [NAME ...]` puts them in kernels/ajepa_kernels/_hopper; setup.py does the same when it
installs the package. A library takes nvcc one to two minutes and 3.5 GB, so it is kept in build/hopper under a hash of
its sources, headers, command and compiler, and compiled only if nobody compiled the same before.

The headers are those of CUTLASS: in the folder AJEPA_CUTLASS, or else from the wheel that requirements.txt names.
"""

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / "build/hopper"
NAMES = tuple(sorted(path.stem for path in HERE.glob("*.cu")))
FLAGS = [
    *("-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a"),
    *("-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v", "-diag-suppress=20012,177", "-shared"),
]
MEMORY = 3.5e9  # bytes that one compilation takes
INCLUDES = ("include", "tools/util/include")  # of CUTLASS


class BuildError(Exception):
    """The fused products cannot be built here, for the reason in the message."""


def run(command: list[str], **options) -> str:
    """Return what the command prints. Raises BuildError with the first line that reports an error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["no output"]
        error = next((line for line in lines if re.search(r"\b(error|fatal|unsupported)\b", line, re.I)), lines[-1])
        raise BuildError(f"{Path(command[0]).name} failed: {error}")
    return done.stdout


def has_hopper() -> bool:
    """Whether the driver knows a GPU of compute capability 9.0."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    with contextlib.suppress(OSError, BuildError, subprocess.TimeoutExpired):
        return "9.0" in run(query, timeout=60).split()
    return False


# --- headers ----------------------------------------------------------------------------------------------------------


def headers(cache: Path = CACHE) -> list[Path]:
    """Return the include folders of CUTLASS, downloaded if need be."""
    if named := os.environ.get("AJEPA_CUTLASS"):
        home = Path(named).resolve()
    else:
        digest = hashlib.sha256((HERE / "requirements.txt").read_bytes()).hexdigest()[:16]
        home = cache / f"cutlass-{digest}"
        if not home.exists():
            _download(home)
    folders = [home / name for name in INCLUDES]
    if not (folders[0] / "cutlass/cutlass.h").exists():
        raise BuildError(f"{folders[0]} has no CUTLASS headers (AJEPA_CUTLASS names a folder with include/cutlass)")
    return folders


def _download(home: Path) -> None:
    # While pip builds a package, these variables point its Python to the build's own environment, which has no pip.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as folder:
        wheels, part = Path(folder, "wheels"), Path(folder, "part")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--retries=1"]
        run([*command, "-r", str(HERE / "requirements.txt"), "-d", str(wheels)], env=environment)
        (wheel,) = wheels.glob("*.whl")
        prefix = "cutlass_library/source/"
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(tuple(f"{prefix}{include}/" for include in INCLUDES)) and not name.endswith("/"):
                    target = part / name.removeprefix(prefix)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
        with contextlib.suppress(FileExistsError, OSError):  # another process may have been faster
            part.rename(home)


# --- libraries --------------------------------------------------------------------------------------------------------


def find_nvcc() -> list[str]:
    nvcc = os.environ.get("AJEPA_NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK):
        raise BuildError("nvcc was not found (AJEPA_NVCC names it)")
    return [nvcc]


def key(source: Path, compiler: list[str], flags: list[str], includes: list[Path]) -> str:
    """Return the hash of all that decides what is compiled from a source."""
    digest = hashlib.sha256(" ".join([*compiler[1:], *flags]).encode())
    digest.update(run([compiler[0], "--version"]).encode())
    sources = [source, *sorted(HERE.glob("*.cuh")), *sorted(HERE.glob("*.h"))]
    for path in [*sources, *sorted(p for folder in includes for p in folder.rglob("*") if p.is_file())]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def library(name: str, compiler: list[str], includes: list[Path], cache: Path = CACHE) -> Path:
    """Return the compiled library of a product. The report of ptxas lies beside it, as `.log`."""
    return compiled(HERE / f"{name}.cu", f"lib{name}.so", compiler, FLAGS, includes, cache)


def cached(name: str, compiler: list[str], includes: list[Path], cache: Path = CACHE) -> bool:
    return (cache / key(HERE / f"{name}.cu", compiler, FLAGS, includes) / f"lib{name}.so").exists()


def compiled(
    source: Path, name: str, compiler: list[str], flags: list[str], includes: list[Path], cache: Path = CACHE
) -> Path:
    """Return the file `name` that the compiler makes of a source, from the cache if it is there."""
    target = cache / key(source, compiler, flags, includes) / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(folder, name)
            folders = [word for path in includes for word in ("-isystem", str(path))]
            command = [*compiler, *flags, f"-I{HERE}", *folders, str(source), "-o"]
            print(*command, target, flush=True)
            target.with_suffix(".log").write_text(run([*command, str(part)]))
            os.replace(part, target)
    return target


def jobs() -> int:
    """Return how many compilations may run at once: MAX_JOBS, as far as the free memory reaches."""
    most = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with contextlib.suppress(OSError, TypeError):
        free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        most = min(most, int(int(free[1]) * 1024 // MEMORY))
    return max(1, most)


def build(out: Path, compiler: list[str], names: Iterable[str] = NAMES, cache: Path = CACHE) -> list[Path]:
    """Compile the libraries into the folder `out`, and return their paths there."""
    includes = headers(cache)
    with ThreadPoolExecutor(jobs()) as pool:
        made = list(pool.map(lambda name: library(name, compiler, includes, cache), names))
    out.mkdir(parents=True, exist_ok=True)
    for path in made:
        part = out / f"{path.name}.new"  # a running process may have the older file open
        shutil.copy2(path, part)
        os.replace(part, out / path.name)
    return [out / path.name for path in made]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], help="products to compile; all by default")
    parser.add_argument("--out", type=Path, default=HERE.parent.parent / "kernels/ajepa_kernels/_hopper")
    options = parser.parse_args()
    try:
        for path in build(options.out, find_nvcc(), options.names or NAMES):
            print(path)
    except BuildError as error:
        sys.exit(f"ajepa: {error}")
