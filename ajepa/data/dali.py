"""The reader that has DALI decode whole compressed recordings on the CPU, where that is faster than libsndfile alone.

DALI only decodes. Cropping, averaging of channels and resampling are `Reader.convert`'s, so that the samples are those
of every other reader; DALI's own resampler does not lower its cutoff when it downsamples, and aliases.

DALI sees one stateless source: batch i of a run is a pure function of i, so DALI's own checkpoint restores the exact
place, and a pipeline that a bad file has killed is rebuilt from the last good one within milliseconds. What DALI cannot
decode is read through libsndfile, which alone decides whether a file is bad.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ajepa.data.columns import Entry
from ajepa.data.formats.audiofile import INT16, audio_bytes, wav_bytes
from ajepa.data.index import Index
from ajepa.data.reader import Clips, Cut, Plan, Reader
from ajepa.data.shards import FORMATS

# `Entry.format` of what DALI decodes, and of what it decodes faster than soundfile does (benchmarks/bench_decode.py).
FASTER = {"FLAC/PCM_16", "FLAC/PCM_24", "OGG/OPUS", "WAV/PCM_24", "WAVEX/PCM_24", FORMATS["flac"]}
DECODES = {
    *FASTER,
    "FLAC/PCM_S8",
    "OGG/VORBIS",
    *(f"{kind}/{code}" for kind in ("WAV", "WAVEX") for code in ("PCM_16", "FLOAT")),
}
# Beyond either, libsndfile seeks and reads the crop alone; within both DALI decodes the whole file.
WHOLE_FILE_CLIPS = 2
WHOLE_FILE_BYTES = 64 << 20


class Piece(NamedTuple):
    """What DALI is given for one clip."""

    item: int
    data: np.ndarray  # uint8, an audio file in memory
    frames: int  # samples that each channel must decode to
    cut: Cut
    clip: np.ndarray | None = None  # the clip itself: DALI has nothing to do, and is given SILENCE's data


# In place of a bad file.
SILENCE = Piece(-1, wav_bytes(np.zeros((1, 1), np.int16), 1000), 1, Cut(0, 1, 0, 1), np.zeros(1, np.int16))


class DaliReader(Reader):
    """A `Reader` of any index; `checkpoint` is DALI's after the last batch, None to count from `first`.

    Args:
        batch_size: of the largest plan.
        formats: `Entry.format` of what DALI is to decode.
    """

    def __init__(self, *args, batch_size: int, formats: set[str], **options):
        _dali()  # a missing package is best told here
        super().__init__(*args, **options)
        self.batch_size, self.formats = batch_size, formats
        # Not int16 unless all are exactly that: DALI's int16 wraps round where Vorbis or Opus exceed full scale.
        self._int16 = (self.index.entries.format.distinct() & formats) <= INT16 | {FORMATS["flac"]}
        self._refused: set[int] = set()  # rows that DALI does not decode
        # Batches read and not yet returned: DALI uses the arrays of the feed in place.
        self._flying: dict[int, tuple[Plan, list[Piece]]] = {}
        self._pipe: Any = None

    def next(self) -> Clips | None:
        """The next batch, None at the end. Raises DataError when no usable file is left."""
        self._flying.pop(self.batches - 1, None)
        attempts = 0
        while True:
            try:
                if self._pipe is None:
                    self._build()
                (audio,) = self._pipe.run()
            except StopIteration:
                return None
            except RuntimeError as error:
                attempts += 1
                if not self._refuse() and attempts > 1:
                    raise RuntimeError(f"DALI failed on batch {self.batches}, and no file of it is to blame") from error
                self._pipe = None
                continue
            plan, pieces = self._flying[self.batches]
            # DALI plays a truncated WAV or Ogg without a word.
            odd = {p.item for p, shape in zip(pieces, audio.shape(), strict=True) if shape[0] != p.frames}
            if odd:
                self._refused |= odd
                self._pipe = None
                continue
            self.checkpoint = self._pipe.checkpoint()
            self.batches += 1
            return Clips(plan, partial(self._clip, pieces, plan.gains, audio))

    def close(self) -> None:
        super().close()
        self._pipe = None
        self._flying.clear()

    def _build(self) -> None:
        self._flying.clear()
        try:
            self._pipe = self._pipeline(self._source, self.batch_size, self.threads, self.checkpoint)
        except RuntimeError:
            if self.checkpoint is None:
                raise
            # Another DALI release wrote the checkpoint. The source is stateless, so counting on is just as exact.
            self.checkpoint, self.first = None, self.batches
            self._pipe = self._pipeline(self._source, self.batch_size, self.threads, None)

    def _source(self, info) -> list[np.ndarray]:
        batch = self.first + info.iteration
        plan = self.plan(batch)
        if plan is None:
            raise StopIteration
        pieces = self.spread(
            lambda b: self._read_piece(int(plan.items[b]), plan.fractions[b], plan.gains[b]), len(plan.items)
        )
        self._flying[batch] = plan, pieces
        return [piece.data for piece in pieces]

    def _read_piece(self, item: int, fraction: float, gain: float) -> Piece:
        return self.good_row(item, lambda row: self._read_row(row, fraction, gain), SILENCE)

    def _read_row(self, row: int, fraction: float, gain: float) -> Piece:
        entry = self.index.entries[row]
        cut = self.cut(entry, fraction)
        if row in self._refused or not self._suits(entry, cut):
            return SILENCE._replace(item=row, clip=self.read_clip(entry, fraction, gain))
        packed = entry.format in FORMATS.values()
        data = self.shards.read(entry) if packed else audio_bytes(entry.path, entry.offset, self.size(entry))
        return Piece(row, data, entry.total, cut)

    def _suits(self, entry: Entry, cut: Cut) -> bool:
        """Whether DALI is to decode it, whole."""
        if entry.format not in self.formats or (entry.format.endswith("/FLOAT") and self.index.float_scale != 1):
            return False
        most = WHOLE_FILE_CLIPS * (cut.stop - cut.start)
        return not self.stored(entry) and entry.total <= most and entry.size <= WHOLE_FILE_BYTES

    def _clip(
        self, pieces: list[Piece], gains: np.ndarray, audio: Any, b: int, out: np.ndarray | None
    ) -> tuple[int, np.ndarray]:
        piece = pieces[b]
        if piece.clip is not None:
            return piece.item, piece.clip
        entry, cut = self.index.entries[piece.item], piece.cut
        samples = np.asarray(audio[b])[entry.start + cut.start : entry.start + cut.stop]
        if samples.dtype == np.int16 and (entry.channels, entry.sample_rate) == (1, self.sample_rate):
            return piece.item, samples[:, 0]
        return piece.item, self.convert(samples, entry, cut, gains[b])

    def _refuse(self) -> bool:
        """After a DALI error: finds which of the files in flight it does not decode, for libsndfile to read."""
        pieces = [piece for _, pieces in self._flying.values() for piece in pieces if piece.clip is None]
        found = {piece.item for piece in pieces if self._fails(piece)}
        self._refused |= found
        return bool(found)

    def _fails(self, piece: Piece) -> bool:
        try:
            self._pipeline(lambda info: [piece.data], 1, 1, None).run()
        except RuntimeError:
            return True
        return False

    def _pipeline(self, source: Callable, batch_size: int, threads: int, checkpoint: bytes | None) -> Any:
        """Decodes to `[frames, channels]` at the file's own rate, int16 or float32."""
        fn, pipeline_def, types = _dali()
        dtype = types.DALIDataType.INT16 if self._int16 else types.DALIDataType.FLOAT

        @pipeline_def()
        def decode():
            # The bytes stay referenced until their batch is out, so DALI need not copy them.
            data = fn.external_source(source=source, batch=True, batch_info=True, no_copy=True)
            return fn.decoders.audio(data, dtype=dtype)[0]

        pipe = decode(
            batch_size=batch_size,
            num_threads=threads,
            device_id=None,
            prefetch_queue_depth=2,
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        pipe.build()
        return pipe


def formats_for(decoder: str, index: Index) -> set[str]:
    """`Entry.format` of the rows that DALI is to decode; none where it is not installed, or not wanted.

    Raises ImportError where `decoder` is "dali" and DALI is not installed.
    """
    wanted = {"auto": FASTER, "dali": DECODES, "soundfile": set()}[decoder] & index.entries.format.distinct()
    if wanted and decoder == "auto":
        try:
            _dali()
        except ImportError:
            return set()
    return wanted


def _dali():
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise ImportError(
            "--decoder dali needs DALI (Linux): pip install 'nvidia-dali-cuda130>=2.4,<3', or use --decoder soundfile"
        ) from error
    return fn, pipeline_def, types
