"""Asks nvidia-smi about the first GPU. It answers before torch is imported, and while kernels run."""

import shutil
import subprocess


def query(*fields: str) -> dict[str, str]:
    """Return {field: value} of `nvidia-smi --query-gpu`, which is empty if nvidia-smi is absent or has no answer."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {}
    command = [smi, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().split(", ")
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}
