"""What the operations' tests share: where a kernel can run, poisoned memory, errors against float64."""

import pytest
import torch

from ajepa_kernels._triton import INTERPRET, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_LAUNCH = triton is not None and (DEVICE == "cuda" or INTERPRET)

needs_kernel = pytest.mark.skipif(
    not CAN_LAUNCH, reason="kernels need a GPU, or TRITON_INTERPRET=1 as test_interpreted.py sets it"
)
IMPLS = ["reference", pytest.param("triton", marks=needs_kernel)]
# bfloat16 is wrong in Triton's interpreter, and slow on a CPU: it is tested on a GPU
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture
def poison():
    """Uninitialised memory holds NaN, so that an output that was not written fails its comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||, NaN if anything is."""
    got, want = got.double(), want.double()
    if not want.numel():
        return 0.0
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def assert_as_good(got, plain, want, dtype, names=None) -> None:
    """Each of `got` errs from float64 at most twice as much as the plain definition in its dtype and one rounding."""
    rounding = torch.finfo(dtype).eps
    for i, (g, p, w) in enumerate(zip(got, plain, want, strict=True)):
        name = names[i] if names else i
        assert g.shape == w.shape, f"{name}: {list(g.shape)} instead of {list(w.shape)}"
        error, allowed = relative_error(g, w), 2 * (relative_error(p, w) + rounding)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


class NoGradient(torch.autograd.Function):
    """The identity, without a derivative."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def assert_first_order(function, x) -> None:
    """First derivatives come with `create_graph` and from `torch.func`; further ones raise instead of losing terms."""
    again = "gradients of gradients"
    total = lambda x: function(x).sum()  # noqa: E731 (its upstream does not require grad)
    x = x.detach().requires_grad_()
    want = torch.autograd.grad(total(x), x)[0].clone()
    got = torch.autograd.grad(total(x), x, create_graph=True)[0]
    torch.testing.assert_close(got, want)
    with pytest.raises(RuntimeError, match=again):
        (got.square().sum() + x.sum()).backward()
    first = torch.func.grad(total)
    torch.testing.assert_close(first(x.detach()), want)
    with pytest.raises(RuntimeError, match=again):
        torch.func.grad(lambda x: first(x).square().sum())(x.detach())
