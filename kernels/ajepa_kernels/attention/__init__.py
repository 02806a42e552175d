"""Attention in which only visible patches take part.

Read the files in this order: `__init__.py` (the public function), `inputs.py` (its arguments and their checks),
`rotary.py` (rotary position embeddings), `layout.py` (which row attends to which, and the plain PyTorch definition),
`ops.py` (the registered operations and their launches), `kernels.py` (the Triton kernels).

Shapes: B samples, N patches, V visible patches; R sequences, T packed tokens (all sequences end to end), S tokens in
the longest sequence, H heads, D head dim. A *slot* is a position in the list of tokens that the sequences cover. A
*row* is the place of that token in memory. The two numbers differ only where the layout gathers.
"""

from __future__ import annotations

import torch

from ajepa_kernels._autograd import BiasGradient, autocast_dtype
from ajepa_kernels._triton import use_triton
from ajepa_kernels.attention.inputs import Inputs, can_be_checked_at_once, check_arguments, check_bias, check_contents
from ajepa_kernels.attention.layout import attention_reference, cast, make_layout, rows, shape_of_result
from ajepa_kernels.attention.ops import MaskedAttention, why_no_kernel
from ajepa_kernels.attention.rotary import Rotary, make_tables


def masked_attention_reference(
    qkv_T3HD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None = None
) -> torch.Tensor:
    """Plain PyTorch definition of packed `masked_attention`: pad each sequence, SDPA with a key mask, unpad."""
    return masked_attention(qkv_T3HD, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, impl="reference")


def masked_attention(
    qkv: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    visible: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    qkv_bias: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    output: str = "packed",
    scale: float | None = None,
    tf32: bool = False,
    rotary: Rotary | None = None,
    rotary_k: Rotary | None = None,
    causal: int | torch.Tensor = 0,
    check: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """softmax(scale q k^T) v among the visible patches of each sample. Masked patches are never read.

    *Packed* inputs `qkv [T, 3, H, D]` hold only visible patches. Sequence r is tokens
    `cu_seqlens[r]:cu_seqlens[r + 1]`; equal offsets mean an empty sequence. *Dense* inputs `qkv [B, N, 3, H, D]` hold
    every patch, `visible` selects those that take part, and the kernel gathers their rows. Instead of `qkv`, the caller
    may pass `q, k, v`, each without the axis of 3.

    Args:
        qkv: queries, keys and values, or only the queries. bfloat16, float16 or float32 on the GPU; autocast casts them
            to its dtype. Kernels exist for head dims that are multiples of 8, up to 256.
        k, v: keys and values where they are separate from the queries.
        cu_seqlens: int32 or int64 `[R + 1]`, from 0 to T without decreasing.
        max_seqlen: bound on the sequence lengths, known to the host. Up to 128 tokens, all scores stay on chip. A
            boolean `visible` may omit it; the bound is then N, because the host does not know the counts.
        visible: for dense inputs. Boolean `[B, N]`; or indices `[B, V]` of V patches for each sample; or, with
            `cu_seqlens`, indices `[T]` into the B * N flattened patches. An index may appear once. None: all patches.
            Each call sorts a boolean mask, so a model of many layers should pass indices.
        key_mask: boolean `[T]` or `[B, N]`. All patches are queries, but only those marked True are keys (A-JEPA's
            regularised masking, arXiv 2311.15830). A query without any key gives zero.
        qkv_bias: `[3, H, D]` or `[3 * H * D]`, the bias that the layer before has already added to q, k and v. It does
            not change the result. Its gradient is the sum of the gradients of q, k and v over their rows, which
            backward computes while it has them on chip, instead of the layer before (up to 128 tokens of joint qkv;
            elsewhere in a pass of its own). float32 partial sums, one for each sequence, are added up in a set order.
            The keys' part is zero, because a vector that is added to all keys does not change the probabilities.
        cu_seqlens_k, max_seqlen_k: packed keys of other lengths than the queries (cross-attention), sequence r of the
            keys for sequence r of the queries. Either may be empty. A predictor can so take its mask tokens as queries
            and the context as keys, see the last example.
        output: where `visible` is given, "packed" returns visible patches only, `[B, V, H, D]` or `[T, H, D]`;
            "scattered" returns `[B, N, H, D]`, zero where not visible. A boolean `visible` with "packed" reads T from
            the device: the host waits, and a CUDA graph cannot capture it. Indices with either output, and booleans
            with "scattered", never make the host wait.
        scale: factor of the scores; 1 / sqrt(D) by default.
        tf32: let float32 products round their operands to tf32. By default they are true float32 products.
        rotary: tables by which pairs of channels of q and k are turned before the product (`Rotary.of`; for positions
            on a grid `axial_angles`). Their rows are those of the input, not of `visible`: packed `[T]`; dense `[N]`,
            which all samples share, or `[B, N]`. The kernels turn q and k as they load them and turn the gradients back
            before they store them, so that turned q and k never reach memory.
        rotary_k: tables of keys of another length than the queries; by default those of the queries.
        causal: 0 for none; 1 for a causal mask; F for blocks of F tokens, where a token sees its own block and earlier
            ones (F tokens of a frame: V-JEPA 2-AC, arXiv 2506.09985). It counts places in the sequence; with `visible`
            those among the visible patches, with `key_mask` those among all. Or an int32 or int64 tensor, `[T]`, `[N]`
            or `[B, N]`, that numbers the rows, e.g. the frame of each token where masked tokens are left out: key k
            counts for query q where `causal[k] <= causal[q]`. For self-attention only. Beyond 128 tokens, the kernels
            skip tiles that an integer masks entirely; a tensor skips none.
        check: verify offsets and indices on the device and wait for the answer. By default they are trusted on a GPU
            and verified on a CPU, where reading them costs nothing.
        impl: "auto" (Triton on a GPU; where no kernel fits, the plain definition and one warning), "triton" or
            "reference" (the plain definition).

    Returns:
        `[T, H, D]`, or the dense shapes described under `output`, in the dtype of the input.

    Saved for backward: only q, k and v up to 128 tokens, or 64 above head dim 128 and, with `rotary`, above head dim 64
    (float32: 64 tokens, and 16 above head dim 64); their backward is one launch. Longer sequences also save the output
    and the `[H, T]` log-sum-exps, and so do GPUs with less shared memory than an A100 (L4, L40, RTX) above 64 tokens at
    head dims above 64, and above 32 tokens at those above 128. The scheme for long sequences is that of
    FlashAttention-2 (arXiv 2307.08691). `torch.func.grad` works; `torch.vmap` needs impl="reference".

    Raises:
        ValueError: invalid shapes, dtypes, devices or options; raised before any launch.
        TypeError: an array or list where a tensor is due.
        RuntimeError: the gradients are differentiated again.

    Example::

        cu_seqlens = torch.tensor([0, 64, 101], device="cuda", dtype=torch.int32)
        qkv = torch.randn(101, 3, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = masked_attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=64)  # [101, 12, 64]

        qkv = torch.randn(8, 196, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
        visible = torch.rand(8, 196, device="cuda").argsort(1)[:, :64]
        out = masked_attention(qkv, visible=visible)  # [8, 64, 12, 64]

        # V-JEPA 2: the places of 4 x 7 x 7 patches
        grid = torch.cartesian_prod(*(torch.arange(n, device="cuda") for n in (4, 7, 7)))
        rotary = Rotary.of(axial_angles(grid, [20, 20, 20], tiled=True))
        out = masked_attention(qkv, visible=visible, rotary=rotary, causal=grid[:, 0])  # also block-causal by frame

        # a predictor: 5 and 3 mask tokens as queries, 64 and 37 context tokens as keys
        q, k, v = (torch.randn(n, 12, 64, device="cuda", dtype=torch.bfloat16) for n in (8, 101, 101))
        cu = torch.tensor([0, 5, 8], device="cuda", dtype=torch.int32)
        out = masked_attention(
            q, k, v, cu_seqlens=cu, max_seqlen=5, cu_seqlens_k=cu_seqlens, max_seqlen_k=64
        )  # [8, 12, 64]
    """
    inputs = Inputs(qkv, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, visible, key_mask, output, causal)
    check_arguments(inputs)
    tables = make_tables(inputs, rotary, rotary_k)
    check_bias(qkv_bias, inputs)
    if check or can_be_checked_at_once(inputs):
        check_contents(inputs)
    inputs = cast(inputs, autocast_dtype(qkv))
    layout, shape = make_layout(inputs), shape_of_result(inputs)
    q, k, v = rows(inputs)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernel, bias = use_triton("masked_attention", impl, q, why_no_kernel(q)), qkv_bias
    # the kernels take it that a vector added to all keys changes nothing, and that each query of a sequence has a key
    sums_hold = k is None and rotary is None and not (layout.order is not None and key_mask is not None)
    if bias is not None and not (kernel and sums_hold):
        q, k, v = _with_bias_gradient(q, k, v, bias)
        bias = None
    if kernel:
        out, _ = MaskedAttention.apply(q, k, v, bias, float(scale), tf32, *tables, *layout)
    else:
        out = attention_reference(q, k, v, layout, scale, tables)
    return out.unflatten(0, shape) if shape else out


def _with_bias_gradient(q, k, v, bias: torch.Tensor):
    if k is None:
        return BiasGradient.apply(q, bias.reshape(q.shape[1:])), None, None
    biases = bias.reshape(3, *q.shape[1:]).unbind(0)
    return tuple(BiasGradient.apply(x, b) for x, b in zip((q, k, v), biases, strict=True))
