"""The packed model against dense float64 models that compute every patch and mask the invisible ones."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ajepa.config import PRESETS, SIZES, Config, MaskConfig, ModelConfig
from ajepa.model.jepa import JEPA, Encoder, Predictor
from ajepa.model.layers import rotary_positions, rotate, sincos_positions, unique_rows
from ajepa.model.masks import MaskSampler
from ajepa_kernels import LogMelSpec

SPEC = LogMelSpec(
    sample_rate=16_000, n_fft=512, win_length=400, hop_length=160, n_mels=32, n_frames=64, patch=(8, 8)
)  # 4 x 8 patches
CFG = Config(front_end=SPEC, model=ModelConfig(size="tiny", predictor_width=48, predictor_depth=2, predictor_heads=3))


def dense_block(block, x_NC, keys_N, rotary):
    """One pre-LN block on all patches of one sequence; only `keys_N` are attended to."""
    H = block.heads
    q, k, v = block.qkv(block.norm1(x_NC)).unflatten(-1, (3, H, -1)).unbind(1)
    if rotary is not None:
        q, k = rotate(q, rotary), rotate(k, rotary)
    scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~keys_N[None, None], -torch.inf)
    x_NC = x_NC + block.proj(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v).flatten(1))
    return x_NC + block.fc2(F.gelu(block.fc1(block.norm2(x_NC))))


def dense_transformer(module, x_NC, keys_N):
    rotary = module.positions.double() if module.rotary else None
    if rotary is None:
        x_NC = x_NC + module.positions
    for block in module.blocks:
        x_NC = dense_block(block, x_NC, keys_N, rotary)
    return module.norm(x_NC)


@pytest.mark.parametrize("positions", ["sincos", "rotary"])
@pytest.mark.parametrize("mask", ["random", "block"])
@pytest.mark.parametrize("masks_per_clip", [1, 2])
@pytest.mark.parametrize("prune", [False, True])
def test_packed_step_equals_a_dense_masked_model_in_values_and_gradients(positions, mask, masks_per_clip, prune):
    torch.manual_seed(0)
    model = JEPA(replace(CFG, model=replace(CFG.model, positions=positions))).double()
    dense = copy.deepcopy(model)
    B, N = 3, SPEC.n_patches
    patches = torch.randn(B, N, SPEC.patch_dim, dtype=torch.float64)
    masks = MaskSampler(MaskConfig(mask=mask, masks_per_clip=masks_per_clip, min_context=4), SPEC.grid, seed=1)(0, 1, B)

    prediction, latents, rows, _ = model(patches, masks, prune)
    assert (len(latents) == len(masks.target)) == (prune and mask == "random" and masks_per_clip == 1)
    with torch.no_grad():
        everything = torch.ones(N, dtype=torch.bool)
        target = [dense_transformer(dense.target_encoder, dense.target_encoder.embed(p), everything) for p in patches]
    torch.testing.assert_close(latents[rows], torch.cat(target)[masks.target], rtol=1e-9, atol=1e-9)

    wanted = []
    owners = torch.repeat_interleave(torch.arange(B * masks_per_clip), masks.context_cu.diff())
    for a, b in zip(masks.predict_cu[:-1], masks.predict_cu[1:], strict=True):
        rows = masks.predict[a:b]
        n_context = len(masks.context)
        shown, asked = rows[rows < n_context], masks.target[rows[rows >= n_context] - n_context]
        clip = int(owners[shown[0]]) // masks_per_clip
        visible = torch.zeros(N, dtype=torch.bool)
        visible[masks.context[shown] - clip * N] = True
        context = dense_transformer(dense.context_encoder, dense.context_encoder.embed(patches[clip]), visible)
        asks = torch.zeros(N, dtype=torch.bool)
        asks[asked - clip * N] = True
        embedded = dense.predictor.embed(context)
        tokens = torch.where(visible[:, None], embedded, dense.predictor.mask_token)
        out = dense_transformer(dense.predictor, tokens, visible | asks)
        wanted.append(dense.predictor.head(out)[asks])
    wanted = torch.cat(wanted)
    torch.testing.assert_close(prediction, wanted, rtol=1e-9, atol=1e-9)

    weight = torch.randn_like(wanted)
    (prediction * weight).sum().backward()
    (wanted * weight).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
        if name.startswith("target_encoder"):
            assert ours.grad is None
        else:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9, msg=name)


def test_invisible_patches_cannot_reach_the_prediction():
    model = JEPA(CFG)
    patches = torch.randn(2, SPEC.n_patches, SPEC.patch_dim)
    masks = MaskSampler(MaskConfig(), SPEC.grid)(0, 1, 2)
    hidden = torch.ones(2 * SPEC.n_patches, dtype=torch.bool)
    hidden[masks.context] = False
    other = patches.flatten(0, 1).masked_fill(hidden[:, None], torch.nan).view_as(patches)
    assert torch.equal(model(patches, masks)[0], model(other, masks)[0])


def test_audio_jepa_has_the_published_sizes():
    cfg = PRESETS["audio-jepa"]
    with torch.device("meta"):  # the position tables are buffers, not parameters
        encoder, predictor = Encoder(cfg.model, cfg.front_end), Predictor(cfg.model, cfg.front_end)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(85.4, rel=0.005)
    assert sum(p.numel() for p in predictor.parameters()) / 1e6 == pytest.approx(11.3, rel=0.01)
    assert cfg.front_end.grid == (8, 16) and PRESETS["a-jepa"].front_end.grid == (8, 64)


@pytest.mark.parametrize("size", list(SIZES))
def test_sizes_build(size):
    width, depth, heads = SIZES[size]
    with torch.device("meta"):
        encoder = Encoder(ModelConfig(size=size), SPEC)
    assert len(encoder.blocks) == depth and encoder.norm.weight.shape == (width,)
    assert all(block.heads == heads for block in encoder.blocks)


def test_initialisation_is_truncated_normal_with_residual_scaling():
    model = JEPA(replace(PRESETS["audio-jepa"], model=ModelConfig(size="S")))
    for layer, block in enumerate(model.context_encoder.blocks, start=1):
        assert block.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.fc2.weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.05)
        assert not block.qkv.bias.any()
    for ours, target in model.ema_pairs():
        assert torch.equal(ours, target) and not target.requires_grad


def test_sincos_positions_tell_every_cell_apart_and_put_frequency_first():
    table = sincos_positions(64, (4, 8)).view(4, 8, 64)
    assert len(table.flatten(0, 1).unique(dim=0)) == 32
    assert torch.equal(table[2, 0, :32], table[2, 7, :32]) and torch.equal(table[0, 5, 32:], table[3, 5, 32:])
    assert torch.allclose(table[3, 6, 0], torch.tensor(3.0).sin()) and torch.allclose(
        table[3, 6, 32], torch.tensor(6.0).sin()
    )


def test_rotary_scores_depend_on_relative_position_only():
    rotary = rotary_positions(16, (6, 6)).view(6, 6, 2, 8)
    q, k = torch.randn(2, 1, 1, 16)

    def score(a, b):
        return (rotate(q, rotary[a][None]) * rotate(k, rotary[b][None])).sum()

    torch.testing.assert_close(score((0, 1), (2, 4)), score((3, 2), (5, 5)))
    assert not torch.allclose(score((0, 1), (2, 4)), score((0, 1), (3, 4)))


def test_top_layer_targets_are_the_mean_of_instance_normalised_outputs():
    encoder = Encoder(replace(CFG.model, target_layers=3), SPEC)
    patches = torch.randn(2, SPEC.n_patches, SPEC.patch_dim)
    outputs = encoder.encode(patches, 3)
    normed = [(o - o.mean(1, keepdim=True)) / (o.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() for o in outputs]
    torch.testing.assert_close(
        encoder.targets(patches).view(2, SPEC.n_patches, 128), sum(normed) / 3, rtol=1e-4, atol=1e-5
    )
    assert encoder.encode(patches).shape == (2, SPEC.n_patches, 128)


@pytest.mark.parametrize("rows", [[3, 0, 2, 1], [2], []])
def test_rows_taken_once_have_the_gradient_of_index_select(rows):
    x, rows = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True), torch.tensor(rows, dtype=torch.int64)
    torch.autograd.gradcheck(lambda x: unique_rows(x, rows), x)
    upstream = torch.randn(len(rows), 3, 2, dtype=torch.float64)
    (got,), (want,) = (torch.autograd.grad(f, x, upstream) for f in (unique_rows(x, rows), x.index_select(0, rows)))
    assert torch.equal(got, want) and torch.equal(unique_rows(x, rows), x[rows])
