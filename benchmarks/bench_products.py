"""Benchmark the matrix products of the training step: PyTorch's at every shape, and those with fused epilogues.

A time is milliseconds per call. The floor is the FLOPs of one product at the rate of a large product measured in the
same run, or the bytes that must move at the measured copy rate, whichever takes longer.

`product` times the three products of each linear layer: forward, the gradient of the input and that of the weight. Few
rows of a weight give few tiles for the multiprocessors, so the weight's gradient is also timed as a sum over parts of
the tokens, which gives more.

`linear_gelu`, `linear_dgelu` and `linear_residual` are timed against the same work in separate passes: by PyTorch, by
torch.compile, and by our own element-wise kernels.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from ceilings import SECONDS, copy_bytes_per_ms, rotating
from conftest import left_out
from records import DEVICE, QUICK

from ajepa.training.roofline import product_flops_per_ms
from ajepa_kernels import bias_gelu, products

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SIZE = torch.finfo(DTYPE).bits // 8
TOKENS = {"context": 64, "targets": 128, "predictor": 128}  # of a clip, with half of the patches visible
WIDTHS = {"context": 768, "targets": 768, "predictor": 384}
LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # (inputs, outputs) in widths
CLIPS = (1,) if DEVICE == "cpu" and QUICK else (8,) if DEVICE == "cpu" else (1024,) if QUICK else (1024, 256)
NETWORKS = ("context", "targets", "predictor") if DEVICE == "cuda" else ("predictor",)
CHECKED = 1024  # rows that are compared with float64
TIME = SECONDS if QUICK or DEVICE == "cpu" else 1.0


def draw(*shape, dtype=DTYPE, scale=1.0):
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)


def floor(M, N, K, nbytes):
    return max(2 * M * N * K / product_flops_per_ms(DTYPE, DEVICE), nbytes / copy_bytes_per_ms())


def weight_gradient(dy, x, parts=1):
    """dy^T x in float32, as the sum of `parts` products over equal shares of the rows."""
    if parts == 1:
        return products.weight_gradient(dy, x, torch.float32)
    dy, x = (t.unflatten(0, (parts, -1)) for t in (dy, x))
    return torch.bmm(dy.transpose(1, 2), x, out_dtype=torch.float32).sum(0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("clips", CLIPS)
def test_product(clips, network, layer, interleave, record):
    M, width = clips * TOKENS[network], WIDTHS[network]
    K, N = (width * times for times in LAYERS[layer])

    def make():
        return draw(M, K), draw(N, K, scale=K**-0.5), draw(N), draw(M, N)

    functions = {"forward": lambda x, w, b, dy: F.linear(x, w, b)}
    if network != "targets":
        functions["gradient of the input"] = lambda x, w, b, dy: dy @ w
        for parts in (1, 2, 4) if DEVICE == "cuda" else (1,):
            name = "gradient of the weight" + f", {parts} parts" * (parts > 1)
            functions[name] = functools.partial(lambda x, w, b, dy, parts: weight_gradient(dy, x, parts), parts=parts)
    nbytes = SIZE * (M * K + N * K + M * N)
    timed = {name: rotating(function, make, nbytes) for name, function in functions.items()}
    shape = f"{network} {layer}, {clips} clips, {M} x {K} to {N}"
    record("product", shape, interleave(timed, TIME), floor_ms=floor(M, N, K, nbytes))


def check(functions, want, *inputs):
    for name, function in functions.items():
        for got, right in zip(function(*inputs), want(*(t.double() for t in inputs)), strict=True):
            bound = (4 if got.dim() == 2 else 64) * torch.finfo(DTYPE).eps  # vectors are sums over the rows
            assert (got.double() - right).norm() < bound * right.norm(), name


def with_compiled(functions, plain):
    functions = {**functions, "plain PyTorch": plain}
    if QUICK:
        left_out({"torch.compile": "compiled peers are left out of a quick run"})
        return functions
    torch.compiler.reset()  # together with dynamic=False, so that each case is compiled for its own shapes
    return {**functions, "torch.compile": torch.compile(plain, dynamic=False)}


def compare(benchmark, shape, functions, plain, make, M, N, K, nbytes, interleave, record):
    """Check and time `functions` and `plain`, which take what `make(rows)` returns and return tuples."""
    functions = with_compiled(functions, plain)
    check(functions, plain, *make(min(M, CHECKED)))
    timed = {name: rotating(function, functools.partial(make, M), nbytes) for name, function in functions.items()}
    times = interleave(timed, TIME)
    record(benchmark, shape, times, plain="plain PyTorch", peers=["torch.compile"], floor_ms=floor(M, N, K, nbytes))
    if DEVICE == "cpu":
        left_out({"the fused product": "needs a Hopper GPU; on a CPU the op runs its plain definition"})


@pytest.fixture
def fused():
    """Skip a benchmark of the fused products where a GPU has none."""
    if DEVICE == "cuda" and (why_not := products.why_not(torch.empty(0, device=DEVICE, dtype=DTYPE), products.ALL)):
        pytest.skip(why_not)


@torch.no_grad()
@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("keep", ["nothing", "z", "slope"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("clips", CLIPS)
def test_linear_gelu(clips, network, keep, interleave, record):
    """Time fc1 with bias and GELU. Training also keeps what the backward pass reads."""
    if (network == "targets") != (keep == "nothing") and DEVICE == "cuda":
        pytest.skip("the target encoder keeps nothing, the other networks keep z or the slope")
    M, C = clips * TOKENS[network], WIDTHS[network]

    def fused(x, w, b):
        y, kept = torch.ops.ajepa.linear_gelu(x, w, b, ["nothing", "z", "slope"].index(keep))
        return (y, kept) if keep == "z" else (y,)

    def separate(x, w, b):
        z = F.linear(x, w)
        return (bias_gelu(z, b), z + b) if keep == "z" and DEVICE == "cpu" else (bias_gelu(z, b),)

    def plain(x, w, b):
        z = F.linear(x, w, b)
        return (F.gelu(z), z) if keep == "z" else (F.gelu(z),)

    functions = {"ajepa linear_gelu": fused}
    if keep != "z" or DEVICE == "cpu":
        functions["ajepa bias_gelu"] = separate
    make = lambda rows: (draw(rows, C), draw(4 * C, C, scale=C**-0.5), draw(4 * C))  # noqa: E731
    nbytes = SIZE * (M * C + 4 * C * C + 4 * M * C * (1 if keep == "nothing" else 2))
    shape = f"{network}, {clips} clips, {M} x {C} to {4 * C}, keeps {keep}"
    compare("linear_gelu", shape, functions, plain, make, M, 4 * C, C, nbytes, interleave, record)


@torch.no_grad()
@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("kept", ["z", "slope"])
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "targets"])
@pytest.mark.parametrize("clips", CLIPS)
def test_linear_dgelu(clips, network, kept, interleave, record):
    """Time the gradient of fc2's input, through the GELU, with the gradient of fc1's bias."""
    M, C = clips * TOKENS[network], WIDTHS[network]
    zero = torch.zeros(4 * C, device=DEVICE, dtype=DTYPE)

    def fused(dy, w, kept_values):
        return torch.ops.ajepa.linear_dgelu(dy, w, kept_values, kept == "slope")

    def separate(dy, w, z):
        return torch.ops.ajepa.bias_gelu_bwd(dy @ w, z, zero, False)

    def plain(dy, w, kept_values):
        dh = dy @ w
        dz = dh * kept_values if kept == "slope" else torch.ops.aten.gelu_backward(dh, kept_values)
        return dz, dz.sum(0)

    functions = {"ajepa linear_dgelu": fused}
    if kept == "z" and DEVICE == "cuda":
        functions["ajepa bias_gelu"] = separate
    make = lambda rows: (draw(rows, C), draw(C, 4 * C, scale=C**-0.5), draw(rows, 4 * C))  # noqa: E731
    nbytes = SIZE * (M * C + 4 * C * C + 8 * M * C)
    shape = f"{network}, {clips} clips, {M} x {C} to {4 * C}, from {kept}"
    compare("linear_dgelu", shape, functions, plain, make, M, 4 * C, C, nbytes, interleave, record)


@torch.no_grad()
@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("layer", ["proj", "fc2"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("clips", CLIPS)
def test_linear_residual(clips, network, layer, interleave, record):
    """Time proj and fc2 with the addition to the float32 stream."""
    M, C = clips * TOKENS[network], WIDTHS[network]
    K = C * LAYERS[layer][0]

    def fused(x, w, b, stream):
        return (torch.ops.ajepa.linear_residual(x, w, b, stream),)

    def plain(x, w, b, stream):
        return (F.linear(x, w, b) + stream,)

    make = lambda rows: (draw(rows, K), draw(C, K, scale=K**-0.5), draw(C), draw(rows, C, dtype=torch.float32))  # noqa: E731
    nbytes = SIZE * (M * K + C * K) + 8 * M * C
    shape = f"{network} {layer}, {clips} clips, {M} x {K} to {C}"
    compare(
        "linear_residual", shape, {"ajepa linear_residual": fused}, plain, make, M, C, K, nbytes, interleave, record
    )
