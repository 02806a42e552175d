"""Whole training steps on the Triton kernels in their interpreter, to test the engine and the kernels together."""

import sys

import pytest
from test_engine import assert_same_weights, make, run

from ajepa_kernels import _triton

pytestmark = pytest.mark.skipif(not _triton.INTERPRET, reason="runs in a separate process, from test_interpreted.py")

KERNELS = {
    *("_masked_attention_fwd_kernel", "_masked_attention_bwd_kernel", "_add_layer_norm_fwd_kernel"),
    *("_add_layer_norm_bwd_kernel", "_bias_gelu_fwd_kernel", "_bias_gelu_bwd_kernel", "_latent_l2_loss_fwd_kernel"),
    "_adamw_ema_kernel",
}


def test_steps_on_the_kernels_are_the_plain_ones(monkeypatch):
    step = {"mlp": "bias-gelu", "recompute": True, "micro_batch": 1}
    cfg = make(step, {"mask": "block"}, {"predictor_depth": 1})
    plain, a = run(cfg, steps=1, batch=2)
    launched = set()

    def launch(kernel, *args, **options):
        launched.add(kernel.__name__)
        return _triton.launch(kernel, *args, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("ajepa_kernels.") and module is not _triton:
            if hasattr(module, "use_triton"):  # the default on a CPU is plain PyTorch
                wanted = lambda op, impl, x, why_not="": impl != "reference" and not why_not  # noqa: E731
                monkeypatch.setattr(module, "use_triton", wanted)
            if hasattr(module, "launch"):
                monkeypatch.setattr(module, "launch", launch)
    interpreted, b = run(cfg, steps=1, batch=2)
    assert launched >= KERNELS, f"the kernels {KERNELS - launched} were not launched, only {launched}"
    assert interpreted == pytest.approx(plain, rel=1e-4)
    assert_same_weights(a, b, rtol=1e-3, atol=2e-5)
