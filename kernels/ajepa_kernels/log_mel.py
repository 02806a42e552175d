"""Log-mel spectrograms of PCM as normalised patches, in the two conventions that are used for training.

Shapes: B clips, S samples, T frames, K frequency bins, M mel bands, N patches, P values of a patch.
"""

import ast
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ajepa_kernels import _extension
from ajepa_kernels._arguments import check_tensors
from ajepa_kernels._triton import constant

KALDI_FLOOR = torch.finfo(torch.float32).eps  # Kaldi's floor of mel power
LARGEST = 2**30  # limit of sizes, because the kernels compute them with 32 bits
PEAK_EPS = 1e-6  # below one step of int16 (3e-5), so that a silent clip stays silent
Layout = Literal["patches", "spectrogram", "mel"]


def _has_transform(n_fft: int) -> bool:
    """Whether n_fft is 16 times a product of 2, 3 and 5 in 128..8192. (Divisors of 30^13 have no other primes.)"""
    return 128 <= n_fft <= 8192 and n_fft % 16 == 0 and 30**13 % n_fft == 0


SIZES = tuple(n_fft for n_fft in range(128, 8193) if _has_transform(n_fft))
CUDA_SIZES = frozenset({400, 640, 1200, *(2**i for i in range(7, 14))})  # with a template in csrc/log_mel.cu


def _number(field: str, value: Any, kind: type) -> Any:
    """`value` as an int or a float, from a number of any type: torchaudio's power is 2.0. Else raises ValueError."""
    try:
        number = kind(value)
        if kind is float or number == value:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"LogMelSpec: {field} must be a {'whole ' if kind is int else ''}number, got {value!r}")


@dataclass(frozen=True)
class LogMelSpec:
    """A front end: PCM -> norm, scale -> frames -> window -> |FFT|^power -> mel -> log -> (x - mean) / std.

    Convention "kaldi" is `torchaudio.compliance.kaldi.fbank` (each frame minus its mean, y[n] = x[n] - c x[n-1] with
    x[-1] = x[0], symmetric window, triangles linear in mel, Nyquist bin unused). Convention "torchaudio" is
    `torchaudio.transforms.MelSpectrogram` (periodic window centred in n_fft, triangles linear in Hz), then
    `AmplitudeToDB` or ln. Some fields apply to only one of the conventions.

    Raises:
        ValueError: a value is invalid; the message names the field and the remedy.

    Example::

        spec = LogMelSpec(sample_rate=32_000, n_fft=1024, win_length=800, hop_length=320, n_frames=1024)
        spec.grid  # (8, 64) patches
    """

    sample_rate: int = 16000
    """Sampling rate of the front end in Hz."""
    n_fft: int = 512
    """Size of the transform: 16 times a product of 2, 3 and 5, from 128 to 8192. The CUDA kernel has the powers of two,
    400 (Whisper's), 640 and 1200; other sizes run as plain PyTorch on a GPU."""
    win_length: int = 400
    """Length of the window in samples."""
    hop_length: int = 160
    """Samples from one frame to the next."""
    n_mels: int = 128
    """Number of mel bands, 1 to 256."""
    f_min: float = 20.0
    """Lower edge of the lowest mel band in Hz."""
    f_max: float | None = None
    """Upper edge of the highest mel band in Hz. None: the Nyquist frequency."""
    convention: Literal["kaldi", "torchaudio"] = "kaldi"
    """Library whose arithmetic the front end follows."""
    window: Literal["hann", "povey", "hamming", "blackman"] = "hann"
    """Window of a frame. povey is Hann to the power 0.85, for Kaldi only."""
    power: Literal[1, 2] = 2
    """2: power spectrum. 1: magnitude spectrum."""
    preemphasis: float = 0.97
    """Kaldi only: coefficient c of the pre-emphasis y[n] = x[n] - c x[n-1]."""
    remove_dc_offset: bool = True
    """Kaldi only: subtract the mean from each frame."""
    snip_edges: bool = True
    """Kaldi only. If off, a clip has round(S / hop) frames and its ends are mirrored, with the edge sample repeated."""
    center: bool = True
    """torchaudio only: centre frame t on sample t * hop; `pad_mode` says what lies beyond the clip's ends."""
    mel_scale: Literal["htk", "slaney"] = "htk"
    """torchaudio only: the formula of the mel scale."""
    mel_norm: Literal["slaney"] | None = None
    """torchaudio only. slaney: divide each band by its width. None: leave it."""
    log: Literal["ln", "db"] = "ln"
    """ln: natural logarithm. db: 10 log10 of power, 20 log10 of magnitude."""
    floor: float | None = None
    """Smallest mel value before the log. None: float32 epsilon for Kaldi, 1e-10 for torchaudio."""
    top_db: float | None = None
    """In dB: values below the clip's maximum minus this are raised to that level. Frames that `n_frames` crops do not
    count for the maximum, as in Whisper. (torchaudio takes the maximum over a whole [B, S] batch, and over one clip
    only if it is called clip by clip.)"""
    n_frames: int | None = None
    """Number of frames: longer results are cropped, shorter ones padded with `pad_value`. None: all frames."""
    waveform_norm: Literal["none", "mean", "peak"] = "none"
    """Normalisation of each clip. mean: x - mean x. peak: (x - mean x) / (max |x - mean x| + 1e-6)."""
    mean: float = 0.0
    """Mean of the data set, subtracted last, also from padded frames (as in AudioMAE)."""
    std: float = 1.0
    """Standard deviation of the data set, which divides last, also padded frames."""
    patch: tuple[int, int] = (16, 16)
    """Size of a patch: mel bands, frames."""
    pad_mode: Literal["reflect", "constant"] = "reflect"
    """torchaudio's `center` only. reflect: the ends are mirrored without repeating the edge sample. constant: zeros lie
    beyond them, also after a waveform norm (librosa's default)."""
    pad_value: float = 0.0
    """Value of frames that the clip does not have, before `mean` and `std`."""
    n_samples: int | None = None
    """Clips are cropped, or padded with zeros after the waveform norm, to this many samples, so that all have the same
    frames (Whisper: 480000). None: they stay as they are."""
    scale: float = 1.0
    """Factor of the samples after the waveform norm. 32768: the units of int16, in which Kaldi applies its floor."""
    _key: ClassVar[str]  # all fields as a string, which torch.compile treats as a constant

    def __post_init__(self):
        for kind, names in (
            (int, ("sample_rate", "n_fft", "win_length", "hop_length", "n_mels", "power", "n_frames", "n_samples")),
            (float, ("f_min", "f_max", "preemphasis", "floor", "top_db", "mean", "std", "pad_value", "scale")),
        ):
            for field in names:
                value = getattr(self, field)
                if value is not None or field not in ("n_frames", "n_samples", "f_max", "floor", "top_db"):
                    object.__setattr__(self, field, _number(field, value, kind))
        sizes = self.patch if isinstance(self.patch, Sequence) else (self.patch,)
        object.__setattr__(self, "patch", tuple(_number("patch", size, int) for size in sizes))
        nyquist, kaldi = self.sample_rate / 2, self.convention == "kaldi"
        f_max = nyquist if self.f_max is None else self.f_max
        near = sorted(sorted(SIZES, key=lambda size: abs(size - self.n_fft))[:2])
        choices = {"convention": ("kaldi", "torchaudio"), "window": ("hann", "povey", "hamming", "blackman"),
                   "power": (1, 2), "mel_scale": ("htk", "slaney"), "mel_norm": (None, "slaney"), "log": ("ln", "db"),
                   "waveform_norm": ("none", "mean", "peak"), "pad_mode": ("reflect", "constant")}  # fmt: skip
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"LogMelSpec: {field} must be one of {allowed}, got {getattr(self, field)!r}")
        for wrong, message in (
            (not 1 <= self.sample_rate < LARGEST, f"sample_rate must be 1..2^30 - 1 Hz, got {self.sample_rate}"),
            (self.n_fft not in SIZES,
             "n_fft must be 16 times a product of 2, 3 and 5 in 128..8192 (a power of two, 400, "
             f"640, 1200, ...), got {self.n_fft}; the nearest are {near[0]} and {near[1]}"),
            (not 2 <= self.win_length <= self.n_fft,
             f"win_length {self.win_length} must be 2..n_fft; raise n_fft ({self.n_fft}) or shorten the window"),
            (not 1 <= self.hop_length < LARGEST, f"hop_length must be 1..2^30 - 1 samples, got {self.hop_length}"),
            (not 1 <= self.n_mels <= 256, f"n_mels must be 1..256, got {self.n_mels}"),
            (f_max > nyquist, f"f_max {f_max} Hz is above Nyquist ({nyquist} Hz); lower it or set None"),
            (not 0 <= self.f_min < f_max, f"f_min {self.f_min} Hz must be at least 0 and below f_max ({f_max} Hz)"),
            (not 0 <= self.preemphasis <= 1, f"preemphasis must be 0..1, got {self.preemphasis}"),
            (not 1e-30 <= self.log_floor < math.inf, f"floor must be at least 1e-30, got {self.floor}"),
            (self.top_db is not None and (self.log != "db" or not 0 <= self.top_db < math.inf),
             f"top_db needs log='db' and a finite value of at least 0, got log={self.log!r}, top_db={self.top_db}"),
            (self.n_frames is not None and not 1 <= self.n_frames < LARGEST,
             f"n_frames must be None or 1..2^30 - 1, got {self.n_frames}"),
            (not (0 < self.std < math.inf), f"std must be positive, got {self.std}"),
            (not math.isfinite(self.mean), f"mean must be finite, got {self.mean}"),
            (not math.isfinite(self.pad_value), f"pad_value must be finite, got {self.pad_value}"),
            (not 0 < self.scale < math.inf, f"scale must be positive, got {self.scale}"),
            (len(self.patch) != 2 or not all(1 <= size < LARGEST for size in self.patch),
             f"patch must be two sizes in 1..2^30 - 1, got {self.patch}"),
            (not kaldi and self.window == "povey", "window 'povey' needs convention='kaldi'; set it or choose 'hann'"),
            (not kaldi and not self.snip_edges, "snip_edges=False needs convention='kaldi'; leave it True"),
            (self.pad_mode != "reflect" and (kaldi or not self.center),
             f"pad_mode {self.pad_mode!r} needs convention='torchaudio' and center=True; leave it 'reflect'"),
            (kaldi and not self.center, "center=False needs convention='torchaudio'; leave it True"),
            (kaldi and self.mel_scale != "htk", "mel_scale 'slaney' needs convention='torchaudio'; leave it 'htk'"),
            (kaldi and self.mel_norm is not None, "mel_norm needs convention='torchaudio'; leave it None"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(f"LogMelSpec: {message}")
        if self.n_samples is not None and not self._least <= self.n_samples < LARGEST:
            raise ValueError(
                f"LogMelSpec: n_samples must be None or {self._least} (one frame) to 2^30 - 1, got {self.n_samples}"
            )
        object.__setattr__(self, "_key", repr(astuple(self)))

    @property
    def log_floor(self) -> float:
        """The smallest mel value before the log."""
        if self.floor is not None:
            return self.floor
        return KALDI_FLOOR if self.convention == "kaldi" else 1e-10

    @property
    def _least(self) -> int:
        """The number of samples, padding included, that one frame takes."""
        if self.convention == "kaldi":  # mirrored ends give round(S / hop) frames
            return self.win_length if self.snip_edges else max(self.win_length, self.hop_length - self.hop_length // 2)
        if not self.center:
            return self.n_fft
        return 1 if self.pad_mode == "constant" else self.n_fft // 2 + 1

    @property
    def min_samples(self) -> int:
        """The number of samples of the shortest clip that has a frame."""
        return self._least if self.n_samples is None else 1

    @property
    def first_sample(self) -> int:
        """The sample at which the window of frame 0 starts; negative if that lies before the clip."""
        if self.convention == "kaldi":
            return 0 if self.snip_edges else self.hop_length // 2 - self.win_length // 2
        return (self.n_fft - self.win_length) // 2 - (self.n_fft // 2 if self.center else 0)

    @property
    def frame_rule(self) -> tuple[int, int]:
        """(a, b) such that S >= min_samples samples (or `n_samples`, if set) have (S + a) // hop + b frames."""
        if self.convention == "kaldi":
            return (-self.win_length, 1) if self.snip_edges else (self.hop_length // 2, 0)
        return (0, 1) if self.center else (-self.n_fft, 1)

    def frames(self, samples: int) -> int:
        """The number of frames of a clip of `samples` samples, before padding or cropping to `n_frames`."""
        a, b = self.frame_rule
        samples = samples if self.n_samples is None else self.n_samples
        return (samples + a) // self.hop_length + b if samples >= self._least else 0

    def patch_grid(self, samples: int) -> tuple[int, int]:
        """The number of (frequency, time) patches of a clip. Frames are padded with `pad_value` to whole patches."""
        if self.n_mels % self.patch[0]:
            raise ValueError(f"LogMelSpec: patch height {self.patch[0]} must divide n_mels {self.n_mels}")
        frames = self.frames(samples) if self.n_frames is None else self.n_frames
        return self.n_mels // self.patch[0], -(-frames // self.patch[1])

    @property
    def grid(self) -> tuple[int, int]:
        """The number of (frequency, time) patches, for a fixed `n_frames` or `n_samples`."""
        if self.n_frames is None and self.n_samples is None:
            raise ValueError(
                "LogMelSpec: grid depends on the clip when n_frames is None; set n_frames or use patch_grid(S)"
            )
        return self.patch_grid(0)

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        return self.patch[0] * self.patch[1]


LOG_MEL_PRESETS: dict[str, LogMelSpec] = {
    # arXiv 2507.02915. A 10 s clip has 254 frames, which are followed by two rows of zeros.
    "audio-jepa": LogMelSpec(
        sample_rate=32000, n_fft=4096, win_length=3125, hop_length=1250, n_frames=256, waveform_norm="peak"
    ),
    # The successor of audio-jepa. A 10 s clip has 257 frames, of which the last one is dropped.
    "audio-jepa-16k": LogMelSpec(
        n_fft=2048, win_length=2048, hop_length=625, f_min=0.0, convention="torchaudio", log="db", n_frames=256
    ),
    # arXiv 2311.15830, with AudioMAE's statistics of AudioSet; AudioMAE divides by twice the standard deviation. The
    # waveform's mean is not subtracted, because every frame's own mean is.
    "a-jepa": LogMelSpec(n_frames=1024, mean=-4.2677393, std=2 * 4.5689974),
    # openai/whisper: samples padded to 30 s, the last frame dropped, then (log10 + 4) / 4 after raising values below
    # max - 8 to that level, here in dB. large-v3 has n_mels=128.
    "whisper": LogMelSpec(
        n_fft=400, n_mels=80, f_min=0.0, convention="torchaudio", mel_scale="slaney", mel_norm="slaney", log="db",
        top_db=80.0, n_frames=3000, mean=-40.0, std=40.0, n_samples=480_000,
    ),
    # arXiv 2211.06687, for 10 s clips, of which shorter ones are padded with zeros ("pad"). To repeat a clip
    # ("repeatpad", "repeat") and to choose or fuse parts of a longer one is left to the caller. The checkpoints without
    # fusion ("rand_trunc") have mel_scale="slaney", mel_norm="slaney".
    "clap": LogMelSpec(
        sample_rate=48_000, n_fft=1024, win_length=1024, hop_length=480, n_mels=64, f_min=0.0, f_max=14_000.0,
        convention="torchaudio", log="db", n_samples=480_000,
    ),
    # Kaldi's compute-fbank-feats and kaldi-native-fbank, in units of int16 and without dither, with the 80 bands of
    # speech recognition (both default to 23).
    "kaldi": LogMelSpec(window="povey", n_mels=80, scale=32768.0),
    # librosa.power_to_db(librosa.feature.melspectrogram(...)) with its defaults, thus for 22.05 kHz.
    "librosa": LogMelSpec(
        sample_rate=22_050, n_fft=2048, win_length=2048, hop_length=512, f_min=0.0, convention="torchaudio",
        mel_scale="slaney", mel_norm="slaney", log="db", top_db=80.0, pad_mode="constant",
    ),
}  # fmt: skip
LOG_MEL_PRESETS |= {
    # arXiv 2104.01778. The model's patches overlap (stride 10), so it takes layout "spectrogram".
    "ast": LOG_MEL_PRESETS["a-jepa"],
    # SeamlessM4T and w2v-BERT 2.0, before they normalise each band over time and stack the frames two by two.
    "seamless": LOG_MEL_PRESETS["kaldi"],
}


class _Tables(NamedTuple):
    window: torch.Tensor  # [win_length]
    mel: torch.Tensor  # [K, M]


class _KernelTables(NamedTuple):
    """The mel bank by intervals: a bin between mel edges i and i + 1 is in falling band i - 1 and rising band i."""

    window: torch.Tensor  # float32 [win_length]
    weights: torch.Tensor  # float32 [Q, M + 1, 2, 4]: weights of four bins in their falling and their rising band
    intervals: torch.Tensor  # int32 [M + 1, 2]: first bin and number of bins
    twiddles: torch.Tensor  # float32 [Q', 4], each row two complex numbers, for the CUDA kernel; see _twiddles


_SLANEY_HZ = 200.0 / 3  # Hz per mel below 1 kHz; the scale is logarithmic above
_SLANEY_KNEE, _SLANEY_STEP = 1000.0 / _SLANEY_HZ, math.log(6.4) / 27.0


def _hz_to_mel(hz: float, scale: str) -> float:
    if scale == "htk":
        return 2595.0 * math.log10(1.0 + hz / 700.0)
    return hz / _SLANEY_HZ if hz < 1000.0 else _SLANEY_KNEE + math.log(hz / 1000.0) / _SLANEY_STEP


def _mel_to_hz(mel: torch.Tensor, scale: str) -> torch.Tensor:
    if scale == "htk":
        return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)
    return torch.where(mel < _SLANEY_KNEE, mel * _SLANEY_HZ, 1000.0 * torch.exp(_SLANEY_STEP * (mel - _SLANEY_KNEE)))


def _mel_edges(spec: LogMelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies of bins `[K]` and edges of triangles `[M + 2]`, float32, on the scale where triangles are linear."""
    bins, f_max = spec.n_fft // 2 + 1, spec.f_max
    on_cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    if spec.convention == "kaldi":
        hz = spec.sample_rate / spec.n_fft * torch.arange(bins, **on_cpu)
        f_max = spec.sample_rate / 2 if f_max is None else f_max
        low, high = (1127.0 * math.log(1.0 + f / 700.0) for f in (spec.f_min, f_max))
        edges = low + torch.arange(spec.n_mels + 2, **on_cpu) * ((high - low) / (spec.n_mels + 1))
        return 1127.0 * torch.log(1.0 + hz / 700.0), edges
    f_max = float(spec.sample_rate // 2) if f_max is None else f_max
    low, high = (_hz_to_mel(f, spec.mel_scale) for f in (spec.f_min, f_max))
    mels = torch.linspace(low, high, spec.n_mels + 2, **on_cpu)
    return torch.linspace(0, spec.sample_rate // 2, bins, **on_cpu), _mel_to_hz(mels, spec.mel_scale)


@lru_cache(maxsize=64)
def _mel_bank(spec: LogMelSpec) -> torch.Tensor:
    """Mel triangles `[K, M]`, float32, with torchaudio's rounding: an edge bin may have a weight of 1e-4, and a
    difference in its rounding would be visible in the log."""
    points, edges = _mel_edges(spec)
    if not (edges.diff() > 0).all():
        raise ValueError(
            f"LogMelSpec: {spec.n_mels} mel bands from f_min {spec.f_min} to f_max {spec.f_max} Hz are too narrow for "
            "float32; lower n_mels or widen the range"
        )
    points, left, centre, right = points[:, None], edges[:-2], edges[1:-1], edges[2:]
    bank = torch.minimum((points - left) / (centre - left), (right - points) / (right - centre)).clamp_min(0)
    if spec.convention == "kaldi":
        bank[-1] = 0
    elif spec.mel_norm == "slaney":
        bank *= 2.0 / (right - left)
    empty = (bank.amax(0) == 0).nonzero().flatten().tolist()
    if empty:
        warnings.warn(
            f"log_mel: mel bands {empty} of {spec.n_mels} hold no bin of a {spec.n_fft}-point transform at "
            f"{spec.sample_rate} Hz; they stay at the log floor",
            stacklevel=2,
        )
    return bank


def _window(spec: LogMelSpec) -> torch.Tensor:
    """`[win_length]`, float64."""
    kinds = {"hamming": torch.hamming_window, "blackman": torch.blackman_window}
    kind = kinds.get(spec.window, torch.hann_window)
    window = kind(spec.win_length, periodic=spec.convention == "torchaudio", dtype=torch.float64, device="cpu")
    return window.pow(0.85) if spec.window == "povey" else window


def _make_tables(spec: LogMelSpec, dtype: torch.dtype) -> _Tables:
    return _Tables(_window(spec).to(dtype), _mel_bank(spec).to(dtype))


def _twiddles(n_fft: int) -> torch.Tensor:
    """Roots of unity for the CUDA kernel, which transforms a frame as n_fft / 2 complex numbers.

    First exp(-2 pi i k / N) and its fourth power for each pass after the first, with N points transformed after the
    pass. Passes have radix 16 and the last one has the radix that remains, but for the sizes named here. Sizes without
    a CUDA kernel have no passes. Then exp(-2 pi i k / n_fft) for k < n_fft / 4.
    """
    points, rows = n_fft // 2, []
    radices = {400: [20, 10], 640: [20, 4, 4], 1200: [25, 24]}.get(n_fft, [16] * 4 if n_fft in CUDA_SIZES else [points])
    done = radices[0]
    for most in radices[1:]:
        if done == points:
            break
        radix = min(most, points // done)
        # A thread of the last pass computes the roots of its further butterflies from those of its first one.
        threads = points // (radices[0] // radix * radix)
        k = torch.arange(threads if done * radix == points else done, dtype=torch.float64, device="cpu")
        done *= radix
        rows.append(torch.outer(k, torch.tensor([1.0, 4.0], dtype=torch.float64, device="cpu")) / done)
    rows.append(torch.arange(n_fft // 4, dtype=torch.float64, device="cpu").view(-1, 2) / n_fft)
    angles = torch.cat(rows) * (-2 * math.pi)
    return torch.stack((angles.cos(), angles.sin()), -1).flatten(1).to(torch.float32)


def _make_kernel_tables(spec: LogMelSpec) -> _KernelTables:
    bank = torch.nn.functional.pad(_mel_bank(spec), (1, 1))
    points, edges = _mel_edges(spec)
    first_bins = torch.searchsorted(points, edges).clamp_max(len(points) - int(spec.convention == "kaldi")).tolist()
    starts = torch.tensor(first_bins, dtype=torch.int32, device="cpu")
    intervals = torch.stack((starts[:-1], starts.diff()), 1)
    rows = max(1, -(-int(intervals[:, 1].max()) // 4))
    weights = torch.zeros(len(intervals), 4 * rows, 2, dtype=torch.float32, device="cpu")
    for i, (first, bins) in enumerate(intervals.tolist()):
        weights[i, :bins] = bank[first : first + bins, i : i + 2]
    return _KernelTables(
        _window(spec).to(torch.float32),
        weights.unflatten(1, (rows, 4)).permute(1, 0, 3, 2).contiguous(),
        intervals.contiguous(),
        _twiddles(spec.n_fft),
    )


@lru_cache(maxsize=64)
def _on_cpu(make: Callable[..., Any], spec: LogMelSpec, *dtype: torch.dtype) -> Any:
    # Cached tensors must be plain ones, neither inference tensors nor fake tensors.
    with torch.inference_mode(False), _disable_current_modes():
        return make(spec, *dtype)


# This cache is never emptied: captured CUDA graphs hold the addresses, and other streams may still be reading.
_on_device: dict[tuple, Any] = {}


def _cached(make: Callable[..., Any], spec: LogMelSpec, device: torch.device, *dtype: torch.dtype) -> Any:
    if device.type == "cpu":
        return _on_cpu(make, spec, *dtype)
    key = (make, spec, device, *dtype)
    if key not in _on_device:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"log_mel: a CUDA graph is being captured, but the tables of this front end are not on {device} yet; "
                "call log_mel once with it before the capture"
            )
        tables = _on_cpu(make, spec, *dtype)
        with torch.inference_mode(False), _disable_current_modes():
            _on_device.setdefault(key, type(tables)(*(table.to(device) for table in tables)))
    return _on_device[key]


# torch.compile calls these functions while tracing, and can only pass constants to them. A spec's key is a constant,
# whereas its fields become symbols once they change between calls. torch 2.11 can only unpack plain tuples.


def _from_key(key: str) -> LogMelSpec:
    return LogMelSpec(*ast.literal_eval(key))


def _constant(tables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    # Parameters, because their sizes stay numbers with dynamic=True; the sizes of constants have no source to guard.
    return tuple(torch.nn.Parameter(table, requires_grad=False) for table in tables)


@constant
def _constant_kernel_tables(device: torch.device, key: str) -> tuple[torch.Tensor, ...]:
    return _constant(_cached(_make_kernel_tables, _from_key(key), device))


@constant
def _constant_tables(device: torch.device, dtype: torch.dtype, key: str) -> tuple[torch.Tensor, ...]:
    return _constant(_cached(_make_tables, _from_key(key), device, dtype))


def _kernel_tables(spec: LogMelSpec, device: torch.device) -> tuple[torch.Tensor, ...]:
    if torch.compiler.is_compiling():
        return _constant_kernel_tables(device, spec._key)
    return _cached(_make_kernel_tables, spec, device)


def _tables(spec: LogMelSpec, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    if torch.compiler.is_compiling():
        return _constant_tables(device, dtype, spec._key)
    return _cached(_make_tables, spec, device, dtype)


def _mirror(index: torch.Tensor, length: torch.Tensor | int, repeat_edge: bool) -> torch.Tensor:
    """The index inside the clip whose sample mirroring puts at `index`, which may lie before 0 or after the end."""
    edge, last = int(repeat_edge), length - 1
    index = torch.where(index < 0, -edge - index, index)
    return torch.where(index > last, 2 * last + edge - index, index).clamp_min(0)


def _check(pcm: torch.Tensor, spec: LogMelSpec, lengths: torch.Tensor | None, dtype: torch.dtype, layout: str) -> None:
    check_tensors("log_mel", pcm=pcm, lengths=lengths)
    if pcm.dim() != 2:
        raise ValueError(f"log_mel: pcm must be [B, S], got {list(pcm.shape)}; add a batch dimension with pcm[None]")
    if pcm.dtype not in (torch.int16, torch.float32, torch.float64):
        raise TypeError(f"log_mel: pcm must be int16 or float32, got {pcm.dtype}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"log_mel: dtype must be float32, bfloat16 or float16, got {dtype}")
    if layout not in ("patches", "spectrogram", "mel"):
        raise ValueError(f"log_mel: layout must be 'patches', 'spectrogram' or 'mel', got {layout!r}")
    if pcm.shape[1] < spec.min_samples:
        raise ValueError(
            f"log_mel: a clip of {pcm.shape[1]} samples is shorter than one window; it needs {spec.min_samples} or more"
        )
    if lengths is not None:
        if lengths.shape != pcm.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"log_mel: lengths must be int32 or int64 [{len(pcm)}], got {lengths.dtype} {list(lengths.shape)}"
            )
        if lengths.device != pcm.device:
            raise ValueError(
                f"log_mel: lengths are on {lengths.device}, pcm on {pcm.device}; move lengths to pcm's device"
            )


def _check_values(pcm: torch.Tensor, spec: LogMelSpec, lengths: torch.Tensor | None) -> None:
    if pcm.is_floating_point():
        finite = pcm.isfinite()
        if lengths is not None:
            finite |= torch.arange(pcm.shape[1], device=pcm.device) >= lengths[:, None]
        if not bool(finite.all()):
            raise ValueError("log_mel: pcm holds NaN or Inf; leave out or repair the clip")
    if lengths is not None and len(lengths):
        low, high = (int(v) for v in lengths.aminmax())
        if low < spec.min_samples or high > pcm.shape[1]:
            raise ValueError(f"log_mel: lengths must be {spec.min_samples}..{pcm.shape[1]}, got {low}..{high}")


def _normalise_waveform(x: torch.Tensor, kind: str, lengths: torch.Tensor | None) -> torch.Tensor:
    if kind == "none":
        return x
    inside = None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    if inside is None:
        mean = x.mean(1, keepdim=True)
    else:
        mean = torch.where(inside, x, 0).sum(1, keepdim=True) / inside.sum(1, keepdim=True).clamp_min(1)
    x = x - mean
    if kind == "mean":
        return x
    peak = (x if inside is None else torch.where(inside, x, 0)).abs().amax(1, keepdim=True)
    return x / (peak + PEAK_EPS)


def _waveforms(
    x: torch.Tensor, spec: LogMelSpec, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Waveforms `[B, S]` normalised, scaled and padded to `n_samples`, and their lengths if they still differ."""
    x = _normalise_waveform(x, spec.waveform_norm, lengths)
    if spec.scale != 1:
        x = x * spec.scale
    if spec.n_samples is None:
        return x, lengths
    if lengths is not None:
        x = x.masked_fill(torch.arange(x.shape[1], device=x.device) >= lengths[:, None], 0)
    return torch.nn.functional.pad(x, (0, spec.n_samples - x.shape[1])), None


def _spectra(x: torch.Tensor, spec: LogMelSpec, lengths: torch.Tensor | None, frames: int) -> torch.Tensor:
    """Waveforms `[B, S]` -> powers or magnitudes `[B, frames, K]`."""
    first, span = spec.first_sample, (frames - 1) * spec.hop_length + spec.win_length
    samples, kaldi = x.shape[1], spec.convention == "kaldi"
    if spec.pad_mode == "constant":
        if lengths is not None:
            x = x.masked_fill(torch.arange(samples, device=x.device) >= lengths[:, None], 0)
        x = torch.nn.functional.pad(x, (-first, first + span - samples))
    elif first < 0 or first + span > samples or (lengths is not None and not (kaldi and spec.snip_edges)):
        index = torch.arange(first, first + span, device=x.device)
        if lengths is None:
            x = x[:, _mirror(index, samples, kaldi)]
        else:
            x = x.gather(1, _mirror(index[None], lengths[:, None], kaldi))
    else:
        x = x[:, first : first + span]
    frames_BTW = x.unfold(1, spec.win_length, spec.hop_length)
    if kaldi and spec.remove_dc_offset:
        frames_BTW = frames_BTW - frames_BTW.mean(-1, keepdim=True)
    if kaldi and spec.preemphasis:
        before = torch.cat((frames_BTW[..., :1], frames_BTW[..., :-1]), -1)
        frames_BTW = frames_BTW - spec.preemphasis * before
    window = _tables(spec, x.device, x.dtype)[0]
    spectrum_BTK = torch.fft.rfft(frames_BTW * window, n=spec.n_fft)
    power_BTK = spectrum_BTK.real.square() + spectrum_BTK.imag.square()
    if spec.power == 2:
        return power_BTK
    if power_BTK.requires_grad:  # the derivative of a root is infinite at 0; the magnitude's is taken as 0 there
        return torch.where(power_BTK > 0, power_BTK, 1).sqrt() * (power_BTK > 0)
    return power_BTK.sqrt()


def _log_mel_frames(
    x: torch.Tensor, spec: LogMelSpec, lengths: torch.Tensor | None, n_frames: int, take_log: bool
) -> torch.Tensor:
    """Waveforms `[B, S]` -> `[B, M, n_frames]`: logarithms before the data set's mean and std, or else mel values."""
    filled = min(spec.frames(x.shape[1]), n_frames)
    x, lengths = _waveforms(x, spec, lengths)
    out = _spectra(x, spec, lengths, filled) @ _tables(spec, x.device, x.dtype)[1]
    if take_log:
        out = out.clamp_min(spec.log_floor).log()
    inside = None
    if lengths is not None:
        a, b = spec.frame_rule
        counts = (lengths + a).div(spec.hop_length, rounding_mode="floor") + b
        counts = torch.where(lengths >= spec.min_samples, counts, 0)
        inside = (torch.arange(filled, device=x.device) < counts[:, None])[:, :, None]
    if take_log and spec.log == "db":
        out = out * ((10.0 if spec.power == 2 else 20.0) / math.log(10.0))
        if spec.top_db is not None:
            peak = out if inside is None else torch.where(inside, out, -math.inf)
            out = torch.maximum(out, peak.amax((1, 2), keepdim=True) - spec.top_db)
    missing = spec.pad_value if take_log else 0.0
    if inside is not None:
        out = torch.where(inside, out, missing)
    return torch.nn.functional.pad(out.transpose(1, 2), (0, n_frames - filled), value=missing)


def log_mel_reference(
    pcm: torch.Tensor,
    spec: LogMelSpec,
    *,
    lengths: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "patches",
) -> torch.Tensor:
    """Plain PyTorch definition of `log_mel`: differentiable, in float32, or in float64 for float64 `pcm` or `dtype`."""
    _check(pcm, spec, lengths, dtype, layout)
    if torch.is_autocast_enabled(pcm.device.type):  # autocast would compute the mel product in bfloat16
        with torch.autocast(pcm.device.type, enabled=False):
            return log_mel_reference(pcm, spec, lengths=lengths, dtype=dtype, layout=layout)
    pcm = pcm[:, : spec.n_samples]
    batch, samples = pcm.shape
    lengths = None if lengths is None else lengths.clamp(0, samples)
    compute = torch.float64 if torch.float64 in (pcm.dtype, dtype) else torch.float32
    if layout == "patches":
        freq, time = spec.patch_grid(samples)
        n_frames = time * spec.patch[1]
    else:
        n_frames = spec.frames(samples) if spec.n_frames is None else spec.n_frames
    x = pcm.to(compute)
    if pcm.dtype == torch.int16:
        x = x / 32768.0
    wanted = n_frames if spec.n_frames is None else spec.n_frames
    budget = 2 ** (21 if pcm.device.type == "cpu" else 28)  # frame values computed at once; 8 MB fit a CPU's cache
    step = max(1, budget // (spec.frames(samples) * spec.n_fft))
    parts = [
        _log_mel_frames(
            x[i : i + step], spec, None if lengths is None else lengths[i : i + step], wanted, layout != "mel"
        )
        for i in range(0, batch, step)
    ]
    out = torch.cat(parts) if parts else x.new_empty(0, spec.n_mels, wanted)
    out = torch.nn.functional.pad(out, (0, n_frames - wanted), value=0.0 if layout == "mel" else spec.pad_value)
    out = (out if layout == "mel" else (out - spec.mean) / spec.std).to(dtype)
    if layout == "patches":
        out = out.view(batch, freq, spec.patch[0], time, spec.patch[1]).transpose(2, 3)
        out = out.reshape(batch, freq * time, spec.patch_dim)
    return out


def _kernel_reason(pcm: torch.Tensor, spec: LogMelSpec, dtype: torch.dtype) -> str:
    """The reason why the compiled kernel cannot take this call, or ""."""
    if pcm.device.type not in ("cpu", "cuda"):
        return f"there is no kernel for {pcm.device.type}"
    if torch.float64 in (pcm.dtype, dtype):
        return "kernels compute in float32, not float64"
    if _extension.MISSING:
        return f"ajepa_kernels has no compiled kernels ({_extension.MISSING})"
    if pcm.device.type == "cuda" and not _extension.CUDA:
        return "ajepa_kernels was built without nvcc"
    if pcm.device.type == "cuda" and spec.n_fft not in CUDA_SIZES:
        return f"the CUDA kernel has no transform of {spec.n_fft} points, only of {sorted(CUDA_SIZES)}"
    if pcm.requires_grad and torch.is_grad_enabled():
        return "pcm requires a gradient, and kernels have no backward"
    return ""


def _log_mel_fused(
    pcm: torch.Tensor,
    spec: LogMelSpec,
    lengths: torch.Tensor | None,
    dtype: torch.dtype,
    layout: Layout,
    op: Callable[..., None] | None = None,  # None: torch.ops.ajepa.log_mel_fwd; tests pass another
) -> torch.Tensor:
    batch, samples = pcm.shape
    if spec.waveform_norm != "none" and pcm.dtype == torch.int16 and (spec.n_samples or spec.pad_mode == "constant"):
        pcm = pcm.float() / 32768  # zeros after the norm are the clip's mean before it, which int16 cannot hold
    kaldi, frames, take_log = spec.convention == "kaldi", spec.frames(samples), layout != "mel"
    kept = frames if spec.n_frames is None else spec.n_frames
    if layout == "patches":
        (freq, time), (height, width) = spec.patch_grid(samples), spec.patch
    else:  # the spectrogram is one patch
        (freq, time), (height, width) = (1, 1), (spec.n_mels, kept)
    out = torch.empty(batch, freq, time, height, width, dtype=dtype, device=pcm.device)
    (bias, add), filled = spec.frame_rule, kept
    edge = (0 if spec.snip_edges else 1) if kaldi else (3 if spec.pad_mode == "constant" else 2 if spec.center else 0)
    if spec.n_samples is not None:  # the kernel computes the frames that start within the clip; the others are silent
        bias, add, filled = -spec.first_sample, 1, min(kept, frames)
    db = (10.0 if spec.power == 2 else 20.0) / math.log(10.0)
    (op or torch.ops.ajepa.log_mel_fwd)(
        pcm.detach().contiguous(),
        None if lengths is None else lengths.to(torch.int64).contiguous(),
        *_kernel_tables(spec, pcm.device),
        out,
        n_fft=spec.n_fft,
        hop_length=spec.hop_length,
        first_sample=spec.first_sample,
        edge=edge,
        frame_bias=bias,
        frame_add=add,
        min_samples=spec.min_samples,
        n_frames=filled,
        remove_dc=kaldi and spec.remove_dc_offset,
        preemphasis=spec.preemphasis if kaldi else 0.0,
        waveform_norm=("none", "mean", "peak").index(spec.waveform_norm),
        power=spec.power,
        floor=spec.log_floor,
        log_scale=(db if spec.log == "db" else 1.0) / spec.std,
        log_shift=-spec.mean / spec.std if take_log else 0.0,
        top=spec.top_db / spec.std if take_log and spec.top_db is not None else -1.0,
        take_log=take_log,
        pad=(spec.pad_value - spec.mean) / spec.std if take_log else 0.0,
        factor=spec.scale,
        n_samples=spec.n_samples or 0,
    )
    return out.view(batch, freq * time, height * width) if layout == "patches" else out.view(batch, spec.n_mels, kept)


if _extension.AVAILABLE:

    @torch.library.register_fake("ajepa::log_mel_fwd")
    def _(*arguments, **keywords):  # the op only writes `out`
        return None


def log_mel(
    pcm: torch.Tensor,
    spec: LogMelSpec,
    *,
    lengths: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "patches",
    impl: str = "auto",
    check: bool = False,
) -> torch.Tensor:
    """Log-mel features of PCM clips, as patches for a transformer or as a spectrogram, or mel values before the log.

    `LogMelSpec` has the formula and the conventions. NaN and Inf invalidate the frames that contain them (on CUDA also
    the frame that shares a transform with such a frame) and, with a waveform norm, the whole clip. With norm "mean" and
    each frame's own mean subtracted, the other frames may stay valid.

    Computed in float32. The result is within 2e-3 nat (0.01 dB) of float64, except in bands more than 80 dB below the
    loudest bin of their frame. (No band need hold that bin. It counts as it is before or after Kaldi's mean subtraction
    and pre-emphasis, whichever is louder.) There the error of any float32 transform, a few times 2^-24 of the loudest
    amplitude, is larger; torchaudio has it, too.

    The plain definition is differentiable and the kernels are not. A `pcm` that requires a gradient therefore takes the
    plain definition, and `impl="fused"` refuses it; nothing is detached silently.

    Args:
        pcm: `[B, S]` int16 (scaled by 1/32768) or float32 in [-1, 1].
        spec: the front end.
        lengths: number of samples of each clip, int32 or int64 `[B]` on pcm's device; the rest of a row is ignored.
            Frames after a clip's last one are rows of `spec.pad_value` (before `mean` and `std`); a clip shorter than
            `spec.min_samples` has no frames. With `spec.n_samples` every clip has all frames.
        dtype: dtype of the result: float32, bfloat16 or float16.
        layout: "patches", "spectrogram" or "mel": the mel values (of `spec.power`) without floor, log, `top_db`, `mean`
            and `std`, which are zero in the frames that a clip does not have.
        impl: "auto" runs the compiled kernel, or warns once and runs plain PyTorch if the kernel cannot run (float64,
            or on CUDA an `n_fft` without a kernel); "fused" requires the kernel; "reference" is plain PyTorch.
        check: raise ValueError for NaN or Inf in a clip and for `lengths` out of range, which makes the host wait for
            the device. Without it, lengths are clamped to 0..S.

    Returns:
        For "patches" `[B, N, P]`: token n = f * time_patches + t (frequency-major), and a patch is [mel, frame]
        flattened. For "spectrogram" and "mel" `[B, n_mels, frames]`, cropped or padded to `spec.n_frames`.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, or clips shorter than one window.
        RuntimeError: `impl="fused"` and the kernel cannot run; or the first call with a spec is in a graph capture.

    Example::

        pcm = torch.randint(-9999, 9999, (8, 320_000), dtype=torch.int16, device="cuda")
        patches = log_mel(pcm, LOG_MEL_PRESETS["audio-jepa"])  # [8, 128, 256]
    """
    _check(pcm, spec, lengths, dtype, layout)
    if impl not in ("auto", "fused", "reference"):
        raise ValueError(f"log_mel: impl must be 'auto', 'fused' or 'reference', got {impl!r}")
    if check:
        _check_values(pcm, spec, lengths)
    if impl == "auto" and pcm.requires_grad and torch.is_grad_enabled():
        impl = "reference"
    reason = "" if impl == "reference" else _kernel_reason(pcm, spec, dtype)
    if impl != "reference" and not reason:
        return _log_mel_fused(pcm, spec, lengths, dtype, layout)
    if impl == "fused":
        raise RuntimeError(f"log_mel: impl='fused' cannot run: {reason}; use impl='auto'")
    if reason:
        _extension.warn_plain("log_mel", reason)
    return log_mel_reference(pcm, spec, lengths=lengths, dtype=dtype, layout=layout)


class LogMel(torch.nn.Module):
    """`log_mel` as a module, in the place of torchaudio's `MelSpectrogram` and `AmplitudeToDB`.

    It has neither parameters nor buffers, so a state dict holds nothing of it; the tables of a front end are kept for
    each device by `log_mel`. A waveform that requires a gradient takes the plain definition, through which it flows.

    Args:
        spec: the front end.
        layout: "spectrogram" (as torchaudio's), "patches" or "mel".
        dtype: dtype of the result: float32, bfloat16 or float16; float64 runs as plain PyTorch.

    Raises:
        TypeError, ValueError: `spec` is no LogMelSpec, `lengths` does not have the shape of pcm's leading axes, or
            `log_mel` refuses the call.

    Example::

        front_end = LogMel(LogMelSpec(sample_rate=16000, n_mels=64))
        features = front_end(torch.randn(2, 1, 16000))  # [2, 1, 64, 98]
    """

    def __init__(self, spec: LogMelSpec, layout: Layout = "spectrogram", dtype: torch.dtype = torch.float32):
        super().__init__()
        if not isinstance(spec, LogMelSpec):
            raise TypeError(f"LogMel: spec must be a LogMelSpec, e.g. LOG_MEL_PRESETS['whisper'], got {spec!r}")
        self.spec, self.layout, self.dtype = spec, layout, dtype

    def forward(self, pcm: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """The features `[..., n_mels, frames]`, or `[..., N, P]` for "patches", of `pcm [..., S]`.

        The leading axes may be none, one or many. `lengths` has the leading axes' shape.
        """
        check_tensors("LogMel", pcm=pcm, lengths=lengths)
        if pcm.dim() == 0:
            raise ValueError("LogMel: pcm must be [..., S], got a scalar")
        leading = pcm.shape[:-1]
        if lengths is not None:
            if lengths.shape != leading:
                raise ValueError(f"LogMel: lengths must be {list(leading)} as pcm's, got {list(lengths.shape)}")
            lengths = lengths.reshape(-1)
        clips = pcm.reshape(math.prod(leading), pcm.shape[-1])
        out = log_mel(clips, self.spec, lengths=lengths, dtype=self.dtype, layout=self.layout)
        return out.view(*leading, *out.shape[1:])

    def extra_repr(self) -> str:
        """The layout, the dtype and the fields that differ from LogMelSpec's defaults."""
        default, options = LogMelSpec(), [f"layout={self.layout!r}", f"dtype={self.dtype}"]
        for field in fields(self.spec):
            if getattr(self.spec, field.name) != getattr(default, field.name):
                options.append(f"{field.name}={getattr(self.spec, field.name)!r}")
        return ", ".join(options)
