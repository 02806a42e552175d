"""Mean and standard deviation of each segment of a packed batch, over its tokens.

Shapes: T tokens, n segments, C width.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._autograd import Function, first_order
from ajepa_kernels._triton import dense_rows, jit, launch, power_of_2, register, tl, use_triton

TOKENS = 8  # tokens that a program holds at a time

# --- forward ----------------------------------------------------------------------------------------------------------


@jit
def _segment_pool_fwd_kernel(
    x_ptr, cu_ptr, out_ptr, stride_x, eps, C: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """One segment and one block of channels. Sums are of differences from the first token, which is at most
    sqrt(length - 1) deviations away from the mean, so a large common offset cancels before it is squared."""
    pid = tl.program_id(0)
    segment = (pid // BLOCKS).to(tl.int64)
    c = (pid % BLOCKS * BLOCK + tl.arange(0, BLOCK))[None, :]
    start, end = tl.load(cu_ptr + segment).to(tl.int64), tl.load(cu_ptr + segment + 1).to(tl.int64)
    first = tl.load(x_ptr + start * stride_x + c, mask=(c < C) & (start < end), other=0.0).to(tl.float32)
    total = tl.zeros([1, BLOCK], tl.float32)
    squares = tl.zeros([1, BLOCK], tl.float32)
    for tile in range(start, end, TOKENS):
        row = (tile + tl.arange(0, TOKENS))[:, None]
        mask = (row < end) & (c < C)
        x = tl.load(x_ptr + row * stride_x + c, mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, x - first, 0.0)
        total += tl.sum(difference, 0, keep_dims=True)
        squares += tl.sum(difference * difference, 0, keep_dims=True)
    length = tl.maximum(end - start, 1).to(tl.float32)
    shift = total / length
    variance = tl.maximum(squares / length - shift * shift, 0.0)
    tl.store(out_ptr + segment * 2 * C + c, first + shift, mask=c < C)
    tl.store(out_ptr + segment * 2 * C + C + c, tl.sqrt_rn(variance + eps), mask=c < C)


def _blocks(C: int) -> tuple[int, int]:
    """Number and width of the blocks of channels. The width divides C if a power of two from 64 to 256 does."""
    divisor = C & -C
    block = min(divisor, 256) if divisor >= 64 else min(power_of_2(C), 256)
    return -(-C // block), block


def _segment_pool_fwd_fake(x, cu, eps):
    return x.new_empty(cu.shape[0] - 1, 2, x.shape[1], dtype=torch.float32)


@register("segment_pool_fwd(Tensor x, Tensor cu, float eps) -> Tensor", _segment_pool_fwd_fake)
def _segment_pool_fwd(x, cu, eps):
    C, n = x.shape[1], cu.shape[0] - 1
    out = torch.empty(n, 2, C, dtype=torch.float32, device=x.device)
    x, (blocks, block) = dense_rows(x), _blocks(C)
    # given any bound on its registers, ptxas issues the loads of a tile before it waits for most of them
    launch(
        _segment_pool_fwd_kernel, n * blocks, x,
        x, cu.contiguous(), out, x.stride(0), eps, C, blocks, block, TOKENS, num_warps=1, maxnreg=128,
    )  # fmt: skip
    return out


# --- backward ---------------------------------------------------------------------------------------------------------


@jit
def _segment_pool_bwd_kernel(
    grad_ptr, x_ptr, cu_ptr, out_ptr, dx_ptr, stride_x, T, rows, C: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One segment and one block of channels, and an equal share of the tokens outside all segments. rows: segments.

    A float32 mean is rounded more coarsely than differences of float32 tokens where their common offset is large. The
    rounding is then found as the mean of x - mean, by a pass over tokens that the cache still holds for the next one.
    """
    pid = tl.program_id(0)
    segment = (pid // BLOCKS).to(tl.int64)
    c = (pid % BLOCKS * BLOCK + tl.arange(0, BLOCK))[None, :]
    start, end = tl.load(cu_ptr + segment).to(tl.int64), tl.load(cu_ptr + segment + 1).to(tl.int64)
    place = segment * 2 * C + c
    mean = tl.load(out_ptr + place, mask=c < C, other=0.0)
    deviation = tl.load(out_ptr + place + C, mask=c < C, other=1.0)
    length = tl.maximum(end - start, 1).to(tl.float32)
    dmean = tl.load(grad_ptr + place, mask=c < C, other=0.0) / length
    ddeviation = tl.load(grad_ptr + place + C, mask=c < C, other=0.0) / (length * deviation)
    if x_ptr.dtype.element_ty == tl.float32:
        total = tl.zeros([1, BLOCK], tl.float32)
        for tile in range(start, end, TOKENS):
            row = (tile + tl.arange(0, TOKENS))[:, None]
            mask = (row < end) & (c < C)
            centred = tl.where(mask, tl.load(x_ptr + row * stride_x + c, mask=mask, other=0.0) - mean, 0.0)
            total += tl.sum(centred, 0, keep_dims=True)
        dmean -= ddeviation * (total / length)
    for tile in range(start, end, TOKENS):
        row = (tile + tl.arange(0, TOKENS))[:, None]
        mask = (row < end) & (c < C)
        x = tl.load(x_ptr + row * stride_x + c, mask=mask, other=0.0).to(tl.float32)
        dx = dmean + ddeviation * (x - mean)
        tl.store(dx_ptr + row * C + c, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    lowest, highest = tl.load(cu_ptr).to(tl.int64), tl.load(cu_ptr + rows).to(tl.int64)
    outside = T - (highest - lowest)
    zeros = tl.zeros([TOKENS, BLOCK], dx_ptr.dtype.element_ty)
    for tile in range(segment * TOKENS, outside, rows.to(tl.int64) * TOKENS):
        index = (tile + tl.arange(0, TOKENS))[:, None]
        row = tl.where(index < lowest, index, index - lowest + highest)
        tl.store(dx_ptr + row * C + c, zeros, mask=(index < outside) & (c < C))


@register(
    "segment_pool_bwd(Tensor grad, Tensor x, Tensor cu, Tensor out) -> Tensor",
    lambda grad, x, cu, out: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def _segment_pool_bwd(grad, x, cu, out):
    (T, C), n = x.shape, cu.shape[0] - 1
    if n == 0:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    x, (blocks, block) = dense_rows(x), _blocks(C)
    launch(
        _segment_pool_bwd_kernel, n * blocks, x,
        grad.contiguous(), x, cu.contiguous(), out, dx, x.stride(0), T, n, C, blocks, block, TOKENS, num_warps=1,
    )  # fmt: skip
    return dx


# --- on a CPU ---------------------------------------------------------------------------------------------------------


def _rows(x: torch.Tensor, cu: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The segment of each token, n for tokens outside all of them; which these are; the lengths, 1 if empty."""
    n = cu.shape[0] - 1
    token = torch.arange(x.shape[0], device=x.device, dtype=cu.dtype)
    segment = torch.searchsorted(cu, token, right=True) - 1
    outside = (segment < 0) | (segment >= n)
    length = F.pad(cu.diff(), (0, 1)).clamp_min(1)[:, None]
    return segment.masked_fill(outside, n)[:, None].expand(-1, x.shape[1]), outside[:, None], length


def _plain_fwd(x: torch.Tensor, cu: torch.Tensor, eps: float) -> torch.Tensor:
    index, _, length = _rows(x, cu)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    zeros = functools.partial(x.new_zeros, length.shape[0], x.shape[1])
    mean = zeros().scatter_add_(0, index, x).div_(length)
    centred = mean.gather(0, index).neg_().add_(x)
    deviation = zeros().scatter_add_(0, index, centred.square_()).div_(length).add_(eps).sqrt_()
    return torch.stack([mean[:-1], deviation[:-1]], 1)


def _plain_bwd(grad: torch.Tensor, x: torch.Tensor, cu: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    index, outside, length = _rows(x, cu)
    # contiguous, for which gather is fast, with a row for the tokens outside
    mean, dmean, ddeviation = (F.pad(t, (0, 0, 0, 1)) for t in (out[:, 0], grad[:, 0], grad[:, 1] / out[:, 1]))
    dx = mean.gather(0, index).neg_().add_(x)
    dmean.addcmul_(ddeviation, torch.zeros_like(mean).scatter_add_(0, index, dx).div_(length), value=-1).div_(length)
    dx.mul_(ddeviation.div_(length).gather(0, index)).add_(dmean.gather(0, index))
    return dx.masked_fill_(outside, 0).to(x.dtype)


class _SegmentPool(Function):
    @staticmethod
    def forward(x, cu, eps, kernel):
        return torch.ops.ajepa.segment_pool_fwd(x, cu, eps) if kernel else _plain_fwd(x, cu, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, cu, _, ctx.kernel = inputs
        ctx.save_for_backward(x, cu, output)

    @staticmethod
    @first_order
    def backward(ctx, saved, grad):
        backward = torch.ops.ajepa.segment_pool_bwd if ctx.kernel else _plain_bwd
        return backward(grad, *saved), None, None, None


# --- public -----------------------------------------------------------------------------------------------------------


def segment_pool_reference(x: torch.Tensor, cu_segments: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    """Plain PyTorch definition of `segment_pool`, in float32 (float64 for float64 inputs)."""
    index, outside, length = _rows(x, cu_segments)
    tokens = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(outside, 0)
    zeros = tokens.new_zeros(length.shape[0], x.shape[1])
    mean = zeros.scatter_add(0, index, tokens) / length
    variance = zeros.scatter_add(0, index, (tokens - mean.gather(0, index)).square()) / length
    return torch.stack([mean, (variance + eps).sqrt()], 1)[:-1]


def segment_pool(x: torch.Tensor, cu_segments: torch.Tensor, *, eps: float = 1e-5, impl: str = "auto") -> torch.Tensor:
    """Mean and standard deviation of contiguous segments of packed tokens, for example of one clip's frequency row.

    With n tokens in a segment: mean = sum(x) / n; deviation = sqrt(sum((x - mean)^2) / n + eps), for each channel.

    Args:
        x: `[T, C]`, packed tokens. The kernel takes bfloat16, float16 or float32, and computes in float32.
        cu_segments: int32 or int64 `[n + 1]`, on x's device: segment i is the tokens from `cu_segments[i]` up to
            `cu_segments[i + 1]`. The offsets must not decrease, and must lie in [0, T]; they are trusted. A segment may
            be empty: its mean is 0 and its deviation sqrt(eps). Tokens before the first offset or after the last one
            belong to no segment.
        eps: added to the variance.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run. On
            a CPU it runs plain PyTorch with the gradient written out, which is faster than the definition and keeps
            nothing but x and the result. "triton" requires the kernel, "reference" is the plain definition.

    Returns:
        float32 `[n, 2, C]` (float64 for float64): means `[:, 0]` and deviations `[:, 1]`.

    Saved for backward: x and the result. The gradient, dmean / n + ddeviation (x - mean) / (n deviation), has the
    dtype of x, and is 0 for tokens outside the segments. `torch.func.grad` works; `torch.vmap` needs impl="reference".

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices are invalid; raised before any launch.
        RuntimeError: the gradient is differentiated again; impl="reference" allows it.

    Example::

        tokens = torch.randn(6, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        offsets = torch.tensor([0, 4, 6], device="cuda", dtype=torch.int32)
        pooled = segment_pool(tokens, offsets)  # [2, 2, 768]
    """
    check_tensors("segment_pool", x=x, cu_segments=cu_segments)
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"segment_pool: x must be floating point [T, C], got {x.dtype} {list(x.shape)}")
    if cu_segments.dim() != 1 or len(cu_segments) == 0 or cu_segments.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"segment_pool: cu_segments must be int32 or int64 [n + 1], "
            f"got {cu_segments.dtype} {list(cu_segments.shape)}"
        )
    if cu_segments.device != x.device:
        raise ValueError(f"segment_pool: x is on {x.device} and cu_segments on {cu_segments.device}")
    unsupported = "" if x.dtype in (torch.float32, torch.float16, torch.bfloat16) else f"no kernel for {x.dtype}"
    kernel = use_triton("segment_pool", impl, x, unsupported)
    if impl == "reference":
        return segment_pool_reference(x, cu_segments, eps)
    return _SegmentPool.apply(x, cu_segments, eps, kernel)
