"""Server-sent events as bytes: an event is framed once, however many viewers it goes to."""

import msgspec

_encoder = msgspec.json.Encoder()


def frame_text(text: str, *, event_id: str | None = None, event: str | None = None) -> bytes:
    """Return one event whose data is `text`.

    A carriage return or line feed within the text starts a new `data:` line, as the format knows no other way;
    a client joins them with line feeds. `event_id` and `event` must hold neither."""
    data = text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "\ndata: ")
    head = f"event: {event}\n" if event is not None else ""
    if event_id is not None:
        head += f"id: {event_id}\n"
    return f"{head}data: {data}\n\n".encode()


def frame_json(document: object, *, event_id: str | None = None, event: str | None = None) -> bytes:
    """Return one event whose data is `document` as one line of JSON."""
    return frame_text(_encoder.encode(document).decode(), event_id=event_id, event=event)
