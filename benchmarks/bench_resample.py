"""Benchmark resample against soxr, torchaudio, librosa, DALI and scipy, on clips of 10 s.

The clips are float mono, or int16 stereo that is mixed down to mono. A time is milliseconds per batch; every variant
runs on one thread. The filters differ. Ours and soxr's keep 0.90 of the band and attenuate by 100 dB from its edge on.
torchaudio's default filter, DALI's and scipy's are shorter and let aliases through. The floor is the time to copy as
many bytes as are read and written.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ceilings import SECONDS, copy_bytes_per_ms
from conftest import left_out
from records import DEVICE, QUICK

from ajepa.model._torchaudio import import_torchaudio
from ajepa_kernels import resample, resample_reference

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # appended: tests/ has a conftest.py as well
from log_mel_cases import clips

pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = 64 if DEVICE == "cuda" else 1 if QUICK else 4
PAIRS = [(48000, 16000), (44100, 32000), (44100, 16000)]
ON_CPU = ("soxr HQ", "soxr VHQ", "librosa", "scipy resample_poly", "nvidia.dali (aliases)")
Peer = Callable[[], Any]


def mixed(pcm: np.ndarray) -> np.ndarray:
    """Mix the samples of the case to float32 mono, as a user of these libraries would."""
    return pcm if pcm.dtype == np.float32 else (pcm[:, 0].astype(np.float32) + pcm[:, 1]) * np.float32(2**-16)


def as_dtype_of(y: np.ndarray, pcm: np.ndarray) -> np.ndarray:
    return y if pcm.dtype == np.float32 else np.rint(np.clip(y * 32768, -32768, 32767)).astype(np.int16)


def each(function: Callable[[np.ndarray], np.ndarray], pcm: torch.Tensor) -> Peer:
    clips = list(pcm.cpu().numpy())
    return lambda: [as_dtype_of(function(mixed(clip)), clip) for clip in clips]


def with_soxr(quality: str) -> Callable[[torch.Tensor, int, int], Peer]:
    def make(pcm: torch.Tensor, from_rate: int, to_rate: int) -> Peer:
        import soxr

        return each(lambda x: soxr.resample(x, from_rate, to_rate, quality=quality), pcm)

    return make


def with_librosa(pcm: torch.Tensor, from_rate: int, to_rate: int) -> Peer:
    import librosa

    return each(lambda x: librosa.resample(x, orig_sr=from_rate, target_sr=to_rate), pcm)


def with_scipy(pcm: torch.Tensor, from_rate: int, to_rate: int) -> Peer:
    from scipy.signal import resample_poly

    common = math.gcd(from_rate, to_rate)
    return each(lambda x: resample_poly(x, to_rate // common, from_rate // common), pcm)


def with_torchaudio(**options: Any) -> Callable[[torch.Tensor, int, int], Peer]:
    def make(pcm: torch.Tensor, from_rate: int, to_rate: int) -> Peer:
        transform = import_torchaudio().transforms.Resample(from_rate, to_rate, **options).to(pcm.device)
        if pcm.dtype == torch.float32:
            return lambda: transform(pcm)
        return lambda: transform(pcm.float().mean(-1)).clamp(-32768, 32767).round().to(torch.int16)

    return make


def with_dali(pcm: torch.Tensor, from_rate: int, to_rate: int) -> Peer:
    from nvidia.dali import fn, pipeline_def, types

    batch = list(pcm if DEVICE == "cuda" else pcm.numpy())
    int16 = pcm.dtype == torch.int16

    @pipeline_def(
        batch_size=len(batch), num_threads=1, device_id=0 if DEVICE == "cuda" else None,
        exec_async=False, exec_pipelined=False, prefetch_queue_depth=1,
    )  # fmt: skip
    def pipeline():
        audio = fn.external_source(source=lambda: batch, device="gpu" if DEVICE == "cuda" else "cpu")
        if int16:
            audio = fn.reductions.mean(audio, axes=1, dtype=types.FLOAT)
        return fn.audio_resample(
            audio, in_rate=from_rate, out_rate=to_rate, dtype=types.INT16 if int16 else types.FLOAT
        )

    built = pipeline()
    built.build()
    return built.run


BEST = {
    "lowpass_filter_width": 64, "rolloff": 0.9475937167399596, "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}  # fmt: skip
PEERS: dict[str, Callable[[torch.Tensor, int, int], Peer]] = {
    "soxr HQ": with_soxr("HQ"),
    "soxr VHQ": with_soxr("VHQ"),
    "torchaudio (aliases)": with_torchaudio(),
    "torchaudio kaiser_best": with_torchaudio(**BEST),
    "librosa": with_librosa,
    "nvidia.dali (aliases)": with_dali,
    "scipy resample_poly": with_scipy,
}


@pytest.mark.parametrize("stereo", [False, True], ids=["float", "int16-stereo"])
@pytest.mark.parametrize(("from_rate", "to_rate"), PAIRS)
def test_resample(from_rate, to_rate, stereo, interleave, record):
    before = torch.get_num_threads()
    few = min(BATCH, 4)  # distinct clips; a GPU's batch repeats them
    left, right = (clips(10 * from_rate, batch=few, seed=seed) for seed in (0, 1))
    pcm = torch.stack((left, right), -1) if stereo else left.float() / 32768
    pcm = pcm.to(DEVICE).repeat(BATCH // few, *[1] * (pcm.dim() - 1))
    fused = "ajepa resample"
    variants: dict[str, Callable[[], Any]] = {
        fused: lambda: resample(pcm, from_rate, to_rate, downmix=stereo, impl="fused"),
        "plain PyTorch": lambda: resample_reference(pcm, from_rate, to_rate, downmix=stereo),
    }
    exact = resample_reference(
        pcm[:1], from_rate, to_rate, count=4000, downmix=stereo, dtype=torch.float32, compute=torch.float64
    )
    error = variants[fused]()[:1, :4000] / (32768 if stereo else 1) - exact
    assert error.abs().max() < (0.51 / 32768 if stereo else 2e-6)
    try:
        torch.set_num_threads(1)
        for name, make in PEERS.items():
            if QUICK and name != "soxr HQ":
                left_out({name: "slow peers are left out of a quick run"})
                continue
            try:
                variants[name] = make(pcm, from_rate, to_rate)
            except Exception as error:
                left_out({f"{name}, {from_rate} to {to_rate} Hz": str(error)})
        times = interleave(variants, SECONDS if QUICK else 3.0, outside_graphs=ON_CPU)
        out = variants[fused]()
        moved = pcm.numel() * pcm.element_size() + out.numel() * out.element_size()
        kind = "int16 stereo" if stereo else "float mono"
        shape = f"{from_rate} to {to_rate} Hz, {kind}, {BATCH} x 10 s" + (", 1 thread" if DEVICE == "cpu" else "")
        record(
            "resample", shape, times, plain="plain PyTorch", peers=[name for name in PEERS if name in variants],
            floor_ms=moved / copy_bytes_per_ms(),
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
