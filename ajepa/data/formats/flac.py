"""Examines a FLAC file: counts its samples, checks that its end is present, and finds the tags around it."""

from ajepa.data.formats.containers import (
    CHUNKS,
    CRC_8,
    CRC_16,
    BadAudio,
    Layout,
    Truncated,
    Window,
    before_tags,
    checksum,
    more_sound,
)


def judge(raw: Window, begin: int, size: int, thorough: bool) -> Layout:
    """The layout of a FLAC without the tags around it. The last frame gives the sample count if the header does not."""
    position, end = begin + 4, before_tags(raw, size)
    for _ in range(CHUNKS):  # metadata blocks
        header = raw.read_at(position, 4)
        if len(header) < 4:
            raise Truncated("truncated: its header is cut short")
        position += 4 + int.from_bytes(header[1:], "big")
        if header[0] >= 128:
            break
    else:
        raise BadAudio("cannot be read: its header is damaged")
    info = raw.read_at(begin, 42)
    if len(info) < 42 or info[4] & 127:
        return Layout()  # the decoder reports the fault
    if position >= end:
        raise BadAudio("header only, no samples")
    stated = int.from_bytes(info[18:26], "big") & (1 << 36) - 1
    layout = Layout(begin=begin, end=None if end == size else end)
    if not thorough and stated:
        return layout._replace(unproven=True)
    if thorough and _find(raw, b"fLaC\0\0\0\x22", position, end) >= 0:
        raise more_sound("another FLAC follows the first", "convert each to a file of its own")
    frames = _last_sample(raw, info, position, end)
    if frames is None:
        return layout._replace(must_decode=True, seekable=bool(stated), frames=stated or None)
    if not stated:
        total = int.from_bytes(info[18:26], "big") | min(frames, (1 << 36) - 1)
        return layout._replace(begin=begin + 26, head=info[:18] + total.to_bytes(8, "big"))
    if frames < stated:
        raise Truncated(f"truncated: {frames} of {stated} samples")
    if frames > stated:
        raise more_sound(f"{frames:,} samples where its header states {stated:,}", "convert it, e.g. with ffmpeg")
    return layout


def _find(raw: Window, pattern: bytes, begin: int, end: int) -> int:
    while begin < end:
        block = raw.read_at(begin, min(1 << 20, end - begin))
        if (at := block.find(pattern)) >= 0:
            return begin + at
        if len(block) < len(pattern) or begin + len(block) >= end:
            break
        begin += len(block) - len(pattern) + 1
    return -1


def _last_sample(raw: Window, info: bytes, begin: int, end: int) -> int | None:
    """The number of the sample after the last frame, None if the stream does not end with a whole frame."""
    largest = int.from_bytes(info[15:18], "big") or 1 << 17
    tail = raw.read_at(max(begin, end - largest - 64), min(end - begin, largest + 64))
    at = len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        if tail[at + 1 : at + 2] not in (b"\xf8", b"\xf9"):
            continue
        frame = _flac_frame(tail[at : at + 16], int.from_bytes(info[8:10], "big"))
        if frame is not None and checksum(tail[at:], 16, CRC_16) == 0:
            return frame
    return None


def _flac_frame(head: bytes, blocksize: int) -> int | None:
    """The number of the sample after the frame with this header, None if it is not a valid frame header."""
    if len(head) < 6:
        return None
    size_code, rate_code, ones = head[2] >> 4, head[2] & 15, 0
    while ones < 8 and head[4] << ones & 128:
        ones += 1
    length = max(1, ones)
    if ones in (1, 8) or size_code == 0 or rate_code == 15:
        return None
    number = head[4] & (0x7F >> ones)
    for byte in head[5 : 4 + length]:
        if byte >> 6 != 2:
            return None
        number = number << 6 | byte & 63
    at = 4 + length
    size_bytes = {6: 1, 7: 2}.get(size_code, 0)
    samples = int.from_bytes(head[at : at + size_bytes], "big") + 1
    if not size_bytes:
        samples = 192 if size_code == 1 else 576 << size_code - 2 if size_code < 6 else 256 << size_code - 8
    at += size_bytes + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if at >= len(head) or checksum(head[: at + 1], 8, CRC_8):
        return None
    return (number if head[1] & 1 else number * blocksize) + samples
