"""The header Range, as far as it is honoured: one range of bytes."""

import re

_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII)


def parse_range(header: str | None) -> tuple[int, int | None] | None:
    """Return offset and length; a negative offset counts from the end, a length of None reaches to it.

    What is not one range of bytes is None and to be ignored, as RFC 9110 wants: then all is sent."""
    match = _RANGE.fullmatch(header.strip()) if header is not None else None
    if match is None or max(len(match[1]), len(match[2])) > 18:
        return None
    first, last = match[1], match[2]
    if not first:
        return (-int(last), None) if last and int(last) else None
    if not last:
        return int(first), None
    if int(last) < int(first):
        return None
    return int(first), int(last) - int(first) + 1
