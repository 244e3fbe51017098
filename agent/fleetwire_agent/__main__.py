"""The command line `fleetwire-agent`. Prints and exits, decides nothing."""

import argparse
import asyncio
import logging
import os
import sys
from collections.abc import Sequence
from typing import Final

from fleetwire_agent.config import DEFAULT_FILE, LOG_LEVELS, AgentConfig, read_config
from fleetwire_shared import __version__
from fleetwire_shared.errors import InvalidError

EXIT_USAGE: Final = 2
"""Wrong arguments or settings: starting again changes nothing."""


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parse_arguments(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr, level=logging.INFO)
    try:
        config = read_config(vars(arguments), os.environ)
    except InvalidError as err:
        print(f"fleetwire-agent: {err}", file=sys.stderr)  # noqa: T201
        sys.exit(EXIT_USAGE)
    logging.getLogger().setLevel(config.log_level.upper())
    _run(config)


def _run(config: AgentConfig) -> None:
    from fleetwire_agent.main import run_agent  # here: --version and a wrong setting need none of it

    asyncio.run(run_agent(config))


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fleetwire-agent", description="The Fleetwire agent of this host.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="connect to the server and serve it until stopped")
    run.add_argument("--server", metavar="URL", help="http:// or https:// address of the server")
    run.add_argument("--key", help="the agent's key; visible in the process list, prefer --key-file")
    run.add_argument("--key-file", metavar="FILE", help="file that holds the agent's key")
    run.add_argument("--state-dir", metavar="DIR", help="where the agent keeps its state")
    run.add_argument("--config", metavar="FILE", help=f"settings in TOML (default: {DEFAULT_FILE}, if there)")
    run.add_argument("--log-level", choices=LOG_LEVELS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
