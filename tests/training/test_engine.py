"""The fused step: graphs, weight copies, micro-batches and pruning change only the rounding of its results."""

from dataclasses import replace

import pytest
import torch

from ajepa.config import PRESETS, Config, ObjectiveConfig
from ajepa.model.frontend import FrontEnd
from ajepa.model.layers import Linear
from ajepa.model.masks import MaskSampler
from ajepa.training.checkpoint import load_checkpoint, save_checkpoint
from ajepa.training.engine import Engine
from ajepa.training.graph import StepGraphs, round_bound
from ajepa_kernels.fp8 import round_e4m3

CPU = torch.device("cpu")
TINY = PRESETS["tiny"]


def make(step: dict | None = None, mask: dict | None = None, model: dict | None = None, **changes) -> Config:
    """The tiny recipe with the masked objective in float32, so that rounding is the only difference between engines.

    Weights and steps are smaller than the recipe's: rounding grows with both.
    """
    optim = replace(TINY.optim, lr=5e-4)
    changes = {"objective": ObjectiveConfig(), "precision": "fp32", "optim": optim, **changes}
    model = {"init": "0.02", **(model or {})}
    return replace(
        TINY, step=replace(TINY.step, **(step or {})), mask=replace(TINY.mask, **(mask or {})),
        model=replace(TINY.model, **model), **changes,
    )  # fmt: skip


def run(cfg: Config, steps: int = 4, batch: int = 5, graphs: bool = False, device: torch.device = CPU, ranks=None):
    """(losses, engine) after some steps on noise."""
    engine = Engine(cfg, device, ranks)
    if graphs:
        engine.use_graphs()
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(steps):
        pcm = torch.randint(-9999, 9999, (batch, 32_000), dtype=torch.int16, generator=generator).to(device)
        lengths = torch.full((batch,), 32_000, dtype=torch.int32, device=device)
        result = engine.step(pcm, lengths, engine.masks(sampler, step, batch), 10 * step)
        assert not result.bad
        losses.append(result.loss.item())
    return losses, engine


def assert_same_weights(a: Engine, b: Engine, **tolerance) -> None:
    for (name, x), y in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mask", ["random", "block"])
def test_the_graphed_path_is_the_eager_path_on_fixed_tensors(mask):
    cfg = make(mask={"mask": mask, "fixed_token_budget": True}, step={"micro_batch": 3})
    eager, a = run(cfg, steps=6)
    graphed, b = run(cfg, steps=6, graphs=True)
    kinds = [type(kept).__name__ for kept in b.graphs.seen.values()]
    assert "_Captured" in kinds, "no shape occurred twice, so nothing was captured"
    assert graphed == pytest.approx(eager, rel=1e-5)
    assert_same_weights(a, b, rtol=1e-4, atol=1e-6)


def test_shapes_beyond_the_limit_run_eagerly_and_say_so_once(monkeypatch, capsys):
    monkeypatch.setattr("ajepa.training.graph.MAX_GRAPHS", 2)
    cfg = make(mask={"mask_ratio": (0.3, 0.9)})
    losses, engine = run(cfg, steps=6, graphs=True)
    assert losses == pytest.approx(run(cfg, steps=6)[0], rel=1e-5)
    assert capsys.readouterr().err.count("--fixed-token-budget") == 1 and len(engine.graphs.seen) == 2


def test_captured_shapes_are_replayed_after_the_limit_is_reached(monkeypatch):
    monkeypatch.setattr("ajepa.training.graph.MAX_GRAPHS", 1)
    first, second = make(mask={"mask_ratio": (0.5, 0.5)}), make(mask={"mask_ratio": (0.7, 0.7)})
    engine = Engine(first, CPU)
    engine.graphs, eager = StepGraphs(engine._train, CPU), []
    samplers = [MaskSampler(cfg.mask, cfg.front_end.grid) for cfg in (first, second)]
    train = engine.graphs.train
    engine.graphs.train = lambda patches, *rest: eager.append(patches) or train(patches, *rest)
    pcm, lengths = torch.randint(-9999, 9999, (5, 32_000), dtype=torch.int16), torch.full((5,), 32_000)
    for step, which in enumerate([0, 0, 1, 0, 0]):
        engine.step(pcm, lengths, samplers[which](step, 100, 5), step)
    (kept,) = engine.graphs.seen.values()
    assert [patches is kept.patches for patches in eager] == [False, True, False, True, True]


def test_a_capture_that_fails_late_leaves_no_gradient_behind(monkeypatch):
    """The eager step that replaces a failed capture does not add to gradients that the capture left behind."""
    cfg = make(mask={"fixed_token_budget": True})

    def capture(graphs, patches, parts, schedule_values):  # like a capture, the body runs until it fails
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "_update", lambda *_: (_ for _ in ()).throw(RuntimeError("stream is capturing")))
            return graphs.train(patches, parts, schedule_values)

    monkeypatch.setattr(StepGraphs, "_capture", capture)
    losses, failed = run(cfg, graphs=True)
    eager, right = run(cfg)
    assert losses == pytest.approx(eager, rel=1e-5)
    assert_same_weights(failed, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("length", "bound"), [(1, 16), (64, 64), (65, 80), (81, 96), (97, 128), (129, 256), (512, 512)]
)
def test_bounds_are_rounded_to_the_lengths_that_attention_distinguishes(length, bound):
    assert round_bound(length) == bound


def test_a_failed_capture_falls_back_with_its_reason(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nstack")

    monkeypatch.setattr(StepGraphs, "_capture", fail)
    cfg = make(mask={"fixed_token_budget": True})
    losses, _ = run(cfg, graphs=True)
    assert losses == pytest.approx(run(cfg)[0], rel=1e-5)
    assert capsys.readouterr().err.count("without a CUDA graph: operation not permitted when stream is capturing") == 1


@pytest.mark.parametrize("mask", ["random", "curriculum"])
def test_micro_batches_add_up_to_the_batch(mask):
    whole, a = run(make(mask={"mask": mask}))
    parts, b = run(make(mask={"mask": mask}, step={"micro_batch": 2}))
    assert parts == pytest.approx(whole, rel=1e-5)
    assert_same_weights(a, b, rtol=1e-3, atol=2e-5)  # Adam's first steps amplify the rounding of small gradients


def test_recomputed_activations_give_the_same_step():
    kept, a = run(make())
    recomputed, b = run(make(step={"recompute": True}))
    assert recomputed == kept
    assert_same_weights(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("residual", ["fp32", "bf16-gradient", "in-product", "bf16"])
def test_bf16_reads_copies_that_the_optimiser_writes(residual):
    cfg = make(step={"residual": residual}, precision="bf16", model={"target_layers": 1})
    losses, engine = run(cfg)
    plain, _ = run(replace(cfg, impl="reference"))
    assert losses == pytest.approx(plain, rel=0.02)
    weights = dict(engine.model.named_parameters())
    for network in ("context_encoder", "target_encoder", "predictor"):
        layer = getattr(engine.model, network).blocks[0].fc1
        weight = weights[f"{network}.blocks.0.fc1.weight"]
        assert weight.dtype == torch.float32 and layer.copies[0].dtype == torch.bfloat16
        assert torch.equal(layer.copies[0], weight.bfloat16())
    other = Engine(replace(cfg, seed=7), CPU)
    other.model.load_state_dict(engine.model.state_dict())
    assert torch.equal(other.model.predictor.head.copies[0], engine.model.predictor.head.weight.bfloat16())


def test_patches_rounded_by_the_front_end_are_those_rounded_by_the_layers():
    cfg = make(precision="bf16")
    losses, engine = run(cfg)
    assert engine.front_end.dtype == torch.bfloat16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ajepa.training.engine.FrontEnd", lambda spec, dtype: FrontEnd(spec))
        assert run(cfg)[0] == losses


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 2e-3)])
def test_bias_gelu_changes_only_rounding(precision, tolerance):
    plain, a = run(make(precision=precision))
    losses, b = run(make(precision=precision, step={"mlp": "bias-gelu"}))
    assert losses == pytest.approx(plain, rel=tolerance)
    if precision == "fp32":
        assert_same_weights(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("residual", ["fp32", "in-product"])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 5e-3)])
def test_gelu_epilogues_change_only_rounding(precision, tolerance, residual):
    """In bf16 the products are computed with the weight copies, and fc2's may add to the stream."""
    model = {"target_layers": 1}
    plain, a = run(make(precision=precision, model=model))
    losses, b = run(make(precision=precision, model=model, step={"mlp": "epilogue", "residual": residual}))
    assert losses == pytest.approx(plain, rel=tolerance)
    if precision == "fp32":
        assert_same_weights(a, b, rtol=1e-3, atol=2e-5)


def test_products_that_add_to_the_stream_leave_the_gradients(monkeypatch):
    """Every parameter of a step in bf16 has nearly the gradient that it has if the norms add."""
    found = {}
    for residual in ("fp32", "bf16-gradient", "in-product"):
        engine = Engine(make(precision="bf16", step={"residual": residual, "mlp": "epilogue"}), CPU)
        monkeypatch.setattr(engine, "_update", lambda *_: torch.zeros(6))
        masks = MaskSampler(engine.cfg.mask, engine.cfg.front_end.grid)(0, 100, 3)
        pcm = torch.randint(-9999, 9999, (3, 32_000), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
        engine.step(pcm, torch.full((3,), 32_000), masks, 0)
        found[residual] = {name: p.grad.double() for name, p in engine.model.named_parameters() if p.requires_grad}
    want = found.pop("fp32")
    for residual, grads in found.items():
        for name, grad in grads.items():
            scale = want[name].norm() + 1e-3 * want[name].numel() ** 0.5 * max(g.abs().max() for g in want.values())
            assert (grad - want[name]).norm() < 0.03 * scale, f"{residual}: {name}"


@pytest.mark.parametrize(("precision", "targets"), [("bf16", "same"), ("bf16", "fp8")])
def test_a_checkpoint_restores_the_copies_too(tmp_path, precision, targets):
    """With their scales: after two steps, the second of which quantises with scales that follow from the first."""
    cfg = make({"target_precision": targets}, precision=precision)
    _, engine = run(cfg)
    path = save_checkpoint(tmp_path, 4, engine, {}, keep=1)
    other = Engine(replace(cfg, seed=7), CPU)
    load_checkpoint(path, other)
    masks = MaskSampler(cfg.mask, cfg.front_end.grid)(4, 100, 3)
    pcm, lengths = torch.randint(-9999, 9999, (3, 32_000), dtype=torch.int16), torch.full((3,), 32_000)
    for step in (4, 5):
        assert engine.step(pcm, lengths, masks, step).loss == other.step(pcm, lengths, masks, step).loss
    assert_same_weights(engine, other, rtol=0, atol=0)
    assert (engine.model.scales is not None) == ("scales" in engine.model.state_dict()) == (targets == "fp8")


def test_copies_give_gradients_of_the_masters_in_float32():
    torch.manual_seed(0)
    engine = Engine(make(precision="bf16"), CPU)
    layer = engine.model.predictor.head
    x = torch.randn(7, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(7, layer.out_features, dtype=torch.bfloat16)
    layer(x, slice(3, 9)).backward(dy[:, 3:9])
    w = layer.weight.detach().bfloat16().double()[3:9]
    torch.testing.assert_close(x.grad.double(), dy.double()[:, 3:9] @ w, rtol=1e-2, atol=1e-2)
    exact = torch.zeros_like(layer.weight, dtype=torch.float64)
    exact[3:9] = dy.double()[:, 3:9].T @ x.detach().double()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(layer.weight.grad.double(), exact, rtol=1e-2, atol=1e-2)
    rounding = {} if layer.bias.is_cuda else {"rtol": 2**-8, "atol": 1e-3}  # a CPU sums in bfloat16 and rounds once
    torch.testing.assert_close(layer.bias.grad[3:9], dy[:, 3:9].float().sum(0), **rounding)


def test_flops_count_each_micro_batch_and_the_published_model():
    cfg = PRESETS["audio-jepa"]
    engine = Engine.__new__(Engine)
    engine.cfg = cfg
    sampler = MaskSampler(replace(cfg.mask, mask_ratio=(0.5, 0.5)), cfg.front_end.grid)
    whole = engine.flops(sampler(0, 1, 6))
    assert whole / 6 == pytest.approx(64.5e9, rel=0.01)  # with 64 of 128 patches visible
    assert engine.flops(sampler.parts(0, 1, [4, 2])) == pytest.approx(whole)


@pytest.mark.parametrize("switches", [{}, {"mlp": "epilogue", "residual": "in-product"}], ids=["", "in-product"])
def test_fp8_targets_point_where_the_others_do(switches):
    """The acceptance test of fp8 targets: each has a high cosine similarity to its bf16 target, and losses agree."""
    full, engine = run(make(precision="bf16", model={"target_layers": 1}), steps=6)
    cfg = make(step={"target_precision": "fp8", **switches}, precision="bf16", model={"target_layers": 1})
    low, other = run(cfg, steps=6)
    assert low == pytest.approx(full, rel=0.03)
    other.model.load_state_dict(engine.model.state_dict())
    patches = torch.randn(4, cfg.front_end.n_patches, cfg.front_end.patch_dim)
    with torch.no_grad(), engine.autocast():
        a, b = (e.model.target_encoder.targets(patches).float() for e in (engine, other))
    assert not torch.equal(a, b) and torch.cosine_similarity(a, b, dim=-1).min() > 0.98


def quantized_layers(engine: Engine) -> list[Linear]:
    return [m for m in engine.model.target_encoder.blocks.modules() if isinstance(m, Linear)]


def assert_fp8_copies(engine: Engine) -> None:
    """The optimiser writes the average in float8; no value is beyond a scale that may be a step old."""
    layers = quantized_layers(engine)
    assert layers
    for layer in layers:
        scale = layer.scalings[1].scale
        assert torch.equal(layer.copies[0].float(), round_e4m3(layer.weight, scale).float())
        assert layer.weight.abs().max() <= 448 * scale < 2 * layer.weight.abs().max()


def test_fp8_scales_follow_the_steps():
    """Over micro-batches, and when graphs are replayed. Evaluation and a step that is not finite change no scale."""
    step, mask = {"micro_batch": 3}, {"fixed_token_budget": True}
    cfg = make({**step, "target_precision": "fp8"}, mask)
    losses, engine = run(cfg, steps=5, graphs=True)
    assert losses == pytest.approx(run(make(step, mask), steps=5)[0], rel=0.01)
    assert_fp8_copies(engine)
    scales = engine.model.scales
    assert (scales[..., 2:7] > 0).all() and not (scales[:, 0, 7] > 0).any() and not scales[:, 0, 1].any()
    torch.testing.assert_close(scales[:, 0, 0], scales[:, 0, 2:].amax(-1) * 1.5 / 448)
    assert (scales[:, 0, 2].diff() != 0).any()
    before = scales.clone()
    masks = MaskSampler(cfg.mask, cfg.front_end.grid).parts(9, 100, [3, 2])
    pcm, lengths = torch.randint(-9999, 9999, (5, 32_000), dtype=torch.int16), torch.full((5,), 32_000)
    assert engine.inspect(pcm, lengths, masks)["target_variance"] > 0 and torch.equal(scales, before)
    with torch.no_grad():
        engine.model.context_encoder.embed.weight[0, 0] = torch.nan
    assert engine.step(pcm, lengths, masks, 9).bad
    assert torch.equal(scales[:, :, 2:], before[:, :, 2:]) and torch.equal(scales[:, :, 0], before[:, :, 0])
    assert_fp8_copies(engine)


def test_weights_move_into_fp8_targets():
    """From an engine without float8 and back, and from a teacher, whose copies the optimiser leaves as they are."""
    _, plain = run(make(), 2)
    _, engine = run(make({"target_precision": "fp8"}), 2)
    with torch.no_grad():
        for p in plain.model.target_encoder.parameters():
            p.mul_(4)
    engine.model.load_state_dict(plain.model.state_dict())
    assert not any(layer.scalings[0].calibrated for layer in quantized_layers(engine))
    assert_fp8_copies(engine)
    plain.model.load_state_dict(engine.model.state_dict())
    taught = Engine(make({"target_precision": "fp8"}, objective=ObjectiveConfig(teacher="given")), CPU)
    taught.model.target_encoder.load_state_dict(plain.model.target_encoder.state_dict())
    assert not taught.optimizer.scalings and not any(c.dtype == torch.float8_e4m3fn for _, c in taught.copies)
    assert_fp8_copies(taught)
