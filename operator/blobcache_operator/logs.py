"""Structured logs on stderr: JSON in a cluster, readable on a terminal."""

import asyncio
import logging
import sys
from typing import Any

import structlog


def configure_logging(level: str, *, as_json: bool | None = None) -> None:
    """
    Send structlog's and the standard library's records to stderr in one form.

    Args:
        level: A name of the standard library, such as 'INFO'.
        as_json: By default JSON unless stderr is a terminal.
    """
    use_json = not sys.stderr.isatty() if as_json is None else as_json
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if use_json else structlog.dev.ConsoleRenderer()
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # kopf tells its own life at info, and object bodies at debug.
    logging.getLogger("kopf").setLevel(logging.WARNING)
    # It warns of running outside the main thread, which is on purpose; see `wakeups`.
    logging.getLogger("kopf._core.reactor.running").setLevel(logging.ERROR)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


async def tell_exception(
    log: structlog.typing.FilteringBoundLogger, event: str, error: BaseException, **values: Any
) -> None:
    """Log an exception nobody foresaw, with its trace: that reads source files, so in a thread."""
    await asyncio.to_thread(log.error, event, exc_info=error, **values)
