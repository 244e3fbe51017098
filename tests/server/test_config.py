import ipaddress
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from fleetwire_server.config import SETTINGS, ServerConfig, load_config
from fleetwire_shared.errors import InvalidError


def load(
    arguments: Mapping[str, str | int | None] | None = None, file: Path | None = None, **environment: str
) -> ServerConfig:
    return load_config(arguments or {}, environment, file)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_defaults_are_those_of_the_table() -> None:
    config = load()
    assert (config.listen, config.public_url) == ("127.0.0.1:8420", "http://127.0.0.1:8420")
    assert config.data_dir == Path("/var/lib/fleetwire-server")
    assert config.database_url == "sqlite:////var/lib/fleetwire-server/fleetwire.db"
    assert (config.session_hours, config.login_failures_per_minute) == (24, 5)
    assert (config.command_retention_days, config.metrics_retention_days) == (30, 30)
    assert (config.tls_cert, config.tls_key, config.trusted_proxies) == (None, None, ())
    assert (config.log_level, config.log_format, config.admin_password) == ("info", "text", None)


def test_every_setting_is_in_the_configuration_and_says_what_it_is() -> None:
    in_config = {field.name for field in fields(ServerConfig)} - {"listen_host", "listen_port"} | {"listen"}
    assert {setting.name for setting in SETTINGS} == in_config
    for setting in SETTINGS:
        assert setting.help.endswith("."), setting.name
        assert setting.env == f"FLEETWIRE_{setting.name.upper()}"


def test_argument_wins_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = write(tmp_path / "server.toml", 'log_level = "debug"\nsession_hours = 1.5\nlisten = "0.0.0.0:1"')
    config = load({"listen": "0.0.0.0:3"}, file, FLEETWIRE_LISTEN="0.0.0.0:2", FLEETWIRE_LOG_LEVEL="error")
    assert (config.listen, config.log_level, config.session_hours) == ("0.0.0.0:3", "error", 1.5)
    config = load({"listen": None}, file, FLEETWIRE_LISTEN="0.0.0.0:2", FLEETWIRE_LOG_LEVEL="")
    assert (config.listen, config.log_level) == ("0.0.0.0:2", "debug")


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "server.toml", "session_hours = 2")
    assert load(FLEETWIRE_CONFIG=str(file)).session_hours == 2


def test_an_unknown_key_of_the_file_is_refused_with_the_valid_ones(tmp_path: Path) -> None:
    file = write(tmp_path / "server.toml", 'lisen = "x"')
    with pytest.raises(InvalidError, match=r"server.toml: unknown setting lisen; valid are listen, data_dir, "):
        load(file=file)


def test_a_password_in_the_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "server.toml", 'admin_password = "secret-secret"')
    with pytest.raises(InvalidError, match="unknown setting admin_password") as refusal:
        load(file=file)
    assert "secret-secret" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"listen = ", b"\xff\xfe", b"[listen"])
def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "server.toml").write_bytes(content)
    with pytest.raises(InvalidError, match=r"server.toml cannot be read"):
        load(file=tmp_path / "server.toml")


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match=r"cannot be read: .*No such file"):
        load(file=tmp_path / "server.toml")


def test_secrets_are_in_no_repr() -> None:
    config = load(FLEETWIRE_ADMIN_PASSWORD="secret-secret")
    assert config.admin_password == "secret-secret"
    assert "secret-secret" not in repr(config)


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        load().listen_port = 1  # type: ignore[misc]


def test_addresses_of_both_families_are_understood() -> None:
    config = load({"listen": "[::1]:8420"})
    assert (config.listen_host, config.listen_port, config.listen) == ("::1", 8420, "[::1]:8420")
    assert config.public_url == "http://[::1]:8420"
    assert load({"listen": "localhost:0"}).listen_port == 0


def test_the_database_is_in_the_data_directory_unless_named() -> None:
    assert load({"data_dir": "/srv/fleet"}).database_url == "sqlite:////srv/fleet/fleetwire.db"
    assert load({"data_dir": "/srv/fleet"}).spool_dir == Path("/srv/fleet/spool")
    assert load({"data_dir": "data"}).data_dir == Path.cwd() / "data"
    named = load({"data_dir": "/srv/fleet", "database_url": "sqlite:////srv/other.db"})
    assert named.database_url == "sqlite:////srv/other.db"


def test_with_tls_the_server_is_reached_by_https() -> None:
    config = load({"tls_cert": "/etc/cert.pem", "tls_key": "/etc/key.pem"})
    assert config.public_url == "https://127.0.0.1:8420"
    assert (config.tls_cert, config.tls_key) == (Path("/etc/cert.pem"), Path("/etc/key.pem"))
    for half in ("tls_cert", "tls_key"):
        with pytest.raises(InvalidError, match="together"):
            load({half: "/etc/file.pem"})


def test_proxies_are_given_as_a_list_or_separated_by_commas(tmp_path: Path) -> None:
    networks = (ipaddress.ip_network("127.0.0.1/32"), ipaddress.ip_network("fd00::/8"))
    assert load(FLEETWIRE_TRUSTED_PROXIES="127.0.0.1, fd00::/8").trusted_proxies == networks
    file = write(tmp_path / "server.toml", 'trusted_proxies = ["127.0.0.1", "fd00::/8"]')
    assert load(file=file).trusted_proxies == networks


def test_the_public_url_has_no_slash_at_its_end() -> None:
    assert load({"public_url": "https://fleet.example.org:444/fw/"}).public_url == "https://fleet.example.org:444/fw"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("listen", "8420"),
        ("listen", ":8420"),
        ("listen", "host:port"),
        ("listen", "::1:8420"),
        ("listen", "host:70000"),
        ("listen", "host:٣"),
        ("public_url", "fleet.example.org"),
        ("public_url", "ftp://fleet"),
        ("public_url", "http://"),
        ("public_url", "http://a$(touch x)"),
        ("public_url", "http://a'b"),
        ("public_url", "http://user:pass@host"),
        ("public_url", "http://host/?a=b"),
        ("public_url", "http://host:99999"),
        ("public_url", "http://[::1"),
        ("database_url", "postgresql://db/fleet"),
        ("session_hours", "0"),
        ("session_hours", "nan"),
        ("session_hours", "inf"),
        ("session_hours", "a day"),
        ("login_failures_per_minute", "0"),
        ("login_failures_per_minute", "1.5"),
        ("max_connections_per_address", "-1"),
        ("trusted_proxies", "10.0.0.1/8"),
        ("trusted_proxies", "proxy.example.org"),
        ("log_level", "loud"),
        ("log_format", "xml"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name(name: str, value: str) -> None:
    with pytest.raises(InvalidError, match=f"^FLEETWIRE_{name.upper()}.*(must|unknown)"):
        load_config({}, {f"FLEETWIRE_{name.upper()}": value})


@pytest.mark.parametrize(
    "line",
    [
        "listen = 8420",
        "data_dir = 1",
        "session_hours = true",
        "login_failures_per_minute = 5.0",
        "trusted_proxies = [1]",
        "log_level = 1",
        "log_level = []",
        "session_hours = []",
        'data_dir = ""',
    ],
)
def test_a_value_of_another_type_is_refused_with_its_place(tmp_path: Path, line: str) -> None:
    name: Any = line.split()[0]
    with pytest.raises(InvalidError, match=rf"server.toml: {name} must be "):
        load(file=write(tmp_path / "server.toml", line))
