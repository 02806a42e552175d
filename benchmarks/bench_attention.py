"""Benchmark masked_attention on packed visible patches against varlen attention, SDPA, FlexAttention and jagged SDPA.

A time is milliseconds per call with 12 heads, in bfloat16 on a GPU and in float32 on a CPU. Four ways are timed: the
forward pass, the backward pass of a graph that was built beforehand, both together, and the backward pass that also
computes the gradient of qkv's bias, which every variant but `qkv_bias` sums in a pass of its own. The floor is the
bytes that must move, divided by the copy rate measured in the same run. The forward pass moves q, k, v and out; the
backward pass moves q, k, v, dO, dq, dk and dv.

The first cases are those of a step of `audio-jepa`. The context encoder attends over 51 to 77 visible patches per clip
and the target encoder over all 128, both with head dim 64. The predictor attends over all 128 with head dim 32.
Others have the head dims of larger models: 80 of ViT-H, 104 of ViT-G, and 256, the largest that the kernels take.
"""

import functools
import importlib.util
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ceilings import SECONDS, backward_only, copy_bytes_per_ms, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa_kernels import masked_attention
from ajepa_kernels._autograd import BiasGradient

H = 12
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
STEP_BATCH = 1024 if DEVICE == "cuda" else 2 if QUICK else 16
STEP = [("64", 64), ("128", 32), ("128", 64), ("51-77", 64), ("77", 64), ("51", 64)]
BIASED = "backward with the bias"
CASES = [(STEP_BATCH, tokens, D, way) for tokens, D in STEP for way in ("forward", "backward", BIASED)]
if not QUICK:
    CASES += [(STEP_BATCH // 4, tokens, D, way) for tokens, D in STEP for way in ("forward", "backward", BIASED)]
    others = [("96", 64), ("64", 32), ("77", 32), ("96", 32)]
    CASES += [(STEP_BATCH, tokens, D, way) for tokens, D in others for way in ("forward", "backward")]
    batches, ways = [64, 256, 1024] if DEVICE == "cuda" else [16], ["forward", "backward", "forward + backward"]
    CASES += [(batch, tokens, 64, way) for batch in batches for tokens in ("64", "32-96") for way in ways]
    larger = [("77", 80), ("256", 80), ("64", 88), ("64", 104), ("64", 256), ("256", 256)]
    CASES += [(max(STEP_BATCH // 16, 2), tokens, D, way) for tokens, D in larger for way in ("forward", "backward")]
FLEX = {("64", 64), ("32-96", 64)}  # tokens and head dim of the cases that FlexAttention is compiled for


def lengths(batch: int, tokens: str) -> torch.Tensor:
    """Return the tokens of each clip: `tokens` is "64", or "32-96" for a ragged batch whose mean is the middle."""
    low, high = int(tokens.split("-")[0]), int(tokens.split("-")[-1])
    spread = (high - low) // 2
    half = torch.randint(-spread, spread + 1, (batch // 2,), generator=torch.Generator().manual_seed(0))
    return (low + high) // 2 + torch.cat([half, -half])


def padded(backend, n: torch.Tensor) -> Callable:
    """Return SDPA on padded `[B, H, S, D]`, with a key mask if lengths differ. Padding and unpadding are not timed."""
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
                max_seqlen=int(n.max()),  # without these bounds torch reads the lengths from the device
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


def variants(n: torch.Tensor, backward: bool, flexible: bool) -> tuple[dict[str, tuple[Callable, int]], dict[str, str]]:
    """Return {name: (function of qkv, rows of qkv)}, and {variant left out on this machine: reason}."""
    T, S = int(n.sum()), int(n.max())
    cu = F.pad(n.cumsum(0), (1, 0)).to(DEVICE, torch.int32)
    functions = {"ajepa masked_attention": (lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=S), T)}
    missing = {}
    if DEVICE == "cuda":
        plain = lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=S, impl="reference")  # noqa: E731
        functions["plain PyTorch"] = (plain, T)
        try:
            from torch.nn.attention.varlen import varlen_attn

            functions["varlen_attn"] = (lambda x: varlen_attn(*x.unbind(1), cu, cu, S, S), T)
        except ImportError as error:
            missing["varlen_attn"] = str(error)
        for name in () if QUICK else ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
            if int(n.min()) == S or name != "FLASH_ATTENTION":
                backend = getattr(torch.nn.attention.SDPBackend, name)
                functions[f"padded SDPA {name.split('_')[0].lower()}"] = (padded(backend, n), len(n) * S)
            else:
                missing[f"padded SDPA {name}"] = "this backend takes no key mask"
    else:
        missing["the kernel"] = "needs a GPU; on a CPU masked_attention runs its plain definition"
        missing["varlen_attn"] = "it runs only on CUDA devices"
        functions["padded SDPA"] = (padded(None, n), len(n) * S)
    if QUICK:
        missing["FlexAttention"] = "compiled peers are left out of a quick run"
        missing["padded SDPA by backend, jagged SDPA, flash-attn"] = "slow peers are left out of a quick run"
        return functions, missing
    functions["jagged SDPA"] = (jagged(n), T)
    if not flexible:
        missing["FlexAttention"] = "it is compiled only for 64 and for 32-96 tokens of head dim 64"
    elif DEVICE == "cuda" or not backward:
        functions["FlexAttention"] = (flex(n), T)
    else:
        missing["FlexAttention"] = "it has no backward pass on a CPU"
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_qkvpacked_func

        functions["flash-attn"] = (lambda x: flash_attn_varlen_qkvpacked_func(x, cu, S), T)
    else:
        missing["flash-attn"] = "the package is not installed"
    return functions, missing


def biased(functions: dict[str, tuple[Callable, int]], cu: torch.Tensor, S: int) -> dict[str, tuple[Callable, int]]:
    """Return the functions of qkv as functions of qkv and its bias, which the layer before has added to qkv."""
    separate = {
        name: (lambda x, bias, function=function: function(BiasGradient.apply(x, bias)), rows)
        for name, (function, rows) in functions.items()
    }
    ours = lambda x, bias: masked_attention(x, cu_seqlens=cu, max_seqlen=S, qkv_bias=bias)  # noqa: E731
    first = "ajepa masked_attention"
    return {first: (ours, separate[first][1]), f"{first}, separate sum": separate.pop(first), **separate}


def checker(n: torch.Tensor, D: int, backward: bool) -> Callable[[Callable, int], None]:
    """Return check(function, rows). It compares the output and gradient of `function` with plain PyTorch in float64.

    The tokens of `function` are packed (`rows` is their number) or padded. `function` takes qkv, and a bias or not.
    """
    T, S = int(n.sum()), int(n.max())
    cu = F.pad(n.cumsum(0), (1, 0)).to(DEVICE)
    # The rows of the padded batch that hold tokens.
    places = (torch.arange(S) < n[:, None]).flatten().nonzero().squeeze(1).to(DEVICE)
    qkv, upstream = (torch.randn(T, *shape, H, D, device=DEVICE, dtype=DTYPE) for shape in ((3,), ()))

    def run(attend, x, bias=None):
        x = x.detach().requires_grad_(backward)
        leaves = (x,) if bias is None else (x, bias)
        out = attend(*leaves)
        return (out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))) if backward else (out,)

    plain = lambda x: masked_attention(x, cu_seqlens=cu, max_seqlen=S, impl="reference")  # noqa: E731
    want = run(plain, qkv.double())

    def check(function: Callable, rows: int, bias: torch.Tensor | None = None) -> None:
        def packed(*leaves):
            out = function(*leaves)
            out = out.transpose(1, 2).flatten(0, 1) if out.dim() == 4 else out
            return out if rows == T else out[places]

        given = qkv if rows == T else qkv.new_zeros(rows, 3, H, D).index_copy(0, places, qkv)
        right_bias = () if bias is None else (want[1].sum(0),)
        for got, right in zip(run(packed, given, bias), (*want, *right_bias), strict=True):
            got = got[places] if len(got) == rows != T else got
            assert (got.double() - right).norm() < 4 * torch.finfo(DTYPE).eps * right.norm()

    return check


def both_ways(function: Callable, x: torch.Tensor) -> torch.Tensor:
    out = function(x)
    return torch.autograd.grad(out, x, out.detach())[0]


@pytest.mark.parametrize(("batch", "tokens", "D", "way"), dict.fromkeys(CASES))
def test_attention(batch, tokens, D, way, interleave, record):
    n, backward = lengths(batch, tokens), way != "forward"
    T, size = int(n.sum()), torch.finfo(DTYPE).bits // 8
    functions, missing = variants(n, backward, flexible=(tokens, D) in FLEX)
    bias = torch.zeros(3, H, D, device=DEVICE, requires_grad=True) if way == BIASED else None
    if way == BIASED:
        functions = biased(functions, F.pad(n.cumsum(0), (1, 0)).to(DEVICE, torch.int32), int(n.max()))
    check = checker(n, D, backward)
    timed = {}
    for name, (function, rows) in functions.items():
        try:
            check(function, rows, bias)
        except RuntimeError as error:
            if name.startswith("ajepa"):
                raise
            missing[name] = str(error).strip().splitlines()[0]
            continue

        def make(rows=rows):
            return (torch.randn(rows, 3, H, D, device=DEVICE, dtype=DTYPE).requires_grad_(backward),)

        def build(function=function, make=make):
            leaves = (*make(), *(() if bias is None else (bias,)))
            out = function(*leaves)
            return out, leaves, torch.randn_like(out)

        if way in ("backward", BIASED):
            timed[name] = backward_only(build, 2 * rows * 4 * H * D * size)
        else:
            call = functools.partial(both_ways, function) if backward else function
            timed[name] = rotating(call, make, rows * 3 * H * D * size)
    tensors = {"forward": 4, "backward": 7, BIASED: 7, "forward + backward": 11}[way]
    floor = T * H * D * size * tensors / copy_bytes_per_ms()
    plain = "plain PyTorch" if "plain PyTorch" in timed else "ajepa masked_attention"
    shape = f"{batch} x {tokens} tokens, head dim {D}, {way}"
    peers = [name for name in timed if name != plain and not name.startswith("ajepa masked_attention")]
    record("masked_attention", shape, interleave(timed, SECONDS), plain=plain, peers=peers, floor_ms=floor)
    left_out(missing)
