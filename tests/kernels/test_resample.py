"""resample: every implementation against a windowed sinc in float64, the filter against its specified bounds, and
slices and streams against the whole."""

import importlib
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ajepa_kernels import Resampler, _extension, input_span, resample, resample_reference, resampled_length

module = importlib.import_module("ajepa_kernels.resample")  # the package's attribute of this name is the function

SPECTRAL = [
    *((48000, 16000), (44100, 32000), (44100, 16000), (22050, 16000)),
    *((8000, 16000), (16000, 44100), (96000, 32000), (11025, 16000)),
]
DIRECT = [(44100, 44099), (384000, 8001), (11, 13)]  # interpolated taps, the same with a long filter, a full table
PAIRS = SPECTRAL + DIRECT
fused = pytest.mark.skipif(not _extension.AVAILABLE, reason=f"needs the compiled kernels: {_extension.MISSING}")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request, monkeypatch):
    """Limits the kernel to this instruction set; it uses the best one that the processor has up to the limit."""
    monkeypatch.setenv("AJEPA_CPU_ISA", request.param)
    return request.param


def oracle(x: np.ndarray, from_rate: int, to_rate: int, m: np.ndarray) -> np.ndarray:
    """Outputs number `m` of float64 recordings `[..., T]`: the sum over i of x[i] h(m * from_rate / to_rate - i)."""
    low = min(1.0, to_rate / from_rate)
    half_width = (102.05 / (2.285 * 0.1 * math.pi * low) + 1) / 2
    reach = math.ceil(half_width)
    out = np.empty((*x.shape[:-1], len(m)))
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(reach, reach + 1 + int(m.max(initial=0)) * from_rate // to_rate)])
    for k, output in enumerate(m.tolist()):
        whole, rest = divmod(output * from_rate, to_rate)
        t = rest / to_rate - np.arange(-reach, reach + 1)
        window = np.i0(0.1102 * 101.3 * np.sqrt(np.maximum(0, 1 - (t / half_width) ** 2))) / np.i0(0.1102 * 101.3)
        h = 0.95 * low * np.sinc(0.95 * low * t) * window * (abs(t) < half_width)
        out[..., k] = padded[..., whole : whole + 2 * reach + 1] @ h
    return out


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.2


def decibels(error: torch.Tensor, signal: torch.Tensor) -> float:
    return 10 * math.log10(float(error.double().square().mean() / signal.double().square().mean()) + 1e-30)


def sizes(from_rate: int, to_rate: int) -> int:
    """A number of samples that spans several blocks of the kernel and many filter lengths."""
    filter = module._filter(from_rate, to_rate)
    blocks = module._blocks(filter)
    return 5 * blocks.size_in + 331 if blocks else 5 * filter.half + 331


# --- against the definition ----------------------------------------------------------------------------------------


@fused
@pytest.mark.parametrize(("from_rate", "to_rate"), PAIRS)
def test_fused(isa, from_rate, to_rate):
    """Compares outputs at the beginning, at the end and in between. The error is that of float32 sums and of a stop
    band 110 dB down."""
    x = noise(2, sizes(from_rate, to_rate))
    out = resample(x, from_rate, to_rate, impl="fused")
    count = resampled_length(x.shape[1], from_rate, to_rate)
    m = np.unique(np.r_[0:9, count - 9 : count, 0 : count : max(1, count // 61)])
    expected = torch.from_numpy(oracle(x.double().numpy(), from_rate, to_rate, m))
    assert out.shape == (2, count) and decibels(out[:, m] - expected, expected) < -117
    assert (out[:, m] - expected).abs().max() < 3e-6


@pytest.mark.parametrize(("from_rate", "to_rate"), PAIRS)
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_reference(from_rate, to_rate, compute):
    x = noise(2, min(sizes(from_rate, to_rate), 20_000))
    out = resample_reference(x, from_rate, to_rate, compute=compute)
    m = np.arange(0, out.shape[1], max(1, out.shape[1] // 41))
    expected = torch.from_numpy(oracle(x.double().numpy(), from_rate, to_rate, m))
    assert out.dtype == compute
    assert (out[:, m] - expected).abs().max() < (2e-6 if compute == torch.float32 else 1e-12)


@fused
def test_recordings(audio_dir):
    """On real audio the only error is the rounding to int16."""
    soundfile = pytest.importorskip("soundfile")
    done = 0
    for path in sorted(audio_dir.rglob("*.wav"))[::17][:6]:
        pcm, rate = soundfile.read(path, dtype="int16", always_2d=True, frames=30_000)
        if rate == 16_000:
            rate = 48_000
        exact = resample_reference(
            torch.from_numpy(pcm), rate, 16_000, downmix=True, dtype=torch.float32, compute=torch.float64
        )
        out = resample(torch.from_numpy(pcm), rate, 16_000, downmix=True, impl="fused")
        assert (out - (exact * 32768).clamp(-32768, 32767)).abs().max() <= 0.51
        done += 1
    if not done:
        pytest.skip(f"{audio_dir} contains no WAV files")


@fused
@pytest.mark.parametrize(("from_rate", "to_rate"), [(48000, 16000), (16000, 44100), (44100, 44099)])
def test_int16(from_rate, to_rate):
    """int16 results are rounded to nearest even and saturated. Their RMS error is that of rounding, 1 / sqrt(12)."""
    g = torch.Generator().manual_seed(1)
    pcm = torch.randint(-32768, 32768, (2, 9001), generator=g, dtype=torch.int16)
    pcm[1] = torch.where(torch.arange(9001) % 200 < 100, 32767, -32768)  # this signal overshoots
    exact = resample_reference(pcm, from_rate, to_rate, dtype=torch.float32, compute=torch.float64) * 32768
    out = resample(pcm, from_rate, to_rate, impl="fused")
    assert out.dtype == torch.int16 and out.max() == 32767 and out.min() == -32768
    error = out - exact.clamp(-32768, 32767)
    assert error.abs().max() < 0.55 and abs(error[0].square().mean().sqrt() - 12**-0.5) < 0.02
    as_float = resample(pcm, from_rate, to_rate, dtype=torch.float32, impl="fused")
    assert torch.equal(out, (as_float * 32768).clamp(-32768, 32767).round().to(torch.int16))
    from_float = resample(pcm.float() / 32768, from_rate, to_rate, dtype=torch.int16, impl="fused")
    assert torch.equal(out, from_float)


def test_exact_ties_and_nan():
    """With equal rates, samples are only rounded to int16."""
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 40000.0, -40000.0, math.nan, math.inf, -math.inf]) / 32768
    expected = torch.tensor([0, 2, 2, 0, -2, 32767, -32768, 0, 32767, -32768], dtype=torch.int16)
    for impl in ("auto", "reference"):
        assert torch.equal(resample(x, 8000, 8000, dtype=torch.int16, impl=impl), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_downmix(channels, impl):
    g = torch.Generator().manual_seed(channels)
    pcm = torch.randint(-32768, 32768, (2, 500, channels), generator=g, dtype=torch.int16)
    mean = np.rint(pcm.double().numpy().mean(-1)).astype(np.int16)  # ties to even
    assert np.array_equal(resample(pcm, 8000, 8000, downmix=True, impl=impl).numpy(), mean)
    mixed = resample(pcm, 48000, 16000, downmix=True, dtype=torch.float32, impl=impl)
    expected = resample_reference(pcm.double().mean(-1).float() / 32768, 48000, 16000)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=2e-6)
    x = pcm.float() / 32768
    torch.testing.assert_close(resample(x, 48000, 16000, downmix=True, impl=impl), expected, rtol=0, atol=2e-6)


# --- the filter ----------------------------------------------------------------------------------------------------


def fit(out: torch.Tensor, frequency: float, rate: int) -> tuple[float, float, float]:
    """(amplitude, phase) of a tone in the middle of `out`, and the power of the remainder relative to a full tone's."""
    margin = len(out) // 4
    t = np.arange(margin, len(out) - margin)
    angle = 2 * np.pi * frequency * t / rate
    basis = np.stack((np.sin(angle), np.cos(angle)), 1)
    y = out[margin : len(out) - margin].double().numpy()
    sine, cosine = np.linalg.lstsq(basis, y, rcond=None)[0]
    rest = y - basis @ (sine, cosine)
    return math.hypot(sine, cosine), math.atan2(cosine, sine), float(np.mean(rest**2) / 0.5)


@pytest.mark.parametrize(("from_rate", "to_rate"), PAIRS)
def test_pass_and_stop_band(from_rate, to_rate):
    """Tones up to 0.90 of the lower Nyquist frequency pass within 0.05 dB and without delay, and their images and
    aliases are 100 dB below them. Tones from 1.00 on are attenuated by 100 dB."""
    low = min(from_rate, to_rate) / 2
    samples = min(8 * module._filter(from_rate, to_rate).half + 4000, 80_000)
    passed = [share * low for share in (0.0101, 0.3, 0.61, 0.8, 0.87, 0.9)]
    stopped = [low + share * (from_rate / 2 - low) for share in (0.0, 0.003, 0.02, 0.1, 0.35, 0.7, 0.97)]
    stopped = stopped if from_rate > 1.01 * to_rate else []
    angle = 2 * math.pi * torch.tensor(passed + stopped, dtype=torch.float64)[:, None] / from_rate
    out = resample((angle * torch.arange(samples) + 0.5).sin().float(), from_rate, to_rate)
    for frequency, y in zip(passed, out, strict=False):
        amplitude, phase, rest = fit(y, frequency, to_rate)
        assert abs(20 * math.log10(amplitude)) < 0.05, frequency
        assert abs(phase - 0.5) < 1e-4 and 10 * math.log10(rest) < -100, frequency
    for frequency, y in zip(stopped, out[len(passed) :], strict=True):
        middle = y[len(y) // 4 : -len(y) // 4].double()
        assert 20 * math.log10(float(middle.square().mean().sqrt()) / 0.5**0.5 + 1e-30) < -100, frequency


@pytest.mark.parametrize(("from_rate", "to_rate"), [(48000, 16000), (8000, 16000), (16000, 48000)])
def test_linear_phase(from_rate, to_rate):
    """The response to an impulse at a time that is also an output time is symmetric about that output."""
    x = torch.zeros(1500)
    x[600] = 1
    out = resample(x, from_rate, to_rate)
    centre = 600 * to_rate // from_rate
    reach = min(centre, len(out) - 1 - centre)
    after, before = out[centre : centre + reach], out[centre - reach + 1 : centre + 1].flip(0)
    assert (after - before).abs().max() < 1e-6 and out.abs().argmax() == centre


def test_constant():
    """A constant passes with a gain of 1 at every filter phase."""
    for pair in PAIRS:
        out = resample(torch.full((8 * module._filter(*pair).half,), 0.7), *pair)
        assert (out[len(out) // 4 : -len(out) // 4] - 0.7).abs().max() < 5e-6, pair


@pytest.mark.parametrize(
    ("from_rate", "to_rate", "share"),
    [(48000, 16000, 0.88), (44100, 16000, 0.45), (16000, 44100, 0.45), (44100, 44099, 0.45)],
)
def test_equals_soxr_in_the_pass_band(from_rate, to_rate, share):
    """At fractional ratios soxr itself droops by 0.01 dB in the upper half of the pass band, which is not compared."""
    soxr = pytest.importorskip("soxr")
    frequencies = torch.linspace(0.01, share, 40, dtype=torch.float64) * min(from_rate, to_rate) / 2
    angle = 2 * math.pi * frequencies[:, None] / from_rate * torch.arange(20_000) + torch.arange(40)[:, None]
    x = (angle.sin().sum(0) / 20).float()
    peer = torch.from_numpy(soxr.resample(x.numpy(), from_rate, to_rate, quality="VHQ"))
    out = resample(x, from_rate, to_rate)
    middle = slice(len(out) // 4, -len(out) // 4)
    assert decibels(out[: len(peer)][middle] - peer[: len(out)][middle], peer) < -95


# --- lengths, slices, streams ---------------------------------------------------------------------------------------


def test_length():
    """There is one output at every time m / to_rate before the end of the recording."""
    for from_rate, to_rate in PAIRS:
        for samples in (0, 1, 2, 3, 17, 441, 48000):
            expected = sum(m * from_rate < samples * to_rate for m in range(samples * to_rate // from_rate + 2))
            assert resampled_length(samples, from_rate, to_rate) == expected
            assert len(resample(torch.zeros(samples), from_rate, to_rate)) == expected


@pytest.mark.parametrize("impl", ["auto", "soxr", "reference"])
@pytest.mark.parametrize(("from_rate", "to_rate"), [(44100, 16000), (16000, 16000), (11, 13)])
def test_ragged(impl, from_rate, to_rate):
    """A row equals its recording resampled alone, followed by zeros. Samples after its length do not matter."""
    if impl == "soxr":
        pytest.importorskip("soxr")
    x = noise(4, 3001)
    lengths = torch.tensor([3001, 1500, 1, 0])
    for b, length in enumerate(lengths.tolist()):
        x[b, length:] = math.nan
    out = resample(x, from_rate, to_rate, lengths=lengths, impl=impl)
    for b, length in enumerate(lengths.tolist()):
        count = resampled_length(length, from_rate, to_rate)
        alone = resample(x[b, :length], from_rate, to_rate, impl=impl)
        torch.testing.assert_close(out[b, :count], alone, rtol=0, atol=1e-6)
        assert not out[b, count:].any()
    assert out.shape[1] == resampled_length(3001, from_rate, to_rate)


@fused
@pytest.mark.parametrize(("from_rate", "to_rate"), [*PAIRS, (16000, 16000)])
def test_slices_equal_the_whole(isa, from_rate, to_rate):
    x = noise(sizes(from_rate, to_rate), seed=3)
    whole = resample(x, from_rate, to_rate, impl="fused")
    n = len(whole)
    for first, count in ((0, 1), (5, 7), (n // 2, n // 3), (n - 1, 1), (n // 7, 0)):
        low, high = input_span(first, count, from_rate, to_rate)
        low, high = max(0, low), max(0, min(high, len(x)))
        part = resample(x[low:high], from_rate, to_rate, first=first, count=count, offset=low, impl="fused")
        assert torch.equal(part, whole[first : first + count]), (first, count)


@pytest.mark.parametrize(("from_rate", "to_rate"), [(44100, 16000), (11, 13), (384000, 8001)])
def test_input_span_holds_the_filter(from_rate, to_rate):
    """Samples outside a span change nothing. Samples of a block beyond the filter's reach change only the rounding."""
    x = noise(sizes(from_rate, to_rate))
    first, count = resampled_length(len(x), from_rate, to_rate) // 2, 20
    low, high = input_span(first, count, from_rate, to_rate)
    filter = module._filter(from_rate, to_rate)
    start, end = (
        first * from_rate // to_rate - filter.half + 1,
        (first + count - 1) * from_rate // to_rate + filter.half,
    )
    assert low <= start and high > end
    expected = resample(x, from_rate, to_rate, first=first, count=count)
    outside = x.clone()
    outside[: max(low, 0)], outside[max(high, 0) :] = 1.0, -1.0
    assert torch.equal(resample(outside, from_rate, to_rate, first=first, count=count), expected)
    near = torch.zeros_like(x)
    near[start : end + 1] = x[start : end + 1]
    out = resample(near, from_rate, to_rate, first=first, count=count)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("impl", ["soxr", "reference"])
@pytest.mark.parametrize(("first", "count", "offset"), [(0, None, 0), (100, 700, 0), (500, 300, 900), (0, 50, 300)])
def test_slices_of_the_other_implementations(impl, first, count, offset):
    """Slices equal those of the reference. soxr has a different filter, which is equal in the pass band."""
    if impl == "soxr":
        pytest.importorskip("soxr")
    x = (torch.arange(4000) * 0.3).sin() * torch.hann_window(4000)
    arguments = {"first": first, "count": count, "offset": offset}
    out = resample(x[offset:], 44100, 32000, impl=impl, **arguments)
    expected = resample_reference(x[offset:], 44100, 32000, **arguments)
    inside = slice(200, None) if offset > 500 else slice(None)  # soxr rings differently at the start
    assert out.shape == expected.shape
    torch.testing.assert_close(out[inside], expected[inside], rtol=0, atol=2e-4 if impl == "soxr" else 0)


@pytest.mark.parametrize("impl", ["auto", "soxr", "reference"])
def test_samples_before_the_recording(impl):
    """With a negative offset, the samples of pcm before sample 0 are ignored."""
    if impl == "soxr":
        pytest.importorskip("soxr")
    for pair in ((44100, 16000), (11, 13), (8000, 8000)):
        x = noise(3000)
        expected = resample(x[441:], *pair, impl=impl)
        out = resample(x, *pair, offset=-441, impl=impl)
        assert out.shape == expected.shape
        inside = slice(200 if impl == "soxr" else 0, None)  # soxr rings differently at the start
        torch.testing.assert_close(out[inside], expected[inside], rtol=0, atol=1e-6)


@fused
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pair=st.sampled_from([(48000, 16000), (8000, 16000), (44100, 32000), (44100, 44099), (13, 11), (16000, 16000)]),
    blocks=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 9000)), max_size=6),
    stereo=st.booleans(),
    int16=st.booleans(),
)
def test_stream_equals_the_whole(pair, blocks, stereo, int16):
    shape = (sum(blocks), 2) if stereo else (sum(blocks),)
    x = noise(*shape)
    x = (x * 32767).to(torch.int16) if int16 else x
    dtype = torch.int16 if int16 else torch.float32
    stream = Resampler(*pair, downmix=stereo, dtype=dtype, impl="fused")
    parts = [stream.push(block) for block in x.split(blocks)] if blocks else []
    out = torch.cat([*parts, stream.finish()])
    assert out.dtype == dtype and torch.equal(out, resample(x, *pair, downmix=stereo, dtype=dtype, impl="fused"))


@fused
@pytest.mark.parametrize("pair", [(8000, 16000), (44100, 44099)])
def test_stream_of_single_samples(pair):
    x = noise(2500)
    stream = Resampler(*pair)
    out = torch.cat([*(stream.push(block) for block in x.split(1)), stream.finish()])
    assert torch.equal(out, resample(x, *pair))


def test_stream_keeps_little():
    """An endless stream needs the memory of a few blocks."""
    stream = Resampler(44100, 16000)
    for block in torch.zeros(400_000).split(4000):
        stream.push(block)
        assert sum(len(kept) for kept in stream._blocks) < 16_000


@fused
def test_same_bits_with_avx2_and_avx512(monkeypatch):
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    if " avx512f" not in flags or " avx2" not in flags:
        pytest.skip("this processor does not have both AVX2 and AVX-512")
    for pair in PAIRS:
        x, results = noise(2, min(sizes(*pair), 30_000)), []
        for isa in ("avx2", "avx512"):
            monkeypatch.setenv("AJEPA_CPU_ISA", isa)
            results.append(resample(x, *pair, impl="fused"))
        assert torch.equal(*results), pair


# --- the op ---------------------------------------------------------------------------------------------------------


def poisoned(*arguments):
    """The op, called with an output that is filled with wrong values."""
    out = arguments[6]
    out.fill_(-12345 if out.dtype == torch.int16 else math.nan)
    torch.ops.ajepa.resample_fwd(*arguments)


@fused
@pytest.mark.parametrize("pair", [(48000, 16000), (44100, 44099), (16000, 16000)])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32])
def test_every_output_is_written(isa, pair, dtype):
    x = noise(3, 7001)
    lengths = torch.tensor([7001, 350, 0])
    for first, count in ((0, resampled_length(7001, *pair)), (11, 5), (3, 0)):
        out = module._resample_fused(x, *pair, lengths, first, count, 0, False, dtype, poisoned)
        expected = resample(x, *pair, lengths=lengths, first=first, count=count, dtype=dtype)
        assert torch.equal(out, expected) and not expected[2].any()


@pytest.mark.parametrize("impl", ["auto", "soxr", "reference"])
@pytest.mark.parametrize("pair", [(44100, 16000), (8000, 16000), (44100, 44099), (8000, 8000)])
def test_small_and_empty(impl, pair):
    if impl == "soxr":
        pytest.importorskip("soxr")
    for shape in ((0,), (1,), (2,), (3, 0), (0, 0), (0, 5), (1, 1)):
        out = resample(torch.ones(shape), *pair, impl=impl)
        assert out.shape == (*shape[:-1], resampled_length(shape[-1], *pair)) and out.isfinite().all()
    assert resample(torch.ones(5), *pair, count=0, impl=impl).shape == (0,)
    assert resample(torch.ones(5), *pair, first=10**6, impl=impl).shape == (0,)
    assert not resample(torch.ones(5), *pair, first=10**5, count=3, impl=impl).any()  # beyond the filter's reach


@fused
def test_strides_and_threads():
    x = noise(6, 9000)
    expected = resample(x, 44100, 16000)
    assert torch.equal(resample(x[::2], 44100, 16000), expected[::2])
    assert torch.equal(resample(x.T.contiguous().T, 44100, 16000), expected)
    assert torch.equal(resample(x[3], 44100, 16000), expected[3])
    planar = torch.stack((x, -0.5 * x), 1)  # [B, C, T]
    torch.testing.assert_close(resample(planar.mT, 44100, 16000, downmix=True), expected / 4, rtol=0, atol=1e-6)
    assert not resample(x.requires_grad_(), 44100, 16000).requires_grad
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(resample(x, 44100, 16000), expected)
    finally:
        torch.set_num_threads(threads)


@fused
def test_calls_from_several_threads():
    """A loader calls from several threads, so every call needs its own scratch memory."""
    jobs = [(noise(20_000, seed=seed), pair) for seed, pair in enumerate([*PAIRS, (8000, 8000)])] * 3
    expected = [resample(x, *pair) for x, pair in jobs]
    with ThreadPoolExecutor(4) as pool:
        out = list(pool.map(lambda job: resample(job[0], *job[1]), jobs))
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@fused
@pytest.mark.parametrize("pair", [(48000, 16000), (44100, 44099)])
def test_non_finite_samples_stay_near(pair):
    """Non-finite samples affect only the outputs of their blocks."""
    x = noise(30_000)
    expected = resample(x, *pair)
    x[15_000] = math.nan
    out = resample(x, *pair)
    spans = {m: input_span(m, 1, *pair) for m in range(0, len(out), 97)}
    clean = [m for m, (low, high) in spans.items() if not low - 16 <= 15_000 < high + 16]
    assert len(clean) > len(out) // 97 // 3 and torch.equal(out[clean], expected[clean])
    assert out[15_000 * pair[1] // pair[0]].isnan()


@fused
@pytest.mark.parametrize("pair", [(48000, 16000), (44100, 44099), (8000, 8000)])
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(pair, ragged):
    tables, method = module._tables(*pair, torch.device("cpu"), False), module._method(*pair, False)
    lengths = torch.tensor([900, 5]) if ragged else None
    arguments = (noise(2, 900, 1), lengths, *tables, torch.empty(2, 300), *method, 0, 0)
    torch.library.opcheck(torch.ops.ajepa.resample_fwd.default, arguments)


@fused
def test_op_refuses_what_it_cannot_take():
    spectral = [*module._tables(48000, 16000, torch.device("cpu"), False)], [*module._method(48000, 16000, False)]
    direct = [*module._tables(44100, 44099, torch.device("cpu"), False)], [*module._method(44100, 44099, False)]
    pcm, out = noise(2, 900, 1), torch.empty(2, 300)

    def call(pcm=pcm, lengths=None, tables=spectral[0], out=out, method=spectral[1], first=0, offset=0):
        torch.ops.ajepa.resample_fwd(pcm, lengths, *tables, out, *method, first, offset)

    def changed(values, at, value):
        return [*values[:at], value, *values[at + 1 :]]

    call()
    call(tables=direct[0], method=direct[1])
    rows, twiddles, response, positions = spectral[0]
    for bad, match in (
        (lambda: call(pcm=pcm.double()), "int16 or float32"),
        (lambda: call(pcm=pcm[:, :, 0]), r"\[B, T, C\]"),
        (lambda: call(pcm=pcm.transpose(0, 1)), "contiguous"),
        (lambda: call(out=out[:1]), "out must be"),
        (lambda: call(lengths=torch.tensor([1])), "lengths"),
        (lambda: call(lengths=torch.tensor([1, 2], dtype=torch.int32)), "lengths"),
        (lambda: call(pcm=noise(2, 900, 0)), "channels"),
        (lambda: call(first=-1), "first"),
        (lambda: call(offset=2**41), "offset"),
        (lambda: call(method=changed(spectral[1], 0, 2**20)), "rate"),
        (lambda: call(method=changed(spectral[1], 8, spectral[1][8] + 1)), "radices"),
        (lambda: call(method=changed(spectral[1], 7, spectral[1][7] * 2)), "hop"),
        (lambda: call(tables=(rows, twiddles[:-1], response, positions)), "twiddles"),
        (lambda: call(tables=(rows, twiddles, response[:-1], positions)), "response"),
        (lambda: call(tables=(rows, twiddles, response, positions + 10**6)), "positions"),
        (lambda: call(tables=(rows, twiddles, response, -positions - 1)), "positions"),
        (lambda: call(tables=(direct[0][0][:-1], *direct[0][1:]), method=direct[1]), "rows"),
        (lambda: call(tables=direct[0], method=changed(direct[1], 3, 0)), "phases"),
    ):
        with pytest.raises(RuntimeError, match=match):
            bad()


@pytest.mark.parametrize(("impl", "dynamic"), [("auto", None), ("auto", True), ("reference", None)])
def test_compiles_as_one_graph(impl, dynamic):
    """Rates are arguments of the compiled function, and become symbols when they change between calls."""
    torch.compiler.reset()
    x, lengths = noise(2, 3000), torch.tensor([3000, 100])

    def call(x, lengths, rate):
        return 2 * resample(x, rate, 16000, lengths=lengths, impl=impl)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rate, samples in ((48000, 3000), (44100, 3000), (16000, 3000), (48000, 2000))[
        : 2 if impl == "reference" else 4
    ]:
        arguments = x[:, :samples], lengths.clamp_max(samples), rate
        torch.testing.assert_close(compiled(*arguments), call(*arguments), rtol=0, atol=2e-6)


# --- choices and errors ---------------------------------------------------------------------------------------------


def test_without_the_extension(monkeypatch):
    """Without the extension soxr is used. If soxr is missing as well, plain PyTorch is used, with one warning."""
    x = noise(4000)
    expected = resample(x, 44100, 16000, impl="reference")
    monkeypatch.setattr(_extension, "MISSING", "it was installed without a C++ compiler")
    with pytest.raises(RuntimeError, match=r"C\+\+ compiler"):
        resample(x, 44100, 16000, impl="fused")
    calls = []
    monkeypatch.setattr(module, "_import_soxr", lambda: object())
    monkeypatch.setattr(module, "_resample_soxr", lambda *arguments: calls.append(arguments) or x)
    assert resample(x, 44100, 16000) is x and len(calls) == 1
    monkeypatch.setattr(module, "_import_soxr", lambda: None)
    _extension.warn_plain.cache_clear()
    with pytest.warns(UserWarning, match=r"plain PyTorch.*without a C\+\+ compiler"):
        assert torch.equal(resample(x, 44100, 16000), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resample(x, 44100, 16000)
    with pytest.raises(RuntimeError, match="soxr is not installed"):
        resample(x, 44100, 16000, impl="soxr")


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, "float64.*pcm.float", lambda x: resample(x.double(), 44100, 16000)),
        (TypeError, "int32", lambda x: resample(x.int(), 44100, 16000)),
        (TypeError, "dtype must be", lambda x: resample(x, 44100, 16000, dtype=torch.float64)),
        (TypeError, "from_rate must be a whole number", lambda x: resample(x, 44100.0, 16000)),
        (TypeError, "to_rate must be a whole number", lambda x: resample(x, 44100, True)),
        (ValueError, "to_rate must be a whole number", lambda x: resample(x, 44100, 0)),
        (ValueError, "from_rate must be .* 1 to 384000", lambda x: resample(x, 384001, 16000)),
        (ValueError, "two steps", lambda x: resample(x, 384000, 383)),
        (ValueError, "downmix=True", lambda x: resample(x[None, None], 44100, 16000)),
        (ValueError, "downmix=False", lambda x: resample(x, 44100, 16000, downmix=True)),
        (ValueError, "channels", lambda x: resample(x[:, None][:, :0], 44100, 16000, downmix=True)),
        (ValueError, "first and count", lambda x: resample(x, 44100, 16000, first=-1)),
        (ValueError, "first and count", lambda x: resample(x, 44100, 16000, count=-1)),
        (
            ValueError,
            "lengths must be 0 to 100",
            lambda x: resample(x[None], 44100, 16000, lengths=torch.tensor([101])),
        ),
        (ValueError, "lengths must be 0 to 100", lambda x: resample(x[None], 44100, 16000, lengths=torch.tensor([-1]))),
        (ValueError, r"lengths must be int64 \[1\]", lambda x: resample(x[None], 8, 16, lengths=torch.tensor([1, 2]))),
        (ValueError, "lengths must be int64", lambda x: resample(x[None], 8, 16, lengths=torch.tensor([1.0]))),
        (ValueError, "impl must be one of", lambda x: resample(x, 44100, 16000, impl="fast")),
        (ValueError, "first and count", lambda x: input_span(-1, 1, 44100, 16000)),
        (ValueError, "from_rate", lambda x: resampled_length(10, 0, 16000)),
        (ValueError, "impl must be one of", lambda x: Resampler(44100, 16000, impl="fast")),
        (ValueError, r"a block must be \[n\]", lambda x: Resampler(44100, 16000).push(x[None])),
        (TypeError, "float64", lambda x: Resampler(44100, 16000).push(x.double())),
    ],
)
def test_errors(error, match, call):
    with pytest.raises(error, match=match):
        call(torch.zeros(100))


def test_stream_errors():
    stream = Resampler(44100, 16000, downmix=True)
    stream.push(torch.zeros(10, 2))
    for block in (torch.zeros(10, 1), torch.zeros(10, 2, dtype=torch.int16)):
        with pytest.raises(ValueError, match="every block"):
            stream.push(block)
    stream.finish()
    with pytest.raises(RuntimeError, match="new Resampler"):
        stream.push(torch.zeros(10, 2))
    with pytest.raises(RuntimeError, match="new Resampler"):
        stream.finish()
