"""One audio file, or one member of a tar: is it whole, and what are its samples?

A source is (path, offset, size): a plain file has offset 0, a tar member is read in place and never extracted.
`ajepa.containers` judges the bytes, libsndfile decodes them. What either says depends on the bytes alone.
"""

import contextlib
import functools
import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import soundfile as sf

from ajepa import containers, streams
from ajepa.containers import BadAudio, Layout, Truncated, Window, open_fd, read_at
from ajepa.streams import MpegFrames, OpusPages, VorbisPages

__all__ = ["INT16", "READABLE", "UNREADABLE", "AudioInfo", "BadAudio", "Truncated", "Window"]  # and what follows

# Containers looked for in folders and tars. The second set is audio that libsndfile cannot read: listed as skipped.
READABLE: tuple[str, ...] = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3")
READABLE += (".aif", ".aiff", ".aifc", ".au", ".snd", ".w64", ".rf64", ".caf")
UNREADABLE = (".m4a", ".aac", ".mp4", ".wma", ".webm", ".mka", ".amr", ".ape", ".wv", ".ac3", ".dsf")

# Values of `AudioInfo.format` that decode to int16 without loss: 16-bit samples, stored as they are or losslessly.
INT16 = frozenset({"CAF/ALAC_16", *(f"{container}/PCM_16" for container in sf.available_formats())})
# Encodings in which libsndfile seeks to the exact sample. All others are decoded from the start, or by `Layout`.
SEEKABLE = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}
SEEKABLE |= {"IMA_ADPCM", "MS_ADPCM", "ALAC_16"}
W64_RIFF = bytes.fromhex("2e91cf11a5d628db04c10000")
OTHERS = (b"Crea", b"RIFF", b"FORM", b"2BIT")  # what else libsndfile knows by its first bytes
OPUS_RATE = 48_000  # Hz, the unit of an Opus stream whatever it decodes to
LOUD = 16.0  # float samples beyond this are no overshoot of 1.0: they are in another unit

BLOCK = 1 << 17  # samples decoded at a time


class AudioInfo(NamedTuple):
    frames: int  # samples per channel, as decoded
    sample_rate: int  # Hz
    channels: int
    format: str  # libsndfile's names of container and encoding: WAV/PCM_16, FLAC/PCM_16, OGG/VORBIS...


class Sound(sf.SoundFile):
    """A decoder that only moves when told to.

    soundfile seeks after each read of a seekable file, to where it already is. That restarts an MP3 decoder and fails
    in a FLAC whose header does not state its length.
    """

    def seekable(self) -> bool:
        return False


def inspect(
    path: str, offset: int, size: int, *, in_tar: bool = False, decode: bool = True, float_scale: float = 1.0
) -> AudioInfo:
    """Checks a source from end to end in bounded memory.

    Args:
        decode: decode all samples, which finds damage inside the file; False judges the container alone.
        float_scale: full scale of samples stored as floating point.

    Raises:
        BadAudio: empty, header only, truncated, garbage, no samples, not finite, or of no format libsndfile reads.
        OSError: it cannot be opened or read.
    """
    if size == 0:
        raise BadAudio("empty file")
    suffix = os.path.splitext(path)[1].lower()
    if not in_tar and suffix in UNREADABLE:
        raise BadAudio(f"unsupported format {suffix}: convert it to WAV, FLAC, Ogg or MP3")
    layout = _layout(path, offset, size, thorough=True)
    with _opened(path, offset, size, in_tar, layout) as sound:
        if not 1_000 <= sound.samplerate <= 1_000_000:
            raise BadAudio(f"implausible sample rate of {sound.samplerate} Hz")
        stated = sound.frames if layout.frames is None else layout.frames
        if decode or layout.must_decode:
            frames = sum(len(block) for block in _blocks(sound, np.dtype(np.float32), float_scale, BLOCK))
        else:
            frames = stated
        if frames == 0:
            raise BadAudio("no samples")
        if frames < stated and not layout.must_decode:
            raise BadAudio(f"truncated: {frames} of {stated} samples decode")
        return AudioInfo(frames, sound.samplerate, sound.channels, _format(sound, layout))


def read_samples(
    path: str,
    offset: int,
    size: int,
    start: int,
    count: int,
    *,
    in_tar: bool = False,
    format: str,
    float_scale: float = 1.0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Samples `[start, start + count)` of a source, `[count, channels]`, as a decode from its start gives them.

    Args:
        format: the source's `AudioInfo.format`.
        float_scale: full scale of samples stored as floating point.
        out: int16 `[count]` to fill and return, for a mono source whose format is in `INT16`.

    Returns:
        int16 where `format` is in `INT16`, else float32 in [-1, 1).

    Raises:
        BadAudio: fewer samples decode, or the source is not what `format` says.
        OSError: it cannot be opened or read.
    """
    whole = _layout(path, offset, size, thorough=False)
    layout, skip, behind = _part(path, offset, size, in_tar, whole, start, count)
    dtype = np.dtype(np.int16 if format in INT16 else np.float32)
    with _opened(path, offset, size, in_tar, layout) as sound:
        if _format(sound, layout) != format:
            raise BadAudio(f"changed: {_format(sound, layout)}, no longer {format}")
        if behind is not None:
            samples = np.concatenate([block.copy() for block in _blocks(sound, dtype, 1.0, BLOCK)])
            samples = samples[max(0, start - behind + len(samples)) :][:count]
        else:
            _skip(sound, skip, layout)
            samples = sound.read(count, dtype.name, always_2d=True) if out is None else sound.read(out=out)
        if len(samples) < count:
            raise BadAudio(f"truncated: {start + len(samples)} of {start + count} samples decode")
        return samples if out is not None else _scaled(samples, sound, float_scale)


def _part(
    path: str, offset: int, size: int, in_tar: bool, layout: Layout, start: int, count: int
) -> tuple[Layout, int, int | None]:
    """What to decode for samples `[start, start + count)`: a layout; the samples to discard at its beginning or, where
    only its end is known, the number of the sample behind it."""
    if isinstance(layout.index, MpegFrames):
        layout, start = layout.index.part(path, offset, start, count) or (layout, start)
    elif isinstance(layout.index, VorbisPages):
        index = layout.index
        if index.origin is None:
            with _opened(path, offset, size, in_tar, layout) as sound:
                index.origin = index.granules[-1] - sound.frames if index.granules else 0
        part = index.part(start + index.origin, count)
        if part is not None:
            return part[0], 0, part[1] - index.origin
    return layout, start, None


def iterate_samples(
    path: str,
    offset: int,
    size: int,
    *,
    in_tar: bool = False,
    format: str,
    float_scale: float = 1.0,
    block: int = BLOCK,
) -> Iterator[np.ndarray]:
    """The whole recording in order, as blocks `[n, channels]` that are the caller's to keep.

    For arguments, dtype and errors see `read_samples`.
    """
    layout = _layout(path, offset, size, thorough=True)
    with _opened(path, offset, size, in_tar, layout) as sound:
        if _format(sound, layout) != format:
            raise BadAudio(f"changed: {_format(sound, layout)}, no longer {format}")
        stated = sound.frames if layout.frames is None else layout.frames
        frames = 0
        for samples in _blocks(sound, np.dtype(np.int16 if format in INT16 else np.float32), float_scale, block):
            frames += len(samples)
            yield samples.copy()
        if frames < stated and not layout.must_decode:
            raise BadAudio(f"truncated: {frames} of {stated} samples decode")


def open_sound(path: str, offset: int, size: int, *, in_tar: bool) -> sf.SoundFile:
    return _open(path, offset, size, in_tar, _layout(path, offset, size, thorough=False))[0]


def _layout(path: str, offset: int, size: int, *, thorough: bool) -> Layout:
    """Raises BadAudio where the bytes show that samples are missing, OSError where they cannot be read."""
    changed = os.stat(path)
    return _layout_cached(path, offset, size, thorough, changed.st_mtime_ns, changed.st_ino)


@functools.lru_cache(maxsize=2048)
def _layout_cached(path: str, offset: int, size: int, thorough: bool, *_: int) -> Layout:
    try:
        with Window(path, offset, size) as raw:
            return _judge(raw, size, thorough)
    except (struct.error, IndexError, KeyError) as error:  # no header is to be trusted so far
        raise BadAudio(f"cannot be read: its header is damaged ({error})") from None


def _judge(raw: Window, size: int, thorough: bool) -> Layout:
    begin = 0
    while tag := containers.id3_size(raw.read_at(begin, 10)):
        begin += tag
    magic = raw.read_at(begin, 16)
    name, form = magic[:4], magic[8:12]
    if magic == b"":
        raise BadAudio("no samples: it holds nothing but a tag") if begin else Truncated("truncated: 0 bytes")
    if name == b"fLaC":
        return containers.flac(raw, begin, size, thorough)
    if name == b"OggS":
        return streams.ogg(raw, begin, size)
    if begin == 0 and name in (b"RIFF", b"RIFX", b"RF64", b"BW64") and form == b"WAVE":
        return containers.chunked(raw, size, containers.RIFX if name == b"RIFX" else containers.RIFF, 12)
    if begin == 0 and name == b"FORM" and form in (b"AIFF", b"AIFC"):
        return containers.chunked(raw, size, containers.AIFF, 12)
    if begin == 0 and name == b"caff":
        return containers.chunked(raw, size, containers.CAF, 8)
    if begin == 0 and magic == b"riff" + W64_RIFF:
        return containers.chunked(raw, size, containers.W64, 40)
    if begin == 0 and name in (b".snd", b"dns."):
        return containers.au(raw, size)
    if begin == 0 and name == b"NIST":
        return containers.nist(raw, size)
    if name == b"\0\x05\x16\x07":
        raise BadAudio("not a recognised audio format")  # what macOS keeps beside a file, under the file's own suffix
    if begin or magic[0] in (0, 0xFF) or not any(name == other for other in OTHERS):
        layout = streams.mpeg(raw, begin, containers.before_tags(raw, size))
        if layout is not None:
            return layout
    return Layout()


def _open(path: str, offset: int, size: int, in_tar: bool, layout: Layout) -> tuple[Sound, Window | None]:
    if in_tar or not layout.whole or os.name == "nt":
        window = layout.window(path, offset, size)
        return Sound(window), window
    # By descriptor, for libsndfile given a name looks at the files beside it. It reads without a Python call per block.
    return Sound(open_fd(path), closefd=True), None


@contextlib.contextmanager
def _opened(path: str, offset: int, size: int, in_tar: bool, layout: Layout) -> Iterator[Sound]:
    """The decoder; whatever goes wrong inside it is raised as BadAudio or OSError."""
    window = None
    try:
        sound, window = _open(path, offset, size, in_tar, layout)
        with sound:
            yield sound
    except sf.LibsndfileError as error:
        if window is not None and window.failure is not None:
            raise window.failure from None
        text = error.error_string.strip().rstrip(".").removeprefix("Error : ")
        if "not recognised" in text or "not a regular file" in text:
            raise BadAudio("not a recognised audio format") from None
        raise BadAudio(f"cannot be decoded: {text}") from None
    except (RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        raise BadAudio(f"cannot be decoded: {str(error) or type(error).__name__}") from None
    finally:
        if window is not None:
            window.close()
    if window is not None and window.failure is not None:
        raise window.failure


def _format(sound: Sound, layout: Layout) -> str:
    return f"{layout.container or sound.format}/{sound.subtype}"


def _blocks(sound: Sound, dtype: np.dtype, float_scale: float, block: int) -> Iterator[np.ndarray]:
    """All samples; a header may claim any length. The same memory is used for each block."""
    buffer = np.empty((max(1, block // sound.channels), sound.channels), dtype)
    while len(samples := sound.read(out=buffer)):
        yield _scaled(samples, sound, float_scale)


def _skip(sound: Sound, start: int, layout: Layout) -> None:
    """Moves from the first sample to sample `start`; the samples that follow are those of a decode from the first."""
    if sound.subtype in SEEKABLE and layout.seekable:
        sound.seek(start)
        return
    if isinstance(layout.index, OpusPages):
        unit = OPUS_RATE / sound.samplerate
        origin = layout.index.granules[-1] - sound.frames * unit
        begin = int(layout.index.begin(int(start * unit + origin)) / unit)
        if begin > 0:
            sound.seek(begin)
            start -= begin
    buffer = np.empty((max(1, min(start, BLOCK // sound.channels)), sound.channels), np.float32)
    while start and (got := len(sound.read(out=buffer[:start]))):
        start -= got


def _scaled(samples: np.ndarray, sound: Sound, float_scale: float) -> np.ndarray:
    if sound.subtype not in ("FLOAT", "DOUBLE") or not len(samples):
        return samples
    if float_scale != 1.0:
        samples /= np.float32(float_scale)
    peak = max(float(samples.max()), -float(samples.min()))
    if not np.isfinite(peak):
        raise BadAudio("samples that are not finite (NaN or infinity)")
    if peak > LOUD:
        raise BadAudio(
            f"float samples reach {peak:,.0f} where full scale is 1.0: if they are 16-bit values stored as floating "
            "point, pass --float-scale 32768"
        )
    return samples


def read_bytes(path: str, offset: int, size: int) -> np.ndarray:
    """The source's bytes, uint8 `[size]`. Raises BadAudio where the file ends early, OSError where it is unreadable."""
    data = np.empty(size, np.uint8)
    fd = open_fd(path)
    try:
        read_into(data, fd, offset)
    finally:
        os.close(fd)
    return data


def read_into(data: np.ndarray, fd: int, offset: int) -> None:
    """Fills uint8 `data` from there on. Raises BadAudio where the file ends early, OSError where it is unreadable."""
    done = read_at(fd, data.data, offset)
    if done < len(data):
        raise Truncated(f"truncated: {done} of {len(data)} bytes")


# Nobody is to call the next two any more: `read_samples` takes their place.


def read_segment(path: str, offset: int, size: int, start: int, count: int, *, in_tar: bool = False) -> np.ndarray:
    """Samples `[start, start + count)` of a source as the bytes of a float32 WAV, uint8."""
    info = inspect(path, offset, size, in_tar=in_tar, decode=False)
    samples = read_samples(path, offset, size, start, count, in_tar=in_tar, format=info.format)
    if samples.dtype == np.int16:
        samples = samples / np.float32(32768)
    return wav_bytes(samples, info.sample_rate)


def read_int16(out: np.ndarray, path: str, offset: int, size: int, start: int, *, in_tar: bool = False) -> None:
    """Fills int16 `out` with samples of a mono file of 16-bit PCM, from `start` on; errors as `read_segment`."""
    format = inspect(path, offset, size, in_tar=in_tar, decode=False).format
    read_samples(path, offset, size, start, len(out), in_tar=in_tar, format=format, out=out)


def wav_bytes(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 or int16 samples `[frames, channels]` as the bytes of a WAV file, uint8."""
    body, width, channels = samples.tobytes(), samples.dtype.itemsize, samples.shape[1]
    kind = 1 if samples.dtype == np.int16 else 3
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(body), b"WAVE", b"fmt ", 16, kind, channels, rate,
                         rate * channels * width, channels * width, 8 * width, b"data", len(body))  # fmt: skip
    return np.frombuffer(header + body, np.uint8)


def stat_file(path: str) -> tuple[int, int]:
    """(size in bytes, mtime in ns). Raises BadAudio for a folder, pipe or device, OSError where there is nothing."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise BadAudio("not a regular file")  # opening a named pipe would wait for ever
    return info.st_size, info.st_mtime_ns


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reason_of(error: Exception) -> str:
    """In the words of a list of skipped files."""
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
