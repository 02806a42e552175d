"""The fused products: plain definitions, the kernels' arithmetic on the host, their compiler reports, and on a GPU."""

import ctypes
import importlib.util
import os
import re
import subprocess
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from host_build import build_on_host
from oracle import DEVICE, assert_as_good, poison, relative_error  # noqa: F401

from ajepa_kernels import _hopper, products

ROOT = Path(__file__).parents[2]
NOTHING, Z, SLOPE = products.NOTHING, products.Z, products.SLOPE
LIBRARIES = (*products.FORWARD.values(), *products.BACKWARD.values(), products.RESIDUAL, products.FP8)
# rows, K, N: none, one, less than a tile, more than one with edges in both directions, several whole tiles
SHAPES = [(0, 16, 24), (1, 8, 8), (67, 24, 136), (130, 72, 264), (256, 64, 128)]
GELU_EPS = 1e-7  # the error of the polynomial beside float32's rounding


def make(rows, k, n, dtype=torch.float32, device="cpu"):
    """x, weight, bias, residual; the gradient dy `[rows, k]`, the next layer's weight `[k, n]` and z `[rows, n]`."""
    seed = torch.Generator().manual_seed(rows)
    draw = lambda *shape, scale=1.0: scale * torch.randn(shape, generator=seed)  # noqa: E731
    x, weight, bias, residual = draw(rows, k), draw(n, k, scale=k**-0.5), draw(n), draw(rows, n)
    dy, w2, z = draw(rows, k), draw(k, n, scale=k**-0.5), draw(rows, n)
    tensors = [t.to(device, dtype) for t in (x, weight, bias, dy, w2, z)]
    return *tensors[:3], residual.to(device), *tensors[3:]


def exact(x, weight, bias, residual, dy, w2, z):
    """The products by their formulas in float64: z, gelu(z), gelu'(z), residual, dz and dbias, and those of a slope."""
    x, weight, bias, residual, dy, w2, given = (t.double() for t in (x, weight, bias, residual, dy, w2, z))
    linear, normal = x @ weight.T + bias, torch.distributions.Normal(0.0, 1.0)
    slope = lambda z: normal.cdf(z) + z * normal.log_prob(z).exp()  # noqa: E731
    dz, scaled = (dy @ w2) * slope(given), (dy @ w2) * given
    return {
        "z": linear, "y": linear * normal.cdf(linear), "slope": slope(linear), "residual": residual + linear,
        "dz": dz, "dbias": dz.sum(0), "dz of a slope": scaled, "dbias of a slope": scaled.sum(0),
    }  # fmt: skip


def computed(linear_gelu, linear_dgelu, linear_residual, x, weight, bias, residual, dy, w2, z):
    y, nothing = linear_gelu(x, weight, bias, NOTHING)
    again, kept = linear_gelu(x, weight, bias, Z)
    third, slope = linear_gelu(x, weight, bias, SLOPE)
    assert not nothing.numel() and torch.equal(y, again) and torch.equal(y, third)
    dz, dbias = linear_dgelu(dy, w2, z, False)
    scaled, sums = linear_dgelu(dy, w2, z, True)
    assert dbias.dtype == sums.dtype == torch.float32
    return {
        "z": kept, "y": y, "slope": slope, "residual": linear_residual(x, weight, bias, residual),
        "dz": dz, "dbias": dbias, "dz of a slope": scaled, "dbias of a slope": sums,
    }  # fmt: skip


def plainly(*tensors):
    return computed(products.linear_gelu_plain, products.linear_dgelu_plain, products.linear_residual_plain, *tensors)


def check(got: dict, tensors, dtype) -> None:
    want, plain = exact(*tensors), plainly(*tensors)
    for name, value in got.items():
        low = name not in ("residual",) and "dbias" not in name
        assert value.dtype == (dtype if low else torch.float32), name
    assert_as_good(got.values(), plain.values(), want.values(), dtype, list(want))


# --- the ops ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_definitions(shape, dtype):
    tensors = make(*shape, dtype)
    got, want = plainly(*tensors), exact(*tensors)
    for name, value in got.items():
        error = relative_error(value, want[name])
        assert value.shape == want[name].shape and error < 4 * torch.finfo(dtype).eps, f"{name}: {error:.2e}"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES)
def test_ops_on_this_device(shape):
    """On a Hopper GPU with the libraries, these are the kernels."""
    ops, tensors = torch.ops.ajepa, make(*shape, torch.bfloat16)
    got = computed(ops.linear_gelu, ops.linear_dgelu, ops.linear_residual, *(t.to(DEVICE) for t in tensors))
    check({name: value.cpu() for name, value in got.items()}, tensors, torch.bfloat16)


@pytest.mark.parametrize("rows", [0, 9])
def test_opcheck(rows):
    x, weight, bias, residual, dy, w2, z = make(rows, 16, 24, torch.bfloat16, DEVICE)
    for keep in (NOTHING, Z, SLOPE):
        torch.library.opcheck(torch.ops.ajepa.linear_gelu.default, (x, weight, bias, keep))
    for slope in (False, True):
        torch.library.opcheck(torch.ops.ajepa.linear_dgelu.default, (dy, w2, z, slope))
    torch.library.opcheck(torch.ops.ajepa.linear_residual.default, (x, weight, bias, residual))


def test_float64_stays_float64():
    x, weight, bias, _, dy, w2, z = (t.double() for t in make(5, 16, 24))
    slope = products.linear_gelu_plain(x, weight, bias, SLOPE)[1]
    z64 = F.linear(x, weight, bias).requires_grad_()
    (want,) = torch.autograd.grad(F.gelu(z64).sum(), z64)
    torch.testing.assert_close(slope, want, rtol=1e-12, atol=1e-12)
    assert torch.ops.ajepa.linear_dgelu(dy, w2, z, False)[1].dtype == torch.float64


# --- the kernels' arithmetic on the host ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = build_on_host("products", tmp_path_factory.mktemp("products"))
    for name in LIBRARIES:
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.POINTER(_hopper._Call), *[ctypes.c_void_p] * 2]
    return library


@pytest.fixture
def on_host(host, monkeypatch):
    """CPU tensors are computed by tests/cuda_on_host/products.cpp, through the calls that a GPU's kernels receive."""
    monkeypatch.setattr(_hopper, "_load", lambda name: (getattr(host, name), ""))
    return products._linear_gelu_fused, products._linear_dgelu_fused, products._linear_residual_fused


def test_gelu_of_the_epilogue(host):
    """gelu.h in float32 on all of its range, against float64; and where x is not finite."""
    x = torch.cat([torch.linspace(-14, 14, 200_001), torch.tensor([-3e38, -100.0, -0.0, 100.0, 3e38])])
    value, slope = torch.full_like(x, math_nan := float("nan")), torch.full_like(x, math_nan)
    host.gelu_all(*(ctypes.c_void_p(t.data_ptr()) for t in (x, value, slope)), len(x))
    z = x.double().requires_grad_()
    want = F.gelu(z)
    (want_slope,) = torch.autograd.grad(want.sum(), z)
    want_slope = want_slope.nan_to_num()  # PyTorch has inf * 0 beyond 1e19
    want_slope[x > 1e19] = 1.0
    rounding = torch.finfo(torch.float32).eps
    assert ((value - want).abs() <= GELU_EPS + rounding * want.abs()).all()
    assert ((slope - want_slope).abs() <= 4 * GELU_EPS + 2 * rounding).all()
    bad = torch.tensor([math_nan])
    host.gelu_all(*(ctypes.c_void_p(t.data_ptr()) for t in (bad, value, slope)), 1)
    assert value[0].isnan() and slope[0].isnan()


def test_constants_are_those_of_bias_gelu():
    number = r"-?\d\.\d{8,}e[-+]\d\d|-?0\.999999959|-?1\.15110694|0\.7213475204444817"
    ours, theirs = (
        {abs(float(x.rstrip("f"))) for x in re.findall(number, (ROOT / path).read_text())}
        for path in ("csrc/hopper/gelu.h", "kernels/ajepa_kernels/bias_gelu.py")
    )
    assert ours == theirs and len(ours) == 10


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", SHAPES)
def test_calls_and_column_sums(on_host, shape):
    """Every pointer, shape and epilogue as on a GPU; the column sums by the kernels' own code, of ragged tiles."""
    tensors = make(*shape, torch.bfloat16)
    check(computed(*on_host, *tensors), tensors, torch.bfloat16)


def test_operands_in_other_layouts(on_host):
    tensors = make(67, 24, 136, torch.bfloat16)
    turned = [t.T.contiguous().T if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in tensors]
    assert not turned[0].is_contiguous()
    want = computed(*on_host, *tensors)
    for name, value in computed(*on_host, *turned).items():
        assert torch.equal(value, want[name]), name


def test_nothing_is_written_beyond_the_partial_sums(on_host, monkeypatch):
    """CUTLASS also visits tiles that lie wholly beyond the matrix; so does the host."""
    buffers = []

    def guarded(result):
        rows = 4 * -(-len(result) // _hopper.TILE)
        buffers.append(torch.full((rows + 8, result.shape[1]), 7.0))
        return buffers[-1][4 : rows + 4]

    monkeypatch.setattr(_hopper, "partial_sums", guarded)
    _, _, _, _, dy, w2, z = make(130, 24, 72, torch.bfloat16)
    products._linear_dgelu_fused(dy, w2, z, False)
    (buffer,) = buffers
    assert (buffer[:4] == 7).all() and (buffer[-4:] == 7).all() and not (buffer[4:-4] == 7).all()


# --- float8 -----------------------------------------------------------------------------------------------------------


def make_fp8(rows, k, n, device="cpu"):
    """x and weight in e4m3, their scales, the bias, and a state whose scale lets a few values be clamped."""
    x, weight, bias, *_ = make(rows, k, n)
    low, scales = [], []
    for t in (x, weight):
        scales.append((t.abs().max() if t.numel() else torch.ones(())) / 448)
        low.append((t / scales[-1]).to(torch.float8_e4m3fn))
    state = torch.zeros(8)
    state[0] = 2.0 / 448
    return [t.to(device) for t in (*low, *scales, bias.bfloat16(), state)]


FP8_SHAPES = [(0, 16, 32), (1, 16, 16), (67, 48, 144), (130, 64, 32)]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", FP8_SHAPES)
@pytest.mark.parametrize("where", ["op", "host"])
def test_fp8(host, monkeypatch, shape, where):
    monkeypatch.setattr(_hopper, "_load", lambda name: (getattr(host, name), ""))
    *operands, state = make_fp8(*shape)
    compute = torch.ops.ajepa.fp8_linear_gelu if where == "op" else products._fp8_linear_gelu_fused
    scale = state[0].clone()
    fixed = compute(*operands, scale, None)
    noted = compute(*operands, None, state)
    x, weight, x_scale, weight_scale, bias = (t.double() for t in operands)
    want = F.gelu(x @ weight.T * (x_scale * weight_scale) + bias)
    assert fixed.dtype == torch.float8_e4m3fn and torch.equal(fixed.float(), noted.float()) and state[0] == scale
    nearest = (want / scale).clamp(-448, 448)
    assert fixed.shape == want.shape
    assert ((fixed.double() - nearest).abs() <= nearest.abs() / 16 + 2.0**-9).all()  # half of the last place
    if shape[0]:
        torch.testing.assert_close(state[1].double(), want.abs().amax(), rtol=1e-5, atol=1e-5)
        assert (nearest.abs() == 448).any() or shape[0] == 1
    else:
        assert state[1] == 0
    assert not state[2:].any()
    state[1] = 100.0  # a maximum of the step, not of the call
    compute(*operands, None, state)
    assert state[1] == 100.0


@pytest.mark.parametrize("rows", [0, 9])
def test_fp8_opcheck(rows):
    *operands, state = make_fp8(rows, 16, 32, DEVICE)
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs compute capability 8.9")
    tests = ("test_faketensor", "test_autograd_registration")  # test_schema computes with float8, which torch cannot
    torch.library.opcheck(
        torch.ops.ajepa.fp8_linear_gelu.default, (*operands, state[0].clone(), None), test_utils=tests
    )
    torch.library.opcheck(torch.ops.ajepa.fp8_linear_gelu.default, (*operands, None, state), test_utils=tests)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["x", "weight", "residual", "strided"])
def test_alignment_errors_name_the_tensor(on_host, which):
    x, weight, bias, residual, *_ = make(9, 16, 24, torch.bfloat16)
    off = lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)  # noqa: E731 (starts one element later)
    tensors = {"x": x, "weight": weight, "bias": off(bias), "source": residual, "result": torch.empty_like(residual)}
    _hopper.launch("linear_residual", 24, **tensors)  # the bias may start anywhere
    if which == "strided":
        with pytest.raises(ValueError, match="linear_residual: x must be contiguous"):
            _hopper.launch("linear_residual", 24, **{**tensors, "x": x.T.contiguous().T})
        return
    name = "source" if which == "residual" else which
    with pytest.raises(ValueError, match=f"linear_residual: {name} must start at a multiple of 16 bytes"):
        _hopper.launch("linear_residual", 24, **{**tensors, name: off(tensors[name])})


def test_errors_of_the_library(monkeypatch):
    x, weight, bias, residual, *_ = make(9, 16, 24, torch.bfloat16)
    monkeypatch.setattr(_hopper, "_load", lambda name: (lambda *call: b"misaligned operand", ""))
    with pytest.raises(RuntimeError, match="linear_residual: misaligned operand for 9 rows of 16 to 24"):
        products._linear_residual_fused(x, weight, bias, residual)
    monkeypatch.setattr(_hopper, "_load", lambda name: (None, "it is absent"))
    with pytest.raises(RuntimeError, match="linear_residual cannot be launched: it is absent"):
        products._linear_residual_fused(x, weight, bias, residual)


def test_reasons_against_the_kernels(monkeypatch, tmp_path):
    gpu = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda", 0))
    monkeypatch.setattr(_hopper, "arch", lambda x: 90)
    monkeypatch.setattr(_hopper, "FOLDER", tmp_path)
    monkeypatch.delenv("AJEPA_HOPPER", raising=False)
    _hopper._load.cache_clear()
    reason = lambda x=gpu, *widths: products.why_not(x, ("linear_gelu",), *widths)  # noqa: E731
    try:
        assert "cpu" in reason(torch.empty(1))
        assert "not built" in reason() and "AJEPA_HOPPER=1" in reason()
        assert "12" in reason(gpu, 16, 12) and "multiples of 8" in reason(gpu, 16, 12) and "0" in reason(gpu, 0)
        half = types.SimpleNamespace(**{**vars(gpu), "dtype": torch.float16})
        assert "bfloat16" in reason(half)
        (tmp_path / "liblinear_gelu.so").write_text("broken")
        _hopper._load.cache_clear()
        assert "liblinear_gelu.so does not load" in reason()
        monkeypatch.setenv("AJEPA_HOPPER", "0")
        _hopper._load.cache_clear()
        assert "AJEPA_HOPPER=0" in reason()
        monkeypatch.setattr(_hopper, "arch", lambda x: 80)
        assert "Hopper GPU" in reason()
    finally:
        _hopper._load.cache_clear()


def test_unfused_is_said_once(monkeypatch):
    """The ops of a GPU without the kernels run their plain definitions."""
    monkeypatch.setattr(_hopper, "why_not", lambda *_, **__: "there is no Hopper GPU")
    _hopper._announce.cache_clear()
    x, weight, bias, residual, dy, w2, z = make(9, 16, 24)
    with pytest.warns(UserWarning, match="linear_gelu runs unfused on this GPU: there is no Hopper GPU"):
        y, _ = products._linear_gelu_cuda(x, weight, bias, NOTHING)
    assert torch.equal(y, products.linear_gelu_plain(x, weight, bias, NOTHING)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        products._linear_gelu_cuda(x, weight, bias, Z)
    with pytest.warns(UserWarning, match="linear_dgelu runs unfused"):
        assert torch.equal(products._linear_dgelu_cuda(dy, w2, z, True)[0], (dy @ w2) * z)
    with pytest.warns(UserWarning, match="linear_residual runs unfused"):
        products._linear_residual_cuda(x, weight, bias, residual)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(24)}, r"bias must be torch\.bfloat16 \[24\], got torch\.float32"),
        ({"weight": torch.zeros(16, 24).bfloat16()}, r"weight must be torch\.bfloat16 \[24, 16\], got .* \[16, 24\]"),
        ({"source": torch.zeros(9, 24).bfloat16()}, r"source must be torch\.float32 \[9, 24\], got torch\.bfloat16"),
        ({"partial": torch.zeros(3, 24)}, r"partial must be torch\.float32 \[4, 24\], got .* \[3, 24\]"),
        ({"largest": torch.zeros(2)}, r"largest must be torch\.float32 \[\], got .* \[2\]"),
    ],
)
def test_tensors_that_a_kernel_would_misread(on_host, change, message):
    x, weight, bias, residual, *_ = make(9, 16, 24, torch.bfloat16)
    tensors = {"x": x, "weight": weight, "bias": bias, "source": residual, "result": torch.empty_like(residual)}
    with pytest.raises(ValueError, match=f"linear_residual: {message}"):
        _hopper.launch("linear_residual", 24, **{**tensors, **change})


# --- compiled for Hopper ----------------------------------------------------------------------------------------------
# A kernel takes one to two minutes, so the suite reads those that are in build/hopper already. AJEPA_AOT=core compiles
# one, AJEPA_AOT=all each.

CORE = "linear_dgelu"  # it has a source, the most arithmetic and the column sums
BUILD = importlib.util.spec_from_file_location("hopper_build", ROOT / "csrc/hopper/build.py")
builder = importlib.util.module_from_spec(BUILD)
BUILD.loader.exec_module(builder)


@pytest.fixture(scope="module")
def toolchain():
    """The compiler and the include folders."""
    try:
        if "AJEPA_AOT" not in os.environ and not any(builder.CACHE.glob("cutlass-*")):
            pytest.skip("nothing was compiled here before: set AJEPA_AOT to core or all")
        return builder.find_nvcc(), builder.headers()
    except builder.BuildError as error:
        pytest.skip(str(error))


def tool(name: str) -> str:
    backend = pytest.importorskip("triton.backends.nvidia")
    return os.path.join(os.path.dirname(backend.__file__), "bin", name)


@pytest.mark.parametrize("name", LIBRARIES)
def test_compiled_for_hopper(toolchain, name):
    wanted = {"all": LIBRARIES, None: ()}.get(os.environ.get("AJEPA_AOT"), (CORE,))
    if name not in wanted and not builder.cached(name, *toolchain):
        pytest.skip("minutes of compiling: set AJEPA_AOT=all")
    library = builder.library(name, *toolchain)
    ((stack, stores, loads, registers),) = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        library.with_suffix(".log").read_text(), re.DOTALL,
    )  # fmt: skip
    assert (stack, stores, loads) == ("0", "0", "0")
    assert int(registers) <= 168  # three warp groups of 128 threads fill the register file
    code = subprocess.check_output([tool("cuobjdump"), "-sass", str(library)], text=True)
    count = lambda word: len(re.findall(rf"\b{word}\b", code))  # noqa: E731
    assert (
        count("QGMMA" if name == products.FP8 else "HGMMA")
        and count("UTMALDG")
        and count("UTMASTG")
        and count("USETMAXREG") == 2
    )
    assert not count("LDL") and not count("STL")
    assert count("REDG") + count("ATOMG") == (name == products.FP8)  # of the largest magnitude
    # 128 values a thread: an exponential for gelu, two for the slope or both, none for a saved slope or a residual
    slopes = {"linear_gelu_slope": 2, "linear_dgelu": 2, "linear_dslope": 0, "linear_residual": 0}
    others = count("MUFU") - 128 * slopes.get(name, 1)
    assert 0 < others < 8 if name == products.FP8 else others == 0  # the inverse of the scale
    assert bool(count("STG")) == (name in products.BACKWARD.values())  # of the column sums; the rest is the TMA's
    assert ctypes.CDLL(str(library)).ajepa_product  # it loads without a GPU and without its driver


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would read the made-up addresses")
@pytest.mark.parametrize("name", LIBRARIES)
def test_matrices_that_the_compiled_kernels_describe(toolchain, capfd, name):
    """Without a driver CUTLASS prints each matrix that it cannot describe to it: its address, sizes and strides."""
    if not builder.cached(name, *toolchain):
        pytest.skip("it is not compiled: set AJEPA_AOT=all")
    m, n, k, size = 130, 272, 48, 1 if name == products.FP8 else 2
    names = [name for name, kind in _hopper._Call._fields_ if kind is ctypes.c_void_p]
    place = {name: 4096 * (i + 1) for i, name in enumerate(names)}
    next_weight, residual = name in products.BACKWARD.values(), name == products.RESIDUAL
    want = {
        (place["x"], k, m, size),
        (place["weight"], n, k, size) if next_weight else (place["weight"], k, n, size),
        (place["result"], n, m, 4 if residual else size),
    }
    want |= {(place["source"], n, m, 4 if residual else 2)} if next_weight or residual else set()
    want |= {(place["kept"], n, m, 2)} if name in ("linear_gelu_keep", "linear_gelu_slope") else set()
    function = ctypes.CDLL(str(builder.library(name, *toolchain))).ajepa_product
    function.restype = ctypes.c_char_p
    run = lambda *sizes: function(ctypes.byref(_hopper._Call(*sizes, **place)), 132, None)  # noqa: E731
    assert run(m, n, k) == b"Error Internal"  # it refuses neither the shape nor the lack of a workspace
    printed = capfd.readouterr().err
    got = {
        (int(address, 16), int(columns), int(rows), int(stride) // int(columns))
        for address, columns, rows, stride in re.findall(
            r"gmem_address +(0x\w+)\n *globalDim +\((\d+),(\d+),1,1,1\)\n *globalStrides +\(\d+,(\d+),", printed
        )
    }
    assert got == want
    assert b"Error Internal" not in (run(m, n + 2, k), run(m, n, k + 2))  # widths off the alignment


def test_fragments_lie_where_the_column_sums_expect_them(toolchain):
    """The layout that CUTLASS gives to a thread's values, computed on the host from its own types."""
    source = ROOT / "tests/cuda_on_host/fragment_place.cu"
    flags = [flag for flag in builder.FLAGS if flag not in ("-O3", "-shared", "-Xptxas=-v")]
    place = builder.CACHE / builder.key(source, toolchain[0], flags, toolchain[1]) / "fragment_place"
    if "AJEPA_AOT" not in os.environ and not place.exists():
        pytest.skip("a minute of compiling: set AJEPA_AOT=all")
    program = builder.compiled(source, "fragment_place", toolchain[0], flags, toolchain[1])
    assert subprocess.check_output([program], text=True) == 2 * "0 of 16384 values lie elsewhere\n"


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("rows", [4096, 77 * 131])
def test_fp8_at_full_size(rows):
    """Rows beyond the matrix hold gelu(bias), and must not count for the largest magnitude: here the bias is large."""
    *operands, state = make_fp8(rows, 768, 3072, DEVICE)
    if reason := products.why_not(operands[0], (products.FP8,), 768, 3072):
        pytest.skip(reason)
    operands[0][:, 0], operands[1][:, 0] = 448.0, -448.0  # as much as the bias below, the other way
    operands[4].fill_(float(448**2 * operands[2] * operands[3]))
    got = torch.ops.ajepa.fp8_linear_gelu(*operands, None, state)
    plain_state = torch.zeros_like(state)
    plain_state[0] = state[0]
    x, weight, x_scale, weight_scale, bias = operands
    z = x.float() @ weight.float().T * (x_scale * weight_scale) + bias.float()
    torch.testing.assert_close(state[1], F.gelu(z).abs().amax(), rtol=1e-2, atol=1e-2)
    want = (F.gelu(z) / state[0]).clamp(-448, 448)
    assert relative_error(got, want) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("rows", [4096, 77 * 131])
def test_fused_at_full_size_in_a_graph(rows):
    """Replays read inputs that were overwritten in place after the capture. The rows end within a tile."""
    tensors = make(rows, 768, 3072, torch.bfloat16, DEVICE)
    if reason := products.why_not(tensors[0], LIBRARIES, 768, 3072):
        pytest.skip(reason)
    ops = torch.ops.ajepa
    run = lambda: computed(ops.linear_gelu, ops.linear_dgelu, ops.linear_residual, *tensors)  # noqa: E731
    want = run()
    check({name: value.cpu() for name, value in want.items()}, [t.cpu() for t in tensors], torch.bfloat16)
    assert all(torch.equal(want[name], value) for name, value in run().items())  # the sums have a fixed order
    x, weight, bias, _, dy, w2, z = tensors
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, slope = ops.linear_gelu(x, weight, bias, SLOPE)
        dz, dbias = ops.linear_dgelu(dy, w2, z, False)
    for t in (x, dy):
        t.neg_()
    graph.replay()
    for got, right in zip((y, slope), ops.linear_gelu(x, weight, bias, SLOPE), strict=True):
        assert torch.equal(got, right)
    assert torch.equal(dz, -want["dz"]) and torch.equal(dbias, -want["dbias"])
