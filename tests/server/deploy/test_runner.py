"""The runner against a real SSH server: which host keys it believes, how it installs, and what it leaves."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import asyncssh
import pytest
from tests.server.deploy.conftest import Side, Site, SshServer, generate, running_ssh_server

from fleetwire_server.deploy.errors import DeployError
from fleetwire_server.deploy.order import Order, Terms
from fleetwire_server.deploy.runner import deploy_to_host
from fleetwire_server.deploy.ssh_keys import public_key_of


@pytest.fixture
def host_key() -> asyncssh.SSHKey:
    return generate()


@pytest.fixture
async def ssh_server(site: Site, host_key: asyncssh.SSHKey) -> AsyncIterator[SshServer]:
    async with running_ssh_server([host_key], site.user_key) as server:
        yield server


async def failure(order: Order, terms: Terms, side: Side | None = None) -> DeployError:
    with pytest.raises(DeployError) as caught:
        async with asyncio.timeout(60):
            await deploy_to_host(order, terms, side or Side())
    return caught.value


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


def line_of(key: asyncssh.SSHKey) -> str:
    return public_key_of(key).line


def leftovers() -> set[Path]:
    return set(Path("/tmp").glob("fleetwire-deploy.*"))


# ------------------------------------------------------------ from nothing to installed


@pytest.mark.parametrize("has_sftp", [True, False])
async def test_an_agent_is_installed_and_nothing_else_stays(site: Site, *, has_sftp: bool) -> None:
    before, key = leftovers(), generate()
    async with running_ssh_server([key], site.user_key, has_sftp=has_sftp) as server:
        side = Side()
        deployed = await deploy_to_host(site.order(server), site.terms, side)
    assert (deployed.agent_id, deployed.key) == (side.agent_id, side.key)
    assert deployed.host_key == key.get_fingerprint()
    assert leftovers() == before
    install, stdin = site.seen.splitlines()
    assert install.startswith("install --json --server http://127.0.0.1:8420 --key-file - --profile manage --python /")
    assert stdin == f"stdin {side.key}"
    said = f"{server.commands} {side.notes}"
    assert side.key not in said, "the key is on standard input, and nowhere else"
    assert [step for step, _ in side.notes] == [
        *("key", "connect", "login", "facts", "check", "upload", "install"),
        "connected",
    ]


async def test_a_failed_installation_says_what_the_host_said(ssh_server: SshServer, site: Site) -> None:
    before = leftovers()
    for reason, told in {
        "no_route": "no_route",
        "disk_full": "disk_full",
        "other_identity": "already_managed",
        "key_refused": "not_connected",
        "busy": "busy",
        "a new one": "install_failed",
    }.items():
        body = f'if sys.argv[1] == "install": say(result="failed", reason="{reason}", detail="so it is", agent_id=None)'
        error = await failure(site.order(ssh_server), site.with_body(body))
        assert (error.step, error.reason) == ("check" if told == "already_managed" else "install", told)
        assert "so it is" in error.message or told == "already_managed"
    assert "uninstall" not in site.seen, "the installer has undone what it did"
    assert leftovers() == before


async def test_an_installer_that_dies_is_undone(ssh_server: SshServer, site: Site) -> None:
    body = 'if sys.argv[1] == "install": sys.exit("it broke")'
    error = await failure(site.order(ssh_server), site.with_body(body))
    assert (error.step, error.reason) == ("install", "install_failed")
    assert "it broke" in error.message
    assert "uninstall --purge" in site.seen


async def test_a_lost_connection_is_made_again_to_clean_up(ssh_server: SshServer, site: Site) -> None:
    before = leftovers()
    ssh_server.drops_at = " install --json"
    error = await failure(site.order(ssh_server), site.terms)
    assert (error.step, error.reason) == ("install", "connection_lost")
    assert "could not be taken back" not in error.message
    assert "uninstall --purge" in site.seen
    assert len(ssh_server.connections) == 2
    assert leftovers() == before


async def test_a_host_that_is_gone_for_good_is_told_of(site: Site, host_key: asyncssh.SSHKey) -> None:
    async with running_ssh_server([host_key], site.user_key) as server:
        server.is_gone = True

        class Leaving(Side):
            async def enrol(self) -> tuple[str, str]:
                server.drops_at = ""  # whatever comes
                server.connections[0].abort()
                return await super().enrol()

        error = await failure(site.order(server), site.terms, Leaving())
    assert error.reason == "connection_lost"
    assert "run there as root: rm -rf /tmp/fleetwire-deploy." in error.message
    for path in leftovers():
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


async def test_a_cancelled_deployment_ends_the_installer_and_cleans_up(ssh_server: SshServer, site: Site) -> None:
    before, side = leftovers(), Side()
    body = 'if sys.argv[1] == "install": time.sleep(60)'
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        task = group.create_task(deploy_to_host(site.order(ssh_server), site.with_body(body), side))
        while not any(step == "install" for step, _ in side.notes):
            await asyncio.sleep(0.02)
        task.cancel()
    assert task.cancelled()
    assert "uninstall --purge" in site.seen
    assert leftovers() == before


async def test_a_host_that_prints_without_end_is_left(ssh_server: SshServer, site: Site) -> None:
    body = 'while sys.argv[1] == "install": print("x" * 1000)'
    error = await failure(site.order(ssh_server), site.with_body(body))
    assert error.reason == "ssh"
    assert "256 KiB" in error.message


# ------------------------------------------------------------ the way to the host


async def test_a_host_that_cannot_be_reached(site: Site) -> None:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        refused = await failure(site.order(own.getsockname()[1]), site.terms)
    assert (refused.step, refused.reason) == ("connect", "unreachable")
    assert "refuses connections" in refused.message
    unknown = await failure(site.order(22, host="no-such-host.invalid"), site.terms)
    assert (unknown.step, unknown.reason) == ("connect", "unreachable")
    assert "there is no host no-such-host.invalid" in unknown.message


async def test_what_is_no_ssh_server(site: Site) -> None:
    ended = asyncio.Event()

    async def speak(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.org ESMTP\r\n" * 200)
        await close(writer)
        ended.set()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as other:
        error = await failure(site.order(other.sockets[0].getsockname()[1]), site.terms)
        await ended.wait()
    assert (error.step, error.reason) == ("login", "ssh")


async def test_a_host_that_says_nothing_is_given_up(site: Site) -> None:
    ended = asyncio.Event()

    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await close(writer)
        ended.set()

    async with await asyncio.start_server(be_silent, "127.0.0.1", 0) as other:
        error = await failure(site.order(other.sockets[0].getsockname()[1]), site.terms)
        await ended.wait()
    assert (error.step, error.reason) == ("connect", "unreachable")
    assert "within 15 s" in error.message


async def test_a_key_that_is_not_accepted_is_named(ssh_server: SshServer, site: Site) -> None:
    other = generate()
    other.write_private_key(str(site.terms.key_directory / "other"))
    side = Side()
    error = await failure(site.order(ssh_server, ssh_user="ops", ssh_key="other"), site.terms, side)
    assert (error.step, error.reason) == ("login", "ssh_auth")
    assert f"ops@127.0.0.1 does not accept the key {other.get_fingerprint()}" in error.message
    assert side.pinned is None


# ------------------------------------------------------------ host keys


async def test_the_first_key_is_pinned_and_another_refused_before_anything_is_sent(site: Site) -> None:
    first, second, side = generate(), generate(), Side()
    async with running_ssh_server([first], site.user_key) as server:
        await deploy_to_host(site.order(server), site.terms, side)
    assert side.pinned is not None
    assert (side.pinned.public_key, side.pinned.fingerprint) == (line_of(first), first.get_fingerprint())
    async with running_ssh_server([second], site.user_key) as server:
        error = await failure(site.order(server), site.terms, side)
        assert server.logins == []
    assert (error.step, error.reason, error.code) == ("host_key", "host_key_changed", "conflict")
    assert error.more == {
        "expected_fingerprint": first.get_fingerprint(),
        "shown_fingerprint": second.get_fingerprint(),
    }
    assert "DELETE /api/host-keys/" in error.message


@pytest.mark.parametrize("pinned", ["ecdsa-sha2-nistp256", "ssh-rsa", "ssh-ed25519"])
async def test_a_key_of_another_type_besides_is_no_change(pinned: str, site: Site) -> None:
    old, side = generate(pinned), Side()
    async with running_ssh_server([old], site.user_key) as server:
        await deploy_to_host(site.order(server), site.terms, side)
    others = [generate(name) for name in ("ssh-ed25519", "ecdsa-sha2-nistp384") if name != pinned]
    async with running_ssh_server([*others, old], site.user_key) as server:
        deployed = await deploy_to_host(site.order(server), site.terms, side)
    assert deployed.host_key == old.get_fingerprint()
    async with running_ssh_server(others, site.user_key) as server:  # but in its place it is one
        assert (await failure(site.order(server), site.terms, side)).reason == "host_key_changed"


async def test_a_key_that_must_be_known_and_is_not(
    ssh_server: SshServer, site: Site, host_key: asyncssh.SSHKey
) -> None:
    terms = site.with_terms(host_key_rule="pinned")
    error = await failure(site.order(ssh_server), terms)
    assert (error.step, error.reason, error.code) == ("host_key", "host_key_unknown", "conflict")
    assert error.more == {"shown_fingerprint": host_key.get_fingerprint()}
    assert ssh_server.logins == []
    for known in (host_key.get_fingerprint(), line_of(host_key), f"{line_of(host_key)} root@web-01"):
        side = Side()
        await deploy_to_host(site.order(ssh_server, host_key=known), terms, side)
        assert side.pinned is not None, "from now on it is known"


async def test_a_key_that_the_request_does_not_expect(ssh_server: SshServer, site: Site) -> None:
    other = generate()
    error = await failure(site.order(ssh_server, host_key=other.get_fingerprint()), site.terms)
    assert error.reason == "host_key_changed"
    assert error.more["expected_fingerprint"] == other.get_fingerprint()
    error = await failure(site.order(ssh_server, host_key="MD5:00:11"), site.terms)
    assert (error.reason, error.code) == ("host_key_invalid", "invalid")
    assert ssh_server.logins == []


def hashed(name: str) -> str:
    salt = b"0123456789abcdefghij"
    digest = hmac.new(salt, name.encode(), hashlib.sha1).digest()
    return f"|1|{base64.b64encode(salt).decode()}|{base64.b64encode(digest).decode()}"


async def test_known_hosts_is_believed_and_a_key_it_does_not_have_is_refused(
    ssh_server: SshServer, site: Site, host_key: asyncssh.SSHKey
) -> None:
    other, name = generate(), f"[127.0.0.1]:{ssh_server.port}"
    pinned_only = site.with_terms(host_key_rule="pinned")
    for entry in (name, hashed(name), "[127.0.0.*]:*"):
        site.terms.known_hosts.write_text(f"# a comment\n\n{entry} {line_of(host_key)} a comment\n")
        side = Side()
        await deploy_to_host(site.order(ssh_server), pinned_only, side)
        assert side.pinned is None, "known_hosts is where it is changed"
        site.terms.known_hosts.write_text(f"{entry} {line_of(other)}\n")
        ssh_server.logins.clear()
        error = await failure(site.order(ssh_server), site.terms)
        assert error.reason == "host_key_changed"
        assert error.more["expected_fingerprint"] == other.get_fingerprint()
        assert "known_hosts" in error.message
        assert ssh_server.logins == []
    site.terms.known_hosts.write_text(f"127.0.0.1 {line_of(other)}\n")  # another SSH server of that host
    await deploy_to_host(site.order(ssh_server), site.terms, Side())
    site.terms.known_hosts.write_text(f"@revoked {name} {line_of(host_key)}\n")
    assert "revoked" in (await failure(site.order(ssh_server), site.terms)).message
    site.terms.known_hosts.write_text("@nonsense x y\n")
    assert "cannot be used" in (await failure(site.order(ssh_server), site.terms)).message


async def test_pinned_and_known_hosts_must_agree(site: Site, host_key: asyncssh.SSHKey) -> None:
    other, side = generate(), Side()
    async with running_ssh_server([host_key], site.user_key) as server:
        await deploy_to_host(site.order(server), site.terms, side)
        site.terms.known_hosts.write_text(f"[127.0.0.1]:{server.port} {line_of(other)}\n")
        assert (await failure(site.order(server), site.terms, side)).reason == "host_key_changed"


async def test_a_host_certificate_is_believed_of_an_authority_of_known_hosts_only(site: Site) -> None:
    authority, host, imposter = generate(), generate(), generate()
    certificate = authority.generate_host_certificate(host, "web-01", principals=["127.0.0.1"])
    wrong = imposter.generate_host_certificate(host, "web-01", principals=["127.0.0.1"])
    terms = site.with_terms(host_key_rule="pinned")
    async with running_ssh_server([(host, certificate)], site.user_key) as server:
        site.terms.known_hosts.write_text(f"@cert-authority * {line_of(authority)}\n")
        side = Side()
        order = site.order(server)
        site.terms.known_hosts.write_text(f"@cert-authority [127.0.0.1]:{server.port} {line_of(authority)}\n")
        await deploy_to_host(order, terms, side)
        assert side.pinned is None
    async with running_ssh_server([host], site.user_key, port=order.port) as server:  # without its certificate
        error = await failure(order, site.terms)
        assert error.reason == "host_key_unknown"
        assert server.logins == []
    async with running_ssh_server([(host, wrong)], site.user_key, port=order.port) as server:
        error = await failure(order, terms)
        assert error.reason == "host_key_changed"
        assert server.logins == []
    site.terms.known_hosts.unlink()
    async with running_ssh_server([(host, certificate)], site.user_key) as server:  # its plain key will do
        await deploy_to_host(site.order(server), site.terms, Side())


async def test_of_two_that_race_the_first_pins(ssh_server: SshServer, site: Site) -> None:
    other = Side()
    key = generate()
    await other.pin(public_key_of(key))

    class Late(Side):
        async def get_pinned(self) -> None:
            return None  # read before the other one pinned

    late = Late(pinned=other.pinned)
    error = await failure(site.order(ssh_server), site.terms, late)
    assert error.reason == "host_key_changed"
    assert not ssh_server.commands
