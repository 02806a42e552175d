"""Reads CSV and TSV files as rows. Every line is a row, part of a row, or reported: a stray quote hides no rows.

CSV follows RFC 4180, with line breaks inside quotes. TSV files of published corpora have no quoting at all, while those
of spreadsheets and of Python's `excel-tab` quote as CSV does: a TSV file is read in the way that makes it consistent.
"""

import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ajepa.data.formats.audiofile import READABLE, UNREADABLE, BadAudio, reason_of, stat_file
from ajepa.data.sources.listing import DataError, Listing, find_column
from ajepa.data.sources.segments import DECIMAL_COMMA, SegmentColumns

BYTE_ORDER_MARKS = (  # the little-endian mark of UTF-32 begins with that of UTF-16
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
)
DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # the usual one first; another if only it gives a path column


class _Row(NamedTuple):
    line: int  # number of the first physical line, from 1
    fields: list[str]
    swallows: bool = False  # a quoted field seems to hold rows of the table, so its quote is stray
    multi_line: bool = False
    opened: int = 0  # where on the first line a quoted field begins that runs past its end
    consistent: bool = True  # each field is quoted as RFC 4180 requires, or holds no quote


class _Unclosed(Exception):
    """A quoted field runs to the end of the file. The argument is the line on which it begins."""


def read_text(path: str) -> str:
    """The text of a manifest, decoded by its byte order mark or as UTF-8. Invalid UTF-8 is kept as surrogates."""
    try:
        stat_file(path)
        with open(path, "rb") as file:
            data = file.read()
    except (OSError, BadAudio) as error:
        raise DataError(f"{path}: the manifest cannot be read: {reason_of(error)}") from None
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "strict")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid {encoding.upper()} ({error.reason}): save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"{path}:{line}: the manifest holds NUL bytes: it is damaged, not text, or UTF-16 without a byte order "
            "mark; save it as UTF-8"
        )
    return text


def split_lines(text: str) -> list[str]:
    """Physical lines, which end with LF or CRLF, or with CR if there is no LF. Other separators belong to the text."""
    if "\n" not in text:
        return text.split("\r")
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_table(
    path: str, suffix: str, path_columns: Sequence[str], used: Sequence[str], listing: Listing
) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """(column names, (line, row) of each complete row). Rows of another width are added to `listing.skipped`.

    Raises DataError if two columns share a name that is in `used`, or if an unbalanced quote would hide rows.
    """
    lines = split_lines(read_text(path))
    first = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    delimiters = DELIMITERS[suffix]
    if first < len(lines) and (stated := re.fullmatch("sep=(.)", lines[first])):  # a line that spreadsheets write
        first, delimiters = first + 1, stated[1]
    headers = {d: _header(path, lines, first, d) for d in delimiters}
    most = max(delimiters, key=lambda d: len(headers[d][0]))
    chosen = next((d for d, (names, _) in headers.items() if find_column(names, path_columns)), most)
    names, body = headers[chosen]
    names = _named_once(path, names, used, listing)
    path_column = find_column(names, path_columns)
    if path_column is None:
        return names, []
    rows: list[tuple[int, dict[str, str]]] = []
    others: list[str] = []  # delimiters by which a row of another width would have the width of the header
    for row in _read(path, lines, body, chosen, len(names), names.index(path_column)):
        if len(row.fields) == len(names):
            rows.append((row.line, dict(zip(names, row.fields, strict=True))))
        else:
            reason = f"{len(row.fields)} fields, the header has {len(names)}"
            listing.skipped.append((f"{path}:{row.line}", reason))
            line = lines[row.line - 1]
            others += [d for d in DELIMITERS[suffix] if d != chosen and len(line.split(d)) == len(names)]
    if others:
        listing.warnings.append(
            f"{path}: {len(others):,} rows are separated by {others[0]!r} and the header by {chosen!r}: use one of them"
        )
    if chosen == ";":  # a comma in a number is then a decimal one
        for name in SegmentColumns.among(names).all():
            for _, values in rows:
                if DECIMAL_COMMA.fullmatch(values[name]):
                    values[name] = values[name].replace(",", ".")
    return names, rows


def _header(path: str, lines: list[str], first: int, delimiter: str) -> tuple[list[str], int]:
    """(column names, number of the line after the header)."""
    if first >= len(lines):
        return [], first
    try:
        row, after = _tokenize(lines, first, delimiter)
    except _Unclosed:
        raise DataError(f"{path}:{first + 1}: a quote in the header is not closed") from None
    return [name.strip() or f"column {i}" for i, name in enumerate(row.fields, 1)], after


def _named_once(path: str, names: list[str], used: Sequence[str], listing: Listing) -> list[str]:
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = count = seen.get(name, 0) + 1
        if count > 1 and name.lower() in used:
            raise DataError(f"{path}: two columns are called {name!r}: rename one")
        result.append(name if count == 1 else f"{name}.{count}")
    twice = [name for name, count in seen.items() if count > 1]
    if twice:
        listing.warnings.append(
            f"{path}: several columns are called {twice[0]!r}: the second is read as '{twice[0]}.2', and so on"
        )
    return result


def _read(path: str, lines: list[str], body: int, delimiter: str, width: int, path_field: int) -> list[_Row]:
    """The rows after the header. `width` is the number of columns, and `path_field` that of the path column."""
    quotes = any('"' in line for line in lines[body:])
    if delimiter == "\t" or not quotes:
        plain = [_Row(i + 1, lines[i].split(delimiter)) for i in range(body, len(lines)) if lines[i].strip()]
    if not quotes:
        return plain
    try:
        quoted = list(_quoted_rows(lines, body, delimiter, width, path_field))
        unclosed = None
    except _Unclosed as error:
        quoted, unclosed = [], int(error.args[0])
    if delimiter == "\t":
        odd_plain, odd_quoted = (sum(len(row.fields) != width for row in rows) for rows in (plain, quoted))
        spans = any(row.multi_line for row in quoted)
        consistent = unclosed is None and all(row.consistent and not row.swallows for row in quoted)
        # If each physical line is a row of the right width, no quoted field runs over several lines.
        return quoted if consistent and (odd_quoted < odd_plain if spans else odd_quoted <= odd_plain) else plain
    bad = unclosed or next((row.line for row in quoted if row.swallows), None)
    if bad is not None:
        extent = "runs to the end of the file" if unclosed else "takes the rows that follow into the field"
        raise DataError(
            f'{path}:{bad}: an unbalanced " {extent}: close the quote, or write a quote within a field as ""'
        )
    return quoted


def _quoted_rows(lines: list[str], body: int, delimiter: str, width: int, path_field: int) -> Iterator[_Row]:
    """Yields the rows after the header, with quotes read as in RFC 4180. Raises _Unclosed."""
    i = body
    while i < len(lines):
        line = lines[i]
        if '"' not in line:
            if line.strip():
                yield _Row(i + 1, line.split(delimiter))
            i += 1
            continue
        row, after = _tokenize(lines, i, delimiter)
        if row.multi_line and len(row.fields) != width:
            row = row._replace(swallows=True)
        elif row.multi_line and not row.swallows:
            bare = not _is_audio(row.fields[path_field])  # paths have no suffix
            lines_as_rows = [lines[k].split(delimiter) for k in range(i + 1, after - 1)]
            lines_as_rows += [_line_fields(lines[k], delimiter) for k in range(i + 1, after - 1) if '"' in lines[k]]
            before = line[: row.opened].count(delimiter)  # fields of the first line before the quote
            if path_field > before:
                lines_as_rows.append(line.split(delimiter))
            inside = lines[after - 1][: _closing(lines[after - 1])].split(delimiter)
            if len(inside) > path_field + 1 or path_field + 1 == len(inside) == width:
                lines_as_rows.append(lines[after - 1].split(delimiter))
            swallows = any(len(fields) == width and _path_like(fields[path_field], bare) for fields in lines_as_rows)
            row = row._replace(swallows=swallows)
        yield row
        i = after


def _closing(line: str) -> int:
    """Where a quoted field that began on an earlier line ends in `line`."""
    found = re.search(r'(?<!")(?:"")*"(?!")', line)
    return found.end() - 1 if found else len(line)


def _line_fields(line: str, delimiter: str) -> list[str]:
    """The fields of a line read by itself; none if a quote in it is not closed."""
    try:
        return _tokenize([line], 0, delimiter)[0].fields
    except _Unclosed:
        return []


def _is_audio(field: str) -> bool:
    return os.path.splitext(field.strip(' "'))[1].lower() in READABLE + UNREADABLE


def _path_like(field: str, bare: bool) -> bool:
    return _is_audio(field) or (bare and bool(field) and not re.search(r"\s", field))


def _tokenize(lines: list[str], first: int, delimiter: str) -> tuple[_Row, int]:
    """The row that begins on line `first`, and the number of the line after it. Raises _Unclosed."""
    i, position, fields, consistent, broken, opened = first, 0, [], True, False, 0
    blanks = " " if delimiter != "\t" else ""
    while True:
        line, begin = lines[i], position
        while line[begin : begin + 1] and line[begin] in blanks:
            begin += 1
        if line[begin : begin + 1] == '"':
            opened = begin if i == first else opened
            value, i, end, proper = _quoted_field(lines, i, begin, delimiter, blanks)
            consistent &= proper
            broken |= not proper and i > first
            line = lines[i]
        else:
            end = line.find(delimiter, position)
            end = len(line) if end < 0 else end
            value = line[position:end]
            consistent &= '"' not in value
        fields.append(value)
        if end >= len(line):
            return _Row(first + 1, fields, broken, i > first, opened, consistent), i + 1
        position = end + 1


def _quoted_field(lines: list[str], i: int, begin: int, delimiter: str, blanks: str) -> tuple[str, int, int, bool]:
    """(value, line and position of its end, whether it is quoted properly) of the field whose quote is at `begin`."""
    first, line, position = i, lines[i], begin + 1
    parts: list[str] = []
    while True:
        quote = line.find('"', position)
        if quote < 0:
            parts.append(line[position:] + "\n")
            i, position = i + 1, 0
            if i == len(lines):
                raise _Unclosed(first + 1)
            line = lines[i]
            continue
        parts.append(line[position:quote])
        if line[quote + 1 : quote + 2] == '"':
            parts.append('"')
            position = quote + 2
            continue
        end = quote + 1
        while line[end : end + 1] and line[end] in blanks:
            end += 1
        if end == len(line) or line[end] == delimiter:
            return "".join(parts), i, end, True
        end = line.find(delimiter, quote)  # text follows the closing quote: keep the field as it is written
        end = len(line) if end < 0 else end
        return line[begin if i == first else 0 : end], i, end, False
