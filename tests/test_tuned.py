"""The table of launch configurations: who finds what in it, and that benchmarks/tune.py rewrites it as it should."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ajepa_kernels import _tuned
from ajepa_kernels._triton import record_launches, triton
from ajepa_kernels._tuned import LONG, Rows, Tiles, tuned

TUNE = Path(__file__).parent.parent / "benchmarks" / "tune.py"


@pytest.fixture
def tune():
    if triton is None:
        pytest.skip("triton is not installed")
    spec = importlib.util.spec_from_file_location("tune", TUNE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120])
def test_every_gpu_has_what_attention_needs(arch):
    x = torch.empty(0, device="meta")
    with record_launches(arch):
        for op in ("attention_fwd", "attention_bwd"):
            for bits, D in ((b, d) for b in (16, 32) for d in (32, 64, 128)):
                assert tuned(x, op, bits, LONG, D) and tuned(x, op, bits, 16, D)
        for D in (32, 64, 128):  # 128 tokens in one launch, but where shared memory is small
            assert (tuned(x, "attention_bwd", 16, 128, D) is None) == (arch in (86, 120) and D == 128)


def test_the_model_comes_before_the_capability(monkeypatch):
    class OnGPU:
        is_cuda, device = True, torch.device("cuda", 0)

    key = ("attention_fwd", 16, 64, 64)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(_tuned, "arch", lambda x: 90)
    monkeypatch.setattr(_tuned, "TIMED", {"H200": {key: Tiles(32, 64, 2)}})
    for cache in (_tuned.model, _tuned._tables):
        cache.cache_clear()
    assert tuned(OnGPU, *key) == Tiles(32, 64, 2)
    assert tuned(OnGPU, "attention_fwd", 16, LONG, 64) == Tiles(128, 64, 8, 2)  # of sm_90
    assert tuned(OnGPU, "attention_fwd", 16, 16, 32) == Tiles(16, 16, 1)  # of any
    assert tuned(OnGPU, "add_layer_norm_fwd", 1024) is None
    for cache in (_tuned.model, _tuned._tables):
        cache.cache_clear()


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"), ("NVIDIA L40S", "L40S"), ("NVIDIA GeForce RTX 4090", ""),
    ],
)  # fmt: skip
def test_model_names(name, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    assert _tuned.model.__wrapped__(0) == model


def test_tune_rewrites_the_timed_part_alone(tune):
    source = Path(_tuned.__file__).read_text()
    timed = {"H200": {("attention_fwd", 16, 64, 64): Tiles(32, 64, 2), ("bias_gelu_fwd", 1024): Rows(2, 8)}}
    once = tune.rewrite(source, timed)
    namespace: dict = {"__name__": "tuned"}
    exec(compile(once, "tuned", "exec"), namespace)
    assert namespace["TIMED"] == timed and namespace["_UNTIMED"] == _tuned._UNTIMED
    assert tune.rewrite(once, timed) == once and tune.rewrite(once, _tuned.TIMED) == source


def test_tune_keeps_what_is_right_and_faster(tune):
    """A faster candidate whose result is wrong, or that does not run, loses; so does one that is hardly faster."""
    key, entries, speeds = ("op", 64), {}, {None: 1.0, 1: 0.99, 2: 0.5, 3: 0.4, 4: 0.3}

    def run(impl):
        config = entries.get(key)
        if impl == "triton" and config == 4:
            raise RuntimeError("does not fit")
        return [torch.full((3,), 2.0 if impl == "triton" and config == 3 else 1.0)]

    time = lambda function: speeds[entries.get(key)]  # noqa: E731
    assert tune.fastest(key, [1, 2, 3, 4], run, entries, time) == (2, 0.5, 1.0)
    assert tune.fastest(key, [1, 3], run, entries, time) == (None, 1.0, 1.0)
    assert not entries


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_tune_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, str(TUNE)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == (
        "tune: no CUDA device here: the configurations stay as they are"
    )
