"""An agent installed on a real host by its own script, and what it leaves there."""

import asyncio
import re
import shlex
from typing import Any

from aiohttp import FormData
from tests.support.api import Api
from tests.support.eventually import eventually
from tests.support.hosts import Host
from tests.support.processes import ROOT

PATHS = (
    "/opt/fleetwire-agent",
    "/usr/local/bin/fleetwire-agent",
    "/etc/fleetwire",
    "/etc/systemd/system/fleetwire-agent.service",
    "/etc/systemd/system/multi-user.target.wants/fleetwire-agent.service",
    "/var/lib/fleetwire-agent",
)

_PROBES = (
    "getent passwd fleetwire-agent",
    "getent group fleetwire-agent",
    "pgrep -af 'fleetwire[-_]agent'",
    "command -v systemctl >/dev/null && systemctl list-units --all --plain --no-legend 'fleetwire*'",
    "ls -d /tmp/fleetwire* /var/tmp/fleetwire* /run/fleetwire* /run/credentials/fleetwire* /home/*/fleetwire*",
)


_BLOCK = re.compile(r"^<!-- on a host: (\w+) -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page: str) -> dict[str, str]:
    """Return what a page of the documentation has people paste on a host, by name."""
    return dict(_BLOCK.findall((ROOT / page).read_text()))


async def enrol(api: Api, label: str) -> tuple[str, str, str]:
    """Return the id, the key and the install line of a new agent."""
    answer = await api.post("/api/agents", {"label": label}, status=201)
    return answer["agent_id"], answer["key"], answer["install_command"]


def with_options(line: str, *words: str) -> str:
    """Return the install line with options for the script."""
    return line.replace("| bash", f"| bash -s -- {shlex.join(words)}")


async def run(host: Host, line: str, *, expect: int | None = 0) -> str:
    """Run a line in the host's root shell, as a person would paste it; return what it said on both streams.

    Args:
        expect: the exit status it must have; None for any but 0."""
    result = await asyncio.to_thread(host.exec, f"exec 2>&1; {line}", check=False, timeout=180)
    right = result.returncode != 0 if expect is None else result.returncode == expect
    assert right, f"{line}: status {result.returncode}\n{result.stdout}{result.stderr}"
    return str(result.stdout)


async def install(api: Api, host: Host, *words: str, label: str | None = None) -> str:
    """Enrol the host and run its install line; return the agent's id once it is online."""
    agent_id, _, line = await enrol(api, label or host.name)
    await run(host, with_options(line, *words) if words else line)
    await api.wait_for_agent(agent_id)
    return agent_id


def make_form(dest: str, content: bytes) -> FormData:
    """Return the body of an upload."""
    form = FormData({"dest": dest})
    form.add_field("file", content, filename="file")
    return form


async def wait_for_version(api: Api, agent_id: str, version: str) -> Any:
    """Return the agent's detail once it is online in that version."""
    return await eventually(
        lambda: api.get(f"/api/agents/{agent_id}"),
        lambda agent: agent["status"] == "online" and agent["version"] == version,
        timeout_seconds=30,
    )


def traces(host: Host) -> list[str]:
    """Return what there is of an agent on the host: files, units, users, processes."""
    tests = "; ".join(f"if [ -e {path} ] || [ -L {path} ]; then echo {path}; fi" for path in PATHS)
    script = "; ".join((tests, *(f"{{ {probe}; }} 2>/dev/null" for probe in _PROBES), "true"))
    return [line for line in host.exec(["sh"], input=script).stdout.splitlines() if line.strip()]
