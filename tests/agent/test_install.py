"""The parts of the installer that need no host: texts, undoing, what is refused before anything is written."""

import os
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetwire_agent.install import users
from fleetwire_agent.install.bundle import open_own_bundle, parse_manifest
from fleetwire_agent.install.changes import Changes, pass_on
from fleetwire_agent.install.failures import InstallError, describe_os_error
from fleetwire_agent.install.host import Python, choose_python
from fleetwire_agent.install.installation import Options, check_identity, read_agent_id
from fleetwire_agent.install.layout import MARK, is_ours
from fleetwire_agent.install.services import call, condense
from fleetwire_agent.install.supervise import Log
from fleetwire_agent.install.texts import build_init_script, build_launcher, build_settings, build_unit, needs_quoting
from fleetwire_agent.install.uninstall import check_removable
from fleetwire_shared.errors import ConflictError

KEY = "agt_" + "a" * 16 + "_" + "B" * 43
OTHER_KEY = "agt_" + "b" * 16 + "_" + "C" * 43
SERVER = "https://fleet.example"
PIN = "sha256//" + "A" * 43 + "="


# ---------------------------------------------------------------- programs of the host


@pytest.mark.parametrize(
    ("script", "reason", "words"),
    [
        ("echo useradd: cannot lock /etc/passwd >&2; exit 1", "failed", "failed: useradd: cannot lock /etc/passwd"),
        ("echo No space left on device; exit 2", "disk_full", "failed: No space left on device"),
        ("exit 9", "failed", "failed: status 9"),
    ],
)
@pytest.mark.parametrize("run", [lambda *command: call(*command), lambda *command: users._run(command)])
def test_a_program_that_fails_is_told_with_what_it_said(
    run: Callable[..., None], script: str, reason: str, words: str
) -> None:
    with pytest.raises(InstallError, match=words) as problem:
        run("sh", "-c", script)
    assert problem.value.reason == reason


def test_a_program_that_hangs_is_told_with_what_to_look_at() -> None:
    with pytest.raises(InstallError, match=r"^sleep 60 did not end within 1 seconds; is the user database locked\?$"):
        users._run(["sleep", "60"], seconds=1.0)


# ---------------------------------------------------------------- texts


def test_settings_are_what_was_asked_for() -> None:
    text = build_settings("", server=SERVER, profile="manage", tls_pin=None)
    assert tomllib.loads(text) == {"server": SERVER, "profile": "manage", "key_file": "/etc/fleetwire/agent.key"}
    assert tomllib.loads(build_settings("", server=SERVER, profile="monitor", tls_pin=PIN))["tls_pin"] == PIN


def test_settings_of_a_person_stay() -> None:
    before = f'# ours: keep\nlog_level = "debug"\nserver = "http://old"\n\ntls_pin = "{PIN}"\nuse_proxy = true # why\n'
    text = build_settings(before, server=SERVER, profile="manage", tls_pin=None)
    assert "# ours: keep\n" in text
    assert "use_proxy = true # why\n" in text
    settings = tomllib.loads(text)
    assert (settings["server"], settings["log_level"]) == (SERVER, "debug")
    assert "tls_pin" not in settings
    assert build_settings(text, server=SERVER, profile="manage", tls_pin=None) == text, "again changes nothing"


@pytest.mark.parametrize("before", ["server = ", 'state_dir = """\nserver = 1\n"""\n', "[table]\nserver = 1\n"])
def test_settings_that_cannot_be_changed_are_not_lost(before: str) -> None:
    with pytest.raises(InstallError, match=r"agent\.toml"):
        build_settings(before, server=SERVER, profile="manage", tls_pin=None)


def test_the_unit_runs_the_current_version_and_is_marked(tmp_path: Path) -> None:
    manage = build_unit("/usr/bin/python3", "manage", has_journal_group=True)
    assert "\nExecStart=/usr/bin/python3 -I /opt/fleetwire-agent/current run\n" in manage
    assert "User=" not in manage
    monitor = build_unit("/usr/bin/python3", "monitor", has_journal_group=True)
    assert {"User=fleetwire-agent", "ProtectSystem=strict", "CapabilityBoundingSet="} <= set(monitor.splitlines())
    assert "SupplementaryGroups=systemd-journal" in monitor
    assert "SupplementaryGroups" not in build_unit("/usr/bin/python3", "monitor", has_journal_group=False)
    for text in (manage, monitor, build_init_script("/usr/bin/python3"), build_launcher("/usr/bin/python3")):
        (tmp_path / "file").write_text(text)
        assert is_ours(tmp_path / "file")
    (tmp_path / "file").write_text(f"[Unit]\nDescription=mine\n{MARK}\n")
    assert not is_ours(tmp_path / "file")
    assert not is_ours(tmp_path / "nothing")


@pytest.mark.parametrize("build", [build_init_script, build_launcher])
def test_scripts_are_sh(build: object, tmp_path: Path) -> None:
    assert callable(build)
    (tmp_path / "script").write_text(str(build("/usr/bin/python3")))
    subprocess.run(["sh", "-n", tmp_path / "script"], check=True)


def test_a_path_that_would_need_quoting_is_noticed() -> None:
    assert not needs_quoting("/opt/python-3.12_x/bin/python3")
    assert all(needs_quoting(path) for path in ("/a b/python", "/a$b", '/a"b', "/a;b", "/a\nb"))


# ---------------------------------------------------------------- changes


def make_tree(root: Path) -> None:
    (root / "etc").mkdir()
    (root / "etc/kept").write_bytes(b"before")
    (root / "etc/kept").chmod(0o640)
    (root / "link").symlink_to("old")


def snapshot(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): (
            os.readlink(path) if path.is_symlink() else (path.stat().st_mode, path.is_file() and path.read_bytes())
        )
        for path in sorted(root.rglob("*"))
    }


def change_all(changes: Changes, root: Path) -> None:
    changes.make_directory(root / "new/deep", 0o700)
    changes.write_file(root / "etc/kept", b"after", 0o600)
    changes.write_file(root / "etc/new", b"after", 0o755)
    changes.set_link(root / "link", "new")
    changes.set_link(root / "second", "new")


@pytest.mark.skipif(os.geteuid() != 0, reason="files are given to root")
def test_changes_are_taken_back_whole(tmp_path: Path) -> None:
    make_tree(tmp_path)
    before = snapshot(tmp_path)
    changes = Changes()
    old_umask = os.umask(0o777)
    try:
        change_all(changes, tmp_path)
    finally:
        os.umask(old_umask)
    assert changes.has_changed
    after = snapshot(tmp_path)
    assert (after["link"], after["etc/kept"]) == ("new", (0o100600, b"after"))
    assert (tmp_path / "new").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "new/deep").stat().st_mode & 0o7777 == 0o700
    assert changes.undo() == []
    assert snapshot(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="files are given to root")
def test_what_is_committed_stays_and_the_second_time_changes_nothing(tmp_path: Path) -> None:
    make_tree(tmp_path)
    changes = Changes()
    change_all(changes, tmp_path)
    changes.commit()
    assert changes.undo() == []
    after = snapshot(tmp_path)
    assert sorted(after) == ["etc", "etc/kept", "etc/new", "link", "new", "new/deep", "second"], "nothing is left over"
    again = Changes()
    change_all(again, tmp_path)
    assert not again.has_changed


def test_a_plan_changes_nothing_and_names_each_thing_once(tmp_path: Path) -> None:
    make_tree(tmp_path)
    before = snapshot(tmp_path)
    plan: list[str] = []
    changes = Changes(plan=plan.append)
    change_all(changes, tmp_path)
    changes.make_directory(tmp_path / "new/deep", 0o700)
    changes.commit()
    assert snapshot(tmp_path) == before
    assert len(plan) == len(set(plan)) == 6


def test_one_step_that_cannot_be_undone_keeps_no_other_from_it(tmp_path: Path) -> None:
    changes = Changes()
    undone: list[str] = []
    changes.on_undo("first", lambda: undone.append("first"))
    changes.on_undo("second", lambda: 1 / 0)
    changes.on_undo("third", lambda: undone.append("third"))
    assert changes.undo() == ["second: division by zero"]
    assert undone == ["third", "first"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
def test_state_that_is_passed_on_is_empty_and_follows_no_link(tmp_path: Path) -> None:
    outside, state = tmp_path / "outside", tmp_path / "state"
    (outside / "deep").mkdir(parents=True)
    (outside / "file").write_text("root's")
    state.mkdir(mode=0o777)
    (state / "ledger.0").symlink_to(outside / "file")
    (state / "commands").symlink_to(outside)
    (state / "other").mkdir()
    (state / "other/link").symlink_to(outside)
    (state / "ledger.1").write_text("forged")
    before = snapshot(outside)
    pass_on(state, 12345, 12346)
    status = state.stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (12345, 12346, 0o700)
    assert list(state.iterdir()) == []
    assert snapshot(outside) == before
    assert (outside / "file").stat().st_uid == 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b'{"version": "0.1.0-12345678"}',
        b'{"version": "../x-12345678", "files": {}}',
        b'{"version": "0.1.0-12345678", "files": {"../x": "%s"}}' % (b"0" * 64),
        b'{"version": "0.1.0-12345678", "files": {"/etc/passwd": "%s"}}' % (b"0" * 64),
        b'{"version": "0.1.0-12345678", "files": {"x": "00"}}',
    ],
)
def test_a_manifest_that_is_not_right_is_refused(manifest: bytes) -> None:
    with pytest.raises(InstallError, match=r"MANIFEST\.json"):
        parse_manifest(manifest)


def test_an_agent_that_runs_from_no_bundle_has_nothing_to_install() -> None:
    with pytest.raises(InstallError, match=r"scripts/build-agent"):
        open_own_bundle()


def test_another_agents_host_is_taken_only_when_asked_for() -> None:
    check_identity(Options(server=SERVER, key=KEY), "")
    check_identity(Options(server=SERVER, key=KEY), KEY[:-1] + "C\n")  # a rotated key of the same agent
    check_identity(Options(server=SERVER, key=KEY, is_replacing=True), OTHER_KEY)
    with pytest.raises(InstallError, match=r"agent_b+ already.*agent_a+.*--replace") as caught:
        check_identity(Options(server=SERVER, key=KEY), OTHER_KEY)
    assert caught.value.reason == "other_identity"
    assert KEY not in str(caught.value)
    assert read_agent_id("garbage") == ""


def test_a_python_that_cannot_run_the_agent_is_named(tmp_path: Path) -> None:
    failing = tmp_path / "python3"
    failing.write_text("#!/bin/sh\necho 'ImportError: no ssl' >&2\nexit 1\n")
    failing.chmod(0o755)
    with pytest.raises(InstallError, match=f"{failing} cannot run the agent: ImportError: no ssl") as caught:
        choose_python(str(failing), tmp_path, "manage")
    assert caught.value.reason == "unsupported"
    with pytest.raises(InstallError, match="/nonexistent/python3 is no program"):
        choose_python("/nonexistent/python3", tmp_path, "manage")
    answering = tmp_path / "answering"
    answer = '{"python": "/home/me/python3", "python_version": "3.12.1", "platform": "x86_64-musl"}'
    answering.write_text(f"#!/bin/sh\necho '{answer}'\n")
    answering.chmod(0o755)
    assert choose_python(str(answering), tmp_path, "manage") == Python("/home/me/python3", "3.12.1", "x86_64-musl")
    with pytest.raises(InstallError, match=r"home directory.*--python"):
        choose_python(str(answering), tmp_path, "monitor")


def test_a_full_disk_and_a_read_only_one_are_told_apart() -> None:
    assert describe_os_error(OSError(28, "No space left on device", "/opt/x")).reason == "disk_full"
    assert "read-only" in describe_os_error(OSError(30, "Read-only file system", "/opt/x")).message


def test_an_agent_that_may_not_remove_itself_says_why() -> None:
    with pytest.raises(ConflictError, match="monitor"):
        check_removable("monitor")
    with pytest.raises(ConflictError, match="not installed by its installer"):
        check_removable("manage")


# ---------------------------------------------------------------- the supervisor's log


def test_the_log_never_holds_more_than_two_files_of_its_size(tmp_path: Path) -> None:
    log = Log(tmp_path / "agent.log", max_bytes=1000)
    for number in range(100):
        log.write(f"{number:<49}\n".encode())
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"agent.log", "agent.log.1"}
    assert max(sizes.values()) <= 1000
    kept = (tmp_path / "agent.log.1").read_text() + (tmp_path / "agent.log").read_text()
    numbers = [int(line) for line in kept.splitlines()]
    assert numbers == list(range(numbers[0], 100)), "the newest, without a gap"


def test_last_words_are_one_line_without_the_middle_of_a_traceback() -> None:
    lines = ["Traceback (most recent call last):", '  File "x", line 1', "    oops()", "", "RuntimeError: oops"]
    assert condense(lines) == "Traceback (most recent call last): | RuntimeError: oops"
