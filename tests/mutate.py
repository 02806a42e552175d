"""Small valid audio files with random damage chosen by a seed, and files whose headers state false values."""

import io
import struct

import numpy as np
import soundfile as sf
from make_audio import encode, noise

# kind: (libsndfile's container and encoding, suffix)
KINDS = {
    "wav": ("WAV", "PCM_16", ".wav"),
    "wav_float": ("WAV", "FLOAT", ".wav"),
    "wav_gsm": ("WAV", "GSM610", ".wav"),
    "wav_adpcm": ("WAV", "MS_ADPCM", ".wav"),
    "rf64": ("RF64", "PCM_24", ".rf64"),
    "w64": ("W64", "PCM_16", ".w64"),
    "aiff": ("AIFF", "PCM_16", ".aiff"),
    "au": ("AU", "PCM_16", ".au"),
    "au_g721": ("AU", "G721_32", ".au"),
    "caf": ("CAF", "ALAC_16", ".caf"),
    "flac": ("FLAC", "PCM_16", ".flac"),
    "flac_unknown": ("FLAC", "PCM_16", ".flac"),
    "vorbis": ("OGG", "VORBIS", ".ogg"),
    "opus": ("OGG", "OPUS", ".opus"),
    "mp3": ("MP3", "MPEG_LAYER_III", ".mp3"),
    "mp3_bare": ("MP3", "MPEG_LAYER_III", ".mp3"),
}
SUFFIXES = {kind: suffix for kind, (_, _, suffix) in KINDS.items()}


def original(kind: str, pcm: np.ndarray, rate: int = 16_000) -> bytes:
    container, subtype, _ = KINDS[kind]
    buffer = io.BytesIO()
    samples = pcm / np.float32(32768) if subtype == "FLOAT" else pcm
    sf.write(buffer, samples, rate, format=container, subtype=subtype)
    data = buffer.getvalue()
    if kind == "flac_unknown":
        return data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]
    if kind == "mp3_bare":  # begins with an audio frame and states no length
        return data[data.index(data[:2], 200) :]
    return data


def originals(frames: int = 2400, rate: int = 16_000) -> dict[str, bytes]:
    return {kind: original(kind, noise(frames), rate) for kind in KINDS}


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Apply one to three kinds of damage: flipped bits, replaced bytes, a lost, repeated or zeroed block, or a header
    field set to a limit of its type."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size = max(len(out), 1)
        at = int(rng.integers(size))
        near = int(rng.integers(min(size, 64)))  # most header fields are in the first bytes
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
    """An Ogg Vorbis file whose last page states that it ends at sample `samples`, with a valid checksum."""
    data = bytearray(encode(noise(frames), 16_000, "vorbis"))
    page = data.rfind(b"OggS")
    data[page + 6 : page + 14] = struct.pack("<q", samples)
    return bytes(data[:page]) + with_crc(bytes(data[page:]))


def with_crc(page: bytes) -> bytes:
    """The Ogg page with its checksum field corrected."""
    crc, page = 0, page[:22] + bytes(4) + page[26:]
    for byte in page:
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
    return page[:22] + struct.pack("<I", crc) + page[26:]
