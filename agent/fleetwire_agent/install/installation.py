"""An installation from its checks to the first connection; whatever fails undoes what this run did."""

import logging
import os
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fleetwire_agent.config import Profile
from fleetwire_agent.install.bundle import Bundle, is_whole, open_own_bundle, remove_leftovers, unpack
from fleetwire_agent.install.changes import Changes, pass_on
from fleetwire_agent.install.ending import end_agent
from fleetwire_agent.install.exclusive import check_place, interruptible, not_interruptible, only_one
from fleetwire_agent.install.failures import InstallError, InstallInterrupt, Reason, describe_os_error
from fleetwire_agent.install.host import (
    Python,
    check_profile,
    check_reach,
    check_room,
    check_root,
    choose_python,
    find_init,
    is_full,
    read_user,
)
from fleetwire_agent.install.layout import (
    CURRENT,
    KEY,
    LAUNCHER,
    PENDING,
    PREVIOUS,
    PROGRAM,
    SETTINGS,
    SETTINGS_DIRECTORY,
    STATE,
    USER,
    VERSIONS,
    is_ours,
)
from fleetwire_agent.install.report import Outcome, Report, Result
from fleetwire_agent.install.services import Service, make_service
from fleetwire_agent.install.texts import build_launcher, build_settings, find_state_directory, parse_settings
from fleetwire_agent.install.users import add_user, is_our_user, remove_user
from fleetwire_agent.status import KEY_NOT_ACCEPTED, KEY_REVOKED, STATUS_NAME, Status, is_alive, read_status
from fleetwire_shared.limits import AGENT_KEY_PATTERN

POLL_SECONDS: Final = 0.1
DEATH_POLL_SECONDS: Final = 0.5
RETURN_SECONDS: Final = 10.0
"""How long a failed upgrade waits for the version before to be connected again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Checked arguments."""

    server: str
    key: str
    profile: Profile | None = None  # None: as it is, `manage` at first
    tls_pin: str | None = None
    python: str | None = None
    is_dry_run: bool = False
    is_waiting: bool = True
    is_replacing: bool = False
    wait_seconds: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the checks found, and so what is to be done."""

    options: Options
    bundle: Bundle
    profile: Profile
    settings: str  # text of agent.toml
    service: Service
    python: Python
    version_before: str | None  # what `current` points to

    @property
    def agent_id(self) -> str:
        return read_agent_id(self.options.key)


def run_install(options: Options, report: Report) -> Outcome:
    """Install, upgrade, or see that nothing is to be done. Raises nothing that is not a fault of the installer."""
    version: str | None = None
    os.umask(0o022)
    try:
        check_root()
        bundle = open_own_bundle()
        version = bundle.version
        check_place()
        with only_one(), interruptible():
            plan = make_plan(options, bundle, report)
            return carry_out(plan, report)
    except OSError as err:
        problem = describe_os_error(err)
    except InstallError as err:
        problem = err
    except KeyboardInterrupt as err:
        problem = InstallError("failed", str(err) or "interrupted")
    except Exception as err:  # a border: whoever reads the answers gets one
        logging.getLogger(__name__).exception("the installer failed")
        problem = InstallError("failed", f"the installer itself failed ({type(err).__name__}: {err}); this is a bug")
    return Outcome(result="failed", version=version, agent_id=None, reason=problem.reason, detail=problem.message)


# ---------------------------------------------------------------- before anything is written


def make_plan(options: Options, bundle: Bundle, report: Report) -> Plan:
    """Check all that can be checked without a change."""
    existing = _read_text(SETTINGS)
    settings_before = parse_settings(existing)
    profile: Profile = options.profile or settings_before.get("profile", "manage")
    init = find_init()
    service = make_service(init)
    check_profile(init, profile)
    service.check_foreign()
    if LAUNCHER.exists() and not is_ours(LAUNCHER):
        raise InstallError(
            "failed", f"{LAUNCHER} was not written by this installer; remove the agent it belongs to first"
        )
    python = choose_python(options.python, bundle.root, profile)
    report.step("check", f"{python.platform}, {python.path} is Python {python.version}, started by {service.name}")
    check_identity(options, _read_text(KEY))
    settings = build_settings(existing, server=options.server, profile=profile, tls_pin=options.tls_pin)
    check_room()
    report.step("reach", _check_way(options, settings_before))
    return Plan(
        options=options,
        bundle=bundle,
        profile=profile,
        settings=settings,
        service=service,
        python=python,
        version_before=CURRENT.readlink().name if CURRENT.is_symlink() else None,
    )


def _check_way(options: Options, settings: Any) -> str:
    if settings.get("use_proxy"):
        return f"not checked: {SETTINGS} says use_proxy"
    try:
        address = check_reach(options.server, tls_pin=options.tls_pin, ca_file=settings.get("tls_ca_file"))
    except InstallError as err:
        if options.is_waiting or options.is_dry_run:
            raise
        return f"not now: {err.message}"
    return f"{options.server} answers at {address}"


def check_identity(options: Options, key_before: str) -> None:
    """Raises InstallError: the host has another agent's key."""
    before = read_agent_id(key_before)
    if before and before != read_agent_id(options.key) and not options.is_replacing:
        raise InstallError(
            "other_identity",
            f"this host is {before} already, and the key is of {read_agent_id(options.key)}; to make it that one, add"
            f" --replace; to keep it, use the key in {KEY}",
        )


def read_agent_id(key: str) -> str:
    """Return the id of the agent with this key, "" for what is no key."""
    return f"agent_{key.split('_')[1]}" if re.fullmatch(AGENT_KEY_PATTERN, key.strip()) else ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError as err:
        raise InstallError("failed", f"{path} is not UTF-8; correct it or remove it") from err


# ---------------------------------------------------------------- the changes


def carry_out(plan: Plan, report: Report) -> Outcome:
    """Make the changes and see the agent connected. Raises InstallError after undoing everything."""
    is_dry_run = plan.options.is_dry_run
    changes = Changes(plan=(lambda text: report.step("plan", f"would {text}")) if is_dry_run else None)
    try:
        status = _change(plan, changes, report)
        if not is_dry_run and report.is_abandoned():
            raise InstallInterrupt("whoever asked for the installation is gone")
    except (Exception, KeyboardInterrupt) as err:
        raise _undo(plan, changes, err) from err
    changes.commit()
    return _describe_success(plan, changes, status)


def _change(plan: Plan, changes: Changes, report: Report) -> Status | None:
    service, options = plan.service, plan.options
    say = report.step if changes.plan is None else lambda _name, _detail: None
    was_active = not changes.plan and service.is_active()
    if was_active:  # undone last, when every file is as it was
        changes.on_undo("start the agent again", lambda: _start_again(service) if changes.has_changed else None)
    is_changed = _note_beginning(changes)
    is_unpacked = _unpack(plan, changes)
    say("unpack", f"to {plan.bundle.directory}" if is_unpacked else f"{plan.bundle.version} is there already")
    is_changed |= _write_settings(plan, changes)
    say("settings", f"{SETTINGS} and {KEY}, profile {plan.profile}")
    if _settle_user(plan, changes):
        say("user", f"{USER}, which the profile monitor runs as")
    is_changed |= service.write(changes, plan.python.path, plan.profile)
    is_changed |= _write_launcher(plan, changes)
    is_changed |= _flip(plan, changes)
    say("service", f"{service.name}: {', '.join(map(str, service.files)) or 'nothing starts it at boot'}")
    if changes.plan:
        if is_changed or is_unpacked or not service.is_active():
            changes.plan("start the agent")
        return None
    if is_changed or is_unpacked or not service.is_active():
        state = find_state_directory(plan.settings)
        changes.do("start the agent", lambda: _start_anew(service, state), service.stop)
        say("start", "the agent runs")
    if not options.is_waiting:
        return None
    status = wait_until_connected(plan, report, seconds=options.wait_seconds)
    say("wait", f"connected as {status.agent_id}")
    return status


def _note_beginning(changes: Changes) -> bool:
    """Leave a mark until this run has ended; return whether an earlier one left its, being killed half-way."""
    changes.make_directory(PROGRAM, 0o755)
    was_killed = PENDING.exists()
    if changes.plan is None:
        changes.on_undo("end", lambda: PENDING.unlink(missing_ok=True))
        PENDING.touch(mode=0o600)
        changes.after_all(lambda: PENDING.unlink(missing_ok=True))
    return was_killed


def _unpack(plan: Plan, changes: Changes) -> bool:
    bundle, python = plan.bundle, plan.python
    changes.make_directory(VERSIONS, 0o755)
    if not changes.plan:
        remove_leftovers()
    if is_whole(bundle, python.platform):
        return False
    was_there = bundle.directory.exists()

    def remove() -> None:
        if not was_there:  # a damaged one that was replaced is better as it is now
            _remove_tree(bundle.directory)

    changes.do(
        f"unpack {bundle.version} to {bundle.directory}", lambda: unpack(bundle, python.platform, python.path), remove
    )
    return True


def _write_settings(plan: Plan, changes: Changes) -> bool:
    if not STATE.exists():  # systemd makes it; what a failed run leaves there goes
        changes.on_undo(f"remove {STATE}", lambda: _remove_tree(STATE))
    changes.make_missing_directory(SETTINGS_DIRECTORY, 0o700)
    is_changed = changes.write_file(SETTINGS, plan.settings.encode(), 0o600)
    return changes.write_file(KEY, f"{plan.options.key}\n".encode(), 0o600) or is_changed


def _settle_user(plan: Plan, changes: Changes) -> bool:
    """Make the user that the profile needs, or have it removed in the end; return whether it is needed."""
    user = read_user(USER)
    if plan.profile == "manage":
        if is_our_user():
            changes.after_all(remove_user)
        _pass_state_on(plan, changes, 0, 0)
        return False
    if user is None:
        changes.do(f"make the system user {USER}", add_user, remove_user)
        user = read_user(USER)
    if user is not None:
        _pass_state_on(plan, changes, user.pw_uid, user.pw_gid)
    return True


def _pass_state_on(plan: Plan, changes: Changes, uid: int, gid: int) -> None:
    """Let another user have the state. Nothing of the agent runs meanwhile: root would write where that user may."""
    if not STATE.exists() or STATE.stat().st_uid == uid:
        return
    before = STATE.stat()
    changes.do("end the agent's commands and stop it", lambda: end_agent(plan.service, STATE))
    changes.do(
        f"empty {STATE} and pass it on to user {uid}",
        lambda: pass_on(STATE, uid, gid),
        lambda: pass_on(STATE, before.st_uid, before.st_gid),
    )


def _write_launcher(plan: Plan, changes: Changes) -> bool:
    try:
        changes.make_missing_directory(LAUNCHER.parent, 0o755)
        return changes.write_file(LAUNCHER, build_launcher(plan.python.path).encode(), 0o755)
    except OSError as err:
        if not isinstance(err, PermissionError) and "read-only" not in (err.strerror or "").lower():
            raise
        return False  # a convenience; some hosts have /usr read-only


def _flip(plan: Plan, changes: Changes) -> bool:
    """Point `current` at the new version and `previous` at the one before; older ones go in the end."""
    before, version = plan.version_before, plan.bundle.version
    if before and before != version:
        changes.set_link(PREVIOUS, f"versions/{before}")
    is_changed = changes.set_link(CURRENT, f"versions/{version}")
    kept = {version, before if before != version else None}
    if PREVIOUS.is_symlink() and before in (None, version):
        kept.add(PREVIOUS.readlink().name)
    for path in VERSIONS.glob("*") if VERSIONS.exists() else ():
        if path.name not in kept:
            changes.remove_tree(path)
    return is_changed


# ---------------------------------------------------------------- until it is connected


def wait_until_connected(plan: Plan, report: Report, *, seconds: float) -> Status:
    """Return what the agent says once it is connected.

    Raises:
        InstallError: it is not in time, or cannot be; with the agent's own reason."""
    deadline = time.monotonic() + seconds
    next_death_at = 0.0
    state = find_state_directory(plan.settings)
    while True:
        status = read_status(state)
        if status is not None and status.version == plan.bundle.version and is_alive(status):
            if status.state == "connected":
                return status
            if status.detail in (KEY_NOT_ACCEPTED, KEY_REVOKED):
                raise InstallError(
                    "key_refused",
                    f"{status.detail}: it was changed, or the agent deleted; fetch a new install line from the server",
                )
        if time.monotonic() >= next_death_at:
            next_death_at = time.monotonic() + DEATH_POLL_SECONDS
            if last_words := plan.service.find_death():
                raise InstallError("not_connected", f"the agent ended right after its start; it said: {last_words}")
            if report.is_abandoned():
                raise InstallInterrupt("whoever asked for the installation is gone")
        if time.monotonic() >= deadline:
            raise _describe_timeout(state, status, seconds)
        time.sleep(POLL_SECONDS)


def _describe_timeout(state: Path, status: Status | None, seconds: float) -> InstallError:
    if status is None and is_full(state):
        return InstallError("disk_full", f"{state}: the disk is full; make room there and try again")
    why = (status and status.detail) or "it has not said why"
    reason: Reason = "tls" if "SSL" in why else "not_connected"
    return InstallError(reason, f"the agent did not connect to the server within {seconds:.0f} seconds: {why}")


def _start_anew(service: Service, state: Path) -> None:
    service.stop()
    (state / STATUS_NAME).unlink(missing_ok=True)  # what it says next is of the agent that is started now
    service.start()


def _start_again(service: Service) -> None:
    service.reload()
    service.stop()
    service.start()


# ---------------------------------------------------------------- the end


def _undo(plan: Plan, changes: Changes, err: BaseException) -> InstallError:
    """Take everything back and return the error to tell."""
    with not_interruptible():
        had_changes = changes.has_changed
        problems = changes.undo()
        if had_changes:
            plan.service.reload()
    if isinstance(err, InstallError):
        problem = err
    elif isinstance(err, OSError):
        problem = describe_os_error(err)
    elif isinstance(err, KeyboardInterrupt):
        problem = InstallError("failed", str(err) or "interrupted")
    else:
        raise err
    message = problem.message.rstrip(".")
    if problems:
        message += f". Could not be undone: {'; '.join(problems)}"
    elif had_changes and plan.version_before:
        message += f". Everything is as it was{_describe_return(plan)}"
    elif had_changes:
        message += ". Nothing is left of this attempt"
    return InstallError(problem.reason, message)


def _describe_return(plan: Plan) -> str:
    deadline = time.monotonic() + RETURN_SECONDS
    while time.monotonic() < deadline:
        status = read_status(find_state_directory(plan.settings))
        is_back = status is not None and status.version == plan.version_before and is_alive(status)
        if status is not None and is_back and status.state == "connected":
            return f": version {plan.version_before} is connected again"
        if not plan.service.is_active():
            break
        time.sleep(POLL_SECONDS)
    return f", with version {plan.version_before}"


def _describe_success(plan: Plan, changes: Changes, status: Status | None) -> Outcome:
    version, server = plan.bundle.version, plan.options.server
    agent_id = status.agent_id if status else plan.agent_id
    boot = ""
    if not plan.service.files and not plan.options.is_dry_run:
        boot = (
            f"\nNothing on this host starts it at boot. To have it started, add to root's crontab (crontab -e):"
            f"\n@reboot {LAUNCHER if LAUNCHER.exists() else f'{plan.python.path} -I {CURRENT}'} supervise"
        )
    if plan.options.is_dry_run:
        return Outcome(
            result="dry_run", version=version, agent_id=plan.agent_id, reason=None, detail="Nothing was changed."
        )
    if not changes.has_changed:
        text = f"Fleetwire agent {version} is already up to date and connected to {server} as {agent_id}"
        if status is None:
            text = f"Fleetwire agent {version} is already up to date"
        return Outcome(result="unchanged", version=version, agent_id=agent_id, reason=None, detail=text + boot)
    text = f"Fleetwire agent {version} is installed and connected to {server} as {agent_id}"
    if status is None:
        text = f"Fleetwire agent {version} is installed for {server} as {agent_id}; its connection was not waited for"
    result: Result = "upgraded" if plan.version_before else "installed"
    return Outcome(result=result, version=version, agent_id=agent_id, reason=None, detail=text + boot)


def _remove_tree(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
