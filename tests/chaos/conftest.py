"""Says at the end, so that nobody overlooks it, which failures this machine cannot make."""

import pytest
from tests.support.disks import NO_POWER_CUTS
from tests.support.syncs import NO_STRACE


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())]
    for reason in (NO_POWER_CUTS, NO_STRACE):
        if any(reason in text for text in skipped):
            terminalreporter.section(reason, sep="!", red=True, bold=True)
