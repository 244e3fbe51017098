"""What is known of each host, in files, so that any process can find, use and end it."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from . import network
from .groups import group_of, list_processes
from .places import DISKS_DIR, HOSTS_DIR, HostError
from .processes import ProcessId

_FIRST: Final = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One host as it was asked for."""

    name: str  # also its hostname
    number: int
    release: str
    init: str  # one of roots.INITS
    lower: str  # path of the root it is made from
    binds: tuple[str, ...]  # paths of this machine, at the same place in the host
    disk_mib: int | None  # size of its root filesystem; None: as large as this machine's
    creator: ProcessId  # who makes it; of use until its keeper runs
    owner: ProcessId | None  # the host ends when this process does; None: when somebody stops it

    @property
    def address(self) -> str:
        return network.address_of(self.number)

    @property
    def directory(self) -> Path:
        return HOSTS_DIR / self.name

    @property
    def disk(self) -> Path:
        """What it writes: the overlay's upper directory and a place to work."""
        return DISKS_DIR / self.name

    @property
    def mount(self) -> Path:
        """Its root filesystem, also while it is off; without what it mounts itself, such as /run."""
        return self.directory / "root"

    @property
    def console(self) -> Path:
        return self.directory / "console.log"

    @property
    def group(self) -> Path:
        return group_of(self.name)

    @property
    def is_leftover(self) -> bool:
        """Whether nobody looks after it any more."""
        if self.owner is not None:
            return not self.owner.is_alive
        keeper = read_keeper(self)
        return not self.creator.is_alive and (keeper is None or not keeper.is_alive)


def write_record(record: Record) -> None:
    record.directory.mkdir(parents=True)
    write_json(record.directory / "host.json", asdict(record))


def read_record(name: str) -> Record:
    """Raises HostError when there is no such host."""
    try:
        fields = json.loads((HOSTS_DIR / name / "host.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        known = ", ".join(record.name for record in list_records()) or "none"
        raise HostError(f"there is no host {name!r}; there are: {known}") from None
    fields["binds"] = tuple(fields["binds"])
    fields["creator"] = ProcessId(**fields["creator"])
    fields["owner"] = ProcessId(**fields["owner"]) if fields["owner"] is not None else None
    return Record(**fields)


def list_records() -> list[Record]:
    names = sorted(path.parent.name for path in HOSTS_DIR.glob("*/host.json"))
    return sorted((read_record(name) for name in names), key=lambda record: record.number)


# Small files beside the record, each with one writer.


def write_keeper(record: Record, keeper: ProcessId) -> None:
    write_json(record.directory / "keeper.json", asdict(keeper))


def read_keeper(record: Record) -> ProcessId | None:
    fields = _read_json(record.directory / "keeper.json")
    return ProcessId(**fields) if fields else None


def write_state(record: Record, *, boots: int, is_on: bool) -> None:
    """Note how often it was booted, and whether it runs. Written by the keeper."""
    write_json(record.directory / "state.json", {"boots": boots, "is_on": is_on})


def read_state(record: Record) -> tuple[int, bool]:
    """Return how often it was booted, and whether it runs."""
    fields = _read_json(record.directory / "state.json") or {"boots": 0, "is_on": False}
    return fields["boots"], fields["is_on"]


def set_flag(record: Record, name: str, *, on: bool) -> None:
    """`wanted`: it is to run. `cut`: its link drops everything, also after a reboot."""
    path = record.directory / name
    if on:
        path.touch()
    else:
        path.unlink(missing_ok=True)


def has_flag(record: Record, name: str) -> bool:
    return (record.directory / name).exists()


def find_first_process(record: Record) -> int | None:
    """Return the process that is number 1 within the host, as this machine numbers it; None while it is off."""
    for pid in list_processes(record.group):
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        numbers = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), [])
        if len(numbers) == 2 and numbers[1] == _FIRST and "\nState:\tZ" not in status:
            return pid
    return None


def write_json(path: Path, content: Any) -> None:
    """Replace the file at once: a reader finds the old or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content))
    partial.rename(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
