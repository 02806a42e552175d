"""Row-wise float8: the only error is the rounding to e4m3."""

import pytest
import torch
from aot import reports
from oracle import DEVICE, IMPLS, poison  # noqa: F401

from ajepa_kernels import add_layer_norm_reference, fp8_linear, norm_quantize_rows, quantize_rows
from ajepa_kernels._triton import INTERPRET, triton
from ajepa_kernels.fp8 import _norm_quantize_rows, _quantize_rows

SHAPES = [(0, 64), (1, 768), (3, 7), (70, 96), (9, 1025)]


@pytest.mark.skipif(INTERPRET, reason="Triton's interpreter rounds float8 wrongly when a mantissa overflows")
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "K"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_values_are_the_nearest_of_e4m3(M, K, dtype, impl):
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(M)[:, None].clamp(max=3)
    x = x.to(dtype)
    values, scale = quantize_rows(x.to(DEVICE), impl=impl)
    back, exact = values.cpu().double() * scale.cpu().double(), x.double()
    peak = exact.abs().amax(1, keepdim=True) if M else exact
    # Half a unit in the last of three mantissa bits, or half a subnormal step. Subnormals are below 2^-6, and the
    # largest value is 448.
    bound = torch.maximum(exact.abs() / 16, peak / 448 * 2.0**-10) * 1.001
    assert ((back - exact).abs() <= bound).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "K"), SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_exact_numbers_stay_exact(M, K, impl):
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # all non-negative values
    pick = torch.randint(0, len(grid), (M, K), generator=torch.Generator().manual_seed(1))
    x = grid[pick] * (1 - 2.0 * (pick % 2))
    x[:, :1] = 448.0
    values, scale = quantize_rows(x.to(DEVICE), impl=impl)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (M, 1)
    torch.testing.assert_close(scale.cpu(), torch.ones(M, 1), rtol=1e-6, atol=0)
    assert torch.equal(values.cpu().float(), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_and_strides(impl):
    x = torch.zeros(4, 64, device=DEVICE)
    x[1] = 448.0
    values, scale = quantize_rows(x.T.contiguous().T, impl=impl)
    assert torch.equal(values.float(), x) and (scale > 0).all() and scale.isfinite().all()


def assert_rounded(got, exact):
    """Compare with the plain rounding of `exact`. Values may differ by one step of e4m3 where the last bits of a sum or
    of a GELU differ."""
    want = quantize_rows(exact, impl="reference")
    torch.testing.assert_close(got.scale.cpu(), want.scale, rtol=1e-5, atol=0)
    values, exact = got.values.cpu().float(), want.values.float()
    assert (values != exact).sum() <= 0.04 * exact.numel()
    if not INTERPRET:  # the interpreter rounds wrongly when a mantissa overflows
        assert ((values - exact).abs() <= exact.abs() / 8 + 2.0**-8).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "K"), [(0, 64), (1, 768), (70, 96), (9, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_an_output_quantised_where_it_is_made(M, K, dtype, impl):
    x, residual = torch.randn(M, K).to(dtype), torch.randn(M, K)
    weight, bias = torch.randn(K), torch.randn(K)
    for gelu in ("none", "tanh"):
        got = quantize_rows(x.to(DEVICE), gelu=gelu, impl=impl)
        assert_rounded(got, torch.nn.functional.gelu(x.double(), approximate=gelu).float())
    on = [t.to(DEVICE) for t in (x, residual, weight, bias)]
    got, total = norm_quantize_rows(*on, 1e-5, impl=impl)
    normed, want = add_layer_norm_reference(x.float(), residual, weight, bias, 1e-5)
    torch.testing.assert_close(total.cpu(), want)
    assert_rounded(got, normed)
    assert torch.equal(got.rows(torch.arange(M, device=DEVICE)).values.float(), got.values.float())


@pytest.mark.skipif(INTERPRET, reason="the product is computed by torch, not by a Triton kernel")
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64)])
def test_linear(shape):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48)
    x = torch.randn(*shape)
    y = fp8_linear(x.to(DEVICE), layer.weight.to(DEVICE), layer.bias.to(DEVICE))
    want = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert y.dtype == torch.bfloat16 and y.shape == want.shape and not y.requires_grad
    assert (y.cpu() - want).std() < 0.05 * want.std()
    already = quantize_rows(x.to(DEVICE).flatten(0, -2))
    assert torch.equal(fp8_linear(already, layer.weight.to(DEVICE), layer.bias.to(DEVICE)), y.flatten(0, -2))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8_linear(torch.randn(2, 7), torch.randn(8, 7))
    with pytest.raises(ValueError, match="'none' or 'tanh'"):
        quantize_rows(torch.ones(2, 2), gelu="exact")
    with pytest.raises(ValueError, match="weight, bias"):
        norm_quantize_rows(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="floating point"):
        quantize_rows(torch.ones(2, 2, dtype=torch.int32))


def test_registration():
    x = torch.randn(4, 32, device=DEVICE)
    if DEVICE == "cuda" or INTERPRET:
        w = torch.randn(32, device=DEVICE)
        torch.library.opcheck(
            torch.ops.ajepa.norm_quantize_rows, (x, x, w, w, 1e-6), test_utils=["test_schema", "test_faketensor"]
        )
        torch.library.opcheck(torch.ops.ajepa.quantize_rows, (x, 1), test_utils=["test_schema", "test_faketensor"])
    compiled = torch.compile(lambda x: quantize_rows(x)[1].sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), quantize_rows(x)[1].sum())


@pytest.mark.skipif(INTERPRET or triton is None, reason="kernels cannot be compiled in a process that interprets them")
@pytest.mark.parametrize("arch", [90, 100])
def test_ahead_of_time(arch):
    def case(K: int) -> None:
        x = torch.empty(4096, K, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(K, device="meta")
        for gelu in range(3):
            _quantize_rows(x, gelu)
        _norm_quantize_rows(x, torch.empty(4096, K, device="meta"), weight, weight, 1e-6)

    for report in (r for K in (768, 3072) for r in reports((case, K), arch)):
        assert report.spills == report.stack == 0 and report.wide, report
        assert report.blocks * report.threads >= 896, report  # triton 3.8 needs 65 registers on sm_100
