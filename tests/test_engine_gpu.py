"""The fused step on a GPU: recorded and eager, against plain PyTorch."""

import pytest
import torch
from test_engine import assert_same_weights, make, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def cuda():
    return torch.device("cuda")


@pytest.mark.parametrize("step", [{}, {"parallel_encoders": True}, {"micro_batch": 8}, {"recompute": True}])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_replayed_step_is_the_eager_step(cuda, step, precision, capsys):
    fixed = {"fixed_token_budget": True}
    eager, a = run(make({**step, "cuda_graph": False}, fixed, precision=precision), 8, 16, device=cuda)
    graphed, b = run(make(step, fixed, precision=precision), 8, 16, device=cuda)
    assert "without a CUDA graph" not in capsys.readouterr().err
    assert any(b.graphs.seen.values()), "nothing was recorded"
    assert graphed == pytest.approx(eager, rel=1e-4)
    assert_same_weights(a, b, rtol=1e-3, atol=1e-4)


def test_the_fused_curve_is_the_plain_one(cuda):
    cfg = make(precision="bf16")
    fused, _ = run(cfg, 200, 64, device=cuda)
    plain, _ = run(make(precision="bf16", impl="reference"), 200, 64, device=cuda)
    assert fused == pytest.approx(plain, rel=0.05)
