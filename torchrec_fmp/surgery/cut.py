"""`cut`: blueprint and selection -> the smaller model and its `CutMap`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from torchrec_fmp.embeddings.collections import Collection, feature_names, table_configs
from torchrec_fmp.embeddings.fqns import join_fqn
from torchrec_fmp.embeddings.meta import meta_parameter
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.surgery.blueprint import Blueprint
from torchrec_fmp.surgery.cut_map import CutMap
from torchrec_fmp.surgery.cut_tables import cut_tables
from torchrec_fmp.surgery.families import deepfm as deepfm  # these imports register rules
from torchrec_fmp.surgery.families import dlrm as dlrm
from torchrec_fmp.surgery.linear import cut_dense
from torchrec_fmp.surgery.rules import Cutter, rule_for


@dataclass(frozen=True)
class Cut:
    """The smaller model, with parameters on meta, and its `CutMap`; fqns are own fqns."""

    model: nn.Module
    cut_map: CutMap


def cut(blueprint: Blueprint, selection: Selection) -> Cut:
    """Applies the cut rules. Pure: needs no weights and no process group.

    Raises:
        ValueError: if the selection names a feature that the model does not have.
        TypeError: if a module reads a dropped feature and has no rule.
    """
    memo = {id(p): meta_parameter(p) for p in blueprint.model.parameters()}
    model = copy.deepcopy(blueprint.model, memo)
    _check_features(model, blueprint, selection)
    cutter = Cutter(selection)
    for fqn, features in blueprint.dense_features.items():
        cut_dense(model.get_submodule(fqn), fqn, features, cutter)
    _cut_module(model, "", cutter, {})
    # Unsaved buffers and extra state are the blueprint's copies, or were made by a rule.
    for fqn, tensor in model.state_dict(keep_vars=True).items():
        if fqn not in cutter.tensors and not fqn.endswith("_extra_state"):
            cutter.record(fqn, tensor)
    return Cut(model, CutMap(cutter.tensors))


def _cut_module(module: nn.Module, fqn: str, cutter: Cutter, done: dict[int, nn.Module]) -> None:
    """Cuts a module and all below; `done` maps the id of a shared collection to the new one."""
    rule = rule_for(module)
    if rule is not None:
        rule(module, fqn, cutter)
        return
    for name, child in list(module.named_children()):
        child_fqn = join_fqn(fqn, name)
        if not isinstance(child, Collection):
            _cut_module(child, child_fqn, cutter, done)
            continue
        features = feature_names(table_configs(child))
        dropped = [feature for feature in features if not cutter.keeps(feature)]
        if dropped:
            raise _no_rule(module, fqn, f"reads the dropped features {dropped}")
        smaller, gates = cut_tables(child, child_fqn, cutter)
        scaled = [feature for feature, gate in gates.items() if gate != 1]
        if scaled:
            raise _no_rule(module, fqn, f"reads {scaled}, whose gates do not fold into a table")
        assert smaller is not None
        setattr(module, name, done.setdefault(id(child), smaller))


def _no_rule(module: nn.Module, fqn: str, problem: str) -> TypeError:
    name = type(module).__name__
    return TypeError(
        f"{fqn or 'the model'} is a {name} that {problem}, but there is no cut rule for {name}: "
        f"register one with @torchrec_fmp.cut_rule({name})"
    )


def _check_features(model: nn.Module, blueprint: Blueprint, selection: Selection) -> None:
    known = {name for names in blueprint.dense_features.values() for name in names}
    for module in model.modules():
        if isinstance(module, Collection):
            known.update(feature_names(table_configs(module)))
    unknown = [name for name in selection.features if name not in known]
    if unknown:
        raise ValueError(f"the selection names features the model does not have: {unknown}")


def table_bytes(model: nn.Module) -> int:
    """Bytes of all embedding tables of an unsharded model."""
    return sum(_nbytes(_table_weights(model)))


def parameter_count(model: nn.Module) -> int:
    """Number of parameters of an unsharded model, tables included."""
    return sum(parameter.numel() for parameter in model.parameters())


def _table_weights(model: nn.Module) -> Iterable[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, Collection):
            yield from module.parameters()


def _nbytes(parameters: Iterable[nn.Parameter]) -> Iterable[int]:
    return (parameter.numel() * parameter.element_size() for parameter in parameters)
