"""Ends the agent that is to be removed, or to become another user's, and before that its commands: while it runs it can
still tell the server how they ended."""

from pathlib import Path
from typing import Final

from fleetwire_agent.install.services import Service, wait_until
from fleetwire_agent.runner.files import COMMANDS
from fleetwire_agent.runners import STOP_SECONDS, is_own_directory, list_running, stop_commands

TELL_SECONDS: Final = 3.0
"""How long the server has to store what the agent tells; one that is away keeps nobody waiting for longer."""


def end_agent(service: Service | None, state: Path) -> str:
    """Have the agent end its commands and tell the server, then stop it, and end what it could not.

    Args:
        service: None where there is none of ours to stop.
        state: where the agent keeps its state. What is there of another user names no command to be ended.
    Returns:
        What became of commands that ran, in words; "" where none did."""
    commands = state / COMMANDS
    running = list_running(commands)
    if service is not None:
        if is_own_directory(commands) and service.is_active():
            service.end_commands()
            wait_until(lambda: not list_running(commands), seconds=STOP_SECONDS)
            # The directory of a command goes when the server has its end.
            wait_until(lambda: not any(commands.iterdir()), seconds=TELL_SECONDS)
        service.stop()
    left = stop_commands(commands)
    said = []
    if ended := [name for name in running if name not in left]:
        said.append(f"{len(ended)} running commands are ended")
    if left:
        said.append(f"these do not end within {STOP_SECONDS:.0f} s: {', '.join(left)}")
    return "; ".join(said)
