import re
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from oracle import DEVICE, DTYPES, IMPLS, assert_as_good, assert_first_order, needs_kernel, poison  # noqa: F401
from torch._dynamo.backends.common import aot_autograd

from ajepa_kernels import latent_l2_loss, latent_l2_loss_reference
from ajepa_kernels.latent_loss import KINDS, REDUCTIONS


def oracle(prediction, latents, index, kind, normalize, reduction, p=2, beta=1.0, weights=None):
    """The loss by its formula, in float64, token by token."""
    losses, power = [], p
    for p, i in zip(prediction.double(), index.tolist(), strict=True):
        t = latents[i].double()
        if normalize:
            t = (t - t.mean()) / (t.var(correction=0) + 1e-6).sqrt()
        if kind == "l2":
            losses.append(((p - t) ** 2).mean())
        elif kind == "smooth_l1":
            d = (p - t).abs()
            losses.append(torch.where(d < beta, d * d / (2 * beta), d - beta / 2).mean())
        elif kind == "lp":
            losses.append(((p - t).abs() ** power / power).mean())
        else:
            losses.append(2 - 2 * (p @ t) / (p.norm().clamp_min(1e-6) * t.norm().clamp_min(1e-6)))
    loss = torch.stack(losses) if losses else prediction.double().sum(1)
    total = len(loss) if weights is None else weights.double().sum().item()
    loss = loss if weights is None else loss * weights.double()
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / (total or 1)}[reduction]


def both(function, prediction, upstream):
    prediction = prediction.detach().requires_grad_()
    loss = function(prediction)
    upstream = upstream.to(loss.device, loss.dtype)
    return loss, torch.autograd.grad(loss, prediction, upstream)[0]


# Widths: less than a vector access, a power of two, those of ViT-S and ViT-B (with masked tails), and one more than a
# power of two.
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("T", "C"), [(5, 7), (9, 64), (1, 384), (6, 768), (3, 1025), (0, 64)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_value_and_gradient(T, C, kind, dtype, impl):
    for reduction in REDUCTIONS:
        normalize = reduction != "sum"
        prediction, latents = torch.randn(T, C).to(dtype), torch.randn(11, C).to(dtype)
        index = torch.randint(11, (T,))
        upstream = torch.randn(T) if reduction == "none" else torch.tensor(1.7)
        options = {"kind": kind, "normalize": normalize, "reduction": reduction}
        want = both(partial(oracle, latents=latents, index=index, **options), prediction.double(), upstream)
        plain = both(partial(latent_l2_loss_reference, latents=latents, index=index, **options), prediction, upstream)
        function = partial(latent_l2_loss, latents=latents.to(DEVICE), index=index.to(DEVICE), impl=impl, **options)
        got = both(function, prediction.to(DEVICE), upstream)
        assert got[0].dtype == torch.float32 and got[1].dtype == dtype
        # the loss is float32 for every input dtype; only the gradient is rounded to dtype
        assert_as_good([got[0].cpu()], plain[:1], want[:1], torch.float32)
        assert_as_good([got[1].cpu()], plain[1:], want[1:], dtype)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kind", [{"kind": "l2"}, {"kind": "cosine"}, {"kind": "lp", "p": 1}, {"kind": "lp"},
                                  {"kind": "smooth_l1", "beta": 0.3}])  # fmt: skip
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_options_against_float64(kind, weighted, impl):
    """The plain definition too is close to the formula."""
    prediction, latents, index = torch.randn(9, 40), torch.randn(11, 40), torch.randint(11, (9,))
    weights = torch.rand(9).index_fill(0, torch.tensor(4), 0.0) if weighted else None
    for reduction, upstream in (("mean", torch.tensor(1.7)), ("sum", torch.tensor(0.3)), ("none", torch.randn(9))):
        options = {**kind, "reduction": reduction}
        formula = partial(oracle, latents=latents, index=index, normalize=True, weights=weights, **options)
        want = both(formula, prediction.double(), upstream)
        options["weights"] = None if weights is None else weights.to(DEVICE).double()  # any float dtype
        function = partial(latent_l2_loss, latents=latents.to(DEVICE), index=index.to(DEVICE), impl=impl, **options)
        got = both(function, prediction.to(DEVICE), upstream)
        torch.testing.assert_close([x.double().cpu() for x in got], list(want), rtol=2e-6, atol=1e-6)


def forms(B=3, P=10, C=24, dtype=torch.int64):
    """(index, shape of the prediction, row of each token's target among B * P) in every form of samples."""
    draw = lambda *shape: torch.rand(*shape, P).argsort(-1)[..., :4].to(DEVICE, dtype)  # noqa: E731
    rows = lambda i: (i.long() + P * torch.arange(B, device=DEVICE).view(-1, *[1] * (i.dim() - 1))).flatten()  # noqa: E731
    strided = draw(B).t().contiguous().t()
    one, many, equal = draw(B), draw(B, 2), [draw(B) for _ in range(3)]
    ragged = [draw(B)[:, :n] for n in (4, 1, 3)]
    several = torch.cat([rows(i) for i in equal])
    return {
        "one mask": (one, (B, 4, C), rows(one)),
        "masks": (many, (B, 2, 4, C), rows(many)),
        "strided index": (strided, (B, 4, C), rows(strided)),
        "list": (equal, (3 * B, 4, C), several),
        "tuple, flat prediction": (tuple(equal), (3 * B * 4, C), several),
        "ragged list": (ragged, (8 * B, C), torch.cat([rows(i) for i in ragged])),
        "no token": (one[:, :0], (B, 0, C), rows(one[:, :0])),
    }


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("sliced", [False, True], ids=["whole", "without the class token"])
@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("impl", IMPLS)
def test_samples(form, sliced, impl):
    """The same bits as the flat rows give, from latents in place and from predictions in any memory order."""
    torch.manual_seed(0)
    for dtype, P, C in [(torch.int32, 11, 7)] if sliced else [(torch.int64, 10, 24)]:
        index, shape, rows = forms(P=P, C=C, dtype=dtype)[form]
        latents = torch.randn(3, P + 1, C, device=DEVICE)
        latents = latents[:, 1:] if sliced else latents[:, 1:].contiguous()
        prediction = torch.randn(*shape[:-1], 2 * C, device=DEVICE)[..., ::2]
        weights = torch.rand(shape[:-1] if isinstance(index, torch.Tensor) else len(rows), device=DEVICE)
        for options, reductions in (({}, ["mean"]), ({"weights": weights, "check": True}, ["mean", "none"])):
            for reduction in reductions:
                run = partial(latent_l2_loss, impl=impl, reduction=reduction, **options)
                upstream = torch.randn(weights.shape, device=DEVICE) if reduction == "none" else torch.tensor(1.7)
                got = both(lambda p: run(p, latents, index), prediction, upstream)  # noqa: B023
                if weights.dim() > 1 and options:
                    run = partial(run, weights=weights.flatten())
                flat = prediction.reshape(-1, C)
                want = both(
                    lambda p: run(p, latents.reshape(-1, C), rows).view_as(got[0]), flat, upstream  # noqa: B023
                )  # fmt: skip
                assert got[0].shape == (weights.shape if reduction == "none" else ())
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1].view(shape))


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("impl", IMPLS)
def test_samples_compile_whole(form, impl):
    index, shape, rows = forms()[form]
    latents, prediction = torch.randn(3, 10, 24, device=DEVICE), torch.randn(shape, device=DEVICE)
    weights = torch.rand(shape[:-1] if isinstance(index, torch.Tensor) else len(rows), device=DEVICE)
    function = lambda p: latent_l2_loss(p, latents, index, kind="lp", p=1, weights=weights, impl=impl)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    upstream = torch.tensor(3.0)
    torch.testing.assert_close(both(compiled, prediction, upstream), both(function, prediction, upstream))


@pytest.mark.parametrize("impl", IMPLS)
def test_other_sizes_do_not_compile_again(impl):
    """I-JEPA draws the sizes of its blocks anew at each step."""
    function = torch.compile(partial(latent_l2_loss, impl=impl), fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (3, 4, 5, 6):
        masks = [torch.rand(2, 9, device=DEVICE).argsort(1)[:, :N] for _ in range(3)]
        prediction = torch.randn(6, N, 16, device=DEVICE, requires_grad=True)
        latents = torch.randn(2, 9, 16, device=DEVICE)
        with torch._dynamo.config.patch(error_on_recompile=N > 4):
            got = function(prediction, latents, masks)
        torch.testing.assert_close(got, latent_l2_loss(prediction, latents, masks, impl=impl))
        got.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_whose_sum_is_zero(impl):
    prediction = torch.randn(2, 8, device=DEVICE, requires_grad=True)
    weights = torch.zeros(2, device=DEVICE, requires_grad=True)
    latents, index = torch.randn(2, 8, device=DEVICE), torch.arange(2, device=DEVICE)
    loss = latent_l2_loss(prediction, latents, index, weights=weights, impl=impl)
    loss.backward()
    assert loss.item() == 0.0 and not prediction.grad.any() and weights.grad is None


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_difference_has_no_slope(impl):
    """The gradient of |d| is 0 at 0, as torch's, and NaN at NaN."""
    prediction = torch.tensor([[0.0, 1.0, -1.0, float("nan")]], device=DEVICE, requires_grad=True)
    latents, index = torch.zeros(1, 4, device=DEVICE), torch.tensor([0], device=DEVICE)
    latent_l2_loss(prediction, latents, index, kind="lp", p=1, normalize=False, impl=impl).backward()
    torch.testing.assert_close(prediction.grad[0, :3].cpu(), torch.tensor([0.0, 0.25, -0.25]))
    assert prediction.grad[0, 3].isnan() or impl == "reference"


@pytest.mark.parametrize("impl", IMPLS)
def test_as_ijepa_and_vjepa_write_it(impl):
    """The loss lines of the two training loops, on their lists of masks."""
    torch.manual_seed(0)
    B, P, N, C = 2, 12, 5, 16
    masks = [torch.rand(B, P).argsort(1)[:, :N].to(DEVICE) for _ in range(4)]
    h, z = torch.randn(B, P, C, device=DEVICE), torch.randn(4 * B, N, C, device=DEVICE)
    gather = lambda x, m: x.gather(1, m[:, :, None].expand(-1, -1, C))  # noqa: E731
    normed = F.layer_norm(h, (C,))
    want = F.smooth_l1_loss(z, torch.cat([gather(normed, m) for m in masks]))
    torch.testing.assert_close(latent_l2_loss(z, h, masks, kind="smooth_l1", eps=1e-5, impl=impl), want)
    for p in (1.0, 2.0):  # V-JEPA averages the masks' means, which are equally long here
        parts = [(y - gather(normed, m)).abs().pow(p).mean() / p for y, m in zip(z.chunk(4), masks, strict=True)]
        got = latent_l2_loss(z, h, masks, kind="lp", p=p, eps=1e-5, impl=impl)
        torch.testing.assert_close(got, torch.stack(parts).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_zero_tokens_have_finite_gradients(kind, impl):
    """A prediction or target of exact zeros has no direction and no variance."""
    prediction = torch.zeros(2, 16, device=DEVICE, requires_grad=True)
    latents = torch.zeros(3, 16, device=DEVICE)
    loss = latent_l2_loss(prediction, latents, torch.tensor([0, 2], device=DEVICE), kind=kind, impl=impl)
    loss.backward()
    assert loss.isfinite() and prediction.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_views_and_int32(impl):
    storage = torch.randn(6, 2, 32, device=DEVICE)
    prediction, latents = storage[:, 0].requires_grad_(), storage[:, 1]
    index = torch.tensor([5, 5, 0, 1, 2, 3], device=DEVICE)
    got = latent_l2_loss(prediction, latents, index.int(), impl=impl)
    target = F.layer_norm(latents[index], (32,), eps=1e-6)
    torch.testing.assert_close(got, F.mse_loss(prediction, target))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    prediction = torch.randn(6, 32, device=DEVICE, requires_grad=True)
    latents, index = torch.randn(9, 32, device=DEVICE), torch.randint(9, (6,), device=DEVICE)
    function = lambda p: 3 * latent_l2_loss(p, latents, index, impl=impl)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    upstream = torch.ones(())
    torch.testing.assert_close(both(compiled, prediction, upstream), both(function, prediction, upstream))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(kind, impl):
    """The loss is float32, and its gradient has the dtype of the prediction."""
    prediction = torch.randn(6, 32, device=DEVICE).half().requires_grad_()
    latents, index = torch.randn(9, 32, device=DEVICE).half(), torch.randint(9, (6,), device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        loss = latent_l2_loss(prediction, latents, index, kind=kind, impl=impl)
    torch.testing.assert_close(loss, latent_l2_loss_reference(prediction, latents, index, kind))
    loss.backward()
    assert loss.dtype == torch.float32 and prediction.grad.dtype == torch.float16 and prediction.grad.isfinite().all()


@needs_kernel
def test_opcheck():
    prediction, latents = torch.randn(6, 32, device=DEVICE), torch.randn(9, 32, device=DEVICE)
    index = torch.randint(9, (6,), device=DEVICE)
    for with_grad in (False, True):
        torch.library.opcheck(
            torch.ops.ajepa.latent_l2_loss_fwd.default,
            (prediction, latents, index, "l2", True, 1e-6, 2, with_grad),
        )
    samples, weights = torch.randn(2, 5, 32, device=DEVICE), torch.rand(6, device=DEVICE)
    for kind in ("l1", "half_l2", "smooth_l1"):
        torch.library.opcheck(
            torch.ops.ajepa.latent_l2_loss_fwd.default,
            (prediction, samples, index % 5, kind, True, 1e-6, 2, True, 0.3, weights, 3),
        )
    for upstream in (torch.tensor(2.0, device=DEVICE), torch.randn(6, device=DEVICE)):
        torch.library.opcheck(torch.ops.ajepa.latent_l2_loss_bwd.default, (prediction, upstream, 0.5))


@needs_kernel
def test_second_backward_is_refused():
    """The saved gradient is scaled in place, so a second backward pass must raise instead of scaling it again."""
    prediction = torch.randn(6, 32, device=DEVICE, requires_grad=True)
    index = torch.arange(6, device=DEVICE)
    loss = latent_l2_loss(prediction, torch.randn(6, 32, device=DEVICE), index, impl="triton")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernel
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_order(reduction):
    latents, index = torch.randn(9, 32, device=DEVICE), torch.arange(6, device=DEVICE)
    function = partial(latent_l2_loss, latents=latents, index=index, reduction=reduction, impl="triton")
    assert_first_order(function, torch.randn(6, 32, device=DEVICE))


@needs_kernel
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_compiled_backward_is_a_product(reduction, dtype):
    """Under torch.compile, the gradient is scaled by ordinary operations, which can be fused with the next ones."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    latents, index = torch.randn(9, 32, device=DEVICE, dtype=dtype), torch.arange(6, device=DEVICE)
    function = partial(latent_l2_loss, latents=latents, index=index, reduction=reduction, impl="triton")
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    prediction = torch.randn(6, 32, device=DEVICE, dtype=dtype)
    upstream = torch.tensor(70000.0) if reduction == "mean" else torch.linspace(-2, 2, 6)  # above float16's range
    torch.testing.assert_close(both(compiled, prediction, upstream), both(function, prediction, upstream))
    assert len(graphs) == 2 and "latent_l2_loss_fwd" in graphs[0] and "latent_l2_loss" not in graphs[1]


@needs_kernel
@pytest.mark.parametrize("T", [1, 200])
def test_more_than_the_programs_scale_at_once(T):
    """Gradients are right when the scaling programs loop several times, as when they loop once."""
    prediction, latents = torch.randn(T, 768, device=DEVICE), torch.randn(T, 768, device=DEVICE)
    for reduction, upstream in (("sum", torch.tensor(3.0)), ("none", torch.linspace(-1, 1, T))):
        run = lambda impl: both(  # noqa: E731
            lambda p: latent_l2_loss(p, latents, torch.arange(T, device=DEVICE), reduction=reduction, impl=impl),  # noqa: B023
            prediction, upstream,  # noqa: B023
        )  # fmt: skip
        torch.testing.assert_close(run("triton"), run("reference"))


@needs_kernel
def test_float16_gradients_do_not_underflow():
    """The loss scale is applied before the division of a mean over many elements, which would underflow otherwise."""
    latents, index = torch.randn(8, 512, device=DEVICE).half(), torch.arange(8, device=DEVICE)
    prediction = (latents + 0.01 * torch.randn_like(latents)).requires_grad_()
    run = lambda p, impl, weights: both(  # noqa: E731
        lambda p: latent_l2_loss(p, latents, index, normalize=False, weights=weights, impl=impl),
        p, torch.tensor(65536.0),
    )[1]  # fmt: skip
    for weights in (None, torch.rand(8, device=DEVICE)):
        want = run(prediction.double(), "reference", weights)
        assert (run(prediction, "triton", weights).double() - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_wanted(impl):
    with torch.no_grad():
        loss = latent_l2_loss(
            torch.ones(2, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE), torch.arange(2, device=DEVICE), impl=impl
        )
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(3, 5)}, "must share C"),
        ({"latents": torch.zeros(4)}, "must share C"),
        ({"index": torch.zeros(3, dtype=torch.int64)}, r"prediction must be \[3, C\]"),
        ({"index": [torch.zeros(2).long()]}, r"index must be \[T\] for latents \[M, C\]"),
        ({"index": torch.zeros(2)}, "int32 or int64"),
        ({"index": torch.tensor([0, 3]), "check": True}, "outside the 3 rows"),
        ({"prediction": torch.zeros(2, 4, dtype=torch.int64)}, "floating point"),
        ({"latents": torch.zeros(3, 4, device="meta")}, "share a device"),
        ({"kind": "l3"}, "kind must be"),
        ({"p": 3}, "p must be 1 or 2"),
        ({"beta": 0.0}, "beta must be a positive"),
        ({"weights": torch.ones(2).long()}, "weights must be floating"),
        ({"weights": torch.ones(2, 1)}, r"weights must be floating point \[2\] on cpu, got torch.float32 \[2, 1\]"),
        ({"weights": torch.ones(2, device="meta")}, "weights must be .* on meta"),
        ({"latents": torch.zeros(3, 5, 4)}, r"index must be \[3, N\] or \[3, K, N\]"),
        ({"latents": torch.zeros(3, 5, 4), "index": [torch.zeros(2, 2).long()]}, r"list of tensors \[3, N\]"),
        ({"latents": torch.zeros(3, 5, 4), "index": []}, r"list of tensors \[3, N\]"),
        ({"latents": torch.zeros(1, 5, 4), "index": torch.zeros(1, 3).long()}, r"prediction must be \[1, 3, C\]"),
        ({"latents": torch.zeros(1, 5, 4), "index": [torch.zeros(1, 3).long()] * 2},
         r"prediction must be \[2, 3, C\] or \[6, C\]"),
        ({"latents": torch.zeros(1, 5, 4), "prediction": torch.zeros(1, 1, 4), "index": torch.tensor([[5]]),
          "check": True}, "outside the 5 rows"),
        ({"reduction": "max"}, "reduction must be"),
        ({"impl": "cuda"}, "impl must be"),
    ],
)  # fmt: skip
def test_errors(change, message):
    arguments = {"prediction": torch.zeros(2, 4), "latents": torch.zeros(3, 4), "index": torch.zeros(2).long()}
    with pytest.raises(ValueError, match=f"latent_l2_loss: .*{message}"):
        latent_l2_loss(**{**arguments, **change})


@pytest.mark.parametrize("name", ["prediction", "latents", "index", "index[1]", "weights"])
def test_what_is_no_tensor_is_named(name):
    arguments = {"prediction": torch.zeros(2, 4), "latents": torch.zeros(3, 4), "index": torch.zeros(2).long()}
    wrong = [torch.zeros(3, 1).long(), numpy.zeros((3, 1))] if "[" in name else numpy.zeros(2)
    with pytest.raises(TypeError, match=f"latent_l2_loss: {re.escape(name)} must be a torch.Tensor, got numpy.ndarray"):
        latent_l2_loss(**{**arguments, name.removesuffix("[1]"): wrong})


@pytest.mark.parametrize("option", [{"kind": "l3"}, {"reduction": "max"}, {"p": 0}, {"beta": -1.0}])
def test_errors_of_the_reference(option):
    with pytest.raises(ValueError, match=f"latent_l2_loss: {next(iter(option))} must be"):
        latent_l2_loss_reference(torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor([0, 1]), **option)


def test_reference_is_mse_of_layer_norm():
    prediction, latents, index = torch.randn(4, 8), torch.randn(6, 8), torch.tensor([1, 1, 5, 0])
    want = F.mse_loss(prediction, F.layer_norm(latents[index], (8,), eps=1e-6))
    torch.testing.assert_close(latent_l2_loss_reference(prediction, latents, index), want)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
def test_graph_and_repeats():
    prediction = torch.randn(65536, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    latents = torch.randn(131072, 768, device="cuda", dtype=torch.bfloat16)
    index = torch.randperm(131072, device="cuda")[:65536]
    upstream = torch.ones((), device="cuda")
    run = lambda: both(lambda p: latent_l2_loss(p, latents, index), prediction, upstream)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = run()
    torch.cuda.current_stream().wait_stream(stream)
    graph, captured = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))
