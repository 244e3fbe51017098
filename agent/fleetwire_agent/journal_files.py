"""The files of the journal: which there are, and which entries they hold, from their headers. Blocking calls.

The format is documented and stable: https://systemd.io/JOURNAL_FILE_FORMAT/"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from fleetwire_agent.journal_entries import Place

SYSTEM_JOURNALS: Final = (Path("/var/log/journal"), Path("/run/log/journal"))

# Files lie in the directory itself (journalctl -D) or in one named after the machine id. With a tilde: set aside by
# journald, as its writer did not end cleanly; read all the same.
_PATTERNS: Final = ("*.journal", "*/*.journal", "*.journal~", "*/*.journal~")
_HEADER = struct.Struct("<8s64x16s72xQQ")  # signature, seqnum_id, tail_entry_seqnum, head_entry_seqnum
_SIGNATURE = b"LPKSHHRH"


class _Range(NamedTuple):
    series: str
    first: int
    last: int


def find_files(directory: str | None) -> list[Path]:
    """Return the journal's files.

    Args:
        directory: where they are; None for the system's own journal."""
    places = SYSTEM_JOURNALS if directory is None else (Path(directory),)
    return [path for place in places for pattern in _PATTERNS for path in place.glob(pattern)]


def find_own_machine(directory: str | None) -> str | None:
    """Return the id of this machine when other machines' journals lie beside its own (collected from them, or left by
    the image it was cloned from); None when all there is to read is its own, or chosen by `directory`."""
    if directory is not None:
        return None
    try:
        own = Path("/etc/machine-id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    names = {path.name.partition(".")[0] for place in SYSTEM_JOURNALS for path in place.glob("*/") if path.is_dir()}
    return own if names - {own} else None  # after a dot: the namespace of a service, which journalctl leaves out


def are_readable(paths: list[Path]) -> bool:
    """Whether this process may read all of them; without, some entries are not for it, and their numbers missing."""
    return all(os.access(path, os.R_OK) for path in paths)


def holds(directory: str | None, place: Place) -> bool:
    """Whether the entry, or the one numbered after it, is still in a file: nothing after it has been removed then,
    as the oldest files are removed first."""
    return any(
        entries.series == place.series and entries.first <= place.number + 1 and place.number <= entries.last
        for entries in _read_ranges(directory)
    )


def _read_ranges(directory: str | None) -> Iterator[_Range]:
    for path in find_files(directory):
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
        except OSError:  # removed a moment ago
            continue
        if len(header) == _HEADER.size:
            signature, series, last, first = _HEADER.unpack(header)
            if signature == _SIGNATURE:
                yield _Range(series.hex(), first, last)
