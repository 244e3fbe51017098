"""Reading and writing files: the blocking halves, on a real filesystem."""

import errno
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetwire_agent.files import MAX_UNSIZED_BYTES, FileReader, FileWriter, error_from_os
from fleetwire_shared.errors import (
    ConflictError,
    FleetwireError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    RangeError,
    TooLargeError,
    UnavailableError,
)
from fleetwire_shared.limits import CHUNK_BYTES
from fleetwire_shared.messages import End, ReadFile, WriteFile


def make_reader(
    path: Path | str, *, offset: int = 0, length: int | None = None, if_etag: str | None = None
) -> FileReader:
    return FileReader(ReadFile(channel_id="ch_1", path=str(path), offset=offset, length=length, if_etag=if_etag))


def read_all(reader: FileReader) -> bytes:
    content = b""
    try:
        while batch := reader.read_batch():
            assert all(len(piece) <= CHUNK_BYTES for piece in batch)
            content += b"".join(batch)
        end = reader.end()
    finally:
        reader.close()
    assert (end.bytes, end.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    return content


def make_writer(path: Path | str) -> FileWriter:
    return FileWriter(WriteFile(channel_id="ch_1", path=str(path)))


def write_all(path: Path | str, content: bytes) -> None:
    writer = make_writer(path)
    try:
        writer.write_batch([content])
        written = writer.commit(make_end(content))
    finally:
        writer.close()
    assert (written.path, written.bytes) == (str(path), len(content))


def make_end(content: bytes) -> End:
    return End(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert len(os.listdir("/proc/self/fd")) == len(before)


# ---------------------------------------------------------------- reading


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    path = tmp_path / "with space\nnewline é.bin"
    path.write_bytes(content)
    reader = make_reader(path)
    assert (reader.opened.size_bytes, reader.opened.offset, reader.opened.length) == (3_000_001, 0, 3_000_001)
    assert reader.opened.modified_at == path.stat().st_mtime
    assert read_all(reader) == content


def test_an_empty_file_has_size_zero(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    reader = make_reader(tmp_path / "empty")
    assert (reader.opened.size_bytes, reader.opened.length) == (0, 0)
    assert read_all(reader) == b""


def test_a_file_of_proc_has_no_size_and_is_read_to_its_end() -> None:
    reader = make_reader("/proc/cpuinfo", offset=100)
    assert (reader.opened.size_bytes, reader.opened.offset, reader.opened.length) == (None, 0, None)
    assert read_all(reader).startswith(b"processor")


def test_a_range_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    reader = make_reader(tmp_path / "f", offset=3, length=4)
    assert (reader.opened.size_bytes, reader.opened.offset, reader.opened.length) == (10, 3, 4)
    assert read_all(reader) == b"3456"
    assert read_all(make_reader(tmp_path / "f", offset=8, length=100)) == b"89"
    assert read_all(make_reader(tmp_path / "f", offset=-3)) == b"789"
    assert read_all(make_reader(tmp_path / "f", offset=-30)) == b"0123456789"


def test_a_range_outside_the_file_is_refused_with_its_size(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    with pytest.raises(RangeError, match="which has 10 bytes, got 10") as outside:
        make_reader(tmp_path / "f", offset=10)
    assert outside.value.size_bytes == 10
    with pytest.raises(InvalidError, match="at least 1"):
        make_reader(tmp_path / "f", length=0)


def test_any_range_of_an_empty_file_is_the_empty_file(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    assert read_all(make_reader(tmp_path / "f", offset=5)) == b""


def test_a_range_of_another_version_gives_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    first = make_reader(path)
    read_all(first)
    same = make_reader(path, offset=5, if_etag=first.opened.etag)
    assert (same.opened.etag, read_all(same)) == (first.opened.etag, b"56789")
    path.write_bytes(b"abcdefghijk")
    changed = make_reader(path, offset=5, if_etag=first.opened.etag)
    assert (changed.opened.offset, read_all(changed)) == (0, b"abcdefghijk")
    assert changed.opened.etag != first.opened.etag


def test_a_growing_file_is_read_as_it_was_when_opened(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a" * 1_000_000)
    reader = make_reader(path)
    with path.open("ab") as file:
        file.write(b"b" * 1_000_000)
    assert read_all(reader) == b"a" * 1_000_000


def test_a_file_that_shrinks_ends_as_a_conflict(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a" * 2_000_000)
    reader = make_reader(path)
    reader.read_batch()
    os.truncate(path, 600_000)
    with pytest.raises(ConflictError, match="became shorter"):
        read_all(reader)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("etc/passwd", "must be absolute"),
        ("", "must be absolute"),
        ("/etc/pass\0wd", "NUL"),
        ("/" + "a" * 5000, "shorter than 4096 bytes"),
        ("/" + "a" * 300, "name too long"),
        ("/dev/zero", "a character device"),
        ("/etc", "a directory"),
        ("/etc/passwd/x", "Not a directory"),
    ],
)
def test_what_is_no_regular_file_is_refused(path: str, message: str) -> None:
    with pytest.raises(InvalidError, match=message):
        make_reader(path)


def test_a_fifo_and_a_socket_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.mknod(tmp_path / "socket", stat.S_IFSOCK | 0o600)
    with pytest.raises(InvalidError, match="a FIFO"):
        make_reader(tmp_path / "fifo")
    with pytest.raises(InvalidError, match="a socket"):
        make_reader(tmp_path / "socket")


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="No such file"):
        make_reader(tmp_path / "missing")


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else")
def test_a_file_without_permission_is_forbidden(tmp_path: Path) -> None:
    program = (
        "import os; from fleetwire_agent.files import FileReader; from fleetwire_shared.messages import ReadFile\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: FileReader(ReadFile(channel_id='c', path='/etc/shadow'))\n"
        "except Exception as err: print(err.code, err)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "forbidden /etc/shadow: Permission denied\n", done.stderr


@pytest.mark.parametrize("path", ["/proc/kmsg", "/proc/self/mem"])
def test_special_files_that_count_as_regular_do_not_hang(path: str) -> None:
    if not os.access(path, os.R_OK):
        pytest.skip(f"{path} cannot be read here")
    with pytest.raises(FleetwireError):  # noqa: PT012 - /proc/kmsg may have a first message, then it would wait
        reader = make_reader(path)
        try:
            while reader.read_batch():
                pass
        finally:
            reader.close()


def test_an_endless_file_of_unknown_size_is_cut_off() -> None:
    # /proc/self/pagemap has 8 bytes for each page of the address space: terabytes.
    reader = make_reader("/proc/self/pagemap")
    try:
        with pytest.raises(TooLargeError, match=str(MAX_UNSIZED_BYTES)):  # noqa: PT012 - which batch it is, is left open
            while reader.read_batch():
                pass
    finally:
        reader.close()


def test_closing_twice_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    reader = make_reader(tmp_path / "f")
    reader.close()
    reader.close()
    with pytest.raises(FleetwireError):
        reader.read_batch()


# ---------------------------------------------------------------- writing


def test_a_new_file_appears_only_when_complete(tmp_path: Path) -> None:
    path, content = tmp_path / "new é", os.urandom(1_500_000)
    writer = make_writer(path)
    writer.write_batch([content[:1_000_000], content[1_000_000:]])
    assert list(tmp_path.iterdir()) == []  # not even a temporary name
    writer.commit(make_end(content))
    writer.close()
    assert path.read_bytes() == content
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 & ~umask
    assert list(tmp_path.iterdir()) == [path]


def test_a_replaced_file_keeps_its_owner_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    if os.getuid() == 0:
        os.chown(path, 1234, 4321)
    path.chmod(0o4750)
    before = path.stat()
    write_all(path, b"new content")
    after = path.stat()
    assert path.read_bytes() == b"new content"
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert after.st_ino != before.st_ino  # whoever has the old file open keeps it


def test_the_target_of_a_symbolic_link_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real/f")
    write_all(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "f").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("end", "case"),
    [(End(bytes=3, sha256="0" * 64), "digest"), (End(bytes=4), "length"), (End(bytes=3), "no digest")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_digest_or_length_leaves_the_old_file(tmp_path: Path, end: End, case: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    writer = make_writer(path)
    writer.write_batch([b"new"])
    with pytest.raises(ConflictError, match="nothing was written"):
        writer.commit(end)
    writer.close()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_destinations_that_are_no_file_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    refused: dict[Path | str, str] = {
        tmp_path: "must name the file to write, .* is a directory",
        f"{tmp_path}/new/": "names a directory",
        tmp_path / "fifo": "a FIFO",
        tmp_path / "file" / "x": "is no directory|Not a directory",
        tmp_path / "loop": "regular file|levels of symbolic",
        "relative": "must be absolute",
    }
    for path, message in refused.items():
        with pytest.raises(InvalidError, match=message):
            make_writer(path)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=f"no directory {tmp_path}/no/such"):
        make_writer(tmp_path / "no" / "such" / "file")


def test_a_file_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    writer = make_writer(tmp_path / "f")
    writer.write_batch([b"x" * 100_000])
    writer.close()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_place_is_forbidden() -> None:
    with pytest.raises(FleetwireError) as caught:
        make_writer("/proc/fleetwire-test")
    assert caught.value.code in {"forbidden", "not_found"}


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to mount a small filesystem")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], check=True)
    try:
        (tmp_path / "f").write_bytes(b"old")
        writer = make_writer(tmp_path / "f")
        with pytest.raises(UnavailableError, match=r"No space left .* bytes are free there now"):
            writer.write_batch([b"x" * 2_000_000])
        writer.close()
        assert (tmp_path / "f").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["f"]
        assert os.statvfs(tmp_path).f_bavail > 200
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, to have no O_TMPFILE")
@pytest.mark.parametrize(("last_call", "left"), [("writer.commit(end)", ["f"]), ("writer.close()", [])])
def test_without_nameless_files_a_hidden_name_is_used(tmp_path: Path, last_call: str, left: list[str]) -> None:
    program = (
        "import hashlib, os, sys; from fleetwire_agent.files import FileWriter\n"
        "from fleetwire_shared.messages import End, WriteFile\n"
        "writer = FileWriter(WriteFile(channel_id='c', path=sys.argv[1] + '/f'))\n"
        "writer.write_batch([b'content'])\n"
        "print([name[:11] for name in os.listdir(sys.argv[1])])\n"
        "end = End(bytes=7, sha256=hashlib.sha256(b'content').hexdigest())\n"
        f"{last_call}; print(os.listdir(sys.argv[1]))"
    )
    # The first open is that of the directory, the second that of the nameless file.
    trace = ["strace", "-qq", "-o", "/dev/null", "-P", str(tmp_path), "-e", "inject=openat:error=EOPNOTSUPP:when=2"]
    done = subprocess.run(
        [*trace, sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"['.fleetwire-']\n{left}\n", done.stderr


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, NotFoundError),
        (errno.EACCES, ForbiddenError),
        (errno.ELOOP, InvalidError),
        (errno.EIO, UnavailableError),
    ],
)
def test_the_kernels_answer_has_a_domain_error(number: int, kind: type[FleetwireError]) -> None:
    error = error_from_os(OSError(number, os.strerror(number)), "/x")
    assert type(error) is kind
    assert str(error) == f"/x: {os.strerror(number)}"
