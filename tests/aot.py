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
_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
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

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor holds: 64 Ki registers; 164 KiB of shared memory on sm_80, 228 KiB after."""
        registers = self.threads * -(-self.registers // 8) * 8
        shared = (164 if self.arch == 80 else 228) * 1024
        return min(65536 // registers, shared // (self.shared + 1024), 2048 // self.threads, 32)


def _specialise(kernel, args, options):
    """Signature, constants and attributes that Triton's own launcher would derive."""
    bound = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in options.items() if k in kernel.arg_names}
    constexpr = {kernel.arg_names[i] for i in kernel.constexprs}
    signature, constants, aligned = {}, {}, []
    for name, x in bound.items():
        if name in constexpr or x is None or (isinstance(x, int) and not isinstance(x, bool) and x == 1):
            signature[name], constants[name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name] = "*" + _TYPES[x.dtype]
            # unlike views into one buffer, a fresh allocation is aligned; a view is where its offset is
            if x.storage_offset() * x.element_size() % 16 == 0:
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
