import re

from fleetwire_server.core.tokens import (
    hash_token,
    new_agent_key,
    new_channel_id,
    new_command_id,
    new_key_for,
    new_token,
)
from fleetwire_shared.limits import AGENT_ID_PATTERN, AGENT_KEY_PATTERN, CHANNEL_ID_PATTERN, COMMAND_ID_PATTERN


def zeros(count: int) -> bytes:
    return bytes(count)


def ones(count: int) -> bytes:
    return b"\xff" * count


def test_ids_and_keys_fit_their_patterns() -> None:
    for random_bytes in (zeros, ones):
        agent_id, key = new_agent_key(random_bytes)
        assert re.fullmatch(AGENT_ID_PATTERN, agent_id)
        assert re.fullmatch(AGENT_KEY_PATTERN, key)
        assert re.fullmatch(AGENT_KEY_PATTERN, new_key_for(agent_id, random_bytes))
        assert re.fullmatch(COMMAND_ID_PATTERN, new_command_id(random_bytes))
        assert re.fullmatch(CHANNEL_ID_PATTERN, new_channel_id(random_bytes))
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}", new_token(random_bytes))


def test_a_key_names_its_agent() -> None:
    agent_id, key = new_agent_key()
    another = new_key_for(agent_id)
    assert key != another
    assert key.split("_")[1] == another.split("_")[1] == agent_id.removeprefix("agent_")


def test_no_two_are_alike() -> None:
    for make in (new_token, new_command_id, new_channel_id, new_agent_key):
        assert len({make() for _ in range(1000)}) == 1000


def test_a_hash_is_of_the_whole_token() -> None:
    assert hash_token("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_token("any text\ud800") != hash_token("any text")
