"""Benchmark the float8 product, which has a scale per row, against the bf16 product.

The cases are those of the target encoder: the inputs are quantised on the way, and only the forward pass runs.
"""

import pytest
import torch
from ceilings import SECONDS
from records import DEVICE, QUICK

from ajepa_kernels import add_layer_norm, fp8_linear, norm_quantize_rows, quantize_rows

M = 131_072 if DEVICE == "cuda" else 64 if QUICK else 256
SHAPES = [(768, 2304), (768, 3072), (3072, 768)]
TIME = SECONDS if QUICK else 1.0
needs_float8 = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9),
    reason="float8 products need compute capability 8.9 or later",
)


@needs_float8
@pytest.mark.parametrize(("K", "N"), SHAPES if DEVICE == "cuda" and not QUICK else SHAPES[:1])
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
    times = interleave(variants, TIME)
    record("fp8_linear", f"{M} x {K} to {N}", times, plain="bf16 linear", peers=["bf16 linear"])


@needs_float8
def test_quantised_where_it_is_made(interleave, record):
    """Time the norm with the first product and the GELU with the second product of a target encoder's MLP."""
    C, options = 768, {"device": DEVICE, "dtype": torch.bfloat16}
    x, residual, z = torch.randn(M, C, **options), torch.randn(M, C, device=DEVICE), torch.randn(M, 4 * C, **options)
    norm, bias = torch.ones(C, device=DEVICE), torch.zeros(C, device=DEVICE)
    w1, w2 = torch.randn(4 * C, C, **options) / C**0.5, torch.randn(C, 4 * C, **options) / (4 * C) ** 0.5

    def fp8():
        normed, _ = norm_quantize_rows(x, residual, norm, bias)
        return fp8_linear(normed, w1), fp8_linear(quantize_rows(z, gelu="none"), w2)

    def bf16():
        normed, _ = add_layer_norm(x, residual, norm, bias)
        return torch.nn.functional.linear(normed, w1), torch.nn.functional.linear(torch.nn.functional.gelu(z), w2)

    for got, want in zip(fp8(), bf16(), strict=True):
        assert (got.float() - want.float()).std() < 0.06 * want.float().std()
    times = interleave({"ajepa fp8": fp8, "bf16": bf16}, TIME)
    record("fp8_mlp", f"{M} x {C}, norm, product; GELU, product", times, plain="bf16", peers=["bf16"])
