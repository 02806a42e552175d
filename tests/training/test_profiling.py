"""--profile writes a trace and prints a table with plausible shares."""

import json
import re

import pytest
from conftest import SMALL

from ajepa.train import main
from ajepa.training.profiling import kind_of, union


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16", "GEMM"),
        ("aten::addmm", "GEMM"),
        ("_masked_attention_fwd_kernel", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("_adamw_ema_kernel", "optimiser"),
        ("ajepa::log_mel_fwd", "front end"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("_add_layer_norm_bwd_kernel", "element-wise and norms"),
        ("aten::gelu", "element-wise and norms"),
    ],
)
def test_kernels_are_classified(name, kind):
    assert kind_of(name) == kind


@pytest.mark.parametrize(
    ("spans", "lasts"),
    [([], 0), ([(0, 2), (5, 6)], 3), ([(5, 6), (0, 5.5)], 6), ([(0, 9), (1, 2), (3, 4)], 9), ([(0, 1), (0, 1)], 1)],
)
def test_kernels_that_run_at_once_count_once(spans, lasts):
    assert union(spans) == lasts


def test_a_profiled_run(tones, tmp_path, capsys):
    options = ["--steps", "12", "--warmup-steps", "2", "--profile", "2", "--compare-steps", "0"]
    assert main(["--data", str(tones), "--out", str(tmp_path / "run"), *SMALL, *options]) == 0
    out = capsys.readouterr().out
    assert "profile of 2 steps" in out and "trace written" in out
    shares = {
        kind: float(share) for kind, share in re.findall(r"^  (GEMM|attention|optimiser|idle) +([\d.]+)%$", out, re.M)
    }
    assert shares["GEMM"] > 0 and shares["optimiser"] > 0 and 0 <= shares["idle"] < 100
    assert json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]


def test_a_run_too_short_to_profile_says_so(tones, tmp_path, capsys):
    assert main(["--data", str(tones), "--out", str(tmp_path / "run"), *SMALL, "--profile", "5", "--steps", "10"]) == 0
    assert "nothing was profiled" in capsys.readouterr().out
