import math
from functools import partial

import numpy as np
import pytest
import torch
from oracle import DEVICE, DTYPES, IMPLS, assert_as_good, assert_first_order, needs_kernel, poison  # noqa: F401

from ajepa.utils.counter_rng import mix64
from ajepa_kernels import sigreg, sigreg_reference

IMPLS = [*IMPLS, "auto"]  # "auto" on a CPU has a gradient of its own
DIRECTIONS = torch.ops.ajepa.sigreg_directions


def unit_vectors(key, S, D):
    """The directions in float64, from the project's generator."""
    bits = mix64(torch.arange(S * D).view(S, D), key).numpy().view(np.uint64)
    uniform, turns = (((bits >> np.uint64(shift)) & np.uint64(2**24 - 1)).astype(float) for shift in (40, 16))
    normal = np.sqrt(-2 * np.log((uniform + 1) / 2**24)) * np.cos(2 * np.pi * turns / 2**24)
    return torch.from_numpy(normal / np.linalg.norm(normal, axis=1, keepdims=True))


def oracle(z, key, dtype, S=256, J=17, limit=3.0):
    """The formula in float64, knot by knot with the knot 0, and directions rounded to `dtype`."""
    views = z if z.dim() == 3 else z[None]
    y = views.double() @ unit_vectors(key, S, z.shape[-1]).to(dtype).double().T
    N, d, total = y.shape[1], limit / (J - 1), 0.0
    for j in range(J):
        phi = math.exp(-((j * d) ** 2) / 2)
        weight = (d if j in (0, J - 1) else 2 * d) * phi
        cos, sin = ((j * d * y).cos().sum(1) / max(N, 1), (j * d * y).sin().sum(1) / max(N, 1))
        total = total + weight * ((cos - phi) ** 2 + sin**2).sum()
    return total * N / (S * len(views))


def both(function, z, upstream=1.0):
    z = z.detach().requires_grad_()
    value = function(z)
    return value, torch.autograd.grad(value * upstream + 0 * z.sum(), z)[0]


# Samples and directions: none, fewer than a tile, a tile and several with a masked rest. Widths: one, less than a
# vector access, several steps of the product, more than a chunk of the directions.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("shape", "S", "J", "limit"),
    [
        ((2, 70, 33), 40, 17, 3.0), ((3, 1), 1, 2, 1.0), ((0, 5), 7, 5, 3.0), ((3, 0, 5), 7, 5, 3.0),
        ((130, 64), 130, 9, 4.0), ((1, 5, 1100), 3, 4, 3.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradient(shape, S, J, limit, dtype, impl):
    z = (1.3 * torch.randn(shape) + 0.2).to(dtype)
    want = both(partial(oracle, key=11, dtype=dtype, S=S, J=J, limit=limit), z.double(), 1.7)
    plain = both(partial(sigreg_reference, key=11, directions=S, knots=J, limit=limit), z, 1.7)
    got = both(partial(sigreg, key=11, directions=S, knots=J, limit=limit, impl=impl), z.to(DEVICE), 1.7)
    assert got[0].dtype == torch.float32 and got[0].shape == () and got[1].dtype == dtype
    # directions at the edge of two roundings to the dtype of z may fall either way, which shows in the value
    assert_as_good([got[0].cpu()], plain[:1], want[:1], dtype)
    assert_as_good([got[1].cpu()], plain[1:], want[1:], dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_values_far_from_gaussian(impl):
    """Products of hundreds, whose angles are many turns."""
    z = 300 * torch.randn(40, 8)
    want = both(partial(oracle, key=2, dtype=torch.float32, S=16), z.double())
    got = both(partial(sigreg, key=2, directions=16, impl=impl), z.to(DEVICE))
    torch.testing.assert_close(got[0].double().cpu(), want[0], rtol=1e-4, atol=0)
    assert (got[1].cpu() - want[1]).norm() < 3e-3 * want[1].norm()


@pytest.mark.parametrize("impl", IMPLS[::2])  # many kernel programs for the interpreter
def test_gaussian_batches_give_their_expectation(impl):
    """Mean of sum_j w_j (1 - phi_j^2) over independent batches; a batch of another scale, mean or rank is above it."""
    t = torch.arange(17, dtype=torch.float64) * 3 / 16
    weight = (-t.square() / 2).exp() * (3 / 8)
    weight[[0, -1]] /= 2
    expected = (weight * (1 - (-t.square()).exp())).sum()
    assert abs(expected - 1.05) < 0.01
    of = partial(sigreg, directions=64, impl=impl)
    mean = sum(of(torch.randn(20, 200, 16, device=DEVICE), key) for key in range(4)) / 4  # of 80 batches
    assert abs(mean - expected) < 0.11  # four standard errors, as one batch deviates by 0.25
    z = torch.randn(200, 16, device=DEVICE)
    line = torch.randn(200, 1, device=DEVICE).expand(-1, 16)
    assert all(of(other, 0) > 3 * expected for other in (2 * z, z / 2, z + 0.5, line))


@pytest.mark.parametrize("impl", IMPLS)
def test_key(impl):
    """A function of the key's 64 bits alone: as an int or a tensor, and different for every key."""
    z = torch.randn(30, 8, device=DEVICE)
    of = partial(sigreg, z, directions=5, impl=impl)
    for key in (0, 3, -1, 2**63 - 1):
        assert torch.equal(of(key), of(torch.tensor(key, device=DEVICE)))
    assert torch.equal(of(-1), of(2**64 - 1)) and len({of(key).item() for key in range(8)}) == 8


@needs_kernel
@pytest.mark.parametrize(("S", "D"), [(40, 96), (3, 1), (2, 1100)])
@pytest.mark.parametrize("key", [0, -1, 0x0123456789ABCDEF])
def test_directions_of_the_kernel(S, D, key):
    got = DIRECTIONS(torch.tensor(key, device=DEVICE), S, D, torch.float32).cpu()
    torch.testing.assert_close(got.double(), unit_vectors(key, S, D), rtol=0, atol=1e-6)
    assert torch.equal(got[:1], DIRECTIONS(torch.tensor(key, device=DEVICE), 1, D, torch.float32).cpu())


def test_directions_are_uniform():
    """Means, covariance and fourth moment of normalised Gaussians, within four standard errors."""
    A = unit_vectors(5, 20_000, 8)
    assert A.mean(0).abs().max() < 4 / math.sqrt(8 * 20_000)
    assert (A.T @ A / 20_000 - torch.eye(8) / 8).abs().max() < 4 * 0.15 / math.sqrt(20_000)
    assert abs((A**4).mean() - 3 / (8 * 10)) < 4 * 0.08 / math.sqrt(8 * 20_000)


@pytest.mark.parametrize("impl", IMPLS)
def test_views_share_directions(impl):
    z = torch.randn(3, 20, 8, device=DEVICE)
    of = partial(sigreg, key=4, directions=9, impl=impl)
    torch.testing.assert_close(of(z), torch.stack([of(view) for view in z]).mean())


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views(impl):
    z = torch.randn(8, 20, 2, device=DEVICE).permute(2, 1, 0)
    of = partial(sigreg, key=4, directions=9, impl=impl)
    torch.testing.assert_close(both(of, z), both(of, z.contiguous()))
    torch.testing.assert_close(both(of, z[:, ::2]), both(of, z[:, ::2].contiguous()))


@pytest.mark.parametrize("impl", IMPLS[::2])
def test_gradcheck(impl):
    z = torch.randn(2, 5, 3, device=DEVICE, dtype=torch.float64, requires_grad=True)
    function = partial(sigreg, key=3, directions=7, knots=5, impl=impl)
    assert function(z).dtype == torch.float64 and torch.autograd.gradcheck(function, z)
    if impl == "reference":
        assert torch.autograd.gradgradcheck(function, z)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    z = torch.randn(20, 8, device=DEVICE)
    of = partial(sigreg, key=4, directions=9, impl=impl)
    want = both(of, z)
    with torch.autocast(DEVICE, torch.float16):
        assert torch.equal(of(z), want[0])
        if impl != "reference":  # autograd's own backward pass of a product is cast
            assert torch.equal(both(of, z)[1], want[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_float16_gradients_do_not_underflow(impl):
    """Gradients with respect to products are far below float16's range until the loss scale is applied."""
    z = torch.randn(256, 8, device=DEVICE)
    of = lambda z: sigreg(z, 4, directions=64, impl=impl) * 1e-3  # noqa: E731
    want = both(of, z.half().double() if impl != "triton" else z.half().float(), 65536.0)[1].double()
    assert (both(of, z.half(), 65536.0)[1].double() - want).norm() < 4e-3 * want.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    z, key = torch.randn(2, 20, 8, device=DEVICE), torch.tensor(7, device=DEVICE)
    function = lambda z: 3 * sigreg(z.tanh(), key, directions=9, impl=impl)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(both(compiled, z), both(function, z))
    compiled = torch.compile(partial(sigreg, directions=9, impl=impl), fullgraph=True, backend="aot_eager")
    for other in (3, 2**62, -5):  # ints become symbols
        torch.testing.assert_close(compiled(z, other), sigreg(z, other, directions=9, impl=impl))


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_first_order(impl):
    assert_first_order(partial(sigreg, key=7, directions=9, impl=impl), torch.randn(20, 8, device=DEVICE))


@pytest.mark.parametrize("impl", IMPLS[1:])
def test_memory(impl):
    """Nothing of `[N, S, J]` is saved for backward."""
    saved, z = [], torch.randn(64, 8, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        sigreg(z, 7, directions=32, knots=17, impl=impl)
    assert sum(saved) <= 64 * 32 + 2 * 16 * 32 + 32 * 8 + 10


@needs_kernel
def test_opcheck():
    key, ops = torch.tensor(7, device=DEVICE), torch.ops.ajepa
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(DIRECTIONS.default, (key, 5, 8, dtype))
        z, directions = torch.randn(2, 70, 8, device=DEVICE).to(dtype), DIRECTIONS(key, 5, 8, dtype)
        torch.library.opcheck(ops.sigreg_fwd.default, (z, directions, 4, 3.0))
        products, sums = ops.sigreg_fwd(z, directions, 4, 3.0)
        for count in (None, torch.tensor(70.0, device=DEVICE)):
            torch.library.opcheck(ops.sigreg_statistic.default, (sums, count, 70, 3.0))
        _, coefficients = ops.sigreg_statistic(sums, None, 70, 3.0)
        arguments = (torch.tensor(0.5, device=DEVICE), products, directions, coefficients, 70, 3.0)
        torch.library.opcheck(ops.sigreg_bwd.default, arguments)


def on_a_rank(argv) -> int:
    """Ranks have different numbers of samples, or none; value and gradient are those of the whole batch."""
    torch.distributed.init_process_group("gloo")
    rank, (impl,) = torch.distributed.get_rank(), argv
    whole = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(1)) + 0.3
    of = partial(sigreg, key=7, directions=9, impl=impl)
    want = both(partial(of, group=None), whole)
    for split in (20, 30):
        mine = slice(0, split) if rank == 0 else slice(split, 30)
        got = both(partial(of, group=torch.distributed.group.WORLD), whole[:, mine])
        torch.testing.assert_close(got, (want[0], want[1][:, mine]))
    mine = slice(0, 20) if rank == 0 else slice(20, 30)
    assert not torch.allclose(of(whole[:, mine]), want[0])  # without the group, the value is the rank's own
    torch.distributed.destroy_process_group()
    return 0


@pytest.mark.skipif(DEVICE != "cpu", reason="the ranks run on CPU tensors")
@pytest.mark.parametrize("impl", IMPLS)
def test_two_ranks_have_the_value_of_the_whole_batch(impl, forks, tmp_path):
    assert forks.run_ranks(2, [impl], tmp_path / "log", call="test_sigreg:on_a_rank") == [0, 0], "".join(
        path.read_text() for path in tmp_path.glob("log.*")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(4)}, r"z must be floating point \[N, D\] or \[V, N, D\]"),
        ({"z": torch.zeros(4, 5).long()}, "z must be floating point"),
        ({"z": torch.zeros(4, 0)}, "V and D from 1"),
        ({"z": torch.zeros(0, 4, 5)}, "V and D from 1"),
        ({"key": torch.tensor(3, dtype=torch.int32)}, "key must be an int or an int64 scalar on cpu"),
        ({"key": torch.tensor([3])}, r"key must be .*got torch.int64 \[1\]"),
        ({"key": torch.tensor(3, device="meta")}, "key must be .* on meta"),
        ({"directions": 0}, "directions must be at least 1"),
        ({"knots": 1}, "knots at least 2"),
        ({"limit": 0.0}, "limit positive"),
        ({"impl": "cuda"}, "impl must be"),
        ({"z": torch.zeros(4, 5).double(), "impl": "triton"}, "impl='triton' is impossible"),
        ({"z": torch.zeros(4, 5000), "impl": "triton"}, "impl='triton' is impossible"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=f"sigreg: .*{message}"):
        sigreg(**{"z": torch.zeros(4, 5), "key": 3, **change})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_and_graph(dtype):
    """Exact repeats, and a CUDA graph that draws the directions of the key that it finds at each replay."""
    z, key = torch.randn(1024, 768).to(dtype), torch.tensor(7, device="cuda")
    run = lambda impl: both(lambda z: sigreg(z, key, directions=1024, impl=impl), z.cuda())  # noqa: E731
    got, plain = run("triton"), both(lambda z: sigreg_reference(z, 7, 1024), z)
    want = both(partial(oracle, key=7, dtype=dtype, S=1024), z.double())
    assert_as_good([t.cpu() for t in got], plain, want, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = run("triton")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run("triton")
    for other in (7, 8):
        key.fill_(other)
        graph.replay()
        expected = run("triton")
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
        assert torch.equal(captured[0], got[0]) == (other == 7)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
