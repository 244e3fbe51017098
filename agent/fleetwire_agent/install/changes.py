"""What a run does to the host, one change at a time, each with what takes it back."""

import os
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fleetwire_agent.runner.files import sync_directory

NEW_SUFFIX: Final = ".fleetwire-new"
OLD_SUFFIX: Final = ".fleetwire-old"


@dataclass(slots=True)
class Changes:
    """Makes changes that survive a power cut whole or not at all, and undoes them in reverse order.

    Args:
        plan: is told each change instead of its being made; None to make them."""

    plan: Callable[[str], None] | None = None
    has_changed: bool = False
    _planned: set[Path] = field(default_factory=set)  # directories that a plan has named already
    _undo: list[tuple[str, Callable[[], object]]] = field(default_factory=list)
    _after: list[Callable[[], object]] = field(default_factory=list)

    def do(self, text: str, action: Callable[[], object], undo: Callable[[], object] | None = None) -> None:
        """Make a change. Its undoing is noted before it is tried, so it must bear a change that was not finished."""
        if self.plan is not None:
            self.plan(text)
            return
        if undo is not None:
            self._undo.append((text, undo))
        action()
        self.has_changed = True

    def on_undo(self, text: str, undo: Callable[[], object]) -> None:
        """Have `undo` called after all later changes are undone."""
        if self.plan is None:
            self._undo.append((text, undo))

    def after_all(self, action: Callable[[], object]) -> None:
        """Have `action` called when the run has succeeded."""
        if self.plan is None:
            self._after.append(action)

    def commit(self) -> None:
        """Throw away what undoing would have needed."""
        self._undo.clear()
        for action in self._after:
            _try(action)

    def undo(self) -> list[str]:
        """Take everything back; return what could not be."""
        problems = []
        while self._undo:
            text, undo = self._undo.pop()
            if problem := _try(undo):
                problems.append(f"{text}: {problem}")
        return problems

    # ------------------------------------------------------------ files

    def make_directory(self, path: Path, mode: int) -> None:
        """Make a directory, with its parents, of root and of this mode whatever the umask is."""
        if path.is_dir():
            if stat.S_IMODE(path.stat().st_mode) != mode:
                before = stat.S_IMODE(path.stat().st_mode)
                self.do(f"chmod {mode:o} {path}", lambda: path.chmod(mode), lambda: path.chmod(before))
            return
        if path in self._planned:
            return
        if not path.parent.is_dir():
            self.make_directory(path.parent, 0o755)
        self._planned.add(path)
        self.do(f"make the directory {path}", lambda: _make_directory(path, mode), lambda: _remove_directory(path))

    def make_missing_directory(self, path: Path, mode: int) -> None:
        """Make a directory that others use, too: one that is there stays as it is."""
        if not path.is_dir():
            self.make_directory(path, mode)

    def write_file(self, path: Path, content: bytes, mode: int) -> bool:
        """Replace a file of root; return whether it was another before."""
        if is_file(path, content, mode):
            return False
        old = path.with_name(f".{path.name}{OLD_SUFFIX}")
        had_before = os.path.lexists(path)

        def write() -> None:
            if had_before:
                old.unlink(missing_ok=True)
                os.link(path, old, follow_symlinks=False)
            replace_file(path, content, mode)

        def restore() -> None:
            if not had_before:
                path.unlink(missing_ok=True)
            elif os.path.lexists(old):
                old.replace(path)
            path.with_name(f".{path.name}{NEW_SUFFIX}").unlink(missing_ok=True)
            sync_directory(path.parent)

        self.do(f"write {path} (mode {mode:o})", write, restore)
        self.after_all(lambda: old.unlink(missing_ok=True))
        return True

    def set_link(self, path: Path, target: str) -> bool:
        """Point a link elsewhere, by a rename; return whether it pointed there before."""
        before = str(path.readlink()) if path.is_symlink() else None
        if before == target:
            return False
        undo = (lambda: path.unlink(missing_ok=True)) if before is None else (lambda: replace_link(path, before))
        self.do(f"point {path} to {target}", lambda: replace_link(path, target), undo)
        return True

    def remove_tree(self, path: Path) -> None:
        """Remove a directory when all else has succeeded."""
        if self.plan is not None:
            self.plan(f"remove {path}")
        self.after_all(lambda: shutil.rmtree(path, ignore_errors=True))


def _try(action: Callable[[], object]) -> str | None:
    """Return what went wrong, None when nothing did."""
    try:
        action()
    except Exception as err:  # noqa: BLE001 - a border: the other steps must be undone as well
        return str(err) or type(err).__name__
    return None


def is_file(path: Path, content: bytes, mode: int) -> bool:
    """Whether there is a regular file of root with this content and mode."""
    try:
        status = path.lstat()
        return (
            stat.S_ISREG(status.st_mode)
            and stat.S_IMODE(status.st_mode) == mode
            and (status.st_uid, status.st_gid) == (0, 0)
            and status.st_size == len(content)
            and path.read_bytes() == content
        )
    except OSError:
        return False


def replace_file(path: Path, content: bytes, mode: int) -> None:
    """Write a file of root, at once: a reader or a power cut sees the old or the new one. Secret from its start."""
    temporary = path.with_name(f".{path.name}{NEW_SUFFIX}")
    temporary.unlink(missing_ok=True)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            os.fchown(file.fileno(), 0, 0)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def replace_link(path: Path, target: str) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    temporary.symlink_to(target)
    temporary.replace(path)
    sync_directory(path.parent)


def pass_on(directory: Path, uid: int, gid: int) -> None:
    """Make another user the owner of a directory of state, and empty it: the one before could have left links there,
    and a ledger of commands that no server offered."""
    os.chown(directory, 0, 0, follow_symlinks=False)  # from here on nobody else adds anything
    directory.chmod(0o700)
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    os.chown(directory, uid, gid, follow_symlinks=False)


def _make_directory(path: Path, mode: int) -> None:
    path.mkdir(mode=0o700)
    path.chmod(mode)
    sync_directory(path.parent)


def _remove_directory(path: Path) -> None:
    if path.is_dir():
        path.rmdir()
