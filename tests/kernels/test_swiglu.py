import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, IMPLS, assert_as_good, assert_first_order, needs_kernel, poison  # noqa: F401

from ajepa_kernels import swiglu, swiglu_reference


def oracle(gate, value, gate_bias, value_bias):
    gate, value = gate.chunk(2, -1) if value is None else (gate, value)
    gate = gate if gate_bias is None else gate + gate_bias
    value = value if value_bias is None else value + value_bias
    return gate / (1 + torch.exp(-gate)) * value


def both_ways(function, tensors, upstream):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, [t for t in leaves if t is not None], upstream.to(y.device, y.dtype))


# Rows: none, one, more than all programs handle at once. Widths: odd, one tile, several tiles, one more than a power
# of two. Biases: both, either, none.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "C"), [(0, 64), (1, 2048), (70, 7), (65, 384), (9, 1025)])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("biases", ["both", "gate", "value", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients(M, C, joined, biases, dtype, impl):
    gate, value = (3 * torch.randn(M, C)).to(dtype), torch.randn(M, C).to(dtype)
    gate, value = (torch.cat([gate, value], 1), None) if joined else (gate, value)
    gate_bias, value_bias = (torch.randn(C) if biases in ("both", name) else None for name in ("gate", "value"))
    tensors, upstream = (gate, value, gate_bias, value_bias), torch.randn(M, C).to(dtype)
    want = both_ways(oracle, [None if t is None else t.double() for t in tensors], upstream)
    plain = both_ways(swiglu_reference, tensors, upstream)
    got = both_ways(lambda *t: swiglu(*t, impl=impl), [None if t is None else t.to(DEVICE) for t in tensors], upstream)
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    assert_as_good([t.cpu() for t in got], plain, want, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_far_from_zero(impl):
    """The result stays finite where the exponentials overflow."""
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE)
    y, dgate, dvalue = both_ways(
        lambda g, v: swiglu(g, v, impl=impl), (gate, torch.full_like(gate, 2)), torch.ones(1, 5)
    )
    torch.testing.assert_close(y, 2 * gate.clamp(min=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dgate.cpu(), torch.tensor([[0, 0, 1.0, 2, 2]]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dvalue, gate.clamp(min=0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides(impl):
    """The halves of one tensor, rows that are not dense, and a bias with gaps."""
    both, bias = torch.randn(2, 3, 20, device=DEVICE), torch.randn(20, device=DEVICE)[::2]
    want = F.silu(both[..., :10] + bias) * both[..., 10:]
    torch.testing.assert_close(swiglu(*both.chunk(2, -1), bias, impl=impl), want)
    torch.testing.assert_close(swiglu(both, None, bias, impl=impl), want)
    apart = torch.stack([both, both], -1)[..., 0]
    torch.testing.assert_close(swiglu(apart, None, bias, impl=impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    x, bias = torch.randn(3, 8, device=DEVICE, requires_grad=True), torch.randn(4, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.float16):
        y = swiglu(x, None, bias, impl=impl)
        assert swiglu(x.double(), impl="reference").dtype == torch.float64
    y.sum().backward()
    assert y.dtype == torch.float16 and x.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    tensors = torch.randn(2, 4, 8, device=DEVICE), torch.randn(2, 4, 4, device=DEVICE), torch.randn(4, device=DEVICE)
    function = lambda both, value, bias: swiglu(swiglu(both, None, bias, impl=impl), value, None, bias, impl=impl)  # noqa: E731
    compiled, upstream = torch.compile(function, fullgraph=True, backend="aot_eager"), torch.randn(2, 4, 4)
    torch.testing.assert_close(both_ways(compiled, tensors, upstream), both_ways(function, tensors, upstream))


@needs_kernel
def test_first_order():
    value = torch.randn(3, 8, device=DEVICE)
    assert_first_order(lambda x: swiglu(x, value, impl="triton"), torch.randn(3, 8, device=DEVICE))


def test_meta():
    x = torch.empty(2, 3, 8, device="meta")
    assert swiglu(x, x).shape == (2, 3, 8) and swiglu(x).is_meta and swiglu(x).shape == (2, 3, 4)


@needs_kernel
def test_opcheck():
    x, bias = torch.randn(5, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    for value, *biases in ((x, bias, bias), (x, None, bias), (None, bias[:4], None)):
        torch.library.opcheck(torch.ops.ajepa.swiglu_fwd.default, (x, value, *biases, torch.float16))
        dy = x[:, :4] if value is None else x
        torch.library.opcheck(torch.ops.ajepa.swiglu_bwd.default, (dy, x, value, *biases))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(2, 5)), r"must both be \[..., I\]"),
        ((torch.zeros(2, 5),), r"or gate \[..., 2 I\] alone"),
        ((torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2)), r"gate_bias must be \[4\], got \[2\]"),
        ((torch.zeros(2, 4), None, None, torch.zeros(4)), r"value_bias must be \[2\], got \[4\]"),
        ((torch.zeros(2, 4), torch.zeros(2, 4, device="meta")), "on one device"),
        ((torch.zeros(2, 4), torch.zeros(2, 4).half()), "must have one dtype"),
        ((torch.zeros(2, 4).long(),), "floating point"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"swiglu: .*{message}"):
        swiglu(*arguments)


def test_arguments_that_are_no_tensors():
    with pytest.raises(TypeError, match=r"swiglu: gate must be a torch.Tensor, got numpy.ndarray; .*as_tensor"):
        swiglu(torch.zeros(2, 4).numpy())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_large_and_repeatable():
    x, upstream = (torch.randn(20000, width, device="cuda", dtype=torch.bfloat16) for width in (4096, 2048))
    tensors = x, None, torch.randn(2048, device="cuda"), torch.randn(2048, device="cuda")
    want = both_ways(oracle, [None if t is None else t.double() for t in tensors], upstream)
    plain = both_ways(lambda *t: swiglu(*t, impl="reference"), tensors, upstream)
    got = both_ways(lambda *t: swiglu(*t, impl="triton"), tensors, upstream)
    assert_as_good(got, plain, want, torch.bfloat16)
    again = both_ways(swiglu, tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
