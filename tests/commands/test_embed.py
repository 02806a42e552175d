import contextlib
import io
import json
import os
import signal
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from make_audio import bad_files, noise, write
from safetensors import safe_open

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
pytest.importorskip("soxr", reason="soxr is not installed")

from ajepa import embed, pack
from ajepa.config import PRESETS, SIZES
from ajepa.encoder import Encoder, EncoderConfig
from ajepa.evaluation import embeddings
from ajepa.utils.atomic_files import write_atomic
from ajepa.utils.lock import locked
from ajepa.utils.tensor_files import write_tensors
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
    bad = embed.BadFiles(tmp_path / "bad.tsv")
    (entry,) = embed.list_recordings([str(path)], embed.Arguments(str(path), [str(path)]), bad)
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

    monkeypatch.setattr(embeddings.Result, "frames", full)
    assert run(folder, recordings[0], "--out", out) == 2
    assert "No space left" in capsys.readouterr().err and out.read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"e.npz", ".e.npz.unfinished"}  # the embeddings are kept
    monkeypatch.undo()
    monkeypatch.setattr(embed, "read_pieces", full)  # nothing is embedded again
    assert run(folder, recordings[0], "--out", out) == 0 and read(out)[0] == [str(recordings[0])]
    assert [p.name for p in tmp_path.iterdir()] == ["e.npz"]


# --- unfinished work ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segments(recordings):
    """A manifest with 36 segments of one recording, each longer than a batch of chunks or as short as one chunk."""
    path = recordings[0].parent / "segments.csv"
    rows = [f"long.wav,{i / 50},{8.2 if i % 3 else 0.4}" for i in range(36)]
    path.write_text("\n".join(["filename,offset,duration", *rows]) + "\n")
    return path


def records(out) -> int:
    """How many recordings the unfinished work for `out` holds."""
    return sum(path.read_bytes().count(b"\n") for path in out.parent.glob(f".{out.name}.unfinished/*/done.jsonl"))


def main_with_a_micro_model(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", (32, 1, 4))
        return embed.main(argv)


# Before which call of which function an embedding is killed, or so many seconds later.
MOMENTS = """
ajepa.embed.claim_file 1
ajepa.embed.BadFiles 1
ajepa.utils.lock.os.link 1
ajepa.evaluation.embeddings.Spool.add 1
ajepa.evaluation.embeddings._write_all 2
ajepa.evaluation.embeddings._write_all 3
ajepa.evaluation.embeddings._write_all 3 0.001
ajepa.embed.encode 5
ajepa.evaluation.embeddings.Spool._note 1
ajepa.embed.pooled 2
ajepa.embed.list_recordings 1
ajepa.evaluation.embeddings._write_all 6
ajepa.embed.read_pieces 4
ajepa.evaluation.embeddings.Spool.add 3 0.002
ajepa.embed.encode 2 0.001
ajepa.evaluation.embeddings.Spool._recover 1
ajepa.evaluation.embeddings._write_all 8
ajepa.embed.write_result 1
ajepa.evaluation.embeddings.np.lib.format.write_array_header_2_0 2
ajepa.embed.shutil.rmtree 1
""".strip().splitlines()


def test_killed_at_20_moments_an_embedding_loses_nothing(segments, tmp_path, forks, monkeypatch):
    """Killed at whatever it does, the command goes on, and writes the file that it writes without kills."""
    with monkeypatch.context() as patch:
        patch.setitem(SIZES, "tiny", (32, 1, 4))
        config = EncoderConfig(front_end=PRESETS["tiny"].front_end, size="tiny", clip_samples=8_000)
        Encoder(config).save_pretrained(tmp_path / "micro")
    argv = [str(tmp_path / "micro"), str(segments), "--device", "cpu", "--out"]
    whole, out, log = tmp_path / "whole.npz", tmp_path / "e.npz", tmp_path / "log"
    micro = {"call": "test_embed:main_with_a_micro_model"}
    assert forks.run([*argv, str(whole)], log, **micro) == 0, log.read_text()
    done = []
    for moment in MOMENTS:
        pid = forks.start([*argv, str(out)], log, **micro, KILL=moment)
        assert forks.wait(pid) == -signal.SIGKILL, (moment, log.read_text())
        done.append(records(out))
        assert out.exists() == (moment == MOMENTS[-1])
    assert len(done) == 20 and done == sorted(done) and len(set(done)) > 5 and done[-1] == 36, done
    assert forks.run([*argv, str(out)], log, **micro) == 0
    assert out.read_bytes() == whole.read_bytes() and len(read(out)[0]) == 36
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.npz", "log", "micro", "whole.npz"]


def interrupted(monkeypatch, after: int, error=KeyboardInterrupt):
    """Let the next embedding end in `error` after that many recordings have been read."""
    whole, count = embed.read_pieces, iter(range(after))

    def read_pieces(*arguments):
        if next(count, None) is None:
            raise error
        return whole(*arguments)

    monkeypatch.setattr(embed, "read_pieces", read_pieces)


def test_ctrl_c_keeps_what_was_embedded(encoder, recordings, segments, tmp_path, monkeypatch, capsys):
    _, folder = encoder
    out, whole = tmp_path / "e.npz", tmp_path / "whole.npz"
    (tmp_path / "bad.wav").write_bytes(b"RIFF")
    sources = [tmp_path / "bad.wav", segments, *recordings]
    assert run(folder, *sources, "--out", whole) == 1
    capsys.readouterr()
    interrupted(monkeypatch, 20)
    assert run(folder, *sources, "--out", out) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stopped after {records(out)} of 41 recordings; the same command goes on from there"
    assert 12 <= records(out) <= 20 and not out.exists()
    assert (tmp_path / "e.npz.bad.tsv").read_text() == (tmp_path / "whole.npz.bad.tsv").read_text()
    monkeypatch.undo()
    interrupted(monkeypatch, 41 - records(out))  # reads no recording twice
    assert run(folder, *sources, "--out", out) == 1
    assert out.read_bytes() == whole.read_bytes()
    monkeypatch.undo()
    interrupted(monkeypatch, 0)
    assert run(folder, recordings[0], "--out", tmp_path / "none.npz") == 130
    assert capsys.readouterr().err.endswith("stopped\n") and not list(tmp_path.glob(".*"))


def test_unfinished_work_is_for_the_same_features_and_samples(encoder, recordings, tmp_path, monkeypatch, capsys):
    """A recording that changed is embedded again, and so are all for other settings; nothing is thrown away unasked."""
    one, folder = encoder
    paths = [write(tmp_path / f"{i}.wav", noise(150_000, i)) for i in range(4)]
    out = tmp_path / "e.npz"
    interrupted(monkeypatch, 3)
    assert run(folder, *paths, "--out", out) == 130 and records(out) == 3
    monkeypatch.undo()
    write(paths[1], noise(140_000, 9))
    assert run(folder, *paths, "--out", out, "--pooling", "concat") == 0
    assert "keeps unfinished embeddings" in capsys.readouterr().err and records(out) == 3
    assert read(out)[1].shape == (4, 1024)
    assert run(folder, *paths, "--out", out) == 0
    names, _, frames = read(out)
    assert names == list(map(str, paths)) and "keeps unfinished" in capsys.readouterr().err  # of the old 1.wav
    for path, x in zip(paths, frames, strict=True):
        np.testing.assert_allclose(x, expected(one, path), rtol=1e-3, atol=1e-3)
    assert run(folder, recordings[4], "--out", tmp_path / "other.npz") == 0
    assert "keeps" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [embeddings.RECORDS, embeddings.CLIPS, embeddings.FRAMES])
def test_damage_of_unfinished_work_is_noticed(tmp_path, name, capsys):
    """Fifty flipped bits, and files that are cut: the whole embeddings before the damage are kept, and no others."""
    rng = np.random.default_rng(0)
    wanted = [(bytes([i] * 16), embeddings.Embedded(f"{i} é", *rng.random((2, 3, 4), "f4"))) for i in range(6)]
    wanted = [(key, one._replace(clip=one.clip[0])) for key, one in wanted]

    def check() -> int:
        with contextlib.closing(embeddings.Spool(tmp_path / "s", 4, True)) as spool:
            assert spool.names == [one.name for _, one in wanted[: len(spool.names)]]
            result = embeddings.Result(spool, range(len(spool.names)), {}) if spool.names else None
        if result is not None:
            clips = np.concatenate(list(result.clips()))
            np.testing.assert_array_equal(clips, [one.clip for _, one in wanted[: len(clips)]])
            for ours, (_, theirs) in zip(result.frames(), wanted, strict=False):
                np.testing.assert_array_equal(ours, theirs.frames)
        return len(spool.names)

    def fill() -> Path:
        with contextlib.closing(embeddings.Spool(tmp_path / "s", 4, True)) as spool:
            spool.add(wanted[len(spool.names) :])
        return tmp_path / "s" / name

    file = fill()
    assert check() == 6
    for bit in rng.integers(8 * file.stat().st_size, size=50):
        data = bytearray(file.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        assert check() < 6
        fill()
    for size in rng.integers(file.stat().st_size, size=10):
        os.truncate(file, size)
        assert check() < 6
        fill()
    assert "recordings are embedded again" in capsys.readouterr().err


def test_two_processes_do_not_share_unfinished_work(encoder, recordings, tmp_path, capsys):
    _, folder = encoder
    (tmp_path / ".e.npz.unfinished").mkdir()
    with locked(tmp_path / ".e.npz.unfinished"):
        assert run(folder, recordings[4], "--out", tmp_path / "e.npz") == 2
        assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    assert run(folder, recordings[4], "--out", tmp_path / "e.npz") == 0


def test_only_earlier_embeddings_are_replaced(encoder, recordings, tmp_path, capsys):
    """Not weights, archives or tables of others, whatever their suffix."""
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow
    from pyarrow import parquet

    one, folder = encoder
    np.savez(tmp_path / "mine.npz", clips=np.zeros(3))
    write_tensors(tmp_path / "encoder.safetensors", one.state_dict())
    parquet.write_table(pyarrow.table({"file": ["a"]}), tmp_path / "mine.parquet")
    (tmp_path / "text.npz").write_text("mine")
    (tmp_path / "text.parquet").write_text("mine")
    (tmp_path / "folder.npz").mkdir()
    kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for path in tmp_path.iterdir():
        assert run(folder, recordings[4], "--out", path) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: --out {path} is ") and message.count("\n") == 1
    assert kept == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for suffix in (".npz", ".safetensors", ".parquet"):
        for _ in range(2):
            assert run(folder, recordings[4], "--out", tmp_path / f"own{suffix}") == 0


def test_names_that_a_format_cannot_hold_are_refused_before_the_work(
    encoder, recordings, tmp_path, monkeypatch, capsys
):
    _, folder = encoder
    monkeypatch.setattr(embeddings, "HEADER", 100)
    assert run(folder, *recordings, "--out", tmp_path / "e.safetensors") == 2
    message = capsys.readouterr().err
    assert "5 names do not fit into a .safetensors file" in message and not list(tmp_path.iterdir())


@pytest.mark.parametrize("stdin", [None, io.TextIOWrapper(io.BytesIO())])
def test_a_closed_standard_input_is_one_line(encoder, tmp_path, monkeypatch, capsys, stdin):
    if stdin is not None:
        stdin.close()
    monkeypatch.setattr("sys.stdin", stdin)
    assert run(encoder[1], "-", "--out", tmp_path / "e.npz") == 2
    message = capsys.readouterr().err
    assert "standard input, which is closed" in message and message.count("\n") == 1


def test_sources_of_every_kind_are_the_same_recordings(encoder, tmp_path):
    """Folders, manifests, tars, brace ranges of tars and shards, as `--data` takes them."""
    _, folder = encoder
    root = tmp_path / "recordings"
    root.mkdir()
    paths = [write(root / f"{i}.wav", noise(5_000 + 900 * i, i)) for i in range(4)]
    for n in range(2):
        with tarfile.open(tmp_path / f"part-{n}.tar", "w") as tar:
            for path in paths[2 * n : 2 * n + 2]:
                tar.add(path, path.name)
    (tmp_path / "m.csv").write_text("\n".join(["path,label", *(f"{path},{i}" for i, path in enumerate(paths))]) + "\n")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"audio": str(path)}) + "\n" for path in paths))
    assert pack.main([str(root), str(tmp_path / "packed"), "--rate", "16000", "--silence-db", "-200"]) == 0
    assert run(folder, *paths, "--out", tmp_path / "e.npz") == 0
    wanted = read(tmp_path / "e.npz")[1]
    sources = ["recordings", "m.csv", "m.jsonl", "part-{0..1}.tar", "part-*.tar", "packed"]
    for source in sources:
        assert run(folder, tmp_path / source, "--out", tmp_path / "e.npz") == 0
        np.testing.assert_allclose(read(tmp_path / "e.npz")[1], wanted, rtol=1e-4, atol=1e-4)
    assert run(folder, tmp_path / "m.csv", "--where", "label=1,2", "--out", tmp_path / "e.npz") == 0
    assert read(tmp_path / "e.npz")[0] == [str(path) for path in paths[1:3]]
