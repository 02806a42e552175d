"""What nvidia-smi knows of the first GPU: it answers before torch is imported, and beside running kernels."""

import shutil
import subprocess


def query(*fields: str) -> dict[str, str]:
    """{field: value} of `nvidia-smi --query-gpu`; empty where nvidia-smi is absent or has no answer."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {}
    command = [smi, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().split(", ")
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}
