"""What the server and the agent must agree on: messages, their encoding, errors and limits.

Standard library only: the agent carries all of it to every host."""

__version__ = "0.1.0"
