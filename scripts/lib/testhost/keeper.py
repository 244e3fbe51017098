"""The process that stays with one host: boots it, boots it again when it asks for a reboot, and ends it with its owner.

    python3 -m scripts.lib.testhost.keeper NAME

SIGUSR1 makes it look again at the flag `wanted`. Killing it does no harm: `operations.stop_host` needs no keeper."""

import os
import select
import signal
import socket
import subprocess
import sys
from typing import Final

from . import network
from .groups import kill_group, remove_group
from .operations import remove_host
from .places import HostError, locked
from .processes import ProcessId, identify_process
from .records import Record, has_flag, read_record, read_state, set_flag, write_keeper, write_state

REBOOT_ASKED: Final = 133
"""systemd-nspawn's exit status with --keep-unit when the host asked to be booted again."""


class OwnerEndedError(Exception):
    """The process for which the host was booted is no more."""


class Keeper:
    def __init__(self, record: Record) -> None:
        self._record = record
        self._boots = read_state(record)[0]
        self._owner_fd = _open_process(record.owner) if record.owner is not None else None
        self._woken, waker = socket.socketpair()
        self._woken.setblocking(False)
        waker.setblocking(False)
        self._waker = waker  # kept: closed with its last reference
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGUSR1, lambda *_: None)

    def keep(self) -> None:
        """Boot the host whenever it is wanted. Raises OwnerEndedError, and returns for nothing else."""
        while True:
            while has_flag(self._record, "wanted"):
                self._run_once()
            self._wait(None)

    def _run_once(self) -> None:
        """Boot it, and return when it is off, with nothing left running."""
        record = self._record
        network.add_network(record.number, is_cut=has_flag(record, "cut"))
        record.group.mkdir(parents=True, exist_ok=True)
        with record.console.open("ab") as console:
            nspawn = subprocess.Popen(
                _build_command(record), stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )
        self._boots += 1
        write_state(record, boots=self._boots, is_on=True)
        with_nspawn = os.pidfd_open(nspawn.pid)
        try:
            while nspawn.poll() is None:
                self._wait(with_nspawn)
        finally:
            os.close(with_nspawn)
        kill_group(record.group)
        remove_group(record.group)
        network.remove_network(record.number)
        if nspawn.returncode != REBOOT_ASKED:
            set_flag(record, "wanted", on=False)
        write_state(record, boots=self._boots, is_on=False)

    def _wait(self, process_fd: int | None) -> None:
        """Return when that process has ended or a signal came."""
        watched = [fd for fd in (self._owner_fd, self._woken.fileno(), process_fd) if fd is not None]
        ready, _, _ = select.select(watched, [], [])
        if self._owner_fd in ready:
            raise OwnerEndedError
        if self._woken.fileno() in ready:
            self._woken.recv(4096)


def _open_process(process: ProcessId) -> int:
    """Return a descriptor that is readable once the process has ended."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        raise OwnerEndedError from None
    if not process.is_alive:  # another one by now
        raise OwnerEndedError
    return descriptor


def _build_command(record: Record) -> list[str]:
    """Return what runs the host, in its own group and with a clock that starts at its boot.

    nspawn takes its kind of cgroup from what is mounted at /sys/fs/cgroup: in a mount namespace of its own, that is the
    unified hierarchy. setpriv: a keeper that is killed in the middle of this leaves no half-started host."""
    nspawn = [
        *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--settings=no", "--link-journal=no"),
        *("--resolv-conf=off", "--timezone=off", "--console=read-only", "--capability=CAP_NET_ADMIN"),
        f"--network-namespace-path=/run/netns/{network.namespace_of(record.number)}",
        *(f"--machine={record.name}", f"--hostname={record.name}", f"--directory={record.mount}"),
        *(f"--bind={path}" for path in record.binds),
        *(["--as-pid2", "/usr/local/sbin/testhost-payload"] if record.init == "none" else ["--boot"]),
    ]
    script = (
        'set -e; echo $$ >"$1/cgroup.procs"; shift; now=$(cut -d. -f1 /proc/uptime)\n'
        "exec unshare --mount --propagation private --time --boottime -$now --monotonic -$now "
        """sh -c 'mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec "$@"' sh "$@" """
    )
    return ["setpriv", "--pdeathsig", "KILL", "sh", "-c", script, "sh", str(record.group), *nspawn]


def main() -> None:
    record = read_record(sys.argv[1])
    write_keeper(record, identify_process(os.getpid()))
    try:
        Keeper(record).keep()
    except OwnerEndedError:
        with locked("hosts"):
            remove_host(record, keeper_is_this=True)
    except HostError as err:
        sys.exit(f"the keeper of {record.name} gives up: {err}")


if __name__ == "__main__":
    main()
