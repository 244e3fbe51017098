"""`fleetwire-server agent`: enrolled hosts, in the database directly. A running server sees the changes at once."""

import time
from datetime import UTC, datetime
from functools import partial

import click

from fleetwire_server.core.tokens import hash_token, new_agent_key
from fleetwire_server.deploy.install_script import build_install_command, reachable_url
from fleetwire_server.model import Agent, AgentKey
from fleetwire_server.storage import agents
from fleetwire_server.storage.audit import audited
from fleetwire_server.tls import find_pin

from .database import audit_entry, run_in_database
from .options import config_from, database_options, setting_option


@click.group(no_args_is_help=True)
def agent() -> None:
    """Enrol and list agents."""


@agent.command()
@click.argument("label")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A tag of the host; may be given several times.")
@setting_option("public_url", metavar="URL")
@setting_option("tls_cert", metavar="FILE")
@setting_option("tls_key", metavar="FILE")
@database_options
def add(label: str, tags: tuple[str, ...], **arguments: str | None) -> None:
    """Enrol a host as LABEL, and print the line that installs its agent there."""
    # Here: it loads the HTTP side, which the other commands need not wait for.
    from fleetwire_server.http.bodies import AgentRequest
    from fleetwire_server.http.explain import check

    body = check({"label": label, "tags": list(dict.fromkeys(tags))}, AgentRequest)
    config = config_from(arguments)
    url, pin = reachable_url(config.public_url), find_pin(config)
    agent_id, key = new_agent_key()
    now = time.time()
    enrol = partial(
        agents.add_agent,
        agent=Agent(id=agent_id, label=body.label, tags=tuple(body.tags), created_at=now),
        key=AgentKey(key_hash=hash_token(key), agent_id=agent_id, created_at=now, expires_at=None),
    )
    run_in_database(config, audited(enrol, audit_entry("agent.enrolled", agent_id, label=body.label)))
    click.echo(
        f"agent {agent_id} enrolled as {label}. Paste this on the host; it holds the agent's key, shown this once:"
    )
    click.echo(build_install_command(url, key, pin))


@agent.command("list")
@database_options
def list_(**arguments: str | None) -> None:
    """List all agents: id, label, host name, version, and when each was last seen."""
    for each in run_in_database(config_from(arguments), agents.list_agents):
        seen = (
            "never" if each.last_seen is None else datetime.fromtimestamp(each.last_seen, UTC).isoformat("T", "seconds")
        )
        click.echo("\t".join((each.id, each.label, each.hostname or "-", each.version or "-", seen)))
