"""New ids, keys and tokens. Those that open something are stored only as hashes."""

import base64
import hashlib
import os
import string
from collections.abc import Callable

RandomBytes = Callable[[int], bytes]

_ID_ALPHABET = string.digits + string.ascii_lowercase


def new_token(random_bytes: RandomBytes = os.urandom) -> str:
    """Return 256 random bits as 43 characters that are safe in a URL: for sessions and stream tickets."""
    return base64.urlsafe_b64encode(random_bytes(32)).rstrip(b"=").decode("ascii")


def hash_token(token: str) -> str:
    """Return what is stored of a token or key: its SHA-256, hex. Unsalted, as 256 random bits need no salt."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def new_agent_key(random_bytes: RandomBytes = os.urandom) -> tuple[str, str]:
    """Return the id of a new agent and its key."""
    agent_id = f"agent_{_new_id(16, random_bytes)}"
    return agent_id, new_key_for(agent_id, random_bytes)


def new_key_for(agent_id: str, random_bytes: RandomBytes = os.urandom) -> str:
    """Return another key for an agent."""
    return f"agt_{agent_id.removeprefix('agent_')}_{new_token(random_bytes)}"


def new_command_id(random_bytes: RandomBytes = os.urandom) -> str:
    return f"cmd_{_new_id(20, random_bytes)}"


def new_channel_id(random_bytes: RandomBytes = os.urandom) -> str:
    return f"ch_{_new_id(20, random_bytes)}"


def new_request_id(random_bytes: RandomBytes = os.urandom) -> str:
    return f"req_{_new_id(20, random_bytes)}"


def new_deployment_id(random_bytes: RandomBytes = os.urandom) -> str:
    return f"dep_{_new_id(20, random_bytes)}"


def _new_id(length: int, random_bytes: RandomBytes) -> str:
    # 5 of 8 bits a character would do; with 8 all characters are as good as equally likely.
    number = int.from_bytes(random_bytes(length), "big")
    characters = []
    for _ in range(length):
        number, digit = divmod(number, len(_ID_ALPHABET))
        characters.append(_ID_ALPHABET[digit])
    return "".join(characters)
