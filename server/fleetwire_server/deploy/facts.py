"""What is read of a host before anything is changed there: one script, and the parsing of what it prints."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fleetwire_server.deploy.python_hint import PYTHON_MODULES
from fleetwire_shared.limits import AGENT_ID_PATTERN

SudoFact: TypeAlias = Literal["root", "nopasswd", "password", "missing", "refused"]

_IDENTITY = r'sed -n "s/^agt_\([0-9a-z]\{16\}\)_.*/agent_id=agent_\1/p" /etc/fleetwire/agent.key 2>/dev/null'
"""Only the part of the key that names the agent leaves the host. Holds no single quote."""

IDENTITY_SCRIPT = f"{_IDENTITY}; echo end=identity; if read -r line; then echo unread=yes; fi"
"""Run as root, where reading the identity takes a password: prints the id of the agent whose key is there, if any; and
whether sudo left the line with the password to whatever it starts."""

FACTS_SCRIPT = rf"""
LC_ALL=C; export LC_ALL
PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
echo "begin=facts"
echo "uid=$(id -u)"
echo "kernel=$(uname -s)"
echo "arch=$(uname -m)"
echo "long_bit=$(getconf LONG_BIT 2>/dev/null)"
if grep -q /ld-musl- /proc/self/maps 2>/dev/null; then echo "libc=musl"
elif grep -q /libc /proc/self/maps 2>/dev/null; then echo "libc=glibc"; fi
if [ -d /run/systemd/system ]; then echo "init=systemd"
elif [ -d /run/openrc ]; then echo "init=openrc"
else echo "init=plain"; fi
for file in /etc/os-release /usr/lib/os-release; do
    [ -r "$file" ] || continue
    ( . "$file"; printf 'os_id=%s\nos_version=%s\nos_like=%s\nos_name=%s\n' \
        "$ID" "$VERSION_ID" "$ID_LIKE" "$PRETTY_NAME" )
    break
done
for directory in /usr/bin /usr/local/bin /bin /run/current-system/sw/bin; do
    for python in "$directory"/python3 "$directory"/python3.[0-9] "$directory"/python3.[0-9][0-9]; do
        [ -x "$python" ] || continue
        "$python" -I -c '
import sys
version = "%d.%d.%d" % sys.version_info[:3]
try:
    import {PYTHON_MODULES}
    state = "whole"
except ImportError:
    state = "incomplete"
print("python=%s %s %s" % (sys.argv[1], version, state))' "$python" </dev/null 2>/dev/null
    done
done
for name in opt tmp; do
    directory=/$name
    [ -d "$directory" ] || directory=/
    echo "${{name}}_free_kib=$(df -Pk "$directory" 2>/dev/null | awk 'NR == 2 {{ print $4 }}')"
done
if [ -e /opt/fleetwire-agent/current ] || [ -e /etc/fleetwire/agent.key ]; then echo "managed=yes"; fi
identity='{_IDENTITY}'
if [ "$(id -u)" = 0 ]; then
    echo "sudo=root"
    sh -c "$identity"
elif ! command -v sudo >/dev/null; then
    echo "sudo=missing"
elif said=$(sudo -k -n -- sh -c : </dev/null 2>&1); then
    echo "sudo=nopasswd"
    sudo -k -n -- sh -c "$identity" </dev/null
else
    case $said in
        *"password is required"* | *"authentication is required"*) echo "sudo=password" ;;
        *) echo "sudo=refused"; printf '%s\n' "$said" | sed -n '1s/^/sudo_said=/p' ;;
    esac
fi
echo "end=facts"
"""
"""For a POSIX sh, on its standard input. Prints `key=value` lines, `end=facts` last; changes nothing."""

_PYTHON = re.compile(r"(/\S+) (\d+)\.(\d+)\.(\d+) (whole|incomplete)")
_AGENT_ID = re.compile(AGENT_ID_PATTERN, re.ASCII)


@dataclass(frozen=True, slots=True)
class PythonFact:
    path: str
    version: tuple[int, int, int]
    is_whole: bool  # has the parts of the standard library that distributions may split off


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What the script said; "" and None where it said nothing."""

    uid: int | None
    kernel: str
    arch: str
    long_bit: str
    libc: str
    init: str
    os_id: str
    os_version: str
    os_like: tuple[str, ...]
    os_name: str
    pythons: tuple[PythonFact, ...]
    opt_free_bytes: int | None
    tmp_free_bytes: int | None
    is_managed: bool
    agent_id: str | None  # of the agent whose key is there; None also where it could not be read
    sudo: SudoFact
    sudo_said: str


def parse_facts(output: str) -> HostFacts | None:
    """Return the facts in the script's output; None where it did not run to its end.

    What a shell's start-up files print around it is passed over."""
    lines = list(_lines_of(output, "begin=facts", "end=facts"))
    if not lines:
        return None
    values = dict(lines)
    sudo = values.get("sudo", "")
    return HostFacts(
        uid=_whole(values.get("uid")),
        kernel=values.get("kernel", ""),
        arch=values.get("arch", ""),
        long_bit=values.get("long_bit", ""),
        libc=values.get("libc", ""),
        init=values.get("init", ""),
        os_id=values.get("os_id", ""),
        os_version=values.get("os_version", ""),
        os_like=tuple(values.get("os_like", "").split()),
        os_name=values.get("os_name", ""),
        pythons=tuple(_pythons(lines)),
        opt_free_bytes=_bytes(values.get("opt_free_kib")),
        tmp_free_bytes=_bytes(values.get("tmp_free_kib")),
        is_managed=values.get("managed") == "yes",
        agent_id=_agent_id(values.get("agent_id", "")),
        sudo=_SUDO.get(sudo, "refused"),
        sudo_said=values.get("sudo_said", ""),
    )


def parse_identity(output: str) -> str | None:
    """Return the agent id that IDENTITY_SCRIPT printed, None where there is none."""
    for line in output.splitlines():
        if line.startswith("agent_id="):
            return _agent_id(line.removeprefix("agent_id="))
    return None


_SUDO: dict[str, SudoFact] = {
    "root": "root", "nopasswd": "nopasswd", "password": "password", "missing": "missing", "refused": "refused"
}  # fmt: skip


def _lines_of(output: str, first: str, last: str) -> Iterator[tuple[str, str]]:
    lines = output.splitlines()
    if first not in lines or last not in lines:
        return
    for line in lines[lines.index(first) + 1 : len(lines) - 1 - lines[::-1].index(last)]:
        key, has_value, value = line.partition("=")
        if has_value:
            yield key, value.strip()


def _pythons(lines: list[tuple[str, str]]) -> Iterator[PythonFact]:
    for key, value in lines:
        match = _PYTHON.fullmatch(value) if key == "python" else None
        if match is not None:
            version = (int(match[2]), int(match[3]), int(match[4]))
            yield PythonFact(match[1], version, match[5] == "whole")


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


def _bytes(kib: str | None) -> int | None:
    number = _whole(kib)
    return None if number is None else number * 1024


def _agent_id(text: str) -> str | None:
    return text if _AGENT_ID.fullmatch(text) else None


def is_line_unread(text: str) -> bool:
    """Whether IDENTITY_SCRIPT found the line that sudo was to read."""
    return "unread=yes" in text.splitlines()
