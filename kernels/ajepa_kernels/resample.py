"""Resampling of PCM by a linear-phase windowed sinc: whole recordings, slices or streams, with channels averaged.

Shapes: B clips, T samples, C channels, M outputs.
"""

import functools
import math
import operator
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ajepa_kernels import _extension
from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._triton import constant

MAX_RATE = 384_000
MAX_RATIO = 1000  # of the input rate to the output rate; the filter has 142 taps times this ratio
PASS_EDGE, STOP_EDGE = 0.9, 1.0  # shares of the lower Nyquist frequency
ATTENUATION = 110.0  # dB in the stop band
KAISER_BETA = 0.1102 * (ATTENUATION - 8.7)
KAISER_PEAK = float(torch.special.i0(torch.tensor(KAISER_BETA, dtype=torch.float64, device="cpu")))
TAP_GROUP = 16  # equal to kTapGroup in csrc/resample.h
LARGEST_TABLE = 1 << 18  # values; a table that would be larger has fewer phases and is interpolated
PHASES = 1024  # per period of the lower rate, in an interpolated table; the interpolation error is -119 dB
LARGEST_TRANSFORM = 8192
PASS_COST = {2: 0.7, 3: 0.95, 4: 0.95, 5: 1.3, 7: 1.6, 8: 1.3}  # by radix, in ns per point of 8 lanes, fitted on Zen 4
IMPLS = ("auto", "fused", "soxr", "reference")


# --- the filter ---------------------------------------------------------------------------------------------------


class _Filter(NamedTuple):
    """h(t) = cutoff * sinc(cutoff * t) * kaiser(t / half_width), t in samples of the input."""

    up: int  # to_rate : from_rate in lowest terms
    down: int
    cutoff: float  # as a share of the input's Nyquist frequency
    half_width: float
    half: int  # half_width rounded up: output m depends on the inputs in (m * down / up - half, m * down / up + half)


class _Blocks(NamedTuple):
    """The overlapping blocks that are filtered as spectra. Of a block's size_in samples, hop * down / up are new."""

    size_in: int
    size_out: int
    hop: int  # outputs that a block contributes


class _Tables(NamedTuple):
    """The tables that the kernel reads. The direct method uses `rows`, the spectral method uses all others."""

    rows: torch.Tensor  # float32 [phases (+ 1 if interpolated), width]; on CUDA see _columns
    twiddles: torch.Tensor  # float32: [size / radix, radix - 1, 2] for every pass of both transforms
    response: torch.Tensor  # float32 [bins, 2]: complex gain of each bin that is kept
    positions: torch.Tensor  # int32 [bins, 2]: place of a bin after the first and before the second transform


def _filter(from_rate: int, to_rate: int) -> _Filter:
    common = math.gcd(from_rate, to_rate)
    up, down = to_rate // common, from_rate // common
    low = min(1.0, up / down)  # the lower Nyquist frequency, as a share of the input's
    transition = math.pi * (STOP_EDGE - PASS_EDGE) * low  # radians per sample
    half_width = ((ATTENUATION - 7.95) / (2.285 * transition) + 1) / 2  # Kaiser's estimate
    return _Filter(up, down, (PASS_EDGE + STOP_EDGE) / 2 * low, half_width, math.ceil(half_width))


def _sinc(t: torch.Tensor, filter: _Filter) -> torch.Tensor:
    """The filter h at the times `t`, in float64. Its integral is 1 within -110 dB."""
    position2 = (t / filter.half_width).square()
    window = torch.special.i0(KAISER_BETA * (1 - position2).clamp_min(0).sqrt()) / KAISER_PEAK
    return torch.where(position2 < 1, filter.cutoff * torch.sinc(filter.cutoff * t) * window, 0.0)


def _taps(phase: torch.Tensor, filter: _Filter) -> torch.Tensor:
    """Weights `[M, 2 * half]` of the inputs floor(t) - half + 1 to floor(t) + half, for t = floor(t) + phase."""
    steps = torch.arange(filter.half - 1, -filter.half - 1, -1, dtype=torch.float64, device=phase.device)
    return _sinc(phase[:, None] + steps, filter)


def _phases(filter: _Filter) -> tuple[int, bool]:
    """The number of phases in the direct method's table, and whether taps are interpolated between them."""
    if filter.up * 2 * filter.half <= LARGEST_TABLE:
        return filter.up, False
    return math.ceil(PHASES * min(1.0, filter.up / filter.down)), True


def _radices(size: int) -> list[int] | None:
    """Radices of a transform's passes, the largest first; None if `size` has a prime factor above 7."""
    found = []
    for prime in (7, 5, 3):
        while size % prime == 0:
            found.append(prime)
            size //= prime
    twos = size.bit_length() - 1
    if size != 1 << twos:
        return None
    found += [8] * (twos // 3 if twos % 3 != 1 else max(twos // 3 - 1, 0))
    found += {0: [], 1: [2] if twos == 1 else [4, 4], 2: [4]}[twos % 3]
    return sorted(found, reverse=True)


@lru_cache(maxsize=256)
def _blocks(filter: _Filter) -> _Blocks | None:
    """The block size with the least work per output; None if these rates need the direct method."""
    best, least = None, math.inf
    for periods in range(1, LARGEST_TRANSFORM // max(filter.up, filter.down) + 1):
        size_in, size_out = filter.down * periods, filter.up * periods
        new = (size_in - 2 * filter.half) // filter.down
        passes_in, passes_out = _radices(size_in), _radices(size_out)
        if new < 1 or not passes_in or not passes_out:
            continue
        work = size_in * (1.0 + sum(PASS_COST[radix] for radix in passes_in) + size_in / 12_000)
        work += size_out * (4.6 + sum(PASS_COST[radix] for radix in passes_out) + size_out / 12_000)
        work *= (1 + (size_in + size_out) / 100_000) / new  # long blocks leave more lanes of the last group unused
        if work < least:
            best, least = _Blocks(size_in, size_out, new * filter.up), work
    return best


def _make_rows(filter: _Filter) -> torch.Tensor:
    """`[phases (+ 1), width]`: the taps of each phase, padded with zeros to whole groups."""
    phases, interpolated = _phases(filter)
    rows = _taps(torch.arange(phases + interpolated, dtype=torch.float64) / phases, filter)
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % TAP_GROUP)).to(torch.float32)


def _columns(rows: torch.Tensor, filter: _Filter) -> torch.Tensor:
    """`[width, phases (+ 1)]`, as the CUDA kernel reads them. Without interpolation, columns are in the order of the
    outputs, so that neighbouring threads read neighbouring values."""
    if filter.up == filter.down:
        return rows
    if not _phases(filter)[1]:
        rows = rows[torch.arange(filter.up) * filter.down % filter.up]
    return rows.t()


def _twiddles(size: int) -> list[torch.Tensor]:
    parts = []
    for radix in _radices(size) or ():
        angles = torch.outer(
            torch.arange(size // radix, dtype=torch.float64), torch.arange(1, radix, dtype=torch.float64)
        ) * (-2 * math.pi / size)
        parts.append(torch.stack((angles.cos(), angles.sin()), -1).flatten())
        size //= radix
    return parts


def _places(bins: torch.Tensor, size: int) -> torch.Tensor:
    """The place at which a transform that decimates in frequency leaves each bin."""
    bins, place = bins % size, torch.zeros_like(bins)
    for radix in _radices(size) or ():
        size //= radix
        place += bins % radix * size
        bins = bins // radix
    return place


def _make_spectral(filter: _Filter, blocks: _Blocks) -> _Tables:
    highest = (min(blocks.size_in, blocks.size_out) - 1) // 2
    bins = torch.arange(-highest, highest + 1)
    fine = 32  # samples of h per input sample, so that h's spectrum repeats far above the stop band
    h = _sinc(torch.arange(fine * blocks.size_in, dtype=torch.float64) / fine - blocks.size_in / 2, filter)
    gain = torch.fft.rfft(h.roll(-fine * blocks.size_in // 2)).real[: highest + 1] / (fine * blocks.size_in)
    angles = bins.to(torch.float64) * (
        2 * math.pi * filter.half / blocks.size_in
    )  # outputs begin `half` samples into the block
    response = gain[bins.abs(), None] * torch.stack((angles.cos(), angles.sin()), -1)
    positions = torch.stack((_places(bins, blocks.size_in), _places(bins, blocks.size_out)), -1)
    order = positions[:, 1].argsort()
    twiddles = torch.cat(_twiddles(blocks.size_in) + _twiddles(blocks.size_out)).to(torch.float32)
    return _Tables(
        torch.empty(0), twiddles, response[order].to(torch.float32), positions[order].to(torch.int32).contiguous()
    )


@lru_cache(maxsize=32)
def _on_cpu(filter: _Filter, direct: bool) -> _Tables:
    # Cached tensors must be plain ones, neither inference tensors nor fake tensors.
    with torch.inference_mode(False), _disable_current_modes(), torch.device("cpu"):
        nothing = torch.empty(0)
        if filter.up == filter.down:
            return _Tables(nothing, nothing, nothing, nothing.to(torch.int32))
        blocks = None if direct else _blocks(filter)
        if blocks is not None:
            return _make_spectral(filter, blocks)
        return _Tables(_make_rows(filter), nothing, nothing, nothing.to(torch.int32))


# This cache is never emptied: captured CUDA graphs hold the addresses, and other streams may still be reading.
_on_device: dict[tuple, _Tables] = {}


def _tables(from_rate: int, to_rate: int, device: torch.device, cuda: bool) -> _Tables:
    filter = _filter(from_rate, to_rate)
    if not cuda:
        return _on_cpu(filter, False)
    key = (filter.up, filter.down, device)
    if key not in _on_device:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"resample: a CUDA graph is being captured, but the filter from {from_rate} to {to_rate} Hz is not on "
                f"{device} yet; call resample once with these rates before the capture"
            )
        tables = _on_cpu(filter, True)
        with torch.inference_mode(False), _disable_current_modes():
            rows = _columns(tables.rows, filter)
            _on_device.setdefault(key, _Tables(*(t.contiguous().to(device) for t in (rows, *tables[1:]))))
    return _on_device[key]


# torch.compile calls these two functions while tracing.


@constant
def _constant_tables(from_rate: int, to_rate: int, device: torch.device, cuda: bool) -> tuple[torch.Tensor, ...]:
    # Parameters, because their sizes stay numbers with dynamic=True; the sizes of constants have no source to guard.
    return tuple(torch.nn.Parameter(t, requires_grad=False) for t in _tables(from_rate, to_rate, device, cuda))


@constant
def _constant_method(from_rate: int, to_rate: int, cuda: bool) -> tuple[int, ...]:
    return _method(from_rate, to_rate, cuda)


@lru_cache(maxsize=256)
def _method(from_rate: int, to_rate: int, cuda: bool) -> tuple[int, ...]:
    """The arguments up, down, half, phases, interpolated, size_in, size_out, hop, radices_in, radices_out of the op."""
    filter = _filter(from_rate, to_rate)
    blocks = None if cuda or filter.up == filter.down else _blocks(filter)
    phases, interpolated = _phases(filter)
    if blocks is None:
        return filter.up, filter.down, filter.half, phases, interpolated, 0, 0, 0, 0, 0
    packed = [
        sum(radix << 4 * i for i, radix in enumerate(_radices(size) or ()))  # one hexadecimal digit per pass
        for size in (blocks.size_in, blocks.size_out)
    ]
    return filter.up, filter.down, filter.half, phases, interpolated, *blocks, *packed


# --- arguments ----------------------------------------------------------------------------------------------------


def _rate(name: str, rate: int) -> int:
    """The checked rate as an index, which is a constant under torch.compile, where a plain int may be a symbol."""
    try:
        hertz = 0 if isinstance(rate, bool) else operator.index(rate)
    except TypeError:
        hertz = 0
    if 1 <= hertz <= MAX_RATE:
        return hertz
    kind: type[Exception] = TypeError if isinstance(rate, (bool, float)) else ValueError
    raise kind(f"resample: {name} must be a whole number (int) of 1 to {MAX_RATE} Hz, got {rate!r}")


def _rates(from_rate: int, to_rate: int) -> tuple[int, int]:
    from_rate, to_rate = _rate("from_rate", from_rate), _rate("to_rate", to_rate)
    if from_rate > MAX_RATIO * to_rate:
        raise ValueError(
            f"resample: from_rate {from_rate} is more than {MAX_RATIO} times to_rate {to_rate}; resample in two steps"
        )
    return from_rate, to_rate


def _check(
    pcm: torch.Tensor,
    lengths: torch.Tensor | None,
    first: int,
    count: int | None,
    offset: int,
    downmix: bool,
    dtype: torch.dtype | None,
) -> None:
    if pcm.dtype not in (torch.int16, torch.float32):
        raise TypeError(f"resample: pcm must be int16 or float32, got {pcm.dtype}; convert it with pcm.float()")
    if dtype not in (None, torch.int16, torch.float32):
        raise TypeError(f"resample: dtype must be torch.int16 or torch.float32, got {dtype}")
    if pcm.dim() not in ((2, 3) if downmix else (1, 2)):
        shape, other = ("[T, C] or [B, T, C]", "False") if downmix else ("[T] or [B, T]", "True")
        raise ValueError(
            f"resample: pcm must be {shape} with downmix={downmix}, got {list(pcm.shape)}; reshape it or set "
            f"downmix={other}"
        )
    if downmix and not 1 <= pcm.shape[-1] <= 65535:
        raise ValueError(f"resample: pcm must have 1 to 65535 channels, got {list(pcm.shape)}")
    if first < 0 or (count is not None and count < 0):
        raise ValueError(f"resample: first and count must not be negative, got {first} and {count}")
    if lengths is not None:
        rows = pcm.shape[:1] if pcm.dim() == 2 + downmix else ()
        if lengths.shape != rows or lengths.dtype != torch.int64:
            raise ValueError(
                f"resample: lengths must be int64 {list(rows)}, one per row of pcm, got {lengths.dtype} "
                f"{list(lengths.shape)}"
            )
        if lengths.device != pcm.device:
            raise ValueError(
                f"resample: lengths are on {lengths.device}, pcm on {pcm.device}; move lengths to pcm's device"
            )
        if lengths.device.type == "cpu" and lengths.numel() and not torch.compiler.is_compiling():
            low, high = (int(n) for n in lengths.aminmax())
            samples = offset + pcm.shape[-1 - downmix]
            if low < 0 or high > samples:
                raise ValueError(
                    f"resample: lengths must be 0 to {samples} (offset plus pcm's samples), got {low} to {high}"
                )


def resampled_length(samples: int, from_rate: int, to_rate: int) -> int:
    """The number of outputs for a recording of `samples` samples: one at every time m / to_rate before its end.

    Raises:
        TypeError, ValueError: a rate is not a whole number of Hz from 1 to 384,000, or `from_rate` is too many times
            `to_rate`.

    >>> resampled_length(44100, 44100, 16000), resampled_length(1, 48000, 16000), resampled_length(0, 8000, 16000)
    (16000, 1, 0)
    """
    from_rate, to_rate = _rates(from_rate, to_rate)
    return -(-samples * to_rate // from_rate) if samples > 0 else 0


def input_span(first: int, count: int, from_rate: int, to_rate: int) -> tuple[int, int]:
    """The input samples `[lo, hi)` that determine outputs `[first, first + count)` to the last bit, in any impl.

    The span may reach below 0 and past the end of the recording, where samples count as zeros. Read the part that
    exists, and pass the index of its first sample as `offset`. The CPU kernel filters whole blocks, so the span covers
    all blocks that contain these outputs: up to 24000 samples more than the reach of the filter. If the rates are
    equal, the span is (first, first + count).

    Raises:
        TypeError, ValueError: a rate is not a whole number of Hz from 1 to 384,000, or `from_rate` is too many times
            `to_rate`.
        ValueError: `first` or `count` is negative.

    Example::

        recording = torch.randn(200_000)
        start, stop = input_span(16_000, 16_000, 44_100, 16_000)
        start, stop = max(start, 0), min(stop, len(recording))
        part = resample(recording[start:stop], 44_100, 16_000, first=16_000, count=16_000, offset=start)  # [16000]
    """
    from_rate, to_rate = _rates(from_rate, to_rate)
    if first < 0 or count < 0:
        raise ValueError(f"resample: first and count must not be negative, got {first} and {count}")
    filter = _filter(from_rate, to_rate)
    if filter.up == filter.down:
        return first, first + count
    start = first * filter.down // filter.up
    if not count:
        return start, start
    last = first + count - 1
    low, high = start - filter.half + 1, last * filter.down // filter.up + filter.half + 1
    blocks = _blocks(filter)
    if blocks is None:
        return low, high
    hop_in = blocks.hop // filter.up * filter.down
    even, odd = first // blocks.hop & ~1, last // blocks.hop | 1  # blocks are filtered in pairs
    return even * hop_in - filter.half, odd * hop_in - filter.half + blocks.size_in


def _complete(samples: int, filter: _Filter) -> int:
    """The number of outputs that no sample after the first `samples` can change: their `input_span` ends there."""
    if filter.up == filter.down:
        return samples
    blocks = _blocks(filter)
    if blocks is None:
        return max(0, -(-(samples - filter.half) * filter.up // filter.down))
    hop_in = blocks.hop // filter.up * filter.down
    return max(0, ((samples + filter.half - blocks.size_in) // hop_in + 1) // 2) * 2 * blocks.hop


# --- implementations ----------------------------------------------------------------------------------------------


def _mono(pcm: torch.Tensor, downmix: bool, compute: torch.dtype) -> torch.Tensor:
    """The channels' mean `[B, T]` or `[T]`, with full scale 1."""
    if pcm.dtype == torch.int16:
        x = pcm.sum(-1) if downmix else pcm
        return x.to(compute) / (32768.0 * (pcm.shape[-1] if downmix else 1))
    x = pcm.to(compute)
    return x.mean(-1) if downmix else x


def _converted(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype != torch.int16:
        return x.to(dtype)
    return (x * 32768.0).nan_to_num(0.0, math.inf, -math.inf).clamp(-32768, 32767).round().to(torch.int16)


def _inside(x: torch.Tensor, lengths: torch.Tensor | None, offset: int) -> torch.Tensor:
    """`x` with zeros before the beginning and after the end of each recording."""
    if lengths is None and offset >= 0:
        return x
    index = torch.arange(offset, offset + x.shape[-1], device=x.device)
    inside = index >= 0 if lengths is None else (index >= 0) & (index < lengths[..., None])
    return torch.where(inside, x, 0)


def _ended(out: torch.Tensor, lengths: torch.Tensor | None, first: int, from_rate: int, to_rate: int) -> torch.Tensor:
    """`out` with zeros after the end of each row's recording."""
    if lengths is None:
        return out
    m = torch.arange(first, first + out.shape[-1], device=out.device)
    return torch.where(m * from_rate < lengths[..., None] * to_rate, out, 0)


def resample_reference(
    pcm: torch.Tensor,
    from_rate: int,
    to_rate: int,
    *,
    lengths: torch.Tensor | None = None,
    first: int = 0,
    count: int | None = None,
    offset: int = 0,
    downmix: bool = False,
    dtype: torch.dtype | None = None,
    compute: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Plain PyTorch definition of `resample`: output m is the sum over i of x[i] h(m * from / to - i).

    Args:
        compute: torch.float32 or torch.float64, the dtype of taps, sums and floating-point results.
    """
    from_rate, to_rate = _rates(from_rate, to_rate)
    _check(pcm, lengths, first, count, offset, downmix, dtype)
    dtype = pcm.dtype if dtype is None else dtype
    x = _inside(_mono(pcm.detach(), downmix, compute), lengths, offset)
    if count is None:
        count = max(0, resampled_length(offset + x.shape[-1], from_rate, to_rate) - first)
    filter = _filter(from_rate, to_rate)
    m = torch.arange(first, first + count, device=x.device)
    reach = 0 if filter.up == filter.down else filter.half
    low = first * filter.down // filter.up - reach - offset  # the first sample of x that is needed
    high = (first + max(count, 1) - 1) * filter.down // filter.up + reach + 1 - offset
    x = torch.nn.functional.pad(x, (max(0, -low), max(0, high - x.shape[-1])))
    x = x[..., max(0, low) : max(0, low) + high - low]
    if filter.up == filter.down:
        out = x[..., :count]
    elif not count:
        out = x[..., :0]
    else:
        whole, rest = m * filter.down // filter.up, m * filter.down % filter.up
        by_phase = filter.up <= count and filter.up * reach <= LARGEST_TABLE  # taps per phase, not per output
        table = torch.arange(filter.up, device=x.device) if by_phase else rest
        table = _taps(table.to(torch.float64) / filter.up, filter).to(compute)
        windows = x.unfold(-1, 2 * reach, 1)
        start = whole - whole[0] + 1
        rows = x.shape[0] if x.dim() == 2 else 1
        step = max(1, 2 ** (23 if x.device.type == "cpu" else 27) // (2 * reach * max(rows, 1)))
        parts = []
        for i in range(0, count, step):
            taps = table[rest[i : i + step]] if by_phase else table[i : i + step]
            parts.append((windows[..., start[i : i + step], :] * taps).sum(-1))
        out = torch.cat(parts, -1)
    out = _ended(out, lengths, first, from_rate, to_rate)
    return _converted(out, compute if dtype == torch.float32 else dtype)


@functools.cache
def _import_soxr() -> ModuleType | None:
    try:
        import soxr
    except ImportError:
        return None
    return soxr


def _resample_soxr(
    pcm: torch.Tensor,
    from_rate: int,
    to_rate: int,
    lengths: torch.Tensor | None,
    first: int,
    count: int,
    offset: int,
    downmix: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    soxr: Any = _import_soxr()
    filter = _filter(from_rate, to_rate)
    x = _inside(_mono(pcm, downmix, torch.float32), lengths, offset)
    periods = min(offset // filter.down, first // filter.up)  # soxr must start at an output that falls on a sample
    skipped = first - periods * filter.up
    needed = (skipped + count) * filter.down // filter.up + 2 * filter.half
    x = torch.nn.functional.pad(x, (offset - periods * filter.down, 0))[..., :needed]
    x = torch.nn.functional.pad(x, (0, needed - x.shape[-1]))
    rows = [
        torch.from_numpy(soxr.resample(row.numpy(), from_rate, to_rate, quality="HQ"))[skipped : skipped + count]
        for row in x.reshape(-1, needed)
    ]
    out = torch.stack(rows).reshape(*x.shape[:-1], count) if rows else x.new_empty(0, count)
    return _converted(_ended(out, lengths, first, from_rate, to_rate), dtype)


def _resample_fused(
    pcm: torch.Tensor,
    from_rate: int,
    to_rate: int,
    lengths: torch.Tensor | None,
    first: int,
    count: int,
    offset: int,
    downmix: bool,
    dtype: torch.dtype,
    op: Any = None,  # None: torch.ops.ajepa.resample_fwd; tests pass another
    cuda: bool | None = None,  # whether to use the CUDA kernel's tables; None: only if pcm is on CUDA
) -> torch.Tensor:
    x = pcm if downmix else pcm.unsqueeze(-1)
    single = x.dim() == 2
    x = (x.unsqueeze(0) if single else x).contiguous()
    if lengths is not None:
        lengths = lengths.reshape(-1).contiguous()
    cuda = pcm.device.type == "cuda" if cuda is None else cuda
    if torch.compiler.is_compiling():
        tables: tuple[torch.Tensor, ...] = _constant_tables(from_rate, to_rate, pcm.device, cuda)
        method = _constant_method(from_rate, to_rate, cuda)
    else:
        tables, method = _tables(from_rate, to_rate, pcm.device, cuda), _method(from_rate, to_rate, cuda)
    out = torch.empty((x.shape[0], count), dtype=dtype, device=pcm.device)
    (op or torch.ops.ajepa.resample_fwd)(x, lengths, *tables, out, *method, first, offset)
    return out[0] if single else out


if _extension.AVAILABLE:

    @torch.library.register_fake("ajepa::resample_fwd")
    def _(*arguments, **keywords):  # the op only writes `out`
        return None


def _kernel_reason(device: torch.device) -> str:
    """The reason why the compiled kernel cannot take this call, or ""."""
    if device.type not in ("cpu", "cuda"):
        return f"there is no kernel for {device.type}"
    if _extension.MISSING:
        return f"ajepa_kernels has no compiled kernels ({_extension.MISSING})"
    if device.type == "cuda" and not _extension.CUDA:
        return "ajepa_kernels was built without nvcc"
    return ""


def resample(
    pcm: torch.Tensor,
    from_rate: int,
    to_rate: int,
    *,
    lengths: torch.Tensor | None = None,
    first: int = 0,
    count: int | None = None,
    offset: int = 0,
    downmix: bool = False,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Resample recordings, average their channels and convert their samples, in one pass.

    y[m] = sum over i of x[i] h(m * from_rate / to_rate - i), where h is a Kaiser-windowed sinc with linear phase and
    without delay. It is flat up to 0.90 of the lower Nyquist frequency, and 100 dB down above 1.00 of it. The rates may
    be any whole numbers. If they are equal there is no filter, and the mean of the channels is exact.

    A slice of outputs has the same bits as that part of the whole result if `pcm` holds their `input_span` (impl
    "fused" on one instruction set). No gradient flows to pcm. NaN and Inf invalidate the block that contains them and
    its neighbour (see `input_span`); in an int16 result NaN becomes 0.

    Args:
        pcm: int16 (full scale 32768) or float32, `[T]` or `[B, T]`; with `downmix` `[T, C]` or `[B, T, C]`.
        from_rate, to_rate: Hz, 1 to 384000; at most 1000 to 1 downwards.
        lengths: number of samples of each recording, int64 `[B]` on pcm's device, 0 to offset + T. Samples after them
            count as zeros; outputs after `resampled_length` of them are zeros.
        first, count: outputs first to first + count - 1 are returned; by default all from `first` to the end of pcm.
        offset: pcm[0] is sample `offset` of the recording. Samples outside pcm count as zeros. If `offset` is negative,
            the samples of pcm before sample 0 count as zeros, too.
        downmix: average the channels.
        dtype: dtype of the result, torch.int16 (rounded to nearest even, saturated) or torch.float32; by default pcm's.
        impl: "fused" is the compiled kernel, "soxr" is the HQ filter of the library soxr (CPU only), "reference" is
            plain PyTorch. "auto" is the first of these that can run here.

    Returns:
        `[count]` or `[B, count]`.

    Raises:
        TypeError, ValueError: an argument is invalid; the message names it and the remedy.
        RuntimeError: `impl` cannot run here; or the first call with these rates is in a CUDA graph capture.

    >>> resample(torch.zeros(2, 44100), 44100, 16000).shape
    torch.Size([2, 16000])
    """
    from_rate, to_rate = _rates(from_rate, to_rate)
    check_tensors("resample", pcm=pcm, lengths=lengths)
    _check(pcm, lengths, first, count, offset, downmix, dtype)
    if impl not in IMPLS:
        raise ValueError(f"resample: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    pcm, dtype = pcm.detach(), pcm.dtype if dtype is None else dtype
    if count is None:
        count = max(0, resampled_length(offset + pcm.shape[-1 - downmix], from_rate, to_rate) - first)
    arguments = (pcm, from_rate, to_rate, lengths, first, count, offset, downmix, dtype)
    reason = "" if impl in ("soxr", "reference") else _kernel_reason(pcm.device)
    if impl in ("auto", "fused") and not reason:
        return _resample_fused(*arguments)
    if impl == "fused":
        raise RuntimeError(f"resample: impl='fused' cannot run: {reason}; use impl='auto'")
    if impl == "soxr" and (pcm.device.type != "cpu" or _import_soxr() is None):
        what = "soxr is not installed" if pcm.device.type == "cpu" else f"pcm is on {pcm.device}"
        raise RuntimeError(f"resample: impl='soxr' cannot run: {what}; use impl='auto'")
    if impl == "soxr" or (impl == "auto" and pcm.device.type == "cpu" and _import_soxr() is not None):
        return _resample_soxr(*arguments)
    if reason:
        _extension.warn_plain("resample", reason)
    return resample_reference(
        pcm, from_rate, to_rate, lengths=lengths, first=first, count=count, offset=offset, downmix=downmix, dtype=dtype
    )


class Resampler:
    """Resamples a recording that arrives block by block.

    The joined results equal `resample` of the joined blocks, bit for bit with the compiled kernel. Outputs come a few
    thousand samples late, because the kernel filters two of its own blocks at a time.

    Raises:
        TypeError, ValueError: a rate is not a whole number of Hz from 1 to 384,000, or `from_rate` is too many times
            `to_rate`.
        TypeError, ValueError: an invalid dtype, `impl` or block.
        RuntimeError: `push` or `finish` after `finish`.

    >>> stream = Resampler(44100, 16000)
    >>> parts = [stream.push(block) for block in torch.zeros(44100).split(1000)] + [stream.finish()]
    >>> torch.cat(parts).shape
    torch.Size([16000])
    """

    def __init__(
        self,
        from_rate: int,
        to_rate: int,
        *,
        downmix: bool = False,
        dtype: torch.dtype = torch.float32,
        impl: str = "auto",
    ):
        self.from_rate, self.to_rate = _rates(from_rate, to_rate)
        _check(torch.empty((0, 1) if downmix else 0), None, 0, None, 0, downmix, dtype)
        if impl not in IMPLS:
            raise ValueError(f"resample: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
        self.downmix, self.dtype, self.impl = downmix, dtype, impl
        self._filter = _filter(self.from_rate, self.to_rate)
        self._blocks: list[torch.Tensor] = []  # samples from `_start` on
        self._start = self._samples = self._outputs = 0
        self._finished = False

    def push(self, block: torch.Tensor) -> torch.Tensor:
        """Takes the next samples, `[n]` or `[n, C]`, and returns the new outputs that later samples cannot change."""
        if self._finished:
            raise RuntimeError("resample: push after finish; make a new Resampler for the next recording")
        _check(block, None, 0, None, 0, self.downmix, self.dtype)
        if block.dim() != 1 + self.downmix:
            raise ValueError(
                f"resample: a block must be {'[n, C]' if self.downmix else '[n]'}, got {list(block.shape)}"
            )
        if self._blocks and (block.dtype, block.shape[1:]) != (self._blocks[0].dtype, self._blocks[0].shape[1:]):
            raise ValueError("resample: every block must have the dtype and the channels of the first one")
        self._blocks.append(block.detach().clone())
        self._samples += len(block)
        return self._advance(_complete(self._samples, self._filter))

    def finish(self) -> torch.Tensor:
        """Returns the remaining outputs. All outputs together are `resampled_length` of all samples."""
        if self._finished:
            raise RuntimeError("resample: finish was called before; make a new Resampler for the next recording")
        self._finished = True
        out = self._advance(resampled_length(self._samples, self.from_rate, self.to_rate))
        self._blocks = []
        return out

    def _advance(self, outputs: int) -> torch.Tensor:
        outputs = min(outputs, resampled_length(self._samples, self.from_rate, self.to_rate))
        if outputs <= self._outputs:
            device = self._blocks[0].device if self._blocks else None
            return torch.empty(0, dtype=self.dtype, device=device)
        pcm = torch.cat(self._blocks)
        out = resample(
            pcm, self.from_rate, self.to_rate, first=self._outputs, count=outputs - self._outputs, offset=self._start,
            downmix=self.downmix, dtype=self.dtype, impl=self.impl,
        )  # fmt: skip
        self._outputs = outputs
        keep = max(self._start, input_span(outputs, 1, self.from_rate, self.to_rate)[0])
        self._blocks = [pcm[keep - self._start :].clone()]
        self._start = keep
        return out
