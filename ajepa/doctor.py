"""`python -m ajepa.doctor`: report what is installed, what runs and whether it computes correctly.

`--plan` predicts speed, time and memory of a recipe on many GPUs instead (`ajepa.training.plan`).

Use the report in bug reports. Each section imports what it needs, so a package that is missing or broken fails only its
own section. The exit status is 0, or 1 if something is broken; the report ends with a list of the problems.
"""

import argparse
import importlib
import importlib.metadata
import io
import os
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ajepa.utils.command import command
from ajepa.utils.version import VERSION

REQUIRED = ("torch", "numpy", "soundfile", "safetensors", "tyro", "pydantic", "rich", "tensorboard", "matplotlib")
LINUX = ("triton", "nvidia-dali-cuda130")
OPTIONAL = ("torchaudio",)
VARIABLES = r"AJEPA_|TRITON_|TORCH_|CUDA_|NCCL_|OMP_|GOMP_|KMP_|MKL_|WORLD_SIZE|RANK|LOCAL_RANK|SLURM_JOB_ID"
Line = tuple[str, str]  # name and finding
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # relative RMS error against the plain definition, in float32 and bfloat16


class ProblemError(Exception):
    """Something is broken. The message is one line for the list at the end of the report."""


def versions() -> Iterator[Line]:
    from importlib.metadata import PackageNotFoundError, version

    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "platform", f"{platform.platform()}, libc {' '.join(platform.libc_ver())}"
    missing = []
    for name in ("ajepa", *REQUIRED, *(LINUX if sys.platform == "linux" else ()), *OPTIONAL):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            if name in OPTIONAL:
                yield name, "not installed, optional"
            else:
                yield name, "run from its folder, not installed" if name == "ajepa" else "MISSING"
                missing += [] if name == "ajepa" else [name]
    if missing:
        raise ProblemError(f"not installed: {', '.join(missing)}; run pip install -e . in the repository")


def imports() -> Iterator[Line]:
    """Import packages that may be installed but fail to load."""
    broken = []
    for name in ("soundfile", *(("nvidia.dali",) if sys.platform == "linux" else ())):
        try:
            module = importlib.import_module(name)
            yield name, f"loads{f', libsndfile {module.__libsndfile_version__}' if name == 'soundfile' else ''}"
        except Exception as error:
            yield name, f"DOES NOT LOAD: {one_line(error)}"
            broken.append(f"{name} ({one_line(error)})")
    yield "torchaudio", torchaudio()
    if broken:
        raise ProblemError(f"does not load: {'; '.join(broken)}")


def torchaudio() -> str:
    """Whether torchaudio loads. It is optional, so its absence is no problem."""
    from ajepa.model._torchaudio import import_torchaudio

    instead = "the plain engine uses the plain definition of log_mel"
    try:
        import_torchaudio()
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torchaudio"
        return f"not installed: {instead}" if absent else f"does not match torch ({one_line(error)}): {instead}"
    return "loads"


def machine() -> Iterator[Line]:
    from ajepa.data.index import cache_root
    from ajepa.utils.cores import cores, free_cores, snapshot
    from ajepa.utils.devices import choose_threads

    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    extensions = " ".join(sorted({"avx2", "avx512f", "avx512_bf16", "amx_bf16"} & cpu_flags()))
    yield "cpu", f"{model[1] if model else platform.machine()}, {cores()} cores for this process; {extensions}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        yield "memory", f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"
    before = snapshot()
    time.sleep(0.3)
    free = free_cores(before)
    yield "free cores", "unknown" if free is None else f"{free:.1f}; the rest is used by other processes"
    policy, spins = os.environ.get("OMP_WAIT_POLICY", "").upper(), os.environ.get("GOMP_SPINCOUNT")
    waiting = {"PASSIVE": "sleep", "ACTIVE": "spin"}.get(policy, f"spin {spins} times, then sleep" if spins else "spin")
    yield "CPU threads", f"{choose_threads(0)} in a run started now; while they wait they {waiting}"
    for name in sorted(name for name in os.environ if re.match(VARIABLES, name)):
        yield name, os.environ[name]
    cache = cache_root()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / f".doctor.{os.getpid()}").touch()
        (cache / f".doctor.{os.getpid()}").unlink()
    except OSError as error:
        yield "cache", f"{cache} CANNOT BE WRITTEN"
        raise ProblemError(f"the cache {cache} cannot be written ({one_line(error)}): set AJEPA_CACHE") from error
    yield "cache", str(cache)


def gpus() -> Iterator[Line]:
    import torch

    driver = Path("/proc/driver/nvidia/version")
    release = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", driver.read_text()) if driver.exists() else None
    yield "torch's CUDA", torch.version.cuda or "none, a CPU build"
    yield "driver", release[1] if release else "unknown" if driver.exists() else "none"
    if torch.version.cuda is None and driver.exists():
        raise ProblemError("an NVIDIA driver is installed but torch is a CPU build: install a CUDA build of torch")
    if driver.exists() and not torch.cuda.is_available():
        raise ProblemError(
            "an NVIDIA driver is installed but torch finds no GPU: check CUDA_VISIBLE_DEVICES and the driver's version"
        )
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        size = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        yield f"cuda:{i}", f"{properties.name}, {capability}, {size}"
    if not torch.cuda.is_available():
        yield "GPU", "none: everything runs on the CPU"
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    yield "distributed", "NCCL and gloo" if nccl else "gloo"


def cpu_flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    flags = re.search(r"flags\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return set(flags[1].split() if flags else ())


def cpu_kernel(flags: set[str], most: str) -> str:
    """The kernel that `cpu_kernel` in csrc/ops.cpp chooses. `most` is the limit in AJEPA_CPU_ISA."""
    if flags >= {"avx512f", "avx512bw", "avx512dq", "avx512vl"} and most == "avx512":
        return "AVX-512"
    return "AVX2" if flags >= {"avx2", "fma"} and most != "portable" else "portable"


def kernels() -> Iterator[Line]:
    import torch

    from ajepa_kernels import _extension, _triton, products

    built = "C++ and CUDA" if _extension.CUDA else "C++ only" if _extension.AVAILABLE else ""
    yield "extension (log_mel, resample)", built or f"not active: {_extension.MISSING}"
    if _extension.AVAILABLE:
        yield "log_mel on the CPU", cpu_kernel(cpu_flags(), os.environ.get("AJEPA_CPU_ISA", "avx512"))
    why_not = _triton.cannot_launch(torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    yield "Triton kernels", f"not active, plain PyTorch instead: {why_not}" if why_not else "active"
    if torch.cuda.is_available():
        missing = products.why_not(torch.empty(0, device="cuda", dtype=torch.bfloat16), products.ALL)
        yield "fused products for Hopper", f"not active: {missing}" if missing else "active"
    if "does not load" in _extension.MISSING:
        raise ProblemError(f"the extension: {_extension.MISSING}; build it again with pip install -e .")
    if torch.cuda.is_available() and (why_not or not _extension.CUDA):
        raise ProblemError(
            f"kernels that this GPU could run are not active: {why_not or 'the extension has no CUDA part'}"
        )


def ceilings() -> Iterator[Line]:
    import torch

    from ajepa.training.roofline import copy_bytes_per_ms, product_flops_per_ms

    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield "copy", f"{copy_bytes_per_ms(device) / 1e6:,.1f} GB/s read and written, on {device}"
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        rate = product_flops_per_ms(dtype, device) / 1e9
        yield f"product {str(dtype).removeprefix('torch.')}", f"{rate:,.3f} TFLOP/s, {torch.get_num_threads()} threads"


# --- self-test --------------------------------------------------------------------------------------------------------


def operations(device: str) -> dict[str, Callable[[str], list]]:
    """Functions of `impl` by operation name. Each returns outputs and gradients for the same random inputs."""
    import torch

    import ajepa_kernels as ops

    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return x.to(device, dtype).requires_grad_()

    def with_gradients(outputs: list, inputs: list) -> list:
        sum((out.float() * draw(*out.shape, seed=9)).sum() for out in outputs).backward()
        return [*outputs, *(x.grad for x in inputs)]

    def attention(impl: str) -> list:
        qkv, cu = draw(120, 3, 4, 32), torch.tensor([0, 20, 20, 77, 120], dtype=torch.int32, device=device)
        return with_gradients([ops.masked_attention(qkv, cu_seqlens=cu, max_seqlen=57, impl=impl)], [qkv])

    def loss(impl: str) -> list:
        prediction, latents = draw(50, 64), draw(128, 64, seed=1).detach()
        index = torch.arange(0, 100, 2, device=device)
        return with_gradients([ops.latent_l2_loss(prediction, latents, index, impl=impl)], [prediction])

    def norm(impl: str) -> list:
        x, residual = draw(60, 64), draw(60, 64, seed=1)
        weight, bias = (torch.nn.Parameter(draw(64, seed=s).detach().float()) for s in (2, 3))
        outputs = list(ops.add_layer_norm(x, residual, weight, bias, impl=impl))
        return with_gradients(outputs, [x, residual, weight, bias])

    def log_mel(impl: str) -> list:
        pcm = (draw(2, 32_000).detach().float() * 3000).to(torch.int16)
        return [ops.log_mel(pcm, ops.LOG_MEL_PRESETS["a-jepa"], impl=impl)]

    def resample(impl: str) -> list:
        from ajepa_kernels import _extension

        pcm = draw(2, 9_000).detach().float()
        # Without the extension, soxr resamples with another filter, so the definition is compared with itself.
        return [ops.resample(pcm, 44_100, 16_000, impl=impl if _extension.AVAILABLE else "reference")]

    def update(impl: str) -> list:
        p, target = torch.nn.Parameter(draw(40, 33).detach().float()), draw(40, 33, seed=1).detach().float()
        if impl == "reference":
            plain = torch.optim.AdamW([p], lr=1e-2)
        fused = ops.AdamWEMA([p], ema=[(p, target)], lr=1e-2) if impl != "reference" else None
        for seed in range(3):
            p.grad = draw(40, 33, seed=seed).detach().float()
            if fused is not None:
                fused.step(ema_decay=0.9)
            else:
                plain.step()
                ops.ema_update_reference_([target], [p], 0.9)
        return [p, target]

    return {
        "masked_attention": attention, "latent_l2_loss": loss, "add_layer_norm": norm, "log_mel": log_mel,
        "resample": resample, "AdamWEMA": update,
    }  # fmt: skip


def check_operations() -> Iterator[Line]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrong = []
    for name, run in operations(device).items():
        try:
            error = max(relative_rms(a, b) for a, b in zip(run("auto"), run("reference"), strict=True))
            ok = error <= TOLERANCE[device]
            yield name, f"{'agrees with' if ok else 'DIFFERS FROM'} its plain definition, relative error {error:.1e}"
            wrong += [] if ok else [f"{name} differs from its plain definition by {error:.1e}"]
        except Exception as error:
            yield name, f"FAILS: {one_line(error)}"
            wrong.append(f"{name} fails: {one_line(error)}")
    if wrong:
        raise ProblemError("; ".join(wrong))


def check_decoding() -> Iterator[Line]:
    """Write a tone as WAV, FLAC and Ogg, read the files through the loader and compare the peaks."""
    import tempfile

    import numpy as np
    import soundfile

    from ajepa.data.index import build_index
    from ajepa.data.loader import AudioLoader

    with tempfile.TemporaryDirectory() as folder:
        for kind in ("wav", "flac", "ogg"):
            tone = 0.3 * np.sin(np.arange(16_000) * 0.1).astype(np.float32)
            buffer = io.BytesIO()
            soundfile.write(buffer, tone, 16_000, format=kind)
            Path(folder, f"tone.{kind}").write_bytes(buffer.getvalue())
        index = build_index(folder, cache_dir=Path(folder, "cache"), progress=False)
        with AudioLoader(index, sample_rate=16_000, clip_samples=16_000, batch_size=3, seed=0) as loader:
            batch = next(loader)
        found = [float(clip.float().abs().max()) / 32768 for clip in batch.pcm]
    if index.skipped or not all(0.28 < peak < 0.32 for peak in found):
        raise ProblemError(f"decoding: {index.skipped or f'the peaks are {found} instead of 0.3'}")
    yield "decoding", "WAV, FLAC and Ogg Vorbis are decoded correctly"


def check_training() -> Iterator[Line]:
    import torch

    from ajepa.config import PRESETS
    from ajepa.model.masks import MaskSampler
    from ajepa.training.engine import Engine
    from ajepa.utils.devices import choose_device

    cfg, device, batch = PRESETS["tiny"], choose_device("auto"), 8
    engine = Engine(cfg, device)
    time_S = torch.arange(32_000) / 16_000
    pitch = torch.logspace(2, 3.5, batch)[:, None]
    pcm = (9000 * torch.sin(6.2832 * pitch * time_S) * torch.cos(20 * time_S)).to(torch.int16).to(device)
    lengths = torch.full((batch,), 32_000, dtype=torch.int32, device=device)
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid)
    masks = engine.masks(sampler, 0, batch)  # the same in every step, so only learning changes the loss
    results = [engine.step(pcm, lengths, masks, cfg.optim.warmup_steps) for _ in range(8)]
    losses = [result.loss.item() for result in results]
    if not losses[-1] < losses[0]:  # also true for NaN
        raise ProblemError(
            f"training: the loss does not fall in 8 steps on one batch ({losses[0]:.3f} to {losses[-1]:.3f})"
        )
    yield "training", f"the loss falls from {losses[0]:.3f} to {losses[-1]:.3f} in 8 steps on {device}"


def relative_rms(a: Any, b: Any) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


SECTIONS: dict[str, list[Callable[[], Iterator[Line]]]] = {
    "versions": [versions, imports],
    "machine": [machine, gpus],
    "kernels": [kernels],
    "ceilings": [ceilings],
    "self-test": [check_operations, check_decoding, check_training],
}


@command
def main(argv: list[str] | None = None) -> int:
    """Print the report. Returns 1 if a section found a problem or could not be finished."""
    parser = argparse.ArgumentParser(
        "python -m ajepa.doctor", description=(__doc__ or "").partition(": ")[2], add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help; after --plan, its flags")
    parser.add_argument("--version", action="version", version=f"ajepa {VERSION}")
    parser.add_argument("--plan", action="store_true", help="predict a recipe on many GPUs; `--plan --help` for more")
    options, more = parser.parse_known_args(argv)
    if options.plan:
        from ajepa.training import plan_text

        return plan_text.main([*more, *["--help"] * options.help])
    if options.help:
        parser.print_help()
        raise SystemExit(0)
    if more:
        parser.error(f"unknown: {' '.join(more)}; a prediction for many GPUs needs --plan")
    problems: list[str] = []
    start = time.monotonic()
    for title, checks in SECTIONS.items():
        print(f"\n{title}" if title != "versions" else title)
        for check in checks:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    for name, finding in check():
                        print(f"  {name:<22} {finding}", flush=True)
                except ProblemError as problem:
                    problems.append(str(problem))
                except Exception as error:
                    print(f"  {check.__name__.replace('check_', ''):<22} CANNOT BE CHECKED: {one_line(error)}")
                    problems.append(f"{check.__name__.replace('check_', '')}: {one_line(error)}")
    print(f"\n{len(problems)} problem{'s' * (len(problems) != 1)} found in {time.monotonic() - start:.0f} s")
    for text in problems:
        print(f"  - {text}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
