"""A reader that uses DALI to decode whole compressed recordings on the CPU, where DALI is faster than libsndfile.

DALI only decodes. `Reader.convert` crops, averages channels and resamples, so every reader gives the same samples.
DALI's own resampler is not used: it keeps its cutoff when it downsamples, and therefore aliases.

DALI sees one stateless source: batch i of a run is a pure function of i. DALI's own checkpoint therefore restores the
exact position, and a pipeline that a bad file has killed is rebuilt from the last checkpoint. Files that DALI cannot
decode are read through libsndfile, and only libsndfile decides whether a file is bad.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ajepa.data.columns import Entry
from ajepa.data.formats.audiofile import INT16, audio_bytes, wav_bytes
from ajepa.data.index import DataError, Index
from ajepa.data.reader import Clips, Cut, Plan, Reader
from ajepa.data.shards import FORMATS

# Values of `Entry.format` that DALI decodes faster than libsndfile (benchmarks/bench_decode.py), then all it decodes.
FASTER = {"FLAC/PCM_16", "FLAC/PCM_24", "OGG/OPUS", "WAV/PCM_24", "WAVEX/PCM_24", FORMATS["flac"]}
DECODES = {
    *FASTER,
    "FLAC/PCM_S8",
    "OGG/VORBIS",
    *(f"{kind}/{code}" for kind in ("WAV", "WAVEX") for code in ("PCM_16", "FLOAT")),
}
# DALI decodes the whole file within both limits. Beyond either limit, libsndfile seeks and reads only the crop.
WHOLE_FILE_CLIPS = 2
WHOLE_FILE_BYTES = 64 << 20


class Piece(NamedTuple):
    """The input of DALI for one clip."""

    item: int
    data: np.ndarray  # uint8, an audio file in memory
    frames: int  # number of samples that each channel must decode to
    cut: Cut
    clip: np.ndarray | None = None  # the clip if it is already read; DALI then gets the data of SILENCE


# Stands in for a bad file.
SILENCE = Piece(-1, wav_bytes(np.zeros((1, 1), np.int16), 1000), 1, Cut(0, 1, 0, 1), np.zeros(1, np.int16))


class DaliReader(Reader):
    """A `Reader` of any index that decodes some of its formats with DALI.

    `checkpoint` is DALI's checkpoint after the last batch; None makes DALI count from batch `first`.

    Args:
        batch_size: number of clips in the largest plan.
        formats: the values of `Entry.format` that DALI decodes.
    """

    def __init__(self, *args, batch_size: int, formats: set[str], **options):
        _dali()  # report a missing package before anything else is set up
        super().__init__(*args, **options)
        self.batch_size, self.formats = batch_size, formats
        # DALI decodes to int16 only if all formats are 16-bit: it wraps around where Vorbis or Opus exceed full scale.
        self._int16 = (self.index.entries.format.distinct() & formats) <= INT16 | {FORMATS["flac"]}
        self._refused: set[int] = set()  # rows that DALI does not decode
        # Batches that DALI has taken and not yet returned: it uses their arrays in place, so they must stay alive.
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
                    raise RuntimeError(f"DALI failed on batch {self.batches}, but decodes each file of it") from error
                self._pipe = None
                continue
            plan, pieces = self._flying[self.batches]
            # DALI decodes a truncated WAV or Ogg without an error.
            wrong_length = {p.item for p, shape in zip(pieces, audio.shape(), strict=True) if shape[0] != p.frames}
            if wrong_length:
                self._refused |= wrong_length
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
            # Another DALI release wrote the checkpoint. The source is stateless, so starting at this batch is exact.
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
        """Whether DALI is to decode the whole file of this entry."""
        if entry.format not in self.formats or (entry.format.endswith("/FLOAT") and self.index.float_scale != 1):
            return False
        max_samples = WHOLE_FILE_CLIPS * (cut.stop - cut.start)
        return not self.stored(entry) and entry.total <= max_samples and entry.size <= WHOLE_FILE_BYTES

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
        """After a DALI error, marks the files in flight that DALI cannot decode, so that libsndfile reads them."""
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
        """A pipeline that decodes to `[frames, channels]` at the file's own rate, int16 or float32."""
        fn, pipeline_def, types = _dali()
        dtype = types.DALIDataType.INT16 if self._int16 else types.DALIDataType.FLOAT

        @pipeline_def()
        def decode():
            # `_flying` keeps the bytes alive until their batch is returned, so DALI need not copy them.
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
    """The values of `Entry.format` in `index` that DALI is to decode.

    The set is empty for the decoder "soundfile", and for "auto" where DALI is not installed. For "dali", `DaliReader`
    raises DataError where DALI is not installed.
    """
    wanted = {"auto": FASTER, "dali": DECODES, "soundfile": set()}[decoder] & index.entries.format.distinct()
    if wanted and decoder == "auto":
        try:
            _dali()
        except DataError:
            return set()
    return wanted


def _dali():
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise DataError(
            "--decoder dali needs DALI (Linux): pip install 'nvidia-dali-cuda130>=2.4,<3', or use --decoder soundfile"
        ) from error
    return fn, pipeline_def, types
