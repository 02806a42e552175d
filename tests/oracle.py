"""Helpers shared by the tests of the operations: where a kernel can run, poisoned memory, errors against float64."""

import pytest
import torch

from ajepa_kernels._triton import INTERPRET, triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_LAUNCH = triton is not None and (DEVICE == "cuda" or INTERPRET)

needs_kernel = pytest.mark.skipif(
    not CAN_LAUNCH, reason="kernels need a GPU or Triton's interpreter (see test_interpreted.py)"
)
IMPLS = ["reference", pytest.param("triton", marks=needs_kernel)]
E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # all finite values >= 0, in order
# bfloat16 is tested on a GPU only: Triton's interpreter computes it wrongly, and CPUs are slow at it.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


@pytest.fixture
def poison():
    """Fills uninitialised memory with NaN, so that an output that a kernel did not write fails its comparison."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float64 x, clamped to +-448 and rounded to the nearest value of e4m3, ties to the even code."""
    size = x.abs().clamp(max=448.0)
    above = torch.searchsorted(E4M3, size).clamp(max=len(E4M3) - 1)
    below = (above - 1).clamp(min=0)
    up, down = E4M3[above] - size, size - E4M3[below]
    code = torch.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return E4M3[code] * x.sign()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want||, which is NaN if any element is NaN."""
    got, want = got.double(), want.double()
    if not want.numel():
        return 0.0
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


def assert_as_good(got, plain, want, dtype, names=None) -> None:
    """Check the error of each of `got` against the float64 result `want`: it may be at most twice the sum of the error
    of `plain` (the plain definition in the same dtype) and one rounding of the dtype."""
    rounding = torch.finfo(dtype).eps
    for i, (g, p, w) in enumerate(zip(got, plain, want, strict=True)):
        name = names[i] if names else i
        assert g.shape == w.shape, f"{name}: the shape is {list(g.shape)} instead of {list(w.shape)}"
        error, allowed = relative_error(g, w), 2 * (relative_error(p, w) + rounding)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


class NoGradient(torch.autograd.Function):
    """The identity, whose backward returns no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def assert_first_order(function, x) -> None:
    """Check that first derivatives work with `create_graph` and `torch.func`, and that second derivatives raise an
    error instead of silently omitting terms."""
    again = "gradients of gradients"
    total = lambda x: function(x).sum()  # noqa: E731 (the sum's upstream gradient does not require grad)
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
