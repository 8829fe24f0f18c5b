"""Terminal output: log messages, errors in one line, and no chatter from libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def set_up_logging() -> None:
    """Sets the log level to TORCHREC_FMP_LOG.

    `debug` shows everything, and tracebacks instead of one-line errors.
    """
    level = os.environ.get("TORCHREC_FMP_LOG", "warning").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if level != "DEBUG":
        warnings.filterwarnings("ignore", module=r"(torch|torchrec|fbgemm_gpu)\b")


def quiet_libraries() -> None:
    """Silences TorchRec and torch; call it after their import, which sets log levels."""
    if shows_everything():
        return
    # TorchRec logs advice to its own developers on every plan and every sharded module.
    for name in ("torchrec", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_is_news)


def shows_everything() -> bool:
    """Whether errors are raised with their traceback."""
    return logging.getLogger().isEnabledFor(logging.DEBUG)


def fail(error: Exception, status: int) -> int:
    """Writes the error to stderr and returns the status."""
    # One line, so that lines of other ranks cannot split it.
    message = " ".join(line.strip() for line in str(error).splitlines())
    sys.stderr.write(f"torchrec-fmp: {type(error).__name__}: {message}\n")
    return status


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a record is worth showing.

    TorchRec's planner warns, through the root logger, of each data-parallel table in every plan.
    """
    return not record.getMessage().startswith("Sharding spec not found")
