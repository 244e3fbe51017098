"""The files an installation writes, as text. Pure."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fleetwire_agent.config import Profile
from fleetwire_agent.install.failures import InstallError
from fleetwire_agent.install.layout import CURRENT, KEY, MARK, SETTINGS, STATE, USER

_UNIT = """\
{mark} Limits of your own: systemctl edit fleetwire-agent
[Unit]
Description=Fleetwire agent
Documentation=man:journalctl(1)
# Not network-online.target: the agent dials again by itself, and waiting for a network that never comes delays boots.
After=network.target nss-lookup.target
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={python} -I {current} run
LoadCredential=agent-key:{key}
LoadCredential=agent.toml:{settings}
SyslogIdentifier=fleetwire-agent
StateDirectory={state}
StateDirectoryMode=0700
WorkingDirectory=/
Restart=always
RestartSec=2
# Commands have units of their own, and run on while the agent is stopped, restarted or replaced.
KillMode=mixed
TimeoutStopSec=10
# A command that eats the memory is no reason to stop the others.
OOMPolicy=continue
LimitNOFILE=4096:524288
{sandbox}
[Install]
WantedBy=multi-user.target
"""

_MANAGE = """\
# Profile manage: commands and files as root, so no sandbox. Commands run in units of their own.
TasksMax=4096
"""

_MONITOR = """\
# Profile monitor: looks, and touches nothing.
User={user}
Group={user}
{groups}TasksMax=512
MemoryMax=256M
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectHostname=yes
ProtectClock=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
# Not ProtectControlGroups and ProtectKernelTunables: this user may write to neither, and in containers of systemd 252
# they show another boot id than the journal has, so that `journalctl --follow` finds nothing.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged @resources
SystemCallErrorNumber=EPERM
"""

_INIT_SCRIPT = """\
#!/sbin/openrc-run
{mark}
name="Fleetwire agent"
description="Keeps this host connected to its Fleetwire server"
supervisor=supervise-daemon
command="{python}"
command_args="-I {current} supervise --foreground"
pidfile="/run/${{RC_SVCNAME}}-daemon.pid"
respawn_delay=2
respawn_max=0
retry="TERM/15/KILL/5"

depend() {{
    use dns logger net
    after bootmisc firewall localmount
}}
"""

_LAUNCHER = """\
#!/bin/sh
{mark}
exec {python} -I {current} "$@"
"""


def build_unit(python: str, profile: Profile, *, has_journal_group: bool) -> str:
    """Return systemd's unit. `has_journal_group`: whether the host has the group systemd-journal."""
    groups = "SupplementaryGroups=systemd-journal\n" if has_journal_group else ""
    sandbox = _MANAGE if profile == "manage" else _MONITOR.format(user=USER, groups=groups)
    return _UNIT.format(
        mark=MARK,
        python=_quote_for_systemd(python),
        current=CURRENT,
        key=KEY,
        settings=SETTINGS,
        state=STATE.name,
        sandbox=sandbox,
    )


def build_init_script(python: str) -> str:
    return _INIT_SCRIPT.format(mark=MARK, python=python, current=CURRENT)


def build_launcher(python: str) -> str:
    return _LAUNCHER.format(mark=MARK, python=python, current=CURRENT)


def build_settings(before: str, *, server: str, profile: Profile, tls_pin: str | None) -> str:
    """Return agent.toml with these settings; what else stood there `before` stays as it was.

    Raises:
        InstallError: what stands there cannot be understood."""
    ours: dict[str, str] = {"server": server, "profile": profile, "key_file": str(KEY)}
    if tls_pin:
        ours["tls_pin"] = tls_pin
    dropped = {*ours, "tls_pin", "key"}
    existing = parse_settings(before)
    kept = [line for line in before.splitlines() if _assigned_name(line) not in dropped and not line.startswith(MARK)]
    lines = [MARK, *(f"{name} = {json.dumps(value)}" for name, value in ours.items())]
    text = "\n".join([*lines, *_strip_blank(kept)]) + "\n"
    others = {name: value for name, value in existing.items() if name not in dropped}
    if parse_settings(text) != others | ours:  # such as a text of several lines: better to ask than to lose it
        raise InstallError(
            "failed", f"{SETTINGS} is written in a way this installer cannot change: one setting a line is understood"
        )
    return text.replace(MARK, f"{MARK} Settings it does not know stay.", 1)


def parse_settings(text: str) -> Mapping[str, Any]:
    """Return the settings of agent.toml. Raises InstallError."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise InstallError("failed", f"{SETTINGS} is not TOML ({err}); correct it or remove it") from err


def find_state_directory(settings: str) -> Path:
    """Return where an agent with these settings keeps its state: a person may have said. Raises InstallError."""
    return Path(str(parse_settings(settings).get("state_dir", STATE)))


def _assigned_name(line: str) -> str | None:
    name, is_assignment, _ = line.partition("=")
    return name.strip().strip("\"'") if is_assignment else None


def _strip_blank(lines: list[str]) -> list[str]:
    text = "\n".join(lines).strip("\n")
    return text.split("\n") if text else []


def _quote_for_systemd(path: str) -> str:
    return path.replace("%", "%%")


def needs_quoting(path: str | Path) -> bool:
    """Whether a path would have to be quoted in a unit or a shell script; such a Python is not taken."""
    return any(not (character.isalnum() or character in "/._+-@%,:=") for character in str(path))
