"""Causal and block-causal masks of `masked_attention`."""

from itertools import chain

import pytest
import torch
from oracle import DEVICE, IMPLS, needs_kernel, poison  # noqa: F401
from test_masked_attention import check, packed_spans

from ajepa_kernels import Rotary, _triton, masked_attention
from ajepa_kernels.attention.inputs import Inputs
from ajepa_kernels.attention.layout import make_layout
from ajepa_kernels.attention.ops import _masked_attention_bwd, _masked_attention_fwd


def oracle(q, k, v, queries, order, keys=None):
    """Attention in float64, query by query. `queries` lists the rows of each sequence; `order` has a number by row; of
    the rows, those in `keys` are keys."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q) + 0 * (q.sum() + k.sum() + v.sum())
    for rows in queries:
        for i in rows:
            seen = [j for j in rows if order[j] <= order[i] and (keys is None or j in keys)]
            if seen:
                p = (torch.einsum("hd,khd->hk", q[i], k[seen]) * q.shape[-1] ** -0.5).softmax(-1)
                out = out.index_put((torch.tensor(i),), torch.einsum("hk,khd->hd", p, v[seen]))
    return out


def places(spans, block):
    """The block of each row by its place in its sequence."""
    return {row: i // block for rows in spans for i, row in enumerate(rows)}


# One tile; ragged; a second tile of keys; several tiles of keys, with blocks that no tile's edge divides.
LENGTHS = [[16, 16], [5, 0, 1, 13], [40, 33], [80, 3], [0]]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [1, 3, "order", 1000])
@pytest.mark.parametrize("impl", IMPLS)
def test_packed(lengths, causal, impl):
    """`order`: frames with gaps, not sorted, some of them negative; the first sequence sees all of itself."""
    (spans, cu), T = packed_spans(lengths), sum(lengths)
    spans = [rows for rows, _ in spans]
    order = places(spans, causal if causal != "order" else 1)
    if causal == "order":
        causal = torch.randint(-3, 9, (T,), dtype=torch.int32) * 5
        causal[: lengths[0]] = 7
        order, causal = causal.tolist(), causal.to(DEVICE)
    kwargs = {"cu_seqlens": cu.to(DEVICE), "max_seqlen": max(lengths), "causal": causal}
    function = lambda impl: lambda x: masked_attention(x, impl=impl, **kwargs)  # noqa: E731
    wanted = lambda x: oracle(*x.unbind(1), spans, order)  # noqa: E731
    leaves, upstream = [torch.randn(T, 3, 2, 32)], torch.randn(T, 2, 32)
    check(function(impl), function("reference"), wanted, leaves, upstream, torch.float32)


# As in test_masked_attention.test_tiles: a second tile of keys, tiles of queries, and several tiles of keys.
@needs_kernel
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU, its own architecture decides the tiles")
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("arch", "lengths", "causal"),
    [(90, [65, 0, 77, 3], 1), (90, [96, 33], 20), (80, [70, 0, 100, 1], 7), (90, [150, 5], 33), (80, [150], "order")],
)
def test_tiles(arch, lengths, causal, monkeypatch):
    monkeypatch.setattr(_triton, "_recorded_arch", arch)
    (spans, cu), T = packed_spans(lengths), sum(lengths)
    spans = [rows for rows, _ in spans]
    if causal == "order":
        causal = torch.randint(0, 9, (T,))
    order = causal.tolist() if isinstance(causal, torch.Tensor) else places(spans, causal)
    rotary = Rotary.of(torch.zeros(T, 16))  # nothing turns, but the rows and the order of the channels are used
    kwargs = {"cu_seqlens": cu, "max_seqlen": max(lengths), "causal": causal, "rotary": rotary}
    function = lambda impl: lambda x: masked_attention(x, impl=impl, **kwargs)  # noqa: E731
    wanted = lambda x: oracle(*x.unbind(1), spans, order)  # noqa: E731
    leaves, upstream = [torch.randn(T, 3, 1, 64)], torch.randn(T, 1, 64)
    check(function("triton"), function("reference"), wanted, leaves, upstream, torch.float16)


DENSE = ["all", "indices", "indices scattered", "boolean scattered", "key_mask", "separate", "long"]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("causal", [3, "rows", "samples"])
@pytest.mark.parametrize("impl", IMPLS)
def test_dense(case, causal, impl):
    """A number counts places in the sequence of visible patches, or, with `key_mask`, among all patches. A tensor gives
    a number to each patch of all samples, or of each sample."""
    B, N = (2, 70) if case == "long" else (3, 11)
    mask = torch.rand(B, N) < 0.5
    mask[1] = False
    mask[0, 1:3] = True
    mask[0, 0] = False
    everything = [[b * N + i for i in range(N)] for b in range(B)]
    visible = [[row for row in rows if mask.flatten()[row]] for rows in everything]
    queries, keys, kept, kwargs = everything, None, None, {}
    if case.startswith("indices"):
        index = torch.rand(B, N).argsort(1)[:, :4]
        queries = (index + N * torch.arange(B)[:, None]).tolist()
        kept, kwargs = [*chain.from_iterable(queries)], {"visible": index}
    elif case in ("boolean scattered", "long"):
        queries, kwargs = visible, {"visible": mask}
    elif case == "key_mask":
        keys, kwargs = {*chain.from_iterable(visible)}, {"key_mask": mask}
    if "scattered" in case or case == "long":
        kept, kwargs["output"] = None, "scattered"
    if causal == 3:
        order, kwargs["causal"] = places(queries, 3), 3
    else:
        numbers = torch.randint(0, 5, (B, N) if causal == "samples" else (N,))
        order, kwargs["causal"] = numbers.expand(B, N).flatten().tolist(), numbers
    kwargs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}

    def function(impl):
        return lambda x: masked_attention(*(x.unbind(2) if case == "separate" else (x,)), impl=impl, **kwargs).reshape(
            -1, 2, 32
        )

    def wanted(x):
        out = oracle(*x.flatten(0, 1).unbind(1), queries, order, keys)
        return out if kept is None else out[kept]

    upstream = torch.randn(B * N if kept is None else len(kept), 2, 32)
    check(function(impl), function("reference"), wanted, [torch.randn(B, N, 3, 2, 32)], upstream, torch.float32)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("lengths", [[4, 0, 6], [5, 70, 3]])
@pytest.mark.parametrize("impl", IMPLS)
def test_packed_key_mask(lengths, impl):
    """A query whose block and earlier ones hold no key gives zero, and so does a sequence without keys. The bias gets
    the sums over the tokens."""
    (spans, cu), T = packed_spans(lengths), sum(lengths)
    spans = [rows for rows, _ in spans]
    keep = torch.rand(T) < 0.5
    keep[spans[0][:2]] = keep[spans[2]] = False
    keep[spans[0][3]] = True
    kwargs = {"cu_seqlens": cu.to(DEVICE), "max_seqlen": max(lengths), "key_mask": keep.to(DEVICE), "causal": 2}
    function = lambda impl: lambda x, b: masked_attention(x, qkv_bias=b, impl=impl, **kwargs)  # noqa: E731
    order, keys = places(spans, 2), {i for i in range(T) if keep[i]}
    wanted = lambda x, b: oracle(*(x + b - b.detach()).unbind(1), spans, order, keys)  # noqa: E731
    leaves, upstream = [torch.randn(T, 3, 2, 32), torch.randn(3, 2, 32)], torch.randn(T, 2, 32)
    check(function(impl), function("reference"), wanted, leaves, upstream, torch.float32)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("impl", IMPLS)
def test_qkv_bias(impl):
    (spans, cu), T = packed_spans([5, 0, 9]), 14
    spans = [rows for rows, _ in spans]
    kwargs = {"cu_seqlens": cu.to(DEVICE), "max_seqlen": 9, "causal": 2}
    function = lambda impl: lambda x, b: masked_attention(x, qkv_bias=b, impl=impl, **kwargs)  # noqa: E731
    wanted = lambda x, b: oracle(*(x + b - b.detach()).unbind(1), spans, places(spans, 2))  # noqa: E731
    leaves, upstream = [torch.randn(T, 3, 2, 32), torch.randn(3, 2, 32)], torch.randn(T, 2, 32)
    check(function(impl), function("reference"), wanted, leaves, upstream, torch.float32)


def test_none_and_all():
    """False and 0 are no mask, True is an ordinary causal mask, and one block of all tokens sees everything."""
    qkv = torch.randn(2, 9, 3, 2, 32, device=DEVICE)
    plain, causal = masked_attention(qkv), masked_attention(qkv, causal=1)
    assert torch.equal(masked_attention(qkv, causal=False), plain) and not torch.allclose(plain, causal)
    assert torch.equal(masked_attention(qkv, causal=True), causal)
    torch.testing.assert_close(masked_attention(qkv, causal=9), plain)


@needs_kernel
@pytest.mark.parametrize("arch", [80, 90])
def test_absent_arguments_reach_no_kernel(arch):
    """Without them, the kernels get None, which prunes their code; a number that changes compiles no kernel anew."""
    qkv, cu = torch.empty(300, 3, 2, 64, dtype=torch.float16, device="meta"), torch.empty(3, device="meta").int()
    for S in (100, 200):
        layout = make_layout(Inputs(qkv, cu_seqlens=cu, max_seqlen=S))
        with _triton.record_launches(arch) as launches:
            out, lse = _masked_attention_fwd(qkv, None, None, *layout, 0.1, False)
            _masked_attention_bwd(out, qkv, None, None, out, lse, False, *layout, 0.1, False)
        named = [dict(zip(kernel.arg_names, args, strict=True)) for kernel, args, _ in launches]
        new = {"order_ptr", "causal", "q_cos_ptr", "q_sin_ptr", "k_cos_ptr", "k_sin_ptr", "q_period", "k_period"}
        assert all(x[name] is None for x in named if "order_ptr" in x for name in new)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"causal": -1}, "causal must be an int of 0 or more, got -1"),
        ({"causal": 2.0}, "causal must be an int of 0 or more, got 2.0"),
        ({"causal": None}, "causal must be an int or a tensor; 0 for none"),
        ({"causal": torch.zeros(4, device=DEVICE)}, "must be int32 or int64, got torch.float32"),
        ({"causal": torch.zeros(5, dtype=torch.int32, device=DEVICE)}, r"each row, \[2, 4\], got \[5\]"),
        ({"causal": torch.zeros(4, dtype=torch.int32, device="meta")}, "causal must be on c"),
        ({"causal": 1, "separate": 5}, "causal is for self-attention"),
    ],
)
def test_errors(kwargs, message):
    qkv, N_k = torch.randn(2, 4, 3, 2, 32, device=DEVICE), kwargs.pop("separate", None)
    operands = (qkv,) if N_k is None else (qkv[:, :, 0], *[torch.randn(2, N_k, 2, 32, device=DEVICE)] * 2)
    with pytest.raises(ValueError, match=f"masked_attention: .*{message}"):
        masked_attention(*operands, **kwargs)


def test_type_errors():
    qkv = torch.randn(2, 4, 3, 2, 32, device=DEVICE)
    with pytest.raises(TypeError, match=r"causal must be a torch\.Tensor, got list; convert it with torch"):
        masked_attention(qkv, causal=[0, 0, 1, 1])
