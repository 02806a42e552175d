"""log_mel on a CUDA device: the cases of the host tests, plus streams and CUDA graphs. Needs a GPU."""

from dataclasses import replace

import pytest
import torch
from log_mel_cases import assert_exact, assert_exact_mel, clips, quiet_about_empty_bands  # noqa: F401

from ajepa_kernels import LOG_MEL_PRESETS, LogMelSpec, _extension, log_mel
from ajepa_kernels.log_mel import CUDA_SIZES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and _extension.CUDA), reason="needs a GPU and a CUDA build"),
]
FRONT_ENDS = ["audio-jepa", "audio-jepa-16k", "a-jepa", "whisper", "clap", "kaldi"]


@pytest.mark.parametrize("n_fft", sorted(CUDA_SIZES))
@pytest.mark.parametrize("convention", ["kaldi", "torchaudio"])
def test_every_size(n_fft, convention):
    spec = LogMelSpec(
        n_fft=n_fft, win_length=n_fft - n_fft // 5, hop_length=n_fft // 3, n_mels=48, convention=convention,
        floor=1e-7, waveform_norm="peak",
    )  # fmt: skip
    pcm = clips(n_fft * 30 + 77, batch=5)
    lengths = torch.tensor([len(pcm[0]), n_fft, 3 * n_fft, 7 * n_fft + 1, n_fft * 30])
    for x in (pcm, pcm.float() / 32768):
        out = log_mel(x.cuda(), spec, lengths=lengths.cuda(), impl="fused").cpu()
        assert_exact(out, pcm, spec, lengths=lengths)
        mel = log_mel(x.cuda(), spec, lengths=lengths.cuda(), layout="mel", impl="fused").cpu()
        assert_exact_mel(mel, pcm, spec, lengths=lengths)


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_cpu_kernel(name, dtype):
    spec = replace(LOG_MEL_PRESETS[name], patch=(16, 16))
    pcm = clips(10 * spec.sample_rate, batch=4)
    out = log_mel(pcm.cuda(), spec, dtype=dtype, impl="fused")
    tolerance = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 0.13}[dtype]
    torch.testing.assert_close(out.cpu(), log_mel(pcm, spec, dtype=dtype), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("n_fft", "n_mels"), [(1024, 108), (2048, 139), (4096, 160)])
def test_shared_memory_just_below_48_kb(n_fft, n_mels):
    """The dynamic shared memory alone is below the default limit of 48 KB; with the static part it exceeds it."""
    spec = LogMelSpec(n_fft=n_fft, win_length=n_fft, hop_length=n_fft // 2, n_mels=n_mels, f_min=0.0, floor=1e-7)
    pcm = clips(n_fft * 20)
    out = log_mel(pcm.cuda(), spec, layout="spectrogram", impl="fused").cpu()
    assert_exact(out, pcm, spec, layout="spectrogram")


def test_top_db():
    spec = replace(LOG_MEL_PRESETS["audio-jepa-16k"], top_db=40.0)
    pcm = clips(160_000, batch=3)
    assert_exact(log_mel(pcm.cuda(), spec, impl="fused").cpu(), pcm, spec)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_graph_and_side_stream(name):
    spec = LOG_MEL_PRESETS[name]
    pcm = clips(10 * spec.sample_rate, batch=4).cuda()
    expected = log_mel(pcm, spec, impl="fused")
    held = torch.zeros_like(pcm)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = log_mel(held, spec, impl="fused")
    for x in (pcm, pcm.flip(0)):
        held.copy_(x)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, expected if x is pcm else expected.flip(0))


def test_graph_outlives_the_tables_of_other_specs():
    spec, pcm = LOG_MEL_PRESETS["a-jepa"], clips(160_000).cuda()
    expected, graph = log_mel(pcm, spec, impl="fused"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = log_mel(pcm, spec, impl="fused")
    for hop_length in range(150, 250):
        log_mel(pcm, replace(spec, hop_length=hop_length), impl="fused")
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_first_call_within_a_capture():
    """The error names the remedy, and the device stays usable."""
    spec, pcm = replace(LOG_MEL_PRESETS["a-jepa"], hop_length=361), clips(160_000).cuda()  # no other test uses it
    with pytest.raises(RuntimeError, match="once with it before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        log_mel(pcm, spec, impl="fused")
    assert log_mel(pcm, spec, impl="fused").isfinite().all()


def test_compiles_as_one_graph():
    spec, pcm = LOG_MEL_PRESETS["a-jepa"], clips(160_000).cuda()
    compiled = torch.compile(lambda x: 2 * log_mel(x, spec, impl="fused"), fullgraph=True)
    assert torch.equal(compiled(pcm), 2 * log_mel(pcm, spec, impl="fused"))


def test_sizes_without_a_kernel_run_as_plain_pytorch():
    spec, pcm = LogMelSpec(n_fft=960, win_length=960, n_mels=40), clips(16_000)
    _extension.warn_plain.cache_clear()
    with pytest.warns(UserWarning, match="no transform of 960 points"):
        out = log_mel(pcm.cuda(), spec, layout="spectrogram")
    assert_exact(out.cpu(), pcm, spec, layout="spectrogram")
    with pytest.raises(RuntimeError, match="960 points"):
        log_mel(pcm.cuda(), spec, impl="fused")


@pytest.mark.parametrize("changes", [{}, {"pad_mode": "constant", "pad_value": 2.0, "waveform_norm": "peak"}])
def test_padded_samples(changes):
    spec = replace(LOG_MEL_PRESETS["whisper"], n_samples=40_000, n_frames=None, **changes)
    pcm, lengths = clips(50_000, batch=3), torch.tensor([50_000, 0, 12_345])
    out = log_mel(pcm.cuda(), spec, lengths=lengths.cuda(), impl="fused").cpu()
    assert_exact(out, pcm, spec, lengths=lengths)
