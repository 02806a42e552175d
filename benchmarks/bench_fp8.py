"""Row-wise float8 product beside the bf16 one, as the target encoder uses it: quantised on the way, forward only."""

import pytest
import torch
from records import DEVICE

from ajepa_kernels import fp8_linear, quantize_rows

M = 256 if DEVICE == "cpu" else 131_072
SHAPES = [(768, 2304), (768, 3072), (3072, 768)]


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="float8 needs sm_89")
@pytest.mark.parametrize(("K", "N"), SHAPES if DEVICE == "cuda" else SHAPES[:1])
def test_fp8_linear(K, N, interleave, record):
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    weight, bias = torch.randn(N, K, device=DEVICE, dtype=torch.bfloat16) / K**0.5, torch.zeros(N, device=DEVICE)
    bias = bias.bfloat16()
    want = torch.nn.functional.linear(x.float(), weight.float())
    assert (fp8_linear(x, weight, bias) - want).std() < 0.05 * want.std()
    variants = {
        "ajepa fp8_linear": lambda: fp8_linear(x, weight, bias),
        "ajepa quantize_rows alone": lambda: quantize_rows(x),
        "bf16 linear": lambda: torch.nn.functional.linear(x, weight, bias),
    }
    times = interleave(variants, seconds=1.0)
    record("fp8_linear", f"{M} x {K} to {N}", times, plain="bf16 linear", peers=["bf16 linear"])
