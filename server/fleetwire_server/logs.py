"""The server's log: structlog's rendering over the standard library, to standard error."""

import logging
import sys

import structlog
from aiohttp.http_exceptions import HttpProcessingError

from fleetwire_server.config import ServerConfig


def configure_logging(config: ServerConfig) -> None:
    """Send all records to standard error, as text or as one JSON object a line."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if config.log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            pad_level=False,
            exception_formatter=structlog.dev.plain_traceback,  # the others print local variables, keys among them
        )
    )
    final: list[structlog.typing.Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if config.log_format == "json":
        final.append(structlog.processors.format_exc_info)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[*final, renderer]))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(config.log_level.upper())
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("aiosqlite").setLevel(logging.WARNING)  # below that it logs every value of every query
    logging.getLogger("asyncssh").setLevel(logging.WARNING)  # below that several lines for each command
    aiohttp_logger = logging.getLogger("aiohttp.server")
    aiohttp_logger.setLevel(logging.ERROR)
    aiohttp_logger.addFilter(_leave_out_request)


def _leave_out_request(record: logging.LogRecord) -> bool:
    """aiohttp logs what is no HTTP with a traceback and its text, in which tokens and keys may be."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError):
        record.exc_info = None
        record.msg = f"{record.msg}: not valid HTTP ({type(error).__name__})"
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True
