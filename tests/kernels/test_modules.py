"""The modules against hand-written blocks of timm's, I-JEPA's and V-JEPA 2's forms: outputs, gradients, training."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracle import DEVICE, IMPLS
from torch import nn
from torch.utils.checkpoint import checkpoint

from ajepa_kernels import MLP, LinearGELU, PreNormResidual, SwiGLU
from ajepa_kernels._triton import INTERPRET

C, B, N = 16, 6, 5


class DropPath(nn.Module):
    """timm's."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def draw(self, x, keep):
        return x.new_empty((len(x),) + (1,) * (x.dim() - 1)).bernoulli_(keep)

    def forward(self, x):
        if not self.drop_prob or not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * self.draw(x, keep).div_(keep)


class RandDropPath(DropPath):
    """I-JEPA's, which draws other numbers."""

    def draw(self, x, keep):
        return (keep + torch.rand((len(x),) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)).floor_()


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, act=nn.GELU):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = nn.Linear(C, 2 * C), act(), nn.Linear(2 * C, C), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLUFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(C, 24), nn.Linear(C, 24), nn.Linear(24, C)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.fc3(F.silu(self.fc1(x)) * self.fc2(x))


class Mixer(nn.Module):
    """In place of attention: tokens see each other, and `mask` and `T` count."""

    def __init__(self, result=lambda y: y):
        super().__init__()
        self.qkv, self.result = nn.Linear(C, C), result

    def forward(self, x, mask=None, T=None):
        y = self.qkv(x) - x.mean(1, keepdim=True)
        y = y if mask is None else y * mask
        return self.result(y if T is None else y + T)


def as_pair(y):
    return y, None


class TimmBlock(nn.Module):
    def __init__(self, drop=0.3, norm=nn.LayerNorm):
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = norm(C, eps=1e-6), Mixer(), LayerScale(C), DropPath(drop)
        self.norm2, self.mlp, self.ls2 = norm(C, eps=0.1), Mlp(), LayerScale(C)
        self.drop_path2 = DropPath(drop) if drop else nn.Identity()

    def forward(self, x, attn_mask=None):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class IJepaBlock(nn.Module):
    def __init__(self, drop=0.3):
        super().__init__()
        self.norm1, self.attn, self.drop_path = nn.LayerNorm(C), Mixer(as_pair), RandDropPath(drop)
        self.norm2, self.mlp = nn.LayerNorm(C, elementwise_affine=False), Mlp()

    def forward(self, x, return_attention=False):
        y, attn = self.attn(self.norm1(x))
        if return_attention:
            return attn
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class VJepaBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.drop_path = nn.LayerNorm(C), Mixer(), nn.Identity()
        self.norm2, self.mlp = nn.LayerNorm(C, bias=False), SwiGLUFFN()

    def forward(self, x, mask=None, attn_mask=None, T=None, H_patches=None):
        if isinstance(self.attn, Mixer):
            y = self.attn(self.norm1(x), mask=mask, T=T)
        else:
            y = self.attn(self.norm1(x), mask=mask, attn_mask=attn_mask)
        x = x + self.drop_path(y)
        y = self.norm2(x)
        return x + self.drop_path(self.mlp(y))


class ScaledByParameters(nn.Module):
    """BEiT's way, with RMS norms, in three halves."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.RMSNorm(C), nn.RMSNorm(C, eps=1e-3), nn.LayerNorm(C)
        self.a, self.b, self.c = Mixer(), Mlp(), nn.Linear(C, C)
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.rand(C)), nn.Parameter(torch.rand(C))

    def forward(self, x):
        x = x + self.gamma_1 * self.a(self.first(x))
        x = self.b(self.second(x)) * self.gamma_2 + x
        return x + self.c(self.third(x))


BLOCKS = {
    "timm": TimmBlock,
    "timm, nothing dropped": partial(TimmBlock, 0.0),
    "timm, RMS norm": partial(TimmBlock, norm=nn.RMSNorm),
    "I-JEPA": IJepaBlock,
    "V-JEPA 2": VJepaBlock,
    "parameters": ScaledByParameters,
}


def pair(make, impl, depth=1, chained=False):
    """Two functions of x and their parameters: plain blocks, and fused copies of them."""
    torch.manual_seed(0)
    plain = nn.ModuleList(make() for _ in range(depth)).to(DEVICE)
    fused = nn.ModuleList(PreNormResidual.of(block, impl=impl) for block in copy.deepcopy(plain))

    def one_by_one(blocks, x, *args, **kwargs):
        for block in blocks:
            x = block(x, *args, **kwargs)
        return x

    return (plain, partial(one_by_one, plain)), (
        fused,
        partial(PreNormResidual.chain if chained else one_by_one, fused),
    )


def train(model, function, steps=2, **autocast):
    """Outputs and gradients of several steps of gradient descent, with the same random numbers for each model."""
    torch.manual_seed(1)
    seen = []
    for _ in range(steps):
        x = torch.randn(B, N, C, device=DEVICE, requires_grad=True)
        with torch.autocast(DEVICE, torch.bfloat16, **autocast) if autocast else torch.enable_grad():
            y = function(x)
        grads = torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])
        seen += [y.detach(), *grads]
        with torch.no_grad():
            for p, grad in zip(model.parameters(), grads[1:], strict=True):
                p -= 0.003 * grad
    return seen


def assert_same(got, want, **tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, **{"rtol": 1e-4, "atol": 1e-4, **tolerance})


@pytest.mark.parametrize("chained", [True] if INTERPRET else [False, True])  # the interpreter takes seconds
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("impl", IMPLS)
def test_training_is_that_of_the_plain_blocks(name, chained, impl):
    plain, fused = pair(BLOCKS[name], impl, depth=2, chained=chained)
    assert_same(train(*fused), train(*plain))
    assert [n for n, _ in fused[0].named_parameters()] == [n for n, _ in plain[0].named_parameters()]


@pytest.mark.parametrize("name", ["timm", "I-JEPA"])
def test_dropped_samples_differ_and_evaluation_drops_none(name):
    (plain, _), (fused, run) = pair(BLOCKS[name], "auto", depth=2, chained=True)
    x = torch.randn(1, N, C, device=DEVICE).expand(64, N, C)
    with torch.no_grad():
        assert len(run(x).flatten(1).unique(dim=0)) > 4
        plain.eval(), fused.eval()
        state = torch.get_rng_state()
        torch.testing.assert_close(run(x), plain[1](plain[0](x)))
        assert torch.equal(torch.get_rng_state(), state), "a number was drawn"


@pytest.mark.parametrize("name", BLOCKS)
def test_checkpoints_fit_both_ways(name):
    (plain, _), (fused, _) = pair(BLOCKS[name], "auto", depth=2)
    assert list(fused.state_dict()) == list(plain.state_dict())
    others = nn.ModuleList(BLOCKS[name]() for _ in range(2)).to(DEVICE)
    fused.load_state_dict(others.state_dict())
    plain.load_state_dict(fused.state_dict())
    for model in (fused, plain):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), others.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_default_eps_of_rms_norm(dtype):
    """It depends on the dtype, and counts where the stream is small."""
    torch.manual_seed(0)
    plain = ScaledByParameters().to(DEVICE, dtype)
    x = (1e-3 * torch.randn(B, N, C, device=DEVICE)).to(dtype)
    torch.testing.assert_close(PreNormResidual.of(plain, impl="reference")(x), plain(x), rtol=1e-2, atol=1e-5)


def test_of_shares_the_parameters():
    block = TimmBlock()
    fused = PreNormResidual.of(block)
    assert all(p is q for p, q in zip(block.parameters(), fused.parameters(), strict=True))
    assert PreNormResidual.of(fused) is fused and fused.training
    assert not PreNormResidual.of(block.eval()).training
    twin = copy.deepcopy(fused)  # a target encoder
    assert twin.norm1 is not fused.norm1 and twin.state_dict().keys() == fused.state_dict().keys()


@pytest.mark.parametrize("name", ["timm", "timm, nothing dropped", "V-JEPA 2"])
@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_autocast(name, stream):
    """The result has the plain block's dtype, and differs by roundings of bfloat16."""
    (plain, one), (fused, other) = pair(BLOCKS[name], "auto", depth=2, chained=True)
    got, want = [], []
    for results, model, function in ((got, fused, other), (want, plain, one)):
        torch.manual_seed(1)
        x = torch.randn(B, N, C, device=DEVICE, dtype=stream, requires_grad=True)
        with torch.autocast(DEVICE, torch.bfloat16):
            y = function(x)
        results += [y, *torch.autograd.grad(y.float().square().sum(), [x, *model.parameters()])]
    assert [t.dtype for t in got] == [t.dtype for t in want]
    for g, w in zip(got, want, strict=True):
        assert (g - w).float().norm() <= 0.03 * w.float().norm()


@pytest.mark.parametrize("name", ["timm, nothing dropped", "V-JEPA 2", "parameters"])
@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(name, impl):
    plain, (fused, function) = pair(BLOCKS[name], impl, depth=2, chained=True)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(train(fused, compiled, steps=1), train(*plain, steps=1))


def test_compiles_whole_with_drop_path():
    _, (fused, function) = pair(BLOCKS["timm"], "auto")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert all(t.isfinite().all() for t in train(fused, compiled, steps=1))


@pytest.mark.parametrize("name", ["timm", "I-JEPA"])
@pytest.mark.parametrize("impl", IMPLS)
def test_activation_checkpointing(name, impl):
    plain, (fused, function) = pair(BLOCKS[name], impl)
    again = partial(checkpoint, function, use_reentrant=False)
    assert_same(train(fused, again), train(*plain))


def test_arguments_go_where_the_block_passes_them():
    (plain, _), (fused, function) = pair(VJepaBlock, "auto", depth=2, chained=True)
    x, mask = torch.randn(B, N, C, device=DEVICE), torch.rand(N, 1, device=DEVICE)
    want = plain[0](x, mask, T=2.0, H_patches=7)
    torch.testing.assert_close(fused[0](x, mask, T=2.0, H_patches=7), want)
    torch.testing.assert_close(function(x, mask, T=2.0, H_patches=7), plain[1](want, mask, T=2.0, H_patches=7))
    assert not torch.allclose(fused[0](x), want)
    timm = PreNormResidual.of(TimmBlock(0.0).to(DEVICE))
    torch.testing.assert_close(timm(x, attn_mask=mask), timm(x, mask))
    with pytest.raises(TypeError, match=r"the block takes \(x, mask, attn_mask, T, H_patches\), got 1"):
        fused[0](x, masks=mask)
    with pytest.raises(TypeError, match="return_attention must keep its default False"):
        PreNormResidual.of(IJepaBlock())(x, return_attention=True)


class Changed(TimmBlock):
    """A timm block with another forward."""

    def __init__(self, forward, **children):
        super().__init__()
        self.how = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.how(self, x)


def half(s, x):
    return x + s.attn(s.norm1(x))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (Changed(half), "two or more halves .* got 1"),
        (Changed(lambda s, x: s.mlp(s.norm1(x))), r"mlp \(Mlp\) is not a sum"),
        (Changed(lambda s, x: half(s, x) + s.mlp(x)), r"mlp \(Mlp\) is no branch of a norm"),
        (Changed(lambda s, x: x + s.norm1(s.attn(x)) + s.norm2(s.mlp(x))), "no LayerNorm or RMSNorm|no branch"),
        (Changed(lambda s, x: half(s, x) + s.mlp(s.norm1(x))), "no branch of a norm of the stream"),
        (Changed(lambda s, x: half(s, x) + 2 * s.mlp(s.norm2(x))), "no branch of a norm"),
        (Changed(lambda s, x: half(s, half(s, x)) if s.training else half(s, x)), "differs between training"),
        (Changed(lambda s, x: x if x.sum() > 0 else half(s, x)), "cannot be followed"),
        (Changed(lambda s, x: half(s, half(s, x)), norm1=nn.GroupNorm(1, C)), r"norm1 \(GroupNorm\) is no LayerNorm"),
        (Changed(lambda s, x: half(s, half(s, x)), norm1=nn.LayerNorm((N, C))), "over the last axis"),
        (Changed(lambda s, x: half(s, x) + s.ls2(s.mlp(s.norm2(x))), ls2=nn.Dropout(0.1)), "no branch|no LayerNorm"),
    ],
)
def test_blocks_of_another_form_are_refused(block, message):
    with pytest.raises(ValueError, match=f"PreNormResidual(?s:.*){message}"):
        PreNormResidual.of(block)


def test_halves_given_one_by_one():
    block = TimmBlock().to(DEVICE)
    halves = (
        (block.norm1, block.attn, block.ls1, block.drop_path1),
        (block.norm2, block.mlp, nn.Dropout(0.0), block.ls2, block.drop_path2),
    )
    fused = PreNormResidual(*halves)
    assert "ls2.gamma" in fused.state_dict() and "branch1.qkv.weight" in fused.state_dict()
    x, mask = torch.randn(B, N, C, device=DEVICE), torch.rand(N, 1, device=DEVICE)
    results = []
    for module in (block, fused):
        torch.manual_seed(2)
        results.append(module(x, mask))
    torch.testing.assert_close(*results)
    for wrong, message in (
        (halves[:1], "got 1"),
        ((halves[0], (block.mlp, block.norm2)), "first; got Mlp, LayerNorm"),
        ((halves[0], (*halves[1], block.ls1)), "got LayerScale"),
        ((halves[0], (*halves[1], nn.GELU())), "got GELU"),
    ):
        with pytest.raises(ValueError, match=f"PreNormResidual: .*{message}"):
            PreNormResidual(*wrong)
    with pytest.raises(ValueError, match=r"Linear is no PreNormResidual; use PreNormResidual\.of"):
        PreNormResidual.chain([nn.Linear(C, C)], x)


# --- MLPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "plain"),
    [
        (lambda impl: MLP(C, 2 * C, impl=impl), Mlp),
        (
            lambda impl: MLP(C, 2 * C, act_layer=partial(nn.GELU, "tanh"), impl=impl),
            partial(Mlp, partial(nn.GELU, "tanh")),
        ),
        (lambda impl: SwiGLU(C, 2 * C, impl=impl), SwiGLUFFN),
        (lambda impl: LinearGELU(C, C, impl=impl), partial(nn.Linear, C, C)),
    ],
    ids=["MLP", "MLP, tanh", "SwiGLU", "LinearGELU"],
)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_mlps(module, plain, autocast, impl):
    torch.manual_seed(0)
    fused, plain = module(impl).to(DEVICE), plain().to(DEVICE)
    plain.load_state_dict(fused.state_dict())
    assert [(n, p.shape) for n, p in fused.named_parameters()] == [(n, p.shape) for n, p in plain.named_parameters()]
    function = (lambda x: F.gelu(plain(x))) if isinstance(fused, LinearGELU) else plain
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    if not autocast:
        want = train(plain, function, steps=1)
        assert_same(train(fused, compiled, steps=1), want)
        fused.load_state_dict(plain.state_dict())
        assert_same(train(fused, fused), train(plain, function))
        return
    x = torch.randn(B, N, C, device=DEVICE)
    with torch.autocast(DEVICE, torch.float16):
        got, want = compiled(x), function(x)
    assert got.dtype == want.dtype == torch.float16
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("impl", ["fused", *IMPLS])
def test_linear_gelu_by_the_fused_product(impl):
    """Its steps, as plain products on a CPU, against the two plain layers; without a gradient nothing is kept."""
    if impl == "fused" and DEVICE == "cuda":
        pytest.skip("test_products.py runs the fused products on a GPU")
    torch.manual_seed(0)
    fused, plain = LinearGELU(C, C, impl=impl).to(DEVICE), nn.Linear(C, C).to(DEVICE)
    plain.load_state_dict(fused.state_dict())
    assert_same(train(fused, fused), train(plain, lambda x: F.gelu(plain(x))))
    x = torch.randn(B, N, C, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), F.gelu(F.linear(x, fused.weight, fused.bias)))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fused(x))
    torch.testing.assert_close(fused(x[:0]), x[:0])


def test_mlps_take_over_layers():
    x = torch.randn(B, N, C)
    for plain, cls in ((Mlp(), MLP), (Mlp(partial(nn.GELU, "tanh")), MLP), (SwiGLUFFN(), SwiGLU)):
        fused = cls.of(plain.eval())
        assert fused.fc1 is plain.fc1 and fused.state_dict().keys() == plain.state_dict().keys() and not fused.training
        torch.testing.assert_close(fused(x), plain(x))
    wide, narrow = SwiGLU(C, 100), SwiGLU(C, 100, wide_silu=False)
    assert wide.fc1.out_features == 72 and narrow.fc1.out_features == 100  # 2 x 100 / 3 = 66, up to a multiple of 8


def test_mlps_refuse_what_they_do_not_compute():
    with pytest.raises(ValueError, match=r"MLP: dropout is not supported, got drop=0\.1"):
        MLP(C, drop=0.1)
    with pytest.raises(ValueError, match="SwiGLU: dropout is not supported"):
        SwiGLU(C, drop=0.1)
    with pytest.raises(ValueError, match=r"MLP: act_layer must make a torch\.nn\.GELU, got ReLU"):
        MLP(C, act_layer=nn.ReLU)
    with pytest.raises(ValueError, match=r"MLP\.of: Mlp\.act must be a torch\.nn\.GELU"):
        MLP.of(Mlp(nn.ReLU))
    with pytest.raises(ValueError, match=r"SwiGLU\.of: Mlp has no fc3"):
        SwiGLU.of(Mlp())
    dropping = Mlp()
    dropping.drop.p = 0.1
    with pytest.raises(ValueError, match=r"MLP\.of: drop \(Dropout\) is not supported, only dropout of 0"):
        MLP.of(dropping)
    with pytest.raises(ValueError, match="approximate must be"):
        LinearGELU(C, C, approximate="erf")(torch.zeros(2, C))
