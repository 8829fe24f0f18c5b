"""Runs functions on a gloo process group of spawned ranks.

The ranks are started once and serve many calls, because importing torch and torchrec takes seconds.
pytest's own process never initialises torch.distributed.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import TypeVar

import torch
import torch.distributed as dist

from tests.support.processes import forked

T = TypeVar("T")

_START_SECONDS = 300.0
# How long the other ranks get to report their own errors once one rank has failed.
_GRACE_SECONDS = 2.0


class RankError(AssertionError):
    """A rank failed, died or did not answer; the message holds its traceback and its number."""


class ProcessGroup:
    """`world_size` processes, each a rank of one gloo group.

    Args:
        world_size: number of ranks.
        timeout_seconds: time limit of one call, and of one collective in it.
    """

    def __init__(self, world_size: int, timeout_seconds: float = 120.0) -> None:
        self.world_size = world_size
        self.timeout_seconds = timeout_seconds
        self._ranks: list[_Rank] = []
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def run(self, fn: Callable[..., T], *args: object) -> list[T]:
        """Calls `fn(*args)` on every rank and returns the results by rank.

        `fn` is a module-level function; arguments and results are pickled by value.

        Raises:
            RankError: if a rank raises, dies, or does not answer in time. The processes are then
                ended, and the next call starts new ones.
        """
        __tracebackhide__ = True
        if not self._ranks:
            self._start()
        call = pickle.dumps((fn, args))
        for rank in self._ranks:
            rank.connection.send_bytes(call)
        return self._gather(getattr(fn, "__qualname__", repr(fn)), self.timeout_seconds)

    def close(self) -> None:
        """Ends the processes."""
        for rank in self._ranks:
            rank.connection.close()
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
        self._ranks = []
        if self._directory is not None:
            self._directory.cleanup()

    def _start(self) -> None:
        # A store in a file needs no port; a file used by an earlier group would mislead this one.
        self._directory = tempfile.TemporaryDirectory(prefix="process_group_")
        store = os.path.join(self._directory.name, "store")
        self._ranks = [
            _Rank(index, self.world_size, store, self.timeout_seconds)
            for index in range(self.world_size)
        ]
        self._gather("start", _START_SECONDS)

    def _gather(self, what: str, timeout_seconds: float) -> list[T]:
        __tracebackhide__ = True
        results: dict[int, T] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout_seconds
        pending = {rank.connection: rank for rank in self._ranks}
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), left):
                rank = pending.pop(connection)  # type: ignore[call-overload]
                try:
                    succeeded, content = pickle.loads(rank.connection.recv_bytes())
                except EOFError:
                    rank.process.join()
                    succeeded, content = False, f"died with exit code {rank.process.exitcode}"
                if succeeded:
                    results[rank.index] = content
                else:
                    errors[rank.index] = content
                    deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if not errors and not pending:
            return [results[index] for index in range(self.world_size)]
        silent = [rank.index for rank in pending.values()]
        self.close()
        report = [f"rank {index} of {self.world_size}: {errors[index]}" for index in sorted(errors)]
        if silent:
            cause = "another rank failed" if errors else f"{timeout_seconds:g} s"
            report.append(f"ranks {silent} of {self.world_size}: no answer after {cause}")
        raise RankError(f"{what} failed\n" + "\n".join(report))


class _Rank:
    """A process and the near end of the pipe to it."""

    def __init__(self, index: int, world_size: int, store: str, timeout_seconds: float) -> None:
        context = forked()
        self.index = index
        self.connection, far_end = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(far_end, index, world_size, store, timeout_seconds), daemon=True
        )
        self.process.start()
        # Otherwise the death of the rank would not close the pipe.
        far_end.close()


def _serve(
    connection: Connection, rank: int, world_size: int, store: str, timeout_seconds: float
) -> None:
    """Body of a rank: answers calls until the pipe is closed."""
    torch.set_num_threads(1)
    # Variables that torchrun would set, for code that reads them.
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)

    def initialise() -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )

    with suppress(EOFError, BrokenPipeError):
        connection.send_bytes(_outcome(initialise))
        while True:
            call = connection.recv_bytes()
            connection.send_bytes(_outcome(lambda call=call: _call(call)))


def _call(call: bytes) -> object:
    fn, args = pickle.loads(call)
    return fn(*args)


def _outcome(fn: Callable[[], object]) -> bytes:
    """(True, result) or (False, traceback), pickled."""
    try:
        return pickle.dumps((True, fn()))
    except BaseException:  # A failed assertion, a skip or an exit of the function is a report too.
        return pickle.dumps((False, traceback.format_exc()))
