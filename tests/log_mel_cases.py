"""Signals and tolerances shared by the tests of log_mel."""

import math
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec, log_mel_reference
from ajepa_kernels.log_mel import _mel_bank, _spectra, _waveforms

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
PRESETS = ["audio-jepa", "audio-jepa-16k", "a-jepa", "whisper", "clap", "kaldi", "librosa"]


def signal_case(name: str, signal: str) -> tuple[torch.Tensor, LogMelSpec]:
    """A signal of about 20 frames and its front end. The floor is raised above the transform's rounding error, which is
    1e-14 of the power of a full-scale frame; only the constant signal keeps the preset's floor."""
    spec = replace(LOG_MEL_PRESETS[name], n_frames=None, n_samples=None, patch=(16, 8))
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


def frame_counts(spec: LogMelSpec, samples: int, batch: int, lengths: torch.Tensor | None) -> torch.Tensor:
    """The number of frames of each clip."""
    return torch.tensor([spec.frames(n) for n in ([samples] * batch if lengths is None else lengths.tolist())])


def rounding_band(
    pcm: torch.Tensor, spec: LogMelSpec, lengths: torch.Tensor | None = None, bits: int = 24
) -> torch.Tensor:
    """How much 2^-bits of the amplitude of the frame's loudest bin changes each value of the spectrogram `[B, M, T]`.

    The bin is the loudest before or after the subtraction of the mean and the pre-emphasis. A band's amplitude is the
    weighted mean of its bins. The result is zero in frames that a clip does not have."""
    scaled = pcm.double() / 32768 if pcm.dtype == torch.int16 else pcm.double()
    value = log_mel_reference(scaled, spec, lengths=lengths, layout="mel").clamp_min(spec.log_floor)
    frames = min(spec.frames(pcm.shape[1]), value.shape[2])
    waveforms, ends = _waveforms(scaled[:, : spec.n_samples], spec, lengths)
    plain = replace(spec, preemphasis=0.0, remove_dc_offset=False)
    spectra = [_spectra(waveforms, kind, ends, frames) for kind in ((spec,) if spec == plain else (spec, plain))]
    loudest = torch.nn.functional.pad(torch.cat(spectra, -1).amax(-1), (0, value.shape[2] - frames))
    counts = frame_counts(spec, pcm.shape[1], len(pcm), lengths)
    loudest = loudest.masked_fill(torch.arange(value.shape[2]) >= counts[:, None], 0)[:, None]
    ratio = (loudest * _mel_bank(spec).double().sum(0)[:, None] / value) ** (1 / spec.power)
    neper = spec.std * (math.log(10) / 20 if spec.log == "db" else 1 / spec.power)  # of amplitude, for one unit
    return 2.0**-bits * ratio / neper


def assert_exact(out: torch.Tensor, pcm: torch.Tensor, spec: LogMelSpec, **arguments) -> None:
    """Compare `out` with the float64 definition. The allowed error is the tolerance or, if larger, the change by 2^-24
    of the amplitude of the frame's loudest bin. The second bound counts for bands more than 90 dB below that bin: a
    float32 transform, torchaudio's included, leaves about that rounding error in every bin."""
    scaled = pcm.double() / 32768 if pcm.dtype == torch.int16 else pcm.double()
    exact = log_mel_reference(scaled, spec, **arguments)
    rounding = rounding_band(pcm, spec, arguments.get("lengths"))
    if arguments.get("layout") != "spectrogram":
        rounding = patches(rounding, spec, pcm.shape[1])
    allowed = rounding.clamp_min((NAT if spec.log == "ln" else DECIBEL) / spec.std)
    error = (out.double() - exact).abs()
    assert not out.isnan().any()
    worst = (error / allowed).argmax() if error.numel() else 0
    assert (error <= allowed).all(), f"error {error.flatten()[worst]:.2e}, allowed {allowed.flatten()[worst]:.2e}"


def assert_exact_mel(mel: torch.Tensor, pcm: torch.Tensor, spec: LogMelSpec, **arguments) -> None:
    """Compare layout "mel", after floor, log and normalisation in float64, with the float64 definition of the
    spectrogram, by the same tolerance. Frames that a clip does not have must be exactly zero."""
    spec = replace(spec, top_db=None)
    counts = frame_counts(spec, pcm.shape[1], len(pcm), arguments.get("lengths"))
    outside = (torch.arange(mel.shape[2]) >= counts[:, None])[:, None].expand_as(mel)
    assert not mel[outside].any()
    out = mel.double().clamp_min(spec.log_floor).log()
    if spec.log == "db":
        out *= (10 if spec.power == 2 else 20) / math.log(10)
    out = (out.masked_fill(outside, spec.pad_value) - spec.mean) / spec.std
    assert_exact(out, pcm, spec, layout="spectrogram", **arguments)


def patches(x: torch.Tensor, spec: LogMelSpec, samples: int) -> torch.Tensor:
    """Rearrange a spectrogram `[B, mels, frames]` into patch order `[B, patches, patch size]`."""
    (freq, time), (height, width) = spec.patch_grid(samples), spec.patch
    x = torch.nn.functional.pad(x, (0, time * width - x.shape[2]))
    return x.view(len(x), freq, height, time, width).transpose(2, 3).reshape(len(x), freq * time, height * width)
