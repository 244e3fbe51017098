"""The top command and those that need no file of their own."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TypeAlias

import click

from fleetwire_server.config import ServerConfig
from fleetwire_server.storage.backup import write_backup
from fleetwire_shared import __version__

from .agents import agent
from .options import config_from, database_options, setting_option
from .users import user

ServeProgram: TypeAlias = Callable[[ServerConfig], Coroutine[None, None, None]]


@click.group(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="%(prog)s %(version)s")
def root() -> None:
    """The Fleetwire control server."""


@root.command()
@setting_option("listen", metavar="HOST:PORT")
@setting_option("public_url", metavar="URL")
@setting_option("tls_cert", metavar="FILE")
@setting_option("tls_key", metavar="FILE")
@setting_option("log_level", metavar="LEVEL")
@setting_option("log_format", metavar="FORMAT")
@database_options
@click.pass_obj
def serve(program: ServeProgram, /, **arguments: str | None) -> None:
    """Serve until SIGTERM or SIGINT."""
    asyncio.run(program(config_from(arguments)))


@root.command()
@click.argument("file", type=click.Path(path_type=Path))
@database_options
def backup(file: Path, **arguments: str | None) -> None:
    """Write a copy of the database to FILE, which must not exist. The server may run meanwhile."""
    write_backup(config_from(arguments).database_url, file)
    click.echo(f"backup written: {file}")


@root.command()
def openapi() -> None:
    """Print the OpenAPI document of the HTTP API."""
    # Loads the whole HTTP side, which the other commands need not wait for.
    from fleetwire_server.http.openapi import build_document
    from fleetwire_server.http.routes import ROUTES

    click.echo(json.dumps(build_document(ROUTES), indent=2, ensure_ascii=False))


root.add_command(agent)
root.add_command(user)
