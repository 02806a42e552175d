"""Float8 with one scale per tensor: the only errors are the rounding to e4m3 and the clamp at the delayed scale."""

import copy
import math

import pytest
import torch
from aot import optimizer, reports
from oracle import DEVICE, E4M3, IMPLS, needs_kernel, poison, round_to_e4m3  # noqa: F401

from ajepa_kernels import (
    Quantized,
    Scaling,
    add_layer_norm_reference,
    advance_scales_,
    fp8_linear,
    fp8_linear_gelu,
    norm_quantize,
    quantize,
)
from ajepa_kernels._triton import INTERPRET, triton
from ajepa_kernels.fp8 import BLOCK, HISTORY, MARGIN, STATE, _norm_quantize, _quantize

SHAPES = [(0, 64), (1, 768), (3, 7), (70, 96), (9, 1025)]  # odd, empty, more than one program


def scaling(amax=None):
    """With the scale that follows from a largest magnitude in the step before; without one, not yet calibrated."""
    made = Scaling(torch.zeros(STATE, device=DEVICE))
    if amax is not None:
        made.state[1] = amax
        advance_scales_(made.state[None])
        made.loaded()
    return made


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "K"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_values_are_the_nearest_of_e4m3(M, K, dtype, impl):
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(M)[:, None].clamp(max=3)
    x = x.to(dtype)
    for delayed in (None, scaling(), scaling(100.0)):  # of present values, at its first use, and one that clamps
        values, scale = quantize(x.to(DEVICE), delayed, impl=impl)
        assert values.shape == x.shape and values.dtype == torch.float8_e4m3fn and scale.shape == ()
        if delayed is not None and M:
            assert delayed.state[1].item() == x.abs().max().item()  # what is clamped counts, too
        inverse = (1.0 / scale.cpu()).double()
        want = round_to_e4m3((x.double() * inverse).float().double())
        if INTERPRET:  # Triton's interpreter rounds wrongly where a mantissa overflows
            assert (values.cpu().double() != want).sum() <= 1 + 0.04 * want.numel()
        else:
            assert torch.equal(values.cpu().double(), want)
    assert M < 9 or (want.abs() == 448.0).sum() > 9, "nothing was clamped"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "K"), SHAPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_exact_numbers_stay_exact(M, K, impl):
    pick = torch.randint(0, len(E4M3), (M, K), generator=torch.Generator().manual_seed(1))
    x = E4M3[pick].float() * (1 - 2.0 * (pick % 2))
    x[:, :1] = 448.0
    values, scale = quantize(x.to(DEVICE), impl=impl)
    if M:
        torch.testing.assert_close(scale.cpu(), torch.ones(()), rtol=1e-6, atol=0)
        assert torch.equal(values.cpu().float(), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_strides_and_infinities(impl):
    x = torch.zeros(4, 64, device=DEVICE)
    for delayed in (None, scaling()):
        values, scale = quantize(x, delayed, impl=impl)
        assert not values.float().any() and scale > 0 and scale.isfinite()
    x[1] = 448.0
    values, _ = quantize(x.T.contiguous().T, impl=impl)
    assert torch.equal(values.float(), x)
    x[0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
    values = quantize(x, scaling(448.0), impl=impl).values.float()
    assert values[0, 0] == 448.0 and values[0, 1] == -448.0 and values[1].isfinite().all()
    assert values[0, 2].isnan() or INTERPRET  # the interpreter has no NaN in float8


def test_scales_are_those_of_the_last_steps():
    """Against a list of the largest magnitudes. A step counts if its tensor occurred, is finite and was not skipped."""
    amaxes = [3.0, 5.0, 0.0, math.inf, 1.0, math.nan, 7.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    states, seen = torch.zeros(2, STATE, device=DEVICE), []
    for step, amax in enumerate(amaxes):
        states[:, 1] = torch.tensor([amax, 10.0])
        skip = step == 7
        advance_scales_(states, torch.tensor(float(skip), device=DEVICE) if step else None)
        seen += [amax] if 0 < amax < math.inf and not skip else []
        want = max(seen[-HISTORY:]) * MARGIN / 448
        torch.testing.assert_close(states[:, 0].cpu(), torch.tensor([want, 10 * MARGIN / 448]), rtol=1e-6, atol=0)
        assert not states[:, 1].any()
    assert states[0, 2:].tolist() == seen[: -HISTORY - 1 : -1] and len(seen) > HISTORY + 3


@pytest.mark.parametrize("impl", IMPLS)
def test_the_scale_stays_within_a_step_and_follows_after_it(impl):
    one = scaling()
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    first = quantize(x, one, impl=impl).scale.item()  # the first use takes the scale from x
    assert first == pytest.approx(MARGIN * x.abs().max().item() / 448)
    for factor in (10.0, 0.1):  # parts of one step, such as micro-batches
        values, scale = quantize(factor * x, one, impl=impl)
        assert scale.item() == first
        assert torch.equal(values.float(), (factor * x / first).clamp(-448, 448).to(torch.float8_e4m3fn).float()) or (
            INTERPRET
        )
    advance_scales_(one.state[None])
    assert one.scale.item() == pytest.approx(10 * first) and values.float().abs().max() < 448


@pytest.mark.parametrize("impl", IMPLS)
def test_a_saved_state_continues_exactly(impl):
    """A resumed run quantises as the run that did not stop. Empty states and scales that are too small are replaced."""
    one, other = scaling(), scaling()
    draws = [torch.randn(9, 64, generator=torch.Generator().manual_seed(i)).to(DEVICE) * (i + 1) for i in range(4)]
    for x in draws:
        quantize(x, one, impl=impl)
        if x is draws[1]:
            other.state.copy_(one.state)
            other.loaded()
            assert other.calibrated
        advance_scales_(one.state[None])
    for i, x in enumerate(draws[1:]):
        values = quantize(x, other, impl=impl).values if i else None
        advance_scales_(other.state[None])
    assert torch.equal(one.state, other.state)
    assert torch.equal(quantize(draws[3], one, impl=impl).values.float(), quantize(draws[3], other).values.float()) or (
        INTERPRET
    )
    assert values is not None
    one.loaded(448 * one.scale * torch.ones(3, device=DEVICE))
    assert one.calibrated
    one.loaded(450 * one.scale * torch.ones(3, device=DEVICE))
    assert not one.calibrated
    other.state.zero_()
    other.loaded()
    assert not other.calibrated


def assert_rounded(got: Quantized, exact):
    """Compare with the rounding of `exact`, in float64. Values may differ by one step of e4m3 where the last bits of a
    sum or of a GELU differ."""
    want = round_to_e4m3(exact / got.scale.cpu().double())
    values = got.values.cpu().double()
    assert (values != want).sum() <= 0.04 * exact.numel()
    if not INTERPRET:  # the interpreter rounds wrongly where a mantissa overflows
        assert ((values - want).abs() <= want.abs() / 8 + 2.0**-8).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "K"), [(0, 64), (1, 768), (70, 96), (9, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("impl", IMPLS)
def test_an_output_quantised_where_it_is_made(M, K, dtype, impl):
    x, residual = torch.randn(M, K).to(dtype), torch.randn(M, K)
    weight, bias = torch.randn(K), 4 * torch.randn(K)  # the bias alone must not count where there is no row
    on = [t.to(DEVICE) for t in (x, residual, weight, bias)]
    normed, want = add_layer_norm_reference(x.double(), residual.double(), weight.double(), bias.double(), 1e-5)
    largest = normed.abs().max().item() if M else 0.0
    for delayed in (None, scaling(), scaling(2.0)):
        got, total = norm_quantize(*on, 1e-5, delayed, impl=impl)
        torch.testing.assert_close(total.cpu().double(), want, rtol=1e-5, atol=1e-6)
        assert_rounded(got, normed)
        assert delayed is None or delayed.state[1].item() == pytest.approx(largest, rel=1e-5)
        for gelu in ("none", "tanh"):
            activated = torch.nn.functional.gelu(x.double(), approximate=gelu)
            if delayed is not None:
                delayed.state[1] = 0
            assert_rounded(quantize(x.to(DEVICE), delayed, gelu=gelu, impl=impl), activated)
            if delayed is not None and M:
                assert delayed.state[1].item() == pytest.approx(activated.abs().max().item(), rel=1e-5)
    assert torch.equal(got.rows(torch.arange(M, device=DEVICE)).values.float(), got.values.float())


@pytest.mark.skipif(INTERPRET, reason="the product is computed by torch, not by a Triton kernel")
@pytest.mark.parametrize("shape", [(0, 64), (5, 64), (2, 3, 64)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(shape, with_bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48, bias=with_bias)
    weight, bias = layer.weight.to(DEVICE), layer.bias.to(DEVICE) if with_bias else None
    x = torch.randn(*shape)
    y = fp8_linear(x.to(DEVICE), weight, bias)
    want = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if with_bias else None)
    assert y.dtype == torch.bfloat16 and y.shape == want.shape and not y.requires_grad
    assert not y.numel() or (y.cpu() - want).std() < 0.05 * want.std()
    a, b = quantize(x.to(DEVICE)), quantize(weight)
    assert torch.equal(fp8_linear(a, b, bias), y)
    # exactly the product of the quantised matrices, rounded once, whatever autocast says
    exact = torch.nn.functional.linear(*(q.values.cpu().double() * q.scale.cpu().double() for q in (a, b)))
    exact = exact if bias is None else exact + bias.bfloat16().cpu().double()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = fp8_linear(a, b, bias)
    atol = 1e-6 if DEVICE == "cpu" else 2.0**-10  # fast accumulation keeps fewer bits
    torch.testing.assert_close(y.cpu().double(), exact, rtol=2.0**-8, atol=atol)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8_linear(torch.randn(2, 7), torch.randn(8, 7))
    with pytest.raises(ValueError, match="multiples of 16"):
        fp8_linear(torch.randn(2, 32), quantize(torch.randn(16, 16)))
    with pytest.raises(ValueError, match="'none' or 'tanh'"):
        quantize(torch.ones(2, 2), gelu="exact")
    with pytest.raises(ValueError, match="weight, bias"):
        norm_quantize(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="floating point"):
        quantize(torch.ones(2, 2, dtype=torch.int32))
    elsewhere = Scaling(torch.zeros(STATE, device="meta"))
    with pytest.raises(ValueError, match="device"):
        quantize(torch.ones(2, 2), elsewhere)
    with pytest.raises(ValueError, match="one device"):
        norm_quantize(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), torch.ones(3), 1e-5, elsewhere)
    for state in (torch.zeros(STATE + 1), torch.zeros(STATE, dtype=torch.float64)):
        with pytest.raises(ValueError, match="float32"):
            Scaling(state)
        with pytest.raises(ValueError, match="float32"):
            advance_scales_(state[None])


@needs_kernel
def test_opcheck():
    x, w = torch.randn(4, 32, device=DEVICE), torch.randn(32, device=DEVICE)
    for scale, state in ((torch.ones((), device=DEVICE), None), (None, torch.ones(STATE, device=DEVICE))):
        torch.library.opcheck(torch.ops.ajepa.quantize, (x, scale, state, 1))
    torch.library.opcheck(torch.ops.ajepa.norm_quantize, (x, x, w, w, torch.ones(STATE, device=DEVICE), 1e-6))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    """The compiled function uses and changes the state as the eager one does."""
    x, w = torch.randn(4, 32, device=DEVICE), torch.randn(32, device=DEVICE)

    def block(x, first, second):
        normed, total = norm_quantize(x, x, w, w, 1e-5, first, impl=impl)
        y = quantize(total, second, gelu="none", impl=impl)
        return normed.values.float() * normed.scale, y.values.float() * y.scale

    for start in (scaling(3.0), scaling()):
        pairs = [(copy.deepcopy(start), copy.deepcopy(start)) for _ in range(2)]
        eager, compiled = block, torch.compile(block, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(x, *pairs[0]), eager(x, *pairs[1]), strict=True):
            torch.testing.assert_close(got, want)
        for got, want in zip(*pairs, strict=True):
            torch.testing.assert_close(got.state, want.state)
            assert got.calibrated and want.calibrated and got.state[1] > 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_replays_follow_the_state():
    """A captured graph reads the scale and notes the largest magnitude at each replay, the same every time."""
    x = torch.randn(3 * BLOCK, device=DEVICE)
    one, plain = scaling(1.0), scaling(1.0)
    graph = torch.cuda.CUDAGraph()
    quantize(x, scaling(1.0), impl="triton")  # compiles
    with torch.cuda.graph(graph):
        values, _ = quantize(x, one, impl="triton")
        advance_scales_(one.state[None])
    for factor in (1.0, 30.0, 1.0):
        x.mul_(factor)
        graph.replay()
        want = quantize(x, plain, impl="reference").values
        advance_scales_(plain.state[None])
        assert torch.equal(values.float(), want.float()) and torch.equal(one.state, plain.state)


@pytest.mark.skipif(INTERPRET or triton is None, reason="kernels cannot be compiled in a process that interprets them")
@pytest.mark.parametrize("arch", [90, 100])
def test_ahead_of_time(arch):
    def case() -> None:
        state = torch.empty(STATE, device="meta")
        for K in (768, 3072):
            x, weight = torch.empty(4096, K, dtype=torch.bfloat16, device="meta"), torch.empty(K, device="meta")
            _norm_quantize(x, torch.empty(4096, K, device="meta"), weight, weight, state, 1e-6)
        for gelu in range(3):
            _quantize(x, None, state, gelu)
        _quantize(x, state[0], None, 0)

    for report in reports((case,), arch):
        assert report.spills == report.stack == 0 and report.wide, report
        assert report.blocks * report.threads >= 896, report
    update = reports((optimizer, False, torch.float8_e4m3fn), arch)[0]
    assert update.spills == update.stack == 0 and update.wide and update.blocks * update.threads >= 512, update


@pytest.mark.parametrize("fused", [False, True])
def test_linear_gelu(fused, monkeypatch):
    """The product with its epilogue is `quantize` after `fp8_linear`, but for the rounding of z to bfloat16."""
    x, weight, bias = torch.randn(40, 32, device=DEVICE), torch.randn(48, 32, device=DEVICE), torch.randn(48)
    quantized, bias = (quantize(x), quantize(weight)), bias.to(DEVICE)
    plain, ours = (Scaling(torch.zeros(8, device=DEVICE)) for _ in range(2))
    z = quantized[0].values.double() @ quantized[1].values.double().T * quantized[0].scale * quantized[1].scale
    want = torch.nn.functional.gelu(z + bias.bfloat16())
    with monkeypatch.context() as patch:
        if fused and DEVICE == "cpu":  # the op runs its plain definition there
            patch.setattr("ajepa_kernels.products.why_not", lambda *_: "")
        for step in range(2):  # the first use sets the scale
            expected = quantize(fp8_linear(*quantized, bias), plain, gelu="none")
            got = fp8_linear_gelu(*quantized, bias, ours)
            assert got.values.dtype == torch.float8_e4m3fn and got.values.shape == (40, 48)
            for y, scaling in ((expected, plain), (got, ours)):
                assert (y.values.double() * y.scale - want).norm() < 0.04 * want.norm(), step
                assert scaling.state[1] == pytest.approx(want.abs().max().item(), rel=1e-2)
            advance_scales_(plain.state[None]), advance_scales_(ours.state[None])
