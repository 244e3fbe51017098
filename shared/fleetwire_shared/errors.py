"""Domain errors. Each class has a stable `code` that crosses the wire and appears in problem documents."""

from typing import ClassVar


class FleetwireError(Exception):
    """Base of all errors a caller may be told about. The message says what was wrong and what would be right."""

    code: ClassVar[str] = "internal"

    @property
    def message(self) -> str:
        return str(self)


class InvalidError(FleetwireError):
    """The request itself is wrong; sending it again changes nothing."""

    code = "invalid"


class UnauthorizedError(FleetwireError):
    """No credentials, or none that are valid now."""

    code = "unauthorized"


class ForbiddenError(FleetwireError):
    """The caller is known and may not do this; also: the operating system of the host refused it."""

    code = "forbidden"


class NotFoundError(FleetwireError):
    code = "not_found"


class ConflictError(FleetwireError):
    """The request is right, but not in the present state."""

    code = "conflict"


class KeyReusedError(FleetwireError):
    """The request's idempotency key was used for a request that asked for something else."""

    code = "key_reused"


class TooLargeError(FleetwireError):
    code = "too_large"


class RangeError(FleetwireError):
    """A byte range outside the file. `size_bytes` is the file's size, None where that is not known."""

    code = "range_not_satisfiable"

    def __init__(self, message: str, *, size_bytes: int | None = None) -> None:
        super().__init__(message)
        self.size_bytes = size_bytes


class RateLimitedError(FleetwireError):
    """Too many attempts. `retry_after_seconds` is when the next one is allowed."""

    code = "rate_limited"

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class UnavailableError(FleetwireError):
    """What is needed is away now (an agent, the database, a disk with space); trying later may succeed."""

    code = "unavailable"


class PeerTimeoutError(FleetwireError):
    """The other side did not answer in time."""

    code = "timeout"


class PeerFailedError(FleetwireError):
    """The other side answered, and failed in a way that is neither the caller's nor our fault."""

    code = "peer_failed"


class ProtocolError(FleetwireError):
    """A frame that is not of the protocol. `path` names the bad field, such as `metrics.filesystems[2].fstype`."""

    code = "protocol"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


_BY_CODE: dict[str, type[FleetwireError]] = {
    kind.code: kind
    for kind in (
        InvalidError, UnauthorizedError, ForbiddenError, NotFoundError, ConflictError, TooLargeError,
        UnavailableError, PeerTimeoutError, PeerFailedError,
    )
}  # fmt: skip


def error_from_code(code: str, message: str, *, size_bytes: int | None = None) -> FleetwireError:
    """Return the error a peer reported; a code this version does not know becomes `PeerFailedError`.

    `size_bytes` belongs to RangeError alone."""
    if code == RangeError.code:
        return RangeError(message, size_bytes=size_bytes)
    return _BY_CODE.get(code, PeerFailedError)(message)
