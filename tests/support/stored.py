"""Records with defaults: a test names only what matters to it."""

from typing import Any, TypeAlias

from fleetwire_server.model import Agent, AgentKey, Command, OutputPiece, Role, User, UserSession

Fields: TypeAlias = dict[str, Any]


def make_user(name: str = "ada", **fields: Any) -> User:
    defaults: Fields = {"role": Role.VIEWER, "password_hash": "hash", "created_at": 100.0}
    return User(name=name, **defaults | fields)


def make_session(token_hash: str = "token", **fields: Any) -> UserSession:
    defaults: Fields = {"username": "ada", "role": Role.VIEWER, "created_at": 100.0, "expires_at": 200.0}
    return UserSession(token_hash=token_hash, **defaults | fields)


def make_agent(agent_id: str = "agent_1", **fields: Any) -> Agent:
    defaults: Fields = {"label": agent_id, "created_at": 100.0}
    return Agent(id=agent_id, **defaults | fields)


def make_key(key_hash: str = "key", agent_id: str = "agent_1", **fields: Any) -> AgentKey:
    defaults: Fields = {"created_at": 100.0, "expires_at": None}
    return AgentKey(key_hash=key_hash, agent_id=agent_id, **defaults | fields)


def make_command(command_id: str = "cmd_1", **fields: Any) -> Command:
    defaults: Fields = {
        "agent_id": "agent_1",
        "type": "shell",
        "params": {"command": "true", "timeout": 30},
        "timeout_seconds": 30.0,
        "created_at": 100.0,
        "created_by": "ada",
        "expires_at": 3700.0,
    }
    return Command(id=command_id, **defaults | fields)


def make_piece(data: bytes, position: int = 0, **fields: Any) -> OutputPiece:
    defaults: Fields = {"stream": "stdout", "offset": position}
    return OutputPiece(position=position, data=data, **defaults | fields)
