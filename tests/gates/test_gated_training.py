"""Training of sharded gates: noise, resume and TorchRec's pipelines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import pytest
import torch
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineBase, TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizerWrapper

from tests.support.gated_dlrm import (
    BATCH_SIZE,
    EBC,
    STEPS,
    Case,
    Tensors,
    batches,
    build_model,
    local,
    optimizers,
    run_steps,
    set_open,
    shard,
)
from tests.support.process_group import ProcessGroup
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.sharded import ShardedGatedEmbeddingBagCollection
from torchrec_fmp.gates.step_counter import StepCounter


def trained_gates(case: Case) -> tuple[Tensors, Tensors, Tensors]:
    """log_alpha after training, the gates of the next step, and the whole state."""
    dmp = shard(case, build_model(case))
    run_steps(dmp, optimizers(dmp), list(batches(case)))
    gates = dict(feature_gates(dmp))
    counters = [m for m in dmp.modules() if isinstance(m, StepCounter)]
    assert [steps.value for steps in counters] == [STEPS, STEPS]
    log_alphas = {fqn: module.log_alpha.detach().clone() for fqn, module in gates.items()}
    noise = {fqn: module(STEPS, BATCH_SIZE).detach() for fqn, module in gates.items()}
    return log_alphas, noise, local(dmp.state_dict())


@pytest.mark.parametrize("sampling", ["batch", "example"])
def test_log_alpha_is_equal_on_all_ranks_although_their_noise_differs(
    ranks_2: ProcessGroup, sampling: Literal["batch", "example"]
) -> None:
    # Nearly open, so that the few draws per batch are not all exactly 0 or 1, without a gradient.
    config = GateConfig(initial_log_alpha=1.5, sampling=sampling)
    case = Case("mixed", gates=config)
    (log_alphas, noise, _), (other_log_alphas, other_noise, _) = ranks_2.run(trained_gates, case)
    assert len(log_alphas) == 2
    for fqn, log_alpha in log_alphas.items():
        assert torch.equal(log_alpha, other_log_alphas[fqn])
        assert (log_alpha != config.initial_log_alpha).all()
        assert not torch.equal(noise[fqn], other_noise[fqn])


def test_sampled_gates_train_alike_in_every_run(ranks_2: ProcessGroup) -> None:
    case = Case("mixed")
    for (_, _, first), (_, _, second) in zip(
        ranks_2.run(trained_gates, case), ranks_2.run(trained_gates, case), strict=True
    ):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def trained_through_warm_up(case: Case) -> list[Tensors]:
    """One step with open gates, then sampled ones."""
    dmp = shard(case, build_model(case))
    optimizer = optimizers(dmp)
    values = []
    for step, batch in enumerate(batches(case)):
        set_open(dmp, step == 0)
        optimizer.zero_grad()
        dmp(batch)[0].backward()
        optimizer.step()
        values.append({fqn: gates.log_alpha.detach().clone() for fqn, gates in feature_gates(dmp)})
    return values


def test_gates_start_to_move_only_when_the_warm_up_ends(ranks: ProcessGroup) -> None:
    for first, *rest in ranks.run(trained_through_warm_up, Case("mixed")):
        for fqn, log_alpha in first.items():
            assert (log_alpha == GateConfig().initial_log_alpha).all()
            assert all((later[fqn] != log_alpha).all() for later in rest)


def trained_into_a_selection(case: Case) -> list[Tensors]:
    """log_alpha after each step: one with sampled gates, then with fixed ones."""
    dmp = shard(case, build_model(case))
    optimizer = optimizers(dmp)
    values = []
    for step, batch in enumerate(batches(case)):
        for _, gates in feature_gates(dmp):
            gates.fix(dict.fromkeys(gates.features, 0.5) if step > 0 else None)
        run_steps(dmp, optimizer, [batch])
        values.append({fqn: gates.log_alpha.detach().clone() for fqn, gates in feature_gates(dmp)})
    return values


def test_training_continues_after_a_selection_has_fixed_the_gates(ranks_1: ProcessGroup) -> None:
    (values,) = ranks_1.run(trained_into_a_selection, Case("mixed"))
    assert len(values) == STEPS


def resumed(case: Case) -> tuple[Tensors, Tensors]:
    """State after STEPS steps in one model, and after moving to another before the last step."""
    straight, interrupted = (shard(case, build_model(case)) for _ in range(2))
    run_steps(straight, optimizers(straight), list(batches(case)))
    optimizer = optimizers(interrupted)
    run_steps(interrupted, optimizer, list(batches(case))[:-1])
    continued = shard(case, build_model(case))
    with torch.no_grad():
        next(iter(feature_gates(continued)))[1].log_alpha.fill_(0.25)
    continued.load_state_dict(interrupted.state_dict())
    next_optimizer = optimizers(continued)
    for _, keyed in next_optimizer.optimizers:
        # A fresh optimizer has no state to load into.
        if isinstance(keyed, KeyedOptimizerWrapper):
            keyed.init_state()
    next_optimizer.load_state_dict(optimizer.state_dict())
    run_steps(continued, next_optimizer, list(batches(case))[-1:])
    return local(straight.state_dict()), local(continued.state_dict())


def test_state_dict_carries_gates_and_their_step_to_another_model(ranks: ProcessGroup) -> None:
    for straight, continued in ranks.run(resumed, Case("mixed")):
        assert {f"{EBC}.gates.log_alpha", f"{EBC}.step._extra_state"} <= straight.keys()
        assert continued.keys() == straight.keys()
        # Weights and the fused state move with TorchRec's own state dicts.
        for name, tensor in straight.items():
            assert torch.equal(continued[name], tensor), name


def by_loop(dmp: DistributedModelParallel, case: Case) -> None:
    run_steps(dmp, optimizers(dmp), list(batches(case, 5)))


def by_base_pipeline(dmp: DistributedModelParallel, case: Case) -> None:
    drain(TrainPipelineBase(dmp, optimizers(dmp), torch.device("cpu")), batches(case, 5))


def by_sparse_dist_pipeline(dmp: DistributedModelParallel, case: Case) -> None:
    pipeline = TrainPipelineSparseDist(dmp, optimizers(dmp), torch.device("cpu"))
    drain(pipeline, batches(case, 5))
    # The pipeline traces the model and takes over the collections that it finds.
    assert [type(module) for module in pipeline._pipelined_modules] == [
        ShardedGatedEmbeddingBagCollection
    ]


def drain(pipeline: TrainPipelineBase | TrainPipelineSparseDist, source: Iterator[Batch]) -> None:
    steps = 0
    try:
        while True:
            pipeline.progress(source)
            steps += 1
    except StopIteration:
        assert steps == 5


def state_after(train_by: Callable[[DistributedModelParallel, Case], None], case: Case) -> Tensors:
    dmp = shard(case, build_model(case))
    train_by(dmp, case)
    fused = dmp.fused_optimizer.state_dict()["state"]
    return local(dmp.state_dict()) | local({"fused": fused})


@pytest.mark.parametrize("sampling", ["batch", "example"])
@pytest.mark.parametrize("pipeline", [by_base_pipeline, by_sparse_dist_pipeline])
def test_torchrecs_pipelines_end_bit_equal_to_a_plain_loop(
    ranks: ProcessGroup,
    pipeline: Callable[[DistributedModelParallel, Case], None],
    sampling: Literal["batch", "example"],
) -> None:
    case = Case("mixed", gates=GateConfig(sampling=sampling))
    for expected, computed in zip(
        ranks.run(state_after, by_loop, case), ranks.run(state_after, pipeline, case), strict=True
    ):
        assert expected.keys() == computed.keys()
        assert expected[f"{EBC}.step._extra_state"].item() == 5
        for name, tensor in expected.items():
            assert torch.equal(computed[name], tensor), name
