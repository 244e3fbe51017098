"""The OpenAPI 3.1 document, made from the route table."""

import re
from collections.abc import Iterable
from typing import Any

import msgspec

from fleetwire_server.http.problem import Problem
from fleetwire_server.http.route import Media, Policy, Route
from fleetwire_shared import __version__

_PARAMETER = re.compile(r"{(\w+)}")
_SECURITY: dict[Policy, list[dict[str, list[str]]]] = {
    Policy.PUBLIC: [],
    Policy.AGENT: [{"agentKey": []}],
    Policy.VIEWER: [{"bearer": []}],
    Policy.OPERATOR: [{"bearer": []}],
    Policy.ADMIN: [{"bearer": []}],
}
_KEY_SECURITY: list[dict[str, list[str]]] = [{"agentKey": []}, {"agentKeyInQuery": []}]
_STREAM_SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"token": []}, {"ticket": []}]


def build_document(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the document as JSON-ready dicts."""
    routes = tuple(routes)
    kinds = [
        kind for route in routes for kind in (route.query, route.headers, route.body, route.answer) if kind is not None
    ]
    schemas, components = msgspec.json.schema_components([Problem, *kinds], ref_template="#/components/schemas/{name}")
    by_kind = {str(kind): schema for kind, schema in zip([Problem, *kinds], schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_kind, components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Fleetwire", "version": __version__, "license": {"name": "MIT", "identifier": "MIT"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "token": {"type": "apiKey", "in": "query", "name": "token"},
                "ticket": {"type": "apiKey", "in": "query", "name": "ticket"},
                "agentKey": {"type": "apiKey", "in": "header", "name": "X-Agent-Key"},
                "agentKeyInQuery": {"type": "apiKey", "in": "query", "name": "key"},
            },
        },
    }


def _operation(route: Route, by_kind: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "description": f"Role: {route.policy}.",
        "parameters": _parameters(route, components),
        "security": _security(route),
        "responses": _responses(route, by_kind),
    }
    if route.body is not None:
        operation["requestBody"] = {
            "required": not route.is_body_optional,
            "content": {route.body_media.value: {"schema": by_kind[str(route.body)]}},
        }
    return operation


def _security(route: Route) -> list[dict[str, list[str]]]:
    if route.is_stream:
        return _STREAM_SECURITY
    return _KEY_SECURITY if route.is_key_in_query else _SECURITY[route.policy]


def _parameters(route: Route, components: dict[str, Any]) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _PARAMETER.findall(route.path)
    ]
    for place, kind in (("query", route.query), ("header", route.headers)):
        if kind is None:
            continue
        schema = components[kind.__name__]
        parameters += [
            {"name": name, "in": place, "required": name in schema.get("required", ()), "schema": _not_null(field)}
            for name, field in schema["properties"].items()
        ]
    return parameters


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a query parameter, which can be left out but never null."""
    options = schema.get("anyOf")
    if options is None:
        return schema
    present = [option for option in options if option.get("type") != "null"]
    kept = {key: value for key, value in schema.items() if key not in ("anyOf", "default")}
    return kept | (present[0] if len(present) == 1 else {"anyOf": present})


def _responses(route: Route, by_kind: dict[str, Any]) -> dict[str, Any]:
    problem = {
        "description": "Refused or failed.",
        "content": {"application/problem+json": {"schema": by_kind[str(Problem)]}},
    }
    success: dict[str, Any] = {"description": route.summary}
    if route.answer is not None:
        success["content"] = {route.answer_media.value: {"schema": by_kind[str(route.answer)]}}
    elif route.answer_media is not Media.WEBSOCKET:
        success["content"] = {route.answer_media.value: {"schema": {"type": "string"}}}
    responses = {str(route.status): success, "default": problem}
    if route.handler.__name__ == "cancel_command":
        responses["202"] = success
    if route.handler.__name__ == "fetch_output":
        responses["206"] = success
    if route.handler.__name__ == "download_file":
        responses |= {"206": success, "304": {"description": "Not changed since If-None-Match."}}
    return responses
