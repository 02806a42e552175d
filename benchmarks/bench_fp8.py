"""Benchmark the float8 products of a target encoder, with their quantising passes, against the bf16 products.

Only the forward pass runs. Scales are delayed, and the optimiser writes the weights in float8, so neither costs a pass
here. Each product has the pass that makes its input: the layer norm or the GELU, or a copy after attention.
"""

import pytest
import torch
from ceilings import SECONDS
from records import DEVICE, QUICK

from ajepa_kernels import Quantized, Scaling, add_layer_norm, fp8_linear, norm_quantize, quantize

M = 131_072 if DEVICE == "cuda" else 64 if QUICK else 256
SHAPES = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]  # qkv, proj, fc1, fc2 of ViT-B
TIME = SECONDS if QUICK else 1.0
needs_float8 = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9),
    reason="float8 products need compute capability 8.9 or later",
)


def weights(K: int, N: int) -> tuple[torch.Tensor, torch.Tensor, Quantized]:
    """Weight and bias in bfloat16, and the weight in float8."""
    weight = torch.randn(N, K, device=DEVICE, dtype=torch.bfloat16) / K**0.5
    return weight, torch.randn(N, device=DEVICE, dtype=torch.bfloat16), quantize(weight)


def scaling() -> Scaling:
    return Scaling(torch.zeros(8, device=DEVICE))


@needs_float8
@pytest.mark.parametrize(("K", "N"), SHAPES if DEVICE == "cuda" and not QUICK else SHAPES[:1])
def test_fp8_linear(K, N, interleave, record):
    x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
    weight, bias, small = weights(K, N)
    delayed = scaling()
    quantized = quantize(x, delayed)
    want = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
    for y in (fp8_linear(x, weight, bias), fp8_linear(quantized, small, bias)):
        assert (y - want).std() < 0.05 * want.std()
    variants = {
        "ajepa fp8_linear": lambda: fp8_linear(quantized, small, bias),
        "ajepa quantize, fp8_linear": lambda: fp8_linear(quantize(x, delayed), small, bias),
        "ajepa quantize alone": lambda: quantize(x, delayed),
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
    (w1, b1, small1), (w2, b2, small2), first, second = weights(C, 4 * C), weights(4 * C, C), scaling(), scaling()

    def fp8():
        normed, _ = norm_quantize(x, residual, norm, bias, 1e-6, first)
        return fp8_linear(normed, small1, b1), fp8_linear(quantize(z, second, gelu="none"), small2, b2)

    def bf16():
        normed, _ = add_layer_norm(x, residual, norm, bias, 1e-6)
        return torch.nn.functional.linear(normed, w1, b1), torch.nn.functional.linear(
            torch.nn.functional.gelu(z), w2, b2
        )

    for got, want in zip(fp8(), bf16(), strict=True):
        assert (got.float() - want.float()).std() < 0.06 * want.float().std()
    times = interleave({"ajepa fp8": fp8, "bf16": bf16}, TIME)
    record("fp8_mlp", f"{M} x {C}, norm, product; GELU, product", times, plain="bf16", peers=["bf16"])
