import types
import warnings

import pytest
import torch
from oracle import DEVICE, assert_as_good, assert_first_order, needs_kernel, poison  # noqa: F401

import ajepa_kernels.mlp as module
from ajepa_kernels import _hopper, gelu_mlp, gelu_mlp_reference, products
from ajepa_kernels._triton import INTERPRET

NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2")
# The fused products take bfloat16 alone. On a CPU "fused" runs their plain definitions, in any dtype.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.bfloat16]
TRITON = pytest.param("triton", marks=needs_kernel)
# C up to SLOPE_WIDTH keeps gelu'(z), a larger one keeps z
SHAPES = [(0, 16, 64, 16), (1, 8, 8, 24), (67, 48, 200, 48), (5, module.SLOPE_WIDTH + 8, 72, 16)]


def fused_here(dtype):
    """Skips the test on a GPU that cannot run the fused path in this dtype."""
    x = torch.empty(0, dtype=dtype, device=DEVICE)
    names = (*products.FORWARD.values(), *products.BACKWARD.values())
    if DEVICE == "cuda" and (reason := products.why_not(x, names)):
        pytest.skip(reason)


def oracle(x, w1, b1, w2, b2):
    """The MLP by its formula, in float64."""
    z = x.double() @ w1.double().T + b1.double()
    return z * torch.distributions.Normal(0.0, 1.0).cdf(z) @ w2.double().T + b2.double()


def make(rows, width, inner, dtype=torch.float32, out=None):
    out, seed = out or width, torch.Generator().manual_seed(rows)
    shapes = [(rows, width), (inner, width), (inner,), (out, inner), (out,)]
    scales = [1.0, width**-0.5, 1.0, inner**-0.5, 1.0]
    return [(s * torch.randn(shape, generator=seed)).to(dtype) for shape, s in zip(shapes, scales, strict=True)]


def both_ways(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    upstream = torch.sin(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, leaves, upstream)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("rows", "width", "inner", "out"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["auto", "reference", "fused", TRITON])
def test_value_and_gradients(rows, width, inner, out, dtype, impl):
    if impl == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    if impl == "fused":
        fused_here(dtype)
    tensors = make(rows, width, inner, dtype, out)
    want, plain = both_ways(oracle, tensors), both_ways(gelu_mlp_reference, tensors)
    got = both_ways(lambda *t: gelu_mlp(*t, impl=impl), [t.to(DEVICE) for t in tensors])
    assert {t.dtype for t in got} == {dtype}
    assert_as_good([t.cpu() for t in got], plain, want, dtype, NAMES)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("impl", ["reference", "fused", TRITON])
def test_gradients_belong_to_the_parameters_when_copies_compute(impl):
    """The values are computed with the copies, and the gradients belong to the float32 parameters. Leading axes are
    kept."""
    dtype = torch.float16 if impl == "triton" else torch.bfloat16
    if impl == "fused":
        fused_here(dtype)
    x, *params = make(30, 16, 64)
    copies = [p.to(DEVICE, dtype) for p in params]
    leaves = [p.to(DEVICE).requires_grad_() for p in params]
    x = x.to(dtype).to(DEVICE, torch.float32).view(5, 6, 16).requires_grad_()
    y = gelu_mlp(x, *leaves, copies=tuple(copies), impl=impl)
    assert y.shape == (5, 6, 16) and y.dtype == dtype
    got = torch.autograd.grad(y, [x, *leaves], torch.ones_like(y))
    assert {g.dtype for g in got} == {torch.float32}
    assert (got[2].to(dtype) != got[2]).any()  # the sum for b1 is not rounded to the copies' dtype on its way
    rounded = [t.double().requires_grad_() for t in (x.detach().flatten(0, 1), *copies)]
    z = oracle(*rounded)
    want = torch.autograd.grad(z, rounded, torch.ones_like(z))
    for name, g, w in zip(NAMES[1:], got, want, strict=True):
        error = (g.double().view_as(w) - w).norm() / w.norm()
        assert error < 4 * torch.finfo(dtype).eps, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("wanted", range(5))
@pytest.mark.parametrize("impl", ["fused", TRITON])
def test_only_the_gradients_that_are_asked_for(wanted, impl):
    dtype = torch.bfloat16 if impl == "fused" else torch.float16
    if impl == "fused":
        fused_here(dtype)
    tensors = [t.to(DEVICE) for t in make(9, 16, 32, dtype)]
    tensors[wanted].requires_grad_()
    (got,) = torch.autograd.grad(gelu_mlp(*tensors, impl=impl).float().sum(), [tensors[wanted]])
    (want,) = torch.autograd.grad(gelu_mlp_reference(*tensors).float().sum(), [tensors[wanted]])
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


def test_a_detached_bias_costs_no_pass(monkeypatch):
    """The sum over dy is left to the op that consumes the output."""
    x, w1, b1, w2, b2 = (t.requires_grad_() for t in make(9, 16, 32))
    y = gelu_mlp(x, w1, b1, w2, b2.detach(), impl="fused")
    summed = []
    total = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda t, *a, **k: summed.append(t.shape) or total(t, *a, **k))
    y.backward(torch.ones_like(y))
    assert summed == [(9, 32)] and b2.grad is None and w2.grad is not None  # only db1


def test_what_is_kept(monkeypatch):
    seen = []
    plain = products.linear_gelu_plain
    monkeypatch.setattr(products, "linear_gelu_plain", lambda x, w, b, keep: seen.append(keep) or plain(x, w, b, keep))
    tensors = make(3, 8, 16)
    gelu_mlp(*tensors, copies=tuple(tensors[1:]), impl="reference")
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        gelu_mlp(*leaves, copies=tuple(tensors[1:]), impl="reference")
    gelu_mlp(*leaves, copies=tuple(tensors[1:]), impl="reference")
    wide = [t.requires_grad_() for t in make(3, module.SLOPE_WIDTH + 8, 16)]
    gelu_mlp(*wide, copies=tuple(t.detach() for t in wide[1:]), impl="reference")
    assert seen == [products.NOTHING, products.NOTHING, products.SLOPE, products.Z]


def test_autocast():
    fused_here(torch.bfloat16)
    tensors = [t.to(DEVICE).requires_grad_() for t in make(12, 16, 64)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y, want = gelu_mlp(*tensors, impl="fused"), gelu_mlp_reference(*tensors)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=3e-2, atol=3e-2)
    got, want = (torch.autograd.grad(t.float().sum(), tensors) for t in (y, want))
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        torch.testing.assert_close(g, w, rtol=5e-2, atol=5e-2)


@pytest.mark.skipif(INTERPRET, reason="the interpreter does not change this test")
@pytest.mark.parametrize(("width", "backend"), [(16, "inductor"), (module.SLOPE_WIDTH + 8, "aot_eager")])
def test_fullgraph(width, backend):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    fused_here(dtype)
    tensors = [t.to(DEVICE) for t in make(9, width, 32, dtype)]
    function = torch.compile(lambda *t: gelu_mlp(*t, impl="fused"), fullgraph=True, backend=backend)
    for got, want in zip(both_ways(function, tensors), both_ways(gelu_mlp_reference, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("impl", ["fused", TRITON])
def test_first_derivatives_only(impl):
    """`torch.func.grad` works, and gradients of gradients are refused."""
    x, *params = (t.to(DEVICE) for t in make(4, 8, 16, torch.bfloat16 if DEVICE == "cuda" else torch.float32))
    if impl == "fused":
        fused_here(x.dtype)
    assert_first_order(lambda x: gelu_mlp(x, *params, impl=impl), x)


def test_a_residual_gets_its_gradient_if_nothing_else_does():
    x, *params = make(4, 8, 16)
    residual = torch.randn(4, 8, requires_grad=True)
    gelu_mlp(x, *params, residual=residual, impl="fused" if DEVICE == "cpu" else "auto").sum().backward()
    assert torch.equal(residual.grad, torch.ones(4, 8))


# --- the choice -------------------------------------------------------------------------------------------------------


def test_unfused_is_said_once(monkeypatch):
    """A GPU without the fused products runs the kernels of bias_gelu, and says why."""
    monkeypatch.setattr(_hopper, "why_not", lambda *_, **__: "they were not built")
    monkeypatch.setattr(module, "use_triton", lambda op, impl, x, unsupported: not unsupported)
    _hopper._announce.cache_clear()
    gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    w1, w2 = torch.empty(64, 16), torch.empty(16, 64)
    with pytest.warns(UserWarning, match="gelu_mlp runs unfused on this GPU: they were not built"):
        assert module._choose("auto", gpu, w1, w2) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module._choose("auto", gpu, w1, w2) == module._choose("triton", gpu, w1, w2) == "triton"
        assert module._choose("auto", types.SimpleNamespace(is_cuda=True, dtype=torch.float64), w1, w2) == "plain"
    with pytest.raises(ValueError, match="impl='fused' is impossible: they were not built"):
        module._choose("fused", gpu, w1, w2)


@pytest.mark.parametrize("width", [384, 768])
def test_the_products_that_a_width_needs(monkeypatch, width):
    asked = []
    monkeypatch.setattr(_hopper, "why_not", lambda x, names, *widths, **_: asked.append((names, widths)) or "")
    x = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert module._choose("auto", x, torch.empty(4 * width, width), torch.empty(width + 8, 4 * width)) == "fused"
    slope = ("linear_gelu", "linear_gelu_slope", "linear_dslope")
    assert asked == [
        (slope if width == 384 else ("linear_gelu", "linear_gelu_keep", "linear_dgelu"), (4 * width, width, width + 8))
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": torch.randn(32, 15)}, r"x \[..., C\], w1 \[I, C\] and w2"),
        ({"w2": torch.randn(16, 31)}, r"w2 \[C', I\] expected"),
        ({"b1": torch.randn(16)}, r"b1 \[32\] and b2 \[16\] expected"),
        ({"x": torch.ones(2, 16, dtype=torch.int64)}, "floating point"),
        ({"b2": torch.randn(16, device="meta")}, "one device"),
        ({"copies": tuple(make(9, 16, 24)[1:])}, "copies must be 4 tensors of the shapes of w1, b1, w2, b2"),
        ({"copies": (*make(9, 16, 32)[1:4], torch.zeros(16).half())}, "copies must share a dtype"),
        ({"impl": "tf32"}, "auto, fused, triton or reference"),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(("x", "w1", "b1", "w2", "b2"), make(9, 16, 32), strict=True))
    with pytest.raises(ValueError, match=message):
        gelu_mlp(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("width", [384, 768])
def test_in_a_graph_at_full_size(width):
    """A replay reads inputs that were overwritten in place after the capture."""
    fused_here(torch.bfloat16)
    x, *params = [t.cuda() for t in make(4096, width, 4 * width, torch.bfloat16)]
    gelu_mlp(x, *params, impl="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gelu_mlp(x, *params, impl="fused")
    x.neg_()
    graph.replay()
    torch.testing.assert_close(y, gelu_mlp_reference(x, *params), rtol=2e-2, atol=2e-2)
