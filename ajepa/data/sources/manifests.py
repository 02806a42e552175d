"""Lists manifests: CSV, TSV, JSON, JSONL and Parquet files whose rows name recordings, or segments of them.

Every row is either listed or skipped with a reason; no row is lost.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote

from ajepa.data.formats.audiofile import BadAudio, reason_of, stat_file
from ajepa.data.sources.delimited import read_table, read_text, split_lines
from ajepa.data.sources.listing import (
    LABEL_COLUMNS,
    MISSING,
    DataError,
    Listed,
    Listing,
    encode_label,
    find_column,
    label_column_of,
    readable,
    text_of,
)
from ajepa.data.sources.parquet import Stored, read_parquet
from ajepa.data.sources.segments import DURATION, END, START, SegmentColumns, SegmentError

# If a manifest has several of these columns, the first in this order names the files.
PATH_COLUMNS: tuple[str, ...] = ("filename", "file", "path", "audio", "audio_filepath", "file_name", "audio_path")
PATH_COLUMNS += ("audio_file", "audio_filename", "filepath", "file_path", "wav_path", "wav_file", "wav", "fname")
PATH_COLUMNS += ("clip",)
MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
FOLDERS = ("", "audio", "clips")  # folders beside the manifest that its relative paths may start from
Rows = list[tuple[int, dict[str, Any]]]  # (line or record number, values by column)


def list_manifests(paths: list[str], suffix: str, label_column: str | None) -> Listing:
    """The joined rows and columns of all manifests. Raises DataError if one cannot be read or names no file."""
    parts = [_list_manifest(path, suffix, label_column) for path in paths]
    if len(parts) == 1:
        return parts[0]
    columns = list(dict.fromkeys(itertools.chain.from_iterable(part.columns for part in parts)))
    whole = Listing(columns=columns)
    for part in parts:
        for file in part.files:
            values = dict(zip(part.columns, file.metadata, strict=True))
            whole.files.append(file._replace(metadata=tuple(values.get(name, "") for name in columns)))
        whole.skipped += part.skipped
        whole.warnings += part.warnings
        whole.segment_columns += [name for name in part.segment_columns if name not in whole.segment_columns]
    return whole


def _list_manifest(path: str, suffix: str, label_column: str | None) -> Listing:
    listing = Listing()
    if suffix == ".parquet":
        names, path_column, rows = read_parquet(path, PATH_COLUMNS, listing)
    elif suffix in (".csv", ".tsv"):
        used = {*PATH_COLUMNS, *LABEL_COLUMNS, *START, *END, *DURATION, (label_column or "").lower()}
        names, rows = read_table(path, suffix, PATH_COLUMNS, sorted(used), listing)
        path_column = find_column(names, PATH_COLUMNS)
    else:
        rows = _json_rows(path, listing)
        names = list(dict.fromkeys(itertools.chain.from_iterable(row for _, row in rows)))
        path_column = find_column(names, PATH_COLUMNS)
    if path_column is None:
        if not rows and not names:
            first = "".join(f"; {name}: {reason}" for name, reason in listing.skipped[:3])
            raise DataError(f"{path}: the manifest has no rows{first}")
        remedy = "; the first line must name the columns" if suffix in (".csv", ".tsv") else ""
        raise DataError(f"{path}: no column {', '.join(PATH_COLUMNS[:4])}; its columns: {', '.join(names)}{remedy}")
    if not rows and not listing.skipped:
        raise DataError(f"{path}: the manifest has no rows")
    label_column = label_column_of(path, names, label_column)
    listing.columns = [name for name in names if name != path_column]
    _add_rows(listing, path, rows, path_column, label_column)
    return listing


def _add_rows(listing: Listing, path: str, rows: Rows, path_column: str, label_column: str | None) -> None:
    columns = SegmentColumns.among([name for name in listing.columns if name != label_column])
    named = ""
    missing: list[str] = []  # files that do not exist, as the manifest writes them
    listing.segment_columns = columns.all()
    folder = os.path.dirname(os.path.abspath(path))
    for line, row in rows:
        file, where = row.get(path_column), f"{path}:{line}"
        try:
            label = encode_label(row.get(label_column)) if label_column else None
            values = tuple(text_of(row.get(name)) for name in listing.columns)
            if isinstance(file, Stored):
                stored, where = file, f"{file.path}!{file.member}"
            else:
                named = _path_in(file)
                where = _find(folder, named)
                size, mtime = stat_file(where)
                stored = Stored(where, "", 0, size, mtime, size)
            start, duration = columns.read(row) if listing.segment_columns else (None, None)
        except SegmentError as error:
            listing.skipped.append((f"{path}:{line}", f"{where}: {error}"))
        except RecursionError:
            listing.skipped.append((f"{path}:{line}", "its values are nested too deeply"))
        except ValueError:  # the name holds a NUL byte
            listing.skipped.append((repr(where), "not a file name"))
        except (OSError, BadAudio) as error:
            listing.skipped.append((where, reason_of(error)))
            missing += [named] if isinstance(error, FileNotFoundError) else []
        else:
            listing.files.append(Listed(*stored, label, values, start, duration))
    for sign, remedy in (
        ("\\", "write / in place of it, and paths relative to the manifest"),
        (";", "give each file a row"),
    ):
        if sign != os.sep and (count := sum(sign in name for name in missing)):
            listing.warnings.append(f"{path}: {count:,} files that are not found have {sign} in their names: {remedy}")
    non_ascii = [f.label for f in listing.files if f.label and not f.label.isascii()] if label_column else []
    raw = [row.get(label_column) for _, row in rows] if label_column and non_ascii else []
    if any(isinstance(cell, str) and readable(cell) != cell for cell in raw):
        shown = f"labels such as {non_ascii[0]!r} are read as Latin-1"
        listing.warnings.append(f"{path}: not UTF-8; {shown}: save it as UTF-8")
    if label_column:
        _check_labels(listing, path, [row.get(label_column) for _, row in rows])


def _check_labels(listing: Listing, path: str, cells: list[Any]) -> None:
    """Warns of texts that mean a missing label, and removes the fraction that data frames add to whole numbers."""
    texts = [cell.strip() for cell in cells if isinstance(cell, str)]
    for word in (*MISSING, "None", "null"):
        if count := texts.count(word):
            meaning = "no label" if word in MISSING else "a class; leave the field empty where there is no label"
            listing.warnings.append(f"{path}: {count} rows have the label {word!r}, which is taken as {meaning}")
    filled = [text for text in texts if text]
    if len(filled) < len(texts) and filled and all(re.fullmatch(r"-?\d+\.0", text) for text in filled):
        # Data frames write a column of whole numbers with gaps as 3.0, and one without gaps as 3.
        listing.files = [f._replace(label=f.label and f.label.removesuffix(".0")) for f in listing.files]


def _path_in(value: Any) -> str:
    """The file that a cell names. Raises BadAudio if the cell names no file or holds something else."""
    if isinstance(value, dict):
        if value.get("path"):
            return _path_in(value["path"])
        held = next((name for name in ("array", "bytes") if value.get(name)), None)
        if held:
            raise BadAudio(f"the row holds the recording itself ({held}) in place of a file's name: write it to a file")
        raise BadAudio("the row names no file")
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise BadAudio(f"the row names {len(value)} files; one is needed" if value else "the row names no file")
        return _path_in(value[0])
    text = text_of(value)
    if not text.strip():
        raise BadAudio("the row names no file")
    return text


def _find(folder: str, text: str) -> str:
    """The path of a file that a manifest in `folder` names: as it is written if that exists, else its usual variants.

    Raises BadAudio for an address of anything but a file.
    """
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]+)://", text)
    if scheme and scheme[1].lower() == "file":
        text = unquote(re.sub(r"^\s*file://(?:localhost)?(?=/)", "", text.strip(), flags=re.IGNORECASE))
    elif scheme:
        raise BadAudio(f"{text.strip()}: an address ({scheme[1].lower()}://), not a file: download it first")
    spellings = dict.fromkeys((text, text.strip(), text.strip().replace("\\", "/")))
    if text.startswith("~"):
        spellings[os.path.expanduser(text.strip())] = None
    paths = [os.path.join(folder, below, spelling) for spelling in spellings for below in FOLDERS]
    return next((path for path in paths if os.path.exists(path)), os.path.join(folder, text.strip()))


def _json_rows(path: str, listing: Listing) -> Rows:
    """The JSON objects of a file: one per line, or in one array. Anything else is skipped by its line or number."""
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(split_lines(text), 1) if line.strip()]
    if not lines:
        return []
    records: Iterable[tuple[int, Any]]
    first = _parsed(lines[0][1])
    if isinstance(first, dict) and not (len(lines) == 1 and _records_in(first)):
        records = ((number, _parsed(line)) for number, line in lines)
    else:
        values, error = _documents(text)
        if error and (text.lstrip()[:1] == "[" or not any(isinstance(_parsed(line), dict) for _, line in lines)):
            raise DataError(f"{path}: not valid JSON ({error}): give one object a line, or one array of objects")
        if error:
            records = ((number, _parsed(line)) for number, line in lines)
        elif len(values) == 1:
            found = values[0] if isinstance(values[0], list) else _records_in(values[0]) or values
            records = enumerate(found, 1)
        else:
            records = enumerate(values, 1)
    rows: Rows = []
    for number, record in records:
        if not isinstance(record, dict):
            listing.skipped.append((f"{path}:{number}", "not a JSON object"))
            continue
        try:
            rows.append((number, _plain_record(record)))
        except BadAudio as problem:
            listing.skipped.append((f"{path}:{number}", str(problem)))
    return rows


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _documents(text: str) -> tuple[list[Any], str]:
    """The JSON values that follow each other in a text, and the error that stopped the reading, or an empty string."""
    decoder, position = json.JSONDecoder(), 0
    values: list[Any] = []
    while (start := re.compile(r"\s*").match(text, position).end()) < len(text):  # type: ignore[union-attr]
        try:
            value, position = decoder.raw_decode(text, start)
        except RecursionError:
            return values, "it is nested too deeply"
        except ValueError as error:
            return values, "it holds a number of too many digits" if "digits" in str(error) else str(error)
        values.append(value)
    return values, ""


def _records_in(value: Any) -> list[Any] | None:
    """The single list of objects within an object such as `{"data": [...]}`, None if there is no such list."""
    lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)]
    named = find_column(value, [*PATH_COLUMNS, "recording", "sources"]) is not None
    return lists[0] if len(lists) == 1 and not named else None


def _plain_record(record: dict[str, Any]) -> dict[str, Any]:
    """An unchanged row, or a nested cut or recording of Lhotse as a row. Raises BadAudio for other kinds of cuts."""
    recording = record.get("recording") if isinstance(record.get("recording"), dict) else None
    if record.get("type") in ("MixedCut", "PaddingCut") or "tracks" in record:
        raise BadAudio("a cut that is mixed or padding has no file of its own: save the cuts' audio first")
    if recording is None and not isinstance(record.get("sources"), list):
        return {str(name): value for name, value in record.items()}
    origin = recording if recording is not None else record
    sources = origin.get("sources")
    if not isinstance(sources, list) or len(sources) != 1 or not isinstance(sources[0], dict):
        raise BadAudio("a recording must have one source")
    kind, file = sources[0].get("type", "file"), sources[0].get("source")
    if kind != "file" or not isinstance(file, str):
        raise BadAudio(f"a recording's source of type {kind!r} cannot be read: save it to a file first")
    if origin.get("transforms"):
        raise BadAudio("the recording is changed on the fly (transforms): save its audio first")
    channels, all_channels = record.get("channel"), sources[0].get("channels")
    wanted = channels if isinstance(channels, list) else [channels]
    if channels is not None and isinstance(all_channels, list) and sorted(wanted) != sorted(all_channels):
        raise BadAudio(f"the cut takes channel {channels} of {all_channels}: save its audio first")
    row = {"audio_filepath": file}
    supervisions = record.get("supervisions")
    spoken = supervisions[0] if isinstance(supervisions, list) and len(supervisions) == 1 else {}
    for part in (record, record.get("custom"), spoken, spoken.get("custom") if isinstance(spoken, dict) else None):
        for name, value in part.items() if isinstance(part, dict) else ():
            if name not in ("recording", "sources", "supervisions", "custom") and name.lower() not in PATH_COLUMNS:
                row.setdefault(str(name), value)
    return row
