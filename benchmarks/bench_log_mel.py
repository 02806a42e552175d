"""Benchmark log_mel against torchaudio, librosa, kaldi-native-fbank, DALI and a bare rfft of the same frames.

A time is milliseconds per batch. A CPU is timed with one thread and with all its threads. On a CPU it
is compared with the bare rfft (MKL), which does less work: no framing, window, mel filters or logarithm. The floor on a
GPU is the larger of the least times that the memory and the fp32 units need.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ceilings import SECONDS, copy_bytes_per_ms
from conftest import left_out
from records import DEVICE, QUICK

from ajepa.model._torchaudio import import_torchaudio
from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec, log_mel

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # appended: tests/ has a conftest.py as well
from log_mel_cases import assert_exact, clips

pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = 256 if DEVICE == "cuda" else 2 if QUICK else 8
THREADS = sorted({1, torch.get_num_threads()}) if DEVICE == "cpu" and not QUICK else [1]
RECIPES = ["audio-jepa", "a-jepa"]
CASES = {name: LOG_MEL_PRESETS[name] for name in (*RECIPES, "audio-jepa-16k", "librosa")} | {
    # Whisper's transform on clips of 10 s without its padding to 30 s, and 25 ms at 48 kHz: 200 and 600 complex points.
    "whisper, 400 points": replace(LOG_MEL_PRESETS["whisper"], n_samples=None, n_frames=None),
    "1200 points": replace(LOG_MEL_PRESETS["clap"], n_fft=1200, win_length=1200),
    "1024 points": LogMelSpec(  # the front end of PANNs (arXiv 1912.10211)
        sample_rate=32000, n_fft=1024, win_length=1024, hop_length=320, n_mels=64, f_min=50.0, f_max=14000.0,
        convention="torchaudio", mel_scale="slaney", mel_norm="slaney", log="db",
    ),
}  # fmt: skip
OUTSIDE_GRAPHS = ("librosa", "kaldi_native_fbank", "nvidia.dali")  # they work on the CPU or on streams of their own


def torchaudio_fbank(x: torch.Tensor, spec: LogMelSpec) -> Callable[[], object]:
    kaldi, ms = import_torchaudio().compliance.kaldi, 1000 / spec.sample_rate
    return lambda: [
        kaldi.fbank(
            clip[None], sample_frequency=spec.sample_rate, frame_length=(spec.win_length + 1e-3) * ms,
            frame_shift=(spec.hop_length + 1e-3) * ms, num_mel_bins=spec.n_mels, low_freq=spec.f_min,
            high_freq=spec.f_max or 0, window_type="hanning",
        )
        for clip in x
    ]  # fmt: skip


def mel_spectrogram(x: torch.Tensor, spec: LogMelSpec) -> Callable[[], object]:
    transforms = import_torchaudio().transforms
    mel = transforms.MelSpectrogram(
        spec.sample_rate, spec.n_fft, spec.win_length, spec.hop_length, f_min=spec.f_min, f_max=spec.f_max,
        n_mels=spec.n_mels, mel_scale=spec.mel_scale, norm=spec.mel_norm,
    ).to(x.device)  # fmt: skip
    return lambda: mel(x)  # without the logarithm, which makes this peer faster


def librosa_mel(x: torch.Tensor, spec: LogMelSpec) -> Callable[[], object]:
    import librosa
    from threadpoolctl import threadpool_limits

    clips = x.cpu().numpy()

    @threadpool_limits.wrap(1, "blas")  # other threads would spin after its product and slow what is timed next
    def run():
        return librosa.feature.melspectrogram(
            y=clips, sr=spec.sample_rate, n_fft=spec.n_fft, win_length=spec.win_length, hop_length=spec.hop_length,
            n_mels=spec.n_mels, fmin=spec.f_min, fmax=spec.f_max,
        )  # fmt: skip

    return run


def kaldi_native(x: torch.Tensor, spec: LogMelSpec) -> Callable[[], object]:
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    frame = options.frame_opts
    frame.samp_freq, frame.window_type, frame.dither = spec.sample_rate, "hanning", 0
    frame.frame_length_ms, frame.frame_shift_ms = (
        (n + 1e-3) * 1000 / spec.sample_rate for n in (spec.win_length, spec.hop_length)
    )
    options.mel_opts.num_bins, options.mel_opts.low_freq = spec.n_mels, spec.f_min
    options.mel_opts.high_freq = spec.f_max or 0
    knf.OnlineFbank(options)  # raises an error if a mel band contains no FFT bin
    batch = x.cpu().numpy()

    def run():
        out = []
        for clip in batch:
            fbank = knf.OnlineFbank(options)
            fbank.accept_waveform(spec.sample_rate, clip)
            fbank.input_finished()
            out.append([fbank.get_frame(i) for i in range(fbank.num_frames_ready)])
        return out

    return run


def dali_mel(x: torch.Tensor, spec: LogMelSpec) -> Callable[[], object]:
    from nvidia.dali import fn, pipeline_def

    batch = list(x if DEVICE == "cuda" else x.numpy())

    @pipeline_def(
        batch_size=len(batch), num_threads=torch.get_num_threads(), device_id=0 if DEVICE == "cuda" else None,
        exec_async=False, exec_pipelined=False, prefetch_queue_depth=1,
    )  # fmt: skip
    def pipeline():
        audio = fn.external_source(source=lambda: batch, device="gpu" if DEVICE == "cuda" else "cpu")
        power = fn.spectrogram(
            audio, nfft=spec.n_fft, window_length=spec.win_length, window_step=spec.hop_length, center_windows=False
        )
        mel = fn.mel_filter_bank(
            power, sample_rate=spec.sample_rate, nfilter=spec.n_mels, freq_low=spec.f_min, freq_high=spec.f_max or 0
        )
        return fn.to_decibels(mel)

    built = pipeline()
    built.build()
    return built.run


def floor_ms(spec: LogMelSpec, samples: int) -> float | None:
    """Return the floor of a batch on a GPU, or None on a CPU, where the bare rfft is the measure.

    The floor is the larger of two times: the bytes over the measured copy rate, and one fp32 instruction for each FLOP
    of the butterflies, of the window and of the mel filters, over the rate at which this device issues instructions.
    """
    if DEVICE == "cpu":
        return None
    frames = spec.n_frames or spec.frames(samples)
    properties = torch.cuda.get_device_properties(0)
    n = spec.n_fft
    instructions = frames / 2 * (5 * n * math.log2(n) + 6 * spec.win_length + 16 * n / 2)
    issue = instructions / (properties.multi_processor_count * 128 * properties.clock_rate)
    return BATCH * max((2 * samples + 2 * frames * spec.n_mels) / copy_bytes_per_ms(), issue)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("name", RECIPES if QUICK else CASES)
def test_log_mel(name, threads, interleave, record):
    spec, before = CASES[name], torch.get_num_threads()
    few = min(BATCH, 8)  # distinct clips; they are drawn on the CPU, where a GPU's whole batch would take seconds
    pcm = clips(10 * spec.sample_rate, batch=few).to(DEVICE).repeat(BATCH // few, 1)
    x, dtype = pcm.float() / 32768, torch.float32 if DEVICE == "cpu" else torch.bfloat16
    kaldi, fused = spec.convention == "kaldi", "ajepa log_mel"
    variants: dict[str, Callable[[], Any]] = {
        fused: lambda: log_mel(pcm, spec, dtype=dtype, impl="fused"),
        "plain PyTorch": lambda: log_mel(pcm, spec, dtype=dtype, impl="reference"),
        "torchaudio MelSpectrogram": mel_spectrogram(x, spec),
    }
    # The float32 result is checked against float64. The call that is timed must then give the same bits.
    single = log_mel(pcm[:2], spec, impl="fused")
    assert_exact(single.cpu(), pcm[:2].cpu(), spec)
    assert torch.equal(variants[fused]()[:2], single.to(dtype))
    optional = {}
    if QUICK:
        left_out({"bare rfft, librosa, kaldi's fbanks, nvidia.dali": "slow peers are left out of a quick run"})
    else:
        frames = torch.randn(BATCH, spec.frames(pcm.shape[1]), spec.n_fft, device=DEVICE)
        variants["bare rfft"] = lambda: torch.fft.rfft(frames)
        optional = {"librosa": librosa_mel, "nvidia.dali": dali_mel}
        if kaldi:
            variants["torchaudio kaldi.fbank"] = torchaudio_fbank(x, spec)
            optional["kaldi_native_fbank"] = kaldi_native
    try:
        torch.set_num_threads(threads)
        for package, make in optional.items():
            try:
                variants[package] = make(x, spec)
            except Exception as error:
                left_out({f"{package}, {name}": str(error)})
        times = interleave(variants, SECONDS if QUICK else 3.0, outside_graphs=OUTSIDE_GRAPHS)
        bound = floor_ms(spec, pcm.shape[1])
        if DEVICE == "cpu" and "bare rfft" in times:
            bound = statistics.median(times["bare rfft"])
        shape = f"{name}, {BATCH} x 10 s" + (f", {threads} thread{'s' * (threads > 1)}" if DEVICE == "cpu" else "")
        peers = [variant for variant in variants if variant not in (fused, "plain PyTorch", "bare rfft")]
        record("log_mel", shape, times, plain="plain PyTorch", peers=peers, floor_ms=bound)
    finally:
        torch.set_num_threads(before)
