"""`add_layer_norm(rms=True)`: sum / sqrt(mean(sum^2) + eps) * weight."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, DTYPES, IMPLS, assert_as_good, needs_kernel, poison  # noqa: F401

from ajepa_kernels import ResidualStream, add_layer_norm, add_layer_norm_reference


def oracle(x, residual, weight, eps=1e-5):
    total = x if residual is None else x + residual
    normed = total / (total.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed if weight is None else normed * weight, total


def run(function, tensors, upstream):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    loss = sum((o * u.to(o.device, o.dtype)).sum() for o, u in zip(out, upstream, strict=True))
    return *out, *torch.autograd.grad(loss, [t for t in leaves if t is not None])


# As for layer norm; the mean of the rows is far from zero, so that a norm that subtracts it fails.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("M", "C"), [(0, 64), (1, 768), (3, 7), (21, 96), (9, 1025)])
@pytest.mark.parametrize("residual", [None, "same", "float32"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradients(M, C, residual, affine, dtype, impl):
    x = (2 + torch.randn(M, C)).to(dtype)
    stream = None if residual is None else torch.randn(M, C).to(dtype if residual == "same" else torch.float32)
    tensors, upstream = (
        (x, stream, torch.randn(C) if affine else None),
        (torch.randn(M, C).to(dtype), torch.randn(M, C)),
    )
    want = run(oracle, [None if t is None else t.double() for t in tensors], upstream)
    plain = run(lambda *t: add_layer_norm_reference(*t, rms=True), tensors, upstream)
    there = [None if t is None else t.to(DEVICE) for t in tensors]
    got = run(lambda *t: add_layer_norm(*t, rms=True, impl=impl), there, upstream)
    assert [t.dtype for t in got] == [t.dtype for t in plain]
    assert_as_good([t.cpu() for t in got], plain, want, dtype)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("impl", IMPLS)
def test_agrees_with_torch(eps, impl):
    x, weight = torch.randn(2, 5, 24, device=DEVICE), torch.randn(24, device=DEVICE)
    normed, total = add_layer_norm(x, None, weight, None, eps, rms=True, impl=impl)
    torch.testing.assert_close(normed, F.rms_norm(x, (24,), weight, eps))
    assert total is x


@pytest.mark.parametrize("impl", IMPLS)
def test_stream_with_a_gradient_in_half_precision(impl):
    """The same values and gradients as a stream of float32, up to the rounding of the gradient."""
    x, values, weight, upstream = (torch.randn(s, device=DEVICE) for s in ((9, 70), (9, 70), (70,), (9, 70)))

    def gradients(stream_of):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        normed, stream = add_layer_norm(leaves[0], stream_of(values), leaves[1], rms=True, impl=impl)
        normed, _ = add_layer_norm(stream, None, leaves[1], rms=True, impl=impl)
        return normed, *torch.autograd.grad(normed, leaves, upstream)

    got, want = gradients(lambda t: ResidualStream.of(t, torch.float16)), gradients(lambda t: t)
    assert torch.equal(got[0], want[0])
    for g, w in zip(got[1:], want[1:], strict=True):
        assert (g - w).norm() < 1e-3 * w.norm()


@needs_kernel
def test_opcheck():
    x, weight = torch.randn(5, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    for residual in (None, x):
        arguments = (x.half(), residual, None, weight, None, 1e-5, torch.float16, True)
        torch.library.opcheck(torch.ops.ajepa.add_layer_norm_fwd.default, arguments)
    none, rstd, float32 = torch.empty(0, device=DEVICE), torch.rand(5, device=DEVICE), torch.float32
    arguments = (x, x, x, none, rstd, weight, float32, float32, None, float32, True)
    torch.library.opcheck(torch.ops.ajepa.add_layer_norm_bwd.default, arguments)


def test_bias_is_refused():
    with pytest.raises(ValueError, match="add_layer_norm: RMS norm has no bias; pass bias=None"):
        add_layer_norm(torch.zeros(2, 4), None, torch.ones(4), torch.zeros(4), rms=True)
