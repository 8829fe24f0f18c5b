"""How fast tables move from plan to plan, against what the machine could do.

    python benchmarks/reshard.py

Two ranks over gloo; tables with row-wise Adagrad, initially half of them on each rank. In each
round, one after the other:

- exchange: every table goes to the other rank, against bare isend/irecv of the same tensors;
- local: every table stays on its rank, against one copy_ of the same tensors;
- checkpoint: the same exchange, against torch.distributed.checkpoint's save to a RAM disk and load
  into the new plan. The checkpoint needs the memory a third time, so this has its own size.

Needs about 2.2 times --gib of memory, and 3.2 times --checkpoint-gib.
"""

from __future__ import annotations

import argparse
import gc
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_fmp import sharders
from torchrec_fmp.reshard.reshard import MoveConfig, reshard_tables
from torchrec_fmp.reshard.tables import Tables, tables
from torchrec_fmp.surgery.cut_map import CutMap, TensorCut

DIM = 128
RANKS = 2


def build(count: int, rows: int, shift: int) -> DistributedModelParallel:
    """`count` tables, the i-th on rank i + shift."""
    configs = [
        EmbeddingBagConfig(
            name=f"t{i}", embedding_dim=DIM, num_embeddings=rows, feature_names=[f"f{i}"]
        )
        for i in range(count)
    ]
    model = nn.Sequential(EmbeddingBagCollection(tables=configs, device=torch.device("meta")))
    fused = {"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": 0.1}
    all_sharders = sharders(fused)
    kernel = EmbeddingComputeKernel.FUSED.value
    plan = construct_module_sharding_plan(
        model[0],
        {f"t{i}": table_wise((i + shift) % RANKS, compute_kernel=kernel) for i in range(count)},
        sharder=next(s for s in all_sharders if s.module_type is EmbeddingBagCollection),
        local_size=RANKS,
        world_size=RANKS,
        device_type="cpu",
    )
    return DistributedModelParallel(model, plan=ShardingPlan({"0": plan}), sharders=all_sharders)


def timed(work: Callable[[], None]) -> float:
    """Seconds until the last rank is done."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def bare_exchange(old: Tables, new: Tables) -> None:
    """The tensors of rank 0's i-th shard to rank 1's i-th, and the other way round."""
    peer = 1 - dist.get_rank()
    for mine, arriving in zip(old, new, strict=True):
        operations = [
            dist.P2POp(operation, tensor, peer)
            for operation, shard in ((dist.isend, mine), (dist.irecv, arriving))
            for tensor in shard.tensors.values()
        ]
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def bare_copy(old: Tables, new: Tables) -> None:
    for mine, kept in zip(old, new, strict=True):
        for name, tensor in kept.tensors.items():
            tensor.copy_(mine.tensors[name])


def reshard(old: Tables, new: Tables) -> None:
    group = dist.group.WORLD
    assert group is not None
    whole = {fqn: TensorCut(fqn, torch.Size([])) for fqn in new.shards}
    reshard_tables(old, new, CutMap(whole), group, torch.device("cpu"), MoveConfig())


def through_checkpoint(
    old: DistributedModelParallel, new: DistributedModelParallel, directory: str
) -> None:
    dcp.save(state(old), checkpoint_id=directory)
    dcp.load(state(new), checkpoint_id=directory)


def state(model: DistributedModelParallel) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}


def compare(
    question: str, moved: int, rounds: int, base: Callable[[], None], ours: Callable[[], None]
) -> None:
    """Prints the seconds of both and the ratio of their speeds."""
    pairs = []
    for index in range(rounds + 1):
        # They take turns in going first; the first round warms up.
        order = (base, ours) if index % 2 else (ours, base)
        seconds = {work: timed(work) for work in order}
        pairs.append((seconds[base], seconds[ours]))
    pairs = pairs[1:]
    ratios = [base_seconds / our_seconds for base_seconds, our_seconds in pairs]
    if dist.get_rank() == 0:
        base_median, our_median = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(
            f"{question:<12}{moved / 2**30:8.2f} GiB{base_median:9.2f} s{our_median:9.2f} s"
            f"  {statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def ask(question: str, gib: float, shift: int, options: argparse.Namespace) -> None:
    """One row of the table; its models are gone before the next."""
    group = dist.group.WORLD
    assert group is not None
    rows = int(gib * 2**30 / options.tables / (4 * DIM + 4))
    models = [build(options.tables, rows, some) for some in (0, shift)]
    old, new = (tables(model, group, MoveConfig().timeout) for model in models)
    total = torch.tensor(old.local_bytes())
    dist.all_reduce(total)
    baselines: dict[str, Callable[[], None]] = {
        "exchange": partial(bare_exchange, old, new),
        "local": partial(bare_copy, old, new),
        "checkpoint": partial(through_checkpoint, *models, options.ram_disk),
    }
    ours = partial(reshard, old, new)
    compare(question, int(total), options.rounds, baselines[question], ours)


def run_rank(rank: int, port: int, options: argparse.Namespace) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    group = dist.group.WORLD
    assert group is not None
    if rank == 0:
        print(f"{'':<12}{'bytes':>12}{'baseline':>11}{'ours':>11}  times as fast, median (range)")
    for question, gib, shift in (
        ("exchange", options.gib, 1),
        ("local", options.gib, 0),
        ("checkpoint", options.checkpoint_gib, 1),
    ):
        ask(question, gib, shift, options)
        # Models refer to themselves.
        gc.collect()
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=8.0, help="of all tables with their state")
    parser.add_argument("--checkpoint-gib", type=float, default=4.0)
    parser.add_argument("--tables", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ram-disk", default="/dev/shm")
    return parser.parse_args()


def main() -> None:
    options = parse()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=options.ram_disk) as directory:
        options.ram_disk = directory
        mp.spawn(run_rank, (port, options), nprocs=RANKS)


if __name__ == "__main__":
    main()
