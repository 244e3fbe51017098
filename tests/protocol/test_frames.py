"""Recorded frames: what version 1 looks like on the wire, decoded for as long as version 1 is accepted."""

import json
from pathlib import Path

import pytest

from fleetwire_shared.codec import decode, encode
from fleetwire_shared.messages import FROM_AGENT, FROM_SERVER, ON_CHANNEL, PROTOCOL_OLDEST, PROTOCOL_VERSION

VERSIONS = range(PROTOCOL_OLDEST, PROTOCOL_VERSION + 1)
FRAMES = sorted(Path(__file__).parent.glob("v*/*.json"))
TABLES = (FROM_AGENT, FROM_SERVER, ON_CHANNEL)


@pytest.mark.parametrize("path", FRAMES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recorded_frame_is_decoded_with_all_its_fields(path: Path) -> None:
    text = path.read_text()
    tables = [table for table in TABLES if path.stem in table]
    assert tables
    for table in tables:
        assert json.loads(encode(decode(text, table))) == json.loads(text)


def test_every_message_has_a_frame_in_the_newest_version() -> None:
    recorded = {path.stem for path in FRAMES if path.parent.name == f"v{PROTOCOL_VERSION}"}
    assert recorded == {name for table in TABLES for name in table}


def test_every_accepted_version_has_frames() -> None:
    assert {path.parent.name for path in FRAMES} >= {f"v{version}" for version in VERSIONS}
