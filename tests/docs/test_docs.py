"""The documentation is held to the code: what there is has its place, links lead somewhere, examples work as pasted."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args

import click
import pytest
from tests.conftest import Fleet
from tests.support.processes import ADMIN_PASSWORD, plain_environment

from fleetwire_agent.config import ENVIRONMENT_PREFIX, AgentConfig
from fleetwire_server.cli.root import root
from fleetwire_server.config import SETTINGS, Setting
from fleetwire_server.core.sessions import AgentStatus
from fleetwire_server.http.problem import STATUS_BY_CODE
from fleetwire_server.http.route import Route
from fleetwire_server.http.routes import ROUTES
from fleetwire_server.model import METRIC_NAMES, CommandStatus
from fleetwire_shared.messages import MetricsReport

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
API = (ROOT / "docs/api.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()

CODES_OF_STATUSES = ("method_not_allowed", "unsupported_media_type", "internal")
"""Codes of refusals that are no domain error of ours."""

_PATH = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_RUN = re.compile(r"^<!-- run -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_ON_A_HOST = re.compile(r"^<!-- on a host: \w+ -->\n```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EVENT = re.compile(r"""(?:\bevent=|\b_event\()"(\w+)\"""")


def name_of(item: Route | Setting | Path | str) -> str:
    match item:
        case Route():
            return f"{item.method} {item.path}"
        case Setting():
            return item.name
        case Path():
            return str(item.relative_to(ROOT))
        case _:
            return item


def list_cli_commands(group: click.Group, prefix: str = "fleetwire-server") -> Iterator[str]:
    for name, command in group.commands.items():
        path = f"{prefix} {name}"
        if isinstance(command, click.Group):
            yield from list_cli_commands(command, path)
        else:
            yield path


def list_agent_commands() -> list[str]:
    usage = subprocess.run(["fleetwire-agent", "--help"], capture_output=True, text=True, check=True, env=_PATH).stdout
    return [f"fleetwire-agent {name}" for name in re.findall(r"^    ([a-z-]+)\b", usage, re.MULTILINE)]


def list_event_names() -> list[str]:
    sources = (ROOT / "server/fleetwire_server").rglob("*.py")
    return sorted({name for source in sources for name in _EVENT.findall(source.read_text())})


def anchors_of(page: Path) -> set[str]:
    """Return what a link may name after `#`, as the usual renderers make it of headings."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("route", ROUTES, ids=name_of)
def test_every_route_has_a_section_that_names_its_role(route: Route) -> None:
    sections = dict(re.findall(r"^### (.+)\n\n(\w+)\.", API, re.MULTILINE))
    assert sections.get(name_of(route), "no section").lower() == route.policy


@pytest.mark.parametrize("route", [route for route in ROUTES if route.query], ids=name_of)
def test_every_query_parameter_is_described_with_its_route(route: Route) -> None:
    assert route.query is not None
    section = API.split(f"### {name_of(route)}\n")[1].split("\n### ")[0]
    for name in route.query.__struct_encode_fields__:
        assert re.search(rf"[`?&]{name}[`=]", section), name


def test_no_route_is_described_that_is_not_there() -> None:
    described = re.findall(r"^### ([A-Z]+ /\S+)$", API, re.MULTILINE)
    assert sorted(described) == sorted(map(name_of, ROUTES))


@pytest.mark.parametrize("code", [*STATUS_BY_CODE, *CODES_OF_STATUSES])
def test_every_problem_code_is_described_with_its_status(code: str) -> None:
    row = re.search(rf"^\| `{code}` \| (\d+) \|", API, re.MULTILINE)
    assert row is not None
    if code in STATUS_BY_CODE:
        assert int(row[1]) == STATUS_BY_CODE[code]


@pytest.mark.parametrize("event", list_event_names())
def test_every_event_is_described(event: str) -> None:
    assert f"| `{event}` |" in API


def test_the_events_are_found_in_the_code() -> None:
    assert {"status", "output", "gap", "rotated", "waiting", "agent", "command", "end"} <= set(list_event_names())


@pytest.mark.parametrize("status", [*CommandStatus, *get_args(AgentStatus)])
def test_every_status_is_described(status: str) -> None:
    assert f"| `{status}` |" in API


@pytest.mark.parametrize("name", [*METRIC_NAMES, *(field.name for field in fields(MetricsReport))])
def test_every_metric_is_described(name: str) -> None:
    assert f"`{name}`" in API


@pytest.mark.parametrize("setting", SETTINGS, ids=name_of)
def test_every_server_setting_is_described_with_its_variable_and_default(setting: Setting) -> None:
    row = re.search(rf"^\| `{setting.name}` \| `{setting.env}` \| (.*?) \|", OPERATIONS, re.MULTILINE)
    assert row is not None
    if setting.default not in (None, ""):
        assert row[1] == f"`{setting.default}`"


@pytest.mark.parametrize(
    "name", [*(field.name for field in fields(AgentConfig) if field.name != "command_environment"), "key_file"]
)
def test_every_agent_setting_is_described_with_its_variable(name: str) -> None:
    assert re.search(rf"^\| `{name}` \| [^|]*\| `{ENVIRONMENT_PREFIX}{name.upper()}` \|", OPERATIONS, re.MULTILINE)


@pytest.mark.parametrize("command", [*list_cli_commands(root), *list_agent_commands()])
def test_every_command_of_the_command_lines_is_described(command: str) -> None:
    assert re.search(rf"^\| `{command}[ `]", OPERATIONS, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_examples_in_json_are_json(page: Path) -> None:
    for example in re.findall(r"^```json\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        rest = example.strip()
        while rest:  # one document, or frames one after the other
            _, end = json.JSONDecoder().raw_decode(rest)
            rest = rest[end:].lstrip()


def test_decisions_are_numbered_without_a_gap() -> None:
    numbers = [int(page.name[:4]) for page in sorted((ROOT / "docs/decisions").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_changelog_has_a_place_for_what_comes_next() -> None:
    assert "\n## Unreleased\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_examples_of_the_readme_work_as_pasted(fleet: Fleet, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = _RUN.findall(readme)
    on_a_host = "".join(_ON_A_HOST.findall(readme))  # run by tests/e2e/test_docs.py
    assert ("".join(blocks) + on_a_host).count("curl ") == readme.count("curl -"), "an example is not marked to be run"
    (tmp_path / ".demo").mkdir()
    (tmp_path / ".demo/admin-password").write_text(ADMIN_PASSWORD + "\n")
    (tmp_path / "README.md").write_text(readme)
    uploaded = Path("/tmp/fleetwire-hello.txt")
    try:
        result = subprocess.run(
            ["bash", "-u", "-c", "\n".join(blocks).replace("http://127.0.0.1:8420", fleet.server.url)],
            cwd=tmp_path,
            env=plain_environment() | {"no_proxy": "*", "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    finally:
        uploaded.unlink(missing_ok=True)
    said = result.stdout
    assert '"label":"web-01"' in said
    assert re.search(r'^event: output\nid: \d+\ndata: .*"text":".*Linux', said, re.MULTILINE)
    assert 'event: end\ndata: {"reason":"succeeded"}' in said
    assert said.count('"cpu_percent":') >= 2, "a snapshot at once, and one within five seconds"
    assert re.search(r"^id: \d+:\d+:\d+\ndata: .*:/", said, re.MULTILINE), "lines of a log"
    assert '"sha256":"' in said
    assert "MIT, see [LICENSE](LICENSE)." in said
    assert '{"status":"deleted"}' in said
    assert "agt_" in result.stderr, "the new agent's key is shown"
