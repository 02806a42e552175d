"""Files whose contents disagree with their headers: the right samples are read, or the error names the reason."""

import io
import struct

import numpy as np
import pytest
import soundfile as sf
from make_audio import encode, noise
from mutate import with_crc

from ajepa.data.formats.audiofile import AudioInfo, BadAudio, inspect, iterate_samples, read_samples
from ajepa.data.formats.streams import Frame

RATE = 16_000


def write(pcm: np.ndarray, container: str, subtype: str = "PCM_16", rate: int = RATE, **options) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, pcm, rate, format=container, subtype=subtype, **options)
    return buffer.getvalue()


@pytest.fixture
def judge(tmp_path):
    """`judge(data)` returns (info, samples) or the reason for refusal. It checks that the verdict is the same for a
    file and a tar member, with and without decoding."""
    numbers = iter(range(1000))

    def one(path, offset, size, in_tar, decode) -> AudioInfo | str:
        try:
            return inspect(str(path), offset, size, in_tar=in_tar, decode=decode)
        except BadAudio as error:
            return str(error)

    def judge(data: bytes, *, only_decoding_tells: bool = False) -> tuple[AudioInfo, np.ndarray] | str:
        plain, tar = tmp_path / f"{next(numbers)}.bin", tmp_path / f"{next(numbers)}.tar"
        plain.write_bytes(data)
        tar.write_bytes(b"\1" * 777 + data + b"\2" * 300)
        source = (str(plain), 0, len(data))
        verdict = one(*source, False, True)
        assert one(tar, 777, len(data), True, True) == verdict
        for arguments in ((*source, False), (tar, 777, len(data), True)):
            assert only_decoding_tells or one(*arguments, False) == verdict
        if isinstance(verdict, str):
            return verdict
        blocks = [np.array(block) for block in iterate_samples(*source, format=verdict.format)]
        samples = np.concatenate(blocks)
        assert samples.shape == (verdict.frames, verdict.channels)
        start, count = verdict.frames // 3, verdict.frames // 2
        for path, offset, in_tar in ((plain, 0, False), (tar, 777, True)):
            part = read_samples(str(path), offset, len(data), start, count, in_tar=in_tar, format=verdict.format)
            assert part.dtype == samples.dtype and np.array_equal(part, samples[start : start + count])
        return verdict, samples

    return judge


def put(data: bytes, place: int, form: str, *values: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(form, out, place, *values)
    return bytes(out)


def same(verdict, pcm: np.ndarray) -> None:
    assert not isinstance(verdict, str), verdict
    assert np.array_equal(verdict[1], pcm.reshape(len(pcm), -1)) and verdict[1].dtype == np.int16


STATING = {
    "WAV": {},
    "WAVEX": {},
    "RIFX": {"container": "WAV", "endian": "BIG"},
    "RF64": {},
    "W64": {},
    "AIFF": {},
    "AIFC": {"container": "AIFF", "endian": "LITTLE"},
    "AU": {},
    "AU little": {"container": "AU", "endian": "LITTLE"},
    "CAF": {},
    "NIST": {},
    "BW64": {"container": "RF64"},
}


def stating(name: str, pcm: np.ndarray) -> bytes:
    data = write(pcm, **{"container": name, **STATING[name]})
    return b"BW64" + data[4:] if name == "BW64" else data


@pytest.mark.parametrize("name", STATING)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_length_that_is_stated_is_checked(judge, name, channels):
    pcm = noise(3000, channels=channels)
    data = stating(name, pcm)
    same(judge(data), pcm)
    body = 6000 * channels
    for cut in (1, 1000, body - 1):
        verdict = judge(data[: len(data) - cut])
        assert isinstance(verdict, str), (cut, verdict)
        assert verdict.startswith("truncated: ") and f" of {body}" in verdict, verdict
    header = judge(data[: len(data) - body])
    assert "header only" in header or "truncated: 0" in header or "no samples" in header, header


@pytest.mark.parametrize("name", ["WAV", "RIFX", "AIFF", "W64", "CAF", "AU"])
def test_what_follows_the_samples_is_metadata_or_sound(judge, name):
    pcm = noise(3000)
    data = stating(name, pcm)
    same(judge(data + bytes(512)), pcm)  # padding up to a disk sector
    same(judge(data + b"TAG" + bytes(125)), pcm)
    same(judge(data + b"\1junk left by an editor"), pcm)
    assert "more sound" in judge(data + noise(2000, 1).tobytes())
    assert "more sound" in judge(data + data)
    assert "more sound" in judge(data + bytes(3 << 20))


def test_chunks_around_the_samples_of_a_wav(judge):
    pcm = noise(3000)
    data = encode(pcm)
    comment = b"LIST" + struct.pack("<I", 5001) + b"x" * 5001 + b"\0"
    same(judge(data + comment), pcm)
    same(judge(data[:12] + comment + data[12:]), pcm)
    same(judge(data + comment[:-1000]), pcm)  # a truncated comment is not taken for sound
    same(judge(id3v2(4000) + data), pcm)
    same(judge(id3v2(400) + put(data, 40, "<I", 0xFFFFFFFF)), pcm)
    assert judge(id3v2(400) + data[:-1000]) == "truncated: 5000 of 6000 bytes of samples"


# Placeholder lengths left by programs that write to a pipe.
LENGTHS = (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFFFFE, 0x7FFFF000, 0x80000000, 0xFFFFFFFF - 36, 0x7FFFFFFF - 36, 0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_whose_length_was_never_written_is_read_to_its_end(judge, length, channels):
    pcm = noise(3000, channels=channels)
    data = put(encode(pcm), 40, "<I", length)
    same(judge(data), pcm)
    same(judge(put(data, 4, "<I", 0xFFFFFFFF)), pcm)
    same(judge(data + b"\1"), pcm)  # half a sample more
    same(judge(put(write(pcm, "WAV", endian="BIG"), 40, ">I", length)), pcm)


def test_other_lengths_that_were_never_written(judge):
    pcm = noise(3000)
    for length in (0xFFFFFFFF, 0x7FFFFFFF, 0):
        same(judge(put(write(pcm, "AU"), 8, ">I", length)), pcm)
    w64 = write(pcm, "W64")
    place = w64.index(b"data\xf3") + 16
    for length in (2**64 - 1, 2**63 - 1, 0, 24):
        same(judge(put(w64, place, "<Q", length)), pcm)
    caf = write(pcm, "CAF")
    place = caf.rindex(b"data") + 4
    for length in (-1, 0):
        same(judge(put(caf, place, ">q", length)), pcm)
    rf64 = write(pcm, "RF64")
    for length in (0, 2**64 - 1):
        same(judge(put(rf64, rf64.index(b"ds64") + 16, "<Q", length)), pcm)
    aiff = write(pcm, "AIFF")
    sound, common = aiff.index(b"SSND") + 4, aiff.index(b"COMM") + 10
    for length, frames in ((0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0x7F000008, 0x3F800000), (8, 0)):
        same(judge(put(put(aiff, sound, ">I", length), common, ">I", frames)), pcm)


def test_a_length_of_two_gigabytes_is_no_sentinel(judge):
    assert judge(put(encode(noise(3000)), 40, "<I", 0x7FFFFF00)) == "truncated: 6000 of 2147483392 bytes of samples"


def test_a_wav_beyond_four_gigabytes(tmp_path):
    pcm = noise(1 << 20)
    path = tmp_path / "long.wav"
    size = 44 + (1 << 32) + 2 * len(pcm)
    with open(path, "wb") as file:
        file.write(put(encode(pcm), 40, "<I", 2 * len(pcm)))  # its length modulo 4 GiB
        file.truncate(size)
    for decode in (True, False):
        with pytest.raises(BadAudio, match="more sound"):
            inspect(str(path), 0, size, decode=decode)
    with open(path, "r+b") as file:  # the placeholder length of a pipe
        file.seek(40)
        file.write(b"\xff" * 4)
        file.seek(size - 2000)
        file.write(pcm[:1000].tobytes())
    info = inspect(str(path), 0, size, decode=False)
    assert info == ((size - 44) // 2, RATE, 1, "WAV/PCM_16")
    last = read_samples(str(path), 0, size, info.frames - 1000, 1000, format=info.format)
    assert np.array_equal(last[:, 0], pcm[:1000])


# --- FLAC -----------------------------------------------------------------------------------------------------------


def id3v2(size: int) -> bytes:
    """An ID3v2 tag whose contents look like MP3 frames."""
    stated = bytes(size >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + stated + b"\xff\xfb\x90\x64" * (size // 4)


ID3V1 = b"TAG" + b"a title".ljust(125)
APE = b"APETAGEX" + struct.pack("<4I8x", 2000, 40, 0, 0xA0000000) + bytes(8)
APE += b"APETAGEX" + struct.pack("<4I8x", 2000, 40, 0, 0x80000000)
LYRICS = b"LYRICSBEGIN" + b"la" * 20 + b"000051LYRICS200"


@pytest.mark.parametrize("channels", [1, 2])
def test_tags_around_a_flac(judge, channels):
    pcm = noise(20_000, channels=channels)
    data = encode(pcm, kind="flac")
    for before in (b"", id3v2(4000)):
        for behind in (b"", ID3V1, APE, APE + ID3V1, LYRICS + ID3V1):
            same(judge(before + data + behind), pcm)


def test_a_flac_that_does_not_state_its_length(judge):
    pcm = noise(20_001)
    data = encode(pcm, kind="flac")
    unknown = data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:]
    same(judge(unknown), pcm)
    same(judge(unknown + ID3V1), pcm)
    assert isinstance(judge(unknown[:-100], only_decoding_tells=True), str)


def test_a_flac_that_states_another_length(judge):
    data = encode(noise(20_000), kind="flac")
    total = int.from_bytes(data[18:26], "big")
    for change in (1, 5000, 2**33):
        assert judge(put(data, 18, ">Q", total + change)).startswith("truncated: 20000 of ")
    assert "more sound" in judge(put(data, 18, ">Q", total - 1))
    assert "more sound" in judge(data + data)
    assert "more sound" in judge(data + encode(noise(5000), kind="flac"))


# --- Ogg ------------------------------------------------------------------------------------------------------------


def pages(data: bytes) -> list[bytes]:
    out, at = [], 0
    while at < len(data):
        size = 27 + data[at + 26] + sum(data[at + 27 : at + 27 + data[at + 26]])
        out.append(data[at : at + size])
        at += size
    return out


@pytest.mark.parametrize("kind", ["vorbis", "opus"])
def test_several_ogg_streams_in_a_file_are_refused(judge, kind):
    one, two = encode(noise(20_000), kind=kind), encode(noise(30_000, 1), kind=kind)
    for other in (one, two):
        assert "another Ogg stream follows" in judge(one + other)
    renamed = [with_crc(page[:14] + b"\1\2\3\4" + page[18:]) for page in pages(two)]
    first = pages(one)
    assert "interleaved" in judge(b"".join([first[0], renamed[0], *first[1:], *renamed[1:]]))


@pytest.mark.parametrize("kind", ["vorbis", "opus"])
def test_the_end_of_an_ogg(judge, kind):
    data = encode(noise(40_000), kind=kind)
    info, samples = judge(data)
    for behind in (ID3V1, bytes(1000), b"garbage" * 20, APE):
        assert np.array_equal(judge(data + behind)[1], samples)
    *others, last = pages(data)
    assert last[5] & 4
    unflagged = b"".join([*others, with_crc(last[:5] + bytes([last[5] & ~4]) + last[6:])])
    info_unflagged, samples_unflagged = judge(unflagged)
    assert abs(info_unflagged.frames - info.frames) < 4096
    count = min(info.frames, info_unflagged.frames)
    assert np.array_equal(samples_unflagged[:count], samples[:count])
    for cut in (1, 20, len(last) - 1):
        assert judge(data[: len(data) - cut]).startswith("truncated")
    assert np.array_equal(judge(id3v2(2000) + data)[1], samples)


# --- MPEG -----------------------------------------------------------------------------------------------------------


def mp3(frames: int = 40_000, seed: int = 0, rate: int = RATE, **options) -> bytes:
    return write(noise(frames, seed), "MP3", "MPEG_LAYER_III", rate, **options)


def test_tags_and_garbage_around_an_mp3(judge):
    data = mp3()
    info, samples = judge(data)
    assert info.frames == 40_000
    for before in (b"", id3v2(200_000), id3v2(40) + id3v2(400), bytes(1500), b"garbage" * 100):
        for behind in (b"", ID3V1, APE + ID3V1, LYRICS + ID3V1, bytes(3000), b"garbage" * 100):
            assert np.array_equal(judge(before + data + behind)[1], samples)


def test_an_mp3_that_begins_or_ends_in_the_middle_of_a_frame(judge):
    data = mp3(bitrate_mode="CONSTANT", compression_level=0.5)
    for begin in (5000, 5001, 5070):
        info, _ = judge(data[begin:])
        assert 25_000 < info.frames < 40_000
        assert judge(data[begin:-10])[0].frames == info.frames - 576
    verdict = judge(data[:-10])
    assert verdict.startswith("truncated") and "frames" in verdict


def test_joined_mp3s_are_refused(judge):
    data = mp3()
    for other in (data, mp3(20_000, 1), id3v2(400) + mp3(20_000, 1)):
        assert "more sound" in judge(data + other)
    assert "changes in the middle" in judge(data[5000:] + mp3(rate=24_000)[5000:])


def test_an_mp3_without_a_header_is_read_to_its_end(judge):
    """libsndfile assumes that all frames have the size of the first."""
    for mode, level in (("VARIABLE", 0.2), ("VARIABLE", 0.9), ("CONSTANT", 0.5), ("CONSTANT", 0.8)):
        quiet_first = np.concatenate([noise(30_000) // 50, noise(60_000, 1)])
        data = write(quiet_first, "MP3", "MPEG_LAYER_III", 44_100, bitrate_mode=mode, compression_level=level)
        whole = judge(data)
        bare = judge(data[Frame(int.from_bytes(data[:4], "big")).size :])
        skipped = 529 + 576
        assert bare[0].frames >= whole[0].frames + skipped
        assert np.array_equal(bare[1][skipped : skipped + whole[0].frames], whole[1])


def test_mpeg_frames_in_a_wav(judge):
    data = mp3(100_000, bitrate_mode="VARIABLE")
    facts = struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 3000, 1, 0, 12, 1, 2, 144, 1, 1393)
    _, whole = judge(data)
    for frames in (data, data[Frame(int.from_bytes(data[:4], "big")).size :]):
        wav = b"RIFF" + struct.pack("<I", 50 + len(frames)) + b"WAVEfmt " + struct.pack("<I", 30) + facts
        wav += b"data" + struct.pack("<I", len(frames)) + frames
        info, samples = judge(wav)
        assert info.format == "WAV/MPEG_LAYER_III"
        skipped = 0 if frames is data else 529 + 576
        assert np.array_equal(samples[skipped:][: len(whole)], whole)
        assert judge(wav[:-1000]).startswith("truncated")
        assert np.array_equal(judge(put(wav, 54, "<I", 0xFFFFFFFF))[1], samples)


# --- other files ----------------------------------------------------------------------------------------------------


def test_apple_double_is_no_audio_even_beside_what_it_belongs_to(tmp_path):
    """Given the file's name, libsndfile would read the audio file beside it instead."""
    header = struct.pack(">II16xH", 0x00051607, 0x00020000, 2)
    header += struct.pack(">III", 9, 50, 32) + struct.pack(">III", 2, 82, 286)
    (tmp_path / "song.mp3").write_bytes(mp3())
    double = tmp_path / "._song.mp3"
    double.write_bytes(header + bytes(32 + 286))
    for decode in (True, False):
        with pytest.raises(BadAudio, match=r"^not a recognised audio format$"):
            inspect(str(double), 0, double.stat().st_size, decode=decode)


def test_garbage_is_not_recognised(judge):
    for seed in range(5):
        assert judge(np.random.default_rng(seed).bytes(5000)) == "not a recognised audio format"
    for data in (b"<html>not found</html>" * 50, bytes(5000), b"\xff" * 5000, b"ID3", b"RIFF", b"OggS", b"fLaC"):
        assert isinstance(judge(data), str)
