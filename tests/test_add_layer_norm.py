import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, IMPLS, assert_as_good, needs_kernel, poison  # noqa: F401

from ajepa_kernels import add_layer_norm, add_layer_norm_reference


def oracle(x, residual, weight, bias):
    total = x.double() if residual is None else x.double() + residual.double()
    centred = total - total.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    return normed if bias is None else normed + bias.double(), total


def run(function, tensors, upstream):
    leaves = [t if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    loss = sum((o * u.to(o.device, o.dtype)).sum() for o, u in zip(out, upstream, strict=True))
    return *out, *torch.autograd.grad(loss, [t for t in leaves if t is not None])


# rows: none, one, fewer than a program takes, more than all programs take at once; widths as in the loss
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


@pytest.mark.parametrize("impl", IMPLS)
def test_only_one_output_used(impl):
    """Either output may go unused, as at the two ends of a model."""
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
    weight = torch.randn(8, device=DEVICE, requires_grad=True)

    def block(x, residual):
        normed, total = add_layer_norm(x, residual, weight, impl=impl)
        return add_layer_norm(normed.tanh(), total, weight, impl=impl)

    upstream = (torch.randn(4, 8), torch.randn(4, 8))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, leaves, upstream), run(block, leaves, upstream))


@needs_kernel
def test_opcheck():
    x, weight = torch.randn(5, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    for residual, bias in ((None, weight), (x.double().float(), None)):
        arguments = (x.half(), residual, weight, bias, 1e-5, torch.float16)
        torch.library.opcheck(torch.ops.ajepa.add_layer_norm_fwd.default, arguments)
    for dsum, x_dtype in ((None, torch.float32), (x, torch.float16)):
        torch.library.opcheck(torch.ops.ajepa.add_layer_norm_bwd.default, (x, dsum, x, weight, True, 1e-5, x_dtype))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(2, 5), torch.ones(4)), "equal shapes"),
        ((torch.zeros(2, 4), None, torch.ones(5)), r"weight must be \[4\]"),
        ((torch.zeros(2, 4), None, torch.ones(4), torch.ones(1)), r"bias must be \[4\]"),
        ((torch.zeros(2, 4), None, torch.ones(4, device="meta")), "on one device"),
        ((torch.zeros(2, 4).long(), None, torch.ones(4)), "floating point"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=f"add_layer_norm: .*{message}"):
        add_layer_norm(*arguments)


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
    assert all(torch.equal(a, b) for a, b in zip(got, run(add_layer_norm, tensors, upstream), strict=True))
