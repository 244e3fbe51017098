"""The agent as one file: the same bytes each time, and it runs wherever there is a Python that is new enough."""

import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from tests.conftest import OpenApi, StartServer
from tests.support.processes import Process, plain_environment

from fleetwire_agent.native import ARCHITECTURES, find_libc, find_platform

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("bundle") / "fleetwire-agent.pyz")


def build(output: Path) -> Path:
    subprocess.run([ROOT / "scripts/build-agent", "--output", output], check=True, capture_output=True, timeout=300)
    return output


def list_pythons() -> list[Path]:
    """Return the Pythons of this machine, one of each version."""
    places = [f"{directory}/python3*" for directory in os.environ["PATH"].split(os.pathsep) if "shims" not in directory]
    places += [os.path.expanduser("~/.pyenv/versions/*/bin/python3")]
    found: dict[str, Path] = {}
    for name in sorted(name for place in places for name in glob.glob(place)):
        if re.fullmatch(r"python3(\.\d+)?", Path(name).name):
            said = subprocess.run([name, "-c", "import sys; print(sys.version)"], capture_output=True, text=True)
            if said.returncode == 0:
                found.setdefault(said.stdout, Path(name))
    return list(found.values())


def version_of(python: Path) -> tuple[int, int]:
    said = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = re.findall(r"\d+", said)[:2]
    return int(major), int(minor)


def test_two_builds_are_the_same_bytes_and_small(bundle: Path, tmp_path: Path) -> None:
    # A copy of the tree elsewhere, made by another user's umask at another time.
    tree = tmp_path / "tree"
    for part in ("agent", "shared", "scripts"):
        shutil.copytree(
            ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copy
        )
    shutil.copy(ROOT / "LICENSE", tree)
    (tree / ".cache").symlink_to(ROOT / ".cache")
    subprocess.run(
        ["sh", "-c", 'umask 077; exec "$0" --output "$1"', tree / "scripts/build-agent", tmp_path / "again.pyz"],
        check=True,
        capture_output=True,
        cwd="/",
        env=plain_environment() | {"FLEETWIRE_PYTHON": str(ROOT / ".venv/bin/python"), "TZ": "Asia/Tokyo"},
    )
    assert (tmp_path / "again.pyz").read_bytes() == bundle.read_bytes()
    assert bundle.stat().st_size <= 1_000_000
    assert os.access(bundle, os.X_OK)


def test_its_manifest_lists_each_file_with_its_digest(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        manifest = json.loads(archive.read("MANIFEST.json"))
        names = set(archive.namelist()) - {"MANIFEST.json"}
        assert manifest["files"] == {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}
    assert re.fullmatch(r"0\.1\.0-[0-9a-f]{8}", manifest["version"])
    natives = {
        f"native/{machine}-{libc}/_psutil_linux.abi3.so" for machine in ARCHITECTURES for libc in ("glibc", "musl")
    }
    assert natives | {"psutil/LICENSE", "websockets/LICENSE", "fleetwire_agent/LICENSE"} <= names


def test_it_runs_on_each_python_that_is_new_enough_and_tells_the_others(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        version = json.loads(archive.read("MANIFEST.json"))["version"]
    pythons = list_pythons()
    assert any(version_of(python) >= (3, 11) for python in pythons)
    for python in pythons:
        said = subprocess.run([python, "-I", bundle, "--version"], capture_output=True, text=True)
        if version_of(python) >= (3, 11):
            assert said.stdout == f"fleetwire-agent {version}\n", said.stderr
            checked = subprocess.run([python, "-I", bundle, "self-check"], capture_output=True, text=True)
            assert json.loads(checked.stdout)["platform"] == find_platform(), checked.stderr
        else:
            assert said.returncode == 1
            assert re.match(r"fleetwire-agent: needs Python 3\.11 or later; .* is Python 3\.\d+\.\n", said.stderr)
            assert "Traceback" not in said.stderr


async def test_an_agent_runs_straight_from_it(
    bundle: Path, start_server: StartServer, open_api: OpenApi, tmp_path: Path
) -> None:
    api = await open_api(start_server())
    agent_id, key = await api.enrol("zipped")
    (tmp_path / "key").touch(mode=0o600)
    (tmp_path / "key").write_text(key)
    state = tmp_path / "state"
    options: list[str | Path] = ["run", "--server", api.url, "--key-file", tmp_path / "key", "--state-dir", state]
    agent = Process(
        [shutil.which("python3", path="/usr/bin") or "python3", "-I", bundle, *options],
        log=tmp_path / "agent.log",
        environment=plain_environment(),
    )
    with zipfile.ZipFile(bundle) as archive:
        version = json.loads(archive.read("MANIFEST.json"))["version"]
    with agent:
        await api.wait_for_agent(agent_id)
        assert (await api.get(f"/api/agents/{agent_id}"))["version"] == version
        assert (await api.run(agent_id, "echo from a zip"))["output"] == "from a zip\n"
        status = subprocess.run([bundle, "status", "--state-dir", state], capture_output=True, text=True)
        assert status.stdout.startswith(f"connected to {api.url} as {agent_id} for ")
        assert status.returncode == 0
        agent.stop()
    status = subprocess.run([bundle, "status", "--state-dir", state], capture_output=True, text=True)
    assert (status.returncode, "is not running" in status.stdout) == (3, True)


@pytest.mark.parametrize(
    ("maps", "libc"),
    [
        ("7f00-7f01 r-xp 0 fe:00 1 /usr/lib/x86_64-linux-gnu/libc.so.6\n", "glibc"),
        ("7f00-7f01 r-xp 0 fe:00 1 /lib64/libc-2.28.so\n7f02-7f03 rw-p 0 0 0 [stack]\n", "glibc"),
        ("7f00-7f01 r-xp 0 fe:00 1 /lib/ld-musl-aarch64.so.1\n", "musl"),
        ("7f00-7f01 r-xp 0 fe:00 1 /lib/ld-musl-x86_64.so.1\n7f00-7f01 r-xp 0 0 1 /lib/libgcompat.so.0\n", "musl"),
        ("5500-5501 r-xp 0 fe:00 1 /opt/static/python3\n", None),
    ],
)
def test_the_libc_is_the_one_that_is_mapped(maps: str, libc: str | None) -> None:
    assert find_libc(maps) == libc
