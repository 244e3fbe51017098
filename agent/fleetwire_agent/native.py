"""psutil's native module out of the bundle, which carries it for several platforms, zipped or unpacked.

A zip file cannot be mapped into memory as a library, nor can a file on a filesystem mounted noexec: from both it is
loaded through a file in memory."""

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Final

NATIVE_MODULE: Final = "psutil._psutil_linux"
NATIVE_DIRECTORY: Final = "native"
NATIVE_FILE: Final = "_psutil_linux.abi3.so"
ARCHITECTURES: Final = ("x86_64", "aarch64")


class UnsupportedPlatformError(ImportError):
    """The bundle carries nothing for this host; the message says what it carries."""


def find_platform() -> str:
    """Return the platform of the running Python, such as x86_64-glibc. Raises UnsupportedPlatformError."""
    machine = os.uname().machine
    libc = find_libc(Path("/proc/self/maps").read_text(errors="replace"))
    if machine not in ARCHITECTURES or sys.maxsize < 2**32:
        word_size = "" if sys.maxsize > 2**32 else " with a 32-bit Python"
        raise UnsupportedPlatformError(
            f"the agent's bundle serves {' and '.join(ARCHITECTURES)}; this host is {machine}{word_size}:"
            " install the agent from source there, with pip and a compiler"
        )
    if libc is None:
        raise UnsupportedPlatformError(
            f"{sys.executable} uses neither glibc nor musl (a static build?): use the distribution's python3"
        )
    return f"{machine}-{libc}"


def find_libc(maps: str) -> str | None:
    """Return glibc or musl, whichever a process with this /proc/PID/maps uses; None for neither.

    What is mapped is what counts: a host may have both installed."""
    names = {line.rsplit("/", 1)[-1] for line in maps.splitlines() if "/" in line}
    if any(name.startswith(("ld-musl-", "libc.musl-")) for name in names):
        return "musl"
    if any(name.startswith(("libc.so.6", "libc-2.")) for name in names):
        return "glibc"
    return None


class NativeFinder(importlib.abc.MetaPathFinder):
    """Finds psutil's native module of this platform in a bundle, and nothing else."""

    def __init__(self, root: str) -> None:
        """`root` is the bundle: a zip file, or the directory it was unpacked to."""
        self._root = root

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        if fullname != NATIVE_MODULE:
            return None
        location = f"{self._root}/{NATIVE_DIRECTORY}/{find_platform()}/{NATIVE_FILE}"
        loader: ExtensionFileLoader
        if _can_be_mapped(location):
            loader = ExtensionFileLoader(fullname, location)
        else:
            import fleetwire_agent

            package = fleetwire_agent.__spec__.loader if fleetwire_agent.__spec__ else None
            loader = _InMemoryLoader(fullname, location, package.get_data(location))  # type: ignore[union-attr]
        return importlib.util.spec_from_file_location(fullname, location, loader=loader)


class _InMemoryLoader(ExtensionFileLoader):
    def __init__(self, name: str, path: str, content: bytes) -> None:
        super().__init__(name, path)
        self._content = content

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        descriptor = os.memfd_create(NATIVE_FILE)
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(self._content)
            in_memory = ModuleSpec(spec.name, self, origin=f"/proc/self/fd/{descriptor}")
            return super().create_module(in_memory)
        finally:
            os.close(descriptor)  # the library stays mapped


def _can_be_mapped(location: str) -> bool:
    try:
        return not os.statvfs(location).f_flag & os.ST_NOEXEC
    except OSError:  # NotADirectoryError: in a zip
        return False
