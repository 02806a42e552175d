"""Times candidate configurations of every Triton operation on this GPU, and keeps the fastest of them in a table.

`python benchmarks/tune.py` tunes one size after the other, those of the audio-jepa recipe first. After each size it
rewrites the timed part of kernels/ajepa_kernels/_tuned.py for this GPU's model. `--minutes 20` stops it after 20
minutes. A candidate is kept if its result agrees with the plain definition's and it is 2 % faster than the present
configuration.
"""

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from triton.errors import TritonError

from ajepa_kernels import _tuned, add_layer_norm, bias_gelu, latent_l2_loss, masked_attention
from ajepa_kernels._tuned import LONG, Rows, Tiles

TOKENS, HEADS, GAIN = 65536, 12, 0.98
LENGTHS = (16, 32, 64, 80, 96, 128, LONG)
REGISTERS = 255  # a thread has at most so many
Case = tuple[tuple, list, Callable[[str], list[torch.Tensor]]]  # key, candidates, function of impl


def rewrite(source: str, timed: dict[str, dict[tuple, object]]) -> str:
    """Return `source`, the text of _tuned.py, with `timed` in place of its timed entries."""
    lines = ["TIMED: dict[str, dict[tuple, Any]] = {"]
    for model, entries in sorted(timed.items()):
        lines.append(f'    "{model}": {{')
        for key, config in sorted(entries.items()):
            names = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
            lines.append(f"        ({names}): {type(config).__name__}({', '.join(map(str, config))}),")
        lines.append("    },")
    new = "\n".join([*lines, "}"]) if timed else lines[0] + "}"
    return re.sub(r"^TIMED: .*?(?=\n# --- end ---)", lambda _: new, source, flags=re.S | re.M)


def tiles(op: str, bits: int, S: int, D: int, shared: int) -> list[Tiles]:
    """Return candidates that fit into the registers and into `shared` bytes per block.

    This is decided by arithmetic, because compiling a candidate takes seconds.
    """
    back, size = op == "attention_bwd", bits // 8
    wide = D == 256  # rows are so long that tiles hold fewer of them
    least = (2 if bits == 32 else 4 if S == 16 else 8) >> wide  # the fewest scores of a thread
    tail = S - 64 if 64 < S < 128 else 0
    if tail and bits == 32:
        return []
    keys = (16, 32, 64, 128)[bits == 16 or not wide :] if S == LONG else (64,) if tail else (S,)
    # with few queries, keys are read often
    queries = (32, 64, 128) if S == LONG and bits == 16 and not wide else (16, 32, 64, 128)
    found = []
    for q, k, warps in ((q, k, w) for k in keys for q in queries for w in (1, 2, 4, 8)):
        threads = 32 * warps
        if q > k and S != LONG and not tail:
            continue
        if bits == 16 and S >= 64 and q < (64 if not back else 128 if tail else 16):
            continue  # keys would be read often; backward, the queries of tiles with a tail are one tile
        k += tail
        # The float32 registers of a thread hold scores (two kinds in the backward pass) and sums: out in the forward
        # pass; dk and dv, and dq in turn, in the backward pass.
        scores = q * k / threads
        sums = (2 * k + q if q < k or S == LONG else k) * D / threads if back else q * D / threads
        if not (least <= scores <= 128 and (1 + back) * scores + sums < 0.9 * REGISTERS):
            continue
        loops = bits == 16 and S >= 64 and not (back and q < k)  # over heads
        for stages in (1, 2, 3) if S == LONG and bits == 16 else (1, 2, 3)[: 2 + (D == 32)] if loops else (1,):
            tiles = 2 * (q + k) if back else q + 2 * k
            held = tiles * stages if loops else tiles if back else q + 2 * k * stages
            if (held * D + (q * k if back else 0)) * size > shared:
                continue
            heads = HEADS if loops and stages > 1 else 1
            found.append(Tiles(q, k - tail, warps, stages, None, tail, heads))
            if S >= 64:  # a bound on the registers changes the order of the loads, or makes room for two programs
                bound = 128 if stages > 1 and warps == 8 else min(REGISTERS, 65536 // threads)
                found.append(Tiles(q, k - tail, warps, stages, bound, tail, heads))
    return found


def rows(op: str, block: int) -> list[Rows]:
    """Return candidates with 4 to 32 channels per thread, or 16 in the backward pass of GELU, which also holds sums."""
    back = op in ("add_layer_norm_bwd", "bias_gelu_bwd")
    return [
        Rows(n, warps, stages)
        for n in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8)
        if 4 <= n * block / (32 * warps) <= (16 if op == "bias_gelu_bwd" else 32)
        for stages in ((1, 2, 3) if back else (1,))
    ]  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the recipe's cases before others. A backward pass is timed with its forward pass, which is tuned first."""
    recipe = [(16, S, D) for S in (64, 80, 128) for D in (64, 32)]
    every = [(bits, S, D) for bits in (16, 32) for D in (32, 64, 128, 256) for S in LENGTHS]
    for size in recipe:
        yield from attention(*size)
    for C in (768, 384):
        yield from on_rows(C)
    for size in every:
        if size not in recipe:
            yield from attention(*size)
    yield from on_rows(1280)


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def attention(bits: int, S: int, D: int) -> Iterator[Case]:
    x = torch.empty(0, device="cuda")
    length, shared = S or 512, torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin
    tile = 128 if S in (80, 96) else S
    if any(_tuned.tuned(x, op, bits, tile, D) is None for op in ("attention_fwd", "attention_bwd")):
        return  # this size does not run in one launch
    sequences = TOKENS // length
    cu = length * torch.arange(sequences + 1, device="cuda", dtype=torch.int32)
    qkv = draw(sequences * length, 3, HEADS, D, dtype=torch.bfloat16 if bits == 16 else torch.float32)
    attend = lambda x, impl: masked_attention(x, cu_seqlens=cu, max_seqlen=length, impl=impl)  # noqa: E731
    forward = lambda impl: [attend(qkv, impl)]  # noqa: E731
    for op, run in (("attention_fwd", forward), ("attention_bwd", lambda impl: grads(attend, [qkv], impl))):
        yield (op, bits, S, D), tiles(op, bits, S, D, shared), run


def on_rows(C: int) -> Iterator[Case]:
    x, residual, weight, bias = draw(TOKENS, C), draw(TOKENS, C), draw(C), draw(C)
    hidden, hidden_bias = draw(TOKENS, 4 * C), draw(4 * C)
    index = torch.randperm(TOKENS, device="cuda")
    norm = lambda x, r, w, b, impl: add_layer_norm(x, r, w, b, impl=impl)[0]  # noqa: E731
    loss = lambda p, impl: latent_l2_loss(p, residual, index, impl=impl)  # noqa: E731
    gelu = lambda x, b, impl: bias_gelu(x, b, impl=impl)  # noqa: E731
    block, block_gelu = 1 << (C - 1).bit_length(), min(4 * C & -(4 * C), 1024)
    stream, mlp = [x, residual, weight, bias], [hidden, hidden_bias]
    runs = {
        ("add_layer_norm_fwd", block): lambda impl: [norm(*stream, impl)],
        ("add_layer_norm_bwd", block): lambda impl: grads(norm, stream, impl),
        ("latent_l2_loss_fwd", block): lambda impl: grads(loss, [x], impl),
        ("bias_gelu_fwd", block_gelu): lambda impl: [gelu(*mlp, impl)],
        ("bias_gelu_bwd", block_gelu): lambda impl: grads(gelu, mlp, impl),
    }
    for key, run in runs.items():
        yield key, rows(*key), run


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


def fastest(
    key: tuple,
    candidates: list,
    run: Callable,
    entries: dict[tuple, object],
    time_of=milliseconds,
    deadline=float("inf"),
):
    """Return (configuration, its time, the time of the present one), or None as configuration if none is faster.

    No candidate is tried after `deadline`, a value of `time.monotonic`.
    """
    want = run("reference")

    def timed(config=None) -> float:
        entries.pop(key, None)
        if config is not None:
            entries[key] = config
        try:
            for got, right in zip(run("triton"), want, strict=True):
                if not (got.double() - right.double()).norm() <= 0.02 * right.double().norm():
                    return float("inf")
            return time_of(lambda: run("triton"))
        except (TritonError, RuntimeError, AssertionError):  # the candidate does not fit, or does not compile
            return float("inf")
        finally:
            entries.pop(key, None)

    present = timed()
    times = ((timed(config), config) for config in candidates if time.monotonic() < deadline)
    best = min(times, key=lambda x: x[0], default=(present, None))
    return (best[1], best[0], present) if best[0] < GAIN * present else (None, present, present)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="tune only the operations whose name contains this")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many, keep what was found")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune: this machine has no CUDA device, so the configurations stay as they are", file=sys.stderr)
        return 2
    model = _tuned.model(torch.cuda.current_device())
    if not model:
        name = torch.cuda.get_device_name()
        print(f"tune: {name!r} names no known GPU model, so the configurations stay as they are", file=sys.stderr)
        return 2
    entries, path = _tuned.TIMED.setdefault(model, {}), Path(_tuned.__file__)
    _tuned._tables.cache_clear()
    deadline, done = time.monotonic() + 60 * args.minutes, set()
    for key, candidates, run in cases():
        if args.only not in key[0] or key in done:
            continue
        if time.monotonic() > deadline:
            print(f"tune: {args.minutes:g} minutes are over before {key}", flush=True)
            break
        done.add(key)
        if key in entries:  # from an earlier run
            candidates = [entries[key], *candidates]
        config, best, present = fastest(key, candidates, run, entries, deadline=deadline)
        print(f"{key}: {present:.4f} ms" + (f" -> {best:.4f} ms, {config}" if config else ", kept"), flush=True)
        if config:
            entries[key] = config
            path.write_text(rewrite(path.read_text(), {m: e for m, e in _tuned.TIMED.items() if e}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
