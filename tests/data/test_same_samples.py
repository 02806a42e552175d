"""Every command gets the same samples: frequencies above the new Nyquist frequency are removed, those below are kept.
The samples do not depend on the decoder, on shards, or on where in the file a clip is cut."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import SMALL
from loading import CLIP, RATE, once, take
from make_audio import FORMATS, encode, noise, write, write_tar

from ajepa import embed, export, finetune, pack, probe, train
from ajepa.data import decode
from ajepa.data.index import DataError, build_index
from ajepa.data.loader import AudioLoader
from ajepa.data.reader import Reader, iterate_entry
from ajepa.encoder import Encoder
from ajepa.model.frontend import FrontEnd
from ajepa_kernels import _extension, resample

FROM = 48_000
TONES = {"alias": 12_000, "pass": 7_000}  # Hz, at amplitude 0.5; the Nyquist frequency is 8 kHz


@pytest.fixture(scope="module", params=TONES)
def tone(request, tmp_path_factory):
    """(name of the tone, folder). The folder has recordings of the tone in two classes at 48 kHz, as stereo FLAC and
    mono WAV."""
    folder = tmp_path_factory.mktemp(request.param)
    x = 0.5 * np.sin(2 * np.pi * TONES[request.param] * np.arange(FROM) / FROM)
    for i in range(8):
        y = np.rint(32767 * x[i * 1000 :]).astype(np.int16)
        kind, suffix = (("wav16", ".wav"), ("flac", ".flac"))[i % 2]
        write(folder / "ab"[i // 4] / f"{i}{suffix}", np.stack([y, y], 1) if i % 2 else y, FROM, kind)
    return request.param, folder


def rms(x) -> float:
    """RMS of the middle of a clip, where the filter has settled. Full scale is 1."""
    x = np.asarray(x, np.float64) / (32768 if x.dtype in (torch.int16, np.int16) else 1)
    return math.sqrt((x[400:-400] ** 2).mean())


def check(kind: str, clips) -> None:
    assert len(clips)
    for clip in clips:
        if kind == "alias":
            assert rms(clip) < 2e-5  # rounding to 16 bits accounts for 9e-6
        else:
            assert abs(20 * math.log10(rms(clip) / (0.5 / math.sqrt(2)))) < 0.05


@pytest.fixture
def clips_heard(monkeypatch):
    """The clips that the front end receives, without the silent ones between recordings."""
    clips: list[torch.Tensor] = []
    call = FrontEnd.__call__

    def listen(self, pcm, lengths=None):
        sizes = [pcm.shape[1]] * len(pcm) if lengths is None else lengths.tolist()
        clips.extend(clip[:n].clone() for clip, n in zip(pcm, sizes, strict=True) if n > 4000)
        return call(self, pcm, lengths)

    monkeypatch.setattr(FrontEnd, "__call__", listen)
    return clips


def test_train(tone, tmp_path, clips_heard):
    kind, folder = tone
    small = [*SMALL, "--steps", "2", "--warmup-steps", "1", "--compare-steps", "0", "--gain-db", "0"]
    assert train.main(["--data", str(folder), "--out", str(tmp_path / "run"), *small]) == 0
    check(kind, clips_heard)


def test_probe(tone, tmp_path, clips_heard, run):
    kind, folder = tone
    probe.main([str(run), "--data", str(folder), "--heads", "knn", "--map", "none", "--out", str(tmp_path)])
    check(kind, clips_heard)


def test_finetune(tone, tmp_path, clips_heard, run):
    kind, folder = tone
    manifest = tmp_path / "m.csv"
    rows = [f"{path},{path.parent.name},{i % 2}\n" for i, path in enumerate(sorted(folder.rglob("*.*")))]
    manifest.write_text("filename,label,fold\n" + "".join(rows))
    options = ["--data", str(manifest), "--test", "fold=1", "--epochs", "1", "--out", str(tmp_path / "fine")]
    assert finetune.main([str(run), *options]) == 0
    check(kind, clips_heard)


@pytest.mark.parametrize("codec", ["pcm", "flac"])
def test_pack(tone, tmp_path, codec):
    kind, folder = tone
    assert pack.main([str(folder), str(tmp_path / "packed"), "--rate", str(RATE), "--codec", codec,
                      "--silence-db", "-200"]) == 0  # fmt: skip
    check(kind, once(build_index(tmp_path / "packed"), clip_samples=10_000).pcm)


def test_embed_encoder_and_export(tone, tmp_path, run, monkeypatch):
    """The exported folder loads as an Encoder. The file for X-ARES expects audio at the encoder's rate."""
    kind, folder = tone
    clips = []
    encode_chunks = Encoder.encode_chunks

    def listen(self, chunks):
        clips.extend(chunk for chunk in chunks if len(chunk) > 4000)
        return encode_chunks(self, chunks)

    monkeypatch.setattr(Encoder, "encode_chunks", listen)
    assert embed.main([str(run), str(folder), "--out", str(tmp_path / "e.npz"), "--pooling", "concat"]) == 0
    check(kind, clips)
    assert len(np.load(tmp_path / "e.npz")["names"]) == 8
    clips.clear()
    assert export.main([str(run), str(tmp_path / "exported")]) == 0
    for source in (run, tmp_path / "exported"):
        encoder = Encoder.from_pretrained(source, pooling="concat")
        for path in sorted(folder.rglob("*.wav")):
            samples, rate = sf.read(path, dtype="float32")
            encoder(torch.from_numpy(samples), rate)
    check(kind, clips)


# --- one clip, read in every way ------------------------------------------------------------------------------------


OTHERS = [
    ("WAV", "GSM610", "wav", 8_000), ("WAV", "NMS_ADPCM_32", "wav", 8_000), ("WAV", "IMA_ADPCM", "wav", 22_050),
    ("AU", "G721_32", "au", 8_000), ("AU", "PCM_16", "au", 44_100), ("AIFF", "PCM_16", "aiff", 44_100),
    ("W64", "PCM_24", "w64", 48_000), ("RF64", "PCM_16", "rf64", 44_100), ("CAF", "ALAC_16", "caf", 44_100),
    ("WAVEX", "PCM_16", "wav", 96_000),
]  # fmt: skip


def other(container: str, subtype: str, _: str, rate: int, seed: int) -> bytes:
    buffer = io.BytesIO()
    sf.write(buffer, noise(rate // 2, seed), rate, format=container, subtype=subtype)
    return buffer.getvalue()


@pytest.fixture
def mixed(tmp_path):
    """A folder with recordings of every format at several rates and channel counts, as files and as tar members."""
    members = {f"{i}-{case[0]}-{case[1]}.{case[2]}": other(*case, seed=30 + i) for i, case in enumerate(OTHERS)}
    piped = bytearray(encode(noise(20_000, 20, channels=2), 44_100))
    piped[40:44] = (0x7FFFF000).to_bytes(4, "little")
    members["piped.wav"] = bytes(piped)
    members["tagged.flac"] = encode(noise(20_000, 21), 44_100, "flac") + b"TAG" + bytes(125)
    flac = encode(noise(20_000, 22), 44_100, "flac")
    members["unknown.flac"] = flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]  # STREAMINFO states no length
    for i, kind in enumerate(FORMATS):
        for rate, channels in ((RATE, 1), (44_100, 2), (48_000, 1)):
            if kind != "opus" or rate == 48_000:
                name = f"{kind}-{rate}{FORMATS[kind][2]}"
                members[name] = encode(noise(rate // 2, i, channels=channels), rate, kind)
    for name, data in members.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / name).write_bytes(data)
    write_tar(tmp_path / "set.tar", dict(sorted(members.items())))
    return tmp_path


def lossless(index) -> list[bool]:
    assert not index.skipped
    return [not entry.format.startswith(("OGG", "MP3")) for entry in index.entries]


@pytest.mark.parametrize("clip_samples", [CLIP, RATE])  # shorter and longer than the recordings
def test_decoders_give_the_same_samples(mixed, clip_samples):
    """Lossless recordings agree bit for bit. DALI has its own builds of the Vorbis and Opus decoders."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    index = build_index(mixed / "files")
    tar = build_index(mixed / "set.tar")
    exact = lossless(index)
    assert len(exact) > 20 and not all(exact)
    for options in ({"crop": "start"}, {"crop": "center"}):
        clips = {
            decoder: once(index, clip_samples=clip_samples, decoder=decoder, pad="zero", **options).pcm
            for decoder in ("soundfile", "auto", "dali")
        }
        for other in ("auto", "dali"):
            assert torch.equal(clips[other][exact], clips["soundfile"][exact])
            assert (clips[other].int() - clips["soundfile"]).abs().max() <= 1
        assert torch.equal(once(tar, clip_samples=clip_samples, pad="zero", **options).pcm, clips["auto"])


@pytest.mark.skipif(not _extension.AVAILABLE, reason="needs the extension: soxr rounds slices differently")
def test_a_clip_is_a_slice_of_the_resampled_recording(mixed):
    """This holds even when only a segment of the file is read: the filter also gets the samples around the clip."""
    index = build_index(mixed / "files")
    options = {"sample_rate": 16_000, "clip_samples": CLIP, "batch_size": 8, "seed": 3, "threads": 2}
    whole = {}
    for row, entry in enumerate(index.entries):
        samples = torch.from_numpy(np.concatenate(list(iterate_entry(entry, 1.0))))
        x = resample(samples, entry.sample_rate, RATE, downmix=True, dtype=torch.float32)
        whole[row] = (x * 32768).round().clamp(-32768, 32767).short()
    with AudioLoader(index, decoder="soundfile", **options) as loader:
        for batch in take(loader, 8):
            for clip, item in zip(batch.pcm, batch.items.tolist(), strict=True):
                windows = whole[item].unfold(0, CLIP, 1)
                assert (windows == clip).all(1).any(), index.entries[item].name


def test_shards_hold_what_the_loader_reads(mixed):
    wanted = once(build_index(mixed / "files"), clip_samples=RATE, pad="zero")
    assert pack.main([str(mixed / "files"), str(mixed / "packed"), "--rate", str(RATE)]) == 0
    got = once(build_index(mixed / "packed"), clip_samples=RATE, pad="zero")
    assert torch.equal(got.pcm, wanted.pcm) and torch.equal(got.lengths, wanted.lengths)


LAPTOP = """
import multiprocessing, os, subprocess, sys, types  # these need the real modules
sys.modules.update(dict.fromkeys(["nvidia.dali", "resource", "fcntl"]))
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)
del os.sched_getaffinity, os.preadv, os.pread
import torch
from loading import once
from ajepa import embed, finetune, pack, probe, train
from ajepa.data.index import build_index
files, packed, result = sys.argv[1:]
torch.save(once(build_index(files), clip_samples=16_000, pad="zero").pcm, result)
sys.exit(pack.main([files, packed, "--rate", "16000"]))
"""


def test_a_laptop_reads_the_same_samples(mixed, tmp_path):
    """Everything imports, reads and packs without DALI and without the modules and functions that Windows lacks."""
    environment = {**os.environ, "AJEPA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [str(mixed / "files"), str(tmp_path / "packed"), str(tmp_path / "pcm.pt")]
    subprocess.run([sys.executable, "-c", LAPTOP, *arguments], check=True, env=environment)
    wanted = once(build_index(mixed / "files"), clip_samples=RATE, pad="zero", decoder="soundfile").pcm
    assert torch.equal(torch.load(tmp_path / "pcm.pt"), wanted)
    assert torch.equal(once(build_index(tmp_path / "packed"), clip_samples=RATE, pad="zero").pcm, wanted)


def test_dali_is_used_where_it_is_faster_and_only_there(mixed, monkeypatch):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    index = build_index(mixed / "files")
    plan = lambda batch: None  # noqa: E731
    options = {"batch_size": 1, "sample_rate": RATE, "clip_samples": CLIP, "threads": 1}
    kinds = {entry.format: i for i, entry in enumerate(index.entries)}

    def reader(rows, decoder="auto"):
        opened = decode.open_reader(index.subset(rows), plan, decoder=decoder, **options)
        opened.close()
        return type(opened)

    assert reader([kinds["FLAC/PCM_16"]]) is decode.DaliReader
    assert reader([kinds["WAV/PCM_16"]]) is Reader and reader([kinds["MP3/MPEG_LAYER_III"]], "dali") is Reader
    assert reader([kinds["WAV/PCM_16"]], "dali") is decode.DaliReader
    assert reader(range(len(index)), "soundfile") is Reader
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert reader(range(len(index))) is Reader
    with pytest.raises(DataError, match="--decoder soundfile"):
        reader([kinds["FLAC/PCM_16"]], "dali")
