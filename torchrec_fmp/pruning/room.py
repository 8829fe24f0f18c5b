"""`Room`: keeps the old tables while the new ones are built and filled."""

from __future__ import annotations

import traceback

from torchrec_fmp.distributed.agreement import Lease, all_or_none
from torchrec_fmp.embeddings.local_shards import local_shards, sharded_collections
from torchrec_fmp.pruning.proposal import Proposal
from torchrec_fmp.reshard.reshard import MoveConfig
from torchrec_fmp.reshard.staging import HostStage, release


class Room:
    """Keeps the old tables while the new ones are built and filled.

    They stay in place, or are staged in host memory if the manifest says so. If anything fails,
    the new tables' memory is freed before the old tables return to the old model.
    """

    def __init__(self, proposal: Proposal, move: MoveConfig) -> None:
        self._proposal = proposal
        self._move = move
        self._stage: HostStage | None = None
        self.lease: Lease | None = None
        self.old = proposal.tables

    def __enter__(self) -> Room:
        if self._proposal.manifest.staging == "host":
            self.lease = Lease()
            try:
                with all_or_none(
                    "staging the tables in host memory", self._proposal.group, self._move.timeout
                ):
                    self._stage = HostStage(self._proposal.tables)
            except BaseException as error:
                self._give_back(error)
                raise
            self.old = self._stage.tables
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._give_back(error)

    def _give_back(self, error: BaseException) -> None:
        if self.lease is None:
            return
        self.lease.end()
        if self._stage is not None:
            # Only the frames that built it hold a collection that failed half way.
            traceback.clear_frames(error.__traceback__)
            # Sharding replaces the smaller model's collections in place, one at a time.
            for collection in sharded_collections(self._proposal.smaller.model).values():
                release(local_shards(collection))
            self._stage.restore()
