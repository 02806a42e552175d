"""Planned batches of clips, read by threads and decoded by DALI on the CPU; a file that has gone bad is replaced.
Sets that hold nothing but mono 16-bit PCM at the rate wanted do not come here: `ajepa.reader.PcmReader`.

DALI sees one stateless source: batch i of a run is a pure function of i, so DALI's own checkpoint restores the exact
place, and a pipeline that a bad file has killed is rebuilt from the last good one within milliseconds.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import soundfile as sf

from ajepa.audiofile import read_bytes, read_int16, read_segment, wav_bytes
from ajepa.columns import Entry
from ajepa.index import Index
from ajepa.reader import STORED, Clips, PcmReader, Plan, Reader, all_stored, default_threads
from ajepa.shards import FORMATS

# Beyond either, libsndfile seeks and reads the crop alone, for DALI to resample; within both DALI decodes the file.
WHOLE_FILE_CLIPS = 2
WHOLE_FILE_BYTES = 64 << 20
LOSSLESS = {*STORED, "FLAC/PCM_16", FORMATS["flac"]}  # int16 samples, however they are stored
GROUP_CLIPS, GROUP_SAMPLES = 64, 1 << 24  # most recordings, and about as many samples, decoded whole at a time

T = TypeVar("T")


class Piece(NamedTuple):
    """What DALI is given for one clip."""

    item: int
    data: np.ndarray  # uint8, an audio file in memory
    frames: int  # samples it must decode to
    start: int  # the crop, in samples at the file's own rate
    length: int
    rate: int  # Hz
    samples: np.ndarray | None = None  # int16, the clip itself: DALI has nothing to do, and is given SILENCE's data


SILENCE = Piece(-1, wav_bytes(np.zeros((1, 1), np.int16), 1000), 1, 0, 1, 1000)  # in place of a bad file


class Decoder(Reader):
    """A `Reader` of any index; `checkpoint` is DALI's after the last batch, None to count from `first`."""

    def __init__(self, *args, batch_size: int, **options):
        _dali()  # a missing package is best told here
        super().__init__(*args, **options)
        self.batch_size = batch_size
        self._exact = all_stored(self.index, self.sample_rate, LOSSLESS)
        self._rate = None if self._exact else self.sample_rate  # that DALI converts to
        # Batches read and not yet returned: DALI uses the arrays of the feed in place.
        self._flying: dict[int, tuple[Plan, list[Piece], tuple]] = {}
        self._pipe: Any = None

    def next(self) -> Clips | None:
        """The next batch, None at the end. Raises DataError when no usable file is left."""
        self._flying.pop(self.batches - 1, None)
        attempts = 0
        while True:
            try:
                if self._pipe is None:
                    self._build()
                audio, frames = self._pipe.run()
            except StopIteration:
                return None
            except RuntimeError as error:
                attempts += 1
                if not self._blame() and attempts > 1:
                    raise RuntimeError(f"DALI failed on batch {self.batches}, and no file of it is to blame") from error
                self._pipe = None
                continue
            plan, pieces, _ = self._flying[self.batches]
            if self._too_short(pieces, frames.as_array()[:, 0]):
                self._pipe = None
                continue
            self.checkpoint = self._pipe.checkpoint()
            self.batches += 1
            return Clips(plan, partial(self._clip, pieces, audio))

    def close(self) -> None:
        super().close()
        self._pipe = None
        self._flying.clear()

    def _build(self) -> None:
        self._flying.clear()
        try:
            self._pipe = self._pipeline(self.checkpoint)
        except RuntimeError:
            if self.checkpoint is None:
                raise
            # Another DALI release wrote the checkpoint. The source is stateless, so counting on is just as exact.
            self.checkpoint, self.first = None, self.batches
            self._pipe = self._pipeline(None)

    def _pipeline(self, checkpoint: bytes | None) -> Any:
        return _pipeline(self._source, self._rate, self.batch_size, self.threads, checkpoint)

    def _source(self, info) -> tuple:
        batch = self.first + info.iteration
        plan = self.plan(batch)
        if plan is None:
            raise StopIteration
        pieces = self.spread(lambda b: self._read(int(plan.items[b]), float(plan.fractions[b])), len(plan.items))
        feed = _feed(pieces)
        self._flying[batch] = plan, pieces, feed
        return feed

    def _read(self, item: int, fraction: float) -> Piece:
        return self.good_row(item, lambda row: self._read_row(row, fraction), SILENCE)

    def _read_row(self, row: int, fraction: float) -> Piece:
        entry = self.index.entries[row]
        if self.stored(entry):
            return SILENCE._replace(item=row, samples=self.read_stored(entry, fraction))
        if entry.format in FORMATS.values():
            return self._read_shard(row, entry, fraction)
        size = self.size(entry)
        start, count = self.window(entry.frames, entry.sample_rate, fraction)
        if _is_long(entry, count) or entry.format.startswith("MP3/"):  # which DALI does not decode
            return self._read_segment(row, entry, size, start, count)
        data = read_bytes(entry.path, entry.offset, size)
        return Piece(row, data, entry.frames, start, count, entry.sample_rate)

    def _read_shard(self, row: int, entry: Entry, fraction: float) -> Piece:
        start, count = self.window(entry.frames, entry.sample_rate, fraction)
        if entry.format == FORMATS["pcm"]:
            samples = self.shards.read(entry, 2 * start, 2 * (start + count)).view(np.int16)
            return Piece(row, wav_bytes(samples[:, None], entry.sample_rate), count, 0, count, entry.sample_rate)
        data = self.shards.read(entry)  # all of it: the checksums are of the compressed bytes
        if _is_long(entry, count):
            return self._read_segment(row, entry, entry.size, start, count)
        return Piece(row, data, entry.frames, start, count, entry.sample_rate)

    def _read_segment(self, row: int, entry: Entry, size: int, start: int, count: int) -> Piece:
        """The crop alone."""
        if self._exact:
            samples = np.empty(count, np.int16)
            read_int16(samples, entry.path, entry.offset, size, start, in_tar=bool(entry.member))
            return SILENCE._replace(item=row, samples=samples)
        data = read_segment(entry.path, entry.offset, size, start, count, in_tar=bool(entry.member))
        return Piece(row, data, count, 0, count, entry.sample_rate)

    def _clip(self, pieces: list[Piece], audio: Any, b: int, out: np.ndarray | None) -> tuple[int, np.ndarray]:
        piece = pieces[b]
        if piece.samples is not None:
            return piece.item, piece.samples
        samples = np.asarray(audio[b]).reshape(-1)  # int16 comes with an axis of channels
        if piece.rate == self.sample_rate:  # DALI cropped the others, before resampling
            samples = samples[piece.start : piece.start + piece.length]
        return piece.item, samples[: self.clip_samples]

    def _too_short(self, pieces: list[Piece], frames: np.ndarray) -> bool:
        """Whether a file decoded to another length than it should: DALI plays a truncated WAV or Ogg without a word."""
        bad = [(piece, int(got)) for piece, got in zip(pieces, frames, strict=True) if got != piece.frames]
        for piece, got in bad:
            self.skipped[self.index.entries[piece.item].name] = f"truncated: {got} of {piece.frames} samples decode"
        return bool(bad)

    def _dali_reason(self, piece: Piece) -> str | None:
        feed = _feed([piece])
        try:
            _pipeline(lambda info: feed, self._rate, 1, 1, None).run()
        except RuntimeError:
            return "cannot be decoded by DALI"
        return None

    def _blame(self) -> bool:
        """After a DALI error: finds which of the files in flight it does not decode, and skips them."""
        pieces = [piece for _, pieces, _ in self._flying.values() for piece in pieces]
        for check in (
            _sndfile_reason,
            self._dali_reason,
        ):  # DALI alone tells for certain, but a pipeline a file is slow
            found = [(piece, reason) for piece in pieces if (reason := check(piece))]
            for piece, reason in found:
                self.skipped[self.index.entries[piece.item].name] = reason
            if found:
                return True
        return False


def open_reader(index: Index, plan: Callable[[int], Plan | None], *, batch_size: int, **options) -> Reader:
    """The reader for this index. `batch_size` is that of the largest plan; for `options` see `Reader`."""
    if all_stored(index, options["sample_rate"]):
        return PcmReader(index, plan, **options)
    return Decoder(index, plan, batch_size=batch_size, **options)


def read_whole(
    index: Index,
    work: Callable[[int, np.ndarray], T],
    *,
    sample_rate: int,
    max_samples: float,
    threads: int = 0,
) -> Iterator[T | str]:
    """`work(row, samples)` of every recording from end to end, or the reason why it cannot be had, in order.

    `work` is called by many threads; its samples are as `Clips.clip` gives them. A recording of more than
    `max_samples` (at `sample_rate`) is refused, which bounds the memory.
    """
    numbers = index.entries.numbers
    samples = np.ceil(numbers["frames"] * (sample_rate / numbers["sample_rate"]))
    too_long = samples > max_samples
    limit = f"longer than {max_samples / sample_rate / 3600:g} hours: cut it"
    refused = {index.entries[row].name: limit for row in np.flatnonzero(too_long)}
    samples[too_long] = 1
    bounds = _groups(samples)

    def plan(batch: int) -> Plan | None:
        if batch + 1 >= len(bounds):
            return None
        items = np.arange(bounds[batch], bounds[batch + 1])
        return Plan(items, np.zeros(len(items)), np.ones(len(items)))

    reader = open_reader(
        index,
        plan,
        batch_size=GROUP_CLIPS,
        sample_rate=sample_rate,
        clip_samples=int(samples.max(initial=1)) + 1,
        threads=threads or default_threads(),
        skipped=refused,
        replace=False,
    )

    def one(clips: Clips, b: int) -> T | str:
        item, samples = clips.clip(b, None)
        return work(item, samples) if item >= 0 else reader.skipped[index.entries[int(clips.plan.items[b])].name]

    try:
        while (clips := reader.next()) is not None:
            yield from reader.spread(lambda b: one(clips, b), len(clips.plan.items))
    finally:
        reader.close()


def _groups(samples: Sequence[float] | np.ndarray) -> list[int]:
    """Bounds of runs of rows to decode together."""
    bounds, held = [0], 0.0
    for row, count in enumerate(samples):
        if row > bounds[-1] and (held + count > GROUP_SAMPLES or row - bounds[-1] == GROUP_CLIPS):
            bounds.append(row)
            held = 0.0
        held += count
    return [*bounds, len(samples)]


def _is_long(entry: Entry, count: int) -> bool:
    return entry.frames > WHOLE_FILE_CLIPS * count or entry.size > WHOLE_FILE_BYTES


def _dali():
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise ImportError("reading audio needs DALI (Linux): pip install 'nvidia-dali-cuda130>=2.4,<3'") from error
    return fn, pipeline_def, types


def _pipeline(source: Callable, sample_rate: int | None, batch_size: int, threads: int, checkpoint: bytes | None):
    """Decodes to mono float32 at `sample_rate`; None: to int16, of files that are all `LOSSLESS`."""
    fn, pipeline_def, types = _dali()
    # The bytes stay referenced until their batch is out, so DALI need not copy them.
    options = {"batch": True, "batch_info": True, "no_copy": True}

    def only_data(info) -> tuple:
        return source(info)[:1]

    @pipeline_def(enable_conditionals=True)
    def decode():
        if sample_rate is None:
            (data,) = fn.external_source(source=only_data, num_outputs=1, **options)
            audio, _ = fn.decoders.audio(data, dtype=types.DALIDataType.INT16)
            return audio, audio.shape()
        data, start, count, rate = fn.external_source(source=source, num_outputs=4, **options)
        # float32, for DALI's int16 wraps round where Vorbis, Opus or float samples exceed full scale.
        audio, _ = fn.decoders.audio(data, downmix=True, dtype=types.DALIDataType.FLOAT)
        frames = audio.shape()
        if rate != float(sample_rate):  # an equal rate would cost as much as any other
            audio = fn.audio_resample(fn.slice(audio, start, count, axes=[0]), in_rate=rate, out_rate=sample_rate)
        return audio, frames

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


def _feed(pieces: list[Piece]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """The files' bytes, and the crops' starts and lengths `[B, 1]` and rates `[B]`."""
    return (
        [piece.data for piece in pieces],
        np.array([[piece.start] for piece in pieces], np.int32),  # longer recordings arrive as segments
        np.array([[piece.length] for piece in pieces], np.int32),
        np.array([piece.rate for piece in pieces], np.float32),
    )


def _sndfile_reason(piece: Piece) -> str | None:
    try:
        with sf.SoundFile(io.BytesIO(piece.data.tobytes())) as sound:
            frames = sum(len(block) for block in sound.blocks(1 << 17))
    except sf.LibsndfileError as error:
        return f"cannot be decoded: {error.error_string.strip()}"
    return None if frames == piece.frames else f"truncated: {frames} of {piece.frames} samples decode"
