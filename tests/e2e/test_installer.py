"""The installer where something goes wrong half-way: signals, power, a full disk, a reader that is gone, a bad version.

After a failure a new host is as if nothing had been, and an upgraded one runs what it ran before."""

import asyncio
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import BootHost
from tests.support.api import Api
from tests.support.bundles import build_bundle
from tests.support.eventually import eventually
from tests.support.hosts import Host
from tests.support.installed import traces

from fleetwire_agent.install.layout import LOG
from fleetwire_server.deploy.bundle import CARRIED_BUNDLE

BUNDLE = "/root/agent.pyz"
NEVER_CONNECTS = "\nasync def run_agent(config: object) -> None: await asyncio.sleep(3600)\n"
DIES = '\nasync def run_agent(config: object) -> None: raise RuntimeError("dies on purpose")\n'


@dataclass
class Subject:
    """A host, and the agent that is to be installed there."""

    host: Host
    agent_id: str
    key: str
    server: str

    def put(self, bundle: Path, path: str = BUNDLE) -> None:
        (self.host.root / path.removeprefix("/")).write_bytes(bundle.read_bytes())

    def line(self, *options: str, bundle: str = BUNDLE) -> str:
        words = f"python3 -I {bundle} install --json --server {self.server} --key-file /root/key {' '.join(options)}"
        return f"echo {self.key} >/root/key; {words}"

    async def install(self, *options: str, bundle: str = BUNDLE, expect: int = 0) -> dict[str, Any]:
        """Return the last line it said."""
        return await self.run(self.line(*options, bundle=bundle), expect=expect)

    async def run(self, script: str, *, expect: int | None = None) -> dict[str, Any]:
        """Run a script that prints what the installer said; return the last line of it."""
        result = await asyncio.to_thread(self.host.exec, ["sh"], input=script, check=False, timeout=100)
        assert expect in (None, result.returncode), result.stdout + result.stderr
        answer: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
        assert expect is None or (answer["result"] == "failed") == (expect == 1)
        return answer

    def status(self) -> str:
        return self.host.exec("fleetwire-agent status", check=False).stdout

    async def purge(self) -> None:
        await self.run(f"python3 -I {BUNDLE} uninstall --purge --json", expect=0)
        assert self.traces() == []

    def traces(self) -> list[str]:
        return [trace for trace in traces(self.host) if not trace.startswith(str(LOG))]


async def make_subject(host: Host, api: Api) -> Subject:
    agent_id, key = await api.enrol(host.name)
    subject = Subject(host, agent_id, key, api.url)
    subject.put(CARRIED_BUNDLE)
    return subject


@pytest.mark.parametrize("init", ["systemd", "none"])
async def test_what_is_interrupted_is_undone_and_what_is_killed_is_mended(
    init: str, boot_host: BootHost, e2e_api: Api
) -> None:
    subject = await make_subject(boot_host("bookworm", init=init), e2e_api)
    began = time.monotonic()
    await subject.install()
    install_seconds = time.monotonic() - began  # how far it is at a moment depends on the machine
    await subject.purge()
    for signal, share in (("TERM", 0.3), ("INT", 0.45), ("HUP", 0.6), ("TERM", 0.75)):
        assert await interrupt(subject, signal, share * install_seconds), f"{signal} always came too late"
    for share in (0.5, 0.75):
        after_seconds = share * install_seconds
        script = f"({subject.line()}) >/dev/null & sleep {after_seconds}; pkill -KILL -f '^python3 -I {BUNDLE} install'"
        await subject.run(f"{script}; wait; echo '{{\"result\": null}}'")
        answer = await subject.install()
        assert answer["agent_id"] == subject.agent_id
        left = "ls -a /opt/fleetwire-agent /opt/fleetwire-agent/versions /etc/fleetwire /usr/local/bin"
        assert not {".pending", "unpacking"} & set(subject.host.exec(left).stdout.replace("-", " ").split())
        await subject.purge()


async def interrupt(subject: Subject, signal: str, after_seconds: float) -> bool:
    """Interrupt an installation, earlier each time it was done before; return whether one was struck and undone."""
    for _ in range(5):
        # setsid: a shell's background job has SIGINT switched off. Status 130 and so on: before it had begun.
        script = f"({subject.line()} >/root/said; echo $? >/root/status) & sleep {after_seconds};"
        script += (
            f" pkill -{signal} -f '^python3 -I {BUNDLE} install'; wait; cat /root/said; echo '{{\"result\": null}}'"
        )
        await subject.run(script.replace("python3 -I", "setsid -w python3 -I", 1))
        status = subject.host.exec("cat /root/status").stdout.strip()
        if status != "0":
            assert subject.traces() == [], f"{signal} after {after_seconds} s: {status}"
            return True
        await subject.purge()
        after_seconds *= 0.7
    return False


async def test_two_at_once_and_a_reader_that_is_gone(boot_host: BootHost, e2e_api: Api, tmp_path: Path) -> None:
    subject = await make_subject(boot_host("trixie"), e2e_api)
    subject.put(CARRIED_BUNDLE, "/root/other.pyz")
    lines = (subject.line(), subject.line(bundle="/root/other.pyz"))
    answers = await asyncio.gather(*(subject.run(line) for line in lines))
    assert sorted((answer["result"], answer["reason"]) for answer in answers) == [
        ("failed", "busy"),
        ("installed", None),
    ]
    assert (await subject.install())["result"] == "unchanged"

    build_bundle(tmp_path / "mute.pyz", version="0.6.0", main_end=NEVER_CONNECTS)
    subject.put(tmp_path / "mute.pyz")
    # Whoever runs it over SSH loses the link while it waits: the server takes that for a failure, so it must be one.
    await subject.run(f"({subject.line()}) | head -n 3 >/dev/null; sleep 4; echo '{{\"result\": null}}'")
    assert subject.status().startswith(f"connected to {subject.server} as {subject.agent_id}")
    assert "0.6.0" not in subject.host.exec("ls /opt/fleetwire-agent/versions").stdout


async def test_a_disk_that_fills_half_way_leaves_nothing(boot_host: BootHost, e2e_api: Api) -> None:
    subject = await make_subject(boot_host("bookworm", disk_mib=64), e2e_api)
    reasons = set()
    for after_seconds in (0.0, 0.9, 1.2):
        fill = f"sleep {after_seconds}; head -c 100M /dev/zero >/var/filler 2>/dev/null"
        script = f"({fill}) & {subject.line('--wait-seconds', '3')} >/run/said; wait; rm /var/filler; cat /run/said"
        answer = await subject.run(script.replace("/root/key", "/run/key"))
        reasons.add(answer["reason"])
        if answer["result"] == "failed":
            assert answer["reason"] == "disk_full", answer["detail"]
            assert subject.traces() == [], f"after {after_seconds} s: {answer['detail']}"
        else:
            await subject.run(f"python3 -I {BUNDLE} uninstall --purge --json", expect=0)
    assert "disk_full" in reasons
    assert (await subject.install())["result"] == "installed"


@pytest.mark.parametrize("init", ["systemd", "openrc", "none"])
async def test_a_version_that_does_not_work_goes_back_whatever_starts_it(
    init: str, boot_host: BootHost, e2e_api: Api, tmp_path: Path
) -> None:
    subject = await make_subject(boot_host("bookworm", init=init), e2e_api)
    before = (await subject.install())["version"]
    kept = "sha256sum /etc/fleetwire/* /usr/local/bin/fleetwire-agent; readlink /opt/fleetwire-agent/current"
    was = subject.host.exec(kept).stdout
    bad = (("dies", DIES, "dies on purpose"), ("mute", NEVER_CONNECTS, "did not connect"))
    for name, end, words in bad if init == "systemd" else bad[:1]:
        version = build_bundle(tmp_path / name, version="0.5.0", main_end=end)
        subject.put(tmp_path / name)
        answer = await subject.install("--wait-seconds 3", "--profile monitor", expect=1)
        assert answer["reason"] == "not_connected"
        assert words in answer["detail"]
        assert answer["detail"].endswith(f"version {before} is connected again")
        assert version not in subject.host.exec("ls /opt/fleetwire-agent/versions").stdout
        assert subject.host.exec(kept).stdout == was
        assert subject.host.exec("getent passwd fleetwire-agent", check=False).stdout == ""
    assert (await e2e_api.run(subject.agent_id, "id -u"))["output"] == "0\n"

    # A profile is changed both ways, and its user comes and goes.
    subject.put(CARRIED_BUNDLE)
    await subject.install("--profile monitor")
    owner = subject.host.exec("stat -c %U /var/lib/fleetwire-agent /proc/$(pgrep -f '[c]urrent run')").stdout
    assert owner == "fleetwire-agent\n" * 2
    assert (await subject.install())["result"] == "unchanged", "the profile stays as it is"
    await subject.install("--profile manage")
    assert subject.host.exec("getent passwd fleetwire-agent", check=False).stdout == ""
    assert subject.host.exec("stat -c %U /var/lib/fleetwire-agent/status.json").stdout == "root\n"


async def test_a_hostile_environment_changes_nothing(boot_host: BootHost, e2e_api: Api) -> None:
    subject = await make_subject(boot_host("trixie"), e2e_api)
    subject.host.exec(
        "mount -t tmpfs -o noexec none /opt; mount --bind /usr/local /usr/local; mount -o remount,ro,bind /usr/local"
    )
    hostile = "umask 777; cd /proc; PATH=/nonexistent LC_ALL=xx PYTHONPATH=/root PYTHONHOME=/root /usr/bin/python3 -I"
    answer = await subject.run(subject.line().replace("python3 -I", hostile, 1), expect=0)
    assert answer["result"] == "installed"
    wrong = r"find /opt/fleetwire-agent \( -type f ! -perm 644 -o -type d ! -perm 755 \)"
    assert subject.host.exec(wrong).stdout == ""
    assert subject.host.exec("stat -c %a /etc/fleetwire /etc/fleetwire/agent.key").stdout == "700\n600\n"
    # The native module could not be mapped from there; it is loaded through memory.
    read = partial(e2e_api.get, f"/api/agents/{subject.agent_id}")
    await eventually(read, lambda agent: agent["status"] == "online" and agent["metrics"] is not None)
