"""Runs the kernels' tests in Triton's interpreter on CPU tensors, in a separate process.

Triton decides whether to interpret a kernel when the kernel is defined, and such a process cannot compile kernels.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from ajepa_kernels._triton import triton

TESTS = [  # the files of one process
    "kernels_package masked_attention",
    "attention_rotary attention_causal attention_head_dims",
    "latent_l2_loss adamw_ema",
    "from_model compatibility adopt",
    "add_layer_norm scaled_residual rms_norm",
    "bias_gelu gelu_mlp swiglu modules fp8",
    "augment_mel segment_pool sigreg",
    "engine_interpreted",
]


# With these versions, a loop whose bounds are not constants raises an error in the interpreter.
BROKEN = triton is not None and triton.__version__ < "3.7" and numpy.__version__ >= "2.4"


@pytest.mark.skipif(triton is None, reason="triton is not installed")
@pytest.mark.skipif(BROKEN, reason="the interpreter of triton 3.6 does not run with numpy 2.4")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the compiled kernels are tested instead")
@pytest.mark.parametrize("names", TESTS)
def test_interpreted(names):
    files = [str(file) for name in names.split() for file in Path(__file__).parents[1].rglob(f"test_{name}.py")]
    assert len(files) == len(names.split())
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "-k", "not reference"]
    done = subprocess.run(
        [*command, *files], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
