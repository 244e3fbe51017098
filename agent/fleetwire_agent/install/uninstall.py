"""Takes the agent off its host: at a person's wish, or by the agent itself while it runs."""

import os
import shutil
import threading
from pathlib import Path

from fleetwire_agent.config import Profile
from fleetwire_agent.install.changes import pass_on
from fleetwire_agent.install.ending import end_agent
from fleetwire_agent.install.exclusive import check_place, only_one
from fleetwire_agent.install.failures import InstallError, describe_os_error
from fleetwire_agent.install.host import check_root, find_init
from fleetwire_agent.install.layout import (
    INIT_SCRIPT,
    KEY,
    LAUNCHER,
    LOG,
    PROGRAM,
    SETTINGS,
    SETTINGS_DIRECTORY,
    STATE,
    UNIT,
    UNIT_DROP_INS,
    VERSIONS,
    is_ours,
)
from fleetwire_agent.install.report import Outcome, Report, Result
from fleetwire_agent.install.services import Plain, Service, make_service, read_supervisor
from fleetwire_agent.install.texts import find_state_directory
from fleetwire_agent.install.users import is_our_user, remove_user
from fleetwire_agent.version import program_root
from fleetwire_shared.errors import ConflictError, UnavailableError

_KEPT = (SETTINGS, KEY, STATE)
"""What makes a later installation the same agent again."""


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
    state = _find_state()
    if not paths and not is_our_user():
        kept = [str(path) for path in _KEPT if path.exists()]
        rest = f"; {', '.join(kept)} are kept, --purge removes them" if kept else ""
        return _outcome("nothing", f"No Fleetwire agent is installed here{rest}")
    if is_dry_run:
        report.step("plan", "would end the agent's commands and stop it")
        for path in paths:
            report.step("plan", f"would remove {path}")
        if is_our_user():
            report.step("plan", "would remove the user fleetwire-agent")
        return _outcome("dry_run", "Nothing was changed.")
    has_service = is_ours(UNIT) or is_ours(INIT_SCRIPT) or isinstance(service, Plain)
    said = end_agent(service if has_service else None, state)
    if has_service:
        report.step("stop", "the agent is stopped")
    if said:
        report.step("stop", said)
    removed = remove_all(service, is_purging=is_purging, is_leaving=False)
    for name in removed:
        report.step("remove", name)
    kept = [str(path) for path in dict.fromkeys((*_KEPT, state)) if path.exists()]
    rest = f"; {', '.join(kept)} are kept, --purge removes them" if kept else ""
    return _outcome("uninstalled", f"The Fleetwire agent is removed{rest}")


def _find_state() -> Path:
    try:
        return find_state_directory(SETTINGS.read_text(encoding="utf-8"))
    except (OSError, ValueError, InstallError):  # it is removed all the same
        return STATE


def _outcome(result: Result, detail: str) -> Outcome:
    return Outcome(result=result, version=None, agent_id=None, reason=None, detail=detail)


def list_installed(*, is_purging: bool) -> list[Path]:
    """Return what there is to remove. A unit or a launcher that is not ours is not; nor is a mount point itself."""
    ours = [path for path in (UNIT, INIT_SCRIPT, LAUNCHER) if is_ours(path)]
    paths = [*ours, PROGRAM, *_list_purged()] if is_purging else [*ours, PROGRAM]
    return [path for path in paths if os.path.lexists(path) and not _is_empty_mount(path)]


def _is_empty_mount(path: Path) -> bool:
    return path.is_mount() and not any(path.iterdir())


def _list_purged() -> list[Path]:
    return [*_KEPT, LOG, LOG.with_name(f"{LOG.name}.1"), UNIT_DROP_INS]


def remove_all(service: Service, *, is_purging: bool, is_leaving: bool) -> list[str]:
    """Remove everything of the agent that is on the host and return the paths.

    The first thing to go is what would start it again, so a removal that fails half-way leaves no agent that comes
    back. What cannot be removed does not keep the rest, and may be tried again.

    Raises:
        InstallError: what is left, and why."""
    removed = service.forget(is_leaving=is_leaving)
    problems = []
    for path in list_installed(is_purging=is_purging):
        try:
            _remove(path)
        except OSError as err:
            problems.append(f"{path} ({err.filename}: {err.strerror})")
        else:
            removed.append(str(path))
    _remove_leftovers(is_purging=is_purging)
    if is_our_user():
        if STATE.exists() and STATE.stat().st_uid != 0:
            pass_on(STATE, 0, 0)
        remove_user()
        removed.append("user fleetwire-agent")
    if problems:
        raise InstallError("failed", f"all else is removed, and this is left: {'; '.join(problems)}")
    return removed


def _remove(path: Path) -> None:
    """Remove a file or directory; of one that is a mount point, all that is in it."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
    elif path.is_mount():
        for inner in path.iterdir():
            _remove(inner)
    else:
        shutil.rmtree(path)


def _remove_leftovers(*, is_purging: bool) -> None:
    """Remove what an installation that was killed left beside its files, and the settings' directory once empty."""
    for directory in (LAUNCHER.parent, UNIT.parent, SETTINGS_DIRECTORY):
        for leftover in directory.glob(".*agent*.fleetwire-*"):
            leftover.unlink(missing_ok=True)
    if is_purging and SETTINGS_DIRECTORY.is_dir() and not any(SETTINGS_DIRECTORY.iterdir()):
        SETTINGS_DIRECTORY.rmdir()


# ---------------------------------------------------------------- by the agent itself


_has_begun = threading.Event()
"""This process has begun to remove its agent: what proved that it may is gone by now, and it may go on."""


def remove_running_agent(*, profile: Profile, purge: bool) -> tuple[str, ...]:
    """Remove everything of the agent that calls this, but its process; return what was removed. Blocking.

    The caller then sends its answer and calls `leave`.

    Raises:
        ConflictError: this agent cannot remove itself; the message says why.
        UnavailableError: something could not be removed."""
    check_may_remove(profile)
    service = make_service(find_init())
    try:
        with only_one():
            _has_begun.set()
            return tuple(remove_all(service, is_purging=purge, is_leaving=True))
    except InstallError as err:
        if err.reason == "busy":
            raise ConflictError(err.message) from err
        raise UnavailableError(f"the agent is removed from its host in part; {err.message}") from err
    except OSError as err:
        problem = describe_os_error(err).message
        raise UnavailableError(f"the agent could not be removed from its host: {problem}") from err


def check_may_remove(profile: Profile) -> None:
    """Raises ConflictError: the agent that calls this cannot remove itself. One that has begun to may go on."""
    if not _has_begun.is_set():
        check_removable(profile)


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
