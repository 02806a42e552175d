"""Checks whether an audio file, or the member of a tar, is whole, and reads its samples.

A source is (path, offset, size): a plain file has offset 0, and a tar member is read in place without extracting it.
`ajepa.data.formats.containers` examines the bytes, and libsndfile decodes them. Both results depend only on the bytes.
"""

import contextlib
import functools
import os
import stat
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import soundfile as sf

from ajepa.data.formats import containers, flac, streams
from ajepa.data.formats.containers import BadAudio, Layout, Truncated, Window, open_fd, read_at
from ajepa.data.formats.streams import MpegFrames, OpusPages, VorbisPages

__all__ = [
    "INT16",
    "READABLE",
    "UNREADABLE",
    "AudioInfo",
    "BadAudio",
    "Truncated",
    "Window",
    "audio_bytes",
    "inspect",
    "iterate_samples",
    "read_bytes",
    "read_into",
    "read_samples",
    "reason_of",
    "stat_file",
    "wav_bytes",
]

# Suffixes of the audio files in folders and tars. libsndfile cannot read the second set: it is listed as skipped.
READABLE: tuple[str, ...] = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3")
READABLE += (".aif", ".aiff", ".aifc", ".au", ".snd", ".w64", ".rf64", ".caf")
UNREADABLE = (".m4a", ".aac", ".mp4", ".wma", ".webm", ".mka", ".amr", ".ape", ".wv", ".ac3", ".dsf")

# Values of `AudioInfo.format` that decode to int16 without loss: 16-bit samples, uncompressed or losslessly compressed.
INT16 = frozenset({"CAF/ALAC_16", *(f"{container}/PCM_16" for container in sf.available_formats())})
PLAIN = {"WAV/PCM_16", "WAVEX/PCM_16"}  # read without libsndfile
# Encodings in which libsndfile seeks to the exact sample. Others are decoded from the start, or by `Layout.index`.
SEEKABLE = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}
SEEKABLE |= {"IMA_ADPCM", "MS_ADPCM", "ALAC_16"}
OTHERS = (b"Crea", b"RIFF", b"FORM", b"2BIT")  # first bytes of the other formats that libsndfile recognises
OPUS_RATE = 48_000  # Hz; an Opus stream counts samples at this rate, whatever rate it decodes to
LOUD = 16.0  # float samples beyond this do not just overshoot 1.0: they are in another unit

RATES = (1_000, 384_000)  # Hz; the lowest and highest sample rate that is plausible and can be resampled
BLOCK = 1 << 17  # samples decoded at a time


class AudioInfo(NamedTuple):
    frames: int  # samples per channel, as decoded
    sample_rate: int  # Hz
    channels: int
    format: str  # libsndfile's names of container and encoding: WAV/PCM_16, FLAC/PCM_16, OGG/VORBIS...


class Sound(sf.SoundFile):
    """A decoder that seeks only when `seek` is called.

    After each read of a seekable file, soundfile seeks to the current position. That restarts an MP3 decoder and fails
    in a FLAC whose header does not state its length.
    """

    def seekable(self) -> bool:
        return False


def inspect(
    path: str, offset: int, size: int, *, in_tar: bool = False, decode: bool = True, float_scale: float = 1.0
) -> AudioInfo:
    """Checks a source from end to end in bounded memory.

    Args:
        decode: True decodes all samples, which finds damage inside the file. False checks only the container.
        float_scale: full scale of samples stored as floating point.

    Raises:
        BadAudio: the source is empty, header only, truncated, garbage, without samples, not finite, or in a format that
            libsndfile does not read.
        OSError: the file cannot be opened or read.
    """
    if size == 0:
        raise BadAudio("empty file")
    suffix = os.path.splitext(path)[1].lower()
    if not in_tar and suffix in UNREADABLE:
        raise BadAudio(f"unsupported format {suffix}: convert it to WAV, FLAC, Ogg or MP3")
    layout = _layout(path, offset, size, thorough=True)
    with _opened(path, offset, size, in_tar, layout) as sound:
        if not RATES[0] <= sound.samplerate <= RATES[1]:
            raise BadAudio(f"implausible sample rate of {sound.samplerate} Hz")
        promised = frames = _promised(sound, layout, size)
        if decode or promised is None or layout.must_decode:
            frames = sum(len(block) for block in _blocks(sound, np.dtype(np.float32), float_scale, BLOCK))
        if not frames:
            raise BadAudio("no samples")
        _check_count(frames, promised)
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
    """Samples `[start, start + count)` of a source, `[count, channels]`, exactly as a decode from its start gives them.

    Args:
        format: the source's `AudioInfo.format`.
        float_scale: full scale of samples stored as floating point.
        out: int16 `[count]` to fill and return, for a mono source whose format is in `INT16`.

    Returns:
        int16 if `format` is in `INT16`, else float32 in [-1, 1).

    Raises:
        BadAudio: fewer samples decode, or the source no longer has this format.
        OSError: the file cannot be opened or read.
    """
    if format in PLAIN and sys.byteorder == "little":
        samples = _read_plain(path, offset, size, start, count, out)
        if samples is not None:
            return samples
    whole = _layout(path, offset, size, thorough=False)
    if whole.frames is not None and start + count > whole.frames:
        raise BadAudio(f"truncated: {whole.frames} of {start + count} samples")
    layout, skip, part_end = _part(path, offset, size, in_tar, whole, start, count)
    dtype = np.dtype(np.int16 if format in INT16 else np.float32)
    with _opened(path, offset, size, in_tar, layout) as sound:
        if _format(sound, layout) != format:
            raise BadAudio(f"changed: {_format(sound, layout)}, no longer {format}")
        promised = _promised(sound, layout, size) if layout is whole else None
        if promised is not None and start + count > promised:
            raise BadAudio(f"truncated: {promised} of {start + count} samples")
        if part_end is not None:
            samples = np.concatenate([block.copy() for block in _blocks(sound, dtype, 1.0, BLOCK)])
            samples = samples[max(0, start - part_end + len(samples)) :][:count]
        else:
            _skip(sound, skip, layout)
            samples = sound.read(count, dtype.name, always_2d=True) if out is None else sound.read(out=out)
        if len(samples) < count:
            raise BadAudio(f"truncated: {start + len(samples)} of {start + count} samples decode")
        return samples if out is not None else _scaled(samples, sound, float_scale)


def _read_plain(path: str, offset: int, size: int, start: int, count: int, out: np.ndarray | None) -> np.ndarray | None:
    """The samples of a WAV that needs no decoder, None for any other file.

    The header is read each time, because a data set has more files than a cache could hold.
    """
    header = bytearray(min(size, containers.PLAIN_HEADER))
    fd = open_fd(path)
    try:
        got = containers.read_at(fd, memoryview(header), offset)
        plain = containers.plain_wav(bytes(header[:got]), size)
        if plain is None:
            return None
        samples, frame = np.empty((count, plain.channels), np.int16) if out is None else out, 2 * plain.channels
        got = containers.read_at(fd, samples.data, offset + plain.begin + start * frame) // frame
    finally:
        os.close(fd)
    if got < count or start + count > plain.frames:
        raise Truncated(f"truncated: {min(start + got, plain.frames)} of {start + count} samples decode")
    return samples


def _part(
    path: str, offset: int, size: int, in_tar: bool, layout: Layout, start: int, count: int
) -> tuple[Layout, int, int | None]:
    """The part of a source to decode for samples `[start, start + count)`: (layout, skip, end).

    `skip` samples must be discarded at the start of the layout. If only the end of the layout is known, `end` is the
    number of the sample after it, else None.
    """
    if isinstance(layout.index, MpegFrames):
        part = layout.index.part(path, offset, start, count)
        if part is not None:
            return part[0]._replace(container=layout.container), part[1], None
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
    """Yields the whole recording in order, as blocks `[n, channels]` that the caller may keep.

    Arguments, dtype and errors are those of `read_samples`.
    """
    layout = _layout(path, offset, size, thorough=True)
    with _opened(path, offset, size, in_tar, layout) as sound:
        if _format(sound, layout) != format:
            raise BadAudio(f"changed: {_format(sound, layout)}, no longer {format}")
        promised, frames = _promised(sound, layout, size), 0
        for samples in _blocks(sound, np.dtype(np.int16 if format in INT16 else np.float32), float_scale, block):
            frames += len(samples)
            yield samples.copy()
        _check_count(frames, promised)


def _layout(path: str, offset: int, size: int, *, thorough: bool) -> Layout:
    """The layout of a source. Raises BadAudio if its bytes show missing samples, OSError if it is unreadable."""
    state = os.stat(path)
    layout = _layout_cached(path, offset, size, state.st_mtime_ns, state.st_ino)
    if thorough and layout.unproven:
        with Window(path, offset, size) as raw:
            return flac.judge(raw, layout.begin, size, True)
    return layout


@functools.lru_cache(maxsize=256)
def _layout_cached(path: str, offset: int, size: int, *changed: int) -> Layout:
    try:
        with Window(path, offset, size) as raw:
            begin = 0
            for _ in range(16):
                begin += containers.id3_size(raw.read_at(begin, 10))
            magic = raw.read_at(begin, 12)
            if not magic:
                raise BadAudio("no samples: it holds nothing but a tag") if begin else Truncated("truncated: 0 bytes")
            if magic[:4] == b"fLaC":
                return flac.judge(raw, begin, size, False)
            if magic[:4] == b"OggS":
                return streams.ogg(raw, begin, size)
        if begin and magic[:4] in (b"RIFF", b"FORM"):
            layout = _layout_cached(path, offset + begin, size - begin, *changed)
            end = begin + layout.end if layout.end else None
            return layout._replace(begin=begin + layout.begin, end=end)
        with Window(path, offset, size) as raw:
            return _judge(raw, begin, size)
    except (struct.error, IndexError, KeyError) as error:  # parsing a damaged header fails
        raise BadAudio(f"cannot be read: its header is damaged ({error})") from None


def _judge(raw: Window, begin: int, size: int) -> Layout:
    magic = raw.read_at(0, 16)
    name, form = magic[:4], magic[8:12]
    if name in (b"RIFF", b"RIFX", b"RF64", b"BW64") and form == b"WAVE":
        layout = containers.chunked(raw, size, containers.RIFX if name == b"RIFX" else containers.RIFF, 12)
        if layout.mpeg and layout.end is not None:
            frames = streams.mpeg(raw, layout.begin, layout.end)
            return Layout() if frames is None else frames._replace(container="WAV")
        return layout
    if name == b"FORM" and form in (b"AIFF", b"AIFC"):
        return containers.chunked(raw, size, containers.AIFF, 12)
    if name == b"caff":
        return containers.chunked(raw, size, containers.CAF, 8)
    if magic == b"riff" + containers.W64_RIFF:
        return containers.chunked(raw, size, containers.W64, 40)
    if name in (b".snd", b"dns."):
        return containers.au(raw, size)
    if name == b"NIST":
        return containers.nist(raw, size)
    if name == b"\0\x05\x16\x07":  # a resource fork, which macOS stores beside a file under the same suffix
        raise BadAudio("not a recognised audio format")
    if name in OTHERS:
        return Layout()
    return streams.mpeg(raw, begin, containers.before_tags(raw, size)) or Layout()


def _open(path: str, offset: int, size: int, in_tar: bool, layout: Layout) -> tuple[Sound, Window | None]:
    if in_tar or not layout.whole or os.name == "nt":
        window = layout.window(path, offset, size)
        return Sound(window), window
    # With a file name, libsndfile would look at neighbouring files. With a descriptor it reads without calling Python.
    return Sound(open_fd(path), closefd=True), None


@contextlib.contextmanager
def _opened(path: str, offset: int, size: int, in_tar: bool, layout: Layout) -> Iterator[Sound]:
    """Opens a decoder. Its errors inside the `with` block are raised as BadAudio or OSError."""
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
    except (RuntimeError, ValueError, OverflowError, MemoryError) as error:
        raise BadAudio(f"cannot be decoded: {str(error) or type(error).__name__}") from None
    finally:
        if window is not None:
            window.close()
    if window is not None and window.failure is not None:
        raise window.failure


def _format(sound: Sound, layout: Layout) -> str:
    return f"{layout.container or sound.format}/{sound.subtype}"


def _promised(sound: Sound, layout: Layout, size: int) -> int | None:
    """The number of samples that the source states, or None. Raises BadAudio if its bytes cannot hold so many."""
    if layout.frames is None and (layout.must_decode or layout.overstate):
        return None
    frames = sound.frames if layout.frames is None else layout.frames
    compressed = sound.format in ("FLAC", "OGG", "MP3") or sound.subtype.startswith("ALAC")
    # Compressed silence reaches the first limit, one bit per sample the second.
    if frames > (8192 if compressed else 8) * size + 65_536:
        raise BadAudio(f"its header claims {frames:,} samples, more than {size:,} bytes can hold")
    return frames


def _check_count(frames: int, promised: int | None) -> None:
    if promised is not None and frames < promised:
        raise BadAudio(f"truncated: {frames} of {promised} samples decode")
    if promised is not None and frames > promised:
        raise BadAudio(f"damaged: {frames} samples decode where its header states {promised}")


def _blocks(sound: Sound, dtype: np.dtype, float_scale: float, block: int) -> Iterator[np.ndarray]:
    """Yields all samples in blocks that reuse the same memory, because a header may claim any length."""
    buffer, left = np.empty((max(1, block // sound.channels), sound.channels), dtype), sound.frames
    # Do not read more than libsndfile counted: at the end of an Opus stream without an end mark it reports an error.
    while left > 0 and len(samples := sound.read(out=buffer[: min(left, len(buffer))])):
        left -= len(samples)
        yield _scaled(samples, sound, float_scale)


def _skip(sound: Sound, start: int, layout: Layout) -> None:
    """Moves from the first sample to sample `start`; what follows equals a decode from the first sample."""
    if sound.subtype in SEEKABLE and layout.seekable:
        sound.seek(start)
        return
    if isinstance(layout.index, OpusPages) and layout.index.granules:
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
    """The bytes of a source, uint8 `[size]`. Raises BadAudio if the file ends early, OSError if it is unreadable."""
    data = np.empty(size, np.uint8)
    fd = open_fd(path)
    try:
        read_into(data, fd, offset)
    finally:
        os.close(fd)
    return data


def audio_bytes(path: str, offset: int, size: int) -> np.ndarray:
    """The bytes of a source for another decoder, uint8: without tags, and with the length filled in if it was missing.

    The errors are those of `inspect`.
    """
    with _layout(path, offset, size, thorough=False)._replace(overstate=False).window(path, offset, size) as window:
        data = window.read_at(0, window.size)
    if data[:4] == b"fLaC" and not 0 < int.from_bytes(data[18:26], "big") & (1 << 36) - 1 <= 8192 * size:
        raise BadAudio("damaged: its header claims no length, or more than its bytes can hold")  # decoders crash on it
    return np.frombuffer(data, np.uint8)


def read_into(data: np.ndarray, fd: int, offset: int) -> None:
    """Fills uint8 `data` from byte `offset` on. Raises BadAudio if the file ends early, OSError if it is unreadable."""
    done = read_at(fd, data.data, offset)
    if done < len(data):
        raise Truncated(f"truncated: {done} of {len(data)} bytes")


def wav_bytes(samples: np.ndarray, rate: int) -> np.ndarray:
    """The bytes of a WAV file, uint8, of float32 or int16 samples `[frames, channels]`."""
    body, width, channels = samples.tobytes(), samples.dtype.itemsize, samples.shape[1]
    kind = 1 if samples.dtype == np.int16 else 3
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(body), b"WAVE", b"fmt ", 16, kind, channels, rate,
                         rate * channels * width, channels * width, 8 * width, b"data", len(body))  # fmt: skip
    return np.frombuffer(header + body, np.uint8)


def stat_file(path: str) -> tuple[int, int]:
    """(size in bytes, mtime in ns). Raises BadAudio if the path is not a regular file, OSError if it does not exist."""
    info = os.stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise BadAudio("not a regular file")  # opening a named pipe would block forever
    return info.st_size, info.st_mtime_ns


def reason_of(error: Exception) -> str:
    """The reason to list for a file that is skipped because of `error`."""
    return (error.strerror or str(error)).lower() if isinstance(error, OSError) else str(error)
