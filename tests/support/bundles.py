"""Agent bundles of other versions, built as the real one is, from a changed copy of the tree."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from fleetwire_server.deploy.bundle import read_bundle

ROOT = Path(__file__).resolve().parents[2]

_NEEDED = ("agent", "shared", "scripts", "pyproject.toml", "LICENSE")


def build_bundle(output: Path, *, version: str, main_end: str = "") -> str:
    """Build a bundle whose agent says it is `version`; return the whole version, with its digest.

    Args:
        main_end: code that the agent's main.py has at its end."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        for part in _NEEDED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, tree / part)
        if (ROOT / ".cache").exists():
            (tree / ".cache").symlink_to(ROOT / ".cache")
        package = tree / "shared/fleetwire_shared/__init__.py"
        head, _, _ = package.read_text().partition("__version__ = ")
        package.write_text(f'{head}__version__ = "{version}"\n')
        main = tree / "agent/fleetwire_agent/main.py"
        main.write_text(main.read_text() + main_end)
        subprocess.run([tree / "scripts/build-agent", "--output", output], check=True, capture_output=True, timeout=120)
    bundle = read_bundle(output)
    assert bundle is not None
    assert bundle.version.startswith(f"{version}-")
    return bundle.version
