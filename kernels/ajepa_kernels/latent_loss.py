"""The JEPA loss: the distance between predicted latents and the target encoder's latents at the masked patches.

Shapes: T masked tokens, M rows of latents, C width.
"""

# Triton kernels build tuples inside static loops, which mypy cannot type.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import torch
import torch.nn.functional as F

from ajepa_kernels._autograd import Function, first_order
from ajepa_kernels._chunks import MAX_WIDTH, centre, chunk, row_chunks
from ajepa_kernels._triton import dense_rows, jit, launch, multiprocessors, register, tl, use_triton

KINDS = ("l2", "smooth_l1", "cosine")
REDUCTIONS = ("mean", "sum", "none")


# --- forward --------------------------------------------------------------------------------------------------------


@jit
def _latent_l2_loss_fwd_kernel(
    prediction_ptr, latents_ptr, index_ptr, loss_ptr, grad_ptr, stride_p, stride_l, T, grad_factor, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Computes each token's distance and its gradient times `grad_factor`. The normalised target stays on chip."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < T
    index = tl.load(index_ptr + row, mask=valid, other=0).to(tl.int64)
    predictions = ()
    for i in tl.static_range(COUNT):
        c, mask = chunk(i, valid, C, WIDTH, VECTOR)
        predictions += (tl.load(prediction_ptr + row[:, None] * stride_p + c, mask=mask, other=0.0),)
    # The barrier keeps the compiler from moving the loads above below the sums over the targets.
    tl.debug_barrier()
    targets = ()
    for i in tl.static_range(COUNT):
        c, mask = chunk(i, valid, C, WIDTH, VECTOR)
        targets += (tl.load(latents_ptr + index[:, None] * stride_l + c, mask=mask, other=0.0).to(tl.float32),)
    if NORMALIZE:
        centred, _, rstd = centre(targets, eps, C, WIDTH, COUNT, VECTOR)
        targets = ()
        for i in tl.static_range(COUNT):
            targets += (centred[i] * rstd[:, None],)
    zeros = tl.zeros([ROWS, WIDTH], tl.float32)
    grads = ()
    if KIND == "cosine":
        dots = zeros
        squares_p = zeros
        squares_t = zeros
        for i in tl.static_range(COUNT):
            p = predictions[i].to(tl.float32)
            dots += p * targets[i]
            squares_p += p * p
            squares_t += targets[i] * targets[i]
        dot, square_p, square_t = tl.reduce((dots, squares_p, squares_t), 1, _add_triples)
        norm_p, norm_t = tl.sqrt_rn(square_p), tl.sqrt_rn(square_t)
        length_p, length_t = tl.maximum(norm_p, eps), tl.maximum(norm_t, eps)
        cosine = dot / (length_p * length_t)
        loss = 2.0 - 2.0 * cosine
        # below eps the length is clamped to a constant, so the gradient has no term along the prediction
        prediction_factor = tl.where(norm_p > eps, cosine / (length_p * length_p), 0.0) * (2.0 * grad_factor)
        target_factor = (-2.0 * grad_factor) / (length_p * length_t)
        for i in tl.static_range(COUNT):
            p = predictions[i].to(tl.float32)
            grads += (targets[i] * target_factor[:, None] + p * prediction_factor[:, None],)
    else:
        total = zeros
        for i in tl.static_range(COUNT):
            d = predictions[i].to(tl.float32) - targets[i]
            if KIND == "smooth_l1":
                clipped = tl.minimum(tl.maximum(d, -1.0), 1.0)
                total += clipped * (d - 0.5 * clipped)
                grads += (clipped * (grad_factor / C),)
            else:
                total += d * d
                grads += (d * (2.0 * grad_factor / C),)
        loss = tl.sum(total, 1) / C
    tl.store(loss_ptr + row, loss, mask=valid)
    if grad_ptr is not None:
        for i in tl.static_range(COUNT):
            c, mask = chunk(i, valid, C, WIDTH, VECTOR)
            tl.store(grad_ptr + row[:, None] * C + c, grads[i].to(grad_ptr.dtype.element_ty), mask=mask)


@jit
def _add_triples(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


def _latent_l2_loss_fwd_fake(prediction, latents, index, kind, normalize, eps, grad_factor, with_grad):
    (T, C), n = prediction.shape, prediction.shape[0] if with_grad else 0
    return prediction.new_empty(T, dtype=torch.float32), prediction.new_empty(n, C)


@register(
    "latent_l2_loss_fwd(Tensor prediction, Tensor latents, Tensor index, str kind, bool normalize, float eps, "
    "float grad_factor, bool with_grad) -> (Tensor loss, Tensor grad)",
    _latent_l2_loss_fwd_fake,
)
def _latent_l2_loss_fwd(prediction, latents, index, kind, normalize, eps, grad_factor, with_grad):
    """Returns each token's float32 loss `[T]` and, if `with_grad`, its gradient times `grad_factor` `[T, C]`."""
    T, C = prediction.shape
    prediction, latents = dense_rows(prediction), dense_rows(latents)
    loss = torch.empty(T, dtype=torch.float32, device=prediction.device)
    grad = torch.empty(T if with_grad else 0, C, dtype=prediction.dtype, device=prediction.device)
    chunks, config = row_chunks("latent_l2_loss_fwd", prediction, latents)
    launch(
        _latent_l2_loss_fwd_kernel, -(-T // config.rows), prediction,
        prediction, latents, index.contiguous(), loss, grad if with_grad else None,
        prediction.stride(0), latents.stride(0), T, grad_factor, eps, C, *chunks, config.rows, kind, normalize,
        num_warps=config.num_warps,
    )  # fmt: skip
    return loss, grad


# --- backward -------------------------------------------------------------------------------------------------------


@jit
def _latent_l2_loss_bwd_kernel(
    grad_ptr, upstream_ptr, factor, T, programs, PER_TOKEN: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Scales the saved gradient with few programs. If the factor is 1, each of them only reads one number."""
    n = T.to(tl.int64) * C
    common = 0.0 if PER_TOKEN else tl.load(upstream_ptr).to(tl.float32) * factor
    if common != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, programs.to(tl.int64) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            scale = common
            if PER_TOKEN:
                scale = tl.load(upstream_ptr + offsets // C, mask=offsets < n, other=0.0).to(tl.float32) * factor
            grad = tl.load(grad_ptr + offsets, mask=offsets < n, other=0.0).to(tl.float32)
            tl.store(grad_ptr + offsets, (grad * scale).to(grad_ptr.dtype.element_ty), mask=offsets < n)


@register("latent_l2_loss_bwd(Tensor(a!) grad, Tensor upstream, float factor) -> ()", lambda *args: None)
def _latent_l2_loss_bwd(grad, upstream, factor):
    """Multiplies grad `[T, C]` in place by factor and by upstream, which is a scalar or has one value per token."""
    programs = min(8 * multiprocessors(grad), -(-grad.numel() // 4096))
    launch(
        _latent_l2_loss_bwd_kernel, programs, grad, grad, upstream.contiguous(), factor, grad.shape[0], programs,
        upstream.dim() == 1, grad.shape[1], 4096, num_warps=4,
    )  # fmt: skip
    torch.autograd.graph.increment_version(grad)


def _factors(prediction: torch.Tensor, reduction: str) -> tuple[float, float, float]:
    """Returns the factors of the loss, of the gradient in the forward pass, and of the gradient in the backward pass.

    A float16 gradient divided by millions of tokens would underflow, so the division waits until backward, which also
    multiplies by the loss scale.
    """
    mean = 1.0 / max(prediction.shape[0], 1) if reduction == "mean" else 1.0
    return (mean, 1.0, mean) if prediction.dtype == torch.float16 else (mean, mean, 1.0)


class _LatentL2Loss(Function):
    """Returns the loss and the saved gradient, which is an output so that differentiating it again raises an error."""

    @staticmethod
    def forward(prediction, latents, index, kind, normalize, eps, reduction, with_grad):
        mean, factor, _ = _factors(prediction, reduction)
        loss, grad = torch.ops.ajepa.latent_l2_loss_fwd(
            prediction, latents, index, kind, normalize, eps, factor, with_grad
        )
        return loss if reduction == "none" else loss.sum() * mean, grad

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, ctx.factor = _factors(inputs[0], inputs[6])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    @first_order
    def backward(ctx, saved, upstream, _):
        (grad,) = saved
        if upstream is None:
            grad = None
        elif torch.compiler.is_compiling():  # torch.compile fuses this product, but would copy grad for the op
            grad = (grad.float() * (upstream * ctx.factor)[..., None]).to(grad.dtype)
        else:  # in place, so autograd's version check refuses a second backward through the same graph
            torch.ops.ajepa.latent_l2_loss_bwd(grad, upstream, ctx.factor)
        return grad, *[None] * 7


# --- public ---------------------------------------------------------------------------------------------------------


def _check_options(kind: str, reduction: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"latent_l2_loss: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"latent_l2_loss: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def latent_l2_loss_reference(
    prediction_TC: torch.Tensor,
    latents_MC: torch.Tensor,
    index_T: torch.Tensor,
    kind: str = "l2",
    normalize: bool = True,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    """Plain PyTorch definition of `latent_l2_loss`, in float32 (float64 for float64 inputs)."""
    _check_options(kind, reduction)
    dtype = torch.promote_types(prediction_TC.dtype, torch.float32)
    prediction, target = prediction_TC.to(dtype), latents_MC.detach().index_select(0, index_T).to(dtype)
    if normalize:
        target = F.layer_norm(target, target.shape[-1:], eps=eps)
    if kind == "l2":
        loss = F.mse_loss(prediction, target, reduction="none").mean(-1)
    elif kind == "smooth_l1":
        loss = F.smooth_l1_loss(prediction, target, reduction="none").mean(-1)
    else:
        loss = 2 - 2 * F.cosine_similarity(prediction, target, dim=-1, eps=eps)
    if reduction == "none":
        return loss
    return loss.sum() / max(loss.shape[0], 1) if reduction == "mean" else loss.sum()


def latent_l2_loss(
    prediction_TC: torch.Tensor,
    latents_MC: torch.Tensor,
    index_T: torch.Tensor,
    *,
    kind: str = "l2",
    normalize: bool = True,
    eps: float = 1e-6,
    reduction: str = "mean",
    check: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Distance between predictions and layer-normalised targets gathered at `index_T`.

    With t = layer_norm(latents[index]) without affine parameters (I-JEPA, arXiv 2301.08243), the distance of a token is
    `l2`: mean over channels of (p - t)^2; `smooth_l1`: mean of Huber with threshold 1; `cosine`: 2 - 2 cos(p, t).

    Args:
        prediction_TC: output of the predictor, `[T, C]`. Only this argument receives a gradient. The kernel takes C up
            to 4,096 in bfloat16, float16 or float32, and computes in float32.
        latents_MC: output of the target encoder for every patch of the batch, `[M, C]`.
        index_T: int64 or int32 `[T]`, the row of `latents_MC` that is the target of each prediction.
        kind: "l2", "smooth_l1" or "cosine".
        normalize: layer-normalise the targets.
        eps: added to the variance in the layer norm; also the smallest length that `cosine` divides by.
        reduction: "mean" or "sum" over tokens, or "none".
        check: raise ValueError if an index is out of range, which makes the host wait for the device. Without it,
            indices are trusted.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.

    Returns:
        A float32 scalar, which is zero if T is 0; with reduction "none", `[T]`.

    Saved for backward: the gradient `[T, C]`, computed in the forward pass, in the dtype of the prediction. Backward
    scales it in place, unless the incoming gradient is 1. A second backward needs a second forward.
    `torch.func.grad` works; `torch.vmap` needs impl="reference".

    Raises:
        ValueError: shapes, dtypes or options are invalid; raised before any launch.
        RuntimeError: the gradient is differentiated again.

    Example::

        prediction = torch.randn(4096, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        latents = torch.randn(16384, 768, device="cuda", dtype=torch.bfloat16)
        masked = torch.randperm(16384, device="cuda")[:4096]
        latent_l2_loss(prediction, latents, masked).backward()
    """
    if prediction_TC.dim() != 2 or latents_MC.dim() != 2 or prediction_TC.shape[1] != latents_MC.shape[1]:
        raise ValueError(
            f"latent_l2_loss: prediction [T, C] and latents [M, C] must share C, "
            f"got {list(prediction_TC.shape)} and {list(latents_MC.shape)}"
        )
    if not (prediction_TC.is_floating_point() and latents_MC.is_floating_point()):
        raise ValueError("latent_l2_loss: prediction and latents must be floating point")
    if index_T.shape != prediction_TC.shape[:1]:
        raise ValueError(f"latent_l2_loss: index must be [{len(prediction_TC)}], got {list(index_T.shape)}")
    if index_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"latent_l2_loss: index must be int32 or int64, got {index_T.dtype}")
    if not prediction_TC.device == latents_MC.device == index_T.device:
        raise ValueError("latent_l2_loss: prediction, latents and index must share a device")
    _check_options(kind, reduction)
    if check and len(index_T) and not 0 <= int(index_T.min()) <= int(index_T.max()) < len(latents_MC):
        raise ValueError(f"latent_l2_loss: an index is outside the {len(latents_MC)} rows of latents")
    unsupported = ""
    if not {prediction_TC.dtype, latents_MC.dtype} <= {torch.float32, torch.float16, torch.bfloat16}:
        unsupported = f"no kernel for {prediction_TC.dtype} and {latents_MC.dtype}"
    elif not 1 <= prediction_TC.shape[1] <= MAX_WIDTH:
        unsupported = f"no kernel for width {prediction_TC.shape[1]}, only up to {MAX_WIDTH}"
    if use_triton("latent_l2_loss", impl, prediction_TC, unsupported):
        with_grad = prediction_TC.requires_grad and torch.is_grad_enabled()
        return _LatentL2Loss.apply(
            prediction_TC, latents_MC.detach(), index_T, kind, normalize, eps, reduction, with_grad
        )[0]
    return latent_l2_loss_reference(prediction_TC, latents_MC, index_T, kind, normalize, eps, reduction)
