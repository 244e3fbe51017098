"""`fleetwire-server user`: users, in the database directly. A running server sees the changes at once."""

import sys
import time
from functools import partial

import click

from fleetwire_server.core.passwords import hash_password
from fleetwire_server.core.usernames import check_username
from fleetwire_server.model import Role, User
from fleetwire_server.storage import users
from fleetwire_server.storage.audit import audited

from .database import audit_entry, run_in_database
from .options import config_from, database_options

_name = click.argument("name")
_role = click.Choice([role.value for role in Role])
_password_stdin = click.option(
    "--password-stdin", is_flag=True, help="Read the password from the first line of standard input."
)


@click.group(no_args_is_help=True)
def user() -> None:
    """Add, list, change and remove users."""


@user.command()
@_name
@click.option("--role", type=_role, required=True, help="What the user may do.")
@_password_stdin
@database_options
def add(name: str, role: str, *, password_stdin: bool, **arguments: str | None) -> None:
    """Add a user."""
    check_username(name)
    password_hash = hash_password(_read_password(from_stdin=password_stdin))
    new = User(name=name, role=Role(role), password_hash=password_hash, created_at=time.time())
    # The database may be made here: users can be there before the first start.
    entry = audit_entry("user.added", name, role=role)
    run_in_database(config_from(arguments), audited(partial(users.add_user, user=new), entry), is_made=True)
    click.echo(f"user {name} added")


@user.command("list")
@database_options
def list_(**arguments: str | None) -> None:
    """List all users with their roles."""
    for each in run_in_database(config_from(arguments), users.list_users):
        click.echo(f"{each.name}\t{each.role.value}")


@user.command()
@_name
@database_options
def remove(name: str, **arguments: str | None) -> None:
    """Remove a user and end their sessions."""
    remove = partial(users.delete_user, name=name)
    run_in_database(config_from(arguments), audited(remove, audit_entry("user.removed", name)))
    click.echo(f"user {name} removed")


@user.command()
@_name
@_password_stdin
@database_options
def passwd(name: str, *, password_stdin: bool, **arguments: str | None) -> None:
    """Set a user's password and end their sessions."""
    password_hash = hash_password(_read_password(from_stdin=password_stdin))
    change = partial(users.update_user, name=name, password_hash=password_hash)
    run_in_database(
        config_from(arguments), audited(change, audit_entry("user.changed", name, is_password_changed=True))
    )
    click.echo(f"password of {name} changed")


@user.command()
@_name
@click.argument("role", type=_role)
@database_options
def role(name: str, role: str, **arguments: str | None) -> None:
    """Set a user's role and end their sessions."""
    change = partial(users.update_user, name=name, role=Role(role))
    run_in_database(config_from(arguments), audited(change, audit_entry("user.changed", name, role=role)))
    click.echo(f"{name} is now {role}")


def _read_password(*, from_stdin: bool) -> str:
    if from_stdin:
        return sys.stdin.readline().removesuffix("\n").removesuffix("\r")
    if not sys.stdin.isatty():
        raise click.UsageError("give the password on standard input, with --password-stdin")
    entered: str = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    return entered
