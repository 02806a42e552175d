"""LayerScale and drop path in the pass of `add_layer_norm`: sum = residual + sample_scale * layer_scale * x."""

import pytest
import torch
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


def oracle(x, residual, weight, gamma, sample_scale, rms=False):
    if gamma is not None:
        x = x * gamma
    if sample_scale is not None:
        x = x * sample_scale.double().reshape(*sample_scale.shape, *[1] * (x.dim() - sample_scale.dim()))
    total = residual + x
    centred = total if rms else total - total.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight, total


def run(function, tensors, upstream):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    loss = sum((o * u.to(o.device, o.dtype)).sum() for o, u in zip(out, upstream, strict=True))
    return *out, *torch.autograd.grad(loss, [t for t in leaves if t is not None])


def factors(scale, B, N):
    """`sample_scale` for x `[B, N, C]`: dropped samples, one factor for each row, or none."""
    if scale == "rows":
        return torch.rand(B, N)
    return torch.tensor([2.0, 0.0, 1.25])[torch.arange(B) % 3] if scale == "samples" else None


def compare(shape, gamma, scale, rms, dtype, impl):
    B, N, C = shape
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape)
    tensors = x, residual, torch.randn(C), torch.randn(C) if gamma else None
    upstream, sample_scale = (torch.randn(shape).to(dtype).float(), torch.randn(shape)), factors(scale, B, N)

    def call(function, **options):
        def it(x, residual, weight, gamma):
            scales = {"layer_scale": gamma, "sample_scale": None if sample_scale is None else sample_scale.to(x.device)}
            return function(x, residual, weight, rms=rms, **scales, **options)

        return it

    doubles = [None if t is None else t.double() for t in tensors]
    want = run(lambda *t: oracle(*t, sample_scale, rms), doubles, upstream)
    plain = run(call(add_layer_norm_reference), tensors, upstream)
    there = [None if t is None else t.to(DEVICE) for t in tensors]
    got = run(call(add_layer_norm, impl=impl), there, upstream)
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    names = ["normed", "sum", "dx", "dresidual", "dweight", *(["dgamma"] if gamma else [])]
    assert_as_good([t.cpu() for t in got], plain, want, dtype, names)


# Rows: none, fewer than a program handles, samples that end within a program's rows. Widths: odd, several chunks.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", [(0, 5, 64), (1, 3, 7), (3, 7, 96), (3, 3, 1025)], ids=str)
@pytest.mark.parametrize(("gamma", "scale"), [(True, None), (False, "samples"), (True, "samples"), (True, "rows")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients(shape, gamma, scale, dtype, impl):
    compare(shape, gamma, scale, False, dtype, impl)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("impl", IMPLS)
def test_with_rms_norm(impl):
    compare((5, 3, 96), True, "samples", True, torch.float32, impl)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("impl", IMPLS)
def test_residual_and_x_of_one_dtype_have_gradients_of_their_own(impl):
    """Without a scale they share one tensor."""
    x, residual = (torch.randn(4, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    kept = torch.tensor([0.0, 2.0, 0.0, 2.0], device=DEVICE)
    add_layer_norm(x, residual, sample_scale=kept, impl=impl)[1].sum().backward()
    assert torch.equal(residual.grad, torch.ones_like(residual)) and torch.equal(x.grad, kept[:, None].expand(4, 8))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_with_the_bias_of_the_layer_before_and_a_stream(table, impl):
    """x_bias gets the sum of x's gradient, scales included; the stream's gradient has none of them."""
    x, gamma, x_bias = (torch.randn(s, device=DEVICE) for s in ((3, 4, 8), (8,), (8,)))
    kept, upstream = torch.tensor([0.0, 1.5, 1.5]), torch.randn(3, 4, 8)
    values, rows = torch.randn(5, 8), torch.randint(5, (3, 4))

    def gradients(x, gamma, x_bias, function, stream):
        x, gamma, x_bias = (t.detach().requires_grad_() for t in (x, gamma, x_bias))
        normed, _ = function(x, stream, x_bias=x_bias, layer_scale=gamma, sample_scale=kept.to(x.device))
        return torch.autograd.grad((normed * upstream.to(normed)).sum(), (x, gamma, x_bias))

    def call(x, residual, x_bias=None, layer_scale=None, sample_scale=None):
        place = {"rows": rows.to(x.device)} if table else {}
        stream = residual.to(x.device) if table else ResidualStream.of(residual.to(x.device), torch.float32)
        options = {"x_bias": x_bias, "layer_scale": layer_scale, "sample_scale": sample_scale, "impl": impl}
        return add_layer_norm(x, stream, **place, **options)

    def definition(x, residual, x_bias, layer_scale, sample_scale):
        x = x + (x_bias - x_bias.detach())
        return oracle(x, residual.double(), torch.ones(8).double(), layer_scale, sample_scale)

    stream = values if table else values[rows]
    got = gradients(x, gamma, x_bias, call, stream)
    want = gradients(*(t.cpu().double() for t in (x, gamma, x_bias)), definition, values[rows])
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu().double(), w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_without_a_gradient_of_normed(impl):
    x, residual = (torch.randn(2, 3, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    gamma, bias = (torch.randn(8, device=DEVICE, requires_grad=True) for _ in range(2))
    kept = torch.tensor([0.0, 2.0], device=DEVICE)
    normed, total = add_layer_norm(x, residual, x_bias=bias, layer_scale=gamma, sample_scale=kept, impl=impl)
    (NoGradient.apply(normed).sum() + 3 * total.sum()).backward()
    want = 3 * kept[:, None, None] * gamma.detach()
    torch.testing.assert_close(x.grad, want.expand(2, 3, 8))
    torch.testing.assert_close(bias.grad, want.expand(2, 3, 8).sum((0, 1)))
    torch.testing.assert_close(gamma.grad, (3 * kept[:, None, None] * x.detach()).sum((0, 1)))
    assert (residual.grad == 3).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_autocast(impl):
    """x, gamma and the factors lie apart in memory; under autocast, the sum has the widest dtype."""
    x = torch.randn(2, 3, 8, 2, device=DEVICE, dtype=torch.float16)[..., 0]
    residual = torch.randn(3, 2, 8, device=DEVICE, dtype=torch.float16).transpose(0, 1)
    gamma, kept = torch.randn(16, device=DEVICE)[::2], torch.tensor([2.0, 9.0, 0.5, 9.0], device=DEVICE)[::2]
    with torch.autocast(DEVICE, torch.float16):
        normed, total = add_layer_norm(x, residual, layer_scale=gamma, sample_scale=kept, impl=impl)
    assert normed.dtype == torch.float16 and total.dtype == torch.float32
    torch.testing.assert_close(total, residual.float() + x.float() * gamma * kept[:, None, None])


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    gamma, kept = torch.randn(8, device=DEVICE), torch.tensor([0.0, 2.0], device=DEVICE)
    tensors = torch.randn(2, 3, 8, device=DEVICE), torch.randn(2, 3, 8, device=DEVICE), gamma

    def block(x, residual, gamma):
        return add_layer_norm(x.tanh(), residual, rms=True, layer_scale=gamma, sample_scale=kept, impl=impl)

    upstream = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, tensors, upstream), run(block, tensors, upstream))


@needs_kernel
def test_first_order():
    x, residual, gamma = (
        torch.randn(4, 8, device=DEVICE),
        torch.randn(4, 8, device=DEVICE),
        torch.ones(8, device=DEVICE),
    )

    def function(gamma):
        normed, total = add_layer_norm(x, residual, layer_scale=gamma, impl="triton")
        return normed.sin() + total

    assert_first_order(function, gamma)


@needs_kernel
@pytest.mark.parametrize("rms", [False, True])
def test_opcheck(rms):
    x, gamma, kept = torch.randn(6, 8, device=DEVICE), torch.randn(8, device=DEVICE), torch.rand(3, device=DEVICE)
    row, none = torch.rand(6, device=DEVICE), torch.empty(0, device=DEVICE)
    float32, float16 = torch.float32, torch.float16
    for scales in ((None, kept), (gamma, None), (gamma, kept)):
        forward = (x.half(), x, None, gamma, None, 1e-5, float16, rms, *scales)
        torch.library.opcheck(torch.ops.ajepa.add_layer_norm_fwd.default, forward)
        branch = None if scales[0] is None else x.half()
        dtypes, mean = (float32, float32, None, float32), none if rms else row
        backward = (x, x, x, mean, row, gamma, *dtypes, rms, branch, *scales)
        torch.library.opcheck(torch.ops.ajepa.add_layer_norm_bwd.default, backward)


@pytest.mark.parametrize(
    ("residual", "options", "message"),
    [
        (None, {"layer_scale": torch.ones(4)}, "need a residual"),
        (None, {"sample_scale": torch.ones(2)}, "need a residual"),
        (torch.zeros(2, 3, 4), {"layer_scale": torch.ones(3)}, r"layer_scale must be \[4\], got \[3\]"),
        (torch.zeros(2, 3, 4), {"sample_scale": torch.ones(3)}, r"sample_scale must be \[2\] or \[2, 3\], got \[3\]"),
        (torch.zeros(2, 3, 4), {"sample_scale": torch.ones(2, requires_grad=True)}, "gets no gradient; detach it"),
        (torch.zeros(2, 3, 4), {"sample_scale": torch.ones(2).long()}, "floating point"),
    ],
)
def test_errors(residual, options, message):
    with pytest.raises(ValueError, match=f"add_layer_norm: .*{message}"):
        add_layer_norm(torch.zeros(2, 3, 4), residual, **options)


def test_arguments_that_are_no_tensors():
    with pytest.raises(TypeError, match=r"add_layer_norm: sample_scale must be a torch.Tensor, got list; .*as_tensor"):
        add_layer_norm(torch.zeros(2, 4), torch.zeros(2, 4), sample_scale=[1.0, 0.0])
