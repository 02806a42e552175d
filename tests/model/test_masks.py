import math

import numpy as np
import pytest
import torch

from ajepa.config import PRESETS, MaskConfig
from ajepa.model.masks import (
    Masks,
    MaskSampler,
    block_masks,
    curriculum_probability,
    deal,
    describe_masks,
    hidden_shares,
    inverse_block_masks,
    random_masks,
    time_frequency_masks,
    unit_count,
)
from ajepa.training.flops import step_flops
from ajepa.utils.counter_rng import Noise, hash64, mix64

GRIDS = [(8, 16), (8, 64), (8, 8), (3, 11)]
FAMILIES = ["random", "block", "time-frequency", "curriculum", "inverse-block"]


def rectangle(mask_FT):
    """(height, width) of a mask that must be one solid rectangle."""
    rows, columns = mask_FT.any(1).nonzero()[:, 0], mask_FT.any(0).nonzero()[:, 0]
    height, width = (int(x.max() - x.min()) + 1 for x in (rows, columns))
    assert int(mask_FT.sum()) == height * width
    return height, width


@pytest.mark.parametrize("grid", GRIDS)
def test_random_masks_split_every_clip_at_one_share_and_cover_patches_evenly(grid):
    context, targets = random_masks(4000, grid, (0.4, 0.6), Noise())
    assert targets.shape == (4000, 1, math.prod(grid))
    assert torch.equal(context, ~targets[:, 0])
    shares = targets.float().mean(-1).unique()
    assert len(shares) == 1 and 0.4 - 0.5 / math.prod(grid) <= shares.item() <= 0.6 + 0.5 / math.prod(grid)
    assert len(context.unique(dim=0)) > 100 or math.prod(grid) < 40  # every clip has its own permutation
    coverage = targets[:, 0].float().mean(0)
    assert (coverage - shares).abs().max() < 5 * math.sqrt(0.25 / 4000)


def test_random_ratio_is_uniform_between_batches():
    ratios = torch.tensor([random_masks(1, (8, 16), (0.4, 0.6), Noise(s))[1].float().mean() for s in range(2000)])
    assert ratios.min() < 0.41 and ratios.max() > 0.59
    assert abs(ratios.mean() - 0.5) < 0.01 and abs(ratios.std() - 0.2 / math.sqrt(12)) < 0.004


@pytest.mark.parametrize("grid", GRIDS)
def test_block_targets_are_rectangles_of_the_asked_area_and_never_seen(grid):
    F, T = grid
    context, targets = block_masks(500, grid, 4, (0.15, 0.2), (0.75, 1.5), (0.85, 1.0), Noise())
    assert not (context[:, None] & targets).any()
    for block in targets.flatten(0, 1)[:300]:
        height, width = rectangle(block.view(F, T))
        assert abs(height * width / (F * T) - 0.175) <= 0.025 + 0.5 * height / (F * T)  # the width is rounded
    heights = {rectangle(b.view(F, T))[0] for b in targets.flatten(0, 1)[:300]}
    lowest, highest = F * math.sqrt(0.15 * 0.75), F * math.sqrt(0.2 * 1.5)
    assert heights <= set(range(round(lowest), round(highest) + 1))
    assert len(context.sum(-1).unique()) > 3  # contexts are ragged


@pytest.mark.parametrize("grid", [(8, 64), (8, 16), (16, 16)])
def test_time_frequency_context_shares_no_row_or_column_with_a_target(grid):
    context, targets = time_frequency_masks(500, grid, 3, (0.05, 0.075), (0.75, 1.5), (0.85, 1.0), 10, Noise())
    F, T = grid
    seen, union = context.view(-1, F, T), targets.any(1).view(-1, F, T)
    assert not (seen & union).any()
    rows_clash = (seen.any(2) & union.any(2)).any(1)
    columns_clash = (seen.any(1) & union.any(1)).any(1)
    strict = ~rows_clash & ~columns_clash
    assert strict.float().mean() > 0.5
    assert (seen.sum((1, 2)) >= 10).float().mean() > 0.99
    # A context is relaxed only where the strict rule left it too small.
    strict_count = ((~union.any(2)).sum(1) * (~union.any(1)).sum(1))[~strict]
    assert (strict_count < 10 + F * T * 0.15).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [(5, 5), (2, 7), (99, 99), (1, 1)])
def test_inverse_block_contexts_are_whole_blocks_and_a_part_of_one(grid, size):
    """Blocks are placed in the order of the noise until they cover the count; this loop does so block by block."""
    F, T = grid
    height, width = min(size[0], F), min(size[1], T)
    visible = round(F * T * 0.3)
    context, targets = inverse_block_masks(40, grid, size, visible, Noise(5))
    assert (context.sum(1) == visible).all() and torch.equal(targets, ~context[:, None])
    places = Noise(5)((40, F + height - 1, T + width - 1))
    for seen, place in zip(context.view(-1, F, T), places, strict=True):
        covered = torch.zeros(F, T, dtype=torch.bool)
        for start in place.flatten().argsort(descending=True).tolist():
            top, left = start // place.shape[1] - height + 1, start % place.shape[1] - width + 1
            before = covered.clone()
            covered[max(top, 0) : top + height, max(left, 0) : left + width] = True
            if covered.sum() >= visible:
                break
        assert not (before & ~seen).any() and not (seen & ~covered).any()


@pytest.mark.parametrize("grid", GRIDS)
def test_inverse_blocks_show_all_patches_about_equally_often(grid):
    visible = round(math.prod(grid) * 0.2)
    context, _ = inverse_block_masks(8000, grid, (5, 5), visible, Noise())
    assert (context.float().mean(0) / (visible / math.prod(grid)) - 1).abs().max() < 0.35
    assert len(context.unique(dim=0)) > 4000
    # The neighbour of a visible patch is visible far more often than any patch.
    seen = context.view(-1, *grid)
    assert seen[:, :, 1:][seen[:, :, :-1]].float().mean() > 2.5 * 0.2


def test_inverse_block_masks_have_one_shape_and_keep_the_minimum():
    def shapes(**fields):
        sampler = MaskSampler(MaskConfig(mask="inverse-block", mask_ratio=(0.75, 0.85), **fields), (8, 8))
        draws = [sampler(step, 20, 6) for step in range(20)]
        assert len({m.context.sum().item() for m in draws}) > 1
        kinds = {(*(tuple(x.shape) for x in m.tensors().values()), *(getattr(m, b) for b in m.BOUNDS)) for m in draws}
        assert len(kinds) == 1
        return draws

    for masks in shapes(masks_per_clip=16):
        assert (masks.context_cu.diff() == 13).all() and (masks.predict_cu.diff() == 64).all()
        assert len(masks.context_cu) - 1 == len(masks.predict_cu) - 1 == 6 * 16
        contexts = (masks.context % 64).view(6, 16, 13)
        assert all(len(own.unique(dim=0)) > 8 for own in contexts)  # the masks of a clip differ
    for plain, fixed in zip(shapes(), shapes(fixed_token_budget=True), strict=True):
        assert plain.disjoint and all(torch.equal(x, fixed.tensors()[name]) for name, x in plain.tensors().items())
    assert (shapes(min_context=15)[0].context_cu.diff() == 15).all()


def test_curriculum_probability_is_the_published_formula():
    for step, steps, c0 in [(0, 100, 0.01), (1, 100, 0.01), (50, 100, 0.01), (100, 100, 0.01), (7, 30, 0.2)]:
        expected = min(1.0, (step * (1 - c0**2) / steps + c0**2) ** 0.5)
        assert curriculum_probability(step, steps, c0) == pytest.approx(expected, abs=1e-12)
    assert curriculum_probability(0, 10) == pytest.approx(0.01)
    assert curriculum_probability(10, 10) == 1.0


def test_curriculum_moves_from_blocks_to_time_frequency():
    sampler = MaskSampler(MaskConfig(mask="curriculum"), (8, 64))
    groups = {step: len(sampler(step, 1000, 600).predict_cu) - 1 for step in (0, 250, 1000)}
    share = {step: (4 * 600 - n) / 600 for step, n in groups.items()}  # clips have 3 groups (block: 4)
    assert share[0] == pytest.approx(0.01, abs=0.02)
    assert share[250] == pytest.approx(0.5, abs=0.08)
    assert share[1000] == 1.0


@pytest.mark.parametrize("mask", FAMILIES)
@pytest.mark.parametrize("masks_per_clip", [1, 3])
def test_packing_says_the_same_as_the_booleans(mask, masks_per_clip):
    grid, B, N = (8, 16), 7, 128
    cfg = MaskConfig(mask=mask, masks_per_clip=masks_per_clip)
    masks = MaskSampler(cfg, grid, seed=3)(5, 10, B)
    contexts = [masks.context[a:b] for a, b in zip(masks.context_cu[:-1], masks.context_cu[1:], strict=True)]
    assert len(contexts) == B * masks_per_clip
    for r, context in enumerate(contexts):
        assert (context // N == r // masks_per_clip).all() and (context.diff() > 0).all()
        assert len(context) >= min(cfg.min_context, N // 4)
    assert masks.max_context == max(map(len, contexts))
    pieces = list(zip(masks.predict_cu[:-1], masks.predict_cu[1:], strict=True))
    assert masks.max_predict == max(int(b - a) for a, b in pieces)
    answered = []
    owners = torch.repeat_interleave(torch.arange(len(contexts)), masks.context_cu.diff())
    for a, b in pieces:
        rows = masks.predict[a:b]
        shown, asked = rows[rows < len(masks.context)], rows[rows >= len(masks.context)] - len(masks.context)
        owner = int(owners[shown[0]])
        assert torch.equal(masks.context[shown], contexts[owner])
        targets = masks.target[asked]
        assert len(targets) and (targets // N == owner // masks_per_clip).all()
        assert not torch.isin(targets, contexts[owner]).any()
        answered.append(asked)
    assert torch.equal(torch.cat(answered), torch.arange(len(masks.target)))
    assert torch.equal(masks.predict[masks.predicted] - len(masks.context), torch.arange(len(masks.target)))


@pytest.mark.parametrize("mask", FAMILIES)
def test_draws_depend_only_on_seed_rank_and_step(mask):
    def draw(seed=0, rank=0, step=4):
        return MaskSampler(MaskConfig(mask=mask), (8, 16), seed=seed, rank=rank, world_size=2)(step, 10, 4).context

    assert torch.equal(draw(), draw())
    for other in (draw(seed=1), draw(rank=1), draw(step=5)):
        assert not torch.equal(draw(), other)


@pytest.mark.parametrize("mask", FAMILIES)
@pytest.mark.parametrize("masks_per_clip", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_fixed_token_budget_gives_static_shapes_and_ragged_clips(mask, masks_per_clip, world_size):
    cfg = MaskConfig(mask=mask, masks_per_clip=masks_per_clip, fixed_token_budget=True)
    sampler = MaskSampler(cfg, (8, 16), rank=world_size - 1, world_size=world_size)
    draws = [sampler(step, 20, 16) for step in range(20)]
    shapes = {(len(m.context), len(m.target), len(m.predict), len(m.predict_cu)) for m in draws}
    assert len(shapes) == 1
    assert all((len(m.context_cu.diff().unique()) > 1) == (mask != "inverse-block") for m in draws)
    assert min(int(m.context_cu.diff().min()) for m in draws) >= sampler.minimum
    for m in draws:  # a context does not overlap its own targets
        owner = torch.repeat_interleave(torch.arange(16 * masks_per_clip), m.context_cu.diff())
        for a, b in zip(m.predict_cu[:-1], m.predict_cu[1:], strict=True):
            rows = m.predict[a:b]
            shown = m.context[rows[rows < len(m.context)]]
            assert not torch.isin(m.target[rows[rows >= len(m.context)] - len(m.context)], shown).any()
        assert len(owner) == len(m.context)


def test_random_budget_stays_within_the_asked_ratios():
    cfg = MaskConfig(mask="random", mask_ratio=(0.4, 0.6), fixed_token_budget=True)
    masks = MaskSampler(cfg, (8, 16))(0, 1, 64)
    assert len(masks.context) == 64 * 64
    visible = masks.context_cu.diff()
    assert visible.min() >= 128 * 0.4 - 8 and visible.max() <= 128 * 0.6 + 8


def test_contexts_keep_their_minimum_where_targets_cover_nearly_everything():
    cfg = MaskConfig(mask="block", block_targets=12, block_scale=(0.5, 0.9), min_context=16)
    masks = MaskSampler(cfg, (8, 16))(0, 1, 32)
    assert masks.context_cu.diff().min() >= 16
    assert len(masks.target) > 0


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("mask", FAMILIES)
@pytest.mark.parametrize(("ratio", "minimum"), [((0.98, 0.98), 10), ((0.3, 0.9), 32)])
def test_every_family_keeps_the_smallest_context_and_tells_what_it_hides(mask, fixed, ratio, minimum):
    """The smallest context may be half of the patches, which is the most that a configuration allows."""
    cfg, grid = MaskConfig(mask=mask, mask_ratio=ratio, min_context=minimum, fixed_token_budget=fixed), (8, 8)
    draws = [MaskSampler(cfg, grid, seed=3)(step, 40, 24) for step in range(40)]
    assert min(int(m.context_cu.diff().min()) for m in draws) >= minimum
    assert all(len(m.target) for m in draws)
    shares, told = [1 - len(m.context) / (64 * 24) for m in draws], hidden_shares(cfg, grid)
    if len(told) == 2:
        assert min(shares) >= told[0] - 1e-9 and max(shares) <= told[1] + 1e-9
    else:
        assert sum(shares) / len(shares) == pytest.approx(told[0], abs=0.02)
    assert max(told) <= 1 - minimum / 64 + 1e-9
    limited = mask in ("random", "inverse-block") and (minimum == 10 or len(told) == 2 or ratio[0] + ratio[1] > 1)
    assert ("--min-context" in describe_masks(cfg, grid)) == limited


def test_what_the_smallest_context_changes_is_told_with_the_true_share():
    def told(**fields):
        return describe_masks(MaskConfig(**fields), (8, 8))

    limit = "(--min-context 10 of 64 patches limits --mask-ratio"
    assert told(mask_ratio=(0.98, 0.98)) == f"random masks of 84% {limit} 0.98 0.98)"
    assert told(mask_ratio=(0.8, 0.9)) == f"random masks of 80-84% {limit} 0.8 0.9)"
    assert told(mask_ratio=(0.98, 0.98), mask="inverse-block") == f"inverse-block masks of 84% {limit} 0.98 0.98)"
    assert told(mask_ratio=(0.98, 0.98), fixed_token_budget=True) == f"random masks of 84% {limit} 0.98 0.98)"
    assert told(mask_ratio=(0.5, 0.75)) == "random masks of 50-75%"
    assert "--min-context" not in told(mask="block", mask_ratio=(0.98, 0.98)), "blocks do not draw this ratio"


def test_pack_accepts_a_context_without_targets():
    context = torch.ones(2, 6, dtype=torch.bool)
    targets = torch.zeros(2, 1, 6, dtype=torch.bool)
    context[1, :2], targets[1, 0, :2] = False, True
    masks = Masks.pack(context, targets, 1)
    assert masks.context_cu.tolist() == [0, 6, 10]
    assert masks.target.tolist() == [6, 7]
    assert masks.predict_cu.tolist() == [0, 6]
    assert masks.predict.tolist() == [6, 7, 8, 9, 10, 11]


def tokens(masks):
    """Tokens of the context encoder, of the loss and of the predictor, and the numbers of sequences of both."""
    return len(masks.context), len(masks.target), len(masks.predict), len(masks.context_cu), len(masks.predict_cu)


@pytest.mark.parametrize("mask", FAMILIES)
@pytest.mark.parametrize("masks_per_clip", [1, 3])
@pytest.mark.parametrize("fixed", [False, True])
def test_ranks_draw_between_them_what_one_rank_draws(mask, masks_per_clip, fixed):
    """Rank r of W holds the clips r, r + W... of the global batch, and draws the masks that one rank draws for them.

    The second micro-batch is smaller than the first. Under a budget, ranks have equal tokens in both.
    """
    cfg, grid, N = MaskConfig(mask=mask, masks_per_clip=masks_per_clip, fixed_token_budget=fixed), (4, 16), 64

    def parts(world_size, rank=0):
        sampler = MaskSampler(cfg, grid, seed=2, rank=rank, world_size=world_size)
        return sampler.parts(3, 10, [128 // world_size, 64 // world_size])

    whole = parts(1)
    for world_size in (2, 4, 8):
        ranks = [parts(world_size, rank) for rank in range(world_size)]
        for piece, everything in enumerate(whole):
            for rank in range(world_size):
                part = ranks[rank][piece]
                for name in ("context", "target"):
                    patches, own = getattr(everything, name), getattr(part, name)
                    mine = patches[patches // N % world_size == rank]
                    assert torch.equal(mine // N // world_size * N + mine % N, own)
            for name in ("context_cu", "predict_cu", "target_cu"):
                lengths = torch.cat([getattr(own[piece], name).diff() for own in ranks])
                assert torch.equal(lengths.sort().values, getattr(everything, name).diff().sort().values)
            assert not fixed or len({tokens(own[piece]) for own in ranks}) == 1


@pytest.mark.parametrize("mask", FAMILIES)
@pytest.mark.parametrize(("world_size", "batch"), [(3, 24), (4, 24), (5, 25)])
def test_ranks_that_hold_no_whole_units_meet_the_budget_as_well(mask, world_size, batch):
    assert unit_count(batch) % world_size
    cfg = MaskConfig(mask=mask, fixed_token_budget=True)
    samplers = [MaskSampler(cfg, (8, 16), rank=rank, world_size=world_size) for rank in range(world_size)]
    draws = [sampler(step, 10, batch // world_size) for sampler in samplers for step in range(3)]
    assert len({tokens(masks) for masks in draws}) == 1
    assert min(int(masks.context_cu.diff().min()) for masks in draws) >= samplers[0].minimum


@pytest.mark.parametrize(
    ("clips", "units"), [(1, 1), (8, 1), (12, 1), (16, 2), (512, 64), (640, 64), (1000, 8), (999, 1)]
)
def test_units_are_a_power_of_two_and_have_at_least_eight_clips(clips, units):
    assert unit_count(clips) == units


@pytest.mark.parametrize(("contexts", "units"), [(16, 2), (24, 2), (512, 64), (1000, 8), (600, 2), (12, 1)])
def test_dealing_gives_every_context_to_one_unit_and_evens_out_the_units(contexts, units):
    numbers, excess = np.random.default_rng(0), []
    for _ in range(20):
        cost = torch.from_numpy(numbers.gamma(4.0, 50.0, contexts)).long()
        dealt = deal(cost, units)
        assert torch.equal(dealt.flatten().sort().values, torch.arange(contexts))
        assert (dealt.diff(dim=1) > 0).all() and (dealt[:, 0].diff() > 0).all()
        sums = [cost[unit].sum(1) for unit in (dealt, torch.arange(contexts).view(units, -1))]
        excess.append([x.max() - x.double().mean() for x in sums])
    ours, undealt = torch.tensor(excess).mean(0)
    assert ours < undealt / 16 or units == 1
    assert torch.equal(deal(torch.full((contexts,), 7), units).flatten().sort().values, torch.arange(contexts))


def test_the_place_of_a_clip_says_nothing_about_the_size_of_its_context():
    numbers = torch.Generator().manual_seed(0)
    draws = torch.randint(0, 1000, (2000, 32), generator=numbers)
    places = torch.stack([cost[deal(cost, 4)] for cost in draws]).double()
    assert (places.mean(0) - draws.double().mean()).abs().max() < 4.5 * 1000 / math.sqrt(12 * 2000)


@pytest.mark.parametrize("mask", MaskSampler.RAGGED)
@pytest.mark.parametrize("masks_per_clip", [1, 3])
def test_dealing_uses_every_drawn_mask_once(mask, masks_per_clip):
    cfg, grid, clips = MaskConfig(mask=mask, masks_per_clip=masks_per_clip, min_context=1), (8, 16), 64
    sampler, R = MaskSampler(cfg, grid, seed=4), clips * masks_per_clip
    drawn, _ = sampler._draw(mask, R, 5, 10, Noise(4, 5))
    assert drawn.any(1).all()  # no context is so small that it would be filled up
    masks = sampler(5, 10, clips)
    used = torch.zeros(R, 128, dtype=torch.bool)
    used[torch.repeat_interleave(torch.arange(R), masks.context_cu.diff()), masks.context % 128] = True
    assert not torch.equal(used, drawn) and sorted(used.tolist()) == sorted(drawn.tolist())


@pytest.mark.parametrize(("world_size", "undealt"), [(2, 1.01), (8, 1.05), (32, 1.15)])
def test_ranks_of_a_jepa_have_nearly_equal_work_at_every_stage_of_the_curriculum(world_size, undealt, monkeypatch):
    """The slowest rank has less than 1 % more to compute than the mean of all, averaged over the run."""
    cfg = PRESETS["a-jepa"]
    steps, batch = cfg.optim.steps, cfg.optim.batch_size // world_size

    def imbalance():
        samplers = [
            MaskSampler(cfg.mask, cfg.front_end.grid, rank=rank, world_size=world_size) for rank in range(world_size)
        ]
        work = torch.tensor(
            [
                [step_flops(cfg, s(step, steps, batch)) for s in samplers]
                for step in range(steps // 8, steps, steps // 4)
            ]
        )
        return work.max(1).values / work.mean(1)

    dealt = imbalance()
    assert dealt.mean() < 1.01 and dealt.max() < 1.02
    monkeypatch.setattr("ajepa.model.masks.deal", lambda cost, units: torch.arange(len(cost)).view(-1, units).t())
    assert imbalance().mean() > undealt


def test_noise_is_uniform_and_independent_between_calls_steps_and_seeds():
    noise = Noise(1, 2)
    draws = [noise((2000, 8)), noise((2000, 8)), Noise(1, 3)((2000, 8)), Noise(2, 2)((2000, 8))]
    for x in draws:
        assert x.min() >= 0 and x.max() < 1
        assert abs(x.mean() - 0.5) < 0.01 and abs(x.var() - 1 / 12) < 0.003
    flat = torch.stack([x.flatten() for x in draws])
    assert (flat.corrcoef() - torch.eye(4)).abs().max() < 0.03


def test_noise_on_tensors_is_the_hash_of_the_loader():
    counter = torch.randint(-(2**63), 2**63 - 1, (1000,), dtype=torch.int64)
    key = int(np.random.SeedSequence([5, 2, 9]).generate_state(1, np.uint64)[0])
    want = hash64(5, 2, 9, counter.numpy().view(np.uint64))
    assert np.array_equal(mix64(counter, key).numpy().view(np.uint64), want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask", FAMILIES)
@pytest.mark.parametrize("fixed", [False, True])
def test_masks_drawn_on_a_gpu_are_those_of_the_cpu(mask, fixed):
    sampler = MaskSampler(MaskConfig(mask=mask, fixed_token_budget=fixed), (8, 16), seed=3)
    want = sampler(7, 10, 32)
    with torch.device("cuda"):
        got = sampler(7, 10, 32)
    assert got.max_context == want.max_context
    assert all(torch.equal(x.cpu(), want.tensors()[name]) for name, x in got.tensors().items())
