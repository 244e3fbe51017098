"""Whatever is sent, the answer says what would be right: a problem document, never a 500, never silence."""

import json
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.callers import CHANGED_USER, Callers
from tests.support.processes import ServerProcess
from tests.support.raw_http import RawAnswer, send_raw

from fleetwire_server.http.route import Media, Policy, Route
from fleetwire_server.http.routes import ROUTES

WITH_JSON = [route for route in ROUTES if route.body is not None and route.body_media is Media.JSON]
WITH_QUERY = [route for route in ROUTES if route.query is not None]
WITH_PARAMETERS = [route for route in ROUTES if "{" in route.path]

NOT_OBJECTS = {
    "nothing": b"",
    "cut off": b'{"label": "x"',
    "null": b"null",
    "list": b"[]",
    "text": b'"label"',
    "number": b"1e999",
    "NaN": b'{"cpu_percent": NaN}',
    "no JSON": b"label=x&tags=y",
    "no UTF-8": b'{"label": "\xff\xfe", "username": "\xff"}',
    "UTF-16": '{"label": "x"}'.encode("utf-16"),
    "lone surrogate": b'{"label": "\\ud800", "username": "\\ud800", "role": "\\udfff"}',
    "very deep": b"[" * 100_000,
    "deep in a field": b'{"label": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    "two documents": b"{}{}",
}
ODD_TEXTS: dict[str, str | bytes] = {
    "NUL": "%00",
    "no UTF-8": "%FF%FE",
    "surrogate": "%ED%A0%80",
    "no hex": "%zz",
    "raw byte": b"\xff",
    "raw UTF-8": "é".encode(),
    "slash": "..%2F..%2Fetc",
    "newline": "a%0D%0Ab",
    "long": "x" * 5000,
    "emoji": quote("🦊"),
    "SQL": quote("' OR 1=1 --"),
    "huge number": "9" * 400,
    "not a number": "nan",
    "infinity": "inf",
    "minus": "-1",
}


def name_of(route: Route) -> str:
    return f"{route.method} {route.path}"


def credentials(route: Route, callers: Callers) -> dict[str, str]:
    if route.policy is Policy.AGENT:
        return {"X-Agent-Key": callers.agent_key}
    return {"Authorization": f"Bearer {callers.admin}"}


def path_of(route: Route, callers: Callers) -> str:
    return route.path.format(agent_id=callers.agent_id, command_id="cmd_unknown", name=CHANGED_USER, channel_id="ch_x")


def send_body(
    server: ServerProcess, route: Route, callers: Callers, body: bytes, content_type: str = "application/json"
) -> RawAnswer:
    headers = credentials(route, callers) | {"Content-Type": content_type}
    return send_raw(server, route.method, path_of(route, callers), headers, body)


def assert_refused(answer: RawAnswer) -> Any:
    assert 400 <= answer.status < 500, answer
    problem = answer.problem()
    assert len(problem["detail"]) > 15
    return problem


@pytest.mark.parametrize("kind", NOT_OBJECTS)
@pytest.mark.parametrize("route", WITH_JSON, ids=name_of)
def test_what_is_no_json_object_is_refused(
    route: Route, kind: str, http_server: ServerProcess, callers: Callers
) -> None:
    answer = send_body(http_server, route, callers, NOT_OBJECTS[kind])
    if not (kind == "nothing" and route.is_body_optional):
        assert assert_refused(answer)["code"] == "invalid"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(min_value=2**60) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("route", WITH_JSON, ids=name_of)
def test_any_values_in_the_fields_are_taken_or_refused(
    route: Route, http_server: ServerProcess, callers: Callers
) -> None:
    assert route.body is not None
    fields = {name: JSON for name in route.body.__struct_encode_fields__ if name not in ("role", "grace_seconds")}

    @settings(max_examples=25)
    @given(document=st.fixed_dictionaries({}, optional=fields) | JSON, is_plain=st.booleans())
    def is_taken_or_refused(document: object, is_plain: bool) -> None:
        body = json.dumps(document, ensure_ascii=is_plain).encode("utf-8", "surrogatepass")
        answer = send_body(http_server, route, callers, body)
        if answer.status >= 300:
            assert_refused(answer)

    is_taken_or_refused()


@pytest.mark.parametrize("route", WITH_JSON, ids=name_of)
def test_any_bytes_of_any_type_are_taken_or_refused(route: Route, http_server: ServerProcess, callers: Callers) -> None:
    types = st.sampled_from(
        ["application/json", "text/plain", "application/json; charset=utf-7", "multipart/form-data"]
    )

    @settings(max_examples=15)
    @given(body=st.binary(min_size=1, max_size=200), content_type=types)
    def is_taken_or_refused(body: bytes, content_type: str) -> None:
        assert_refused(send_body(http_server, route, callers, body, content_type))

    is_taken_or_refused()


@pytest.mark.parametrize("kind", ODD_TEXTS)
@pytest.mark.parametrize("route", WITH_PARAMETERS, ids=name_of)
def test_odd_ids_are_not_found(route: Route, kind: str, http_server: ServerProcess, callers: Callers) -> None:
    before, _, after = route.path.partition("{agent_id}" if "{agent_id}" in route.path else "{")
    odd = ODD_TEXTS[kind]
    tail = after.partition("}")[2] if "{agent_id}" not in route.path else after.replace("{command_id}", "cmd_x")
    target = before.encode() + (odd if isinstance(odd, bytes) else odd.encode()) + tail.encode()
    body = b'{"label":"x","role":"viewer","type":"shell","params":{"command":"true"}}'
    answer = send_raw(http_server, route.method, target, credentials(route, callers), body)
    assert 400 <= answer.status < 500, answer


@pytest.mark.parametrize("kind", ODD_TEXTS)
@pytest.mark.parametrize("route", WITH_QUERY, ids=name_of)
def test_odd_query_values_are_taken_or_refused(
    route: Route, kind: str, http_server: ServerProcess, callers: Callers
) -> None:
    assert route.query is not None
    odd = ODD_TEXTS[kind]
    for name in route.query.__struct_encode_fields__:
        target = (
            path_of(route, callers).encode() + f"?{name}=".encode() + (odd if isinstance(odd, bytes) else odd.encode())
        )
        answer = send_raw(http_server, route.method, target, credentials(route, callers))
        assert answer.status == 200 or 400 <= answer.status < 500 or answer.status == 503, answer
        if answer.status != 200 and answer.body.startswith(b"{"):
            answer.problem()


@pytest.mark.parametrize("route", WITH_QUERY, ids=name_of)
def test_a_parameter_given_twice_is_refused(route: Route, http_server: ServerProcess, callers: Callers) -> None:
    assert route.query is not None
    for name in route.query.__struct_encode_fields__:
        target = f"{path_of(route, callers)}?{name}=1&{name}=2"
        problem = assert_refused(send_raw(http_server, route.method, target, credentials(route, callers)))
        assert problem["detail"].startswith(f"{name} is given more than once")


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/agents", {"label": ""}, "label"),
        ("/api/agents", {"label": "a\x00b"}, "label"),
        ("/api/agents", {"label": "web", "tags": ["ok", 5]}, "tags"),
        ("/api/agents", {"tags": []}, "label"),
        ("/api/users", {"username": "x", "password": "long enough", "role": "king"}, "admin, operator, viewer"),
        ("/api/users", {"username": "a b", "password": "long enough", "role": "viewer"}, "username"),
        ("/api/users", {"username": "x", "password": "short", "role": "viewer"}, "password"),
        ("{agent}/commands", {"type": "python", "params": {"command": "1"}}, "shell"),
        ("{agent}/commands", {"type": "shell", "params": {"command": ""}}, "params.command"),
        ("{agent}/commands", {"type": "shell", "params": {"command": "a\x00b"}}, "params.command"),
        ("{agent}/commands", {"type": "shell", "params": {"command": "true", "timeout": 0}}, "params.timeout"),
        ("{agent}/commands", {"type": "shell", "params": {"command": "true", "timeout": 10**400}}, "timeout"),
        ("{agent}/commands", {"type": "shell", "params": {"command": "true", "timeout": "30"}}, "params.timeout"),
        ("{agent}/commands", {"type": "shell", "params": {"command": "x" * 131_072}}, "params.command"),
        ("{agent}/commands", {"type": "shell", "params": {"command": "é" * 70_000}}, "params.command"),
        ("{agent}/commands", {"type": "shell"}, "params"),
    ],
)
def test_a_refusal_names_the_field(
    path: str, body: object, said: str, http_server: ServerProcess, callers: Callers
) -> None:
    headers = {"Authorization": f"Bearer {callers.admin}"}
    target = path.format(agent=f"/api/agents/{callers.agent_id}")
    answer = send_raw(http_server, "POST", target, headers, json.dumps(body).encode())
    assert answer.status == 400
    assert said in answer.problem()["detail"]


@pytest.mark.parametrize("header", ["Authorization", "X-Agent-Key", "Last-Event-ID", "Range", "X-Forwarded-For"])
def test_headers_that_are_no_text_do_no_harm(header: str, http_server: ServerProcess, callers: Callers) -> None:
    for path in (f"/api/agents/{callers.agent_id}", f"/api/agents/{callers.agent_id}/stream/logs?source=journald"):
        sent: dict[str, str | bytes] = {"Authorization": f"Bearer {callers.admin}", header: b"Bearer \xff\xed\xa0\x80"}
        answer = send_raw(http_server, "GET", path + "&lines=0" if "?" in path else path, sent)
        assert answer.status in (200, 400, 401, 503), answer


def test_the_longest_path_fits_into_a_request(http_server: ServerProcess, callers: Callers) -> None:
    headers = {"Authorization": f"Bearer {callers.admin}"}
    target = f"/api/agents/{callers.agent_id}/files?path="
    longest = "/" + "é" * 2047
    assert send_raw(http_server, "GET", target + quote(longest), headers).status == 503  # the agent is away
    problem = assert_refused(send_raw(http_server, "GET", target + quote("/" + "🦊" * 4095), headers))
    assert "shorter than 4096 bytes" in problem["detail"]
