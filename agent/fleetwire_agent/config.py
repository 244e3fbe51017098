"""The agent's settings: the only reader of its file, environment and key file. Argument > environment > file."""

import logging
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args
from urllib.parse import urlsplit

from fleetwire_shared.errors import InvalidError
from fleetwire_shared.limits import AGENT_KEY_PATTERN, MAX_COMMANDS_AT_ONCE
from fleetwire_shared.pins import parse_pins

DEFAULT_FILE: Final = Path("/etc/fleetwire/agent.toml")
ENVIRONMENT_PREFIX: Final = "FLEETWIRE_AGENT_"
CREDENTIAL_NAME: Final = "agent-key"
"""The key, in systemd's directory of credentials; the settings may be there, too, as `agent.toml`."""

DEFAULT_STATE_DIR: Final = "/var/lib/fleetwire-agent"
Profile: TypeAlias = Literal["manage", "monitor"]
"""What the server may do here: everything the agent's user can; or only look."""

PROFILES: Final[tuple[Profile, ...]] = get_args(Profile)
LOG_LEVELS: Final = ("debug", "info", "warning", "error")

_DEFAULT_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PRIVATE_PREFIXES: Final = ("FLEETWIRE_", "LISTEN_", "WATCHDOG_")
_PRIVATE_VARIABLES: Final = frozenset(
    {"CREDENTIALS_DIRECTORY", "INVOCATION_ID", "JOURNAL_STREAM", "NOTIFY_SOCKET", "PYTHONHOME", "PYTHONPATH"}
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Checked settings. `docs/operations.md` explains each."""

    server: str  # URL without a trailing slash
    key: str = field(repr=False)
    profile: Profile = "manage"
    tls_ca_file: str | None = None  # certificates to trust instead of the system's
    tls_pin: str | None = None  # public keys that the server must have one of, as curl's --pinnedpubkey
    use_proxy: bool = False  # take the proxy from http_proxy, https_proxy, no_proxy
    state_dir: str = DEFAULT_STATE_DIR
    journal_directory: str | None = None  # journal files to read instead of the host's journal
    max_commands_at_once: int = MAX_COMMANDS_AT_ONCE
    log_level: str = "info"
    command_environment: Mapping[str, str] = field(default_factory=dict, repr=False)


def read_config(arguments: Mapping[str, str | None], environment: Mapping[str, str]) -> AgentConfig:
    """Return the settings of this start. Blocking.

    Args:
        arguments: of the command line, None where not given; names as in the file, and `config`.
        environment: FLEETWIRE_AGENT_SERVER and so on; CREDENTIALS_DIRECTORY as systemd sets it: `agent.toml` there
            stands in for the one in /etc/fleetwire.
    Raises:
        InvalidError: a setting is missing or wrong; the message says which and what would be right."""
    given = {name: value for name, value in arguments.items() if value is not None}
    from_environment = {
        name.removeprefix(ENVIRONMENT_PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(ENVIRONMENT_PREFIX) and value
    }
    named_file = given.pop("config", None) or from_environment.pop("config", None)
    levels: list[dict[str, Any]] = [given, from_environment, _read_file(named_file, environment)]
    for level in levels:
        _check_names(level)
    merged = {name: value for level in reversed(levels) for name, value in level.items()}
    merged["key"] = _find_key(levels, environment)
    merged.pop("key_file", None)
    return _build(merged, environment)


def _read_file(named: str | None, environment: Mapping[str, str]) -> dict[str, Any]:
    credential = _credential(DEFAULT_FILE.name, environment)
    path = Path(named) if named else credential if credential.is_file() else DEFAULT_FILE
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as err:
        if not named:
            return {}
        raise InvalidError(f"config file {path}: {err.strerror}") from err
    except OSError as err:
        raise InvalidError(f"config file {path}: {err.strerror}") from err
    except ValueError as err:
        raise InvalidError(f"config file {path} is not TOML: {err}") from err


def _check_names(level: Mapping[str, Any]) -> None:
    known = ({item.name for item in fields(AgentConfig)} | {"key_file"}) - {"command_environment"}
    if unknown := sorted(level.keys() - known):
        raise InvalidError(f"unknown setting {', '.join(unknown)}; there are {', '.join(sorted(known))}")


def _find_key(levels: list[dict[str, Any]], environment: Mapping[str, str]) -> str:
    """Return the key of the first level that names one; systemd's credential stands between environment and file."""
    credential = _credential(CREDENTIAL_NAME, environment)
    arguments, from_environment, from_file = levels
    credentials = {"key_file": str(credential)} if credential.is_file() else {}
    for level in (arguments, from_environment, credentials, from_file):
        if level is credentials and credentials:
            # systemd guards the directory, and lets the files in it be read by a group or by all.
            return check_key(_read_key_file(credential, is_guarded=True), "the credential agent-key")
        if "key" in level:
            return check_key(level["key"], "key")
        if "key_file" in level:
            return check_key(_read_key_file(Path(str(level["key_file"])), is_guarded=False), "the key file's content")
    raise InvalidError(
        "no key: give --key-file, FLEETWIRE_AGENT_KEY, the systemd credential agent-key, or key_file in the config file"
    )


def _credential(name: str, environment: Mapping[str, str]) -> Path:
    return Path(environment.get("CREDENTIALS_DIRECTORY") or "/nonexistent", name)


def _read_key_file(path: Path, *, is_guarded: bool) -> str:
    try:
        content = path.read_text("ascii").strip()
        mode = path.stat().st_mode
    except OSError as err:
        raise InvalidError(f"key file {path}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise InvalidError(f"key file {path} does not hold a key") from err
    if mode & 0o044 and not is_guarded:
        _log.warning("key file %s can be read by others; chmod 600 it", path)
    return content


def check_key(key: object, name: str) -> str:
    """Return an agent's key. Raises InvalidError, which names where it came from and never the value."""
    if not isinstance(key, str) or not re.fullmatch(AGENT_KEY_PATTERN, key):
        raise InvalidError(f"{name} must look like agt_<16 characters>_<43 characters>")
    return key


def _build(merged: dict[str, Any], environment: Mapping[str, str]) -> AgentConfig:
    if "server" not in merged:
        raise InvalidError("no server: give --server, FLEETWIRE_AGENT_SERVER, or server in the config file")
    merged["server"] = check_server(merged["server"])
    if merged.get("profile", "manage") not in PROFILES:
        raise InvalidError(f"profile must be {' or '.join(PROFILES)}, got {merged['profile']!r}")
    if "tls_pin" in merged:
        merged["tls_pin"] = check_pin(merged["tls_pin"], merged["server"])
    if "use_proxy" in merged:
        merged["use_proxy"] = _check_boolean("use_proxy", merged["use_proxy"])
    if "max_commands_at_once" in merged:
        merged["max_commands_at_once"] = _check_count("max_commands_at_once", merged["max_commands_at_once"])
    if merged.get("log_level", "info") not in LOG_LEVELS:
        raise InvalidError(f"log_level must be one of {', '.join(LOG_LEVELS)}, got {merged['log_level']!r}")
    for name in ("tls_ca_file", "state_dir", "journal_directory"):
        if name in merged and not isinstance(merged[name], str):
            raise InvalidError(f"{name} must be a path, got {merged[name]!r}")
    if "tls_ca_file" in merged and not Path(merged["tls_ca_file"]).is_file():
        raise InvalidError(f"tls_ca_file {merged['tls_ca_file']} is not a file")
    return AgentConfig(**merged, command_environment=build_command_environment(environment))


def check_server(value: object) -> str:
    """Return the server's URL without a trailing slash. Raises InvalidError."""
    problem = InvalidError(f"server must be a URL such as https://fleet.example.net, got {value!r}")
    if not isinstance(value, str):
        raise problem
    try:
        parts = urlsplit(value)
        port_is_right = parts.port is None or parts.port > 0
    except ValueError as err:
        raise problem from err
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_right:
        raise problem
    if parts.query or parts.fragment or parts.username is not None or re.search(r"[\s\x00-\x1f]", value):
        raise problem
    return value.rstrip("/")


def check_pin(value: object, server: str) -> str | None:
    """Return the pins, None for an empty text. Raises InvalidError."""
    if not isinstance(value, str):
        raise InvalidError(f"tls_pin must look like sha256//BASE64, got {value!r}")
    if not value:
        return None
    if not server.startswith("https:"):
        raise InvalidError(f"tls_pin needs a server with https://, got {server}: without TLS nothing could be checked")
    return ";".join(parse_pins(value))


def _check_boolean(name: str, value: object) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    word = str(value).lower()
    if word not in words:
        raise InvalidError(f"{name} must be true or false, got {value!r}")
    return words[word]


def _check_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[1-9][0-9]{0,3}", str(value), re.ASCII):
        raise InvalidError(f"{name} must be 1 to 9999, got {value!r}")
    return int(str(value))


def build_command_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what commands inherit: the agent's environment without what concerns only the agent, and with a PATH."""
    inherited = {
        name: value
        for name, value in environment.items()
        if not name.startswith(_PRIVATE_PREFIXES) and name not in _PRIVATE_VARIABLES
    }
    return {"PATH": _DEFAULT_PATH, "HOME": str(Path("~").expanduser()), **inherited}
