"""Small valid audio files, broken in every way a seed can think of, and headers that lie."""

import struct

import numpy as np
from make_audio import encode, noise

SUFFIXES = {"wav16": ".wav", "wav_float": ".wav", "flac": ".flac", "vorbis": ".ogg", "opus": ".opus"}


def originals(frames: int = 2400, rate: int = 16_000) -> dict[str, bytes]:
    return {kind: encode(noise(frames), rate, kind) for kind in SUFFIXES}


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three of: bits flipped, bytes replaced, a block lost, repeated or zeroed, a header field at a limit."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size = max(len(out), 1)
        at = int(rng.integers(size))
        near = int(rng.integers(min(size, 64)))  # most of what a decoder believes stands in the first bytes
        span = int(rng.integers(1, max(2, size // 4)))
        match rng.integers(9):
            case 0:
                for place in rng.integers(size, size=rng.integers(1, 16)):
                    out[place : place + 1] = bytes([(out[place] if place < len(out) else 0) ^ 1 << rng.integers(8)])
            case 1:
                out[at : at + 8] = rng.bytes(min(8, size - at))
            case 2:
                del out[at:]
            case 3:
                del out[at : at + span]
            case 4:
                out[at:at] = out[:span]
            case 5:
                out[at : at + span] = bytes(min(span, size - at))
            case 6:
                out[near : near + 4] = struct.pack("<I", int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])))
            case 7:
                out[near : near + 2] = struct.pack("<H", int(rng.choice([0, 1, 0x7FFF, 0x8000, 0xFFFF])))
            case 8:
                out[near] = int(rng.integers(256)) if near < len(out) else 0
    return bytes(out)


def ogg_claiming(samples: int, frames: int = 2400) -> bytes:
    """An Ogg Vorbis file whose last page says that it ends at sample `samples`, with a right checksum."""
    data = bytearray(encode(noise(frames), 16_000, "vorbis"))
    page = data.rfind(b"OggS")
    data[page + 6 : page + 14] = struct.pack("<q", samples)
    data[page + 22 : page + 26] = bytes(4)
    data[page + 22 : page + 26] = struct.pack("<I", _ogg_crc(data[page:]))
    return bytes(data)


def _ogg_crc(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return crc
