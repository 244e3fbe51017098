"""Where settings come from, which one wins, and what is refused with which words."""

import logging
from pathlib import Path

import pytest

from fleetwire_agent.config import AgentConfig, build_command_environment, read_config
from fleetwire_shared.errors import InvalidError

KEY = "agt_" + "a" * 16 + "_" + "B" * 43
OTHER_KEY = "agt_" + "b" * 16 + "_" + "C" * 43
SERVER = "http://127.0.0.1:8420"
PIN = "sha256//" + "A" * 43 + "="


def write(path: Path, content: str, mode: int = 0o600) -> str:
    path.write_text(content)
    path.chmod(mode)
    return str(path)


def test_arguments_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "agent.toml", f'server = "http://file"\nkey = "{KEY}"\nstate_dir = "/file"\nuse_proxy = true\n'
    )
    config = read_config(
        {"server": "http://argument/", "config": file, "key": None},
        {"FLEETWIRE_AGENT_SERVER": "http://environment", "FLEETWIRE_AGENT_STATE_DIR": "/environment"},
    )
    assert (config.server, config.state_dir, config.use_proxy) == ("http://argument", "/environment", True)
    assert config.key == KEY


def test_the_key_never_shows_in_a_printed_config() -> None:
    assert KEY not in repr(read_config({"server": SERVER, "key": KEY}, {}))


def test_a_credential_of_systemd_wins_over_the_file(tmp_path: Path) -> None:
    write(tmp_path / "agent-key", KEY + "\n")
    file = write(tmp_path / "agent.toml", f'key = "{OTHER_KEY}"')
    config = read_config({"server": SERVER, "config": file}, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert config.key == KEY


def test_settings_may_be_a_credential_of_systemd(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "agent-key", KEY, 0o440)  # as systemd makes it; the directory guards it
    write(tmp_path / "agent.toml", f'server = "https://host"\nprofile = "monitor"\ntls_pin = "{PIN};"\n')
    config = read_config({}, {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert (config.server, config.key, config.profile, config.tls_pin) == ("https://host", KEY, "monitor", PIN)
    assert not caplog.records
    other = write(tmp_path / "other.toml", 'server = "https://other"\n')
    assert read_config({"config": other}, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).server == "https://other"


def test_a_key_file_that_others_can_read_gets_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_config({"server": SERVER, "key_file": write(tmp_path / "private", KEY)}, {})
        assert not caplog.records
        read_config({"server": SERVER, "key_file": write(tmp_path / "public", KEY, 0o644)}, {})
    assert "chmod 600" in caplog.text
    assert KEY not in caplog.text


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"key": KEY}, "no server"),
        ({"server": SERVER}, "no key"),
        ({"server": "ftp://host", "key": KEY}, "server must be a URL"),
        ({"server": "127.0.0.1:8420", "key": KEY}, "server must be a URL"),
        ({"server": "http://host:99999", "key": KEY}, "server must be a URL"),
        ({"server": "http://user:pw@host", "key": KEY}, "server must be a URL"),
        ({"server": SERVER, "key": "agt_short"}, "must look like"),
        ({"server": SERVER, "key_file": "/nonexistent"}, "No such file"),
        ({"server": SERVER, "key": KEY, "config": "/nonexistent"}, "No such file"),
        ({"server": SERVER, "key": KEY, "log_level": "loud"}, "log_level must be one of"),
        ({"server": SERVER, "key": KEY, "max_commands_at_once": "0"}, "1 to 9999"),
        ({"server": SERVER, "key": KEY, "tls_ca_file": "/nonexistent"}, "tls_ca_file"),
        ({"server": SERVER, "key": KEY, "sever": "x"}, "unknown setting sever"),
        ({"server": SERVER, "key": KEY, "profile": "root"}, "profile must be manage or monitor, got 'root'"),
        ({"server": SERVER, "key": KEY, "tls_pin": PIN}, "tls_pin needs a server with https://"),
        ({"server": "https://host", "key": KEY, "tls_pin": "sha1//x"}, "sha256//BASE64"),
    ],
)
def test_wrong_settings_are_refused_with_what_would_be_right(arguments: dict[str, str], problem: str) -> None:
    with pytest.raises(InvalidError, match=problem):
        read_config(arguments, {})


def test_a_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="is not TOML"):
        read_config({"config": write(tmp_path / "agent.toml", "server = ")}, {})


def test_a_wrong_key_is_not_repeated_in_the_message() -> None:
    with pytest.raises(InvalidError) as caught:
        read_config({"server": SERVER, "key": "secret-typo"}, {})
    assert "secret-typo" not in str(caught.value)


def test_defaults() -> None:
    config = read_config({"server": SERVER, "key": KEY}, {"PATH": "/bin", "HOME": "/root"})
    assert config == AgentConfig(server=SERVER, key=KEY, command_environment={"PATH": "/bin", "HOME": "/root"})


def test_commands_inherit_a_path_and_nothing_of_the_agents_own() -> None:
    environment = build_command_environment(
        {"FLEETWIRE_AGENT_KEY": KEY, "NOTIFY_SOCKET": "/run/x", "LANG": "C.UTF-8", "HOME": "/root"}
    )
    assert environment.pop("PATH").endswith("/bin")
    assert environment == {"LANG": "C.UTF-8", "HOME": "/root"}
