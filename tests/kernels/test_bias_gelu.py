import math

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, IMPLS, assert_as_good, assert_first_order, needs_kernel, poison  # noqa: F401

from ajepa_kernels import bias_gelu, bias_gelu_reference


def oracle(x, bias, approximate):
    """GELU(x + bias) by its formulas, in float64."""
    z = x.double() + bias.double()
    if approximate == "tanh":
        return z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
    return z * (1 + torch.erf(z / math.sqrt(2))) / 2


def both_ways(function, x, bias, upstream):
    leaves = [t.detach().requires_grad_() for t in (x, bias)]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, upstream.to(y.device, y.dtype))


# Numbers of rows: none, one, more than all programs handle at once. Widths: odd, one tile, several tiles, one more than
# a power of two.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "C"), [(0, 64), (1, 3072), (70, 7), (65, 384), (9, 1025)])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients(M, C, approximate, dtype, impl):
    x, bias, upstream = (3 * torch.randn(M, C)).to(dtype), torch.randn(C), torch.randn(M, C).to(dtype)
    want = both_ways(lambda *t: oracle(*t, approximate), x.double(), bias.double(), upstream)
    plain = both_ways(lambda *t: bias_gelu_reference(*t, approximate), x, bias, upstream)
    function = lambda *t: bias_gelu(*t, approximate=approximate, impl=impl)  # noqa: E731
    got = both_ways(function, x.to(DEVICE), bias.to(DEVICE), upstream)
    assert [t.dtype for t in got] == [dtype, dtype, torch.float32]
    assert_as_good([t.cpu() for t in got], plain, want, dtype, ("y", "dx", "dbias"))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("impl", IMPLS)
def test_far_from_zero(approximate, impl):
    """The result stays finite where the exponentials overflow."""
    x = torch.tensor([-1e4, -30.0, -6.0, 0.0, 6.0, 30.0, 1e4], device=DEVICE)[None]
    y, dx, _ = both_ways(
        lambda *t: bias_gelu(*t, approximate=approximate, impl=impl), x, torch.zeros(7, device=DEVICE), torch.ones(1, 7)
    )
    torch.testing.assert_close(y, x.clamp(min=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx[0, [0, 1, 3, 5, 6]].cpu(), torch.tensor([0, 0, 0.5, 1, 1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_axes_and_strides(impl):
    x, other = torch.randn(2, 3, 5, 2, device=DEVICE).unbind(-1)
    bias = torch.randn(10, device=DEVICE)[::2]
    torch.testing.assert_close(bias_gelu(x, bias, impl=impl), F.gelu(x + bias))
    rows = torch.stack([x, other], 2)[:, :, 0]  # dense rows with gaps between them
    torch.testing.assert_close(bias_gelu(rows, bias, impl=impl), F.gelu(x + bias))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    x, bias = torch.randn(3, 8, device=DEVICE, requires_grad=True), torch.randn(8, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.float16):
        y = bias_gelu(x, bias, impl=impl)
    y.sum().backward()
    assert y.dtype == torch.float16 and x.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    x, bias, upstream = torch.randn(4, 6, 8, device=DEVICE), torch.randn(8, device=DEVICE), torch.randn(4, 6, 8)
    function = lambda x, bias: bias_gelu(bias_gelu(x, bias, impl=impl), bias, approximate="tanh", impl=impl)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(both_ways(compiled, x, bias, upstream), both_ways(function, x, bias, upstream))


@needs_kernel
def test_first_order():
    bias = torch.randn(8, device=DEVICE)
    assert_first_order(lambda x: bias_gelu(x, bias, impl="triton"), torch.randn(3, 8, device=DEVICE))


def test_meta():
    y = bias_gelu(torch.empty(2, 3, 8, device="meta"), torch.empty(8, device="meta"))
    assert y.is_meta and y.shape == (2, 3, 8)


def test_autocast_leaves_float64():
    x = torch.randn(3, 8, device=DEVICE, dtype=torch.float64)
    with torch.autocast(DEVICE, torch.float16):
        assert bias_gelu(x, torch.zeros(8, device=DEVICE), impl="reference").dtype == torch.float64


@needs_kernel
@pytest.mark.parametrize("tanh", [False, True])
def test_opcheck(tanh):
    x, bias = torch.randn(5, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    torch.library.opcheck(torch.ops.ajepa.bias_gelu_fwd.default, (x.half(), bias, tanh, torch.float16))
    torch.library.opcheck(torch.ops.ajepa.bias_gelu_bwd.default, (x, x.half(), bias, tanh))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(5)), "must share C"),
        ((torch.tensor(1.0), torch.zeros(1)), "must share C"),
        ((torch.zeros(2, 4), torch.zeros(4, device="meta")), "on one device"),
        ((torch.zeros(2, 4).long(), torch.zeros(4)), "floating point"),
        ((torch.zeros(2, 4), torch.zeros(4), "erf"), "approximate must be"),
    ],
)
def test_errors(arguments, message):
    x, bias, *approximate = arguments
    with pytest.raises(ValueError, match=f"bias_gelu: .*{message}"):
        bias_gelu(x, bias, **({"approximate": approximate[0]} if approximate else {}))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("C", [1536, 3072, 4096])
def test_large_and_repeatable(C):
    x, upstream = (torch.randn(20000, C, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bias = torch.randn(C, device="cuda")
    want = both_ways(lambda *t: oracle(*t, "none"), x.double(), bias.double(), upstream)
    plain = both_ways(lambda *t: bias_gelu(*t, impl="reference"), x, bias, upstream)
    got = both_ways(lambda *t: bias_gelu(*t, impl="triton"), x, bias, upstream)
    assert_as_good(got, plain, want, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = both_ways(bias_gelu, x, bias, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(bias_gelu, x, bias, upstream)
    graph.replay()
    for other in (again, captured):
        assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True))
