"""Entries of the journal as `journalctl -o json` writes them, and where they are in it. Pure."""

import json
import re
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from fleetwire_agent.lines import RawLine, cut_text
from fleetwire_shared.limits import MAX_LINE_BYTES

OUTPUT_FIELDS: Final = "MESSAGE,SYSLOG_IDENTIFIER,_COMM,_PID,SYSLOG_PID,_HOSTNAME,_SOURCE_REALTIME_TIMESTAMP"
CURSOR_PATTERN: Final = re.compile(r"[a-z]=[0-9a-f]+(;[a-z]=[0-9a-f]+)*", re.ASCII)

_CURSOR_IN_JSON = re.compile(rb'"__CURSOR" ?: ?"([a-z0-9=;]+)"')
_PLACE = re.compile(r"s=([0-9a-f]+);i=([0-9a-f]{1,16});b=([0-9a-f]+);m=[0-9a-f]+;t=([0-9a-f]{1,16})(?:;|$)", re.ASCII)


class Place(NamedTuple):
    """Where an entry is. journald numbers the entries of one series 1, 2, 3 ..., over all its files and restarts."""

    cursor: str
    series: str
    number: int
    boot_id: str
    microseconds: int  # when it was received, by the host's clock


class JournalEntry(NamedTuple):
    place: Place | None  # None where the cursor cannot be understood
    text: str | None  # the line to show; None for an entry that was too long to be kept
    full_bytes: int  # its length as JSON

    @property
    def cursor(self) -> str:
        return "" if self.place is None else self.place.cursor


def read_place(cursor: str) -> Place | None:
    """Return what a cursor says; None for one that journald did not make."""
    match = _PLACE.match(cursor)
    if match is None:
        return None
    return Place(cursor, match[1], int(match[2], 16), match[3], int(match[4], 16))


def read_entry(line: RawLine) -> JournalEntry:
    """Return the entry of one line of `journalctl -o json`."""
    if line.full_bytes > len(line.kept):
        found = _CURSOR_IN_JSON.search(line.kept)  # fields come in no order
        return JournalEntry(read_place(found[1].decode()) if found else None, None, line.full_bytes)
    fields: dict[str, Any] = json.loads(line.kept.decode(errors="replace"))
    return JournalEntry(read_place(fields["__CURSOR"]), format_entry(fields), line.full_bytes)


def format_entry(entry: dict[str, Any]) -> str:
    """Return `TIME HOST IDENT[PID]: MESSAGE`, the time in UTC with microseconds.

    Args:
        entry: fields as journalctl writes them in JSON: text, a list of byte values, a list of several values."""
    moment = _field(entry, "_SOURCE_REALTIME_TIMESTAMP") or _field(entry, "__REALTIME_TIMESTAMP")
    seconds, microseconds = divmod(int(moment), 1_000_000)
    moment_text = datetime.fromtimestamp(seconds, UTC).replace(microsecond=microseconds).isoformat("T", "microseconds")
    identifier = _field(entry, "SYSLOG_IDENTIFIER") or _field(entry, "_COMM") or "unknown"
    pid = _field(entry, "_PID") or _field(entry, "SYSLOG_PID")
    host = _field(entry, "_HOSTNAME") or "localhost"
    source = f"{identifier}[{pid}]" if pid else identifier
    text = f"{moment_text} {host} {source}: {_field(entry, 'MESSAGE')}"
    if len(text) * 4 > MAX_LINE_BYTES and len(whole := text.encode(errors="replace")) > MAX_LINE_BYTES:
        return cut_text(whole[:MAX_LINE_BYTES], len(whole))
    return text.replace("\0", "\ufffd") if "\0" in text else text


def _field(entry: dict[str, Any], name: str) -> str:
    value = entry.get(name)
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, int) for item in value):  # not UTF-8, or with control characters
            return bytes(value).decode(errors="replace")
        return _field({name: value[0]}, name)  # the field was given several times
    return ""
