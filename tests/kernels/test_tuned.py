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

TUNE = Path(__file__).parents[2] / "benchmarks" / "tune.py"


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
            for bits, D in ((b, d) for b in (16, 32) for d in (32, 64, 128, 256)):
                assert tuned(x, op, bits, LONG, D) and tuned(x, op, bits, 16, D)
        for D in (32, 64, 128):  # 128 tokens in one launch, but where shared memory is small
            assert (tuned(x, "attention_bwd", 16, 128, D) is None) == (arch in (86, 120) and D == 128)
        assert (tuned(x, "attention_bwd", 16, 64, 256) is None) == (arch in (86, 120))


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
    assert tune.fastest(key, [1, 2], run, entries, time, deadline=0.0) == (None, 1.0, 1.0)  # no time for any
    assert not entries


def test_tune_tries_what_is_shipped_and_little_else(tune):
    """Candidates are pruned by arithmetic, which must not rule out what is known to compile well."""
    shared = {"sm_80": 163, "sm_86": 99, "sm_120": 99}
    for name, table in _tuned._UNTIMED.items():
        for key, config in table.items():
            if isinstance(config, Rows):
                assert config in tune.rows(*key), (name, key)
            elif config is not None and key[0].split("_")[1] not in ("rotary", "causal"):
                candidates = tune.tiles(*key, shared.get(name, 227) << 10)
                bare = [candidate._replace(max_registers=None) for candidate in candidates]
                assert config._replace(max_registers=None) in bare, (name, key)
    sizes = [("attention_fwd", 16, S, D) for S in (64, 80, 128) for D in (32, 64)]
    sizes += [("attention_bwd", *size[1:]) for size in sizes]
    assert sum(len(tune.tiles(*size, 227 << 10)) for size in sizes) < 250  # minutes of compiling


def test_tune_takes_the_recipe_first(tune, monkeypatch):
    monkeypatch.setattr(tune, "attention", lambda *size: [size])
    monkeypatch.setattr(tune, "on_rows", lambda C: [C])
    order = list(tune.cases())
    recipe = [(16, 64, 64), (16, 64, 32), (16, 80, 64), (16, 80, 32), (16, 128, 64), (16, 128, 32), 768, 384]
    assert order[:8] == recipe and len(set(order)) == len(order) == 56 + 3


def test_tune_stops_in_time(tune, monkeypatch, capsys, tmp_path):
    """What is found is written at once, each key is tuned once, and the clock decides when it ends."""
    attention, norm, gelu = ("attention_fwd", 16, 64, 64), ("add_layer_norm_fwd", 1024), ("bias_gelu_fwd", 512)
    table, seconds, found = tmp_path / "_tuned.py", iter(range(0, 600, 60)), []
    table.write_text(Path(_tuned.__file__).read_text())

    def fastest(key, candidates, run, entries, deadline):
        found.append(key)
        return (Tiles(64, 64, 4), 1.0, 2.0) if key == attention else (None, 1.0, 1.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name, value in {"model": lambda index: "H200", "TIMED": {}, "__file__": str(table)}.items():
        monkeypatch.setattr(_tuned, name, value)
    monkeypatch.setattr(tune, "cases", lambda: [(key, [], None) for key in (attention, norm, norm, gelu)])
    monkeypatch.setattr(tune, "fastest", fastest)
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(seconds))
    monkeypatch.setattr(sys, "argv", ["tune.py", "--minutes", "2"])
    assert tune.main() == 0 and found == [attention, norm]
    assert f"2 minutes are over before {gelu}" in capsys.readouterr().out
    assert f"{attention}: Tiles(64, 64, 4, 1, None, 0, 1)".replace("'", '"') in table.read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
@pytest.mark.skipif(triton is None, reason="triton is not installed")
def test_tune_says_that_there_is_no_gpu():
    done = subprocess.run([sys.executable, str(TUNE)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == (
        "tune: this machine has no CUDA device, so the configurations stay as they are"
    )
