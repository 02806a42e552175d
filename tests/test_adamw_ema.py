import copy
from collections import OrderedDict

import pytest
import torch
from oracle import DEVICE, IMPLS, INTERPRET, needs_kernel

from ajepa_kernels import AdamWEMA, _tables, ema_update_
from ajepa_kernels._tables import CHUNK
from ajepa_kernels.adamw_ema import join_remainder, split_remainder

SHAPES = [(3, 5), (CHUNK + 17,), (1,), (0,), (64, 32)]  # odd, more than one chunk, a scalar's worth, empty, aligned


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in SHAPES]


def groups(params, lr):
    decay = torch.tensor(0.1, device=DEVICE) if isinstance(lr, torch.Tensor) else 0.1
    return [{"params": params[:2], "weight_decay": decay}, {"params": params[2:], "weight_decay": 0.0, "lr": lr}]


def set_gradients(params, step):
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        # now and then a parameter has no gradient, and its step count lags
        p.grad = None if (step + i) % 4 == 0 else torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def oracle_step(values, emas, state, params, lrs, decays, ema_decay, scale):
    """AdamW and the average as their papers write them, in float64."""
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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_dicts_interchange_with_torch(impl, direction):
    ours = lambda params: AdamWEMA(params, lr=1e-2, impl=impl)  # noqa: E731
    torchs = lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True)  # noqa: E731
    first, second = (torchs, ours) if direction == "from torch" else (ours, torchs)
    params = parameters()
    optimizer, straight = first(params), parameters()
    reference = torchs(straight)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = second(params)
            optimizer.load_state_dict(saved)
        for p in (params, straight):
            set_gradients(p, step)
        optimizer.step()
        reference.step()
    for p, q in zip(params, straight, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_hooks_run_once_and_closures_return(impl):
    params, calls = parameters(), []
    torch.optim.AdamW(params)  # makes torch wrap AdamW.step in hooks as well
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
    value[:4] = torch.tensor([0.0, -0.0, 1.00390625, float("inf")])  # 1 + 2^-8 lies half way between two bfloat16
    high, low = split_remainder(value)
    assert torch.equal(join_remainder(high, low), value)
    assert (high.double() - value.double()).abs()[:3].max() <= 2**-8


NANS = (0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000)  # CUDA's own, one whose upper half alone would be infinite, negative


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
    optimizer.state[p]["exp_avg"].copy_(bits.view(torch.float32))  # moments hold it, and hand it on
    for _ in range(2):
        optimizer.step()
        assert p.float().isnan().tolist() == [True] * len(NANS) + [False]


# the interpreter cannot be trusted with bfloat16 in general, but here it only carries bits
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
        if step == 2:  # through a checkpoint, whose float32 moments torch would round to bfloat16
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
    sources[0] = sources[0].half()  # another dtype, hence another launch
    want = [0.99 * t.double() + 0.01 * s.double() for t, s in zip(targets, sources, strict=True)]
    ema_update_(targets, sources, decay, impl=impl)
    for t, w in zip(targets, want, strict=True):
        torch.testing.assert_close(t.double(), w, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("remainder", [False, True])
def test_step_compiles_whole(impl, remainder):
    """What a compiled training step does is what an eager one does; schedules are tensors, which it reads again."""
    made = []
    for compiled in (False, True):
        params = parameters(torch.bfloat16 if remainder else torch.float32)
        emas, copies = [p.detach().float() for p in params], [torch.zeros_like(p, dtype=torch.float16) for p in params]
        lr, decay, scale = (torch.tensor(x, device=DEVICE) for x in (1e-2, 0.5, 2.0))
        optimizer = AdamWEMA(
            groups(params, lr), zip(params, emas, strict=True), zip(emas, copies, strict=True),
            remainder=remainder, lr=lr, impl=impl,
        )  # fmt: skip
        step = lambda optimizer=optimizer, decay=decay, scale=scale: (  # noqa: E731
            optimizer.step(ema_decay=decay, grad_scale=scale, found_inf=scale - scale)
        )
        step = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
        for i in range(3):
            for p, g in zip(params, parameters(params[0].dtype, seed=i), strict=True):
                p.grad = None if p is params[2] else g.detach()  # one parameter has an average alone
            for scalar in (lr, decay, scale):
                scalar.mul_(1.1)
            version = params[0]._version
            step()
            assert compiled or params[0]._version > version  # autograd's check of saved tensors sees the update
        states = [optimizer.state[p] for p in params if p.grad is not None]
        made.append([*params, *emas, *copies, *(x for state in states for x in state.values())])
    for eager, got in zip(*made, strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_step_compiles_in_inductor(impl):
    """Updates land in the tensors themselves, not in copies that a functional graph makes of them."""
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
    places = [-1, 0, -1, -1, 0, -1, 1, 0, -1, 0, -1, 2, -1, 0, 0]  # the third parameter has no gradient
    torch.library.opcheck(
        torch.ops.ajepa.adamw_ema_.default,
        (params, grads, draw(), draw(), steps, [], draw(3), draw(1), draw(1), [scalar], places, [0, -1],
         [0.9, 0.99, 1e-8, 0.0, 0.1, 1.0], scalar, scalar - scalar, scalar, 0.0),
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
    """A tensor on a GPU, as far as `_tables` looks."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self):
        self.tensor = torch.zeros(1)

    def untyped_storage(self):
        return self.tensor.untyped_storage()

    def record_stream(self, stream):
        pass


def test_tables_made_in_a_capture_are_its_own(monkeypatch):
    """Their memory is filled when the graph is replayed, not before: an eager step must not find them."""
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
    """Equal numbers share a table, also between optimisers whose streams have nothing to do with each other."""

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
def test_a_decay_that_cannot_be(impl, decay):
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
def test_scales_that_cannot_be(impl, name):
    optimizer = AdamWEMA(parameters(), impl=impl)
    set_gradients(optimizer.param_groups[0]["params"], 1)
    for x in (torch.ones(2, device=DEVICE), torch.ones((), device="meta"), 1.0):
        with pytest.raises(ValueError, match=f"{name} must be a scalar on {DEVICE}"):
            optimizer.step(**{name: x})
    optimizer.step(**{name: torch.ones(1, device=DEVICE)})  # one element is a scalar
    plain = AdamWEMA(parameters(), fused=False, impl="reference")
    set_gradients(plain.param_groups[0]["params"], 1)
    with pytest.raises(ValueError, match="need fused=True"):
        plain.step(**{name: torch.ones((), device=DEVICE)})


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_captured_step_follows_its_schedules():
    """Learning rate, decay and clip scale are read on the device at each replay; gradients are fixed buffers."""
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
        eager.step(ema_decay=decay, grad_scale=scale)
    for a, b in zip([*captured, *emas], [*plain, *plain_emas], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
