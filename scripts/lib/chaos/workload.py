"""The commands that are run: each says in a file that it ran, and how it must end is known before. Pure."""

import random
import shlex
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Final

CANARY_VARIABLE: Final = "CHAOS_CANARY"
"""Names, in the agent's environment and so in every command's, the file that each command writes its token to."""

LONG_SECONDS: Final = 3600
"""How long what must be stopped would sleep: longer than any run, so that it cannot end by itself unseen."""

_PATIENCE_SECONDS: Final = 900  # timeout of what must not run into it


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A command to submit, and the truth about it.

    `ends` are the statuses it may end with while its host lives; `stdout` and `stderr` the first and last number of the
    `seq` it prints, None where it prints nothing or nobody can tell how far it came."""

    token: str
    kind: str
    text: str
    ends: Set[str]
    agent: int = 0
    submit_at: float = 0.0  # seconds after the start
    cancel_after: float | None = None  # seconds after its submit was acknowledged
    timeout_seconds: int = _PATIENCE_SECONDS
    expires_in: int = 3600
    exit_code: int | None = 0
    stdout: tuple[int, int] | None = None
    stderr: tuple[int, int] | None = None

    @property
    def body(self) -> dict[str, object]:
        """What is sent to the server."""
        params = {"command": self.text, "timeout": self.timeout_seconds}
        return {"type": "shell", "params": params, "expires_in": self.expires_in}


def sequence_bytes(numbers: tuple[int, int] | None) -> bytes:
    """Return what `seq FIRST LAST` prints."""
    return b"" if numbers is None else b"".join(b"%d\n" % number for number in range(numbers[0], numbers[1] + 1))


def make_quick(token: str, _: random.Random) -> Order:
    return Order(token=token, kind="quick", text=_say(token), ends={"succeeded"})


def make_slow(token: str, choose: random.Random) -> Order:
    text = f"{_say(token)}; sleep {choose.uniform(0.1, 2.0):.2f}"
    return Order(token=token, kind="slow", text=text, ends={"succeeded"})


def make_output(token: str, choose: random.Random) -> Order:
    """Print up to about a megabyte at once, or a little at a time for about a second."""
    first = choose.randrange(100_000, 900_000)
    stdout = (first, first + int(10 ** choose.uniform(0, 5.1)))
    stderr = (first, first + choose.randrange(100))
    text = f"{_say(token)}; seq {stderr[0]} {stderr[1]} >&2; seq {stdout[0]} {stdout[1]}"
    if choose.random() < 0.4:
        stdout = (first, first + 59)
        loop = f"for n in $(seq 0 5); do seq $(({first} + 10 * n)) $(({first} + 10 * n + 9)); sleep 0.2; done"
        text = f"{_say(token)}; seq {stderr[0]} {stderr[1]} >&2; {loop}"
    return Order(token=token, kind="output", text=text, ends={"succeeded"}, stdout=stdout, stderr=stderr)


def make_failing(token: str, choose: random.Random) -> Order:
    exit_code = choose.randrange(1, 126)
    text = f"{_say(token)}; seq 1 {exit_code}; exit {exit_code}"
    return Order(token=token, kind="failing", text=text, ends={"failed"}, exit_code=exit_code, stdout=(1, exit_code))


def make_cancelled(token: str, choose: random.Random) -> Order:
    """Never end by itself, with a child in a session of its own; some ignore SIGTERM."""
    trap = "trap '' TERM; " if choose.random() < 0.1 else ""
    text = f"{trap}{_say(token)}; {_stay(token)}"
    delay = choose.choice([0.0, choose.uniform(0, 0.3), choose.uniform(0, 3)])
    return Order(token=token, kind="cancelled", text=text, ends={"cancelled"}, cancel_after=delay, exit_code=None)


def make_racing(token: str, choose: random.Random) -> Order:
    """End by itself about when it is cancelled."""
    seconds = choose.uniform(0.0, 1.0)
    text = f"{_say(token)}; sleep {seconds:.2f}"
    ends = {"cancelled", "succeeded"}
    return Order(token=token, kind="racing", text=text, ends=ends, cancel_after=seconds + choose.uniform(-0.1, 0.3))


def make_timed_out(token: str, choose: random.Random) -> Order:
    trap = "trap '' TERM; " if choose.random() < 0.2 else ""
    text = f"{trap}{_say(token)}; {_stay(token)}"
    return Order(token=token, kind="timed out", text=text, ends={"timed_out"}, timeout_seconds=1, exit_code=None)


def make_expiring(token: str, choose: random.Random) -> Order:
    """Run within a second or two after the submit, or never."""
    ends = {"succeeded", "expired"}
    return Order(token=token, kind="expiring", text=_say(token), ends=ends, expires_in=choose.choice([1, 1, 2]))


KINDS: Final[Mapping[Callable[[str, random.Random], Order], int]] = {
    make_quick: 32,
    make_slow: 14,
    make_output: 14,
    make_failing: 10,
    make_cancelled: 12,
    make_racing: 4,
    make_timed_out: 6,
    make_expiring: 8,
}
"""How many in a hundred."""


def make_token(number: int, choose: random.Random) -> str:
    """Return a text that no other process of this machine has in its command line."""
    return f"canary-{number:05d}-{choose.getrandbits(48):012x}"


def _say(token: str) -> str:
    return f'echo {token} >> "${CANARY_VARIABLE}"'


def _stay(token: str) -> str:
    """Return what leaves a child in another session, and does not end; all have the token in their command line."""
    inner = shlex.quote(f"sleep {LONG_SECONDS}; :")
    return f"setsid sh -c {inner} {token} & sh -c {inner} {token}; :"
