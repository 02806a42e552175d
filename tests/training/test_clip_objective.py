"""The clip objective and its combination with the masked one: against a plain restatement, and across engines, graphs,
ranks and resumed runs."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ajepa import train
from ajepa.config import PRESETS, Config, ConfigError, validate
from ajepa.model.clip import BatchNorm
from ajepa.model.jepa import JEPA
from ajepa.model.layers import Sequences
from ajepa.model.masks import MaskSampler
from ajepa.model.pretrained import load_pretrained
from ajepa.training.distributed import joined
from ajepa.training.engine import Engine
from ajepa.training.graph import StepGraphs

CPU = torch.device("cpu")


def make(
    kind: str = "clip",
    *,
    mask: dict | None = None,
    model: dict | None = None,
    impl="fused",
    precision="fp32",
    **changes,
) -> Config:
    base = PRESETS["tiny"]
    objective = {"objective": kind, "clip_loss": "lejepa", "projector_hidden": 32, "projector_width": 16,
                 "sigreg_directions": 32, "sigreg_weight": 0.05, "source_seconds": 2.5, **changes}  # fmt: skip
    return dataclasses.replace(
        base,
        impl=impl,
        precision=precision,
        mask=dataclasses.replace(base.mask, mask_ratio=(0.4, 0.6), **(mask or {})),
        model=dataclasses.replace(base.model, **(model or {})),
        objective=dataclasses.replace(base.objective, **objective),
        optim=dataclasses.replace(base.optim, batch_size=6, steps=100, warmup_steps=2, lr=1e-3),
    )


def batch(step: int, clips: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tones = torch.sin(torch.arange(40_000) * torch.rand(clips, 1, generator=generator))
    noise = torch.randn(clips, 40_000, generator=generator)
    pcm = ((tones + 0.3 * noise) * 8_000).clamp(-32_000, 32_000).to(torch.int16)
    return pcm, torch.full((clips,), 40_000, dtype=torch.int32)


def steps(cfg: Config, count: int = 4, engine: Engine | None = None, first: int = 0, graphs: bool = False):
    engine = engine or Engine(cfg, CPU)
    if graphs:
        engine.graphs = StepGraphs(engine._train, CPU)
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid, seed=cfg.seed)
    results = []
    for step in range(first, first + count):
        pcm, lengths = batch(step)
        result = engine.step(pcm, lengths, engine.masks(sampler, step, len(pcm)), step)
        assert not result.bad
        results.append([x.item() for x in result])
    return results, engine


def same_weights(a: torch.nn.Module, b: torch.nn.Module, **tolerance) -> None:
    theirs = b.state_dict()
    assert a.state_dict().keys() == theirs.keys()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, theirs[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def plain_clip_terms(model: JEPA, patches, masks, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Agreement and SIGReg restated clip by clip, from the context latents of the model."""
    clip, (rows, columns) = model.clip, model.clip.grid
    context = model.context_encoder(patches, masks.context, Sequences(masks.context_cu, masks.max_context))
    pooled = []
    for first, stop in zip(masks.context_cu[:-1].tolist(), masks.context_cu[1:].tolist(), strict=True):
        row = masks.context[first:stop] % (rows * columns) // columns
        parts = []
        for r in range(rows):
            x = context[first:stop][row == r]
            mean = x.mean(0) if len(x) else context.new_zeros(context.shape[1])
            variance = (x - mean).square().mean(0) if len(x) else torch.zeros_like(mean)
            parts += [mean, (variance + 1e-5).sqrt()]
        pooled.append(torch.cat(parts))
    x = F.linear(torch.stack(pooled), clip.projector.fc1.weight, clip.projector.fc1.bias)
    norm = clip.projector.norm
    x = F.gelu(F.batch_norm(x, None, None, norm.weight, norm.bias, training=True, eps=norm.eps))
    z = F.linear(x, clip.projector.fc2.weight, clip.projector.fc2.bias).unflatten(0, (clip.cfg.views, -1))
    from ajepa_kernels import sigreg

    agreement = ((z - z.mean(0)) ** 2).mean()
    return agreement, sigreg(z, key, directions=clip.cfg.sigreg_directions, impl="reference")


def test_the_loss_is_agreement_and_sigreg_of_the_pooled_visible_latents():
    cfg = make()
    engine = Engine(cfg, CPU)
    pcm, lengths = batch(0)
    masks = engine.masks(MaskSampler(cfg.mask, cfg.front_end.grid), 0, 6)
    patches = engine.patches(pcm, lengths, 0)
    assert patches.shape[0] == 12 == masks[0].clips
    agreement, spread = plain_clip_terms(engine.model, patches, masks[0], key=7)
    engine.key.fill_(7)
    loss, terms = engine._forward(patches, masks[0], None)
    torch.testing.assert_close(loss, 0.95 * agreement + 0.05 * spread, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms, torch.stack([torch.zeros(()), agreement, spread]).detach(), rtol=1e-5, atol=1e-6)
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss, trained)
    want = torch.autograd.grad(0.95 * agreement + 0.05 * spread, trained)
    largest = max(w.abs().max().item() for w in want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.parametrize("loss", ["lejepa", "byol", "utterance"])
@pytest.mark.parametrize("kind", ["clip", "both"])
def test_the_fused_engine_trains_as_plain_pytorch(kind, loss):
    cfg = make(kind, clip_loss=loss)
    fused, a = steps(cfg)
    plain, b = steps(dataclasses.replace(cfg, impl="reference"))
    for mine, theirs in zip(fused, plain, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3, abs=1e-5)
    same_weights(a.model, b.model, rtol=1e-2, atol=2e-4)  # Adam turns small differences of small gradients into steps
    assert all((later[3:] != fused[0][3:]) for later in fused[1:])


@pytest.mark.parametrize("loss", ["lejepa", "byol", "utterance"])
def test_bf16_changes_only_rounding(loss):
    """With and without copies of the weights, the terms of the loss stay within bfloat16's rounding of float32's."""
    exact, _ = steps(make("both", clip_loss=loss), 3)
    for impl in ("fused", "reference"):
        rounded, _ = steps(make("both", clip_loss=loss, precision="bf16", impl=impl), 3)
        for mine, theirs in zip(rounded, exact, strict=True):
            assert mine[3:] == pytest.approx(theirs[3:], rel=3e-2)


def test_both_is_the_sum_of_the_objectives():
    both = make("both", clip_weight=0.7)
    (row,), engine = steps(both, 1)
    loss, _, _, masked, agreement, spread = row
    assert loss == pytest.approx(masked + 0.7 * (0.95 * agreement + 0.05 * spread), rel=1e-5)
    assert not hasattr(Engine(make("clip"), CPU).model, "target_encoder"), "the clip objective needs no second encoder"
    assert any("target_encoder" in name for name in engine.model.state_dict())


@pytest.mark.parametrize("kind", ["clip", "both"])
def test_a_replayed_step_is_the_eager_step_with_fresh_directions(kind):
    cfg = make(kind, mask={"fixed_token_budget": True})
    eager, a = steps(cfg, 5)
    replayed, b = steps(cfg, 5, graphs=True)
    assert [type(kept).__name__ for kept in b.graphs.seen.values()] == ["_Captured"]
    for x, y in zip(eager, replayed, strict=True):
        assert y == pytest.approx(x, rel=1e-4, abs=1e-6)
    same_weights(a.model, b.model, rtol=1e-3, atol=2e-3)  # the loss does not depend on some weights but for rounding


def test_several_masks_of_a_clip_are_views_of_its_recording():
    cfg = make("both", mask={"masks_per_clip": 2})
    (row,), engine = steps(cfg, 1)
    assert all(value == value for value in row)
    x = torch.arange(2 * 3 * 2.0)[:, None]  # view, recording, mask
    got = engine.model.clip.by_view(x)[..., 0]
    assert torch.equal(got, torch.tensor([[0.0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]))


def test_batch_norm_keeps_running_statistics_except_of_a_skipped_step():
    norm, x = BatchNorm(3), torch.randn(64, 3) * 2 + 1
    want = torch.nn.BatchNorm1d(3, momentum=0.1)
    torch.testing.assert_close(norm(x), want(x), rtol=1e-4, atol=1e-5)
    norm.update(torch.ones(()))
    assert torch.equal(norm.running_mean, torch.zeros(3)), "a step that was thrown away leaves no trace"
    norm.update(torch.zeros(()))
    torch.testing.assert_close(norm.running_mean.data, want.running_mean)
    torch.testing.assert_close(norm.running_var.data, 0.9 + 0.1 * x.var(0, correction=0))
    norm.batch = (torch.full((3,), torch.nan),) * 2
    norm.update(torch.ones(()))
    assert norm.running_mean.isfinite().all()
    norm.eval()
    torch.testing.assert_close(norm(x), (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_frozen_teacher_stays_and_the_student_is_what_counts(tmp_path, precision):
    first = dataclasses.replace(make("masked"), out=str(tmp_path / "first"))
    first = shorten(first)
    train.run(first)
    cfg = make("masked", teacher=str(tmp_path / "first"), precision=precision)
    engine = Engine(cfg, CPU)
    engine.teach(cfg.objective.teacher)
    weights = load_pretrained(tmp_path / "first").weights
    steps(cfg, 2, engine)
    for name, value in engine.model.target_encoder.state_dict().items():
        assert torch.equal(value, weights[name])
    if precision == "bf16":
        copy, _ = engine.model.target_encoder.embed.copies
        assert torch.equal(copy, weights["embed.weight"].bfloat16()), "the targets are computed with other weights"
    assert engine.encoder() is engine.model.context_encoder
    assert not engine.pairs
    other = dataclasses.replace(cfg, front_end=dataclasses.replace(cfg.front_end, hop_length=400))
    with pytest.raises(ConfigError, match="front end"):
        Engine(other, CPU).teach(str(tmp_path / "first"))


def test_a_target_encoder_that_never_moves_is_not_what_counts():
    cfg = make("masked")
    assert cfg.network == "target_encoder"
    frozen = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, ema_start=1.0, ema_end=1.0))
    engine = Engine(frozen, CPU)
    untrained = {name: value.clone() for name, value in engine.model.target_encoder.state_dict().items()}
    steps(frozen, 2, engine)
    assert engine.encoder() is engine.model.context_encoder
    assert all(torch.equal(value, untrained[name]) for name, value in engine.model.target_encoder.state_dict().items())
    assert any(not torch.equal(value, untrained[name]) for name, value in engine.encoder().state_dict().items())


def test_separate_targets_are_predicted_layer_by_layer():
    cfg = make("masked", model={"target_layers": 3, "target_mode": "separate"})
    engine = Engine(cfg, CPU)
    pcm, lengths = batch(0)
    pcm, lengths = pcm[:, :32_000], lengths.clamp(max=32_000)
    masks = engine.masks(MaskSampler(cfg.mask, cfg.front_end.grid), 0, 6)[0]
    patches = engine.patches(pcm, lengths, 0)
    out = engine.model(patches, masks)
    assert out.prediction.shape == (3 * len(masks.target), 128) and len(out.rows) == 3 * len(masks.target)
    layers = engine.model.target_encoder.encode(patches, 3)
    for i, layer in enumerate(layers):
        want = F.instance_norm(layer.transpose(1, 2)).transpose(1, 2).flatten(0, 1)[masks.target]
        torch.testing.assert_close(out.latents[out.rows[i::3]], want, rtol=1e-4, atol=1e-5)
    fused, _ = steps(cfg, 3)
    plain, _ = steps(dataclasses.replace(cfg, impl="reference"), 3)
    assert fused[-1] == pytest.approx(plain[-1], rel=1e-3, abs=1e-5)


def test_fan_in_initialisation_scales_with_the_width():
    model = JEPA(make("masked", model={"init": "fan-in"})).context_encoder
    assert model.embed.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert model.blocks[0].qkv.weight.std().item() == pytest.approx(0.06, rel=0.05)
    assert model.blocks[1].proj.weight.std().item() == pytest.approx(0.06 / 2, rel=0.05)
    plain = JEPA(make("masked", model={"init": "0.02"})).context_encoder
    assert plain.blocks[0].qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)


def shorten(cfg: Config) -> Config:
    return dataclasses.replace(
        cfg,
        optim=dataclasses.replace(cfg.optim, steps=6, batch_size=4),
        watch=dataclasses.replace(
            cfg.watch, log_every=1, watch_every=3, checkpoint_every=3, eval_clips=64, compare_steps=0
        ),
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, precision):
    whole = shorten(dataclasses.replace(make("both", precision=precision), out=str(tmp_path / "whole")))
    whole = dataclasses.replace(whole, watch=dataclasses.replace(whole.watch, pooling="projection"))
    summary = train.run(whole)
    assert summary["pooling"] == "projection" and 0 <= summary["position_share"] <= 1
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"masked", "agreement", "sigreg"} <= records[0].keys()
    cut = dataclasses.replace(whole, out=str(tmp_path / "cut"), resume=True)

    class StopError(Exception):
        pass

    real, count = Engine.train, 0

    def step(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count == 5:
            raise StopError
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(StopError):
        patch.setattr(Engine, "train", step)
        train.run(cut)
    train.run(cut)
    for name in ("encoder.safetensors", "projector.safetensors"):
        mine, theirs = (load_file(tmp_path / folder / name) for folder in ("cut", "whole"))
        for key, value in theirs.items():
            assert torch.equal(mine[key], value), (name, key, (mine[key] - value).abs().max())
    unfinished = load_pretrained(tmp_path / "whole" / "checkpoints" / "step_00000006")
    final = load_pretrained(tmp_path / "whole")
    assert unfinished.projector.keys() == final.projector.keys()
    assert all(torch.equal(unfinished.projector[name], value) for name, value in final.projector.items())


def ranks_body(argv):
    """Train on this rank's half of each batch and write the weights; the body of the test below."""
    cfg = make(argv[0], clip_loss=argv[1], view_mix=0.0)
    with joined(cfg, CPU) as (ranks, device):
        engine = Engine(cfg, device, ranks)
        options = {"rank": ranks.rank, "world_size": ranks.world_size}
        sampler = MaskSampler(cfg.mask, cfg.front_end.grid, seed=cfg.seed, **options)
        losses = []
        for step in range(3):
            pcm, lengths = (x[ranks.rank :: ranks.world_size] for x in batch(step))
            masks = engine.masks(sampler, step, len(pcm))
            share = ranks.share(sum(len(part.target) for part in masks), False)
            losses.append(engine.step(pcm, lengths, masks, step, share).loss.item())
        if ranks.is_first:
            torch.save({"losses": losses, "weights": engine.model.state_dict()}, argv[2])
    return 0


@pytest.mark.parametrize(("kind", "loss"), [("clip", "lejepa"), ("both", "lejepa"), ("clip", "byol")])
def test_two_ranks_with_half_the_batch_are_one_rank_with_all_of_it(kind, loss, forks, tmp_path):
    found = []
    for world in (1, 2):
        out = tmp_path / f"{world}.pt"
        call = f"test_clip_objective:{ranks_body.__name__}"
        code = forks.run_ranks(world, [kind, loss, str(out)], tmp_path / "log", call=call)
        assert code == [0] * world, (tmp_path / "log.0").read_text()
        found.append(torch.load(out))
    one, two = found
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-2, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"views": 1}, "--views 1"),
        ({"source_seconds": 1.0}, "--source-seconds"),
        ({"view_time": (0.9, 0.5)}, "--view-time"),
        ({"view_mix": 1.5}, "--view-mix"),
        ({"sigreg_weight": 1.5}, "--sigreg-weight"),
        ({"sigreg_directions": 0}, "--sigreg-directions"),
        ({"teacher": "runs/x"}, "--teacher"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        validate(make("clip", **change))


def test_settings_that_do_not_go_together_are_named():
    cfg = make("clip")
    for changed, words in (
        (dataclasses.replace(cfg, parallel="fsdp"), "fsdp"),
        (dataclasses.replace(cfg, step=dataclasses.replace(cfg.step, micro_batch=2)), "--micro-batch"),
        (dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, target_layers=1, target_mode="separate")),
         "--target-mode"),
        (dataclasses.replace(make("masked"), watch=dataclasses.replace(cfg.watch, pooling="projection")), "projection"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            validate(changed)
