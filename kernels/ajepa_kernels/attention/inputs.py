"""The arguments of a call of `masked_attention`, and their checks. Shapes and terms as in `__init__.py`."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch

from ajepa_kernels._arguments import check_tensors

OFFSET_DTYPES = (torch.int32, torch.int64)


class Inputs(NamedTuple):
    """The tensors of one call and their bounds. `k` None: `qkv` holds queries, keys and values."""

    qkv: torch.Tensor
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    max_seqlen: int | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_k: int | None = None
    visible: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    output: str = "packed"
    causal: int | torch.Tensor = 0


def is_packed(x: Inputs) -> bool:
    """True where the inputs hold the tokens of all sequences end to end, False where they hold `[B, N]` patches."""
    return x.cu_seqlens is not None and x.visible is None


def check_arguments(x: Inputs) -> None:
    """Check everything that is known without reading the device. Raises ValueError, or TypeError for what is no
    tensor."""
    named = {"cu_seqlens": x.cu_seqlens, "cu_seqlens_k": x.cu_seqlens_k, "visible": x.visible, "key_mask": x.key_mask}
    check_tensors("masked_attention", qkv=x.qkv, k=x.k, v=x.v, **named)
    _require(x.qkv is not None, "qkv must be a tensor")
    _check_operands(x)
    for name, tensor in named.items():
        _require(tensor is None or tensor.device == x.qkv.device, f"{name} must be on {x.qkv.device}")
    _check_offsets("cu_seqlens", x.cu_seqlens, x.max_seqlen)
    _check_offsets("cu_seqlens_k", x.cu_seqlens_k, x.max_seqlen_k)
    _require(x.max_seqlen_k is None or x.cu_seqlens_k is not None, "max_seqlen_k goes with cu_seqlens_k")
    _require(x.output in ("packed", "scattered"), f"output must be 'packed' or 'scattered', got {x.output!r}")
    if is_packed(x):
        _check_packed(x)
    else:
        _check_dense(x)
    _check_masks(x)
    _check_causal(x)


def check_bias(bias: torch.Tensor | None, x: Inputs) -> None:
    if bias is None:
        return
    check_tensors("masked_attention", qkv_bias=bias)
    _require(bias.is_floating_point(), "qkv_bias must be a floating-point tensor")
    H, D = x.qkv.shape[-2:]
    shapes = ((3, H, D), (3 * H * D,))
    _require(tuple(bias.shape) in shapes, f"qkv_bias must be {list(shapes[0])} or flat, got {list(bias.shape)}")
    _require(bias.device == x.qkv.device, f"qkv_bias must be on {x.qkv.device}")


def _check_operands(x: Inputs) -> None:
    q, k, v = x.qkv, x.k, x.v
    lead, heads = (1, "T") if is_packed(x) else (2, "B, N")
    if k is None:
        _require(v is None, "k and v must be given together")
        _require(q.dim() == lead + 3 and q.shape[lead] == 3, f"qkv must be [{heads}, 3, H, D], got {list(q.shape)}")
    else:
        _require(v is not None and k.shape == v.shape, "k and v must be given together, with equal shapes")
        assert v is not None
        _require(q.dim() == k.dim() == lead + 2, f"q, k, v must be [{heads}, H, D], got {list(q.shape)}")
        _require(q.shape[-2:] == k.shape[-2:], f"q and k must share H and D, got {list(q.shape)}, {list(k.shape)}")
        _require(is_packed(x) or q.shape[0] == k.shape[0], "q and k must share B")
        _require(q.dtype == k.dtype == v.dtype, f"q, k, v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        _require(q.device == k.device == v.device, "q, k, v must share a device")
    _require(q.shape[-1] > 0, f"head dim must be positive, got {list(q.shape)}")
    _require(q.is_floating_point(), f"floating point expected, got {q.dtype}")


def _check_offsets(name: str, offsets: torch.Tensor | None, max_seqlen: int | None) -> None:
    if offsets is not None:
        is_list = offsets.dim() == 1 and offsets.shape[0] >= 1 and offsets.dtype in OFFSET_DTYPES
        _require(is_list, f"{name} must be a 1-D integer tensor of R + 1 offsets, int32 or int64")
        _require(max_seqlen is not None, f"{name} needs its max_seqlen")
    _require(max_seqlen is None or _is_count(max_seqlen), f"the max_seqlen of {name} must be an int of 0 or more")


def _check_packed(x: Inputs) -> None:
    q, k, cu, cu_k = x.qkv, x.k, x.cu_seqlens, x.cu_seqlens_k
    assert cu is not None
    _require(x.output == "packed", "visible and output='scattered' are for dense inputs")
    if cu_k is not None:
        _require(k is not None and cu_k.shape == cu.shape, "cu_seqlens_k goes with k, one for each q")
    else:
        _require(k is None or k.shape[0] == q.shape[0], "k of another length than q needs cu_seqlens_k")


def _check_dense(x: Inputs) -> None:
    has_offsets = x.visible is not None and x.visible.dim() == 1
    _require(
        has_offsets == (x.cu_seqlens is not None),
        "visible must be boolean [B, N] or indices [B, V], or [T] with cu_seqlens",
    )
    _require(x.visible is None or x.visible.dim() in (1, 2), "visible must have one axis or two")
    _require(x.cu_seqlens_k is None, "cu_seqlens_k is for packed inputs")


def _check_masks(x: Inputs) -> None:
    q, k, visible, key_mask = x.qkv, x.k, x.visible, x.key_mask
    if visible is not None:
        _require(key_mask is None, "visible and key_mask exclude each other")
        _require(k is None or k.shape[:2] == q.shape[:2], "visible needs q and k of equal shapes")
        if visible.dtype == torch.bool:
            _require(visible.shape == q.shape[:2], f"a boolean visible must be {list(q.shape[:2])}")
        else:
            is_index = visible.dtype in OFFSET_DTYPES
            _require(
                is_index, f"visible must be boolean, or int32 or int64, got {visible.dtype}; a mask: visible.bool()"
            )
            _require(visible.dim() == 1 or visible.shape[0] == q.shape[0], "visible must have a row for each sample")
    if key_mask is not None:
        keys = (q if k is None else k).shape[: 1 if is_packed(x) else 2]
        _require(key_mask.dtype == torch.bool and key_mask.shape == keys, f"key_mask must be boolean {list(keys)}")


def _check_causal(x: Inputs) -> None:
    q, k, order = x.qkv, x.k, x.causal
    if isinstance(order, numbers.Real | torch.SymInt):
        _require(_is_count(order), f"causal must be an int of 0 or more, got {order!r}")
        if not order:
            return
    else:
        check_tensors("masked_attention", causal=order)
        _require(isinstance(order, torch.Tensor), "causal must be an int or a tensor; 0 for none")
        assert isinstance(order, torch.Tensor)
        tokens = q.shape[: 1 if is_packed(x) else 2]
        fits = order.shape == tokens or (not is_packed(x) and order.shape == tokens[1:])
        _require(fits, f"causal must have a number for each row, {list(tokens)}, got {list(order.shape)}")
        _require(order.dtype in OFFSET_DTYPES, f"a causal tensor must be int32 or int64, got {order.dtype}")
        _require(order.device == q.device, f"causal must be on {q.device}")
    same = x.cu_seqlens_k is None and (k is None or k.shape == q.shape)
    _require(same, "causal is for self-attention, where row i of q and of k are the same token")


def check_contents(x: Inputs) -> None:
    """Check the offsets and indices themselves. Reads the device, so the host waits for it. Raises ValueError."""
    flat = x.visible is not None and x.visible.dim() == 1
    tokens = len(x.visible if x.visible is not None and flat else x.qkv)
    _check_sequences("cu_seqlens", x.cu_seqlens, x.max_seqlen, tokens)
    _check_sequences("cu_seqlens_k", x.cu_seqlens_k, x.max_seqlen_k, 0 if x.k is None else len(x.k))
    if x.visible is not None and x.visible.numel():
        _check_visible(x.visible, x.qkv, x.max_seqlen)


def _check_sequences(name: str, offsets: torch.Tensor | None, max_seqlen: int | None, tokens: int) -> None:
    if offsets is None:
        return
    lengths = offsets.diff()
    _require(int(offsets[0]) == 0 and bool((lengths >= 0).all()), f"{name} must start at 0 and never decrease")
    _require(int(offsets[-1]) == tokens, f"{name} must end at the number of tokens, {tokens}")
    longest = int(lengths.max()) if len(lengths) else 0
    _require(longest <= (max_seqlen or 0), f"{name} has a sequence longer than max_seqlen {max_seqlen}")


def _check_visible(visible: torch.Tensor, q: torch.Tensor, max_seqlen: int | None) -> None:
    if visible.dtype == torch.bool:
        longest = int(visible.sum(1).max())
        _require(max_seqlen is None or longest <= max_seqlen, f"visible has a sample of more than {max_seqlen}")
        return
    patches = q.shape[0] * q.shape[1] if visible.dim() == 1 else q.shape[1]
    _require(int(visible.min()) >= 0 and int(visible.max()) < patches, "an index of visible is out of range")
    _require(bool((visible.sort().values.diff() > 0).all()), "visible names a patch twice")


def can_be_checked_at_once(x: Inputs) -> bool:
    """True where reading the offsets or indices costs nothing: real tensors (not traced, not fake) on a CPU."""
    contents = x.cu_seqlens if x.visible is None else x.visible
    if contents is None or torch.compiler.is_compiling():
        return False
    return contents.device.type == "cpu" and type(contents) is torch.Tensor


def _is_count(n) -> bool:
    integers: tuple = (numbers.Integral, torch.SymInt)
    return isinstance(n, integers) and n >= 0


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"masked_attention: {message}")
