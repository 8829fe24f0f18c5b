"""Ranks as threads of one process, and tables that they hold without any kernel."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.support.placements import Shards, box_of
from torchrec_fmp.embeddings.boxes import Box
from torchrec_fmp.embeddings.local_shards import LocalShard
from torchrec_fmp.reshard import mover
from torchrec_fmp.reshard.tables import Tables

# Far more than any message takes: a rank that waits this long would wait forever.
_DEADLOCK_SECONDS = 10.0


@dataclass
class Network:
    """Links between the ranks, on which a message has arrived once the receiver has taken it.

    Args:
        received: (origin, rank, bytes) of every message, without checksums.
        damage: function that changes a message on its way.
    """

    received: list[tuple[int, int, int]] = field(default_factory=list)
    damage: Callable[[Tensor], None] = lambda _: None
    links: dict[tuple[int, int], queue.Queue[Any]] = field(
        default_factory=lambda: defaultdict(queue.Queue)
    )


@dataclass(frozen=True)
class Group:
    """One rank's view of the process group."""

    rank: int
    ranks: int
    network: Network

    def size(self) -> int:
        return self.ranks


class _Batch:
    """Sends and receives that are under way until `wait`.

    A message is read from the sender's memory only when the receiver takes it, so that memory that
    is used again too early shows.
    """

    def __init__(self, operations: list[SimpleNamespace]) -> None:
        self._receives = [op for op in operations if op.kind == "receive"]
        self._sent = []
        for op in operations:
            if op.kind == "send":
                self._sent.append(threading.Event())
                link = op.group.network.links[op.group.rank, op.peer]
                link.put((op.tensor, self._sent[-1]))

    def wait(self) -> None:
        for op in self._receives:
            network, rank = op.group.network, op.group.rank
            message, taken = network.links[op.peer, rank].get(timeout=_DEADLOCK_SECONDS)
            assert message.shape == op.tensor.shape, "the two ends disagree on the message"
            op.tensor.copy_(message)
            taken.set()
            if message.dtype == torch.uint8:
                network.damage(op.tensor)
                network.received.append((op.peer, rank, message.nbytes))
        for taken in self._sent:
            assert taken.wait(_DEADLOCK_SECONDS), "nobody received the message"


_DIST = SimpleNamespace(
    isend="send",
    irecv="receive",
    P2POp=lambda kind, tensor, peer, group: SimpleNamespace(
        kind=kind, tensor=tensor, peer=peer, group=group
    ),
    batch_isend_irecv=lambda operations: [_Batch(operations)],
    get_rank=lambda group: group.rank,
    get_global_rank=lambda _, peer: peer,
)


def run_ranks(network: Network, ranks: int, function: Callable[[Any], None]) -> None:
    """Runs the function with each rank's group at once.

    Raises:
        Exception: the first rank's error.
    """
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            function(Group(rank, ranks, network))
        except BaseException as error:
            errors[rank] = error

    with mock.patch.object(mover, "dist", _DIST):
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[min(errors)]


def cut_out(whole: Tensor, box: Box) -> Tensor:
    """A copy of the box."""
    rows = whole[box.row : box.row + box.rows]
    return rows[:, box.column : box.column + box.columns].clone()


def rank_tables(
    shards: Mapping[str, Shards],
    make: Callable[[str, Box], tuple[Tensor, dict[str, Tensor]]],
    rank: int,
) -> Tables:
    """What a rank knows and holds, with `make(fqn, box)` as weight and states of its shards."""
    local = {
        fqn: [
            LocalShard(fqn, box, *make(fqn, box), mock.Mock())
            for box in map(box_of, held[held["rank"] == rank])
        ]
        for fqn, held in shards.items()
    }
    return Tables(shards, frozenset(), {}, local)
