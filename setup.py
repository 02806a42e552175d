"""Builds two distributions: `ajepa` (both packages) at the top, `ajepa-kernels` (`ajepa_kernels` alone) in kernels/.

`kernels/setup.py` runs this file, and the source archive of `ajepa-kernels` holds this file in its place. The folder
kernels/ must never become a package itself.

The extension `ajepa_kernels._C` is built where there is a C++ compiler, and its CUDA kernels where there is nvcc. A
part that does not compile is left out with a message, unless an environment variable demands it: docs/index.md lists
the variables. The fused products for Hopper take minutes to compile, so they are built only beside a Hopper GPU or on
demand (AJEPA_HOPPER=1), by csrc/hopper/build.py.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError, LinkError

# Where the sources lie, seen from the folder that is built: the top of the checkout, kernels/, or a source archive.
KERNELS = Path("kernels" if Path("kernels/ajepa_kernels").is_dir() else ".")
CSRC = Path("csrc" if Path("csrc").is_dir() else "../csrc")
HOPPER = Path("ajepa_kernels/_hopper")  # the folder of the fused products, in the package's own
CXX = os.environ.get("CXX", "c++").split()
KERNEL_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
X86 = platform.machine() in ("x86_64", "AMD64")
CPU_KERNELS = {"portable": (4, "kPortableKernel", [])}  # lanes, symbol, flags
if X86:
    CPU_KERNELS["avx2"] = (8, "kAvx2Kernel", ["-mavx2", "-mfma", "-mf16c"])
    CPU_KERNELS["avx512"] = (
        16,
        "kAvx512Kernel",
        [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")] + ["-mfma", "-mf16c"],
    )


class CudaError(CompileError):
    """The CUDA kernels cannot be built; the rest of the extension can."""


def choice(name: str) -> str:
    """The value of an environment variable: `0` (never), `1` (required) or `auto` (where possible, the default)."""
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, not {value!r}")
    return value


def leave_out(name: str, what: str, why: object) -> None:
    if choice(name) == "1":
        raise SystemExit(f"{name}=1, but {why}")
    print(f"ajepa: installing without {what}: {why} ({name}=1 makes this an error)", file=sys.stderr, flush=True)


def first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if re.search(r"\b(error|fatal|unsupported)\b", line)), lines[-1])


def query(command: list[str]) -> tuple[bool, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0, done.stdout + done.stderr


def find_nvcc() -> str:
    named = os.environ.get("AJEPA_NVCC")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [*(f"{home}/bin/nvcc" for home in homes if home), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for place in [named] if named else places:
        if place and os.access(place, os.X_OK):
            return place
    raise CudaError(f"AJEPA_NVCC={named} is no program" if named else "nvcc was not found (AJEPA_NVCC, CUDA_HOME)")


def gencode(nvcc: str) -> list[str]:
    """The -gencode options for AJEPA_CUDA_ARCHS, or by default for those of sm_80, 90 and 100 that nvcc supports."""
    asked = [arch for arch in re.split(r"[;, ]+", os.environ.get("AJEPA_CUDA_ARCHS", "").replace(".", "")) if arch]
    known = re.findall(r"compute_(\w+)", query([nvcc, "--list-gpu-arch"])[1])
    if known and (unknown := [arch for arch in asked if arch not in known]):
        raise SystemExit(f"AJEPA_CUDA_ARCHS: {nvcc} does not know {', '.join(unknown)}, only {', '.join(known)}")
    archs = asked or [arch for arch in ("80", "90", "100") if arch in known]
    if not archs or not known:
        raise CudaError(f"{nvcc} knows no architecture from 80 on, only {', '.join(known) or 'none'}")
    newest = max(archs, key=lambda arch: int(arch.rstrip("af")))  # later GPUs compile its PTX when they load it
    return [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs] + [
        f"-gencode=arch=compute_{newest},code=compute_{newest}"
    ]


def host_compiler(nvcc: str) -> list[str]:
    """The nvcc option that names a C++ compiler which this nvcc supports, neither too new nor too old for it."""
    own = [f"-ccbin={CXX[0]}"] if "CXX" in os.environ and "NVCC_CCBIN" not in os.environ and len(CXX) == 1 else []
    others = [found for version in range(16, 8, -1) if (found := shutil.which(f"g++-{version}"))]
    errors = []
    for option in [own, *([f"-ccbin={other}"] for other in others)]:
        works, output = query([nvcc, *option, "-E", "-x", "cu", os.devnull, "-o", os.devnull])
        if works:
            return option
        errors.append(first_error(output))
    raise CudaError(f"{nvcc} takes no C++ compiler here, NVCC_CCBIN may name one: {errors[0]}")


def find_cudart(nvcc: str) -> str:
    top = re.search(r"#\$ TOP=(.*)", query([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull])[1])
    homes = [top[1] if top else "", os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    target = {"aarch64": "sbsa"}.get(platform.machine(), platform.machine())
    for home in filter(None, homes):
        for lib in ("lib64", "lib", f"targets/{target}-linux/lib"):
            if (place := Path(home, lib, "libcudart_static.a")).exists():
                return str(place)
    raise CudaError(f"libcudart_static.a is not beside {nvcc}; CUDA_HOME names the folder that has both")


def compile_object(command: list[str]) -> str:
    """Run a compiler command whose last word is the object file, and return that file.

    The command is skipped if the same command made the object file after the last change of a source.
    """
    target, line = Path(command[-1]), " ".join(command)
    stamp = target.with_suffix(".command")
    newest = max(path.stat().st_mtime for path in CSRC.iterdir() if path.is_file())
    if target.exists() and target.stat().st_mtime > newest and stamp.exists() and stamp.read_text() == line:
        return str(target)
    print(line, flush=True)
    stamp.unlink(missing_ok=True)
    works, output = query(command)
    print(output, end="", file=sys.stderr, flush=True)
    if not works:
        raise (CudaError if target.match("*.cu.o") else CompileError)(f"{command[0]} failed: {first_error(output)}")
    stamp.write_text(line)
    return str(target)


def hopper_builder() -> ModuleType:
    """The module csrc/hopper/build.py."""
    spec = importlib.util.spec_from_file_location("ajepa_hopper_build", CSRC / "hopper/build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Build(build_ext):
    """Compiles each CPU kernel with its own flags and the CUDA sources with nvcc, then lets setuptools link them.

    Afterwards it compiles the fused products for Hopper, each to a library of its own.
    """

    fused: tuple[Path, ...] = ()  # their libraries

    def build_extensions(self):
        try:
            (extension,) = self.extensions
            extension.extra_objects = self.objects()
            extension.depends += extension.extra_objects  # other object files: link again
            super().build_extensions()
        except (CompileError, LinkError) as error:
            leave_out("AJEPA_EXTENSION", "kernels, the ops run in plain PyTorch", error)
            self.extensions = []
        self.build_fused()

    def build_fused(self):
        builder, wanted = hopper_builder(), choice("AJEPA_HOPPER")
        if wanted == "0" or (wanted == "auto" and not builder.has_hopper()):
            return
        try:
            nvcc = find_nvcc()
            self.fused = tuple(builder.build(Path(self.build_lib) / HOPPER, [nvcc, *host_compiler(nvcc)]))
        except (CudaError, builder.BuildError, OSError) as error:
            leave_out("AJEPA_HOPPER", "the fused products for Hopper", error)

    def copy_extensions_to_source(self):
        super().copy_extensions_to_source()
        if not self.extensions:  # nobody may mistake an older build for the result of this one
            Path(KERNELS, "ajepa_kernels/_C.abi3.so").unlink(missing_ok=True)
        shutil.rmtree(KERNELS / HOPPER, ignore_errors=True)
        for path in self.fused:
            (KERNELS / HOPPER).mkdir(exist_ok=True)
            shutil.copy2(path, KERNELS / HOPPER)

    def objects(self) -> list[str]:
        if choice("AJEPA_CUDA") != "0":
            try:
                nvcc = find_nvcc()
                self.extensions[0].extra_link_args = ["-ldl", "-lrt", "-lpthread"]
                return [*self.compile(nvcc), find_cudart(nvcc)]
            except CudaError as error:
                leave_out("AJEPA_CUDA", "CUDA kernels", error)
        return self.compile()

    def compile(self, nvcc: str | None = None) -> list[str]:
        torch = find_spec("torch")  # only its headers and libraries are needed, and importing it takes seconds
        if torch is None or torch.origin is None:
            raise CompileError("torch is not installed")
        home = Path(torch.origin).parent
        self.extensions[0].library_dirs = [str(home / "lib")]
        out = Path(self.build_temp)
        out.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        cxx = [*CXX, "-std=c++17", "-fPIC", "-fvisibility=hidden"]
        includes = [f"-isystem{home / 'include'}", f"-isystem{home / 'include/torch/csrc/api/include'}"]
        defines = ["-DTORCH_TARGET_VERSION=0x020b000000000000"] + ["-DAJEPA_CUDA"] * bool(nvcc) + ["-DAJEPA_X86"] * X86
        commands = []
        if nvcc:
            flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *host_compiler(nvcc), *gencode(nvcc)]
            commands += [
                [nvcc, *flags, f"--threads={jobs}", "-c", str(source), "-o", str(out / f"{source.stem}.cu.o")]
                for source in sorted(CSRC.glob("*.cu"))
            ]
        commands += [
            [*cxx, *KERNEL_FLAGS, *flags, f"-DAJEPA_LANES={lanes}", f"-DAJEPA_KERNEL={symbol}",
             "-c", str(CSRC / f"{op}_cpu.cpp"), "-o", str(out / f"{op}_{name}.o")]
            for op in ("log_mel", "resample")
            for name, (lanes, symbol, flags) in reversed(CPU_KERNELS.items())
        ]  # fmt: skip
        commands += [
            [*cxx, "-O2", *includes, *defines, "-c", str(CSRC / f"{name}.cpp"), "-o", str(out / f"{name}.o")]
            for name in ("ops",)
        ]
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(compile_object, commands))  # the slowest compilations come first


class BuildPy(build_py):
    """Copies the modules, and drops those that an earlier build left behind and the sources no longer have."""

    def run(self):
        super().run()
        copied = {Path(path) for path in self.get_outputs(include_bytecode=False)}
        for package in {name.partition(".")[0] for name in self.packages}:
            for path in set(Path(self.build_lib, package).rglob("*.py")) - copied:
                path.unlink()


class SourceArchive(sdist):
    """Adds the files of the checkout that `ajepa-kernels` is built from and that lie above its folder."""

    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, files)
        if CSRC.parent != Path("."):
            built = shutil.ignore_patterns("__pycache__")
            shutil.copytree(CSRC, Path(base_dir, "csrc"), dirs_exist_ok=True, ignore=built)
            Path(base_dir, "setup.py").unlink()
            shutil.copy(CSRC.parent / "setup.py", base_dir)


def extension() -> dict:
    return {
        "ext_modules": [
            Extension(
                "ajepa_kernels._C",
                [],
                depends=[str(path) for path in sorted(CSRC.iterdir()) if path.is_file()],
                libraries=["c10", "torch", "torch_cpu"],
                language="c++",
                py_limited_api=True,
            )
        ],
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


build = choice("AJEPA_EXTENSION") != "0"
if build and not (shutil.which(CXX[0]) and os.name == "posix"):
    leave_out("AJEPA_EXTENSION", "kernels, the ops run in plain PyTorch", f"there is no C++ compiler ({CXX[0]})")
    build = False
if not build and choice("AJEPA_HOPPER") == "1":
    leave_out("AJEPA_HOPPER", "the fused products for Hopper", "the extension is not built")

setup(
    packages=[
        *find_packages(include=["ajepa", "ajepa.*"]),
        *find_packages(str(KERNELS), include=["ajepa_kernels", "ajepa_kernels.*"]),
    ],
    package_dir={"ajepa_kernels": str(KERNELS / "ajepa_kernels")},
    cmdclass={"build_ext": Build, "build_py": BuildPy, "sdist": SourceArchive},
    **(extension() if build else {}),
)
