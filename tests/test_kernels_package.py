"""What holds for the package of operations as a whole."""

import subprocess
import sys
import warnings

import pytest
import torch
from oracle import CAN_LAUNCH, DEVICE

import ajepa_kernels
from ajepa_kernels import _triton


def test_imports_without_triton():
    """Neither a GPU, nor a compiler, nor Triton is needed to import it and to use the plain definitions."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, ajepa_kernels as k\n"
        "assert 'ajepa' not in sys.modules and not k.warmup(device='cpu')\n"
        "cu = torch.tensor([0, 2, 5])\n"
        "assert k.masked_attention(torch.ones(5, 3, 2, 8), cu_seqlens=cu, max_seqlen=3).shape == (5, 2, 8)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_auto_says_once_that_it_falls_back(monkeypatch):
    """On a GPU that a kernel cannot serve, auto says so, once for each reason; on a CPU there is nothing to say."""

    class OnGPU:
        is_cuda = True

    monkeypatch.setattr(_triton, "cannot_launch", lambda x: "")
    _triton._announce.cache_clear()
    with pytest.warns(
        UserWarning, match="ajepa_kernels.some_op runs as plain PyTorch on this GPU: no kernel for D = 3"
    ):
        assert not _triton.use_triton("some_op", "auto", OnGPU(), "no kernel for D = 3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _triton.use_triton("some_op", "auto", OnGPU(), "no kernel for D = 3")
        assert _triton.use_triton("some_op", "auto", OnGPU())
        assert not _triton.use_triton("some_op", "auto", torch.empty(0))


@pytest.mark.skipif(not CAN_LAUNCH, reason="there is nothing to compile for")
def test_warmup_runs_every_operation():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    assert ajepa_kernels.warmup(device=DEVICE, dtype=dtype, heads=[(2, 32)], max_seqlens=[16, 33], widths=[32])
