"""Views of the clip objective: what is drawn, from where, and that it depends on nothing but seed, step and place."""

import dataclasses

import pytest
import torch

from ajepa.config import PRESETS, Config
from ajepa.model.views import SILENCE, ViewFrontEnd, _sounding_crops, draw_views, frame_peaks
from ajepa.utils.counter_rng import Noise
from ajepa_kernels import log_mel

TINY = PRESETS["tiny"]
PLAIN = {"view_time": (1.0, 1.0), "view_bands": (1.0, 1.0), "view_gain_db": 0.0, "view_equaliser_db": 0.0,
         "view_mix": 0.0}  # fmt: skip


def make(**objective) -> Config:
    return dataclasses.replace(
        TINY, objective=dataclasses.replace(TINY.objective, objective="clip", clip_loss="lejepa", **objective)
    )


def noise_clips(clips: int, samples: int = 80_000, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9_000, 9_000, (clips, samples), dtype=torch.int16, generator=generator)


def full(pcm: torch.Tensor) -> torch.Tensor:
    return torch.full((len(pcm),), pcm.shape[1], dtype=torch.int32)


def test_a_plain_view_is_the_log_mel_of_a_crop():
    cfg, pcm = make(views=3, **PLAIN), noise_clips(2)
    front_end, hop = ViewFrontEnd(cfg), TINY.front_end.hop_length
    patches = front_end(pcm, full(pcm), step=5)
    assert patches.shape == (6, 64, 64)
    mel = log_mel(pcm, front_end.power_spec, layout="mel")
    noise = Noise(cfg.seed, 5)
    noise.calls = 1_000
    peaks = frame_peaks(pcm, full(pcm), hop, mel.shape[-1])
    views = draw_views(mel, torch.full((2,), mel.shape[-1]), peaks, cfg.front_end, cfg.objective, noise)
    starts = views.start[:, 0].long()
    assert torch.equal(views.clip[:, 0], torch.tensor([0, 1] * 3, dtype=torch.int32))
    assert len(set(starts.tolist())) > 3, "views show different crops"
    for view, patch in enumerate(patches):
        first = int(starts[view]) * hop
        crop = pcm[view % 2, first : first + 63 * hop + 752][None]
        want = log_mel(crop, cfg.front_end)[0]
        torch.testing.assert_close(patch, want, rtol=0, atol=0.05)  # the peak of whole hops, not of the crop's samples


def test_views_depend_on_seed_step_and_place_alone():
    cfg, pcm = make(), noise_clips(6)
    front_end = ViewFrontEnd(cfg)
    patches = front_end(pcm, full(pcm), 3)
    assert torch.equal(patches, front_end(pcm, full(pcm), 3))
    assert not torch.equal(patches, front_end(pcm, full(pcm), 4))
    assert not torch.equal(patches, ViewFrontEnd(dataclasses.replace(cfg, seed=1))(pcm, full(pcm), 3))
    assert not torch.equal(patches[:6], patches[6:]), "the views of a recording differ"
    alone = make(view_mix=0.0)  # a background comes from the rank's own recordings
    one = ViewFrontEnd(alone)(pcm, full(pcm), 3).unflatten(0, (2, 6))
    for rank in range(2):
        part = pcm[rank::2]
        got = ViewFrontEnd(alone)(part, full(part), 3, rank, 2).unflatten(0, (2, 3))
        torch.testing.assert_close(got, one[:, rank::2], rtol=1e-5, atol=1e-5)


def test_crops_are_real_and_not_silent():
    W, L = 20, 100
    peaks = torch.full((2, L), 0.5 * SILENCE)
    peaks[0, 70] = 1.0
    peaks[1] = 1.0
    chance = torch.linspace(0, 1 - 1e-6, 400)[:, None].expand(400, 2)
    start, peak = _sounding_crops(torch.tensor([90, L]), peaks, W, chance)
    start, peak = start.view(400, 2), peak.view(400, 2)
    assert start[:, 0].min() == 51 and start[:, 0].max() == 70, "every crop with the loud frame, and no other"
    assert set(start[:, 0].tolist()) == set(range(51, 71)) and (peak == 1).all()
    assert set(start[:, 1].tolist()) == set(range(L - W + 1))


def test_a_short_recording_starts_anywhere_and_is_repeated():
    cfg, pcm = make(views=2, **PLAIN), noise_clips(3, 80_000)
    lengths = torch.tensor([80_000, 9_000, 40], dtype=torch.int32)  # five seconds, 17 frames, less than a window
    pcm[1, 9_000:] = 0
    pcm[2, 40:] = 0
    patches = ViewFrontEnd(cfg)(pcm, lengths, 0)
    assert patches.isfinite().all()
    floor = (torch.tensor(TINY.front_end.log_floor).log() - TINY.front_end.mean) / TINY.front_end.std
    assert (patches[1] > floor + 0.1).all(1).float().mean() > 0.8, "a repeated recording leaves no silence"


def test_silence_stays_finite():
    pcm = torch.zeros(2, 80_000, dtype=torch.int16)
    patches = ViewFrontEnd(make())(pcm, full(pcm), 0)
    assert patches.isfinite().all() and (patches == patches[0, 0, 0]).all()


@pytest.mark.parametrize("norm", ["none", "peak"])
def test_gain_mixing_and_level(norm):
    """A background lies 5 to 20 dB below the view's mean power, in views drawn with the stated chance."""
    spec = dataclasses.replace(TINY.front_end, waveform_norm=norm)
    objective = make(view_mix=0.5, view_gain_db=6.0).objective
    B, L = 64, 161
    mel = torch.rand(B, 64, L) + 0.5
    mel *= 10 ** torch.linspace(-3, 3, B)[:, None, None]
    peaks = mel.mean(1).sqrt()
    views = draw_views(mel, torch.full((B,), L), peaks, spec, objective, Noise(0, 1))
    mixed = views.gain[:, 1] > 0
    assert 0.35 < mixed.float().mean() < 0.65
    own, other = views.clip.long().unbind(1)
    assert (own != other).all()
    power = mel.mean((1, 2))
    level = 10 * (power[own] * views.gain[:, 0] / (power[other] * views.gain[:, 1])).log10()[mixed]
    assert level.min() > 4 and level.max() < 21 and level.max() - level.min() > 10
    if norm == "peak":
        loud = 10 * (mel[own].amax((1, 2)) * views.gain[:, 0]).log10()
        assert loud.max() - loud.min() < 20, "crops are normalised to their peak before the gain"


def test_frame_peaks_are_those_of_the_centred_samples():
    pcm = noise_clips(2, 4_960) + 3_000
    pcm[1, 2_000:] = 0
    lengths = torch.tensor([4_960, 2_000])
    got = frame_peaks(pcm, lengths, 496, 12)
    mean = torch.stack([x[:n].double().mean() for x, n in zip(pcm, lengths, strict=True)])
    want = (pcm.double() - mean[:, None]).unflatten(1, (10, 496)).abs().amax(2) / 32768
    torch.testing.assert_close(got[:, :4].double(), want[:, :4], rtol=0.05, atol=0.01)
    assert got.shape == (2, 12)
