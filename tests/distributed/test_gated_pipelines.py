"""Gated collections in TorchRec's pipelines: what is left of them after a pipeline is detached."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.train_pipeline.runtime_forwards import BaseForward

from tests.distributed.gated_dlrm import (
    Case,
    Tensors,
    batches,
    build_model,
    local,
    optimizers,
    run_steps,
    shard,
)
from tests.distributed.process_group import ProcessGroup


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


def test_a_detached_gated_model_trains_on_as_if_it_had_never_been_pipelined(
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
