"""What is asked of a deployment, and what one needs of the server that runs it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fleetwire_server.deploy.bundle import Bundle, require_bundle
from fleetwire_server.deploy.errors import deploy_error
from fleetwire_server.deploy.host_keys import HostKeyRule, PublicKey
from fleetwire_server.deploy.install_script import reachable_url
from fleetwire_server.deploy.plan import Profile
from fleetwire_server.model import HostKey
from fleetwire_shared.errors import ConflictError, UnavailableError

_STEP = "server"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One host to be deployed to."""

    host: str  # lower case; a name or an address
    port: int = 22
    ssh_user: str = "root"
    ssh_key: str | None = None  # path on the server, as it was given
    label: str
    tags: tuple[str, ...] = ()
    profile: Profile = "manage"
    sudo_password: str | None = field(default=None, repr=False)
    host_key: str | None = None  # the public key or fingerprint that the host must show
    is_replacing: bool = False  # whatever agent the host has

    @property
    def where(self) -> str:
        return f"{self.host} port {self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds for all hosts of a server."""

    bundle: Bundle
    server_url: str
    tls_pin: str | None
    key_directory: Path
    known_hosts: Path
    host_key_rule: HostKeyRule


@dataclass(frozen=True, slots=True)
class Deployed:
    agent_id: str
    key: str = field(repr=False)
    host_key: str  # fingerprint


def build_terms(
    *,
    bundle: Bundle | None,
    public_url: str,
    tls_pin: str | None,
    key_directory: Path,
    known_hosts: Path,
    host_key_rule: HostKeyRule,
) -> Terms:
    """Return the terms of a server with these settings.

    Raises:
        DeployError: it carries no agent, or has no URL that hosts can dial."""
    try:
        server_url = reachable_url(public_url)
        carried = require_bundle(bundle)
    except ConflictError as err:
        raise deploy_error(_STEP, "public_url", err.message) from err
    except UnavailableError as err:
        raise deploy_error(_STEP, "no_bundle", err.message) from err
    return Terms(
        bundle=carried,
        server_url=server_url,
        tls_pin=tls_pin,
        key_directory=key_directory,
        known_hosts=known_hosts,
        host_key_rule=host_key_rule,
    )


class ServerSide(Protocol):
    """The server, as the deployment to one host uses it."""

    def note(self, step: str, detail: str) -> None:
        """Tell those who watch what is being done; nothing secret."""

    async def get_pinned(self) -> HostKey | None: ...

    async def pin(self, key: PublicKey) -> HostKey:
        """Pin the key unless there is one; return the pinned one."""

    async def enrol(self) -> tuple[str, str]:
        """Make the agent's record; return its id and key. Whoever calls the runner removes it when that fails."""

    async def wait_connected(self, agent_id: str) -> None:
        """Wait until the agent has dialled in."""
