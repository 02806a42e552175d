"""The source of the CUDA kernel, run on the CPU with one fiber per CUDA thread, and the compiler's resource report."""

import ctypes
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from host_build import build_on_host, ptxas_report
from log_mel_cases import (
    PRESETS,
    SIGNALS,
    assert_exact,
    assert_exact_mel,
    clips,
    quiet_about_empty_bands,  # noqa: F401
    recordings,
    signal_case,
)

from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec, log_mel, log_mel_reference
from ajepa_kernels.log_mel import CUDA_SIZES, _log_mel_fused

SIZES = sorted(CUDA_SIZES)


class LogMel(ctypes.Structure):
    """The struct LogMel of csrc/log_mel.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("pcm", "lengths", "window", "weights", "intervals")),
        *((name, ctypes.c_void_p) for name in ("twiddles", "stats", "peaks", "out")),
        ("batch", ctypes.c_int64), ("samples", ctypes.c_int64),
        *((name, ctypes.c_int) for name in (
            "n_fft", "win_length", "hop_length", "first_sample", "frame_bias", "frame_add", "min_samples",
            "n_mels", "n_intervals", "n_frames", "patch_mels", "patch_frames", "patches", "patch_rows",
            "patch_mels_inverse", "power", "waveform_norm", "n_samples",
        )),
        *((name, ctypes.c_bool) for name in ("is_int16", "remove_dc", "take_log")),
        ("edge", ctypes.c_int), ("dtype", ctypes.c_int),
        *((name, ctypes.c_float) for name in (
            "preemphasis", "scale", "floor", "log_scale", "log_shift", "top", "factor", "pad", "silence",
        )),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """`log_mel` computed by the CUDA source, with the same arguments and result."""
    run = build_on_host("log_mel", tmp_path_factory.mktemp("cuda_on_host")).log_mel_on_host

    def op(pcm, lengths, window, weights, intervals, twiddles, out, **scalars):
        batch, patch_rows, patches, patch_mels, patch_frames = out.shape
        out.fill_(torch.nan)  # an element that is not written fails
        stats = torch.empty(batch, 2) if scalars["waveform_norm"] else None
        peaks = torch.empty(batch) if scalars["top"] >= 0 else None
        tensors = {"pcm": pcm, "lengths": lengths, "window": window, "weights": weights, "intervals": intervals,
                   "twiddles": twiddles, "stats": stats, "peaks": peaks, "out": out}  # fmt: skip
        described = LogMel(
            **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
            **scalars, batch=batch, samples=pcm.shape[1], win_length=len(window), n_mels=patch_rows * patch_mels,
            n_intervals=len(intervals), patch_mels=patch_mels, patch_frames=patch_frames, patches=patches,
            patch_rows=patch_rows, patch_mels_inverse=65535 // patch_mels + 1, is_int16=pcm.dtype == torch.int16,
            scale=1 / 32768 if pcm.dtype == torch.int16 else 1.0,
            silence=scalars["take_log"] and math.log(scalars["floor"]) * scalars["log_scale"] + scalars["log_shift"],
            dtype=[torch.float32, torch.float16, torch.bfloat16].index(out.dtype),
        )  # fmt: skip
        assert run(ctypes.byref(described)) == 0

    def call(pcm, spec, *, lengths=None, dtype=torch.float32, layout="patches"):
        return _log_mel_fused(pcm, spec, lengths, dtype, layout, op)

    return call


@pytest.mark.parametrize("n_fft", SIZES)
@pytest.mark.parametrize("convention", ["kaldi", "torchaudio"])
def test_every_size(kernel, n_fft, convention):
    """The window is shorter than the transform, the frames do not fill a chunk, and samples are int16 or float32."""
    spec = LogMelSpec(
        n_fft=n_fft, win_length=n_fft - n_fft // 5, hop_length=n_fft // 3, n_mels=48, convention=convention,
        floor=1e-7, waveform_norm="mean",
    )  # fmt: skip
    pcm = clips(n_fft * 5 + 77, batch=1)
    assert_exact(kernel(pcm, spec), pcm, spec)
    assert_exact(kernel(pcm.float() / 32768, spec), pcm, spec)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("audio-jepa", {"n_frames": 32}),
        ("a-jepa", {"n_frames": 32}),
        ("audio-jepa-16k", {"n_frames": 16, "power": 1}),
        ("a-jepa", {"n_frames": 20, "snip_edges": False, "patch": (8, 7), "n_mels": 256}),
        ("audio-jepa-16k", {"n_frames": None, "top_db": 30.0, "waveform_norm": "peak", "center": False}),
        ("whisper", {"n_frames": 40}),
        ("whisper", {"n_frames": None, "n_samples": 4800, "pad_value": -9.0, "scale": 8.0}),
        ("audio-jepa-16k", {"n_frames": 16, "pad_mode": "constant", "pad_value": 2.5, "window": "blackman"}),
        ("audio-jepa", {"n_frames": 24, "n_samples": 25_000, "snip_edges": False, "pad_value": -2.0}),
    ],
)
def test_front_ends(kernel, name, changes):
    spec = replace(LOG_MEL_PRESETS[name], **changes)
    pcm = clips(spec.n_fft + 9 * spec.hop_length, batch=2)
    lengths = torch.tensor([pcm.shape[1], spec.n_fft + 3 * spec.hop_length + 1])
    for layout in ("patches", "spectrogram"):
        out = kernel(pcm, spec, lengths=lengths, layout=layout)
        assert_exact(out, pcm, spec, lengths=lengths, layout=layout)
    assert_exact_mel(kernel(pcm, spec, lengths=lengths, layout="mel"), pcm, spec, lengths=lengths)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(
            kernel(pcm, spec, lengths=lengths, dtype=dtype), kernel(pcm, spec, lengths=lengths).to(dtype)
        )


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_signals(kernel, name, signal):
    pcm, spec = signal_case(name, signal)
    assert_exact(kernel(pcm, spec), pcm, spec)


@pytest.mark.parametrize("name", PRESETS)
def test_recordings(kernel, audio_dir, name):
    spec, pcm = replace(LOG_MEL_PRESETS[name], n_frames=None, n_samples=None), recordings(audio_dir, each=6_000)
    assert_exact(kernel(pcm, spec), pcm, spec)


@pytest.mark.parametrize("n_fft", [128, 400, 512, 640, 1200, 4096])
def test_windows(kernel, n_fft):
    """A thread's samples depend on the window: all of them, 13 of its 16 pairs, fewer, or an odd number in all."""
    for win_length in (n_fft, n_fft - 1, 25 * n_fft // 32, n_fft // 2 + 3, 3):
        spec = LogMelSpec(n_fft=n_fft, win_length=win_length, hop_length=n_fft // 2, n_mels=32, floor=1e-7)
        pcm = clips(n_fft * 4, batch=1)
        assert_exact(kernel(pcm, spec), pcm, spec)


def test_noise_of_one_step_on_a_large_offset(kernel):
    """Each frame's mean is subtracted before the pre-emphasis, whose rounding of a large mean would drown the noise."""
    spec = replace(LOG_MEL_PRESETS["audio-jepa"], n_frames=None, floor=1e-20, waveform_norm="none")
    pcm = SIGNALS["least noise"](8000).to(torch.int16)[None]
    quiet, lifted = (kernel(x, spec, layout="spectrogram") for x in (pcm, pcm + 30_000))
    # The rounding of the mean itself remains in the lowest bands.
    torch.testing.assert_close(lifted[:, 3:], quiet[:, 3:], rtol=0, atol=2e-4)


def test_quiet_frame_beside_a_loud_one(kernel):
    """Two frames share a warp and their powers lie side by side, here 96 dB apart. Neither may affect the other."""
    spec = LogMelSpec(win_length=512, hop_length=512, n_mels=40, floor=1e-20)
    g = torch.Generator().manual_seed(0)
    loud, quiet = (torch.randn(512, generator=g, dtype=torch.float64) * level for level in (0.3, 1e-5))
    for frames in ((loud, quiet), (quiet, loud), (loud, 0 * loud), (0 * loud, loud), (0 * loud, 0 * loud)):
        x = torch.cat(frames)[None].float()
        exact = log_mel_reference(x.double(), spec, layout="spectrogram")
        assert (kernel(x, spec, layout="spectrogram") - exact).abs().max() < 2e-3


def test_equals_the_cpu_kernel(kernel):
    spec = replace(LOG_MEL_PRESETS["a-jepa"], n_frames=48)
    pcm = clips(8000)
    torch.testing.assert_close(kernel(pcm, spec), log_mel(pcm, spec), rtol=0, atol=1e-3)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.slow
def test_no_spills(tmp_path):
    """For the architecture in AJEPA_TEST_ARCH (default 90), ptxas reports no spills, no stack, and few enough registers
    for 1024 threads (768 with 20 points per thread, 640 with 25)."""
    kernels = ptxas_report("log_mel", tmp_path)
    assert len([name for name, *_ in kernels if "log_mel_fwd_kernel" in name]) == 2 * len(SIZES)
    for name, stack, spills, registers in kernels:
        points = int(found[1]) if (found := re.search(r"ILi(\d+)E", name)) else 0
        most = {400: 80, 640: 80, 1200: 96}.get(points, 64)
        assert (stack, spills) == ("0", "0") and int(registers) <= most, f"{name}: {stack=} {spills=} {registers=}"
