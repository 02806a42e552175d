from functools import partial

import pytest
import torch
from oracle import DEVICE, DTYPES, IMPLS, assert_as_good, assert_first_order, needs_kernel, poison  # noqa: F401

from ajepa_kernels import segment_pool, segment_pool_reference

IMPLS = [*IMPLS, "auto"]  # "auto" on a CPU has a gradient of its own
EPS = 1e-5


def oracle(x, cu):
    """The formula in float64, segment by segment."""
    pooled = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        tokens = x[start:end].double()
        mean = tokens.sum(0) / max(end - start, 1)
        variance = (tokens - mean).square().sum(0) / max(end - start, 1)
        pooled.append(torch.stack([mean, (variance + EPS).sqrt()]))
    return torch.stack(pooled) if pooled else x.new_zeros(0, 2, x.shape[1], dtype=torch.float64)


def both(function, x, upstream):
    x = x.detach().requires_grad_()
    out = function(x)
    return out, torch.autograd.grad((out * upstream.to(out.device, out.dtype)).sum() + 0 * x.sum(), x)[0]


# Segments: empty at either end and in between, of one token, longer than a program holds at once, all tokens or none of
# them outside; no segments, no tokens. Widths: less than a vector access, several blocks, a masked block, a ViT-S's.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("T", "C", "offsets"),
    [
        (40, 7, [2, 2, 3, 11, 11, 29, 37]), (12, 384, [0, 8, 12]), (21, 300, [0, 0, 21, 21]), (9, 16, [4, 4]),
        (9, 16, [3]), (0, 64, [0, 0, 0]), (30, 1, [0, 5, 30]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradient(T, C, offsets, offset, dtype, impl):
    x, cu = (torch.randn(T, C) + offset).to(dtype), torch.tensor(offsets, dtype=torch.int32)
    upstream = torch.randn(len(cu) - 1, 2, C)
    want = both(partial(oracle, cu=cu), x.double(), upstream)
    plain = both(partial(segment_pool_reference, cu_segments=cu), x, upstream)
    got = both(partial(segment_pool, cu_segments=cu.to(DEVICE), impl=impl), x.to(DEVICE), upstream)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    for part in range(2):  # apart, because a large mean would hide an error of the deviation
        assert_as_good([got[0][:, part].cpu()], [plain[0][:, part]], [want[0][:, part]], torch.float32)
    assert_as_good([got[1].cpu()], plain[1:], want[1:], dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_outside_are_not_read(impl):
    """Values that are not finite do not pass from padding to results, and the gradient of padding is zero."""
    x, cu = torch.randn(9, 8, device=DEVICE), torch.tensor([2, 5, 7], device=DEVICE)
    want = both(partial(segment_pool, cu_segments=cu, impl=impl), x, torch.ones(2, 2, 8))
    x[:2], x[7:] = torch.nan, torch.inf
    leaf = x.requires_grad_()
    pooled = segment_pool(leaf, cu, impl=impl)
    (dx,) = torch.autograd.grad(pooled.sum(), leaf)
    torch.testing.assert_close(pooled, want[0])
    torch.testing.assert_close(dx[2:7], want[1][2:7])
    assert (dx[:2] == 0).all() and (dx[7:] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_one_token_and_equal_tokens(impl):
    """The deviation is sqrt(eps), and its gradient is zero instead of infinite."""
    x = torch.full((4, 8), 3.7, device=DEVICE, requires_grad=True)
    pooled = segment_pool(x, torch.tensor([0, 1, 4], device=DEVICE), impl=impl)
    torch.testing.assert_close(pooled[:, 1], torch.full_like(pooled[:, 1], EPS**0.5))
    (dx,) = torch.autograd.grad(pooled[:, 1].sum(), x)
    assert dx.abs().max() < 1e-3


@pytest.mark.parametrize("impl", IMPLS[::2])
def test_gradcheck(impl):
    x, cu = torch.randn(9, 3, device=DEVICE, dtype=torch.float64), torch.tensor([1, 1, 4, 8], device=DEVICE)
    function = partial(segment_pool, cu_segments=cu, impl=impl)
    assert torch.autograd.gradcheck(function, x.requires_grad_())
    if impl == "reference":
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_and_eps(impl):
    x, cu = torch.randn(6, 2, 5, device=DEVICE)[:, 1], torch.tensor([0, 2, 6], device=DEVICE)
    pooled = segment_pool(x, cu, eps=0.5, impl=impl)
    want = torch.stack([torch.stack([s.mean(0), (s.var(0, correction=0) + 0.5).sqrt()]) for s in (x[:2], x[2:])])
    torch.testing.assert_close(pooled, want)
    torch.testing.assert_close(segment_pool(x.T.contiguous().T, cu, eps=0.5, impl=impl), want)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    """The result is float32, and autocast changes nothing."""
    x, cu = torch.randn(6, 8, device=DEVICE).half().requires_grad_(), torch.tensor([0, 2, 6], device=DEVICE)
    want = segment_pool(x, cu, impl=impl)
    with torch.autocast(DEVICE, torch.float16):
        pooled = segment_pool(x, cu, impl=impl)
    assert pooled.dtype == torch.float32 and torch.equal(pooled, want)
    pooled.sum().backward()
    assert x.grad.dtype == torch.float16 and x.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    x, cu = torch.randn(9, 8, device=DEVICE), torch.tensor([1, 1, 4, 8], device=DEVICE)
    function = lambda x: segment_pool(x.tanh(), cu, impl=impl).flatten(1)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(3, 16)
    torch.testing.assert_close(both(compiled, x, upstream), both(function, x, upstream))


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_first_order(impl):
    cu = torch.tensor([1, 1, 4, 8], device=DEVICE)
    assert_first_order(partial(segment_pool, cu_segments=cu, impl=impl), torch.randn(9, 8, device=DEVICE))


@needs_kernel
def test_opcheck():
    for dtype, offsets in ((torch.float32, [1, 1, 4, 8]), (torch.float16, [3])):
        x, cu = torch.randn(9, 8, device=DEVICE).to(dtype), torch.tensor(offsets, device=DEVICE, dtype=torch.int32)
        torch.library.opcheck(torch.ops.ajepa.segment_pool_fwd.default, (x, cu, EPS))
        out = segment_pool_reference(x, cu)
        torch.library.opcheck(torch.ops.ajepa.segment_pool_bwd.default, (torch.randn_like(out), x, cu, out))


def test_meta():
    x, cu = torch.empty(6, 8, device="meta"), torch.empty(4, dtype=torch.int32, device="meta")
    assert segment_pool(x, cu).shape == (3, 2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must be floating point \[T, C\], got torch.float32 \[2, 3, 4\]"),
        ({"x": torch.zeros(3, 4).long()}, "x must be floating point"),
        ({"cu_segments": torch.zeros(2)}, "cu_segments must be int32 or int64"),
        ({"cu_segments": torch.zeros(0).int()}, r"cu_segments must be int32 or int64 \[n \+ 1\]"),
        ({"cu_segments": torch.zeros(2, 2).int()}, "cu_segments must be"),
        ({"cu_segments": torch.zeros(2, device="meta").int()}, "x is on cpu and cu_segments on meta"),
        ({"impl": "cuda"}, "impl must be"),
        ({"x": torch.zeros(3, 4).double(), "impl": "triton"}, "impl='triton' is impossible"),
    ],
)
def test_errors(change, message):
    arguments = {"x": torch.zeros(3, 4), "cu_segments": torch.tensor([0, 3], dtype=torch.int32)}
    with pytest.raises(ValueError, match=f"segment_pool: .*{message}"):
        segment_pool(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_and_repeatable(dtype):
    cu = torch.cat([torch.zeros(1), torch.randint(0, 17, (16384,)).cumsum(0)]).int()
    x, upstream = torch.randn(int(cu[-1]) + 100, 768, dtype=dtype), torch.randn(16384, 2, 768, device="cuda")
    x, cu = x.cuda(), cu.cuda()
    run = lambda impl: both(partial(segment_pool, cu_segments=cu, impl=impl), x, upstream)  # noqa: E731
    got = run("triton")
    want = both(partial(segment_pool_reference, cu_segments=cu), x.double(), upstream)
    assert_as_good(got, run("reference"), want, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = run("triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("triton")
    for t in captured:
        t.detach().fill_(float("nan"))  # an element that the replay does not write stays NaN
    graph.replay()
    for other in (again, captured):
        assert all(torch.equal(a, b) for a, b in zip(got, other, strict=True))
