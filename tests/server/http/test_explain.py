"""Every complaint about a body says what would be right."""

import msgspec
import pytest

from fleetwire_server.http.bodies import AgentPatch, AgentRequest, CommandRequest, LogStreamQuery, UserRequest
from fleetwire_server.http.explain import explain


@pytest.mark.parametrize(
    ("kind", "body", "sentence"),
    [
        (CommandRequest, '{"type":"shell"}', "params: is missing; it must be an object with command, timeout"),
        (CommandRequest, '{"type":"python","params":{"command":"a"}}', "type: must be shell"),
        (
            CommandRequest,
            '{"type":"shell","params":{"command":"a","timeout":0}}',
            "params.timeout: must be a number from 1 to 86400",
        ),
        (
            CommandRequest,
            '{"type":"shell","params":{"command":"a","timeout":"x"}}',
            "params.timeout: must be a number from 1 to 86400, got str",
        ),
        (
            CommandRequest,
            '{"type":"shell","params":{}}',
            "params.command: is missing; it must be text of 1 to 131071 characters without NUL characters",
        ),
        (CommandRequest, "[]", "the body: must be an object with type, params, expires_in, on_offline, got array"),
        (UserRequest, '{"username":"a","password":"12345678","role":"root"}', "role: must be one of admin, "),
        (
            AgentRequest,
            '{"label":"a","tags":[1]}',
            "tags[0]: must be text of 1 to 50 characters without control characters, got int",
        ),
        (AgentPatch, '{"tags":{}}', "tags: must be a list of at most 50 items, got object"),
        (LogStreamQuery, '{"source":"file","lines":-1}', "lines: must be a whole number from 0 to 10000"),
    ],
)
def test_a_complaint_says_what_would_be_right(kind: type[msgspec.Struct], body: str, sentence: str) -> None:
    with pytest.raises(msgspec.ValidationError) as raised:
        msgspec.json.decode(body, type=kind)
    assert explain(raised.value, kind).startswith(sentence)
