"""Every shipped configuration compiled for GPUs that are not here: no spills, tensor cores, room for enough blocks."""

import os
import re

import pytest
from aot import ARCHS, CORE, REST, compile_all

from ajepa_kernels._triton import INTERPRET, triton

pytestmark = [
    pytest.mark.skipif(triton is None, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRET, reason="kernels defined under TRITON_INTERPRET=1 cannot be compiled"),
]

# What a multiprocessor must have under way to keep memory busy: bandwidth x latency / multiprocessors, rounded up
# (A100 2.0 TB/s x 0.7 us / 108, H200 4.8 x 0.8 / 132, B200 8 x 0.8 / 148).
BYTES_IN_FLIGHT = {80: 16 << 10, 90: 32 << 10, 100: 48 << 10}


STREAMING = {
    *("_latent_l2_loss_fwd_kernel", "_add_layer_norm_fwd_kernel", "_add_layer_norm_bwd_kernel"),
    *("_bias_gelu_fwd_kernel", "_bias_gelu_bwd_kernel", "_adamw_ema_kernel", "_ema_update_kernel"),
}


@pytest.fixture(scope="module")
def compiled():
    return compile_all(CORE)


def check(name: str, arch: int, reports: list) -> None:
    assert len(reports) >= 2, f"{name}: launches went missing: {[r.kernel for r in reports]}"
    for r in reports:
        assert r.spills == 0 and r.stack == 0, f"{name}: spills on sm_{arch}: {r}"
        if "attention" in name and "fp32" not in name and "delta" not in r.kernel:
            assert r.tensor_core, f"{name}: no tensor-core instruction on sm_{arch}: {r}"
        assert r.blocks >= 1, f"{name}: a block does not fit on sm_{arch}: {r}"
        if re.fullmatch("_masked_attention_(fwd|bwd|tiled_bwd)_kernel", r.kernel) and "fp32" not in name:
            S, D = (int(x) for x in name.removesuffix(" gathered").removeprefix("attention ").split(" x "))
            tensors = 4 if "bwd" in r.kernel else 3
            if S <= 128:  # q, k, v (and dO) of a sequence are asked for at once
                in_flight = r.blocks * tensors * S * D * 2
                assert in_flight >= BYTES_IN_FLIGHT[arch], f"{name}: {in_flight} bytes in flight on sm_{arch}: {r}"
        elif r.kernel in STREAMING:
            assert r.wide, f"{name}: no 16-byte load on sm_{arch}: {r}"
            assert r.blocks * r.threads >= 512, f"{name}: too few threads on sm_{arch}: {r}"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CORE)
def test_core(compiled, name, arch):
    check(name, arch, compiled[name, arch])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", [n for n in CORE if n.startswith("attention") and "fp32" not in n])
def test_hopper_and_blackwell_use_their_own_units(compiled, name, arch):
    """64 rows and more run on warp-group or tensor-memory products, not on Ampere's."""
    size = int(name.split()[1])
    if arch >= 90 and size >= 64:
        assert any(r.warp_group for r in compiled[name, arch])


@pytest.mark.slow
@pytest.mark.skipif("AJEPA_AOT" not in os.environ, reason="minutes of compiling: set AJEPA_AOT=all")
def test_every_configuration():
    for (name, arch), reports in compile_all(REST).items():
        check(name, arch, reports)
