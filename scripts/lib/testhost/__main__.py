"""The command line of scripts/testhost. Prints and exits, decides nothing."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

from . import operations
from .network import BRIDGE_ADDRESS
from .places import SSH_KEY, HostError
from .programs import check_obstacles
from .records import list_records, read_record
from .roots import INITS, RECIPES, RELEASES, build_roots


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse_arguments(argv)
    try:
        check_obstacles()
        sys.exit(arguments.run(arguments))
    except HostError as err:
        sys.exit(f"testhost: {err}")


def _build(arguments: argparse.Namespace) -> None:
    started_at = time.monotonic()
    for name, path in build_roots(tuple(arguments.root) or tuple(RECIPES)).items():
        print(f"{name}: {path}")
    print(f"took {time.monotonic() - started_at:.1f} s")


def _boot(arguments: argparse.Namespace) -> None:
    if arguments.release not in RELEASES:
        record = read_record(arguments.release)
        operations.start_host(record)
    else:
        record = operations.boot_host(
            arguments.release,
            init=arguments.init,
            binds=arguments.bind,
            disk_mib=arguments.disk_mib,
            python=not arguments.without_python,
            owner_pid=arguments.owner,
        )
    if arguments.json:
        print(json.dumps(operations.describe(record)))
    else:
        print(f"{record.name} is up at {record.address}; this machine is {BRIDGE_ADDRESS} to it")
        print(f"ssh -i {SSH_KEY} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null root@{record.address}")


def _list(arguments: argparse.Namespace) -> None:
    hosts = [operations.describe(record) for record in list_records()]
    if arguments.json:
        print(json.dumps(hosts))
        return
    for host in hosts:
        state = "cut" if host["is_cut"] else "on" if host["is_on"] else "off"
        owner = f"of process {host['owner_pid']}" if host["owner_pid"] else ""
        print(f"{host['name']:16} {host['address']:15} {host['init']:8} {state:4} {owner}".rstrip())


def _exec(arguments: argparse.Namespace) -> None:
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    term = {"TERM": os.environ.get("TERM", "dumb")}
    argv = operations.build_exec(read_record(arguments.name), command or ["/bin/bash", "-l"], term)
    os.execvp(argv[0], argv)


def _stop(arguments: argparse.Namespace) -> int:
    if arguments.all:
        stopped = operations.stop_all()
    elif arguments.leftovers:
        stopped = operations.stop_leftovers()
    elif arguments.name:
        stopped = arguments.name
        for name in arguments.name:
            operations.stop_host(read_record(name))
    else:
        print("testhost: say which host to stop, or --all, or --leftovers", file=sys.stderr)
        return 2
    print(f"stopped: {', '.join(stopped) or 'none, there was none'}")
    return 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/testhost", description="Real Debian hosts on this machine, to test against. Needs root."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        return command

    build = add("build", _build, "build the roots that hosts are made from, where they are missing")
    build.add_argument("root", nargs="*", help=f"default: all of {', '.join(RECIPES)}")

    boot = add("boot", _boot, "boot a new host, or one that is off; returns when its sshd listens")
    boot.add_argument("release", help=f"{', '.join(RELEASES)}, or the name of a host that is off")
    boot.add_argument("--init", choices=INITS, default="systemd")
    boot.add_argument("--bind", metavar="DIR", action="append", default=[], help="the same directory in the host")
    boot.add_argument("--disk-mib", metavar="N", type=int, help="size of its root filesystem")
    boot.add_argument("--without-python", action="store_true")
    boot.add_argument("--owner", metavar="PID", type=int, help="the host ends with this process")
    boot.add_argument("--json", action="store_true")

    listing = add("list", _list, "list the hosts of this machine")
    listing.add_argument("--json", action="store_true")

    execute = add("exec", _exec, "run a command in a host as root; without one, a shell")
    execute.add_argument("name")
    execute.add_argument("command", nargs=argparse.REMAINDER)

    for name, operation, text in (
        ("cut", operations.cut_host, "drop every packet from and to a host, silently"),
        ("heal", operations.heal_host, "the end of `cut`"),
        ("reboot", operations.reboot_host, "reboot a host in order"),
        ("kill", operations.kill_host, "cut a host's power; `boot NAME` switches it on again"),
    ):
        command = add(name, lambda arguments, do=operation: do(read_record(arguments.name)), text)  # type: ignore[misc]
        command.add_argument("name")

    stop = add("stop", _stop, "end hosts and remove all of them")
    stop.add_argument("name", nargs="*")
    stop.add_argument("--all", action="store_true", help="every host of this machine, whoever uses it")
    stop.add_argument("--leftovers", action="store_true", help="hosts whose owner has ended; done at each boot, too")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
