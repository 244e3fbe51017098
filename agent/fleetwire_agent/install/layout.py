"""Where things are on a host, and how what the installer wrote is told from what others wrote."""

from pathlib import Path
from typing import Final

PROGRAM: Final = Path("/opt/fleetwire-agent")
VERSIONS: Final = PROGRAM / "versions"
CURRENT: Final = PROGRAM / "current"
PREVIOUS: Final = PROGRAM / "previous"
PENDING: Final = PROGRAM / ".pending"
"""There while an installation is under way, and after one that was killed: the next one starts the agent again."""

LAUNCHER: Final = Path("/usr/local/bin/fleetwire-agent")

SETTINGS_DIRECTORY: Final = Path("/etc/fleetwire")
SETTINGS: Final = SETTINGS_DIRECTORY / "agent.toml"
KEY: Final = SETTINGS_DIRECTORY / "agent.key"

STATE: Final = Path("/var/lib/fleetwire-agent")
LOG: Final = Path("/var/log/fleetwire-agent.log")
"""Of the supervisor; where systemd runs, the journal has it all."""

UNIT_NAME: Final = "fleetwire-agent.service"
UNIT: Final = Path("/etc/systemd/system") / UNIT_NAME
UNIT_LINK: Final = Path("/etc/systemd/system/multi-user.target.wants") / UNIT_NAME
UNIT_DROP_INS: Final = Path("/etc/systemd/system/fleetwire-agent.service.d")
OTHER_UNITS: Final = tuple(Path(name) / UNIT_NAME for name in ("/usr/lib/systemd/system", "/lib/systemd/system"))

INIT_SCRIPT: Final = Path("/etc/init.d/fleetwire-agent")
PID_FILE: Final = Path("/run/fleetwire-agent.pid")
CREDENTIALS: Final = Path("/run/fleetwire-agent-credentials")
LOCK: Final = Path("/run/fleetwire-install.lock")

USER: Final = "fleetwire-agent"
USER_COMMENT: Final = "Fleetwire agent; made by its installer"
"""A user of that name with another comment is somebody else's, and is left when the agent goes."""

MARK: Final = "# Written by `fleetwire-agent install`, which replaces it at the next installation."
_MARK_START: Final = b"# Written by `fleetwire-agent install`"


def is_ours(path: Path) -> bool:
    """Whether the installer wrote this file, which says so in one of its first two lines."""
    try:
        with path.open("rb") as file:
            return any(line.startswith(_MARK_START) for line in (file.readline(), file.readline()))
    except OSError:
        return False
