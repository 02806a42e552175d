"""resample on a CUDA device: against float64, ragged batches, slices, streams and CUDA graphs. Needs a GPU."""

import pytest
import torch

from ajepa_kernels import _extension, input_span, resample, resample_reference, resampled_length

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and _extension.CUDA), reason="needs a GPU and a CUDA build"),
]
PAIRS = [(48_000, 16_000), (44_100, 32_000), (44_100, 16_000), (8_000, 16_000), (44_100, 44_099), (384_000, 8_001)]


def noise(*shape: int, dtype=torch.float32) -> torch.Tensor:
    x = 0.2 * torch.randn(shape)
    return x if dtype == torch.float32 else (x * 32768).clamp(-32768, 32767).short()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize(("from_rate", "to_rate"), PAIRS)
def test_is_its_definition(from_rate, to_rate, dtype):
    pcm = noise(3, 9_001, 2, dtype=dtype)
    lengths = torch.tensor([9_001, 0, 4_321])
    options = {"downmix": True, "dtype": torch.float32}
    out = resample(pcm.cuda(), from_rate, to_rate, lengths=lengths.cuda(), impl="fused", **options).cpu()
    exact = resample_reference(pcm, from_rate, to_rate, lengths=lengths, compute=torch.float64, **options)
    assert out.shape == (3, resampled_length(9_001, from_rate, to_rate))
    assert (out - exact).abs().max() < 4e-6 and not out[1].any()
    rounded = resample(pcm.cuda(), from_rate, to_rate, lengths=lengths.cuda(), downmix=True, dtype=torch.int16).cpu()
    assert (rounded - (exact * 32768).clamp(-32768, 32767)).abs().max() < 0.6


@pytest.mark.parametrize(("from_rate", "to_rate"), PAIRS[:4])
def test_a_slice_has_the_bits_of_the_whole(from_rate, to_rate):
    pcm = noise(60_000).cuda()
    whole = resample(pcm, from_rate, to_rate)
    low, high = input_span(3_001, 777, from_rate, to_rate)
    low, high = max(0, low), min(high, len(pcm))
    part = resample(pcm[low:high], from_rate, to_rate, first=3_001, count=777, offset=low)
    assert torch.equal(part, whole[3_001:3_778])


def test_equal_rates_average_exactly():
    pcm = noise(2, 1_001, 3, dtype=torch.int16)
    out = resample(pcm.cuda(), 16_000, 16_000, downmix=True, dtype=torch.float32).cpu()
    assert torch.equal(out, resample(pcm, 16_000, 16_000, downmix=True, dtype=torch.float32))


def test_graph_and_side_stream():
    pcm = noise(4, 44_100).cuda()
    wanted = resample(pcm, 44_100, 16_000)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        beside = resample(pcm, 44_100, 16_000)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = resample(pcm, 44_100, 16_000)
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(beside, wanted) and torch.equal(captured, wanted)
