"""How a deployment can fail: at a step, for a stable reason, with a sentence that says what to do."""

from collections.abc import Mapping
from typing import TypeAlias

from fleetwire_shared.errors import ConflictError, FleetwireError, InvalidError, PeerFailedError, UnavailableError

More: TypeAlias = Mapping[str, str]


class DeployError(FleetwireError):
    """Why a host was not deployed to. `more` holds further members for programs, such as fingerprints."""

    def __init__(self, step: str, reason: str, detail: str, more: More) -> None:
        super().__init__(detail)
        self.step = step
        self.reason = reason
        self.more = more
        self.is_agent_kept = False  # the new agent stays on its host, so its record must stay, too


class DeployInvalidError(DeployError):
    """What was asked for is wrong: the key file, the password."""

    code = InvalidError.code


class DeployConflictError(DeployError):
    """The host is not in the state that was expected: its key, an agent that is there already."""

    code = ConflictError.code


class DeployFailedError(DeployError):
    """The host, or the way to it, failed or cannot be used."""

    code = PeerFailedError.code


class DeployUnavailableError(DeployError):
    """This server cannot deploy now."""

    code = UnavailableError.code


REASONS: Mapping[str, type[DeployError]] = {
    # the request, on the server
    "key_missing": DeployInvalidError,  # no ssh_key was given, or there is no such file
    "key_refused": DeployInvalidError,  # outside the key directory, no private key, or one with a passphrase
    "public_url": DeployConflictError,  # hosts cannot dial what the server calls itself
    "busy": DeployConflictError,  # a deployment to this host, or an installation on it, is under way
    "no_bundle": DeployUnavailableError,
    "interrupted": DeployUnavailableError,  # the server is stopping
    "server_failed": DeployUnavailableError,  # a fault of the server, or its database cannot be written
    "host_key_invalid": DeployInvalidError,  # the request's host_key is neither a key nor a fingerprint
    # the way to the host
    "unreachable": DeployFailedError,
    "ssh": DeployFailedError,  # what answers does not speak SSH with us
    "host_key_unknown": DeployConflictError,
    "host_key_changed": DeployConflictError,
    "ssh_auth": DeployFailedError,
    "connection_lost": DeployFailedError,
    "timeout": DeployFailedError,
    # the host
    "no_shell": DeployFailedError,
    "unsupported": DeployFailedError,
    "no_sudo": DeployFailedError,
    "sudo_password": DeployInvalidError,
    "no_python": DeployFailedError,
    "python_too_old": DeployFailedError,
    "already_managed": DeployConflictError,
    "disk_full": DeployFailedError,
    # the installation
    "no_route": DeployFailedError,
    "tls": DeployFailedError,
    "not_connected": DeployFailedError,
    "install_failed": DeployFailedError,
}
"""Every reason, and the kind of error it is."""


def deploy_error(step: str, reason: str, detail: str, **more: str) -> DeployError:
    """Return the error of that reason, to be raised."""
    return REASONS[reason](step, reason, detail, more)
