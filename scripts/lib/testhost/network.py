"""One bridge within this machine, and for each host a network namespace with one cable to it.

Nothing is routed: hosts reach each other and this machine's address on the bridge, and nothing else."""

import ipaddress
from pathlib import Path
from typing import Final

from .processes import wait_until
from .programs import run, try_run

BRIDGE: Final = "fleetwire0"
NETWORK: Final = ipaddress.IPv4Network("10.213.0.0/16")
BRIDGE_ADDRESS: Final = "10.213.0.1"
HOST_COUNT: Final = 60_000  # numbers before they start again; 10.213.1.0 is the first

_BLOCKED: Final = 0
_FORWARDING: Final = 3
_PLUG_IN_SECONDS: Final = 10
_INTERFACE: Final = "host0"  # as systemd-nspawn names it


def address_of(number: int) -> str:
    return str(NETWORK[256 + number])


def namespace_of(number: int) -> str:
    return f"fleetwire-{number}"


def cable_of(number: int) -> str:
    """Return this machine's end of the host's cable; a name has at most 15 characters."""
    return f"fwhost{number}"


def add_bridge() -> None:
    """Make the bridge unless it is there. Call it with the lock held."""
    if has_bridge():
        return
    # With an address of its own, the bridge does not take that of its first port: hosts would remember an old one.
    run("ip", "link", "add", BRIDGE, "address", _hardware_address(0), "type", "bridge")
    run("ip", "address", "add", f"{BRIDGE_ADDRESS}/{NETWORK.prefixlen}", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")


def has_bridge() -> bool:
    return try_run("ip", "link", "show", BRIDGE).returncode == 0


def remove_bridge() -> None:
    try_run("ip", "link", "delete", BRIDGE)


def add_network(number: int, *, is_cut: bool) -> None:
    """Make the namespace and the cable, as a machine has them when it is switched on."""
    remove_network(number)
    namespace, cable = namespace_of(number), cable_of(number)
    run("ip", "netns", "add", namespace)
    peer = ("peer", "name", _INTERFACE, "address", _hardware_address(number), "netns", namespace)
    run("ip", "link", "add", cable, "type", "veth", *peer)
    run("ip", "link", "set", cable, "master", BRIDGE, "up")
    commands = [
        "link set lo up",
        f"address add {address_of(number)}/{NETWORK.prefixlen} broadcast + dev {_INTERFACE}",
        f"link set {_INTERFACE} up",
    ]
    run("ip", "-n", namespace, "-batch", "-", content="\n".join(commands))
    if is_cut:
        # The kernel lets a cable that is plugged in at both ends forward a moment later: it would undo an earlier cut.
        port_state = Path(f"/sys/class/net/{cable}/brport/state")
        wait_until(lambda: int(port_state.read_text()) == _FORWARDING, f"{cable} forwarding", _PLUG_IN_SECONDS)
        cut(number)


def remove_network(number: int) -> None:
    """Remove all of it, with what its connections had still to send: no peer hears of the end."""
    try_run("ip", "link", "delete", cable_of(number))
    try_run("ip", "netns", "delete", namespace_of(number))


def cut(number: int) -> None:
    """Drop every packet in both directions, without a word to anybody."""
    run("bridge", "link", "set", "dev", cable_of(number), "state", _BLOCKED)


def heal(number: int) -> None:
    run("bridge", "link", "set", "dev", cable_of(number), "state", _FORWARDING)


def _hardware_address(number: int) -> str:
    """Return the same one at each boot, as a network card has; the second bit says that no maker gave it."""
    return "02:f1:ee:7a:" + number.to_bytes(2).hex(":")
