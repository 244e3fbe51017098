"""What a route is: its address, who may call it, and what goes in and out. routes.py lists them all."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

import msgspec
from aiohttp import web

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Policy(StrEnum):
    """Who may call a route. The user roles include those above them."""

    PUBLIC = "public"
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"
    AGENT = "agent"  # any enrolled agent, by its key; the handler sees to it that it only touches its own


class Media(StrEnum):
    JSON = "application/json"
    EVENTS = "text/event-stream"
    BYTES = "application/octet-stream"
    TEXT = "text/plain"
    HTML = "text/html"
    SCRIPT = "text/x-shellscript"
    FORM = "multipart/form-data"
    WEBSOCKET = "websocket"


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    method: str
    path: str
    handler: Handler
    policy: Policy
    summary: str
    query: type[msgspec.Struct] | None = None
    headers: type[msgspec.Struct] | None = None
    body: type[msgspec.Struct] | None = None
    body_media: Media = Media.JSON
    is_body_optional: bool = False
    answer: object | None = None  # a type that msgspec knows
    answer_media: Media = Media.JSON
    status: int = 200
    is_waiting: bool = False  # for a host: how long it takes says nothing about the server
    is_key_in_query: bool = False  # the agent's key may be in the URL, as `?key=`

    @property
    def is_stream(self) -> bool:
        return self.answer_media is Media.EVENTS

    @property
    def is_timed(self) -> bool:
        """Whether how long it takes says something about the server."""
        is_plain = self.answer_media not in (Media.EVENTS, Media.WEBSOCKET, Media.BYTES)
        return is_plain and self.body_media is Media.JSON and not self.is_waiting
