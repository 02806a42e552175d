"""Attention in which only visible patches take part.

Shapes: R sequences, T packed tokens (all sequences end to end), H heads, D head dim, S longest sequence.
"""

import torch
import torch.nn.functional as F


def masked_attention_reference(
    qkv_T3HD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, scale: float | None = None
) -> torch.Tensor:
    """Plain PyTorch definition of `masked_attention`: pad to the longest sequence, SDPA with a key mask, unpad."""
    T, _, H, D = qkv_T3HD.shape
    R, S = cu_seqlens.numel() - 1, max_seqlen
    if T == 0:
        return qkv_T3HD.new_empty(0, H, D)
    if R * S == T:  # every sequence has the full length: no padding, no mask
        q, k, v = qkv_T3HD.view(R, S, 3, H, D).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(T, H, D)
    cu = cu_seqlens.long()
    lengths = cu.diff()
    sequence = torch.repeat_interleave(torch.arange(R, device=cu.device), lengths, output_size=T)
    slot = sequence * S + torch.arange(T, device=cu.device) - cu[sequence]
    padded = qkv_T3HD.new_zeros(R * S, 3, H, D).index_copy(0, slot, qkv_T3HD)
    q, k, v = padded.view(R, S, 3, H, D).permute(2, 0, 3, 1, 4)
    keys = (torch.arange(S, device=cu.device) < lengths[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, scale=scale)
    return out.transpose(1, 2).reshape(R * S, H, D)[slot]


def masked_attention(
    qkv_T3HD: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scale: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """softmax(scale q k^T) v within each packed sequence, without a mask between tokens.

    Args:
        qkv_T3HD: queries, keys, values of the visible patches only, `[T, 3, H, D]`, floating point.
        cu_seqlens: int32 or int64 `[R + 1]`, where sequence r holds tokens `cu_seqlens[r]:cu_seqlens[r + 1]`.
        max_seqlen: an upper bound on the sequence lengths, known to the host (no device sync).
        scale: of the scores; 1 / sqrt(D) by default.
        impl: "auto" or "reference".

    Returns:
        `[T, H, D]`, dtype of the input.

    Raises:
        ValueError: a shape, dtype or `impl` that cannot be.
    """
    if qkv_T3HD.dim() != 4 or qkv_T3HD.shape[1] != 3:
        raise ValueError(f"masked_attention: qkv must be [T, 3, H, D], got {list(qkv_T3HD.shape)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError("masked_attention: cu_seqlens must be a 1-D integer tensor of R + 1 offsets")
    if impl not in ("auto", "reference"):
        raise ValueError(f"masked_attention: impl must be 'auto' or 'reference', got {impl!r}")
    return masked_attention_reference(qkv_T3HD, cu_seqlens, max_seqlen, scale)
