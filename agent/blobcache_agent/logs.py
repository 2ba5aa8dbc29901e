"""Log set-up: structlog for us, the same output for the libraries' standard loggers.

One line is one event: a constant text and key=value pairs. JSON where stderr is not a terminal.
Every value is bounded; what a client or an origin sent is never logged longer than that.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

VALUE_CHARS_MAX = 512
"""Longer string values are cut: a line stays readable and nobody floods the log through us."""

Format = Literal["auto", "json", "console"]
LEVELS = ("debug", "info", "warning", "error")

# These speak at info and debug about single requests: signing input and headers among it.
_QUIET_LOGGERS = ("aiohttp", "asyncio", "boto3", "botocore", "urllib3")


def _bound_values(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, str) and len(value) > VALUE_CHARS_MAX and key != "exception":
            event[key] = value[:VALUE_CHARS_MAX] + "…"
    return event


def configure_logging(level: str = "info", log_format: Format = "auto") -> None:
    """Send all logs to stderr; call once, before anything logs.

    Args:
        level: The least level written: one of `LEVELS`.
        log_format: `auto` writes JSON unless stderr is a terminal.
    """
    as_json = log_format == "json" or (log_format == "auto" and not sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        # Tracebacks without the frames' local variables, where credentials may lie.
        structlog.processors.format_exc_info,
        _bound_values,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            # The engine logs by the standard library, with its keys in `extra`.
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return a logger; `name` is the module's."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
