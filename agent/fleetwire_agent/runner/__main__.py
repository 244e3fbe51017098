"""`python -I -S .../runner DIRECTORY`: run the command whose order is in the directory."""

import os
import sys


def main() -> int:
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__)))))  # noqa: PTH120
    from fleetwire_agent.runner.supervisor import run

    return run(sys.argv[1])


if __name__ == "__main__":
    sys.exit(main())
