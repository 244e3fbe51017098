"""The install script of one agent, and the line that a person pastes to run it."""

import shlex
from pathlib import Path
from urllib.parse import urlsplit

from fleetwire_server.deploy.bundle import Bundle
from fleetwire_server.deploy.python_hint import HINTS, NO_COMMAND, PYTHON_MODULES, UNKNOWN
from fleetwire_shared.errors import ConflictError

_TEMPLATE = Path(__file__).parent / "install.sh"


def build_install_script(server_url: str, key: str, bundle: Bundle, tls_pin: str | None) -> str:
    """Return the script that installs this agent. Every value is quoted for the shell.

    Args:
        server_url: under which the host reaches the server.
        key: checked by the caller to be an agent's.
        tls_pin: curl's syntax; None to let the host's own certificates decide."""
    values = {
        "@SERVER@": shlex.quote(server_url),
        "@KEY@": shlex.quote(key),
        "@TLS_PIN@": shlex.quote(tls_pin or ""),
        "@SHA256@": shlex.quote(bundle.sha256),
        "@VERSION@": shlex.quote(bundle.version),
        "@UNKNOWN_ADVICE@": shlex.quote(_sentence(UNKNOWN)),
        "@NO_COMMAND_ADVICE@": shlex.quote(_sentence(NO_COMMAND)),
        "@PYTHON_MODULES@": PYTHON_MODULES,
        "@PYTHON_CASES@": "\n".join(
            f"            {patterns}) echo {shlex.quote(command)}; exit ;;" for patterns, command in HINTS
        ),
    }
    script = _TEMPLATE.read_text(encoding="utf-8")
    for placeholder, value in values.items():
        script = script.replace(placeholder, value)
    return script


def build_install_command(server_url: str, key: str, tls_pin: str | None) -> str:
    """Return the line that installs this agent on the host where it is pasted. It holds the agent's key."""
    url = shlex.quote(f"{server_url}/api/agents/install-script?key={key}")
    curl = f"curl -fsSk --pinnedpubkey {shlex.quote(tls_pin)}" if tls_pin else "curl -fsSL"
    return f"{curl} {url} | bash"


def reachable_url(public_url: str) -> str:
    """Return the server's public URL, which other hosts are to dial.

    Raises:
        ConflictError: it is an address to listen on, which nobody can dial."""
    if not is_reachable_url(public_url):
        raise ConflictError(
            f"hosts cannot dial {public_url}: start the server with --public-url and the URL they are to use"
        )
    return public_url


def is_reachable_url(public_url: str) -> bool:
    """Whether it names a host and a port, and not just all addresses or any free port."""
    parts = urlsplit(public_url)
    return parts.hostname not in ("0.0.0.0", "::") and parts.port != 0  # noqa: S104 - compared, not listened on


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
