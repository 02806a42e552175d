"""The doctor names everything that is broken, and finishes its report whatever is missing."""

import importlib.metadata
import sys

import pytest
import torch

import ajepa_kernels
from ajepa import doctor
from ajepa.training import roofline


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(roofline, "copy_bytes_per_ms", lambda _: 1e6)
    monkeypatch.setattr(roofline, "product_flops_per_ms", lambda *_: 1e9)


@pytest.fixture
def complete():
    """Imports every package that the doctor checks."""
    import nvidia.dali  # noqa: F401
    import pydantic  # noqa: F401
    import soundfile  # noqa: F401
    import tyro  # noqa: F401


@pytest.mark.usefixtures("complete")
def test_a_healthy_machine_has_no_problem(capsys):
    assert doctor.main([]) == 0
    report = capsys.readouterr().out
    for title in doctor.SECTIONS:
        assert f"\n{title}\n" in f"\n{report}"
    assert f"  torch                  {torch.__version__.split('+')[0]}" in report
    for name in doctor.operations("cpu"):
        assert f"  {name:<22} agrees with" in report
    assert "GB/s" in report and "TFLOP/s" in report and "0 problems found" in report
    assert report.count("DIFFERS") == report.count("FAILS") == report.count("CANNOT") == 0


@pytest.mark.parametrize("name", ["masked_attention", "latent_l2_loss", "add_layer_norm", "log_mel", "resample"])
def test_an_op_that_computes_something_else_is_named(name, monkeypatch, capsys):
    real = getattr(ajepa_kernels, name)

    def wrong(*arguments, impl="auto", **options):
        out = real(*arguments, impl=impl, **options)
        if impl == "reference":
            return out
        return tuple(x * 1.01 for x in out) if isinstance(out, tuple) else out * 1.01

    monkeypatch.setattr(ajepa_kernels, name, wrong)
    monkeypatch.setattr(doctor, "SECTIONS", {"self-test": [doctor.check_operations]})
    assert doctor.main([]) == 1
    report = capsys.readouterr().out
    assert f"  {name:<22} DIFFERS" in report and f"- {name} differs from its plain definition" in report


def test_training_that_does_not_learn_is_named(monkeypatch, capsys):
    monkeypatch.setattr(ajepa_kernels.AdamWEMA, "step", lambda self, **_: None)
    monkeypatch.setattr(doctor, "SECTIONS", {"self-test": [doctor.check_training]})
    assert doctor.main([]) == 1
    assert "the loss does not fall" in capsys.readouterr().out


@pytest.mark.parametrize("gone", ["torch", "numpy", "soundfile", "nvidia.dali", "ajepa_kernels"])
def test_whatever_does_not_import_the_report_is_finished_and_names_it(gone, quick, monkeypatch, capsys):
    sections = {**doctor.SECTIONS, "self-test": [doctor.check_operations, doctor.check_decoding]}
    monkeypatch.setattr(doctor, "SECTIONS", sections)
    monkeypatch.setitem(sys.modules, gone, None)  # `import` raises
    assert doctor.main([]) == 1
    report = capsys.readouterr().out
    assert all(f"\n{title}\n" in f"\n{report}" for title in doctor.SECTIONS)
    assert gone in report[report.index("found in") :]


@pytest.mark.usefixtures("complete")
def test_a_missing_package_is_named(quick, monkeypatch, capsys):
    real = importlib.metadata.version

    def version(name):
        if name == "safetensors":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "SECTIONS", {"versions": [doctor.versions]})
    assert doctor.main([]) == 1
    report = capsys.readouterr().out
    assert "  safetensors            MISSING" in report and "- not installed: safetensors" in report


def test_a_section_that_breaks_is_named_and_the_others_are_not_lost(monkeypatch, capsys):
    def breaks():
        yield "first", "fine"
        raise ZeroDivisionError("as it\nhappens")

    def works():
        yield "second", "fine"

    monkeypatch.setattr(doctor, "SECTIONS", {"one": [breaks], "two": [works]})
    assert doctor.main([]) == 1
    report = capsys.readouterr().out
    assert "second                 fine" in report and "- breaks: ZeroDivisionError: as it happens" in report


@pytest.mark.usefixtures("complete")
def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch, capsys):
    monkeypatch.setenv("AJEPA_CACHE", "/proc/nowhere")
    monkeypatch.setattr(doctor, "SECTIONS", {"machine": [doctor.machine]})
    assert doctor.main([]) == 1
    assert "set AJEPA_CACHE" in capsys.readouterr().out


def test_the_cpu_kernel_is_the_best_that_the_cpu_has_and_the_variable_allows():
    both = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma"}
    assert [doctor.cpu_kernel(both, most) for most in ("avx512", "avx2", "portable")] == ["AVX-512", "AVX2", "portable"]
    assert doctor.cpu_kernel({"avx2", "fma"}, "avx512") == "AVX2" and doctor.cpu_kernel(set(), "avx512") == "portable"


def test_the_report_says_how_many_threads_compute_and_how_they_wait(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "SECTIONS", {"machine": [doctor.machine]})
    for policy, words in (("PASSIVE", "they sleep"), ("ACTIVE", "they spin"), (None, "they spin 7 times, then sleep")):
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")
        monkeypatch.setenv("OMP_WAIT_POLICY", policy) if policy else monkeypatch.delenv("OMP_WAIT_POLICY")
        assert doctor.main([]) == 0
        report = capsys.readouterr().out
        assert f"{torch.get_num_threads()} in a run started now; while they wait {words}" in report
        assert "free cores" in report
