"""Signals and tolerances shared by the tests of log_mel."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec, log_mel_reference

AUDIO = (".wav", ".flac")
NAT, DECIBEL = 2e-3, 1e-2  # largest allowed error against float64, before the cast to the output dtype


@pytest.fixture(autouse=True)
def quiet_about_empty_bands():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*mel (bands|filterbank).*")
        yield


def clips(samples: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """int16 clips of decaying noise plus a chirp, which have loud and quiet frames."""
    g = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, samples)
    x = 0.2 * torch.randn(batch, samples, generator=g) * torch.exp(-4 * t) + 0.3 * torch.sin(2000 * t + 9000 * t * t)
    return (x.clamp(-1, 1) * 32767).round().to(torch.int16)


SIGNALS = {
    "silence": lambda n: torch.zeros(n),
    "constant": lambda n: torch.full((n,), 12345.0),
    "impulse": lambda n: torch.zeros(n).index_fill(0, torch.tensor([n // 3]), 32767.0),
    "first sample": lambda n: torch.zeros(n).index_fill(0, torch.tensor([0]), -32768.0),
    "full-scale square": lambda n: torch.where(torch.arange(n) % 50 < 25, 32767.0, -32768.0),
    "full-scale sine": lambda n: 32767 * torch.sin(torch.arange(n) * 0.3),
    "least noise": lambda n: torch.randint(-1, 2, (n,), generator=torch.Generator().manual_seed(0)).float(),
    "silence, then noise": lambda n: torch.where(torch.arange(n) < n // 2, 0.0, torch.randn(n) * 3000),
}
PRESETS = ["audio-jepa", "audio-jepa-16k", "a-jepa", "whisper"]


def signal_case(name: str, signal: str) -> tuple[torch.Tensor, LogMelSpec]:
    """A signal of about 20 frames and its front end. The floor is raised above the transform's rounding error, which is
    1e-14 of the power of a full-scale frame; only the constant signal keeps the preset's floor."""
    spec = replace(LOG_MEL_PRESETS[name], n_frames=None, patch=(16, 8))
    if signal != "constant":
        spec = replace(spec, floor=1e-7)
    pcm = SIGNALS[signal](spec.n_fft + 20 * spec.hop_length)
    return pcm.round().clamp(-32768, 32767).to(torch.int16)[None], spec


def recordings(folder: Path, each: int) -> torch.Tensor:
    """The first `each` samples of several recordings, concatenated."""
    soundfile = pytest.importorskip("soundfile")
    files = [path for name in ("smoke", "fsdd") for path in sorted((folder / name).rglob("*.*"))[:20:6]]
    found = [soundfile.read(path, dtype="int16", always_2d=True)[0][:each, 0] for path in files if path.suffix in AUDIO]
    return torch.cat([torch.from_numpy(x.copy()) for x in found])[None]


def assert_exact(out: torch.Tensor, pcm: torch.Tensor, spec: LogMelSpec, **arguments) -> None:
    """Compare `out` with the float64 definition. The allowed error is the tolerance or, if larger, 2^-24 of the
    amplitude of the frame's loudest band before pre-emphasis. The second bound counts for bands more than 90 dB below
    the loudest one: a float32 transform, torchaudio's included, leaves that much rounding error in every bin."""
    scaled = pcm.double() / 32768 if pcm.dtype == torch.int16 else pcm.double()
    exact = log_mel_reference(scaled, spec, **arguments)
    flat = log_mel_reference(scaled, replace(spec, preemphasis=0.0), **{**arguments, "layout": "spectrogram"})
    loudest = flat.amax(1, keepdim=True).expand_as(flat)
    if arguments.get("layout") != "spectrogram":
        loudest = patches(loudest, spec, pcm.shape[1])
    # nepers of amplitude per unit of `out`
    neper = spec.std * (math.log(10) / 20 if spec.log == "db" else 1 / spec.power)
    rounding = 2.0**-24 * ((loudest - exact) * neper).exp() / neper
    allowed = rounding.clamp_min((NAT if spec.log == "ln" else DECIBEL) / spec.std)
    error = (out.double() - exact).abs()
    assert not out.isnan().any()
    worst = (error / allowed).argmax() if error.numel() else 0
    assert (error <= allowed).all(), f"error {error.flatten()[worst]:.2e}, allowed {allowed.flatten()[worst]:.2e}"


def assert_exact_mel(mel: torch.Tensor, pcm: torch.Tensor, spec: LogMelSpec, **arguments) -> None:
    """Compare layout "mel", after floor, log and normalisation in float64, with the float64 definition of the
    spectrogram, by the same tolerance. Frames that a clip does not have must be exactly zero."""
    spec, lengths = replace(spec, top_db=None), arguments.get("lengths")
    samples = [pcm.shape[1]] * len(pcm) if lengths is None else lengths.tolist()
    counts = torch.tensor([spec.frames(n) for n in samples])
    outside = (torch.arange(mel.shape[2]) >= counts[:, None])[:, None].expand_as(mel)
    assert not mel[outside].any()
    out = mel.double().clamp_min(spec.log_floor).log()
    if spec.log == "db":
        out *= (10 if spec.power == 2 else 20) / math.log(10)
    out = (out.masked_fill(outside, 0) - spec.mean) / spec.std
    assert_exact(out, pcm, spec, layout="spectrogram", **arguments)


def patches(x: torch.Tensor, spec: LogMelSpec, samples: int) -> torch.Tensor:
    """Rearrange a spectrogram `[B, mels, frames]` into patch order `[B, patches, patch size]`."""
    (freq, time), (height, width) = spec.patch_grid(samples), spec.patch
    x = torch.nn.functional.pad(x, (0, time * width - x.shape[2]))
    return x.view(len(x), freq, height, time, width).transpose(2, 3).reshape(len(x), freq * time, height * width)
