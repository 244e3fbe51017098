"""Entry point of `fleetwire-server` and `python -m fleetwire_server`."""

import sys

from .cli import run
from .config import ServerConfig


def main() -> None:
    sys.exit(run(sys.argv[1:], _serve))


async def _serve(config: ServerConfig) -> None:
    # Loads the whole server, which the other commands need not wait for.
    from .main import serve

    await serve(config)


if __name__ == "__main__":
    main()
