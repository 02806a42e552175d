"""Properties of the kernel package as a whole."""

import functools
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from aot import _specialise
from oracle import CAN_LAUNCH, DEVICE, IMPLS
from torch.utils._python_dispatch import TorchDispatchMode

import ajepa_kernels
from ajepa_kernels import _triton

ROOT = Path(__file__).parents[2]


def script(name: str):
    """A module of the folder kernels/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "kernels" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the public interface ---------------------------------------------------------------------------------------------


def test_public_interface_is_the_recorded_one():
    """A change of a public name, argument or default needs a version and a line in CHANGELOG.md."""
    names = script("public_names")
    version, lines = names.recorded()
    assert lines == names.interface(), (
        "the public interface has changed: raise the version in kernels/pyproject.toml and ajepa_kernels/__init__.py "
        "by the rules of docs/adopt.md, add a line to CHANGELOG.md, and run python kernels/public_names.py"
    )
    assert version == ajepa_kernels.__version__
    assert f'version = "{version}"' in (ROOT / "kernels/pyproject.toml").read_text()
    assert f"ajepa-kernels {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("after", "kept"),
    [
        ("f(x, y=1, *, eps=1e-05, impl='auto')", True),
        ("f(x, y=1, z=None, *, eps=1e-05, impl='auto', more=())", True),
        ("f(x, y=1, impl='auto', *, eps=1e-05)", True),  # a keyword that may now be given by place, too
        ("f(x, y=1, *, eps=1e-05, impl='auto', more)", False),
        ("f(x, y=2, *, eps=1e-05, impl='auto')", False),
        ("f(x, y=1, *, eps=1e-06, impl='auto')", False),
        ("f(x, *, eps=1e-05, impl='auto')", False),
        ("f(q, y=1, *, eps=1e-05, impl='auto')", False),
        ("f(x, z=None, y=1, *, eps=1e-05, impl='auto')", False),
        ("g(x, y=1, *, eps=1e-05, impl='auto')", False),
    ],
)
def test_what_breaks_an_interface(after, kept):
    broken = script("public_names").broken(["f(x, y=1, *, eps=1e-05, impl='auto')"], ["h: dict", after])
    assert bool(broken) != kept


def test_a_breaking_change_is_not_recorded_under_a_version_that_promises_none(tmp_path, monkeypatch, capsys):
    names = script("public_names")
    monkeypatch.setattr(names, "FILE", tmp_path / "names.txt")
    names.FILE.write_text(f"version {ajepa_kernels.__version__}\ngone(x)\n")
    assert names.main() == 1 and "gone(x)" in capsys.readouterr().out
    major, minor, *_ = (int(number) for number in ajepa_kernels.__version__.split("."))
    monkeypatch.setattr(ajepa_kernels, "__version__", f"{major + 1}.0.0" if major else f"0.{minor + 1}.0")
    assert names.main() == 0 and names.recorded() == (ajepa_kernels.__version__, names.interface())


# --- without Triton, a compiler or a GPU ------------------------------------------------------------------------------


def test_the_package_imports_without_triton():
    """The package imports, and its plain definitions run, without a GPU, a compiler or Triton."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, ajepa_kernels as k\n"
        "assert 'ajepa' not in sys.modules and not k.warmup(device='cpu')\n"
        "cu = torch.tensor([0, 2, 5])\n"
        "assert k.masked_attention(torch.ones(5, 3, 2, 8), cu_seqlens=cu, max_seqlen=3).shape == (5, 2, 8)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_auto_says_once_that_it_falls_back(monkeypatch):
    """On a GPU, `auto` warns once for each reason why it uses no kernel. On a CPU it does not warn."""

    class OnGPU:
        is_cuda = True

    monkeypatch.setattr(_triton, "cannot_launch", lambda x: "")
    monkeypatch.setattr(_triton, "_announced", set())
    with pytest.warns(
        UserWarning, match="ajepa_kernels.some_op runs as plain PyTorch on this GPU: no kernel for D = 3"
    ):
        assert not _triton.use_triton("some_op", "auto", OnGPU(), "no kernel for D = 3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _triton.use_triton("some_op", "auto", OnGPU(), "no kernel for D = 3")
        assert _triton.use_triton("some_op", "auto", OnGPU())
        assert not _triton.use_triton("some_op", "auto", torch.empty(0))


@pytest.mark.skipif(_triton.triton is None, reason="triton is not installed")
def test_an_old_gpu_is_noticed_under_compile_too(monkeypatch):
    """Under torch.compile, `auto` falls back with the same warning as in eager mode, and without a graph break."""

    class OnGPU:
        is_cuda = True
        device = torch.device("cuda", 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(_triton, "_announced", set())
    _triton._capability.cache_clear()
    x, old = torch.zeros(2), OnGPU()
    fork = torch.compile(
        lambda x: x + 1 if _triton.use_triton("some_op", "auto", old) else x - 1, fullgraph=True, backend="eager"
    )
    try:
        with pytest.warns(UserWarning, match="some_op runs as plain PyTorch on this GPU: the GPU is older") as warned:
            assert fork(x).tolist() == [-1, -1]
        assert len(warned) == 1
    finally:
        _triton._capability.cache_clear()


@pytest.mark.skipif(not CAN_LAUNCH, reason="kernels need a GPU or Triton's interpreter")
def test_warmup_runs_every_operation():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    numbers = torch.get_rng_state()
    assert ajepa_kernels.warmup(
        device=DEVICE, dtype=dtype, heads=iter([(2, 32)]), max_seqlens=iter([16, 33]), widths=iter([32]),
        projection=(24, 16, 5), rotary=iter([ajepa_kernels.Rotary.of(torch.zeros(1, 16))]), causal=iter([4]),
        scaled=True, gated=iter([48]),
    )  # fmt: skip
    assert torch.equal(numbers, torch.get_rng_state())


def training_step(adamw_params: int, graph: bool) -> None:
    """Launches the kernels of a model with width 64, 2 heads of 32 and sequences of at most 30 tokens."""
    k, bf16 = ajepa_kernels, functools.partial(torch.ones, dtype=torch.bfloat16, requires_grad=True)
    weight, stream = torch.ones(64, requires_grad=True), torch.ones(48, 64, requires_grad=True)
    k.masked_attention(bf16(48, 3, 2, 32), cu_seqlens=torch.tensor([0, 30, 48]), max_seqlen=30).sum().backward()
    dense, visible = bf16(2, 40, 3, 2, 32), torch.arange(30).expand(2, 30)
    k.masked_attention(dense, visible=visible).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        normed, total = k.add_layer_norm(bf16(48, 64), stream, weight, weight)
        (normed.sum() + total.sum()).backward()
        k.add_layer_norm(bf16(48, 64), stream, weight, weight)[0].sum().backward()
    k.bias_gelu(bf16(48, 256), torch.ones(256)).sum().backward()
    k.latent_l2_loss(bf16(48, 64), bf16(64, 64), torch.arange(48)).backward()
    with torch.no_grad():
        k.latent_l2_loss(bf16(48, 64), bf16(64, 64), torch.arange(48))
    pooled = k.segment_pool(bf16(48, 64), torch.tensor([0, 30, 48], dtype=torch.int32))
    pooled.sum().backward()
    for z in (bf16(2, 48, 24), torch.ones(2, 48, 24, requires_grad=True)):
        k.sigreg(z, torch.tensor(3), directions=40, knots=5).backward()
    schedules = torch.ones(4)  # adjacent scalars, of which three are not aligned to 16 bytes
    scale, found_inf, lr, decay = schedules if graph else (*schedules[:2], 1e-3, 0.9)
    params = [torch.nn.Parameter(torch.ones(64, 16)) for _ in range(adamw_params)] + [torch.nn.Parameter(torch.ones(5))]
    for p in params:
        p.grad = torch.ones_like(p)
    emas = [(p, p.detach().clone()) for p in params]
    optimizer = k.AdamWEMA(params, ema=emas, copies=[(p, p.detach().bfloat16()) for p in params], lr=lr)
    optimizer.step(ema_decay=decay, grad_scale=scale, found_inf=found_inf)
    k.AdamWEMA(params, lr=lr).step()
    k.ema_update_([ema for _, ema in emas], params, decay)


@pytest.mark.skipif(_triton.triton is None or _triton.INTERPRET, reason="needs Triton, outside its interpreter")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
def test_warmup_leaves_nothing_to_compile(graph, monkeypatch):
    def variants(function, *args) -> set:
        with _triton.record_launches(90) as launches:
            function(*args)
        return {
            (kernel.__name__, repr(sorted(options.items())), *map(repr, _specialise(kernel, args, options)))
            for kernel, args, options in launches
        }

    sizes = {"heads": ((h, 32) for h in (2,)), "max_seqlens": (s for s in (30,)), "widths": (c for c in (64,))}
    sizes["projection"] = (24, 40, 5)
    warm = variants(
        functools.partial(ajepa_kernels.warmup, device="cpu", offsets=[torch.int64], gathered=True, **sizes)
    )
    use = _triton.use_triton
    modules = "attention layer_norm bias_gelu latent_loss adamw_ema ema_update segment_pool sigreg"
    for module in modules.split():  # as on a GPU
        monkeypatch.setattr(
            sys.modules[f"ajepa_kernels.{module}"], "use_triton", lambda op, impl, *rest: use(op, "triton", *rest)
        )
    for n in (1, 5, 150):
        assert variants(training_step, n, graph) <= warm


class NoSync(TorchDispatchMode):
    """Refuses operations that make the host wait for the device: reading a value, and sizes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if masks or name in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
            "unique2",
            "repeat_interleave",
        ):
            raise AssertionError(f"{function} makes the host wait")
        return function(*args, **(kwargs or {}))


def no_wait_cases():
    """{name: (function, leaves)} for every form of the operations that promise not to make the host wait."""
    k, on = ajepa_kernels, {"device": DEVICE}
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool, **on)
    index, rows = torch.tensor([[0, 3], [4, 1]], **on), torch.tensor([0, 2, 3, 7], **on)
    cu = torch.tensor([0, 3, 4], **on)
    dense, packed = torch.randn(2, 5, 3, 2, 32, **on), torch.randn(4, 3, 2, 32, **on)
    x, residual, weight, bias = (
        torch.randn(6, 8, **on),
        torch.randn(6, 8, **on),
        torch.randn(8, **on),
        torch.ones(8, **on),
    )
    attend = k.masked_attention
    return {
        "packed": (lambda q, impl: attend(q, cu_seqlens=cu, max_seqlen=3, impl=impl), [packed]),
        "packed, key mask": (
            lambda q, impl: attend(q, cu_seqlens=cu, max_seqlen=3, key_mask=mask[0, :4], impl=impl), [packed]
        ),
        "indices": (lambda q, impl: attend(q, visible=index, impl=impl), [dense]),
        "indices, scattered": (lambda q, impl: attend(q, visible=index, output="scattered", impl=impl), [dense]),
        "rows": (lambda q, impl: attend(q, visible=rows, cu_seqlens=cu, max_seqlen=3, impl=impl), [dense]),
        "booleans, scattered": (lambda q, impl: attend(q, visible=mask, output="scattered", impl=impl), [dense]),
        "all, key mask": (lambda q, impl: attend(q, key_mask=mask, impl=impl), [dense]),
        "loss": (lambda p, impl: k.latent_l2_loss(p, residual, rows[:2].repeat(3), impl=impl), [x]),
        "layer norm": (lambda *t, impl: k.add_layer_norm(*t, impl=impl)[0], [x, residual, weight, bias]),
        "gelu": (lambda *t, impl: k.bias_gelu(*t, impl=impl), [x, bias]),
        "segment pool": (lambda x, impl: k.segment_pool(x, cu, impl=impl), [x]),
        "sigreg": (lambda z, impl: k.sigreg(z, cu[0], directions=5, impl=impl), [x]),
        "sigreg, int key": (lambda z, impl: k.sigreg(z, 3, directions=5, impl=impl), [x]),
    }  # fmt: skip


@pytest.mark.parametrize("case", no_wait_cases())
@pytest.mark.parametrize("impl", IMPLS)
def test_the_host_never_waits(case, impl, monkeypatch):
    monkeypatch.setattr("ajepa_kernels.attention.can_be_checked_at_once", lambda x: False)  # as for CUDA tensors
    function, leaves = no_wait_cases()[case]
    leaves = [x.requires_grad_() for x in leaves]
    with NoSync():
        out = function(*leaves, impl=impl)
        torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_host_never_waits_for_the_optimiser(impl):
    params = [torch.nn.Parameter(torch.randn(4, 4, device=DEVICE)) for _ in range(2)]
    emas, rate = [p.detach().clone() for p in params], torch.tensor(0.1, device=DEVICE)
    groups = [{"params": [p], "weight_decay": rate} for p in params]
    optimizer = ajepa_kernels.AdamWEMA(groups, ema=zip(params, emas, strict=True), lr=rate, impl=impl)
    for p in params:
        p.grad = torch.ones_like(p)
    with NoSync():
        optimizer.step(ema_decay=rate, grad_scale=rate, found_inf=rate - rate)
        ajepa_kernels.ema_update_(emas, [p.detach() for p in params], rate, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_host_never_waits_for_augmented_views(impl, monkeypatch):
    module = sys.modules["ajepa_kernels.augment_mel"]
    monkeypatch.setattr(module, "_check_values", lambda *arguments: None)  # as for CUDA tensors
    on = functools.partial(torch.ones, device=DEVICE)
    views = module.MelViews(on(3, 2, dtype=torch.int32), on(3, 2), on(3), on(3, 2), on(3, 2), on(3, 4))
    spec = ajepa_kernels.LogMelSpec(n_mels=8, n_frames=10, patch=(4, 4))
    with NoSync():
        ajepa_kernels.augment_mel(on(2, 8, 20), views, spec, lengths=on(2, dtype=torch.int32), impl=impl)


def test_no_sync_detects_an_operation_that_waits():
    qkv, mask = torch.randn(2, 5, 3, 2, 32), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(AssertionError, match="makes the host wait"), NoSync():
        ajepa_kernels.masked_attention(qkv, visible=mask)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("masked_attention", (1,)), ("latent_l2_loss", (1, 2, 3)), ("add_layer_norm", (1, 2)), ("bias_gelu", (1, 2)),
        ("gelu_mlp", (1, 2, 3, 4, 5)), ("linear_residual", (1, 2, 3, 4)), ("swiglu", (1, 2)), ("segment_pool", (1, 2)),
        ("sigreg", (1, None)), ("log_mel", (1, ajepa_kernels.LogMelSpec())), ("resample", (1, 16000, 8000)),
        ("augment_mel", (1, None, ajepa_kernels.LogMelSpec())), ("quantize", (1,)), ("fp8_linear", (1, 2, 3)),
        ("norm_quantize", (1, 2, 3, 4)), ("ema_update_", ([1], [2], 0.5)),
    ],
)  # fmt: skip
def test_every_operation_asks_for_tensors(op, arguments):
    """Lists, arrays and numbers get one clear error."""
    with pytest.raises(TypeError, match=f"{op}: .* must be a torch.Tensor, got int"):
        getattr(ajepa_kernels, op)(*arguments)
