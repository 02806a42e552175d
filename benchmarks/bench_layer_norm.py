"""Benchmark add_layer_norm against an addition followed by torch's layer norm, eager and compiled.

A time is milliseconds per call. The step adds a bfloat16 `x` to a float32 residual stream, with float32 weight and
bias, and asks for a bfloat16 `normed`. The names of these cases say "fp32 stream". The floor is the bytes that must
move, divided by the copy rate measured in the same run. These cases move the following bytes per element:

    forward   12: reads x (2) and residual (4); writes sum (4) and normed (2)
    backward  16: reads sum (4) and the gradients of normed (2) and sum (4); writes those of x (2) and residual (4)

If all tensors have one dtype, x and residual share one gradient, so that 4 tensors move forward and 4 backward.

"With the bias" also wants the gradient of the bias of the layer before, as the step does. It is timed against a pass of
its own over the gradient of x. "bf16 gradient" rounds the gradient of the stream to bfloat16, so that x and residual
share one gradient and a backward pass moves 10 bytes per element.

"RMS norm" subtracts no mean. "Scaled" multiplies x by LayerScale's factors of the channels and by drop path's factors
of samples of 64 rows; its backward pass also reads x, 18 bytes per element in all. Plain PyTorch makes a pass for each.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from ceilings import SECONDS, backward_only, copy_bytes_per_ms, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa_kernels import ResidualStream, add_layer_norm
from ajepa_kernels._autograd import BiasGradient

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SIZES = [(65536, 768), (131072, 384)] if DEVICE == "cuda" else [(256, 64)] if QUICK else [(4096, 768), (8192, 384)]
CHECKED = 8192  # rows that are compared with float64
BYTES = {"forward": 12, "backward": 16}  # per element, with a float32 stream
TOKENS = 64  # of a sample


def plain(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias).to(x.dtype), total


def norm_with_bias(x, residual, weight, bias, x_bias):
    return add_layer_norm(x, residual, weight, bias, x_bias=x_bias)


def plain_with_bias(x, residual, weight, bias, x_bias):
    """The bias has been added to x already: only its gradient is computed."""
    return plain(BiasGradient.apply(x, x_bias), residual, weight, bias)


def sum_apart(x, residual, weight, bias, x_bias):
    return add_layer_norm(BiasGradient.apply(x, x_bias), residual, weight, bias)


def rms_norm(x, residual, weight):
    return add_layer_norm(x, residual, weight, rms=True)


def plain_rms_norm(x, residual, weight):
    total = x + residual
    return F.rms_norm(total, total.shape[-1:], weight, 1e-5).to(x.dtype), total


@functools.cache
def kept(samples, dtype):
    """Return the factors of a drop path that drops every tenth sample."""
    return (torch.arange(samples, device=DEVICE) % 10 > 0).to(dtype) / 0.9


def scaled(function):
    """Return `function` of tensors `[M, C]` that sees samples `[B, TOKENS, C]`, and their factors."""

    def call(x, residual, *vectors):
        x, residual = (t.view(-1, TOKENS, t.shape[-1]) for t in (x, residual))
        return tuple(t.flatten(0, 1) for t in function(x, residual, *vectors, kept(len(x), x.dtype)))

    return call


def scaled_norm(x, residual, weight, bias, gamma, factors):
    return add_layer_norm(x, residual, weight, bias, layer_scale=gamma, sample_scale=factors)


def plain_scaled_norm(x, residual, weight, bias, gamma, factors):
    total = residual + x * gamma * factors[:, None, None]
    return F.layer_norm(total, total.shape[-1:], weight, bias).to(x.dtype), total


def both_ways(function, leaves, upstream):
    """Return the outputs, and the gradients of all leaves."""
    outputs = function(*leaves)
    return (*outputs, *torch.autograd.grad(outputs, leaves, upstream))


def compare(shape, M, C, half, stream, way, bytes_each, interleave, record, ours=None, plain=plain, vectors=2):
    """Check and time `way` on M rows of C channels.

    half: dtype of x. stream: dtype of the residual and of the parameters. ours: our variants; vectors: their number of
    parameters.
    """

    def make(rows=M):
        def draw(dtype, *size):
            return torch.randn(*size, device=DEVICE, dtype=dtype)

        leaves = draw(half, rows, C), draw(stream, rows, C), *(draw(stream, C) for _ in range(vectors))
        upstream = draw(half, rows, C), draw(stream, rows, C)
        return tuple(t.requires_grad_() for t in leaves), upstream

    functions = {**(ours or {"ajepa add_layer_norm": add_layer_norm}), "plain PyTorch": plain}
    if QUICK:
        left_out({"torch.compile": "compiled peers are left out of a quick run"})
    else:
        torch.compiler.reset()  # together with dynamic=False, so that each case is compiled for its own shapes
        functions["torch.compile"] = torch.compile(plain, dynamic=False)
    leaves, upstream = make(min(M, CHECKED))
    doubles = tuple(t.detach().double().requires_grad_() for t in leaves), tuple(t.double() for t in upstream)
    want = both_ways(plain, *doubles)
    for name, function in functions.items():
        for got, right in zip(both_ways(function, leaves, upstream), want, strict=True):
            bound = (4 if got.dim() == 2 else 64) * torch.finfo(half).eps  # vectors are sums over the rows
            assert (got.double() - right).norm() < bound * right.norm(), name

    def timed(function):
        def build():
            leaves, upstream = make()
            return function(*leaves), leaves, upstream

        if way == "backward":
            return backward_only(build, bytes_each)
        if way == "forward":
            return rotating(lambda leaves, upstream: function(*leaves), make, bytes_each)
        return rotating(lambda leaves, upstream: both_ways(function, leaves, upstream), make, bytes_each)

    times = interleave({name: timed(function) for name, function in functions.items()}, SECONDS)
    floor = bytes_each / copy_bytes_per_ms()
    record("add_layer_norm", shape, times, plain="plain PyTorch", peers=["torch.compile"], floor_ms=floor)
    if DEVICE == "cpu":
        left_out({"the kernel": "needs a GPU; on a CPU add_layer_norm runs its plain definition"})


@pytest.mark.parametrize("way", BYTES)
@pytest.mark.parametrize(("M", "C"), SIZES)
def test_fp32_stream(M, C, way, interleave, record):
    """Time the dtypes that the training step uses."""
    shape = f"{M} x {C}, fp32 stream, {way}"
    compare(shape, M, C, torch.bfloat16, torch.float32, way, BYTES[way] * M * C, interleave, record)


@pytest.mark.parametrize(("M", "C"), SIZES)
def test_bias_of_the_layer_before(M, C, interleave, record):
    """Time the backward pass of the step, whose norms also sum the bias gradients of proj and fc2."""
    ours = {"ajepa add_layer_norm": norm_with_bias, "ajepa, bias summed apart": sum_apart}
    shape, nbytes = f"{M} x {C}, fp32 stream, with the bias, backward", BYTES["backward"] * M * C
    options = {"ours": ours, "plain": plain_with_bias, "vectors": 3}
    compare(shape, M, C, torch.bfloat16, torch.float32, "backward", nbytes, interleave, record, **options)


@pytest.mark.parametrize("way", BYTES)
@pytest.mark.parametrize(("M", "C"), SIZES[:1])
def test_rms_norm(M, C, way, interleave, record):
    shape, nbytes = f"{M} x {C}, fp32 stream, RMS norm, {way}", BYTES[way] * M * C
    options = {"ours": {"ajepa add_layer_norm": rms_norm}, "plain": plain_rms_norm, "vectors": 1}
    compare(shape, M, C, torch.bfloat16, torch.float32, way, nbytes, interleave, record, **options)


@pytest.mark.parametrize("way", BYTES)
@pytest.mark.parametrize(("M", "C"), SIZES[:1])
def test_scaled(M, C, way, interleave, record):
    """Time LayerScale and drop path in the pass of the norm."""
    shape, nbytes = f"{M} x {C}, fp32 stream, scaled, {way}", (BYTES[way] + 2 * (way == "backward")) * M * C
    options = {"ours": {"ajepa add_layer_norm": scaled(scaled_norm)}, "plain": scaled(plain_scaled_norm), "vectors": 3}
    compare(shape, M, C, torch.bfloat16, torch.float32, way, nbytes, interleave, record, **options)


@pytest.mark.parametrize(("M", "C"), SIZES)
def test_bf16_gradient_of_the_stream(M, C, interleave, record):
    """Time a layer norm between two others, whose streams have a bfloat16 or a float32 gradient."""

    def build(gradient):
        half = {"device": DEVICE, "dtype": torch.bfloat16}
        x, vectors = torch.randn(M, C, **half), [torch.randn(C, device=DEVICE).requires_grad_() for _ in range(2)]
        leaves = x.requires_grad_(), torch.randn(M, C, device=DEVICE)
        upstream = torch.randn(M, C, **half), torch.randn(M, C, device=DEVICE, dtype=gradient)
        if gradient == torch.float32:
            outputs = add_layer_norm(leaves[0], leaves[1].requires_grad_(), *vectors)
            return outputs, (*leaves, *vectors), upstream
        stream = ResidualStream.of(leaves[1], gradient)
        carrier = stream.carrier.detach().requires_grad_()
        normed, total = add_layer_norm(leaves[0], ResidualStream(leaves[1], carrier), *vectors)
        return (normed, total.carrier), (leaves[0], carrier, *vectors), upstream

    nbytes = 10 * M * C
    names = {"ajepa add_layer_norm": torch.bfloat16, "ajepa, fp32 gradient": torch.float32}
    timed = {name: backward_only(lambda g=gradient: build(g), nbytes) for name, gradient in names.items()}
    times = interleave(timed, SECONDS)
    shape, floor = f"{M} x {C}, fp32 stream, bf16 gradient, backward", nbytes / copy_bytes_per_ms()
    record("add_layer_norm", shape, times, floor_ms=floor)


@pytest.mark.skipif(QUICK, reason="the training step has other dtypes, so a quick run leaves this out")
@pytest.mark.parametrize(("M", "C"), SIZES)
def test_layer_norm(M, C, interleave, record):
    """Time tensors that all have the same dtype."""
    way, size = "forward + backward", torch.finfo(DTYPE).bits // 8
    compare(f"{M} x {C}, {way}", M, C, DTYPE, DTYPE, way, 8 * M * C * size, interleave, record)
