"""Every rounding of the head dim to a tile's channels: 8 to 32, 40 to 64, 80 to 120 to 128, 200 and 256 to 256."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, IMPLS, needs_kernel, poison  # noqa: F401
from test_masked_attention import check, oracle, packed_spans

from ajepa_kernels import _triton, masked_attention
from ajepa_kernels.attention.ops import HEAD_DIMS, _block_d, _longest_tile, why_no_kernel

DIMS = (8, 24, 40, 80, 88, 104, 120, 200, 256)
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16

# One tile, ragged; a tile of 64 keys, which backward takes at 256 channels with tiles of queries; several tiles.
LENGTHS = [([5, 0, 1, 13], HALF), ([40, 33], HALF), ([16, 3], torch.float32), ([70, 0, 3], torch.float32)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("lengths", "dtype"), LENGTHS, ids=lambda x: str(x).replace(" ", ""))
@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("impl", IMPLS)
def test_packed(D, lengths, dtype, impl):
    (spans, cu), T = packed_spans(lengths), sum(lengths)
    cu = cu.to(DEVICE, torch.int32)

    def attend(impl):
        return lambda x, b: masked_attention(x, cu_seqlens=cu, max_seqlen=max(lengths), qkv_bias=b, impl=impl)

    wanted = lambda x, b: oracle(*(x + b - b.detach()).unbind(1), spans)  # noqa: E731
    leaves = [torch.randn(T, 3, 2, D), torch.randn(3, 2, D)]
    check(attend(impl), attend("reference"), wanted, leaves, torch.randn(T, 2, D), dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("impl", IMPLS)
def test_tile_with_a_tail(impl):
    """Visible patches of a ViT-H."""
    test_packed(80, [77, 3], HALF, impl)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("impl", IMPLS)
def test_visible(D, impl):
    """Three heads of 8 channels make rows of which not every one is aligned to more than 16 bytes."""
    index = torch.tensor([[8, 0, 3], [2, 1, 7]])
    spans = [(rows, rows) for rows in (index + 9 * torch.arange(2)[:, None]).tolist()]

    def attend(impl):
        visible = {"visible": index.to(DEVICE), "output": "scattered", "impl": impl}
        return lambda x: masked_attention(x.unflatten(0, (2, 9)), **visible).flatten(0, 1)

    wanted = lambda x: oracle(*x.unbind(1), spans)  # noqa: E731
    check(attend(impl), attend("reference"), wanted, [torch.randn(18, 3, 3, D)], torch.randn(18, 3, D), HALF)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("S", [7, 70])
@pytest.mark.parametrize("D", DIMS)
@pytest.mark.parametrize("impl", IMPLS)
def test_cross(D, S, impl):
    ends, ends_k = (torch.tensor([0, *n]).cumsum(0).tolist() for n in ([3, S, 0], [5, 4, 3]))
    spans = [(list(range(*a)), list(range(*b))) for a, b in zip(pairwise(ends), pairwise(ends_k), strict=True)]
    kwargs = {"cu_seqlens": torch.tensor(ends, device=DEVICE), "max_seqlen": S}
    kwargs |= {"cu_seqlens_k": torch.tensor(ends_k, device=DEVICE), "max_seqlen_k": 5}

    def attend(impl):
        return lambda *qkv: masked_attention(*qkv, **kwargs, impl=impl)

    leaves = [torch.randn(n, 2, D) for n in (ends[-1], ends_k[-1], ends_k[-1])]
    wanted = lambda *qkv: oracle(*qkv, spans)  # noqa: E731
    check(attend(impl), attend("reference"), wanted, leaves, torch.randn(ends[-1], 2, D), torch.float32)


@needs_kernel
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU, its own architecture decides the tiles")
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("lengths", [[64, 3], [65, 2]])
@pytest.mark.parametrize("arch", [80, 86, 100, 120])
def test_tiles_of_256_channels(arch, lengths, monkeypatch):
    """The other GPUs' tiles: of 64 tokens backward is one tile on sm_80, tiles of queries on sm_100, several tiles of
    keys where shared memory is small; of 65 tokens it is several tiles everywhere."""
    monkeypatch.setattr(_triton, "_recorded_arch", arch)
    test_packed(248, lengths, HALF, "triton")


@pytest.mark.parametrize(
    ("dims", "tokens", "with_little_shared_memory", "float32"),
    [((8, 32), 128, 128, 64), ((40, 64), 128, 128, 64), ((72, 128), 128, 64, 16), ((136, 256), 64, 32, 16)],
)
def test_longest_tile(dims, tokens, with_little_shared_memory, float32):
    """The table in docs/kernels.md."""
    longest = lambda arch, D, dtype: _with_arch(arch, torch.empty(1, 3, 1, D, dtype=dtype, device="meta"))  # noqa: E731
    for D in dims:
        assert {longest(arch, D, torch.bfloat16) for arch in (80, 90, 100)} == {tokens}
        assert {longest(arch, D, torch.bfloat16) for arch in (86, 89, 120)} == {with_little_shared_memory}
        assert {longest(arch, D, torch.float32) for arch in (80, 86, 90, 100, 120)} == {float32}


def _with_arch(arch, q):
    with _triton.record_launches(arch):
        return _longest_tile(q)


def test_tile_channels():
    assert [_block_d(D) for D in (8, 32, 40, 64, 72, 128, 136, 256)] == [32, 32, 64, 64, 128, 128, 256, 256]
    assert all(not why_no_kernel(torch.empty(1, 3, 1, D)) for D in HEAD_DIMS) and set(DIMS) < set(HEAD_DIMS)


@needs_kernel
@pytest.mark.parametrize("D", [20, 252, 264])
def test_other_head_dims(D):
    """They run as plain PyTorch, or with the padding that the error proposes."""
    qkv, cu = torch.randn(4, 3, 2, D, device=DEVICE), torch.tensor([0, 4], device=DEVICE)
    attend = lambda x, **kwargs: masked_attention(x, cu_seqlens=cu, max_seqlen=4, **kwargs)  # noqa: E731
    with pytest.raises(ValueError, match=f"no kernel for head dim {D}, only for multiples of 8 up to 256") as error:
        attend(qkv, impl="triton")
    plain = attend(qkv)
    assert plain.shape == (4, 2, D)
    if D < 256:
        assert f"pad q, k and v with 4 channels of zeros, and pass scale={D} ** -0.5" in str(error.value)
        torch.testing.assert_close(attend(F.pad(qkv, (0, 4)), scale=D**-0.5, impl="triton")[..., :D], plain)
    else:
        assert "pad" not in str(error.value)
