"""In every container and encoding, a window of samples equals the same part of a decode from the start."""

import errno
import functools
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_audio import noise
from mutate import KINDS, mutate, original

from ajepa.data.formats import audiofile, containers
from ajepa.data.formats.audiofile import INT16, BadAudio, audio_bytes, inspect, iterate_samples, read_into, read_samples
from ajepa.data.formats.streams import Frame

RATE = 16_000
# {container: encodings}, out of all that libsndfile writes. The missing ones are obscure or (ALAC_20) written wrongly.
ENCODINGS = {
    "WAV": "PCM_U8 PCM_16 PCM_24 PCM_32 FLOAT DOUBLE ULAW ALAW IMA_ADPCM MS_ADPCM GSM610 G721_32 NMS_ADPCM_16 "
    "NMS_ADPCM_24 NMS_ADPCM_32",
    "WAVEX": "PCM_16 PCM_24 FLOAT",
    "RF64": "PCM_U8 PCM_16 FLOAT ULAW",
    "W64": "PCM_16 PCM_24 FLOAT ALAW IMA_ADPCM MS_ADPCM GSM610",
    "AIFF": "PCM_S8 PCM_U8 PCM_16 PCM_24 FLOAT DOUBLE ULAW IMA_ADPCM GSM610 DWVW_16 DWVW_24",
    "AU": "PCM_S8 PCM_16 PCM_24 FLOAT DOUBLE ULAW G721_32 G723_24 G723_40",
    "CAF": "PCM_S8 PCM_16 FLOAT ALAW ALAC_16",
    "FLAC": "PCM_S8 PCM_16 PCM_24",
    "OGG": "VORBIS OPUS",
    "MP3": "MPEG_LAYER_III",
    "NIST": "PCM_S8 PCM_16 ULAW",
}
FORMATS = [(container, encoding) for container, encodings in ENCODINGS.items() for encoding in encodings.split()]


class Sequential(sf.SoundFile):
    """A SoundFile that does not seek after each read."""

    def seekable(self) -> bool:
        return False


def speech_like(frames: int, channels: int = 1, rate: int = RATE) -> np.ndarray:
    """float64 `[frames, channels]` that alternates between loud and quiet, so that a codec's frames differ in size."""
    t = np.arange(frames) / rate
    pitch = 0.4 * np.sin(2 * np.pi * (120 + 60 * np.sin(2 * t)) * t) * (np.sin(5 * t) > -0.4)
    hiss = noise(frames, seed=3) / 32768 * (np.sin(3 * t + 1) > 0.2)
    return np.stack([pitch + hiss, 0.6 * pitch - hiss][:channels], 1)


@functools.lru_cache
def encoded(container: str, encoding: str, rate: int, channels: int, frames: int, **options) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, speech_like(frames, channels, rate), rate, format=container, subtype=encoding, **options)
    return buffer.getvalue()


def decoded(data: bytes, dtype: str = "float32") -> np.ndarray:
    with Sequential(io.BytesIO(data)) as sound:
        return sound.read(sound.frames, dtype, always_2d=True)


def check_windows(path: str, data: bytes, windows, *, offset: int = 0, expected: np.ndarray | None = None) -> None:
    """Compare `inspect`, `iterate_samples` and `read_samples` with a decode of the whole file by libsndfile."""
    in_tar = offset > 0
    info = inspect(path, offset, len(data), in_tar=in_tar)
    assert inspect(path, offset, len(data), in_tar=in_tar, decode=False) == info
    whole = decoded(data, "int16" if info.format in INT16 else "float32") if expected is None else expected
    assert (info.frames, info.channels) == whole.shape
    options = {"in_tar": in_tar, "format": info.format}
    blocks = list(iterate_samples(path, offset, len(data), **options, block=5000))
    assert max(map(len, blocks)) <= 5000
    assert blocks[0].dtype == whole.dtype and np.array_equal(np.concatenate(blocks), whole)
    for start, count in windows:
        start, count = int(start * info.frames), max(1, int(count * info.frames))
        start = min(start, info.frames - count)
        got = read_samples(path, offset, len(data), start, count, **options)
        assert got.dtype == whole.dtype
        np.testing.assert_array_equal(got, whole[start : start + count], f"{info} [{start}, +{count}]")


fractions = st.floats(0, 1)
windows = st.lists(st.tuples(fractions, st.floats(0, 0.6)), min_size=1, max_size=4)
quick = functools.partial(
    settings,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@quick(max_examples=120)
@given(st.sampled_from(FORMATS), st.sampled_from([8000, 16000, 48000]), st.integers(1, 2), windows, st.booleans())
def test_any_window_of_any_format(tmp_path, format, rate, channels, windows, in_tar):
    try:
        data = encoded(*format, rate, channels, 20_000)
    except sf.LibsndfileError:
        data = encoded(*format, 8000, 1, 20_000)  # some encodings support telephone rates only
    path, offset = tmp_path / "sound", 777 if in_tar else 0
    path.write_bytes(bytes(offset) + data + bytes(offset))
    check_windows(str(path), data, windows, offset=offset)


def test_every_format_is_read(tmp_path):
    path = tmp_path / "sound"
    for container, encoding in FORMATS:
        path.write_bytes(data := encoded(container, encoding, 8000, 1, 9000))
        check_windows(str(path), data, [(0, 1), (0.5, 0.3), (0.99, 0.01)])
        assert inspect(str(path), 0, len(data)).format == f"{container}/{encoding}"
        assert (f"{container}/{encoding}" in INT16) == (encoding in ("PCM_16", "ALAC_16"))


@quick(max_examples=250)
@given(st.sampled_from(sorted(KINDS)), st.integers(1, 2), st.integers(0, 2**32 - 1), st.booleans())
def test_a_damaged_file_is_refused_or_read_as_it_was_judged(tmp_path, kind, channels, seed, cut):
    rng = np.random.default_rng(seed)
    data = original(kind, noise(2400, channels=1 if kind in ("au_g721", "wav_gsm") else channels))
    data = data[: rng.integers(1, len(data))] if cut else mutate(data, rng)
    path = tmp_path / "sound"
    path.write_bytes(data)
    source = (str(path), 0, len(data))
    try:
        info = inspect(*source)
    except BadAudio as error:
        assert str(error)
        return
    whole = np.concatenate(list(iterate_samples(*source, format=info.format)))
    assert whole.shape == (info.frames, info.channels)
    start, count = info.frames // 3, (info.frames + 1) // 2
    part = read_samples(*source, start, count, format=info.format)
    assert np.array_equal(part, whole[start : start + count])


# --- MPEG, whose frames depend on earlier frames ---------------------------------------------------------------------


def first_frame_left_out(data: bytes) -> bytes:
    return data[Frame(int.from_bytes(data[:4], "big")).size :]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [44_100, 22_050, 16_000, 8_000])  # MPEG-1, 2, 2 and 2.5
def test_windows_of_an_mp3(tmp_path, rate, channels, capfd):
    path = tmp_path / "sound.mp3"
    spread = [(x, 0.02) for x in np.linspace(0, 1, 12)]
    for mode, level in (("CONSTANT", 0.4), ("CONSTANT", 0.99), ("VARIABLE", 0.1), ("VARIABLE", 0.9)):
        options = {"bitrate_mode": mode, "compression_level": level}
        data = encoded("MP3", "MPEG_LAYER_III", rate, channels, 6 * rate, **options)
        path.write_bytes(data)
        check_windows(str(path), data, spread)
        bare = first_frame_left_out(data)  # states no length, and none of its samples are trimmed
        path.write_bytes(bare)
        info = inspect(str(path), 0, len(bare))
        whole = np.concatenate(list(iterate_samples(str(path), 0, len(bare), format=info.format)))
        check_windows(str(path), bare, spread, expected=whole)
        if b"LAME" in data[:200]:
            stated = decoded(data)
            assert np.array_equal(whole[529 + 576 :][: len(stated)], stated)
        cut = bare[len(bare) // 3 :]  # begins within a frame, and later frames need data from before the cut
        path.write_bytes(cut)
        info = inspect(str(path), 0, len(cut))
        whole = np.concatenate(list(iterate_samples(str(path), 0, len(cut), format=info.format)))
        check_windows(str(path), cut, spread, expected=whole)
    noise_of_the_decoder = [line for line in capfd.readouterr().err.splitlines() if "missing" in line]
    assert not noise_of_the_decoder


@pytest.mark.parametrize("options", [{}, {"bitrate_mode": "VARIABLE"}])
def test_an_mp3_is_quiet(tmp_path, options, capfd):
    data = encoded("MP3", "MPEG_LAYER_III", RATE, 1, 200_000, **options)
    path = tmp_path / "sound.mp3"
    path.write_bytes(data)
    check_windows(str(path), data, [(x, 0.05) for x in np.linspace(0, 1, 20)])
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("encoding", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("level", [0.2, 0.97, 1.0])
def test_windows_of_an_ogg(tmp_path, encoding, level):
    """At high compression levels Opus uses its speech mode, whose decoder never forgets earlier samples, and Vorbis
    writes pages of many seconds."""
    data = encoded("OGG", encoding, 48_000, 1, 48_000 * 12, compression_level=level)
    path = tmp_path / "sound.ogg"
    path.write_bytes(data)
    check_windows(str(path), data, [(x, 0.02) for x in np.linspace(0, 1, 25)])


def test_real_recordings(tmp_path):
    if not os.path.isdir(os.environ.get("AJEPA_TEST_AUDIO", "")):
        pytest.skip("AJEPA_TEST_AUDIO names no folder of recordings")
    names = [*Path(os.environ["AJEPA_TEST_AUDIO"]).rglob("*")]
    paths = sorted(path for path in names if path.suffix in (".wav", ".flac", ".ogg", ".mp3"))
    paths = [path for path in paths if "corrupt" not in path.parts and path.stat().st_size < 1 << 20]
    for path in np.random.default_rng(0).permutation(paths)[:60]:
        check_windows(str(path), path.read_bytes(), [(0.5, 0.1), (0.9, 0.1)])


# --- floating point -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["FLOAT", "DOUBLE"])
def test_float_samples_in_another_unit(tmp_path, encoding):
    path = tmp_path / "sound.wav"
    samples = noise(5000).astype(np.float64)
    sf.write(path, samples, RATE, subtype=encoding)
    source = (str(path), 0, path.stat().st_size)
    format = f"WAV/{encoding}"
    reads = (
        lambda **options: inspect(*source, **options),
        lambda **options: read_samples(*source, 0, 5000, format=format, **options),
        lambda **options: list(iterate_samples(*source, format=format, **options)),
    )
    for read in reads:
        with pytest.raises(
            BadAudio, match=r"float samples reach .*,\d{3} where full scale is 1\.0.*--float-scale 32768"
        ):
            read()
        read(float_scale=32768)
    expected = (samples / 32768).astype(np.float32)[:, None]
    assert np.array_equal(read_samples(*source, 0, 5000, format=format, float_scale=32768), expected)
    assert np.array_equal(read_samples(*source, 100, 50, format=format, float_scale=32768), expected[100:150])
    assert np.array_equal(np.concatenate(list(reads[2](float_scale=32768))), expected)


def test_the_scale_of_floats_is_not_that_of_integers(tmp_path):
    path = tmp_path / "sound.wav"
    for encoding, dtype in (("PCM_16", np.int16), ("PCM_24", np.float32)):
        sf.write(path, noise(500), RATE, subtype=encoding)
        source = (str(path), 0, path.stat().st_size)
        got = read_samples(*source, 0, 500, format=f"WAV/{encoding}", float_scale=32768)
        assert got.dtype == dtype and np.array_equal(got[:, 0] * (1 if dtype == np.int16 else 32768), noise(500))


def test_a_little_above_full_scale_is_as_it_was(tmp_path):
    path = tmp_path / "sound.wav"
    samples = noise(500) / np.float32(8192)
    sf.write(path, samples, RATE, subtype="FLOAT")
    assert samples.max() > 1
    assert np.array_equal(read_samples(str(path), 0, path.stat().st_size, 0, 500, format="WAV/FLOAT")[:, 0], samples)


# --- arguments and errors -------------------------------------------------------------------------------------------


def test_out_is_filled(tmp_path):
    path, out = tmp_path / "sound.wav", np.empty(200, np.int16)
    sf.write(path, noise(1000), RATE)
    got = read_samples(str(path), 0, path.stat().st_size, 300, 200, format="WAV/PCM_16", out=out)
    assert got is out or np.shares_memory(got, out)
    assert np.array_equal(out, noise(1000)[300:500])


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3", "AU"])
def test_a_window_beyond_the_end_is_refused(tmp_path, container):
    path = tmp_path / "sound"
    encoding = ENCODINGS[container].split()[0 if container != "WAV" else 1]
    path.write_bytes(data := encoded(container, encoding, RATE, 1, 40_000))
    frames = inspect(str(path), 0, len(data)).frames
    for start, count in ((frames - 10, 11), (frames, 1), (frames + 5000, 10), (0, frames + 1)):
        with pytest.raises(BadAudio):
            read_samples(str(path), 0, len(data), start, count, format=f"{container}/{encoding}")


def test_a_file_that_became_another_is_refused(tmp_path):
    path = tmp_path / "sound.wav"
    sf.write(path, noise(1000), RATE, subtype="PCM_24")
    with pytest.raises(BadAudio, match="PCM_24, no longer WAV/PCM_16"):
        read_samples(str(path), 0, path.stat().st_size, 0, 10, format="WAV/PCM_16")


def test_a_disk_that_fails_is_an_error_of_the_system(tmp_path, monkeypatch):
    """A decoder reads a tar member through a callback, and would mistake a read error for the end of the file."""
    path = tmp_path / "sound.tar"
    path.write_bytes(bytes(512) + encoded("WAV", "PCM_16", RATE, 1, 40_000))
    size = path.stat().st_size - 512
    whole = containers.read_at

    def failing(fd: int, buffer: memoryview, position: int) -> int:
        if position > 40_000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(fd, buffer, position)

    monkeypatch.setattr(containers, "read_at", failing)
    with pytest.raises(OSError, match="Input/output error"):
        inspect(str(path), 512, size, in_tar=True)
    with pytest.raises(OSError, match="Input/output error"):
        read_samples(str(path), 512, size, 30_000, 1000, in_tar=True, format="WAV/PCM_16")


def test_missing_files_and_folders_are_errors_of_the_system(tmp_path):
    for path in (tmp_path / "none.wav", tmp_path):
        with pytest.raises(OSError):
            inspect(str(path), 0, 100)


def test_no_descriptor_is_left_open(tmp_path):
    good, bad, none = tmp_path / "good.flac", tmp_path / "bad.flac", tmp_path / "none.wav"
    none.write_bytes(bytes(range(256)) * 20)
    good.write_bytes(data := encoded("FLAC", "PCM_16", RATE, 1, 5000))
    bad.write_bytes(data[:100] + bytes(3000))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        inspect(str(good), 0, len(data))
        read_samples(str(good), 0, len(data), 0, 10, format="FLAC/PCM_16")
        next(iterate_samples(str(good), 0, len(data), format="FLAC/PCM_16"))
        for path in (bad, none):
            with pytest.raises(BadAudio):
                inspect(str(path), 0, path.stat().st_size)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("missing", [("preadv",), ("preadv", "pread")])  # as on an older macOS, and on Windows
def test_without_positional_reads_threads_still_read_the_right_bytes(tmp_path, monkeypatch, missing):
    for name in missing:
        monkeypatch.delattr(os, name)
    content = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    path = tmp_path / "bytes"
    path.write_bytes(content.tobytes())
    fd = os.open(path, os.O_RDONLY)

    def read(start: int) -> bool:
        data = np.empty(3000, np.uint8)
        read_into(data, fd, start)
        return np.array_equal(data, content[start : start + 3000])

    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, np.random.default_rng(1).integers(0, len(content) - 3000, 300).tolist()))
    finally:
        os.close(fd)
    path.write_bytes(bytes(512) + encoded("FLAC", "PCM_16", RATE, 1, 20_000))
    check_windows(str(path), encoded("FLAC", "PCM_16", RATE, 1, 20_000), [(0.3, 0.2)], offset=512)


def test_threads_read_one_file_at_once(tmp_path):
    path = tmp_path / "sound.mp3"
    path.write_bytes(data := encoded("MP3", "MPEG_LAYER_III", RATE, 1, 200_000))
    whole = decoded(data)

    def read(start: int) -> bool:
        part = read_samples(str(path), 0, len(data), start, 3000, format="MP3/MPEG_LAYER_III")
        return np.array_equal(part, whole[start : start + 3000])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, np.random.default_rng(1).integers(0, len(whole) - 3000, 60).tolist()))


def test_bytes_for_another_decoder_are_mended(tmp_path):
    data = encoded("FLAC", "PCM_16", RATE, 1, 20_000)
    path = tmp_path / "sound.flac"
    path.write_bytes(data[:21] + bytes([data[21] & 0xF0]) + bytes(4) + data[26:] + b"TAG" + bytes(125))
    assert audio_bytes(str(path), 0, path.stat().st_size).tobytes() == data


def test_a_header_that_claims_more_than_bytes_can_hold(tmp_path, monkeypatch):
    path = tmp_path / "sound"
    path.write_bytes(data := encoded("OGG", "VORBIS", RATE, 1, 9000))
    monkeypatch.setattr(audiofile.Sound, "frames", property(lambda sound: 2**62), raising=False)
    for decode in (True, False):
        with pytest.raises(BadAudio, match=r"more than .* bytes can hold"):
            inspect(str(path), 0, len(data), decode=decode)
