"""The command line of the server: reads arguments, calls, prints and exits."""

import errno
import sys
from collections.abc import Sequence

import click

from fleetwire_shared.errors import FleetwireError, InvalidError

from .root import ServeProgram, root

__all__ = ["run"]

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run(arguments: Sequence[str], serve: ServeProgram) -> int:
    """Run one command line and return the exit status.

    Args:
        serve: the program that `serve` starts. What went wrong is told in one line on standard error."""
    try:
        result = root.main(list(arguments), prog_name="fleetwire-server", standalone_mode=False, obj=serve)
    except click.exceptions.NoArgsIsHelpError as err:
        err.show()
        return EXIT_USAGE
    except click.UsageError as err:
        help_command = f"{err.ctx.command_path} --help" if err.ctx else "fleetwire-server --help"
        return _fail(f"{err.format_message()} (see {help_command})", EXIT_USAGE)
    except click.ClickException as err:
        return _fail(err.format_message(), err.exit_code)
    except InvalidError as err:
        return _fail(err.message, EXIT_USAGE)
    except FleetwireError as err:
        return _fail(err.message, EXIT_FAILURE)
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except OSError as err:
        if err.errno == errno.EPIPE:  # the reader of our output left, such as head
            return EXIT_FAILURE
        return _fail(str(err), EXIT_FAILURE)
    return result if isinstance(result, int) else 0


def _fail(message: str, status: int) -> int:
    one_line = " ".join(message.split())
    print(f"fleetwire-server: {one_line}", file=sys.stderr)
    return status
