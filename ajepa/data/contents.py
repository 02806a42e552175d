"""Hashes of what recordings hold, from a few blocks of each, so that they are cheap for millions of files."""

import hashlib
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ajepa.data.index import Index
from ajepa.utils.cores import cores

BLOCKS, BLOCK = 8, 2048  # number of the blocks that are read of a recording, and their bytes
AT_ONCE = 256  # recordings that a thread reads in a row
Place = tuple[str, int, int]  # path, offset, size


def content_hashes(index: Index, rows: np.ndarray | None = None, threads: int = 0) -> list[bytes | None]:
    """Hash of the size and of evenly spaced blocks of each recording in `rows`; None where it cannot be read.

    The blocks go from the first byte, so from the header, to the last. 0 threads are one per core.
    """
    entries = index.entries if rows is None else index.entries.take(rows)
    numbers = (entries.numbers[name].tolist() for name in ("offset", "size"))
    places = list(zip(entries.path, *numbers, strict=True))
    distinct = list(dict.fromkeys(places))  # segments of one file share its hash
    groups = [distinct[i : i + AT_ONCE] for i in range(0, len(distinct), AT_ONCE)]
    with ThreadPoolExecutor(threads or cores()) as pool:
        hashes = dict(zip(distinct, itertools.chain.from_iterable(pool.map(_hashes, groups)), strict=True))
    return [hashes[place] for place in places]


def _hashes(places: Sequence[Place]) -> list[bytes | None]:
    return list(map(_hash, places))


def _hash(place: Place) -> bytes | None:
    path, offset, size = place
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            for start in np.linspace(0, max(0, size - BLOCK), BLOCKS).astype(np.int64).tolist():
                file.seek(offset + start)
                digest.update(file.read(min(BLOCK, size)))
    except OSError:
        return None
    return digest.digest()
