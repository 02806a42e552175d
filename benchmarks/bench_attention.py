"""masked_attention over packed visible patches against varlen attention, SDPA, FlexAttention and jagged SDPA.

Milliseconds a call, 12 heads of 64 channels (ViT-B), bfloat16 on a GPU, float32 on a CPU: forward, backward of a graph
that is built beforehand, and both. The floor is the bytes that must move over the copy rate measured in the same run:
q, k, v, out forward; q, k, v, dO, dq, dk, dv backward.
"""

import functools
import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import DEVICE, left_out

from ajepa_kernels import masked_attention

torch._functorch.config.donated_buffer = False  # what torch.compile saves is read by one backward after another
H, D = 12, 64
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BATCHES = [64, 256, 1024] if DEVICE == "cuda" else [16]


def lengths(batch: int, ragged: bool) -> torch.Tensor:
    """64 visible patches a clip; ragged: between 32 and 96, adding up to the same budget."""
    if not ragged:
        return torch.full((batch,), 64)
    half = torch.randint(-32, 33, (batch // 2,), generator=torch.Generator().manual_seed(0))
    return 64 + torch.cat([half, -half])


def padded(backend, n: torch.Tensor) -> Callable:
    """SDPA on `[B, H, S, D]`, with a key mask where lengths differ. Padding and unpadding are not timed."""
    S = int(n.max())
    mask = None if int(n.min()) == S else (torch.arange(S, device=DEVICE) < n.to(DEVICE)[:, None])[:, None, None, :]

    def run(qkv):
        q, k, v = qkv.unflatten(0, (len(n), S)).permute(2, 0, 3, 1, 4)
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        with torch.nn.attention.sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return run


def jagged(n: torch.Tensor) -> Callable:
    offsets = F.pad(n.cumsum(0), (1, 0)).to(DEVICE)

    def run(qkv):
        q, k, v = (
            torch.nested.nested_tensor_from_jagged(
                x.contiguous(),
                offsets,
                min_seqlen=int(n.min()),
                max_seqlen=int(n.max()),  # else read from the device
            ).transpose(1, 2)
            for x in qkv.unbind(1)
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()

    return run


def flex(n: torch.Tensor) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.repeat_interleave(torch.arange(len(n)), n).to(DEVICE)
    T = int(n.sum())
    same = lambda b, h, q, k: document[q] == document[k]  # noqa: E731
    block_mask = create_block_mask(same, None, None, T, T, device=DEVICE)
    compiled = torch.compile(flex_attention)
    return lambda qkv: compiled(*(x.transpose(0, 1)[None] for x in qkv.unbind(1)), block_mask=block_mask)


def variants(n: torch.Tensor, backward: bool) -> tuple[dict[str, tuple[Callable, int]], dict[str, str]]:
    """{name: (function of qkv, rows of qkv)} and what cannot run here."""
    T, S = int(n.sum()), int(n.max())
    cu = F.pad(n.cumsum(0), (1, 0)).to(DEVICE, torch.int32)
    run = {"ajepa masked_attention": (lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=S), T)}
    out = {}
    if DEVICE == "cuda":
        plain = lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=S, impl="reference")  # noqa: E731
        run["plain PyTorch"] = (plain, T)
        try:
            from torch.nn.attention.varlen import varlen_attn

            run["varlen_attn"] = (lambda x: varlen_attn(*x.unbind(1), cu, cu, S, S), T)
        except ImportError as error:
            out["varlen_attn"] = str(error)
        for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            if int(n.min()) == S or name != "FLASH_ATTENTION":
                backend = getattr(torch.nn.attention.SDPBackend, name)
                run[f"padded SDPA {name.split('_')[0].lower()}"] = (padded(backend, n), len(n) * S)
            else:
                out[f"padded SDPA {name}"] = "takes no key mask"
    else:
        out["the kernel"] = "needs a GPU: masked_attention is its plain definition here"
        out["varlen_attn"] = "CUDA only"
        run["padded SDPA"] = (padded(None, n), len(n) * S)
    run["jagged SDPA"] = (jagged(n), T)
    if DEVICE == "cuda" or not backward:
        run["FlexAttention"] = (flex(n), T)
    else:
        out["FlexAttention"] = "no backward on a CPU"
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_qkvpacked_func

        run["flash-attn"] = (lambda x: flash_attn_varlen_qkvpacked_func(x, cu, S), T)
    else:
        out["flash-attn"] = "not installed"
    return run, out


def check(function: Callable, rows: int, n: torch.Tensor, backward: bool) -> None:
    """Output and gradient of `function`, of packed or of padded tokens, against plain float64."""
    T, S = int(n.sum()), int(n.max())
    cu = F.pad(n.cumsum(0), (1, 0)).to(DEVICE)
    places = (torch.arange(S) < n[:, None]).flatten().nonzero().squeeze(1).to(DEVICE)  # of the tokens among padded ones
    qkv, upstream = (torch.randn(T, *shape, H, D, device=DEVICE, dtype=DTYPE) for shape in ((3,), ()))

    def packed(x):
        out = function(x)
        out = out.transpose(1, 2).flatten(0, 1) if out.dim() == 4 else out
        return out if rows == T else out[places]

    def run(attend, x):
        x = x.detach().requires_grad_(backward)
        out = attend(x)
        return (out, *torch.autograd.grad(out, x, upstream.to(out.dtype))) if backward else (out,)

    plain = lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=S, impl="reference")  # noqa: E731
    want = run(plain, qkv.double())
    given = qkv if rows == T else qkv.new_zeros(rows, 3, H, D).index_copy(0, places, qkv)
    for got, right in zip(run(packed, given), want, strict=True):
        got = got if len(got) == T else got[places]
        assert (got.double() - right).norm() < 4 * torch.finfo(DTYPE).eps * right.norm()


def both_ways(function: Callable, x: torch.Tensor) -> torch.Tensor:
    out = function(x)
    return torch.autograd.grad(out, x, out.detach())[0]


def alone_backward(function: Callable, make: Callable[[], torch.Tensor], bytes_each: int) -> Callable[[], object]:
    """The backward pass of graphs built on the stream that asks for it: autograd runs it where they were built."""
    ready: dict[object, Callable[[], object]] = {}

    def build():
        x = make()
        out = function(x)
        return out, x, torch.randn_like(out)

    def run():
        stream = torch.cuda.current_stream() if DEVICE == "cuda" else None
        if stream not in ready:
            ready.clear()
            again = lambda out, x, upstream: torch.autograd.grad(out, x, upstream, retain_graph=True)  # noqa: E731
            ready[stream] = rotating(again, build, bytes_each)
        return ready[stream]()

    return run


@pytest.mark.parametrize("way", ["forward", "backward", "forward + backward"])
@pytest.mark.parametrize("ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("batch", BATCHES)
def test_attention(batch, ragged, way, interleave, record):
    n, backward = lengths(batch, ragged), way != "forward"
    T, size = int(n.sum()), torch.finfo(DTYPE).bits // 8
    functions, missing = variants(n, backward)
    timed = {}
    for name, (function, rows) in functions.items():
        try:
            check(function, rows, n, backward)
        except RuntimeError as error:
            if name.startswith("ajepa"):
                raise
            missing[name] = str(error).strip().splitlines()[0]
            continue
        make = lambda rows=rows: torch.randn(rows, 3, H, D, device=DEVICE, dtype=DTYPE).requires_grad_(backward)  # noqa: E731
        if way == "backward":
            timed[name] = alone_backward(function, make, 2 * rows * 4 * H * D * size)
        else:
            call = functools.partial(both_ways, function) if backward else function
            timed[name] = rotating(call, lambda make=make: (make(),), rows * 3 * H * D * size)
    tensors = {"forward": 4, "backward": 7, "forward + backward": 11}[way]
    floor = T * H * D * size * tensors / copy_bytes_per_ms()
    plain = "plain PyTorch" if "plain PyTorch" in timed else "ajepa masked_attention"
    shape = f"{batch} x {'32-96' if ragged else 64} visible, {way}"
    peers = [name for name in timed if name not in (plain, "ajepa masked_attention")]
    record("masked_attention", shape, interleave(timed, SECONDS), plain=plain, peers=peers, floor_ms=floor)
    left_out(missing)
