import copy
import pickle
import textwrap
from collections import OrderedDict

import pytest
import torch
from oracle import CAN_LAUNCH, DEVICE, IMPLS, INTERPRET, needs_kernel, round_to_e4m3
from torch.utils._python_dispatch import TorchDispatchMode

import ajepa_kernels
from ajepa_kernels import AdamWEMA, _tables, adamw_ema, advance_scales_, ema_update_
from ajepa_kernels._tables import CHUNK
from ajepa_kernels.adamw_ema import join_remainder, split_remainder
from ajepa_kernels.fp8 import STATE

SHAPES = [(3, 5), (CHUNK + 17,), (1,), (0,), (64, 32)]  # odd, more than one chunk, one element, empty, aligned


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in SHAPES]


def groups(params, lr):
    decay = torch.tensor(0.1, device=DEVICE) if isinstance(lr, torch.Tensor) else 0.1
    return [{"params": params[:2], "weight_decay": decay}, {"params": params[2:], "weight_decay": 0.0, "lr": lr}]


def set_gradients(params, step):
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        # in some steps a parameter has no gradient, so its step count falls behind
        p.grad = None if (step + i) % 4 == 0 else torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def oracle_step(values, emas, state, params, lrs, decays, ema_decay, scale):
    """One step of AdamW and of the EMA by the formulas of their papers, in float64."""
    for i, p in enumerate(params):
        if p.grad is not None:
            g = p.grad.double().cpu() / scale
            s = state.setdefault(i, [0, torch.zeros_like(g), torch.zeros_like(g)])
            s[0], s[1], s[2] = s[0] + 1, 0.9 * s[1] + 0.1 * g, 0.999 * s[2] + 0.001 * g * g
            mean, square = s[1] / (1 - 0.9 ** s[0]), s[2] / (1 - 0.999 ** s[0])
            values[i] = values[i] * (1 - lrs[i] * decays[i]) - lrs[i] * mean / (square.sqrt() + 1e-8)
        emas[i] = ema_decay * emas[i] + (1 - ema_decay) * values[i]


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "device scalars"])
@pytest.mark.parametrize("impl", IMPLS)
def test_against_float64(tensors, impl):
    scalar = lambda x: torch.tensor(x, device=DEVICE) if tensors else x  # noqa: E731
    params, lr = parameters(), scalar(3e-3)
    emas = [p.detach() * 0.5 for p in params]
    halves = [torch.full_like(p, float("nan"), dtype=torch.float16) for p in params]
    ema_halves = [torch.full_like(p, float("nan"), dtype=torch.float16) for p in params]
    copies = zip([*params, *emas], [*halves, *ema_halves], strict=True)
    optimizer = AdamWEMA(groups(params, lr), ema=zip(params, emas, strict=True), copies=copies, lr=1e-3, impl=impl)
    values, averages = [p.detach().double().cpu() for p in params], [e.double().cpu() for e in emas]
    state: dict = {}
    for step in range(4):
        set_gradients(params, step)
        decay, rate = 0.9 + 0.02 * step, 3e-3 * (step + 1)
        if tensors:
            lr.fill_(rate)
        else:
            optimizer.param_groups[1]["lr"] = rate
        scale = torch.tensor(2.0, device=DEVICE)
        oracle_step(values, averages, state, params, [1e-3] * 2 + [rate] * 3, [0.1] * 2 + [0.0] * 3, decay, 2.0)
        optimizer.step(ema_decay=scalar(decay), grad_scale=scale, found_inf=torch.zeros((), device=DEVICE))
    for i, p in enumerate(params):
        torch.testing.assert_close(p.detach().double().cpu(), values[i], rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(emas[i].double().cpu(), averages[i], rtol=2e-6, atol=1e-6)
        assert torch.equal(halves[i], p.detach().half()) and torch.equal(ema_halves[i], emas[i].half())
        assert optimizer.state[p]["step"].item() == state[i][0]


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_another_dtype_are_read_as_they_are(impl):
    """Float32 parameters whose `grad_dtype` is bfloat16 get lasting gradients, slices of one tensor; some are empty."""
    flat = torch.zeros(sum(torch.Size(shape).numel() for shape in SHAPES), dtype=torch.bfloat16, device=DEVICE)
    starts = [sum(torch.Size(shape).numel() for shape in SHAPES[:i]) for i in range(len(SHAPES))]
    params, wide = parameters(), parameters()
    for p, start in zip(params, starts, strict=True):
        p.grad_dtype = torch.bfloat16
        p.grad = flat[start : start + p.numel()].view(p.shape)
    emas, averages = ([p.detach() * 0.5 for p in group] for group in (params, wide))
    optimizer = AdamWEMA(params, ema=zip(params, emas, strict=True), lr=1e-2, impl=impl)
    same = AdamWEMA(wide, ema=zip(wide, averages, strict=True), lr=1e-2, impl=impl)
    for step in range(3):
        flat.copy_(torch.randn(len(flat), generator=torch.Generator().manual_seed(step)))
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()
        optimizer.step(ema_decay=0.9)
        same.step(ema_decay=0.9)
    for a, b in zip([*params, *emas], [*wide, *averages], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_slices_that_are_updated_apart_are_the_whole(impl):
    """Ranks that share an update hold slices of parameters, averages and copies, many of them empty."""
    whole = parameters()
    emas, halves = [p.detach() * 0.5 for p in whole], [torch.zeros_like(p, dtype=torch.float16) for p in whole]
    owners: list = [[], [], []]
    for p, ema in zip(whole, emas, strict=True):
        for r, part in enumerate(owners):
            own = slice(128 * r, 128 * (r + 1) if r < 2 else None)
            weight, average = (x.detach().flatten()[own].clone() for x in (p, ema))
            part.append((torch.nn.Parameter(weight), average, torch.zeros_like(weight, dtype=torch.float16), own))
    optimizer = AdamWEMA(whole, zip(whole, emas, strict=True), zip(whole, halves, strict=True), lr=0.1, impl=impl)
    apart = [
        AdamWEMA([p for p, *_ in part], [(p, ema) for p, ema, *_ in part], [(p, half) for p, _, half, _ in part],
                 lr=0.1, impl=impl)
        for part in owners
    ]  # fmt: skip
    for step in range(3):
        set_gradients(whole, step)
        for part in owners:
            for (local, _, _, own), p in zip(part, whole, strict=True):
                local.grad = None if p.grad is None else p.grad.flatten()[own].clone()
        for each in (optimizer, *apart):
            each.step(ema_decay=0.9, grad_scale=torch.tensor(2.0, device=DEVICE))
    for i, tensors in enumerate(zip(whole, emas, halves, strict=True)):
        for k, x in enumerate(tensors):
            assert torch.equal(torch.cat([part[i][k].detach() for part in owners]), x.detach().flatten())


def float8_copies(emas):
    """Copies of averages, and the states of their scalings after a step in which the largest magnitude was 1."""
    small = [torch.zeros_like(e, dtype=torch.float8_e4m3fn) for e in emas]
    states = torch.zeros(len(emas), STATE, device=DEVICE)
    states[:, 1] = 1.0
    advance_scales_(states)
    return small, list(states)


@pytest.mark.parametrize("impl", IMPLS)
def test_float8_copies_of_averages(impl):
    """Against float64, beside copies in float16. A value of 2 is beyond the scale of the first step, and is clamped."""
    params = parameters()
    emas = [p.detach().double().clamp(-2, 2).to(p.dtype) for p in params]
    small, states = float8_copies(emas[1:])
    half = torch.zeros_like(emas[0], dtype=torch.float16)
    optimizer = AdamWEMA(
        params, zip(params, emas, strict=True), zip(emas, [half, *small], strict=True),
        zip(small, states, strict=True), lr=1e-3, impl=impl,
    )  # fmt: skip
    for step in range(3):
        set_gradients(params, step)
        scales = [state[0].item() for state in states]
        optimizer.step(ema_decay=torch.tensor(0.9, device=DEVICE))
        assert torch.equal(half, emas[0].half())
        for ema, copied, state, scale in zip(emas[1:], small, states, scales, strict=True):
            inverse = 1.0 / torch.tensor(scale)
            want = round_to_e4m3((ema.cpu() * inverse).double())
            wrong = copied.cpu().double() != want
            assert not wrong.any() if not INTERPRET else wrong.sum() <= 1 + 0.04 * want.numel()
            assert state[0].item() == scale and state[1].item() == (ema.abs().max().item() if ema.numel() else 0.0)
            assert step or ema.numel() < 99 or (want.abs() == 448.0).any(), "nothing was clamped"
            advance_scales_(state[None])
            assert step != 1 or not ema.numel() or state[0] > 1.01 * ema.abs().max() / 448
    before = [x.clone() for x in (*states, *map(bits, small))]
    one = torch.ones((), device=DEVICE)
    for options in ({}, {"ema_decay": 0.5, "grad_scale": one, "found_inf": one}):  # without an average, none is written
        optimizer.step(**options)
        assert all(torch.equal(x, y) for x, y in zip(before, (*states, *map(bits, small)), strict=True))


def bits(x):
    return x.view(torch.uint8)


@pytest.mark.parametrize("impl", IMPLS)
def test_copies_of_the_optimizer_write_float8_copies(impl):  # torch cannot pickle float8 tensors
    params = parameters()[1:3]
    emas = [p.detach().clone() for p in params]
    small, states = float8_copies(emas)
    pairs = [zip(x, y, strict=True) for x, y in ((params, emas), (emas, small), (small, states))]
    optimizer = AdamWEMA(params, *pairs, lr=0.1, impl=impl)
    set_gradients(params, 1)
    optimizer.step(ema_decay=0.5)
    copied, other = copy.deepcopy(((params, emas, small, states), optimizer))
    for p, q in zip(params, copied[0], strict=True):
        q.grad = p.grad.clone()
    for made in (optimizer, other):
        made.step(ema_decay=0.5)
    for a, b in zip((*small, *states), (*copied[2], *copied[3]), strict=True):
        assert torch.equal(bits(a), bits(b)) and a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("impl", IMPLS)
def test_found_inf_changes_nothing(impl):
    params = parameters()
    emas = [torch.zeros_like(p) for p in params]
    optimizer = AdamWEMA(params, ema=zip(params, emas, strict=True), impl=impl)
    set_gradients(params, 1)
    before = [p.detach().clone() for p in params]
    one = torch.ones((), device=DEVICE)
    optimizer.step(ema_decay=0.5, grad_scale=one, found_inf=one)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)) and not any(e.any() for e in emas)
    assert all(s["step"].item() == 0 for s in optimizer.state.values())


def change_over(optimizer, second, reference, params, straight):
    """Train `params` for two steps with `optimizer` and two with `second(params)`, which loads its state and is
    returned. `reference` trains `straight` for all four steps."""
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = second(params)
            optimizer.load_state_dict(saved)
        for p in (params, straight):
            set_gradients(p, step)
        optimizer.step()
        reference.step()
    return optimizer


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_dicts_interchange_with_torch(impl, direction):
    ours = lambda params: AdamWEMA(params, lr=1e-2, impl=impl)  # noqa: E731
    torchs = lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True)  # noqa: E731
    first, second = (torchs, ours) if direction == "from torch" else (ours, torchs)
    params = parameters()
    optimizer, straight = first(params), parameters()
    reference = torchs(straight)
    change_over(optimizer, second, reference, params, straight)
    for p, q in zip(params, straight, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensor lr"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_dicts_of_a_default_adamw(impl, direction, tensors):
    """By default AdamW does not set `fused`, and keeps its step counts on the CPU, here in float64. Its learning rate
    may be a CPU tensor as well."""

    def made(cls, ps, dtype, device, **options):
        lr = torch.tensor(1e-2, dtype=dtype, device=device) if tensors else 1e-2
        return cls([{"params": ps[:2], "weight_decay": 0.2}, {"params": ps[2:], "lr": lr}], lr=1e-2, **options)

    ours = lambda ps: made(AdamWEMA, ps, torch.float32, DEVICE, impl=impl)  # noqa: E731
    torchs = lambda ps: made(torch.optim.AdamW, ps, torch.float64, "cpu")  # noqa: E731
    first, second = (torchs, ours) if direction == "from torch" else (ours, torchs)
    params, straight = parameters(), parameters()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer, reference = first(params), torchs(straight)
        optimizer = change_over(optimizer, second, reference, params, straight)
    finally:
        torch.set_default_dtype(torch.float32)
    for p, q in zip(params, straight, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    if second is ours:
        assert all(group["fused"] for group in optimizer.param_groups)
        steps = [state["step"] for state in optimizer.state.values()]
        assert {(x.device.type, x.dtype) for x in steps} == {(DEVICE, torch.float32)}


@pytest.mark.parametrize("kind", ["float64", "elsewhere"])
def test_steps_that_the_kernel_cannot_read(kind):
    optimizer = AdamWEMA(parameters(), impl="reference")
    params = optimizer.param_groups[0]["params"]
    set_gradients(params, 1)
    optimizer.step()
    step = optimizer.state[params[1]]["step"]
    optimizer.state[params[1]]["step"] = step.double() if kind == "float64" else step.to("meta")
    optimizer.impl = "triton"
    with pytest.raises(ValueError, match="step counts" if CAN_LAUNCH else "impossible"):
        optimizer.step()


@pytest.mark.parametrize("impl", IMPLS)
def test_load_hooks_run(impl):
    """The state that a pre-hook returns is loaded, and a post-hook sees the state in its final form."""
    halves = [torch.nn.Parameter(p.detach().bfloat16()) for p in parameters()]
    saved, optimizer = (AdamWEMA(halves, remainder=True, impl=impl) for _ in range(2))
    set_gradients(halves, 1)
    saved.step()
    third = torch.tensor(1 / 3, device=DEVICE)  # bfloat16 cannot represent this value

    def pre(_, given):
        state = {i: {**state, "exp_avg": state["exp_avg"] * 0 + third} for i, state in given["state"].items()}
        return {**given, "state": state}

    seen = []
    optimizer.register_load_state_dict_pre_hook(pre)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.extend(o.state[halves[0]]["exp_avg"].flatten()[:1]))
    optimizer.load_state_dict(saved.state_dict())
    assert seen == [third] and (optimizer.state[halves[1]]["exp_avg"] == third).all()
    assert torch.equal(optimizer.state[halves[1]]["remainder"], saved.state[halves[1]]["remainder"])
    plain = AdamWEMA(halves, impl=impl)  # without a remainder, the loaded state is rounded
    plain.load_state_dict(saved.state_dict())
    assert all("remainder" not in state for state in plain.state.values())
    plain.step()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("impl", IMPLS)
def test_copies_of_the_optimizer_update_copies(impl, way):
    params = parameters()
    emas, halves = [p.detach().clone() for p in params], [torch.zeros_like(p, dtype=torch.float16) for p in params]
    optimizer = AdamWEMA(params, zip(params, emas, strict=True), zip(emas, halves, strict=True), lr=0.1, impl=impl)
    set_gradients(params, 1)
    optimizer.step(ema_decay=0.5)
    original = (params, emas, halves)
    before = copy.deepcopy(original)
    copied, other = way((original, optimizer))
    for p, q in zip(params, copied[0], strict=True):  # pickling a parameter drops its gradient
        q.grad = None if p.grad is None else p.grad.clone()
    other.step(ema_decay=0.5)
    for a, b in zip((x for xs in original for x in xs), (x for xs in before for x in xs), strict=True):
        assert torch.equal(a, b)  # a step of the copy leaves the original's tensors unchanged
    optimizer.step(ema_decay=0.5)
    for a, b in zip((x for xs in original for x in xs), (x for xs in copied for x in xs), strict=True):
        assert torch.equal(a, b)
    assert other._step_supports_amp_scaling


@pytest.mark.parametrize("impl", IMPLS)
def test_scales_of_a_grad_scaler_and_of_clipping_multiply(impl):
    grads = {}
    for clip in (1.0, 4.0):
        (p,) = params = [torch.nn.Parameter(torch.zeros(4, device=DEVICE))]
        optimizer = AdamWEMA(params, lr=0.1, eps=1.0, impl=impl)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
        scaler.scale((p * torch.arange(4.0, device=DEVICE)).sum()).backward()
        scaler.step(optimizer, grad_scale=torch.tensor(clip, device=DEVICE))
        grads[clip] = optimizer.state[p]["exp_avg"] / 0.1
    torch.testing.assert_close(grads[1.0], torch.arange(4.0, device=DEVICE))
    torch.testing.assert_close(grads[4.0], torch.arange(4.0, device=DEVICE) / 4)
    optimizer.found_inf, optimizer.grad_scale = torch.ones((), device=DEVICE), torch.ones((), device=DEVICE)
    before = p.detach().clone()
    optimizer.step(found_inf=torch.zeros((), device=DEVICE))  # the attribute `found_inf` alone prevents the step
    assert torch.equal(p, before)


def misaligned_gradient(p):
    """A gradient that is aligned to 4 bytes only."""
    return torch.ones(p.numel() + 1, device=p.device)[1:].view_as(p)


def pair(p):
    return p, torch.ones_like(p.detach())


def add_float8_copy(optimizer, ema):
    (small,), states = float8_copies([ema])
    optimizer.add_pairs(copies=[(ema, small)], scalings=[(small, states[0])])


CHANGES = {
    "gradient gone": lambda o, p, e: setattr(p, "grad", None),
    "gradient elsewhere": lambda o, p, e: setattr(p, "grad", p.grad.clone() * 2),
    "gradient not aligned": lambda o, p, e: setattr(p, "grad", misaligned_gradient(p)),
    "group added": lambda o, p, e: o.add_param_group({"params": [torch.nn.Parameter(p.detach().clone())], "lr": 0.3}),
    "pairs added": lambda o, p, e: o.add_pairs(ema=[pair(o.param_groups[0]["params"][4])]),
    "float8 copy added": lambda o, p, e: add_float8_copy(o, e),
    "copy added": lambda o, p, e: o.add_pairs(copies=[(p, torch.zeros_like(e, dtype=torch.float16))]),
    "state loaded": lambda o, p, e: o.load_state_dict(copy.deepcopy(o.state_dict())),
    "parameter swapped": lambda o, p, e: setattr(p, "data", p.data * 2),
    "average swapped": lambda o, p, e: setattr(e, "data", e.data * 2),
    "moment swapped": lambda o, p, e: o.state[p].update(exp_avg=o.state[p]["exp_avg"] * 2),
    "state gone": lambda o, p, e: o.state.pop(p),
    "other rate": lambda o, p, e: o.param_groups[0].update(lr=0.2),
    "rate becomes a tensor": lambda o, p, e: o.param_groups[0].update(lr=torch.tensor(0.2, device=p.device)),
    "parameters leave": lambda o, p, e: o.param_groups[0].update(params=[p]),
    "other implementation": lambda o, p, e: setattr(o, "impl", "reference"),
}


@needs_kernel
@pytest.mark.parametrize("change", CHANGES)
def test_a_reused_plan_notices_changes(change):
    """The launch tables are kept from step to step, and must be rebuilt after a change of anything they depend on."""
    made = []
    for impl in ("triton", "reference"):
        params = parameters()
        emas = [p.detach().clone() for p in params[:3]]
        optimizer = AdamWEMA(params, zip(params[:3], emas, strict=True), lr=0.1, impl=impl)
        set_gradients(params, 1)
        params[4].grad = torch.ones_like(params[4])
        for decay in (0.5, 0.25):
            optimizer.step(ema_decay=decay)
        CHANGES[change](optimizer, params[1], emas[1])
        for group in optimizer.param_groups[1:]:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        for decay in (0.5, None, 0.25):
            optimizer.step(ema_decay=decay)
        updated = [p for group in optimizer.param_groups for p in group["params"]]
        states = [x for p in updated for x in optimizer.state[p].values()]
        for source, target in optimizer.copies:
            if target.dtype == torch.float8_e4m3fn:
                (_, state), *_ = optimizer.scalings
                source = (source / state[0]).clamp(-448, 448)
                assert state[1] == optimizer.copies[0][0].abs().max() or source.abs().max() == 448
            error = (target.float() - source.to(target.dtype).float()).abs()
            assert error.max() == 0 or (INTERPRET and target.dtype == torch.float8_e4m3fn and error.median() == 0)
        made.append([*params, *updated, *states, *optimizer.ema_targets])
    for got, want in zip(*made, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@needs_kernel
def test_a_reused_plan_notices_moved_tensors():
    """Tensors can change places: a parameter moves to another group, and a learning rate becomes a weight decay."""
    made = []
    for impl in ("triton", "reference"):
        params, shared = parameters(), torch.tensor(0.3, device=DEVICE)
        groups = [{"params": params[:2], "lr": shared}, {"params": [], "lr": 0.2}, {"params": params[2:]}]
        optimizer = AdamWEMA(groups, lr=0.1, impl=impl)
        first, second, third = optimizer.param_groups
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.step()
        second["params"], third["params"] = third["params"], []
        optimizer.step()
        second["params"].insert(0, first["params"].pop())
        optimizer.step()
        first.update(lr=0.1, weight_decay=shared)
        optimizer.step()
        made.append(params)
    for got, want in zip(*made, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=4e-6)  # steps cancel, but not their rounding errors


@needs_kernel
def test_a_reused_plan_notices_unsupported_changes(monkeypatch):
    (p,) = params = [torch.nn.Parameter(torch.zeros(64, device=DEVICE))]
    optimizer = AdamWEMA(params, impl="triton")
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert [kind[-1] for kind in optimizer._plan.kinds] == [True]
    p.grad = misaligned_gradient(p)
    optimizer.step()
    assert [kind[-1] for kind in optimizer._plan.kinds] == [False]  # a misaligned gradient rules out wide accesses
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    optimizer.param_groups[0]["betas"] = (torch.tensor(beta1), torch.tensor(beta2))
    with pytest.raises(ValueError, match="betas that are tensors"):
        optimizer.step()
    optimizer.param_groups[0].update(betas=(beta1, beta2), fused=False)
    with pytest.raises(ValueError, match="fused=False"):
        optimizer.step()
    optimizer.param_groups[0]["fused"] = True
    optimizer.impl = "reference"
    monkeypatch.setattr(adamw_ema, "launch_adamw_ema", None)
    optimizer.step()


@needs_kernel
def test_an_unchanged_step_reuses_its_plan(monkeypatch):
    """Host time limits the speed of small models, so an unchanged step must not scan the groups and the state again."""
    params = parameters()
    optimizer = AdamWEMA(params, [(p, p.detach().clone()) for p in params], lr=0.1, impl="triton")
    set_gradients(params, 1)
    optimizer.step(ema_decay=0.5)
    want, versions = [p.detach().clone() for p in params], [p._version for p in params]
    monkeypatch.setattr(AdamWEMA, "_init_group", None)
    for p in params:
        p.grad = None if p.grad is None else p.grad.clone()  # as after another backward pass
    optimizer.step(ema_decay=0.5)
    for p, before, version in zip(params, want, versions, strict=True):
        if p.grad is not None and p.numel():
            assert not torch.equal(p, before) and p._version > version


@needs_kernel
def test_a_dispatch_mode_sees_the_operation():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    names: list[str] = []
    optimizer = AdamWEMA(parameters(), impl="triton")
    set_gradients(optimizer.param_groups[0]["params"], 1)
    optimizer.step()
    with Seen():
        optimizer.step()
    assert "ajepa::adamw_ema_" in names


@pytest.mark.parametrize("impl", IMPLS)
def test_the_order_of_axes_in_memory_does_not_matter(impl):
    """The update is elementwise, so dense tensors with equal strides are updated in their own memory order, together
    with contiguous parameters."""
    made = []
    for dense in (False, True):
        torch.manual_seed(0)
        draw = lambda *shape: torch.randn(shape).to(DEVICE)  # noqa: E731
        tensors = [draw(4, 3, 8, 2), draw(8, 6), draw(16)]
        if dense:
            tensors[0] = tensors[0].to(memory_format=torch.channels_last)
            tensors[1] = tensors[1].t().contiguous().t()
        params = [torch.nn.Parameter(x) for x in tensors]
        emas, copies = [p.detach() * 0.5 for p in params], [torch.empty_like(p, dtype=torch.float16) for p in params]
        optimizer = AdamWEMA(params, zip(params, emas, strict=True), zip(emas, copies, strict=True), lr=0.1, impl=impl)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p).copy_(draw(*p.shape))
            optimizer.step(ema_decay=0.5)
        ema_update_(emas, [p.detach() for p in params], 0.5, impl=impl)
        assert params[0].is_contiguous() != dense and emas[1].is_contiguous() != dense
        made.append([*params, *emas, *copies])
    for contiguous, got in zip(*made, strict=True):
        torch.testing.assert_close(got, contiguous, rtol=1e-6, atol=1e-7)


@needs_kernel
def test_layouts_that_no_kernel_takes():
    p = torch.nn.Parameter(torch.zeros(4, 3, device=DEVICE))
    p.grad = torch.ones(3, 4, device=DEVICE).t()
    with pytest.raises(ValueError, match="different strides"):
        AdamWEMA([p], impl="triton").step()
    strided = torch.zeros(4, 8, device=DEVICE)[:, ::2]
    with pytest.raises(ValueError, match="not dense"):
        ema_update_([strided], [torch.ones_like(strided)], 0.5, impl="triton")
    optimizer = AdamWEMA([p], impl="auto")
    optimizer.step()
    assert (p != 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_hooks_run_once_and_closures_return(impl):
    params, calls = parameters(), []
    torch.optim.AdamW(params)  # makes torch wrap AdamW.step with hooks as well
    optimizer = AdamWEMA(params, impl=impl)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == ["pre", "post"]


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_average_moves_without_gradients(impl):
    params = parameters()
    emas = [torch.zeros_like(p) for p in params]
    optimizer = AdamWEMA(params, ema=zip(params, emas, strict=True), impl=impl)
    before = [p.detach().clone() for p in params]
    optimizer.step(ema_decay=0.75)
    for p, b, e in zip(params, before, emas, strict=True):
        assert torch.equal(p, b)
        torch.testing.assert_close(e, b * 0.25)


def test_remainder_is_exact():
    value = torch.randn(4096) * torch.logspace(-30, 30, 4096)
    value[:4] = torch.tensor([0.0, -0.0, 1.00390625, float("inf")])  # 1 + 2^-8 is half way between two bfloat16 values
    high, low = split_remainder(value)
    assert torch.equal(join_remainder(high, low), value)
    assert (high.double() - value.double()).abs()[:3].max() <= 2**-8


# The bits of several NaNs: CUDA's default, one whose upper half alone would be infinite, a negative one, a quiet one.
NANS = (0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000)


def test_remainder_of_what_is_not_finite():
    value = torch.tensor([*NANS, 0x7F800000, -0x800000], dtype=torch.int32).view(torch.float32)
    high, low = split_remainder(value)
    for x in (high.float(), join_remainder(high, low)):
        assert x[:4].isnan().all() and x[4:].tolist() == [float("inf"), float("-inf")]


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_nan_beside_a_remainder(impl):
    p = torch.nn.Parameter(torch.ones(len(NANS) + 1, dtype=torch.bfloat16, device=DEVICE))
    optimizer = AdamWEMA([p], remainder=True, impl=impl)
    p.grad = torch.ones_like(p)
    optimizer.step()
    bits = torch.tensor([*NANS, 0], dtype=torch.int32, device=DEVICE)
    optimizer.state[p]["exp_avg"].copy_(bits.view(torch.float32))  # the moment passes the NaNs on to the parameter
    for _ in range(2):
        optimizer.step()
        assert p.float().isnan().tolist() == [True] * len(NANS) + [False]


# Triton's interpreter computes bfloat16 wrongly, but here it only copies the bits.
@pytest.mark.parametrize("impl", IMPLS)
def test_remainder_trains_as_float32(impl):
    plain = parameters()
    start = [p.detach().bfloat16() for p in plain]
    for p, s in zip(plain, start, strict=True):
        p.data.copy_(s)
    halves = [torch.nn.Parameter(s) for s in start]
    emas = [p.detach().clone() for p in plain]
    reference = torch.optim.AdamW(plain, lr=1e-3, weight_decay=0.1)
    make = lambda: AdamWEMA(  # noqa: E731
        halves, ema=zip(halves, emas, strict=True), remainder=True, lr=1e-3, weight_decay=0.1, impl=impl
    )
    optimizer = make()
    for step in range(4):
        if step == 2:  # continue from a checkpoint, whose float32 moments torch would round to bfloat16
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = make()
            optimizer.load_state_dict(saved)
        set_gradients(halves, step)
        for p, h in zip(plain, halves, strict=True):
            p.grad = None if h.grad is None else h.grad.float()
        optimizer.step(ema_decay=0.0)
        reference.step()
    for p, h, e in zip(plain, halves, emas, strict=True):
        master = join_remainder(h.detach(), optimizer.state[h]["remainder"])
        torch.testing.assert_close(master, p.detach(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(h.detach(), p.detach().bfloat16(), rtol=2**-7, atol=0)
        torch.testing.assert_close(e, master, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("decay", [0.99, torch.tensor(0.99)], ids=["number", "tensor"])
def test_ema_update(impl, decay):
    decay = decay.to(DEVICE) if isinstance(decay, torch.Tensor) else decay
    targets, sources = [p.detach() for p in parameters(seed=1)], [p.detach() for p in parameters(seed=2)]
    sources[0] = sources[0].half()  # a different dtype needs a launch of its own
    want = [0.99 * t.double() + 0.01 * s.double() for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, decay, impl=impl)
    for t, w in zip(targets, want, strict=True):
        torch.testing.assert_close(t.double(), w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_ema_update_copies_counters(impl):
    """The running averages of a batch norm are averaged, and its integer batch counter is copied."""
    norm, target = (torch.nn.BatchNorm1d(4).to(DEVICE) for _ in range(2))
    norm(torch.randn(8, 4, device=DEVICE))
    want = [0.25 * t + 0.75 * s if t.is_floating_point() else s.clone()
            for t, s in zip(target.buffers(), norm.buffers(), strict=True)]  # fmt: skip
    ema_update_(target.buffers(), norm.buffers(), 0.25, impl=impl)
    for got, w in zip(target.buffers(), want, strict=True):
        torch.testing.assert_close(got, w)
    assert target.num_batches_tracked.item() == 1
    ema_update_([target.num_batches_tracked], [torch.tensor(7, device=DEVICE)], 0.25, impl=impl)
    assert target.num_batches_tracked.item() == 7


@pytest.mark.parametrize("name", ["AdamWEMA", "ema_update_"])
def test_examples_can_be_pasted(name):
    example = getattr(ajepa_kernels, name).__doc__.split("Example::")[1]
    code = textwrap.dedent(example.strip("\n")).replace('"cuda"', repr(DEVICE))
    exec(code, {"torch": torch, name: getattr(ajepa_kernels, name)})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("remainder", [False, True])
def test_step_compiles_whole(impl, remainder):
    """A compiled step does the same as an eager one, and reads the schedule values from their tensors at every call."""
    made = []
    for compiled in (False, True):
        params = parameters(torch.bfloat16 if remainder else torch.float32)
        emas, copies = [p.detach().float() for p in params], [torch.zeros_like(p, dtype=torch.float16) for p in params]
        copies[4:], states = float8_copies(emas[4:])
        lr, decay, scale = (torch.tensor(x, device=DEVICE) for x in (1e-2, 0.5, 2.0))
        optimizer = AdamWEMA(
            groups(params, lr), zip(params, emas, strict=True), zip(emas, copies, strict=True),
            zip(copies[4:], states, strict=True), remainder=remainder, lr=lr, impl=impl,
        )  # fmt: skip
        step = lambda optimizer=optimizer, decay=decay, scale=scale: (  # noqa: E731
            optimizer.step(ema_decay=decay, grad_scale=scale, found_inf=scale - scale)
        )
        step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        for i in range(3):
            for p, g in zip(params, parameters(params[0].dtype, seed=i), strict=True):
                p.grad = None if p is params[2] else g.detach()  # this parameter has an EMA but no gradient
            for scalar in (lr, decay, scale):
                scalar.mul_(1.1)
            version = params[0]._version
            step()
            assert compiled or params[0]._version > version  # autograd can detect the in-place update
        states = [optimizer.state[p] for p in params if p.grad is not None]
        copies[4] = copies[4].float()
        made.append([*params, *emas, *copies, *optimizer.scalings[0][1:], *(x for s in states for x in s.values())])
    for eager, got in zip(*made, strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_step_compiles_in_inductor(impl):
    """The updates reach the tensors themselves, not only the copies in Inductor's functional graph."""
    torch.manual_seed(0)
    model, target = torch.nn.Linear(4, 4, device=DEVICE), torch.nn.Linear(4, 4, device=DEVICE)
    pairs = list(zip(model.parameters(), target.parameters(), strict=True))
    optimizer = AdamWEMA(model.parameters(), ema=pairs, lr=torch.tensor(0.1, device=DEVICE), impl=impl)
    x, decay = torch.randn(8, 4, device=DEVICE), torch.tensor(0.9, device=DEVICE)
    update = torch.compile(lambda: optimizer.step(ema_decay=decay), fullgraph=True)
    losses = []
    for _ in range(5):
        loss = (model(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@needs_kernel
def test_opcheck():
    draw = lambda n=2: [torch.rand(20, device=DEVICE) for _ in range(n)]  # noqa: E731
    params, grads, steps = draw(3), draw(), [torch.zeros((), device=DEVICE) for _ in range(2)]
    scalar = torch.tensor(0.5, device=DEVICE)
    places = [-1, 0, -1, -1, 0, -1, -1, 1, 0, -1, 0, -1, -1, 2, -1, 0, 0, 0]  # the third parameter has no gradient
    small, states = [torch.zeros(20, device=DEVICE, dtype=torch.float8_e4m3fn)], [torch.ones(STATE, device=DEVICE)]
    for ema_copies, checks in ((draw(1), "ALL"), (small, "test_faketensor")):  # the schema's check multiplies them
        torch.library.opcheck(
            torch.ops.ajepa.adamw_ema_.default,
            (params, grads, draw(), draw(), steps, [], draw(3), draw(1), ema_copies, states, [scalar], places, [0, -1],
             [0.9, 0.99, 1e-8, 0.0, 0.1, 1.0], scalar, scalar - scalar, scalar, 0.0),
            test_utils=checks,
        )  # fmt: skip


def test_opcheck_plain():
    draw = lambda: [torch.rand(20, device=DEVICE) for _ in range(2)]  # noqa: E731
    steps, scalar = [torch.zeros((), device=DEVICE) for _ in range(2)], torch.tensor(0.5, device=DEVICE)
    for lr in (scalar, None):
        torch.library.opcheck(
            torch.ops.ajepa.fused_adamw_.default,
            (draw(), draw(), draw(), draw(), [], steps, lr, 0.1, 0.9, 0.99, 0.1, 1e-8, False, False, scalar, None),
        )


@needs_kernel
def test_opcheck_ema():
    targets, sources = [torch.randn(20, device=DEVICE)], [torch.randn(20, device=DEVICE)]
    for decay in (None, torch.tensor(0.5, device=DEVICE)):
        torch.library.opcheck(torch.ops.ajepa.ema_update_.default, (targets, sources, decay, 0.5))


@pytest.mark.parametrize("impl", IMPLS)
def test_ema_update_compiles_whole(impl):
    target, source = torch.zeros(20, device=DEVICE), torch.ones(20, device=DEVICE)
    decay = torch.tensor(0.25, device=DEVICE)
    torch.compile(lambda: ema_update_([target], [source], decay, impl=impl), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(target, torch.full_like(target, 0.75))


class OnGPU:
    """Stands in for a CUDA tensor, with all that `_tables` uses of one."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self):
        self.tensor = torch.zeros(1)

    def untyped_storage(self):
        return self.tensor.untyped_storage()

    def record_stream(self, stream):
        pass


def test_tables_made_in_a_capture_are_its_own(monkeypatch):
    """Tables made during a graph capture are filled only when the graph is replayed, so an eager step must not reuse
    them."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    first, second = (_tables.cached(("test",), lambda: (torch.zeros(1),), OnGPU()) for _ in range(2))
    assert first is not second and ("test",) not in _tables._cached


def test_what_graphs_read_is_kept_as_long_as_what_they_write(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_tables, "_captured", [])
    monkeypatch.setattr(_tables, "_cached", OrderedDict({"before": _tables._Made((torch.zeros(1),), None, {0})}))
    x, y = OnGPU(), OnGPU()
    for written in (x, y, x, y, x):  # five graphs
        assert _tables.cached("before", None, written) is _tables._cached["before"].value
    kept = lambda: [value for _, value in _tables._captured]  # noqa: E731
    assert len(kept()) == 2 and kept()[0] is kept()[1] is _tables._cached["before"].value
    del x, written
    _tables._keep("of another graph", y)
    assert len(kept()) == 2 and kept()[1] == "of another graph"


def test_a_stream_waits_for_the_tables_of_another(monkeypatch):
    """Optimisers with equal values share one table, so the stream of the second must wait until the table is copied."""

    class Stream:
        def __init__(self, number):
            self.cuda_stream, self.waited = number, []

        def record_event(self):
            return f"event of {self.cuda_stream}"

        def wait_event(self, event):
            self.waited.append(event)

    first, second = Stream(1), Stream(2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_tables, "_cached", OrderedDict())
    for stream in (first, second, second):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        _tables.cached(("test",), lambda: (OnGPU(),), OnGPU())
    assert second.waited == ["event of 1"]


def test_errors():
    p, q = torch.nn.Parameter(torch.zeros(3)), torch.zeros(4)
    with pytest.raises(ValueError, match="equally many"):
        ema_update_([p], [], 0.9)
    with pytest.raises(ValueError, match="equal shapes"):
        ema_update_([p.detach()], [q], 0.9)
    with pytest.raises(ValueError, match="twice"):
        ema_update_([q, q], [q + 1, q + 2], 0.9)
    with pytest.raises(ValueError, match="equal shapes and devices"):
        AdamWEMA([p], ema=[(p, q)])
    with pytest.raises(ValueError, match="two averages"):
        AdamWEMA([p], ema=[(p, p.detach()), (p, p.detach())])
    with pytest.raises(ValueError, match="another tensor"):
        AdamWEMA([p], ema=[(p, p)])
    with pytest.raises(ValueError, match="floating-point"):
        AdamWEMA([p], copies=[(p, torch.zeros(3, dtype=torch.int32))])
    small, state = torch.zeros(3, dtype=torch.float8_e4m3fn), torch.zeros(STATE)
    for copies, scalings in (
        ([(q3 := torch.zeros(3), small)], [(small, state)]),  # copies no average
        ([(q3, small)], []),
        ([], [(small, state)]),
        ([(q3, torch.zeros(3, dtype=torch.float16))], [(small, state)]),
    ):
        with pytest.raises(ValueError, match="each has one scaling"):
            AdamWEMA([p], ema=[(p, q3)] if not scalings else [], copies=copies, scalings=scalings)
    with pytest.raises(ValueError, match="is for copies of averages"):
        AdamWEMA([p], ema=[(p, small)])
    with pytest.raises(ValueError, match="state of a scaling must be float32"):
        AdamWEMA([p], ema=[(p, q3)], copies=[(q3, small)], scalings=[(small, state[1:])])
    target, other = torch.zeros(3), torch.nn.Parameter(torch.zeros(3))
    for pairs in ({"ema": [(p, target), (other, target)]}, {"ema": [(p, target)], "copies": [(other, target)]}):
        with pytest.raises(ValueError, match="two pairs write one tensor"):
            AdamWEMA([p, other], **pairs)
    with pytest.raises(ValueError, match="impl must be one of"):
        AdamWEMA([p], impl="cuda")
    if DEVICE == "cpu" and not INTERPRET:
        p.grad = torch.zeros(3)
        with pytest.raises(ValueError, match="impl='triton' is impossible"):
            AdamWEMA([p], impl="triton").step()


NO_DECAYS = (1.5, -0.1, float("nan"), torch.tensor([0.5, 0.6]), torch.tensor(0.5, device="meta"))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("decay", NO_DECAYS, ids=["above 1", "negative", "nan", "two", "elsewhere"])
def test_an_invalid_decay_is_refused(impl, decay):
    decay = decay.to(DEVICE) if isinstance(decay, torch.Tensor) and decay.numel() == 2 else decay
    params = parameters()
    emas = [torch.zeros_like(p) for p in params]
    optimizer = AdamWEMA(params, ema=zip(params, emas, strict=True), impl=impl)
    set_gradients(params, 1)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="decay"):
        optimizer.step(ema_decay=decay)
    with pytest.raises(ValueError, match="decay"):
        ema_update_(emas, before, decay, impl=impl)
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)) and not optimizer.state


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("impl", IMPLS)
def test_invalid_scales_are_refused(impl, name):
    optimizer = AdamWEMA(parameters(), impl=impl)
    set_gradients(optimizer.param_groups[0]["params"], 1)
    for x in (torch.ones(2, device=DEVICE), torch.ones((), device="meta"), 1.0):
        with pytest.raises(ValueError, match=f"{name} must be a scalar on {DEVICE}"):
            optimizer.step(**{name: x})
    optimizer.step(**{name: torch.ones(1, device=DEVICE)})  # a tensor of one element is accepted as a scalar
    plain = AdamWEMA(parameters(), fused=False, impl="reference")
    set_gradients(plain.param_groups[0]["params"], 1)
    with pytest.raises(ValueError, match="need fused=True"):
        plain.step(**{name: torch.ones((), device=DEVICE)})


needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("remainder", [False, True])
def test_steps_repeat_to_the_bit(remainder):
    runs = []
    for _ in range(2):
        params = parameters(torch.bfloat16 if remainder else torch.float32)
        params.append(torch.nn.Parameter(params[3].detach().new_ones(64 * CHUNK)))  # spans many programs
        emas = [p.detach().float() for p in params]
        optimizer = AdamWEMA(params, zip(params, emas, strict=True), remainder=remainder, lr=1e-2, impl="triton")
        for step in range(5):
            set_gradients(params, step)
            optimizer.step(ema_decay=0.9)
        runs.append([*params, *emas, *(x for p in params for x in optimizer.state[p].values())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_bfloat16_without_a_remainder():
    """With parameters, gradients and moments in bfloat16, each is rounded once a step, as in torch's fused AdamW."""
    ours, torchs = (parameters(torch.bfloat16) for _ in range(2))
    emas = [p.detach().float() for p in ours]
    optimizer = AdamWEMA(ours, zip(ours, emas, strict=True), lr=1e-2, impl="triton")
    reference = torch.optim.AdamW(torchs, lr=1e-2, fused=True)
    for step in range(3):
        for params in (ours, torchs):
            set_gradients(params, step)
        optimizer.step(ema_decay=0.0)
        reference.step()
    for p, q, e in zip(ours, torchs, emas, strict=True):
        torch.testing.assert_close(p, q, rtol=2**-7, atol=1e-3)  # neighbouring bfloat16 values
        torch.testing.assert_close(e.bfloat16(), p.detach(), rtol=2**-8, atol=0)  # EMA of the unrounded value
        for name, x in optimizer.state[p].items():
            one_step = 2**-8 * x.abs().max().item() if x.numel() else 0.0  # allowed where the terms of a sum cancel
            torch.testing.assert_close(x, reference.state[q][name], rtol=2**-6, atol=one_step)


@pytest.mark.gpu
@needs_gpu
def test_tables_are_shared_across_streams():
    """Equal values share one table: the second stream waits for the copy that the first stream has not finished."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    made, plain = [parameters() for _ in streams], parameters()
    for params in (*made, plain):
        for p in params:
            p.grad = torch.ones_like(p)
    optimizers = [AdamWEMA(params, lr=0.0123, impl="triton") for params in made]
    for optimizer in optimizers:  # compiles, and makes the state and all tables but the next learning rate's
        optimizer.step()
    reference = AdamWEMA(plain, lr=0.0123, impl="reference")
    reference.step()
    for optimizer in (*optimizers, reference):
        optimizer.param_groups[0]["lr"] = 0.0321
    torch.cuda.synchronize()
    for optimizer, stream in zip(optimizers, streams, strict=True):
        with torch.cuda.stream(stream):
            if optimizer is optimizers[0]:
                torch.cuda._sleep(200_000_000)  # a tenth of a second
            optimizer.step()
    reference.step()
    torch.cuda.synchronize()
    for params in made:
        for p, q in zip(params, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
def test_ema_update_on_a_side_stream():
    targets, sources = [p.detach() for p in parameters(seed=1)], [p.detach() for p in parameters(seed=2)]
    want = [0.9 * t + 0.1 * s for t, s in zip(targets, sources, strict=True)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ema_update_(targets, sources, 0.9, impl="triton")
    torch.cuda.current_stream().wait_stream(stream)
    for t, w in zip(targets, want, strict=True):
        torch.testing.assert_close(t, w, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("warm", [False, True], ids=["tables of the capture", "tables made before"])
def test_captured_ema_update(warm):
    """Each replay reads the decay. The graph's tables stay valid after newer ones have replaced them in the cache."""
    targets, sources = [p.detach() for p in parameters(seed=1)], [p.detach() for p in parameters(seed=2)]
    decay, others = torch.tensor(1.0, device="cuda"), [torch.zeros(64, device="cuda") for _ in range(64)]
    # A decay of 1 leaves the targets unchanged.
    ema_update_(targets if warm else [t.clone() for t in targets], sources, decay, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_(targets, sources, decay, impl="triton")
    want = [t.clone() for t in targets]
    for other in others:  # more tables than the cache holds
        ema_update_([other], [sources[4].flatten()[:64]], 0.5, impl="triton")
    for value in (0.5, 0.25):
        decay.fill_(value)
        graph.replay()
        want = [value * w + (1 - value) * s for w, s in zip(want, sources, strict=True)]
    for t, w in zip(targets, want, strict=True):
        torch.testing.assert_close(t, w, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@needs_gpu
def test_captured_step_follows_its_schedules():
    """Each replay reads the learning rate, the decay and the clip scale on the device. Gradients are fixed buffers."""
    lr, decay, scale = (torch.tensor(x, device="cuda") for x in (1e-3, 0.9, 1.0))
    captured, plain = parameters(), parameters()
    emas, plain_emas = ([p.detach().clone() for p in ps] for ps in (captured, plain))
    ours = AdamWEMA(captured, ema=zip(captured, emas, strict=True), lr=lr)
    eager = AdamWEMA(plain, ema=zip(plain, plain_emas, strict=True), lr=lr.clone(), impl="reference")
    for ps in (captured, plain):
        for p in ps:
            p.grad = torch.ones_like(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours.step(ema_decay=decay, grad_scale=scale)
    torch.cuda.current_stream().wait_stream(stream)
    eager.step(ema_decay=decay, grad_scale=scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step(ema_decay=decay, grad_scale=scale)
    for i in range(3):
        lr.fill_(1e-3 * (i + 2))
        decay.fill_(0.9 + 0.03 * i)
        scale.fill_(i + 1.0)
        graph.replay()
        eager.param_groups[0]["lr"].copy_(lr)
        for p in plain:
            p.grad = torch.ones_like(p)  # torch's fused step divided the previous gradients in place
        eager.step(ema_decay=decay, grad_scale=scale)
    for a, b in zip([*captured, *emas], [*plain, *plain_emas], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
