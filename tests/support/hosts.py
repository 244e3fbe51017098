"""Real Debian hosts on this machine, as tests use them; `scripts/testhost` is the same for people."""

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.lib.testhost import operations
from scripts.lib.testhost.network import BRIDGE_ADDRESS
from scripts.lib.testhost.places import SSH_KEY, HostError
from scripts.lib.testhost.records import Record, find_first_process, read_state
from scripts.lib.testhost.roots import PASSWORDS

__all__ = ["BRIDGE_ADDRESS", "PASSWORDS", "SSH_KEY", "Host", "HostError"]


class Host:
    """A host that was booted. All methods block; from a coroutine, those that take long go through a thread.

    Users: root and ops (sudo without a password), opspw (sudo with PASSWORDS["opspw"]), nosudo; SSH_KEY opens all."""

    def __init__(self, record: Record) -> None:
        self.record = record

    @property
    def name(self) -> str:
        """Its hostname, too."""
        return self.record.name

    @property
    def address(self) -> str:
        return self.record.address

    @property
    def release(self) -> str:
        return self.record.release

    @property
    def is_on(self) -> bool:
        return read_state(self.record)[1]

    @property
    def first_pid(self) -> int:
        """The process that is its number 1, as this machine numbers it."""
        pid = find_first_process(self.record)
        assert pid is not None, f"{self.name} is off"
        return pid

    @property
    def root(self) -> Path:
        """Its filesystem as this machine sees it: with /run and /tmp while it is on, its disk alone while it is off.

        An absolute link leads astray from here, into this machine's own files: `exists` and `exec` follow it right."""
        pid = find_first_process(self.record)
        return self.record.mount if pid is None else Path(f"/proc/{pid}/root")

    @property
    def console_text(self) -> str:
        path = self.record.console
        return path.read_text(errors="replace") if path.exists() else ""

    def exec(
        self,
        command: Sequence[str] | str,
        *,
        check: bool = True,
        timeout: float = 60.0,
        input: str | None = None,  # noqa: A002 - as subprocess.run calls it
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root, to its end and that of its output; text is for /bin/sh.

        Raises HostError, with what it said, when it took too long, and when it failed, unless `check` is False."""
        return operations.exec_in_host(
            self.record, command, check=check, timeout_seconds=timeout, content=input, environment=environment
        )

    def build_exec(self, command: Sequence[str] | str, environment: Mapping[str, str] | None = None) -> list[str]:
        """Return the arguments of a process of this machine that is `command` in the host."""
        return operations.build_exec(self.record, command, environment)

    def write(self, path: str, text: str, *, mode: int = 0o644) -> None:
        """Write a file, and make its directory where that is missing."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        self.exec(["sh", "-c", script, "sh", path, f"{mode:o}"], input=text)

    def exists(self, path: str) -> bool:
        """Whether there is anything at the path, be it a link that leads nowhere."""
        return self.exec(["sh", "-c", '[ -e "$1" ] || [ -L "$1" ]', "sh", path], check=False).returncode == 0

    def cut(self) -> None:
        """Drop every packet from and to it, silently; also after a reboot."""
        operations.cut_host(self.record)

    def heal(self) -> None:
        operations.heal_host(self.record)

    def reboot(self) -> None:
        """Reboot it in order; return when its sshd listens again."""
        operations.reboot_host(self.record)

    def kill(self) -> None:
        """Cut its power. `boot` switches it on again."""
        operations.kill_host(self.record)

    def boot(self) -> None:
        """Switch it on; return when its sshd listens."""
        operations.start_host(self.record)

    def wait_until_up(self, timeout_seconds: float = operations.UP_SECONDS) -> None:
        """Return when its sshd listens."""
        operations.wait_until_up(self.record, timeout_seconds)

    def stop(self) -> None:
        """End it, and remove all of it."""
        operations.stop_host(self.record)
