"""JSON bodies, queries and answers of the HTTP API. Their docstrings and constraints are its documentation."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from fleetwire_server.core.sessions import AgentStatus
from fleetwire_server.core.usernames import USERNAME_PATTERN
from fleetwire_server.model import CommandStatus, DeploymentStatus, HostStatus, Role
from fleetwire_shared.limits import (
    COMMAND_TIMEOUT_DEFAULT_SECONDS,
    COMMAND_TIMEOUT_MAX_SECONDS,
    COMMAND_TIMEOUT_MIN_SECONDS,
    MAX_COMMAND_BYTES,
    MAX_PATH_BYTES,
)

END = r"(?![\s\S])"
"""The end of the text: unlike `$` not before a last newline, and unlike `\\Z` also known to JSON Schema."""

TEXT = rf"^[^\x00-\x1f\x7f]*{END}"
NO_NUL = rf"^[^\x00]*{END}"
USERNAME = f"^{USERNAME_PATTERN}{END}"
UNIT = rf"^[A-Za-z0-9:_.\\@-]+{END}"
HOST = rf"^[A-Za-z0-9._:%-]+{END}"
SSH_USER = rf"^[A-Za-z0-9._@\\][A-Za-z0-9._@\\$-]*{END}"
BOOT = rf"^(0|-[1-9][0-9]{{0,5}}|[0-9a-f]{{32}}){END}"
UNIT_TYPE = rf"^[a-z]+{END}"
VISIBLE = rf"^[\x21-\x7e]+{END}"

PATTERN_WORDS = {
    TEXT: "without control characters",
    NO_NUL: "without NUL characters",
    USERNAME: "out of A-Z a-z 0-9 . _ @ - that begins with a letter or digit and has at most 64 characters",
    UNIT: "that is the name of a systemd unit",
    HOST: "that is the name or the address of a host",
    SSH_USER: "that is the name of a user on the host",
    BOOT: "that is 0 for the last boot, -1 for the one before it and so on, or the 32 hexadecimal digits of a boot id",
    VISIBLE: "of visible ASCII characters",
    UNIT_TYPE: "that is a type of systemd's units, such as service",
}
"""What each pattern asks for, in words for people."""
Label = Annotated[str, Meta(min_length=1, max_length=100, pattern=TEXT, description="What people call the host.")]
Tag = Annotated[str, Meta(min_length=1, max_length=50, pattern=TEXT)]
Tags = Annotated[list[Tag], Meta(max_length=50)]
Username = Annotated[
    str,
    Meta(pattern=USERNAME, description="Letters, digits, `.`, `_`, `@`, `-`; at most 64."),
]
Password = Annotated[str, Meta(min_length=8, max_length=1024)]
Percent = Annotated[float, Meta(ge=0, le=100)]
ShortText = Annotated[str, Meta(max_length=255)]
FilePath = Annotated[str, Meta(min_length=1, max_length=MAX_PATH_BYTES, description="Absolute path on the host.")]
HostName = Annotated[str, Meta(min_length=1, max_length=253, pattern=HOST, description="Name or address.")]
Port = Annotated[int, Meta(ge=1, le=65_535)]
SshUser = Annotated[str, Meta(min_length=1, max_length=64, pattern=SSH_USER)]
SshKeyPath = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=1024,
        pattern=TEXT,
        description="File on the server, within its key directory (`ssh_key_dir`).",
    ),
]
Profile = Annotated[
    Literal["manage", "monitor"],
    Meta(description="`manage` runs as root; `monitor` without rights, and takes no commands."),
]
SudoPassword = Annotated[str, Meta(min_length=1, max_length=1024, pattern=TEXT, description="Not kept.")]
ExpectedHostKey = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=8192,
        pattern=TEXT,
        description="Public key or SHA256: fingerprint that the host must show.",
    ),
]
Replace = Annotated[bool, Meta(description="Put this agent in the place of one that the host has.")]


# ---------------------------------------------------------------- logins and users


class LoginRequest(Struct, kw_only=True):
    username: Annotated[str, Meta(max_length=64)]
    password: Annotated[str, Meta(max_length=1024)]


class LoginAnswer(Struct, kw_only=True):
    token: str
    role: Role
    username: str
    expires_at: int


class MeAnswer(Struct, kw_only=True):
    username: str
    role: Role
    expires_at: int


class TicketAnswer(Struct, kw_only=True):
    """A ticket for one event stream, as `?ticket=`."""

    ticket: str
    expires_in: int


class UserAnswer(Struct, kw_only=True):
    username: str
    role: Role
    created_at: int


class UserRequest(Struct, kw_only=True):
    username: Username
    password: Password
    role: Role


class UserPatch(Struct, kw_only=True):
    """A change of either ends all logins of that user."""

    role: Role | None = None
    password: Password | None = None


class StatusAnswer(Struct, kw_only=True):
    status: str


class DeletionQuery(Struct, kw_only=True):
    uninstall: Annotated[bool, Meta(description="Remove the agent from its host first.")] = False


class DeletionAnswer(Struct, kw_only=True, omit_defaults=True):
    status: str
    uninstalled: Annotated[bool, Meta(description="With `uninstall` only: the host said that it is removed.")] = False


# ---------------------------------------------------------------- agents


class AgentFilter(Struct, kw_only=True):
    tag: str | None = None
    status: AgentStatus | None = None
    q: Annotated[str, Meta(description="Text within id, label, hostname, ip or os, in any case.")] | None = None


class AgentAnswer(Struct, kw_only=True):
    id: str
    label: str
    hostname: str
    ip: str
    os: str
    version: str
    status: AgentStatus
    last_seen: int | None
    tags: list[str]


class AgentDetail(AgentAnswer, kw_only=True):
    created_at: int
    uptime_s: int | None
    metrics: Annotated[dict[str, Any], Meta(description="The newest snapshot; null before the first.")] | None
    agent: Annotated[dict[str, Any], Meta(description="What the agent told of its host at its last connect.")]


class AgentRequest(Struct, kw_only=True):
    label: Label
    tags: Tags = []


class AgentPatch(Struct, kw_only=True):
    label: Label | None = None
    tags: Tags | None = None


class EnrolAnswer(Struct, kw_only=True):
    """The key is shown this once; the server keeps its hash only."""

    agent_id: str
    key: str
    install_command: Annotated[
        str | None,
        Meta(description="Line to paste on the host; it holds the key. Null: `public_url` is no address to dial."),
    ]


class InstallQuery(Struct, kw_only=True):
    key: Annotated[str, Meta(description="The agent's key.")] | None = None


class KeyRequest(Struct, kw_only=True):
    grace_seconds: Annotated[
        int, Meta(ge=0, le=604_800, description="How long the old key works still; 0 revokes it at once.")
    ] = 86_400


class ReportRequest(Struct, kw_only=True):
    hostname: ShortText
    os: ShortText
    cpu_percent: Percent
    mem_percent: Percent
    disk_percent: Percent
    uptime_s: Annotated[int, Meta(ge=0, le=2**53)]


class ReportAnswer(Struct, kw_only=True):
    status: str
    pending_commands: int


# ---------------------------------------------------------------- deployments over SSH


class DeployRequest(Struct, kw_only=True):
    host: HostName
    ssh_user: SshUser = "root"
    ssh_port: Port = 22
    ssh_key: SshKeyPath | None = None
    label: Label | None = None
    tags: Tags = []
    profile: Profile = "manage"
    sudo_password: SudoPassword | None = None
    host_key: ExpectedHostKey | None = None
    replace: Replace = False


class DeployAnswer(Struct, kw_only=True):
    """The agent has dialled in. The key is shown this once; the host has it."""

    agent_id: str
    key: str
    status: Literal["deployed"]
    deployment_id: str
    host_key: Annotated[str, Meta(description="Fingerprint of the key the host showed.")]


class DeploymentHostRequest(Struct, kw_only=True):
    """One host; what is left out is as for all."""

    host: HostName
    ssh_user: SshUser | None = None
    ssh_port: Port | None = None
    ssh_key: SshKeyPath | None = None
    label: Label | None = None
    tags: Tags | None = None
    profile: Profile | None = None
    sudo_password: SudoPassword | None = None
    host_key: ExpectedHostKey | None = None
    replace: Replace | None = None


class DeploymentRequest(Struct, kw_only=True):
    hosts: Annotated[list[DeploymentHostRequest], Meta(min_length=1, max_length=200)]
    ssh_user: SshUser = "root"
    ssh_port: Port = 22
    ssh_key: SshKeyPath | None = None
    tags: Tags = []
    profile: Profile = "manage"
    sudo_password: SudoPassword | None = None
    replace: Replace = False


class DeploymentStartedHost(Struct, kw_only=True):
    host: str
    port: int
    status: HostStatus


class DeploymentStarted(Struct, kw_only=True):
    deployment_id: str
    hosts: list[DeploymentStartedHost]


class DeploymentListed(Struct, kw_only=True):
    deployment_id: str
    status: DeploymentStatus
    created_at: float
    created_by: str
    finished_at: float | None
    hosts: int
    deployed: int
    failed: int


class DeploymentHostAnswer(Struct, kw_only=True):
    host: str
    port: int
    ssh_user: str
    label: str
    profile: str
    status: HostStatus
    agent_id: str | None
    host_key: str | None
    step: Annotated[str, Meta(description="At which it failed.")] | None
    reason: str | None
    detail: str | None
    started_at: float | None
    finished_at: float | None


class DeploymentAnswer(Struct, kw_only=True):
    deployment_id: str
    status: DeploymentStatus
    created_at: float
    created_by: str
    finished_at: float | None
    hosts: list[DeploymentHostAnswer]


class HostKeyAnswer(Struct, kw_only=True):
    host: str
    port: int
    public_key: str
    fingerprint: str
    pinned_at: float
    pinned_by: str


class AuditQuery(Struct, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    before: Annotated[int, Meta(ge=1, le=2**53, description="Only entries older than the one of this id.")] | None = (
        None
    )


class AuditAnswer(Struct, kw_only=True):
    id: int
    at: float
    actor: str
    action: str
    subject: str
    detail: dict[str, Any]


# ---------------------------------------------------------------- commands


class ShellParams(Struct, kw_only=True):
    command: Annotated[
        str,
        Meta(min_length=1, max_length=MAX_COMMAND_BYTES - 1, pattern=NO_NUL, description="For `sh -c`."),
    ]
    timeout: Annotated[
        float, Meta(ge=COMMAND_TIMEOUT_MIN_SECONDS, le=COMMAND_TIMEOUT_MAX_SECONDS, description="Seconds.")
    ] = COMMAND_TIMEOUT_DEFAULT_SECONDS


class CommandRequest(Struct, kw_only=True):
    type: Literal["shell"]
    params: ShellParams
    expires_in: Annotated[
        int, Meta(ge=1, le=30 * 86_400, description="Seconds a command waits for an agent that is away.")
    ] = 3600
    on_offline: Annotated[
        Literal["wait", "fail"], Meta(description="`fail` refuses at once (503) when the agent is not connected.")
    ] = "wait"


class CommandHeaders(Struct, kw_only=True, rename={"key": "Idempotency-Key"}):
    key: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=255,
                pattern=VISIBLE,
                description="For 24 hours the same key and body are the same command; with another body, 422.",
            ),
        ]
        | None
    ) = None


class CommandQueued(Struct, kw_only=True):
    command_id: str
    status: str


class KilledAnswer(Struct, kw_only=True):
    """A process that was ended with the command."""

    pid: int
    command: Annotated[str, Meta(description="Its command line, cut.")]
    signal: Annotated[str, Meta(description="`KILL`: it lived on through `TERM`.")]


class CommandAnswer(Struct, kw_only=True):
    command_id: str
    agent_id: str
    type: str
    params: dict[str, Any]
    status: CommandStatus
    exit_code: int | None
    output: Annotated[str, Meta(description="stdout and stderr as they came, the last 64 KiB.")]
    stdout_bytes: Annotated[int, Meta(description="Bytes the command wrote, kept or not.")]
    stderr_bytes: int
    truncated: Annotated[bool, Meta(description="`output` is not all that the command wrote.")]
    late: Annotated[bool, Meta(description="What the agent said later has refined an end that was not proved.")]
    created_at: float
    accepted_at: Annotated[float, Meta(description="When the agent was first known to hold it.")] | None
    started_at: float | None
    finished_at: float | None
    expires_at: float
    cancel_requested_at: float | None
    created_by: str
    orphan: Annotated[bool, Meta(description="An agent held it, and this server did not know it.")]
    killed: Annotated[list[KilledAnswer], Meta(description="The first of what a stop ended.")]
    killed_count: Annotated[int, Meta(description="How many processes a stop ended.")]
    error: str | None


class OutputQuery(Struct, kw_only=True):
    stream: Literal["stdout", "stderr"] | None = None


# ---------------------------------------------------------------- metrics, logs, files


class HistoryQuery(Struct, kw_only=True, rename={"start": "from", "end": "to"}):
    start: Annotated[float, Meta(ge=0, le=2**53, description="Unix seconds; default an hour before `to`.")] | None = (
        None
    )
    end: Annotated[float, Meta(ge=0, le=2**53, description="Unix seconds; default now.")] | None = None
    step: Annotated[
        int,
        Meta(
            ge=5,
            le=86_400,
            description="Seconds of one point; the last hour has one sample each 5 s, before it one a minute.",
        ),
    ] = 60


class HistoryAnswer(Struct, kw_only=True):
    step: int
    points: Annotated[
        list[dict[str, float]],
        Meta(description="`at` (start of the step), the mean of each metric and `<metric>_max`."),
    ]


class LogStreamQuery(Struct, kw_only=True):
    source: Annotated[Literal["journald", "file"], Meta(description="Where the lines come from.")]
    unit: (
        Annotated[
            str,
            Meta(
                min_length=1,
                max_length=256,
                pattern=UNIT,
                description="systemd unit; journald.",
            ),
        ]
        | None
    ) = None
    path: Annotated[str, Meta(min_length=1, max_length=MAX_PATH_BYTES, description="Absolute path; file.")] | None = (
        None
    )
    lines: Annotated[int, Meta(ge=0, le=10_000, description="How many of the last lines come first.")] = 10
    since: Annotated[float, Meta(ge=0, le=2**40, description="Unix seconds; journald.")] | None = None
    priority: Annotated[int, Meta(ge=0, le=7, description="This and more urgent, 0 to 7; journald.")] | None = None
    grep: (
        Annotated[str, Meta(min_length=1, max_length=1000, description="Only lines that contain this text.")] | None
    ) = None
    boot: (
        Annotated[
            str,
            Meta(
                max_length=32,
                pattern=BOOT,
                description="`0` (the last boot), `-1` (the one before) and so on, or a boot id; journald.",
            ),
        ]
        | None
    ) = None
    kernel: Annotated[bool, Meta(description="Only messages of the kernel; journald, not with `unit`.")] = False


class UnitFilter(Struct, kw_only=True):
    type: (
        Annotated[str, Meta(max_length=32, pattern=UNIT_TYPE, description="`service`, `timer`, `socket` and so on.")]
        | None
    ) = None
    q: Annotated[str, Meta(description="Text within name or description, in any case.")] | None = None


class UnitAnswer(Struct, kw_only=True):
    """The words are systemd's."""

    name: str
    load: Annotated[str, Meta(description="`not-loaded`: systemd has forgotten it, the journal has entries of it.")]
    active: str
    sub: str
    description: str


class UnitsAnswer(Struct, kw_only=True):
    units: list[UnitAnswer]
    truncated: Annotated[bool, Meta(description="The host has more units than an agent sends at once.")]


class FileQuery(Struct, kw_only=True):
    path: FilePath


class UploadForm(Struct, kw_only=True):
    """Either order works; `dest` first spares the server a copy on its disk."""

    file: Annotated[bytes, Meta(description="File to upload")]
    dest: Annotated[str, Meta(description="Destination path on the agent")]


class UploadAnswer(Struct, kw_only=True):
    path: str
    bytes: int
    sha256: str


class HealthAnswer(Struct, kw_only=True):
    status: str
    version: str


def to_json(answer: object) -> bytes:
    return msgspec.json.encode(answer)
