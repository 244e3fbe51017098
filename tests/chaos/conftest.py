"""What the failures need that are made here.

Where this machine cannot make one, its tests are skipped and the end of the output says so loudly; in CI they fail."""

import os
import shutil

import pytest
from tests.support.disks import NO_POWER_CUTS, find_disk_obstacles
from tests.support.syncs import NO_STRACE


@pytest.fixture(scope="session")
def strace() -> None:
    """Kills at a sync, and slows them."""
    if shutil.which("strace") is None:
        _leave_out(NO_STRACE, "strace is not there: apt-get install strace")


@pytest.fixture(scope="session")
def power_cuts() -> None:
    """Disks that can lose power."""
    if obstacles := find_disk_obstacles():
        _leave_out(NO_POWER_CUTS, " ".join(obstacles))


def _leave_out(what: str, obstacle: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must be able to make every failure. {what}: {obstacle}")
    pytest.skip(f"{what}: {obstacle}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())]
    for reason in (NO_POWER_CUTS, NO_STRACE):
        if any(reason in text for text in skipped):
            terminalreporter.section(reason, sep="!", red=True, bold=True)
