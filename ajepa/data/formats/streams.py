"""Examines Ogg streams page by page and MPEG streams frame by frame: what they hold, and where decoding can start.

Neither format states where its samples are, so both are read from end to end. No sample is decoded here.
"""

import itertools
import re
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ajepa.data.formats.containers import CRC_32, BadAudio, Layout, Truncated, Window, checksum, id3_size, more_sound

BLOCK = 1 << 18  # bytes read at a time


class _Bytes:
    """Random access to the bytes of a window, with read-ahead."""

    def __init__(self, raw: Window):
        self.raw, self.base, self.block = raw, 0, b""

    def __call__(self, position: int, count: int) -> bytes:
        at = position - self.base
        if at < 0 or at + count > len(self.block):
            self.block, self.base, at = self.raw.read_at(position, max(count, BLOCK)), position, 0
        return self.block[at : at + count]

    def places(self, pattern: re.Pattern, begin: int, end: int) -> Iterator[int]:
        """Yields the positions at which a pattern of at most 8 bytes begins."""
        while begin < end:
            block = self.raw.read_at(begin, min(BLOCK, end - begin))
            last = begin + len(block) >= end or len(block) < BLOCK
            for found in pattern.finditer(block):
                if last or found.start() < len(block) - 7:
                    yield begin + found.start()
            if last:
                break
            begin += len(block) - 7


# --- Ogg ------------------------------------------------------------------------------------------------------------


class VorbisPages:
    """Positions of the pages of a Vorbis stream.

    Decoding can begin at any page, because a packet depends only on the packet before it.
    """

    MARGIN = 3 * 8192  # samples; a packet holds at most 8192, and two are decoded before the first wanted one

    def __init__(self, head: bytes, positions: array, granules: array, end: int, tail: bytes):
        self.head, self.positions, self.granules = head, positions, granules
        self.end, self.tail = end, tail  # see `Layout`
        self.origin: int | None = None  # granule of the first sample, which only a decoder can find

    def part(self, start: int, count: int) -> tuple[Layout, int] | None:
        """A layout of the pages that hold samples `[start, start + count)`, and the number of the sample after it.

        Samples are numbered like granules. Returns None if it is better to decode from the first page on.
        """
        last = bisect_left(self.granules, start + count)  # the first page that ends at the last wanted sample or later
        # A decoder cuts the last page of a stream to its stated end only if it has decoded a page before it.
        first = min(bisect_right(self.granules, start - self.MARGIN), last - 1)
        if first <= 0 or last >= len(self.granules):
            return None
        layout = Layout(begin=self.positions[first], end=self.end, head=self.head, tail=self.tail)
        if last + 1 < len(self.positions):
            layout = layout._replace(end=self.positions[last + 1], tail=b"")
        return layout, self.granules[last]


class OpusPages:
    """Records which pages of an Opus stream hold only music coding (CELT).

    A decoder forgets its past within seconds of music coding. Speech coding (SILK) never fully forgets, but a decoder
    starts it with a fresh state after music coding.
    """

    # All in samples at 48 kHz, the unit of Opus.
    FORGOTTEN = 3 * 48_000  # a decoder has forgotten its past after so much music coding
    FAR = 1800 * 48_000  # an exact start is not searched for farther back than this
    NEAR = 60 * 48_000  # decoding then begins this far before `start`, which is nearly exact

    def __init__(self, granules: array, pure: bytearray):
        self.granules, self.pure = granules, pure

    def begin(self, start: int) -> int:
        """The sample at which decoding must begin for the samples from `start` on to be right; 0 is the first one."""
        stop = start  # end of the run of music pages that is being measured
        for page in range(min(bisect_right(self.granules, start), len(self.pure) - 1), 0, -1):
            begin = self.granules[page - 1]
            if start - begin > self.FAR:
                return start - self.NEAR
            if not self.pure[page]:
                stop = begin
            elif stop - begin >= self.FORGOTTEN:
                return stop - self.FORGOTTEN
        return 0


def ogg(raw: Window, begin: int, end: int) -> Layout:
    """The layout of an Ogg stream. Raises BadAudio if it is truncated, or if streams are chained or interleaved."""
    data = _Bytes(raw)
    serial, position, page_end, last = None, begin, begin, b""
    head_end, packets, only_heads, codec, holes = begin, 0, True, "", False
    positions, granules, pure = array("q"), array("q"), bytearray()
    while position < end:
        header = data(position, min(282, end - position))
        if len(header) < 5 and b"OggS".startswith(header[:4]):
            raise Truncated("truncated: the last page is cut short")
        if header[:5] != b"OggS\0":
            again = next(data.places(PAGE, position, end), -1)
            if again < 0:
                break  # tags, padding or garbage
            position, holes = again, True  # the decoder reports the hole
            continue
        table = header[27 : 27 + header[26]] if len(header) >= 27 else b""
        size = 27 + len(table) + sum(table)
        if len(header) < 27 or len(table) < header[26] or position + size > end:
            raise Truncated("truncated: the last page is cut short")
        flags, granule, number = struct.unpack_from("<BqI", header, 5)
        if flags & 2 and serial is not None and not only_heads:
            raise more_sound("another Ogg stream follows the first", "decode it into one, e.g. with ffmpeg")
        if serial is not None and (number != serial or flags & 2):
            raise more_sound(
                "several Ogg streams are interleaved", "extract the one wanted, e.g. with ffmpeg -map 0:a:0"
            )
        only_heads = only_heads and bool(flags & 2)
        if serial is None or codec == "":
            start = data(position + 27 + len(table), 8)
            codec = "vorbis" if start[:7] == b"\x01vorbis" else "opus" if start == b"OpusHead" else "other"
            serial = number
        if packets < HEADS.get(codec, 1):  # header packets, the last of which ends its page
            packets += sum(length < 255 for length in table)
            head_end = position + size
        else:
            positions.append(position)
            granules.append(granule if granule >= 0 else granules[-1] if granules else 0)  # -1: no packet ends here
            if codec == "opus":
                pure.append(_pure(data(position + 27 + len(table), sum(table)), table, bool(flags & 1)))
        last, position = header[5:6] + table, position + size
        page_end = position
    if not last:
        return Layout()
    audio_end, tail = page_end, b""
    if not last[0] & 4:
        if last[-1] == 255 and len(last) > 1:
            raise Truncated("truncated: the last packet continues on a page that is missing")
        if positions:  # mark the last page as such, which the decoder requires
            audio_end = positions[-1]
            page = raw.read_at(audio_end, page_end - audio_end)
            without_crc = page[:22] + bytes(4) + page[26:]
            if checksum(without_crc, 32, CRC_32).to_bytes(4, "little") == page[22:26]:
                without_crc = without_crc[:5] + bytes([without_crc[5] | 4]) + without_crc[6:]
                tail = without_crc[:22] + checksum(without_crc, 32, CRC_32).to_bytes(4, "little") + without_crc[26:]
            else:
                audio_end = page_end
    index: VorbisPages | OpusPages | None = None
    if not holes and all(a <= b for a, b in itertools.pairwise(granules)):
        if codec == "vorbis" and head_end - begin < 1 << 20:
            index = VorbisPages(raw.read_at(begin, head_end - begin), positions, granules, audio_end, tail)
        elif codec == "opus":
            index = OpusPages(granules, pure)
    return Layout(begin, None if audio_end == raw.size else audio_end, tail=tail, index=index)


PAGE = re.compile(b"OggS\\0")
HEADS = {"vorbis": 3, "opus": 2}  # number of header packets before the first audio packet


def _pure(body: bytes, table: bytes, continued: bool) -> bool:
    """Whether all packets that begin on a page use music coding."""
    at = 0
    for length in table:
        if not continued and at < len(body) and length and body[at] < 16 << 3:
            return False
        at += length
        continued = length == 255
    return True


# --- MPEG audio -----------------------------------------------------------------------------------------------------

RATES = (44100, 48000, 32000)
KBPS = {  # by (whether MPEG-1, layer): the bit rates with the numbers 1 to 14
    (True, 1): range(32, 449, 32),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
KIND = 0xFFFE0C00  # mask of the header bits that all frames of a stream share: version, layer and sample rate
DELAY = 529  # samples by which the output of a decoder lags
SEARCH = 1 << 18  # the next frame is searched for in this many bytes
CHAIN = 4  # so many frames in a row are not a coincidence
# Matches the start of a frame header: 11 bits set, and no reserved version, layer, bit rate or sample rate.
HEADER = re.compile(
    b"\xff(?=[%b][%b])"
    % (
        b"".join(b"\\x%02x" % x for x in range(0xE0, 0x100) if x >> 3 & 3 != 1 and x >> 1 & 3),
        b"".join(b"\\x%02x" % x for x in range(256) if x >> 4 not in (0, 15) and x >> 2 & 3 != 3),
    )
)


class Frame:
    """The fields of a frame header, given as a 32-bit number."""

    def __init__(self, header: int):
        version, self.layer = header >> 19 & 3, 4 - (header >> 17 & 3)  # 0: MPEG-2.5, 2: MPEG-2, 3: MPEG-1
        rate, kbps = header >> 10 & 3, header >> 12 & 15
        self.size = 0  # bytes of the frame; 0 if this is not a frame header
        if header >> 21 != 0x7FF or version == 1 or self.layer == 4 or rate == 3 or kbps in (0, 15) or header & 3 == 2:
            return
        mpeg1 = version == 3
        self.rate = RATES[rate] >> {3: 0, 2: 1, 0: 2}[version]
        self.channels = 1 if header >> 6 & 3 == 3 else 2
        self.samples = 384 if self.layer == 1 else 1152 if mpeg1 or self.layer == 2 else 576
        self.crc = 0 if header >> 16 & 1 else 2
        self.side = 0  # bytes of side information of layer III
        if self.layer == 3:
            self.side = (32 if mpeg1 else 17) if self.channels == 2 else (17 if mpeg1 else 9)
        bits, padding = KBPS[mpeg1, self.layer][kbps - 1] * 1000, header >> 9 & 1
        slot = 4 if self.layer == 1 else 1
        self.size = slot * (self.samples * bits // (8 * slot) // self.rate + padding)
        self.back = 9 if mpeg1 else 8  # bits of the field that states how far back a frame's data begins


class MpegFrames:
    """Positions of every `STEP`th frame of an MPEG stream, from which decoding can start."""

    STEP = 16
    # The filter bank rotates its order of summation with each granule of 18 samples per band, and repeats after 8.
    TURN = 8
    RESERVOIR = 511  # the data of a frame may begin up to this many bytes before the frame

    def __init__(self, positions: array, end: int, first: Frame, skipped: int, spoiled: list[tuple[int, int]]):
        self.positions, self.end = positions, end
        self.samples = first.samples  # samples per frame
        self.skipped = skipped  # samples that the decoder skips at the start
        self.granules = 1 if first.samples == 576 else 2
        # (frame, lost granules) of frames that cannot be decoded. The filter bank does not rotate in a lost granule.
        self.spoiled = spoiled

    def part(self, path: str, offset: int, start: int, count: int) -> tuple[Layout, int] | None:
        """A layout of the frames that hold samples `[start, start + count)`, and how many samples to discard first.

        The two frames before the first wanted one are decoded too, because a frame depends on the frame before it. The
        frames before those two are silenced: they rotate the filter bank to its position and hold data of the two.
        Returns None if it is better to decode from the first frame on.
        """
        wanted = (start + self.skipped) // self.samples
        bad = dict(self.spoiled)
        clean = wanted - 2
        while clean in bad or clean + 1 in bad:
            clean -= 1
        lost_granules = sum(lost for frame, lost in self.spoiled if frame < clean)
        if lost_granules % self.granules:
            return None
        last = (start + self.skipped + count) // self.samples // self.STEP + 2
        end = self.positions[last] if last < len(self.positions) else self.end
        for back in range(2, 8):
            step = clean // self.STEP - back
            if step < 1:
                return None
            position = self.positions[step]
            with Window(path, offset + position, end - position) as raw:
                data = raw.read_at(0, min(end - position, (back + 1) * self.STEP * 1500))
            first = step * self.STEP + lost_granules // self.granules % self.TURN
            silent = _silent(data, first - step * self.STEP, clean - first)
            if silent is not None and silent[2] >= self.RESERVOIR:
                layout = Layout(begin=position + silent[1], end=end, head=silent[0], overstate=True)
                return layout, start + self.skipped - first * self.samples
        return None


def _silent(data: bytes, left_out: int, count: int) -> tuple[bytes, int, int] | None:
    """Drops `left_out` frames and silences the next `count`, which keep their data for the frames that follow.

    Returns the bytes of the silent frames, where the next frame begins, and how many bytes of layer III data the silent
    frames hold; None if `data` holds too few frames.
    """
    at, out, held = 0, bytearray(), 0
    for number in range(left_out + count):
        frame = Frame(int.from_bytes(data[at : at + 4], "big"))
        if not frame.size or at + frame.size > len(data):
            return None
        if number >= left_out:
            side = bytearray(frame.side)
            if frame.layer == 3:
                # Data that begins before the first frame would be an error to the decoder.
                side[:2] = (min(held, (1 << frame.back) - 1) << (16 - frame.back)).to_bytes(2, "big")
            info = at + 4 + frame.crc
            out += data[at:info] + side + data[info + frame.side : at + frame.size]
            held += frame.size - 4 - frame.crc - frame.side if frame.layer == 3 else MpegFrames.RESERVOIR
        at += frame.size
    return bytes(out), at, held


def _spoiled(block: bytes, places: list[int], first: Frame, frames: int) -> list[tuple[int, int]]:
    """(frame, granules that a decoder loses) of the layer III frames that state more data than they have.

    Args:
        places: positions of the frames in the block.
        frames: number of the first of these frames in the stream.
    """
    if first.layer != 3 or not places:
        return []
    data = np.frombuffer(block + bytes(64), np.uint8)
    at = np.asarray(places)
    info = at + np.where(data[at + 1] & 1, 4, 6)

    def bits(place: int, count: int) -> np.ndarray:
        byte = info + place // 8
        word = data[byte].astype(np.int64) << 16 | data[byte + 1].astype(np.int64) << 8 | data[byte + 2]
        return word >> (24 - place % 8 - count) & (1 << count) - 1

    mpeg1 = first.samples == 1152
    place = (18 if first.channels == 1 else 20) if mpeg1 else 8 + first.channels
    granules, width = (2, 59) if mpeg1 else (1, 63)
    sizes = np.diff(at, append=len(block)) if len(at) else at
    own = np.minimum(sizes, 1500) - (info - at) - first.side
    # A stream that was cut out of another lacks the data before its start. libmpg123 then clears the side information
    # of the frame, except for its first two bytes.
    back = bits(0, first.back)
    before = np.minimum(np.cumsum(own) - own, (1 << first.back) - 1) if not frames else back
    missing = back > before
    kept = 0 if mpeg1 else 0xFFF << place - 4 & 0xFFF
    left = 8 * (np.where(missing, before, back) + own)
    lost = np.zeros(len(at), np.int64)
    for part in range(granules * first.channels):
        length = bits(place + part * width, 12)
        left = left - np.where(missing, length & kept if part == 0 else 0, length)
        lost = np.where((left < 0) & (lost == 0), granules - part // first.channels, lost)
    return [(frames + int(i), int(lost[i])) for i in np.flatnonzero(lost)]


def mpeg(raw: Window, begin: int, end: int) -> Layout | None:
    """The layout of an MPEG stream, None if no frames are found.

    Raises BadAudio if the stream is truncated, or if several streams are joined.
    """
    data = _Bytes(raw)
    begin, kind = _first_frame(data, begin, min(end, begin + SEARCH), end)
    if begin < 0:
        return None
    first = Frame(int.from_bytes(data(begin, 4), "big"))
    info = _info(data(begin, first.size), first)
    position = audio_end = begin + first.size if info is not None and info.silent else begin
    positions, frames, gaps, spoiled, sizes = array("q"), 0, 0, list[tuple[int, int]](), dict[int, int]()
    unpack = struct.Struct(">I").unpack_from
    while position + 4 <= end:
        block = raw.read_at(position, min(BLOCK, end - position))
        at, last, places = 0, len(block) - 4, list[int]()
        while at <= last:
            key = unpack(block, at)[0] >> 6
            size = sizes.get(key)
            if size is None:
                frame = Frame(key << 6)
                same = key << 6 & KIND == kind and frame.size > 0 and frame.channels == first.channels
                size = sizes[key] = frame.size if same else 0
            if not size or at + size > len(block):
                break
            places.append(at)
            at += size
        if places:
            _check_single(block[: at + 256], first)
            spoiled += _spoiled(block[:at], places, first, frames)
            positions.extend(position + place for place in places[-frames % MpegFrames.STEP :: MpegFrames.STEP])
            frames += len(places)
            position = audio_end = position + at
            continue
        if at <= last and size and position + size > end:
            break  # the last frame is cut short, and no decoder plays it
        position = _after_tag(data, position)
        position, other = _first_frame(data, position, min(end, position + SEARCH), end)
        if position < 0:
            break  # tags, padding or garbage
        gaps += 1
        frame = Frame(int.from_bytes(data(position, 4), "big"))
        if other != kind or frame.channels != first.channels:
            raise BadAudio("its sample rate or number of channels changes in the middle: convert it, e.g. with ffmpeg")
    stated = info.frames if info is not None else 0
    if frames < stated:
        raise Truncated(f"truncated: {frames} of {stated} frames")
    if stated and frames > stated + 1:
        raise more_sound(f"{frames:,} MPEG frames where its header states {stated:,}", "convert it, e.g. with ffmpeg")
    skipped, samples = 0, frames * first.samples
    if info is not None and stated and info.silent:
        skipped = DELAY + info.delay
        samples = stated * first.samples - max(0, info.padding - DELAY) - skipped
    index = None if gaps else MpegFrames(positions, audio_end, first, skipped, spoiled)
    # Without a stated length libsndfile stops at an estimated one, so the layout makes it overestimate.
    counted = samples if skipped or not gaps else None
    return Layout(begin, audio_end, frames=counted, must_decode=gaps > 0, overstate=not skipped, index=index)


class Info(NamedTuple):
    """The facts about a stream in its first frame, if that is an information frame (Xing, Info or VBRI)."""

    frames: int  # number of frames in the stream; 0 if not stated
    delay: int = 0  # samples that the encoder added at the start
    padding: int = 0  # samples that the encoder added at the end
    silent: bool = True  # whether the decoder skips this frame


def _info(data: bytes, frame: Frame) -> Info | None:
    """Reads an information frame as libmpg123 does, because libmpg123 decides which samples are left out."""
    at = 4 + frame.crc + frame.side
    if frame.layer == 3 and data[36:40] == b"VBRI" and len(data) >= 54:
        return Info(int.from_bytes(data[50:54], "big"), silent=False)
    if frame.layer != 3 or data[at : at + 4] not in (b"Xing", b"Info") or any(data[6:at]) or len(data) < at + 120:
        return None
    flags = int.from_bytes(data[at + 4 : at + 8], "big")
    frames = int.from_bytes(data[at + 8 : at + 12], "big") if flags & 1 else 0
    encoder = at + 8 + sum(size for bit, size in ((1, 4), (2, 4), (4, 100), (8, 4)) if flags & bit)
    gaps = int.from_bytes(data[encoder + 21 : encoder + 24], "big")
    if not frames or len(data) < encoder + 24 or not data[encoder]:
        return Info(frames)
    return Info(frames, gaps >> 12, gaps & 0xFFF)


def _check_single(block: bytes, first: Frame) -> None:
    """Raises BadAudio if a frame of the block begins another stream."""
    at = 4 + first.side
    for name in (b"Xing", b"Info"):
        found = block.find(name)
        while found >= 0:
            header = Frame(int.from_bytes(block[found - at : found - at + 4], "big")) if found >= at else None
            if header is not None and header.size and not any(block[found - at + 6 : found]):
                raise more_sound("another MPEG stream follows the first", "convert it, e.g. with ffmpeg")
            found = block.find(name, found + 4)


def _after_tag(data: _Bytes, position: int) -> int:
    head = data(position, 10)
    if head[:3] == b"ID3":
        return position + id3_size(head)
    return position + 128 if head[:3] == b"TAG" else position


def _first_frame(data: _Bytes, begin: int, last: int, end: int) -> tuple[int, int]:
    """(position before `last` at which frames begin, header bits that the frames share); (-1, 0) if there is none."""
    for position in data.places(HEADER, begin, last):
        header = int.from_bytes(data(position, 4), "big")
        at, frames = position, 0
        while frames < CHAIN and at + 4 <= end:
            following = int.from_bytes(data(at, 4), "big")
            frame = Frame(following)
            if not frame.size or (following ^ header) & KIND or at + frame.size > end:
                break
            at += frame.size
            frames += 1
        if frames == CHAIN or (frames > 0 and (at >= end - 4 or position == begin)):
            return position, header & KIND
    return -1, 0
