"""The fused step on a GPU: captured against eager steps, and against plain PyTorch."""

import pytest
import torch
from test_engine import assert_same_weights, make, run

from ajepa.model.masks import MaskSampler
from ajepa.training.engine import Engine

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


@pytest.mark.parametrize("graph", [True, False])
def test_patches_computed_beside_the_step_before_change_nothing(cuda, graph):
    """The batches differ, so a step that read the patches of another step would have another loss."""
    mask, losses, engines = {"fixed_token_budget": True}, {}, {}
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(-9999, 9999, (64, 32_000), dtype=torch.int16, generator=generator) for _ in range(12)]
    lengths = torch.full((64,), 32_000, dtype=torch.int32, device=cuda)
    for overlaps in (False, True):
        cfg = make({"cuda_graph": graph, "overlap_front_end": overlaps}, mask, precision="bf16")
        engine = engines[overlaps] = Engine(cfg, cuda)
        sampler, results = MaskSampler(cfg.mask, cfg.front_end.grid), []
        for step, pcm in enumerate(batches):
            with engine.ahead():
                patches = engine.patches(pcm.pin_memory().to(cuda, non_blocking=True), lengths, step)
            results.append(engine.train(patches, engine.masks(sampler, step, 64), 10 * step).loss)
            del patches  # the engine must keep what a queued step reads
        losses[overlaps] = torch.stack(results).tolist()
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert_same_weights(engines[False], engines[True], rtol=1e-3, atol=3e-4)
