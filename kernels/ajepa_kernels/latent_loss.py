"""The JEPA loss: the distance between predicted latents and the target encoder's latents at the masked patches.

Shapes: T masked tokens, M rows of latents, C width; or B samples of P patches, with K masks of N tokens each.
"""

# Triton kernels build tuples inside static loops, which mypy cannot type.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._autograd import Function, first_order
from ajepa_kernels._chunks import MAX_WIDTH, centre, chunk, row_chunks
from ajepa_kernels._triton import dense_rows, jit, launch, multiprocessors, register, tl, use_triton

KINDS = ("l2", "smooth_l1", "cosine", "lp")
REDUCTIONS = ("mean", "sum", "none")


# --- forward --------------------------------------------------------------------------------------------------------


@jit
def _latent_l2_loss_fwd_kernel(
    prediction_ptr, latents_ptr, index_ptr, weights_ptr, loss_ptr, grad_ptr, stride_p, stride_l, stride_b,
    T, rows, samples, grad_factor, eps,
    C: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, VECTOR: tl.constexpr, ROWS: tl.constexpr,
    KIND: tl.constexpr, NORMALIZE: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """Computes each token's distance and its gradient times `grad_factor`. The normalised target stays on chip.

    With `stride_b`, the latents have samples, and `rows` successive tokens belong to one; after the last, the first
    follows again.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < T
    index = tl.load(index_ptr + row, mask=valid, other=0).to(tl.int64)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row, mask=valid, other=0.0).to(tl.float32)
    if stride_b is not None:
        latents_ptr += ((row.to(tl.int32) // rows % samples).to(tl.int64) * stride_b)[:, None]
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
                clipped = tl.minimum(tl.maximum(d, -BETA), BETA)
                total += clipped * (d - 0.5 * clipped)
                grads += (clipped * (grad_factor / (BETA * C)),)
            elif KIND == "l1":
                total += tl.abs(d)
                slope = grad_factor / C
                grads += (tl.where(d > 0.0, slope, tl.where(d < 0.0, -slope, d)),)  # 0 stays 0, and NaN stays NaN
            else:
                total += d * d
                grads += (d * ((2.0 if KIND == "l2" else 1.0) * grad_factor / C),)
        loss = tl.sum(total, 1) / (BETA * C if KIND == "smooth_l1" else 2.0 * C if KIND == "half_l2" else C)
    if weights_ptr is not None:
        loss *= weight
    tl.store(loss_ptr + row, loss, mask=valid)
    if grad_ptr is not None:
        for i in tl.static_range(COUNT):
            c, mask = chunk(i, valid, C, WIDTH, VECTOR)
            grad = grads[i]
            if weights_ptr is not None:
                grad *= weight[:, None]
            tl.store(grad_ptr + row[:, None] * C + c, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@jit
def _add_triples(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


def _latent_l2_loss_fwd_fake(prediction, latents, index, kind, normalize, eps, divisor, with_grad, *options):
    (T, C), n = prediction.shape, prediction.shape[0] if with_grad else 0
    return prediction.new_empty(T, dtype=torch.float32), prediction.new_empty(n, C)


@register(
    "latent_l2_loss_fwd(Tensor prediction, Tensor latents, Tensor index, str kind, bool normalize, float eps, "
    "SymInt divisor, bool with_grad, float beta=1.0, Tensor? weights=None, SymInt rows=0) "
    "-> (Tensor loss, Tensor grad)",
    _latent_l2_loss_fwd_fake,
)
def _latent_l2_loss_fwd(
    prediction, latents, index, kind, normalize, eps, divisor, with_grad, beta=1.0, weights=None, rows=0
):
    """Returns each token's float32 loss `[T]` and, if `with_grad`, its gradient divided by `divisor` `[T, C]`.

    kind: as in `latent_l2_loss`, with "l1" and "half_l2" for its "lp".
    rows: for latents `[B, P, C]`, how many successive tokens belong to one sample.
    """
    T, C = prediction.shape
    prediction, latents = dense_rows(prediction), latents if latents.stride(-1) == 1 else latents.contiguous()
    *sample, stride, _ = latents.stride()
    of_sample = (*sample, T, rows, latents.shape[0]) if sample else (None, T, None, None)
    loss = torch.empty(T, dtype=torch.float32, device=prediction.device)
    grad = torch.empty(T if with_grad else 0, C, dtype=prediction.dtype, device=prediction.device)
    chunks, config = row_chunks("latent_l2_loss_fwd", prediction, latents)
    launch(
        _latent_l2_loss_fwd_kernel, -(-T // config.rows), prediction,
        prediction, latents, index.contiguous(), None if weights is None else weights.contiguous(), loss,
        grad if with_grad else None, prediction.stride(0), stride, *of_sample, 1.0 / divisor, eps,
        C, *chunks, config.rows, kind, normalize, beta, num_warps=config.num_warps,
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


def _factors(prediction: torch.Tensor, reduction: str) -> tuple[float, int, float]:
    """Returns the factor of the loss, the divisor of the gradient in the forward pass, and its factor in backward.

    A float16 gradient divided by millions of tokens would underflow, so the division waits until backward, which also
    multiplies by the loss scale. The divisor is an integer, because torch.compile would recompile for each new factor.
    """
    tokens = max(prediction.shape[0], 1) if reduction == "mean" else 1
    return (1.0 / tokens, 1, 1.0 / tokens) if prediction.dtype == torch.float16 else (1.0 / tokens, tokens, 1.0)


class _LatentL2Loss(Function):
    """Returns the loss and the saved gradient, which is an output so that differentiating it again raises an error."""

    @staticmethod
    def forward(prediction, latents, index, weights, kind, normalize, eps, beta, rows, reduction, with_grad):
        mean, divisor, _ = _factors(prediction, reduction)
        loss, grad = torch.ops.ajepa.latent_l2_loss_fwd(
            prediction, latents, index, kind, normalize, eps, divisor, with_grad, beta, weights, rows
        )
        return loss if reduction == "none" else loss.sum() * mean, grad

    @staticmethod
    def setup_context(ctx, inputs, output):
        *_, ctx.factor = _factors(inputs[0], inputs[9])
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
        return grad, *[None] * 10


# --- public ---------------------------------------------------------------------------------------------------------

Index = torch.Tensor | Sequence[torch.Tensor]


def _check_options(kind: str, reduction: str, p: float, beta: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"latent_l2_loss: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"latent_l2_loss: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if p not in (1, 2):
        raise ValueError(f"latent_l2_loss: p must be 1 or 2, got {p!r}")
    if not 0 < beta < float("inf"):
        raise ValueError(f"latent_l2_loss: beta must be a positive number, got {beta!r}")


def _check_tensors(prediction: torch.Tensor, latents: torch.Tensor, index: Index, weights: torch.Tensor | None) -> None:
    listed = isinstance(index, list | tuple)
    tensors: list[Any] = [*index] if listed else [index]
    names = {f"index[{k}]": i for k, i in enumerate(tensors)} if listed else {"index": index}
    check_tensors("latent_l2_loss", prediction=prediction, latents=latents, weights=weights, **names)
    if latents.dim() not in (2, 3) or prediction.shape[-1:] != latents.shape[-1:]:
        raise ValueError(
            f"latent_l2_loss: prediction [..., C] and latents [M, C] or [B, P, C] must share C, "
            f"got {list(prediction.shape)} and {list(latents.shape)}"
        )
    if not (prediction.is_floating_point() and latents.is_floating_point()):
        raise ValueError("latent_l2_loss: prediction and latents must be floating point")
    for i in tensors:
        if i.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"latent_l2_loss: index must be int32 or int64 numbers of patches, got {i.dtype}")
        if i.device != prediction.device:
            raise ValueError("latent_l2_loss: prediction, latents, index and weights must share a device")
    if latents.device != prediction.device:
        raise ValueError("latent_l2_loss: prediction, latents, index and weights must share a device")
    _check_shapes(prediction, latents, tensors, listed)
    if weights is not None:
        shape = (sum(i.numel() for i in tensors),) if listed else tensors[0].shape
        if not weights.is_floating_point() or weights.shape != shape or weights.device != prediction.device:
            raise ValueError(
                f"latent_l2_loss: weights must be floating point {list(shape)} on {prediction.device}, "
                f"got {weights.dtype} {list(weights.shape)} on {weights.device}"
            )


def _check_shapes(prediction: torch.Tensor, latents: torch.Tensor, index: list[torch.Tensor], listed: bool) -> None:
    B, shapes = latents.shape[0], [i.shape for i in index]
    if latents.dim() == 2:
        valid, what = not listed and len(shapes[0]) == 1, "[T] for latents [M, C]"
    elif listed:
        valid, what = bool(shapes) and all(len(s) == 2 and s[0] == B for s in shapes), f"a list of tensors [{B}, N]"
    else:
        valid, what = len(shapes[0]) in (2, 3) and shapes[0][0] == B, f"[{B}, N] or [{B}, K, N] for latents [B, P, C]"
    if not valid:
        raise ValueError(
            f"latent_l2_loss: index must be {what}, got {[*map(list, shapes)] if listed else [*shapes[0]]}"
        )
    wanted: list[tuple[int, ...]] = [shapes[0]]
    if listed:
        equal = all(s == shapes[0] for s in shapes)
        wanted = [(len(shapes) * B, shapes[0][1])] * equal + [(B * sum(s[1] for s in shapes),)]
    if prediction.shape[:-1] not in wanted:
        of = " or ".join(f"[{', '.join(map(str, shape))}, C]" for shape in wanted)
        raise ValueError(f"latent_l2_loss: prediction must be {of}, one for each index, got {list(prediction.shape)}")


def _targets(latents: torch.Tensor, index: Index) -> torch.Tensor:
    """The latents at the index, `[T, C]`."""
    if latents.dim() == 2:
        return latents.index_select(0, index)  # type: ignore[arg-type]
    if not isinstance(index, torch.Tensor):
        return torch.cat([_targets(latents, i) for i in index])
    sample = torch.arange(len(latents), device=latents.device).view(-1, *[1] * (index.dim() - 1))
    return latents[sample, index.contiguous()].flatten(0, -2)


def _flat(latents: torch.Tensor, index: Index) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The latents and the index `[T]` as the kernel takes them, and how many successive tokens belong to a sample."""
    if latents.dim() == 2:
        return latents, index, 0  # type: ignore[return-value]
    if isinstance(index, torch.Tensor):
        return latents, index.reshape(-1), index.shape[1:].numel()
    if all(i.shape == index[0].shape for i in index):
        return latents, torch.cat([*index]).view(-1), index[0].shape[1]
    B, P, _ = latents.shape
    first = torch.arange(0, B * P, P, device=latents.device)[:, None]  # of each sample, a row of the flat latents
    rows = (torch.cat([*index], 1) + first).split([i.shape[1] for i in index], 1)
    return latents.flatten(0, 1), torch.cat([i.reshape(-1) for i in rows]), 0


def _inverse_sum(weights: torch.Tensor) -> torch.Tensor:
    """1 / sum of the weights, or zero if the sum is zero."""
    total = weights.sum()
    return torch.where(total == 0, 0.0, 1 / total)


def latent_l2_loss_reference(
    prediction: torch.Tensor,
    latents: torch.Tensor,
    index: Index,
    kind: str = "l2",
    normalize: bool = True,
    eps: float = 1e-6,
    reduction: str = "mean",
    *,
    p: float = 2,
    beta: float = 1.0,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch definition of `latent_l2_loss`, in float32 (float64 for float64 inputs)."""
    _check_options(kind, reduction, p, beta)
    shape = index.shape if isinstance(index, torch.Tensor) else (-1,)
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    prediction, target = prediction.flatten(0, -2).to(dtype), _targets(latents.detach(), index).to(dtype)
    if normalize:
        target = F.layer_norm(target, target.shape[-1:], eps=eps)
    if kind == "l2":
        loss = F.mse_loss(prediction, target, reduction="none").mean(-1)
    elif kind == "smooth_l1":
        loss = F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).mean(-1)
    elif kind == "lp":
        loss = F.l1_loss(prediction, target, reduction="none").pow(p).mean(-1) / p
    else:
        loss = 2 - 2 * F.cosine_similarity(prediction, target, dim=-1, eps=eps)
    share = 1 / max(loss.shape[0], 1)
    if weights is not None:
        weights = weights.detach().reshape(-1).to(dtype)
        loss, share = loss * weights, _inverse_sum(weights)
    if reduction == "none":
        return loss.view(shape)
    return loss.sum() * share if reduction == "mean" else loss.sum()


def latent_l2_loss(
    prediction: torch.Tensor,
    latents: torch.Tensor,
    index: Index,
    *,
    kind: str = "l2",
    p: float = 2,
    beta: float = 1.0,
    weights: torch.Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-6,
    reduction: str = "mean",
    check: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Distance between predictions and layer-normalised targets gathered at `index`.

    With t = layer_norm(latents[index]) without affine parameters (I-JEPA, arXiv 2301.08243), the distance l of a token
    to its prediction y is, averaged over channels:

    - `l2`: (y - t)^2; `lp`: |y - t|^p / p, with p = 1 or 2 (V-JEPA, arXiv 2404.08471; V-JEPA 2, arXiv 2506.09985).
    - `smooth_l1`: (y - t)^2 / (2 beta) where |y - t| < beta, else |y - t| - beta / 2, as in torch.
    - `cosine`: 2 - 2 cos(y, t), not averaged.

    The latents are rows `[M, C]` with an index of rows, or samples `[B, P, C]` with an index of each sample's patches:

    | latents | index | prediction |
    |---|---|---|
    | `[M, C]` | `[T]` | `[T, C]` |
    | `[B, P, C]` | `[B, N]` | `[B, N, C]` |
    | `[B, P, C]` | `[B, K, N]` | `[B, K, N, C]` |
    | `[B, P, C]` | list of K tensors `[B, N]` | `[K * B, N, C]` or `[K * B * N, C]`, one mask after the other |
    | `[B, P, C]` | list of K tensors `[B, N_k]` | `[sum of B * N_k, C]`, one mask after the other |

    The lists are those of I-JEPA's and V-JEPA's predictors, which concatenate masks along the batch.

    Args:
        prediction: output of the predictor. Only this argument receives a gradient. The kernel takes C up to 4,096 in
            bfloat16, float16 or float32, and computes in float32.
        latents: output of the target encoder for every patch of the batch. `[B, P, C]` may be a slice such as
            `output[:, 1:]` without the class token, which is read in place unless a list has several lengths.
        index: int64 or int32, the row or the patch that is the target of each prediction.
        kind: "l2", "smooth_l1", "cosine" or "lp".
        p: power of `lp`, 1 or 2.
        beta: of `smooth_l1`, where the square ends; positive. The kernel is compiled for each value.
        weights: floating point, a factor for the distance of each token, in the shape of the index (`[T]` for a list).
            They get no gradient. The mean is then sum(weights l) / sum(weights).
        normalize: layer-normalise the targets.
        eps: added to the variance in the layer norm; also the smallest length that `cosine` divides by. I-JEPA's loss
            calls `torch.nn.functional.layer_norm`, whose default is 1e-5.
        reduction: "mean" or "sum" over tokens, or "none".
        check: raise ValueError if an index is out of range, which makes the host wait for the device. Without it,
            indices are trusted.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.

    Returns:
        A float32 scalar, which is zero if there is no token or the sum of the weights is zero; with reduction "none",
        the weighted distances in the shape of the index (`[T]` for a list).

    Saved for backward: the gradient `[T, C]`, computed in the forward pass, in the dtype of the prediction. Backward
    scales it in place, unless the incoming gradient is 1. A second backward needs a second forward.
    `torch.func.grad` works; `torch.vmap` needs impl="reference".

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: shapes, dtypes or options are invalid; raised before any launch.
        RuntimeError: the gradient is differentiated again.

    Example::

        prediction = torch.randn(4096, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        latents = torch.randn(16384, 768, device="cuda", dtype=torch.bfloat16)
        masked = torch.randperm(16384, device="cuda")[:4096]
        latent_l2_loss(prediction, latents, masked).backward()

        latents = latents.view(64, 256, 768)  # of 64 images
        masks = [torch.rand(64, 256, device="cuda").argsort(1)[:, :32] for _ in range(4)]  # four blocks in each image
        prediction = torch.randn(4 * 64, 32, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        latent_l2_loss(prediction, latents, masks, kind="smooth_l1", eps=1e-5).backward()  # as in I-JEPA
    """
    _check_tensors(prediction, latents, index, weights)
    _check_options(kind, reduction, p, beta)
    if check:
        for i in [index] if isinstance(index, torch.Tensor) else index:
            if i.numel() and not 0 <= int(i.min()) <= int(i.max()) < latents.shape[-2]:
                raise ValueError(f"latent_l2_loss: an index is outside the {latents.shape[-2]} rows of latents")
    unsupported = ""
    if not {prediction.dtype, latents.dtype} <= {torch.float32, torch.float16, torch.bfloat16}:
        unsupported = f"no kernel for {prediction.dtype} and {latents.dtype}"
    elif not 1 <= prediction.shape[-1] <= MAX_WIDTH:
        unsupported = f"no kernel for width {prediction.shape[-1]}, only up to {MAX_WIDTH}"
    if not use_triton("latent_l2_loss", impl, prediction, unsupported):
        return latent_l2_loss_reference(
            prediction, latents, index, kind, normalize, eps, reduction, p=p, beta=beta, weights=weights
        )
    with_grad = prediction.requires_grad and torch.is_grad_enabled()
    shape = index.shape if isinstance(index, torch.Tensor) else (-1,)
    latents, index, rows = _flat(latents.detach(), index)
    share = None
    if weights is not None:
        weights = weights.detach().reshape(-1).float()
        if reduction == "mean":
            reduction, share = "sum", _inverse_sum(weights)
            if prediction.dtype != torch.float16:  # see `_factors`
                weights, share = weights * share, None
    kind, beta = {"lp": "l1" if p == 1 else "half_l2"}.get(kind, kind), float(beta) if kind == "smooth_l1" else 1.0
    prediction = prediction if prediction.dim() == 2 else prediction.flatten(0, -2)
    loss = _LatentL2Loss.apply(
        prediction, latents, index, weights, kind, normalize, eps, beta, rows, reduction, with_grad
    )[0]
    if reduction == "none":
        return loss.view(shape)
    return loss if share is None else loss * share
