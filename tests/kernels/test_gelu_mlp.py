import ctypes
import math
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, assert_as_good, poison  # noqa: F401

import ajepa_kernels.mlp as module
from ajepa_kernels import gelu_mlp, gelu_mlp_reference

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "c++").split()[0]
NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2")
# cuBLASLt has no float32 epilogue, and bfloat16 products are slow on a CPU.
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16]


def oracle(x, w1, b1, w2, b2):
    """The MLP by its formula, in float64."""
    z = x.double() @ w1.double().T + b1.double()
    hidden = z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
    return hidden @ w2.double().T + b2.double()


def make(rows, width, inner, dtype=torch.float32, out=None):
    out, seed = out or width, torch.Generator().manual_seed(rows)
    shapes = [(rows, width), (inner, width), (inner,), (out, inner), (out,)]
    scales = [1.0, width**-0.5, 1.0, inner**-0.5, 1.0]
    return [(s * torch.randn(shape, generator=seed)).to(dtype) for shape, s in zip(shapes, scales, strict=True)]


def both_ways(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves)
    upstream = torch.sin(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    return y, *torch.autograd.grad(y, leaves, upstream)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("rows", "width", "inner", "out"), [(0, 16, 64, 16), (1, 8, 8, 24), (67, 48, 200, 48)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_value_and_gradients(rows, width, inner, out, dtype, impl):
    tensors = make(rows, width, inner, dtype, out)
    want, plain = both_ways(oracle, tensors), both_ways(gelu_mlp_reference, tensors)
    got = both_ways(lambda *t: gelu_mlp(*t, impl=impl), [t.to(DEVICE) for t in tensors])
    assert {t.dtype for t in got} == {dtype}
    assert_as_good([t.cpu() for t in got], plain, want, dtype, NAMES)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_gradients_belong_to_the_parameters_when_copies_compute(impl):
    """The values are computed with the copies, and the gradients belong to the float32 parameters. Leading axes are
    kept."""
    dtype = DTYPES[-1]
    x, *params = make(30, 16, 64)
    copies = [p.to(DEVICE, dtype) for p in params]
    leaves = [p.to(DEVICE).requires_grad_() for p in params]
    x = x.to(dtype).to(DEVICE, torch.float32).view(5, 6, 16).requires_grad_()
    y = gelu_mlp(x, *leaves, copies=tuple(copies), impl=impl)
    assert y.shape == (5, 6, 16) and y.dtype == dtype
    got = torch.autograd.grad(y, [x, *leaves], torch.ones_like(y))
    assert {g.dtype for g in got} == {torch.float32}
    rounded = [t.double().requires_grad_() for t in (x.detach().flatten(0, 1), *copies)]
    z = oracle(*rounded)
    want = torch.autograd.grad(z, rounded, torch.ones_like(z))
    for name, g, w in zip(NAMES[1:], got, want, strict=True):
        error = (g.double().view_as(w) - w).norm() / w.norm()
        assert error < 4 * torch.finfo(dtype).eps, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_gradients_that_are_asked_for(wanted):
    tensors = [t.to(DEVICE) for t in make(9, 16, 32, DTYPES[0])]
    tensors[wanted].requires_grad_()
    (got,) = torch.autograd.grad(gelu_mlp(*tensors, impl="fused").float().sum(), [tensors[wanted]])
    (want,) = torch.autograd.grad(gelu_mlp_reference(*tensors).float().sum(), [tensors[wanted]])
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_nothing_is_saved_when_no_gradient_is_needed(monkeypatch):
    seen = []
    plain = module._linear_gelu_plain
    monkeypatch.setattr(module, "_linear_gelu_plain", lambda x, w, b, keep: seen.append(keep) or plain(x, w, b, keep))
    tensors = make(3, 8, 16)
    gelu_mlp(*tensors, copies=tuple(tensors[1:]), impl="reference")
    with torch.no_grad():
        gelu_mlp(*(t.clone().requires_grad_() for t in tensors), copies=tuple(tensors[1:]), impl="reference")
    assert seen == [False, False]


def test_autocast():
    tensors = [t.to(DEVICE) for t in make(12, 16, 64)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y, want = gelu_mlp(*tensors, impl="fused"), gelu_mlp_reference(*tensors)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want, rtol=3e-2, atol=3e-2)


def test_opcheck_and_fullgraph():
    x, w1, b1, w2, b2 = tensors = [t.to(DEVICE) for t in make(9, 16, 32, DTYPES[0])]
    y, z = torch.ops.ajepa.linear_gelu(x, w1, b1, True)
    for keep in (True, False):
        torch.library.opcheck(torch.ops.ajepa.linear_gelu.default, (x, w1, b1, keep))
    torch.library.opcheck(torch.ops.ajepa.linear_dgelu.default, (F.linear(y, w2, b2), w2, z))
    function = torch.compile(lambda *t: gelu_mlp(*t, impl="fused"), fullgraph=True)
    for got, want in zip(both_ways(function, tensors), both_ways(gelu_mlp_reference, tensors), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": torch.randn(32, 15)}, r"x \[..., C\], w1 \[I, C\] and w2"),
        ({"w2": torch.randn(16, 31)}, r"w2 \[C', I\] expected"),
        ({"b1": torch.randn(16)}, r"b1 \[32\] and b2 \[16\] expected"),
        ({"x": torch.ones(2, 16, dtype=torch.int64)}, "floating point"),
        ({"b2": torch.randn(16, device="meta")}, "one device"),
        ({"copies": tuple(make(9, 16, 24)[1:])}, "four tensors of the shapes"),
        ({"copies": (*make(9, 16, 32)[1:4], torch.zeros(16).half())}, "copies must share a dtype"),
        ({"impl": "triton"}, "auto, fused or reference"),
    ],
)
def test_errors(change, message):
    arguments = dict(zip(("x", "w1", "b1", "w2", "b2"), make(9, 16, 32), strict=True))
    with pytest.raises(ValueError, match=message):
        gelu_mlp(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_in_a_graph_at_full_size():
    """With the sizes of ViT-B, a replay reads inputs that were overwritten in place after the capture."""
    x, *params = [t.cuda() for t in make(4096, 768, 3072, torch.bfloat16)]
    gelu_mlp(x, *params, impl="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gelu_mlp(x, *params, impl="fused")
    x.neg_()
    graph.replay()
    torch.testing.assert_close(y, gelu_mlp_reference(x, *params), rtol=2e-2, atol=2e-2)


# --- the calls of cuBLASLt, computed on the host by tests/cuda_on_host/cublaslt.cpp -----------------------------------


class GeluProduct(ctypes.Structure):
    """The struct GeluProduct of csrc/gelu_product.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "z", "result", "workspace")),
        *((name, ctypes.c_int64) for name in ("workspace_bytes", "rows", "in_", "out")),
        ("device", ctypes.c_int), ("kind", ctypes.c_int), ("is_half", ctypes.c_bool),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    """`_gelu_product` on CPU tensors, which calls csrc/gelu_product.cpp."""
    if shutil.which(CXX) is None:
        pytest.skip(f"the C++ compiler {CXX} is not installed")
    folder = tmp_path_factory.mktemp("cublaslt")
    flags = [CXX, "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    fake, library = folder / "cublaslt.so", folder / "gelu_product.so"
    subprocess.run([*flags, str(ROOT / "tests/cuda_on_host/cublaslt.cpp"), "-o", str(fake)], check=True)
    entry = folder / "entry.cpp"
    entry.write_text(
        '#include "gelu_product.cpp"\n'
        'extern "C" const char* run(const ajepa::GeluProduct* p) {\n'
        "  static std::string error;\n  error = ajepa::gelu_product(*p, nullptr);\n  return error.c_str();\n}\n"
        'extern "C" bool present() { return ajepa::has_gelu_product(); }\n'
    )
    subprocess.run([*flags, f'-DAJEPA_CUBLASLT="{fake}"', str(entry), "-ldl", "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype, loaded.present.restype = ctypes.c_char_p, ctypes.c_bool
    assert loaded.present()

    def gelu_product(x, weight, bias, z, result, kind):
        tensors = {"x": x.contiguous(), "weight": weight.contiguous(), "bias": bias, "z": z, "result": result}
        described = GeluProduct(
            **{name: None if t is None else t.data_ptr() for name, t in tensors.items()},
            rows=len(x), in_=x.shape[1], out=result.shape[1], kind=kind, is_half=x.dtype == torch.float16,
        )  # fmt: skip
        error = loaded.run(ctypes.byref(described)).decode()
        if error:
            raise RuntimeError(error)

    return gelu_product


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_products_asked_of_cublaslt(on_host, monkeypatch, dtype):
    """Tests layouts, transposes, epilogues and pointers with the code that runs on a GPU. Only cuBLASLt is replaced."""
    monkeypatch.setattr(module, "_gelu_product", on_host)
    for rows in (5, 37, 5):  # the second 5 uses the algorithm remembered for its shape
        x, w1, b1, w2, _ = make(rows, 16, 40, dtype, out=24)
        y, z = module._linear_gelu_cuda(x, w1, b1, True)
        exact = x.double() @ w1.double().T + b1.double()
        torch.testing.assert_close(z, exact.to(dtype), rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(y, F.gelu(exact, approximate="tanh").to(dtype), rtol=2e-2, atol=1e-2)
        assert torch.equal(module._linear_gelu_cuda(x, w1, b1, False)[0], y)
        dy = torch.randn(rows, 24).to(dtype)
        dz, dbias = module._linear_dgelu_cuda(dy, w2, z)
        hidden = z.double().requires_grad_()
        (want,) = torch.autograd.grad(F.gelu(hidden, approximate="tanh"), hidden, dy.double() @ w2.double())
        torch.testing.assert_close(dz, want.to(dtype), rtol=2e-2, atol=1e-2)
        torch.testing.assert_close(dbias, want.sum(0).to(dtype), rtol=2e-2, atol=2e-2)
    y, z = module._linear_gelu_cuda(x[:0], w1, b1, True)
    dz, dbias = module._linear_dgelu_cuda(dy[:0], w2, z)
    assert (y.shape, z.shape, dz.shape) == ((0, 40),) * 3 and not dbias.any()


def test_an_error_of_cublaslt_is_named(on_host):
    x, w1, b1, _, _ = make(4, 16, 20, torch.float16)  # 20 is not a multiple of 8
    z = torch.empty(4, 20, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="cublasLtMatmulAlgoGetHeuristic"):
        on_host(x, w1, b1, z, z.clone(), module.FORWARD_KEEP)


def test_constants_equal_those_of_the_header(tmp_path):
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *Path(sysconfig.get_path("purelib")).glob("nvidia/cu*")]
    folders = [Path(home, "include") for home in homes if home]
    if not any((folder / "cublasLt.h").exists() for folder in folders) or shutil.which(CXX) is None:
        pytest.skip("needs a C++ compiler and cublasLt.h (in CUDA_HOME, /usr/local/cuda or the nvidia packages)")
    same = {
        "kNoTranspose": "CUBLAS_OP_N", "kTranspose": "CUBLAS_OP_T", "kComputeFloat": "CUBLAS_COMPUTE_32F",
        "kFloat": "CUDA_R_32F", "kHalf": "CUDA_R_16F", "kBFloat16": "CUDA_R_16BF", "kSuccess": "CUBLAS_STATUS_SUCCESS",
        "kDescTransposeA": "CUBLASLT_MATMUL_DESC_TRANSA", "kDescTransposeB": "CUBLASLT_MATMUL_DESC_TRANSB",
        "kDescEpilogue": "CUBLASLT_MATMUL_DESC_EPILOGUE", "kDescBias": "CUBLASLT_MATMUL_DESC_BIAS_POINTER",
        "kDescAux": "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER", "kDescAuxLd": "CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD",
        "kEpilogueGeluBias": "CUBLASLT_EPILOGUE_GELU_BIAS", "kEpilogueGeluAuxBias": "CUBLASLT_EPILOGUE_GELU_AUX_BIAS",
        "kEpilogueDGeluBGrad": "CUBLASLT_EPILOGUE_DGELU_BGRAD",
        "kPrefWorkspace": "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES",
        **{f"kPrefAlignment[{i}]": f"CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{m}_BYTES" for i, m in enumerate("ABCD")},
        "sizeof(Heuristic)": "sizeof(cublasLtMatmulHeuristicResult_t)",
        "sizeof(Algorithm)": "sizeof(cublasLtMatmulAlgo_t)",
    }  # fmt: skip
    lines = ["#include <cublasLt.h>", '#include "cublaslt.h"', "using namespace ajepa::cublaslt;"]
    lines += [f'static_assert({ours} == {theirs}, "{theirs}");' for ours, theirs in same.items()]
    source = tmp_path / "numbers.cpp"
    source.write_text("\n".join(lines) + "\n")
    include = [f"-I{folder}" for folder in (ROOT / "csrc", *folders)]
    done = subprocess.run([CXX, "-std=c++17", "-fsyntax-only", *include, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
