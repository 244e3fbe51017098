"""docs/protocol.md names every message, field, record and version."""

import dataclasses
import re
from pathlib import Path

import pytest

from fleetwire_shared import messages
from fleetwire_shared.messages import FROM_AGENT, FROM_SERVER, ON_CHANNEL, PROTOCOL_VERSION, Message

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
KINDS: dict[str, type[Message]] = {**FROM_AGENT, **FROM_SERVER, **ON_CHANNEL}
RECORDS = {
    name: kind
    for name, kind in vars(messages).items()
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and not hasattr(kind, "type")
}


def section_of(heading: str) -> str:
    match = re.search(rf"^### {re.escape(heading)}\n(.*?)(?=^##|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert match, f"docs/protocol.md has no section {heading}"
    return match[1]


def field_names_in(section: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


@pytest.mark.parametrize("name", KINDS)
def test_a_message_is_described_with_all_its_fields(name: str) -> None:
    section = section_of(f"`{name}`")
    assert "Direction: " in section
    assert "Sent " in section
    assert "Answer: " in section
    assert field_names_in(section) == [field.name for field in dataclasses.fields(KINDS[name])]


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_within_messages_is_described_with_all_its_fields(name: str) -> None:
    assert field_names_in(section_of(name)) == [field.name for field in dataclasses.fields(RECORDS[name])]


def test_no_other_message_is_described() -> None:
    assert set(re.findall(r"^### `(\w+)`$", DOCUMENT, re.MULTILINE)) == set(KINDS)


@pytest.mark.parametrize("version", range(1, PROTOCOL_VERSION + 1))
def test_every_version_has_a_dated_line(version: int) -> None:
    assert re.search(rf"^\| {version} \| \d{{4}}-\d\d-\d\d \| \S", DOCUMENT, re.MULTILINE)
