"""The registered operations of `masked_attention` and their launches. Shapes and terms as in `__init__.py`."""

from __future__ import annotations

from typing import Any

import torch

from ajepa_kernels._autograd import Function, first_order
from ajepa_kernels._triton import arch, launch, multiprocessors, power_of_2, register
from ajepa_kernels._tuned import LONG, Tiles, tuned
from ajepa_kernels.attention.kernels import (
    _masked_attention_bwd_kernel,
    _masked_attention_delta_kernel,
    _masked_attention_fwd_kernel,
    _masked_attention_long_bwd_kernel,
    _masked_attention_long_fwd_kernel,
    _masked_attention_tiled_bwd_kernel,
)
from ajepa_kernels.attention.layout import Layout
from ajepa_kernels.attention.rotary import Tables

HEAD_DIMS = tuple(range(8, 257, 8))  # rows of other head dims are not aligned to 16 bytes


def why_no_kernel(q: torch.Tensor) -> str:
    """The reason why no kernel takes `q`; empty where one does."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {q.dtype}"
    if (D := q.shape[-1]) % 8 or not 8 <= D <= 256:  # torch.compile cannot look a symbolic size up in a range
        remedy = f": pad q, k and v with {-D % 8} channels of zeros, and pass scale={D} ** -0.5" if D < 256 else ""
        return f"no kernel for head dim {D}, only for multiples of 8 up to 256{remedy}"
    return ""


def _block_d(D: int) -> int:
    """The channels of a tile. Those beyond D are zero and are neither read nor written."""
    return max(power_of_2(D), 32)


def _tiles(q: torch.Tensor, op: str, S: int) -> Any:
    """The table's entry for this head dim, or for the channels of its tiles."""
    bits, D = 8 * q.element_size(), int(q.shape[-1])  # torch.compile may hand over a symbol
    return tuned(q, op, bits, S, D) or tuned(q, op, bits, S, _block_d(D))


def _longest_tile(q: torch.Tensor) -> int:
    """The longest sequence, a power of two, whose keys fit on chip at once. Both passes are then one launch each."""
    fits = lambda S: _tiles(q, "attention_fwd", S) and _tiles(q, "attention_bwd", S)  # noqa: E731
    return max(S for S in (16, 32, 64, 128) if fits(S))


def _config(q: torch.Tensor, max_q: int, max_k: int, op: str) -> tuple[bool, Tiles]:
    """Whether one tile holds all keys, and the launch configuration for this GPU, dtype and rounded size."""
    longest = max(max_q, max_k)
    tile = max(power_of_2(longest), 16)
    if tile > _longest_tile(q):
        return False, _tiles(q, op, LONG)
    between = (_tiles(q, op, S) for S in (80, 96) if 64 < longest <= S)
    return True, next(filter(None, between), None) or _tiles(q, op, tile)


def _one_tile(q: torch.Tensor, max_q: int, max_k: int, turns: bool) -> bool:
    """Whether one tile holds all keys. Kernels that turn q and k have no registers for more than 64 wide ones."""
    longest = min(_longest_tile(q), 128 if not turns or q.shape[-1] <= 64 else 64 if q.shape[-1] <= 128 else 16)
    return max_q <= longest and max_k <= longest


def _own(q: torch.Tensor, one_tile: bool, config: Tiles, op: str) -> Tiles:
    """The configuration in place of `config` where `op`, a variant that needs more registers, has an entry."""
    length = config.block_k + config.tail if one_tile else LONG
    return _tiles(q, op, length) or config


def _options(config: Tiles) -> dict[str, int | None]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.max_registers}


def _heads(q: torch.Tensor, config: Tiles, sequences: int) -> tuple[int, int]:
    """How many heads a program takes one after the other, and the programs of a sequence.

    A program takes as many heads as the configuration allows while a multiprocessor has 3.5 programs. With 132
    multiprocessors, 256 or 1024 sequences then fill whole rounds of one, two or four programs on each to 97 %.
    """
    H, programs = q.shape[-2], 7 * multiprocessors(q) // 2
    groups = max(-(-H // config.heads), min(H, -(-programs // max(sequences, 1))))
    heads = -(-H // groups)
    return heads, -(-H // heads)


def _keys(one_tile: bool, q_start, q_end, q_rows, k_start, k_end, k_rows):
    """The keys' part of the layout as the kernels take it. Where `k_start` is None, the queries' slots hold the keys: a
    kernel of one tile then reads the offsets once. A kernel of several tiles gets the offsets twice, because it would
    need more registers if it knew that both are the same."""
    if k_start is not None:
        return k_start, k_end, k_rows
    return (None, None, q_rows) if one_tile else (q_start, q_end, q_rows)


def _blocks(causal: int, max_q: int) -> int | None:
    """`causal` as the kernels take it: None where one block holds every sequence."""
    return causal if 0 < causal < max_q else None


def _tables(q, k, q_cos, q_sin, k_cos, k_sin):
    """The rotary tables of q and k, and after how many rows they repeat; None where they do not."""
    k_cos, k_sin = (q_cos, q_sin) if k_cos is None else (k_cos, k_sin)
    periods = (None if t is None or len(t) == len(x) else len(t) for x, t in ((q, q_cos), (k, k_cos)))
    return (q_cos, q_sin, k_cos, k_sin, *periods)


def _operands(q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None):
    """q, k and v as the `[rows, H, D]` views that the kernels take: heads and channels contiguous."""
    tensors = q.unbind(1) if k is None or v is None else (q, k, v)
    return [x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous() for x in tensors]


def _masked_attention_fwd_fake(
    q, k, v, q_start, q_end, q_rows, k_start, k_end, k_rows, max_q, max_k, slots, scatter, causal, order, scale, tf32,
    q_cos=None, q_sin=None, k_cos=None, k_sin=None, interleaved=True, pairs=0,
):  # fmt: skip
    H, D = q.shape[-2:]
    one_tile = _one_tile(q, max_q, max_k, q_cos is not None)
    return q.new_empty(q.shape[0] if scatter else slots, H, D), q.new_empty(
        (0 if one_tile else H, slots), dtype=torch.float32
    )


_LAYOUT = (
    "Tensor q_start, Tensor q_end, Tensor? q_rows, Tensor? k_start, Tensor? k_end, Tensor? k_rows, "
    "SymInt max_q, SymInt max_k, SymInt slots, bool scatter, SymInt causal, Tensor? order, float scale, bool tf32, "
    "Tensor? q_cos=None, Tensor? q_sin=None, Tensor? k_cos=None, Tensor? k_sin=None, bool interleaved=True, int pairs=0"
)


@register(
    f"masked_attention_fwd(Tensor q, Tensor? k, Tensor? v, {_LAYOUT}) -> (Tensor out, Tensor lse)",
    _masked_attention_fwd_fake,
)
def _masked_attention_fwd(
    q, k, v, q_start, q_end, q_rows, k_start, k_end, k_rows, max_q, max_k, slots, scatter, causal, order, scale, tf32,
    q_cos=None, q_sin=None, k_cos=None, k_sin=None, interleaved=True, pairs=0,
):  # fmt: skip
    """If k is None, q is `[rows, 3, H, D]`. lse (base 2, `[H, slots]`) is written only for long sequences. `causal` and
    `order` as in `Layout`, the tables as in `Tables`."""
    one_tile, config = _config(q, max_q, max_k, "attention_fwd")
    if q_cos is not None:
        if one_tile and not _one_tile(q, max_q, max_k, True):
            one_tile, config = False, _tiles(q, "attention_fwd", LONG)
        config = _own(q, one_tile, config, "attention_rotary_fwd")
    elif causal or order is not None:
        config = _own(q, one_tile, config, "attention_causal_fwd")
    k_start, k_end, k_rows = _keys(one_tile, q_start, q_end, q_rows, k_start, k_end, k_rows)
    allocate = torch.zeros if scatter else torch.empty  # rows that no sequence owns must be zero
    H, D = q.shape[-2:]
    out = allocate(q.shape[0] if scatter else slots, H, D, dtype=q.dtype, device=q.device)
    lse = allocate(0 if one_tile else H, slots, dtype=torch.float32, device=q.device)
    q, k, v = _operands(q, k, v)
    R, tiles, strides = q_start.shape[0], -(-max_q // config.block_q), [x.stride(0) for x in (q, k, v)]
    tables = _tables(q, k, q_cos, q_sin, k_cos, k_sin)
    layout = (q_start, q_end, q_rows, k_start, k_end, k_rows, order, _blocks(causal, max_q), *tables)
    sizes = (D, _block_d(D), config.block_q, config.block_k)
    consts = (scatter, "tf32" if tf32 else "ieee", None if q_cos is None else (pairs, q_cos.shape[1], interleaved))
    if one_tile:
        heads, groups = _heads(q, config, R * tiles)
        launch(
            _masked_attention_fwd_kernel, R * tiles * groups, q,
            q, k, v, out, *layout, scale, heads, tiles, H, *strides, *sizes, config.tail, *consts, **_options(config),
        )  # fmt: skip
    else:
        launch(
            _masked_attention_long_fwd_kernel, R * tiles * H, q,
            q, k, v, out, lse, *layout, *strides, slots, scale, H, tiles, *sizes, *consts, **_options(config),
        )  # fmt: skip
    return out, lse


def _masked_attention_bwd_fake(
    do, q, k, v, out, lse, bias,
    q_start, q_end, q_rows, k_start, k_end, k_rows, max_q, max_k, slots, scatter, causal, order, scale, tf32,
    q_cos=None, q_sin=None, k_cos=None, k_sin=None, interleaved=True, pairs=0,
):  # fmt: skip
    dbias = q.new_empty(q.shape[1:] if bias else 0, dtype=torch.float32)
    if k is None:
        return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(0), q.new_empty(0), dbias
    return *(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), dbias


@register(
    "masked_attention_bwd(Tensor do, Tensor q, Tensor? k, Tensor? v, Tensor? out, Tensor? lse, bool bias, "
    f"{_LAYOUT}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    _masked_attention_bwd_fake,
)
def _masked_attention_bwd(
    do, q, k, v, out, lse, bias,
    q_start, q_end, q_rows, k_start, k_end, k_rows, max_q, max_k, slots, scatter, causal, order, scale, tf32,
    q_cos=None, q_sin=None, k_cos=None, k_sin=None, interleaved=True, pairs=0,
):  # fmt: skip
    """If k is None, dq holds all three gradients. out and lse are read only for long sequences. `bias` asks for dbias,
    the sum of dq over its rows in float32, where k is None."""
    one_tile, config = _config(q, max_q, max_k, "attention_bwd")
    if q_cos is not None:
        if one_tile and not _one_tile(q, max_q, max_k, True):
            one_tile, config = False, _tiles(q, "attention_bwd", LONG)
        config = _own(q, one_tile, config, "attention_rotary_bwd")
    elif causal or order is not None:
        config = _own(q, one_tile, config, "attention_causal_bwd")
    k_start, k_end, k_rows = _keys(one_tile, q_start, q_end, q_rows, k_start, k_end, k_rows)
    # where rows are gathered, a row that no sequence owns has zero gradient
    allocate = torch.empty_like if q_rows is None and k_rows is None else torch.zeros_like
    grads = [allocate(x, memory_format=torch.contiguous_format) for x in ([q] if k is None else [q, k, v])]
    dq, dk, dv = grads[0].unbind(1) if k is None else grads
    H, D = q.shape[-2:]
    q_, k_, v_ = _operands(q, k, v)
    do = do.contiguous()
    strides = [x.stride(0) for x in (q_, k_, v_, dq, dk, dv)]
    R, tables = q_start.shape[0], _tables(q_, k_, q_cos, q_sin, k_cos, k_sin)
    layout = (q_start, q_end, q_rows, k_start, k_end, k_rows, order, _blocks(causal, max_q), *tables)
    sizes = (D, _block_d(D), config.block_q, config.block_k)
    consts = (scatter, "tf32" if tf32 else "ieee", None if q_cos is None else (pairs, q_cos.shape[1], interleaved))
    options = _options(config)
    # for each sequence, a row of sums for the queries and one for the values
    sums = torch.empty(R, 2, H, D, dtype=torch.float32, device=q.device) if bias and one_tile else None
    if one_tile and config.block_q < config.block_k + config.tail:
        launch(
            _masked_attention_tiled_bwd_kernel, R * H, q_,
            q_, k_, v_, do, dq, dk, dv, sums, *layout, *strides, scale, H, *sizes, *consts, **options,
        )  # fmt: skip
    elif one_tile:
        heads, groups = _heads(q, config, R)
        warp_groups = arch(q) // 10 == 9 and q.element_size() == 2 and D >= 64  # a product's rows are channels
        launch(
            _masked_attention_bwd_kernel, R * groups, q_,
            q_, k_, v_, do, dq, dk, dv, sums, *layout, scale, heads, H, *strides, *sizes, config.tail, *consts,
            warp_groups, **options,
        )  # fmt: skip
    else:
        delta = torch.empty_like(lse)
        tiles = -(-max_q // 32)
        launch(
            _masked_attention_delta_kernel, R * tiles * H, q_,
            out, do, delta, q_start, q_end, q_rows, slots, H, tiles, D, _block_d(D), 32, scatter, num_warps=4,
        )  # fmt: skip
        tiles = -(-max(max_q, max_k) // config.block_k)
        launch(
            _masked_attention_long_bwd_kernel, R * tiles * H, q_,
            q_, k_, v_, do, lse, delta, dq, dk, dv, *layout, *strides, slots, scale, H, tiles, *sizes, *consts,
            **options,
        )  # fmt: skip
    dbias = torch.zeros(q.shape[1:] if bias else 0, dtype=torch.float32, device=q.device)
    if sums is not None:
        dbias[::2] = sums.sum(0)
    elif bias:
        dbias = grads[0].sum(0, dtype=torch.float32)
    return (*grads, q.new_empty(0), q.new_empty(0), dbias) if k is None else (*grads, dbias)


class MaskedAttention(Function):
    """Returns the output, and the log-sum-exps that its backward may need. `bias` goes with joint qkv, see qkv_bias."""

    @staticmethod
    def forward(q, k, v, bias, scale, tf32, *rest):
        tables, layout = rest[: len(Tables._fields)], rest[len(Tables._fields) :]
        return torch.ops.ajepa.masked_attention_fwd(q, k, v, *layout, scale, tf32, *tables)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, bias, ctx.scale, ctx.tf32, *rest = inputs
        tables, layout = Tables(*rest[: len(Tables._fields)]), Layout(*rest[len(Tables._fields) :])
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.numbers, ctx.pairs = layout[6:-1], tables[4:]
        # short sequences recompute their probabilities from q and k
        ctx.save_for_backward(
            q, k, v, *((out, lse) if lse.shape[0] else (None, None)), *layout[:6], layout.order, *tables[:4]
        )

    @staticmethod
    @first_order
    def backward(ctx, saved, do, _):
        dq = dk = dv = dbias = None
        if do is not None:
            sums = ctx.bias is not None and ctx.needs_input_grad[3]
            dq, dk, dv, dbias = torch.ops.ajepa.masked_attention_bwd(
                do,
                *saved[:5],
                sums,
                *saved[5:11],
                *ctx.numbers,
                saved[11],
                ctx.scale,
                ctx.tf32,
                *saved[12:],
                *ctx.pairs,
            )
            dk, dv = (None, None) if saved[1] is None else (dk, dv)
            dbias = dbias.view(ctx.bias[0]).to(ctx.bias[1]) if sums else None
        return dq, dk, dv, dbias, *[None] * (2 + len(Tables._fields) + len(Layout._fields))
