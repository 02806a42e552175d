"""The presets against the libraries that define them: transformers' extractors, librosa and kaldi-native-fbank.

The libraries compute in float32 too (Whisper's and AST's transforms by torch, Kaldi's in C++, librosa's by scipy), or
in float64 with spectra that are stored as complex64 (CLAP's and SeamlessM4T's by numpy). Their mel banks are rounded in
other places, which shows where the loudest bin lies at the edge of a band. So two results may differ by three times
what log_mel states against float64: 2e-3 nat (0.01 dB), or for bands more than 80 dB below the frame's loudest bin the
change by 2^-22 of that bin's amplitude.
"""

import importlib
from dataclasses import replace

import pytest
import torch
from log_mel_cases import DECIBEL, NAT, recordings, rounding_band

from ajepa.model._torchaudio import has_torchaudio
from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec, _extension, log_mel

IMPLS = ["reference"] + ["fused"] * _extension.AVAILABLE
SIGNALS = {
    "noise": lambda t: 0.1 * torch.randn(len(t), generator=torch.Generator().manual_seed(0)),
    "quiet, then noise": lambda t: 0.3 * torch.randn(len(t)) * (t > t[-1] / 2) + 1e-4 * torch.randn(len(t)),
    "digital silence": lambda t: torch.zeros(len(t)),
    "loud tone": lambda t: 0.9 * torch.sin(2 * torch.pi * 1000 * t),
    "tone below the bands": lambda t: 0.9 * torch.sin(2 * torch.pi * 12 * t),
    "chirp": lambda t: 0.5 * torch.sin(2000 * t * (1 + 2 * t)),
}


@pytest.fixture(scope="module")
def library():
    """Imports a library, or skips the test."""
    has_torchaudio()  # puts a stub in place of an extension that does not match this torch, which transformers imports

    def load(name):
        try:
            return importlib.import_module(name)
        except Exception as error:  # a library may also fail to load its own extension
            pytest.skip(f"{name}, the reference, cannot be imported: {error}")

    return load


def signal(name: str, samples: int, spec: LogMelSpec) -> torch.Tensor:
    torch.manual_seed(0)
    return SIGNALS[name](torch.arange(samples) / spec.sample_rate).float()


def assert_agree(x: torch.Tensor, spec: LogMelSpec, theirs: torch.Tensor) -> None:
    """`theirs` `[M, T]` of the clip `x [S]`."""
    allowed = 3 * rounding_band(x[None], spec, bits=22)[0].clamp_min((NAT if spec.log == "ln" else DECIBEL) / spec.std)
    for impl in IMPLS:
        ours = log_mel(x[None], spec, layout="spectrogram", impl=impl)[0]
        assert ours.shape == theirs.shape
        error = (ours - theirs).abs()
        worst = (error / allowed).argmax()
        assert (error <= allowed).all(), f"{impl}: {error.flatten()[worst]:.2e} > {allowed.flatten()[worst]:.2e}"


def whisper(library, spec):
    extractor = library("transformers").WhisperFeatureExtractor(feature_size=spec.n_mels)
    return lambda x: extractor(x.numpy(), sampling_rate=16_000, return_tensors="pt")["input_features"][0]


def ast(library, spec):
    extractor = library("transformers").ASTFeatureExtractor()
    return lambda x: extractor(x.numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"][0].T


def clap(library, spec):
    """The fused extractor gives four copies of a clip of up to 10 s; the other one has Slaney's bands."""
    extractor = library("transformers").ClapFeatureExtractor(
        padding="pad", truncation="fusion" if spec.mel_scale == "htk" else "rand_trunc"
    )
    return lambda x: extractor(x.numpy(), sampling_rate=48_000, return_tensors="pt")["input_features"][0, 0].T


def seamless(library, spec):
    """By the extractor's own function, before it normalises each band over time and stacks two frames."""
    extractor = library("transformers").SeamlessM4TFeatureExtractor()
    return lambda x: torch.from_numpy(extractor._extract_fbank_features(x.numpy())).T


def kaldi(library, spec):
    knf = library("kaldi_native_fbank")
    options = knf.FbankOptions()
    options.frame_opts.dither, options.mel_opts.num_bins = 0, spec.n_mels
    options.frame_opts.snip_edges, options.frame_opts.window_type = spec.snip_edges, spec.window

    def run(x):
        fbank = knf.OnlineFbank(options)
        fbank.accept_waveform(16_000, (x * 32768).numpy())
        fbank.input_finished()
        return torch.stack([torch.from_numpy(fbank.get_frame(i).copy()) for i in range(fbank.num_frames_ready)], 1)

    return run


def librosa(library, spec):
    module = library("librosa")
    window = {"hann": "hann", "blackman": "blackman"}[spec.window]
    return lambda x: torch.from_numpy(
        module.power_to_db(
            module.feature.melspectrogram(
                y=x.numpy(), sr=spec.sample_rate, n_fft=spec.n_fft, hop_length=spec.hop_length, window=window,
                n_mels=spec.n_mels, pad_mode=spec.pad_mode,
            )
        )
    )  # fmt: skip


PRESETS = LOG_MEL_PRESETS
CASES = {  # a front end, its library, and clips that are complete, shorter, shorter than a window, and longer
    "whisper": (PRESETS["whisper"], whisper, (480_000, 479_900, 100_001, 150, 600_000)),
    "whisper large-v3": (replace(PRESETS["whisper"], n_mels=128), whisper, (100_001,)),
    "ast": (PRESETS["ast"], ast, (164_000, 50_001, 200_000)),
    "clap": (PRESETS["clap"], clap, (480_000, 479_400, 100_001)),
    "clap, Slaney's bands": (replace(PRESETS["clap"], mel_scale="slaney", mel_norm="slaney"), clap, (100_001,)),
    "seamless": (PRESETS["seamless"], seamless, (160_000, 20_001)),
    "kaldi": (PRESETS["kaldi"], kaldi, (160_000, 20_001)),
    "kaldi, mirrored ends": (replace(PRESETS["kaldi"], snip_edges=False), kaldi, (20_001,)),
    "kaldi, blackman": (replace(PRESETS["kaldi"], window="blackman", n_mels=40), kaldi, (20_001,)),
    "librosa": (PRESETS["librosa"], librosa, (220_500, 1500)),
    "librosa, 48 kHz, 25 ms": (
        replace(PRESETS["librosa"], sample_rate=48_000, n_fft=1200, win_length=1200, hop_length=480, n_mels=64),
        librosa, (96_000,),
    ),
    "librosa, blackman, mirrored": (
        replace(PRESETS["librosa"], n_fft=640, win_length=640, window="blackman", pad_mode="reflect", n_mels=40),
        librosa, (30_001,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", SIGNALS)
def test_agrees(library, name, kind):
    spec, make, lengths = CASES[name]
    theirs = make(library, spec)
    for samples in lengths if kind == "noise" else lengths[:1] if len(lengths) < 4 else lengths[2:3]:
        x = signal(kind, samples, spec)
        assert_agree(x, spec, theirs(x))


@pytest.mark.parametrize("name", ["whisper", "ast", "seamless", "clap", "librosa"])
def test_recordings(library, audio_dir, name):
    """Recordings, as if they had the front end's sampling rate."""
    spec, make, _ = CASES[name]
    x = recordings(audio_dir, each=30_000)[0].float() / 32768
    assert_agree(x[: spec.n_samples], spec, make(library, spec)(x[: spec.n_samples]))


def test_samples_may_be_int16_or_ragged():
    """A clip of int16, or within a longer row, has the features of the same clip alone."""
    for name in ("whisper", "clap", "kaldi"):
        spec = LOG_MEL_PRESETS[name]
        pcm = (32767 * signal("chirp", 9000, spec)).round().to(torch.int16)
        rows = torch.stack((pcm, pcm.flip(0)))
        rows[1, 5000:] = 30_000
        for impl in IMPLS:
            alone = log_mel(pcm.flip(0)[None, :5000].float() / 32768, spec, layout="spectrogram", impl=impl)
            out = log_mel(rows, spec, lengths=torch.tensor([9000, 5000]), layout="spectrogram", impl=impl)
            frames = alone.shape[2]
            torch.testing.assert_close(out[1:, :, :frames], alone, rtol=0, atol=1e-3)
            assert (out[1, :, frames:] == spec.pad_value).all()
