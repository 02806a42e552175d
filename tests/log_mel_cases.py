"""Signals and tolerances shared by the tests of log_mel."""

import warnings

import pytest
import torch

from ajepa_kernels import LogMelSpec, log_mel_reference

NAT, DECIBEL = 2e-3, 1e-2  # largest error before the cast, against float64


@pytest.fixture(autouse=True)
def quiet_about_empty_bands():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*mel (bands|filterbank).*")
        yield


def clips(samples: int, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Noise under a slow envelope, plus a chirp: loud and quiet frames, int16."""
    g = torch.Generator().manual_seed(seed)
    t = torch.linspace(0, 1, samples)
    x = 0.2 * torch.randn(batch, samples, generator=g) * torch.exp(-4 * t) + 0.3 * torch.sin(2000 * t + 9000 * t * t)
    return (x.clamp(-1, 1) * 32767).round().to(torch.int16)


def assert_exact(out: torch.Tensor, pcm: torch.Tensor, spec: LogMelSpec, **arguments) -> None:
    """Against the definition in float64: within the tolerance, or within 3 x what the definition errs in float32.

    Where a bin is 100 dB below its frame's loudest one no float32 transform, torchaudio's neither, meets the first.
    """
    scaled = pcm.double() / 32768 if pcm.dtype == torch.int16 else pcm.double()
    exact = log_mel_reference(scaled, spec, **arguments)
    single = log_mel_reference(scaled.float(), spec, **arguments)
    tolerance = (NAT if spec.log == "ln" else DECIBEL) / spec.std
    error, allowed = (out.double() - exact).abs(), 3 * (single.double() - exact).abs().max()
    assert not out.isnan().any()
    assert error.max() <= max(tolerance, float(allowed)), f"{error.max():.2e} > {tolerance:.1e}, float32: {allowed:.1e}"
