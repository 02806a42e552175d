"""Examines the bytes of an audio file: finds where its samples are, and whether all of them are present."""

import io
import os
import re
import struct
import threading
from typing import Any, NamedTuple

TAG = 128  # bytes of an ID3v1 tag
_position = threading.Lock()  # threads share the position of a descriptor where the system has no positional read


class BadAudio(Exception):
    """The file cannot be used; the message is the reason, without the path."""


class Truncated(BadAudio):
    """The file ends early."""


def open_fd(path: str) -> int:
    return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))


def read_at(fd: int, buffer: memoryview, position: int) -> int:
    """Fills `buffer` from byte `position` of the file on. Returns the bytes read, which are fewer only at its end."""
    buffer, done = memoryview(buffer).cast("B"), 0
    while done < len(buffer):
        if hasattr(os, "preadv"):
            got = os.preadv(fd, [buffer[done:]], position + done)
        elif hasattr(os, "pread"):
            data = os.pread(fd, len(buffer) - done, position + done)
            got = len(data)
            buffer[done : done + got] = data
        else:
            with _position:
                os.lseek(fd, position + done, os.SEEK_SET)
                data = os.read(fd, len(buffer) - done)
            got = len(data)
            buffer[done : done + got] = data
        if not got:
            break
        done += got
    return done


class Window(io.RawIOBase):
    """Read-only, seekable view of `head`, then bytes `[offset, offset + size)` of a file, then `tail`.

    A read error is kept in `failure` and looks like the end of the file, because a decoder's callback cannot raise.

    Args:
        claimed: size in bytes to report if larger than the true one, so that a decoder overestimates the samples.
    """

    def __init__(self, path: str, offset: int, size: int, head: bytes = b"", tail: bytes = b"", claimed: int = 0):
        self._fd, self._offset, self._head, self._tail, self._position = open_fd(path), offset, head, tail, 0
        self._tail_at = len(head) + size
        self._size = self._tail_at + len(tail)
        self.size = max(claimed, self._size)
        self.failure: OSError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, origin + position)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        view = memoryview(buffer).cast("B")
        if self._size < self.size and self._position >= self.size - TAG:
            view[:] = bytes(len(view))  # libmpg123 looks for a tag here, and fails if the file ends before it
            self._position += len(view)
            return len(view)
        view = view[: max(0, min(len(view), self._size - self._position))]
        got = 0
        try:
            while got < len(view) and (count := self._read_part(view[got:], self._position + got)):
                got += count
        except OSError as error:
            self.failure = error
        self._position += got
        return got

    def _read_part(self, view: memoryview, position: int) -> int:
        if len(self._head) <= position < self._tail_at:
            return read_at(self._fd, view[: self._tail_at - position], self._offset + position - len(self._head))
        part, at = (self._head, position) if position < len(self._head) else (self._tail, position - self._tail_at)
        data = part[at : at + len(view)]
        view[: len(data)] = data
        return len(data)

    def read_at(self, position: int, count: int) -> bytes:
        """`count` bytes from `position` on, fewer only at the end. Raises OSError."""
        self.seek(position)
        buffer = bytearray(max(0, min(count, self._size - position)))
        got = self.readinto(buffer)
        if self.failure is not None:
            raise self.failure
        return bytes(buffer[:got])

    def close(self) -> None:
        if not self.closed:
            os.close(self._fd)
        super().close()


class Plain(NamedTuple):
    """Little-endian 16-bit samples that can be read from the file without decoding."""

    begin: int  # bytes before the samples
    channels: int
    frames: int


class Layout(NamedTuple):
    """The bytes to give to a decoder, and what is known about them without decoding."""

    begin: int = 0  # where the audio begins in the source, after tags or garbage
    end: int | None = None  # where the audio ends, before tags; None: at the end of the source
    head: bytes = b""  # placed before the audio
    tail: bytes = b""  # placed after the audio
    container: str = ""  # name of the container, if `head` makes libsndfile report another
    frames: int | None = None  # samples per channel; None: the decoder reports them
    must_decode: bool = False  # only decoding shows whether it is whole and how many samples it holds
    mpeg: bool = False  # the bytes are MPEG frames, not examined yet
    unproven: bool = False  # a FLAC whose end was not examined
    seekable: bool = True  # False: the decoder cannot seek, even if the encoding is seekable
    overstate: bool = False  # present the audio to the decoder as longer than it is
    index: Any = None  # the positions at which decoding can begin

    @property
    def whole(self) -> bool:
        """Whether a decoder can be given the unchanged source."""
        return not (self.begin or self.head or self.tail or self.end is not None or self.overstate)

    def window(self, path: str, offset: int, size: int) -> Window:
        length = (size if self.end is None else self.end) - self.begin
        # The largest frame of an MPEG stream can have 120 times the bytes of the smallest.
        claimed = 128 * (length + len(self.head)) + TAG if self.overstate else 0
        return Window(path, offset + self.begin, length, self.head, self.tail, claimed)


def more_sound(finding: str, remedy: str) -> BadAudio:
    return BadAudio(f"holds more sound than its header says: {finding}: {remedy}")


def id3_size(head: bytes) -> int:
    """Size in bytes of the ID3v2 tag whose first ten bytes are `head`; 0 if they do not begin a tag."""
    if head[:3] != b"ID3" or len(head) < 10 or max(head[6:10]) > 127:
        return 0
    size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
    return size + (20 if head[5] & 16 else 10)


def before_tags(raw: Window, end: int) -> int:
    """Where the tags at the end of a stream begin: ID3v1, APE, Lyrics3 and ID3v2 footers, in any order."""
    while True:
        tail = raw.read_at(max(0, end - 160), min(end, 160))
        if tail[-128:-125] == b"TAG":
            size = 128
        elif tail[-32:-24] == b"APETAGEX":
            size, flags = struct.unpack("<I4xI", tail[-20:-8])
            size += 32 if flags >> 31 else 0
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            size = int(tail[-15:-9]) + 15
        elif tail[-10:-7] == b"3DI":
            size = id3_size(b"ID3" + tail[-7:])
        else:
            return end
        if not 0 < size <= end:
            return end
        end -= size


# --- containers that state how many bytes of samples they hold -------------------------------------------------------

# A program that writes into a pipe cannot state the length. It writes one of these values, or the largest whole number
# of sample frames below it, sometimes minus the bytes of the header.
UNKNOWN_32 = (0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x7FFFF000, 0x7F000000)
UNKNOWN_64 = (2**64 - 1, 2**63 - 1, 2**63)
CHUNKS = 10_000  # at most this many chunks are examined
STRAY = 4096  # up to this many unexplained bytes at the end are too few to be sound
METADATA = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"_PMX", b"JUNK", b"junk", b"FLLR", b"ANNO", b"NAME", b"APPL")
PLAIN_HEADER = 4096  # the samples of a WAV read without libsndfile begin within this many bytes
PCM_GUID = bytes.fromhex("000000001000800000aa00389b71")
PADDING = 1 << 20  # up to this many zero bytes at the end are padding


class Chunks(NamedTuple):
    """The format of a container that consists of chunks."""

    sample_chunk: bytes
    size: str  # struct format of a chunk's length
    name_bytes: int = 4
    own: int = 0  # bytes of the chunk's header that its length includes
    align: int = 2  # chunks begin at multiples of this many bytes
    extra: int = 0  # bytes in the sample chunk before the first sample


RIFF = Chunks(b"data", "<I")
RIFX = Chunks(b"data", ">I")
AIFF = Chunks(b"SSND", ">I", extra=8)
CAF = Chunks(b"data", ">q", align=1, extra=4)
W64_RIFF = bytes.fromhex("2e91cf11a5d628db04c10000")
W64_END = bytes.fromhex("f3acd3118cd100c04f8edb8a")
W64 = Chunks(b"data" + W64_END, "<Q", name_bytes=16, own=24, align=8)


def chunked(raw: Window, size: int, kind: Chunks, position: int) -> Layout:
    """The layout of a WAV, AIFF, CAF or W64 file by its chunks. libsndfile would play a truncated one without error.

    Raises BadAudio if samples are missing, or if there are more than the header states.
    """
    header = kind.name_bytes + struct.calcsize(kind.size)
    seen: dict[bytes, tuple[int, int]] = {}  # name -> (position of the contents, length)
    while position + header <= size and len(seen) < CHUNKS:
        name, length = _chunk(raw, position, kind)
        position += header
        if name == kind.sample_chunk:
            break
        if length < 0:
            raise BadAudio("no samples: a chunk of its header has no length")
        seen.setdefault(name if name not in seen else b"%s %d" % (name, position), (position, length))
        position += -(-length // kind.align) * kind.align
    else:
        raise BadAudio("no samples")
    present = size - position
    if present <= kind.extra:
        raise BadAudio("header only, no samples")
    is_64 = kind is RIFF and raw.read_at(0, 4) in (b"RF64", b"BW64") and b"ds64" in seen
    if is_64 and length == 0xFFFFFFFF:
        (length,) = struct.unpack("<Q", raw.read_at(seen[b"ds64"][0] + 8, 8))
    frame = _frame_bytes(raw, kind, seen)
    mpeg = kind is RIFF and b"fmt " in seen and raw.read_at(seen[b"fmt "][0], 2) in (b"\x50\0", b"\x55\0")
    if _never_written(length, position, frame or 1, kind, is_64):
        complete = 0 <= length <= present and _skip_chunks(raw, position + length + length % 2, size, kind) >= size
        if not complete and mpeg:
            return Layout(position, size, mpeg=True)
        if not complete:
            return _until_the_end(raw, size, kind, position, frame, is_64, seen)
    if length > present:
        raise Truncated(f"truncated: {present - kind.extra} of {length - kind.extra} bytes of samples")
    if length <= kind.extra:
        raise BadAudio("no samples")
    _check_rest(raw, position, length, size, kind)
    if kind is AIFF and b"COMM" in seen and frame:
        frames = int.from_bytes(raw.read_at(seen[b"COMM"][0] + 2, 4), "big")
        if frames * frame > length - kind.extra:
            raise Truncated(f"truncated: {length - kind.extra} of {frames * frame} bytes of samples")
    if mpeg:
        return Layout(position, position + length, mpeg=True)
    if kind is W64 and position + length < size:  # libsndfile would read the rest as samples
        return Layout(end=position + length)
    if raw.read_at(0, 4) == b"BW64":  # differs from RF64 only in its name
        return Layout(begin=4, head=b"RF64")
    return Layout()


def plain_wav(head: bytes, size: int) -> Plain | None:
    """The samples of a WAV file of `size` bytes that begins with `head`; None if it needs more than this check."""
    if head[:4] != b"RIFF" or head[8:12] != b"WAVE":
        return None
    position, form = 12, b""
    while position + 8 <= len(head):
        name, (length,) = head[position : position + 4], struct.unpack_from("<I", head, position + 4)
        position += 8
        if name == b"data":
            break
        if name == b"fmt " and not form:
            form = head[position : position + length]
        position += length + length % 2
    else:
        return None
    # A length that may be a placeholder for an unknown one is left to `chunked`.
    if len(form) < 16 or not 0 < length <= min(size - position, min(UNKNOWN_32) - PLAIN_HEADER):
        return None
    code, channels, _, _, frame, bits = struct.unpack_from("<HHIIHH", form)
    if code == 0xFFFE and form[26:40] == PCM_GUID:  # WAVE_FORMAT_EXTENSIBLE
        (code,) = struct.unpack_from("<H", form, 24)
    if code != 1 or bits != 16 or not channels or frame != 2 * channels:
        return None
    return Plain(position, channels, length // frame)


def _chunk(raw: Window, position: int, kind: Chunks) -> tuple[bytes, int]:
    """Name of the chunk at `position`, and the length of its contents; -1 if unstated, where the format allows that."""
    header = raw.read_at(position, kind.name_bytes + struct.calcsize(kind.size))
    (length,) = struct.unpack(kind.size, header[kind.name_bytes :])
    return header[: kind.name_bytes], length - kind.own


def _frame_bytes(raw: Window, kind: Chunks, seen: dict[bytes, tuple[int, int]]) -> int:
    """Bytes of one sample of all channels, or of one block of an encoding; 0 if unknown."""
    if kind is AIFF and b"COMM" in seen:
        comm, length = seen[b"COMM"]
        channels, _, bits = struct.unpack(">hIh", raw.read_at(comm, 8).ljust(8, b"\0"))
        plain = length < 22 or raw.read_at(comm + 18, 4) in (b"NONE", b"sowt", b"twos", b"raw ", b"fl32", b"fl64")
        return max(0, channels) * ((max(0, bits) + 7) // 8) if plain else 0
    if kind is CAF and b"desc" in seen:
        return int.from_bytes(raw.read_at(seen[b"desc"][0] + 16, 4), "big")
    for name in (b"fmt ", b"fmt " + W64_END):
        if name in seen:
            return int.from_bytes(raw.read_at(seen[name][0] + 12, 2), "big" if kind is RIFX else "little")
    return 0


def _never_written(length: int, position: int, frame: int, kind: Chunks, is_64: bool) -> bool:
    """Whether a length is one of the placeholders for an unknown length."""
    if length <= kind.extra:
        return True
    limits = UNKNOWN_64 if is_64 or struct.calcsize(kind.size) == 8 else UNKNOWN_32
    lengths = {limit - header for limit in limits for header in (0, 8, 36, 44, position, position - 8, kind.own)}
    sound = length - kind.extra
    return length in lengths or any(sound in (x, x - x % 2, x - x % frame) for x in lengths)


def _until_the_end(
    raw: Window, size: int, kind: Chunks, position: int, frame: int, is_64: bool, seen: dict[bytes, tuple[int, int]]
) -> Layout:
    """The layout of a file whose length was never written: all bytes from `position` on are samples."""
    if not frame or position > 1 << 24:
        raise BadAudio("length never written by the program that made it: convert it, e.g. with ffmpeg")
    samples = size - position - kind.extra
    samples -= samples % frame
    if not samples:
        raise BadAudio("header only, no samples")
    head = bytearray(raw.read_at(0, position + kind.extra))
    at = position - struct.calcsize(kind.size)
    end, container = position + kind.extra + samples, ""
    length = samples + kind.extra + kind.own
    if kind is AIFF:
        struct.pack_into(">I", head, seen[b"COMM"][0] + 2, samples // frame)
    if is_64:
        struct.pack_into("<QQ", head, seen[b"ds64"][0] + 8, samples, samples // frame)
        struct.pack_into("<I", head, at, 0xFFFFFFFF)
        head[:4] = b"RF64"
    elif length < 1 << 32 or struct.calcsize(kind.size) == 8:
        struct.pack_into(kind.size, head, at, length)
        if head[:4] in (b"RF64", b"BW64"):  # an RF64 without the ds64 chunk that would state the length
            head[:4] = b"RIFF"
    elif kind is RIFF:  # too long for a WAV
        fmt, count = seen[b"fmt "]
        ds64 = struct.pack("<4sI4s4sIQQQI", b"RF64", 0xFFFFFFFF, b"WAVE", b"ds64", 28, samples + 72 + count, samples,
                            samples // frame, 0)  # fmt: skip
        head = bytearray(ds64 + raw.read_at(fmt - 8, 8 + count) + b"data" + b"\xff" * 4)
        container = "WAV"
    else:
        raise BadAudio("length never written, and more than its container can state: convert it, e.g. with ffmpeg")
    return Layout(begin=position + kind.extra, end=end, head=bytes(head), container=container)


def _skip_chunks(raw: Window, position: int, end: int, kind: Chunks) -> int:
    """Where the chunks that follow the samples end."""
    header = kind.name_bytes + struct.calcsize(kind.size)
    for _ in range(CHUNKS):
        if position + header > end:
            break
        name, length = _chunk(raw, position, kind)
        cut = position + header + length > end
        if length < 0 or not all(32 <= byte < 127 for byte in name[:4]) or (cut and name[:4] not in METADATA):
            break
        if name in (kind.sample_chunk, b"RIFF", b"RIFX", b"RF64", b"FORM", b"riff" + W64_RIFF):
            break
        position = min(end, position + header + -(-length // kind.align) * kind.align)
    return position


def _check_rest(raw: Window, position: int, length: int, size: int, kind: Chunks) -> None:
    """Raises BadAudio if the bytes after the samples are more than metadata."""
    ends = [position + -(-length // kind.align) * kind.align, position + length]  # some writers do not pad
    after = max(_skip_chunks(raw, end, size, kind) for end in ends)
    check_rest(raw, after, before_tags(raw, size), length)


def check_rest(raw: Window, position: int, end: int, length: int) -> None:
    rest = end - position
    if rest <= 0:
        return
    first = raw.read_at(position, 16)
    joined = first == b"riff" + W64_RIFF or first[:4] in (
        b"RIFF",
        b"RIFX",
        b"RF64",
        b"FORM",
        b".snd",
        b"fLaC",
        b"OggS",
        b"data",
        b"SSND",
        b"caff",
    )
    if not joined and rest <= max(64, min(STRAY, length // 16)):
        return
    if not joined and rest <= PADDING and not any(raw.read_at(position, rest)):
        return
    finding = f"{rest:,} bytes follow the {length:,} of its samples"
    raise more_sound(finding, "repair its header, or convert all of it, e.g. with ffmpeg -ignore_length 1")


def au(raw: Window, size: int) -> Layout:
    """The layout of a Sun AU file, whose header states the offset and, if known, the length of the samples in bytes."""
    order = ">" if raw.read_at(0, 4) == b".snd" else "<"
    head = raw.read_at(0, 24)
    if len(head) < 24:
        raise BadAudio("header only, no samples")
    begin, length, code, _, channels = struct.unpack(f"{order}5I", head[4:])
    if begin < len(head):
        raise BadAudio("cannot be read: its header is damaged")
    present = size - begin
    if present <= 0:
        raise BadAudio("header only, no samples")
    frame = channels * {2: 1, 3: 2, 4: 3, 5: 4, 6: 4, 7: 8}.get(code, 1)
    limits = (limit - header for limit in UNKNOWN_32 for header in (0, begin))
    unknown = length == 0 or (length > present and any(length in (x, x - x % max(1, frame)) for x in limits))
    if unknown:
        if present >= 1 << 32:
            return Layout()
        return Layout(begin=len(head), head=head[:8] + struct.pack(f"{order}I", present) + head[12:])
    if length > present:
        raise Truncated(f"truncated: {present} of {length} bytes of samples")
    check_rest(raw, begin + length, before_tags(raw, size), length)
    return Layout()


def nist(raw: Window, size: int) -> Layout:
    """The layout of a NIST SPHERE file, which has a text header."""
    head = raw.read_at(0, 4096)
    values = {key: int(value) for key, value in re.findall(rb"(?m)^(\w+) -i (\d{1,18})\s*$", head)}
    count, width = values.get(b"sample_count", 0), values.get(b"sample_n_bytes", 0)
    length = count * width * values.get(b"channel_count", 1)
    begin = int(head[8:16]) if head[8:16].strip().isdigit() else 1024
    if length > size - begin:
        raise Truncated(f"truncated: {max(0, size - begin)} of {length} bytes of samples")
    if length:
        check_rest(raw, begin + length, size, length)
    return Layout()


# --- checksums ------------------------------------------------------------------------------------------------------


def _crc_table(bits: int, polynomial: int) -> list[int]:
    table = []
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = (value << 1 ^ (polynomial if value >> bits - 1 else 0)) & (1 << bits) - 1
        table.append(value)
    return table


CRC_8, CRC_16, CRC_32 = _crc_table(8, 0x07), _crc_table(16, 0x8005), _crc_table(32, 0x04C11DB7)


def checksum(data: bytes, bits: int, table: list[int]) -> int:
    """The cyclic redundancy check of `data`; 0 if the data end with their own checksum."""
    crc, shift, mask = 0, bits - 8, (1 << bits) - 1
    for byte in data:
        crc = (crc << 8 & mask) ^ table[crc >> shift ^ byte]
    return crc
