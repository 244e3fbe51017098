"""The server's own records, as stored. No I/O. Times are Unix seconds of the server's clock, ids are opaque text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


class Role(StrEnum):
    """What a user may do; each role includes the ones before it."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def includes(self, other: "Role") -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    name: str
    role: Role
    password_hash: str  # argon2id, with its parameters
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class UserSession:
    """A login. The token itself is never stored."""

    token_hash: str  # SHA-256 of the token, hex
    username: str
    role: Role  # the user's role now, not the one at login
    created_at: float
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamTicket:
    """A token for one SSE request, so that no session token need be put into a URL."""

    ticket_hash: str
    session_token_hash: str
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentKey:
    key_hash: str
    agent_id: str
    created_at: float
    expires_at: float | None  # set on the key that a rotation replaces


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """An enrolled host. What the agent reports of itself is empty until it was first seen."""

    id: str
    label: str
    tags: tuple[str, ...] = ()
    hostname: str = ""
    ip: str = ""  # address the agent last came from
    os: str = ""
    version: str = ""  # of the agent software
    facts: Mapping[str, str | int] = field(default_factory=dict)  # the rest of HostFacts
    created_at: float
    last_seen: float | None = None


class DeploymentStatus(StrEnum):
    RUNNING = "running"
    FINISHED = "finished"  # each host has ended, one way or another
    INTERRUPTED = "interrupted"  # the server stopped meanwhile


class HostStatus(StrEnum):
    """Where the deployment to one host is."""

    WAITING = "waiting"
    RUNNING = "running"
    DEPLOYED = "deployed"
    FAILED = "failed"
    INTERRUPTED = "interrupted"  # the server stopped meanwhile

    @property
    def is_end(self) -> bool:
        return self not in (HostStatus.WAITING, HostStatus.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentHost:
    """The deployment to one host and how it ended. No secret is kept of it."""

    host: str
    port: int
    ssh_user: str
    label: str
    profile: str
    status: HostStatus = HostStatus.WAITING
    step: str | None = None  # at which it failed
    reason: str | None = None  # stable; for programs
    detail: str | None = None  # what was wrong and what would be right
    agent_id: str | None = None  # stays when the agent is deleted later
    host_key: str | None = None  # fingerprint
    started_at: float | None = None
    finished_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    id: str
    status: DeploymentStatus
    created_at: float
    created_by: str
    finished_at: float | None = None
    hosts: tuple[DeploymentHost, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSummary:
    """A deployment in a list: how many of its hosts ended how."""

    id: str
    status: DeploymentStatus
    created_at: float
    created_by: str
    finished_at: float | None
    hosts: int
    deployed: int
    failed: int  # or interrupted


@dataclass(frozen=True, slots=True, kw_only=True)
class HostKey:
    """The key an SSH server was first seen with, and must show from then on."""

    host: str
    port: int
    public_key: str  # in OpenSSH's format, without a comment
    fingerprint: str  # SHA256:..., as ssh-keygen -l prints it
    pinned_at: float
    pinned_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """Who did what to what. `sequence` is 0 before it is stored."""

    at: float
    actor: str
    action: str
    subject: str
    detail: Mapping[str, object] = field(default_factory=dict)
    sequence: int = 0


class CommandStatus(StrEnum):
    """Where a command is in its life; what may follow what is in core/command_states.py."""

    QUEUED = "queued"
    OFFERED = "offered"
    ACCEPTED = "accepted"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REJECTED = "rejected"
    INTERRUPTED = "interrupted"
    LOST = "lost"

    @property
    def is_end(self) -> bool:
        """Whether the command is over. `lost` and `interrupted` are ends, though a late truth may refine them."""
        return self not in (
            CommandStatus.QUEUED, CommandStatus.OFFERED, CommandStatus.ACCEPTED, CommandStatus.RUNNING
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class KilledProcess:
    """A process that was ended with a command."""

    pid: int
    command: str  # its command line, cut
    signal: str  # "TERM" or "KILL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    id: str
    agent_id: str
    type: str
    params: Mapping[str, str | int | float]
    status: CommandStatus = CommandStatus.QUEUED
    timeout_seconds: float
    created_at: float
    created_by: str
    expires_at: float  # an agent that has not been offered it by then never is
    offered_to: str | None = None  # instance id of the agent that was offered it, holds it, or was asked about it
    accepted_at: float | None = None  # when the agent was first known to hold it; None: it may never have received it
    started_at: float | None = None
    finished_at: float | None = None
    cancel_requested_at: float | None = None
    exit_code: int | None = None
    stdout_bytes: int = 0  # written by the command, kept or not
    stderr_bytes: int = 0
    output_end: int = 0  # position after the last stored byte
    truncated: bool = False  # some output was not kept
    late: bool = False  # an end that was not proved was refined afterwards
    is_orphan: bool = False  # not sent by this server as far as it knows: an agent held it
    killed: tuple[KilledProcess, ...] = ()  # the first of those that were ended with it
    killed_count: int = 0
    error: str | None = None

    @property
    def is_ended_alone(self) -> bool:
        """Whether this server ended it, as never offered, without a word of its agent.

        No proof that it has not run: a server restored from a backup may have offered it after that was made."""
        is_unheard = self.offered_to is None and self.accepted_at is None
        return is_unheard and self.status in (CommandStatus.CANCELLED, CommandStatus.EXPIRED)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandKey:
    """A user's name for one request, under which a second one is the same command. Unique for agent and user."""

    agent_id: str
    username: str
    key: str
    body_hash: str  # SHA-256 of what was asked for, hex
    created_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputPiece:
    """Consecutive bytes of one stream of a command."""

    position: int  # bytes of both streams before it
    stream: Literal["stdout", "stderr"]
    offset: int  # bytes of this stream before it
    data: bytes

    @property
    def end(self) -> int:
        return self.position + len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class MinuteRollup:
    """What one agent's samples of one minute came to; sums, so that two halves of a minute can be added.

    `sums` and `maxima` are keyed by the metric names of METRIC_NAMES; a metric without samples is missing."""

    agent_id: str
    minute: int  # Unix seconds, a multiple of 60
    counts: Mapping[str, int]
    sums: Mapping[str, float]
    maxima: Mapping[str, float]


METRIC_NAMES = (
    "cpu_percent",
    "mem_percent",
    "disk_percent",
    "swap_percent",
    "load1",
    "received_bytes_per_second",
    "sent_bytes_per_second",
    "read_bytes_per_second",
    "written_bytes_per_second",
)
"""The metrics kept as history: the last four are totals over all interfaces and disks."""
