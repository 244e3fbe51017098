"""Bytes to log lines to frames. Pure; bounded memory whatever the length of a line."""

import codecs
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fleetwire_shared.limits import CHUNK_BYTES, MAX_LINE_BYTES, MAX_LINES_PER_FRAME
from fleetwire_shared.messages import LogLines


class RawLine(NamedTuple):
    offset: int  # of the line's first byte
    kept: bytes  # the line without its newline, or the start of it
    full_bytes: int  # length of the whole line, without its newline


class LineSplitter:
    """Splits a stream of bytes at newlines; of a longer line than `limit_bytes` the start is kept, the rest counted."""

    def __init__(self, offset: int, *, limit_bytes: int = MAX_LINE_BYTES) -> None:
        """Start at `offset`, the position in the file of the first byte that will be fed."""
        self._limit_bytes = limit_bytes
        self._offset = offset
        self._head = b""
        self._head_bytes = 0

    def feed(self, piece: bytes) -> list[RawLine]:
        """Return the lines that `piece` completes."""
        *complete, rest = piece.split(b"\n")
        lines = []
        for part in complete:
            line = self._close_line(part) if self._head_bytes else RawLine(self._offset, part, len(part))
            if len(line.kept) > self._limit_bytes:
                line = line._replace(kept=line.kept[: self._limit_bytes])
            lines.append(line)
            self._offset = line.offset + line.full_bytes + 1
        self._add_to_head(rest)
        return lines

    def finish(self) -> RawLine | None:
        """Return the last line, which has no newline and will never get one; None when there is none."""
        if not self._head_bytes:
            return None
        line = self._close_line(b"")
        self._offset += line.full_bytes
        return line

    def _close_line(self, part: bytes) -> RawLine:
        self._add_to_head(part)
        line = RawLine(self._offset, self._head, self._head_bytes)
        self._head, self._head_bytes = b"", 0
        return line

    def _add_to_head(self, part: bytes) -> None:
        if len(self._head) < self._limit_bytes:
            self._head += part[: self._limit_bytes - len(self._head)]
        self._head_bytes += len(part)


def format_line(line: RawLine) -> str:
    """Return the text that is shown: what is no UTF-8 or NUL replaced, a cut line marked with its whole length."""
    if line.full_bytes > len(line.kept):
        return cut_text(line.kept, line.full_bytes)
    text = line.kept.decode("utf-8", errors="replace")
    if text.endswith("\r"):
        text = text[:-1]
    return text.replace("\0", "\ufffd") if "\0" in text else text


def cut_text(kept: bytes, full_bytes: int) -> str:
    """Return the start of a text of `full_bytes`, never ending within a character, and say that it is one."""
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(kept)
    return text.replace("\0", "\ufffd") + f" … [cut, {full_bytes} bytes in all]"


def make_line_filter(grep: str | None) -> Callable[[RawLine], str | None]:
    """Return the function that gives the text of a line, or None for a line that does not contain `grep`."""
    if not grep:
        return format_line
    # Most lines do not match: telling that from the bytes spares decoding them. A replacement character may stand
    # for any byte, so a text with one is looked for after decoding only.
    needle = b"" if "\ufffd" in grep else grep.encode()

    def text_if_matching(line: RawLine) -> str | None:
        if needle not in line.kept:
            return None
        text = format_line(line)
        return text if grep in text else None

    return text_if_matching


def build_frames(lines: Iterable[tuple[str, str]]) -> Iterator[LogLines]:
    """Yield the (cursor, text) pairs in frames of at most MAX_LINES_PER_FRAME lines and about CHUNK_BYTES of text."""
    cursors: list[str] = []
    texts: list[str] = []
    text_chars = 0
    for cursor, text in lines:
        if texts and (len(texts) == MAX_LINES_PER_FRAME or text_chars + len(text) > CHUNK_BYTES):
            yield LogLines(cursors=tuple(cursors), texts=tuple(texts))
            cursors, texts, text_chars = [], [], 0
        cursors.append(cursor)
        texts.append(text)
        text_chars += len(text)
    if texts:
        yield LogLines(cursors=tuple(cursors), texts=tuple(texts))
