import io
import json
import os
import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from make_audio import bad_files, noise, write
from safetensors import safe_open

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytest.importorskip("soxr", reason="soxr is not installed")

from ajepa import embed
from ajepa.config import PRESETS
from ajepa.encoder import Encoder, EncoderConfig
from ajepa.utils.atomic_files import write_atomic
from ajepa_kernels import _extension, resample


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random tiny encoder with half-second chunks, and its folder."""
    torch.manual_seed(0)
    one = Encoder(EncoderConfig(front_end=PRESETS["tiny"].front_end, size="tiny", clip_samples=8_000))
    folder = tmp_path_factory.mktemp("encoder")
    one.save_pretrained(folder)
    return one, folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Files of several formats, rates, channel counts and lengths. The first has 20 chunks; the last is shorter than an
    analysis window."""
    root = tmp_path_factory.mktemp("recordings")
    return [
        write(root / "long.wav", noise(158_000, 0)),
        write(root / "stereo.flac", noise(30_000, 1, channels=2), 44_100, "flac"),
        write(root / "voice.ogg", noise(20_000, 2), 16_000, "vorbis"),
        write(root / "song.mp3", noise(60_000, 3), 48_000, "mp3"),
        write(root / "click.wav", noise(100, 4)),
    ]


def expected(one: Encoder, path, embedded_by=None) -> np.ndarray:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    with torch.inference_mode():
        return (embedded_by or one)(torch.from_numpy(samples.mean(1)), rate)[0].numpy()


def read(path) -> tuple[list[str], np.ndarray, list[np.ndarray] | None]:
    """(names, clips, frames), read from any of the three formats with the format's own library."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows = parquet.read_table(path).to_pylist()
        frames = [np.asarray(row["frames"], np.float32) for row in rows] if "frames" in rows[0] else None
        return [row["file"] for row in rows], np.asarray([row["clip"] for row in rows], np.float32), frames
    if path.suffix == ".npz":
        arrays = dict(np.load(path))
        names = arrays["names"].tolist()
    else:
        with safe_open(path, "np") as file:
            arrays = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            names = json.loads(file.metadata()["names"])
    at = arrays["offsets"]
    frames = np.split(arrays["frames"], at[1:-1]) if "frames" in arrays else None
    assert at[0] == 0 and (frames is None or at[-1] == len(arrays["frames"]))
    return names, arrays["clips"], frames


def run(*argv) -> int:
    return embed.main([str(a) for a in argv])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".parquet"])
def test_embeddings_are_the_encoders_own(encoder, recordings, tmp_path, suffix, capsys):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    one, folder = encoder
    out = tmp_path / f"e{suffix}"
    assert run(folder, *recordings, "--out", out) == 0
    names, clips, frames = read(out)
    assert names == [str(path) for path in recordings]
    for path, clip, x in zip(recordings, clips, frames, strict=True):
        wanted = expected(one, path)
        assert x.shape == wanted.shape
        np.testing.assert_allclose(x, wanted, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(clip, x.mean(0), rtol=1e-5, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == [out.name]  # no temporary file and no list of bad files is left
    assert "5 recordings embedded" in capsys.readouterr().out

    assert run(folder, *recordings[:2], "--out", out, "--no-frames", "--pooling", "concat") == 0
    names, clips, frames = read(out)
    assert len(names) == 2 and clips.shape == (2, 8 * 128) and frames is None


@pytest.mark.parametrize("pooling", ["mean+std", "concat+std", "projection"])
def test_poolings_of_a_chunk_are_pooled_over_the_recording(recordings, tmp_path, pooling):
    """A frame for each chunk, and one embedding over all chunks of a recording, also of one with 20 chunks."""
    torch.manual_seed(0)
    one = Encoder(EncoderConfig(PRESETS["tiny"].front_end, "tiny", 8_000, projector=(32, 16), layers="mean"))
    one.save_pretrained(tmp_path / "encoder")
    assert run(tmp_path / "encoder", *recordings, "--out", tmp_path / "e.npz", "--pooling", pooling) == 0
    one = Encoder.from_pretrained(tmp_path / "encoder", pooling=pooling)
    names, clips, frames = read(tmp_path / "e.npz")
    assert names == [str(path) for path in recordings] and len(frames[0]) == 20
    for path, clip, x in zip(recordings, clips, frames, strict=True):
        np.testing.assert_allclose(x, expected(one, path), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(clip, expected(one, path, one.embed), rtol=1e-3, atol=1e-3)
    assert dict(np.load(tmp_path / "e.npz"))["hop_size_in_ms"] == 500


@pytest.mark.skipif(not _extension.AVAILABLE, reason="needs the extension: soxr rounds slices differently")
def test_streamed_resampling_is_that_of_the_whole(encoder, tmp_path):
    """A minute at 44.1 kHz is decoded in many blocks."""
    one, _ = encoder
    path = write(tmp_path / "minute.wav", noise(60 * 44_100, 5), 44_100)
    (entry,) = embed.list_recordings([str(path)], embed.Arguments(str(path), [str(path)]), {})
    pieces = torch.cat([piece.samples for piece in embed.read_pieces(entry, one)])
    samples, _ = soundfile.read(path, dtype="float32")
    whole = resample(torch.from_numpy(samples), 44_100, 16_000)
    wanted = torch.cat([whole[c.start : c.stop] for c in one.chunks(len(whole))])
    assert torch.equal(pieces, wanted)


def test_bad_files_are_listed_and_leave_no_trace(encoder, recordings, tmp_path, capsys):
    one, folder = encoder
    reasons = {}
    for name, (data, reason) in bad_files().items():
        (tmp_path / name).write_bytes(data)
        reasons[str(tmp_path / name)] = reason
    late = soundfile.SoundFile(tmp_path / "late.wav", "w", 16_000, 1, "FLOAT")  # bad after a batch of chunks
    samples = noise(300_000, 6).astype(np.float32) / 32768
    samples[-5] = np.nan
    late.write(samples)
    late.close()
    reasons[str(tmp_path / "late.wav")] = "not finite"
    reasons[str(tmp_path / "none.wav")] = "no such file"
    (tmp_path / "empty").mkdir()
    reasons[str(tmp_path / "empty")] = "no audio files here"
    os.mkfifo(tmp_path / "pipe.wav")
    reasons[str(tmp_path / "pipe.wav")] = "not a regular file"
    good = [str(path) for path in recordings]
    bad = list(reasons)
    mixed = [*good[:2], *bad[:7], good[2], *bad[7:], *good[3:], good[0]]  # one file appears twice
    out = tmp_path / "e.npz"
    assert run(folder, *mixed, "--out", out) == 1
    names, _, frames = read(out)
    assert names == good
    for path, x in zip(good, frames, strict=True):
        np.testing.assert_allclose(x, expected(one, path), rtol=1e-3, atol=1e-3)
    shown = capsys.readouterr()
    rows = dict(line.split("\t") for line in (tmp_path / "e.npz.bad.tsv").read_text().splitlines()[1:])
    assert rows.keys() == reasons.keys()
    for path, reason in reasons.items():
        assert reason in rows[path] and rows[path] and path in shown.err
    assert f"bad files: {len(reasons)}," in shown.err and "5 recordings embedded" in shown.out

    assert run(folder, bad[0], "--out", tmp_path / "none.npz") == 1
    assert not (tmp_path / "none.npz").exists() and "nothing written" in capsys.readouterr().out
    assert run(folder, good[4], "--out", out) == 0
    assert not (tmp_path / "e.npz.bad.tsv").exists()  # the previous run's list is removed


@pytest.mark.parametrize("separator", ["\n", "\0"])
def test_names_come_from_the_standard_input(encoder, tmp_path, monkeypatch, separator):
    _, folder = encoder
    odd = os.fsdecode(b"caf\xe9 \xc3\xa9.wav")  # one of the two characters is not UTF-8
    paths = [str(write(tmp_path / name, noise(5_000, i))) for i, name in enumerate(["a b.wav", odd])]
    if separator == "\0":
        paths.append(str(write(tmp_path / "two\nlines.wav", noise(5_000, 3))))
    data = separator.join(paths).encode(errors="surrogateescape") + separator.encode()
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    assert run(folder, "-", "--out", tmp_path / "e.safetensors") == 0
    names, clips, _ = read(tmp_path / "e.safetensors")
    assert len(clips) == len(paths) and names[1].endswith("caf\\xe9 é.wav")


def test_wrong_arguments_are_refused_before_the_work(encoder, recordings, tmp_path, monkeypatch, capsys):
    _, folder = encoder

    def refused(match: str, *argv) -> None:
        assert run(*argv) == 2
        message = capsys.readouterr().err
        assert match in message and message.count("\n") == 1

    refused(".npz", folder, recordings[0], "--out", tmp_path / "e.csv")
    refused("config.json", tmp_path, recordings[0])
    refused("no files", folder)
    refused("projector of a clip objective", folder, recordings[0], "--pooling", "projection")
    if not torch.cuda.is_available():
        refused("CUDA", folder, recordings[0], "--device", "cuda")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused("ajepa[parquet]", folder, recordings[0], "--out", tmp_path / "e.parquet")
    write_atomic(tmp_path / "file", b"")
    refused("file", folder, recordings[0], "--out", tmp_path / "file" / "e.npz")


def test_a_failed_write_leaves_the_old_result(encoder, recordings, tmp_path, monkeypatch, capsys):
    _, folder = encoder
    out = tmp_path / "e.npz"
    assert run(folder, recordings[4], "--out", out) == 0
    before = out.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embed, "_copy_frames", full)
    assert run(folder, recordings[0], "--out", out) == 2
    assert "No space left" in capsys.readouterr().err and out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["e.npz"]
