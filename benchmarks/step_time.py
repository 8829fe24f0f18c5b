"""What gates cost in a step, and whether a pruned model is as fast as one built small.

    python benchmarks/step_time.py
    torchrun --nproc-per-node 2 benchmarks/step_time.py

DLRM with 26 tables of dimension 64 and 13 dense columns, batches of 4,096 on each rank. The two
models of a ratio take turns, step by step, in one process; with several ranks, rank 0 reports.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_fmp import GateConfig, attach_gates, feature_gates, gate_optimizer, prune, sharders
from torchrec_fmp.data.schema import Schema, SparseColumn
from torchrec_fmp.distributed.ranks import Ranks, process_group
from torchrec_fmp.gates.penalty import L0Penalty
from torchrec_fmp.models.dlrm import DlrmBackbone
from torchrec_fmp.planning.planner import PlannerConfig, make_planner
from torchrec_fmp.selection.selection import FeatureDecision, Selection

ROWS = 100_000
BACKBONE = DlrmBackbone(embedding_dim=64, dense_arch=(512, 256), over_arch=(512, 512, 256))
SCHEMA = Schema(
    label="label",
    dense=tuple(f"I{i}" for i in range(13)),
    sparse=tuple(SparseColumn(f"C{i}", ROWS) for i in range(26)),
)


class Trainee:
    """A sharded model with its optimizers."""

    def __init__(self, schema: Schema, ranks: Ranks, gates: GateConfig | None = None) -> None:
        torch.manual_seed(0)
        model = BACKBONE.build(schema, ranks.device)
        if gates is not None:
            attach_gates(model, gates, BACKBONE.dense_modules(schema))
        optimizer = EmbOptimType.EXACT_ROWWISE_ADAGRAD
        model_sharders = sharders({"optimizer": optimizer, "learning_rate": 0.02})
        tables = [f"t_{name}" for name in SCHEMA.sparse_names]
        self.planner = make_planner(PlannerConfig(), tables, 4096, ranks.device.type)
        plan = self.planner.collective_plan(model, model_sharders, ranks.group)
        self.model = DistributedModelParallel(
            model, device=ranks.device, plan=plan, sharders=model_sharders
        )
        self.gates = [module for _, module in feature_gates(self.model)]
        log_alphas = {id(module.log_alpha) for module in self.gates}
        dense = dict(in_backward_optimizer_filter(self.model.named_parameters())).values()
        parameters = [p for p in dense if id(p) not in log_alphas]
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
        self.gate_optimizer = gate_optimizer(self.model, 0.0) if gates else None

    def step(self, batch: Batch) -> float:
        """Seconds of one training step."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss, _ = self.model(batch)
        if self.gate_optimizer is not None:
            self.gate_optimizer.zero_grad()
            loss = loss + L0Penalty()(self.gates, 1.0)
        loss.backward()
        self.optimizer.step()
        if self.gate_optimizer is not None:
            self.gate_optimizer.step()
        return time.perf_counter() - start


def batches(schema: Schema, count: int, batch_size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    features = len(schema.sparse)
    return [
        Batch(
            torch.rand(batch_size, len(schema.dense), generator=generator),
            KeyedJaggedTensor(
                keys=list(schema.sparse_names),
                values=torch.randint(0, ROWS, (features * batch_size,), generator=generator),
                lengths=torch.ones(features * batch_size, dtype=torch.int32),
            ),
            torch.randint(0, 2, (batch_size,), generator=generator).float(),
        )
        for _ in range(count)
    ]


def compare(name: str, first: Trainee, second: Trainee, data: Sequence[Batch], rounds: int) -> None:
    """Prints the ratio first / second of steps that follow each other."""
    for batch in data:
        first.step(batch), second.step(batch)
    times = [(first.step(batch), second.step(batch)) for _ in range(rounds) for batch in data]
    ratios = sorted(a / b for a, b in times)
    quarter = len(ratios) // 4
    low, high = ratios[quarter], ratios[-quarter - 1]
    if dist.get_rank() != 0:
        return
    print(
        f"| {name} | {1e3 * statistics.median(a for a, _ in times):.1f} "
        f"| {1e3 * statistics.median(b for _, b in times):.1f} "
        f"| {statistics.median(ratios):.3f} | {low:.3f} to {high:.3f} |",
        flush=True,
    )


def pruned(trainee: Trainee, kept: Sequence[str], batch: Batch) -> Trainee:
    """Drops all features but the kept ones."""
    decisions = {
        name: FeatureDecision(0.0, float(name in kept), name in kept, "benchmark")
        for name in SCHEMA.features
    }
    result = prune(
        trainee.model,
        trainee.optimizer,
        Selection(decisions),
        planner=trainee.planner,
        batch=batch,
        tolerance=1e-5,
    )
    trainee.model, trainee.optimizer = result.model, result.optimizer
    trainee.gates, trainee.gate_optimizer = [], None
    return trainee


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10, help="of 8 steps each")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    with process_group() as ranks:
        if ranks.speaks:
            print("| steps of | ms | steps of the other, ms | ratio, median | middle half |")
            print("|---|---|---|---|---|")
        data = batches(SCHEMA, 8, arguments.batch_size)
        plain = Trainee(SCHEMA, ranks)
        for sampling in ("batch", "example"):
            gated = Trainee(SCHEMA, ranks, GateConfig(sampling=sampling))
            compare(f"gated, per {sampling} / plain", gated, plain, data, arguments.rounds)
        kept = SCHEMA.dense[:6] + SCHEMA.sparse_names[::2]
        small_schema = SCHEMA.only(kept)
        small = Trainee(small_schema, ranks)
        small_data = batches(small_schema, 8, arguments.batch_size)
        gated = pruned(gated, kept, data[0])
        compare("pruned to half / built small", gated, small, small_data, arguments.rounds)
        compare(
            "built small / built small",
            Trainee(small_schema, ranks),
            small,
            small_data,
            arguments.rounds,
        )


if __name__ == "__main__":
    main()
