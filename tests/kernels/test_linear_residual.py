import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, assert_as_good

from ajepa_kernels import ResidualStream, gelu_mlp, gelu_mlp_reference, linear_residual, linear_residual_reference

IMPLS = ["auto", "reference"]  # on a CPU "fused" is "auto"


def gradients(function, tensors, upstream):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, upstream.to(out))


def as_stream(function, half):
    """The function with a `ResidualStream`, whose carrier stands for the residual as a leaf."""

    def call(*tensors):
        *others, residual = tensors
        carrier = residual.to(half)  # so that the gradient of the carrier becomes that of the residual
        return function(*others, ResidualStream(residual.detach(), carrier)).joined()

    return call


@pytest.mark.parametrize("shape", [(0, 8, 16), (1, 16, 8), (200, 24, 40)], ids=str)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients(shape, stream, copied, dtype, impl):
    M, K, N = shape
    x = torch.randn(M, K).to(dtype)
    weight, bias = (torch.randn(s).to(dtype) for s in ((N, K), (N,)))
    if copied:
        weight, bias = weight.float(), bias.float()
    tensors, upstream = (x, weight, bias, torch.randn(M, N)), torch.randn(M, N).to(dtype)

    def ours(x, weight, bias, residual):
        copies = (weight.detach().to(dtype), bias.detach().to(dtype)) if copied else None
        return linear_residual(x, weight, bias, residual, copies=copies, impl=impl)

    def plain(x, weight, bias, residual):
        return linear_residual_reference(x, weight.to(dtype), bias.to(dtype), residual)

    want = gradients(linear_residual_reference, [t.double() for t in tensors], upstream)
    function = as_stream(ours, dtype) if stream else ours
    got = gradients(function, [t.to(DEVICE) for t in tensors], upstream.to(DEVICE))
    expected = gradients(plain, tensors, upstream)
    assert [t.dtype for t in got] == [t.dtype for t in expected]
    assert_as_good([t.cpu() for t in got], expected, want, dtype)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("impl", ["auto", "fused", "reference"])
def test_an_mlp_adds_to_the_stream(stream, impl):
    if impl == "fused" and DEVICE == "cuda":
        pytest.skip("the fused products take bfloat16 alone, and may not be built")
    M, C = 40, 24
    tensors = [torch.randn(s) for s in ((M, C), (4 * C, C), (4 * C,), (C, 4 * C), (C,), (M, C))]
    upstream = torch.randn(M, C)
    ours = lambda *t: gelu_mlp(*t[:-1], residual=t[-1], impl=impl)  # noqa: E731
    function = as_stream(ours, torch.float32) if stream else ours
    want = gradients(lambda *t: t[-1] + gelu_mlp_reference(*t[:-1]), [t.double() for t in tensors], upstream)
    got = gradients(function, [t.to(DEVICE) for t in tensors], upstream.to(DEVICE))
    plain = gradients(lambda *t: t[-1] + gelu_mlp_reference(*t[:-1]), tensors, upstream)
    assert_as_good([t.cpu() for t in got], plain, want, torch.float32)


def test_a_detached_bias_gets_no_gradient():
    x, weight, residual = (torch.randn(4, 8, device=DEVICE, requires_grad=True) for _ in range(3))
    weight, bias = torch.randn(8, 8, device=DEVICE, requires_grad=True), torch.randn(8, device=DEVICE)
    out = linear_residual(x, weight, bias, residual)
    torch.testing.assert_close(out, residual + F.linear(x, weight, bias))
    out.sum().backward()
    assert bias.grad is None and x.grad is not None and residual.grad is not None


def test_compiles_whole():
    weight, bias = torch.randn(8, 8, device=DEVICE, requires_grad=True), torch.randn(8, device=DEVICE)

    def block(x, residual):
        stream = linear_residual(x, weight, bias, ResidualStream(residual.detach(), residual.to(torch.float16)))
        return linear_residual(x.tanh(), weight, bias, stream).joined()

    leaves, upstream = [torch.randn(4, 8, device=DEVICE) for _ in range(2)], torch.randn(4, 8, device=DEVICE)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, leaves, upstream), gradients(block, leaves, upstream))


def test_gradients_of_gradients_raise():
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    y = linear_residual(x, torch.randn(8, 8, device=DEVICE), torch.zeros(8, device=DEVICE), x.sin())
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ([(2, 4), (8, 5), (8,), (2, 8)], {}, r"x \[\.\.\., K\], weight \[N, K\] and bias \[N\] expected"),
        ([(2, 4), (8, 4), (4,), (2, 8)], {}, r"bias \[N\] expected"),
        ([(2, 4), (8, 4), (8,), (2, 4)], {}, r"the residual must be \[2, 8\], got \[2, 4\]"),
        ([(2, 4), (8, 4), (8,), (2, 8)], {"copies": (torch.zeros(8, 4), torch.zeros(4))}, "copies must be 2 tensors"),
        ([(2, 4), (8, 4), (8,), (2, 8)], {"impl": "triton"}, "impl must be auto, fused or reference"),
    ],
)
def test_errors(sizes, options, message):
    with pytest.raises(ValueError, match=f"linear_residual: .*{message}"):
        linear_residual(*(torch.zeros(size) for size in sizes), **options)
