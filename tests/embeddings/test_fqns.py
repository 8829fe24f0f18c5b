"""Own fqns: the fqns of the model as its author wrote it, whatever wraps its modules."""

from __future__ import annotations

import torch
from torch import nn
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ShardingPlan

from tests.support.dlrm_model import DENSE, Case, build, shard
from tests.support.process_group import ProcessGroup
from torchrec_fmp.embeddings.compiled import compiled, compilers, uncompiled
from torchrec_fmp.embeddings.fqns import (
    module_at,
    own_fqn,
    own_modules,
    own_parameters,
    own_plan,
    own_tensors,
    plan_for,
)
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.gates.gated import GatedDense, GatedEmbeddingBagCollection
from torchrec_fmp.surgery.blueprint import blueprint

EBC = "model.sparse_arch.embedding_bag_collection"


def plain() -> nn.Module:
    return build(Case(gated=False))


def wrapped_in_every_way() -> nn.Module:
    """A model compiled inside its gates, gated, compiled around its gates and as a whole."""
    model = plain()
    dense = model.model.dense_arch  # type: ignore[union-attr]
    dense.model = torch.compile(dense.model, backend="eager")
    attach_gates(model, dense={"model.dense_arch": DENSE})
    model.model.dense_arch = torch.compile(model.model.dense_arch, backend="eager")  # type: ignore[union-attr]
    compiled_model = torch.compile(model, backend="eager")
    assert isinstance(compiled_model, nn.Module)
    return compiled_model


def test_own_fqns_of_a_wrapped_model_are_the_plain_fqns_and_its_gates() -> None:
    model = wrapped_in_every_way()
    names = {name for name, _ in model.named_parameters()}
    assert not names & set(plain().state_dict())
    own = {own_fqn(model, name) for name in names}
    gates = {f"{EBC}.gates.log_alpha", "model.dense_arch.gates.log_alpha"}
    assert own == {name for name, _ in plain().named_parameters()} | gates
    assert {name for name, _ in own_tensors(model)} >= own


def test_own_fqns_find_gated_modules_and_not_their_compile_wrappers() -> None:
    model = wrapped_in_every_way()
    assert type(module_at(model, EBC)) is GatedEmbeddingBagCollection
    assert type(module_at(model, "model.dense_arch")) is GatedDense
    assert type(module_at(model, "")) is type(plain())
    modules = dict(own_modules(model))
    assert modules.keys() >= dict(plain().named_modules()).keys()


def test_uncompiled_modules_are_compiled_again_at_the_same_own_fqns() -> None:
    taken = blueprint(wrapped_in_every_way())
    assert not compilers(taken.model)
    assert set(taken.compilers) == {"", "model.dense_arch", "model.dense_arch.model"}
    again = {name for name, _ in compiled(taken.model, taken.compilers).named_modules()}
    assert again >= {
        "_orig_mod.model.dense_arch._orig_mod.model._orig_mod",
        f"_orig_mod.{EBC}",
    }


def test_compilers_find_their_modules_below_gates_attached_later() -> None:
    model = plain()
    dense = model.model.dense_arch  # type: ignore[union-attr]
    dense.model = torch.compile(dense.model, backend="eager")
    bare, found = uncompiled(model)
    gated = attach_gates(bare, dense={"model.dense_arch": DENSE})
    names = {name for name, _ in compiled(gated, found).named_modules()}
    assert "model.dense_arch._module.model._orig_mod" in names


def test_a_plan_converts_to_own_fqns_and_back_to_the_fqns_of_the_model() -> None:
    model = wrapped_in_every_way()
    module_plan = EmbeddingModuleShardingPlan({})
    raw = ShardingPlan({f"_orig_mod.{EBC}": module_plan})
    assert own_plan(raw).plan == {EBC: module_plan}
    assert plan_for(own_plan(raw), model).plan == raw.plan


def check_sharded() -> None:
    bare, gated = shard(Case(gated=False)), shard(Case())
    own = own_parameters(gated)
    assert {name for name in own if "log_alpha" not in name} == own_parameters(bare).keys()
    for name, (fqn, parameter) in own.items():
        assert dict(gated.named_parameters())[fqn] is parameter
        assert name == fqn or "._module." in fqn or "._embedding_bag_collection." in fqn


def test_gates_change_no_own_fqn_of_a_sharded_model(ranks: ProcessGroup) -> None:
    ranks.run(check_sharded)
