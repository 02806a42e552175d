"""What holds for the package of operations as a whole."""

import subprocess
import sys
import warnings

import pytest
import torch
from oracle import CAN_LAUNCH, DEVICE, IMPLS
from torch.utils._python_dispatch import TorchDispatchMode

import ajepa_kernels
from ajepa_kernels import _triton


def test_imports_without_triton():
    """Neither a GPU, nor a compiler, nor Triton is needed to import it and to use the plain definitions."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, ajepa_kernels as k\n"
        "assert 'ajepa' not in sys.modules and not k.warmup(device='cpu')\n"
        "cu = torch.tensor([0, 2, 5])\n"
        "assert k.masked_attention(torch.ones(5, 3, 2, 8), cu_seqlens=cu, max_seqlen=3).shape == (5, 2, 8)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_auto_says_once_that_it_falls_back(monkeypatch):
    """On a GPU that a kernel cannot serve, auto says so, once for each reason; on a CPU there is nothing to say."""

    class OnGPU:
        is_cuda = True

    monkeypatch.setattr(_triton, "cannot_launch", lambda x: "")
    _triton._announce.cache_clear()
    with pytest.warns(
        UserWarning, match="ajepa_kernels.some_op runs as plain PyTorch on this GPU: no kernel for D = 3"
    ):
        assert not _triton.use_triton("some_op", "auto", OnGPU(), "no kernel for D = 3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _triton.use_triton("some_op", "auto", OnGPU(), "no kernel for D = 3")
        assert _triton.use_triton("some_op", "auto", OnGPU())
        assert not _triton.use_triton("some_op", "auto", torch.empty(0))


@pytest.mark.skipif(not CAN_LAUNCH, reason="there is nothing to compile for")
def test_warmup_runs_every_operation():
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    assert ajepa_kernels.warmup(device=DEVICE, dtype=dtype, heads=[(2, 32)], max_seqlens=[16, 33], widths=[32])


class NoSync(TorchDispatchMode):
    """Refuses what a host must wait for a device to do: reading a value, or sizes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if masks or name in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
            "unique2",
            "repeat_interleave",
        ):
            raise AssertionError(f"{function} makes the host wait")
        return function(*args, **(kwargs or {}))


def no_wait_cases():
    """Every form of every operation that promises not to make the host wait, forward and backward."""
    k, on = ajepa_kernels, {"device": DEVICE}
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool, **on)
    index, rows = torch.tensor([[0, 3], [4, 1]], **on), torch.tensor([0, 2, 3, 7], **on)
    cu = torch.tensor([0, 3, 4], **on)
    dense, packed = torch.randn(2, 5, 3, 2, 32, **on), torch.randn(4, 3, 2, 32, **on)
    x, residual, weight, bias = (
        torch.randn(6, 8, **on),
        torch.randn(6, 8, **on),
        torch.randn(8, **on),
        torch.ones(8, **on),
    )
    attend = k.masked_attention
    return {
        "packed": (lambda q, impl: attend(q, cu_seqlens=cu, max_seqlen=3, impl=impl), [packed]),
        "packed, key mask": (
            lambda q, impl: attend(q, cu_seqlens=cu, max_seqlen=3, key_mask=mask[0, :4], impl=impl), [packed]
        ),
        "indices": (lambda q, impl: attend(q, visible=index, impl=impl), [dense]),
        "indices, scattered": (lambda q, impl: attend(q, visible=index, output="scattered", impl=impl), [dense]),
        "rows": (lambda q, impl: attend(q, visible=rows, cu_seqlens=cu, max_seqlen=3, impl=impl), [dense]),
        "booleans, scattered": (lambda q, impl: attend(q, visible=mask, output="scattered", impl=impl), [dense]),
        "all, key mask": (lambda q, impl: attend(q, key_mask=mask, impl=impl), [dense]),
        "loss": (lambda p, impl: k.latent_l2_loss(p, residual, rows[:2].repeat(3), impl=impl), [x]),
        "layer norm": (lambda *t, impl: k.add_layer_norm(*t, impl=impl)[0], [x, residual, weight, bias]),
        "gelu": (lambda *t, impl: k.bias_gelu(*t, impl=impl), [x, bias]),
    }  # fmt: skip


@pytest.mark.parametrize("case", no_wait_cases())
@pytest.mark.parametrize("impl", IMPLS)
def test_the_host_never_waits(case, impl, monkeypatch):
    monkeypatch.setattr("ajepa_kernels.attention._is_free_to_read", lambda x: False)  # as on a GPU
    function, leaves = no_wait_cases()[case]
    leaves = [x.requires_grad_() for x in leaves]
    with NoSync():
        out = function(*leaves, impl=impl)
        torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_host_never_waits_for_the_optimiser(impl):
    params = [torch.nn.Parameter(torch.randn(4, 4, device=DEVICE)) for _ in range(2)]
    emas, rate = [p.detach().clone() for p in params], torch.tensor(0.1, device=DEVICE)
    groups = [{"params": [p], "weight_decay": rate} for p in params]
    optimizer = ajepa_kernels.AdamWEMA(groups, ema=zip(params, emas, strict=True), lr=rate, impl=impl)
    for p in params:
        p.grad = torch.ones_like(p)
    with NoSync():
        optimizer.step(ema_decay=rate, grad_scale=rate, found_inf=rate - rate)
        ajepa_kernels.ema_update_(emas, [p.detach() for p in params], rate, impl=impl)


def test_what_waits_is_noticed():
    qkv, mask = torch.randn(2, 5, 3, 2, 32), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(AssertionError, match="makes the host wait"), NoSync():
        ajepa_kernels.masked_attention(qkv, visible=mask)
