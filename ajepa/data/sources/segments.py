"""Segments of recordings: reads from a manifest's row where its part of a file starts and ends."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ajepa.data.sources.listing import find_column

START = ("offset", "start", "start_time", "begin", "begin_time", "start_seconds", "start_sec", "start_s")
END = ("end", "end_time", "stop", "end_seconds", "end_sec", "end_s")
DURATION = ("duration", "duration_seconds", "duration_sec", "duration_s")
EVENT = ("onset", "offset")  # in tables of sound events, `offset` is the end
_EDGE = "(?:start|begin|onset|offset|end|stop)"
_UNIT = "(?:samples?|frames?|ms|msec|milliseconds)"
OTHER_UNIT = re.compile(rf"(?:{_EDGE}_?{_UNIT}|{_UNIT}_?{_EDGE})")
DECIMAL_COMMA = re.compile(r"\s*-?\d+,\d+\s*")
SLACK = 0.1  # a stated end or length may differ from the recording's by so many seconds: manifests round
SLACK_SHARE = 1e-3  # or this share of the recording's length


class SegmentError(ValueError):
    """The segment of a row cannot be read. The message is the reason."""


class SegmentColumns(NamedTuple):
    """Names of the columns that state which part of a file a row means."""

    start: list[str]
    end: list[str]
    duration: list[str]
    other_unit: list[str]  # columns of segments in a unit other than seconds

    @classmethod
    def among(cls, names: Sequence[str]) -> "SegmentColumns":
        onset, offset = (find_column(names, [name]) for name in EVENT)
        starts: tuple[str, ...] = START
        ends: tuple[str, ...] = END
        if onset is not None:
            starts = ("onset", *START)
            if offset is not None:
                starts, ends = ("onset", *START[1:]), ("offset", *END)

        def present(wanted: Sequence[str]) -> list[str]:
            return [name for want in wanted if (name := find_column(names, [want])) is not None]

        found = cls(present(starts), present(ends), present(DURATION), [])
        other = [name for name in names if OTHER_UNIT.fullmatch(re.sub(r"[\s-]+", "_", name.strip().lower()))]
        return found._replace(other_unit=[] if found.start else other)

    def all(self) -> list[str]:
        return [*self.start, *self.end, *self.duration, *self.other_unit]

    def read(self, row: Mapping[str, Any]) -> tuple[float | None, float | None]:
        """(start, duration) in seconds, None for what the row does not state. Raises SegmentError."""
        for name in self.other_unit:
            if not _blank(row.get(name)):
                raise SegmentError(f"the segment is given by {name!r}: give its start and end in seconds")
        start, end, duration = (_agreed(row, names) for names in (self.start, self.end, self.duration))
        if end is not None:
            if start is None:
                raise SegmentError(f"the row gives an end of {end:g} s and no start")
            if end <= start:
                raise SegmentError(f"the segment ends at {end:g} s and starts at {start:g} s")
            if duration is not None and abs(start + duration - end) > SLACK:
                raise SegmentError(f"start {start:g}, end {end:g} and duration {duration:g} s contradict each other")
            duration = end - start
        if duration == 0:
            raise SegmentError("the segment has a duration of 0")
        return start, duration


def place(start: float | None, duration: float | None, total: int, rate: int) -> tuple[int, int]:
    """(first sample, number of samples) of a segment. Raises SegmentError beyond the recording's `total` samples."""
    length, begin = total / rate, start or 0.0
    slack = max(SLACK, SLACK_SHARE * length)
    rounded = start is None and duration is not None and float(duration).is_integer() and length < duration < length + 1
    if start is None and (duration is None or rounded or abs(duration - length) <= slack):
        return 0, total  # a duration without a start usually is that of the whole file
    first = round(min(begin, length) * rate)  # `begin` may be too large to be counted in samples
    count = total - first if duration is None else round(min(duration, length + 2 * slack) * rate)
    if first >= total or first + count > total + slack * rate:
        span = f"from {begin:.6g}" if duration is None else f"{round(begin, 3)} to {round(begin + duration, 3)}"
        reason = f"segment {span} s reaches beyond the recording's {round(length, 3)} s"
        whole = all(float(t or 0).is_integer() for t in (start, duration))
        in_samples = whole and 20 * length < begin + (duration or 0.0) <= total
        raise SegmentError(reason + "; give seconds, these look like samples" * in_samples)
    if count < 1:
        raise SegmentError("the segment is shorter than one sample")
    return first, min(count, total - first)


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _agreed(row: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """The number of seconds in the columns `names`, None if all are empty. Filled columns must agree."""
    found = [(name, _seconds(name, row[name])) for name in names if not _blank(row.get(name))]
    for name, value in found[1:]:
        if abs(value - found[0][1]) > SLACK:
            raise SegmentError(f"{found[0][0]} {found[0][1]:g} and {name} {value:g} contradict each other")
    return found[0][1] if found else None


def _seconds(name: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        comma = isinstance(value, str) and re.fullmatch(DECIMAL_COMMA, value)
        remedy = ": write a decimal point in place of the comma" if comma else ""
        raise SegmentError(f"{name} {value!r:.40} is not a number of seconds{remedy}") from None
    if not math.isfinite(seconds):
        raise SegmentError(f"{name} {value!r:.40} is not a finite number of seconds")
    if seconds < 0:
        raise SegmentError(f"{name} {value} is negative")
    return seconds
