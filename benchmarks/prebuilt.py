"""Makes, on a machine without a GPU, everything that a GPU machine would otherwise compile or download.

`python benchmarks/prebuilt.py` writes the folder `prebuilt/`:

    extension/      `_C.abi3.so` with CUDA kernels for the architectures, the libraries of the fused products if one of
                    them is Hopper's (`hopper/`), and the fingerprint of their sources
    wheels/         packages that CUDA images lack
    triton-*.zip    Triton's cache files of the kernels that a training step and the benchmarks launch, and of the C
                    modules that start them, for one version of Triton and of Python

`unpack` puts all of it in place on the GPU machine. This module imports only the standard library, so that `unpack` can
run before torch is imported.

A key of Triton's cache is a hash of the kernel's source, its specialised arguments, the compiler options, and the
installed Triton itself. The archive holds everything but the last. `unpack` adds the Triton of its own machine and
computes the keys there, so that a rebuilt wheel of the same Triton version finds the kernels, too.
"""

import argparse
import base64
import filecmp
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = "kernels/ajepa_kernels/_C.abi3.so"
HOPPER = "kernels/ajepa_kernels/_hopper"
EXTENSION = ("csrc/*", "csrc/hopper/*", "setup.py")  # the sources of each
KERNELS = ("kernels/ajepa_kernels/*.py",)
WORK = ROOT / "build/prebuilt"  # holds objects, an environment for each version of Python, and Triton's cache
TORCH = "torch==2.11.0"  # that of the GPU machine; it installs the Triton that it was released with
# The packages that CUDA images lack, except DALI, which has 200 MB: libsndfile decodes in its place.
WHEELS = ["soundfile", "cffi", "pycparser", "soxr", "isal", "tyro", "docstring-parser", "typeguard", "pydantic"]
KINDS = ("cubin", "json")  # the cache files of a kernel that Triton needs to launch it
MACHINE = """
import json, os, triton, triton.runtime.build, triton.runtime.cache
ptxas = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "ptxas")
print(json.dumps([triton.runtime.cache.triton_key(), triton.runtime.build.platform_key(), ptxas]))
"""  # prints the parts of the cache's keys that depend on the machine, and the path of Triton's own assembler
PROOF = """
import importlib.util, os, pathlib, torch
from ajepa_kernels import bias_gelu
x, bias = torch.randn(64, 3072, device="cuda", dtype=torch.bfloat16), torch.randn(3072, device="cuda")
want = torch.nn.functional.gelu(x.float() + bias)
assert (bias_gelu(x, bias, impl="triton").float() - want).norm() < 0.02 * want.norm(), "bias_gelu is wrong"
for path in pathlib.Path(os.environ["TRITON_CACHE_DIR"]).glob("*/*.so"):
    importlib.util.module_from_spec(importlib.util.spec_from_file_location(path.name.split(".")[0], path))
"""  # checks that a kernel of the cache runs on this GPU, and that its C modules load with this driver


def run(command: Iterable[object], root: Path = ROOT, seconds: float | None = None, **environment: str) -> str:
    """Return what the command prints. Raises RuntimeError with the last line of its errors if it fails.

    A command that takes more than `seconds` is killed together with the processes that it started. This is an error,
    too.
    """
    words = [str(word) for word in command]
    process = subprocess.Popen(
        words, cwd=root, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise RuntimeError(f"{Path(words[0]).name} took more than {seconds:.3g} s") from None
    if process.returncode:
        lines = (errors.strip() or out.strip() or f"exit status {process.returncode}").splitlines()
        raise RuntimeError(f"{Path(words[0]).name} failed: {lines[-1]}")
    return out + errors


# --- on the GPU machine -----------------------------------------------------------------------------------------------


def unpack(
    folder: Path, into: Path, capability: int | None, root: Path = ROOT, seconds: float | None = None
) -> list[dict]:
    """Put the contents of `folder` in place for the Python that calls this. No exception is raised.

    Args:
        folder: a folder that this module wrote. What is missing or does not fit is built on this machine or left out.
        into: a folder for packages (`site`) and for Triton's cache (`triton`).
        capability: 10 x compute capability of the GPU, or None if there is no GPU. Then nothing is built.
        root: the checkout that the extension belongs to.
        seconds: the longest time that building or installing may take.

    Returns:
        One dict for each step: `what` it is, its `seconds`, a `note` in one sentence, and the `environment` variables
        to set before torch is imported. The steps run side by side.
    """
    folder, into = Path(folder).absolute(), Path(into).absolute()
    steps: dict[str, Callable[[], tuple[str, dict]]] = {
        "extension": lambda: (_place_extension(folder / "extension", capability, root, seconds), {}),
        "wheels": lambda: _place_wheels(folder / "wheels", into / "site", seconds),
        "triton": lambda: _proven(*_place_kernels(folder, into / "triton", capability, root), root),
    }

    def step(what: str) -> dict:
        begin = time.perf_counter()
        try:
            note, environment = steps[what]()
        except Exception as error:  # the run goes on without this step, whatever went wrong
            note, environment = f"{what} could not be unpacked: {type(error).__name__}: {error}".splitlines()[0], {}
        return {
            "what": what,
            "seconds": round(time.perf_counter() - begin, 2),
            "note": note,
            "environment": environment,
        }

    with ThreadPoolExecutor() as pool:
        return list(pool.map(step, steps))


def fingerprint(patterns: Iterable[str], root: Path = ROOT) -> str:
    """Return the sha256 of the files that match `patterns`."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in root.glob(pattern) if path.is_file()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _place_extension(folder: Path, capability: int | None, root: Path, seconds: float | None) -> str:
    library = root / LIBRARY
    if capability is None:
        return "There is no GPU: the extension is used as it is." if library.exists() else "There is no extension."
    why_not = _try_extension(folder, capability, root)
    if not why_not:
        return "The prebuilt extension is in place."
    begin, command = time.perf_counter(), [sys.executable, "setup.py", "build_ext", "--inplace"]
    try:
        # the fused products would take minutes of a GPU machine's time
        output = run(command, root, seconds, AJEPA_CUDA_ARCHS=str(capability), AJEPA_HOPPER="0")
    except RuntimeError as error:
        return f"The prebuilt extension is not used: {why_not}. Building it here failed, too: {error}"
    left_out = "".join(f" {line}." for line in output.splitlines() if line.startswith("ajepa:"))
    took = time.perf_counter() - begin
    return f"The prebuilt extension is not used: {why_not}. Building it here took {took:.0f} s.{left_out}"


def _try_extension(folder: Path, capability: int, root: Path) -> str:
    """Copy the extension to where it is imported from. Returns why it cannot be used, or an empty string."""
    library = root / LIBRARY
    try:
        made = json.loads((folder / "made.json").read_text())
        if made["fingerprint"] != fingerprint(EXTENSION, root):
            return "its sources have changed since"
        if str(capability) not in made["archs"]:
            return f"it is for sm_{', sm_'.join(made['archs'])} and this GPU is sm_{capability}"
        _copy(folder / library.name, library)
        shutil.rmtree(root / HOPPER, ignore_errors=True)
        for fused in sorted((folder / "hopper").glob("*.so")) if capability == 90 else ():
            _copy(fused, root / HOPPER / fused.name)
        run([sys.executable, "-c", f"import torch; torch.ops.load_library({str(library)!r})"], root)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        return str(error)
    return ""


def _copy(source: Path, target: Path) -> None:
    if not (target.exists() and filecmp.cmp(source, target, shallow=False)):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target.with_suffix(".new"))
        os.replace(target.with_suffix(".new"), target)  # another process may have the older file open


def _place_wheels(folder: Path, site: Path, seconds: float | None) -> tuple[str, dict]:
    """Install the wheels that hold a module which cannot be imported."""
    wheels = sorted(folder.glob("*.whl"))
    search = [str(site), *sys.path]
    importlib.invalidate_caches()
    missing = [
        wheel
        for wheel in wheels
        if not all(importlib.machinery.PathFinder.find_spec(name, search) for name in _modules(wheel))
    ]
    environment = {"PYTHONPATH": str(site)} if missing or site.exists() else {}
    if missing:
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
        run([sys.executable, "-m", "pip", "install", *options, "--target", site, *missing], seconds=seconds)
    names = ", ".join(wheel.name.split("-")[0] for wheel in missing)
    present = f"{len(wheels) - len(missing)} of {len(wheels)} packages were there"
    return f"{present}; installed: {names or 'none'}." if wheels else f"There are no wheels in {folder}.", environment


def _modules(wheel: Path) -> set[str]:
    """Return the top-level modules of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    return {top.split(".")[0] for top in tops if not top.endswith((".dist-info", ".data"))}


def _place_kernels(folder: Path, cache: Path, capability: int | None, root: Path = ROOT) -> tuple[str, dict]:
    if capability is None:
        return "There is no GPU to compile kernels for.", {}
    cache.mkdir(parents=True, exist_ok=True)
    environment = {"TRITON_CACHE_DIR": str(cache)}  # always set, so that `new_entries` sees what is compiled
    try:
        archive = folder / archive_name()
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed.", {}
    if not archive.exists():
        archives = ", ".join(sorted(path.name for path in folder.glob("triton-*.zip"))) or "no archive"
        return f"Kernels will be compiled here: {archive.name} is wanted and {folder} holds {archives}.", environment
    try:
        with zipfile.ZipFile(archive) as file:
            made = json.loads(file.read("made.json"))
            if capability not in made["archs"]:
                archs = ", ".join(f"sm_{arch}" for arch in made["archs"])
                return f"The prebuilt kernels are for {archs}; others will be compiled here.", environment
            triton_key, platform_key, ptxas = json.loads(run([sys.executable, "-c", MACHINE]))
            keys = [_write_kernel(file, kernel, triton_key, cache) for kernel in made["kernels"]]
            keys += [_write_module(file, module, platform_key, cache) for module in made["modules"]]
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        return f"Kernels will be compiled here: {archive.name} is damaged ({error}).", environment
    (cache.parent / "unpacked.json").write_text(json.dumps(sorted(keys)))
    more = "" if triton_key == made["triton_key"] else " The Triton here is another build of the same version."
    if made["fingerprint"] != fingerprint(KERNELS, root):
        more += " The kernels' sources have changed since, so that some will be compiled here."
    # torch.compile would set another assembler, whose version is part of the keys
    environment["TRITON_PTXAS_PATH"] = ptxas
    return f"{len(made['kernels'])} kernels and {len(made['modules'])} C modules are in place.{more}", environment


def _proven(note: str, environment: dict, root: Path) -> tuple[str, dict]:
    """Run a kernel of the cache. If it fails, empty the cache, because prebuilt kernels must not break a run.

    Returns the note and the environment variables that are valid afterwards.
    """
    if "TRITON_PTXAS_PATH" not in environment:
        return note, environment  # nothing was put in place
    try:
        run([sys.executable, "-c", PROOF], root, 60.0, PYTHONPATH=str(root / "kernels"), **environment)
    except RuntimeError as error:
        cache = Path(environment["TRITON_CACHE_DIR"])
        shutil.rmtree(cache)
        cache.mkdir()
        return f"Kernels will be compiled here: the prebuilt ones do not run ({error}).", {
            "TRITON_CACHE_DIR": str(cache)
        }
    return note, environment


def archive_name(version: str = "", python: str = "") -> str:
    """Return the file name of the archive for this version of Triton and Python."""
    python = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"triton-{version or importlib.metadata.version('triton')}-py{python}.zip"


def cache_entry(digest: str) -> str:
    return base64.b32encode(bytes.fromhex(digest)).decode().rstrip("=")


def _write_kernel(file: zipfile.ZipFile, kernel: dict, triton_key: str, cache: Path) -> str:
    """Write one entry of the cache. Triton reads it only if the last file has the absolute paths of the others."""
    digest = hashlib.sha256(f"{triton_key}-{kernel['key']}".encode()).hexdigest()
    place = cache / cache_entry(digest)
    group = place / f"__grp__{kernel['name']}.json"
    if not group.exists():
        place.mkdir(exist_ok=True)
        paths = {f"{kernel['name']}.{kind}": place / f"{kernel['name']}.{kind}" for kind in KINDS}
        for name, path in paths.items():
            data = file.read(f"{kernel['folder']}/{name}")
            if name.endswith(".json"):
                data = json.dumps({**json.loads(data), "hash": digest}).encode()
            path.write_bytes(data)
        group.write_text(json.dumps({"child_paths": {name: str(path) for name, path in paths.items()}}))
    return place.name


def _write_module(file: zipfile.ZipFile, module: dict, platform_key: str, cache: Path) -> str:
    place = cache / cache_entry(hashlib.sha256((module["source"] + platform_key).encode()).hexdigest())
    path = place / (module["name"] + sysconfig.get_config_var("EXT_SUFFIX"))
    if not path.exists():
        data = file.read(f"{module['folder']}/{module['name']}.so")
        place.mkdir(exist_ok=True)
        path.write_bytes(data)
    return place.name


def new_entries(into: Path) -> list[str]:
    """Return the names of the kernels and modules compiled since `unpack`, one for each entry of Triton's cache."""
    known = Path(into) / "unpacked.json"
    keys = set(json.loads(known.read_text())) if known.exists() else set()
    places = [place for place in (Path(into) / "triton").glob("*") if place.is_dir() and place.name not in keys]
    names = [[*place.glob("__grp__*.json"), *place.glob("*.so")] for place in places]
    return sorted(found[0].name.removeprefix("__grp__").split(".")[0] for found in names if found)


# --- on a machine without a GPU ---------------------------------------------------------------------------------------


def build_extension(out: Path, archs: list[str]) -> str:
    """Build the extension with nvcc in separate folders, so that the checkout keeps its own build.

    For Hopper (90), build the fused products, too. They take minutes the first time.
    """
    options = {"AJEPA_CUDA_ARCHS": ";".join(archs), "AJEPA_CUDA": "1", "AJEPA_EXTENSION": "1"}
    options["AJEPA_HOPPER"] = "1" if "90" in archs else "0"
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", WORK / "objects", "--build-lib", WORK / "lib"]
    run(command, **options)
    (out / "extension").mkdir(parents=True, exist_ok=True)
    shutil.copy2(WORK / "lib/ajepa_kernels" / Path(LIBRARY).name, out / "extension")
    shutil.rmtree(out / "extension/hopper", ignore_errors=True)
    if "90" in archs:
        shutil.copytree(WORK / "lib/ajepa_kernels/_hopper", out / "extension/hopper")
    (out / "extension/made.json").write_text(json.dumps({"fingerprint": fingerprint(EXTENSION), "archs": archs}) + "\n")
    return f"for sm_{', sm_'.join(archs)}"


def download_wheels(out: Path, python: str) -> str:
    folder = out / "wheels"
    shutil.rmtree(folder, ignore_errors=True)

    def download(names: Iterable[str]) -> None:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", python, "-d", folder]
        run([sys.executable, "-m", "pip", "download", *options, *names])

    download(WHEELS)
    (pydantic,) = folder.glob("pydantic-*.whl")  # it needs its compiled core in one exact version
    with zipfile.ZipFile(pydantic) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = file.read(metadata).decode().splitlines()
    download(
        line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist:") and ";" not in line
    )
    return ", ".join(sorted(path.name.split("-")[0] for path in folder.glob("*.whl")))


def compile_kernels(out: Path, archs: list[str], python: str) -> str:
    """Compile the kernels in an environment that has the GPU machine's torch, Triton and version of Python."""
    home = WORK / f"python{python}"
    interpreter = home / "bin/python"
    if not (home / "installed").exists():
        run([_find_python(python), "-m", "venv", "--clear", home])
        run([interpreter, "-m", "pip", "install", "--quiet", TORCH, "numpy"])
        (home / "installed").touch()
    for old in out.glob("triton-*.zip"):
        old.unlink()
    path = os.pathsep.join(str(ROOT / name) for name in ("benchmarks", "kernels", "."))
    code = f"import pathlib, launches; launches.fill(pathlib.Path({str(out)!r}), {[int(arch) for arch in archs]})"
    output = run(
        [interpreter, "-W", "ignore", "-c", code], PYTHONPATH=path, CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="0"
    )
    return output.splitlines()[-1]


def _find_python(version: str) -> str:
    """Return a program `python<version>` that runs, from the PATH or from beside this Python's own installation."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), *Path(sys.base_prefix).parent.glob("*/bin")]
    for folder in folders:
        program = Path(folder, f"python{version}")
        if os.access(program, os.X_OK) and subprocess.run([program, "-c", ""], capture_output=True).returncode == 0:
            return str(program)
    raise RuntimeError(f"python{version} was not found")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "prebuilt", help="folder to write")
    parser.add_argument("--archs", nargs="+", default=["90"], help="10 x compute capability of the GPUs")
    parser.add_argument("--python", default="3.12", help="version of the GPU machine's Python")
    options = parser.parse_args()
    options.out = options.out.absolute()
    for name, make in {
        "extension": lambda: build_extension(options.out, options.archs),
        "wheels": lambda: download_wheels(options.out, options.python),
        "kernels": lambda: compile_kernels(options.out, options.archs, options.python),
    }.items():
        begin = time.perf_counter()
        print(f"{name}: {make()} ({time.perf_counter() - begin:.0f} s)", flush=True)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 2**20:.1f} MiB")
