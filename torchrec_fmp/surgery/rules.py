"""The registry of cut rules, one per module type, and the `Cutter` that a rule works with.

A model needs a rule for the module that holds an embedding collection and its readers. Here the
pooled features are concatenated after a dense input and read by a linear layer::

    import torchrec_fmp as fmp

    class Ranker(nn.Module):
        def __init__(self, ebc: EmbeddingBagCollection, dense: int) -> None:
            super().__init__()
            self.ebc = ebc
            self.widths = {
                feature: config.embedding_dim
                for config in ebc.embedding_bag_configs()
                for feature in config.feature_names
            }
            self.over = nn.Linear(dense + sum(self.widths.values()), 1)

        def forward(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
            pooled = self.ebc(features)
            return self.over(torch.cat([dense, *(pooled[name] for name in self.widths)], dim=1))

    @fmp.cut_rule(Ranker)
    def cut_ranker(model: Ranker, fqn: str, cutter: fmp.Cutter) -> None:
        # Cut the tables: this returns the smaller collection, and the gates left for its readers.
        smaller, gates = fmp.cut_tables(model.ebc, fmp.join_fqn(fqn, "ebc"), cutter)
        if smaller is None:
            raise ValueError(f"{fqn} has no features left")
        model.ebc = smaller
        # Cut the layer that reads them: None marks a block that stays, here the dense input.
        dense = model.over.in_features - sum(model.widths.values())
        columns, scale = fmp.kept_columns([(None, dense), *model.widths.items()], gates)
        fmp.cut_linear(model.over, fmp.join_fqn(fqn, "over"), cutter, columns, scale)
        # Cut the names by which forward finds the features.
        model.widths = {name: width for name, width in model.widths.items() if name in gates}

A rule covers the module and everything inside it. A rule that removes a whole collection sets it to
None, and the module's forward must handle that. Read a `KeyedTensor` by its keys: the order of
`values()` depends on the sharding plan. If `prune` gets a real batch, it compares the models
on it, and refuses a rule that does not match the module's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from torchrec_fmp.embeddings.fqns import join_fqn
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.surgery.cut_map import TensorCut

M = TypeVar("M", bound=nn.Module)
Rule = Callable[[M, str, "Cutter"], None]

_RULES: dict[type[nn.Module], Rule[nn.Module]] = {}


def cut_rule(module_type: type[M]) -> Callable[[Rule[M]], Rule[M]]:
    """Registers how modules of exactly this type shrink.

    The rule is called as `rule(module, fqn, cutter)`. It changes `module`, whose parameters are on
    the meta device, in place, so that it reads only the kept features, and records each changed
    tensor through `cutter`. The module's output must keep its shape.

    The rule of a module that `torch.compile` wraps gets the module without the wrapper; the module
    is compiled again afterwards.

    Raises:
        ValueError: if the type already has a rule.
    """

    def register(rule: Rule[M]) -> Rule[M]:
        if module_type in _RULES:
            raise ValueError(f"{module_type.__name__} already has a cut rule")
        _RULES[module_type] = rule  # type: ignore[assignment]
        return rule

    return register


def rule_for(module: nn.Module) -> Rule[nn.Module] | None:
    """The rule for exactly this module's type: a subclass may compute something else."""
    return _RULES.get(type(module))


def check_parts(model: nn.Module, fqn: str, parts: Mapping[str, type[nn.Module]]) -> None:
    """Checks that the model's children have exactly the types that its rule knows.

    Raises:
        TypeError: if a part of the model was replaced by a module of another type.
    """
    for name, expected in parts.items():
        part = getattr(model, name)
        if type(part) is not expected:
            raise TypeError(
                f"{join_fqn(fqn, name)} is a {type(part).__name__} where {type(model).__name__} "
                f"has a {expected.__name__}: register a cut rule for the whole model's type with "
                "torchrec_fmp.cut_rule"
            )


class Cutter:
    """The selection that a rule reads, and the record that it writes.

    Args:
        selection: decisions; a feature that it does not name is kept.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self.tensors: dict[str, TensorCut] = {}

    def keeps(self, feature: str) -> bool:
        """Whether the feature is kept."""
        decision = self._selection.features.get(feature)
        return decision is None or decision.kept

    def gate(self, feature: str) -> float:
        """The value that scales a kept feature."""
        decision = self._selection.features.get(feature)
        return 1.0 if decision is None else decision.gate

    def record(
        self,
        fqn: str,
        source: Tensor,
        columns: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Records the source of a tensor; see `TensorCut`. The fqn stays the same.

        Args:
            fqn: own fqn of the tensor.
            source: old tensor, read for its shape.
            columns: int64 positions kept along the last dimension.
            scale: fp32 scale; a scale of 1 throughout changes nothing.
        """
        if columns is not None and torch.equal(columns, torch.arange(source.shape[-1])):
            columns = None
        if scale is not None and bool((scale == 1).all()):
            scale = None
        self.tensors[fqn] = TensorCut(fqn, source.shape, columns, scale)
