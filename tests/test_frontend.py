import math

import pytest
import torch

from ajepa.config import PRESETS
from ajepa.model.frontend import FrontEnd
from ajepa_kernels import LOG_MEL_PRESETS


def noise(spec, seconds=10.0, clips=3):
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([[20000.0], [300.0], [3.0]])
    loud = torch.randn(3, round(seconds * spec.sample_rate), generator=generator) * scale
    return loud[:clips].clamp(-32768, 32767).short()


@pytest.mark.parametrize("name", ["audio-jepa", "audio-jepa-16k", "a-jepa", "tiny"])
def test_the_plain_engines_front_end_is_torchaudio_and_agrees(name):
    spec = PRESETS[name].front_end if name == "tiny" else LOG_MEL_PRESETS[name]
    pcm = noise(spec, 2.0 if name == "tiny" else 10.0)
    ours, theirs = FrontEnd(spec)(pcm), FrontEnd(spec, "torchaudio")(pcm)
    assert ours.shape == theirs.shape == (3, spec.n_patches, spec.patch_dim)
    tolerance = 1e-2 if spec.log == "db" else 2e-3
    assert (ours - theirs).abs().max() * spec.std < tolerance


def test_ragged_lengths_agree_too():
    spec = LOG_MEL_PRESETS["a-jepa"]
    pcm, lengths = noise(spec), torch.tensor([160_000, 31_234, 400])
    ours, theirs = FrontEnd(spec)(pcm, lengths), FrontEnd(spec, "torchaudio")(pcm, lengths)
    assert (ours - theirs).abs().max() * spec.std < 2e-3


def test_audio_jepa_has_254_frames_and_two_rows_of_zeros():
    spec = PRESETS["audio-jepa"].front_end
    assert spec.frames(320_000) == 254 and spec.n_frames == 256
    patches = FrontEnd(spec)(noise(spec, clips=1)).view(8, 16, 16, 16)
    assert not patches[:, -1, :, -2:].any() and (patches[:, -1, :, -3] != 0).all()


def test_silence_is_finite_in_every_preset():
    for name in PRESETS:
        cfg = PRESETS[name]
        silent = torch.zeros(1, math.ceil(cfg.data.clip_seconds * cfg.front_end.sample_rate), dtype=torch.int16)
        for impl in ("auto", "torchaudio"):
            assert FrontEnd(cfg.front_end, impl)(silent).isfinite().all()
