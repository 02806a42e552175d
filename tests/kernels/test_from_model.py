"""AdamWEMA from two modules, with schedules, and on steps that found_inf skips."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, IMPLS, INTERPRET, needs_kernel
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ajepa_kernels import AdamWEMA, advance_scales_, ema_update_, latent_l2_loss
from ajepa_kernels.fp8 import STATE


class Encoder(nn.Module):
    """A small one with all that models have: a fixed embedding, shared weights, buffers of several dtypes."""

    def __init__(self, width=8):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, width), requires_grad=False)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("exact", torch.randn(3, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor([False, True]))
        self.register_buffer("cached", torch.zeros(2), persistent=False)

    def forward(self, x):
        x = F.gelu(self.first(x + self.position))
        return self.second(self.norm(x.flatten(0, 1)).view_as(x))


def made(seed=0):
    """Encoder, its target with other values, and predictor."""
    torch.manual_seed(seed)
    encoder, predictor = Encoder().to(DEVICE), nn.Linear(8, 8).to(DEVICE)
    target = copy.deepcopy(encoder).requires_grad_(False)
    with torch.no_grad():
        for x in target.parameters():
            x.mul_(0.5)
    return encoder, target, predictor


def loss_of(encoder, target, predictor, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 5, 8, generator=generator).to(DEVICE)
    masked = torch.rand(4, 5, generator=generator).argsort(1)[:, :3].to(DEVICE)
    with torch.no_grad():
        latents = target(x)
    prediction = predictor(encoder(x)).gather(1, masked[:, :, None].expand(-1, -1, 8))
    return latents, masked, prediction


def state_of(*modules):
    return [x.detach().clone() for module in modules for x in module.state_dict().values()]


# --- before and after ---

STEPS, WARMUP = 20, 5
LR = lambda n: 1e-2 * min((n + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * n / STEPS))  # noqa: E731
WEIGHT_DECAY = lambda n: 0.4 - 0.36 * (0.5 + 0.5 * math.cos(math.pi * n / STEPS))  # noqa: E731
EMA_DECAY = lambda n: 0.9 + 0.1 * n / STEPS  # noqa: E731
SCHEDULES = {"lr": LR, "weight_decay": WEIGHT_DECAY, "ema_decay": EMA_DECAY}


@pytest.mark.parametrize("impl", IMPLS)
def test_as_ijepa_trains(impl):
    """Twenty steps, against I-JEPA's loop by hand in plain PyTorch: its groups, schedules, loss and moving average."""
    encoder, target, predictor = made()
    modules = (encoder, predictor)
    named = [(n, p) for module in modules for n, p in module.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([
        {"params": [p for n, p in named if "bias" not in n and p.dim() != 1]},
        {"params": [p for n, p in named if "bias" in n or p.dim() == 1], "WD_exclude": True, "weight_decay": 0},
    ])  # fmt: skip
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR(step)
            if not group.get("WD_exclude"):
                group["weight_decay"] = WEIGHT_DECAY(step)
        latents, masked, prediction = loss_of(encoder, target, predictor, step)
        normed = F.layer_norm(latents, (8,))
        loss = F.smooth_l1_loss(prediction, normed.gather(1, masked[:, :, None].expand(-1, -1, 8)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            m = EMA_DECAY(step)
            for p, q in zip(encoder.parameters(), target.parameters(), strict=True):
                q.mul_(m).add_((1.0 - m) * p.detach())

    ours, our_target, our_predictor = made()
    optimizer = AdamWEMA.from_model(ours, our_target, our_predictor, schedules=SCHEDULES, buffers=False, impl=impl)
    for step in range(STEPS):
        latents, masked, prediction = loss_of(ours, our_target, our_predictor, step)
        our_loss = latent_l2_loss(prediction, latents, masked, kind="smooth_l1", eps=1e-5, impl=impl)
        our_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-6)
    for plain, fused in ((encoder, ours), (target, our_target), (predictor, our_predictor)):
        for (name, x), y in zip(plain.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=2e-6, msg=name)


# --- from_model ---


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("buffers", [True, False])
def test_each_tensor_moves_as_it_should(buffers, impl):
    encoder, target, predictor = made()
    half = torch.zeros_like(target.mean, dtype=torch.float16)
    optimizer = AdamWEMA.from_model(
        encoder, target, predictor, weight_decay=0.3, buffers=buffers, lr=0.1, impl=impl,
        copies=[(target.mean, half), (encoder.first.weight, torch.zeros(8, 8, dtype=torch.float16, device=DEVICE))],
    )  # fmt: skip
    decayed, others = optimizer.param_groups
    assert decayed["params"] == [encoder.first.weight, predictor.weight] and decayed["weight_decay"] == 0.3
    assert len(others["params"]) == 5 and others["weight_decay"] == 0.0
    for step in range(2):  # the second reuses the launch
        latents, masked, prediction = loss_of(encoder, target, predictor, step)
        latent_l2_loss(prediction, latents, masked).backward()
        encoder.cached += 1
        encoder.mean += 1
        encoder.exact += 1
        encoder.seen.logical_not_()
        before = target.state_dict(), copy.deepcopy(target.state_dict())
        optimizer.step()  # without a decay, no average moves and no buffer is copied
        assert all(torch.equal(x, y) for x, y in zip(*map(dict.values, before), strict=True))
        optimizer.step(ema_decay=0.75)
        for name, x in encoder.state_dict().items():
            got, start = target.state_dict()[name], before[1][name]
            if name in dict(encoder.named_buffers()) and not buffers:
                assert torch.equal(got, start)
            elif x.is_floating_point():
                torch.testing.assert_close(got, 0.75 * start + 0.25 * x, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(got, x) and x.dtype == got.dtype
        assert torch.equal(half, target.mean.half()) or not buffers
    assert torch.equal(encoder.position, 2 * (target.position - (target.position - encoder.position / 2)))
    assert not target.cached.any() and target.second.weight is target.first.weight
    assert optimizer.copies[1][1].any()


class Wrapped(nn.Module):
    """Names as DistributedDataParallel's."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_wrappers_do_not_change_names():
    compiled = torch.compile
    wrap = [lambda m: m, Wrapped, compiled, lambda m: Wrapped(compiled(m)), lambda m: compiled(Wrapped(m))]
    for outer in wrap:
        for of_target in wrap[:3]:
            encoder, target, _ = made()
            encoder.first, encoder.norm = torch.compile(encoder.first), checkpoint_wrapper(encoder.norm)
            optimizer = AdamWEMA.from_model(outer(encoder), of_target(target))
            assert len(optimizer.ema_sources) == 9 and len(optimizer.apart) == 3


def test_a_module_named_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    optimizer = AdamWEMA.from_model(model, copy.deepcopy(model).requires_grad_(False))
    assert [p is q for p, q in zip(optimizer.ema_sources, model.parameters(), strict=True)] == [True] * 4


def test_modules_that_do_not_match():
    encoder, target, predictor = made()
    wide = Encoder(16).requires_grad_(False)
    with pytest.raises(ValueError, match=r"10 are of different shapes \(position \[1, 5, 8\] and .* and 6 more\)"):
        AdamWEMA.from_model(encoder, wide)
    with pytest.raises(ValueError, match=r"2 are only in the model \(1.weight, 1.bias\); .*copy.deepcopy"):
        two = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        AdamWEMA.from_model(two, copy.deepcopy(two[:1]).requires_grad_(False))
    target.extra = nn.Parameter(torch.zeros(1), requires_grad=False)
    target.register_buffer("count", torch.zeros(1))
    with pytest.raises(ValueError, match=r"2 are only in the target \(extra, count\)"):
        AdamWEMA.from_model(encoder, target)
    with pytest.raises(ValueError, match=r"1 are only in the target \(extra\)"):
        AdamWEMA.from_model(encoder, target, buffers=False)
    with pytest.raises(ValueError, match=r"6 parameters .*\(first.weight, .* and 2 more\); call target.requires_grad_"):
        AdamWEMA.from_model(encoder, copy.deepcopy(encoder))
    with pytest.raises(ValueError, match="require a gradient"):
        AdamWEMA.from_model(encoder, encoder)
    untied = copy.deepcopy(encoder)
    untied.second.weight = nn.Parameter(untied.second.weight.detach().clone())
    with pytest.raises(ValueError, match="the model shares a parameter"):
        AdamWEMA.from_model(encoder, copy.deepcopy(untied).requires_grad_(False))
    with pytest.raises(ValueError, match="the target shares a parameter"):
        AdamWEMA.from_model(untied, copy.deepcopy(encoder).requires_grad_(False))
    with pytest.raises(TypeError, match=r"torch.nn.Module is needed, got Parameter"):
        AdamWEMA.from_model(encoder, made()[1], predictor.weight)


def test_what_the_modules_share_is_optimised_once():
    encoder, target, predictor = made()
    target.position = encoder.position  # one fixed embedding for both: it has no average
    predictor.weight = encoder.first.weight
    optimizer = AdamWEMA.from_model(encoder, target, predictor, predictor, decay_1d=True)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(set(group["params"])) == 6
    assert not any(p is encoder.position for p in optimizer.ema_sources)
    assert type(AdamWEMA.from_model(encoder, made()[1]).param_groups[0]["weight_decay"]) is float


@pytest.mark.parametrize("impl", IMPLS)
def test_integers_among_the_pairs_are_copied(impl):
    """As `ema_update_` does, so that the values of two state dicts can be paired."""
    encoder, target, _ = made()
    pairs = zip(encoder.state_dict(keep_vars=True).values(), target.state_dict(keep_vars=True).values(), strict=True)
    pairs = list(dict.fromkeys(pairs))
    optimizer = AdamWEMA([p for p in encoder.parameters() if p.requires_grad], ema=pairs, impl=impl)
    encoder.norm.num_batches_tracked.fill_(7)
    one = torch.ones((), device=DEVICE)
    for p in encoder.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = state_of(encoder, target)
    optimizer.step(ema_decay=0.5, grad_scale=one, found_inf=one)  # nothing changes
    assert all(torch.equal(x, y) for x, y in zip(before, state_of(encoder, target), strict=True))
    optimizer.step(ema_decay=0.5)
    assert target.norm.num_batches_tracked == 7
    extra = torch.tensor(3, device=DEVICE), torch.tensor(0, device=DEVICE)
    optimizer.add_pairs(ema=[extra])
    optimizer.step(ema_decay=0.5)
    assert extra[1] == 3 and len(optimizer.apart) == 4
    with pytest.raises(ValueError, match="two averages"):
        optimizer.add_pairs(ema=[extra])


# --- schedules ---


def tensor(x):
    return torch.tensor(x, device=DEVICE)


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("impl", IMPLS)
def test_schedules_set_the_groups(tensors, impl):
    encoder, target, predictor = made()
    scalar = tensor if tensors else lambda x: x
    optimizer = AdamWEMA.from_model(
        encoder, target, predictor, weight_decay=scalar(1.0), lr=scalar(1.0), schedules=SCHEDULES, impl=impl
    )
    rates = [group[name] for group in optimizer.param_groups for name in ("lr", "weight_decay")]
    for p in encoder.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    decays = set()
    for step in range(4):
        encoder.mean.fill_(1.0)
        target.mean.zero_()
        explicit = {"ema_decay": 0.25} if step == 2 else {}
        optimizer.step(**explicit)
        decayed, others = optimizer.param_groups
        assert float(decayed["lr"]) == float(others["lr"]) == pytest.approx(LR(step))
        assert float(decayed["weight_decay"]) == pytest.approx(WEIGHT_DECAY(step)) and others["weight_decay"] == 0.0
        want = 1 - explicit.get("ema_decay", EMA_DECAY(step))
        torch.testing.assert_close(target.mean, torch.full_like(target.mean, want), rtol=1e-5, atol=1e-6)
        decays.add(id(optimizer.schedules.ema_decay()))
    if tensors:  # the same tensors, which a graph has captured
        now = [group[name] for group in optimizer.param_groups for name in ("lr", "weight_decay")]
        assert all(x is y for x, y in zip(now, rates, strict=True)) and len(decays) == 1
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, device=DEVICE))], "weight_decay": 0.0})
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, device=DEVICE))], "weight_decay": 0.5})
    optimizer.step()
    assert [float(g["weight_decay"]) for g in optimizer.param_groups[1:]] == pytest.approx([0.0, 0.0, WEIGHT_DECAY(4)])
    assert optimizer.finished_steps == 5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("way", ["state dict", "pickle", "deepcopy", "AdamW's state dict", "before the first step"])
def test_training_continues_exactly(way, impl):
    runs = []
    at = 0 if way == "before the first step" else 2
    for resumed in (False, True):
        modules = made()
        make = lambda modules=modules: AdamWEMA.from_model(  # noqa: E731
            *modules, schedules=NAMED, impl=impl
        )
        optimizer = make()
        for step in range(4):
            if resumed and step == at:
                if way == "pickle":
                    modules, optimizer = pickle.loads(pickle.dumps((modules, optimizer)))
                elif way == "deepcopy":
                    modules, optimizer = copy.deepcopy((modules, optimizer))
                else:
                    saved = copy.deepcopy(optimizer.state_dict())
                    if way == "AdamW's state dict":
                        assert [group.pop("finished_steps") for group in saved["param_groups"]] == [2, 2]
                        torchs = torch.optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups])
                        torchs.load_state_dict(saved)
                        saved = torchs.state_dict()
                    optimizer = make()
                    optimizer.load_state_dict(saved)
                    assert all("finished_steps" not in group for group in optimizer.param_groups)
            latents, masked, prediction = loss_of(*modules, step)
            optimizer.zero_grad()
            latent_l2_loss(prediction, latents, masked).backward()
            optimizer.step()
        assert optimizer.finished_steps == 4
        runs.append(state_of(*modules))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def lr_by_name(n):
    return LR(n)


def weight_decay_by_name(n):
    return WEIGHT_DECAY(n)


def ema_decay_by_name(n):
    return EMA_DECAY(n)


NAMED = {"lr": lr_by_name, "weight_decay": weight_decay_by_name, "ema_decay": ema_decay_by_name}  # can be pickled


@pytest.mark.parametrize("impl", IMPLS)
def test_a_skipped_step_counts(impl):
    """A GradScaler skips the step, the schedules go on, and torch's bias correction does not see it."""
    encoder, target, predictor = (module.eval() for module in made())  # no running statistics
    optimizer = AdamWEMA.from_model(encoder, target, predictor, schedules=SCHEDULES, impl=impl)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    for bad in (False, True, False):
        before = state_of(encoder, target, predictor)
        optimizer.zero_grad()
        latents, masked, prediction = loss_of(encoder, target, predictor, 0)
        loss = latent_l2_loss(prediction, latents, masked)
        scaler.scale(loss * float("inf") if bad else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = state_of(encoder, target, predictor)
        same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert all(same) if bad else not all(same)
    assert optimizer.finished_steps == 3 and optimizer.param_groups[0]["lr"] == LR(2)
    assert {state["step"].item() for state in optimizer.state.values()} == {2}


def test_state_dicts_without_schedules_are_as_before():
    encoder, target, predictor = made()
    plain = AdamWEMA.from_model(encoder, target, predictor)
    assert all("finished_steps" not in group for group in plain.state_dict()["param_groups"])
    scheduled = AdamWEMA.from_model(encoder, target, predictor, schedules=SCHEDULES)
    plain.load_state_dict(scheduled.state_dict())
    assert all("finished_steps" not in group for group in plain.state_dict()["param_groups"])


@pytest.mark.parametrize("impl", IMPLS)
def test_loading_keeps_the_tensors_that_graphs_read(impl):
    encoder, target, _ = made()
    saved = AdamWEMA.from_model(encoder, target, lr=0.5, weight_decay=0.5, schedules=SCHEDULES, impl=impl)
    saved.step()
    lr, weight_decay = tensor(0.1), tensor(0.2)
    optimizer = AdamWEMA.from_model(
        encoder, target, lr=lr, weight_decay=weight_decay, schedules=SCHEDULES, betas=(0.5, 0.5), impl=impl
    )
    optimizer.advance()
    decay = optimizer.schedules.ema_decay()
    optimizer.load_state_dict(saved.state_dict())
    optimizer.step()
    group, other = optimizer.param_groups
    assert group["lr"] is other["lr"] is lr and group["weight_decay"] is weight_decay
    assert optimizer.schedules.ema_decay() is decay and group["betas"] == saved.param_groups[0]["betas"]
    got = [x.item() for x in (lr, weight_decay, decay)]
    assert got == pytest.approx([LR(1), WEIGHT_DECAY(1), EMA_DECAY(1)]) and optimizer.finished_steps == 2


def test_invalid_schedules():
    encoder, target, _ = made()
    with pytest.raises(ValueError, match="schedules are of lr, weight_decay, ema_decay, got 'momentum'"):
        AdamWEMA.from_model(encoder, target, schedules={"momentum": LR})
    with pytest.raises(TypeError, match="the schedule of lr must be a function"):
        AdamWEMA.from_model(encoder, target, schedules={"lr": 1e-3})
    with pytest.raises(ValueError, match="weight decay of every group is zero"):
        AdamWEMA.from_model(encoder, target, weight_decay=0.0, schedules={"weight_decay": WEIGHT_DECAY})
    for name, value in (("lr", -1.0), ("lr", math.nan), ("weight_decay", math.inf), ("ema_decay", 1.01)):
        optimizer = AdamWEMA.from_model(encoder, target, schedules={name: lambda n, value=value: value})
        lr = optimizer.param_groups[0]["lr"]
        for act in (optimizer.step, optimizer.advance):
            with pytest.raises(ValueError, match=f"the schedule of {name} gave {value} after 0 steps"):
                act()
        assert optimizer.finished_steps == 0 and optimizer.param_groups[0]["lr"] == lr


@pytest.mark.parametrize("impl", IMPLS)
def test_a_compiled_step_reads_what_advance_sets(impl):
    runs = []
    for compiled in (False, True):
        modules = made()
        optimizer = AdamWEMA.from_model(
            *modules, weight_decay=tensor(0.1), lr=tensor(0.1), schedules=SCHEDULES, impl=impl
        )
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiled else optimizer.step
        if compiled:
            with pytest.raises(Exception, match=r"call advance\(\) before"):
                torch.compile(optimizer.step, fullgraph=True, backend="eager")()
        for i in range(3):
            optimizer.zero_grad()
            latents, masked, prediction = loss_of(*modules, i)
            latent_l2_loss(prediction, latents, masked).backward()
            if compiled:
                optimizer.advance()
            with torch._dynamo.config.patch(error_on_recompile=compiled and i > 1):
                step()
        assert optimizer.finished_steps == 3
        runs.append(state_of(*modules))
    for x, y in zip(*runs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_a_captured_step_reads_what_advance_sets():
    runs = []
    for captured in (False, True):
        modules = made()
        optimizer = AdamWEMA.from_model(*modules, weight_decay=tensor(0.1), lr=tensor(0.1), schedules=SCHEDULES)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
            assert optimizer.finished_steps == 1
        for _ in range(4):
            if captured:
                optimizer.advance()
                graph.replay()
            else:
                optimizer.step()
        assert optimizer.finished_steps == 5
        runs.append(state_of(*modules))
    for x, y in zip(*runs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


# --- the average on skipped steps ---


@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_ema_on_skip(impl, compiled, remainder):
    """Parameters, moments and step counts stay; averages move towards the parameters, and their copies follow."""
    encoder, target, _ = made()
    if remainder:
        encoder.first.bias = nn.Parameter(encoder.first.bias.detach().bfloat16())
    states = torch.zeros(2, STATE, device=DEVICE)
    states[:, 1] = 4.0
    advance_scales_(states)
    small = [torch.zeros_like(x, dtype=torch.float8_e4m3fn) for x in (target.first.weight, target.second.bias)]
    half = torch.zeros_like(target.mean, dtype=torch.float16)
    optimizer = AdamWEMA.from_model(
        encoder, target, ema_on_skip=True, remainder=remainder, lr=0.1, impl=impl,
        copies=[(target.mean, half), (target.first.weight, small[0]), (target.second.bias, small[1])],
        scalings=list(zip(small, states, strict=True)),
    )  # fmt: skip
    decay, one = torch.tensor(0.75, device=DEVICE), torch.ones((), device=DEVICE)
    step = lambda found_inf: optimizer.step(ema_decay=decay, grad_scale=one, found_inf=found_inf)  # noqa: E731
    step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    for skipped in (False, True, True, False):
        for p in encoder.parameters():
            value = float("nan") if skipped else 1.0
            p.grad = torch.full_like(p, value) if p.requires_grad else None
        encoder.norm.num_batches_tracked += 1
        encoder.exact += 1
        names, before = list(target.state_dict()), state_of(target)
        moments = [x.clone() for state in optimizer.state.values() for x in state.values()]
        params = state_of(encoder)
        states[:, 1] = 0.0
        step(one if skipped else 0 * one)
        if skipped:
            now = [x for state in optimizer.state.values() for x in state.values()]
            assert all(torch.equal(x, y) for x, y in zip(params, state_of(encoder), strict=True))
            assert all(torch.equal(x, y) for x, y in zip(moments, now, strict=True)) and moments
        for name, start, source in zip(names, before, state_of(encoder), strict=True):
            got = target.state_dict()[name]
            if source.dtype in (torch.float32, torch.float64):
                torch.testing.assert_close(got, 0.75 * start + 0.25 * source, rtol=1e-6, atol=1e-7)
            elif not source.is_floating_point():
                assert torch.equal(got, source)
        assert torch.equal(half, target.mean.half())
        for ema, copied, state in zip((target.first.weight, target.second.bias), small, states, strict=True):
            assert state[1] == ema.abs().max()
            error = (copied.float() * state[0] - ema).abs()
            assert (error <= 0.0625 * ema.abs() + 2**-9 * state[0]).all() or INTERPRET
    assert {state["step"].item() for state in optimizer.state.values()} == {2}
    if not compiled:
        before = state_of(encoder, target)
        optimizer.step(grad_scale=one, found_inf=one)  # without a decay, nothing moves
        assert all(torch.equal(x, y) for x, y in zip(before, state_of(encoder, target), strict=True))


@needs_kernel
def test_opcheck_on_skip():
    draw = lambda n=1: [torch.rand(20, device=DEVICE) for _ in range(n)]  # noqa: E731
    steps, one = [torch.zeros((), device=DEVICE)], torch.ones((), device=DEVICE)
    torch.library.opcheck(
        torch.ops.ajepa.adamw_ema_.default,
        (draw(), draw(), draw(), draw(), steps, [], draw(), [], [], [], [], [-1, 0, -1, -1, 0, -1], [-1, -1],
         [0.9, 0.99, 1e-8, 0.1, 0.1, 1.0], one, one, None, 0.5, True),
    )  # fmt: skip


def test_what_is_no_tensor_is_named():
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match=r"ema_update_: number 1 of targets must be a torch.Tensor, got NoneType"):
        ema_update_([p.detach(), None], [p, p], 0.9)
    with pytest.raises(TypeError, match=r"ema_update_: number 0 of sources must be a torch.Tensor, got str"):
        ema_update_([p.detach()], nn.Linear(1, 3, bias=False).state_dict(), 0.9)
    with pytest.raises(TypeError, match=r"AdamWEMA: number 1 of ema must be a torch.Tensor, got ndarray"):
        AdamWEMA([p], ema=[(p, p.detach().numpy())])
