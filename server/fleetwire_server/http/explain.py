"""What was wrong with a body or a query and what would be right: the decoder's complaint and the type's schema."""

import re
from typing import Any, TypeVar

import msgspec

from fleetwire_server.http.bodies import PATTERN_WORDS
from fleetwire_shared.errors import InvalidError

_AT = re.compile(r" - at `(?:key in )?\$\.?(?P<path>.*)`$")
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")
_GOT = re.compile(r"got `(?P<got>\w+)`")
_INDEX = re.compile(r"\[[^\]]*\]")

_KINDS = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
}


S = TypeVar("S", bound=msgspec.Struct)


def check(document: object, kind: type[S], *, strict: bool = True) -> S:
    """Return `document` as a `kind`.

    Args:
        strict: False takes text for numbers, as a query string has them.
    Raises:
        InvalidError: what is wrong with it, and what would be right."""
    try:
        return msgspec.convert(document, kind, strict=strict)
    except msgspec.ValidationError as err:
        raise InvalidError(explain(err, kind)) from err


def explain(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> str:
    """Return one sentence, such as `params.timeout: must be a number from 1 to 86400`."""
    message = str(error)
    at = _AT.search(message)
    path = at["path"] if at is not None else ""
    problem = message[: at.start()] if at is not None else message
    missing = _MISSING.fullmatch(problem)
    if missing is not None:
        path = f"{path}.{missing['name']}".lstrip(".")
    wanted = _describe(_schema_at(kind, path))
    if missing is not None:
        return f"{path}: is missing; it must be {wanted}"
    got = _GOT.search(problem)
    return f"{path or 'the body'}: must be {wanted}" + (f", got {got['got']}" if got is not None else "")


def _schema_at(kind: type[msgspec.Struct], path: str) -> list[dict[str, Any]]:
    """Return the schemas of what may stand at `path`, without null."""
    (schema,), components = msgspec.json.schema_components([kind])
    options = [_resolve(schema, components)]
    for name in filter(None, path.split(".")):
        field = options[0].get("properties", {}).get(_INDEX.sub("", name), {})
        options = _options(field, components)
        if "[" in name and options:
            options = _options(options[0].get("items", {}), components)
        if not options:
            break
    return options


def _options(schema: dict[str, Any], components: dict[str, Any]) -> list[dict[str, Any]]:
    resolved = [_resolve(option, components) for option in schema.get("anyOf", [schema])]
    return [option for option in resolved if option and option.get("type") != "null"]


def _resolve(schema: dict[str, Any], components: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    resolved: dict[str, Any] = components[reference.rpartition("/")[2]] if reference else schema
    return resolved


def _describe(options: list[dict[str, Any]]) -> str:
    return " or ".join(_describe_one(option) for option in options) or "of the documented type"


def _describe_one(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        allowed = ", ".join(str(value) for value in schema["enum"])
        return f"one of {allowed}" if len(schema["enum"]) > 1 else allowed
    words = [_KINDS.get(schema.get("type", ""), "of the documented type")]
    if "minimum" in schema:
        words.append(f"from {schema['minimum']:g}")
    if "maximum" in schema:
        words.append(f"to {schema['maximum']}")
    if "minLength" in schema or "maxLength" in schema:
        words.append(f"of {schema.get('minLength', 0)} to {schema['maxLength']} characters")
    if "maxItems" in schema:
        words.append(f"of at most {schema['maxItems']} items")
    if "pattern" in schema:
        words.append(PATTERN_WORDS.get(schema["pattern"], f"that matches {schema['pattern']}"))
    if "properties" in schema:
        words.append(f"with {', '.join(schema['properties'])}")
    return " ".join(words)
