"""Writes `ajepa_kernels` as builds for the Hugging Face Kernel Hub: `python kernels/hub_layout.py OUT`.

OUT/build/torch-cpu and OUT/build/torch-cuda hold the Python and Triton part of the package, which is the same for every
version of torch and Python. The library `kernels` loads such a folder under a name of its own, beside other versions
and an installed `ajepa_kernels`. The written modules therefore import each other relatively, and register their
operators in a namespace of their own. The C++ and CUDA part is left out: `log_mel` and `resample` then run as plain
PyTorch.

The layout is that of `kernels` 0.17: https://huggingface.co/docs/kernels.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

KERNELS = Path(__file__).parent
PACKAGE = KERNELS / "ajepa_kernels"
NAME = "ajepa-kernels"
VERSION = 1  # of the Kernel Hub, which counts releases that break an interface
BACKENDS = ("cpu", "cuda")
OPERATORS = re.compile(r'\btorch\.ops\.ajepa\b|(?<=Library\(")ajepa(?=")|(?<=")ajepa(?=::)')


def portable(source: str, depth: int, namespace: str) -> str:
    """The source of a module `depth` folders below the package, without the package's name and operator namespace."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.startswith("ajepa_kernels") for alias in node.names):
            raise ValueError(f"line {node.lineno}: write `from ajepa_kernels import ...`, which can be made relative")
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ajepa_kernels":
            written = re.compile(r"from ajepa_kernels\.?")
            line = node.lineno - 1
            lines[line] = written.sub("from " + "." * (depth + 1), lines[line], count=1)
    return OPERATORS.sub(lambda found: found[0].replace("ajepa", namespace), "".join(lines))


def write(out: Path) -> list[Path]:
    """Writes the builds into `out` and returns their folders. A folder of an earlier call is replaced."""
    sources = {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    known = hashlib.sha256("".join(f"{path}\0{text}\0" for path, text in sources.items()).encode()).hexdigest()[:7]
    folders = []
    for backend in BACKENDS:
        folder, unique = out / "build" / f"torch-{backend}", f"_ajepa_kernels_{backend}_{known}"
        shutil.rmtree(folder, ignore_errors=True)
        for path, text in sources.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(portable(text, len(path.parts) - 1, unique), encoding="utf-8")
        digests = {
            path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
            for path in sorted(folder.rglob("*.py"))
        }
        metadata = {
            "name": NAME, "id": unique, "version": VERSION, "license": "Apache-2.0", "python-depends": [],
            "backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": digests},
        }  # fmt: skip
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        folders.append(folder)
    card = "---\nlibrary_name: kernels\nlicense: apache-2.0\ntags:\n- kernels\n---\n\n"
    (out / "README.md").write_text(card + (KERNELS / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copy(KERNELS / "LICENSE", out)
    return folders


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write ajepa_kernels as builds for the Hugging Face Kernel Hub.")
    parser.add_argument("out", type=Path, help="folder to write")
    for folder in write(parser.parse_args().out):
        print(folder)
