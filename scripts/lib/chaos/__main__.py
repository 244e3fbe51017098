"""The command line of scripts/chaos."""

import argparse
import asyncio
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final

from scripts.lib.chaos.parts import ChaosError
from scripts.lib.chaos.report import format_history, format_table, say
from scripts.lib.chaos.run import Outcome, make_plan, run_plan

HISTORIES: Final = 20
"""How many violations are told at length; their number is in the table."""


def main() -> int:
    arguments = _parse_arguments()
    signal.signal(signal.SIGTERM, _stop)
    plan = make_plan(arguments.commands, seed=arguments.seed, agents=arguments.agents, strikes=arguments.strikes)
    faults = sum(len(strike.faults) for strike in plan.strikes)
    say(f"seed {plan.seed}: {len(plan.orders)} commands for {plan.agents} agents, {faults} faults")
    try:
        with _directory(arguments.keep) as directory:
            outcome = asyncio.run(run_plan(plan, directory))
            tell(outcome, directory)
    except ChaosError as err:
        say(str(err))
        return 2
    except KeyboardInterrupt:
        say("stopped")
        return 130
    return 1 if outcome.violations else 0


def tell(outcome: Outcome, directory: Path) -> None:
    """Print the table, after the histories of what went wrong."""
    tokens = dict.fromkeys(violation.token for violation in outcome.violations if violation.token)
    for token in list(tokens)[:HISTORIES]:
        print(format_history(outcome, token, directory), end="\n\n")
    for violation in outcome.violations:
        if violation.token is None:
            print(f"==== {violation.rule}: {violation.detail}", end="\n\n")
    print(format_table(outcome))


@contextmanager
def _directory(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        try:
            kept.mkdir(parents=True)
        except FileExistsError as err:
            raise ChaosError(f"--keep: {kept} exists; give a new directory") from err
        except OSError as err:
            raise ChaosError(f"--keep: {kept} cannot be made: {err.strerror}; give another directory") from err
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="fleetwire-chaos-") as name:
        yield Path(name)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _whole(text: str, *, at_least: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < at_least:
        raise argparse.ArgumentTypeError(f"must be a whole number, {at_least} or more, got {text}")
    return int(text)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description="Run commands while everything fails.")
    positive, natural = partial(_whole, at_least=1), partial(_whole, at_least=0)
    parser.add_argument("--commands", type=positive, required=True, metavar="N", help="how many")
    parser.add_argument("--seed", type=natural, default=secrets.randbelow(10**6), help="of the schedule; default: any")
    parser.add_argument("--agents", type=positive, default=1, metavar="K", help="how many; default: 1")
    parser.add_argument(
        "--strikes", type=natural, metavar="N", help="how often faults strike; default: by the commands"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep logs and state there, in a new directory")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
