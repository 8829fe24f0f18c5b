"""Peak memory of a prune: the tables of both models and one chunk, or less if they are staged."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import torch.distributed as dist

from tests.support.dlrm_model import Case, FixedPlanner, adam, batch, select, shard, train
from tests.support.process_group import ProcessGroup
from torchrec_fmp.pruning.prune import prune
from torchrec_fmp.reshard.reshard import MoveConfig
from torchrec_fmp.reshard.tables import tables

CHUNK_BYTES = 8 * 2**20
# Four tables of 51 MB each, and their row-wise Adagrad state of 3 MB.
BIG = Case("table_wise", gated=False, rows=800_000, device="meta")
SMALL = Case("table_wise", gated=False, device="meta")
GATES = {"e": 0.0}
SLACK = 1.05

Staging = Literal["none", "host"]


def anonymous_bytes() -> int:
    """Memory of this process that no file backs, so without the host stage's mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux 4.5 or newer")


@contextmanager
def sampled(peaks: list[int]) -> Iterator[None]:
    """Appends the peak of `anonymous_bytes` inside the context."""
    done = threading.Event()
    samples = [anonymous_bytes()]

    def sample() -> None:
        while not done.wait(0.002):
            samples.append(anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        peaks.append(max(samples))


def peak_bytes(case: Case, to: str, staging: Staging) -> tuple[int, int, int]:
    """Bytes of the old and of the new local tables, and the peak memory that the job adds."""
    gc.collect()
    start = anonymous_bytes()
    dmp = shard(case)
    optimizer = adam(dmp)
    train(dmp, optimizer, range(1))
    assert dist.group.WORLD is not None
    old = tables(dmp, dist.group.WORLD, MoveConfig().timeout)
    for held in old:
        for state in held.states.values():
            # Zeros that nothing has written yet take no memory.
            state.fill_(1)
    peaks: list[int] = []
    with sampled(peaks):
        pruned = prune(
            dmp,
            optimizer,
            select(GATES, case),
            planner=FixedPlanner(to, first_rank=1),
            batch=batch(7),
            move=MoveConfig(staging=staging, chunk_bytes=CHUNK_BYTES),
        )
    new_bytes = tables(pruned.model, dist.group.WORLD, MoveConfig().timeout).local_bytes()
    return old.local_bytes(), new_bytes, peaks[0] - start


@pytest.fixture(scope="module")
def fresh_ranks() -> Iterator[ProcessGroup]:
    """Ranks whose memory no other test has filled, and that have pruned once."""
    group = ProcessGroup(2)
    for staging in ("none", "host"):
        group.run(peak_bytes, SMALL, "row_wise", staging)
    yield group
    group.close()


@pytest.mark.parametrize("to", ["table_wise", "row_wise", "column_wise"])
@pytest.mark.parametrize("staging", ["none", "host"])
def test_a_prune_needs_no_more_memory_than_the_tables_and_one_chunk(
    fresh_ranks: ProcessGroup, staging: Staging, to: str
) -> None:
    for old, new, peak in fresh_ranks.run(peak_bytes, BIG, to, staging):
        both = old + new if staging == "none" else max(old, new)
        assert min(old, new) > 50 * 2**20
        assert peak <= SLACK * (both + CHUNK_BYTES)
        assert peak >= 0.85 * both, "the measure misses the tables themselves"
