import json
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fleetwire_server.cli import run
from fleetwire_server.config import ServerConfig
from fleetwire_server.core.passwords import verify_password
from fleetwire_server.model import Role
from fleetwire_server.storage import users
from fleetwire_server.storage.store import running_store
from fleetwire_shared import __version__

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fleetwire(tmp_path: Path) -> Command:
    """Run `fleetwire-server` with FLEETWIRE_DATA_DIR of its own."""

    def fleetwire(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        others = {name: value for name, value in os.environ.items() if not name.startswith("FLEETWIRE_")}
        return subprocess.run(
            [sys.executable, "-m", "fleetwire_server", *arguments],
            input=stdin,
            env=others | {"FLEETWIRE_DATA_DIR": str(tmp_path / "data")} | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return fleetwire


@pytest.fixture
def add(fleetwire: Command) -> Callable[[str, str], None]:
    def add(name: str, role: str) -> None:
        ended = fleetwire("user", "add", name, "--role", role, "--password-stdin", stdin="correct horse\n")
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"user {name} added\n", "")

    return add


def assert_refused(ended: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """One line that says what is wrong, on standard error, and nothing else."""
    assert ended.returncode == status, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.startswith("fleetwire-server: ")
    assert ended.stderr.count("\n") == 1
    for word in words:
        assert word in ended.stderr


def test_users_are_added_listed_changed_and_removed(fleetwire: Command, add: Callable[[str, str], None]) -> None:
    add("root", "admin")
    add("ada", "viewer")
    assert fleetwire("user", "list").stdout == "ada\tviewer\nroot\tadmin\n"
    assert fleetwire("user", "role", "ada", "operator").stdout == "ada is now operator\n"
    assert fleetwire("user", "list").stdout == "ada\toperator\nroot\tadmin\n"
    assert fleetwire("user", "remove", "ada").stdout == "user ada removed\n"
    assert fleetwire("user", "list").stdout == "root\tadmin\n"


async def test_a_password_is_set_from_standard_input(
    fleetwire: Command, add: Callable[[str, str], None], tmp_path: Path
) -> None:
    add("ada", "viewer")
    changed = fleetwire("user", "passwd", "ada", "--password-stdin", stdin="battery staple")
    assert (changed.returncode, changed.stdout) == (0, "password of ada changed\n")
    async with running_store(f"sqlite:///{tmp_path}/data/fleetwire.db") as store:
        ada = await store.read(partial(users.get_user, name="ada"))
    assert ada is not None
    assert ada.role is Role.VIEWER
    assert verify_password(ada.password_hash, "battery staple")
    assert not verify_password(ada.password_hash, "correct horse")


def test_what_cannot_be_done_is_told_in_one_line(fleetwire: Command, add: Callable[[str, str], None]) -> None:
    add("root", "admin")
    again = fleetwire("user", "add", "root", "--role", "admin", "--password-stdin", stdin="correct horse\n")
    assert_refused(again, 1, "already a user root")
    assert_refused(fleetwire("user", "remove", "ada"), 1, "no user ada")
    assert_refused(fleetwire("user", "remove", "root"), 1, "last admin")
    assert_refused(fleetwire("user", "role", "root", "viewer"), 1, "last admin")


def test_wrong_usage_is_told_in_one_line(fleetwire: Command) -> None:
    add = ("user", "add", "ada", "--role", "viewer")
    assert_refused(fleetwire("user", "add", "ada"), 2, "--role", "viewer, operator, admin", "user add --help")
    assert_refused(fleetwire("user", "add", "ada", "--role", "king"), 2, "king", "viewer")
    assert_refused(fleetwire(*add), 2, "--password-stdin")
    assert_refused(fleetwire(*add, "--password-stdin", stdin="short\n"), 2, "8 characters", "got 5")
    assert_refused(
        fleetwire("user", "add", "a b", "--role", "viewer", "--password-stdin", stdin="x" * 9), 2, "username"
    )
    assert_refused(fleetwire("sevre"), 2, "sevre")
    assert_refused(fleetwire("serve", "--listen", "nowhere"), 2, "--listen", "HOST:PORT", "nowhere")
    assert_refused(fleetwire("serve", "--config", "/missing.toml"), 2, "/missing.toml")
    assert_refused(fleetwire("user", "list", FLEETWIRE_SESSION_HOURS="-1"), 2, "FLEETWIRE_SESSION_HOURS")


def test_without_a_database_nothing_is_made(fleetwire: Command, tmp_path: Path) -> None:
    for arguments in (("user", "list"), ("user", "remove", "ada"), ("backup", str(tmp_path / "copy"))):
        assert_refused(fleetwire(*arguments), 1, "there is no database", "data/fleetwire.db")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_told(fleetwire: Command, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    ended = fleetwire("user", "add", "ada", "--role", "admin", "--password-stdin", stdin="correct horse")
    assert_refused(ended, 1, "directory cannot be made")


def test_a_backup_is_a_database_for_its_owner_only(
    fleetwire: Command, add: Callable[[str, str], None], tmp_path: Path
) -> None:
    add("ada", "viewer")
    copy = tmp_path / "copy.db"
    assert fleetwire("backup", str(copy)).stdout == f"backup written: {copy}\n"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    connection = sqlite3.connect(copy)
    assert connection.execute("SELECT name FROM users").fetchall() == [("ada",)]
    connection.close()
    assert_refused(fleetwire("backup", str(copy)), 1, "exists already")


def test_help_and_version_are_printed(fleetwire: Command) -> None:
    assert fleetwire("--version").stdout == f"fleetwire-server {__version__}\n"
    serve_help = fleetwire("serve", "--help")
    assert serve_help.returncode == 0
    for option in ("listen", "data-dir", "public-url", "config", "tls-cert", "tls-key", "database-url", "log-level"):
        assert f"--{option} " in serve_help.stdout
    for arguments in ((), ("user",)):
        bare = fleetwire(*arguments)
        assert bare.returncode == 2
        assert "Usage:" in bare.stderr


def test_the_openapi_document_is_printed(fleetwire: Command) -> None:
    ended = fleetwire("openapi")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["openapi"].startswith("3.1")


def test_serve_gets_the_settings_of_the_command_line(tmp_path: Path) -> None:
    served: list[ServerConfig] = []

    async def serve(config: ServerConfig) -> None:
        served.append(config)

    arguments = [
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--data-dir",
        str(tmp_path),
        "--public-url",
        "https://fleet.example",
    ]
    assert run(arguments, serve) == 0
    assert (served[0].listen_port, served[0].data_dir) == (0, tmp_path)
    assert served[0].public_url == "https://fleet.example"


def test_an_interrupted_serve_ends_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    async def serve(_: ServerConfig) -> None:
        raise KeyboardInterrupt

    assert run(["serve"], serve) == 130
    assert capsys.readouterr() == ("", "\n")  # ends the line of the terminal's ^C
