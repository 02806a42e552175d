"""Times candidate configurations of every Triton operation on the GPU at hand, and keeps the fastest in its table.

`python benchmarks/tune.py` rewrites the timed part of kernels/ajepa_kernels/_tuned.py for this GPU's model. A candidate
counts where its result agrees with the plain definition's and it beats the present configuration by 2 %.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from triton.errors import TritonError

from ajepa_kernels import _tuned, add_layer_norm, bias_gelu, latent_l2_loss, masked_attention
from ajepa_kernels._tuned import LONG, Rows, Tiles

TOKENS, HEADS, GAIN = 65536, 12, 0.98
Case = tuple[tuple, list, Callable[[str], list[torch.Tensor]]]  # key, candidates, function of impl


def rewrite(source: str, timed: dict[str, dict[tuple, object]]) -> str:
    """`source` of _tuned.py with `timed` in place of its timed entries."""
    lines = ["TIMED: dict[str, dict[tuple, Any]] = {"]
    for model, entries in sorted(timed.items()):
        lines.append(f'    "{model}": {{')
        for key, config in sorted(entries.items()):
            names = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
            lines.append(f"        ({names}): {type(config).__name__}({', '.join(map(str, config))}),")
        lines.append("    },")
    new = "\n".join([*lines, "}"]) if timed else lines[0] + "}"
    return re.sub(r"^TIMED: .*?(?=\n# --- end ---)", lambda _: new, source, flags=re.S | re.M)


def cases() -> Iterator[Case]:
    """Backward passes are timed with their forward passes, which are tuned before them."""
    draw = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    for bits, dtype in ((16, torch.bfloat16), (32, torch.float32)):
        for D in (32, 64, 128):
            for S in (16, 32, 64, 128, LONG):
                length = S or 512
                cu = torch.arange(0, TOKENS + 1, length, device="cuda", dtype=torch.int32)
                qkv = draw(TOKENS, 3, HEADS, D, dtype=dtype)
                sizes = [(q, k) for q in (16, 32, 64, 128) for k in ((32, 64, 128) if S == LONG else (S,))]
                options = [
                    Tiles(q, k, warps, stages)
                    for q, k in sizes if S == LONG or q <= S
                    for warps in (1, 2, 4, 8, 16) for stages in ((1, 2, 3) if S == LONG else (1,))
                ]  # fmt: skip
                attend = lambda x, impl, cu=cu, length=length: masked_attention(  # noqa: E731
                    x, cu_seqlens=cu, max_seqlen=length, impl=impl
                )
                yield ("attention_fwd", bits, S, D), options, lambda impl, x=qkv, f=attend: [f(x, impl)]
                yield ("attention_bwd", bits, S, D), options, lambda impl, x=qkv, f=attend: grads(f, [x], impl)
    rows = [Rows(n, warps) for n in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8, 16)]
    for C in (384, 512, 768, 1024):
        x, residual, weight, bias = draw(TOKENS, C), draw(TOKENS, C), draw(C), draw(C)
        norm = lambda x, r, w, b, impl: add_layer_norm(x, r, w, b, impl=impl)[0]  # noqa: E731
        tensors, block = [x, residual, weight, bias], 1 << (C - 1).bit_length()
        yield ("add_layer_norm_fwd", block), rows, lambda impl, t=tensors, f=norm: [f(*t, impl)]
        yield ("add_layer_norm_bwd", block), rows, lambda impl, t=tensors, f=norm: grads(f, t, impl)
        index = torch.randperm(TOKENS, device="cuda")
        loss = lambda p, impl, m=residual, i=index: latent_l2_loss(p, m, i, impl=impl)  # noqa: E731
        yield ("latent_l2_loss_fwd", block), rows, lambda impl, p=x, f=loss: grads(f, [p], impl)
        hidden, bias = draw(TOKENS, 4 * C), draw(4 * C)
        gelu = lambda x, b, impl: bias_gelu(x, b, impl=impl)  # noqa: E731
        block = min(4 * C & -(4 * C), 1024)
        yield ("bias_gelu_fwd", block), rows, lambda impl, t=(hidden, bias), f=gelu: [f(*t, impl)]
        yield ("bias_gelu_bwd", block), rows, lambda impl, t=(hidden, bias), f=gelu: grads(f, t, impl)


def grads(function: Callable, tensors, impl: str) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, impl)
    return list(torch.autograd.grad(out, leaves, torch.ones_like(out)))


def milliseconds(function: Callable[[], object], repeats: int = 20) -> float:
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def fastest(key: tuple, candidates: list, run: Callable, entries: dict[tuple, object], time=milliseconds):
    """(configuration, its time, the present one's time); the configuration is None where nothing beats the present."""
    want = run("reference")

    def timed(config=None) -> float:
        entries.pop(key, None)
        if config is not None:
            entries[key] = config
        try:
            for got, right in zip(run("triton"), want, strict=True):
                if not (got.double() - right.double()).norm() <= 0.02 * right.double().norm():
                    return float("inf")
            return time(lambda: run("triton"))
        except (TritonError, RuntimeError, AssertionError):  # does not fit, or does not compile
            return float("inf")

    present = timed()
    best = min(((timed(config), config) for config in candidates), key=lambda x: x[0], default=(present, None))
    entries.pop(key, None)
    return (best[1], best[0], present) if best[0] < GAIN * present else (None, present, present)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="tune the operations whose name contains this")
    only = parser.parse_args().only
    if not torch.cuda.is_available():
        print("tune: no CUDA device here: the configurations stay as they are", file=sys.stderr)
        return 2
    model = _tuned.model(torch.cuda.current_device())
    if not model:
        print(f"tune: no model in the name {torch.cuda.get_device_name()!r}: nothing to file it under", file=sys.stderr)
        return 2
    entries = _tuned.TIMED.setdefault(model, {})
    _tuned._tables.cache_clear()
    for key, candidates, run in cases():
        attention = key[0].startswith("attention")
        if only not in key[0] or (attention and _tuned.tuned(torch.empty(0, device="cuda"), *key) is None):
            continue
        config, best, present = fastest(key, candidates, run, entries)
        print(f"{key}: {present:.4f} ms" + (f" -> {best:.4f} ms, {config}" if config else ", kept"), flush=True)
        if config:
            entries[key] = config
        path = Path(_tuned.__file__)
        path.write_text(rewrite(path.read_text(), {m: e for m, e in _tuned.TIMED.items() if e}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
