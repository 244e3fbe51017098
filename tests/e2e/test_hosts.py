"""Test hosts are as good and as bad as they say, and nothing of them is left."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scripts.lib.testhost import operations
from scripts.lib.testhost.groups import list_processes
from scripts.lib.testhost.network import cable_of, namespace_of
from scripts.lib.testhost.records import Record, list_records, read_keeper
from tests.support.host_fixtures import BootHost
from tests.support.hosts import BRIDGE_ADDRESS, PASSWORDS, SSH_KEY, Host, HostError
from tests.support.processes import ROOT

pytestmark = pytest.mark.timeout(300)


def log_in(host: Host, user: str, command: str, *, answer: str = "") -> subprocess.CompletedProcess[str]:
    options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "BatchMode=yes", "LogLevel=ERROR"]
    settings = [word for option in options for word in ("-o", option)]
    argv = ["ssh", "-F", "none", "-i", str(SSH_KEY), *settings, f"{user}@{host.address}", command]
    return subprocess.run(argv, input=answer, capture_output=True, text=True, check=False, timeout=30)


def boot_id(host: Host) -> str:
    return host.exec("cat /proc/sys/kernel/random/boot_id").stdout


def traces(record: Record) -> list[str]:
    """Return what this machine still has of a host: processes, mounts, cable, namespace, files."""
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    return [
        *map(str, list_processes(record.group)),
        *(line for line in Path("/proc/self/mounts").read_text().splitlines() if record.name in line),
        *(line for line in links.splitlines() if f"{cable_of(record.number)}@" in line),
        *(str(path) for path in Path("/run/netns").glob(namespace_of(record.number))),
        *(str(path) for path in (record.directory, record.disk, record.group) if path.exists()),
    ]


@pytest.mark.parametrize(
    ("release", "python"), [("bookworm", "Python 3.11"), ("trixie", "Python 3.13"), ("bullseye", "Python 3.9")]
)
def test_a_host_is_what_most_hosts_are(boot_host: BootHost, release: str, python: str) -> None:
    started_at = time.monotonic()
    host = boot_host(release)
    assert time.monotonic() - started_at < 20
    assert host.exec("hostname").stdout == f"{host.name}\n"
    assert host.exec("systemctl is-system-running --wait").stdout == "running\n"
    assert host.exec("python3 --version").stdout.startswith(python)
    for module in ("pip", "ensurepip"):
        assert host.exec(f"python3 -c 'import {module}'", check=False).returncode == 1
    assert "started" in host.exec("journalctl -b --no-pager | tr A-Z a-z").stdout
    assert float(host.exec("cut -d ' ' -f 1 /proc/uptime").stdout) < 60
    # What would hurt this machine or its neighbours is not allowed.
    assert host.exec("date -s 2020-01-01", check=False).returncode != 0
    assert time.time() > 1_700_000_000

    assert log_in(host, "root", "id -un").stdout == "root\n"
    assert log_in(host, "ops", "sudo -n id -un").stdout == "root\n"
    assert log_in(host, "opspw", "sudo -n id -un").returncode != 0
    assert log_in(host, "opspw", "sudo -S -p '' id -un", answer=f"{PASSWORDS['opspw']}\n").stdout == "root\n"
    refused = log_in(host, "nosudo", "sudo -S -p '' id -un", answer=f"{PASSWORDS['nosudo']}\n")
    assert "not in the sudoers" in refused.stderr


def test_hosts_of_other_kinds(boot_host: BootHost, tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("from here")
    openrc, bare = boot_host(init="openrc"), boot_host(init="none", binds=(tmp_path,))
    for host in (openrc, bare):
        assert host.exec("command -v systemctl", check=False).returncode != 0
        assert log_in(host, "ops", "sudo -n id -un").stdout == "root\n"
        before = boot_id(host)
        host.reboot()
        assert boot_id(host) != before
    assert "default" in openrc.exec("rc-status --all").stdout
    assert bare.exec(["cat", str(tmp_path / "shared")]).stdout == "from here"
    bare.exec(f"echo from there >{tmp_path}/shared")
    assert (tmp_path / "shared").read_text() == "from there\n"

    small = boot_host("trixie", disk_mib=64, python=False)
    assert small.exec("command -v python3", check=False).returncode != 0
    filled = small.exec("dd if=/dev/zero of=/opt/filler bs=1M count=100", check=False)
    assert "No space left" in filled.stderr
    assert 40 < (small.root / "opt/filler").stat().st_size / 1024**2 < 64
    with pytest.raises(HostError, match="not within 1 s"):
        small.exec("sleep 50", timeout=1)


def test_hosts_see_each_other_and_a_cut_is_silent(boot_host: BootHost) -> None:
    first, second = boot_host(), boot_host("trixie")
    connect = f"exec 3<>/dev/tcp/{second.address}/22; head -c 4 <&3"
    assert first.exec(["bash", "-c", connect]).stdout == "SSH-"
    second.cut()
    started_at = time.monotonic()
    cut_off = first.exec(["timeout", "2", "bash", "-c", connect], check=False)
    assert cut_off.returncode == 124, cut_off.stderr  # neither refused nor reset
    assert time.monotonic() - started_at > 1.9
    assert second.exec("echo still here").stdout == "still here\n"
    second.reboot()
    assert first.exec(["timeout", "2", "bash", "-c", connect], check=False).returncode in (1, 124)  # 1: no ARP answer
    second.heal()
    assert first.exec(["timeout", "10", "bash", "-c", f"until {connect}; do sleep 0.2; done"]).stdout == "SSH-"
    assert first.exec("ip route show default").stdout == ""


async def test_a_reboot_is_orderly_and_a_power_cut_is_not(boot_host: BootHost) -> None:
    host = boot_host()
    farewell = "[Service]\nExecStart=/bin/sleep infinity\nExecStopPost=/bin/sh -c 'echo stopped >>/root/farewell'\n"
    host.write("/etc/systemd/system/farewell.service", f"{farewell}[Install]\nWantedBy=multi-user.target\n")
    host.exec("systemctl enable --now farewell")
    first = boot_id(host)
    with _connection_from(host) as connection:
        await asyncio.to_thread(host.reboot)
        assert connection.recv(10) == b""  # the client was stopped, and its kernel said so
    assert boot_id(host) != first
    assert host.exec("cat /root/farewell").stdout == "stopped\n"
    assert "10.213." in host.exec("ip -4 -o addr show host0").stdout
    assert float(host.exec("cut -d ' ' -f 1 /proc/uptime").stdout) < 30

    host.exec("echo kept >/root/kept; sync")
    with _connection_from(host) as connection:
        await asyncio.to_thread(host.kill)
        assert not host.is_on
        assert (host.root / "root/kept").read_text() == "kept\n"
        with pytest.raises(TimeoutError):
            connection.recv(10)  # nobody heard of the end
        with pytest.raises(HostError, match="is off"):
            host.exec("true")
        await asyncio.to_thread(host.boot)
    assert host.exec("cat /root/farewell /root/kept").stdout == "stopped\nkept\n"


@contextmanager
def _connection_from(host: Host) -> Iterator[socket.socket]:
    """Accept a connection of a process on the host that says nothing and stays."""
    with socket.create_server((BRIDGE_ADDRESS, 0)) as listening:
        listening.settimeout(10)
        port = listening.getsockname()[1]
        client = f"exec 3<>/dev/tcp/{BRIDGE_ADDRESS}/{port}; read -r <&3"
        host.exec(["bash", "-c", f"systemd-run -q --collect bash -c {json.dumps(client)}"])
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(3)
            yield connection


def test_a_stopped_host_leaves_nothing(boot_host: BootHost) -> None:
    running, off, orphan = boot_host(), boot_host("trixie"), boot_host()
    assert traces(running.record) != []
    off.kill()
    keeper = read_keeper(orphan.record)
    assert keeper is not None
    os.kill(keeper.pid, signal.SIGKILL)
    for host in (running, off, orphan):
        host.stop()
        assert traces(host.record) == []
        host.stop()  # once more does no harm


def test_hosts_of_a_killed_owner_go_and_those_of_others_stay(boot_host: BootHost) -> None:
    mine = boot_host()
    script = (
        "import os, time\n"
        "from scripts.lib.testhost import operations\n"
        "operations.boot_host('bookworm', owner_pid=os.getpid())\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )

    def boot_of_another() -> tuple[subprocess.Popen[str], Record]:
        argv = [sys.executable, "-c", script]
        owner = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        records = [record for record in list_records() if record.owner is not None and record.owner.pid == owner.pid]
        return owner, records[0]

    def kill(owner: subprocess.Popen[str]) -> None:
        owner.kill()
        owner.communicate()

    # Its keeper sees to it at once.
    owner, theirs = boot_of_another()
    operations.stop_leftovers()
    assert traces(theirs) != []
    kill(owner)
    deadline = time.monotonic() + 20
    while traces(theirs) and time.monotonic() < deadline:
        time.sleep(0.05)  # another process does it
    assert traces(theirs) == []

    # With the keeper killed first, the next who boots a host does.
    owner, theirs = boot_of_another()
    keeper = read_keeper(theirs)
    assert keeper is not None
    os.kill(keeper.pid, signal.SIGKILL)
    kill(owner)
    assert traces(theirs) != []
    boot_host("trixie")
    assert traces(theirs) == []
    assert mine.exec("echo here").stdout == "here\n"
