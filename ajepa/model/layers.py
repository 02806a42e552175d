"""Parts of the encoders: positions, a linear layer that can read a low-precision copy, and the transformer block.

Shapes: T packed tokens, C width, H heads, D head dim.
"""

from typing import NamedTuple

import torch
from torch import nn

from ajepa_kernels import (
    Quantized,
    ResidualStream,
    Scaling,
    add_layer_norm,
    bias_gelu,
    fp8_linear,
    fp8_linear_gelu,
    gelu_mlp,
    linear_residual,
    masked_attention,
    norm_quantize,
    quantize,
)


def sincos_positions(width: int, grid: tuple[int, int]) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions `[F * T, width]`: one half encodes the frequency row, the other half the time."""
    half = [_angles(width // 2, size) for size in grid]
    axes = [torch.cat([a.sin(), a.cos()], dim=1) for a in half]
    rows = axes[0][:, None].expand(-1, grid[1], -1)
    columns = axes[1][None].expand(grid[0], -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).float()


def rotary_positions(head_dim: int, grid: tuple[int, int]) -> torch.Tensor:
    """2-D rotary angles (cos, sin), `[F * T, 2, head_dim / 2]`: half the pairs encode frequency, half encode time."""
    rows, columns = (_angles(head_dim // 2, size) for size in grid)
    angles = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], dim=-1).flatten(
        0, 1
    )
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()


def _angles(width: int, size: int) -> torch.Tensor:
    frequencies = 10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.arange(size, dtype=torch.float64)[:, None] * frequencies


def rotate(x_THD: torch.Tensor, rotary_T2D: torch.Tensor) -> torch.Tensor:
    cos, sin = rotary_T2D.to(x_THD.dtype)[:, :, None].unbind(1)
    a, b = x_THD.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class _CopyLinear(torch.autograd.Function):
    """y = x W^T + b from low-precision copies of W and b (b may be None). W and b get their gradients in float32."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_copy, bias_copy):
        ctx.save_for_backward(x, weight_copy)
        return nn.functional.linear(x, weight_copy, bias_copy)

    @staticmethod
    def backward(ctx, dy):
        x, weight_copy = ctx.saved_tensors
        dx = dy @ weight_copy if ctx.needs_input_grad[0] else None
        rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dw = torch.mm(dy_rows.T, rows, out_dtype=torch.float32) if dy.is_cuda else (dy_rows.T @ rows).float()
        db = None
        if ctx.needs_input_grad[2]:  # a CPU would first convert all rows to float32
            db = dy_rows.sum(0, dtype=torch.float32) if dy.is_cuda else dy_rows.sum(0).float()
        return dx, dw, db, None, None


class Addend(NamedTuple):
    """What the next layer norm adds to the residual stream; or the stream itself, if a product has added to it."""

    x: torch.Tensor | ResidualStream
    bias: torch.Tensor | None = None  # already added in x; the norm computes its gradient, see `Linear.split_bias`

    def plus(self, stream: torch.Tensor | ResidualStream | None) -> torch.Tensor:
        """The sum, with the gradient of the bias."""
        parts = [t.joined() if isinstance(t, ResidualStream) else t for t in (self.x, stream) if t is not None]
        parts += [] if self.bias is None else [self.bias - self.bias.detach()]
        return sum(parts[1:], parts[0])


class Table(NamedTuple):
    """A residual stream that has no addend yet: rows of a table without a gradient. The first layer norm reads them."""

    values: torch.Tensor | ResidualStream  # [R, C]
    rows: torch.Tensor  # int64 [T]


class Linear(nn.Linear):
    """`nn.Linear` that computes with copies of its parameters in a lower precision after `add_copies`.

    The copies replace the casts of autocast. Code that updates the parameters must also write the copies. After
    `use_fp8` the layer multiplies in float8 when no gradient is needed, and the copy of its weight is in float8.
    """

    copies: tuple[torch.Tensor, torch.Tensor] | None = None
    scalings: tuple[Scaling, Scaling] | None = None  # of the input and of the weight's copy, in float8

    def use_fp8(self, states: torch.Tensor) -> None:
        """states `[2, 8]`: those of the scalings of input and weight."""
        self.scalings = (Scaling(states[0]), Scaling(states[1]))

    def add_copies(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Create the copies. Returns the pairs (parameter, copy)."""
        small = dtype if self.scalings is None else torch.float8_e4m3fn
        self.copies = (torch.empty_like(self.weight, dtype=small), torch.empty_like(self.bias, dtype=dtype))
        self.write_copies()
        return list(zip((self.weight, self.bias), self.copies, strict=True))

    @property
    def quantizes(self) -> bool:
        return self.scalings is not None and not torch.is_grad_enabled()

    @property
    def scaling(self) -> Scaling | None:
        """Of the input. Evaluation takes the scale of the present values, and so leaves the training's as it is."""
        return self.scalings[0] if self.scalings is not None and self.training else None

    @property
    def quantized_weight(self) -> Quantized | None:
        """The copy of the weight, if it is in float8."""
        if self.copies is None or self.scalings is None:
            return None
        return Quantized(self.copies[0], self.scalings[1].scale)

    @torch.no_grad()
    def write_copies(self) -> None:
        """Refresh the copies after something other than the optimiser has set the parameters."""
        weight: torch.Tensor = self.weight
        if self.scalings is not None:
            self.scalings[0].loaded()
            if self.copies is not None:
                self.scalings[1].loaded(weight)
                weight = quantize(weight, self.scalings[1]).values
        for copy, value in zip(self.copies or (), (weight, self.bias), strict=False):
            copy.copy_(value)

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self.write_copies()

    def forward(self, x: torch.Tensor | Quantized, outputs: slice | None = None, biased: bool = True) -> torch.Tensor:
        """`outputs` selects a slice of the output features. `biased` adds the bias."""
        parameters = (self.weight, self.bias, *(self.copies or ()))
        if outputs is not None:
            parameters = tuple(p[outputs] for p in parameters)
        if not biased:
            parameters = tuple(p if p.dim() == 2 else None for p in parameters)
        if self.scalings is not None and self.quantizes:
            *_, weight, bias = parameters
            x = x if isinstance(x, Quantized) else quantize(x, self.scaling)
            return fp8_linear(x, weight if self.copies is None else Quantized(weight, self.scalings[1].scale), bias)
        assert isinstance(x, torch.Tensor)
        if self.copies is None or self.scalings is not None:
            return nn.functional.linear(x, *parameters[:2])
        return _CopyLinear.apply(x.to(self.copies[0].dtype), *parameters)

    def split_bias(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The bias to add, and the bias whose gradient is left to the op that reads the output, or None.

        That op reads the gradient of the output anyway, so that no pass over it remains. Without copies of the weights
        the layer computes the gradient itself: sharded weights must not be read outside their own block.
        """
        if self.copies is None or self.scalings is not None or not torch.is_grad_enabled():
            return self.bias, None
        return self.bias.detach(), self.bias

    def addend(self, x: torch.Tensor | Quantized) -> Addend:
        _, bias = self.split_bias()
        if bias is None:
            return Addend(self(x))
        assert isinstance(x, torch.Tensor) and self.copies is not None
        return Addend(_CopyLinear.apply(x.to(self.copies[0].dtype), self.weight, None, *self.copies), bias)

    def add_to(self, stream: torch.Tensor | ResidualStream, x: torch.Tensor, impl: str) -> Addend:
        """The stream after this layer's output was added to it, within the product."""
        bias, left = self.split_bias()
        return Addend(linear_residual(x, self.weight, bias, stream, copies=self.copies, impl=impl), left)


class _UniqueRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows):
        ctx.save_for_backward(rows)
        ctx.length = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy):
        (rows,) = ctx.saved_tensors
        return dy.new_zeros(ctx.length, *dy.shape[1:]).index_copy_(0, rows, dy), None


def unique_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """x[rows] for rows without repeats. Its gradient is an indexed copy; `index_select` would sum with atomics."""
    return _UniqueRows.apply(x, rows)


class Sequences(NamedTuple):
    """Packed tokens: the start of each sequence and the length of the longest."""

    cu: torch.Tensor  # int32 [R + 1]
    longest: int
    keys: torch.Tensor | None = None  # bool [T]: tokens that may be attended to; every token is a query


class Wanted(NamedTuple):
    """The tokens of each sequence whose outputs are needed."""

    rows: torch.Tensor  # int64 [Tw], rows of the packed tokens without repeats
    sequences: Sequences


class Block(nn.Module):
    """Pre-LN transformer block on packed tokens.

    It takes and returns a pair (addend, stream) whose sum is the residual stream. The next layer norm does the
    addition, because it reads both tensors anyway. Where products add to the stream, the addend is the whole sum.
    """

    mlp = "plain"  # see StepConfig.mlp
    adds_in_product = False  # see StepConfig.residual

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, addend: Addend, stream, sequences: Sequences, rotary, impl: str, wanted: Wanted | None = None):
        normed, stream = add_norm(addend, stream, self.norm1, impl, self.qkv)
        if wanted is None:
            attended = self.attend(normed, sequences, rotary, impl)
        else:
            attended = self.attend_wanted(normed, sequences, rotary, impl, wanted)
            stream = select_rows(stream, wanted.rows)
        addend, stream = self.add(self.proj, attended.flatten(1), stream, impl)
        normed, stream = add_norm(addend, stream, self.norm2, impl, self.fc1)
        return self.transform(normed, stream, impl)

    def add(self, layer: Linear, x, stream, impl: str):
        """The pair (addend, stream) after `layer`, at the end of a residual branch."""
        if self.adds_in_product and not layer.quantizes:
            return layer.add_to(stream, x, impl), None
        return layer.addend(x), stream

    def transform(self, normed, stream, impl: str):
        """The pair (addend, stream) after the MLP."""
        fc1, fc2 = self.fc1, self.fc2
        if fc2.quantizes:
            return Addend(fc2(self.quantized_gelu(normed, impl))), stream
        if self.mlp == "bias-gelu":
            return self.add(fc2, bias_gelu(fc1(normed, biased=False), fc1.bias, impl=impl), stream, impl)
        if self.mlp == "plain":
            return self.add(fc2, nn.functional.gelu(fc1(normed)), stream, impl)
        copies = None if fc1.copies is None or fc2.copies is None else (*fc1.copies, *fc2.copies)
        bias, left = fc2.split_bias()
        residual = stream if self.adds_in_product else None
        y = gelu_mlp(normed, fc1.weight, fc1.bias, fc2.weight, bias, residual=residual, copies=copies, impl=impl)
        return Addend(y, left), stream if residual is None else None

    def quantized_gelu(self, normed, impl: str) -> Quantized:
        """The input of a float8 fc2."""
        if self.mlp == "epilogue" and isinstance(normed, Quantized) and (weight := self.fc1.quantized_weight):
            return fp8_linear_gelu(normed, weight, self.fc1.bias, self.fc2.scaling, impl=impl)
        return quantize(self.fc1(normed), self.fc2.scaling, gelu="none", impl=impl)

    def attend(self, normed, sequences: Sequences, rotary, impl: str):
        if rotary is None:
            qkv, bias = self.qkv.addend(normed)
        else:  # attention reads other values than those to which the bias was added
            qkv, bias = self.qkv(normed), None
        assert isinstance(qkv, torch.Tensor)
        qkv = qkv.unflatten(-1, (3, self.heads, -1))
        if rotary is not None:
            q, k, v = qkv.unbind(1)
            qkv = torch.stack([rotate(q, rotary), rotate(k, rotary), v], dim=1)
        return masked_attention(
            qkv, cu_seqlens=sequences.cu, max_seqlen=sequences.longest, key_mask=sequences.keys, qkv_bias=bias,
            impl=impl,
        )  # fmt: skip

    def attend_wanted(self, normed, sequences: Sequences, rotary, impl: str, wanted: Wanted):
        """All tokens are keys; only the wanted tokens are queries."""
        width = self.qkv.in_features
        queried = normed.rows(wanted.rows) if isinstance(normed, Quantized) else unique_rows(normed, wanted.rows)
        q = self.qkv(queried, slice(0, width)).unflatten(-1, (self.heads, -1))
        k, v = self.qkv(normed, slice(width, None)).unflatten(-1, (2, self.heads, -1)).unbind(1)
        if rotary is not None:
            q, k = rotate(q, rotary.index_select(0, wanted.rows)), rotate(k, rotary)
        queries = wanted.sequences
        return masked_attention(
            q, k, v, cu_seqlens=queries.cu, max_seqlen=queries.longest, cu_seqlens_k=sequences.cu,
            max_seqlen_k=sequences.longest, impl=impl,
        )  # fmt: skip


def select_rows(stream, rows: torch.Tensor):
    """A residual stream, or None, at rows without repeats."""
    if stream is None:
        return None
    return stream.select(rows) if isinstance(stream, ResidualStream) else unique_rows(stream, rows)


def add_norm(addend: Addend, stream, norm: nn.LayerNorm, impl: str, reader: Linear | None = None):
    """Return layer_norm(addend + stream) and the sum. The norm is in float8 if its `reader` multiplies in float8."""
    rows = None
    if isinstance(stream, Table):
        stream, rows = stream
    if reader is not None and reader.quantizes:
        stream = stream if rows is None else stream[rows]
        assert isinstance(addend.x, torch.Tensor)
        return norm_quantize(addend.x, stream, norm.weight, norm.bias, norm.eps, reader.scaling, impl=impl)
    return add_layer_norm(addend.x, stream, norm.weight, norm.bias, norm.eps, x_bias=addend.bias, rows=rows, impl=impl)


def mean_of_layers(outputs: list[torch.Tensor], eps: float) -> torch.Tensor:
    """The average of layers' outputs `[..., C]`, each layer-normalised without affine parameters, in float32."""
    return torch.stack([nn.functional.layer_norm(x.float(), x.shape[-1:], eps=eps) for x in outputs]).mean(0)
