"""The index of a data set: every usable recording with its length, rate and label, and every bad file with its reason.

A source is a folder, a manifest (CSV, TSV, JSON, JSONL, Parquet), or webdataset tars. Each file is decoded once, when
it is first indexed. Its verdict is cached by path, size and modification time, so later runs check only changed files.
A row may be a segment of a file: the verdict belongs to the file, and the position of the segment to the row.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ajepa.data.columns import Entries, Entry, Strings
from ajepa.data.formats.audiofile import AudioInfo, BadAudio, inspect, reason_of, stat_file
from ajepa.data.shards import is_shards, read_shards
from ajepa.data.sources.listing import DataError, Listed, Listing, cache_root, decode_label
from ajepa.data.sources.segments import SegmentError, place
from ajepa.data.sources.source import list_source
from ajepa.utils.cores import cores
from ajepa.utils.progress import Progress

__all__ = ["DataError", "Entry", "Index", "build_index", "cache_root"]

FORMAT = "ajepa-index-3"
SAVE_SECONDS = 10.0  # time between two savings of the cache while files are checked,
SAVE_RATIO = 20.0  # which is also at least so many times what a saving takes
LEFT_SECONDS = 86_400.0  # age of a partial file that a killed process has left; clocks of two nodes may differ by hours
Key = tuple[str, int, int, int]  # path, offset, size, mtime_ns


@dataclass(frozen=True)
class Index:
    """`entries[i]` is row i, and `metadata[column][i]` holds its other manifest columns as text."""

    source: str
    entries: Entries
    label_names: list[str] = field(default_factory=list)
    metadata: dict[str, Strings] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    warnings: list[str] = field(default_factory=list)  # about rows that look wrong but are used
    float_scale: float = 1.0  # full scale of samples stored as floating point

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def labels(self) -> np.ndarray:
        """Label numbers, int64 `[len(self)]`, -1 if unknown."""
        return self.entries.numbers["label"].astype(np.int64)

    @property
    def seconds(self) -> float:
        return float((self.entries.numbers["frames"] / self.entries.numbers["sample_rate"]).sum())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the entries and their order. A saved data position is valid only for the same fingerprint."""
        digest = hashlib.sha256()
        positions = (self.entries.numbers[name] for name in ("start", "frames", "sample_rate"))
        for name, start, frames, rate in zip(self.entries.names(), *positions, strict=True):
            digest.update(f"{name}\0{start}\0{frames}\0{rate}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]

    def subset(self, rows: Iterable[int]) -> "Index":
        """The given rows in the given order. Labels keep their numbers."""
        taken = np.fromiter(rows, np.int64)
        metadata = {name: column.take(taken) for name, column in self.metadata.items()}
        return replace(self, entries=self.entries.take(taken), metadata=metadata)

    def filter(self, where: str | Sequence[str]) -> "Index":
        """The rows that match `where`, see `build_index`. Raises DataError for an unknown column or no matching row."""
        return self.subset(self.rows(where))

    def rows(self, where: str | Sequence[str]) -> list[int]:
        """Numbers of the rows that match `where`. Raises the same errors as `filter`."""
        columns: dict[str, Sequence[str]] = {**self.metadata}
        columns.setdefault("label", [self.label_names[label] if label >= 0 else "" for label in self.labels])
        return _select(columns, where, self.source)

    @cached_property
    def single_labels(self) -> np.ndarray:
        """`labels`, with -1 also for rows whose label is a list of several."""
        several = np.array([len(decode_label(name) or ()) > 1 for name in self.label_names] + [False])  # last: label -1
        return np.where(several[self.labels], -1, self.labels)


def build_index(
    source: str | os.PathLike,
    *,
    where: str | Sequence[str] | None = None,
    label_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    threads: int = 0,
    decode: bool = True,
    progress: bool = True,
    float_scale: float = 1.0,
) -> Index:
    """Lists the files of a data set and checks each of them.

    Args:
        source: a folder, searched recursively; a .csv, .tsv, .json, .jsonl, .ndjson or .parquet manifest with a column
            `filename`, `file`, `path`, `audio`..., whose rows are segments if it has columns such as `offset` and
            `duration`, or `start` and `end`, in seconds; webdataset tars, as a path, a glob or a brace range
            (`shard-{000..010}.tar`); or the output of `python -m ajepa.pack`: its folder, or one shard.
        where: keeps the rows that match: `"fold=1,2,3"`, `"speaker!=theo"`. Join several conditions by `;` or give them
            as a list. A cell that holds a list matches by each of its values.
        label_column: the manifest column that holds the labels; default `label`, `target`, `category`, `class`...
        cache_dir: folder of the cached verdicts; default `cache_root() / "index"`.
        threads: number of files checked at once; 0 uses the number of cores this process may use.
        decode: True decodes every file to its end, which finds damage inside a file. False trusts headers that state a
            length.
        progress: report progress on stderr if the check takes more than a second.
        float_scale: full scale of samples stored as floating point.

    Returns:
        An `Index` whose rows keep the order of the listing (sorted paths, manifest rows, tar order). Labels are
        numbered over the whole listing, before `where`, so folds and splits of one manifest agree.

    Raises:
        DataError: the source does not exist or has no usable file, the manifest is bad, or a column is unknown. The
            message states the remedy.
    """
    source = os.path.expanduser(os.fspath(source))
    if not 0 < float_scale < float("inf"):
        raise DataError(f"--float-scale {float_scale}: the scale must be a finite number above 0")
    if is_shards(source):
        shards = read_shards(source, label_column, _label_names)
        if not len(shards.entries):
            raise DataError(f"{source}: its shards hold no clips; everything was left out when they were packed")
        index = Index(source, *shards, float_scale=float_scale)
        return index.filter(where) if where else index
    listing = list_source(source, label_column)
    rows: Sequence[int] = range(len(listing.files))
    if where:
        columns = {name: [file.metadata[i] for file in listing.files] for i, name in enumerate(listing.columns)}
        columns.setdefault("label", [file.label or "" for file in listing.files])
        rows = _select(columns, where, source)
    files = [listing.files[row] for row in rows]
    cache = _Cache(Path(cache_dir) if cache_dir is not None else cache_root() / "index", source, decode, float_scale)
    verdicts = _check(files, cache, threads or cores(), decode, progress, float_scale)
    index = replace(_assemble(source, listing, files, verdicts), float_scale=float_scale)
    for warning in index.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return index


def _assemble(source: str, listing: Listing, files: list[Listed], verdicts: list[AudioInfo | str]) -> Index:
    names = _label_names({file.label for file in listing.files if file.label is not None})
    number = {name: i for i, name in enumerate(names)}
    good, entries, skipped, misplaced = [], [], list(listing.skipped), 0
    for file, verdict in zip(files, verdicts, strict=True):
        if isinstance(verdict, str):
            skipped.append((file.name, verdict))
            continue
        try:
            start, frames = place(file.start, file.duration, verdict.frames, verdict.sample_rate)
        except SegmentError as error:
            skipped.append((file.name, str(error)))
            misplaced += 1
            continue
        good.append(file)
        label = -1 if file.label is None else number[file.label]
        bytes_at = (file.path, file.member, file.offset, file.size, file.mtime_ns, file.file_size)
        entries.append(Entry(*bytes_at, frames, start, *verdict, label))
    warnings = [*listing.warnings, *_repeats(source, good, entries)]
    if misplaced:
        columns = ", ".join(listing.segment_columns)
        warnings.append(f"{source}: {misplaced:,} rows are left out because their segment is not within the recording; "
                        f"columns that mean something else must not be called {columns}")  # fmt: skip
    if not entries:
        if not skipped:
            raise DataError(f"{source}: no audio files here; expected WAV, FLAC, Ogg, Opus or MP3")
        first = "; ".join([*(f"{path}: {reason}" for path, reason in skipped[:3]), *warnings])
        raise DataError(f"{source}: none of its {len(skipped)} audio files can be used ({first})")
    metadata = {name: Strings(file.metadata[i] for file in good) for i, name in enumerate(listing.columns)}
    return Index(source, Entries.of(entries), names, metadata, skipped, warnings)


def _repeats(source: str, files: list[Listed], entries: list[Entry]) -> Iterator[str]:
    """Yields a warning for each kind of rows that name the same samples."""
    keys = [(os.path.normpath(e.path), e.offset, e.start, e.frames) for e in entries]
    if len(set(keys)) == len(keys):
        return
    rows: dict[tuple, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    several = [(same, {files[i].label: None for i in same if files[i].label is not None}) for same in rows.values()]
    differing = [(same, labels) for same, labels in several if len(labels) > 1]
    if differing:
        same, labels = differing[0]
        example = f"{entries[same[0]].name}: {', '.join(map(str, labels))}"
        yield (f"{source}: {len(differing):,} files are named by several rows with different labels ({example}); "
               "for several labels a file use a list in one row, and --multi-label")  # fmt: skip
    repeated = [same for same, labels in several if len(same) > 1 and len(labels) <= 1]
    if repeated:
        same = repeated[0]
        surplus = sum(map(len, repeated)) - len(repeated)
        exact = sum(len(same) - len({(files[i].label, files[i].metadata) for i in same}) for same in repeated)
        yield (f"{source}: {surplus:,} rows repeat the recording of an earlier row, {exact:,} of them word for word "
               f"({entries[same[0]].name}: {len(same)} rows); each counts as a recording")  # fmt: skip


def _label_names(names: set[str]) -> list[str]:
    try:
        return sorted(names, key=int)  # "10" after "9"
    except ValueError:
        return sorted(names)


def _select(columns: Mapping[str, Sequence[str]], where: str | Sequence[str], source: str) -> list[int]:
    clauses = where.split(";") if isinstance(where, str) else list(where)
    keep: np.ndarray | None = None
    for clause in filter(str.strip, clauses):
        name, equals, values = clause.partition("=")
        negate, name = name.endswith("!"), name.rstrip("!").strip()
        if not equals or not name:
            raise DataError(f"where: {clause.strip()!r} is not of the form column=value,value or column!=value")
        if name not in columns:
            raise DataError(f"where: {source} has no column {name!r}; its columns: {', '.join(columns) or 'none'}")
        wanted = {value.strip() for value in values.split(",")}
        matches = np.array([_has(value, wanted) != negate for value in columns[name]], bool)
        keep = matches if keep is None else keep & matches
    rows = [] if keep is None else np.flatnonzero(keep).tolist()
    if keep is not None and not rows:
        raise DataError(f"where: no row of {source} has {where if isinstance(where, str) else '; '.join(where)}")
    return rows if keep is not None else list(range(len(next(iter(columns.values()), []))))


def _has(value: str, wanted: set[str]) -> bool:
    """Whether a cell is one of the wanted values, or a list that holds one of them."""
    return value in wanted or (value.startswith("[") and not wanted.isdisjoint(decode_label(value) or ()))


def was_decoded(source: str | os.PathLike, float_scale: float = 1.0) -> bool:
    """Whether the files of `source` were decoded before, so that `build_index` need not decode all of them."""
    source = os.path.expanduser(os.fspath(source))
    return _verdicts_path(cache_root() / "index", source, True, float_scale).exists()


def _verdicts_path(folder: Path, source: str, decode: bool, float_scale: float) -> Path:
    """The file of cached verdicts. Those from headers only, or at another float scale, have files of their own."""
    options = f"{os.path.abspath(source)}\0{decode}\0{float(float_scale)}"
    name = hashlib.sha256(options.encode(errors="surrogateescape")).hexdigest()[:24]
    return folder.expanduser() / f"{name}.jsonl"


class _Cache:
    """Cached verdicts by (path, offset, size, mtime_ns): a file of JSON lines whose header holds their checksum."""

    def __init__(self, folder: Path, source: str, decode: bool, float_scale: float):
        self.path = _verdicts_path(folder, source, decode, float_scale)
        begin = time.monotonic()
        self.verdicts: dict[Key, AudioInfo | str] = self._load()
        self._plan(time.monotonic() - begin)  # a large cache takes about as long to save as to load

    def _plan(self, seconds: float) -> None:
        self.due = time.monotonic() + max(SAVE_SECONDS, SAVE_RATIO * seconds)  # time of the next saving

    def _load(self) -> dict[Key, AudioInfo | str]:
        try:
            header, _, body = self.path.read_bytes().partition(b"\n")
            stated = json.loads(header)
            if stated["format"] != FORMAT or stated["crc32"] != zlib.crc32(body):
                raise ValueError("checksum")
            rows = (json.loads(line) for line in body.splitlines())
            return {tuple(key): AudioInfo(*info) if isinstance(info, list) else info for key, info in rows}
        except OSError:
            return {}
        except (ValueError, KeyError, TypeError):
            print(f"{self.path}: the index cache is damaged or outdated, rebuilding it", file=sys.stderr)
            return {}

    def save(self, keys: Iterable[Key]) -> None:
        """Writes the cache in one step, without the verdicts that a newer key in `keys` replaces."""
        begin = time.monotonic()
        newest = {key[:2]: key for key in keys}
        kept = {key: info for key, info in self.verdicts.items() if newest.get(key[:2], key) == key}
        body = b"".join(json.dumps([key, info]).encode() + b"\n" for key, info in kept.items())
        header = json.dumps({"format": FORMAT, "crc32": zlib.crc32(body)}).encode() + b"\n"
        aside = self.path.with_suffix(f".{uuid.uuid4().hex[:8]}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(header + body)
            os.replace(aside, self.path)
            for left in self.path.parent.glob(f"{self.path.stem}.{'[0-9a-f]' * 8}"):
                with contextlib.suppress(FileNotFoundError):  # another process has finished it
                    if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                        left.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            reason = f"{self.path}: {error.strerror}"
            print(f"the index cache was not written ({reason}): the next run checks the files again", file=sys.stderr)
            self.due = float("inf")
            return
        self._plan(time.monotonic() - begin)


def _check(
    files: list[Listed], cache: _Cache, threads: int, decode: bool, progress: bool, float_scale: float
) -> list[AudioInfo | str]:
    """One verdict per file: its `AudioInfo`, or the reason it is bad. Segments of one file share its verdict."""
    keys = [(file.path, file.offset, file.size, file.mtime_ns) for file in files]
    first_of: dict[Key, int] = {}
    for i, key in enumerate(keys):
        first_of.setdefault(key, i)
    todo = [i for key, i in first_of.items() if key not in cache.verdicts]
    fresh: dict[Key, str] = {}  # reasons that may go away although the file is unchanged: permissions, I/O errors
    report = Progress(len(todo), "checking audio files", progress)

    def check(i: int) -> tuple[int, AudioInfo | str, bool]:
        file = files[i]
        try:
            stat_file(file.path)
            in_tar = bool(file.member)
            info = inspect(file.path, file.offset, file.size, in_tar=in_tar, decode=decode, float_scale=float_scale)
            return i, info, True
        except BadAudio as error:
            return i, str(error), True
        except OSError as error:
            return i, reason_of(error), False
        except Exception as error:  # a fault of the decoder must not stop the check of the other files
            return i, f"cannot be checked: {type(error).__name__}: {error}", False

    try:
        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(todo), 1024):  # bounds the number of futures, and lets Ctrl-C act promptly
                for i, verdict, lasting in pool.map(check, todo[first : first + 1024]):
                    if lasting:
                        cache.verdicts[keys[i]] = verdict
                    else:
                        fresh[keys[i]] = str(verdict)
                    report.step(isinstance(verdict, str))
                    if len(todo) > len(fresh) and time.monotonic() >= cache.due:
                        cache.save(keys)
    finally:
        report.close()
        if len(todo) > len(fresh):
            cache.save(keys)
    return [cache.verdicts[key] if key in cache.verdicts else fresh[key] for key in keys]
