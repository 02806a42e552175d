"""One audio file, or one member of a tar: is it whole, and what are its bytes?

A source is (path, offset, size): a plain file has offset 0, a tar member is read in place and never extracted.
"""

import contextlib
import io
import os
import stat
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import soundfile as sf

# Containers looked for in folders and tars. The second set is audio that libsndfile cannot read: listed as skipped.
READABLE: tuple[str, ...] = (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3")
READABLE += (".aif", ".aiff", ".aifc", ".au", ".snd", ".w64", ".rf64", ".caf")
UNREADABLE = (".m4a", ".aac", ".mp4", ".wma", ".webm", ".mka", ".amr", ".ape", ".wv", ".ac3", ".dsf")

STREAMED = 0xFFFFFFFF  # chunk size written by programs that pipe a WAV out and cannot know its length
BLOCK = 1 << 17  # samples decoded at a time


class BadAudio(Exception):
    """The file cannot be used; the message is the reason, without the path."""


class Truncated(BadAudio):
    """The file ends early."""


class AudioInfo(NamedTuple):
    frames: int  # samples per channel, as decoded
    sample_rate: int  # Hz
    channels: int
    format: str  # libsndfile's names of container and encoding: WAV/PCM_16, FLAC/PCM_16, OGG/VORBIS...


class Window(io.RawIOBase):
    """Read-only, seekable view of bytes `[offset, offset + size)` of a file; nothing is held in memory."""

    def __init__(self, path: str, offset: int, size: int):
        self._fd, self._offset, self._size, self._position = os.open(path, os.O_RDONLY), offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, origin + position)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._size - self._position))
        got = os.preadv(self._fd, [memoryview(buffer)[:count]], self._offset + self._position) if count else 0
        self._position += got
        return got

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


def read_bytes(path: str, offset: int, size: int) -> np.ndarray:
    """The source's bytes, uint8 `[size]`. Raises BadAudio where the file ends early, OSError where it is unreadable."""
    data = np.empty(size, np.uint8)
    fd = os.open(path, os.O_RDONLY)
    try:
        read_into(data, fd, offset)
    finally:
        os.close(fd)
    return data


def read_into(data: np.ndarray, fd: int, offset: int) -> None:
    """Fills uint8 `data` from there on. Raises BadAudio where the file ends early, OSError where it is unreadable."""
    done = 0
    while done < len(data):
        got = os.preadv(fd, [data.data[done:]], offset + done)
        if not got:
            raise Truncated(f"truncated: {done} of {len(data)} bytes")
        done += got


def inspect(path: str, offset: int, size: int, *, in_tar: bool = False, decode: bool = True) -> AudioInfo:
    """Checks a source from end to end in bounded memory.

    Raises:
        BadAudio: empty, header only, truncated, garbage, no samples, not finite, or of no format libsndfile reads.
        OSError: it cannot be opened or read.
    """
    if size == 0:
        raise BadAudio("empty file")
    suffix = os.path.splitext(path)[1].lower()
    if not in_tar and suffix in UNREADABLE:
        raise BadAudio(f"unsupported format {suffix}: convert it to WAV, FLAC, Ogg or MP3")
    with Window(path, offset, size) as raw:
        head = raw.read(12)
        if head[:4] in (b"RIFF", b"FORM"):
            _check_chunks(raw, head, size)
        elif head[:4] == b"OggS":
            _check_last_page(raw, size)
        counted = not _is_mpeg(head) or _mp3_states_length(raw, head)
    try:
        with open_sound(path, offset, size, in_tar=in_tar) as sound:
            if not 1_000 <= sound.samplerate <= 1_000_000:
                raise BadAudio(f"implausible sample rate of {sound.samplerate} Hz")
            frames = _decode(sound) if decode or not counted else sound.frames
            if frames == 0:
                raise BadAudio("no samples")
            if frames < sound.frames and counted:
                raise BadAudio(f"truncated: {frames} of {sound.frames} samples decode")
            return AudioInfo(frames, sound.samplerate, sound.channels, f"{sound.format}/{sound.subtype}")
    except sf.LibsndfileError as error:
        text = error.error_string.strip().rstrip(".").removeprefix("Error : ")
        if "not recognised" in text or "not a regular file" in text:
            raise BadAudio("not a recognised audio format") from None
        raise BadAudio(f"cannot be decoded: {text}") from None


def open_sound(path: str, offset: int, size: int, *, in_tar: bool) -> sf.SoundFile:
    # libsndfile opens plain files itself: no Python call per block read.
    return sf.SoundFile(Window(path, offset, size) if in_tar else os.fsencode(path))


def read_segment(path: str, offset: int, size: int, start: int, count: int, *, in_tar: bool = False) -> np.ndarray:
    """Samples `[start, start + count)` of a source as the bytes of a float32 WAV, uint8; seeks, reads no more.

    Raises BadAudio where fewer samples decode, OSError where the file cannot be read.
    """
    with _segment(path, offset, size, start, in_tar) as sound:
        samples = sound.read(count, dtype="float32", always_2d=True)
    _check_count(samples, start, count)
    return wav_bytes(samples, sound.samplerate)


def read_int16(out: np.ndarray, path: str, offset: int, size: int, start: int, *, in_tar: bool = False) -> None:
    """Fills int16 `out` with samples of a mono file of 16-bit PCM, from `start` on; errors as `read_segment`."""
    with _segment(path, offset, size, start, in_tar) as sound:
        samples = sound.read(out=out)
    _check_count(samples, start, len(out))


@contextlib.contextmanager
def _segment(path: str, offset: int, size: int, start: int, in_tar: bool) -> Iterator[sf.SoundFile]:
    try:
        with open_sound(path, offset, size, in_tar=in_tar) as sound:
            sound.seek(start)
            yield sound
    except sf.LibsndfileError as error:
        raise BadAudio(f"cannot be decoded at sample {start}: {error.error_string.strip()}") from None


def _check_count(samples: np.ndarray, start: int, count: int) -> None:
    if len(samples) < count:
        raise BadAudio(f"truncated: {start + len(samples)} of {start + count} samples decode")


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


def _decode(sound: sf.SoundFile) -> int:
    """Counts the samples that decode, block by block; a header may claim any length."""
    block = np.empty((max(1, BLOCK // sound.channels), sound.channels), np.float32)
    check_finite = sound.subtype in ("FLOAT", "DOUBLE")
    frames = 0
    while got := len(samples := sound.read(out=block)):
        frames += got
        if check_finite and not np.isfinite(samples).all():
            raise BadAudio("samples that are not finite (NaN or infinity)")
    return frames


def _check_chunks(raw: Window, head: bytes, size: int) -> None:
    """WAV and AIFF: libsndfile plays what is left of a truncated file without a word, so compare the sizes here."""
    order, data_name = ("<I", b"data") if head[:4] == b"RIFF" else (">I", b"SSND")
    position = 12
    while position + 8 <= size:
        raw.seek(position)
        chunk = raw.read(8)
        (length,) = struct.unpack(order, chunk[4:])
        if chunk[:4] == data_name:
            present = size - position - 8
            if not present:
                raise BadAudio("header only, no samples")
            if length > present and length != STREAMED:
                raise BadAudio(f"truncated: {present} of {length} bytes of samples")
            return
        position += 8 + length + length % 2
    raise BadAudio("no samples")


def _check_last_page(raw: Window, size: int) -> None:
    """Ogg: a whole stream ends in a page flagged end-of-stream, and with it the file (or zero padding)."""
    raw.seek(max(0, size - 66_000))  # a page is at most 65,307 bytes
    tail = raw.read(66_000)
    page = tail.rfind(b"OggS")
    header = tail[page : page + 27]
    if page < 0 or len(header) < 27 or not header[5] & 4:
        raise BadAudio("truncated: no end-of-stream page")
    table = tail[page + 27 : page + 27 + header[26]]
    if len(table) < header[26] or page + 27 + len(table) + sum(table) > len(tail):
        raise BadAudio("truncated: the last page is cut short")


def _is_mpeg(head: bytes) -> bool:
    return head[:3] == b"ID3" or (head[0] == 0xFF and len(head) > 1 and head[1] & 0xE0 == 0xE0)


def _mp3_states_length(raw: Window, head: bytes) -> bool:
    """Whether an MP3's first frame states its length; else libsndfile's is an estimate and proves nothing."""
    start = 0
    if head[:3] == b"ID3" and len(head) >= 10:
        start = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9])
    raw.seek(start)
    frame = raw.read(256)
    return b"Xing" in frame or b"Info" in frame
