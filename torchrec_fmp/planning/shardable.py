"""The tables that a model's sharders shard, and the features of each table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrec import optim
from torchrec.distributed.embedding_types import ShardedEmbeddingModule
from torchrec.distributed.model_parallel import get_unwrapped_module
from torchrec.distributed.planner.types import ShardingOption
from torchrec.distributed.planner.utils import sharder_name
from torchrec.distributed.types import ModuleSharder
from torchrec.distributed.utils import optimizer_type_to_emb_opt_type

from torchrec_fmp.embeddings.collections import features_by_table
from torchrec_fmp.embeddings.meta import meta_parameter
from torchrec_fmp.embeddings.seams import backward_classes, set_fused_optimizer
from torchrec_fmp.surgery.blueprint import blueprint

Sharders = Sequence[ModuleSharder[Any]]

# The optimizers that FBGEMM fuses: the class that TorchRec's storage estimator knows, the number
# of states of the weight's shape, and the number of states with one value per row. States are fp32.
_FUSED_OPTIMIZERS: dict[EmbOptimType, tuple[type, int, int]] = {
    EmbOptimType.EXACT_SGD: (optim.SGD, 0, 0),
    EmbOptimType.LARS_SGD: (optim.LarsSGD, 1, 0),
    EmbOptimType.EXACT_ADAGRAD: (optim.Adagrad, 1, 0),
    EmbOptimType.EXACT_ROWWISE_ADAGRAD: (optim.RowWiseAdagrad, 0, 1),
    EmbOptimType.ADAM: (optim.Adam, 2, 0),
    EmbOptimType.PARTIAL_ROWWISE_ADAM: (optim.PartialRowWiseAdam, 1, 1),
    EmbOptimType.LAMB: (optim.LAMB, 2, 0),
    EmbOptimType.PARTIAL_ROWWISE_LAMB: (optim.PartialRowWiseLAMB, 1, 1),
}
_STATE_BYTES = 4


@dataclass(frozen=True)
class ShardableTable:
    """One table of an unsharded model.

    Args:
        path: fqn of the module that a sharder shards; the key in the plan.
        module: module at `path`.
        name: name of the table.
        weight: weight (rows, columns), with the attributes that `apply_optimizer_in_backward` set.
        features: features of the table, in the order of its config.
        fused_params: `fused_params` of the module's sharder.
        is_pooled: whether lookups are pooled rather than sequences.
    """

    path: str
    module: nn.Module
    name: str
    weight: Tensor
    features: tuple[str, ...]
    fused_params: dict[str, Any]
    is_pooled: bool

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the weight, without optimizer state."""
        return self.weight.numel() * self.weight.element_size()

    @property
    def optimizer(self) -> EmbOptimType | None:
        """The fused optimizer that is set on the parameter, or else on the sharder.

        Raises:
            ValueError: if the optimizer's states are unknown.
        """
        classes = backward_classes(self.weight)
        of_sharder: EmbOptimType | None = self.fused_params.get("optimizer")
        kind = self._of_class(classes[0]) if classes else of_sharder
        if kind is not None and kind not in _FUSED_OPTIMIZERS:
            raise self._unknown(str(kind))
        return kind

    def _of_class(self, optimizer: type[Optimizer]) -> EmbOptimType | None:
        try:
            return optimizer_type_to_emb_opt_type(optimizer)
        except ValueError as error:
            raise self._unknown(optimizer.__name__) from error

    def _unknown(self, optimizer: str) -> ValueError:
        known = [kind.name for kind in _FUSED_OPTIMIZERS]
        return ValueError(
            f"table {self.name} of {self.path or 'the model'} has the optimizer {optimizer}, whose "
            f"states are unknown; use one of {known}"
        )

    @property
    def bytes_per_element(self) -> int:
        """Bytes per element of the weight and the optimizer states of its shape."""
        return self.weight.element_size() + _STATE_BYTES * self._states[0]

    @property
    def bytes_per_row(self) -> int:
        """Bytes per row of the optimizer states with one value per row."""
        return _STATE_BYTES * self._states[1]

    @property
    def _states(self) -> tuple[int, int]:
        if self.optimizer is None:
            return (0, 0)
        _, of_elements, of_rows = _FUSED_OPTIMIZERS[self.optimizer]
        return (of_elements, of_rows)

    def priced_weight(self) -> Tensor:
        """The weight in a form that lets TorchRec's storage estimator count optimizer state.

        The estimator finds an optimizer on the parameter only (`_get_optimizer_multipler` in
        planner/shard_estimators.py), so it overlooks one in the sharder's `fused_params`.
        """
        if self.optimizer is None or backward_classes(self.weight):
            return self.weight
        weight = meta_parameter(nn.Parameter(self.weight, requires_grad=False))
        set_fused_optimizer(weight, _FUSED_OPTIMIZERS[self.optimizer][0])
        return weight


def shardable_tables(model: nn.Module, sharders: Sharders) -> list[ShardableTable]:
    """Every table that the sharders find, in the model's order.

    Args:
        model: model, gated or not. A sharded model gives the tables of its unsharded counterpart.
        sharders: sharders, as for `DistributedModelParallel`.

    Raises:
        ValueError: if the sharders find no table.
    """
    by_type = {sharder_name(sharder.module_type): sharder for sharder in sharders}
    tables = []
    for path, module in _sharded_by(unsharded(model), by_type, ""):
        sharder = by_type[sharder_name(type(module))]
        features = features_by_table(module)
        # Walks the whole module, so it is called once per module, not per table.
        is_pooled = ShardingOption.module_pooled(module, path)
        for name, weight in sharder.shardable_parameters(module).items():
            fused_params = dict(sharder.fused_params or {})
            served = tuple(features[name])
            tables.append(
                ShardableTable(path, module, name, weight, served, fused_params, is_pooled)
            )
    if not tables:
        raise ValueError(
            f"the model has no module of the types that the sharders shard: {sorted(by_type)}; "
            "pass sharders for its collections"
        )
    return tables


def unsharded(model: nn.Module) -> nn.Module:
    """The model itself, or its unsharded counterpart on meta if it is sharded."""
    module = get_unwrapped_module(model)
    if any(isinstance(child, ShardedEmbeddingModule) for child in module.modules()):
        return blueprint(model).model
    return module


def _sharded_by(
    module: nn.Module, by_type: dict[str, ModuleSharder[Any]], path: str
) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules that have a sharder, as TorchRec's enumerator finds them."""
    if sharder_name(type(module)) in by_type:
        yield path, module
        return
    for name, child in module.named_children():
        yield from _sharded_by(child, by_type, f"{path}.{name}" if path else name)
