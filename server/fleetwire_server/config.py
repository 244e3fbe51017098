"""The server's settings: the only reader of the configuration file and the environment.

A setting given as an argument wins over its environment variable, that over the file, that over the default."""

import ipaddress
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args
from urllib.parse import urlsplit

from sqlalchemy import make_url

from fleetwire_shared.errors import InvalidError
from fleetwire_shared.pins import parse_pins

from .deploy.host_keys import HostKeyRule
from .storage.engines import parse_database_url

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
LogFormat: TypeAlias = Literal["text", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """All settings, checked. `SETTINGS` says what each means."""

    listen_host: str
    listen_port: int  # 0: any free one
    data_dir: Path
    database_url: str = field(repr=False)  # may hold a password
    public_url: str  # without a slash at the end
    tls_cert: Path | None
    tls_key: Path | None
    tls_pin: str  # auto, off, or pins in curl's syntax
    agent_bundle: Path | None  # None: the one that came with the server
    ssh_key_dir: Path
    ssh_known_hosts: Path
    deploy_host_keys: HostKeyRule
    session_hours: float
    login_failures_per_minute: int
    max_connections_per_address: int
    header_timeout_seconds: float
    max_viewers: int
    max_channels_per_agent: int
    command_retention_days: float
    metrics_retention_days: float
    trusted_proxies: tuple[Network, ...]
    log_level: LogLevel
    log_format: LogFormat
    admin_password: str | None = field(repr=False)

    @property
    def listen(self) -> str:
        """`host:port`, an IPv6 address in brackets."""
        return _join_address(self.listen_host, self.listen_port)

    def is_trusted_proxy(self, address: str) -> bool:
        """Return whether what this peer says of its client's address is believed."""
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self.trusted_proxies)

    @property
    def spool_dir(self) -> Path:
        """Directory of files on their way to an agent; whatever is in it at a start is left over."""
        return self.data_dir / "spool"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting, as it is documented. `name` is its key in the file."""

    name: str
    default: str | int | None  # as it would be written; None: see `help`
    help: str
    parse: Callable[[str, Any], Any] = field(repr=False)
    is_secret: bool = False  # taken from the environment only: a file is copied, an argument is seen by all users

    @property
    def env(self) -> str:
        return f"FLEETWIRE_{self.name.upper()}"


def load_config(
    arguments: Mapping[str, str | int | None], environment: Mapping[str, str], file: Path | None = None
) -> ServerConfig:
    """Return the settings in force.

    Args:
        arguments: by name of the setting; None where it was not given.
        environment: all of it; only FLEETWIRE_* of known settings is read.
        file: TOML; when None, the path in FLEETWIRE_CONFIG, if set.
    Raises:
        InvalidError: the file cannot be read or has an unknown key, or a value is not valid."""
    path = file or (Path(environment["FLEETWIRE_CONFIG"]) if environment.get("FLEETWIRE_CONFIG") else None)
    from_file = _read_file(path) if path is not None else {}
    values = {setting.name: _value_of(setting, arguments, environment, from_file, path) for setting in SETTINGS}
    host, port = values.pop("listen")
    has_tls = values["tls_cert"] is not None
    if has_tls != (values["tls_key"] is not None):
        raise InvalidError("tls_cert and tls_key must be given together, or neither")
    if values["public_url"] is None:
        values["public_url"] = f"{'https' if has_tls else 'http'}://{_join_address(host, port)}"
    if values["tls_pin"] not in ("auto", "off") and not values["public_url"].startswith("https:"):
        raise InvalidError(f"tls_pin needs a public_url with https://, got {values['public_url']}")
    if values["database_url"] is None:
        values["database_url"] = f"sqlite:///{values['data_dir'] / 'fleetwire.db'}"
    return ServerConfig(listen_host=host, listen_port=port, **values)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:  # ValueError: neither UTF-8 nor TOML
        raise InvalidError(f"the configuration file {path} cannot be read: {err}") from err
    valid = [setting.name for setting in SETTINGS if not setting.is_secret]
    unknown = sorted(set(content) - set(valid))
    if unknown:
        raise InvalidError(f"{path}: unknown setting {', '.join(unknown)}; valid are {', '.join(valid)}")
    return content


def _value_of(
    setting: Setting,
    arguments: Mapping[str, str | int | None],
    environment: Mapping[str, str],
    from_file: Mapping[str, Any],
    path: Path | None,
) -> Any:
    if arguments.get(setting.name) is not None:
        return setting.parse(f"--{setting.name.replace('_', '-')}", arguments[setting.name])
    if environment.get(setting.env):  # set to nothing is not set
        return setting.parse(setting.env, environment[setting.env])
    if setting.name in from_file:
        return setting.parse(f"{path}: {setting.name}", from_file[setting.name])
    return None if setting.default is None else setting.parse(setting.name, setting.default)


# Parsers: (name of the setting as the person wrote it, value) -> checked value.


def _join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidError(f"{name} must be a text that is not empty, got {value!r}")
    return value


def _parse_password(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidError(f"{name} must be a text")
    return value


def _parse_listen(name: str, value: Any) -> tuple[str, int]:
    host, _, port = _parse_text(name, value).rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # which colon ends the address?
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise InvalidError(f"{name} must be HOST:PORT such as 127.0.0.1:8420 or [::1]:8420, got {value}")
    return host, int(port)


def _parse_path(name: str, value: Any) -> Path:
    return Path(_parse_text(name, value)).expanduser().absolute()


def _parse_home_path(name: str, value: Any) -> Path:
    """As _parse_path, and a user without a home is no error: there is then no such file."""
    return Path(os.path.expanduser(_parse_text(name, value))).absolute()  # noqa: PTH111


def _parse_database(name: str, value: Any) -> str:
    try:
        return str(make_url(parse_database_url(_parse_text(name, value))).render_as_string(hide_password=False))
    except InvalidError as err:
        raise InvalidError(f"{name}: {err}") from err


def _parse_url(name: str, value: Any) -> str:
    text = _parse_text(name, value)
    problem = InvalidError(f"{name} must be a URL such as https://fleet.example.org, without a query, got {text}")
    try:
        parts = urlsplit(text)
        _ = parts.port  # checks it
    except ValueError as err:
        raise problem from err
    is_plain = text.isascii() and text.isprintable() and not set(text) & set("\"'`$\\<>{} ")
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain or parts.username is not None:
        raise problem
    if "?" in text or "#" in text:
        raise problem
    return text.rstrip("/")


def _number(low: float, high: float, *, whole: bool) -> Callable[[str, Any], Any]:
    kind = "a whole number" if whole else "a number"

    def parse(name: str, value: Any) -> int | float:
        problem = InvalidError(f"{name} must be {kind} from {low:g} to {high:g}, got {value}")
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise problem
        try:
            number = int(value) if whole and not isinstance(value, float) else float(value)
        except ValueError as err:
            raise problem from err
        if not low <= number <= high or (whole and isinstance(number, float)):
            raise problem
        return number

    return parse


def _one_of(*choices: str) -> Callable[[str, Any], str]:
    def parse(name: str, value: Any) -> str:
        if value not in choices:
            raise InvalidError(f"{name} must be one of {', '.join(choices)}, got {value}")
        return str(value)

    return parse


def _parse_pin(name: str, value: Any) -> str:
    if value in ("auto", "off"):
        return str(value)
    try:
        return ";".join(parse_pins(_parse_text(name, value)))
    except InvalidError as err:
        raise InvalidError(f"{name} must be auto, off, or pins: {err}") from err


def _parse_networks(name: str, value: Any) -> tuple[Network, ...]:
    given = value.replace(",", " ").split() if isinstance(value, str) else value
    try:
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            raise ValueError(given)
        return tuple(ipaddress.ip_network(one) for one in given)
    except ValueError as err:
        raise InvalidError(f"{name} must be addresses or networks such as 127.0.0.1, 10.0.0.0/8, got {value}") from err


SETTINGS = (
    Setting(
        name="listen",
        default="127.0.0.1:8420",
        help="Address and port to listen on, HOST:PORT. Port 0 takes any free one.",
        parse=_parse_listen,
    ),
    Setting(
        name="data_dir",
        default="/var/lib/fleetwire-server",
        help="Directory of the database. Made, readable by its owner only, when missing.",
        parse=_parse_path,
    ),
    Setting(
        name="database_url",
        default=None,
        help="Database, sqlite:///FILE. Default: fleetwire.db in data_dir.",
        parse=_parse_database,
    ),
    Setting(
        name="public_url",
        default=None,
        help="URL under which people and agents reach the server. Default: http:// (with TLS https://) and listen.",
        parse=_parse_url,
    ),
    Setting(
        name="tls_cert",
        default=None,
        help="PEM file of the certificate with its chain. With tls_key, the server speaks HTTPS only.",
        parse=_parse_path,
    ),
    Setting(name="tls_key", default=None, help="PEM file of the certificate's private key.", parse=_parse_path),
    Setting(
        name="tls_pin",
        default="auto",
        help="Public key that agents pin, as curl's sha256//BASE64[;sha256//BASE64]. auto: that of tls_cert where this"
        " machine's certificates do not vouch for it (self-signed, a private authority). off: none.",
        parse=_parse_pin,
    ),
    Setting(
        name="agent_bundle",
        default=None,
        help="File of the agent that hosts are given. Default: the one that came with the server.",
        parse=_parse_path,
    ),
    Setting(
        name="ssh_key_dir",
        default="~/.ssh",
        help="Directory of the private keys that deployments over SSH may log in with.",
        parse=_parse_home_path,
    ),
    Setting(
        name="ssh_known_hosts",
        default="~/.ssh/known_hosts",
        help="File of SSH host keys that deployments trust, in OpenSSH's format. It need not be there.",
        parse=_parse_home_path,
    ),
    Setting(
        name="deploy_host_keys",
        default="accept-new",
        help="accept-new: a host never seen before is believed, and must show the same key from then on. pinned: its"
        " key must be known beforehand. A key that differs from the known one is refused either way.",
        parse=_one_of(*get_args(HostKeyRule)),
    ),
    Setting(
        name="session_hours",
        default=24,
        help="How long a login is good for, in hours.",
        parse=_number(0.01, 8760, whole=False),
    ),
    Setting(
        name="login_failures_per_minute",
        default=5,
        help="Failed logins a minute, for each address and for each account, before more are refused.",
        parse=_number(1, 10_000, whole=True),
    ),
    Setting(
        name="max_connections_per_address",
        default=200,
        help="Connections open at once from one address; further ones are closed. Addresses of trusted_proxies"
        " have no limit.",
        parse=_number(1, 1_000_000, whole=True),
    ),
    Setting(
        name="header_timeout_seconds",
        default=15,
        help="A connection that has not sent a whole request header after this many seconds is closed.",
        parse=_number(0.1, 3600, whole=False),
    ),
    Setting(
        name="max_viewers",
        default=1000,
        help="Streams (logs, metrics, output, events) open at once to all viewers; further ones are refused.",
        parse=_number(1, 1_000_000, whole=True),
    ),
    Setting(
        name="max_channels_per_agent",
        default=16,
        help="File transfers and log tails open at once on one agent; further ones are refused.",
        parse=_number(1, 1000, whole=True),
    ),
    Setting(
        name="command_retention_days",
        default=30,
        help="Commands that are over are removed, with their output, this many days after they were made.",
        parse=_number(0.01, 36_500, whole=False),
    ),
    Setting(
        name="metrics_retention_days",
        default=30,
        help="The metrics history of each minute is removed after this many days.",
        parse=_number(0.01, 36_500, whole=False),
    ),
    Setting(
        name="trusted_proxies",
        default="",
        help="Addresses or networks, separated by commas, whose X-Forwarded-For is believed. Default: none.",
        parse=_parse_networks,
    ),
    Setting(
        name="log_level",
        default="info",
        help="Least severity that is logged: debug, info, warning or error.",
        parse=_one_of(*get_args(LogLevel)),
    ),
    Setting(
        name="log_format",
        default="text",
        help="text for people, json (one object a line) for machines.",
        parse=_one_of(*get_args(LogFormat)),
    ),
    Setting(
        name="admin_password",
        default=None,
        help="Password of the user admin that the first start makes. Default: random, printed once. Taken from the"
        " environment only.",
        parse=_parse_password,
        is_secret=True,
    ),
)
"""Every setting there is; the documentation is held to this table by a test."""
