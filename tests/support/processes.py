"""New processes that share one import of torch and torchrec, which takes seconds."""

from __future__ import annotations

import multiprocessing
from functools import lru_cache
from multiprocessing.context import ForkServerContext

_PRELOADED = ["torchrec", "torchrec_fmp.run.pipeline", "torchrec_fmp.pruning.prune", "pytest"]


@lru_cache(maxsize=1)
def forked() -> ForkServerContext:
    """A context whose processes are forked from one that has imported the libraries.

    It runs no thread and never initialises torch.distributed, so its forks are like new processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
