"""Messages to JSON text and back. Strict on types, forgiving to unknown keys, so that a newer peer can add fields."""

import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin

from fleetwire_shared.errors import ProtocolError
from fleetwire_shared.limits import MAX_CONTROL_FRAME_BYTES
from fleetwire_shared.messages import Message

M = TypeVar("M", bound=Message)
_Check = Callable[[Any, str], Any]

_INT_MAX = 2**63 - 1  # what SQLite and every other reader of the number can hold


def encode(message: Message) -> str:
    """Return the message as one JSON object. Fields that equal their default are left out."""
    return json.dumps(
        {"type": message.type, **_to_json(message)},
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )


def decode(text: str, table: Mapping[str, type[M]]) -> M:
    """Return the message that `text` holds.

    Args:
        text: one frame.
        table: the messages allowed here: messages.FROM_AGENT, FROM_SERVER or ON_CHANNEL.
    Raises:
        ProtocolError: not JSON, too large, of a type not in `table`, or with a missing or mistyped field."""
    if len(text) > MAX_CONTROL_FRAME_BYTES:
        raise ProtocolError("frame", f"is {len(text)} characters, at most {MAX_CONTROL_FRAME_BYTES} are allowed")
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise ProtocolError("frame", f"is not JSON: {err}") from err
    if not isinstance(document, dict):
        raise ProtocolError("frame", "must be an object")
    name = document.get("type")
    kind: Any = table.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError("type", f"must be one of {', '.join(sorted(table))}, got {str(name)[:50]!r}")
    decoded: M = _record(kind)(document, kind.type)
    return decoded


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _to_json(record: Any) -> dict[str, Any]:
    out = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if field.default is not MISSING and value == field.default:
            continue
        if isinstance(value, tuple) and value and is_dataclass(value[0]):
            value = [_to_json(item) for item in value]
        elif is_dataclass(value):
            value = _to_json(value)
        out[field.name] = value
    return out


@cache
def _record(kind: Any) -> _Check:
    """Return the function that checks a JSON object and builds a `kind` of it."""
    hints = typing.get_type_hints(kind)
    checks = [(field.name, _checker(hints[field.name]), field.default is MISSING) for field in fields(kind)]

    def check(value: Any, path: str) -> Any:
        if type(value) is not dict:
            raise ProtocolError(path, "must be an object")
        arguments = {}
        for name, check_field, is_required in checks:
            if name in value:
                arguments[name] = check_field(value[name], f"{path}.{name}")
            elif is_required:
                raise ProtocolError(f"{path}.{name}", "is missing")
        return kind(**arguments)

    return check


def _checker(hint: Any) -> _Check:
    if hint in _SCALARS:
        return _SCALARS[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple:
        return _tuple_of(_checker(args[0]))
    if origin is Literal:
        return _one_of(args)
    if origin is UnionType or origin is typing.Union:
        (inner,) = (arg for arg in args if arg is not NoneType)
        return _optional(_checker(inner))
    return _record(hint)


def _tuple_of(check_item: _Check) -> _Check:
    def check(value: Any, path: str) -> Any:
        if type(value) is not list:
            raise ProtocolError(path, "must be an array")
        return tuple(check_item(item, f"{path}[{index}]") for index, item in enumerate(value))

    return check


def _optional(check_inner: _Check) -> _Check:
    return lambda value, path: None if value is None else check_inner(value, path)


def _one_of(allowed: tuple[str, ...]) -> _Check:
    def check(value: Any, path: str) -> Any:
        if not isinstance(value, str) or value not in allowed:
            raise ProtocolError(path, f"must be one of {', '.join(allowed)}")
        return value

    return check


def _string(value: Any, path: str) -> str:
    if type(value) is not str:
        raise ProtocolError(path, "must be a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as err:  # "\ud800" is valid JSON, and could be neither stored nor sent on
            raise ProtocolError(path, "must not hold a lone surrogate") from err
    return value


def _integer(value: Any, path: str) -> int:
    if type(value) is not int:
        raise ProtocolError(path, "must be an integer")
    if not -_INT_MAX <= value <= _INT_MAX:
        raise ProtocolError(path, "must fit into 64 bits")
    return value


def _number(value: Any, path: str) -> float:
    if type(value) not in (int, float):
        raise ProtocolError(path, "must be a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ProtocolError(path, "must be finite")
    return number


def _boolean(value: Any, path: str) -> bool:
    if type(value) is not bool:
        raise ProtocolError(path, "must be true or false")
    return value


_SCALARS: dict[Any, _Check] = {str: _string, int: _integer, float: _number, bool: _boolean}
