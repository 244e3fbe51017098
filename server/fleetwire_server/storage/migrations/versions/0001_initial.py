"""The tables of version 0.1."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "agents",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("tags", sa.Text(), nullable=False),
        sa.Column("hostname", sa.Text(), nullable=False),
        sa.Column("ip", sa.Text(), nullable=False),
        sa.Column("os", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("facts", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("last_seen", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("agents_pkey")),
    )
    op.create_table(
        "users",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("users_pkey")),
    )
    op.create_table(
        "agent_keys",
        sa.Column("key_hash", sa.Text(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("agent_keys_agent_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("key_hash", name=op.f("agent_keys_pkey")),
    )
    op.create_index(op.f("agent_keys_agent_id"), "agent_keys", ["agent_id"], unique=False)
    op.create_table(
        "commands",
        sa.Column("sequence", sa.Integer(), autoincrement=True, nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("params", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("timeout_seconds", sa.Float(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("offered_to", sa.Text(), nullable=True),
        sa.Column("started_at", sa.Float(), nullable=True),
        sa.Column("finished_at", sa.Float(), nullable=True),
        sa.Column("cancel_requested_at", sa.Float(), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("stdout_bytes", sa.Integer(), nullable=False),
        sa.Column("stderr_bytes", sa.Integer(), nullable=False),
        sa.Column("output_end", sa.Integer(), nullable=False),
        sa.Column("truncated", sa.Boolean(), nullable=False),
        sa.Column("late", sa.Boolean(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("commands_agent_id_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("sequence", name=op.f("commands_pkey")),
        sa.UniqueConstraint("id", name=op.f("commands_id_key")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("commands_agent_id_sequence"), "commands", ["agent_id", "sequence"], unique=False)
    op.create_index(op.f("commands_agent_id_status"), "commands", ["agent_id", "status"], unique=False)
    op.create_index(op.f("commands_created_at"), "commands", ["created_at"], unique=False)
    op.create_index(op.f("commands_status_expires_at"), "commands", ["status", "expires_at"], unique=False)
    op.create_table(
        "metrics_minutes",
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("minute", sa.Integer(), nullable=False),
        sa.Column("cpu_percent_count", sa.Integer(), nullable=False),
        sa.Column("cpu_percent_sum", sa.Float(), nullable=False),
        sa.Column("cpu_percent_max", sa.Float(), nullable=True),
        sa.Column("mem_percent_count", sa.Integer(), nullable=False),
        sa.Column("mem_percent_sum", sa.Float(), nullable=False),
        sa.Column("mem_percent_max", sa.Float(), nullable=True),
        sa.Column("disk_percent_count", sa.Integer(), nullable=False),
        sa.Column("disk_percent_sum", sa.Float(), nullable=False),
        sa.Column("disk_percent_max", sa.Float(), nullable=True),
        sa.Column("swap_percent_count", sa.Integer(), nullable=False),
        sa.Column("swap_percent_sum", sa.Float(), nullable=False),
        sa.Column("swap_percent_max", sa.Float(), nullable=True),
        sa.Column("load1_count", sa.Integer(), nullable=False),
        sa.Column("load1_sum", sa.Float(), nullable=False),
        sa.Column("load1_max", sa.Float(), nullable=True),
        sa.Column("received_bytes_per_second_count", sa.Integer(), nullable=False),
        sa.Column("received_bytes_per_second_sum", sa.Float(), nullable=False),
        sa.Column("received_bytes_per_second_max", sa.Float(), nullable=True),
        sa.Column("sent_bytes_per_second_count", sa.Integer(), nullable=False),
        sa.Column("sent_bytes_per_second_sum", sa.Float(), nullable=False),
        sa.Column("sent_bytes_per_second_max", sa.Float(), nullable=True),
        sa.Column("read_bytes_per_second_count", sa.Integer(), nullable=False),
        sa.Column("read_bytes_per_second_sum", sa.Float(), nullable=False),
        sa.Column("read_bytes_per_second_max", sa.Float(), nullable=True),
        sa.Column("written_bytes_per_second_count", sa.Integer(), nullable=False),
        sa.Column("written_bytes_per_second_sum", sa.Float(), nullable=False),
        sa.Column("written_bytes_per_second_max", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(
            ["agent_id"], ["agents.id"], name=op.f("metrics_minutes_agent_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("agent_id", "minute", name=op.f("metrics_minutes_pkey")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("metrics_minutes_minute"), "metrics_minutes", ["minute"], unique=False)
    op.create_table(
        "sessions",
        sa.Column("token_hash", sa.Text(), nullable=False),
        sa.Column("username", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["username"], ["users.name"], name=op.f("sessions_username_fkey"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("token_hash", name=op.f("sessions_pkey")),
    )
    op.create_index(op.f("sessions_expires_at"), "sessions", ["expires_at"], unique=False)
    op.create_index(op.f("sessions_username"), "sessions", ["username"], unique=False)
    op.create_table(
        "command_output",
        sa.Column("command_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("stream", sa.Text(), nullable=False),
        sa.Column("offset", sa.Integer(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["command_id"], ["commands.id"], name=op.f("command_output_command_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("command_id", "position", name=op.f("command_output_pkey")),
    )
    op.create_index(
        op.f("command_output_command_id_stream_offset"),
        "command_output",
        ["command_id", "stream", "offset"],
        unique=False,
    )
    op.create_table(
        "stream_tickets",
        sa.Column("ticket_hash", sa.Text(), nullable=False),
        sa.Column("session_token_hash", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["session_token_hash"],
            ["sessions.token_hash"],
            name=op.f("stream_tickets_session_token_hash_fkey"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("ticket_hash", name=op.f("stream_tickets_pkey")),
    )
    op.create_index(op.f("stream_tickets_expires_at"), "stream_tickets", ["expires_at"], unique=False)
    op.create_index(op.f("stream_tickets_session_token_hash"), "stream_tickets", ["session_token_hash"], unique=False)
