"""The JEPA loss: distance between predicted latents and the target encoder's at the masked patches.

Shapes: T masked tokens, M rows of latents, C width.
"""

import torch
import torch.nn.functional as F

KINDS = ("l2", "smooth_l1", "cosine")


def latent_l2_loss_reference(
    prediction_TC: torch.Tensor,
    latents_MC: torch.Tensor,
    index_T: torch.Tensor,
    kind: str = "l2",
    normalize: bool = True,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Plain PyTorch definition of `latent_l2_loss`, in float32."""
    prediction, target = prediction_TC.float(), latents_MC.detach().index_select(0, index_T).float()
    if normalize:
        target = F.layer_norm(target, target.shape[-1:], eps=eps)
    if prediction.numel() == 0:
        return prediction.sum()  # zero, and still part of the graph
    if kind == "l2":
        return F.mse_loss(prediction, target)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(prediction, target)
    return (2 - 2 * F.cosine_similarity(prediction, target, dim=-1, eps=eps)).mean()


def latent_l2_loss(
    prediction_TC: torch.Tensor,
    latents_MC: torch.Tensor,
    index_T: torch.Tensor,
    *,
    kind: str = "l2",
    normalize: bool = True,
    eps: float = 1e-6,
    impl: str = "auto",
) -> torch.Tensor:
    """Mean distance between predictions and layer-normalised targets gathered at `index_T`.

    `l2`: mean over tokens and channels of (p - t)^2; `smooth_l1`: Huber with threshold 1; `cosine`: mean over tokens
    of 2 - 2 cos(p, t). t = layer_norm(latents[index]) without affine parameters (I-JEPA, arXiv 2301.08243).

    Args:
        prediction_TC: predictor's output, `[T, C]`. The only argument that receives a gradient.
        latents_MC: target encoder's output for every patch of the batch, `[M, C]`.
        index_T: int64 `[T]`, the row of `latents_MC` that each prediction is about.
        kind: "l2", "smooth_l1" or "cosine".
        normalize: layer-normalise the targets.
        impl: "auto" or "reference".

    Returns:
        A float32 scalar; zero where T is 0.
    """
    if prediction_TC.dim() != 2 or latents_MC.dim() != 2 or prediction_TC.shape[1] != latents_MC.shape[1]:
        raise ValueError(
            f"latent_l2_loss: prediction [T, C] and latents [M, C] must share C, "
            f"got {list(prediction_TC.shape)} and {list(latents_MC.shape)}"
        )
    if index_T.shape != prediction_TC.shape[:1]:
        raise ValueError(f"latent_l2_loss: index must be [{len(prediction_TC)}], got {list(index_T.shape)}")
    if kind not in KINDS:
        raise ValueError(f"latent_l2_loss: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if impl not in ("auto", "reference"):
        raise ValueError(f"latent_l2_loss: impl must be 'auto' or 'reference', got {impl!r}")
    return latent_l2_loss_reference(prediction_TC, latents_MC, index_T, kind, normalize, eps)
