"""Reduction in flat buckets, graphs on both sides of it, and the shared update, on ranks that run under gloo."""

import functools
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ajepa.config import PRESETS, Config, MaskConfig, ObjectiveConfig
from ajepa.model.masks import MaskSampler
from ajepa.training import replicas
from ajepa.training.checkpoint import load_checkpoint, save_checkpoint
from ajepa.training.distributed import joined, ranks_of
from ajepa.training.engine import Engine
from ajepa.training.ranks import Ranks
from ajepa.training.replicas import Layout, Replicas, split

CPU = torch.device("cpu")
CLIPS = 8  # of the global batch


def make(parallel: str = "ddp", reduce: str = "fp32", precision: str = "fp32", **step) -> Config:
    """A tiny model with the masked objective, whose masks are ragged."""
    tiny = PRESETS["tiny"]
    return replace(
        tiny,
        parallel=parallel,
        precision=precision,
        objective=ObjectiveConfig(),
        mask=MaskConfig(mask="block", block_targets=2, min_context=4),
        model=replace(tiny.model, init="0.02", target_layers=1),
        optim=replace(tiny.optim, lr=5e-4),
        step=replace(tiny.step, reduce=reduce, **step),
    )


def batch(ranks: Ranks, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's share of a step's clips."""
    pcm = torch.randint(-9999, 9999, (CLIPS, 32_000), dtype=torch.int16, generator=torch.Generator().manual_seed(step))
    pcm = pcm[ranks.rank :: ranks.world_size]
    return pcm, torch.full((len(pcm),), 32_000, dtype=torch.int32)


def engine_of(ranks: Ranks, cfg: Config) -> Engine:
    """An engine with the way of `cfg` to share weights, in the group that these ranks have joined."""
    own = ranks_of(cfg, ranks.rank, ranks.world_size)
    own.steps, own.patient = ranks.steps, ranks.patient
    return Engine(cfg, CPU, own)


def train(engine: Engine, steps: range, fixed: bool = False) -> list[float]:
    """Losses of some steps. With `fixed` every step has the same masks, so that its shapes recur."""
    cfg, ranks = engine.cfg, engine.ranks
    sampler = MaskSampler(cfg.mask, cfg.front_end.grid, rank=ranks.rank, world_size=ranks.world_size)
    losses = []
    for step in steps:
        pcm, lengths = batch(ranks, step)
        parts = engine.masks(sampler, 0 if fixed else step, len(pcm))
        share = ranks.share(sum(len(part.target) for part in parts), False)
        result = engine.step(pcm, lengths, parts, 10 * step, share)
        assert not result.bad
        losses.append(result.loss.item())
    return losses


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in engine.ranks.complete(engine.model).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def start(forks, tmp_path, call: str, world_size: int = 2, argv: tuple[str, ...] = ()) -> list[str]:
    """Run a function of this module on every rank, and return what each has printed."""
    log = tmp_path / "log"
    codes = forks.run_ranks(world_size, list(argv), log, call=f"test_replicas:{call}")
    texts = [log.with_suffix(f".{rank}").read_text() for rank in range(world_size)]
    assert codes == [0] * world_size, "\n".join(texts)
    return texts


# --- without processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_slices_of_all_ranks_are_the_whole_bucket(world_size):
    shapes = [(3, 5), (1,), (64, 33), (0, 4), (128,), (7, 11, 2)]
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    joined_parts: list[list[torch.Tensor]] = [[] for _ in shapes]
    for rank in range(world_size):
        layout = Layout(parameters, rank, world_size)
        flat = torch.full((layout.size,), float("nan"))
        for view, p in zip(layout.views(flat), parameters, strict=True):
            assert view.shape == p.shape and view.storage_offset() % replicas.ALIGNED == 0
            view.copy_(p.detach())
        own = flat[layout.own]
        assert len(own) * world_size == layout.size and layout.own.start % replicas.ALIGNED == 0
        for joined_part, part, (first, stop) in zip(joined_parts, layout.parts(own), layout.spans(), strict=True):
            assert len(part) == stop - first and (not len(part) or part.data_ptr() >= own.data_ptr())
            joined_part.append(part)
    for pieces, p in zip(joined_parts, parameters, strict=True):
        assert torch.equal(torch.cat(pieces), p.detach().flatten())


def test_three_bfloat16_hold_a_float32():
    values = torch.cat([torch.randn(1000) * 10.0 ** torch.randint(-30, 30, (1000,)), torch.tensor([0.0, 1 / 3, -7e37])])
    pieces = split(values, torch.bfloat16, 3)
    assert pieces.dtype == torch.bfloat16
    assert torch.equal(pieces.view(3, -1).float().sum(0), values)
    lost = split(torch.tensor([float("nan"), float("inf"), 1.0]), torch.bfloat16, 3).view(3, -1).float().sum(0)
    assert lost.isfinite().tolist() == [False, False, True]


# --- one rank in a group, which a single GPU can run too --------------------------------------------------------------


def group_of_one(argv) -> int:
    """The step of a single process, and that of one rank in a group of one, give the same bits."""
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{argv[0]}")
    for kind, precision, step in (
        (Replicas, "fp32", {}), (Replicas, "bf16", {"micro_batch": 3, "target_precision": "fp8"}),
        (replicas.Zero1, "fp32", {}), (replicas.Zero1, "bf16", {"target_precision": "fp8"}),
    ):  # fmt: skip
        cfg = make(precision=precision, **step)
        one, group = Engine(cfg, CPU), Engine(cfg, CPU, kind(0, 1))
        assert not group.ranks.alone
        for engine in (one, group):
            engine.use_graphs()
        losses, same_losses = ([*train(e, range(1)), *train(e, range(1, 5), fixed=True)] for e in (one, group))
        assert any(group.graphs.seen.values()) and any(group.update_graph.seen.values())
        if kind is Replicas:
            assert losses == same_losses and same(weights(one), weights(group)), (kind, precision)
        else:  # the squares of the parts' norms are added, which rounds
            assert same_losses == pytest.approx(losses, rel=1e-5), (kind, precision)
    dist.destroy_process_group()
    return 0


def test_one_rank_in_a_group_takes_the_step_of_a_single_process(forks, tmp_path):
    log = tmp_path / "log"
    assert forks.run([str(tmp_path / "store")], log, call="test_replicas:group_of_one") == 0, log.read_text()


# --- two ranks --------------------------------------------------------------------------------------------------------


def reduction(argv) -> int:
    """Of every kind and precision, the reduced gradients are the means of those of the ranks."""
    replicas.BUCKET_BYTES = 1 << 18
    with joined(make(), CPU) as (ranks, _):
        for parallel in ("ddp", "zero1"):
            for reduce in ("fp32", "bf16"):
                check_reduction(engine_of(ranks, make(parallel, reduce)), reduce == "bf16")
    return 0


def check_reduction(engine: Engine, in_bf16: bool) -> None:
    ranks, cfg = engine.ranks, engine.cfg
    masks = MaskSampler(cfg.mask, cfg.front_end.grid, rank=ranks.rank, world_size=2)(0, 10, CLIPS // 2)
    share = ranks.share(len(masks.target), False)
    pcm, lengths = batch(ranks, 0)
    names = [name for name, p in engine.model.named_parameters() if p.requires_grad]
    parameters = [p for p in engine.model.parameters() if p.requires_grad]
    assert len(ranks.buckets) > 2
    calls: list[tuple[str, int]] = []  # each collective, and how many gradients autograd has already made then
    made = 0

    def counted(name):
        whole = getattr(dist, name)

        def call(*args, **options):
            calls.append((name, made))
            return whole(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "reduce_scatter_single", "reduce_scatter_tensor"):
            if hasattr(dist, name):
                patch.setattr(dist, name, counted(name))
        patches = engine.patches(pcm, lengths, 0)

        def grads() -> list[torch.Tensor]:
            loss, _ = engine._forward(patches, masks, share)
            return list(torch.autograd.grad(loss, parameters))

        every = [torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64) for _ in range(2)]
        own = torch.cat([g.flatten() for g in grads()]).double()
        dist.all_gather(every, own)
        mean = (every[0] + every[1]) / 2
        calls.clear()

        def count(_):
            nonlocal made
            made += 1

        hooks = [p.register_post_accumulate_grad_hook(count) for p in parameters]
        values = (torch.tensor([1.0, 2.0, 3.0]) + ranks.rank).unbind()
        for eager in (True, False):
            made = 0
            ranks.clear(engine.model)
            loss, _ = engine._forward(patches, masks, share)
            ranks.backward(loss, True, eager)
            early = len(calls)
            packed = [p.grad is None for bucket in ranks.buckets[:-1] for p in bucket.parameters]
            assert all(packed), "gradients are kept although their bucket is full"
            assert early == (len(ranks.buckets) - 1 if eager else 0), "a bucket was not reduced during backward"
            assert not eager or calls[0][1] < made, "nothing was reduced before backward ended"
            ranks.collect(loss, torch.stack(values), None)
            ranks.exchange()
            assert all(p.grad is None for p in parameters)
            found_loss, norm, terms = ranks.reduced(engine.trained, None)
            scalars = 1 if cfg.parallel == "zero1" else 0  # the norm of the slices
            assert len(calls) == len(ranks.buckets) + scalars
            locals_ = [ranks.local(p) for p in parameters]
            assert all(p.grad.dtype == (torch.bfloat16 if in_bf16 else torch.float32) for p in locals_)
            whole = [ranks.whole(p, part.grad.float()).flatten() for p, part in zip(parameters, locals_, strict=True)]
            error = (torch.cat(whole).double() - mean).norm() / mean.norm()
            assert error < (4e-3 if in_bf16 else 1e-6), (cfg.parallel, in_bf16, error)
            assert norm.item() == pytest.approx(mean.norm().item(), rel=4e-3 if in_bf16 else 1e-5)
            losses = ranks.gather(loss.item())
            assert found_loss.item() == pytest.approx(sum(losses) / 2, rel=1e-7)  # exact in bf16, too
            assert terms.tolist() == [1.5, 2.5, 3.5]
            calls.clear()
        for hook in hooks:
            hook.remove()
    assert len(names) == len(parameters)


def test_reduced_gradients_are_the_means_of_the_ranks(forks, tmp_path):
    start(forks, tmp_path, "reduction")


def replays(argv) -> int:
    """Rank 0 replays its step, or fails to capture it, while rank 1 runs eagerly: as two eager ranks do."""
    replicas.BUCKET_BYTES = 1 << 18
    with joined(make(), CPU) as (ranks, _):
        for parallel in ("ddp", "zero1"):
            eager, mixed, failing = (engine_of(ranks, make(parallel)) for _ in range(3))
            for engine in (eager, mixed, failing):
                engine.use_graphs()
                engine.graphs.failed = engine.update_graph.failed = engine is eager or not ranks.is_first
            failing.graphs._capture = functools.partial(fail_in_backward, failing)
            losses = [train(engine, range(6), fixed=True) for engine in (eager, mixed, failing)]
            assert losses[0] == losses[1] == losses[2]
            assert not ranks.is_first or all(any(g.seen.values()) for g in (mixed.graphs, mixed.update_graph))
            assert failing.graphs.failed
            assert same(weights(eager), weights(mixed)) and same(weights(eager), weights(failing))
            mixed.ranks.check_alike(mixed.model, 6)
    return 0


def fail_in_backward(engine: Engine, patches, parts, values):
    """Like a capture that fails: the body runs, and raises when it packs its second bucket."""
    packed = itertools.count(1)
    pack = replicas.Bucket.pack

    def packs(bucket):
        if next(packed) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        pack(bucket)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replicas.Bucket, "pack", packs)
        engine._backward(patches, parts, values, eager=False)


def test_a_rank_that_replays_meets_a_rank_that_does_not(forks, tmp_path):
    start(forks, tmp_path, "replays")


def against_ddp(argv) -> int:
    """torch's DistributedDataParallel gives the same gradients."""
    cfg = make()
    with joined(cfg, CPU) as (ranks, device):
        engine = Engine(cfg, device, ranks)
        other = Engine(cfg, device)
        other.net = torch.nn.parallel.DistributedDataParallel(other.model)
        masks = MaskSampler(cfg.mask, cfg.front_end.grid, rank=ranks.rank, world_size=2)(0, 10, CLIPS // 2)
        share = ranks.share(len(masks.target), False)
        patches = engine.patches(*batch(ranks, 0), 0)
        loss, terms = engine._gradients(patches, [masks], share, eager=True)
        ranks.collect(loss, terms, None)
        ranks.exchange()
        other._forward(patches, masks, share)[0].backward()
        for p, q in zip(engine.model.parameters(), other.model.parameters(), strict=True):
            if q.requires_grad:
                torch.testing.assert_close(ranks.local(p).grad, q.grad, rtol=1e-4, atol=1e-7)
    return 0


def test_the_gradients_are_those_of_torchs_data_parallel(forks, tmp_path):
    start(forks, tmp_path, "against_ddp")


def exact_moves(argv) -> int:
    """A checkpoint of one way to share weights, loaded and saved by another, keeps every bit."""
    folder, paths, step = Path(argv[0]), [], 3
    with joined(make(), CPU) as (ranks, _):
        for i, parallel in enumerate(("ddp", "zero1", "fsdp", "zero1", "ddp")):
            engine = engine_of(ranks, replace(make(parallel, precision="bf16"), seed=i))
            if paths:
                load_checkpoint(paths[-1], engine)
            else:
                train(engine, range(step))
            paths.append(save_checkpoint(folder / str(i), step, engine, {}, keep=1))
            ranks.gather(None)
            loss = train(engine, range(step, step + 1))[0]  # the parts are where the optimiser expects them
            print(f"loss {loss:.5f}")
    if os.environ["RANK"] == "0":
        for name in ("model.safetensors", "optimizer.safetensors"):
            tensors = [load_file(path / name) for path in paths]
            tensors = [{k: v for k, v in t.items() if not k.startswith("rng/")} for t in tensors]
            assert all(same(tensors[0], t) for t in tensors[1:]), name
    return 0


def test_checkpoints_move_between_all_ways_to_share_weights_bit_for_bit(forks, tmp_path):
    texts = start(forks, tmp_path, "exact_moves", argv=(str(tmp_path),))
    losses = [float(line.split()[1]) for line in texts[0].splitlines() if line.startswith("loss")]
    assert len(losses) == 5 and losses[1:] == pytest.approx(losses[:-1], rel=1e-3)
