"""The units of the host's systemd, for whoever picks one whose log is to be followed."""

import json
import shutil
from collections.abc import Iterable
from typing import Any, Final

from fleetwire_agent.processes import Spawner, read_output
from fleetwire_shared.errors import PeerFailedError, UnavailableError
from fleetwire_shared.limits import MAX_CONTROL_FRAME_BYTES
from fleetwire_shared.messages import Unit

MAX_LIST_BYTES: Final = MAX_CONTROL_FRAME_BYTES - 16 * 1024
"""Of all units as JSON: they travel in one frame."""

READ_SECONDS: Final = 10.0
MAX_OUTPUT_BYTES: Final = 16 * 1024 * 1024
MAX_DESCRIPTION_CHARACTERS: Final = 200

_NOT_LOADED: Final = "not-loaded"


async def read_units(spawner: Spawner, journal_directory: str | None) -> tuple[Unit, ...]:
    """Return the units systemd has loaded, and those it has forgotten of which the journal has entries; by name.

    Left out are units that only others name and that do not exist, and of the forgotten ones those whose names never
    come back (sessions, transient runs).

    Raises:
        UnavailableError: the host has no systemd, or it did not answer in time.
        PeerFailedError: it answered something else than units."""
    if shutil.which("systemctl") is None:
        raise UnavailableError("this host has no systemd, so it has no units; follow a file instead (source=file)")
    listing = await _read(spawner, "systemctl", "list-units", "--all", "--no-pager", "--output=json")
    loaded = parse_units(listing)
    return merge_units(loaded, await _read_journal_units(spawner, journal_directory))


def parse_units(listing: bytes) -> list[Unit]:
    """Return the units of `systemctl list-units --output=json`, as systemd 246 and later writes it.

    Raises:
        PeerFailedError: it is something else."""
    try:
        rows: list[dict[str, Any]] = json.loads(listing.decode(errors="replace"))
        return [
            Unit(
                name=str(row["unit"]),
                load=str(row["load"]),
                active=str(row["active"]),
                sub=str(row["sub"]),
                description=_shorten(str(row["description"])),
            )
            for row in rows
        ]
    except (ValueError, KeyError, TypeError) as err:
        raise PeerFailedError(
            "systemctl listed the units in a form that is not known; is systemd older than 246?"
        ) from err


def merge_units(loaded: Iterable[Unit], logged_names: Iterable[str]) -> tuple[Unit, ...]:
    """Return the units that exist or have log entries, sorted by name."""
    logged = {name for name in logged_names if not _is_passing(name)}
    units = {unit.name: unit for unit in loaded if unit.load != "not-found" or unit.name in logged}
    for name in logged - units.keys():
        units[name] = Unit(name=name, load=_NOT_LOADED, active="inactive", sub="dead", description="")
    return tuple(units[name] for name in sorted(units))


def fit_units(units: tuple[Unit, ...], limit_bytes: int = MAX_LIST_BYTES) -> tuple[tuple[Unit, ...], bool]:
    """Return as many units as fit into one frame, sorted by name, and whether some were left out.

    Devices go first: a host with many disks has thousands, and none of them writes a log."""
    kept: list[Unit] = []
    size_bytes = 0
    for unit in sorted(units, key=lambda unit: (unit.name.endswith(".device"), unit.name)):
        size_bytes += _size_bytes(unit)
        if size_bytes > limit_bytes:
            return tuple(sorted(kept, key=lambda unit: unit.name)), True
        kept.append(unit)
    return units, False


def _size_bytes(unit: Unit) -> int:
    words = (unit.name, unit.load, unit.active, unit.sub, unit.description)
    return 64 + sum(len(json.dumps(word, ensure_ascii=False).encode()) for word in words)


def _is_passing(name: str) -> bool:
    return name.endswith(".scope") or name.startswith("run-")


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_DESCRIPTION_CHARACTERS else f"{text[: MAX_DESCRIPTION_CHARACTERS - 1]}…"


async def _read_journal_units(spawner: Spawner, directory: str | None) -> list[str]:
    """Return the units that the journal has entries of; none where it cannot be read: it only completes the list."""
    place = () if directory is None else (f"--directory={directory}",)
    try:
        output = await _read(spawner, "journalctl", "--quiet", "--no-pager", *place, "--field=_SYSTEMD_UNIT")
    except UnavailableError:
        return []
    return output.decode(errors="replace").split()


async def _read(spawner: Spawner, *command: str) -> bytes:
    environment = {"LC_ALL": "C.UTF-8", "SYSTEMD_LOG_LEVEL": "err", "SYSTEMD_COLORS": "0"}
    return await read_output(
        spawner, command, timeout_seconds=READ_SECONDS, max_bytes=MAX_OUTPUT_BYTES, env=environment
    )
