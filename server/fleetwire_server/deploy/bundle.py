"""The agent as one file, which the server carries for hosts that reach nothing but the server."""

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from fleetwire_shared.errors import InvalidError, UnavailableError

CARRIED_BUNDLE = Path(__file__).parent / "bundle" / "fleetwire-agent.pyz"
"""Made by scripts/build-agent; part of the server's wheel."""


@dataclass(frozen=True, slots=True)
class Bundle:
    content: bytes = field(repr=False)
    sha256: str  # of the content, hex
    version: str  # of the agent in it, such as 0.1.0-1a2b3c4d


def read_bundle(path: Path | None) -> Bundle | None:
    """Return the bundle at `path`, by default the one that came with the server; None where that one is missing.

    Blocking; about a megabyte.

    Raises:
        InvalidError: the file named is missing, or is no agent bundle."""
    if path is None and not CARRIED_BUNDLE.exists():
        return None
    source = path or CARRIED_BUNDLE
    try:
        content = source.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            version = json.loads(archive.read("MANIFEST.json"))["version"]
    except OSError as err:
        raise InvalidError(f"agent_bundle {source} cannot be read: {err.strerror}") from err
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as err:
        raise InvalidError(f"agent_bundle {source} is no agent bundle; make one with scripts/build-agent") from err
    return Bundle(content, hashlib.sha256(content).hexdigest(), str(version))


def require_bundle(bundle: Bundle | None) -> Bundle:
    """Raises UnavailableError where the server carries none."""
    if bundle is None:
        raise UnavailableError(
            "this server carries no agent bundle: make it with scripts/build-agent and start the server again,"
            " or name one with the setting agent_bundle"
        )
    return bundle
