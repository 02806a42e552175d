"""LogMel: leading axes, gradients, torchaudio's place, and what a module must survive."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from log_mel_cases import clips, quiet_about_empty_bands  # noqa: F401

from ajepa.model._torchaudio import has_torchaudio, import_torchaudio
from ajepa_kernels import LOG_MEL_PRESETS, LogMel, LogMelSpec, _extension, log_mel

SPEC = LogMelSpec(n_mels=40, patch=(8, 8))
SMALL = LogMelSpec(n_fft=128, win_length=100, hop_length=40, n_mels=6, patch=(3, 2), floor=1e-8)


def waveform(*shape: int) -> torch.Tensor:
    return clips(shape[-1], batch=math.prod(shape[:-1])).float().view(shape) / 32768


@pytest.mark.parametrize("leading", [(), (3,), (2, 1), (2, 3, 1), (0,), (2, 0)])
@pytest.mark.parametrize("layout", ["spectrogram", "patches", "mel"])
def test_leading_axes(leading, layout):
    pcm = waveform(*leading, 4000)
    out = LogMel(SPEC, layout)(pcm)
    flat = log_mel(pcm.reshape(-1, 4000), SPEC, layout=layout)
    assert out.shape == (*leading, *flat.shape[1:]) and torch.equal(out.reshape(flat.shape), flat)


@pytest.mark.parametrize("leading", [(), (2,), (2, 1)])
def test_lengths_have_the_leading_axes(leading):
    pcm, lengths = waveform(*leading, 4000), torch.full(leading, 2000)
    out = LogMel(SPEC)(pcm, lengths)
    torch.testing.assert_close(out[..., :11], LogMel(SPEC)(pcm[..., :2000]), rtol=0, atol=1e-4)
    assert not out[..., 11:].any()


def test_dtype_and_strides():
    pcm = waveform(4, 2, 4000)
    expected = LogMel(SPEC)(pcm)
    assert torch.equal(LogMel(SPEC)(pcm.transpose(0, 1)), expected.transpose(0, 1))
    assert torch.equal(LogMel(SPEC)(pcm[:, ::2]), expected[:, ::2])
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(LogMel(SPEC, dtype=dtype)(pcm), expected.to(dtype))
    assert torch.equal(LogMel(SPEC)((pcm * 32768).to(torch.int16)), expected)


@pytest.mark.skipif(not has_torchaudio(), reason="torchaudio, the reference, cannot be imported")
@pytest.mark.parametrize("leading", [(), (2,), (2, 1)])
def test_in_the_place_of_torchaudio(leading):
    transforms = import_torchaudio().transforms
    theirs = torch.nn.Sequential(
        transforms.MelSpectrogram(16_000, n_fft=640, hop_length=160, n_mels=64), transforms.AmplitudeToDB()
    )
    ours = LogMel(
        LogMelSpec(n_fft=640, win_length=640, n_mels=64, f_min=0.0, convention="torchaudio", log="db"),
    )
    x = waveform(*leading, 16_000)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"waveform_norm": "peak"}, {"snip_edges": False, "waveform_norm": "mean"}, {"log": "db", "top_db": 20.0},
        {"convention": "torchaudio", "power": 1}, {"convention": "torchaudio", "pad_mode": "constant", "scale": 3.0},
        {"convention": "torchaudio", "n_samples": 260},
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["patches", "mel"])
def test_gradient(changes, layout):
    spec = replace(SMALL, **changes)
    x = (0.3 * torch.randn(2, 220, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    lengths = torch.tensor([220, 180])
    run = lambda x: log_mel(x, spec, lengths=lengths, dtype=torch.float64, layout=layout, impl="reference")  # noqa: E731
    torch.autograd.gradcheck(run, (x,), atol=1e-6, rtol=1e-4)


def test_gradient_of_the_module():
    """It takes the plain definition, in float32 and with several clips at once; without a gradient, the kernel."""
    torch.manual_seed(0)
    x = waveform(2, 1, 4000) + 1e-3 * torch.randn(2, 1, 4000)
    module, weight = LogMel(SPEC), torch.randn(2, 1, 40, 23)
    exact = x.double().requires_grad_()
    (log_mel(exact[:, 0], SPEC, layout="spectrogram", impl="reference") * weight[:, 0]).sum().backward()
    x.requires_grad_()
    (module(x) * weight).sum().backward()
    assert (x.grad - exact.grad).norm() < 1e-3 * exact.grad.norm()
    with torch.no_grad():
        assert torch.equal(module(x), log_mel(x.detach()[:, 0], SPEC, layout="spectrogram")[:, None])


def test_fused_refuses_a_gradient():
    x = waveform(1, 4000).requires_grad_()
    with pytest.raises(RuntimeError, match="impl='fused' cannot run"):
        log_mel(x, SPEC, impl="fused")
    if _extension.AVAILABLE:
        with torch.no_grad():
            log_mel(x, SPEC, impl="fused")


def test_silence_has_a_finite_gradient():
    """Below the floor and at the root of zero the gradient is zero."""
    for power in (1, 2):
        x = torch.zeros(1, 400, requires_grad=True)
        for layout in ("spectrogram", "mel"):
            log_mel(x, replace(SMALL, power=power), layout=layout, impl="reference").sum().backward()
        assert (x.grad == 0).all()


def test_has_no_state_and_survives_copies():
    module, x = torch.nn.Sequential(LogMel(LOG_MEL_PRESETS["clap"]), torch.nn.Flatten()), waveform(1, 48_000)
    expected = module(x)
    assert not module.state_dict() and not list(module.parameters()) + list(module.buffers())
    module.load_state_dict({})
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.to("cpu").half().double()):
        assert torch.equal(copied(x), expected)
    assert "n_fft=1024" in repr(module) and "layout='spectrogram'" in repr(module) and "mean" not in repr(module)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_as_one_graph(requires_grad):
    torch.compiler.reset()
    module, x = LogMel(SMALL), waveform(2, 1, 1000).requires_grad_(requires_grad)
    out = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, module(x), rtol=0, atol=1e-4)
    if requires_grad:
        (grad,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(module(x).sum(), x)[0], rtol=1e-3, atol=1e-3)


def test_bad_calls():
    module = LogMel(SPEC)
    for bad, error, match in (
        (lambda: module(waveform(1, 4000).numpy()), TypeError, "torch.as_tensor"),
        (lambda: module([0.0] * 4000), TypeError, "pcm must be a torch.Tensor, got list"),
        (lambda: module(torch.tensor(1.0)), ValueError, "scalar"),
        (lambda: module(waveform(2, 1, 4000), torch.tensor([1, 2])), ValueError, r"lengths must be \[2, 1\]"),
        (lambda: module(waveform(2, 4000), [1, 2]), TypeError, "lengths"),
        (lambda: module(waveform(2, 300)), ValueError, "shorter than one window"),
        (lambda: module(waveform(2, 4000).int()), TypeError, "int16 or float32"),
        (lambda: LogMel("whisper"), TypeError, "LogMelSpec"),
        (lambda: LogMel(SPEC, layout="power")(waveform(2, 4000)), ValueError, "layout"),
    ):
        with pytest.raises(error, match=match):
            bad()
