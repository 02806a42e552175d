"""Small audio files, intact and broken, for the data tests."""

import io
import tarfile
from pathlib import Path

import numpy as np
import soundfile as sf

# name: (libsndfile format, subtype, suffix)
FORMATS = {
    "wav8": ("WAV", "PCM_U8", ".wav"),
    "wav16": ("WAV", "PCM_16", ".wav"),
    "wav24": ("WAV", "PCM_24", ".wav"),
    "wav_float": ("WAV", "FLOAT", ".wav"),
    "flac": ("FLAC", "PCM_16", ".flac"),
    "vorbis": ("OGG", "VORBIS", ".ogg"),
    "opus": ("OGG", "OPUS", ".opus"),
    "mp3": ("MP3", "MPEG_LAYER_III", ".mp3"),
}


def noise(frames: int, seed: int = 0, channels: int = 1, level: float = 0.2) -> np.ndarray:
    """int16 noise `[frames]` or `[frames, channels]`, smooth enough for lossy codecs."""
    white = np.random.default_rng(seed).standard_normal((frames + 7, channels))
    smooth = np.stack([np.convolve(white[:, c], np.ones(8) / 8**0.5, "valid") for c in range(channels)], 1)
    pcm = np.clip(smooth * level * 32768, -32768, 32767).astype(np.int16)
    return pcm[:, 0] if channels == 1 else pcm


def encode(pcm: np.ndarray, rate: int = 16000, kind: str = "wav16") -> bytes:
    container, subtype, _ = FORMATS[kind]
    if subtype == "FLOAT" and pcm.dtype == np.int16:
        pcm = pcm / np.float32(32768)
    buffer = io.BytesIO()
    sf.write(buffer, pcm, rate, format=container, subtype=subtype)
    return buffer.getvalue()


def write(path: Path, pcm: np.ndarray, rate: int = 16000, kind: str = "wav16") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(pcm, rate, kind))
    return path


def write_set(folder: Path, count: int, frames: int = 1600, rate: int = 16000) -> list[np.ndarray]:
    """`count` WAV files; file i holds `noise(frames, i)`."""
    clips = [noise(frames, i) for i in range(count)]
    for i, clip in enumerate(clips):
        write(folder / f"{i:03d}.wav", clip, rate)
    return clips


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def bad_files() -> dict[str, tuple[bytes, str]]:
    """{file name: (bytes, part of the expected reason)}."""
    pcm = noise(20000)
    wav, flac, vorbis, opus, mp3 = (encode(pcm, 16000, kind) for kind in ("wav16", "flac", "vorbis", "opus", "mp3"))
    torn = bytearray(flac)
    torn[len(flac) // 2 : len(flac) // 2 + 2000] = bytes(2000)
    not_finite = np.zeros(4000, np.float32)
    not_finite[1000] = np.nan
    huge = wav[:4] + (0x7FFFFFF0).to_bytes(4, "little") + wav[8:40] + (0x7FFFFF00).to_bytes(4, "little") + wav[44:]
    return {
        "empty.wav": (b"", "empty"),
        "header_only.wav": (wav[:44], "header only"),
        "no_data_chunk.wav": (wav[:36], "no samples"),
        "truncated.wav": (wav[:20000], "truncated"),
        "huge_claim.wav": (huge, "truncated"),
        "no_samples.wav": (encode(pcm[:0]), "no samples"),
        "garbage.wav": (np.random.default_rng(1).bytes(5000), "not a recognised"),
        "text.mp3": (b"<html>404 not found</html>" * 20, "not a recognised"),
        "not_finite.wav": (encode(not_finite, 16000, "wav_float"), "not finite"),
        "header_only.flac": (flac[:42], ""),
        "truncated.flac": (flac[: len(flac) // 2], "cannot be decoded"),
        "short_by_a_bit.flac": (flac[:-10], ""),
        "out_of_sync.flac": (bytes(torn), "cannot be decoded"),
        "truncated.ogg": (vorbis[: len(vorbis) // 2], "truncated: the last page"),
        "cut_last_page.ogg": (vorbis[:-5], "cut short"),
        "truncated.opus": (opus[: len(opus) // 2], "truncated: the last page"),
        "header_only.ogg": (vorbis[:100], "truncated: the last page"),
        "truncated.mp3": (mp3[: len(mp3) // 2], "truncated"),
        "film.m4a": (b"\0\0\0\x20ftypM4A " + bytes(400), "unsupported"),
    }
