"""The life of a host, from `boot_host` to `stop_host`. All of it may be called from several processes at once."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from . import network
from .groups import kill_group, remove_group, remove_parent
from .places import CACHE_DIR, HOSTS_DIR, OWNERS_DIR, SOURCE_ROOT, STATE_DIR, HostError, locked
from .processes import ProcessId, identify_process, wait_until
from .programs import check_obstacles, run, spawn_detached, try_run
from .records import (
    Record,
    find_first_process,
    has_flag,
    list_records,
    read_keeper,
    read_state,
    set_flag,
    write_json,
    write_record,
)
from .roots import PASSWORDS, build_root, find_recipe, generate_key, make_ssh_key

UP_SECONDS: Final = 60.0
_OFF_SECONDS: Final = 60.0
_INOTIFY_INSTANCES: Final = 1024  # the default of 128 is used up by about 12 hosts
_SSH_PORT: Final = 22
_LISTENING: Final = "0A"  # in /proc/net/tcp
_PLAIN_ENVIRONMENT: Final = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "LOGNAME": "root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/bash",
    "USER": "root",
}


def boot_host(
    release: str,
    *,
    init: str = "systemd",
    binds: Iterable[str | Path] = (),
    disk_mib: int | None = None,
    python: bool = True,
    owner_pid: int | None = None,
) -> Record:
    """Make a host and boot it; return when its sshd listens.

    Args:
        release: one of roots.RELEASES; its root is built first where it is missing.
        init: one of roots.INITS; "none" is a container's host, where nothing looks after services.
        binds: directories of this machine that are at the same path in the host.
        disk_mib: size of its root filesystem, in memory.
        python: without it, no python3 is on the host.
        owner_pid: the host ends with this process.
    Raises:
        HostError: it cannot be booted; nothing of it is left."""
    check_obstacles()
    lower = build_root(find_recipe(release, init))
    with locked("hosts"):
        _remove_leftovers()
        _prepare_machine()
        number = _next_number()
        record = Record(
            name=f"{release}-{number}",
            number=number,
            release=release,
            init=init,
            lower=str(lower),
            binds=tuple(str(path) for path in binds),
            disk_mib=disk_mib,
            creator=identify_process(os.getpid()),
            owner=identify_process(owner_pid) if owner_pid is not None else None,
        )
        write_record(record)
    try:
        _make_disk(record)
        _personalise(record, python=python)
        set_flag(record, "wanted", on=True)
        command = [sys.executable, "-m", "scripts.lib.testhost.keeper", record.name]
        spawn_detached(command, record.directory / "keeper.log", SOURCE_ROOT)
        wait_until_up(record)
    except BaseException:
        stop_host(record)
        raise
    return record


def start_host(record: Record) -> None:
    """Boot a host that is off, and return when its sshd listens."""
    keeper = read_keeper(record)
    if keeper is None or not keeper.is_alive:
        raise HostError(f"{record.name} has lost its keeper: stop it and boot another")
    set_flag(record, "wanted", on=True)
    os.kill(keeper.pid, signal.SIGUSR1)
    wait_until_up(record)


def wait_until_up(record: Record, timeout_seconds: float = UP_SECONDS, *, boot: int = 1) -> None:
    """Return when its sshd listens. Raises HostError with the end of its console when that takes too long.

    Args:
        boot: at least the boot with this number, such as the next after a reboot that was asked for."""

    def is_up() -> bool:
        if not record.directory.exists():
            raise HostError(f"{record.name} was stopped")
        boots, is_on = read_state(record)
        return is_on and boots >= boot and _is_ssh_listening(record)

    try:
        wait_until(is_up, f"{record.name} up, with its sshd", timeout_seconds)
    except HostError as err:
        logs = [record.directory / "keeper.log", record.console]
        said = "\n".join(path.read_text(errors="replace")[-3000:] for path in logs if path.exists())
        raise HostError(f"{err}\n{said}") from None


def _is_ssh_listening(record: Record) -> bool:
    """Asks the kernel, not the host: a connection that comes too early costs a second of waiting for ARP."""
    pid = find_first_process(record)
    if pid is None:
        return False
    lines: list[str] = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            lines += Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
    wanted = f":{_SSH_PORT:04X}"
    return any(fields[1].endswith(wanted) and fields[3] == _LISTENING for fields in map(str.split, lines))


# ---------------------------------------------------------------- things that happen to hosts


def cut_host(record: Record) -> None:
    """Drop every packet from and to it, without a word to anybody; a reboot does not change that."""
    set_flag(record, "cut", on=True)
    if read_state(record)[1]:
        network.cut(record.number)


def heal_host(record: Record) -> None:
    set_flag(record, "cut", on=False)
    if read_state(record)[1]:
        network.heal(record.number)


def kill_host(record: Record) -> None:
    """Cut its power: no process and no peer hears of it. Return when it is off; `start_host` boots it again."""
    set_flag(record, "wanted", on=False)
    if read_state(record)[1]:
        try_run(
            "ip", "link", "set", network.cable_of(record.number), "nomaster"
        )  # its sockets' last words stay unheard

    def is_off() -> bool:
        kill_group(record.group)
        return not read_state(record)[1]

    wait_until(is_off, f"{record.name} off", _OFF_SECONDS)


def reboot_host(record: Record) -> None:
    """Reboot it in order, as its administrator would, and return when its sshd listens again."""
    boots, is_on = read_state(record)
    if not is_on:
        raise HostError(f"{record.name} is off: boot it")
    if record.init == "none":
        exec_in_host(record, "kill -TERM -1; sleep 1", check=False)
        kill_host(record)
        start_host(record)
        return
    exec_in_host(record, ["systemctl", "reboot"] if record.init == "systemd" else ["reboot"], check=False)
    wait_until_up(record, boot=boots + 1)


# ---------------------------------------------------------------- commands within a host


def build_exec(record: Record, command: Sequence[str] | str, environment: Mapping[str, str] | None = None) -> list[str]:
    """Return what runs a command as the host's root; text is for its shell.

    The process is the host's in every respect: its namespaces, its group, which ends with it, and no capability that
    the host's own init has not. With this machine's, `date -s` would set everybody's clock."""
    pid = find_first_process(record)
    if pid is None:
        raise HostError(f"{record.name} is off: boot it")
    inside = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    variables = [f"{name}={value}" for name, value in {**_PLAIN_ENVIRONMENT, **(environment or {})}.items()]
    payload = record.group / "payload"
    group = (payload if payload.exists() else record.group) / "exec"
    return [
        *("sh", "-c", 'mkdir -p "$0" && echo $$ >"$0/cgroup.procs" && exec "$@"', str(group)),
        *("setpriv", f"--bounding-set={_bounding_set_of(pid)}"),
        *("nsenter", f"--target={pid}", "--all", "--root", "--wd"),
        *("env", "-i", *variables, *inside),
    ]


def _bounding_set_of(pid: int) -> str:
    """Return the capabilities that a process can have at most, in setpriv's notation."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line for line in status.splitlines() if line.startswith("CapBnd:")).split()[1], 16)
    return ",".join(["-all", *(f"+cap_{number}" for number in range(64) if mask >> number & 1)])


def exec_in_host(
    record: Record,
    command: Sequence[str] | str,
    *,
    check: bool = True,
    timeout_seconds: float = 60.0,
    content: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command in the host to its end, and to the end of its output.

    Args:
        command: arguments, or text for the shell.
        check: a status other than 0 is an error.
        content: its standard input.
    Raises:
        HostError: it failed or took too long; with what it said."""
    with subprocess.Popen(
        build_exec(record, command, environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(content or "", timeout_seconds)
        except BaseException as err:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(err, subprocess.TimeoutExpired):
                said = f"{_text(err.stdout)}{_text(err.stderr)}"[-4000:]
                raise HostError(f"{record.name}: {command!r}: not within {timeout_seconds:.0f} s: {said}") from None
            raise
    done = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    if check and done.returncode != 0:
        raise HostError(f"{record.name}: {command!r}: status {done.returncode}: {stdout[-4000:]}{stderr[-4000:]}")
    return done


def _text(output: Any) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


# ---------------------------------------------------------------- the end


def stop_host(record: Record) -> None:
    """End it as a power cut would, and remove all of it."""
    with locked("hosts"):
        remove_host(record)


def stop_leftovers() -> list[str]:
    """Remove every host that nobody looks after any more, and what has lost its host. Return their names."""
    with locked("hosts"):
        return _remove_leftovers()


def stop_all() -> list[str]:
    """Remove every host of this machine, whoever uses it. Return their names."""
    with locked("hosts"):
        records = list_records()
        for record in records:
            remove_host(record)
        return [record.name for record in records] + _remove_leftovers()


def remove_host(record: Record, *, keeper_is_this: bool = False) -> None:
    """Remove all of it; each step may have been done before. Call it with the lock held."""
    if not record.directory.exists():
        return
    if not keeper_is_this:
        _kill_keeper(read_keeper(record))
    kill_group(record.group)
    if record.group.exists():
        remove_group(record.group)
    network.remove_network(record.number)
    _unmount(record.mount)
    _unmount(record.disk)
    shutil.rmtree(record.disk, ignore_errors=True)
    # nspawn's own directory of a host; it refuses to remove one that is on a disk.
    with contextlib.suppress(OSError):
        Path("/run/systemd/nspawn/propagate", record.name).rmdir()
    shutil.rmtree(record.directory)
    _remove_shared()


def _kill_keeper(keeper: ProcessId | None) -> None:
    if keeper is not None and keeper.is_alive:
        os.kill(keeper.pid, signal.SIGKILL)
        wait_until(lambda: not keeper.is_alive, f"the end of the keeper {keeper.pid}", _OFF_SECONDS)


def _unmount(path: Path) -> None:
    """Unmount all that is mounted there; what still has it open keeps it until it ends."""
    while path.is_mount():
        run("umount", "--lazy", path)


def _remove_leftovers() -> list[str]:
    leftovers = [record for record in list_records() if record.is_leftover]
    for record in leftovers:
        remove_host(record)
    for path in OWNERS_DIR.glob("*"):
        if not _is_owner_alive(path.name):
            path.unlink()
    _remove_strays()
    _remove_shared()
    return [record.name for record in leftovers]


def _remove_strays() -> None:
    """Remove what has no record: it was being made, or removed, when its maker was killed or this machine restarted."""
    known = {record.name for record in list_records()}
    for parent, names in ((HOSTS_DIR, ("root",)), (CACHE_DIR / "disks", ("",))):
        for directory in parent.glob("*"):
            if directory.name not in known:
                for name in names:
                    _unmount(directory / name)
                shutil.rmtree(directory, ignore_errors=True)


def _remove_shared() -> None:
    """Remove bridge and groups when no host is left and no process wants to have hosts."""
    if list_records() or any(_is_owner_alive(path.name) for path in OWNERS_DIR.glob("*")):
        return
    network.remove_bridge()
    remove_parent()


# ---------------------------------------------------------------- this machine


def hold_network(pid: int) -> str:
    """Keep the bridge for as long as that process lives or holds it. Return this machine's address on it."""
    check_obstacles()
    with locked("hosts"):
        _remove_leftovers()
        _prepare_machine()
        process = identify_process(pid)
        OWNERS_DIR.mkdir(exist_ok=True)
        (OWNERS_DIR / f"{process.pid}-{process.started_ticks}").touch()
    return network.BRIDGE_ADDRESS


def release_network(pid: int) -> None:
    """The opposite of `hold_network`; hosts that run keep the bridge, too."""
    with locked("hosts"):
        for path in OWNERS_DIR.glob(f"{pid}-*"):
            path.unlink()
        _remove_shared()


def _is_owner_alive(name: str) -> bool:
    pid, _, ticks = name.partition("-")
    return ProcessId(int(pid), int(ticks)).is_alive


def _prepare_machine() -> None:
    network.add_bridge()
    limit = Path("/proc/sys/fs/inotify/max_user_instances")
    if int(limit.read_text()) < _INOTIFY_INSTANCES:
        limit.write_text(str(_INOTIFY_INSTANCES))


def _next_number() -> int:
    """Return a number that no host has and none had lately: who knew another host's address takes it for no other."""
    path = CACHE_DIR / "last-number"
    used = {record.number for record in list_records()}
    last = int(path.read_text()) if path.exists() else 0
    number = last % network.HOST_COUNT + 1
    while number in used:
        number = number % network.HOST_COUNT + 1
    write_json(path, number)
    return number


def _make_disk(record: Record) -> None:
    record.disk.mkdir(parents=True)
    if record.disk_mib is not None:
        run("mount", "-t", "tmpfs", "-o", f"size={record.disk_mib}m,mode=0755", "tmpfs", record.disk)
    upper, work = record.disk / "upper", record.disk / "work"
    for path in (upper, work, record.mount):
        path.mkdir()
    options = f"lowerdir={record.lower},upperdir={upper},workdir={work}"
    run("mount", "-t", "overlay", "-o", options, "overlay", record.mount)


def _personalise(record: Record, *, python: bool) -> None:
    """Give it what no other host has."""
    root = record.mount
    (root / "etc/hostname").write_text(f"{record.name}\n")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{record.address} {record.name}\n")
    (root / "etc/machine-id").write_text(f"{uuid.uuid4().hex}\n")
    generate_key(root / "etc/ssh/ssh_host_ed25519_key", record.name, root=root)
    public_key = make_ssh_key().with_suffix(".pub").read_text()
    for home in (root / "root", *(root / "home" / user for user in PASSWORDS)):
        owner = home.stat()
        directory = home / ".ssh"
        directory.mkdir(mode=0o700, exist_ok=True)
        (directory / "authorized_keys").write_text(public_key)
        for path in (directory, directory / "authorized_keys"):
            os.chown(path, owner.st_uid, owner.st_gid)
    if not python:
        for path in (root / "usr/bin").glob("python3*"):
            path.unlink()


def describe(record: Record) -> dict[str, Any]:
    """Return what a person or a program wants to know of a host."""
    boots, is_on = read_state(record)
    return {
        "name": record.name,
        "address": record.address,
        "release": record.release,
        "init": record.init,
        "is_on": is_on,
        "is_cut": has_flag(record, "cut"),
        "boots": boots,
        "root": str(record.mount),
        "owner_pid": record.owner.pid if record.owner is not None else None,
        "state_dir": str(STATE_DIR),
    }
