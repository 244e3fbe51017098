"""Starts the agent out of its bundle; becomes __main__.py there.

Parses on Pythons that are far too old for the agent, so that it can say what is missing instead of a SyntaxError."""

import os
import sys

OLDEST = (3, 11)

_OLD = "fleetwire-agent: needs Python {0}.{1} or later; {2} is Python {3}.{4}.\n"
_USE = "This host has one that is new enough. Run the same with it:\n  {0} {1}\n"
_INSTALL = """\
Install one beside it with the package manager, then run the same with it. It is called python3.11 (or 3.12, ...) on
Debian, Ubuntu, Fedora, RHEL and their relatives, python311 on openSUSE and SLES, python3 on Alpine:
  python3.11 {0}
"""


def explain_old_python(newer):  # type: ignore[no-untyped-def]
    """Return what to tell the user of a Python that is too old; `newer` is one that would do, or None."""
    text = _OLD.format(OLDEST[0], OLDEST[1], sys.executable, sys.version_info[0], sys.version_info[1])
    arguments = " ".join(sys.argv)
    return text + (_USE.format(newer, arguments) if newer else _INSTALL.format(arguments))


def find_newer_python():  # type: ignore[no-untyped-def]
    directories = os.environ.get("PATH", os.defpath).split(os.pathsep) + ["/usr/local/bin", "/usr/bin"]
    for minor in range(19, OLDEST[1] - 1, -1):
        for directory in directories:
            path = os.path.join(directory, "python3.{0}".format(minor))
            if os.access(path, os.X_OK):
                return path
    return None


def main():  # type: ignore[no-untyped-def]
    if sys.version_info < OLDEST:
        sys.stderr.write(explain_old_python(find_newer_python()))  # type: ignore[no-untyped-call]
        sys.exit(1)
    # Not the link `current`: what is imported late must be of the version that was started.
    root = sys.path[0] = os.path.realpath(sys.path[0])
    from fleetwire_agent.native import NativeFinder

    sys.meta_path.insert(0, NativeFinder(root))
    from fleetwire_agent.__main__ import main as run

    run()


if __name__ == "__main__":
    main()  # type: ignore[no-untyped-call]
