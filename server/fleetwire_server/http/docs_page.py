"""The OpenAPI document, and the same as a page that needs neither scripts nor anything from elsewhere."""

from collections.abc import Sequence
from html import escape
from typing import Any

from aiohttp import web

from fleetwire_server.http.bodies import to_json
from fleetwire_server.http.openapi import build_document
from fleetwire_server.http.route import Route

_DOCUMENT: web.AppKey[bytes] = web.AppKey("openapi_document", bytes)
_PAGE: web.AppKey[str] = web.AppKey("openapi_page", str)

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid var(--line); padding: .75rem 0; }
h2 { font: 600 1rem ui-monospace, monospace; margin: 0; overflow-wrap: anywhere; }
p { margin: .25rem 0; }
dt { font-family: ui-monospace, monospace; }
dd { margin: 0 0 .25rem 1.5rem; color: var(--soft); }
small { color: var(--soft); }
"""


def provide(app: web.Application, routes: Sequence[Route]) -> None:
    """Build both once, at start: they never change while the server runs."""
    document = build_document(routes)
    app[_DOCUMENT] = to_json(document)
    app[_PAGE] = build_page(document)


async def show_openapi(request: web.Request) -> web.Response:
    return web.Response(body=request.app[_DOCUMENT], content_type="application/json")


async def show_docs(request: web.Request) -> web.Response:
    return web.Response(
        text=request.app[_PAGE],
        content_type="text/html",
        headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"},
    )


def build_page(document: dict[str, Any]) -> str:
    sections = "".join(
        _section(method, path, operation, document["components"]["schemas"])
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Fleetwire API</title><style>{_STYLE}</style>"
        f"<h1>Fleetwire API {escape(document['info']['version'])}</h1>"
        "<p>The same for programs: <a href=openapi.json>openapi.json</a>. Errors are "
        "<code>application/problem+json</code> with a stable <code>code</code>.</p>"
        f"{sections}</html>"
    )


def _section(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    fields = [_field(f"{item['name']} ({item['in']})", item["schema"], schemas) for item in operation["parameters"]]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        fields += _properties(content["schema"], schemas)
    return (
        f"<section><h2>{method.upper()} {escape(path)}</h2><p>{escape(operation['summary'])} "
        f"<small>{escape(operation['description'])}</small></p><dl>{''.join(fields)}</dl></section>"
    )


def _properties(schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    resolved = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return [_field(name, field, schemas) for name, field in resolved.get("properties", {}).items()]


def _field(name: str, schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    nested = "".join(_properties(schema, schemas)) if "$ref" in schema else ""
    return f"<dt>{escape(name)}</dt><dd>{escape(_describe(schema))}{f'<dl>{nested}</dl>' if nested else ''}</dd>"


def _describe(schema: dict[str, Any]) -> str:
    options = [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]
    kinds = [
        " | ".join(map(str, option["enum"])) if "enum" in option else str(option.get("type", "object"))
        for option in options
    ]
    bounds = [
        f"{word} {option[key]}"
        for option in options
        for key, word in (("minimum", "from"), ("maximum", "to"), ("maxLength", "at most"))
        if key in option
    ]
    default = [f"default {schema['default']}"] if schema.get("default") not in (None, [], "") else []
    text = ", ".join([*kinds, *bounds, *default])
    description = schema.get("description") or next((o["description"] for o in options if "description" in o), "")
    return f"{text}. {description}" if description else text
