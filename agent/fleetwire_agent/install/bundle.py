"""The bundle this runs from, and how it is unpacked: each file checked, compiled, in place at once or not at all."""

import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import fleetwire_agent
from fleetwire_agent.install.failures import InstallError
from fleetwire_agent.install.layout import VERSIONS
from fleetwire_agent.native import NATIVE_DIRECTORY
from fleetwire_agent.runner.files import sync_directory
from fleetwire_agent.version import MANIFEST_NAME, program_root, read_manifest

TEMPORARY_PREFIX: Final = ".unpacking-"
_COMPILE_SECONDS: Final = 120.0


@dataclass(frozen=True, slots=True)
class Bundle:
    """A manifest and the way to what it lists."""

    version: str
    digests: Mapping[str, str]  # path in the bundle: SHA-256, hex
    manifest: bytes
    root: Path  # a zip file, or a directory it was unpacked to
    read: Callable[[str], bytes]

    @property
    def directory(self) -> Path:
        """Where it is on the host once installed."""
        return VERSIONS / self.version

    def list_files(self, platform: str) -> list[str]:
        """Return the paths that a host of this platform needs: other platforms' native modules are left out."""
        native = f"{NATIVE_DIRECTORY}/"
        return [name for name in self.digests if not name.startswith(native) or name.startswith(f"{native}{platform}/")]


def open_own_bundle() -> Bundle:
    """Return the bundle this process runs from. Raises InstallError where it runs from none."""
    manifest = read_manifest()
    loader = fleetwire_agent.__spec__.loader if fleetwire_agent.__spec__ else None
    if manifest is None or loader is None:
        raise InstallError(
            "failed",
            "this agent does not run from a bundle, so there is nothing to install: run python3 fleetwire-agent.pyz"
            " install; a server gives it away at /api/agents/bundle, and scripts/build-agent makes it",
        )
    root = program_root()

    def read(name: str) -> bytes:
        content: bytes = loader.get_data(str(root / name))  # type: ignore[attr-defined]
        return content

    version, digests = parse_manifest(manifest)
    return Bundle(version, digests, manifest, root, read)


def parse_manifest(manifest: bytes) -> tuple[str, Mapping[str, str]]:
    """Return version and digests. Raises InstallError for one that names places outside, or is none."""
    try:
        content = json.loads(manifest)
        version, digests = content["version"], content["files"]
        names_are_right = all(
            re.fullmatch(r"[0-9a-f]{64}", digest) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name)
            for name, digest in digests.items()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise InstallError("failed", f"{MANIFEST_NAME} of the bundle cannot be read; fetch the bundle again") from err
    if not names_are_right or not re.fullmatch(r"[0-9][\w.+]*-[0-9a-f]{8}", version):
        raise InstallError("failed", f"{MANIFEST_NAME} of the bundle is not right; fetch the bundle again")
    return version, digests


def is_whole(bundle: Bundle, platform: str) -> bool:
    """Whether this version is on the host as the manifest has it."""
    try:
        return (bundle.directory / MANIFEST_NAME).read_bytes() == bundle.manifest and all(
            hash_bytes((bundle.directory / name).read_bytes()) == bundle.digests[name]
            for name in bundle.list_files(platform)
        )
    except OSError:
        return False


def unpack(bundle: Bundle, platform: str, python: str) -> None:
    """Put the version in place, checked and compiled. On failure nothing is left of it.

    Raises:
        InstallError: the bundle is damaged, or what was unpacked does not run.
        OSError: it could not be written."""
    temporary = VERSIONS / f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}"
    try:
        _write_files(bundle, platform, temporary)
        _compile(python, temporary, bundle.directory)
        _sync_tree(temporary)
        if bundle.directory.exists():  # damaged, or it would not be replaced; a program that runs keeps its files
            bundle.directory.rename(VERSIONS / f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}")
        temporary.rename(bundle.directory)
        sync_directory(VERSIONS)
    finally:
        remove_leftovers()


def remove_leftovers() -> None:
    """Remove what an earlier run was unpacking when it was killed."""
    for path in VERSIONS.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def hash_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _write_files(bundle: Bundle, platform: str, directory: Path) -> None:
    directory.mkdir(mode=0o755)
    for name in bundle.list_files(platform):
        content = bundle.read(name)
        if hash_bytes(content) != bundle.digests[name]:
            raise InstallError("failed", f"{name} in the bundle is not what its manifest says: fetch the bundle again")
        path = directory / name
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        path.write_bytes(content)
    (directory / MANIFEST_NAME).write_bytes(bundle.manifest)


def _compile(python: str, directory: Path, final: Path) -> None:
    """Compile for the interpreter that will run it: a start that must compile first keeps megabytes more."""
    result = subprocess.run(  # noqa: S603 - the interpreter was checked
        [python, "-I", "-m", "compileall", "-q", "-s", str(directory), "-p", str(final), str(directory)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_COMPILE_SECONDS,
        check=False,
    )
    said = result.stdout + result.stderr
    if "No space left" in said or "Disk quota exceeded" in said:
        raise InstallError("disk_full", f"{VERSIONS}: the disk is full; make room there and try again")
    if result.returncode:
        raise InstallError("failed", f"{python} could not compile the agent: {said.strip()[-500:]}")


def _sync_tree(directory: Path) -> None:
    """Set all modes, whatever the umask was, and bring all to the disk."""
    for name, _, files, descriptor in os.fwalk(directory):
        for file in files:
            opened = os.open(file, os.O_RDONLY, dir_fd=descriptor)
            try:
                os.fchmod(opened, 0o644)
                os.fsync(opened)
            finally:
                os.close(opened)
        del name
        os.fchmod(descriptor, 0o755)
        os.fsync(descriptor)
