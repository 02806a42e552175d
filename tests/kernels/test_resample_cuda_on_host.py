"""The source of the CUDA kernel, run on the CPU with one fiber per CUDA thread, and the compiler's resource report."""

import ctypes
import importlib
import shutil

import pytest
import torch
from host_build import build_on_host, ptxas_report

from ajepa_kernels import input_span, resample_reference, resampled_length

module = importlib.import_module("ajepa_kernels.resample")  # the package's attribute of this name is the function


class Resample(ctypes.Structure):
    """The struct Resample of csrc/resample.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pcm", "lengths", "rows", "twiddles", "response", "positions", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "samples", "count", "first", "offset", "up", "down", "half")),
        *((name, ctypes.c_int) for name in ("channels", "width", "phases", "bins", "size_in", "size_out", "hop")),
        ("radices_in", ctypes.c_uint64), ("radices_out", ctypes.c_uint64),
        *((name, ctypes.c_bool) for name in ("interpolated", "pcm_int16", "out_int16")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """`resample` computed by the CUDA source, with the same arguments and result."""
    run = build_on_host("resample", tmp_path_factory.mktemp("cuda_on_host")).resample_on_host

    def op(pcm, lengths, rows, twiddles, response, positions, out, *method):
        up, down, half, phases, interpolated, size_in, *_, first, offset = method
        assert size_in == 0  # the CUDA kernel uses the direct method only
        out.fill_(-12345 if out.dtype == torch.int16 else torch.nan)  # an element that is not written fails
        tensors = {"pcm": pcm, "lengths": lengths, "rows": rows, "out": out}
        batch, samples, channels = pcm.shape
        run(ctypes.byref(Resample(
            **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
            batch=batch, samples=samples, channels=channels, count=out.shape[1], first=first, offset=offset, up=up,
            down=down, half=half, width=rows.shape[0] if rows.dim() == 2 else 0, phases=phases,
            interpolated=interpolated, pcm_int16=pcm.dtype == torch.int16, out_int16=out.dtype == torch.int16,
        )))  # fmt: skip

    def call(pcm, from_rate, to_rate, *, lengths=None, first=0, count=None, offset=0, downmix=False, dtype=None):
        if count is None:
            count = resampled_length(offset + pcm.shape[-1 - downmix], from_rate, to_rate) - first
        dtype = dtype or pcm.dtype
        return module._resample_fused(
            pcm, from_rate, to_rate, lengths, first, count, offset, downmix, dtype, op, cuda=True
        )

    return call


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.2


@pytest.mark.parametrize(
    ("from_rate", "to_rate", "samples"),
    [
        (48000, 16000, 6001),
        (44100, 32000, 3000),
        (8000, 16000, 900),
        (16000, 44100, 700),
        (44100, 44099, 900),  # interpolated taps
        (96000, 3001, 9001),  # the same with a long filter
        (192000, 3000, 20_001),  # the samples of a run do not fit into shared memory
        (16000, 16000, 700),
    ],
)
def test_rates(kernel, from_rate, to_rate, samples):
    x = noise(2, samples)
    exact = resample_reference(x, from_rate, to_rate, compute=torch.float64)
    assert (kernel(x, from_rate, to_rate) - exact).abs().max() < 3e-6


@pytest.mark.parametrize("pair", [(48000, 16000), (11, 13), (44100, 44099), (16000, 16000)])
def test_ragged_slices_and_dtypes(kernel, pair):
    """Covers rows that end early, a slice of the outputs, int16 input and output, and several channels."""
    pcm = (noise(3, 2400, 3) * 60000).clamp(-32768, 32767).to(torch.int16)
    lengths = torch.tensor([2400, 700, 0])
    first, count = resampled_length(900, *pair), 301
    low, high = input_span(first, count, *pair)
    low, high = max(low, 0), min(high, 2400)
    piece, kept = pcm[:, low:high], lengths.clamp_max(high)
    common = {"lengths": kept, "first": first, "count": count, "offset": low, "downmix": True}
    exact = resample_reference(piece, *pair, dtype=torch.float32, compute=torch.float64, **common)
    out = kernel(piece, *pair, dtype=torch.float32, **common)
    assert (out - exact).abs().max() < 3e-6 and not out[2].any()
    rounded = kernel(piece, *pair, **common)
    assert rounded.dtype == torch.int16 and (rounded - (exact * 32768).clamp(-32768, 32767)).abs().max() < 0.55
    out = kernel(piece.float().div(32768), *pair, **common)
    assert (out - exact).abs().max() < 3e-6


def test_rounding(kernel):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 40000.0, -40000.0, torch.nan]) / 32768
    out = kernel(x, 8000, 8000, dtype=torch.int16)
    assert out.tolist() == [0, 2, 2, 0, -2, 32767, -32768, 0]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.slow
def test_no_spills(tmp_path):
    """For the architecture in AJEPA_TEST_ARCH (default 90), ptxas reports no spills, no stack, and few enough registers
    for four blocks of 256 threads."""
    kernels = ptxas_report("resample", tmp_path)
    assert len([name for name, *_ in kernels if "resample_fwd_kernel" in name]) == 16
    for name, stack, spills, registers in kernels:
        assert (stack, spills) == ("0", "0") and int(registers) <= 64, f"{name}: {stack=} {spills=} {registers=}"
