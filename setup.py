"""Packages are listed by hand: ajepa_kernels lives in kernels/, a folder that must never be a package itself.

The extension `ajepa_kernels._C` is built where a C++ compiler is, with CUDA kernels where nvcc is; without a compiler
the Python alone is installed. Environment (csrc/README.md): AJEPA_EXTENSION, AJEPA_CUDA, AJEPA_CUDA_ARCHS, AJEPA_NVCC,
CUDA_HOME, CXX, MAX_JOBS.
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

CSRC = Path("csrc")
CXX = os.environ.get("CXX", "c++").split()
KERNEL_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
                "-fno-trapping-math", "-Wno-psabi"]  # fmt: skip
X86 = platform.machine() in ("x86_64", "AMD64")
CPU_KERNELS = {"portable": (4, "kPortableKernel", [])}  # lanes, symbol, flags
if X86:
    CPU_KERNELS["avx2"] = (8, "kAvx2Kernel", ["-mavx2", "-mfma", "-mf16c"])
    CPU_KERNELS["avx512"] = (
        16,
        "kAvx512Kernel",
        [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")] + ["-mfma", "-mf16c"],
    )


def wanted(name: str, found: bool, what: str) -> bool:
    """Whether to build a part: its variable is 0 (never), 1 (must) or auto (where its compiler is)."""
    choice = os.environ.get(name, "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, not {choice!r}")
    if choice == "1" and not found:
        raise SystemExit(f"{name}=1, but {what} was not found")
    return choice != "0" and found


def find_nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + ["/usr/local/cuda"]
    places = [os.environ.get("AJEPA_NVCC"), shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes)]
    return next((place for place in places if place and os.access(place, os.X_OK)), None)


def cuda_gencode() -> list[str]:
    archs = os.environ.get("AJEPA_CUDA_ARCHS", "80;90;100").replace(",", ";").split(";")
    newest = max(archs, key=lambda arch: int(arch.rstrip("af")))  # its PTX serves later GPUs
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs] + [
        f"-gencode=arch=compute_{newest},code=compute_{newest}"
    ]


def find_cudart(nvcc: str) -> str:
    homes = [Path(nvcc).resolve().parent.parent, os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    libs = ["lib64", "lib", f"targets/{platform.machine()}-linux/lib"]
    places = [Path(home, lib, "libcudart_static.a") for home in homes if home for lib in libs]
    found = next((str(place) for place in places if place.exists()), None)
    if found is None:
        raise SystemExit(f"libcudart_static.a is not beside {nvcc}: set CUDA_HOME, or AJEPA_CUDA=0 to build without it")
    return found


def compile_object(command: list[str]) -> None:
    """Runs the command, unless its last word, the object, is newer than every source and this command made it."""
    target, line = Path(command[-1]), " ".join(command)
    stamp = target.with_suffix(".command")
    newest = max(path.stat().st_mtime for path in CSRC.iterdir())
    if target.exists() and target.stat().st_mtime > newest and stamp.exists() and stamp.read_text() == line:
        return
    print(line, flush=True)
    if subprocess.run(command).returncode:
        raise SystemExit(
            f"{command[0]} failed: set AJEPA_CUDA=0 to build without CUDA, AJEPA_EXTENSION=0 without kernels"
        )
    stamp.write_text(line)


def extension() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    nvcc = find_nvcc()
    cuda = wanted("AJEPA_CUDA", nvcc is not None, "nvcc")

    class Build(BuildExtension):
        """Compiles each CPU kernel with its own flags and the CUDA sources with nvcc, then leaves the rest to torch."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "use_ninja": False})

        def build_extensions(self):
            out = Path(self.build_temp)
            out.mkdir(parents=True, exist_ok=True)
            commands = [
                [*CXX, *KERNEL_FLAGS, *flags, f"-DAJEPA_LANES={lanes}", f"-DAJEPA_KERNEL={symbol}",
                 "-c", str(CSRC / "log_mel_cpu.cpp"), "-o", str(out / f"log_mel_{name}.o")]
                for name, (lanes, symbol, flags) in CPU_KERNELS.items()
            ]  # fmt: skip
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            if cuda:
                commands += [
                    [nvcc, "-std=c++17", "-O3", f"--threads={jobs}", "-Xcompiler=-fPIC,-fvisibility=hidden",
                     *cuda_gencode(), "-c", str(source), "-o", str(out / f"{source.stem}.cu.o")]
                    for source in sorted(CSRC.glob("*.cu"))
                ]  # fmt: skip
                self.extensions[0].extra_link_args += [find_cudart(nvcc), "-ldl", "-lrt", "-lpthread"]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(compile_object, reversed(commands)))  # the longest first
            self.extensions[0].extra_objects += [command[-1] for command in commands]
            super().build_extensions()

    defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000"] + ["-DAJEPA_CUDA"] * cuda + ["-DAJEPA_X86"] * X86
    return {
        "ext_modules": [
            CppExtension(
                "ajepa_kernels._C",
                ["csrc/ops.cpp", "csrc/gelu_product.cpp"],
                depends=[str(path) for path in sorted(CSRC.iterdir())],
                extra_compile_args={"cxx": ["-std=c++17", "-O2", "-fvisibility=hidden", *defines]},
                py_limited_api=True,
            )
        ],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


found = shutil.which(CXX[0]) is not None and os.name == "posix"
build = wanted("AJEPA_EXTENSION", found, f"a C++ compiler ({CXX[0]})")
if not found:
    print(
        f"ajepa: no C++ compiler ({CXX[0]}): installing without kernels, the ops run in plain PyTorch", file=sys.stderr
    )

setup(
    packages=["ajepa", "ajepa_kernels"],
    package_dir={"ajepa": "ajepa", "ajepa_kernels": "kernels/ajepa_kernels"},
    **(extension() if build else {}),
)
