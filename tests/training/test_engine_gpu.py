"""The fused step on a GPU: captured against eager steps, and against plain PyTorch."""

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


STEPS = [{}, {"parallel_encoders": True}, {"micro_batch": 8}, {"recompute": True}, {"mlp": "plain"}]
BF16 = [{"mlp": "epilogue"}, {"residual": "bf16-gradient"}, {"residual": "in-product"}, {"residual": "bf16"}]
BF16 += [{"mlp": "epilogue", "residual": "in-product"}, {"target_precision": "fp8"}]


@pytest.mark.parametrize(
    ("step", "precision"), [(step, p) for step in STEPS for p in ("bf16", "fp32")] + [(step, "bf16") for step in BF16]
)
def test_a_replayed_step_is_the_eager_step(cuda, step, precision, capsys):
    fixed = {"fixed_token_budget": True}
    eager, a = run(make({**step, "cuda_graph": False}, fixed, precision=precision), 8, 16, device=cuda)
    graphed, b = run(make(step, fixed, precision=precision), 8, 16, device=cuda)
    assert "without a CUDA graph" not in capsys.readouterr().err
    assert any(b.graphs.seen.values()), "no step was captured"
    assert graphed == pytest.approx(eager, rel=1e-4)
    assert_same_weights(a, b, rtol=1e-3, atol=3e-4)  # a key bias has only rounding error as its gradient


def test_the_fused_curve_is_the_plain_one(cuda):
    cfg = make(precision="bf16")
    fused, _ = run(cfg, 200, 64, device=cuda)
    plain, _ = run(make(precision="bf16", impl="reference"), 200, 64, device=cuda)
    assert fused == pytest.approx(plain, rel=0.05)


def test_the_host_stays_two_steps_ahead_at_most(cuda):
    _, engine = run(make(precision="bf16"), 6, 16, device=cuda)
    assert len(engine.in_flight.events) == 2
