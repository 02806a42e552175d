"""Compiles the launches that an operation would make on a given GPU, without one, and reads what the assembler made.

`python tests/aot.py` prints the table of every shipped configuration.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

ARCHS = (80, 90, 100)
SMALL_ARCHS = (86, 120)  # RTX, L4 and L40, RTX 50: an A100's products and less shared memory
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
# tensor-core instructions, by the width of the unit that runs them: warp, warp group, tensor memory
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA", "UTCQMMA")


@dataclass
class Report:
    kernel: str
    arch: int
    threads: int
    registers: int
    stack: int
    spills: int  # local-memory loads and stores in the machine code
    shared: int
    tensor_core: int
    warp_group: int  # those of Hopper's and Blackwell's own units
    wide: int  # 16-byte loads
    order: str  # of these loads, "L", or "a" where asynchronous, and of what waits for one, "w"
    stages: int  # of the loops' software pipelines

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds: 64 Ki registers; shared memory of 164, 100 (sm_86, sm_120) or 228 KiB."""
        registers = self.threads * -(-self.registers // 8) * 8
        shared = {80: 164, 86: 100, 120: 100}.get(self.arch, 228) * 1024
        threads, most = {86: (1536, 16), 120: (1536, 24)}.get(self.arch, (2048, 32))
        return min(65536 // registers, shared // (self.shared + 1024), threads // self.threads, most)

    @property
    def together(self) -> int:
        """16-byte loads that are issued before anything waits for one of them."""
        return len(re.match("L*", self.order.lstrip("a"))[0])

    @property
    def apart(self) -> bool:
        """Does anything wait for a load between the first 16-byte load and the last?"""
        return "w" in self.order[self.order.find("L") : self.order.rfind("L")]


def _specialise(kernel, args, options):
    """Signature, constants and attributes that Triton's own launcher would derive."""
    bound = dict(zip(kernel.arg_names, args, strict=False))
    bound |= {name: x for name, x in options.items() if name in kernel.arg_names}
    constexpr = {kernel.arg_names[i] for i in kernel.constexprs}
    signature: dict[str, str] = {}
    constants: dict = {}
    aligned = []
    counts = {p.name for p in kernel.params if p.do_not_specialize}
    anywhere = {p.name for p in kernel.params if p.do_not_specialize_on_alignment}
    for name, x in bound.items():
        if name in counts and x is not None:
            signature[name] = "i32"
        elif name in constexpr or x is None or (isinstance(x, int) and not isinstance(x, bool) and x == 1):
            signature[name], constants[name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name] = "*" + _TYPES[x.dtype]
            # unlike views into one buffer, a fresh allocation is aligned; a view is where its offset is
            if x.storage_offset() * x.element_size() % 16 == 0 and name not in anywhere:
                aligned.append(name)
        elif isinstance(x, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            if x % 16 == 0:
                aligned.append(name)
    place = kernel.arg_names.index
    return (
        signature,
        {(place(n),): v for n, v in constants.items()},
        {(place(n),): [["tt.divisibility", 16]] for n in aligned},
    )


def _order(code: str) -> str:
    """As in `Report`: a load is waited for by the first instruction that names a register it loads into."""
    order, loading = "", set()
    for instruction in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*)", code, re.M):
        if "LDGSTS" in instruction:
            order += "a"
        elif load := re.search(r"\bLDG\S*\.128\S* R(\d+),", instruction):
            order += "L"
            loading |= set(range(int(load[1]), int(load[1]) + 4))
        elif used := loading & {int(r) for r in re.findall(r"\bR(\d+)\b", instruction)}:
            order += "w"
            loading -= used
    return order


def compile_launch(kernel, args, options, arch: int) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import __file__ as backend
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialise(kernel, args, options)
    options = {k: v for k, v in options.items() if k not in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = os.path.join(os.path.dirname(backend), "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        read = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = read([f"{tools}/cuobjdump", "--dump-resource-usage", file.name]).stdout
        code = read([f"{tools}/nvdisasm", "-c", file.name]).stdout
    count = lambda *names: len(re.findall(rf"\b(?:{'|'.join(names)})\b", code))  # noqa: E731
    return Report(
        kernel.__name__, arch, 32 * compiled.metadata.num_warps, int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]), count("STL", "LDL"), compiled.metadata.shared, count(*TENSOR_CORE),
        count(*TENSOR_CORE[1:]), len(re.findall(r"\bLDG\S*\.128", code)),
        _order(code), compiled.metadata.num_stages,
    )  # fmt: skip


def reports(case, arch: int) -> list[Report]:
    """`case`: a function and its arguments; every launch that it makes is compiled for `arch`."""
    from ajepa_kernels._triton import record_launches

    function, *args = case
    with record_launches(arch) as launches:
        function(*args)
    return [compile_launch(*launch, arch) for launch in launches]


def compile_all(cases: dict, archs=ARCHS, workers: int | None = None) -> dict:
    """{(name of the case, arch): reports}, compiled in parallel processes."""
    jobs = [(name, arch) for name in cases for arch in archs]
    with ProcessPoolExecutor(workers or min(os.cpu_count() or 1, 8)) as pool:
        results = pool.map(reports, [cases[name] for name, _ in jobs], [arch for _, arch in jobs])
        return dict(zip(jobs, results, strict=True))


# --- the shipped configurations ---------------------------------------------------------------------------------------

META = {"device": "meta"}


def attention(S: int, D: int, dtype: torch.dtype, tf32: bool = False, cross: bool = False) -> None:
    """cross: q, k, v apart, and keys of other lengths."""
    from ajepa_kernels.attention.inputs import Inputs
    from ajepa_kernels.attention.layout import make_layout
    from ajepa_kernels.attention.ops import _masked_attention_bwd, _masked_attention_fwd

    qkv, cu = torch.empty(4 * S, 3, 12, D, dtype=dtype, **META), torch.empty(5, dtype=torch.int32, **META)
    operands = [x.contiguous() for x in qkv.unbind(1)] if cross else [qkv, None, None]
    keys = {"cu_seqlens_k": cu, "max_seqlen_k": S} if cross else {}
    inputs = Inputs(operands[0], *operands[1:], cu_seqlens=cu, max_seqlen=S, **keys)
    arguments = (*make_layout(inputs), 0.125, tf32)
    out, lse = _masked_attention_fwd(*operands, *arguments)
    _masked_attention_bwd(out, *operands, out, lse, not cross, *arguments)


def attention_gathered(S: int, D: int, dtype: torch.dtype) -> None:
    from ajepa_kernels.attention.layout import Layout
    from ajepa_kernels.attention.ops import _masked_attention_bwd, _masked_attention_fwd

    qkv, rows = torch.empty(4 * S, 3, 12, D, dtype=dtype, **META), torch.empty(4 * S, dtype=torch.int64, **META)
    start = torch.empty(4, dtype=torch.int64, **META)
    arguments = (*Layout(start, start, rows, None, None, None, S, S, 4 * S, True), 0.125, False)
    out, lse = _masked_attention_fwd(qkv, None, None, *arguments)
    _masked_attention_bwd(out, qkv, None, None, out, lse, False, *arguments)


def attention_turned(
    S: int, D: int, dtype: torch.dtype, pairs: int, channels: bool = False, interleaved: bool = True, causal: int = 0
) -> None:
    """With rotary tables `[S, .]` that all samples share, of an angle for each pair or each channel; pairs 0: none."""
    from ajepa_kernels.attention.inputs import Inputs
    from ajepa_kernels.attention.layout import make_layout
    from ajepa_kernels.attention.ops import _masked_attention_bwd, _masked_attention_fwd
    from ajepa_kernels.attention.rotary import Rotary, make_tables

    qkv, tables = torch.empty(4, S, 3, 12, D, dtype=dtype, **META), ()
    inputs = Inputs(qkv, causal=causal)
    if pairs:
        table = torch.empty(S, pairs * (1 + channels), **META)
        tables = make_tables(inputs, Rotary(table, table, interleaved, pairs), None)
    operands, arguments = (qkv.flatten(0, 1), None, None), (*make_layout(inputs), 0.125, False, *tables)
    out, lse = _masked_attention_fwd(*operands, *arguments)
    _masked_attention_bwd(out, *operands, out, lse, False, *arguments)


def loss(C: int, kind: str, dtype: torch.dtype) -> None:
    from ajepa_kernels.latent_loss import _latent_l2_loss_bwd, _latent_l2_loss_fwd

    prediction, index = torch.empty(4096, C, dtype=dtype, **META), torch.empty(4096, dtype=torch.int64, **META)
    _, grad = _latent_l2_loss_fwd(prediction, prediction, index, kind, True, 1e-6, 1.0, True)
    for upstream in (torch.empty((), **META), torch.empty(4096, **META)):
        _latent_l2_loss_bwd(grad, upstream, 1.0)


def loss_of_samples(C: int, kind: str, dtype: torch.dtype) -> None:
    """Of samples without their class token, weighted."""
    from ajepa_kernels.latent_loss import _latent_l2_loss_bwd, _latent_l2_loss_fwd

    latents = torch.empty(64, 197, C, dtype=dtype, **META)[:, 1:]
    prediction, index = torch.empty(4096, C, dtype=dtype, **META), torch.empty(4096, dtype=torch.int64, **META)
    weights = torch.empty(4096, **META)
    options = (kind, True, 1e-6, 1.0, True, 0.5 if kind == "smooth_l1" else 1.0, weights, 16)
    _, grad = _latent_l2_loss_fwd(prediction, latents, index, *options)
    _latent_l2_loss_bwd(grad, weights, 1.0)


def layer_norm(
    C: int, dtype: torch.dtype, stream: torch.dtype, affine: bool = True, gradient: torch.dtype | None = None
) -> None:
    """gradient: dtype of the gradient of the stream. The first residual is read from a table by row."""
    from ajepa_kernels.layer_norm import _add_layer_norm_bwd, _add_layer_norm_fwd

    x, residual = torch.empty(4096, C, dtype=dtype, **META), torch.empty(4096, C, dtype=stream, **META)
    weight, bias_dtype = (torch.empty(C, **META), torch.float32) if affine else (None, None)
    rows = torch.empty(4096, dtype=torch.int64, **META) if gradient else None
    normed, total, mean, rstd = _add_layer_norm_fwd(x, residual, rows, weight, weight, 1e-5, dtype)
    gradient = total.dtype if gradient is None else gradient
    dtypes = (dtype, gradient, bias_dtype, bias_dtype)
    _add_layer_norm_bwd(normed, total.to(gradient), total, mean, rstd, weight, *dtypes)


def scaled_norm(C: int, dtype: torch.dtype, stream: torch.dtype, rms: bool = False, gamma: bool = True) -> None:
    """With LayerScale (gamma), drop path and the bias of the layer before."""
    from ajepa_kernels.layer_norm import _add_layer_norm_bwd, _add_layer_norm_fwd

    x, residual = torch.empty(4096, C, dtype=dtype, **META), torch.empty(4096, C, dtype=stream, **META)
    weight, kept = torch.empty(C, **META), torch.empty(64, **META)
    bias, bias_dtype = (None, None) if rms else (weight, torch.float32)
    normed, *saved = _add_layer_norm_fwd(
        x, residual, None, weight, bias, 1e-5, dtype, rms, weight if gamma else None, kept
    )
    dtypes = (dtype, stream, bias_dtype, torch.float32)
    _add_layer_norm_bwd(normed, saved[0], *saved, weight, *dtypes, rms, *((x, weight) if gamma else (None, None)), kept)


def gelu(C: int, approximate: str, dtype: torch.dtype) -> None:
    from ajepa_kernels.bias_gelu import _bias_gelu_bwd, _bias_gelu_fwd

    x, bias = torch.empty(4096, C, dtype=dtype, **META), torch.empty(C, **META)
    _bias_gelu_bwd(_bias_gelu_fwd(x, bias, approximate == "tanh", dtype), x, bias, approximate == "tanh")


def gated(C: int, dtype: torch.dtype, biases: bool = True) -> None:
    """Both halves of one tensor."""
    from ajepa_kernels.swiglu import _swiglu_bwd, _swiglu_fwd

    x, bias = torch.empty(4096, 2 * C, dtype=dtype, **META), torch.empty(C, **META) if biases else None
    _swiglu_bwd(_swiglu_fwd(x, None, bias, bias, dtype), x, None, bias, bias)


def optimizer(
    remainder: bool, ema_copy: torch.dtype = torch.bfloat16, ema_on_skip: bool = False, grad: torch.dtype | None = None
) -> None:
    from ajepa_kernels._adamw_ema import _adamw_ema
    from ajepa_kernels.ema_update import _ema_update

    draw = lambda dtype: [torch.empty(768, 768, dtype=dtype, **META)]  # noqa: E731
    weights, scalar = torch.bfloat16 if remainder else torch.float32, torch.empty((), **META)
    params, emas, remainders = draw(weights), draw(torch.float32), draw(torch.int16) if remainder else []
    scalings = [torch.empty(8, **META)] if ema_copy == torch.float8_e4m3fn else []
    _adamw_ema(
        params, draw(grad or weights), draw(torch.float32), draw(torch.float32), [scalar], remainders, emas, [],
        draw(ema_copy), scalings, [scalar], [0 if remainder else -1, 0, -1, 0, 0, len(scalings) - 1], [0, -1],
        [0.9, 0.999, 1e-8, 0.0, 0.05, 1.0], scalar, scalar, scalar, 0.0, ema_on_skip,
    )  # fmt: skip
    _ema_update(emas, params, scalar, 0.0)


def augment(M: int, T: int, patch: tuple[int, int], dtype: torch.dtype) -> None:
    from ajepa_kernels.augment_mel import _augment_mel_fwd

    mel, lengths = torch.empty(64, M, 400, **META), torch.empty(64, dtype=torch.int32, **META)
    views = [torch.empty(128, k, **META) for k in (2, 1, 2, 2, 5)]
    clip = torch.empty(128, 2, dtype=torch.int32, **META)
    for ragged in (None, lengths):
        _augment_mel_fwd(mel, ragged, clip, *views, patch, T, 1e-7, 0.2, 1.0, dtype)


def pool(C: int, dtype: torch.dtype) -> None:
    from ajepa_kernels.segment_pool import _segment_pool_bwd, _segment_pool_fwd

    x, cu = torch.empty(4096, C, dtype=dtype, **META), torch.empty(513, dtype=torch.int32, **META)
    out = _segment_pool_fwd(x, cu, 1e-5)
    _segment_pool_bwd(out, x, cu, out)


def gaussian(D: int, S: int, dtype: torch.dtype) -> None:
    from ajepa_kernels.sigreg import _sigreg_bwd, _sigreg_directions, _sigreg_fwd, _sigreg_statistic

    z, scalar = torch.empty(2, 1024, D, dtype=dtype, **META), torch.empty((), **META)
    directions = _sigreg_directions(torch.empty((), dtype=torch.int64, **META), S, D, dtype)
    products, sums = _sigreg_fwd(z, directions, 17, 3.0)
    for count in (None, scalar):  # of one rank, of all
        _, coefficients = _sigreg_statistic(sums, count, 1024, 3.0)
    _sigreg_bwd(scalar, products, directions, coefficients, 1024, 3.0)


B, F = torch.bfloat16, torch.float32
SIZES = ((16, 32), (64, 64), (77, 64), (128, 32), (128, 64), (128, 128), (300, 64))
SIZES += ((64, 80), (300, 256))
# head dims are compiled as the next of 32, 64, 128 and 256, float16 as bfloat16
CORE = {
    **{f"attention {S} x {D}": (attention, S, D, B) for S, D in SIZES},
    "attention 64 x 64 gathered": (attention_gathered, 64, 64, B),
    "attention 64 x 64 cross fp16": (attention, 64, 64, torch.float16, False, True),
    "rotary attention 64 x 64": (attention_turned, 64, 64, B, 30, True),
    "rotary causal attention 300 x 64": (attention_turned, 300, 64, B, 30, True, True, 196),
    "attention 32 x 64 fp32": (attention, 32, 64, F),
    "attention 32 x 64 tf32": (attention, 32, 64, F, True),
    "loss 768": (loss, 768, "l2", B),
    "loss 768 of samples": (loss_of_samples, 768, "l1", B),
    "layer norm 768": (layer_norm, 768, B, F),
    "layer norm 768 bf16 gradient": (layer_norm, 768, B, F, True, B),
    "scaled norm 768": (scaled_norm, 768, B, F),
    "scaled norm 1024 rms": (scaled_norm, 1024, B, F, True),
    "bias gelu 3072": (gelu, 3072, "none", B),
    "bias gelu 3072 fp32": (gelu, 3072, "none", F),  # spilled once
    "swiglu 2048": (gated, 2048, B),
    "optimizer": (optimizer, False),
    "optimizer on skip": (optimizer, False, B, True),
    "augment mel 128 x 256": (augment, 128, 256, (16, 16), B),
    "segment pool 768": (pool, 768, B),
    "sigreg 768": (gaussian, 768, 1024, B),
    "sigreg 128 fp32": (gaussian, 128, 256, F),
}
REST = {
    **{f"attention {S} x {D}": (attention, S, D, B) for S in (16, 32, 64, 77, 96, 128, 300) for D in (32, 64, 96, 128)},
    **{f"attention {S} x {D} fp32": (attention, S, D, F) for S in (16, 32, 64, 300) for D in (32, 64, 128)},
    **{f"attention {S} x {D} tf32": (attention, S, D, F, True) for S in (16, 64, 300) for D in (32, 64)},
    **{f"attention {S} x {D} gathered": (attention_gathered, S, D, B) for S in (96, 128, 300) for D in (64, 96, 128)},
    **{f"attention {S} x 64 cross": (attention, S, 64, B, False, True) for S in (16, 96, 128, 300)},
    # one masked head dim for each width of a tile; 96 is that of 128 above
    **{f"attention {S} x {D}": (attention, S, D, B) for S in (16, 64, 77, 128, 300) for D in (24, 40)},
    **{f"attention {S} x {D}": (attention, S, D, B) for S, D in ((77, 80), (128, 88), (300, 104))},
    **{f"attention {S} x {D}": (attention, S, D, B) for S in (16, 32, 64, 300) for D in (200, 256)},
    **{f"attention {S} x 200 gathered": (attention_gathered, S, 200, B) for S in (64, 300)},
    **{f"attention {S} x 200 cross": (attention, S, 200, B, False, True) for S in (64, 300)},
    **{f"attention {S} x {D} fp32": (attention, S, D, F) for S in (16, 300) for D in (40, 80, 200)},
    **{f"attention {S} x 200 tf32": (attention, S, 200, F, True) for S in (16, 300)},
    **{f"attention 64 x {D} fp32 gathered": (attention_gathered, 64, D, F) for D in (32, 64)},
    **{
        f"rotary attention {S} x {D}{' halves' * (not adjacent)}": (
            attention_turned,
            S,
            D,
            B,
            D // 6 * 3,
            True,
            adjacent,
        )
        for S in (16, 32, 64, 77, 96, 128, 300)
        for D in (32, 64, 128)
        for adjacent in (True, False)
    },
    **{f"rotary attention {S} x 80": (attention_turned, S, 80, B, 39, True) for S in (64, 300)},
    **{f"rotary attention {S} x 256": (attention_turned, S, 256, B, 30, True) for S in (16, 300)},
    "rotary attention 300 x 256 fp32": (attention_turned, 300, 256, F, 30, True),
    **{f"rotary attention {S} x 64 pairs": (attention_turned, S, 64, B, 32) for S in (64, 77, 128, 300)},
    **{f"rotary attention {S} x 64 fp32": (attention_turned, S, 64, F, 30, True) for S in (16, 32, 300)},
    **{f"rotary causal attention {S} x 64": (attention_turned, S, 64, B, 30, True, True, 16) for S in (64, 77, 128)},
    **{
        f"causal attention {S} x {D}": (attention_turned, S, D, B, 0, False, True, 1)
        for S in (16, 64, 77, 128, 300)
        for D in (32, 64, 128)
    },
    **{f"loss {C} {k}": (loss, C, k, B) for C, k in ((384, "l2"), (768, "cosine"), (1024, "smooth_l1"), (4096, "l2"))},
    "loss 4096 of samples": (loss_of_samples, 4096, "smooth_l1", B),
    **{f"layer norm {C}": (layer_norm, C, B, F) for C in (384, 1024, 2048, 4096)},
    **{f"layer norm {C} fp32": (layer_norm, C, F, F) for C in (768, 2048, 4096)},
    **{f"scaled norm {C}": (scaled_norm, C, B, F) for C in (384, 1408, 2048, 4096)},
    **{f"scaled norm {C} fp32": (scaled_norm, C, F, F) for C in (768, 4096)},
    "scaled norm 768 drop path": (scaled_norm, 768, B, F, False, False),
    "scaled norm 768 bf16": (scaled_norm, 768, B, B),
    "layer norm 768 bare": (layer_norm, 768, B, B, False),
    **{f"bias gelu {C} {a}": (gelu, C, a, B) for C, a in ((1536, "none"), (3072, "tanh"), (1000, "tanh"))},
    **{f"swiglu {C} fp32": (gated, C, F) for C in (2048, 1000)},
    "swiglu 3072 bare": (gated, 3072, B, False),
    "optimizer remainder": (optimizer, True),
    "optimizer bf16 gradients": (optimizer, False, B, False, B),
    "optimizer bf16 gradients fp8": (optimizer, False, torch.float8_e4m3fn, False, B),
    "optimizer remainder on skip": (optimizer, True, B, True),
    "augment mel 64 x 64 fp32": (augment, 64, 64, (8, 8), F),
    "augment mel 80 x 101": (augment, 80, 101, (5, 3), torch.float16),
    **{f"segment pool {C}{' fp32' * (t is F)}": (pool, C, t) for C, t in ((384, B), (1280, B), (128, F), (768, F))},
    **{f"sigreg {D} fp32": (gaussian, D, S, F) for D, S in ((768, 1024), (100, 33), (4096, 256))},
}
REST = {name: case for name, case in REST.items() if name not in CORE}


# compiled for the GPUs with less shared memory as well
SMALL = {name: CORE[name] for name in ("attention 64 x 64", "attention 77 x 64", "attention 128 x 128", "loss 768")}
SMALL |= {"attention 300 x 256": CORE["attention 300 x 256"]}
SMALL |= {name: (REST | CORE)[name] for name in ("rotary attention 64 x 64", "rotary attention 300 x 128")}
SMALL |= {"layer norm 4096 fp32": REST["layer norm 4096 fp32"]}


def table(results: dict) -> str:
    lines = ["| Case | sm | Kernel | Threads | Registers | Spills | Shared | Tensor core | Blocks/SM |"]
    lines.append("|" + "---|" * 9)
    for (name, arch), reported in results.items():
        for r in reported:
            lines.append(
                f"| {name} | {arch} | `{r.kernel}` | {r.threads} | {r.registers} | {r.spills} | {r.shared} "
                f"| {r.tensor_core} | {r.blocks} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(compile_all(CORE | REST, (*ARCHS, 120)) | compile_all(SMALL, (86,))))
