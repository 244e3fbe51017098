"""Which agent this is."""

import json
from pathlib import Path

import fleetwire_agent
from fleetwire_shared import __version__

MANIFEST_NAME = "MANIFEST.json"


def read_version() -> str:
    """Return the version of the bundle this runs from, such as 0.1.0-1a2b3c4d; elsewhere the version of the source.

    Blocking: reads a small file, or one of the zip."""
    content = read_manifest()
    return __version__ if content is None else str(json.loads(content)["version"])


def read_manifest() -> bytes | None:
    """Return MANIFEST.json of the bundle this runs from, zipped or unpacked; None when it is no bundle."""
    loader = fleetwire_agent.__spec__.loader if fleetwire_agent.__spec__ else None
    try:
        content: bytes = loader.get_data(str(program_root() / MANIFEST_NAME))  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return None
    return content


def program_root() -> Path:
    """Return the zip file or directory that holds the package."""
    return Path(fleetwire_agent.__file__).parent.parent
