"""The list of units: what systemd says, put together with what the journal knows."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.support.journals import JOURNAL_REMOTE, make_entry, write_journal

from fleetwire_agent.processes import Spawner
from fleetwire_agent.units import fit_units, merge_units, parse_units, read_units
from fleetwire_shared.codec import encode
from fleetwire_shared.errors import PeerFailedError, UnavailableError
from fleetwire_shared.limits import MAX_CONTROL_FRAME_BYTES
from fleetwire_shared.messages import Unit, UnitList


def make_unit(name: str, *, load: str = "loaded", description: str = "") -> Unit:
    return Unit(name=name, load=load, active="active", sub="running", description=description)


def test_systemds_own_list_is_read() -> None:
    row = {"unit": "ssh.service", "load": "loaded", "active": "active", "sub": "running", "description": "x" * 300}
    (unit,) = parse_units(json.dumps([row]).encode())
    assert (unit.name, unit.load, unit.active, unit.sub) == ("ssh.service", "loaded", "active", "running")
    assert unit.description == "x" * 199 + "…"


@pytest.mark.parametrize("listing", [b"", b"UNIT LOAD ACTIVE", b'[{"unit":"x"}]', b"[1]", b"7"])
def test_what_is_no_list_of_units_is_said(listing: bytes) -> None:
    with pytest.raises(PeerFailedError, match="is systemd older than 246"):
        parse_units(listing)


def test_units_that_only_the_journal_knows_are_added_and_those_nobody_has_left_out() -> None:
    loaded = [make_unit("b.service"), make_unit("a.mount"), make_unit("ghost.service", load="not-found")]
    logged = ["b.service", "removed.service", "session-7.scope", "run-r1.service"]
    units = merge_units([*loaded, make_unit("gone.service", load="not-found")], [*logged, "gone.service"])
    assert [(unit.name, unit.load) for unit in units] == [
        ("a.mount", "loaded"),
        ("b.service", "loaded"),
        ("gone.service", "not-found"),
        ("removed.service", "not-loaded"),
    ]


def test_more_units_than_one_frame_holds_are_cut_devices_first() -> None:
    devices = [make_unit(f"dev-é{number}.device", description="é" * 200) for number in range(3000)]
    services = [make_unit(f"service-{number:05}.service", description='"' * 100) for number in range(1000)]
    units, is_truncated = fit_units(tuple(sorted([*devices, *services], key=lambda unit: unit.name)))
    assert is_truncated
    assert set(services) <= set(units)
    assert list(units) == sorted(units, key=lambda unit: unit.name)
    frame = encode(UnitList(request_id="req_" + "a" * 20, units=units, is_truncated=True))
    assert MAX_CONTROL_FRAME_BYTES * 0.7 < len(frame.encode()) <= MAX_CONTROL_FRAME_BYTES
    assert fit_units(tuple(services)) == (tuple(services), False)


async def test_a_host_without_systemd_says_so(tmp_path: Path) -> None:
    with Spawner({"PATH": os.environ["PATH"]}) as spawner:
        if shutil.which("systemctl") is None or not Path("/run/systemd/system").exists():
            with pytest.raises(UnavailableError, match="systemd"):
                await read_units(spawner, None)


@pytest.mark.skipif(not JOURNAL_REMOTE.exists(), reason="no systemd-journal-remote")
async def test_systemctl_and_the_journal_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"unit": "ssh.service", "load": "loaded", "active": "active", "sub": "running", "description": "OpenSSH"}
    listing = tmp_path / "bin" / "listing.json"
    listing.parent.mkdir()
    listing.write_text(json.dumps([row]))
    systemctl = listing.with_name("systemctl")
    systemctl.write_text(f'#!/bin/sh\n[ "$1" = list-units ] && cat {listing}\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{systemctl.parent}:{os.environ['PATH']}")
    journal = tmp_path / "journal"
    journal.mkdir()
    write_journal(journal / "a.journal", make_entry(0), make_entry(1, _SYSTEMD_UNIT="ssh.service"))
    with Spawner(os.environ) as spawner:
        units = await read_units(spawner, str(journal))
        assert [unit.name for unit in units] == ["nginx.service", "ssh.service"]
        systemctl.write_text("#!/bin/sh\necho 'Failed to connect to bus' >&2; exit 1\n")
        with pytest.raises(UnavailableError, match="systemctl ended with status 1: Failed to connect to bus"):
            await read_units(spawner, str(journal))
