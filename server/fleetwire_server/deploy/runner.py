"""The deployment to one host, from the key to log in with to an agent that has dialled in.

Whatever fails, nothing of it is left on the host. Imports asyncssh, which costs 30 MB and 0.4 s: import this module
only when there is something to deploy."""

import asyncio
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fleetwire_server.deploy.errors import DeployError, deploy_error
from fleetwire_server.deploy.facts import (
    FACTS_SCRIPT,
    IDENTITY_SCRIPT,
    HostFacts,
    is_line_unread,
    parse_facts,
    parse_identity,
)
from fleetwire_server.deploy.host_keys import KnownKeys, judge_host_key
from fleetwire_server.deploy.order import Deployed, Order, ServerSide, Terms
from fleetwire_server.deploy.plan import (
    BUNDLE_NAME,
    CHECK,
    Plan,
    already_managed,
    build_clean_up,
    build_install,
    build_root_command,
    check_route,
    judge_sudo,
    plan_installation,
    route_advice,
)
from fleetwire_server.deploy.ssh import Login, SshHost, last_line, log_in, open_socket
from fleetwire_server.deploy.ssh_keys import (
    parse_expected_key,
    public_key_of,
    read_known_hosts,
    read_private_key,
)
from fleetwire_shared.errors import FleetwireError

logger = logging.getLogger(__name__)

FACTS_SECONDS = 20.0
SUDO_SECONDS = 20.0
UPLOAD_SECONDS = 120.0
INSTALL_SECONDS = 120.0
ARRIVAL_SECONDS = 15.0
"""How long the agent may take to be seen here once its host says that it is connected."""
CLEAN_UP_SECONDS = 60.0
"""An installer that is ended takes back what it did, which includes starting the agent before."""

MAX_DETAIL_CHARACTERS = 1000

_REASON_OF_INSTALLER: Mapping[str, str] = {
    "not_root": "no_sudo",
    "unsupported": "unsupported",
    "other_identity": "already_managed",
    "no_route": "no_route",
    "tls": "tls",
    "key_refused": "not_connected",
    "not_connected": "not_connected",
    "disk_full": "disk_full",
    "busy": "busy",
}
"""What the installer reports as its reason, as it is told here; any other is `install_failed`."""


async def deploy_to_host(order: Order, terms: Terms, server: ServerSide) -> Deployed:
    """Install an agent on the host and return when it has dialled in.

    Raises:
        DeployError: why not. What was done on the host is taken back, or the error says what is left."""
    server.note("key", f"reading {order.ssh_key or 'the key'}")
    login = await _prepare_login(order, terms, server)
    server.note("connect", f"dialling {order.where}")
    host = await _dial(login)
    try:
        await _pin(host, server)
        server.note("login", f"logged in as {order.ssh_user} to a host with the key {host.host_key.fingerprint}")
        return await _install(host, order, terms, server)
    finally:
        await host.close()


async def _prepare_login(order: Order, terms: Terms, server: ServerSide) -> Login:
    key = await asyncio.to_thread(read_private_key, order.ssh_key, terms.key_directory)
    expected = None if order.host_key is None else parse_expected_key(order.host_key)
    # The file is matched by the name that was asked for, and by nothing a name server says.
    listed = await asyncio.to_thread(read_known_hosts, terms.known_hosts, order.host, order.port)
    known = KnownKeys(
        expected=expected,
        pinned=await server.get_pinned(),
        listed=tuple(public_key_of(one) for one in listed.listed),
        revoked=tuple(public_key_of(one) for one in listed.revoked),
        has_authority=bool(listed.authorities),
    )
    return Login(
        order.host,
        order.port,
        order.ssh_user,
        key,
        known,
        listed,
        partial(judge_host_key, known=known, where=order.where, rule=terms.host_key_rule),
    )


async def _dial(login: Login) -> SshHost:
    return await log_in(login, await open_socket(login.host, login.port))


async def _pin(host: SshHost, server: ServerSide) -> None:
    """Pin the key of a host that nothing was known of.

    One that known_hosts vouches for, itself or by an authority, may be changed there."""
    known = host.login.known
    if known.pinned is not None or known.listed or (host.login.known_hosts.authorities and not known.expected):
        return
    pinned = await server.pin(host.host_key)
    if pinned.fingerprint != host.host_key.fingerprint:  # another deployment was first, and saw another key
        refusal = judge_host_key(host.host_key, KnownKeys(pinned=pinned), host.login.where, "pinned")
        if refusal is not None:
            raise refusal


# ------------------------------------------------------------ on the host


@dataclass(slots=True)
class _Leftovers:
    """What is on the host and must not stay there."""

    directory: str
    plan: Plan
    agent_id: str | None = None  # set while it is not known what the installer has done
    is_agent_kept: bool = False  # the new agent is there, or may be, in the place of another


async def _install(host: SshHost, order: Order, terms: Terms, server: ServerSide) -> Deployed:
    server.note("facts", "reading what the host is")
    facts = await _read_facts(host, order)
    plan = plan_installation(
        facts,
        order.ssh_user,
        has_sudo_password=order.sudo_password is not None,
        is_replacing=order.is_replacing,
    )
    check_route(terms.server_url, is_same_machine=host.is_this_machine)
    server.note(CHECK, f"{facts.os_name or facts.os_id or 'Linux'}, {facts.arch}, {facts.init}, {plan.python}")
    if plan.root_by == "sudo with password":
        await _try_sudo(host, plan, order)
    # Named here and not by mktemp, so that it can be removed also when the answer never comes; 128 random bits, and
    # mkdir refuses what is there already.
    directory = f"/tmp/fleetwire-deploy.{secrets.token_hex(16)}"  # noqa: S108
    leftovers = _Leftovers(directory, plan)
    try:
        deployed = await _install_bundle(host, order, terms, server, leftovers)
    except DeployError as err:
        problem = await _clean_up(host, order, server, leftovers)
        if problem is None:
            raise
        told = deploy_error(err.step, err.reason, f"{err.message}. {problem}", **err.more)
        told.is_agent_kept = leftovers.is_agent_kept
        raise told from err
    except BaseException:
        await _clean_up(host, order, server, leftovers)
        raise
    await _clean_up(host, order, server, leftovers)
    return deployed


async def _read_facts(host: SshHost, order: Order) -> HostFacts:
    ran = await host.run("facts", "sh -s", stdin=FACTS_SCRIPT.encode(), seconds=FACTS_SECONDS)
    facts = parse_facts(ran.stdout)
    if facts is None:
        raise deploy_error(
            "facts",
            "no_shell",
            f"{order.ssh_user}@{order.host} logs in and runs no commands: give that user a shell, or deploy as another"
            f" user; the host said: {last_line(ran.stderr or ran.stdout)}",
        )
    return facts


async def _try_sudo(host: SshHost, plan: Plan, order: Order) -> None:
    """See that sudo takes the password, before anything else is sent to it: refused, it would read on for another."""
    command = build_root_command(plan.root_by, ["sh", "-c", IDENTITY_SCRIPT])
    ran = await host.run("sudo", command, stdin=_sudo_line(plan, order), seconds=SUDO_SECONDS)
    judge_sudo(ran.exit_status, ran.stderr, order.ssh_user)
    if is_line_unread(ran.stdout):
        raise deploy_error(
            CHECK,
            "sudo_password",
            f"sudo let {order.ssh_user} in without reading the sudo_password: deploy without one, or as another user",
        )
    agent_id = parse_identity(ran.stdout)
    if agent_id is not None and not order.is_replacing:
        raise already_managed(agent_id)


def _sudo_line(plan: Plan, order: Order) -> bytes:
    return f"{order.sudo_password}\n".encode() if plan.root_by == "sudo with password" else b""


async def _install_bundle(
    host: SshHost, order: Order, terms: Terms, server: ServerSide, leftovers: _Leftovers
) -> Deployed:
    await _send_bundle(host, terms, server, leftovers.directory)
    agent_id, key = await server.enrol()
    leftovers.agent_id = agent_id
    await _run_installer(host, order, terms, server, leftovers, key)
    try:
        async with asyncio.timeout(ARRIVAL_SECONDS):
            await server.wait_connected(agent_id)
    except TimeoutError as err:
        raise deploy_error(
            "connected",
            "not_connected",
            f"the host says that the agent is connected to {terms.server_url}, and it is not connected to this server:"
            f" {route_advice(terms.server_url)}",
        ) from err
    leftovers.agent_id = None
    server.note("connected", f"{agent_id} has dialled in")
    return Deployed(agent_id, key, host.host_key.fingerprint)


async def _send_bundle(host: SshHost, terms: Terms, server: ServerSide, directory: str) -> None:
    bundle = terms.bundle
    server.note("upload", f"sending the agent {bundle.version}, {len(bundle.content) // 1024} KiB")
    made = await host.run("upload", f"mkdir -m 700 {directory}", seconds=FACTS_SECONDS)
    if made.exit_status != 0:
        is_full = "No space left" in made.stderr
        detail = f"the host makes no directory in /tmp: {last_line(made.stderr)}"
        raise deploy_error("upload", "disk_full" if is_full else "install_failed", detail)
    path = f"{directory}/{BUNDLE_NAME}"
    await host.upload("upload", path, bundle.content, seconds=UPLOAD_SECONDS)
    summed = await host.run("upload", f"sha256sum {path}", seconds=FACTS_SECONDS)
    if summed.exit_status == 0 and bundle.sha256 not in summed.stdout:  # not every host has sha256sum
        raise deploy_error(
            "upload", "install_failed", "the agent arrived damaged on the host: check its disk, and deploy again"
        )


async def _run_installer(
    host: SshHost, order: Order, terms: Terms, server: ServerSide, leftovers: _Leftovers, key: str
) -> None:
    """Run the installer and show its steps. Raises DeployError unless it says that the agent is connected."""
    results: list[dict[str, Any]] = []

    def take(line: str) -> None:
        try:
            report = json.loads(line)
        except ValueError:
            return
        if not isinstance(report, dict):
            return
        if "result" in report:
            results.append(report)
        elif "step" in report:
            server.note("install", f"{report['step']}: {report.get('detail', '')}"[:MAX_DETAIL_CHARACTERS])

    plan = leftovers.plan
    install = build_install(
        plan,
        leftovers.directory,
        terms.server_url,
        order.profile,
        terms.tls_pin,
        is_replacing=order.is_replacing,
    )
    ran = await host.run(
        "install",
        build_root_command(plan.root_by, install),
        stdin=_sudo_line(plan, order) + f"{key}\n".encode(),
        seconds=INSTALL_SECONDS,
        on_line=take,
    )
    result = results[-1] if results else {}
    if result.get("result") in ("installed", "upgraded", "unchanged"):
        return
    if not results:
        raise deploy_error(
            "install", "install_failed", f"the installation ended without a result: {last_line(ran.stderr)}"
        )
    leftovers.agent_id = None  # it has undone what it did
    raise _installer_error(result, terms.server_url)


def _installer_error(result: dict[str, Any], server_url: str) -> DeployError:
    said, reason = str(result.get("detail", ""))[:MAX_DETAIL_CHARACTERS], str(result.get("reason"))
    told = _REASON_OF_INSTALLER.get(reason, "install_failed")
    if told == "already_managed":
        return already_managed(None)  # it came between the facts and the installation
    advice = f": {route_advice(server_url)}" if told in ("no_route", "not_connected") else ""
    return deploy_error("install", told, f"the host says: {said}{advice}")


# ------------------------------------------------------------ afterwards


async def _clean_up(host: SshHost, order: Order, server: ServerSide, leftovers: _Leftovers) -> str | None:
    """Remove what is left on the host, over a new connection where the one there was is lost; None when it is done,
    else what a person must know."""
    undo = None if leftovers.agent_id is None else (leftovers.plan, leftovers.agent_id)
    if undo is not None:
        server.note("clean_up", "taking back what was done on the host")
    try:
        try:
            await _run_clean_up(host, order, leftovers, undo)
        except DeployError:
            again = await _dial(host.login)
            try:
                await _run_clean_up(again, order, leftovers, undo)
            finally:
                await again.close()
    except FleetwireError as err:
        logger.warning("deployment to %s: clean-up failed: %s", order.where, err.message)
        leftovers.is_agent_kept = undo is not None and order.is_replacing
        problem = _describe_rest(order, leftovers, undo)
    else:
        if not leftovers.is_agent_kept:
            return None
        problem = f"The host had another agent, which is replaced: {leftovers.agent_id} is installed there, and kept"
    server.note("clean_up", problem)
    return problem


def _describe_rest(order: Order, leftovers: _Leftovers, undo: tuple[Plan, str] | None) -> str:
    if undo is None:
        return f"The directory {leftovers.directory} stays on the host; remove it there as root"
    if order.is_replacing:
        return (
            f"It is not known whether {leftovers.agent_id} has replaced the agent there: look at the host with"
            f" fleetwire-agent status, and remove {leftovers.directory} there"
        )
    return (
        "What was done on the host could not be taken back; run there as root:"
        f" rm -rf {leftovers.directory}; fleetwire-agent uninstall --purge"
    )


async def _run_clean_up(host: SshHost, order: Order, leftovers: _Leftovers, undo: tuple[Plan, str] | None) -> None:
    plan = leftovers.plan
    script = build_clean_up(leftovers.directory, undo, is_replacing=order.is_replacing).encode()
    ran = await host.run(
        "clean_up",
        build_root_command(plan.root_by, ["sh", "-s"]),
        stdin=_sudo_line(plan, order) + script,
        seconds=CLEAN_UP_SECONDS,
    )
    said = ran.stdout.splitlines()
    if "clean_up=done" not in said:
        raise deploy_error("clean_up", "install_failed", last_line(ran.stderr))
    leftovers.is_agent_kept = "agent=kept" in said
