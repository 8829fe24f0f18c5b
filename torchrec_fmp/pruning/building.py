"""Builds and shards the smaller model with its dense weights; its tables are filled later."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from torchrec_fmp.distributed.agreement import all_or_none
from torchrec_fmp.embeddings.compiled import compiled
from torchrec_fmp.embeddings.fqns import own_modules, plan_for
from torchrec_fmp.embeddings.local_shards import dense_tensors
from torchrec_fmp.embeddings.seams import data_parallel_wrapper, sharding_env
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.gated import GatedCollection
from torchrec_fmp.gates.step_counter import StepCounter
from torchrec_fmp.pruning.proposal import Proposal
from torchrec_fmp.reshard.dense import fill_dense
from torchrec_fmp.reshard.reshard import MoveConfig


def build(
    proposal: Proposal, move: MoveConfig, gates: GateConfig | None
) -> DistributedModelParallel:
    """The smaller model, sharded by the new plan; tables are not filled. Collective.

    Args:
        proposal: prune to build the model for.
        move: settings for moving tables; only the timeout is read.
        gates: configuration of the new model's gates; None for no gates.

    Raises:
        ValueError: if a parameter cannot be cut, or `gates` is given and the model was sharded
            without sharders for gated collections.
        RuntimeError: if another rank fails.
    """
    old = proposal.model
    with all_or_none("cutting the dense parameters", proposal.group, move.timeout):
        fill_dense(proposal.smaller.model, dense_tensors(old), proposal.smaller.cut_map)
    # Building modules draws initial weights, which are overwritten later: the job's own random
    # numbers must not change.
    devices = [] if old.device.type == "cpu" else [old.device]
    with torch.random.fork_rng(devices, device_type=old.device.type):
        with all_or_none("building the smaller model", proposal.group, move.timeout):
            model = proposal.smaller.model if gates is None else _gated(proposal, gates)
            # The plan uses own fqns; compiled modules have longer fqns.
            model = compiled(model, proposal.blueprint.compilers)
            new = DistributedModelParallel(
                model,
                env=sharding_env(old),
                device=old.device,
                plan=plan_for(proposal.manifest.plans.after, model),
                sharders=old.sharders,
                init_data_parallel=False,
                data_parallel_wrapper=data_parallel_wrapper(old),
            )
        new.init_data_parallel()
    return new


def restore_modes(old: nn.Module, new: nn.Module) -> None:
    """Copies each module's training mode by own fqn; a new module gets the mode of the model."""
    modes = {fqn: module.training for fqn, module in own_modules(old)}
    new.train(old.training)
    for fqn, module in own_modules(new):
        module.training = modes.get(fqn, old.training)


def _gated(proposal: Proposal, config: GateConfig) -> nn.Module:
    """The smaller model with open gates, whose noise continues where the old gates' noise ended."""
    if not any(issubclass(s.module_type, GatedCollection) for s in proposal.model.sharders):
        raise ValueError(
            "the model was sharded without sharders of gated collections, which the new gates "
            "need: shard it with torchrec_fmp.sharders()"
        )
    model = attach_gates(proposal.smaller.model, config, proposal.manifest.dense_columns)
    for _, module in feature_gates(model):
        module.set_open(True)
    old_steps = _step_counters(proposal.model)
    for fqn, counter in _step_counters(model).items():
        if fqn in old_steps:
            counter.value = old_steps[fqn].value
    return model


def _step_counters(model: nn.Module) -> dict[str, StepCounter]:
    """Step counters of the gated modules, by own fqn."""
    return {fqn: module for fqn, module in own_modules(model) if isinstance(module, StepCounter)}
