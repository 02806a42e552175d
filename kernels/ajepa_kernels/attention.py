"""Attention in which only visible patches take part.

Shapes: B samples, N patches, V visible; R sequences, T packed tokens (all sequences end to end), S longest sequence,
H heads, D head dim. A *slot* is a position in the list of tokens that the sequences run over, a *row* the place of
that token in memory: the same number, unless the layout gathers.
"""

from __future__ import annotations

import numbers

import torch

from ajepa_kernels._attention_layout import attention_reference, dense_layout, packed_layout
from ajepa_kernels._attention_ops import HEAD_DIMS, MaskedAttention
from ajepa_kernels._autograd import autocast_dtype
from ajepa_kernels._triton import use_triton


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"masked_attention: {message}")


def _is_count(n) -> bool:
    integers: tuple = (numbers.Integral, torch.SymInt)
    return isinstance(n, integers) and n >= 0


def _check_arguments(q, k, v, packed, cu, max_seqlen, cu_k, max_seqlen_k, visible, key_mask, output) -> None:
    """What can be known without reading the device."""
    named = {"cu_seqlens": cu, "cu_seqlens_k": cu_k, "visible": visible, "key_mask": key_mask}
    for name, x in {"qkv": q, "k": k, "v": v, **named}.items():
        _require(isinstance(x, torch.Tensor) or (x is None and name != "qkv"), f"{name} must be a tensor")
    lead, heads = (1, "T") if packed else (2, "B, N")
    if k is None:
        _require(v is None, "k and v must be given together")
        _require(q.dim() == lead + 3 and q.shape[lead] == 3, f"qkv must be [{heads}, 3, H, D], got {list(q.shape)}")
    else:
        _require(v is not None and k.shape == v.shape, "k and v must be given together, with equal shapes")
        _require(q.dim() == k.dim() == lead + 2, f"q, k, v must be [{heads}, H, D], got {list(q.shape)}")
        _require(q.shape[-2:] == k.shape[-2:], f"q and k must share H and D, got {list(q.shape)}, {list(k.shape)}")
        _require(packed or q.shape[0] == k.shape[0], "q and k must share B")
        _require(q.dtype == k.dtype == v.dtype, f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        _require(q.device == k.device == v.device, "q, k, v must share a device")
    _require(q.shape[-1] > 0, f"head dim must be positive, got {list(q.shape)}")
    _require(q.is_floating_point(), f"floating point expected, got {q.dtype}")
    for name, x in named.items():
        _require(x is None or x.device == q.device, f"{name} must be on {q.device}")
    for name, x, bound in (("cu_seqlens", cu, max_seqlen), ("cu_seqlens_k", cu_k, max_seqlen_k)):
        if x is not None:
            offsets = x.dim() == 1 and x.shape[0] >= 1 and x.dtype in (torch.int32, torch.int64)
            _require(offsets, f"{name} must be a 1-D integer tensor of R + 1 offsets, int32 or int64")
            _require(bound is not None, f"{name} needs its max_seqlen")
        _require(bound is None or _is_count(bound), f"the max_seqlen of {name} must be an int of 0 or more")
    _require(max_seqlen_k is None or cu_k is not None, "max_seqlen_k goes with cu_seqlens_k")
    _require(output in ("packed", "scattered"), f"output must be 'packed' or 'scattered', got {output!r}")
    if packed:
        _require(visible is None and output == "packed", "visible and output='scattered' are for dense inputs")
        _require(cu_k is None or (k is not None and cu_k.shape == cu.shape), "cu_seqlens_k goes with k, one for each q")
        _require(
            cu_k is not None or k is None or k.shape[0] == q.shape[0], "k of another length than q needs cu_seqlens_k"
        )
    else:
        rows = visible is not None and visible.dim() == 1
        _require(rows == (cu is not None), "visible must be boolean [B, N] or indices [B, V], or [T] with cu_seqlens")
        _require(visible is None or rows or visible.dim() == 2, "visible must have one axis or two")
        _require(cu_k is None, "cu_seqlens_k is for packed inputs")
    if visible is not None:
        _require(key_mask is None, "visible and key_mask exclude each other")
        _require(k is None or k.shape[:2] == q.shape[:2], "visible needs q and k of equal shapes")
        if visible.dtype == torch.bool:
            _require(visible.shape == q.shape[:2], f"a boolean visible must be {list(q.shape[:2])}")
        else:
            index = visible.dtype in (torch.int32, torch.int64)
            _require(index, f"visible must be boolean, or int32 or int64, got {visible.dtype}; a mask: visible.bool()")
            _require(visible.dim() == 1 or visible.shape[0] == q.shape[0], "visible must have a row for each sample")
    if key_mask is not None:
        want = (q if k is None else k).shape[:lead]
        _require(key_mask.dtype == torch.bool and key_mask.shape == want, f"key_mask must be boolean {list(want)}")


def _check_contents(q, k, cu, max_seqlen, cu_k, max_seqlen_k, visible) -> None:
    """What only the device knows. Reads it, so waits for it."""
    flat = visible is not None and visible.dim() == 1
    for name, offsets, bound, slots in (
        ("cu_seqlens", cu, max_seqlen, len(visible) if flat else len(q)),
        ("cu_seqlens_k", cu_k, max_seqlen_k, 0 if k is None else len(k)),
    ):
        if offsets is not None:
            lengths = offsets.diff()
            _require(int(offsets[0]) == 0 and bool((lengths >= 0).all()), f"{name} must start at 0 and never decrease")
            _require(int(offsets[-1]) == slots, f"{name} must end at the number of tokens, {slots}")
            longest = int(lengths.max()) if len(lengths) else 0
            _require(longest <= bound, f"{name} has a sequence longer than max_seqlen {bound}")
    if visible is None or not visible.numel():
        return
    if visible.dtype == torch.bool:
        longest = int(visible.sum(1).max())
        _require(max_seqlen is None or longest <= max_seqlen, f"visible has a sample of more than {max_seqlen}")
        return
    rows = q.shape[0] * q.shape[1] if flat else q.shape[1]
    _require(int(visible.min()) >= 0 and int(visible.max()) < rows, "an index of visible is out of range")
    _require(bool((visible.sort().values.diff() > 0).all()), "visible names a patch twice")


def _is_free_to_read(x: torch.Tensor) -> bool:
    """On a CPU, with numbers in it: neither traced nor fake."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and type(x) is torch.Tensor


def masked_attention_reference(
    qkv_T3HD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None = None
) -> torch.Tensor:
    """Plain PyTorch definition of packed `masked_attention`: pad to the longest, SDPA with a key mask, unpad."""
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
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    output: str = "packed",
    scale: float | None = None,
    tf32: bool = False,
    check: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """softmax(scale q k^T) v among the visible patches of each sample; the others are never read.

    *Packed*: `qkv [T, 3, H, D]` holds visible patches only, sequence r being tokens `cu_seqlens[r]:cu_seqlens[r + 1]`
    (equal offsets: an empty sequence). *Dense*: `qkv [B, N, 3, H, D]` holds every patch and `visible` says which take
    part, rows being gathered inside the kernel. In place of `qkv`: `q, k, v`, each without the axis of 3.

    Args:
        qkv: queries, keys, values; or the queries. bfloat16, float16 or float32 on the GPU; under autocast cast to its
            dtype. Kernels exist for head dims 32, 64, 96, 128.
        k, v: keys and values apart from the queries.
        cu_seqlens: int32 or int64 `[R + 1]`, from 0 to T without decreasing.
        max_seqlen: bound on the sequence lengths, known to the host. Up to 128, all scores stay on chip. Optional for a
            boolean `visible`, whose counts the host does not know: N otherwise.
        visible: dense inputs only. Boolean `[B, N]`; or indices `[B, V]` of V patches for each sample; or, with
            `cu_seqlens`, indices `[T]` into the B * N flattened patches. An index may appear once. None: all.
            Booleans are sorted at each call: indices spare a model of many layers that.
        key_mask: boolean `[T]` or `[B, N]`. All patches are queries, but only those marked True are keys (A-JEPA's
            regularised masking, arXiv 2311.15830). A query without any key gives zero.
        cu_seqlens_k, max_seqlen_k: packed keys of other lengths than the queries (cross-attention).
        output: where `visible` is given, "packed" returns visible patches only, `[B, V, H, D]` or `[T, H, D]`;
            "scattered" returns `[B, N, H, D]`, zero where not visible. A boolean `visible` with "packed" reads T from
            the device: the host waits, and a CUDA graph cannot capture it. Indices with either output, and booleans
            with "scattered", never wait.
        scale: of the scores; 1 / sqrt(D) by default.
        tf32: let float32 products round their operands to tf32. Otherwise they are true float32.
        check: verify offsets and indices on the device and wait for the answer (ValueError). Otherwise they are
            trusted, but on a CPU, where it costs nothing.
        impl: "auto" (Triton on a GPU where it can, aloud once where it cannot), "triton" or "reference".

    Returns:
        `[T, H, D]`, or dense as said above; dtype of the input.

    Saved for backward: q, k, v alone up to 128 tokens (float32: 64, and 16 above head dim 64), whose backward is one
    launch; the output and `[H, T]` log-sum-exps beyond, and on GPUs with less shared memory than an A100 (L4, L40, RTX)
    above 64 tokens at head dims 96 and 128. The scheme for long sequences is FlashAttention-2's (arXiv 2307.08691).
    `torch.func.grad` works, `torch.vmap` only with impl="reference".

    Raises:
        ValueError: shapes, dtypes, devices or options that cannot be, before any launch.
        RuntimeError: differentiating the gradients again.

    Example::

        cu_seqlens = torch.tensor([0, 64, 101], device="cuda", dtype=torch.int32)
        qkv = torch.randn(101, 3, 12, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        out = masked_attention(qkv, cu_seqlens=cu_seqlens, max_seqlen=64)  # [101, 12, 64]

        qkv = torch.randn(8, 196, 3, 12, 64, device="cuda", dtype=torch.bfloat16)
        visible = torch.rand(8, 196, device="cuda").argsort(1)[:, :64]
        out = masked_attention(qkv, visible=visible)  # [8, 64, 12, 64]
    """
    q = qkv
    packed = cu_seqlens is not None and visible is None
    _check_arguments(q, k, v, packed, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, visible, key_mask, output)
    contents = cu_seqlens if visible is None else visible
    if check or (contents is not None and _is_free_to_read(contents)):
        _check_contents(q, k, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, visible)
    dtype = autocast_dtype(q)
    q, k, v = q.to(dtype), None if k is None else k.to(dtype), None if v is None else v.to(dtype)
    shape: tuple = ()
    if packed:
        layout = packed_layout(q, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, key_mask)
    else:
        scatter = output == "scattered" and visible is not None
        layout = dense_layout(q, q if k is None else k, visible, cu_seqlens, max_seqlen, key_mask, scatter)
        if visible is None or scatter:
            shape = tuple(q.shape[:2])
        elif visible.dim() == 2 and visible.dtype != torch.bool:
            shape = tuple(visible.shape)
        q, k, v = q.flatten(0, 1), None if k is None else k.flatten(0, 1), None if v is None else v.flatten(0, 1)
    unsupported = ""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        unsupported = f"no kernel for {q.dtype}"
    elif q.shape[-1] not in HEAD_DIMS:
        unsupported = f"no kernel for head dim {q.shape[-1]}, only {', '.join(map(str, HEAD_DIMS))}"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if use_triton("masked_attention", impl, q, unsupported):
        out, _ = MaskedAttention.apply(q, k, v, float(scale), tf32, *layout)
    else:
        q, k, v = q.unbind(1) if k is None else (q, k, v)
        out = attention_reference(q, k, v, layout, scale)
    return out.unflatten(0, shape) if shape else out
