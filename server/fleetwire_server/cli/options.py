"""Options that several commands share, and the settings they make."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import click

from fleetwire_server.config import SETTINGS, ServerConfig, load_config

Arguments: TypeAlias = Mapping[str, str | None]
F = TypeVar("F", bound=Callable[..., Any])


def setting_option(name: str, *, metavar: str) -> Callable[[F], F]:
    """Return an option for a setting; its help is that of the setting."""
    setting = next(setting for setting in SETTINGS if setting.name == name)
    default = "" if setting.default is None else f"  [default: {setting.default}]"
    return click.option(f"--{name.replace('_', '-')}", name, metavar=metavar, help=f"{setting.help}{default}")


def database_options(command: F) -> F:
    """Add the options by which a command finds the database."""
    file = click.option("--config", "config", metavar="FILE", help="TOML file with settings (FLEETWIRE_CONFIG).")
    data_dir = setting_option("data_dir", metavar="DIR")
    database_url = setting_option("database_url", metavar="URL")
    return file(data_dir(database_url(command)))


def config_from(arguments: Arguments) -> ServerConfig:
    """Return the settings of a command line, the environment and the file. Raises InvalidError."""
    file = arguments.get("config")
    settings = {name: value for name, value in arguments.items() if name != "config"}
    return load_config(settings, os.environ, Path(file) if file else None)
