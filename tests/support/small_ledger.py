"""The agent's command line, with a ledger so small that a handful of commands fills it several times."""

from functools import partial

from fleetwire_agent import ledger
from fleetwire_agent.__main__ import main
from fleetwire_agent.ledger_file import LedgerFile

SIZE_BYTES = 2048  # to begin with: it grows to twice what counts in it

if __name__ == "__main__":
    ledger.LedgerFile = partial(LedgerFile, size_bytes=SIZE_BYTES)  # type: ignore[attr-defined, assignment]
    main()
