"""log_mel against torchaudio (in float64 where possible) for both conventions and difficult inputs."""

import math
import pickle
import warnings
from dataclasses import astuple, fields, replace

import numpy as np
import pytest
import torch
from log_mel_cases import assert_exact, assert_exact_mel, clips, quiet_about_empty_bands, rounding_band  # noqa: F401

from ajepa.model._torchaudio import has_torchaudio, import_torchaudio
from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec, log_mel, log_mel_reference
from ajepa_kernels.log_mel import _from_key, _kernel_tables, _tables

torchaudio = import_torchaudio() if has_torchaudio() else None
needs_torchaudio = pytest.mark.skipif(torchaudio is None, reason="torchaudio, the reference, cannot be imported")
AUDIO_JEPA = LOG_MEL_PRESETS["audio-jepa"]


def torchaudio_log_mel(x: torch.Tensor, spec: LogMelSpec) -> torch.Tensor:
    """The log-mel `[M, T]` of one clip `[S]` by torchaudio, before padding and data-set normalisation."""
    if spec.convention == "kaldi":
        ms = 1000 / spec.sample_rate
        out = torchaudio.compliance.kaldi.fbank(
            x[None], sample_frequency=spec.sample_rate, frame_length=(spec.win_length + 1e-3) * ms,
            frame_shift=(spec.hop_length + 1e-3) * ms, num_mel_bins=spec.n_mels, low_freq=spec.f_min,
            high_freq=spec.f_max or 0.0, window_type={"hann": "hanning"}.get(spec.window, spec.window),
            preemphasis_coefficient=spec.preemphasis, remove_dc_offset=spec.remove_dc_offset,
            snip_edges=spec.snip_edges, use_power=spec.power == 2,
        )  # fmt: skip
        return out.T
    window = torch.hamming_window if spec.window == "hamming" else torch.hann_window
    mel = torchaudio.transforms.MelSpectrogram(
        spec.sample_rate, spec.n_fft, spec.win_length, spec.hop_length, f_min=spec.f_min, f_max=spec.f_max,
        n_mels=spec.n_mels, window_fn=window, power=spec.power, center=spec.center, norm=spec.mel_norm,
        mel_scale=spec.mel_scale,
    )  # fmt: skip
    mel.spectrogram.window = window(spec.win_length, dtype=torch.float64).to(x.dtype)
    mel.mel_scale.to(x.dtype)
    out = mel(x)
    if spec.log == "ln":
        return out.clamp_min(spec.log_floor).log()
    decibel = torchaudio.transforms.AmplitudeToDB("power" if spec.power == 2 else "magnitude", spec.top_db)
    decibel.amin = spec.log_floor
    return decibel(out)


KALDI = {
    "a-jepa": replace(LOG_MEL_PRESETS["a-jepa"], n_frames=None, mean=0.0, std=1.0),
    "povey, mirrored ends": LogMelSpec(window="povey", snip_edges=False, n_mels=23),
    "hamming, raw": LogMelSpec(window="hamming", preemphasis=0.0, remove_dc_offset=False, f_max=7000.0, n_mels=40),
    "audio-jepa": replace(AUDIO_JEPA, n_frames=None, waveform_norm="none"),
    "magnitude": LogMelSpec(power=1, n_mels=40, hop_length=400, snip_edges=False),
    "window shorter than hop": LogMelSpec(win_length=300, hop_length=500, snip_edges=False, n_mels=40),
}
TORCHAUDIO = {
    "audio-jepa-16k": replace(LOG_MEL_PRESETS["audio-jepa-16k"], n_frames=None),
    "whisper": replace(LOG_MEL_PRESETS["whisper"], n_frames=None, n_samples=None, mean=0.0, std=1.0),
    "htk, magnitude": LogMelSpec(convention="torchaudio", n_mels=40, f_min=0.0, power=1, log="db", top_db=60.0),
    "no centre, ln": LogMelSpec(convention="torchaudio", center=False, n_mels=64, window="hamming", mel_norm="slaney"),
}


@needs_torchaudio
@pytest.mark.parametrize("name", KALDI | TORCHAUDIO)
def test_equals_torchaudio(name):
    spec = (KALDI | TORCHAUDIO)[name]
    pcm = clips(2 * spec.sample_rate)
    exact = torch.stack([torchaudio_log_mel(x, spec) for x in pcm.double() / 32768])
    out = log_mel_reference(pcm, spec, layout="spectrogram", dtype=torch.float64)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-9)
    theirs = torch.stack([torchaudio_log_mel(x, spec) for x in pcm.float() / 32768])
    out = log_mel_reference(pcm, spec, layout="spectrogram")
    assert (out - exact).abs().max() < 2 * (theirs - exact).abs().max() + 1e-4  # both have float32 errors


def test_presets():
    """The published front ends give the published numbers of frames, tokens and padding for their clip lengths."""
    assert AUDIO_JEPA.frames(320_000) == 254 and AUDIO_JEPA.grid == (8, 16) and AUDIO_JEPA.n_patches == 128
    assert LOG_MEL_PRESETS["a-jepa"].frames(160_000) == 998 and LOG_MEL_PRESETS["a-jepa"].n_patches == 512
    assert LOG_MEL_PRESETS["audio-jepa-16k"].frames(160_000) == 257
    assert LOG_MEL_PRESETS["whisper"].frames(480_000) == 3001
    out = log_mel(clips(320_000), AUDIO_JEPA, layout="spectrogram")
    assert out.shape == (2, 128, 256) and not out[:, :, 254:].any() and out[:, :, 253].all()
    spec = LOG_MEL_PRESETS["a-jepa"]
    out = log_mel(clips(160_000), spec, layout="spectrogram")
    torch.testing.assert_close(out[:, :, 998:], torch.full((2, 128, 26), -spec.mean / spec.std))


@needs_torchaudio
def test_whisper_formula():
    """Whisper takes log10, raises all values to at least max - 8, maps x to (x + 4) / 4 and drops the last frame."""
    pcm = clips(480_000, batch=1)
    mel = torchaudio.transforms.MelSpectrogram(16000, 400, None, 160, n_mels=80, norm="slaney", mel_scale="slaney")
    expected = mel(pcm.float() / 32768)[..., :-1].clamp(min=1e-10).log10()
    expected = (torch.maximum(expected, expected.max() - 8.0) + 4.0) / 4.0
    out = log_mel(pcm, LOG_MEL_PRESETS["whisper"], layout="spectrogram")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)


@needs_torchaudio
@pytest.mark.parametrize("kind", ["mean", "peak"])
def test_waveform_norm(kind):
    pcm = clips(320_000)
    x = pcm.double() / 32768
    x = x - x.mean(1, keepdim=True)
    if kind == "peak":
        x = x / (x.abs().amax(1, keepdim=True) + 1e-6)
    spec = replace(AUDIO_JEPA, n_frames=None, waveform_norm=kind)
    expected = torch.stack([torchaudio_log_mel(row, spec) for row in x])
    out = log_mel(pcm, spec, layout="spectrogram")
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=1e-3)


def test_silence_is_the_floor():
    out = log_mel(torch.zeros(1, 320_000, dtype=torch.int16), replace(AUDIO_JEPA, n_frames=None), layout="spectrogram")
    torch.testing.assert_close(out, torch.full_like(out, math.log(AUDIO_JEPA.log_floor)))


def test_patch_order():
    """Token n is f * time_patches + t, and a patch is [mel, frame]."""
    spec = replace(AUDIO_JEPA, patch=(32, 8))
    pcm = clips(320_000)
    tokens, spectrogram = log_mel(pcm, spec), log_mel(pcm, spec, layout="spectrogram")
    freq, time = spec.grid
    assert tokens.shape == (2, freq * time, 256)
    for f, t in ((0, 0), (1, 5), (freq - 1, time - 1)):
        block = spectrogram[:, 32 * f : 32 * f + 32, 8 * t : 8 * t + 8]
        torch.testing.assert_close(tokens[:, f * time + t].view(2, 32, 8), block, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["povey, mirrored ends", "audio-jepa", "audio-jepa-16k", "whisper", "no centre, ln"])
def test_ragged_lengths(name):
    """A clip in a batch has the same features as the clip alone, and zeros in the frames beyond its end."""
    spec = replace((KALDI | TORCHAUDIO)[name], waveform_norm="peak")
    pcm = clips(40_000, batch=4)
    lengths = torch.tensor([40_000, 31_111, spec.min_samples, spec.min_samples - 1])
    out = log_mel(pcm, spec, lengths=lengths, layout="spectrogram")
    for row, clip, n in zip(out, pcm, lengths.tolist(), strict=True):
        frames = spec.frames(n)
        if frames:
            alone = log_mel(clip[None, :n], spec, layout="spectrogram")[0]
            torch.testing.assert_close(row[:, :frames], alone, rtol=0, atol=2e-4 if spec.log == "ln" else 2e-3)
        assert not row[:, frames:].any()


@needs_torchaudio
@pytest.mark.parametrize("name", KALDI | TORCHAUDIO)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_mel_values(name, impl):
    """Layout "mel" is what the spectrogram is the logarithm of; floor, `top_db`, `mean` and `std` do not count."""
    spec = (KALDI | TORCHAUDIO)[name]
    pcm = clips(2 * spec.sample_rate)
    mel = log_mel(pcm, spec, layout="mel", impl=impl)
    assert mel.dtype == torch.float32 and (mel >= 0).all()
    assert_exact_mel(mel, pcm, spec)
    other = replace(spec, floor=0.5, log="ln", top_db=None, mean=3.0, std=7.0)
    torch.testing.assert_close(log_mel(pcm, other, layout="mel", impl=impl), mel, rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("n_frames", [None, 30, 400])
@pytest.mark.parametrize("name", ["povey, mirrored ends", "audio-jepa-16k", "htk, magnitude"])
def test_mel_of_ragged_clips(name, n_frames, impl):
    """As in the spectrogram, all frames are there, or as many as `n_frames` says; those beyond its end are zero."""
    spec = replace((KALDI | TORCHAUDIO)[name], waveform_norm="peak", n_frames=n_frames)
    pcm = clips(40_000, batch=4)
    lengths = torch.tensor([40_000, 31_111, spec.min_samples, spec.min_samples - 1])
    mel = log_mel(pcm, spec, lengths=lengths, layout="mel", impl=impl)
    assert mel.shape == log_mel(pcm, spec, lengths=lengths, layout="spectrogram", impl=impl).shape
    assert_exact_mel(mel, pcm, spec, lengths=lengths)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_fft": 500}, "400.*got 500; the nearest are 480 and 512"), ({"n_fft": 16384}, "8000 and 8192"),
        ({"n_fft": 399}, "384 and 400"), ({"n_fft": 0}, "128 and 144"), ({"n_fft": 882}, "864 and 960"),
        ({"win_length": 513}, "win_length"),
        ({"hop_length": 0}, "hop_length"), ({"n_mels": 257}, "n_mels"), ({"f_max": 8001.0}, "Nyquist"),
        ({"f_min": 9000.0}, "f_min"), ({"preemphasis": 2.0}, "preemphasis"), ({"floor": 0.0}, "floor"),
        ({"top_db": 80.0}, "top_db"), ({"n_frames": 0}, "n_frames"), ({"std": 0.0}, "std"),
        ({"mean": math.inf}, "mean"),
        ({"patch": (16,)}, "patch"), ({"convention": "htk"}, "convention"), ({"window": "kaiser"}, "window"),
        ({"convention": "torchaudio", "window": "povey"}, "povey"), ({"center": False}, "center"),
        ({"convention": "torchaudio", "snip_edges": False}, "snip_edges"), ({"mel_scale": "slaney"}, "mel_scale"),
        ({"hop_length": 2**32}, "hop_length"), ({"hop_length": 2**30}, "hop_length"), ({"n_frames": 2**31}, "n_frames"),
        ({"sample_rate": 2**40}, "sample_rate"), ({"patch": (16, 2**33)}, "patch"), ({"patch": 16}, "two sizes"),
        ({"win_length": 400.5}, "win_length"), ({"hop_length": math.nan}, "hop_length"), ({"n_mels": None}, "n_mels"),
        ({"n_frames": 10.5}, "n_frames"), ({"n_fft": "512"}, "n_fft"), ({"f_min": None}, "f_min"),
        ({"std": "wide"}, "std"), ({"power": 1.5}, "power"), ({"patch": (16, 0.5)}, "patch"),
        ({"log": "db", "top_db": math.inf}, "top_db"),
        ({"pad_mode": "edge"}, "pad_mode"), ({"pad_mode": "constant"}, "pad_mode"), ({"scale": 0.0}, "scale"),
        ({"convention": "torchaudio", "center": False, "pad_mode": "constant"}, "center=True"),
        ({"pad_value": math.inf}, "pad_value"), ({"n_samples": 399}, "n_samples.*400"),
        ({"n_samples": 2**30}, "n_samples"),
        ({"power": 3}, "power"), ({"sample_rate": 0}, "sample_rate"), ({"mel_norm": "slaney"}, "mel_norm"),
    ],
)  # fmt: skip
def test_impossible_specs(change, match):
    with pytest.raises(ValueError, match=match):
        LogMelSpec(**change)


def test_whole_numbers_of_any_type():
    """Whole numbers such as torchaudio's `power=2.0`, or a patch read from JSON, are stored as int, so that equal specs
    share their tables."""
    spec = LogMelSpec(
        power=2.0, hop_length=160.0, n_mels=np.int64(80), patch=[16, 8.0], n_frames=16.0, std=np.float32(2)
    )
    assert repr(spec) == repr(LogMelSpec(power=2, hop_length=160, n_mels=80, patch=(16, 8), n_frames=16, std=2.0))
    assert log_mel(clips(4000), spec).shape == (2, 10, 128)


def test_mel_bands_too_narrow_for_float32():
    with pytest.raises(ValueError, match=r"mel bands.*too narrow"):
        log_mel(clips(16000), LogMelSpec(f_min=1000.0, f_max=1000.01), impl="reference")


def test_shortest_clip_has_a_frame():
    """Kaldi with mirrored ends rounds S / hop, which is 0 for a clip shorter than half a hop."""
    spec = LogMelSpec(win_length=400, hop_length=1001, snip_edges=False)
    assert spec.min_samples == 501 and spec.frames(501) == 1 and spec.frames(500) == 0
    for impl in ("auto", "reference"):
        assert log_mel(clips(501), spec, layout="spectrogram", impl=impl).shape[2] == 1
        with pytest.raises(ValueError, match="shorter than one window"):
            log_mel(clips(500), spec, impl=impl)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", ["povey, mirrored ends", "audio-jepa-16k"])
def test_lengths_out_of_range_and_strided(impl, name):
    """A length beyond the row means the whole row, and a negative one means no frame. Lengths may have any strides."""
    spec, pcm = replace((KALDI | TORCHAUDIO)[name], waveform_norm="peak"), clips(9000, batch=3)
    expected = log_mel(pcm, spec, lengths=torch.tensor([9000, 0, 8000]), layout="spectrogram", impl=impl)
    wild = torch.tensor([10**12, 7, -5, 7, 8000, 7])
    out = log_mel(pcm, spec, lengths=wild[::2], layout="spectrogram", impl=impl)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    same = torch.tensor([8000]).expand(3)
    out = log_mel(pcm, spec, lengths=same, layout="spectrogram", impl=impl)
    torch.testing.assert_close(out[2], expected[2], rtol=0, atol=0)


def test_tables_ignore_the_default_dtype_and_device():
    """The tables of a spec do not depend on the default dtype and device during its first call."""
    specs = [LogMelSpec(n_mels=n, hop_length=163) for n in (37, 38)]  # no other test caches these specs
    pcm = clips(4000)
    torch.set_default_dtype(torch.float64)
    try:
        tables = _kernel_tables(specs[0], torch.device("cpu"))
        first = [log_mel(pcm, specs[0], layout="spectrogram", impl=impl) for impl in ("auto", "reference")]
    finally:
        torch.set_default_dtype(torch.float32)
    assert tables[0].dtype == tables[1].dtype == torch.float32
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=2e-3)  # a logarithm near the floor, in float32
    with torch.device("meta"):
        second = [log_mel(pcm, specs[1], layout="spectrogram", impl=impl) for impl in ("auto", "reference")]
    torch.testing.assert_close(second[0], second[1], rtol=0, atol=2e-3)


def test_tables_outlive_other_specs_on_a_device():
    """The tables on a device are kept for ever, because CUDA graphs hold their addresses."""
    device, specs = torch.device("meta"), [LogMelSpec(n_mels=30, hop_length=200 + i) for i in range(70)]
    first = _kernel_tables(specs[0], device), _tables(specs[0], device, torch.float32)
    for spec in specs:
        _kernel_tables(spec, device), _tables(spec, device, torch.float32)
    assert _kernel_tables(specs[0], device) is first[0] and _tables(specs[0], device, torch.float32) is first[1]


def test_no_tables_are_made_in_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call log_mel once with it before"):
        _kernel_tables(AUDIO_JEPA, torch.device("cuda", 7))


def test_reference_ignores_autocast():
    pcm, spec = clips(8000), LogMelSpec(n_mels=40)
    expected = log_mel_reference(pcm, spec, layout="spectrogram")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel_reference(pcm, spec, layout="spectrogram"), expected)


def test_check_ignores_what_lies_beyond_a_clip():
    x, lengths = clips(8000).float() / 32768, torch.tensor([4000, 8000])
    x[0, 4000:] = torch.nan
    log_mel(x, LogMelSpec(n_mels=32), lengths=lengths, check=True)
    x[1, 7999] = torch.inf
    with pytest.raises(ValueError, match="NaN"):
        log_mel(x, LogMelSpec(n_mels=32), lengths=lengths, check=True)


def test_bad_calls():
    spec, pcm = LogMelSpec(n_mels=40), clips(16000)
    for bad, error, match in (
        (lambda: log_mel(pcm[0], spec), ValueError, "batch dimension"),
        (lambda: log_mel(pcm.numpy(), spec), TypeError, r"pcm must be a torch.Tensor, got numpy.ndarray.*as_tensor"),
        (lambda: log_mel([[0.0]], spec), TypeError, "pcm must be a torch.Tensor, got list"),
        (lambda: log_mel(pcm, spec, lengths=[1, 2]), TypeError, "lengths must be a torch.Tensor, got list"),
        (lambda: log_mel_reference(pcm.numpy(), spec), TypeError, "as_tensor"),
        (lambda: log_mel(pcm.int(), spec), TypeError, "int16"),
        (lambda: log_mel(pcm, spec, dtype=torch.int16), TypeError, "dtype"),
        (lambda: log_mel(pcm, spec, layout="power"), ValueError, "layout"),
        (lambda: log_mel(pcm, spec, impl="cuda"), ValueError, "impl"),
        (lambda: log_mel(pcm[:, :399], spec), ValueError, "shorter than one window"),
        (lambda: log_mel(pcm, spec), ValueError, "patch height"),
        (lambda: log_mel(pcm, spec, lengths=torch.tensor([1])), ValueError, "lengths"),
        (lambda: log_mel(pcm, spec, lengths=torch.tensor([1.0, 2.0])), ValueError, "lengths"),
        (lambda: log_mel(pcm.float() / 0, spec, check=True), ValueError, "NaN"),
        (lambda: log_mel(pcm, spec, lengths=torch.tensor([16001, 400]), check=True), ValueError, "lengths"),
    ):
        with pytest.raises(error, match=match):
            bad()
    with pytest.raises(ValueError, match="n_frames"):
        _ = spec.grid


def test_empty_bands_warn_once():
    spec = LogMelSpec(sample_rate=16001)  # no other test caches this spec
    with pytest.warns(UserWarning, match=r"mel bands \[.*\] of 128"):
        out = log_mel(clips(16000), spec, layout="spectrogram")
    assert (out[:, 0] == math.log(spec.log_floor)).all() or (out.amin((0, 2)) == math.log(spec.log_floor)).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_mel(clips(16000), spec)


LOUD = {  # amplitudes of up to 1; every one puts its energy into few bins
    "tone": lambda t: 0.9 * torch.sin(2 * torch.pi * 997 * t),
    "tone between the bands": lambda t: 0.9 * torch.sin(2 * torch.pi * 2000 * t) + 1e-5 * torch.randn(len(t)),
    "tone below the bands": lambda t: 0.9 * torch.sin(2 * torch.pi * 60 * t) + 1e-5 * torch.randn(len(t)),
    "tone at Nyquist": lambda t: 0.9 * torch.cos(0.995 * torch.pi * torch.arange(len(t))),
    "constant": lambda t: 0.9 + 1e-4 * torch.randn(len(t)),
    "chirp": lambda t: 0.9 * torch.sin(4000 * t * (1 + 2 * t)),
}
BANDS = {"narrow": {"n_mels": 6, "f_min": 5000.0}, "all": {"n_mels": 64, "f_min": 20.0}}


@pytest.mark.parametrize("bands", BANDS)
@pytest.mark.parametrize("kind", LOUD)
def test_accuracy(kind, bands):
    """Within 2e-3 nat of float64 in bands up to 80 dB below the frame's loudest bin, also where no band holds it."""
    torch.manual_seed(0)
    x = LOUD[kind](torch.arange(8000) / 16_000).float()[None]
    for n_fft in (400, 512, 1200, 2048):
        for convention in ("kaldi", "torchaudio"):
            spec = LogMelSpec(n_fft=n_fft, win_length=n_fft, convention=convention, floor=1e-20, **BANDS[bands])
            exact = log_mel_reference(x.double(), spec, layout="spectrogram")
            above = rounding_band(x, spec, bits=0) < 1e4  # 80 dB, in nepers of power for one half
            for impl in ("auto", "reference"):
                error = (log_mel(x, spec, layout="spectrogram", impl=impl) - exact).abs()
                assert not error[above].numel() or error[above].max() < 2e-3, f"{n_fft} {convention} {impl}"


def test_accuracy_is_relative_to_the_loudest_bin_of_all():
    """A tone below all bands leaves its rounding error in them, which are 130 dB below it but of one level."""
    t = torch.arange(16_000) / 16_000
    x = (0.9 * torch.sin(2 * torch.pi * 60 * t) + 3e-8 * torch.randn(len(t)))[None]
    spec = LogMelSpec(
        convention="torchaudio", n_fft=2048, win_length=2048, f_min=4000.0, n_mels=20, center=False, floor=1e-30
    )  # fmt: skip
    exact = log_mel_reference(x.double(), spec, layout="spectrogram")
    error = (log_mel(x, spec, layout="spectrogram") - exact).abs()
    assert (exact.amax(1) - exact.amin(1)).max() < 12  # nat of power: no band is 90 dB below another one
    assert error.max() > 2e-3 and (error < rounding_band(x, spec, bits=21).clamp_min(2e-3)).all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["none", "mean", "peak"])
@pytest.mark.parametrize(
    "changes",
    [
        {"pad_mode": "constant"}, {"pad_mode": "constant", "n_fft": 1200, "win_length": 1001},
        {"n_samples": 12_000}, {"n_samples": 12_000, "pad_mode": "constant", "log": "db", "top_db": 40.0},
        {"n_samples": 5000, "center": False}, {"n_samples": 12_000, "convention": "kaldi"},
        {"n_samples": 12_000, "convention": "kaldi", "snip_edges": False, "n_frames": 90},
    ],
)  # fmt: skip
def test_padded_samples(changes, kind, impl):
    """`n_samples` and `pad_mode` equal padding by hand after the waveform norm, for whole clips and ragged ones."""
    spec = LogMelSpec(**{"convention": "torchaudio", "n_mels": 40, "waveform_norm": kind, "pad_value": -3.0, **changes})
    pcm, lengths = clips(10_000, batch=3), torch.tensor([10_000, 300, 9990])
    for given, ends in ((pcm, None), (pcm, lengths), (pcm.float() / 32768, lengths)):
        out = log_mel(given, spec, lengths=ends, layout="spectrogram", impl=impl)
        for row, clip, n in zip(
            out, pcm, (lengths if ends is not None else torch.tensor([10_000] * 3)).tolist(), strict=True
        ):
            x = (clip.double() / 32768)[: min(n, spec.n_samples or n)]
            if kind != "none":
                x = x - x.mean()
            if kind == "peak":
                x = x / (x.abs().max() + 1e-6)
            x = torch.nn.functional.pad(x, (0, (spec.n_samples or len(x)) - len(x)))
            by_hand = replace(spec, n_samples=None, pad_mode="reflect", waveform_norm="none", n_frames=None)
            if spec.pad_mode == "constant":
                x, by_hand = torch.nn.functional.pad(x, [spec.n_fft // 2] * 2), replace(by_hand, center=False)
            exact = log_mel_reference(x[None], by_hand, layout="spectrogram")[0]
            frames = exact.shape[1] if spec.n_frames is None else min(exact.shape[1], spec.n_frames)
            error = (row[:, :frames] - exact[:, :frames]).abs().max()
            assert error < (2e-3 if spec.log == "ln" else 1e-2), error
            assert (row[:, frames:] == -3.0).all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_fixed_samples(impl):
    """`n_samples` fixes the frames: any clip has them, also one of no samples, whose frames are those of zeros."""
    spec = replace(LOG_MEL_PRESETS["whisper"], n_samples=4000, n_frames=None, patch=(16, 16))
    assert spec.frames(1) == spec.frames(9999) == 26 and spec.grid == (5, 2) and spec.min_samples == 1
    silent = log_mel(torch.zeros(1, 4000), spec, layout="spectrogram", impl=impl)
    out = log_mel(clips(200, batch=2), spec, lengths=torch.tensor([0, 200]), layout="spectrogram", impl=impl)
    torch.testing.assert_close(out[:1], silent, rtol=0, atol=1e-5)
    torch.testing.assert_close(out[1:], log_mel(clips(200, batch=2)[1:], spec, layout="spectrogram", impl=impl))
    tokens = log_mel(clips(200), replace(spec, pad_value=5.0), impl=impl).view(2, 5, 2, 16, 16)
    assert (tokens[:, :, 1, :, 10:] == (5.0 + 40.0) / 40.0).all()  # frames 26 to 31 complete the last patches
    assert (tokens[:, :, 1, :, :10] < 1).all()
    mel = log_mel(clips(200), spec, layout="mel", impl=impl)
    assert (mel[:, :, 4:] == 0).all() and (mel[:, :, 0] > 0).all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_scale(impl):
    """The scale multiplies the samples after the norm, so that the floor is in other units: 32768 means int16."""
    spec = LogMelSpec(n_mels=40, scale=32768.0)
    pcm = clips(8000)
    out = log_mel(pcm, spec, layout="spectrogram", impl=impl)
    assert_exact(out, pcm, spec, layout="spectrogram")
    plain = log_mel(pcm, replace(spec, scale=1.0, floor=spec.log_floor / 2**30), layout="spectrogram", impl=impl)
    torch.testing.assert_close(out, plain + 30 * math.log(2), rtol=0, atol=1e-4)
    peak = log_mel(pcm, replace(spec, waveform_norm="peak"), layout="mel", impl=impl)
    once = log_mel(pcm, replace(spec, waveform_norm="peak", scale=1.0), layout="mel", impl=impl)
    torch.testing.assert_close(peak, once * 2**30)


def test_blackman_window():
    pcm = clips(16_000)
    spec = LogMelSpec(window="blackman", n_mels=40)
    if torchaudio is not None:
        exact = torch.stack([torchaudio_log_mel(x, spec) for x in pcm.double() / 32768])
        out = log_mel_reference(pcm, spec, layout="spectrogram", dtype=torch.float64)
        torch.testing.assert_close(out, exact, rtol=0, atol=1e-9)
    for convention in ("kaldi", "torchaudio"):
        spec = replace(spec, convention=convention)
        assert_exact(log_mel(pcm, spec, layout="spectrogram"), pcm, spec, layout="spectrogram")


def test_specs_of_older_versions():
    """A pickled spec from before the last four fields, and its key, mean the spec with their defaults."""
    spec, new = LOG_MEL_PRESETS["a-jepa"], ("pad_mode", "pad_value", "n_samples", "scale")
    names = [field.name for field in fields(spec)]
    assert tuple(names[-4:]) == new and names[-5] == "patch"
    old = object.__new__(LogMelSpec)
    old.__dict__.update({name: value for name, value in spec.__dict__.items() if name not in new})
    old.__dict__["_key"] = repr(astuple(spec)[:-4])
    old = pickle.loads(pickle.dumps(old))
    assert old == spec and hash(old) == hash(spec) and _from_key(old._key) == spec
    assert torch.equal(log_mel(clips(8000), old), log_mel(clips(8000), spec))
    assert LogMelSpec(**{name: getattr(old, name) for name in names[:-4]}) == spec
