"""Lists the files of a data set: a folder, a manifest or webdataset tars. Nothing is decoded here."""

import glob
import itertools
import os
import re
from collections.abc import Iterator

from ajepa.data.formats.audiofile import BadAudio, reason_of, stat_file
from ajepa.data.sources.listing import DataError, Listed, Listing, readable
from ajepa.data.sources.manifests import MANIFESTS, list_manifests
from ajepa.data.sources.tars import is_audio, list_tars

__all__ = ["DataError", "Listed", "Listing", "list_source"]

PACKED = (".gz", ".tgz", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst", ".tzst", ".zip", ".7z")


def list_source(source: str, label_column: str | None = None) -> Listing:
    """The files of a folder, manifest or tars, in a fixed order. Raises DataError as `ajepa.data.index.build_index`."""
    suffix = os.path.splitext(source)[1].lower()
    if os.path.isdir(source):
        return _list_folder(source)
    if os.path.isfile(source):
        if suffix in MANIFESTS:
            return list_manifests([source], suffix, label_column)
        if suffix == ".tar":
            return list_tars([source], label_column)
        if suffix in PACKED:
            raise DataError(f"{source}: a compressed file: unpack it first, so that recordings can be read in place")
        raise DataError(f"{source}: expected a folder, a manifest ({', '.join(MANIFESTS)}) or a .tar")
    if os.path.exists(source):
        raise DataError(f"{source}: not a regular file; give a folder of recordings, a CSV or JSONL manifest, or tars")
    paths = _expand(source)
    if not paths:
        hint = "no file matches" if glob.has_magic(source) or "{" in source else "no such file or folder"
        raise DataError(f"{source}: {hint}; give a folder of recordings, a CSV or JSONL manifest, or tars")
    packed = next((path for path in paths if path.lower().endswith(PACKED)), None)
    if packed:
        raise DataError(f"{packed}: a compressed file: unpack it first, so that recordings can be read in place")
    suffixes = {os.path.splitext(path)[1].lower() for path in paths}
    if suffixes == {".tar"}:
        return list_tars(paths, label_column)
    if len(suffixes) == 1 and suffixes <= set(MANIFESTS):
        return list_manifests(paths, suffixes.pop(), label_column)
    raise DataError(
        f"{source}: a pattern must name .tar files or manifests of one kind; give the folder for loose recordings"
    )


def _expand(pattern: str) -> list[str]:
    """Expands braces (`{000..010}`, `{a,b}`), then globs. A path from braces is kept even if it is missing."""
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
    """Lists a folder. The sub-folders of `root` are the labels if at least two of them hold audio directly."""
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
        listing.files.append(Listed(path, "", 0, size, mtime, size, readable(top) if labelled and top else None, ()))
    return listing


def _walk(root: str, listing: Listing) -> Iterator[tuple[str, list[str]]]:
    """Yields (folder, its audio files), sorted. Symbolic links are followed, but each folder is visited once."""
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
        yield folder, sorted(name for name in names if is_audio(name))
