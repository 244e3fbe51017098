"""Takes the agent off its host: at a person's wish, or by the agent itself while it runs."""

import os
import shutil
from pathlib import Path

from fleetwire_agent.config import Profile
from fleetwire_agent.install.changes import hand_over
from fleetwire_agent.install.failures import InstallError, describe_os_error
from fleetwire_agent.install.host import check_root, find_init
from fleetwire_agent.install.installation import check_place, only_one
from fleetwire_agent.install.layout import (
    INIT_SCRIPT,
    LAUNCHER,
    LOG,
    PROGRAM,
    SETTINGS_DIRECTORY,
    STATE,
    UNIT,
    UNIT_DROP_INS,
    VERSIONS,
    is_ours,
)
from fleetwire_agent.install.report import Outcome, Report, Result
from fleetwire_agent.install.services import Plain, Service, make_service, read_supervisor
from fleetwire_agent.install.users import is_our_user, remove_user
from fleetwire_agent.version import program_root
from fleetwire_shared.errors import ConflictError, UnavailableError

_KEPT = (SETTINGS_DIRECTORY, STATE)


def run_uninstall(report: Report, *, is_purging: bool, is_dry_run: bool) -> Outcome:
    """Remove the agent; without `is_purging` leave its settings and state. Raises nothing but faults of its own."""
    try:
        check_root()
        if not is_dry_run:
            check_place()
        with only_one():
            return _uninstall(report, is_purging=is_purging, is_dry_run=is_dry_run)
    except OSError as err:
        problem = describe_os_error(err)
    except InstallError as err:
        problem = err
    return Outcome(result="failed", version=None, agent_id=None, reason=problem.reason, detail=problem.message)


def _uninstall(report: Report, *, is_purging: bool, is_dry_run: bool) -> Outcome:
    service = make_service(find_init())
    paths = list_installed(is_purging=is_purging)
    if not paths and not is_our_user():
        kept = [str(path) for path in _KEPT if path.exists()]
        rest = f"; {' and '.join(kept)} are kept, --purge removes them" if kept else ""
        return _outcome("nothing", f"No Fleetwire agent is installed here{rest}")
    if is_dry_run:
        report.step("plan", "would stop the agent")
        for path in paths:
            report.step("plan", f"would remove {path}")
        if is_our_user():
            report.step("plan", "would remove the user fleetwire-agent")
        return _outcome("dry_run", "Nothing was changed.")
    if is_ours(UNIT) or is_ours(INIT_SCRIPT) or isinstance(service, Plain):
        service.stop()
        report.step("stop", "the agent is stopped")
    removed = remove_all(service, is_purging=is_purging, is_leaving=False)
    for name in removed:
        report.step("remove", name)
    kept = [str(path) for path in _KEPT if path.exists()]
    rest = f"; {' and '.join(kept)} are kept, --purge removes them" if kept else ""
    return _outcome("uninstalled", f"The Fleetwire agent is removed{rest}")


def _outcome(result: Result, detail: str) -> Outcome:
    return Outcome(result=result, version=None, agent_id=None, reason=None, detail=detail)


def list_installed(*, is_purging: bool) -> list[Path]:
    """Return what there is to remove. A unit or a launcher that is not ours is not."""
    ours = [path for path in (UNIT, INIT_SCRIPT, LAUNCHER) if is_ours(path)]
    paths = [*ours, PROGRAM, *_list_purged()] if is_purging else [*ours, PROGRAM]
    return [path for path in paths if os.path.lexists(path)]


def _list_purged() -> list[Path]:
    return [*_KEPT, LOG, LOG.with_name(f"{LOG.name}.1"), UNIT_DROP_INS]


def remove_all(service: Service, *, is_purging: bool, is_leaving: bool) -> list[str]:
    """Remove everything of the agent that is on the host and return the paths. The first thing to go is what would
    start it again, so a removal that fails half-way leaves no agent that comes back."""
    removed = service.forget(is_leaving=is_leaving)
    for path in list_installed(is_purging=is_purging):
        _remove(path)
        removed.append(str(path))
    for directory in (LAUNCHER.parent, UNIT.parent):
        for leftover in directory.glob(".fleetwire-agent*.fleetwire-*"):
            leftover.unlink(missing_ok=True)
    if is_our_user():
        if STATE.exists():
            hand_over(STATE, 0, 0)
        remove_user()
        removed.append("user fleetwire-agent")
    return removed


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- by the agent itself


def remove_running_agent(*, profile: Profile, purge: bool) -> tuple[str, ...]:
    """Remove everything of the agent that calls this, but its process; return what was removed. Blocking.

    The caller then sends its answer and calls `leave`.

    Raises:
        ConflictError: this agent cannot remove itself; the message says why.
        UnavailableError: something could not be removed."""
    check_removable(profile)
    service = make_service(find_init())
    try:
        with only_one():
            return tuple(remove_all(service, is_purging=purge, is_leaving=True))
    except InstallError as err:
        if err.reason == "busy":
            raise ConflictError(err.message) from err
        raise UnavailableError(f"the agent could not be removed from its host: {err.message}") from err
    except OSError as err:
        problem = describe_os_error(err).message
        raise UnavailableError(f"the agent could not be removed from its host: {problem}") from err


def check_removable(profile: Profile) -> None:
    """Raises ConflictError: the agent that calls this cannot remove itself."""
    if profile == "monitor":
        raise ConflictError(
            "the agent on this host was installed with the profile monitor, so it may not remove itself;"
            " on the host, as root: fleetwire-agent uninstall"
        )
    if program_root().parent != VERSIONS or os.geteuid() != 0 or not _is_service_ours():
        raise ConflictError(
            "the agent on this host was not installed by its installer (pip, or by hand), so it cannot remove itself;"
            " remove it there in the way it came"
        )


def _is_service_ours() -> bool:
    return is_ours(UNIT) or is_ours(INIT_SCRIPT) or read_supervisor() is not None


def leave() -> None:
    """Stop the agent that calls this. Returns at once; the signal to end comes soon afterwards."""
    make_service(find_init()).leave()
