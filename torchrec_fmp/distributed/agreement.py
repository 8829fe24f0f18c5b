"""Decisions that must be the same on every rank: made once and sent, or compared."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

_T = TypeVar("_T")

_PATIENCE = timedelta(minutes=30)
_POLL_SECONDS = 0.5
_WHOLE = "whole"

# Number of agreements in each process group so far; all ranks count alike.
_agreements: Counter[str] = Counter()


class PeerError(RuntimeError):
    """Another rank does not answer.

    The root cause is on that rank; its own error is preferred when available.
    """


def broadcast_text(text: str | None, group: dist.ProcessGroup, device: torch.device) -> str:
    """Rank 0's text, on every rank.

    Args:
        text: text to send; read on rank 0 only.
        group: process group.
        device: device that the group's backend communicates on.
    """
    source = dist.get_global_rank(group, 0)
    data = torch.frombuffer(bytearray((text or "").encode() or b" "), dtype=torch.uint8).to(device)
    length = torch.tensor([data.numel()], device=device)
    dist.broadcast(length, source, group=group)
    if dist.get_rank(group) != 0:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(data, source, group=group)
    return bytes(data.cpu().tolist()).decode()


def check_equal(digest: str, what: str, group: dist.ProcessGroup) -> None:
    """Checks that a digest is the same on all ranks.

    Raises:
        RuntimeError: if the digest differs; names the ranks that differ from rank 0.
    """
    digests: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group=group)
    different = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if different:
        raise RuntimeError(
            f"{what} differs between ranks: ranks {different} disagree with rank 0. Give every "
            "rank the same selection, model and planner"
        )


@contextmanager
def all_or_none(
    what: str, group: dist.ProcessGroup, timeout: timedelta = _PATIENCE
) -> Iterator[Callable[[], None]]:
    """Independent work on each rank, which fails on all ranks if it fails on any.

    The ranks agree through the group's store. The store still answers after a rank has died, unless
    that rank served it.

    Args:
        what: name of the work, for errors.
        group: process group.
        timeout: time to wait for the slowest rank.

    Yields:
        A function that raises RuntimeError if another rank has failed in the meantime. Long work
        calls it now and then.

    Raises:
        RuntimeError: if another rank failed or did not finish in time; names that rank and its
            error. Raised on ranks that succeeded, and on ranks that lost contact with a failed
            rank. A rank that failed for its own reason raises its own error.
    """
    store = group.get_group_store()
    _agreements[group.group_name] += 1
    # An elastic launcher may keep the store across a restart.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"torchrec_fmp/{start}/{_agreements[group.group_name]}"
    verdict = f"{prefix}/verdict"
    rank, world_size = dist.get_rank(group), group.size()

    def check() -> None:
        with _store_answers(what):
            said = store.get(verdict).decode() if store.check([verdict]) else _WHOLE
        if said != _WHOLE:
            raise RuntimeError(f"{what} failed on {said}")

    try:
        yield check
    except BaseException as error:
        own = f"rank {rank}: {error!r}"
        said = own
        # If the store is gone, the other ranks notice without being told.
        with suppress(dist.DistNetworkError):
            said = store.compare_set(verdict, "", own).decode()
        if said != own and isinstance(error, PeerError):
            raise RuntimeError(f"{what} failed on {said}") from error
        raise
    with _store_answers(what):
        done = store.add(f"{prefix}/done", 1)
        if done == world_size:
            store.compare_set(verdict, "", _WHOLE)
        try:
            store.wait([verdict], timeout)
        except RuntimeError as error:  # A TCPStore raises DistStoreError, a FileStore does not.
            done = store.add(f"{prefix}/done", 0)
            late = (
                f"{what} failed: {world_size - done} of {world_size} ranks did not finish "
                f"in {timeout}"
            )
            # Late ranks must fail too, unless the last one has just finished.
            said = store.compare_set(verdict, "", f"rank {rank}: {late}").decode()
            if said != _WHOLE:
                raise RuntimeError(late) from error
    check()


@contextmanager
def _store_answers(what: str) -> Iterator[None]:
    """Explains the error if the store does not answer."""
    try:
        yield
    except dist.DistNetworkError as error:
        raise RuntimeError(
            f"{what} failed: the store that the ranks agree through does not answer, so rank 0 or "
            f"the launcher, whichever serves the store, has exited: {error}"
        ) from error


class Lease:
    """Permission to write to a block of memory, until the memory is freed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Delays the end of the lease during a write.

        Raises:
            PeerError: if the lease has ended.
        """
        with self._lock:
            if self._ended:
                raise PeerError("the work was abandoned because another rank failed")
            yield

    def end(self) -> None:
        """Waits for the write in progress, and permits no further writes."""
        with self._lock:
            self._ended = True


def watched(work: Callable[[Callable[[], None]], _T], check: Callable[[], None]) -> _T:
    """Runs work that may wait for other ranks, and abandons it when one of them has failed.

    The work runs in a thread. Nothing can interrupt a gloo transfer whose peer never answers, so
    such a transfer is left to its process group's timeout.

    Args:
        work: function to run. Its argument is a function that raises PeerError once the work has
            been abandoned.
        check: function that raises if another rank has failed; see `all_or_none`.

    Returns:
        The result of `work`.

    Raises:
        Exception: any error that `work` or `check` raises.
    """
    given_up = threading.Event()
    results: list[_T] = []
    errors: list[BaseException] = []

    def proceed() -> None:
        if given_up.is_set():
            raise PeerError("the work was abandoned because another rank failed")

    def run() -> None:
        try:
            results.append(work(proceed))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="torchrec_fmp", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_SECONDS)
        if thread.is_alive():
            try:
                check()
            except BaseException:
                given_up.set()
                raise
    if errors:
        raise errors[0]
    return results[0]


def largest(value: float, group: dist.ProcessGroup, device: torch.device) -> float:
    """The largest of the ranks' values, on every rank; NaN if any value is NaN."""
    values = torch.zeros(dist.get_world_size(group), dtype=torch.float64, device=device)
    values[dist.get_rank(group)] = value
    dist.all_reduce(values, group=group)
    return float(values.max())
