"""Patches of augmented views of clips, in one pass over their mel power.

Shapes: B clips, L frames of a clip, M mel bands, R views, T frames of a view, K knots of the equaliser, N patches, P
values of a patch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._triton import jit, launch, power_of_2, register, tl, use_triton
from ajepa_kernels.log_mel import LogMelSpec

TILE = 1024  # values of the result that a program computes


class MelViews(NamedTuple):
    """What each of R views shows, as tensors on the device of the mel power; float32 except for `clip`.

    Source 0 is the clip that the view shows, and source 1 is a clip mixed in as its background.
    """

    clip: torch.Tensor
    """int32 or int64 `[R, 2]`: the row of `mel` of each source."""
    start: torch.Tensor
    """`[R, 2]`: the frame of each source at which the view starts, which may be a fraction."""
    rate: torch.Tensor
    """`[R]`: frames of the sources per frame of the view, which stretches time."""
    band: torch.Tensor
    """`[R, 2]`: offset and scale of the mel axis. Output band m shows position offset + scale * m, within 0..M - 1."""
    gain: torch.Tensor
    """`[R, 2]`: linear gain of each source's mel values. A background of gain 0 is not read."""
    equaliser: torch.Tensor
    """`[R, K]`: dB at K >= 1 knots, evenly spaced from band 0 to band M - 1, with straight lines between them."""


# --- kernel ---------------------------------------------------------------------------------------------------------


@jit
def _source(mel_ptr, lengths_ptr, clip, start, rate, t, lower, upper, share, B, L, MELS: tl.constexpr):
    """Bilinear samples of one clip at `start + rate t` and at the bands between `lower` and `upper`.

    Every position lies inside the clip, whatever the arguments are, so the loads need no mask.
    """
    clip = tl.minimum(tl.maximum(clip, 0), B - 1).to(tl.int64)
    frames = L
    if lengths_ptr is not None:
        frames = tl.minimum(tl.maximum(tl.load(lengths_ptr + clip).to(tl.int32), 1), L)
    at = start + rate * t
    before = tl.floor(at)
    late = (at - before)[None, :]
    first = before.to(tl.int32) % frames  # the remainder has the sign of the dividend
    first = tl.where(first < 0, first + frames, first)
    second = tl.where(first + 1 == frames, 0, first + 1)
    mel_ptr += clip * MELS * L
    low, high = (lower * L)[:, None], (upper * L)[:, None]
    first_ptr, second_ptr = (mel_ptr + first)[None, :], (mel_ptr + second)[None, :]
    a, b = tl.load(first_ptr + low), tl.load(second_ptr + low)
    c, d = tl.load(first_ptr + high), tl.load(second_ptr + high)
    a += (b - a) * late
    c += (d - c) * late
    return a + (c - a) * share[:, None]


@jit
def _augment_mel_fwd_kernel(
    mel_ptr, lengths_ptr, clip_ptr, start_ptr, rate_ptr, band_ptr, gain_ptr, equaliser_ptr, out_ptr,
    B, L, n_frames, floor, log_scale, log_shift,
    MELS: tl.constexpr, K: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    BANDS: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """A program computes `BANDS` bands of `FRAMES` frames of one view, and stores them in the order of patches."""
    BLOCKS: tl.constexpr = (COLUMNS * WIDTH + FRAMES - 1) // FRAMES
    TILES: tl.constexpr = (MELS + BANDS - 1) // BANDS * BLOCKS
    view = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    m = tile // BLOCKS * BANDS + tl.arange(0, BANDS)
    t = tile % BLOCKS * FRAMES + tl.arange(0, FRAMES)

    offset, scale = tl.load(band_ptr + 2 * view), tl.load(band_ptr + 2 * view + 1)
    position = tl.minimum(tl.maximum(offset + scale * m, 0.0), MELS - 1.0)
    below = tl.floor(position)
    lower = below.to(tl.int32)
    bands = (lower, tl.minimum(lower + 1, MELS - 1), position - below)
    rate = tl.load(rate_ptr + view)
    gain, background = tl.load(gain_ptr + 2 * view), tl.load(gain_ptr + 2 * view + 1)
    clip, start = tl.load(clip_ptr + 2 * view), tl.load(start_ptr + 2 * view)
    value = gain * _source(mel_ptr, lengths_ptr, clip, start, rate, t, *bands, B, L, MELS)
    if background != 0:
        clip, start = tl.load(clip_ptr + 2 * view + 1), tl.load(start_ptr + 2 * view + 1)
        value += background * _source(mel_ptr, lengths_ptr, clip, start, rate, t, *bands, B, L, MELS)

    STEP: tl.constexpr = (K - 1) / max(MELS - 1, 1)  # knots per band
    knot = tl.minimum((m * STEP).to(tl.int32), K - 1)
    decibel = tl.load(equaliser_ptr + view * K + knot)
    if K > 1:
        following = tl.load(equaliser_ptr + view * K + tl.minimum(knot + 1, K - 1))
        decibel += (following - decibel) * (m * STEP - knot)
    value *= tl.exp2(decibel * 0.33219280948873623)[:, None]  # log2(10) / 10
    value = tl.log2(tl.where(value < floor, floor, value)) * (0.6931471805599453 * log_scale)  # NaN stays NaN
    value = tl.where((t < n_frames)[None, :], value, 0.0) + log_shift

    patch = (m // HEIGHT * COLUMNS)[:, None] + (t // WIDTH)[None, :]
    place = (m % HEIGHT * WIDTH)[:, None] + (t % WIDTH)[None, :]
    # One value per thread and access: stores of 16 bytes would give a thread neighbouring frames, and the loads of a
    # warp would then lie apart.
    index = tl.max_contiguous(patch * (HEIGHT * WIDTH) + place, [1, 1])
    stored = (m < MELS)[:, None] & (t < COLUMNS * WIDTH)[None, :]
    tl.store(out_ptr + view * MELS * COLUMNS * WIDTH + index, value.to(out_ptr.dtype.element_ty), mask=stored)


def _augment_mel_fwd_fake(
    mel, lengths, clip, start, rate, band, gain, equaliser, patch, n_frames, floor, log_scale, log_shift, dtype
):
    height, width = patch
    columns = -(-n_frames // width)
    return mel.new_empty(rate.shape[0], mel.shape[1] // height * columns, height * width, dtype=dtype)


@register(
    "augment_mel_fwd(Tensor mel, Tensor? lengths, Tensor clip, Tensor start, Tensor rate, Tensor band, Tensor gain, "
    "Tensor equaliser, SymInt[] patch, SymInt n_frames, float floor, float log_scale, float log_shift, "
    "ScalarType dtype) -> Tensor",
    _augment_mel_fwd_fake,
)
def _augment_mel_fwd(
    mel, lengths, clip, start, rate, band, gain, equaliser, patch, n_frames, floor, log_scale, log_shift, dtype
):
    """Returns the patches `[R, N, P]` of the views; `log_scale` times ln, plus `log_shift`."""
    (B, M, L), (height, width), R = mel.shape, patch, len(rate)
    columns = -(-n_frames // width)
    out = torch.empty(R, M // height * columns, height * width, dtype=dtype, device=mel.device)
    frames = min(64, power_of_2(columns * width))
    bands = min(TILE // frames, power_of_2(M))
    launch(
        _augment_mel_fwd_kernel, R * -(-M // bands) * -(-columns * width // frames), mel,
        mel.contiguous(), None if lengths is None else lengths.contiguous(),
        *(x.contiguous() for x in (clip, start, rate, band, gain, equaliser)), out,
        B, L, n_frames, floor, log_scale, log_shift, M, equaliser.shape[1], height, width, columns, bands, frames,
        num_warps=4,
    )  # fmt: skip
    return out


# --- public ---------------------------------------------------------------------------------------------------------


def _check(
    mel: torch.Tensor, views: MelViews, spec: LogMelSpec, lengths: torch.Tensor | None, dtype: torch.dtype
) -> int:
    """Returns the number of frames of a view; raises an error for invalid arguments."""
    if mel.dim() != 3 or mel.shape[1] != spec.n_mels or not (mel.shape[0] and mel.shape[2]):
        raise ValueError(
            f"augment_mel: mel must be [B, {spec.n_mels}, L] with B, L >= 1 for this spec, got {list(mel.shape)}; "
            "log_mel(pcm, spec, layout='mel') returns it"
        )
    if mel.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"augment_mel: mel must be float32, got {mel.dtype}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"augment_mel: dtype must be float32, bfloat16 or float16, got {dtype}")
    if spec.n_frames is None:
        raise ValueError("augment_mel: spec.n_frames must be set, because it is the number of frames of a view")
    if spec.top_db is not None:
        raise ValueError("augment_mel: spec.top_db must be None; a view has no limit below its maximum")
    spec.patch_grid(0)  # raises an error if patches do not divide the bands
    R = views.rate.shape[0] if views.rate.dim() else 0
    for field, x in zip(MelViews._fields, views, strict=True):
        shape = {"rate": [R], "equaliser": [R, max(x.shape[-1], 1) if x.dim() else 1]}.get(field, [R, 2])
        kinds = (torch.int32, torch.int64) if field == "clip" else (torch.float32,)
        if list(x.shape) != shape or x.dtype not in kinds:
            wanted = f"{'int32' if field == 'clip' else 'float32'} {shape}"
            raise ValueError(f"augment_mel: views.{field} must be {wanted}, got {x.dtype} {list(x.shape)}")
        if x.device != mel.device:
            raise ValueError(
                f"augment_mel: views.{field} is on {x.device}, mel on {mel.device}; move it to mel's device"
            )
    if lengths is not None:
        if lengths.shape != mel.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"augment_mel: lengths must be int32 or int64 [{len(mel)}], got {lengths.dtype} {list(lengths.shape)}"
            )
        if lengths.device != mel.device:
            raise ValueError(
                f"augment_mel: lengths are on {lengths.device}, mel on {mel.device}; move lengths to mel's device"
            )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (mel, *views)):
        raise ValueError("augment_mel: no gradient flows to mel or views; detach them or call it under torch.no_grad()")
    return spec.n_frames


def _check_values(mel: torch.Tensor, views: MelViews, lengths: torch.Tensor | None) -> None:
    for name, x, low, high in (("views.clip", views.clip, 0, len(mel) - 1), ("lengths", lengths, 1, mel.shape[2])):
        if x is not None and x.numel():
            least, most = (int(v) for v in x.aminmax())
            if least < low or most > high:
                raise ValueError(f"augment_mel: {name} must be {low}..{high}, got {least}..{most}")


def augment_mel_reference(
    mel: torch.Tensor,
    views: MelViews,
    spec: LogMelSpec,
    *,
    lengths: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Plain PyTorch definition of `augment_mel`, in float32; in float64 for float64 `mel` or `dtype`.

    It is also what runs on a CPU. Interpolation is separable: a frame is the weighted sum of two frames of each source,
    and then a band is the weighted sum of two bands. `embedding_bag` computes such sums of rows.
    """
    T = _check(mel, views, spec, lengths, dtype)
    compute = torch.float64 if torch.float64 in (mel.dtype, dtype) else torch.float32
    (B, M, L), R = mel.shape, len(views.rate)
    (rows, columns), (height, width) = spec.grid, spec.patch
    if R == 0:
        return mel.new_empty(0, rows * columns, height * width, dtype=dtype)
    mel = mel.detach().to(compute)
    clip, start, rate, band, gain, equaliser = (
        x.detach() if x is views.clip else x.detach().to(compute) for x in views
    )
    read = gain != 0  # a background of gain 0 is replaced by the clip itself
    read[:, 0] = True
    clip = torch.where(read, clip, clip[:, :1]).long().clamp(0, B - 1)
    start = torch.where(read, start, start[:, :1])
    frames = torch.full_like(clip, L) if lengths is None else lengths.long().clamp(1, L)[clip]

    at = start[:, None] + rate[:, None, None] * torch.arange(T, device=mel.device)[:, None]  # [R, T, 2]
    first = at.floor()
    late = at - first
    first = first.long().remainder(frames[:, None])
    second = (first + 1).remainder(frames[:, None])
    taken = B * torch.cat((first, second), 2) + clip.repeat(1, 2)[:, None]
    weights = torch.cat(((1 - late) * gain[:, None], late * gain[:, None]), 2)
    table = mel.reshape(B * M, L).t().reshape(L * B, M)  # rows by frame and clip; torch transposes matrices fastest
    x_RTM = _weighted_rows(table, taken, weights)

    position = (band[:, :1] + band[:, 1:] * torch.arange(M, device=mel.device)).clamp(0, M - 1)  # [R, M]
    lower = position.floor().long().clamp(0, M - 1)
    high = position - lower
    level = 10 ** (F.interpolate(equaliser[:, None], M, mode="linear", align_corners=True)[:, 0] / 10)
    own = M * torch.arange(R, device=mel.device)[:, None, None]  # the first row of each view
    taken = own + torch.stack((lower, (lower + 1).clamp_max(M - 1)), 2)
    weights = torch.stack(((1 - high) * level, high * level), 2)
    x_RMT = _weighted_rows(x_RTM.transpose(1, 2).reshape(R * M, T), taken, weights)

    out = x_RMT.clamp_min_(spec.log_floor).log_()
    if spec.log == "db":
        out *= (10.0 if spec.power == 2 else 20.0) / math.log(10.0)
    if columns * width > T:
        out = F.pad(out, (0, columns * width - T))
    out = out.sub_(spec.mean).div_(spec.std).to(dtype)
    return out.view(R, rows, height, columns, width).transpose(2, 3).reshape(R, rows * columns, height * width)


def _weighted_rows(table: torch.Tensor, taken: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sums over j of `weights[..., j] * table[taken[..., j]]`, `[..., C]`, for a table of rows `[n, C]`."""
    sums = F.embedding_bag(taken.flatten(0, -2), table, mode="sum", per_sample_weights=weights.flatten(0, -2))
    return sums.unflatten(0, taken.shape[:-1])


def augment_mel(
    mel: torch.Tensor,
    views: MelViews,
    spec: LogMelSpec,
    *,
    lengths: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> torch.Tensor:
    """Log-mel patches of R augmented views of B clips: crop, time stretch, mel shift, mix, gain and equaliser at once.

    With b(i, m, t) the bilinear sample of source i at band offset + scale m and frame start_i + rate t,

        value(m, t) = 10^(eq(m) / 10) (gain_0 b(0, m, t) + gain_1 b(1, m, t))
        out = (log(max(value, spec.log_floor)) - spec.mean) / spec.std

    with the log of `spec`: ln, or dB by `spec.power`. Bands are clamped to 0..M - 1. Frames wrap around the clip's end:
    after its last frame comes frame 0. For a `spec.power` of 1 the gains and the equaliser multiply magnitudes. No
    gradient flows to any argument. A view with rate 1, band (0, 1), a whole start, gain (1, 0) and an equaliser of
    zeros holds the patches that `log_mel` gives for this section of the clip.

    Args:
        mel: mel values before the log, float32 `[B, M, L]`, as `log_mel` returns them with `layout="mel"`; for all
            frames of the clips, its spec must have an `n_frames` of None.
        views: what each view shows; see `MelViews`.
        spec: the front end, of which the floor, the log, `mean`, `std`, `patch` and `n_frames` count here: a view has
            `n_frames` frames, and zeros (before `mean` and `std`) up to whole patches. `top_db` must be None.
        lengths: number of frames of each clip, int32 or int64 `[B]`, from 1 to L. None: L for every clip.
        dtype: dtype of the result: float32, bfloat16 or float16.
        impl: "auto" runs the Triton kernel on a GPU, or warns once and runs plain PyTorch if the kernel cannot run; on
            a CPU it runs plain PyTorch. "triton" requires the kernel, "reference" is plain PyTorch.

    Returns:
        `[R, N, P]`, in the order of `log_mel`: token n = f * time_patches + t, and a patch is [mel, frame] flattened.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or spec, or an argument that requires grad. On a CPU, outside
            `torch.compile`, also a clip or a length that is out of range; elsewhere these are clamped to their range,
            because reading them would make the host wait.

    Example::

        mel = log_mel(torch.randn(2, 32_000), LogMelSpec(n_mels=64), layout="mel")  # [2, 64, 198]
        views = MelViews(
            clip=torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), start=torch.tensor([[0.0, 5.0], [2.5, 0.0]]),
            rate=torch.tensor([1.0, 1.2]), band=torch.tensor([[0.0, 1.0], [1.0, 0.9]]),
            gain=torch.tensor([[1.0, 0.0], [0.5, 0.1]]), equaliser=torch.zeros(2, 5),
        )
        patches = augment_mel(mel, views, LogMelSpec(n_mels=64, n_frames=64, patch=(8, 8)))  # [2, 64, 64]
    """
    check_tensors("augment_mel", mel=mel, lengths=lengths)
    n_frames = _check(mel, views, spec, lengths, dtype)
    if mel.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(mel, views, lengths)
    unsupported = ""
    if torch.float64 in (mel.dtype, dtype):
        unsupported = "the kernel computes in float32, not float64"
    elif mel.shape[1] * mel.shape[2] >= 2**31:
        unsupported = f"no kernel for clips of {mel.shape[2]} frames"
    if not use_triton("augment_mel", impl, mel, unsupported):
        return augment_mel_reference(mel, views, spec, lengths=lengths, dtype=dtype)
    log_scale = ((10.0 if spec.power == 2 else 20.0) / math.log(10.0) if spec.log == "db" else 1.0) / spec.std
    return torch.ops.ajepa.augment_mel_fwd(
        mel.detach(), lengths, *(x.detach() for x in views), spec.patch, n_frames, spec.log_floor, log_scale,
        -spec.mean / spec.std, dtype,
    )  # fmt: skip
