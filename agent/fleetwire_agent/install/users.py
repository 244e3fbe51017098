"""The system user of the profile monitor: made and removed with whatever the distribution has for it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fleetwire_agent.install.failures import InstallError
from fleetwire_agent.install.host import describe_failure, find_program, has_group, read_user, run_program
from fleetwire_agent.install.layout import USER, USER_COMMENT

_USER_SECONDS: Final = 60.0
"""Somebody else may hold the lock of the user database."""


def is_our_user() -> bool:
    user = read_user(USER)
    return user is not None and user.pw_gecos == USER_COMMENT


def add_user() -> None:
    """Make the user and its group. Raises InstallError."""
    shell = next((path for path in ("/usr/sbin/nologin", "/sbin/nologin") if Path(path).exists()), "/bin/false")
    if find_program("useradd"):
        command = ["useradd", "--system", "--user-group", "--no-create-home", "--home-dir", "/nonexistent"]
        _run([*command, "--shell", shell, "--comment", USER_COMMENT, USER])
    elif find_program("adduser"):  # busybox
        if not has_group(USER):
            _run(["addgroup", "-S", USER])
        _run(["adduser", "-S", "-D", "-H", "-h", "/nonexistent", "-s", shell, "-G", USER, "-g", USER_COMMENT, USER])
    else:
        raise InstallError(
            "unsupported",
            f"there is neither useradd nor adduser to make the user {USER}, which the profile monitor runs as",
        )


def remove_user() -> None:
    """Remove the user and its group, if the installer made them. Raises InstallError."""
    if is_our_user():
        _run(["userdel", USER] if find_program("userdel") else ["deluser", USER])
    if read_user(USER) is None and has_group(USER):
        _run(["groupdel", USER] if find_program("groupdel") else ["delgroup", USER])


def _run(command: Sequence[str], *, seconds: float = _USER_SECONDS) -> None:
    result = run_program(command, seconds=seconds, if_hung="is the user database locked?")
    if result.returncode:
        raise describe_failure(command, result)
