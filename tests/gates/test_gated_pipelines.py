"""Gated collections in TorchRec's pipelines, after detaching one, and with prunes in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torchrec.datasets.utils import Batch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import (
    PrefetchTrainPipelineSparseDist,
    TrainPipelineSparseDist,
)
from torchrec.distributed.train_pipeline.runtime_forwards import BaseForward

from tests.support.gated_dlrm import (
    DENSE,
    Case,
    Tensors,
    batches,
    build_model,
    local,
    optimizers,
    run_steps,
    shard,
)
from tests.support.process_group import ProcessGroup, RankError
from tests.support.torchrec_models import Planner
from torchrec_fmp.pruning.prune import Pruned, prune
from torchrec_fmp.selection.selection import FeatureDecision, Selection


def pipelined(model: nn.Module) -> list[str]:
    """Fqns of the modules whose forward a pipeline has replaced."""
    return [
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module.__dict__.get("forward"), BaseForward)
    ]


def by_loop(case: Case) -> Tensors:
    dmp = shard(case, build_model(case))
    run_steps(dmp, optimizers(dmp), list(batches(case, 5)))
    return whole_state(dmp)


def by_pipeline_then_loop(case: Case) -> tuple[Tensors, list[str], list[str]]:
    """State, and the pipelined modules before and after the pipeline is detached."""
    dmp = shard(case, build_model(case))
    optimizer = optimizers(dmp)
    some = list(batches(case, 5))
    pipeline = TrainPipelineSparseDist(dmp, optimizer, torch.device("cpu"))
    source = iter(some[:3])
    for _ in range(3):
        pipeline.progress(source)
    attached = pipelined(dmp)
    assert pipeline.detach() is dmp
    run_steps(dmp, optimizer, some[3:])
    return whole_state(dmp), attached, pipelined(dmp)


def whole_state(dmp: DistributedModelParallel) -> Tensors:
    return local(dmp.state_dict()) | local({"fused": dmp.fused_optimizer.state_dict()["state"]})


def test_a_detached_gated_model_continues_as_if_it_had_never_been_pipelined(
    ranks: ProcessGroup,
) -> None:
    case = Case("mixed")
    for expected, (computed, attached, detached) in zip(
        ranks.run(by_loop, case), ranks.run(by_pipeline_then_loop, case), strict=True
    ):
        assert len(attached) == 1 and detached == []
        assert expected.keys() == computed.keys()
        for name, tensor in expected.items():
            assert torch.equal(computed[name], tensor), name


def by_pipeline(case: Case, pipeline: type[TrainPipelineSparseDist[Batch, object]]) -> Tensors:
    dmp = shard(case, build_model(case))
    losses_of(pipeline(dmp, optimizers(dmp), torch.device("cpu")), list(batches(case, 5)))
    return whole_state(dmp)


def losses_of(pipeline: TrainPipelineSparseDist[Batch, object], some: list[Batch]) -> list[float]:
    source = iter(some)
    outputs: list[Any] = [pipeline.progress(source) for _ in some]
    return [float(loss) for loss, _, _ in outputs]


@pytest.mark.parametrize(
    "pipeline",
    [
        TrainPipelineSparseDist,
        pytest.param(
            PrefetchTrainPipelineSparseDist,
            marks=pytest.mark.skip(
                reason="TorchRec's prefetch_embeddings does nothing on a device without streams, "
                "and the pipelined forward then finds no input (torchrec 1.8, gates or not)"
            ),
        ),
    ],
)
def test_a_pipelined_gated_model_trains_as_in_a_loop(
    ranks: ProcessGroup, pipeline: type[TrainPipelineSparseDist[Batch, object]]
) -> None:
    case = Case("mixed")
    for expected, computed in zip(
        ranks.run(by_loop, case), ranks.run(by_pipeline, case, pipeline), strict=True
    ):
        assert expected.keys() == computed.keys()
        for name, tensor in expected.items():
            assert torch.equal(computed[name], tensor), name


def pruned(dmp: DistributedModelParallel, optimizer: Optimizer, case: Case) -> Pruned:
    gates = {"a": 0.0, "b": 1.0, "c": 0.0, "d": 0.5} | dict.fromkeys(DENSE, 1.0)
    selection = Selection(
        {name: FeatureDecision(0.0, gate, gate > 0, "test") for name, gate in gates.items()}
    )
    batch = list(batches(case, 6))[5]
    return prune(
        dmp, optimizer, selection, planner=Planner("mixed"), batch=batch, forward=logits_of
    )


def logits_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    _, (_, logits, _) = model(batch)
    return logits


def pruned_by_loop(case: Case) -> tuple[list[float], Tensors]:
    dmp = shard(case, build_model(case))
    optimizer = optimizers(dmp)
    some = list(batches(case, 6))
    run_steps(dmp, optimizer, some[:3])
    new, new_optimizer, _ = pruned(dmp, optimizer, case)
    losses = []
    for batch in some[3:]:
        new_optimizer.zero_grad()
        loss, _ = new(batch)
        loss.backward()
        new_optimizer.step()
        losses.append(float(loss))
    return losses, whole_state(new)


def pruned_between_pipelines(case: Case) -> tuple[list[float], Tensors]:
    dmp = shard(case, build_model(case))
    optimizer = optimizers(dmp)
    some = list(batches(case, 6))
    pipeline = TrainPipelineSparseDist(dmp, optimizer, torch.device("cpu"))
    losses_of(pipeline, some[:3])
    pipeline.detach()
    new, new_optimizer, _ = pruned(dmp, optimizer, case)
    following = TrainPipelineSparseDist(new, new_optimizer, torch.device("cpu"))
    return losses_of(following, some[3:]), whole_state(new)


def test_a_prune_between_two_pipelines_is_bit_equal_to_a_prune_in_a_loop(
    ranks: ProcessGroup,
) -> None:
    case = Case("mixed")
    for (losses, expected), (of_pipeline, computed) in zip(
        ranks.run(pruned_by_loop, case), ranks.run(pruned_between_pipelines, case), strict=True
    ):
        assert of_pipeline == losses
        assert expected.keys() == computed.keys()
        for name, tensor in expected.items():
            assert torch.equal(computed[name], tensor), name


def pruned_while_attached(case: Case) -> None:
    dmp = shard(case, build_model(case))
    optimizer = optimizers(dmp)
    losses_of(TrainPipelineSparseDist(dmp, optimizer, torch.device("cpu")), list(batches(case, 3)))
    pruned(dmp, optimizer, case)


def test_pruning_a_model_attached_to_a_pipeline_is_refused(ranks_2: ProcessGroup) -> None:
    with pytest.raises(RankError, match="ValueError: .*is attached to a train pipeline"):
        ranks_2.run(pruned_while_attached, Case("mixed"))
