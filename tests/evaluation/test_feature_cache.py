import random
from pathlib import Path

import pytest
import sklearn.metrics
import torch
from make_audio import noise, write, write_set

from ajepa import finetune
from ajepa.config import ModelConfig
from ajepa.data.formats.audiofile import BadAudio
from ajepa.data.index import build_index
from ajepa.evaluation import feature_cache
from ajepa.evaluation.feature_cache import EncoderFeatures, LogMelFeatures, embed, read_chunks
from ajepa.model.frontend import FrontEnd
from ajepa.model.jepa import Encoder
from ajepa.utils.devices import peak_memory
from ajepa_kernels import LogMelSpec

SPEC = LogMelSpec(n_fft=512, win_length=400, hop_length=160, n_mels=32, n_frames=64, patch=(8, 8))  # 4 x 8 patches
SAMPLES = 400 + 63 * 160  # samples of a chunk, at 16 kHz
CPU = torch.device("cpu")
OPTIONS = {"device": CPU, "reading": {"decoder": "soundfile"}}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Recordings of several rates, channels and encodings. Two end with a tail that is too short for a window."""
    folder = tmp_path_factory.mktemp("recordings")
    write(folder / "a.wav", noise(70_000, 1))
    write(folder / "b.flac", noise(300_000, 2, channels=2), 44_100, "flac")
    write(folder / "c.wav", noise(90_001, 3, channels=2), 22_050, "wav_float")
    write(folder / "d.wav", noise(8 * SAMPLES + 100, 4))
    write(folder / "e.wav", noise(2 * SAMPLES + 300, 5))
    write(folder / "f.wav", noise(900, 6))
    write(folder / "g.ogg", noise(100_000, 7), 16_000, "vorbis")
    return build_index(folder)


@pytest.fixture(scope="module")
def sources():
    torch.manual_seed(0)
    encoder = Encoder(ModelConfig(size="tiny"), SPEC).eval()
    log_mel = LogMelSpec(n_fft=512, win_length=400, hop_length=160, n_mels=32, patch=(8, 8))
    return {"e": EncoderFeatures(encoder, FrontEnd(SPEC), SPEC, "e"), "m": LogMelFeatures(log_mel)}


@pytest.fixture
def streamed(monkeypatch):
    """Makes every recording a long one, of which two chunks are read at a time."""
    monkeypatch.setattr(feature_cache, "BATCH_SECONDS", 0.1)
    monkeypatch.setattr(feature_cache, "CHUNKS_AT_ONCE", 2)


def chunks_of(index) -> dict[int, torch.Tensor]:
    """The chunks of every recording, each after its length."""
    found: dict[int, list[torch.Tensor]] = {}
    for batch in read_chunks(index, SPEC, SAMPLES, {"decoder": "soundfile"}, []):
        for owner, chunk, length in zip(batch.items[batch.owner].tolist(), batch.pcm, batch.lengths, strict=True):
            found.setdefault(owner, []).append(torch.cat([length[None], chunk.long()]))
    return {row: torch.stack(parts) for row, parts in sorted(found.items())}


def test_a_long_recording_is_cut_into_the_chunks_of_a_short_one(index, streamed, monkeypatch):
    groups = list(read_chunks(index, SPEC, SAMPLES, {}, []))
    assert len(groups) > 2 * len(index) and max(len(group.pcm) for group in groups) == 2
    long = chunks_of(index)
    monkeypatch.undo()
    short = chunks_of(index)
    assert long.keys() == short.keys() == set(range(len(index)))
    for row in short:
        assert torch.equal(long[row], short[row])


@pytest.mark.parametrize("pooling", ["mean", "concat+std"])
def test_features_of_a_long_recording_are_those_of_a_short_one(
    index, sources, streamed, monkeypatch, tmp_path, pooling
):
    kinds = [pooling, "tokens"]
    items, long = embed(index, sources, SAMPLES, kinds, **OPTIONS, skipped=[], cache=tmp_path / "long")
    monkeypatch.undo()
    assert items.tolist() == list(range(len(index)))
    _, short = embed(index, sources, SAMPLES, kinds, **OPTIONS, skipped=[], cache=tmp_path / "short")
    for name in sources:
        torch.testing.assert_close(long[name].clips, short[name].clips, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(long[name].tokens, short[name].tokens, rtol=1e-2, atol=1e-3)
        assert torch.equal(long[name].cu, short[name].cu)


def test_a_long_recording_that_ends_early_is_left_out(index, sources, streamed, monkeypatch, tmp_path):
    whole = embed(index, sources, SAMPLES, ["mean"], **OPTIONS, skipped=[], cache=tmp_path / "whole")[1]
    original = feature_cache.iterate_resampled

    def cut(entry, *args, **options):
        blocks = original(entry, *args, **options)
        yield next(blocks)
        if entry.name.endswith("b.flac"):
            raise BadAudio("truncated")
        yield from blocks

    monkeypatch.setattr(feature_cache, "iterate_resampled", cut)
    skipped: list[tuple[str, str]] = []
    items, got = embed(index, sources, SAMPLES, ["mean"], **OPTIONS, skipped=skipped, cache=tmp_path / "cut")
    assert items.tolist() == [0, 2, 3, 4, 5, 6] and skipped == [(index.entries[1].name, "truncated")]
    for name in sources:
        assert torch.equal(got[name].clips, whole[name].clips[items])


def peak_memory_of_embedding(argv) -> int:
    """Prints by how many bytes the memory of the process grows at most while a folder is embedded."""
    source, cache = argv
    index = build_index(source)
    sources = {"m": LogMelFeatures(LogMelSpec(n_fft=1024, win_length=400, hop_length=160))}
    before = peak_memory(CPU)
    embed(index, sources, SAMPLES, ["mean+std", "tokens"], **OPTIONS, skipped=[], cache=Path(cache))
    print(peak_memory(CPU) - before)
    return 0


def test_a_long_recording_is_embedded_in_bounded_memory(tmp_path, forks):
    """Its PCM takes 77 MB and its log-mel frames 123 MB. Of these, tokens of 8 MB are kept."""
    write(tmp_path / "audio" / "long.wav", noise(60 * 16_000).repeat(40))
    argv = [str(tmp_path / "audio"), str(tmp_path / "cache")]
    log = tmp_path / "log"
    assert forks.run(argv, log, call="test_feature_cache:peak_memory_of_embedding") == 0, log.read_text()
    assert 0 < int(log.read_text()) < 250_000_000


def test_every_flipped_bit_of_the_cache_is_noticed_and_mended(tmp_path, sources, capsys):
    write_set(tmp_path / "audio", 3)
    index = build_index(tmp_path / "audio")

    def features():
        x = embed(index, sources, SAMPLES, ["mean", "tokens"], **OPTIONS, skipped=[], cache=tmp_path / "cache")[1]
        return [t for name in sources for t in (x[name].clips, x[name].tokens, x[name].cu)]

    wanted = features()
    files = {path: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 4
    draw = random.Random(0)
    for _ in range(50):
        path, whole = draw.choice(list(files.items()))
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        assert all(map(torch.equal, features(), wanted))
        assert f"warning: {path} is damaged" in capsys.readouterr().err
        assert path.read_bytes() == whole


def test_what_others_wrote_in_the_cache_is_not_taken_for_features(tmp_path, sources, capsys):
    write_set(tmp_path / "audio", 3)
    index = build_index(tmp_path / "audio")
    options = {**OPTIONS, "skipped": [], "cache": tmp_path / "cache"}
    wanted = embed(index, {"m": sources["m"]}, SAMPLES, ["mean"], **options)[1]["m"].clips
    (path,) = (tmp_path / "cache").iterdir()
    path.unlink()
    path.mkdir()
    assert torch.equal(embed(index, {"m": sources["m"]}, SAMPLES, ["mean"], **options)[1]["m"].clips, wanted)
    assert "its features are computed again" in capsys.readouterr().err


def test_fine_tuning_scores_a_long_recording_as_a_short_one(run, tones, tmp_path, monkeypatch):
    rows = [f"{wav},{wav.parent.name},{i % 4}" for i, wav in enumerate(sorted(tones.rglob("*.wav")))]
    (tmp_path / "m.csv").write_text("\n".join(["file,label,fold", *rows, ""]))
    chances: list[torch.Tensor] = []
    score, precision = finetune.Tuner.score, sklearn.metrics.average_precision_score

    def keep(targets, values, **options):
        chances.append(torch.from_numpy(values))
        return precision(targets, values, **options)

    def twice(self, task, skipped):
        score(self, task, skipped)
        monkeypatch.setattr(feature_cache, "BATCH_SECONDS", 0.1)
        monkeypatch.setattr(feature_cache, "CHUNKS_AT_ONCE", 1)
        return score(self, task, skipped)

    monkeypatch.setattr(sklearn.metrics, "average_precision_score", keep)
    monkeypatch.setattr(finetune.Tuner, "score", twice)
    options = [
        "--test",
        "fold=3",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--multi-label",
        "--out",
        str(tmp_path / "out"),
    ]
    assert finetune.main([str(run), "--data", str(tmp_path / "m.csv"), *options]) == 0
    short, long = chances
    assert len(short) == 10
    torch.testing.assert_close(long, short)
