"""Starts the agent out of its bundle; becomes __main__.py there.

Parses on Pythons that are far too old for the agent, so that it can say what is missing instead of a SyntaxError."""

import os
import sys

OLDEST = (3, 11)


def explain_old_python(version: str, executable: str, newer: "str | None") -> str:
    """Return what to tell the user of a Python that is too old; `newer` is one that would do, or None."""
    text = "fleetwire-agent: needs Python 3.11 or later; %s is Python %s.\n" % (executable, version)
    if newer:
        return text + "This host has one that is new enough. Run the same with it:\n  %s %s\n" % (
            newer,
            " ".join(sys.argv),
        )
    return text + (
        "Install one beside it with the package manager, then run the same with it. It is called python3.11 (or\n"
        "3.12, ...) on Debian, Ubuntu, Fedora, RHEL and the like, python311 on openSUSE and SLES, python3 on Alpine:\n"
        "  python3.11 %s\n" % " ".join(sys.argv)
    )


def find_newer_python() -> "str | None":
    for minor in range(19, OLDEST[1] - 1, -1):
        for directory in os.environ.get("PATH", os.defpath).split(os.pathsep) + ["/usr/local/bin", "/usr/bin"]:
            path = os.path.join(directory, "python3.%d" % minor)
            if os.access(path, os.X_OK):
                return path
    return None


def main() -> None:
    if sys.version_info < OLDEST:
        sys.stderr.write(explain_old_python("%d.%d" % sys.version_info[:2], sys.executable, find_newer_python()))
        sys.exit(1)
    # Not the link `current`: what is imported late must be of the version that was started.
    root = sys.path[0] = os.path.realpath(sys.path[0])
    from fleetwire_agent.native import NativeFinder

    sys.meta_path.insert(0, NativeFinder(root))
    from fleetwire_agent.__main__ import main as run

    run()


if __name__ == "__main__":
    main()
