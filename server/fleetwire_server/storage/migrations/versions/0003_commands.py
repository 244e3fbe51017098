"""Of commands: when they were accepted, whether they are orphans, what was killed with them; keys of requests."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("commands", sa.Column("accepted_at", sa.Float(), nullable=True))
    op.add_column("commands", sa.Column("is_orphan", sa.Boolean(), server_default=sa.text("0"), nullable=False))
    op.add_column("commands", sa.Column("killed", sa.Text(), nullable=True))
    op.add_column("commands", sa.Column("killed_count", sa.Integer(), server_default=sa.text("0"), nullable=False))
    # A lost command without this is offered again when its agent proves not to have received it: of those that were
    # lost before it was recorded that cannot be told, so all of them count as accepted.
    op.execute(
        "UPDATE commands SET accepted_at = coalesce(started_at, created_at)"
        " WHERE started_at IS NOT NULL OR status IN ('accepted', 'running', 'lost')"
    )
    is_ended_alone = sa.text("offered_to IS NULL AND accepted_at IS NULL AND status IN ('cancelled', 'expired')")
    op.create_index(
        "commands_ended_alone",
        "commands",
        ["agent_id", "status"],
        sqlite_where=is_ended_alone,
        postgresql_where=is_ended_alone,
    )
    op.create_table(
        "command_keys",
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("username", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("body_hash", sa.Text(), nullable=False),
        sa.Column("command_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["command_id"], ["commands.id"], name=op.f("command_keys_command_id_fkey"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("agent_id", "username", "key", name=op.f("command_keys_pkey")),
    )
    op.create_index(op.f("command_keys_command_id"), "command_keys", ["command_id"], unique=False)
    op.create_index(op.f("command_keys_created_at"), "command_keys", ["created_at"], unique=False)
