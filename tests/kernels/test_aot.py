"""Every shipped configuration compiled for GPUs that are not here: no spills, tensor cores, room for enough blocks."""

import functools
import os
import re

import pytest
from aot import ARCHS, CORE, REST, SMALL, SMALL_ARCHS, compile_all, reports

from ajepa_kernels._triton import INTERPRET, triton

pytestmark = [
    pytest.mark.skipif(triton is None, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRET, reason="kernels defined under TRITON_INTERPRET=1 cannot be compiled"),
]

# What a multiprocessor must have under way to keep memory busy: bandwidth x latency / multiprocessors, rounded up
# (A100 2.0 TB/s x 0.7 us / 108, L40 0.9 x 0.7 / 142, H200 4.8 x 0.8 / 132, B200 8 x 0.8 / 148, and RTX 5090
# 1.8 x 0.7 / 170).
BYTES_IN_FLIGHT = {80: 16 << 10, 86: 8 << 10, 90: 32 << 10, 100: 48 << 10, 120: 8 << 10}

STREAMING = {
    *("_latent_l2_loss_fwd_kernel", "_add_layer_norm_fwd_kernel", "_add_layer_norm_bwd_kernel"),
    *("_bias_gelu_fwd_kernel", "_bias_gelu_bwd_kernel", "_adamw_ema_kernel", "_ema_update_kernel"),
    *("_segment_pool_fwd_kernel", "_segment_pool_bwd_kernel", "_swiglu_fwd_kernel", "_swiglu_bwd_kernel"),
}


@functools.cache
def compiled(name: str, arch: int) -> list:
    """Each test compiles what it reads, so that test processes share the work; Triton keeps the results on disk."""
    return reports((CORE | SMALL)[name], arch)


def check(name: str, arch: int, reports: list, share: float = 1.0) -> None:
    """share: of the bytes that keep memory busy, those that one tile's first loads must make up."""
    assert len(reports) >= 2, f"{name}: launches went missing: {[r.kernel for r in reports]}"
    for r in reports:
        assert r.spills == 0 and r.stack == 0, f"{name}: spills on sm_{arch}: {r}"
        if "attention" in name and "fp32" not in name and "delta" not in r.kernel:
            assert r.tensor_core, f"{name}: no tensor-core instruction on sm_{arch}: {r}"
        if r.kernel in ("_sigreg_fwd_kernel", "_sigreg_dz_kernel"):
            assert r.tensor_core, f"{name}: no tensor-core instruction on sm_{arch}: {r}"
        assert r.blocks >= 1, f"{name}: a block does not fit on sm_{arch}: {r}"
        if re.match("attention (16|32|64|77|96|128) x", name) and not name.endswith(("fp32", "tf32")):
            # asynchronous loads stand in the loop and, for all stages but the last, before it
            loads = r.together or r.order.count("a") * (r.stages - 1) // r.stages
            in_flight = r.blocks * r.threads * 16 * loads
            assert in_flight >= share * BYTES_IN_FLIGHT[arch], f"{name}: {in_flight} bytes in flight, sm_{arch}: {r}"
        elif r.kernel == "_augment_mel_fwd_kernel":
            assert r.blocks * r.threads >= 768, f"{name}: too few threads on sm_{arch}: {r}"
        elif r.kernel in STREAMING:
            assert r.wide, f"{name}: no 16-byte load on sm_{arch}: {r}"
            if (
                r.kernel == "_add_layer_norm_bwd_kernel"
            ):  # two programs, whose next rows are on their way to shared memory
                assert min(2, r.blocks) * r.shared >= BYTES_IN_FLIGHT[arch], f"{name}: too little on its way: {r}"
            else:
                assert r.blocks * r.threads >= 512, f"{name}: too few threads on sm_{arch}: {r}"
            prefetching = re.fullmatch("_(add_layer_norm|bias_gelu|swiglu)_bwd_kernel", r.kernel)
            if prefetching and "1000" not in name:  # aligned rows
                assert "a" in r.order, f"{name}: the next rows are not prefetched on sm_{arch}: {r}"
            if r.kernel == "_latent_l2_loss_fwd_kernel":
                assert not r.apart, f"{name}: a load behind a sum on sm_{arch}: {r}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CORE)
def test_core(name, arch):
    check(name, arch, compiled(name, arch))


@pytest.mark.parametrize("arch", SMALL_ARCHS)
@pytest.mark.parametrize("name", SMALL)
def test_small_shared_memory(name, arch):
    check(name, arch, compiled(name, arch))


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("name", [n for n in CORE if re.match("attention (64|77|128) x", n)])
def test_loads_are_issued_together(name, arch):
    """All of a sequence that is one tile, before anything waits for a part of it: one memory latency, not several."""
    whole = [r for r in compiled(name, arch) if re.fullmatch("_masked_attention_(fwd|bwd)_kernel", r.kernel)]
    assert whole
    for r in whole:
        assert not r.apart, f"{name}: a load behind the use of another on sm_{arch}: {r}"
        assert not ("a" in r.order and "L" in r.order), f"{name}: some of the next tiles are not prefetched: {r}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [n for n in CORE if n.startswith("attention") and "32 x 64" not in n])
def test_hopper_and_blackwell_use_their_own_units(name, arch):
    """64 rows and more run on warp-group or tensor-memory products, not on Ampere's."""
    if arch >= 90 and int(name.split()[1]) >= 64:
        assert any(r.warp_group for r in compiled(name, arch))


@pytest.mark.slow
@pytest.mark.skipif("AJEPA_AOT" not in os.environ, reason="minutes of compiling: set AJEPA_AOT=all")
def test_every_configuration():
    failures = []
    for (name, arch), made in (compile_all(CORE, (120,)) | compile_all(REST, (*ARCHS, 120))).items():
        try:
            check(name, arch, made, share=0.5)
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n".join(failures)
