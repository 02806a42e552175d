"""Files that are built ahead of time for a GPU machine, and their installation on that machine."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import prebuilt

from ajepa_kernels._triton import INTERPRET, triton

ROOT = Path(__file__).parents[2]
STEPS = ["extension", "wheels", "triton"]
needs_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")


def unpacked(folder: Path, into: Path, capability: int | None = 90, root: Path = ROOT) -> dict[str, dict]:
    steps = prebuilt.unpack(folder, into, capability, root)
    assert [step["what"] for step in steps] == STEPS and all(step["seconds"] >= 0 for step in steps)
    return {step["what"]: step for step in steps}


def test_prebuilt_needs_only_the_standard_library():
    code = "import prebuilt, sys; assert not {'torch', 'triton', 'numpy', 'packaging'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=ROOT / "benchmarks")


# --- the extension ----------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A checkout with sources, a setup.py that builds or fails, and a stand-in torch that refuses a library whose text
    begins with "broken"."""
    root = tmp_path / "checkout"
    (root / "csrc/hopper").mkdir(parents=True)
    (root / "csrc/ops.cpp").write_text("int main;")
    (root / "csrc/hopper/linear_gelu.cu").write_text("int main;")
    (root / prebuilt.LIBRARY).parent.mkdir(parents=True)
    (root / "setup.py").write_text(
        "import os, pathlib, sys\n"
        "if pathlib.Path('no-nvcc').exists(): sys.exit('nvcc was not found')\n"
        "assert os.environ['AJEPA_HOPPER'] == '0'\n"
        f"pathlib.Path({prebuilt.LIBRARY!r}).write_text('built for ' + os.environ['AJEPA_CUDA_ARCHS'])\n"
        "print('ajepa: installing without frills', file=sys.stderr)\n"
    )
    (root / "torch.py").write_text(
        "class ops:\n"
        "    def load_library(path):\n"
        "        if open(path).read().startswith('broken'): raise OSError('undefined symbol')\n"
    )
    folder = tmp_path / "prebuilt"
    (folder / "extension").mkdir(parents=True)
    (folder / "extension/_C.abi3.so").write_text("prebuilt")
    made = {"fingerprint": prebuilt.fingerprint(prebuilt.EXTENSION, root), "archs": ["80", "90"]}
    (folder / "extension/made.json").write_text(json.dumps(made))
    return root, folder


def extension(checkout, tmp_path, capability: int | None = 90) -> tuple[str, str]:
    """The note and the library's contents after unpacking."""
    root, folder = checkout
    note = unpacked(folder, tmp_path / "into", capability, root)["extension"]["note"]
    library = root / prebuilt.LIBRARY
    return note, library.read_text() if library.exists() else ""


def test_extension_of_these_sources_is_copied(checkout, tmp_path):
    (checkout[0] / prebuilt.LIBRARY).write_text("older")
    for _ in range(2):
        assert extension(checkout, tmp_path) == ("The prebuilt extension is in place.", "prebuilt")


def test_fused_products_are_copied_for_hopper(checkout, tmp_path):
    root, folder = checkout
    (folder / "extension/hopper").mkdir()
    (folder / "extension/hopper/liblinear_gelu.so").write_text("prebuilt")
    place = root / prebuilt.HOPPER
    place.mkdir()
    (place / "libremoved.so").write_text("older")
    extension(checkout, tmp_path)
    assert {path.name: path.read_text() for path in place.iterdir()} == {"liblinear_gelu.so": "prebuilt"}
    extension(checkout, tmp_path, 80)
    assert not place.exists()
    before = prebuilt.fingerprint(prebuilt.EXTENSION, root)
    (root / "csrc/hopper/linear_gelu.cu").write_text("int niam;")
    assert prebuilt.fingerprint(prebuilt.EXTENSION, root) != before


@pytest.mark.parametrize("case", ["changed", "other GPU", "absent", "torn", "broken"])
def test_extension_that_does_not_fit_is_built(checkout, tmp_path, case):
    root, folder = checkout
    capability, reason = {
        "changed": (90, "its sources have changed"), "other GPU": (100, "for sm_80, sm_90 and this GPU is sm_100"),
        "absent": (90, "No such file"), "torn": (90, "Unterminated string"), "broken": (90, "undefined symbol"),
    }[case]  # fmt: skip
    if case == "changed":
        (root / "csrc/ops.cpp").write_text("int niam;")
    elif case == "absent":
        shutil.rmtree(folder)
    elif case == "torn":
        (folder / "extension/made.json").write_text('{"fing')
    elif case == "broken":
        (folder / "extension/_C.abi3.so").write_text("broken")
    note, library = extension(checkout, tmp_path, capability)
    assert library == f"built for {capability}"
    assert reason in note and "Building it here took" in note and "installing without frills" in note, note


def test_extension_that_cannot_be_built(checkout, tmp_path):
    root, folder = checkout
    shutil.rmtree(folder)
    (root / "no-nvcc").touch()
    note, library = extension(checkout, tmp_path)
    assert "failed, too" in note and "nvcc was not found" in note and not library


def test_a_build_that_hangs_is_killed_with_what_it_started(checkout, tmp_path):
    root, folder = checkout
    shutil.rmtree(folder)
    (root / "setup.py").write_text("import subprocess\nsubprocess.run(['sh', '-c', 'sleep 2; touch outlived'])\n")
    steps = prebuilt.unpack(folder, tmp_path / "into", 90, root, seconds=0.5)
    assert "took more than 0.5 s" in steps[0]["note"]
    time.sleep(2)
    assert not (root / "outlived").exists()


def test_without_a_gpu_nothing_is_built(checkout, tmp_path):
    assert extension(checkout, tmp_path, None) == ("There is no extension.", "")
    (checkout[0] / prebuilt.LIBRARY).write_text("older")
    assert extension(checkout, tmp_path, None) == ("There is no GPU: the extension is used as it is.", "older")


# --- wheels -----------------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, module: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{module}.py", "answer = 42\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{module}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def test_wheels_that_are_missing_are_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wheel(tmp_path / "prebuilt/wheels", "present", "pytest")
    wheel(tmp_path / "prebuilt/wheels", "absent", "absent_tiny_module")
    into = tmp_path / "into"
    step = unpacked(Path("prebuilt"), Path("into"), None)["wheels"]
    assert step["note"] == "1 of 2 packages were there; installed: absent."
    path = step["environment"]["PYTHONPATH"]
    code = "import absent_tiny_module, pytest; assert pytest.__version__ != '1.0'; print(absent_tiny_module.answer)"
    assert subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}) == b"42\n"
    again = unpacked(tmp_path / "prebuilt", into, None)["wheels"]
    assert again["note"] == "2 of 2 packages were there; installed: none." and again["environment"] == {
        "PYTHONPATH": path
    }


def test_a_file_that_is_not_a_wheel(tmp_path):
    (tmp_path / "prebuilt/wheels").mkdir(parents=True)
    (tmp_path / "prebuilt/wheels/torn-1.0-py3-none-any.whl").write_text("no wheel")
    step = unpacked(tmp_path / "prebuilt", tmp_path / "into", None)["wheels"]
    assert step["note"] == "wheels could not be unpacked: BadZipFile: File is not a zip file"


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive of one kernel and one C module, for a Triton and Python whose keys are set to "here"."""
    made = {"archs": [90], "triton_key": "here", "kernels": [], "modules": []}
    made["fingerprint"] = prebuilt.fingerprint(prebuilt.KERNELS)
    made["kernels"].append({"folder": "A", "name": "_some_kernel", "key": "source-options"})
    made["modules"].append({"folder": "B", "name": "__triton_launcher", "source": "int x;"})
    path = tmp_path / "prebuilt" / prebuilt.archive_name()
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("A/_some_kernel.cubin", b"\x7fELF")
        file.writestr("A/_some_kernel.json", json.dumps({"hash": "of another machine", "shared": 7}))
        file.writestr("B/__triton_launcher.so", b"launches")
        file.writestr("made.json", json.dumps(made))
    run = prebuilt.run
    machine = json.dumps(["here", "x86_64", "/bin/ptxas"])
    monkeypatch.setattr(
        prebuilt, "run", lambda command, *a, **k: machine if prebuilt.MACHINE in command else run(command, *a, **k)
    )
    return path


def kernels(archive: Path, into: Path, capability: int | None = 90) -> tuple[str, dict]:
    note, environment = prebuilt._place_kernels(archive.parent, into / "triton", capability)
    return note, environment


@needs_triton
def test_kernels_are_put_where_triton_looks(archive, tmp_path):
    into = tmp_path / "into"
    cache = into / "triton"
    note, environment = kernels(archive, into)
    assert note == "1 kernels and 1 C modules are in place."
    assert environment == {"TRITON_CACHE_DIR": str(cache), "TRITON_PTXAS_PATH": "/bin/ptxas"}
    digest = hashlib.sha256(b"here-source-options").hexdigest()
    place = cache / prebuilt.cache_entry(digest)
    paths = json.loads((place / "__grp___some_kernel.json").read_text())["child_paths"]
    assert paths == {name: str(place / name) for name in ("_some_kernel.cubin", "_some_kernel.json")}
    assert Path(paths["_some_kernel.cubin"]).read_bytes() == b"\x7fELF"
    assert json.loads(Path(paths["_some_kernel.json"]).read_text()) == {"hash": digest, "shared": 7}
    (module,) = cache.glob("*/__triton_launcher.*.so")
    assert module.parent.name == prebuilt.cache_entry(hashlib.sha256(b"int x;x86_64").hexdigest())
    assert prebuilt.new_entries(into) == []
    (place / "_some_kernel.cubin").write_text("kept")
    kernels(archive, into)
    assert (place / "_some_kernel.cubin").read_text() == "kept"


@needs_triton
def test_what_is_compiled_afterwards_is_counted(archive, tmp_path):
    assert prebuilt.new_entries(tmp_path / "into") == []
    kernels(archive, tmp_path / "into")
    for name in ("C/__grp___other_kernel.json", "D/cuda_utils.cpython.so", "E/tmp.pid_1/torn"):
        path = tmp_path / "into/triton" / name
        path.parent.mkdir(parents=True)
        path.touch()
    assert prebuilt.new_entries(tmp_path / "into") == ["_other_kernel", "cuda_utils"]


@needs_triton
def test_another_build_of_triton_finds_its_own_keys(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(prebuilt, "run", lambda *a, **k: json.dumps(["there", "x86_64", "/bin/ptxas"]))
    assert "another build of the same version" in kernels(archive, tmp_path / "into")[0]
    digest = hashlib.sha256(b"there-source-options").hexdigest()
    note, _ = prebuilt._place_kernels(archive.parent, tmp_path / "into/triton", 90, root=tmp_path)
    assert "sources have changed since" in note
    assert (tmp_path / "into/triton" / prebuilt.cache_entry(digest)).is_dir()


@needs_triton
@pytest.mark.parametrize("damage", ["cut", "flipped", "no archive"])
def test_damaged_archive(archive, tmp_path, damage):
    data = bytearray(archive.read_bytes())
    data[40] ^= 255  # within the compressed bytes of the first file
    archive.write_bytes({"cut": data[: len(data) // 2], "flipped": bytes(data), "no archive": b"PK"}[damage])
    step = unpacked(archive.parent, tmp_path / "into", 90, tmp_path)["triton"]
    assert step["note"].startswith(f"Kernels will be compiled here: {archive.name} is damaged (")
    assert step["environment"] == {"TRITON_CACHE_DIR": str(tmp_path / "into/triton")}


@needs_triton
def test_kernels_that_do_not_fit(archive, tmp_path):
    into = tmp_path / "into"
    assert kernels(archive, into, 80)[0] == "The prebuilt kernels are for sm_90; others will be compiled here."
    assert kernels(archive, into, None) == ("There is no GPU to compile kernels for.", {})
    archive.rename(archive.with_name("triton-0.1-py2.7.zip"))
    note, environment = kernels(archive, into)
    assert f"{archive.name} is wanted" in note and "holds triton-0.1-py2.7.zip" in note
    assert environment == {"TRITON_CACHE_DIR": str(into / "triton")}


def test_missing_folder(tmp_path):
    for step in unpacked(tmp_path / "nothing", tmp_path / "into", 90, tmp_path).values():
        assert step["note"].endswith(".") or "failed" in step["note"]
        assert "PYTHONPATH" not in step["environment"]


CASE = """
import json, pathlib, sys, torch, launches, ajepa_kernels
assert ajepa_kernels.__file__.startswith(sys.argv[2]), ajepa_kernels.__file__
targets, index = torch.ones(8, 64), torch.arange(8)
cases = [lambda rows=rows: ajepa_kernels.latent_l2_loss(torch.ones(rows, 64), targets, index[:rows]) for rows in (8, 6)]
print(json.dumps(launches.fill(pathlib.Path(sys.argv[1]), [80, 90], cases)))
"""


@pytest.mark.skipif(triton is None or INTERPRET, reason="needs Triton, outside its interpreter")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_round_trip(tmp_path):
    """Kernels compiled for two GPU architectures are found by another checkout with its own cache, for any rows."""

    def fill(out: Path, root: Path, **environment: str) -> dict:
        path = os.pathsep.join(str(root / name) for name in ("benchmarks", "kernels", "."))
        variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", CASE, out, root], env=variables | environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    made = fill(tmp_path / "prebuilt", ROOT, TRITON_CACHE_DIR=str(tmp_path / "first"))
    assert (made["found"], made["compiled"]) == (0, 2)
    compiles_modules = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)  # later ones read them from a file
    assert made["modules"] >= compiles_modules
    shutil.rmtree(tmp_path / "first")
    for name in ("benchmarks", "kernels", "ajepa"):
        shutil.copytree(ROOT / name, tmp_path / "elsewhere" / name, ignore=shutil.ignore_patterns("*.so", "results"))
    note, environment = prebuilt._place_kernels(tmp_path / "prebuilt", tmp_path / "into/triton", 90)
    assert note == f"2 kernels and {made['modules']} C modules are in place."
    found = fill(tmp_path / "again", tmp_path / "elsewhere", **environment)
    assert found == made | {"found": 2, "compiled": 0}
    assert prebuilt.new_entries(tmp_path / "into") == ([] if compiles_modules else ["cuda_utils"])


@pytest.mark.parametrize("runs", [True, False])
def test_kernels_that_do_not_run_are_thrown_away(tmp_path, monkeypatch, runs):
    """A test process on the GPU decides whether kernels run; here it is replaced by one that succeeds or fails."""
    cache = tmp_path / "into" / "triton"

    def place(folder, cache, capability, root):
        (cache / "KEY").mkdir(parents=True)
        return "1 kernel is in place.", {"TRITON_CACHE_DIR": str(cache), "TRITON_PTXAS_PATH": "ptxas"}

    monkeypatch.setattr(prebuilt, "_place_kernels", place)
    monkeypatch.setattr(prebuilt, "PROOF", "" if runs else "raise SystemExit('the driver is too old')")
    step = unpacked(tmp_path / "nothing", tmp_path / "into", root=tmp_path)["triton"]
    assert step["environment"].pop("TRITON_CACHE_DIR") == str(cache)
    if runs:
        assert step["note"] == "1 kernel is in place." and (cache / "KEY").exists() and step["environment"]
    else:
        assert "do not run (" in step["note"] and "the driver is too old" in step["note"]
        assert not list(cache.iterdir()) and not step["environment"]
