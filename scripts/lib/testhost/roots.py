"""The systems that hosts are made from: Debian roots, built once by mmdebstrap and kept.

They are what most hosts are: no compiler, no pip, no venv. A root is never booted itself; hosts write to an overlay."""

import hashlib
import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from .places import CACHE_DIR, ROOTS_DIR, SSH_KEY, HostError, locked
from .programs import check_obstacles, run

INITS: Final = ("systemd", "openrc", "none")

_COMMON: Final = (
    *("bash", "ca-certificates", "curl", "iproute2", "libfaketime", "openssh-server"),
    *("procps", "python3", "sudo", "wget"),
)
_SYSTEMD: Final = ("systemd", "systemd-sysv", "dbus")
_OPENRC: Final = ("sysvinit-core", "openrc")

_MASKED_UNITS: Final = (
    "systemd-networkd.service",
    "systemd-networkd.socket",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
    "systemd-firstboot.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "console-getty.service",
)

_FILES: Final = {
    "etc/ssh/sshd_config.d/testhost.conf": "HostKey /etc/ssh/ssh_host_ed25519_key\nUseDNS no\n",
    "etc/systemd/journald.conf.d/testhost.conf": "[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n",
    "etc/sudoers.d/ops": "ops ALL=(ALL:ALL) NOPASSWD: ALL\n",
    "etc/sudoers.d/opspw": "opspw ALL=(ALL:ALL) ALL\n",
    "etc/resolv.conf": "",
    # The first process of a host without an init system: it starts what such an image starts, and waits.
    "usr/local/sbin/testhost-payload": "#!/bin/sh\nmkdir -p /run/sshd\n/usr/sbin/sshd\nexec sleep infinity\n",
}
_EXECUTABLE: Final = ("usr/local/sbin/testhost-payload",)

PASSWORDS: Final = {"ops": "ops-password", "opspw": "opspw-password", "nosudo": "nosudo-password"}
"""The users beside root, all with the SSH key: sudo without a password, sudo with this password, no sudo."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides what a root is."""

    suite: str
    packages: tuple[str, ...]
    is_systemd: bool

    @property
    def key(self) -> str:
        content = json.dumps([asdict(self), _FILES, _EXECUTABLE, PASSWORDS, _MASKED_UNITS, _VERSION], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


_VERSION: Final = 1  # to be raised when what `_finish` does changes

RECIPES: Final = {
    "bookworm": Recipe("bookworm", (*_COMMON, *_SYSTEMD), is_systemd=True),
    "trixie": Recipe("trixie", (*_COMMON, *_SYSTEMD), is_systemd=True),
    "bullseye": Recipe("bullseye", (*_COMMON, *_SYSTEMD), is_systemd=True),  # Python 3.9
    "bookworm-openrc": Recipe("bookworm", (*_COMMON, *_OPENRC), is_systemd=False),  # for init openrc and none
}
RELEASES: Final = ("bookworm", "trixie", "bullseye")


def find_recipe(release: str, init: str) -> str:
    """Return the name of the recipe for a host. Raises HostError where there is none."""
    if init not in INITS:
        raise HostError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if release not in RELEASES:
        raise HostError(f"release must be one of {', '.join(RELEASES)}, got {release!r}")
    name = release if init == "systemd" else f"{release}-openrc"
    if name not in RECIPES:
        raise HostError(f"there are {release} hosts with systemd only; a host without it is of bookworm")
    return name


def root_of(name: str) -> Path:
    return ROOTS_DIR / f"{name}-{RECIPES[name].key}"


def build_roots(names: tuple[str, ...] = tuple(RECIPES)) -> dict[str, Path]:
    """Build what is missing, two at a time: each waits for the network or uses one core."""
    check_obstacles()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(build_root, names), strict=True))


def build_root(name: str) -> Path:
    """Return the root of that recipe, built unless it is there."""
    if name not in RECIPES:
        raise HostError(f"there is no root {name!r}; there are {', '.join(RECIPES)}")
    root = root_of(name)
    if root.exists():
        return root
    check_obstacles()
    with locked(f"root-{name}", CACHE_DIR):
        if root.exists():
            return root
        _remove_others(name)
        unfinished = ROOTS_DIR / f".unfinished-{name}"
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        _build(RECIPES[name], unfinished)
        _finish(RECIPES[name], unfinished)
        unfinished.rename(root)
    return root


def _remove_others(name: str) -> None:
    """Remove what an interrupted build left. Roots of other recipes stay: hosts of another checkout may run on them."""
    unfinished = ROOTS_DIR / f".unfinished-{name}"
    if unfinished.exists():
        shutil.rmtree(unfinished)


def _build(recipe: Recipe, root: Path) -> None:
    run(
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"),
        *('--aptopt=APT::Install-Recommends "false"', "--dpkgopt=force-unsafe-io"),
        f"--include={','.join(recipe.packages)}",
        *(recipe.suite, root),
    )


def _finish(recipe: Recipe, root: Path) -> None:
    for name, content in _FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(content)
        path.chmod(0o755 if name in _EXECUTABLE else 0o644)
    for path in (root / "etc/sudoers.d").glob("ops*"):
        path.chmod(0o440)
    for path in (root / "etc/ssh").glob("ssh_host_*"):  # each host has its own
        path.unlink()
    (root / "etc/machine-id").write_text("")
    for user in PASSWORDS:
        run("chroot", root, "useradd", "--create-home", "--shell", "/bin/bash", user)
    run("chroot", root, "chpasswd", content="".join(f"{user}:{word}\n" for user, word in PASSWORDS.items()))
    if recipe.is_systemd:
        (root / "var/log/journal").mkdir(exist_ok=True)
        units = root / "etc/systemd/system"
        for unit in _MASKED_UNITS:
            (units / unit).unlink(missing_ok=True)
            (units / unit).symlink_to("/dev/null")
    else:
        _without_gettys(root / "etc/inittab")


def _without_gettys(inittab: Path) -> None:
    """There are no terminals to ask for a login on."""
    lines = inittab.read_text().splitlines(keepends=True)
    inittab.write_text("".join(line for line in lines if "getty" not in line))


def make_ssh_key() -> Path:
    """Return the private key that every host accepts, made once."""
    with locked("ssh", CACHE_DIR):
        if not SSH_KEY.exists():
            SSH_KEY.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            generate_key(SSH_KEY, "fleetwire-testhosts")
    return SSH_KEY


def generate_key(path: Path, comment: str, *, root: Path | None = None) -> None:
    """Make an Ed25519 key pair; with `root`, by that system's own ssh-keygen."""
    inside = ("chroot", str(root)) if root is not None else ()
    name = f"/{path.relative_to(root)}" if root is not None else str(path)
    if root is None and shutil.which("ssh-keygen") is None:
        raise HostError("ssh-keygen is missing: install openssh-client")
    argv = [*inside, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", name]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
