"""Rotary position embeddings inside `masked_attention`."""

from itertools import chain, pairwise

import numpy
import pytest
import torch
from oracle import DEVICE, DTYPES, IMPLS, assert_as_good, assert_first_order, needs_kernel, poison  # noqa: F401
from test_masked_attention import check, gradients, oracle, packed_spans

from ajepa_kernels import Rotary, _triton, axial_angles, masked_attention
from ajepa_kernels.attention.inputs import Inputs
from ajepa_kernels.attention.layout import make_layout
from ajepa_kernels.attention.rotary import make_tables


def turned(x, angles, interleaved, pairs):
    """x `[rows, H, D]` in float64, pair after pair. angles `[rows, P]`, or `[rows, 2 P]` in the order of channels."""
    out, angles = x.double().clone(), angles.double()
    for p in range(pairs):
        c1, c2 = (2 * p, 2 * p + 1) if interleaved else (p, pairs + p)
        a1, a2 = (angles[:, None, c] if angles.shape[1] == 2 * pairs else angles[:, None, p] for c in (c1, c2))
        x1, x2 = x[..., c1].double(), x[..., c2].double()
        out[..., c1], out[..., c2] = x1 * a1.cos() - x2 * a1.sin(), x2 * a2.cos() + x1 * a2.sin()
    return out


def tables(angles, interleaved, pairs):
    return Rotary(*(t.to(DEVICE) for t in Rotary.of(angles)[:2]), interleaved, pairs)


# (head dim, pairs, an angle for each channel): all channels, a part of them, V-JEPA 2's tables
KINDS = [(32, 16, False), (32, 5, False), (32, 14, True), (96, 48, True)]
# Ragged with an empty sequence, for each kind; then, for two kinds, tiles of queries, and several tiles of keys.
CASES = [([5, 0, 1, 13], *kind, interleaved) for kind in KINDS for interleaved in (True, False)]
CASES += [(lengths, *KINDS[1 + i], i == 1) for lengths in ([40, 33], [70, 3], [0]) for i in range(2)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("lengths", "head_dim", "pairs", "channels", "interleaved"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_packed(lengths, head_dim, pairs, channels, interleaved, dtype, impl):
    if dtype != torch.float32 and lengths[0] > 5:
        pytest.skip("half precision is checked at short lengths")
    (spans, cu), T = packed_spans(lengths), sum(lengths)
    angles = 3 * torch.randn(T, pairs * (1 + channels))
    kwargs = {"cu_seqlens": cu.to(DEVICE), "max_seqlen": max(lengths), "rotary": tables(angles, interleaved, pairs)}

    def wanted(x):
        q, k, v = x.unbind(1)
        return oracle(turned(q, angles, interleaved, pairs), turned(k, angles, interleaved, pairs), v, spans)

    function = lambda impl: lambda x: masked_attention(x, impl=impl, **kwargs)  # noqa: E731
    leaves, upstream = [torch.randn(T, 3, 2, head_dim)], torch.randn(T, 2, head_dim)
    check(function(impl), function("reference"), wanted, leaves, upstream, dtype)


# As in test_masked_attention.test_tiles: a second tile of keys, and tiles of queries.
@needs_kernel
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU, its own architecture decides the tiles")
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("arch", "lengths", "interleaved"),
    [(90, [65, 0, 77, 3], True), (90, [96, 33], False), (80, [70, 0, 100, 1], True), (100, [80], False)],
)
def test_tiles(arch, lengths, interleaved, monkeypatch):
    monkeypatch.setattr(_triton, "_recorded_arch", arch)
    (spans, cu), T = packed_spans(lengths), sum(lengths)
    angles = 3 * torch.randn(T, 60)
    kwargs = {"cu_seqlens": cu, "max_seqlen": max(lengths), "rotary": tables(angles, interleaved, 30)}

    def wanted(x):
        q, k, v = x.unbind(1)
        return oracle(turned(q, angles, interleaved, 30), turned(k, angles, interleaved, 30), v, spans)

    function = lambda impl: lambda x: masked_attention(x, impl=impl, **kwargs)  # noqa: E731
    leaves, upstream = [torch.randn(T, 3, 1, 64)], torch.randn(T, 1, 64)
    check(function("triton"), function("reference"), wanted, leaves, upstream, torch.float16)


DENSE = ["all", "of each sample", "indices", "indices scattered", "boolean scattered", "key_mask", "separate", "long"]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("case", DENSE)
@pytest.mark.parametrize("impl", IMPLS)
def test_dense(case, impl):
    """A table has a row for each of N patches, or of those of each sample. Gathered tokens have that of their patch."""
    B, N = (2, 150) if case == "long" else (3, 11)
    own = case in ("of each sample", "indices scattered", "long")
    angles = 3 * torch.randn(*([B] if own else []), N, 12)
    rotary, flat = tables(angles, True, 12), (angles if own else angles.expand(B, N, 12)).reshape(B * N, 12)
    mask = torch.rand(B, N) < 0.5
    mask[1] = False
    mask[0, :2] = True
    everything = [[b * N + i for i in range(N)] for b in range(B)]
    visible = [[row for row in rows if mask.flatten()[row]] for rows in everything]
    spans, kept, kwargs = [(r, r) for r in everything], None, {}
    if case.startswith("indices"):
        index = torch.rand(B, N).argsort(1)[:, :4]
        visible = (index + N * torch.arange(B)[:, None]).tolist()
        spans, kwargs = [(r, r) for r in visible], {"visible": index}
        kept = [*chain.from_iterable(visible)]
    elif case in ("boolean scattered", "long"):
        spans, kwargs = [(r, r) for r in visible], {"visible": mask}
    elif case == "key_mask":
        spans, kwargs = list(zip(everything, visible, strict=True)), {"key_mask": mask}
    if "scattered" in case or case == "long":
        kept, kwargs["output"] = None, "scattered"
    kwargs = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}

    def function(impl):
        return lambda x: masked_attention(
            *(x.unbind(2) if case == "separate" else (x,)), rotary=rotary, impl=impl, **kwargs
        ).reshape(-1, 2, 32)

    def wanted(x):
        q, k, v = x.flatten(0, 1).unbind(1)
        out = oracle(turned(q, flat, True, 12), turned(k, flat, True, 12), v, spans)
        return out if kept is None else out[kept]

    upstream = torch.randn(B * N if kept is None else len(kept), 2, 32)
    check(function(impl), function("reference"), wanted, [torch.randn(B, N, 3, 2, 32)], upstream, torch.float32)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("S", [7, 140])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_keys_of_their_own(S, dense, impl):
    """The queries of a predictor's mask tokens on context keys: other lengths, other tables."""
    lengths, lengths_k = ([S, S], [5, 5]) if dense else ([3, S, 0, 2], [5, 4, 3, 0])
    ends, ends_k = (torch.tensor([0, *x]).cumsum(0).tolist() for x in (lengths, lengths_k))
    spans = [(list(range(*a)), list(range(*b))) for a, b in zip(pairwise(ends), pairwise(ends_k), strict=True)]
    angles, angles_k = 3 * torch.randn(S if dense else ends[-1], 16), 3 * torch.randn(5 if dense else ends_k[-1], 16)
    kwargs = {"rotary": tables(angles, False, 16), "rotary_k": tables(angles_k, False, 16)}
    if not dense:
        kwargs |= {"cu_seqlens": torch.tensor(ends, device=DEVICE), "max_seqlen": S}
        kwargs |= {"cu_seqlens_k": torch.tensor(ends_k, device=DEVICE), "max_seqlen_k": 5}
    repeats = len(lengths) if dense else 1

    def function(impl):
        def attend(*x):
            x = [t.unflatten(0, (2, -1)) for t in x] if dense else x
            return masked_attention(*x, impl=impl, **kwargs).reshape(-1, 2, 32)

        return attend

    def wanted(q, k, v):
        q = turned(q, angles.repeat(repeats, 1), False, 16)
        return oracle(q, turned(k, angles_k.repeat(repeats, 1), False, 16), v, spans)

    leaves = [torch.randn(n, 2, 32) for n in (ends[-1], ends_k[-1], ends_k[-1])]
    check(function(impl), function("reference"), wanted, leaves, torch.randn(ends[-1], 2, 32), torch.float32)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("impl", IMPLS)
def test_qkv_bias(impl):
    """Once turned, a vector added to all keys changes the probabilities, so that the keys' bias has a gradient."""
    (spans, cu), angles = packed_spans([5, 0, 9]), 3 * torch.randn(14, 16)
    kwargs = {"cu_seqlens": cu.to(DEVICE), "max_seqlen": 9, "rotary": tables(angles, True, 16)}

    def wanted(x, bias):
        q, k, v = (x + bias - bias.detach()).unbind(1)
        return oracle(turned(q, angles, True, 16), turned(k, angles, True, 16), v, spans)

    function = lambda impl: lambda x, bias: masked_attention(x, qkv_bias=bias, impl=impl, **kwargs)  # noqa: E731
    leaves, upstream = [torch.randn(14, 3, 2, 32), torch.randn(3, 2, 32)], torch.randn(14, 2, 32)
    check(function(impl), function("reference"), wanted, leaves, upstream, torch.float32)


@needs_kernel
def test_invisible_rows_are_not_read():
    """Neither those of qkv nor those of the tables."""
    index = torch.tensor([[3, 1, 4], [0, 7, 2]])
    seen = torch.zeros(2, 9, dtype=torch.bool).scatter(1, index, True)
    qkv = torch.randn(2, 9, 3, 2, 32).masked_fill(~seen[:, :, None, None, None], float("nan")).to(DEVICE)
    angles = torch.randn(2, 9, 16).masked_fill(~seen[:, :, None], float("nan"))
    out = masked_attention(
        qkv.requires_grad_(), visible=index.to(DEVICE), rotary=tables(angles, True, None), impl="triton"
    )
    out.sum().backward()
    assert out.isfinite().all() and qkv.grad.isfinite().all()


@pytest.mark.parametrize("D", [64, 80])
def test_vjepa2(D):
    """V-JEPA 2 turns each of three axes by itself. Channel c of d turns by omega[c mod d / 2], where it reads channel
    c + 1 with a minus, or c - 1; the channels after the three axes stay."""
    grid = torch.stack(torch.meshgrid(*map(torch.arange, (4, 3, 5)), indexing="ij"), -1).flatten(0, 2)
    d, x = D // 3 // 2 * 2, torch.randn(60, 2, D, dtype=torch.float64)
    want = x.clone()
    for axis in range(3):
        part = x[..., axis * d : axis * d + d]
        for c in range(d):
            omega = 10_000 ** -((c % (d // 2)) / (d / 2))
            angle = grid[:, axis, None].double() * omega
            other = -part[..., c + 1] if c % 2 == 0 else part[..., c - 1]
            want[..., axis * d + c] = part[..., c] * angle.cos() + other * angle.sin()
    rotary = Rotary.of(axial_angles(grid, [d] * 3, tiled=True).to(DEVICE))
    qkv = torch.stack([want, want, x], 1)
    want = oracle(*qkv.unbind(1), [(list(range(60)),) * 2])
    qkv = torch.stack([x] * 3, 1)[None].to(DEVICE)
    torch.testing.assert_close(masked_attention(qkv, rotary=rotary, impl="reference")[0].cpu(), want, rtol=0, atol=1e-6)


def test_axial_angles():
    angles = axial_angles(torch.tensor([[2, 3], [0, 1]]), [4, 2], base=100.0)
    torch.testing.assert_close(angles, torch.tensor([[2, 0.2, 3], [0, 0, 1]]))
    tiled = axial_angles(torch.tensor([[2, 3], [0, 1]]), [4, 2], base=100.0, tiled=True)
    torch.testing.assert_close(tiled, torch.tensor([[2, 0.2, 2, 0.2, 3, 3], [0, 0, 0, 0, 1, 1]]))
    with pytest.raises(ValueError, match="dims has 1 entries, but positions has 2 axes"):
        axial_angles(torch.zeros(3, 2), [4])
    with pytest.raises(ValueError, match=r"even number of channels, got \[4, 3\]"):
        axial_angles(torch.zeros(3, 2), [4, 3])
    with pytest.raises(TypeError, match=r"positions must be a torch\.Tensor, got numpy"):
        axial_angles(numpy.zeros((3, 2)), [4, 4])


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    """The tables stay float32 while q and k are rounded, and are made in float32 under autocast, too."""
    qkv, cu = torch.randn(9, 3, 2, 32, device=DEVICE, requires_grad=True), torch.tensor([0, 4, 9], device=DEVICE)
    angles = 100 * torch.randn(9, 16, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        rotary = Rotary.of(angles)
        out = masked_attention(qkv, cu_seqlens=cu, max_seqlen=5, rotary=rotary, impl=impl)
    out.sum().backward()
    assert torch.equal(rotary.cos, angles.cos()) and out.dtype == torch.float16 and qkv.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    qkv, cu = torch.randn(9, 3, 2, 32, device=DEVICE, requires_grad=True), torch.tensor([0, 4, 9], device=DEVICE)

    def function(x, angles):
        packed = masked_attention(x, cu_seqlens=cu, max_seqlen=5, rotary=Rotary.of(angles), impl=impl)
        rotary = Rotary.of(angles[:3], False)
        return packed, masked_attention(x.unflatten(0, (3, 3)), rotary=rotary, causal=2, impl=impl)

    angles = torch.randn(9, 16, device=DEVICE)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(qkv, angles), function(qkv, angles)
    torch.testing.assert_close(got, want)
    got, want = ([torch.autograd.grad(sum(x.square().sum() for x in out), qkv)] for out in (got, want))
    torch.testing.assert_close(got, want)


@needs_kernel
@pytest.mark.parametrize("S", [6, 33])
def test_opcheck(S):
    qkv, rotary = torch.randn(2, S, 3, 1, 32, device=DEVICE), Rotary.of(torch.randn(S, 32, device=DEVICE))
    inputs = Inputs(qkv, causal=2 if S == 6 else torch.arange(S, device=DEVICE))
    tables = make_tables(inputs, rotary, None)
    arguments = (qkv.flatten(0, 1), None, None, *make_layout(inputs), 0.2, False, *tables)
    torch.library.opcheck(torch.ops.ajepa.masked_attention_fwd.default, arguments)
    out, lse = torch.ops.ajepa.masked_attention_fwd(*arguments)
    torch.library.opcheck(
        torch.ops.ajepa.masked_attention_bwd.default,
        (torch.randn_like(out), *arguments[:3], out, lse, False, *arguments[3:]),
    )


@needs_kernel
@pytest.mark.parametrize("S", [6, 33])
def test_first_order(S):
    rotary = Rotary.of(torch.randn(S, 16, device=DEVICE))
    function = lambda x: masked_attention(x[None], rotary=rotary, causal=3, impl="triton")  # noqa: E731
    assert_first_order(function, torch.randn(S, 3, 1, 64, device=DEVICE))


def rotary(rows=4, columns=16, **change):
    return Rotary.of(torch.zeros(rows, columns, device=DEVICE))._replace(**change)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"rotary": rotary(5)}, r"rotary must have 4 rows, or 2 x 4, got \[5, 16\]"),
        ({"rotary": rotary(4, 40)}, "40 columns, which is neither P nor 2 P of P pairs of the 32 channels"),
        ({"rotary": rotary(4, 31)}, "31 columns, which is neither"),
        ({"rotary": rotary(pairs=12)}, "16 columns, which is neither"),
        ({"rotary": rotary(sin=torch.zeros(4, 8, device=DEVICE))}, r"\.cos and \.sin must be \[rows, P\]"),
        ({"rotary": rotary(sin=torch.zeros(4, 16, device=DEVICE).half())}, "must be float32, got torch.float32, torch"),
        ({"rotary": rotary(cos=torch.zeros(4, 16, device=DEVICE, requires_grad=True))}, "receives no gradient: detach"),
        ({"rotary": rotary(cos=torch.zeros(4, 16, device="meta"))}, "rotary must be on c"),
        ({"rotary_k": rotary()}, "rotary_k goes with rotary"),
        ({"rotary": rotary(), "rotary_k": rotary()}, "rotary_k is for k that is separate from q"),
        ({"rotary": rotary(), "separate": 5}, r"rotary_k must have 5 rows, or 2 x 5, got \[4, 16\], or pass rotary_k"),
        ({"rotary": rotary(), "rotary_k": rotary(interleaved=False), "separate": 4}, "must have equal columns, pairs"),
        ({"rotary": rotary(), "rotary_k": rotary(5, 32), "separate": 5}, "must have equal columns, pairs and"),
    ],
)  # fmt: skip
def test_errors(kwargs, message):
    qkv, N_k = torch.randn(2, 4, 3, 2, 32, device=DEVICE), kwargs.pop("separate", None)
    operands = (qkv,) if N_k is None else (qkv[:, :, 0], *[torch.randn(2, N_k, 2, 32, device=DEVICE)] * 2)
    with pytest.raises(ValueError, match=f"masked_attention: .*{message}"):
        masked_attention(*operands, **kwargs)


def test_type_errors():
    qkv, (cos, sin, *_) = torch.randn(4, 3, 2, 32, device=DEVICE), rotary()
    kwargs = {"cu_seqlens": torch.tensor([0, 4], device=DEVICE), "max_seqlen": 4}
    with pytest.raises(ValueError, match="a row for each of the 4 tokens, got 5"):
        masked_attention(qkv, rotary=rotary(5), **kwargs)
    with pytest.raises(TypeError, match=r"rotary must be a Rotary, got Tensor; see Rotary\.of"):
        masked_attention(qkv, rotary=cos, **kwargs)
    with pytest.raises(TypeError, match=r"rotary\.cos must be a torch\.Tensor, got numpy\.ndarray; convert it with"):
        masked_attention(qkv, rotary=Rotary(cos.cpu().numpy(), sin), **kwargs)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("S", [16, 32, 64, 77, 90, 128, 300, 1568])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [0, 50])
def test_sizes_on_a_gpu(S, head_dim, interleaved, causal):
    """Every launch configuration of this GPU, in bfloat16."""
    lengths = [S, 1, S // 2]
    (_, cu), T, pairs = packed_spans(lengths), sum(lengths), head_dim // 6 * 3
    kwargs = {"cu_seqlens": cu.cuda(), "max_seqlen": S, "causal": causal}
    kwargs["rotary"] = tables(3 * torch.randn(T, 2 * pairs), interleaved, pairs)
    qkv, upstream = (torch.randn(*shape, 3, head_dim, device="cuda").bfloat16() for shape in ((T, 3), (T,)))
    run = lambda x, impl: gradients(  # noqa: E731
        lambda x: masked_attention(x, impl=impl, **kwargs), [x.detach().requires_grad_()], upstream
    )
    want = run(qkv.double(), "reference")
    assert_as_good(run(qkv, "triton"), run(qkv, "reference"), want, torch.bfloat16)
