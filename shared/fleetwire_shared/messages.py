"""Every message of the wire, in one place: `docs/protocol.md` explains when each is sent.

Three tables at the end say which message may come from where: `FROM_AGENT` and `FROM_SERVER` on the control
socket, `ON_CHANNEL` on a channel (one socket for one file or one log tail).
Positions: a command's output is addressed by `position`, the number of bytes of stdout and stderr together that
came before, in the order in which the agent read them; `offset` counts within one stream."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, TypeAlias

PROTOCOL_VERSION = 1
"""The newest version this code speaks. Each bump adds a dated line to docs/protocol.md and recorded frames."""

PROTOCOL_OLDEST = 1
"""The oldest version this code still accepts from its peer."""

SUBPROTOCOL = "fleetwire.v1"
"""WebSocket subprotocol of the control socket; changes only when frames could not even be parsed."""

# ---------------------------------------------------------------- records within messages


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """What does not change between two boots."""

    hostname: str
    os: str  # PRETTY_NAME of os-release
    kernel: str  # uname -r
    architecture: str  # uname -m
    boot_id: str  # /proc/sys/kernel/random/boot_id
    cpu_count: int  # logical CPUs
    memory_bytes: int
    python: str  # version of the interpreter the agent runs on


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """A command the agent holds: it has not been told that the server stored its result."""

    command_id: str
    state: Literal["accepted", "running", "finished"]
    # What the server needs to take over a command that it does not know, restored from a backup perhaps.
    command: str = ""  # the first characters of its text
    timeout_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class KilledProcess:
    """A process that a timeout, a cancel or the agent's removal ended."""

    pid: int
    command: str  # its command line, cut; its name in brackets where it has none
    signal: Literal["TERM", "KILL"]  # KILL: it lived on through the grace


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """The server's answer to one `LedgerEntry`.

    keep: go on; send output from `output_position` on, and the result when there is one.
    forget: the server has the result, or never will want it. What waits does not start; what runs goes on.
    cancel: stop the command; the server has ended it meanwhile."""

    command_id: str
    action: Literal["keep", "forget", "cancel"]
    output_position: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem:
    """One mounted local filesystem. Network filesystems are never asked: a dead server would hang the question."""

    mountpoint: str
    device: str
    fstype: str
    total_bytes: int
    used_bytes: int
    available_bytes: int  # to unprivileged users
    used_percent: float
    inodes_total: int | None = None  # None where the filesystem has no fixed number (btrfs)
    inodes_used: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRates:
    device: str
    read_bytes_per_second: float
    written_bytes_per_second: float
    reads_per_second: float
    writes_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkRates:
    interface: str
    received_bytes_per_second: float
    sent_bytes_per_second: float
    received_packets_per_second: float
    sent_packets_per_second: float
    errors_per_second: float  # both directions, with drops


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    sensor: str
    label: str
    celsius: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectorFailure:
    """A collector that failed in this round; the others' values are not affected."""

    collector: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One unit of the service manager. The words are systemd's own."""

    name: str
    load: str  # "loaded", "not-found", "masked" ...; "not-loaded": only the journal still knows it
    active: str  # "active", "inactive", "failed" ...
    sub: str  # "running", "exited", "listening" ...
    description: str


# ---------------------------------------------------------------- control, both directions


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A sign of life from either side when nothing else was sent for `HEARTBEAT_SECONDS`. No answer."""

    type: ClassVar[str] = "heartbeat"


# ---------------------------------------------------------------- control, agent to server


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first frame. Answered by `welcome`, or by a close frame that says why not."""

    type: ClassVar[str] = "hello"
    protocol_oldest: int
    protocol_newest: int
    agent_version: str
    # New whenever the agent lost what it remembered: only within one instance does "never heard of it" prove
    # that a command was not received.
    instance_id: str
    host: HostFacts
    ledger: tuple[LedgerEntry, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsReport:
    """One sampling round. No answer. A value is None where the host has none or its collector failed."""

    type: ClassVar[str] = "metrics"
    sampled_at: float  # Unix seconds, agent's clock
    cpu_percent: float | None = None  # 0 to 100, mean of all logical CPUs since the last round
    cpu_per_core_percent: tuple[float, ...] = ()
    cpu_steal_percent: float | None = None
    cpu_iowait_percent: float | None = None
    load1: float | None = None
    load5: float | None = None
    load15: float | None = None
    mem_percent: float | None = None
    mem_total_bytes: int | None = None
    mem_used_bytes: int | None = None
    mem_available_bytes: int | None = None
    swap_percent: float | None = None
    swap_total_bytes: int | None = None
    swap_used_bytes: int | None = None
    disk_percent: float | None = None  # of the filesystem at /
    filesystems: tuple[Filesystem, ...] = ()
    disks: tuple[DiskRates, ...] = ()
    networks: tuple[NetworkRates, ...] = ()
    temperatures: tuple[Temperature, ...] = ()
    process_count: int | None = None
    uptime_s: int | None = None
    failures: tuple[CollectorFailure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandAccepted:
    """The agent holds the command in its ledger and will start it. Answers `command_offer`."""

    type: ClassVar[str] = "command_accepted"
    command_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRejected:
    """The command has not been started and never will be.

    Answers `command_offer`, or a `command_cancel` that came before it started."""

    type: ClassVar[str] = "command_rejected"
    command_id: str
    reason: Literal["cancelled", "expired", "full", "policy", "unsupported", "invalid"]
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandStarted:
    """The process runs. No answer."""

    type: ClassVar[str] = "command_started"
    command_id: str
    seconds_ago: float  # when this was sent


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOutput:
    """A piece of output, never split within a UTF-8 character. Answered by `output_stored`.

    A `position` beyond the end of the previous piece means that what lies between was dropped by the agent."""

    type: ClassVar[str] = "command_output"
    command_id: str
    stream: Literal["stdout", "stderr"]
    position: int
    offset: int
    base64: str  # at most CHUNK_BYTES when decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandFinished:
    """The result. Sent again at every connect until `command_stored` answers it."""

    type: ClassVar[str] = "command_finished"
    command_id: str
    status: Literal["succeeded", "failed", "timed_out", "cancelled", "interrupted"]
    exit_code: int | None  # None where no exit status exists; 128 + n when signal n ended the shell
    stdout_bytes: int  # all that was written, also what was not kept
    stderr_bytes: int
    seconds_ago: float  # since its end, when this was sent
    duration_seconds: float  # by a monotonic clock
    error: str | None = None
    killed: tuple[KilledProcess, ...] = ()  # of a stopped command, at most MAX_KILLED_LISTED
    killed_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelRefused:
    """The agent will not dial the channel. `code` is one of errors.py."""

    type: ClassVar[str] = "channel_refused"
    channel_id: str
    code: str
    message: str
    size_bytes: int | None = None  # of the file, where the range wanted lies outside it


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitList:
    """The host's units, sorted by name. Answers `list_units`."""

    type: ClassVar[str] = "unit_list"
    request_id: str
    units: tuple[Unit, ...]
    is_truncated: bool = False  # there are more than fit into one frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Uninstalled:
    """The agent is removed from its host and leaves as soon as this is written. Answers `uninstall`."""

    type: ClassVar[str] = "uninstalled"
    request_id: str
    removed: tuple[str, ...]  # paths


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailed:
    """The agent cannot or will not do what was asked. `code` is one of errors.py. Answers any `request_id`."""

    type: ClassVar[str] = "request_failed"
    request_id: str
    code: str
    message: str


# ---------------------------------------------------------------- control, server to agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Answers `hello`."""

    type: ClassVar[str] = "welcome"
    protocol: int  # the version both will speak
    protocol_oldest: int  # the range the server accepts
    protocol_newest: int
    agent_id: str
    server_version: str
    heartbeat_seconds: float
    silence_seconds: float
    metrics_seconds: float
    ledger: tuple[Settlement, ...] = ()


NO_KIND: Final = "none"
"""The kind of an offer that no agent takes: of an id that it holds or remembers it says what there is to say, as
to any offer, and an id that it does not know it refuses with `unsupported` or `policy`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandOffer:
    """A command to run. Answered by `command_accepted` or `command_rejected`."""

    type: ClassVar[str] = "command_offer"
    command_id: str
    kind: str  # "shell"; NO_KIND asks what the agent knows of the id, and nothing is run
    command: str
    timeout_seconds: float
    remaining_seconds: float  # until the offer expires; relative, as no clock is compared between machines


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandCancel:
    """Stop the command and all it started, or never start it: the agent remembers an id it has not seen yet, so that
    an offer on its way is refused.

    Answered by its `command_finished` or `command_rejected`. `expired` is for what was offered, never answered and is
    out of time: only the agent can tell that it has not run."""

    type: ClassVar[str] = "command_cancel"
    command_id: str
    reason: Literal["cancelled", "expired"] = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputStored:
    """The server has stored all output before `position`; the agent may drop it."""

    type: ClassVar[str] = "output_stored"
    command_id: str
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandStored:
    """The server has stored how the command ended; the agent may forget it."""

    type: ClassVar[str] = "command_stored"
    command_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFile:
    """Dial `channel_id` and send a file.

    Answered there by `file_opened`, binary frames and `end`; or on the control socket by `channel_refused`."""

    type: ClassVar[str] = "read_file"
    channel_id: str
    path: str
    offset: int = 0  # of the first byte wanted; negative: so many bytes before the end
    length: int | None = None  # None: to the end
    if_etag: str | None = None  # the range is wanted of this version only; of another, all is sent


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteFile:
    """Dial `channel_id` and receive a file.

    Answered there by `file_ready`; then binary frames and `end` from the server; then `file_written`, or an `end`
    with an error. Or answered on the control socket by `channel_refused`."""

    type: ClassVar[str] = "write_file"
    channel_id: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowLog:
    """Dial `channel_id` and follow a log until the channel is closed.

    Answered there by `log_opened`, then `log_lines`, `log_gap`, `log_rotated`; or by `channel_refused`."""

    type: ClassVar[str] = "follow_log"
    channel_id: str
    source: Literal["journald", "file"]
    unit: str | None = None
    path: str | None = None
    lines: int = 10  # how many of the last matching lines come first; not used with `cursor` or `since`
    since: float | None = None  # Unix seconds; journald only
    priority: int | None = None  # 0 (emerg) to 7 (debug), this and more urgent; journald only
    grep: str | None = None  # only lines that contain this text
    cursor: str | None = None  # go on after this line
    boot: str | None = None  # "0" (the last), "-1" (the one before) ..., or 32 hex digits; journald only
    kernel: bool = False  # the kernel's messages only; journald only, not with `unit`


@dataclass(frozen=True, slots=True, kw_only=True)
class ListUnits:
    """Which units does the host have? Answered by `unit_list` or `request_failed`."""

    type: ClassVar[str] = "list_units"
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Uninstall:
    """Remove the agent from its host. Answered by `uninstalled` or `request_failed`; after the former it leaves."""

    type: ClassVar[str] = "uninstall"
    request_id: str
    purge: bool = False  # also its key, its settings and its state


# ---------------------------------------------------------------- channels


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOpened:
    """Agent to server: the file is open; its bytes follow in binary frames."""

    type: ClassVar[str] = "file_opened"
    size_bytes: int | None  # of the whole file as it was when opened; None where only reading tells (/proc)
    offset: int  # of the first byte sent
    length: int | None  # bytes that will be sent; None: until `end`
    modified_at: float  # Unix seconds
    etag: str  # changes when the file does


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReady:
    """Agent to server: the destination is open; send."""

    type: ClassVar[str] = "file_ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileWritten:
    """Agent to server: the file is in place under its name, durable, and its digest was the expected one."""

    type: ClassVar[str] = "file_written"
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOpened:
    """Agent to server: the log can be read; lines follow."""

    type: ClassVar[str] = "log_opened"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLines:
    """Agent to server: lines in order. `cursors[i]` is the position of `texts[i]`, opaque to the server."""

    type: ClassVar[str] = "log_lines"
    cursors: tuple[str, ...]
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogGap:
    """Agent to server: lines are missing here. `count` is None when nobody can know."""

    type: ClassVar[str] = "log_gap"
    reason: str
    count: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogRotated:
    """Agent to server: the file was renamed, replaced or truncated; what follows is from its successor."""

    type: ClassVar[str] = "log_rotated"
    reason: Literal["replaced", "truncated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The last frame of a channel from the side that sent the data. With `code`, it failed."""

    type: ClassVar[str] = "end"
    bytes: int = 0
    sha256: str | None = None
    code: str | None = None
    message: str | None = None


AgentMessage: TypeAlias = (
    Hello | Heartbeat | MetricsReport | CommandAccepted | CommandRejected | CommandStarted | CommandOutput
    | CommandFinished | ChannelRefused | UnitList | Uninstalled | RequestFailed
)  # fmt: skip
ServerMessage: TypeAlias = (
    Welcome | Heartbeat | CommandOffer | CommandCancel | OutputStored | CommandStored | ReadFile | WriteFile
    | FollowLog | ListUnits | Uninstall
)  # fmt: skip
ChannelMessage: TypeAlias = (
    FileOpened | FileReady | FileWritten | LogOpened | LogLines | LogGap | LogRotated | End
)  # fmt: skip
Message: TypeAlias = AgentMessage | ServerMessage | ChannelMessage


FROM_AGENT: Mapping[str, type[AgentMessage]] = {
    kind.type: kind
    for kind in (
        Hello, Heartbeat, MetricsReport, CommandAccepted, CommandRejected, CommandStarted, CommandOutput,
        CommandFinished, ChannelRefused, UnitList, Uninstalled, RequestFailed,
    )
}  # fmt: skip
FROM_SERVER: Mapping[str, type[ServerMessage]] = {
    kind.type: kind
    for kind in (
        Welcome, Heartbeat, CommandOffer, CommandCancel, OutputStored, CommandStored, ReadFile, WriteFile,
        FollowLog, ListUnits, Uninstall,
    )
}  # fmt: skip
ON_CHANNEL: Mapping[str, type[ChannelMessage]] = {
    kind.type: kind
    for kind in (FileOpened, FileReady, FileWritten, LogOpened, LogLines, LogGap, LogRotated, End)
}  # fmt: skip
