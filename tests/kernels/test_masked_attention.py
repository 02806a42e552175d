from itertools import chain, pairwise

import numpy
import pytest
import torch
from oracle import (
    DEVICE,
    DTYPES,
    IMPLS,
    INTERPRET,
    NoGradient,
    assert_as_good,
    assert_first_order,
    needs_kernel,
    poison,  # noqa: F401
    relative_error,
)

from ajepa_kernels import _triton, masked_attention, masked_attention_reference
from ajepa_kernels.attention import ops
from ajepa_kernels.attention.inputs import Inputs
from ajepa_kernels.attention.layout import make_layout
from ajepa_kernels.attention.ops import _masked_attention_bwd, _masked_attention_fwd


def oracle(q, k, v, spans, scale=None):
    """Attention in float64, sequence by sequence. `spans` lists (query rows, key rows) of each sequence."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q) + 0 * (q.sum() + k.sum() + v.sum())  # has a gradient even without rows
    for rows, keys in spans:
        if rows and keys:
            s = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * scale
            out = out.index_put((torch.tensor(rows),), torch.einsum("hqk,khd->qhd", s.softmax(-1), v[keys]))
    return out


def gradients(function, leaves, upstream):
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype).to(out.device).reshape(out.shape))


def check(function, reference, wanted, leaves, upstream, dtype):
    """Compare `function` with the float64 oracle `wanted`, by the error that `reference` makes in the same dtype."""
    make = lambda d: [x.to(d).to(DEVICE if d == dtype else "cpu").requires_grad_() for x in leaves]  # noqa: E731
    leaves = [x.to(dtype).double() for x in leaves]  # all three get the same rounded inputs
    want = gradients(wanted, [x.detach().requires_grad_() for x in leaves], upstream.to(dtype).double())
    plain = gradients(reference, make(dtype), upstream.to(dtype))
    got = gradients(function, make(dtype), upstream.to(dtype))
    assert got[0].dtype == dtype
    assert_as_good([x.cpu() for x in got], [x.cpu() for x in plain], want, dtype)


def packed_spans(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [(list(range(a, b)),) * 2 for a, b in pairwise(ends)], torch.tensor(ends)


# Lengths: one full tile; ragged with an empty sequence and one of a single token; several tiles; no tokens at all.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("lengths", [[16, 16], [5, 0, 1, 13], [40, 33], [150, 3], [0, 0], []])
@pytest.mark.parametrize("head_dim", [32, 96])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_packed(lengths, head_dim, dtype, impl):
    if max(lengths, default=0) > 64 and (head_dim == 96) != (dtype == torch.float16):
        pytest.skip("long sequences are checked in two of the four combinations")
    spans, cu = packed_spans(lengths)
    T, S = int(cu[-1]), max(lengths, default=0)
    cu = cu.to(DEVICE, torch.int32)
    qkv, upstream = torch.randn(T, 3, 2, head_dim), torch.randn(T, 2, head_dim)
    check(
        lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=S, impl=impl),
        lambda x: masked_attention_reference(x, cu, S),
        lambda x: oracle(*x.unbind(1), spans),
        [qkv], upstream, dtype,
    )  # fmt: skip


# forward, backward: the queries and keys of a tile, by architecture, with the keys of a second tile beside it. For
# sequences of up to 128 tokens each pass is one launch, and no log-sum-exp is saved.
@needs_kernel
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU, its own architecture decides the tiles")
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("arch", "head_dim", "lengths", "forward", "backward"),
    [
        (80, 64, [70, 0, 128, 1], (64, 128, 0), (32, 128, 0)), (80, 128, [70, 0, 128, 1], (64, 128, 0), (16, 128, 0)),
        (80, 64, [65, 96, 3, 0], (128, 64, 32), (32, 128, 0)), (90, 64, [65, 0, 77, 3], (128, 64, 16), (128, 64, 16)),
        (90, 32, [65, 0, 96, 33], (128, 64, 32), (128, 64, 32)), (90, 64, [97, 5, 0, 1], (128, 128, 0), (128, 128, 0)),
        (100, 64, [90, 80, 0, 1], (128, 64, 32), (128, 128, 0)),
    ],
)  # fmt: skip
def test_tiles(arch, head_dim, lengths, forward, backward, monkeypatch):
    """Three heads, of which a program takes two and the other program the last."""
    monkeypatch.setattr(_triton, "_recorded_arch", arch)
    monkeypatch.setattr(ops, "multiprocessors", lambda x: 2)  # seven programs
    (spans, cu), T, S = packed_spans(lengths), sum(lengths), max(lengths)
    check(
        lambda x, b: masked_attention(x, cu_seqlens=cu, max_seqlen=S, qkv_bias=b, impl="triton"),
        lambda x, b: masked_attention(x, cu_seqlens=cu, max_seqlen=S, qkv_bias=b, impl="reference"),
        lambda x, b: oracle(*(x + b - b.detach()).unbind(1), spans),
        [torch.randn(T, 3, 3, head_dim), torch.randn(3, 3, head_dim)], torch.randn(T, 3, head_dim), torch.float16,
    )  # fmt: skip
    arguments = (torch.empty(T, 3, 3, head_dim, dtype=torch.float16, device="meta"), None, None)
    layout = make_layout(Inputs(arguments[0], cu_seqlens=cu.to("meta"), max_seqlen=S))
    with _triton.record_launches(arch) as launches:
        out, lse = _masked_attention_fwd(*arguments, *layout, 0.1, False)
        _masked_attention_bwd(out, *arguments, out, lse, False, *layout, 0.1, False)
    named = [dict(zip(kernel.arg_names, args, strict=True)) for kernel, args, _ in launches]
    tiles = [(x["BLOCK_Q"], x["BLOCK_K"], x.get("TAIL", 0)) for x in named]
    assert tiles == [forward, backward] and not lse.numel()
    assert all(x["heads"] == 2 for x in named if "TAIL" in x and x["BLOCK_Q"] > 64)


# One tile, tiles of queries, several tiles of keys, no sequence, and layouts that gather rows or keys.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", ["packed", "64", "long", "empty", "dense", "visible", "key_mask", "separate"])
@pytest.mark.parametrize("impl", IMPLS)
def test_qkv_bias(case, impl):
    """The result does not change, and the bias gets the sum over the tokens of the gradient of qkv. In 16 bits and at
    head dims from 64, the kernel for Hopper sums with products."""
    D, dtype = (64, torch.float16) if case in ("visible", "key_mask") else (32, torch.float32)
    lengths = {"packed": [5, 0, 1, 13], "64": [40, 64], "long": [70, 3], "empty": [0]}.get(case, [9, 9])
    (spans, cu), T = packed_spans(lengths), sum(lengths)
    kwargs, dense = {"cu_seqlens": cu.to(DEVICE), "max_seqlen": max(lengths)}, case in ("dense", "visible")
    if case == "dense":
        kwargs = {}
    elif case == "visible":
        index = torch.tensor([[8, 0, 3], [2, 1, 7]])
        spans = [(r, r) for r in (index + 9 * torch.arange(2)[:, None]).tolist()]
        kwargs = {"visible": index.to(DEVICE), "output": "scattered"}
    elif case == "key_mask":
        keep = torch.arange(T) % 3 == 1
        keep[9:] = False  # the second sequence has no keys
        spans = [(rows, [i for i in rows if keep[i]]) for rows, _ in spans]
        kwargs["key_mask"] = keep.to(DEVICE)

    def function(impl):
        def attend(x, bias):
            operands = x.unbind(1) if case == "separate" else (x.unflatten(0, (2, 9)) if dense else x,)
            return masked_attention(*operands, **kwargs, qkv_bias=bias, impl=impl).reshape(T, 2, D)

        return attend

    wanted = lambda x, b: oracle(*(x + (b - b.detach()).view(3, 2, D)).unbind(1), spans)  # noqa: E731
    leaves = [torch.randn(T, 3, 2, D), torch.randn((3, 2, D) if case in ("packed", "separate") else 6 * D)]
    check(function(impl), function("reference"), wanted, leaves, torch.randn(T, 2, D), dtype)
    x, bias = (leaf.to(DEVICE) for leaf in leaves)
    packed = {"cu_seqlens": cu.to(DEVICE), "max_seqlen": max(lengths), "impl": impl}
    plain, biased = (masked_attention(x, qkv_bias=b, **packed) for b in (None, bias))
    assert torch.equal(plain, biased)


@pytest.mark.parametrize("impl", IMPLS)
def test_qkv_bias_under_autocast(impl):
    """qkv has autocast's dtype; the gradient of a float32 bias is float32. A bias may come without a gradient."""
    qkv, bias = torch.randn(20, 3, 2, 32, device=DEVICE), torch.randn(192, device=DEVICE, requires_grad=True)
    kwargs = {"cu_seqlens": torch.tensor([0, 13, 20], device=DEVICE), "max_seqlen": 13, "impl": impl}
    upstream = torch.randn(20, 2, 32, device=DEVICE)
    (want,) = torch.autograd.grad(masked_attention(qkv, qkv_bias=bias, **kwargs), bias, upstream)
    with torch.autocast(DEVICE, torch.float16):
        out = masked_attention(qkv, qkv_bias=bias, **kwargs)
    (got,) = torch.autograd.grad(out, bias, upstream.half())
    assert out.dtype == torch.float16 and got.dtype == torch.float32 and relative_error(got, want) < 2e-3
    leaf = qkv.requires_grad_()
    with_bias, without = (
        torch.autograd.grad(masked_attention(leaf, qkv_bias=b, **kwargs), leaf, upstream)[0]
        for b in (bias.detach(), None)
    )
    assert torch.equal(with_bias, without)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("S", [7, 140])
@pytest.mark.parametrize("impl", IMPLS)
def test_separate_and_cross(S, impl):
    """q, k and v are separate and not contiguous, with different numbers of queries and keys and an explicit scale."""
    lengths, lengths_k = [3, S, 0, 2], [5, 4, 3, 0]
    ends, ends_k = (torch.tensor([0, *x]).cumsum(0).tolist() for x in (lengths, lengths_k))
    spans = [(list(range(*a)), list(range(*b))) for a, b in zip(pairwise(ends), pairwise(ends_k), strict=True)]
    leaves = [torch.randn(n, 32, 2) for n in (ends[-1], ends_k[-1], ends_k[-1])]
    function = lambda impl: lambda q, k, v: masked_attention(  # noqa: E731
        q.mT, k.mT, v.mT, cu_seqlens=torch.tensor(ends, device=DEVICE), max_seqlen=S,
        cu_seqlens_k=torch.tensor(ends_k, device=DEVICE), max_seqlen_k=5, scale=0.3, impl=impl,
    )  # fmt: skip
    wanted = lambda q, k, v: oracle(q.mT, k.mT, v.mT, spans, 0.3)  # noqa: E731
    check(function(impl), function("reference"), wanted, leaves, torch.randn(ends[-1], 2, 32), torch.float32)


DENSE = ["all", "indices", "indices scattered", "flat", "boolean scattered", "boolean packed", "key_mask", "long"]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("impl", IMPLS)
def test_dense(case, impl):
    B, N = (2, 150) if case == "long" else (3, 11)
    mask = torch.rand(B, N) < 0.5
    mask[1] = False  # a sample without visible patches
    mask[0, :2] = True
    rows = [(torch.arange(N)[m] + b * N).tolist() for b, m in enumerate(mask)]
    everything = [(torch.arange(N) + b * N).tolist() for b in range(B)]
    kwargs: dict = {}
    if case == "all":
        spans, kept = [(r, r) for r in everything], None
    elif case == "key_mask":
        spans, kept, kwargs = list(zip(everything, rows, strict=True)), None, {"key_mask": mask}
    elif case.startswith("indices"):
        index = torch.rand(B, N).argsort(1)[:, :4]
        rows = (index + torch.arange(B)[:, None] * N).tolist()
        spans, kept, kwargs = [(r, r) for r in rows], [*chain.from_iterable(rows)], {"visible": index}
    elif case == "flat":
        kept = [*chain.from_iterable(rows)]
        cu = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
        spans = [(r, r) for r in rows]
        kwargs = {"visible": torch.tensor(kept, dtype=torch.int32), "cu_seqlens": cu, "max_seqlen": N}
    else:
        spans, kept, kwargs = [(r, r) for r in rows], [*chain.from_iterable(rows)], {"visible": mask}
    scattered = case in ("indices scattered", "boolean scattered", "long")
    if scattered:
        kept, kwargs["output"] = None, "scattered"
    kwargs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    qkv = torch.randn(B, N, 3, 2, 32)

    def function(impl):
        return lambda x: masked_attention(x, check=True, impl=impl, **kwargs).reshape(-1, 2, 32)

    def wanted(x):
        out = oracle(*x.flatten(0, 1).unbind(1), spans)
        return out if kept is None else out[kept]

    upstream = torch.randn(B * N if kept is None else len(kept), 2, 32)
    check(function(impl), function("reference"), wanted, [qkv], upstream, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
def test_invisible_rows_are_not_read(impl):
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 3:7] = mask[1, ::2] = True
    qkv = torch.randn(2, 9, 3, 2, 32).masked_fill(~mask[:, :, None, None, None], float("nan")).to(DEVICE)
    qkv.requires_grad_()
    out = masked_attention(qkv, visible=mask.to(DEVICE), output="scattered", impl=impl)
    out.sum().backward()
    assert out.isfinite().all() and qkv.grad.isfinite().all()
    assert (out[~mask.to(DEVICE)] == 0).all() and (qkv.grad[~mask.to(DEVICE)] == 0).all()


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("lengths", [[4, 0, 6], [5, 140, 3]])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_packed_key_mask(lengths, cross, impl):
    """All tokens are queries, but only the kept tokens are keys, of the same sequences or of others (`cross`)."""
    spans, cu = packed_spans(lengths)
    key_spans, cu_k = packed_spans([3, 5, 1] if cross else lengths)
    keep = torch.rand(int(cu_k[-1])) < 0.5
    keep[key_spans[2][0]] = False  # a sequence without keys
    keep[key_spans[0][0][1]] = True
    spans = [(q, [i for i in k if keep[i]]) for (q, _), (k, _) in zip(spans, key_spans, strict=True)]
    leaves = [torch.randn(len(x), 2, 32) for x in (range(int(cu[-1])), keep, keep)]
    kwargs = {"cu_seqlens_k": cu_k.to(DEVICE), "max_seqlen_k": 5} if cross else {}

    def function(impl):
        return lambda q, k, v: masked_attention(
            q, k, v, cu_seqlens=cu.to(DEVICE), max_seqlen=max(lengths), key_mask=keep.to(DEVICE), impl=impl, **kwargs
        )

    upstream = torch.randn(int(cu[-1]), 2, 32)
    check(function(impl), function("reference"), lambda *x: oracle(*x, spans), leaves, upstream, torch.float32)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", ["indices", "boolean scattered", "key_mask of other keys"])
@pytest.mark.parametrize("impl", IMPLS)
def test_dense_separate(case, impl):
    """q, k and v are separate tensors, and the kernel gathers rows of them."""
    B, N, N_k = 2, 9, 5 if case == "key_mask of other keys" else 9
    mask = torch.rand(B, N_k) < 0.5
    mask[:, 3] = True
    rows = [[(b * N_k + i) for i in range(N_k) if mask[b, i]] for b in range(B)]
    queries, kept, kwargs = rows, None, {"visible": mask, "output": "scattered"}
    if case == "indices":
        index = torch.tensor([[8, 0, 3], [2, 1, 7]])
        queries = rows = (index + N * torch.arange(B)[:, None]).tolist()
        kept, kwargs = [*chain.from_iterable(rows)], {"visible": index}
    elif N_k != N:
        queries, kwargs = [[b * N + i for i in range(N)] for b in range(B)], {"key_mask": mask}
    kwargs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    function = lambda impl: lambda *x: masked_attention(*x, impl=impl, **kwargs).reshape(-1, 2, 32)  # noqa: E731

    def wanted(*x):
        out = oracle(*(t.flatten(0, 1) for t in x), list(zip(queries, rows, strict=True)))
        return out if kept is None else out[kept]

    leaves = [torch.randn(B, n, 2, 32) for n in (N, N_k, N_k)]
    upstream = torch.randn(B * N if kept is None else len(kept), 2, 32)
    check(function(impl), function("reference"), wanted, leaves, upstream, torch.float32)


@needs_kernel
@pytest.mark.parametrize("S", [20, 70])
def test_tf32(S):
    """TF32 multiplies operands rounded to 10 mantissa bits and sums in float32. The interpreter does not round."""
    cu = torch.tensor([0, S, S + 5], device=DEVICE)
    qkv, upstream = torch.randn(S + 5, 3, 2, 32, device=DEVICE), torch.randn(S + 5, 2, 32, device=DEVICE)
    run = lambda x, **kwargs: gradients(  # noqa: E731
        lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=S, **kwargs), [x.requires_grad_()], upstream
    )
    want = run(qkv.double(), impl="reference")
    for i, (g, w) in enumerate(zip(run(qkv.clone(), impl="triton", tf32=True), want, strict=True)):
        assert relative_error(g, w) < 2**-9, i


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts_agree(impl):
    """Packing the visible rows gives the same bits as gathering them from the dense layout."""
    qkv = torch.randn(3, 10, 3, 2, 32, device=DEVICE)
    index = torch.rand(3, 10, device=DEVICE).argsort(1)[:, :6]
    packed = qkv[torch.arange(3)[:, None], index].flatten(0, 1)
    cu = torch.arange(0, 19, 6, device=DEVICE)
    got = masked_attention(qkv, visible=index, impl=impl)
    assert torch.equal(got.flatten(0, 1), masked_attention(packed, cu_seqlens=cu, max_seqlen=6, impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    qkv, cu = torch.randn(9, 3, 2, 32, device=DEVICE, requires_grad=True), torch.tensor([0, 4, 9], device=DEVICE)
    mask = torch.rand(3, 3, device=DEVICE) < 0.7

    bias = torch.randn(192, device=DEVICE, requires_grad=True)

    def both(x, bias):
        packed = masked_attention(x, cu_seqlens=cu, max_seqlen=5, qkv_bias=bias, impl=impl)
        return packed, masked_attention(x.unflatten(0, (3, 3)), visible=mask, output="scattered", impl=impl)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    got, want = compiled(qkv, bias), both(qkv, bias)
    torch.testing.assert_close(got, want)
    got, want = ([torch.autograd.grad(sum(x.square().sum() for x in out), (qkv, bias))] for out in (got, want))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_once_for_all_counts(impl):
    """Token counts and bounds that change from batch to batch become symbols, for short and for long sequences."""
    function = lambda x, cu, S: masked_attention(x, cu_seqlens=cu, max_seqlen=S, impl=impl)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([4, 5], [3, 8], [40, 7]):
        qkv = torch.randn(sum(lengths), 3, 2, 32, device=DEVICE, requires_grad=True)
        arguments = qkv, packed_spans(lengths)[1].to(DEVICE), max(lengths)
        got, want = (torch.autograd.grad(f(*arguments).square().sum(), qkv) for f in (compiled, function))
        torch.testing.assert_close(got, want)


@needs_kernel
@pytest.mark.parametrize("S", [6, 33])
def test_opcheck(S):
    qkv = torch.randn(2 * S, 3, 2, 32, device=DEVICE)
    cu = torch.tensor([0, S, 2 * S], device=DEVICE)
    visible = torch.rand(2, S, device=DEVICE) < 0.5
    for inputs in (
        Inputs(qkv, cu_seqlens=cu, max_seqlen=S),
        Inputs(qkv.unflatten(0, (2, S)), visible=visible, output="scattered"),
    ):
        arguments = (qkv, None, None, *make_layout(inputs), 0.2, False)
        torch.library.opcheck(torch.ops.ajepa.masked_attention_fwd.default, arguments)
        out, lse = torch.ops.ajepa.masked_attention_fwd(*arguments)
        for bias in (False, True):
            torch.library.opcheck(
                torch.ops.ajepa.masked_attention_bwd.default,
                (torch.randn_like(out), qkv, None, None, out, lse, bias, *arguments[3:]),
            )


@needs_kernel
@pytest.mark.parametrize("S", [6, 40])  # without and with the output saved for backward
def test_first_order(S):
    cu = torch.tensor([0, 2, S], device=DEVICE)
    function = lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=S, impl="triton")  # noqa: E731
    assert_first_order(function, torch.randn(S, 3, 2, 96, device=DEVICE))
    qkv = torch.randn(S, 3, 2, 96, device=DEVICE)
    of_bias = lambda b: masked_attention(qkv * b.sum(), cu_seqlens=cu, max_seqlen=S, qkv_bias=b, impl="triton")  # noqa: E731
    assert_first_order(of_bias, torch.randn(3, 2, 96, device=DEVICE))


@needs_kernel
def test_backward_without_a_gradient():
    """A later function may return no gradient, which torch's own operations accept."""
    qkv = torch.randn(4, 3, 2, 32, device=DEVICE, requires_grad=True)
    out = masked_attention(qkv, cu_seqlens=torch.tensor([0, 4], device=DEVICE), max_seqlen=4, impl="triton")
    NoGradient.apply(out).sum().backward()
    assert qkv.grad is None


def test_meta():
    """Meta tensors give the right shapes, as for a model that is built before its weights are read."""
    qkv, cu = torch.empty(9, 3, 2, 32, device="meta"), torch.empty(3, dtype=torch.int32, device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_attention(qkv, cu_seqlens=cu, max_seqlen=5)
        dense = masked_attention(qkv[None], visible=torch.empty(1, 4, dtype=torch.int64, device="meta"))
    assert out.is_meta and out.dtype == torch.float32 and out.shape == (9, 2, 32) and dense.shape == (1, 4, 2, 32)


def test_autocast_leaves_float64():
    qkv = torch.randn(4, 3, 2, 32, device=DEVICE, dtype=torch.float64)
    with torch.autocast(DEVICE, torch.float16):
        out = masked_attention(qkv, cu_seqlens=torch.tensor([0, 4], device=DEVICE), max_seqlen=4, impl="reference")
    assert out.dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    qkv = torch.randn(4, 3, 2, 32, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.float16):
        out = masked_attention(qkv, cu_seqlens=torch.tensor([0, 4], device=DEVICE), max_seqlen=4, impl=impl)
    out.sum().backward()
    assert out.dtype == torch.float16 and qkv.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "kwargs", "message"),
    [
        ((4, 2, 2, 32), {"cu_seqlens": [0, 4]}, r"qkv must be \[T, 3, H, D\]"),
        ((4, 3, 2, 32), {}, r"qkv must be \[B, N, 3, H, D\]"),
        ((4, 3, 2, 32), {"cu_seqlens": [[0, 4]]}, "1-D integer"),
        ((4, 3, 2, 32), {"cu_seqlens": [0.0, 4.0]}, "1-D integer"),
        ((4, 3, 2, 0), {"cu_seqlens": [0, 4]}, "head dim must be positive"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "max_seqlen": None}, "max_seqlen"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "max_seqlen": 4.0}, "must be an int"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "max_seqlen": -1}, "must be an int of 0 or more"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "max_seqlen_k": 4}, "max_seqlen_k goes with cu_seqlens_k"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 3, 2, 4]}, "never decrease"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 3]}, "end at the number of tokens"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 9]}, "end at the number of tokens"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "max_seqlen": 2}, "longer than max_seqlen"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "output": "scattered"}, "dense"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "output": "sparse"}, "output must be"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "impl": "cuda"}, "impl must be"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "key_mask": [True]}, "key_mask must be boolean"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "qkv_bias": [0.0]}, r"qkv_bias must be \[3, 2, 32\] or flat"),
        ((4, 3, 2, 32), {"cu_seqlens": [0, 4], "qkv_bias": [0]}, "qkv_bias must be a floating-point tensor"),
        ((2, 4, 3, 2, 32), {"visible": [[0, 4], [1, 2]]}, "out of range"),
        ((2, 4, 3, 2, 32), {"visible": [[0, 3], [1, -1]]}, "out of range"),
        ((2, 4, 3, 2, 32), {"visible": [[0, 3], [1, 1]]}, "twice"),
        ((2, 4, 3, 2, 32), {"visible": [0, 8], "cu_seqlens": [0, 1, 2]}, "out of range"),
        ((2, 4, 3, 2, 32), {"visible": [3, 3], "cu_seqlens": [0, 1, 2]}, "twice"),
        ((2, 4, 3, 2, 32), {"visible": [3, 2], "cu_seqlens": [0, 1]}, "end at the number of tokens, 2"),
        ((1, 2, 3, 2, 32), {"visible": [[True, True]], "max_seqlen": 1}, "a sample of more than 1"),
        ((2, 4, 3, 2, 32), {"visible": [[True], [False]]}, "boolean visible must be"),
        ((2, 4, 3, 2, 32), {"visible": [[0]]}, "row for each sample"),
        ((2, 4, 3, 2, 32), {"visible": [[0.5], [0.5]]}, "boolean, or int32 or int64"),
        (
            (2, 4, 3, 2, 32),
            {"visible": [[1] * 4] * 2, "dtype": torch.uint8},
            r"got torch.uint8; a mask: visible.bool\(\)",
        ),
        ((2, 4, 3, 2, 32), {"visible": [0]}, "visible must be"),
    ],
)
def test_errors(shape, kwargs, message):
    """Tensor contents are always checked on the CPU, and on other devices with `check=True`."""
    kwargs = {"max_seqlen": 4 if "cu_seqlens" in kwargs else None, "check": DEVICE == "cuda", **kwargs}
    dtype = kwargs.pop("dtype", None)
    kwargs = {k: torch.tensor(v, device=DEVICE, dtype=dtype) if isinstance(v, list) else v for k, v in kwargs.items()}
    with pytest.raises(ValueError, match=f"masked_attention: .*{message}"):
        masked_attention(torch.randn(shape, device=DEVICE), **kwargs)


@pytest.mark.parametrize("name", ["qkv", "k", "v", "cu_seqlens", "visible", "key_mask", "cu_seqlens_k", "qkv_bias"])
def test_what_is_no_tensor(name):
    qkv = torch.randn(4, 3, 2, 32, device=DEVICE)
    given = {"qkv": qkv, "cu_seqlens": torch.tensor([0, 4], device=DEVICE), "max_seqlen": 4}
    with pytest.raises(TypeError, match=f"masked_attention: {name} must be a torch.Tensor, got numpy.ndarray; convert"):
        masked_attention(**(given | {name: numpy.zeros(4)}))
    with pytest.raises(TypeError, match=f"masked_attention: {name} must be a torch.Tensor, got list; convert it with"):
        masked_attention(**(given | {name: [0.0] * 4}))


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRET, reason="kernels can be launched here")
def test_triton_without_a_device_is_refused():
    with pytest.raises(ValueError, match="impl='triton' is impossible: the tensors are on the CPU"):
        masked_attention(torch.randn(4, 3, 2, 32), cu_seqlens=torch.tensor([0, 4]), max_seqlen=4, impl="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
class TestOnGPU:
    @pytest.mark.usefixtures("poison")
    @pytest.mark.parametrize("S", [16, 64, 77, 90, 128, 300, 4096])
    @pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_sizes(self, S, head_dim, dtype):
        lengths = torch.randint(1, S + 1, (6,))
        lengths[0] = S
        cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to("cuda", torch.int32)
        qkv = torch.randn(int(cu[-1]), 3, 3, head_dim, device="cuda", dtype=dtype)
        upstream = torch.randn(len(qkv), 3, head_dim, device="cuda", dtype=dtype)
        bias = torch.randn(3, 3, head_dim, device="cuda", requires_grad=True)
        run = lambda x, impl: gradients(  # noqa: E731
            lambda x, b: masked_attention(x, cu_seqlens=cu, max_seqlen=S, qkv_bias=b, impl=impl),
            [x.requires_grad_(), bias], upstream,
        )  # fmt: skip
        want = run(qkv.double(), "reference")
        assert_as_good(run(qkv, "triton"), run(qkv.clone(), "reference"), want, dtype)

    def test_repeats_bit_for_bit(self):
        cu = torch.arange(0, 6401, 64, device="cuda", dtype=torch.int32)
        qkv = torch.randn(6400, 3, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        run = lambda: gradients(lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=64), [qkv], qkv[:, 0].detach())  # noqa: E731
        first = run()
        assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, run(), strict=True))

    def test_graph_and_stream(self):
        """A captured graph reads the offsets on the device at each replay, and kernels run on the current stream."""
        cu = torch.tensor([0, 10, 64], device="cuda", dtype=torch.int32)
        qkv = torch.randn(64, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        run = lambda: gradients(lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=64), [qkv], qkv[:, 0].detach())  # noqa: E731
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        cu.copy_(torch.tensor([0, 50, 64]))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
