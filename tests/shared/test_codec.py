"""The codec: every message survives the wire, and nothing a peer sends raises anything but ProtocolError."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleetwire_shared.codec import decode, encode
from fleetwire_shared.errors import ProtocolError
from fleetwire_shared.limits import MAX_CONTROL_FRAME_BYTES
from fleetwire_shared.messages import FROM_AGENT, FROM_SERVER, ON_CHANNEL, Message

TABLES: dict[str, Mapping[str, type[Message]]] = {
    "from_agent": FROM_AGENT,
    "from_server": FROM_SERVER,
    "on_channel": ON_CHANNEL,
}
KINDS = [
    pytest.param(table, kind, id=f"{name}-{kind.type}") for name, table in TABLES.items() for kind in table.values()
]

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
INTEGERS = st.integers(-(2**63) + 1, 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return a strategy for the values that a field with this type hint may hold."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=4).map(tuple)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([st.none() if argument is types.NoneType else values_of(argument) for argument in arguments])
    if dataclasses.is_dataclass(hint):
        return records_of(typing.cast("type[Any]", hint))
    return {str: TEXTS, int: INTEGERS, float: FLOATS, bool: st.booleans()}[hint]


def records_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy for records of `kind`; a field with a default has it in about half of them."""
    hints = typing.get_type_hints(kind)
    required: dict[str, st.SearchStrategy[Any]] = {}
    optional: dict[str, st.SearchStrategy[Any]] = {}
    for field in dataclasses.fields(kind):
        group = required if field.default is dataclasses.MISSING else optional
        group[field.name] = values_of(hints[field.name])
    return st.fixed_dictionaries(required, optional=optional).map(lambda arguments: kind(**arguments))


def make_finished(**changes: Any) -> dict[str, Any]:
    """Return a valid `command_finished` document with some keys changed."""
    return {
        "type": "command_finished",
        "command_id": "cmd_00000000000000000001",
        "status": "failed",
        "exit_code": 1,
        "stdout_bytes": 10,
        "stderr_bytes": 0,
        "seconds_ago": 60.5,
        "duration_seconds": 0.25,
    } | changes


@pytest.mark.parametrize(("table", "kind"), KINDS)
@given(data=st.data())
def test_every_message_comes_back_as_it_was_sent(
    table: Mapping[str, type[Message]], kind: type[Message], data: st.DataObject
) -> None:
    message = data.draw(records_of(kind))
    assert decode(encode(message), table) == message


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@given(text=st.text() | JSON_VALUES.map(json.dumps) | st.binary().map(lambda raw: raw.decode(errors="surrogateescape")))
@example(text="")
@example(text="null")
@example(text="[]")
@example(text='{"type":null}')
@example(text='{"type":["hello"]}')
@example(text='{"type":"\\ud800"}')
@example(text="[" * 100_000)
@example(text='{"type":' * 100_000)
@example(text="9" * 5000)
def test_arbitrary_text_is_a_protocol_error(table: Mapping[str, type[Message]], text: str) -> None:
    with pytest.raises(ProtocolError):
        decode(text, table)


@pytest.mark.parametrize(("table", "kind"), KINDS)
@given(data=st.data())
def test_arbitrary_fields_are_decoded_or_a_protocol_error(
    table: Mapping[str, type[Message]], kind: type[Message], data: st.DataObject
) -> None:
    document = json.loads(encode(data.draw(records_of(kind))))
    names = sorted(document.keys() | {field.name for field in dataclasses.fields(kind)})
    document[data.draw(st.sampled_from(names))] = data.draw(JSON_VALUES)
    try:
        message = decode(json.dumps(document), table)
    except ProtocolError:
        return
    assert decode(encode(message), table) == message


@pytest.mark.parametrize(
    ("literal", "problem"),
    [
        ("NaN", "NaN is not a number"),
        ("Infinity", "Infinity is not a number"),
        ("-Infinity", "-Infinity is not a number"),
        ("1e999", "must be finite"),
        ("-1e999", "must be finite"),
        ("1" + "0" * 400, "must be finite"),
        ("1" + "0" * 5000, "is not JSON"),
        ('"1"', "must be a number"),
        ("true", "must be a number"),
        ("null", "must be a number"),
    ],
)
def test_what_is_not_a_finite_number_is_refused(literal: str, problem: str) -> None:
    text = json.dumps(make_finished(duration_seconds=0)).replace(
        '"duration_seconds": 0', f'"duration_seconds": {literal}'
    )
    with pytest.raises(ProtocolError, match=problem):
        decode(text, FROM_AGENT)


@pytest.mark.parametrize("value", [2**63, -(2**63), 10**400, 1.0, True, "1", None])
def test_what_is_not_a_64_bit_integer_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(json.dumps(make_finished(stdout_bytes=value)), FROM_AGENT)
    assert caught.value.path == "command_finished.stdout_bytes"


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"command_finished\.error: must not hold a lone surrogate"):
        decode(json.dumps(make_finished(error="\ud800")), FROM_AGENT)


def test_a_surrogate_pair_is_one_character() -> None:
    text = json.dumps(make_finished(error="\U0001f6a2"))
    assert "\\ud83d\\udea2" in text
    assert decode(text, FROM_AGENT) == decode(
        json.dumps(make_finished(error="\U0001f6a2"), ensure_ascii=False), FROM_AGENT
    )


@pytest.mark.parametrize("name", sorted(make_finished().keys() - {"type", "exit_code"}))
def test_a_missing_field_is_named(name: str) -> None:
    document = make_finished()
    del document[name]
    with pytest.raises(ProtocolError) as caught:
        decode(json.dumps(document), FROM_AGENT)
    assert caught.value.path == f"command_finished.{name}"
    assert "is missing" in caught.value.message


def test_a_missing_field_that_may_be_null_is_still_missing() -> None:
    document = make_finished()
    del document["exit_code"]
    with pytest.raises(ProtocolError, match=r"command_finished\.exit_code: is missing"):
        decode(json.dumps(document), FROM_AGENT)


def test_the_path_of_a_bad_field_leads_into_arrays() -> None:
    filesystem = {
        "mountpoint": "/", "device": "/dev/vda1", "fstype": "ext4", "total_bytes": 1, "used_bytes": 1,
        "available_bytes": 0, "used_percent": 100.0,
    }  # fmt: skip
    document = {"type": "metrics", "sampled_at": 1.0, "filesystems": [filesystem, filesystem | {"fstype": 7}]}
    with pytest.raises(ProtocolError) as caught:
        decode(json.dumps(document), FROM_AGENT)
    assert caught.value.path == "metrics.filesystems[1].fstype"


def test_a_value_outside_a_closed_list_is_refused() -> None:
    with pytest.raises(ProtocolError, match="must be one of succeeded, failed"):
        decode(json.dumps(make_finished(status="exploded")), FROM_AGENT)


def test_unknown_keys_are_skipped() -> None:
    extended = make_finished(weather={"in": ["a", "newer", "version"]})
    assert decode(json.dumps(extended), FROM_AGENT) == decode(json.dumps(make_finished()), FROM_AGENT)


def test_an_unknown_type_is_told_what_is_known() -> None:
    with pytest.raises(ProtocolError, match=r"type: must be one of channel_refused, .*hello.*, got 'greet'"):
        decode('{"type":"greet"}', FROM_AGENT)


def test_a_message_of_the_other_direction_is_refused() -> None:
    with pytest.raises(ProtocolError, match="type: must be one of"):
        decode('{"type":"command_cancel","command_id":"cmd_1"}', FROM_AGENT)


def test_an_oversize_frame_is_refused_before_it_is_parsed() -> None:
    text = json.dumps(make_finished(error="x" * MAX_CONTROL_FRAME_BYTES))
    with pytest.raises(ProtocolError, match=r"frame: is \d+ characters"):
        decode(text, FROM_AGENT)


def test_defaults_are_left_out_and_text_is_not_escaped() -> None:
    text = encode(decode(json.dumps(make_finished(error="é")), FROM_AGENT))
    assert '"error":"é"' in text
    assert "error" not in encode(decode(json.dumps(make_finished(error=None)), FROM_AGENT))
