"""Lists webdataset tars: audio members, with labels and fields from the `.cls` and `.json` members beside them.

Members are read in place. If tars are appended to each other, all of them are read. A link is listed as the member that
it points to.
"""

import itertools
import json
import os
import posixpath
import tarfile
from typing import Any, NamedTuple

from ajepa.data.formats.audiofile import READABLE, UNREADABLE, BadAudio, read_bytes, reason_of, stat_file
from ajepa.data.sources.listing import Listed, Listing, encode_label, label_column_of, text_of
from ajepa.data.sources.segments import SegmentColumns

# First bytes of compressed files, and the tools that unpack them.
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ\x00": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
NOTE_BYTES = 1 << 20  # larger .cls and .json members are not read
SCAN_BYTES = 1 << 20
BLOCK = tarfile.BLOCKSIZE
Notes = dict[str, dict[str, Any]]  # fields by the key of their member


class _Found(NamedTuple):
    name: str
    offset: int
    size: int
    fields: dict[str, Any]


def list_tars(paths: list[str], label_column: str | None) -> Listing:
    listing = Listing()
    found: list[tuple[_Found, tuple[str, int, int]]] = []
    for path in paths:
        try:
            size, mtime = stat_file(path)
            members = _members(path, size, listing)
        except (OSError, BadAudio) as error:
            listing.skipped.append((path, reason_of(error)))
            continue
        found.extend((member, (path, mtime, size)) for member in members)
    names = list(dict.fromkeys(itertools.chain.from_iterable(member.fields for member, _ in found)))
    column = label_column_of(" ".join(paths[:1]), names, label_column or ("cls" if "cls" in names else None))
    listing.columns = names
    for member, (path, mtime, size) in found:
        try:
            values = tuple(text_of(member.fields.get(name)) for name in names)
            label = encode_label(member.fields.get(column)) if column else None
        except RecursionError:
            listing.skipped.append((f"{path}!{member.name}", "its values are nested too deeply"))
            continue
        listing.files.append(Listed(path, member.name, member.offset, member.size, mtime, size, label, values))
    times = SegmentColumns.among([name for name in names if name != column])
    if times.start or times.end or times.other_unit:
        fields = ", ".join([*times.start, *times.end, *times.other_unit])
        listing.warnings.append(f"{paths[0]}: a member is read whole; the fields {fields} are kept as columns only")
    return listing


def _members(path: str, size: int, listing: Listing) -> list[_Found]:
    """The audio members of all tars in the file. Raises BadAudio if it is not a tar, OSError if it cannot be read."""
    found: list[_Found] = []
    with open(path, "rb") as file:
        head = file.read(8)
        tool = next((tool for magic, tool in COMPRESSED.items() if head.startswith(magic)), None)
        if tool:
            raise BadAudio(f"damaged or compressed tar: unpack it with {tool}, so that members can be read in place")
        position: int | None = 0
        while position is not None:
            members: list[tarfile.TarInfo] = []
            file.seek(position)
            end, problem = position, ""
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        members.append(member)
                    end = tar.offset
            except (tarfile.TarError, EOFError, ValueError) as error:
                problem = str(error)
                end = members[-1].offset_data if members else position
            found += _with_notes(path, size, members, listing)
            rest = _next_block(file, end)
            if not problem and rest == end < size:
                problem = f"no member begins at byte {end:,}"
            if problem:
                listing.skipped.append((path, f"damaged or compressed tar: {problem}; what follows is not read"))
                break
            position = rest
    return _distinct(path, found, listing)


def _next_block(file: Any, position: int) -> int | None:
    """Position of the first block at or after `position` that is not all zeros, None if there is none."""
    file.seek(position)
    while data := file.read(SCAN_BYTES):
        rest = data.lstrip(b"\0")
        if rest:
            return position + (len(data) - len(rest)) // BLOCK * BLOCK
        position += len(data)
    return None


def _with_notes(path: str, size: int, members: list[tarfile.TarInfo], listing: Listing) -> list[_Found]:
    """The audio members of one tar, each with the fields of the `.cls` and `.json` members of the same key."""
    audio: list[tuple[str, tarfile.TarInfo]] = []
    notes: Notes = {}
    by_name: dict[str, tarfile.TarInfo] = {}
    for member in members:  # a link may have the name of its own target
        if not (member.islnk() or member.issym()) or posixpath.normpath(member.name) not in by_name:
            by_name[posixpath.normpath(member.name)] = member
    unread: list[str] = []
    for link in members:
        suffix = os.path.splitext(link.name)[1].lower()
        note = suffix in (".cls", ".json") and not os.path.basename(link.name).startswith("._")
        if link.isdir() or not (note or is_audio(link.name)):
            continue
        held = _target(link, by_name)
        reason = _unusable(link, held, size)
        if held is None or reason:
            if note:
                unread.append(f"{link.name}: {reason}")
            else:
                listing.skipped.append((f"{path}!{link.name}", reason))
        elif not note:
            audio.append((link.name, held))
        elif held.size > NOTE_BYTES:
            unread.append(f"{link.name}: {held.size / 1e6:.1f} MB, the limit is 1 MB")
        else:
            text = read_bytes(path, held.offset_data, held.size).tobytes().decode("utf-8-sig", errors="replace")
            fields = _json_fields(text) if suffix == ".json" else {"cls": text.strip()}
            if fields is None:
                unread.append(f"{link.name}: not a JSON object")
            for key in dict.fromkeys(_keys(link.name)):
                notes.setdefault(key, {}).update(fields or {})
    if unread:
        listing.warnings.append(f"{path}: labels or fields of {len(unread)} members cannot be read ({unread[0]})")
    found = []
    for name, member in audio:
        stem, key = _keys(name)
        found.append(_Found(name, member.offset_data, member.size, notes.get(stem) or notes.get(key) or {}))
    return found


def _target(member: tarfile.TarInfo, by_name: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """The member that holds the data of a member or link, None if the link leads out of the tar."""
    at: tarfile.TarInfo | None = member
    for _ in range(20):  # a longer chain of links is a loop
        if at is None or not (at.islnk() or at.issym()):
            return at
        folder = os.path.dirname(at.name) if at.issym() else ""
        at = by_name.get(posixpath.normpath(posixpath.join(folder, at.linkname)))
    return None


def _unusable(link: tarfile.TarInfo, member: tarfile.TarInfo | None, size: int) -> str:
    if member is None:
        return f"a link to {link.linkname}, which is not in the tar"
    if not member.isfile():
        return "not a regular file"
    if member.issparse():
        return "a sparse member: make the tar without --sparse"
    if member.offset_data + member.size > size:
        return "truncated: the tar ends inside it"
    return ""


def _distinct(path: str, found: list[_Found], listing: Listing) -> list[_Found]:
    """Renames members of the same name, as in appended tars, by appending the byte at which they begin."""
    seen: set[str] = set()
    result, twice = [], []
    for member in found:
        if member.name in seen:
            twice.append(member.name)
            member = member._replace(name=f"{member.name}@{member.offset}")
        seen.add(member.name)
        result.append(member)
    if twice:
        example = f"{twice[0]}; the later ones are listed as {twice[0]}@BYTE"
        listing.warnings.append(f"{path}: {len(twice)} members have the name of an earlier one ({example})")
    return result


def is_audio(name: str) -> bool:
    base = os.path.basename(name)  # a leading dot marks a hidden file, or a resource fork that only looks like audio
    return not base.startswith(".") and os.path.splitext(base)[1].lower() in READABLE + UNREADABLE


def _keys(name: str) -> tuple[str, str]:
    """The keys of a member: its name without the last suffix, and its name up to the first dot, as in webdataset."""
    folder, base = os.path.split(name)
    return os.path.splitext(name)[0], os.path.join(folder, base.split(".")[0])


def _json_fields(text: str) -> dict[str, Any] | None:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return {str(name): value for name, value in fields.items()} if isinstance(fields, dict) else None
