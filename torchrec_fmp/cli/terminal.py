"""What a terminal gets: log messages, errors in one line, and no chatter of libraries."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def set_up_logging() -> None:
    """TORCHREC_FMP_LOG=debug shows everything, and tracebacks instead of one-line errors."""
    level = os.environ.get("TORCHREC_FMP_LOG", "warning").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")
    if level != "DEBUG":
        warnings.filterwarnings("ignore", module=r"(torch|torchrec|fbgemm_gpu)\b")


def quiet_libraries() -> None:
    """Silences TorchRec and torch; after their import, which sets levels of its own."""
    if shows_everything():
        return
    # TorchRec's advice to its own developers, on every plan and every sharded module.
    for name in ("torchrec", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_is_news)


def shows_everything() -> bool:
    """Whether errors are to be raised with their traceback."""
    return logging.getLogger().isEnabledFor(logging.DEBUG)


def fail(error: Exception, status: int) -> int:
    """Writes the error to stderr and returns the status."""
    # One line, so that it is found whole among the lines of other ranks.
    message = " ".join(line.strip() for line in str(error).splitlines())
    sys.stderr.write(f"torchrec-fmp: {type(error).__name__}: {message}\n")
    return status


def _is_news(record: logging.LogRecord) -> bool:
    """TorchRec's planner warns, by the root logger, of each data-parallel table in every plan."""
    return not record.getMessage().startswith("Sharding spec not found")
