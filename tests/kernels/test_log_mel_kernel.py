"""The compiled CPU kernel of log_mel against float64, on every instruction set that this machine has."""

import random
import types
import warnings
from dataclasses import replace

import pytest
import torch
from log_mel_cases import (
    PRESETS,
    SIGNALS,
    assert_exact,
    assert_exact_mel,
    clips,
    quiet_about_empty_bands,  # noqa: F401
    recordings,
    signal_case,
)

from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec, _extension, log_mel
from ajepa_kernels.log_mel import CUDA_SIZES, SIZES, _kernel_reason, _kernel_tables

pytestmark = pytest.mark.skipif(not _extension.AVAILABLE, reason=f"needs the compiled kernels: {_extension.MISSING}")


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request, monkeypatch):
    """Limits the kernel to this instruction set; it uses the best one that the processor has up to the limit."""
    monkeypatch.setenv("AJEPA_CPU_ISA", request.param)
    return request.param


def random_spec(r: random.Random) -> LogMelSpec:
    n_fft = r.choice([128, 256, 400, 512, 1024, 2048, 4096, 8192, r.choice(SIZES)])
    win_length, rate = r.randint(n_fft // 2, n_fft), r.choice([8000, 16000, 22050, 32000, 48000])
    later = {"pad_value": r.choice([0.0, -7.5]), "scale": r.choice([1.0, 1.0, 32768.0])}
    if r.random() < 0.3:
        later["n_samples"] = r.randint(2 * n_fft, 12 * n_fft)
    common = {
        "sample_rate": rate, "n_fft": n_fft, "win_length": win_length, "hop_length": r.randint(win_length // 4, n_fft),
        "n_mels": r.choice([1, 23, 40, 64, 80, 128, 256]), "f_min": r.choice([0.0, 20.0, 300.0]),
        "f_max": r.choice([None, rate / 2 - 100, rate / 3]), "power": r.choice([1, 2]),
        "waveform_norm": r.choice(["none", "mean", "peak"]), "n_frames": r.choice([None, 5, 40]),
        "patch": (1, r.choice([3, 8, 16, 64])), "mean": r.choice([0.0, -4.0]), "std": r.choice([1.0, 4.5]), **later,
    }  # fmt: skip
    if r.random() < 0.5:
        return LogMelSpec(
            **common, window=r.choice(["hann", "povey", "hamming", "blackman"]), snip_edges=r.random() < 0.5,
            preemphasis=r.choice([0.0, 0.97]), remove_dc_offset=r.random() < 0.7,
        )  # fmt: skip
    log, center = r.choice(["ln", "db"]), r.random() < 0.7
    return LogMelSpec(
        **common, convention="torchaudio", window=r.choice(["hann", "hamming", "blackman"]), center=center, log=log,
        pad_mode=r.choice(["reflect", "constant"]) if center else "reflect",
        mel_scale=r.choice(["htk", "slaney"]), mel_norm=r.choice([None, "slaney"]), floor=r.choice([1e-5, 1e-7]),
        top_db=r.choice([None, 30.0, 80.0]) if log == "db" else None,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(32))
def test_random_specs(isa, seed):
    r = random.Random(seed)
    spec = random_spec(r)
    pcm = clips(spec.n_fft + r.randint(1, 20) * spec.hop_length + r.randint(0, 99), batch=3, seed=seed)
    lengths = torch.tensor([pcm.shape[1], spec.min_samples, r.randint(spec.min_samples, pcm.shape[1])])
    layout = r.choice(["patches", "spectrogram"])
    assert_exact(log_mel(pcm, spec, layout=layout, impl="fused"), pcm, spec, layout=layout)
    x = pcm.float() / 32768
    out = log_mel(x, spec, lengths=lengths, layout=layout, impl="fused")
    assert_exact(out, x, spec, lengths=lengths, layout=layout)
    assert_exact_mel(log_mel(x, spec, lengths=lengths, layout="mel", impl="fused"), x, spec, lengths=lengths)


@pytest.mark.parametrize("n_fft", SIZES)
def test_every_size(isa, n_fft):
    """16 times every product of 2, 3 and 5, with a window that is shorter by an odd number of samples."""
    spec = LogMelSpec(
        n_fft=n_fft, win_length=n_fft - n_fft // 5 - 1, hop_length=n_fft // 3, n_mels=24, floor=1e-7,
        convention="torchaudio" if n_fft % 32 else "kaldi",
    )  # fmt: skip
    pcm = clips(n_fft * 5 + 77, batch=1)
    assert_exact(log_mel(pcm, spec, layout="spectrogram", impl="fused"), pcm, spec, layout="spectrogram")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("signal", SIGNALS)
def test_signals(isa, name, signal):
    pcm, spec = signal_case(name, signal)
    assert_exact(log_mel(pcm, spec, impl="fused"), pcm, spec)


@pytest.mark.parametrize("name", PRESETS)
def test_recordings(audio_dir, name):
    spec, pcm = replace(LOG_MEL_PRESETS[name], n_frames=None, n_samples=None), recordings(audio_dir, each=30_000)
    assert_exact(log_mel(pcm, spec, impl="fused"), pcm, spec)


@pytest.mark.parametrize("std", [1.0, 2e-4, 1e6])
def test_dtypes(isa, std):
    """Results are rounded as torch rounds them, also where float16 is subnormal or overflows."""
    spec, pcm = replace(LOG_MEL_PRESETS["audio-jepa"], std=std), clips(60_000, batch=4)
    expected = log_mel(pcm, spec, impl="fused")
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(log_mel(pcm, spec, dtype=dtype, impl="fused"), expected.to(dtype), rtol=0, atol=0)


def test_strides():
    spec, pcm = LOG_MEL_PRESETS["audio-jepa"], clips(60_000, batch=4)
    expected = log_mel(pcm, spec, impl="fused")
    torch.testing.assert_close(log_mel(pcm[::2], spec, impl="fused"), expected[::2], rtol=0, atol=0)
    torch.testing.assert_close(log_mel(pcm.T.contiguous().T, spec, impl="fused"), expected, rtol=0, atol=0)
    assert log_mel(pcm[:0], spec, impl="fused").shape == (0, 128, 256)


def test_nan_stays_in_its_frames():
    spec = replace(LOG_MEL_PRESETS["a-jepa"], n_frames=None)
    x = clips(16_000).float() / 32768
    expected = log_mel(x, spec, layout="spectrogram", impl="fused")
    x[0, 8000] = torch.nan
    out = log_mel(x, spec, layout="spectrogram", impl="fused")
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[0, :, (8000 - 400) // 160 + 1 : 8000 // 160 + 1] = True
    torch.testing.assert_close(out[~hit], expected[~hit], rtol=0, atol=0)
    assert out[0, :, hit[0, 0]].isnan().float().mean() > 0.95  # all bands except the empty ones


def test_same_at_any_thread_count():
    pcm, threads = clips(320_000, batch=3), torch.get_num_threads()
    expected = log_mel(pcm, LOG_MEL_PRESETS["audio-jepa"], impl="fused")
    try:
        torch.set_num_threads(1)
        assert torch.equal(log_mel(pcm, LOG_MEL_PRESETS["audio-jepa"], impl="fused"), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("lengths", [None, [4000, 1600]])
def test_opcheck(lengths):
    out = torch.empty(2, 8, 1, 16, 16)
    arguments = {
        "n_fft": 512, "hop_length": 160, "first_sample": 0, "edge": 0, "frame_bias": -400, "frame_add": 1,
        "min_samples": 400, "n_frames": 10, "remove_dc": True, "preemphasis": 0.97, "waveform_norm": 2, "power": 2,
        "floor": 1e-7, "log_scale": 1.0, "log_shift": 0.0, "top": 3.0,
    }  # fmt: skip
    ragged = None if lengths is None else torch.tensor(lengths)
    tables = _kernel_tables(LogMelSpec(), torch.device("cpu"))
    for take_log in ({}, {"take_log": False}, {"pad": 1.0, "factor": 2.0, "n_samples": 3000, "edge": 3}):
        torch.library.opcheck(
            torch.ops.ajepa.log_mel_fwd.default, (clips(4000), ragged, *tables, out), arguments | take_log
        )


def test_op_refuses_what_it_cannot_take():
    spec, pcm = LogMelSpec(n_mels=32), clips(4000)
    tables, out = _kernel_tables(spec, torch.device("cpu")), torch.empty(2, 2, 1, 16, 16)
    good = {
        "n_fft": 512, "hop_length": 160, "first_sample": 0, "edge": 0, "frame_bias": -400, "frame_add": 1,
        "min_samples": 400, "n_frames": 16, "remove_dc": True, "preemphasis": 0.97, "waveform_norm": 0, "power": 2,
        "floor": 1e-7, "log_scale": 1.0, "log_shift": 0.0, "top": -1.0,
    }  # fmt: skip
    op = torch.ops.ajepa.log_mel_fwd
    op(pcm, None, *tables, out, **good)
    for bad, match in (
        (lambda: op(pcm.int(), None, *tables, out, **good), "int16 or float32"),
        (lambda: op(pcm.T, None, *tables, out, **good), "contiguous"),
        (lambda: op(pcm, None, *tables, out.double(), **good), "float32, float16"),
        (lambda: op(pcm, None, *tables, out[:1], **good), "out must be"),
        (lambda: op(pcm, torch.tensor([1]), *tables, out, **good), "lengths"),
        (lambda: op(pcm, None, *tables[:-1], tables.twiddles[:-1], out, **good), "twiddles"),
        (lambda: op(pcm, None, *tables[:-2], tables.intervals[:-1], tables.twiddles, out, **good), "intervals"),
        (lambda: op(pcm, None, tables.window[1:], *tables[1:], out, **good), "aligned to 16 bytes"),
        (lambda: op(pcm, None, *tables, out, **{**good, "frame_add": 2}), "out of range"),
        (lambda: op(pcm, None, *tables, out, **{**good, "n_fft": 500}), "n_fft"),
        (lambda: op(pcm, None, *tables, out, **{**good, "n_fft": 256}), "longer than n_fft"),
        (lambda: op(pcm, None, *tables, out, **{**good, "n_fft": 784}), "16 times"),
        (lambda: op(pcm, None, *tables, out, **good, n_samples=2**32), "out of range"),
        (lambda: op(pcm, None, *tables, out, **good, n_samples=-1), "out of range"),
        (lambda: op(pcm, None, *tables, out, **{**good, "edge": 4}), "out of range"),
        (lambda: op(pcm, None, *tables, out, **{**good, "n_frames": 17}), "n_frames"),
        (lambda: op(pcm, None, *tables, out, **{**good, "hop_length": 0}), "out of range"),
        (lambda: op(pcm, None, *tables, out, **{**good, "hop_length": 2**32}), "out of range"),
        (lambda: op(pcm, None, *tables, out, **{**good, "min_samples": 2**32 + 1}), "out of range"),
        (lambda: op(pcm, None, *tables, out[:, :, :, :0], **good), "out"),
    ):
        with pytest.raises(RuntimeError, match=match):
            bad()


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize(("layout", "backend"), [("patches", "inductor"), ("mel", "aot_eager")])
def test_compiles_as_one_graph(impl, layout, backend):
    torch.compiler.reset()
    spec, pcm = replace(LOG_MEL_PRESETS["a-jepa"], n_frames=32), clips(8000)
    function = lambda x: 2 * log_mel(x, spec, layout=layout, impl=impl)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(pcm), function(pcm), rtol=0, atol=1e-3)


@pytest.mark.parametrize("impl", ["fused", "reference"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_for_several_specs(impl, dynamic):
    """One compiled function takes the spec as an argument, and fields that change between calls become symbols."""
    torch.compiler.reset()  # earlier cases count towards the limit of recompilations
    spec, pcm = replace(LOG_MEL_PRESETS["a-jepa"], n_frames=None), clips(8000)
    compiled = torch.compile(
        lambda x, spec: log_mel(x, spec, impl=impl), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    for changes in ({}, {"hop_length": 200}, {"win_length": 320}, {"f_min": 50.0}, {"n_mels": 64, "std": 3.0}, {}):
        changed = replace(spec, **changes)
        torch.testing.assert_close(compiled(pcm, changed), log_mel(pcm, changed, impl=impl), rtol=0, atol=1e-3)


def test_without_the_extension(monkeypatch):
    """log_mel warns once that it runs the plain version, and why."""
    spec, pcm = LogMelSpec(n_mels=32), clips(4000)
    expected = log_mel(pcm, spec, impl="reference")
    monkeypatch.setattr(_extension, "MISSING", "it was installed without a C++ compiler")
    _extension.warn_plain.cache_clear()
    with pytest.warns(UserWarning, match="plain PyTorch.*without a C\\+\\+ compiler"):
        assert torch.equal(log_mel(pcm, spec), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log_mel(pcm, spec)
    with pytest.raises(RuntimeError, match="compiler"):
        log_mel(pcm, spec, impl="fused")


def test_sizes_without_a_cuda_kernel(monkeypatch):
    """On a GPU they run as plain PyTorch, and the warning names the sizes of the kernel."""
    monkeypatch.setattr(_extension, "CUDA", True)
    pcm = types.SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.int16, requires_grad=False)
    for n_fft in SIZES:
        reason = _kernel_reason(pcm, LogMelSpec(n_fft=n_fft, win_length=100), torch.float32)
        assert (reason == "") == (n_fft in CUDA_SIZES)
        assert not reason or (f"no transform of {n_fft} points" in reason and "400, 512, 640" in reason)
