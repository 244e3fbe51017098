"""Builds the agent's bundle: our packages, the libraries they import and a manifest, as one reproducible zip file."""

import argparse
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path("agent/bundle-requirements.txt")
CACHE = Path(".cache/agent-wheels")
OUTPUT = Path("server/fleetwire_server/deploy/bundle/fleetwire-agent.pyz")

MAX_BYTES = 1_000_000
SHEBANG = b"#!/usr/bin/env python3\n"
OUR_PACKAGES = ("agent/fleetwire_agent", "shared/fleetwire_shared")
ENTRY = Path("agent/bundle_entry.py")
LICENSE = Path("LICENSE")

PLATFORMS = {
    # how the bundle calls it: what pip calls it
    "x86_64-glibc": "manylinux_2_28_x86_64",
    "aarch64-glibc": "manylinux_2_28_aarch64",
    "x86_64-musl": "musllinux_1_2_x86_64",
    "aarch64-musl": "musllinux_1_2_aarch64",
}
LEFT_OUT = re.compile(
    # The agent's client needs none of it.
    r"websockets/(legacy|sync|trio)/.*|websockets/(__main__|auth|cli|connection|server)\.py"
    r"|websockets/asyncio/(router|server)\.py"
    # Other operating systems; tests.
    r"|psutil/_ps(aix|bsd|osx|sunos|windows)\.py|psutil/tests/.*"
)
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip file can hold


class BuildError(Exception):
    """The bundle cannot be made; the message says why."""


def build_bundle(root: Path = ROOT, output: Path | None = None) -> str:
    """Make the bundle of the source tree `root` and return its version. Blocking; downloads what is not cached.

    Raises:
        BuildError: a library cannot be had or is not the pinned one, or the bundle is too large."""
    wheels = read_wheels(root)
    files = {**read_our_files(root), **read_library_files(wheels)}
    files["fleetwire_agent/LICENSE"] = (root / LICENSE).read_bytes()
    version = f"{read_source_version(root)}-{hash_files(files)[:8]}"
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())}
    files["MANIFEST.json"] = json.dumps({"version": version, "files": digests}, indent=1).encode() + b"\n"
    content = pack(files)
    if len(content) > MAX_BYTES:
        raise BuildError(f"the bundle has {len(content):,} bytes; it must have at most {MAX_BYTES:,}")
    write(output or root / OUTPUT, content)
    return version


def read_our_files(root: Path) -> dict[str, bytes]:
    files = {"__main__.py": (root / ENTRY).read_bytes()}
    for package in OUR_PACKAGES:
        for path in (root / package).rglob("*.py"):
            files[path.relative_to((root / package).parent).as_posix()] = path.read_bytes()
    return files


def read_library_files(wheels: Iterable[bytes]) -> dict[str, bytes]:
    """Return what the agent needs of the wheels, and their licences."""
    files: dict[str, bytes] = {}
    for wheel in wheels:
        with zipfile.ZipFile(io.BytesIO(wheel)) as archive:
            tags = read_tags(archive)
            for name in archive.namelist():
                target = place(name, tags)
                if target is not None:
                    files[target] = archive.read(name)
    missing = {f"native/{platform}/_psutil_linux.abi3.so" for platform in PLATFORMS} - files.keys()
    if missing:
        raise BuildError(f"the wheels of {REQUIREMENTS} lack {', '.join(sorted(missing))}")
    return files


def place(name: str, tags: str) -> str | None:
    """Return where a file of a wheel goes in the bundle, None for one that is left out."""
    if name.endswith(".abi3.so"):
        return f"native/{find_platform(tags)}/{name.rsplit('/', 1)[1]}"
    if licence := re.fullmatch(r"(\w+)-[^/]+\.dist-info/(?:licenses/)?(LICENSE[^/]*)", name):
        return f"{licence[1]}/{licence[2]}"
    return name if name.endswith(".py") and not LEFT_OUT.fullmatch(name) else None


def read_tags(archive: zipfile.ZipFile) -> str:
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
    return " ".join(re.findall(r"^Tag: (\S+)", archive.read(name).decode(), re.MULTILINE))


def find_platform(tags: str) -> str:
    libc = "musl" if "musllinux" in tags else "glibc"
    machine = "aarch64" if "aarch64" in tags else "x86_64"
    return f"{machine}-{libc}"


def read_source_version(root: Path) -> str:
    match = re.search(r'^__version__ = "(.+)"$', (root / "shared/fleetwire_shared/__init__.py").read_text(), re.M)
    if match is None:
        raise BuildError("shared/fleetwire_shared/__init__.py names no __version__")
    return match[1]


def hash_files(files: Mapping[str, bytes]) -> str:
    """Return a digest of all names and contents: bundles that differ in one byte have different versions."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return a zip file that python3 runs. Nothing in it depends on when, where or by whom it is made."""
    buffer = io.BytesIO()
    buffer.write(SHEBANG)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(name, ZIP_DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, whatever builds it
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content, compresslevel=9)
    return buffer.getvalue()


def write(output: Path, content: bytes) -> None:
    """Replace `output` at once: a server that starts meanwhile reads the old or the new one."""
    output.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o755)
        Path(temporary).replace(output)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------- wheels


def read_wheels(root: Path) -> list[bytes]:
    """Return the pinned wheels, from the cache or with pip; in a fixed order."""
    wanted = sorted(re.findall(r"--hash=sha256:([0-9a-f]{64})", (root / REQUIREMENTS).read_text()))
    cache = root / CACHE
    cached = read_cache(cache)
    if not cached.keys() >= set(wanted):
        download(root / REQUIREMENTS, cache)
        cached = read_cache(cache)
    if missing := [digest for digest in wanted if digest not in cached]:
        raise BuildError(f"pip brought no wheel with sha256 {', '.join(missing)}, which {REQUIREMENTS} names")
    return [cached[digest] for digest in wanted]


def read_cache(cache: Path) -> dict[str, bytes]:
    wheels = (path.read_bytes() for path in cache.glob("*.whl"))
    return {hashlib.sha256(content).hexdigest(): content for content in wheels}


def download(requirements: Path, cache: Path) -> None:
    """Let pip bring the wheels for every platform; it checks their digests."""
    pip = find_pip()
    cache.mkdir(parents=True, exist_ok=True)
    for platform in PLATFORMS.values():
        command = [
            *(*pip, "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"),
            *("--only-binary=:all:", "--require-hashes", "--requirement", str(requirements), "--dest", str(cache)),
            *("--implementation", "cp", "--python-version", "311", "--abi", "abi3", "--abi", "none"),
            *("--platform", platform),
        ]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if result.returncode:
            said = "\n".join(result.stderr.strip().splitlines()[-5:])
            raise BuildError(f"pip could not download the libraries of {requirements} for {platform}:\n{said}")


def find_pip() -> list[str]:
    """Return the command of a pip: this Python's own, or that of the Python its environment was made with."""
    pythons = (sys.executable, getattr(sys, "_base_executable", sys.executable), "python3")
    for python in dict.fromkeys(pythons):
        command = [python, "-m", "pip"]
        try:
            if subprocess.run([*command, "--version"], capture_output=True, check=False).returncode == 0:
                return command
        except OSError:
            continue
    raise BuildError(
        f"the libraries of {REQUIREMENTS} are not in {CACHE}, and {sys.executable} has no pip to bring them"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/build-agent", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"default: {OUTPUT}")
    output = parser.parse_args().output or ROOT / OUTPUT
    try:
        version = build_bundle(ROOT, output)
    except (BuildError, OSError) as err:
        sys.exit(f"scripts/build-agent: {err}")
    print(f"scripts/build-agent: agent {version}, {output.stat().st_size:,} bytes: {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
