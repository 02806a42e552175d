"""Compiles the kernels that training steps and the benchmarks launch, without a GPU, into an archive of Triton's cache.

`prebuilt.py` calls `fill` in an environment that has the GPU machine's versions, and unpacks the archive on the GPU
machine.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import itertools
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import prebuilt
import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import compiler
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.build import platform_key
from triton.runtime.cache import triton_key

from ajepa import config
from ajepa.model.masks import MaskSampler
from ajepa.training.engine import Engine
from ajepa.training.graph import StepGraphs
from ajepa_kernels import (
    AdamWEMA,
    Scaling,
    add_layer_norm,
    bias_gelu,
    latent_l2_loss,
    norm_quantize,
    quantize,
    segment_pool,
    sigreg,
    warmup,
)
from ajepa_kernels._triton import record_launches

Cases = Iterable[Callable[[], object]]
BF16, FP32 = torch.bfloat16, torch.float32

# --- the archive ------------------------------------------------------------------------------------------------------


def fill(out: Path, archs: list[int], cases: Cases | None = None) -> dict[str, int]:
    """Compile the kernels that `cases` launch (None: `launches()`), and write the archive of this Triton and Python.

    Every launch takes Triton's own path, which specialises the arguments; only the driver is a stand-in. The tensors
    are on the CPU, where allocations are aligned to 16 bytes as they are on a GPU. The process must run without
    TRITON_INTERPRET. Kernels that are in TRITON_CACHE_DIR already are not compiled again.

    Returns how many kernels were `found` in TRITON_CACHE_DIR, how many were `compiled`, and the number of C `modules`.
    """
    cache = Path(os.environ.setdefault("TRITON_CACHE_DIR", str(prebuilt.WORK / "triton")))
    hits: list[bool] = []
    knobs.compilation.listener = lambda **compiled: hits.append(compiled["cache_hit"])
    with _remembered() as (keys, sources):
        kernels = {kernel.hash: kernel for arch in archs for kernel in _compile(arch, cases)}
        with _stand_in_for_libcuda():
            nvidia.CudaUtils()
            for kernel in kernels.values() if hasattr(nvidia, "make_launcher") else ():  # absent in later versions
                nvidia.CudaLauncher(kernel.src, kernel.metadata)
    made: dict = {"archs": archs, "triton_key": triton_key(), "fingerprint": prebuilt.fingerprint(prebuilt.KERNELS)}
    made |= {"kernels": [], "modules": []}
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out / prebuilt.archive_name(), "w", zipfile.ZIP_DEFLATED) as file:
        for digest, kernel in kernels.items():
            folder, name = prebuilt.cache_entry(digest), kernel.src.name[:150]
            made["kernels"].append({"folder": folder, "name": name, "key": keys[digest]})
            for kind in prebuilt.KINDS:
                file.write(cache / folder / f"{name}.{kind}", f"{folder}/{name}.{kind}")
        for digest, source in sources.items():
            folder = prebuilt.cache_entry(digest)
            (library,) = (cache / folder).glob("*.so")
            made["modules"].append({"folder": folder, "name": library.name.split(".")[0], "source": source})
            file.write(library, f"{folder}/{library.name.split('.')[0]}.so")
        file.writestr("made.json", json.dumps(made))
    counts = {"found": sum(hits), "compiled": len(hits) - sum(hits), "modules": len(sources)}
    print("{} kernels: {found} found, {compiled} compiled; {modules} C modules".format(len(kernels), **counts))
    return counts


def _compile(arch: int, cases: Cases | None) -> list:
    """Compile the kernels that `cases` launch on a GPU of this compute capability."""
    triton.runtime.driver.set_active(_Driver(GPUTarget("cuda", arch, 32)))
    started = []
    workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, AsyncCompileMode(pool):
        for case in launches() if cases is None else cases:
            with record_launches(arch) as recorded:
                case()
            started += [kernel.run(*args, grid=(1,), warmup=True, **kwargs) for kernel, args, kwargs in recorded]
    return [kernel.result() if hasattr(kernel, "result") else kernel for kernel in started]


class _Driver:
    """Answers what Triton asks of a driver before a launch."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # one device for each target, since a kernel remembers the target of a device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _remembered() -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Record what Triton hashes, by the hash: keys of kernels without Triton's own key, and sources of C modules."""
    keys: dict[str, str] = {}
    sources: dict[str, str] = {}
    get_cache_key = compiler.get_cache_key
    compile_module = getattr(nvidia, "compile_module_from_src", None)  # absent from triton 3.8 on

    def remember_key(*args, **kwargs):
        key = get_cache_key(*args, **kwargs)
        keys[hashlib.sha256(key.encode()).hexdigest()] = key.removeprefix(f"{triton_key()}-")
        return key

    def remember_source(src, name, **kwargs):
        sources[hashlib.sha256((src + platform_key()).encode()).hexdigest()] = src
        return compile_module(src=src, name=name, **kwargs)

    compiler.get_cache_key = remember_key
    if compile_module is not None:
        nvidia.compile_module_from_src = remember_source
    try:
        yield keys, sources
    finally:
        compiler.get_cache_key = get_cache_key
        if compile_module is not None:
            nvidia.compile_module_from_src = compile_module


@contextlib.contextmanager
def _stand_in_for_libcuda() -> Iterator[None]:
    """Provide an empty library with the driver's name, so that C modules can be linked and loaded, but not called."""
    flags = sys.getdlopenflags()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "libcuda.so.1")
        prebuilt.run(["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, "-x", "c", os.devnull])
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
        sys.setdlopenflags(os.RTLD_LAZY)
        knobs.nvidia.libcuda_path = folder
        try:
            yield
        finally:
            sys.setdlopenflags(flags)


# --- the launches -------------------------------------------------------------------------------------------------

MODELS = [("audio-jepa", "B"), ("audio-jepa", "S"), ("audio-jepa", "L"), ("a-jepa", "B"), ("a-jepa", "S")]
MODELS += [("a-jepa", "L"), ("tiny", "tiny"), ("tiny", "S")]
SWITCHES = [
    {"mlp": "plain"}, {"mlp": "epilogue"}, {"residual": "bf16-gradient"}, {"residual": "bf16"},
    {"residual": "in-product"}, {"target_precision": "fp8"},
    {"mlp": "epilogue", "residual": "in-product", "target_precision": "fp8"},
    {"residual": "bf16", "target_precision": "fp8"},
]  # fmt: skip
SWITCHED = [("audio-jepa", "B", 0.4, 0.5), ("tiny", "tiny", 0.7)]
CLIP_MODELS = [("audio-jepa", "B"), ("audio-jepa", "S"), ("tiny", "tiny")]


def launches() -> Iterator[Callable[[], object]]:
    """Yield functions that launch the kernels of training steps in bfloat16, benchmarks and tests of large tensors."""
    for preset, size in MODELS:
        yield lambda preset=preset, size=size: _train(preset, size, {}, (0.4, 0.5))
    for switches, (preset, size, *ratios) in itertools.product(SWITCHES, SWITCHED):
        yield lambda arguments=(preset, size, switches, ratios): _train(*arguments)
    for (preset, size), objective in itertools.product(CLIP_MODELS, ("clip", "both")):
        yield lambda preset=preset, size=size, objective=objective: _train(preset, size, {}, (0.5,), objective)
    yield from _operations()
    for remainder in (False, True):
        yield lambda remainder=remainder: _update(remainder)


def _train(preset: str, size: str, switches: dict, mask_ratios: Iterable[float], objective: str | None = None) -> None:
    """Run steps of a model with three layers: the first, the last, and one between them, which all others repeat.

    No kernel runs, so the values are whatever the memory happens to hold.
    """
    cfg, shape = config.PRESETS[preset], config.SIZES[size]
    model = dataclasses.replace(cfg.model, size=size, predictor_depth=min(cfg.model.predictor_depth, 3))
    step = dataclasses.replace(cfg.step, **{"mlp": "bias-gelu", **switches})  # what "auto" is on a GPU
    aim = dataclasses.replace(cfg.objective, objective=objective or cfg.objective.objective)  # type: ignore[arg-type]
    cfg = dataclasses.replace(cfg, precision="bf16", model=model, step=step, objective=aim)
    config.SIZES[size] = (shape[0], max(3, model.target_layers), shape[2])
    try:
        engine = Engine(cfg, torch.device("cpu"))
    finally:
        config.SIZES[size] = shape
    samples = round(cfg.source_seconds * cfg.front_end.sample_rate)
    pcm, lengths = torch.zeros(2, samples, dtype=torch.int16), torch.full((2,), samples, dtype=torch.int32)
    ratios = [*mask_ratios]
    if step.target_precision == "fp8":
        ratios.append(ratios[-1])  # the first step takes the scales of present values, with other kernels
    for ratio in ratios:
        mask = dataclasses.replace(cfg.mask, mask_ratio=(ratio, ratio))
        masks = MaskSampler(mask, cfg.front_end.grid)(0, cfg.optim.steps, 2 * aim.count)
        engine.step(pcm, lengths, masks, 1)
        engine.graphs = StepGraphs(engine._train, engine.device)  # keeps the schedule values on the device
    engine.inspect(pcm, lengths, masks)


def _leaf(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, requires_grad=True)


def _both_ways(function: Callable, *leaves: torch.Tensor) -> None:
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])


def _operations() -> Iterator[Callable[[], object]]:
    """Call the operations as the benchmarks do, but on a few rows, because their number is not compiled in."""
    sizes: dict[str, Any] = {
        "heads": [(12, 64), (12, 32)],
        "max_seqlens": [16, 32, 64, 80, 96, 128],
        "widths": [768, 384],
    }
    yield lambda: warmup(device="cpu", projection=(128, 256, 17), **sizes)
    for C, stream, affine in itertools.product((768, 384, 1024, 4096), (BF16, FP32), (BF16, FP32)):
        leaves = _leaf(16, C), _leaf(16, C, dtype=stream), _leaf(C, dtype=affine), _leaf(C, dtype=affine)
        yield lambda leaves=leaves: _both_ways(add_layer_norm, *leaves)
        yield lambda leaves=leaves: _both_ways(lambda *t: add_layer_norm(*t[:4], x_bias=t[4]), *leaves, leaves[3])
    yield lambda: _both_ways(add_layer_norm, _leaf(16, 768), _leaf(16, 768), _leaf(768, dtype=FP32))
    latents, index = torch.ones(16, 768, dtype=BF16), torch.arange(16)
    for kind in ("l2", "smooth_l1", "cosine"):
        yield lambda kind=kind: _both_ways(lambda x: latent_l2_loss(x, latents, index, kind=kind), _leaf(16, 768))
    for C, approximate, dtype in itertools.product((3072, 1536, 4096), ("none", "tanh"), (BF16, FP32)):
        gelu = lambda x, bias, approximate=approximate: bias_gelu(x, bias, approximate=approximate)  # noqa: E731
        yield lambda gelu=gelu, C=C, dtype=dtype: _both_ways(gelu, _leaf(16, C), _leaf(C, dtype=dtype))
    rows = [(768, BF16), (3072, BF16), (768, FP32), (768, torch.float16), (64, FP32)]
    for (K, dtype), gelu in itertools.product(rows, (None, "none", "tanh")):
        yield lambda K=K, dtype=dtype, gelu=gelu: _both_scales(_leaf(16, K, dtype=dtype), gelu)
    affine = _leaf(768, dtype=FP32)
    for dtype, stream in ((BF16, BF16), (BF16, FP32), (torch.float16, FP32), (FP32, FP32)):
        pair = _leaf(16, 768, dtype=dtype), _leaf(16, 768, dtype=stream)
        yield lambda pair=pair: norm_quantize(*pair, affine, affine, 1e-6, _calibrated())
    offsets = torch.tensor([0, 9, 16], dtype=torch.int32)
    for C, dtype in itertools.product((768, 128), (BF16, FP32)):
        pool = lambda x: segment_pool(x, offsets)  # noqa: E731
        yield lambda pool=pool, C=C, dtype=dtype: _both_ways(pool, _leaf(16, C, dtype=dtype))
    key = torch.zeros((), dtype=torch.int64)
    for (V, D, S), dtype in itertools.product(((1, 768, 1024), (2, 128, 256)), (BF16, FP32)):
        spread = lambda z, S=S: sigreg(z, key, directions=S)  # noqa: E731
        yield lambda spread=spread, V=V, D=D, dtype=dtype: _both_ways(spread, _leaf(V, 16, D, dtype=dtype))


def _calibrated() -> Scaling:
    scaling = Scaling(torch.ones(8))
    scaling.loaded()
    return scaling


def _both_scales(x: torch.Tensor, gelu: str | None) -> None:
    quantize(x, gelu=gelu)
    quantize(x, _calibrated(), gelu=gelu)


def _update(remainder: bool) -> None:
    """Run the optimiser with its EMA, on float32 weights with copies or on bfloat16 weights with a remainder."""
    p = torch.nn.Parameter(torch.ones(768, 768, dtype=BF16 if remainder else FP32))
    p.grad = torch.ones_like(p)
    ema, copies = [(p, p.detach().to(FP32, copy=True))], [] if remainder else [(p, p.detach().to(BF16))]
    one, zero, decay = torch.ones(()), torch.zeros(()), torch.tensor(0.999)
    for scales in ({}, {"grad_scale": one}, {"grad_scale": one, "found_inf": zero}):
        for lr, ema_decay in ((1e-3, 0.999), (torch.tensor(1e-3), decay)):
            optimizer = AdamWEMA([p], ema=ema, copies=copies, remainder=remainder, lr=lr)
            optimizer.step(ema_decay=ema_decay, **scales)
