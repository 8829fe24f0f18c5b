"""New processes that need not import torch and torchrec, which takes seconds, each on its own."""

from __future__ import annotations

import multiprocessing
from functools import lru_cache
from multiprocessing.context import ForkServerContext

_PRELOADED = ["torchrec", "torchrec_fmp.run.pipeline", "torchrec_fmp.pruning.prune", "pytest"]


@lru_cache(maxsize=1)
def forked() -> ForkServerContext:
    """A context whose processes are forked from one that has imported the libraries.

    It runs no thread and never initialises torch.distributed, so what is forked from it is as new.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context
