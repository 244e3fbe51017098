"""Whether this Python can run the agent: proved by importing all of it."""

import json
import platform
import sys

from fleetwire_agent.native import find_platform
from fleetwire_agent.version import read_version


def describe_python() -> str:
    """Return a JSON object of this interpreter. Raises ImportError: something of the agent cannot be imported."""
    name = find_platform()  # first: it says best what is wrong
    import fleetwire_agent.main  # noqa: F401 - the import is the check

    facts = {
        "version": read_version(),
        "python": sys.executable,
        "python_version": platform.python_version(),
        "platform": name,
    }
    return json.dumps(facts)
