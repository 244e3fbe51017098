"""What a user may be called."""

import re

from fleetwire_shared.errors import InvalidError

USERNAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"


def check_username(name: str) -> None:
    """Raises InvalidError unless the name is fit for URLs, logs and terminals."""
    if not re.fullmatch(USERNAME_PATTERN, name):
        raise InvalidError(
            "a username must have 1 to 64 characters out of A-Z a-z 0-9 . _ @ - and begin with a letter or digit,"
            f" got {name[:100]!r}"
        )
