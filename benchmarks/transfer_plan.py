"""What the transfer plan costs at production size: seconds and memory, on one core.

    python benchmarks/transfer_plan.py

Every rank computes the same plan, so this is what each of them spends. The old plan has every
table on all ranks, the new one on nine tenths of them, so that every shard moves. TorchRec's
own plan objects are made one table at a time and not counted: 1,000 tables on 1,024 ranks are two
million of them, several GB.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
from numpy.typing import NDArray
from torchrec.distributed.types import (
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingType,
    ShardMetadata,
)

from torchrec_fmp.embeddings.boxes import shards_of
from torchrec_fmp.reshard.transfer_plan import TableMove, link_bytes

DIM = 128


def row_wise(rows: int, ranks: int) -> ParameterSharding:
    """As TorchRec's planner shards by row: blocks of equal size, the last one shorter."""
    block = -(-rows // ranks)
    starts = [min(rank * block, rows) for rank in range(ranks + 1)]
    shards = [
        ShardMetadata([start, 0], [end - start, DIM], f"rank:{rank}/cuda:{rank % 8}")
        for rank, (start, end) in enumerate(zip(starts, starts[1:], strict=False))
    ]
    return ParameterSharding(
        ShardingType.ROW_WISE.value, "fused", list(range(ranks)), EnumerableShardingSpec(shards)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=1024)
    options = parser.parse_args()
    before = peak_bytes()
    moves = []
    reading = 0.0
    for index in range(options.tables):
        rows = 10_000_000 + index
        plans = [row_wise(rows, ranks) for ranks in (options.ranks, options.ranks * 9 // 10)]
        start = time.perf_counter()
        shards: list[NDArray[np.void]] = [
            shards_of(plan, rows, DIM, options.ranks) for plan in plans
        ]
        reading += time.perf_counter() - start
        moves.append(TableMove(f"t{index}", *shards, bytes_per_element=4, bytes_per_row=4))
    start = time.perf_counter()
    links = link_bytes(moves, options.ranks)
    planning = time.perf_counter() - start
    print(f"{options.tables} tables, {options.ranks} ranks, {links.sum() / 2**40:.1f} TiB to place")
    print(f"  reading the shards  {reading:6.2f} s")
    print(f"  transfers, bytes    {planning:6.2f} s")
    print(f"  memory              {(peak_bytes() - before) / 2**30:6.2f} GiB above the imports'")


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
