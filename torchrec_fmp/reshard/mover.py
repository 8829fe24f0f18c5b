"""Exchanges parts of tables between ranks, in messages of bounded size.

Ranks exchange in rounds. In round (d, n) every rank sends the n-th message for the rank d places
after it, and receives the n-th message from the rank d places before it. All ranks take the rounds
in the same order, and the two messages of a round wait for nothing else, so there is no deadlock. A
round begins before the previous round ends, so that the link is never idle.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from torchrec_fmp.distributed.agreement import Lease, PeerError
from torchrec_fmp.reshard.chunks import Part, chunked, direct, message_bytes, pack, unpack
from torchrec_fmp.reshard.itinerary import Itinerary

_ROUNDS_UNDER_WAY = 2


class CorruptionError(RuntimeError):
    """A received message differs from the message that was sent."""


def exchange(
    todo: Itinerary,
    group: dist.ProcessGroup,
    device: torch.device,
    chunk_bytes: int,
    checksums: bool,
    check: Callable[[], None],
    lease: Lease | None = None,
) -> None:
    """Sends and receives everything that moves from rank to rank.

    Collective. Besides the tables it needs at most `chunk_bytes`.

    Args:
        todo: this rank's itinerary.
        group: process group of the ranks that exchange.
        device: device that the group communicates on.
        chunk_bytes: bytes of all messages in flight at once.
        checksums: whether to send a CRC-32 after each message and compare it.
        check: function called between rounds; raises if the exchange is to end.
        lease: lease on the new tables, if they may be freed before an abandoned exchange has ended.
            Messages are then never received in place, because no lease could delay that.

    Raises:
        CorruptionError: if a checksum differs.
        PeerError: if another rank does not answer.
    """
    size = chunk_bytes // (2 * _ROUNDS_UNDER_WAY)
    buffers = cycle([_Buffers(device, size) for _ in range(_ROUNDS_UNDER_WAY)])
    under_way: deque[_Round] = deque()
    for leaving, arriving, peers in _messages(todo, group, size):
        check()
        if len(under_way) == _ROUNDS_UNDER_WAY:
            under_way.popleft().finish()
        under_way.append(_Round(leaving, arriving, peers, group, next(buffers), checksums, lease))
    for last in under_way:
        last.finish()


def _messages(
    todo: Itinerary, group: dist.ProcessGroup, size: int
) -> Iterator[tuple[Sequence[Part], Sequence[Part], tuple[int, int]]]:
    """The outgoing parts, the incoming parts, and the ranks of both, round by round."""
    rank, world_size = dist.get_rank(group), group.size()
    for distance in range(1, world_size):
        to, origin = (rank + distance) % world_size, (rank - distance) % world_size
        for leaving, arriving in zip_longest(
            chunked(todo.outgoing.get(to, []), size),
            chunked(todo.incoming.get(origin, []), size),
            fillvalue=(),
        ):
            yield leaving, arriving, (to, origin)


class _Buffers:
    """Buffers for one message each way, made when a message cannot be sent or received in place."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.device = device
        self._size = size
        self._made: dict[str, Tensor] = {}

    def get(self, name: str, size: int) -> Tensor:
        """The first `size` bytes of a buffer."""
        if name not in self._made or len(self._made[name]) < size:
            length = max(size, self._size)
            self._made[name] = torch.empty(length, dtype=torch.uint8, device=self.device)
        return self._made[name][:size]


class _Round:
    """One message each way, in flight."""

    def __init__(
        self,
        leaving: Sequence[Part],
        arriving: Sequence[Part],
        peers: tuple[int, int],
        group: dist.ProcessGroup,
        buffers: _Buffers,
        checksums: bool,
        lease: Lease | None,
    ) -> None:
        self._lease = lease
        self._arriving = arriving
        self._peers = peers
        self._rank = dist.get_rank(group)
        self._received: Tensor | None = None
        self._checksum: Tensor | None = None
        self._in_place = False
        to, origin = (dist.get_global_rank(group, peer) for peer in peers)
        operations = []
        if leaving:
            sent = direct(leaving, buffers.device)
            if sent is None:
                sent = buffers.get("sent", message_bytes(leaving))
                pack(leaving, sent)
            operations.append(dist.P2POp(dist.isend, sent, to, group))
            if checksums:
                own = torch.tensor([_checksum(sent)], device=buffers.device)
                operations.append(dist.P2POp(dist.isend, own, to, group))
        if arriving:
            if lease is None:
                self._received = direct(arriving, buffers.device)
            self._in_place = self._received is not None
            if self._received is None:
                self._received = buffers.get("received", message_bytes(arriving))
            operations.append(dist.P2POp(dist.irecv, self._received, origin, group))
            if checksums:
                self._checksum = torch.zeros(1, dtype=torch.int64, device=buffers.device)
                operations.append(dist.P2POp(dist.irecv, self._checksum, origin, group))
        with self._peers_may_be_lost():
            self._works = dist.batch_isend_irecv(operations)

    def finish(self) -> None:
        """Waits for both messages and writes the received one into its place."""
        with self._peers_may_be_lost():
            for work in self._works:
                work.wait()
        if self._received is None:
            return
        if self._checksum is not None and _checksum(self._received) != int(self._checksum):
            names = "; ".join(dict.fromkeys(part.name for part in self._arriving))
            raise CorruptionError(
                f"the message from rank {self._peers[1]} to rank {self._rank} does not match its "
                f"checksum: {names}"
            )
        if not self._in_place:
            with self._lease.writing() if self._lease else nullcontext():
                unpack(self._arriving, self._received)

    @contextmanager
    def _peers_may_be_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            lost = " or ".join(f"rank {peer}" for peer in dict.fromkeys(self._peers))
            raise PeerError(f"the exchange with {lost} broke off: {error}") from error


def _checksum(message: Tensor) -> int:
    return zlib.crc32(message.cpu().numpy().data)
