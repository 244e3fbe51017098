"""What the README and docs/operations.md tell people to paste on a host, pasted on a host."""

from tests.e2e.conftest import BootHost
from tests.support.api import Api
from tests.support.hosts import Host
from tests.support.installed import blocks_of, enrol, run, traces


async def paste(host: Host, block: str, url: str, key: str) -> str:
    return await run(host, f"set -eu; URL={url} KEY={key}\n{block}")


async def test_installation_upgrade_and_uninstallation_as_documented(boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host("bookworm")
    agent_id, key, _ = await enrol(e2e_api, "documented")
    blocks = blocks_of("docs/operations.md")
    assert set(blocks) == {"install", "monitor", "status", "upgrade", "pinned", "uninstall", "purge"}
    await paste(host, blocks["install"], e2e_api.url, key)
    await e2e_api.wait_for_agent(agent_id)
    assert agent_id in await paste(host, blocks["status"], e2e_api.url, key)
    await paste(host, blocks["upgrade"], e2e_api.url, key)
    await paste(host, blocks["uninstall"], e2e_api.url, key)
    assert traces(host) == ["/etc/fleetwire", "/var/lib/fleetwire-agent"]
    await paste(host, blocks["monitor"], e2e_api.url, key)
    await e2e_api.wait_for_agent(agent_id)
    assert "monitor" in host.exec("cat /etc/fleetwire/agent.toml").stdout
    await paste(host, blocks["purge"], e2e_api.url, key)
    assert traces(host) == []


async def test_the_readme_as_pasted(boot_host: BootHost, e2e_api: Api) -> None:
    host = boot_host("trixie")
    agent_id, key, _ = await enrol(e2e_api, "readme")
    blocks = blocks_of("README.md")
    said = await paste(host, blocks["install"], e2e_api.url, key)
    assert "connected" in said.splitlines()[-1]
    await e2e_api.wait_for_agent(agent_id)
    said = await paste(host, blocks["purge"], e2e_api.url, key)
    assert agent_id in said
    assert traces(host) == []
