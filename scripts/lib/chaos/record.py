"""All that was seen during a run, in order, for the history of a command that went wrong."""

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Note:
    at: float  # seconds since the start
    token: str | None  # of the command it is about; None: a fault, or something about all
    text: str


@dataclass(slots=True)
class Record:
    started: float = field(default_factory=time.monotonic)
    notes: list[Note] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, text: str, token: str | None = None) -> None:
        self.notes.append(Note(self.seconds, token, text))

    def tell(self, token: str) -> list[str]:
        """Return what happened to one command and, between that, to all."""
        own = [note.at for note in self.notes if note.token == token]
        first, last = (min(own) - 5, max(own) + 1) if own else (0.0, self.seconds)
        return [
            f"{note.at:9.3f} {note.text}" if note.token else f"{note.at:9.3f}     {note.text}"
            for note in self.notes
            if note.token == token or (note.token is None and first <= note.at <= last)
        ]
