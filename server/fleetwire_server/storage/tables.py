"""Every table, on one MetaData. Times are Unix seconds; JSON is kept as TEXT. A change here needs a migration."""

from sqlalchemy import Boolean, Column, Float, ForeignKey, Index, Integer, LargeBinary, MetaData, Table, Text, text

from fleetwire_server.model import METRIC_NAMES

METADATA = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)


def _required(name: str, kind: type[Float[float]] | type[Integer] | type[Text], *more: ForeignKey) -> Column[object]:
    return Column(name, kind, *more, nullable=False)


IS_ENDED_ALONE = text("offered_to IS NULL AND accepted_at IS NULL AND status IN ('cancelled', 'expired')")
"""Of COMMANDS: see Command.is_ended_alone. A database takes an index on some rows only for a query that has the same
words: with values bound to it, it would not. SQLite takes this one for its second column, as it guesses without
counting: of two indexes on the agent alone it would take the other."""

USERS = Table(
    "users",
    METADATA,
    Column("name", Text, primary_key=True),
    _required("role", Text),
    _required("password_hash", Text),
    _required("created_at", Float),
)

SESSIONS = Table(
    "sessions",
    METADATA,
    Column("token_hash", Text, primary_key=True),
    _required("username", Text, ForeignKey("users.name", ondelete="CASCADE")),
    _required("created_at", Float),
    _required("expires_at", Float),
    Index(None, "username"),
    Index(None, "expires_at"),
)

STREAM_TICKETS = Table(
    "stream_tickets",
    METADATA,
    Column("ticket_hash", Text, primary_key=True),
    _required("session_token_hash", Text, ForeignKey("sessions.token_hash", ondelete="CASCADE")),
    _required("expires_at", Float),
    Index(None, "session_token_hash"),
    Index(None, "expires_at"),
)

AGENTS = Table(
    "agents",
    METADATA,
    Column("id", Text, primary_key=True),
    _required("label", Text),
    _required("tags", Text),  # JSON, list of strings
    _required("hostname", Text),
    _required("ip", Text),
    _required("os", Text),
    _required("version", Text),
    _required("facts", Text),  # JSON, object
    _required("created_at", Float),
    Column("last_seen", Float),
)

AGENT_KEYS = Table(
    "agent_keys",
    METADATA,
    Column("key_hash", Text, primary_key=True),
    _required("agent_id", Text, ForeignKey("agents.id", ondelete="CASCADE")),
    _required("created_at", Float),
    Column("expires_at", Float),
    Index(None, "agent_id"),
)

COMMANDS = Table(
    "commands",
    METADATA,
    Column("sequence", Integer, primary_key=True, autoincrement=True),  # order of creation, never used again
    Column("id", Text, nullable=False, unique=True),
    _required("agent_id", Text, ForeignKey("agents.id", ondelete="CASCADE")),
    _required("type", Text),
    _required("params", Text),  # JSON, object
    _required("status", Text),
    _required("timeout_seconds", Float),
    _required("created_at", Float),
    _required("created_by", Text),  # no foreign key: what a removed user started stays known as theirs
    _required("expires_at", Float),
    Column("offered_to", Text),
    Column("accepted_at", Float),
    Column("started_at", Float),
    Column("finished_at", Float),
    Column("cancel_requested_at", Float),
    Column("exit_code", Integer),
    _required("stdout_bytes", Integer),
    _required("stderr_bytes", Integer),
    _required("output_end", Integer),
    Column("truncated", Boolean, nullable=False),
    Column("late", Boolean, nullable=False),
    Column("is_orphan", Boolean, nullable=False, server_default=text("0")),
    Column("killed", Text),  # JSON, list of objects; null when there are none
    Column("killed_count", Integer, nullable=False, server_default=text("0")),
    Column("error", Text),
    Index(None, "agent_id", "sequence"),
    Index(None, "agent_id", "status"),
    Index(None, "status", "expires_at"),
    Index(None, "created_at"),
    Index("commands_ended_alone", "agent_id", "status", sqlite_where=IS_ENDED_ALONE, postgresql_where=IS_ENDED_ALONE),
    sqlite_autoincrement=True,
)

COMMAND_OUTPUT = Table(
    "command_output",
    METADATA,
    Column("command_id", Text, ForeignKey("commands.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    _required("stream", Text),
    _required("offset", Integer),
    Column("data", LargeBinary, nullable=False),
    Index(None, "command_id", "stream", "offset"),
)

COMMAND_KEYS = Table(
    "command_keys",
    METADATA,
    Column("agent_id", Text, primary_key=True),
    Column("username", Text, primary_key=True),  # no foreign key: as with created_by
    Column("key", Text, primary_key=True),
    _required("body_hash", Text),
    _required("command_id", Text, ForeignKey("commands.id", ondelete="CASCADE")),
    _required("created_at", Float),
    Index(None, "command_id"),
    Index(None, "created_at"),
)

METRICS_MINUTES = Table(
    "metrics_minutes",
    METADATA,
    Column("agent_id", Text, ForeignKey("agents.id", ondelete="CASCADE"), primary_key=True),
    Column("minute", Integer, primary_key=True),
    *(
        column
        for name in METRIC_NAMES
        for column in (
            _required(f"{name}_count", Integer),
            _required(f"{name}_sum", Float),
            Column(f"{name}_max", Float),  # null when count is 0
        )
    ),
    Index(None, "minute"),
    sqlite_with_rowid=False,
)

DEPLOYMENTS = Table(
    "deployments",
    METADATA,
    Column("sequence", Integer, primary_key=True, autoincrement=True),  # order of creation, never used again
    Column("id", Text, nullable=False, unique=True),
    _required("status", Text),
    _required("created_at", Float),
    _required("created_by", Text),
    Column("finished_at", Float),
    Index(None, "status"),
    sqlite_autoincrement=True,
)

DEPLOYMENT_HOSTS = Table(
    "deployment_hosts",
    METADATA,
    Column("deployment_id", Text, ForeignKey("deployments.id", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True),
    _required("host", Text),
    _required("port", Integer),
    _required("ssh_user", Text),
    _required("label", Text),
    _required("profile", Text),
    _required("status", Text),
    Column("step", Text),
    Column("reason", Text),
    Column("detail", Text),
    Column("agent_id", Text),  # no foreign key: how a deployment ended stays known when its agent is deleted
    Column("host_key", Text),
    Column("started_at", Float),
    Column("finished_at", Float),
)

HOST_KEYS = Table(
    "host_keys",
    METADATA,
    Column("host", Text, primary_key=True),
    Column("port", Integer, primary_key=True),
    _required("public_key", Text),
    _required("fingerprint", Text),
    _required("pinned_at", Float),
    _required("pinned_by", Text),
)

AUDIT = Table(
    "audit",
    METADATA,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    _required("at", Float),
    _required("actor", Text),  # no foreign key: what a removed user did stays known as theirs
    _required("action", Text),
    _required("subject", Text),
    _required("detail", Text),  # JSON, object
    sqlite_autoincrement=True,
)
