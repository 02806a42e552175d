"""Planned batches of clips, read by threads and decoded by DALI on the CPU; a file that has gone bad is replaced.

DALI sees one stateless source: batch i of a run is a pure function of i, so DALI's own checkpoint restores the exact
place, and a pipeline that a bad file has killed is rebuilt from the last good one within milliseconds.
"""

import io
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import soundfile as sf

from ajepa.audiofile import BadAudio, cores, inspect, os_reason, read_bytes, read_segment, stat_file
from ajepa.index import DataError, Index

# Beyond either, libsndfile seeks and reads the crop alone, for DALI to resample; within both DALI decodes the file.
WHOLE_FILE_CLIPS = 2
WHOLE_FILE_BYTES = 64 << 20


class Plan(NamedTuple):
    """One batch to be: rows of the index, where to crop (0 start .. 1 end) and a linear gain, `[B]` each."""

    items: np.ndarray
    fractions: np.ndarray
    gains: np.ndarray


class Piece(NamedTuple):
    """What DALI is given for one clip."""

    item: int
    data: np.ndarray  # uint8, an audio file in memory
    frames: int  # samples it must decode to
    start: int  # the crop, in samples at the file's own rate
    length: int
    rate: int  # Hz


class Decoded(NamedTuple):
    plan: Plan
    pieces: list[Piece]
    samples: list[np.ndarray]  # float32 each, mono at the loader's rate; valid until the next call


class Decoder:
    """Batches 0, 1, 2... of `plan(i)`, until it returns None.

    Args:
        plan: the batch's rows, crops and gains; called with growing i, again after a rebuild.
        checkpoint: DALI's, as left in `checkpoint` after the batch to continue from; None starts at `first`.
        first: number of the batch that DALI's own count starts from.
        skipped: name -> reason of files not to be read; files found bad are added.
    """

    def __init__(
        self,
        index: Index,
        plan: Callable[[int], Plan | None],
        *,
        sample_rate: int,
        clip_samples: int,
        batch_size: int,
        threads: int,
        first: int = 0,
        batches: int = 0,
        checkpoint: bytes | None = None,
        skipped: dict[str, str] | None = None,
    ):
        _dali()  # a missing package is best told here
        self.index, self.plan, self.sample_rate, self.clip_samples = index, plan, sample_rate, clip_samples
        self.batch_size, self.threads = batch_size, threads
        self.first, self.batches, self.checkpoint = first, batches, checkpoint
        self.skipped = dict(skipped or {})
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="ajepa-read")
        # Batches read and not yet returned: DALI uses the arrays of the feed in place.
        self._flying: dict[int, tuple[Plan, list[Piece], tuple]] = {}
        self._unchanged: set[tuple[str, int]] = set()  # (name, mtime) of touched files found to be the same recording
        self._pipe: Any = None

    def next(self) -> Decoded | None:
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
            return Decoded(plan, pieces, [self._crop(piece, np.asarray(audio[b])) for b, piece in enumerate(pieces)])

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self._pipe = None
        self._flying.clear()

    def _build(self) -> None:
        self._flying.clear()
        try:
            self._pipe = _pipeline(self._source, self.sample_rate, self.batch_size, self.threads, self.checkpoint)
        except RuntimeError:
            if self.checkpoint is None:
                raise
            # Another DALI release wrote the checkpoint. The source is stateless, so counting on is just as exact.
            self.checkpoint, self.first = None, self.batches
            self._pipe = _pipeline(self._source, self.sample_rate, self.batch_size, self.threads, None)

    def spread(self, work: Callable[[int], Any], size: int) -> list:
        """`[work(0), ..., work(size - 1)]` by all threads; a few tasks, as a future costs more than a short clip."""
        tasks = min(size, 4 * self.threads)
        results: list = [None] * size

        def run(first: int) -> None:
            for i in range(first, size, tasks):
                results[i] = work(i)

        list(self.pool.map(run, range(tasks)))
        return results

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
        """The item, or the next row of the index that is good: the same one in every run that skips the same files."""
        for row in range(item, item + len(self.index)):
            row %= len(self.index)
            name = self.index.entries[row].name
            if name not in self.skipped:
                try:
                    return self._read_row(row, fraction)
                except BadAudio as error:
                    self.skipped[name] = str(error)
                except OSError as error:
                    self.skipped[name] = os_reason(error)
        raise DataError(f"{self.index.source}: no usable file is left, {len(self.skipped)} went bad since indexing")

    def _read_row(self, row: int, fraction: float) -> Piece:
        entry = self.index.entries[row]
        file_size, mtime = stat_file(entry.path)
        size = entry.size if entry.member else file_size
        if (file_size, mtime) != (entry.file_size, entry.mtime_ns) and (entry.name, mtime) not in self._unchanged:
            info = inspect(entry.path, entry.offset, size, in_tar=bool(entry.member))
            if info != (entry.frames, entry.sample_rate, entry.channels, entry.format):
                raise BadAudio("changed since it was indexed")
            self._unchanged.add((entry.name, mtime))
        wanted = math.ceil(self.clip_samples * entry.sample_rate / self.sample_rate)
        count = min(entry.frames, wanted)
        start = min(int(fraction * (entry.frames - count + 1)), entry.frames - count)
        long = entry.frames > WHOLE_FILE_CLIPS * wanted or size > WHOLE_FILE_BYTES
        if long or entry.format == "MP3":  # which DALI does not decode
            data = read_segment(entry.path, entry.offset, size, start, count, in_tar=bool(entry.member))
            return Piece(row, data, count, 0, count, entry.sample_rate)
        data = read_bytes(entry.path, entry.offset, size)
        return Piece(row, data, entry.frames, start, count, entry.sample_rate)

    def _crop(self, piece: Piece, samples: np.ndarray) -> np.ndarray:
        if piece.rate == self.sample_rate:  # DALI cropped the others, before resampling
            samples = samples[piece.start : piece.start + piece.length]
        return samples[: self.clip_samples]

    def _too_short(self, pieces: list[Piece], frames: np.ndarray) -> bool:
        """Whether a file decoded to another length than it should: DALI plays a truncated WAV or Ogg without a word."""
        bad = [(piece, int(got)) for piece, got in zip(pieces, frames, strict=True) if got != piece.frames]
        for piece, got in bad:
            self.skipped[self.index.entries[piece.item].name] = f"truncated: {got} of {piece.frames} samples decode"
        return bool(bad)

    def _dali_reason(self, piece: Piece) -> str | None:
        feed = _feed([piece])
        try:
            _pipeline(lambda info: feed, self.sample_rate, 1, 1, None).run()
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


def _dali():
    try:
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise ImportError("reading audio needs DALI (Linux): pip install 'nvidia-dali-cuda130>=2.4,<3'") from error
    return fn, pipeline_def, types


def _pipeline(source: Callable, sample_rate: int, batch_size: int, threads: int, checkpoint: bytes | None):
    fn, pipeline_def, types = _dali()

    @pipeline_def(enable_conditionals=True)
    def decode():
        # The bytes stay referenced until their batch is out, so DALI need not copy them.
        data, start, count, rate = fn.external_source(
            source=source, num_outputs=4, batch=True, batch_info=True, no_copy=True
        )
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


def default_threads() -> int:
    """The cores this process may use, shared among the ranks of this machine."""
    return max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
