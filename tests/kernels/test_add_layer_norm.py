import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DEVICE,
    DTYPES,
    IMPLS,
    NoGradient,
    assert_as_good,
    assert_first_order,
    needs_kernel,
    poison,  # noqa: F401
)

from ajepa_kernels import ResidualStream, add_layer_norm, add_layer_norm_reference


def oracle(x, residual, weight, bias):
    total = x.double() if residual is None else x.double() + residual.double()
    centred = total - total.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    normed = normed if weight is None else normed * weight.double()
    return normed if bias is None else normed + bias.double(), total


def run(function, tensors, upstream):
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    loss = sum((o * u.to(o.device, o.dtype)).sum() for o, u in zip(out, upstream, strict=True))
    return *out, *torch.autograd.grad(loss, [t for t in leaves if t is not None])


# Numbers of rows: none, one, fewer than one program handles, more than all programs handle at once. Widths: as in the
# tests of the loss.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "C"), [(0, 64), (1, 768), (3, 7), (70, 96), (9, 1025)])
@pytest.mark.parametrize("residual", [None, "same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients(M, C, residual, dtype, impl):
    x = torch.randn(M, C).to(dtype)
    stream = None if residual is None else torch.randn(M, C).to(dtype if residual == "same" else torch.float32)
    bias = None if residual == "same" else torch.randn(C)
    tensors, upstream = (x, stream, torch.randn(C), bias), (torch.randn(M, C).to(dtype).float(), torch.randn(M, C))
    want = run(oracle, tuple(t if t is None else t.double() for t in tensors), upstream)
    plain = run(add_layer_norm_reference, tensors, upstream)
    got = run(
        lambda *t: add_layer_norm(*t, impl=impl), tuple(t if t is None else t.to(DEVICE) for t in tensors), upstream
    )
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    names = [
        "normed",
        "sum",
        *(n for n, t in zip(("dx", "dres", "dweight", "dbias"), tensors, strict=True) if t is not None),
    ]
    assert_as_good([t.cpu() for t in got], plain, want, dtype, names)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_without_weight(with_bias, with_residual, impl):
    """A layer norm without affine parameters, as for the targets, or with a bias only."""
    tensors = (
        torch.randn(9, 70), torch.randn(9, 70) if with_residual else None, None, torch.randn(70) if with_bias else None,
    )  # fmt: skip
    upstream = torch.randn(9, 70), torch.randn(9, 70)
    want = run(oracle, tuple(t if t is None else t.double() for t in tensors), upstream)
    plain = run(add_layer_norm_reference, tensors, upstream)
    leaves = tuple(t if t is None else t.to(DEVICE) for t in tensors)
    got = run(lambda *t: add_layer_norm(*t, impl=impl), leaves, upstream)
    assert_as_good([t.cpu() for t in got], plain, want, torch.float32)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "C"), [(0, 64), (70, 96)])
@pytest.mark.parametrize("residual", [None, "table", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_bias_of_the_layer_before(M, C, residual, dtype, impl):
    """x holds the bias already; its gradient is the sum of x's. A residual may be read from a table by row."""
    x, table = torch.randn(M, C).to(dtype), torch.randn(5, C)
    rows = torch.randint(5, (M,)) if residual == "table" else None
    tensors = (x, torch.randn(M, C) if residual == "float32" else None, torch.randn(C), torch.randn(C), torch.randn(C))
    upstream = torch.randn(M, C).to(dtype).float(), torch.randn(M, C)

    def definition(x, residual, weight, bias, x_bias):
        stream = table.double()[rows] if rows is not None else residual
        return oracle(x + (x_bias - x_bias.detach()), stream, weight, bias)

    def call(function, **options):
        def run_it(x, residual, weight, bias, x_bias):
            stream = residual if rows is None else table.to(x.device)
            place = None if rows is None else rows.to(x.device)
            return function(x, stream, weight, bias, x_bias=x_bias, rows=place, **options)

        return run_it

    want = run(definition, tuple(t if t is None else t.double() for t in tensors), upstream)
    plain = run(call(add_layer_norm_reference), tensors, upstream)
    got = run(call(add_layer_norm, impl=impl), tuple(t if t is None else t.to(DEVICE) for t in tensors), upstream)
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    assert_as_good([t.cpu() for t in got], plain, want, dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("first", ["table", "stream"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_the_stream_in_half_precision(first, dtype, impl):
    """Three sums in a chain, of which the last takes a stream that a product has added to; rows are left out on the
    way. Values are exactly those of a float32 stream; gradients are as good as float16 allows."""
    M, C, some = 9, 70, torch.tensor([7, 0, 3, 4])
    x, table = torch.randn(3, M, C).to(dtype), torch.randn(5, C)
    rows, weight, bias = torch.arange(M) % 5, torch.randn(3, C), torch.randn(3, C)
    upstream = torch.randn(len(some), C)

    def network(x, weight, bias, impl=impl, stream_of=lambda t: ResidualStream.of(t, torch.float16)):
        norm = lambda x, r, i, **more: add_layer_norm(x, r, weight[i], bias[i], x_bias=bias[i], impl=impl, **more)  # noqa: E731
        device, half = x.device, x.dtype
        values = table.to(device, torch.promote_types(half, torch.float32))
        if first == "table":
            normed, stream = norm(x[0], stream_of(values), 0, rows=rows.to(device))
        else:
            normed, stream = norm(x[0], stream_of(values[rows.to(device)]), 0)
        normed, stream = norm((x[1] * normed).to(half), stream, 1)
        half_of_x, normed = x[2][some.to(device)], normed[some.to(device)]
        if isinstance(stream, ResidualStream):
            stream = stream.select(some.to(device))
            total = ResidualStream(stream.values + (half_of_x * normed).detach(), stream.carrier)
            normed, total = norm(total, None, 2)
            return normed.float() + total.joined().float()
        total = stream[some.to(device)] + (half_of_x * normed).detach()
        normed, total = norm(total, None, 2)
        return normed.float() + total.float()

    def gradients(tensors, **options):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = network(*leaves, **options)
        return out, *torch.autograd.grad(out, leaves, upstream.to(out))

    place = [t.to(DEVICE) for t in (x, weight, bias)]
    want = gradients([t.double() for t in (x, weight, bias)], impl="reference", stream_of=lambda t: t)
    exact = gradients(place, stream_of=lambda t: t)
    plain = gradients((x, weight, bias), impl="reference")
    got = gradients(place)
    torch.testing.assert_close(got[0], exact[0], rtol=0, atol=0)
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    assert_as_good([t.cpu() for t in got], plain, want, torch.float16)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_backward_without_a_gradient(with_residual, impl):
    """A later function may return no gradient for `normed`; the gradient of the sum still passes through."""
    x, residual = (torch.randn(4, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    normed, total = add_layer_norm(x, residual if with_residual else None, torch.ones(8, device=DEVICE), impl=impl)
    NoGradient.apply(normed).sum().backward(retain_graph=True)
    assert x.grad is None and residual.grad is None
    (NoGradient.apply(normed).sum() + 3 * total.sum()).backward()
    assert (x.grad == 3).all() and (residual.grad is None or (residual.grad == 3).all())


@needs_kernel
@pytest.mark.parametrize("which", [0, 1, 2])
def test_first_order(which):
    """Derivatives with respect to x, the residual or the weight, while the other two require no gradient."""
    tensors = [torch.randn(4, 8, device=DEVICE), torch.randn(4, 8, device=DEVICE), torch.randn(8, device=DEVICE)]

    def function(x):
        normed, total = add_layer_norm(*tensors[:which], x, *tensors[which + 1 :], impl="triton")
        return normed.sin() + total

    assert_first_order(function, tensors[which])


def test_meta():
    x = torch.empty(2, 3, 8, device="meta")
    normed, total = add_layer_norm(x, x, torch.empty(8, device="meta"))
    assert normed.is_meta and normed.shape == total.shape == x.shape


def test_autocast_leaves_float64():
    x = torch.randn(3, 8, device=DEVICE, dtype=torch.float64)
    with torch.autocast(DEVICE, torch.float16):
        assert add_layer_norm(x, None, impl="reference")[0].dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
def test_only_one_output_used(impl):
    """Either output may be unused, as in the first and last layer of a model."""
    leaves = [torch.randn(4, 8, device=DEVICE, requires_grad=True) for _ in range(2)]
    weight = torch.randn(8, device=DEVICE, requires_grad=True)
    for i in range(2):
        got = torch.autograd.grad(add_layer_norm(*leaves, weight, impl=impl)[i].square().sum(), leaves)
        want = torch.autograd.grad(add_layer_norm(*leaves, weight, impl="reference")[i].square().sum(), leaves)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_axes_and_strides(impl):
    x, residual = torch.randn(2, 3, 5, 2, device=DEVICE).unbind(-1)
    weight = torch.randn(5, device=DEVICE)
    normed, total = add_layer_norm(x, residual, weight, impl=impl)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, F.layer_norm(x + residual, (5,), weight))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    x, residual = (torch.randn(3, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    with torch.autocast(DEVICE, torch.float16):
        normed, total = add_layer_norm(x.half(), residual, torch.ones(8, device=DEVICE), impl=impl)
    assert normed.dtype == torch.float16 and total.dtype == torch.float32
    (normed.sum() + total.sum()).backward()
    assert x.grad.dtype == residual.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    leaves = [torch.randn(4, 8, device=DEVICE, requires_grad=True) for _ in range(2)]
    weight, x_bias = (torch.randn(8, device=DEVICE, requires_grad=True) for _ in range(2))

    def block(x, residual):
        normed, total = add_layer_norm(x, residual, weight, x_bias=x_bias, impl=impl)
        stream = ResidualStream.of(total.detach(), torch.bfloat16)
        normed, stream = add_layer_norm(normed.tanh(), stream, weight, impl=impl)
        return normed, total + stream.joined()

    upstream = (torch.randn(4, 8), torch.randn(4, 8))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, leaves, upstream), run(block, leaves, upstream))


@needs_kernel
def test_opcheck():
    x, weight = torch.randn(5, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    for residual, w, bias in ((None, weight, weight), (x.double().float(), weight, None), (x, None, None)):
        for rows in (None,) if residual is None else (None, torch.arange(5, device=DEVICE) // 2):
            arguments = (x.half(), residual, rows, w, bias, 1e-5, torch.float16)
            torch.library.opcheck(torch.ops.ajepa.add_layer_norm_fwd.default, arguments)
    rows = torch.randn(5, device=DEVICE), torch.rand(5, device=DEVICE)
    float32, float16 = torch.float32, torch.float16
    for dsum, *dtypes in ((None, float32, float32, None, None), (x, float16, float32, float32, float32)):
        torch.library.opcheck(torch.ops.ajepa.add_layer_norm_bwd.default, (x, dsum, x, *rows, weight, *dtypes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(2, 5), torch.ones(4)), "equal shapes"),
        ((torch.zeros(2, 4), None, torch.ones(5)), r"weight must be \[4\]"),
        ((torch.zeros(2, 4), None, torch.ones(4), torch.ones(1)), r"bias must be \[4\]"),
        ((torch.zeros(2, 4), None, torch.ones(4, device="meta")), "on one device"),
        ((torch.zeros(2, 4).long(), None, torch.ones(4)), "floating point"),
        ((ResidualStream.of(torch.zeros(2, 4), torch.float32), torch.zeros(2, 4)), "where there is no residual"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"add_layer_norm: .*{message}"):
        add_layer_norm(*arguments)


@pytest.mark.parametrize(
    ("residual", "options", "message"),
    [
        (None, {"x_bias": torch.zeros(3)}, r"x_bias must be \[4\], got \[3\]"),
        (None, {"rows": torch.zeros(2).long()}, r"rows needs a residual \[R, C\]"),
        (torch.zeros(9, 4), {"rows": torch.zeros(3).long()}, r"rows must be int64 or int32 \[2\], got \[3\]"),
        (torch.zeros(9, 4), {"rows": torch.zeros(2)}, "rows must be int64 or int32"),
        (torch.zeros(9, 4, requires_grad=True), {"rows": torch.zeros(2).long()}, "gets no gradient; detach it"),
    ],
)
def test_errors_of_options(residual, options, message):
    with pytest.raises(ValueError, match=f"add_layer_norm: .*{message}"):
        add_layer_norm(torch.zeros(2, 4), residual, **options)


@needs_kernel
def test_dtypes_without_a_kernel():
    x, weight = torch.zeros(2, 4, device=DEVICE), torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match=r"no kernel for torch\.float64, torch\.float8_e4m3fn"):
        add_layer_norm(x.to(torch.float8_e4m3fn), None, weight.double(), impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("C", [384, 768, 1024, 4096])
def test_large_and_repeatable(C):
    tensors = [torch.randn(20000, C, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    tensors += [torch.randn(C, device="cuda") for _ in range(2)]
    upstream = [torch.randn(20000, C, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    want = run(oracle, tensors, upstream)
    plain = run(lambda *t: add_layer_norm(*t, impl="reference"), tensors, upstream)
    got = run(lambda *t: add_layer_norm(*t, impl="triton"), tensors, upstream)
    assert_as_good(got, plain, want, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = run(add_layer_norm, tensors, upstream)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(add_layer_norm, tensors, upstream)
    for t in captured:
        t.detach().fill_(float("nan"))  # an element that the replay does not write stays NaN
    graph.replay()
    for other in (again, captured):
        assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True))
