"""The command line `fleetwire-agent`. Prints and exits, decides nothing."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from fleetwire_agent.config import (
    DEFAULT_FILE,
    DEFAULT_STATE_DIR,
    LOG_LEVELS,
    PROFILES,
    AgentConfig,
    check_key,
    check_pin,
    check_server,
    read_config,
)
from fleetwire_agent.version import read_version
from fleetwire_shared.errors import FleetwireError, InvalidError

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
"""Wrong arguments or settings: starting again changes nothing."""

EXIT_NOT_CONNECTED: Final = 3


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _build_parser().parse_args(argv)
    try:
        sys.exit(arguments.call(arguments))
    except InvalidError as err:
        print(f"fleetwire-agent: {err}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except FleetwireError as err:
        print(f"fleetwire-agent: {err}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fleetwire-agent", description="The Fleetwire agent of this host.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {read_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="connect to the server and serve it until stopped")
    run.add_argument("--server", metavar="URL", help="http:// or https:// address of the server")
    run.add_argument("--key", help="the agent's key; visible in the process list, prefer --key-file")
    run.add_argument("--key-file", metavar="FILE", help="file that holds the agent's key")
    run.add_argument("--state-dir", metavar="DIR", help="where the agent keeps its state")
    run.add_argument("--config", metavar="FILE", help=f"settings in TOML (default: {DEFAULT_FILE}, if there)")
    run.add_argument("--log-level", choices=LOG_LEVELS)
    run.set_defaults(call=_run)

    status = commands.add_parser("status", help="say whether the agent is connected; exit 0 if so, else 3")
    status.add_argument("--state-dir", metavar="DIR", default=DEFAULT_STATE_DIR)
    status.set_defaults(call=_show_status)

    install = commands.add_parser("install", help="install this agent as a service, or upgrade it to this version")
    install.add_argument("--server", metavar="URL", required=True)
    install.add_argument("--key-file", metavar="FILE", required=True, help="file with the agent's key; - for stdin")
    install.add_argument("--profile", choices=PROFILES, help="what the server may do here (default: as it is; manage)")
    install.add_argument("--tls-pin", metavar="PINS", help="sha256//BASE64[;...]: the server's public key")
    install.add_argument("--python", metavar="PATH", help="the Python to run with (default: /usr/bin/python3, or this)")
    install.add_argument("--replace", action="store_true", help="take over a host that has another agent's key")
    install.add_argument("--no-wait", action="store_true", help="do not wait until the agent is connected")
    install.add_argument("--wait-seconds", type=_seconds, default=30.0, metavar="N", help="how long (default: 30)")
    install.set_defaults(call=_install)

    uninstall = commands.add_parser("uninstall", help="remove the agent from this host")
    uninstall.add_argument("--purge", action="store_true", help="also its settings, key and state")
    uninstall.set_defaults(call=_uninstall)
    for changing in (install, uninstall):
        changing.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
        changing.add_argument("--json", action="store_true", help="one JSON object a line")

    supervise = commands.add_parser("supervise", help="keep the agent running where no service manager does")
    supervise.add_argument("--foreground", action="store_true", help="stay in this process")
    supervise.set_defaults(call=_supervise)

    check = commands.add_parser("self-check", help="say as JSON what this Python is, if it can run the agent")
    check.set_defaults(call=_check_self)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.INFO)
    names = ("server", "key", "key_file", "state_dir", "config", "log_level")
    config = read_config({name: getattr(arguments, name) for name in names}, os.environ)
    logging.getLogger().setLevel(config.log_level.upper())
    return _serve(config)


def _serve(config: AgentConfig) -> int:
    import asyncio

    try:
        from fleetwire_agent.main import run_agent  # here: --version and a wrong setting need none of it
    except ImportError as err:
        print(f"fleetwire-agent: {err}", file=sys.stderr)
        return EXIT_FAILED
    asyncio.run(run_agent(config))
    return 0


def _show_status(arguments: argparse.Namespace) -> int:
    from fleetwire_agent.status import format_status, is_alive, read_status

    try:
        status = read_status(Path(arguments.state_dir))
    except PermissionError:
        print(f"fleetwire-agent: only root may read {arguments.state_dir}; use sudo", file=sys.stderr)
        return EXIT_FAILED
    print(format_status(status, time.time()))
    is_connected = status is not None and status.state == "connected" and is_alive(status)
    return 0 if is_connected else EXIT_NOT_CONNECTED


def _install(arguments: argparse.Namespace) -> int:
    from fleetwire_agent.install.installation import Options, run_install
    from fleetwire_agent.install.report import Report

    server = check_server(arguments.server)
    options = Options(
        server=server,
        key=_read_key(arguments.key_file),
        profile=arguments.profile,
        tls_pin=check_pin(arguments.tls_pin or "", server),
        python=arguments.python,
        is_dry_run=arguments.dry_run,
        is_waiting=not arguments.no_wait,
        is_replacing=arguments.replace,
        wait_seconds=arguments.wait_seconds,
    )
    report = Report(is_json=arguments.json)
    outcome = run_install(options, report)
    report.finish(outcome)
    return EXIT_FAILED if outcome.result == "failed" else 0


def _read_key(name: str) -> str:
    try:
        text = sys.stdin.readline() if name == "-" else Path(name).read_text(encoding="ascii")
    except OSError as err:
        raise InvalidError(f"key file {name}: {err.strerror}") from err
    except UnicodeDecodeError as err:
        raise InvalidError(f"key file {name} does not hold a key") from err
    return check_key(text.strip(), "the key")


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"must be 1 to 3600 seconds, got {text}")
    return seconds


def _uninstall(arguments: argparse.Namespace) -> int:
    from fleetwire_agent.install.report import Report
    from fleetwire_agent.install.uninstall import run_uninstall

    report = Report(is_json=arguments.json)
    outcome = run_uninstall(report, is_purging=arguments.purge, is_dry_run=arguments.dry_run)
    report.finish(outcome)
    return EXIT_FAILED if outcome.result == "failed" else 0


def _supervise(arguments: argparse.Namespace) -> int:
    from fleetwire_agent.install.supervise import supervise

    supervise(is_detached=not arguments.foreground)
    return 0


def _check_self(arguments: argparse.Namespace) -> int:
    del arguments
    from fleetwire_agent.self_check import describe_python

    try:
        print(describe_python())
    except ImportError as err:
        print(f"fleetwire-agent: {err}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    main()
