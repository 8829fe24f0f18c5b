"""Outputs of the old and the pruned model for the same input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import LazyAwaitable

from torchrec_fmp.embeddings.collections import feature_names
from torchrec_fmp.embeddings.evaluation import evaluation, steps_uncounted
from torchrec_fmp.embeddings.fqns import module_at
from torchrec_fmp.embeddings.local_shards import sharded_collections
from torchrec_fmp.embeddings.seams import (
    ShardedCollection,
    device_of,
    forget_input_order,
    sharded_table_configs,
)
from torchrec_fmp.gates.attach import feature_gates
from torchrec_fmp.gates.scale import scale_keys, scale_sequences
from torchrec_fmp.selection.selection import Selection

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    """`model(batch)`."""
    return model(batch)


@contextmanager
def gates_fixed(model: nn.Module, selection: Selection) -> Iterator[None]:
    """Fixes the gates at the selection's values, and restores their state afterwards."""
    before = [(module, module.fixed) for _, module in feature_gates(model)]
    for module, _ in before:
        module.fix(selection.gates)
    try:
        yield
    finally:
        for module, fixed in before:
            module.fixed = fixed


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation that leaves no trace, without the graphs that `torch.compile` made.

    Compiled graphs would not see the hooks of a comparison.
    """
    with evaluation(model), torch.compiler.set_stance("force_eager"), steps_uncounted(model):
        yield


def outputs_before(
    model: nn.Module, selection: Selection, batch: Any, forward: Forward
) -> list[Tensor]:
    """Outputs of the old model in evaluation, with features scaled by the selection's values.

    Gates get the selection's values; in a collection without gates, the embeddings are multiplied
    by these values. Collective, like the model's forward.

    Args:
        model: old model, sharded.
        selection: selection to prune by.
        batch: input of the model.
        forward: function that runs a model on the batch.

    Returns:
        Every floating-point tensor of the output.
    """
    with (
        _undisturbed(model),
        gates_fixed(model, selection),
        _scaled(model, selection),
    ):
        return _floats(forward(model, batch))


def outputs_after(
    model: nn.Module,
    selection: Selection,
    batch: Any,
    forward: Forward,
    dense_features: Mapping[str, tuple[str, ...]],
) -> list[Tensor]:
    """Outputs of the pruned model in evaluation, for an input of the old model.

    Args:
        model: pruned model, sharded.
        selection: selection that the model was pruned by.
        batch: input of the old model; the pruned model gets the remaining dense columns.
        forward: function that runs a model on the batch.
        dense_features: own fqn of a module that reads gated dense columns -> the columns' names.

    Returns:
        Every floating-point tensor of the output.
    """
    with (
        _undisturbed(model),
        _narrowed_input(model, selection, dense_features),
    ):
        outputs = _floats(forward(model, batch))
    # This batch still has the dropped keys: its cached key order would misplace those of others.
    for collection in sharded_collections(model).values():
        forget_input_order(collection)
    return outputs


def _floats(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


@contextmanager
def _scaled(model: nn.Module, selection: Selection) -> Iterator[None]:
    """Multiplies embeddings of features without a gate by the selection's value."""
    gated = {feature for _, gates in feature_gates(model) for feature in gates.features}

    def scale(
        collection: ShardedCollection, _: tuple[Any, ...], embeddings: LazyAwaitable[Any]
    ) -> None:
        features = feature_names(sharded_table_configs(collection))
        values = [1.0 if f in gated else selection.gates.get(f, 1.0) for f in features]
        pooled = isinstance(collection, ShardedEmbeddingBagCollection)
        embeddings.callbacks.append(
            partial(
                scale_keys if pooled else scale_sequences,
                features=features,
                gates=torch.tensor(values, device=device_of(collection)),
                centered=False,
            )
        )

    with ExitStack() as stack:
        for collection in sharded_collections(model).values():
            stack.callback(collection.register_forward_hook(scale).remove)
        yield


@contextmanager
def _narrowed_input(
    model: nn.Module, selection: Selection, dense_features: Mapping[str, tuple[str, ...]]
) -> Iterator[None]:
    """Passes the remaining columns of the old input to modules that read fewer dense columns."""
    with ExitStack() as stack:
        for fqn, names in dense_features.items():
            dropped = set(selection.dropped)
            columns = [i for i, name in enumerate(names) if name not in dropped]

            def narrow(
                _: nn.Module, args: tuple[Any, ...], columns: list[int] = columns
            ) -> tuple[Any, ...]:
                return (args[0][:, columns], *args[1:])

            hook = module_at(model, fqn).register_forward_pre_hook(narrow)
            stack.callback(hook.remove)
        yield
