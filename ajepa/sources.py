"""Listing a data set's files: folders, CSV and JSONL manifests, webdataset tars. Nothing is decoded here."""

import csv
import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ajepa.audiofile import READABLE, UNREADABLE, BadAudio, read_bytes, reason_of, stat_file

PATH_COLUMNS = ("filename", "file", "path", "audio", "audio_filepath")
LABEL_COLUMNS = ("label", "target", "category", "class", "class_name", "labels")
MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


class DataError(ValueError):
    """A data set that cannot be used; the message names it and the remedy."""


class Listed(NamedTuple):
    """A file, or a tar's member, that may hold audio. Sizes are in bytes."""

    path: str
    member: str
    offset: int
    size: int
    mtime_ns: int
    file_size: int
    label: str | None
    metadata: tuple[str, ...]  # one value per `Listing.columns`

    @property
    def name(self) -> str:
        return f"{self.path}!{self.member}" if self.member else self.path


@dataclass
class Listing:
    files: list[Listed] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def list_source(source: str, label_column: str | None = None) -> Listing:
    """Files of a folder, manifest or tars, in a fixed order. Raises DataError (see `ajepa.index.build_index`)."""
    suffix = os.path.splitext(source)[1].lower()
    if os.path.isdir(source):
        return _list_folder(source)
    if os.path.isfile(source):
        if suffix in MANIFESTS:
            return _list_manifest(source, suffix, label_column)
        if suffix == ".tar":
            return _list_tars([source], label_column)
        raise DataError(f"{source}: expected a folder, a manifest ({', '.join(MANIFESTS)}) or a .tar")
    paths = _expand(source)
    if not paths:
        hint = "no file matches" if glob.has_magic(source) or "{" in source else "no such file or folder"
        raise DataError(f"{source}: {hint}; give a folder of recordings, a CSV or JSONL manifest, or tars")
    if not all(path.lower().endswith(".tar") for path in paths):
        raise DataError(f"{source}: a pattern must name .tar files; give the folder itself for loose recordings")
    return _list_tars(paths, label_column)


def _expand(pattern: str) -> list[str]:
    """Braces (`{000..010}`, `{a,b}`), then globs. A brace's path is kept though it does not exist: a missing shard."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found:
        span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
        if span:
            low, high = int(span[1]), int(span[2])
            options = [str(i).zfill(len(span[1])) for i in range(low, high + 1)]
        else:
            options = found[1].split(",")
        texts = (pattern[: found.start()] + option + pattern[found.end() :] for option in options)
        paths = list(itertools.chain.from_iterable(_expand(text) or [text] for text in texts))
        return paths if any(map(os.path.exists, paths)) else []
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True))


def _list_folder(root: str) -> Listing:
    """Labels are the root's sub-folders, where at least two of them hold audio directly."""
    listing = Listing()
    found: list[tuple[str, str, tuple[int, int]]] = []  # (sub-folder, path, (size, mtime))
    class_folders = set()
    for folder, names in _walk(root, listing):
        below = os.path.relpath(folder, root)
        for name in names:
            path = os.path.join(folder, name)
            try:
                found.append(("" if below == "." else below.split(os.sep)[0], path, stat_file(path)))
            except (OSError, BadAudio) as error:
                listing.skipped.append((path, reason_of(error)))
                continue
            if below != "." and os.sep not in below:
                class_folders.add(below)
    labelled = len(class_folders) >= 2
    for top, path, (size, mtime) in found:
        listing.files.append(Listed(path, "", 0, size, mtime, size, top if labelled and top else None, ()))
    return listing


def _walk(root: str, listing: Listing) -> Iterator[tuple[str, list[str]]]:
    """(folder, its audio files), sorted. Symbolic links are followed, each folder once."""
    seen: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        listing.skipped.append((str(error.filename), reason_of(error)))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=failed):
        info = os.stat(folder)
        if (info.st_dev, info.st_ino) in seen:
            folders.clear()
            continue
        seen.add((info.st_dev, info.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield folder, sorted(name for name in names if _is_audio(name))


def _is_audio(name: str) -> bool:
    base = os.path.basename(name)  # a leading dot: hidden, or a resource fork that only looks like audio
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in READABLE + UNREADABLE


def _list_manifest(path: str, suffix: str, label_column: str | None) -> Listing:
    listing = Listing()
    if suffix == ".parquet":
        rows = list(_parquet_rows(path))
    else:
        rows = list(_jsonl_rows(path, listing) if suffix in (".jsonl", ".ndjson") else _csv_rows(path, suffix))
    names = list(dict.fromkeys(itertools.chain.from_iterable(row for _, row in rows)))
    lower = {name.strip().lower(): name for name in reversed(names)}
    path_column = next((lower[name] for name in PATH_COLUMNS if name in lower), None)
    if path_column is None:
        if not rows:
            raise DataError(f"{path}: the manifest has no rows")
        raise DataError(f"{path}: no column {', '.join(PATH_COLUMNS[:4])}; its columns: {', '.join(names)}")
    label_column = _label_column(path, names, label_column)
    listing.columns = [name for name in names if name != path_column]
    folder = os.path.dirname(os.path.abspath(path))
    for line, row in rows:
        relative = row.get(path_column, "")
        file = os.path.join(folder, relative)
        if not os.path.exists(file) and os.path.exists(os.path.join(folder, "audio", relative)):
            file = os.path.join(folder, "audio", relative)
        try:
            if not relative:
                file = f"{path}:{line}"
                raise BadAudio("the row names no file")
            size, mtime = stat_file(file)
        except ValueError:  # a NUL in the name
            listing.skipped.append((repr(file), "not a file name"))
        except (OSError, BadAudio) as error:
            listing.skipped.append((file, reason_of(error)))
        else:
            label = row.get(label_column) or None if label_column else None
            values = tuple(row.get(name, "") for name in listing.columns)
            listing.files.append(Listed(file, "", 0, size, mtime, size, label, values))
    return listing


def _label_column(source: str, names: list[str], wanted: str | None) -> str | None:
    if wanted is not None:
        if wanted not in names:
            raise DataError(f"{source}: no column {wanted!r} to take labels from; its columns: {', '.join(names)}")
        return wanted
    lower = {name.strip().lower(): name for name in reversed(names)}
    return next((lower[name] for name in LABEL_COLUMNS if name in lower), None)


def _csv_rows(path: str, suffix: str) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
            for row in reader:
                yield reader.line_num, {name: value or "" for name, value in row.items() if isinstance(name, str)}
    except (OSError, csv.Error) as error:
        raise DataError(f"{path}: the manifest cannot be read: {error}") from None


def _jsonl_rows(path: str, listing: Listing) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, _flat(json.loads(line))
                    except ValueError:
                        listing.skipped.append((f"{path}:{number}", "not a JSON object"))
    except OSError as error:
        raise DataError(f"{path}: the manifest cannot be read: {reason_of(error)}") from None


def _parquet_rows(path: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Columns of sounds or other bytes are left alone."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'ajepa[parquet]'") from None
    try:
        fields = parquet.read_schema(path)
        plain = [f.name for f in fields if not (pyarrow.types.is_nested(f.type) or "binary" in str(f.type))]
        rows = parquet.read_table(path, columns=plain).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: the manifest cannot be read: {' '.join(str(error).split())}") from None
    for number, row in enumerate(rows, 1):
        yield number, {name: "" if value is None else str(value) for name, value in row.items()}


def _flat(record: Any) -> dict[str, str]:
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return {
        str(name): value if isinstance(value, str) else "" if value is None else json.dumps(value)
        for name, value in record.items()
    }


def _list_tars(paths: list[str], label_column: str | None) -> Listing:
    listing = Listing()
    found: list[tuple[tarfile.TarInfo, str, int, int, dict[str, str]]] = []
    for path in paths:
        try:
            size, mtime = stat_file(path)
            members, notes = _tar_members(path, size, listing)
        except (OSError, BadAudio) as error:
            listing.skipped.append((path, reason_of(error)))
            continue
        for member in members:
            stem, key = _keys(member.name)
            found.append((member, path, size, mtime, notes.get(stem) or notes.get(key) or {}))
    names = list(dict.fromkeys(itertools.chain.from_iterable(row for *_, row in found)))
    column = _label_column(" ".join(paths[:1]), names, label_column or ("cls" if "cls" in names else None))
    listing.columns = names
    for member, path, size, mtime, row in found:
        values = tuple(row.get(name, "") for name in names)
        label = row.get(column) or None if column else None
        listing.files.append(Listed(path, member.name, member.offset_data, member.size, mtime, size, label, values))
    return listing


def _keys(name: str) -> tuple[str, str]:
    """A member's key: the name without its last suffix, or by webdataset's rule up to the base name's first dot."""
    folder, base = os.path.split(name)
    return os.path.splitext(name)[0], os.path.join(folder, base.split(".")[0])


def _tar_members(path: str, size: int, listing: Listing) -> tuple[list[tarfile.TarInfo], dict[str, dict[str, str]]]:
    """Audio members, and the fields of the `.cls` and `.json` members by key."""
    audio: list[tarfile.TarInfo] = []
    notes: dict[str, dict[str, str]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                suffix = os.path.splitext(member.name)[1].lower()
                if not member.isfile():
                    continue
                if _is_audio(member.name):
                    if member.issparse() or member.offset_data + member.size > size:
                        listing.skipped.append((f"{path}!{member.name}", "truncated: the tar ends inside it"))
                    else:
                        audio.append(member)
                elif suffix in (".cls", ".json") and member.size < 1 << 20:
                    text = read_bytes(path, member.offset_data, member.size).tobytes().decode(errors="replace")
                    fields = _json_fields(text) if suffix == ".json" else {"cls": text.strip()}
                    for key in dict.fromkeys(_keys(member.name)):
                        notes.setdefault(key, {}).update(fields)
    except (tarfile.TarError, EOFError, BadAudio) as error:
        listing.skipped.append((path, f"damaged or compressed tar: {error}"))
    return audio, notes


def _json_fields(text: str) -> dict[str, str]:
    try:
        return _flat(json.loads(text))
    except ValueError:
        return {}
