"""Sketched isotropic-Gaussian regulariser: how far the distribution of a batch is from a standard Gaussian.

Shapes: V views, N samples, D width, S directions, J knots, P samples padded to whole tiles.
"""

# Triton kernels build tuples inside static loops, which mypy cannot type.
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._autograd import Function, first_order
from ajepa_kernels._chunks import MAX_WIDTH
from ajepa_kernels._triton import arch, jit, launch, power_of_2, register, tl, use_triton

# Constants of SplitMix64's finaliser, the project's generator of counter-based random numbers.
INCREMENT, FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


# --- directions -------------------------------------------------------------------------------------------------------


@jit
def _cos_sin(turns):
    """Cosine and sine of 2 pi turns to float32 rounding, by Taylor series within a quarter turn of the nearest half.

    The library's functions need local memory for their exact reduction of large arguments, which turns do not need.
    """
    half = tl.floor(2.0 * turns + 0.5)
    x = (turns - 0.5 * half) * 6.283185307179586
    sign = 1.0 - 2.0 * (half - 2.0 * tl.floor(0.5 * half))
    q = x * x
    cos = 1.0 - q / 2 * (1.0 - q / 12 * (1.0 - q / 30 * (1.0 - q / 56 * (1.0 - q / 90 * (1.0 - q / 132)))))
    sin = 1.0 - q / 6 * (1.0 - q / 20 * (1.0 - q / 42 * (1.0 - q / 72 * (1.0 - q / 110 * (1.0 - q / 156)))))
    return sign * cos, sign * x * sin


@jit
def _sigreg_directions_kernel(
    key_ptr, directions_ptr, D: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr,
    INCREMENT: tl.constexpr, FACTOR_1: tl.constexpr, FACTOR_2: tl.constexpr,
):  # fmt: skip
    """One direction, in chunks that stay in registers until its length is known."""
    row = tl.program_id(0).to(tl.int64)
    key = tl.load(key_ptr).to(tl.uint64)
    normals = ()
    squares = tl.zeros([WIDTH], tl.float32)
    for i in tl.static_range(COUNT):
        d = i * WIDTH + tl.arange(0, WIDTH)
        z = (row * D + d).to(tl.uint64) * INCREMENT + key
        z = (z ^ (z >> 30)) * FACTOR_1
        z = (z ^ (z >> 27)) * FACTOR_2
        z = z ^ (z >> 31)
        uniform = ((z >> 40).to(tl.int32) + 1).to(tl.float32) * 5.9604644775390625e-08
        cos, _ = _cos_sin(((z >> 16).to(tl.int32) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08)
        normal = tl.where(d < D, tl.sqrt_rn(-2.0 * tl.log(uniform)) * cos, 0.0)
        squares += normal * normal
        normals += (normal,)
    scale = 1.0 / tl.maximum(tl.sqrt_rn(tl.sum(squares, 0)), 1e-12)
    for i in tl.static_range(COUNT):
        d = i * WIDTH + tl.arange(0, WIDTH)
        out = (normals[i] * scale).to(directions_ptr.dtype.element_ty)
        tl.store(directions_ptr + row * D + d, out, mask=d < D)


@register(
    "sigreg_directions(Tensor key, int S, int D, ScalarType dtype) -> Tensor",
    lambda key, S, D, dtype: key.new_empty(S, D, dtype=dtype),
)
def _sigreg_directions(key, S, D, dtype):
    """`draw_directions`, rounded to dtype."""
    directions = torch.empty(S, D, dtype=dtype, device=key.device)
    width = min(power_of_2(D), 1024)
    launch(_sigreg_directions_kernel, S, key, key, directions, D, width, -(-D // width), INCREMENT, *FACTORS)
    return directions


def _signed(bits: int) -> int:
    """The int64 whose bits are the lowest 64 of `bits`."""
    bits &= 2**64 - 1
    return bits - (bits >> 63 << 64)


def _shifted(z: torch.Tensor, by: int) -> torch.Tensor:
    return (z >> by) & ((1 << (64 - by)) - 1)  # without the sign


def draw_directions(key: torch.Tensor, S: int, D: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Unit vectors `[S, D]`, uniform on the sphere and a pure function of `key`, an int64 scalar.

    Element (s, d) is a normal number by Box-Muller from the hash of key and s D + d; each row is divided by its length.
    """
    z = torch.arange(S * D, device=key.device).view(S, D) * _signed(INCREMENT) + key
    for shift, factor in zip((30, 27), FACTORS, strict=True):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    z = z ^ _shifted(z, 31)
    uniform, turns = ((bits.to(dtype) * 2**-24) for bits in (_shifted(z, 40) + 1, _shifted(z, 16) & 0xFFFFFF))
    return F.normalize((-2 * uniform.log()).sqrt() * (2 * math.pi * turns).cos(), dim=1)


@register(
    "sigreg_plain_directions(Tensor key, int S, int D, ScalarType dtype) -> Tensor",
    lambda key, S, D, dtype: key.new_empty(S, D, dtype=dtype),
)
def _plain_directions(key, S, D, dtype):
    """`draw_directions` as one operation: torch.compile would fold its products of 64 bits, which wrap around."""
    return draw_directions(key, S, D, dtype)


# --- forward ----------------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """Tiles of directions, of samples, and of what a product sums over."""

    directions: int
    samples: int
    depth: int


def _tiles(dtype: torch.dtype) -> _Tiles:
    return _Tiles(64, 64, 32 if dtype == torch.float32 else 64)


@jit
def _sigreg_fwd_kernel(
    z_ptr, directions_ptr, products_ptr, sums_ptr, stride_v, stride_n, rows, tiles, turns,
    S: tl.constexpr, D: tl.constexpr, J: tl.constexpr,
    DIRECTIONS: tl.constexpr, SAMPLES: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of products, directions by samples, and the sums of their cosines and sines over its samples.

    Samples lie along the columns, so most of a sum stays within a thread. rows: samples; turns: of one knot.
    """
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    view = (rest // tl.cdiv(S, DIRECTIONS)).to(tl.int64)
    s = rest % tl.cdiv(S, DIRECTIONS) * DIRECTIONS + tl.arange(0, DIRECTIONS)
    n = tile * SAMPLES + tl.arange(0, SAMPLES)
    samples = z_ptr + view * stride_v + n[None, :].to(tl.int64) * stride_n
    products = tl.zeros([DIRECTIONS, SAMPLES], tl.float32)
    for start in tl.range(0, D, DEPTH, num_stages=STAGES):
        d = start + tl.arange(0, DEPTH)
        a = tl.load(directions_ptr + s[:, None] * D + d[None, :], mask=(s < S)[:, None] & (d < D)[None, :], other=0.0)
        b = tl.load(samples + d[:, None], mask=(n < rows)[None, :] & (d < D)[:, None], other=0.0)
        products = tl.dot(a, b, products, input_precision="tf32x3")
    width = (tiles * SAMPLES).to(tl.int64)
    place = products_ptr + (view * S + s[:, None]) * width + n[None, :]
    tl.store(place, products, mask=(s < S)[:, None])
    cos, sin = _cos_sin(products * turns)
    power_cos = tl.where((n < rows)[None, :], cos, 0.0)
    power_sin = tl.where((n < rows)[None, :], sin, 0.0)
    sums = sums_ptr + (view * tiles + tile) * (J - 1) * 2 * S + s
    for _ in range(J - 1):
        tl.store(sums, tl.sum(power_cos, 1), mask=s < S)
        tl.store(sums + S, tl.sum(power_sin, 1), mask=s < S)
        sums += 2 * S
        power_cos, power_sin = power_cos * cos - power_sin * sin, power_sin * cos + power_cos * sin


def _sigreg_fwd_fake(z, directions, J, limit):
    V, S, samples = z.shape[0], directions.shape[0], _tiles(z.dtype).samples
    tiles = -(-z.shape[1] // samples)
    return tuple(
        z.new_empty(shape, dtype=torch.float32) for shape in ((V, S, tiles * samples), (V, tiles, J - 1, 2, S))
    )


@register(
    "sigreg_fwd(Tensor z, Tensor directions, int J, float limit) -> (Tensor products, Tensor sums)", _sigreg_fwd_fake
)
def _sigreg_fwd(z, directions, J, limit):
    """z `[V, N, D]`; products `[V, S, P]`; sums `[V, P / tile, J - 1, 2, S]`, of cosines and sines, of each tile."""
    (V, N, D), S = z.shape, directions.shape[0]
    z = z if z.stride(2) == 1 else z.contiguous()
    products, sums = _sigreg_fwd_fake(z, directions, J, limit)
    sizes, tiles = _tiles(z.dtype), sums.shape[1]
    launch(
        _sigreg_fwd_kernel, V * tiles * -(-S // sizes.directions), z,
        z, directions, products, sums, z.stride(0), z.stride(1), N, tiles, limit / (J - 1) / (2 * math.pi),
        S, D, J, *sizes, 3, num_warps=4,
    )  # fmt: skip
    return products, sums


# --- statistic --------------------------------------------------------------------------------------------------------


@jit
def _sigreg_statistic_kernel(
    sums_ptr, count_ptr, value_ptr, coefficients_ptr, rows, tiles, step, factor,
    S: tl.constexpr, J: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One knot of one view and a block of directions. rows: samples, where there is no `count_ptr`."""
    pid = tl.program_id(0)
    s = pid % tl.cdiv(S, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    knot = pid // tl.cdiv(S, BLOCK)  # of all views
    view, j = knot // (J - 1), knot % (J - 1)
    cos = tl.zeros([TILES, BLOCK], tl.float32)
    sin = tl.zeros([TILES, BLOCK], tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        place = sums_ptr + ((view * tiles + tile).to(tl.int64) * (J - 1) + j)[:, None] * 2 * S + s[None, :]
        mask = (tile < tiles)[:, None] & (s < S)[None, :]
        cos += tl.load(place, mask=mask, other=0.0)
        sin += tl.load(place + S, mask=mask, other=0.0)
    count = rows.to(tl.float32) if count_ptr is None else tl.load(count_ptr)
    t = step * (j + 1).to(tl.float32)
    phi = tl.exp(-0.5 * t * t)
    weight = phi * step * tl.where(j == J - 2, 1.0, 2.0)
    mean_cos = tl.sum(cos, 0) / tl.maximum(count, 1.0) - phi
    mean_sin = tl.sum(sin, 0) / tl.maximum(count, 1.0)
    squares = tl.where(s < S, mean_cos * mean_cos + mean_sin * mean_sin, 0.0)
    tl.store(value_ptr + pid, tl.sum(squares, 0) * (weight * count * factor))
    place = coefficients_ptr + knot.to(tl.int64) * 2 * S + s
    tl.store(place, -weight * t * mean_cos, mask=s < S)
    tl.store(place + S, weight * t * mean_sin, mask=s < S)


BLOCK = 128  # directions of a program


def _sigreg_statistic_fake(sums, count, N, limit):
    V, _, knots, _, S = sums.shape
    return sums.new_empty(V * knots * -(-S // BLOCK)), sums.new_empty(V, knots, 2, S)


@register(
    "sigreg_statistic(Tensor sums, Tensor? count, int N, float limit) -> (Tensor values, Tensor coefficients)",
    _sigreg_statistic_fake,
)
def _sigreg_statistic(sums, count, N, limit):
    """Parts of the value, to be added, and the coefficients `[V, J - 1, 2, S]` of sine and cosine in its gradient."""
    V, tiles, knots, _, S = sums.shape
    values, coefficients = _sigreg_statistic_fake(sums, count, N, limit)
    launch(
        _sigreg_statistic_kernel, len(values), sums,
        sums, count, values, coefficients, N, tiles, limit / knots, 1 / (S * V), S, knots + 1, BLOCK, 8, num_warps=4,
    )  # fmt: skip
    return values, coefficients


# --- backward ---------------------------------------------------------------------------------------------------------


@jit
def _sigreg_dproducts_kernel(
    products_ptr, coefficients_ptr, dproducts_ptr, tiles, turns, S: tl.constexpr, J: tl.constexpr,
    DIRECTIONS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """The gradient with respect to the products, times S V / 2: a polynomial in exp(i t_1 y), by Horner's rule."""
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    view = (rest // tl.cdiv(S, DIRECTIONS)).to(tl.int64)
    s = rest % tl.cdiv(S, DIRECTIONS) * DIRECTIONS + tl.arange(0, DIRECTIONS)
    n = tile * SAMPLES + tl.arange(0, SAMPLES)
    place = (view * S + s[:, None]) * (tiles * SAMPLES).to(tl.int64) + n[None, :]
    mask = (s < S)[:, None]
    cos, sin = _cos_sin(tl.load(products_ptr + place, mask=mask, other=0.0) * turns)
    real = tl.zeros([DIRECTIONS, SAMPLES], tl.float32)
    imaginary = tl.zeros([DIRECTIONS, SAMPLES], tl.float32)
    coefficients = coefficients_ptr + (view * (J - 1) + (J - 2)) * 2 * S + s[:, None]
    for _ in range(J - 1):
        real += tl.load(coefficients, mask=mask, other=0.0)
        imaginary += tl.load(coefficients + S, mask=mask, other=0.0)
        real, imaginary = real * cos - imaginary * sin, imaginary * cos + real * sin
        coefficients -= 2 * S
    tl.store(dproducts_ptr + place, imaginary.to(dproducts_ptr.dtype.element_ty), mask=mask)


@jit
def _sigreg_dz_kernel(
    upstream_ptr, dproducts_ptr, directions_ptr, dz_ptr, rows, tiles, factor, S: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, SAMPLES: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of dz, samples by channels. The scale comes last, so that float16 gradients of products stay normal."""
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    view = (rest // tl.cdiv(D, WIDTH)).to(tl.int64)
    d = rest % tl.cdiv(D, WIDTH) * WIDTH + tl.arange(0, WIDTH)
    n = tile * SAMPLES + tl.arange(0, SAMPLES)
    width = (tiles * SAMPLES).to(tl.int64)
    dz = tl.zeros([SAMPLES, WIDTH], tl.float32)
    for start in tl.range(0, S, DEPTH, num_stages=STAGES):
        s = start + tl.arange(0, DEPTH)
        place = (view * S + s[None, :]) * width + n[:, None]
        a = tl.load(dproducts_ptr + place, mask=(s < S)[None, :], other=0.0)
        b = tl.load(directions_ptr + s[:, None] * D + d[None, :], mask=(s < S)[:, None] & (d < D)[None, :], other=0.0)
        dz = tl.dot(a, b, dz, input_precision="tf32x3")
    dz *= tl.load(upstream_ptr).to(tl.float32) * factor
    place = dz_ptr + (view * rows + n[:, None]) * D + d[None, :]
    tl.store(place, dz.to(dz_ptr.dtype.element_ty), mask=(n < rows)[:, None] & (d < D)[None, :])


@register(
    "sigreg_bwd(Tensor upstream, Tensor products, Tensor directions, Tensor coefficients, int N, float limit) "
    "-> Tensor dz",
    lambda upstream, products, directions, coefficients, N, limit: directions.new_empty(
        products.shape[0], N, directions.shape[1]
    ),
)
def _sigreg_bwd(upstream, products, directions, coefficients, N, limit):
    """dz `[V, N, D]` in the dtype of the directions."""
    (V, S, P), D, knots = products.shape, directions.shape[1], coefficients.shape[1]
    sizes = _tiles(directions.dtype)
    tiles, turns = P // sizes.samples, limit / knots / (2 * math.pi)
    dproducts = torch.empty_like(products, dtype=directions.dtype)
    dz = torch.empty(V, N, D, dtype=directions.dtype, device=products.device)
    launch(
        _sigreg_dproducts_kernel, V * tiles * -(-S // 32), products,
        products, coefficients, dproducts, tiles, turns, S, knots + 1, 32, sizes.samples, num_warps=4,
        maxnreg=128 if arch(products) >= 120 else None,  # the compiler would choose 80 there, and spill
    )  # fmt: skip
    launch(
        _sigreg_dz_kernel, V * tiles * -(-D // 64), products,
        upstream, dproducts, directions, dz, N, tiles, 2 / (S * V), S, D, 64, sizes.samples, sizes.depth, 3,
        num_warps=4,
    )  # fmt: skip
    return dz


# --- on a CPU ---------------------------------------------------------------------------------------------------------


def _rotation(products: torch.Tensor, J: int, limit: float) -> torch.Tensor:
    return torch.polar(torch.ones_like(products), products * (limit / (J - 1)))


def _plain_sums(products: torch.Tensor, J: int, limit: float) -> torch.Tensor:
    """`sigreg_fwd`'s sums `[V, 1, J - 1, 2, S]` of products `[V, N, S]`."""
    rotation = _rotation(products, J, limit)
    power, sums = rotation.clone(), [rotation.sum(1)]
    for _ in range(J - 2):
        sums.append(power.mul_(rotation).sum(1))
    return torch.view_as_real(torch.stack(sums, 1)).movedim(-1, 2)[:, None]


def _knots(K: int, limit: float, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions t, exp(-t^2 / 2) and weights, `[K, 1, 1]`, of the knots but t = 0, where both terms are 0.

    The weights are those of the trapezoidal rule on [-limit, limit], times exp(-t^2 / 2).
    """
    j = torch.arange(1, K + 1, device=like.device, dtype=like.dtype).view(-1, 1, 1)
    t = j * (limit / K)
    phi = (-t.square() / 2).exp()
    return t, phi, phi * (limit / K) * (2 - (j == K).to(j.dtype))


def _plain_statistic(
    sums: torch.Tensor, count: torch.Tensor | None, N: int, limit: float
) -> tuple[torch.Tensor, torch.Tensor]:
    V, _, knots, _, S = sums.shape
    t, phi, weights = _knots(knots, limit, sums)
    count = sums.new_full((), N) if count is None else count
    cos, sin = (sums.sum(1) / count.clamp_min(1)).split(1, 2)
    cos = cos - phi
    value = (weights * (cos.square() + sin.square())).sum() * count / (S * V)
    return value, weights * t * torch.cat([-cos, sin], 2)


def _plain_dproducts(products: torch.Tensor, coefficients: torch.Tensor, J: int, limit: float) -> torch.Tensor:
    rotation = _rotation(products, J, limit)
    terms = torch.view_as_complex(coefficients.movedim(2, -1).contiguous())[:, :, None]
    total = torch.zeros_like(rotation)
    for j in reversed(range(J - 1)):
        total.add_(terms[:, j]).mul_(rotation)
    return total.imag


# --- autograd ---------------------------------------------------------------------------------------------------------


def _over_ranks(sums: torch.Tensor, N: int, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and numbers of samples of all ranks of `group`, in one reduction."""
    total = sums.sum(1, keepdim=True)  # also where this rank has no samples and so no tiles
    both = torch.cat([total.flatten(), total.new_full((1,), N)])
    torch.distributed.all_reduce(both, group=group)
    return both[:-1].view_as(total), both[-1]


class _SigReg(Function):
    """Returns the value and what its gradient needs, as outputs so that differentiating them raises an error."""

    @staticmethod
    def forward(z, key, S, J, limit, group, kernel):
        (_, N, D), ops = z.shape, torch.ops.ajepa
        if kernel:
            directions = ops.sigreg_directions(key, S, D, z.dtype)
            products, sums = ops.sigreg_fwd(z, directions, J, limit)
        else:
            dtype = torch.promote_types(z.dtype, torch.float32)
            directions = ops.sigreg_plain_directions(key, S, D, dtype).to(z.dtype)
            products = z.to(dtype) @ directions.to(dtype).T
            sums = _plain_sums(products, J, limit)
        count = None
        if group is not None:
            sums, count = _over_ranks(sums, N, group)
        values, coefficients = (ops.sigreg_statistic if kernel else _plain_statistic)(sums, count, N, limit)
        return values.sum(), products, directions, coefficients

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, _, _, J, limit, _, kernel = inputs
        ctx.options = z.shape[1], J, limit, kernel
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    @first_order
    def backward(ctx, saved, upstream, *_):
        products, directions, coefficients = saved
        N, J, limit, kernel = ctx.options
        if upstream is None:
            dz = None
        elif kernel:
            dz = torch.ops.ajepa.sigreg_bwd(upstream, products, directions, coefficients, N, limit)
        else:
            V, S = products.shape[0], directions.shape[0]
            dproducts = _plain_dproducts(products, coefficients, J, limit) * (upstream * (2 / (S * V)))
            with torch.autocast(products.device.type, enabled=False):
                dz = (dproducts @ directions.to(dproducts.dtype)).to(directions.dtype)
        return dz, *[None] * 6


# --- public -----------------------------------------------------------------------------------------------------------


def _check(z: torch.Tensor, key: int | torch.Tensor, directions: int, knots: int, limit: float) -> None:
    if z.dim() not in (2, 3) or not z.is_floating_point() or 0 in (z.shape[-1], z.shape[0] if z.dim() == 3 else 1):
        raise ValueError(
            f"sigreg: z must be floating point [N, D] or [V, N, D] with V and D from 1, got {z.dtype} {list(z.shape)}"
        )
    if isinstance(key, torch.Tensor) and (key.dtype != torch.int64 or key.dim() or key.device != z.device):
        raise ValueError(
            f"sigreg: key must be an int or an int64 scalar on {z.device}, "
            f"got {key.dtype} {list(key.shape)} on {key.device}"
        )
    if directions < 1 or knots < 2 or not 0 < limit < math.inf:
        raise ValueError(
            f"sigreg: directions must be at least 1, knots at least 2 and limit positive, "
            f"got {directions}, {knots} and {limit}"
        )


def _tensor(key: int | torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return key if isinstance(key, torch.Tensor) else torch.full((), _signed(key), dtype=torch.int64, device=z.device)


def sigreg_reference(
    z: torch.Tensor,
    key: int | torch.Tensor,
    directions: int = 256,
    knots: int = 17,
    limit: float = 3.0,
    group: Any = None,
) -> torch.Tensor:
    """Plain PyTorch definition of `sigreg`, in float32 (float64 for float64 inputs).

    Autograd keeps `[V, N, S]` for each knot. With `group`, the value can be differentiated once.
    """
    _check(z, key, directions, knots, limit)
    z = z if z.dim() == 3 else z[None]
    dtype = torch.promote_types(z.dtype, torch.float32)
    A = torch.ops.ajepa.sigreg_plain_directions(_tensor(key, z), directions, z.shape[-1], dtype)
    A = A.to(z.dtype).to(dtype)
    with torch.autocast(z.device.type, enabled=False):
        y = z.to(dtype) @ A.T
    angles = [y * (limit / (knots - 1) * j) for j in range(1, knots)]
    sums = torch.stack([torch.stack([a.cos().sum(1), a.sin().sum(1)], 1) for a in angles], 1)[:, None]
    count = None
    if group is not None:
        total, count = _over_ranks(sums.detach(), z.shape[1], group)
        sums = sums + (total - sums.detach())
    return _plain_statistic(sums, count, z.shape[1], limit)[0]


def sigreg(
    z: torch.Tensor,
    key: int | torch.Tensor,
    *,
    directions: int = 256,
    knots: int = 17,
    limit: float = 3.0,
    group: Any = None,
    impl: str = "auto",
) -> torch.Tensor:
    """SIGReg, the sketched isotropic-Gaussian regulariser of LeJEPA (arXiv 2511.08544), by its characteristic function.

    Products y = z A^T with S random unit vectors A are compared with a standard Gaussian at the knots
    t_j = j limit / (J - 1), where phi_j = exp(-t_j^2 / 2) (Epps and Pulley's test)::

        C_sj = mean_n cos(t_j y_ns),   S_sj = mean_n sin(t_j y_ns)
        sigreg = (N / S) sum_s sum_j w_j ((C_sj - phi_j)^2 + S_sj^2)

    w_j is phi_j times the weight of the trapezoidal rule on [-limit, limit]: twice the spacing, and once at both ends.
    Independent samples of a standard Gaussian give sum_j w_j (1 - phi_j^2) on average, 1.05 at the defaults. The factor
    N makes the value of other distributions grow with the batch.

    Args:
        z: `[N, D]`, or `[V, N, D]` for the mean over V views, which share the directions. The kernels take bfloat16,
            float16 or float32 and D up to 4,096. Float32 products are as precise as float32 (three TF32 products);
            others add up in float32. Autocast does not change the computation.
        key: determines the directions. An int, of which the lowest 64 bits count, or an int64 scalar tensor on z's
            device, which a CUDA graph reads at each replay and for which torch.compile does not recompile. Every
            implementation draws the same directions up to rounding, rounded to the dtype of z.
        directions: S.
        knots: J, from 2.
        limit: the last knot.
        group: a `torch.distributed` process group, over which the sums of cosines and sines and the numbers of samples
            are added up: every rank gets the value of the whole batch, and the gradient of that value with respect to
            its own z. All ranks must pass the same key. DistributedDataParallel averages gradients over ranks, so
            multiply the loss by their number. None means no reduction.
        impl: "auto" runs the Triton kernels on a GPU, or warns once and runs plain PyTorch if they cannot run. On a CPU
            it runs plain PyTorch that obtains each knot from the previous one by a complex rotation. "triton" requires
            the kernels, "reference" is the plain definition.

    Returns:
        A float32 scalar (float64 for float64); 0 if there are no samples. Only z receives a gradient.

    Memory: products `[V, N, S]`, their gradient, and sums `[V, J - 1, 2, S]` of each tile of samples; never
    `[N, S, J]`. The sums are taken in a fixed order.
    Saved for backward: products, directions, and the coefficients of the gradient `[V, J - 1, 2, S]`.
    `torch.func.grad` works; `torch.vmap` needs impl="reference".

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes, devices or options are invalid; raised before any launch.
        RuntimeError: the gradient is differentiated again; impl="reference" allows it.

    Example::

        z = torch.randn(2, 1024, 128, device="cuda", requires_grad=True)
        step = torch.zeros((), device="cuda", dtype=torch.int64)
        sigreg(z, step, directions=1024).backward()
    """
    check_tensors("sigreg", z=z)
    _check(z, key, directions, knots, limit)
    unsupported = ""
    if z.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        unsupported = f"no kernel for {z.dtype}"
    elif z.shape[-1] > MAX_WIDTH:
        unsupported = f"no kernel for width {z.shape[-1]}, only up to {MAX_WIDTH}"
    kernel = use_triton("sigreg", impl, z, unsupported)
    if impl == "reference":
        return sigreg_reference(z, key, directions, knots, limit, group)
    views = z if z.dim() == 3 else z[None]
    with torch.autocast(z.device.type, enabled=False):
        return _SigReg.apply(views, _tensor(key, z), directions, knots, float(limit), group, kernel)[0]
