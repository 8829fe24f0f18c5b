"""Drops columns of a dense input from the layer that reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchrec.models import deepfm, dlrm
from torchrec.modules.mlp import MLP, Perceptron

from torchrec_fmp.embeddings.fqns import join_fqn
from torchrec_fmp.embeddings.seams import MLP_LAYERS, PERCEPTRON_LINEAR
from torchrec_fmp.surgery.rules import Cutter

# Module type -> name of the child that reads the module's input.
_FIRST_CHILD: dict[type[nn.Module], str] = {
    dlrm.DenseArch: "model",
    deepfm.DenseArch: "model",
    MLP: MLP_LAYERS,
    Perceptron: PERCEPTRON_LINEAR,
    nn.Sequential: "0",
}


def cut_dense(module: nn.Module, fqn: str, features: Sequence[str], cutter: Cutter) -> None:
    """Shrinks the first layer of the module that reads a gated dense input, in place.

    The input loses the dropped columns too: the pruned model reads the kept columns, in order.

    Raises:
        TypeError: if columns change and the first layer is not known to be linear.
    """
    gates = torch.tensor([cutter.gate(feature) for feature in features])
    if bool((gates == 1).all()):
        return
    columns = torch.tensor(
        [i for i, feature in enumerate(features) if cutter.keeps(feature)], dtype=torch.int64
    )
    name = first_linear(module)
    if name is None:
        raise TypeError(
            f"{fqn} is a {type(module).__name__} that reads dense features {list(features)}, but "
            "its first layer is not known to be linear: gate a Linear, Sequential, MLP or DenseArch"
        )
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    cut_linear(linear, join_fqn(fqn, name), cutter, columns, gates[columns])


def first_linear(module: nn.Module) -> str | None:
    """Name, within the module, of the linear layer that reads its input; '' is the module."""
    names = []
    while type(module) is not nn.Linear:
        name = _FIRST_CHILD.get(type(module))
        if name is None:
            return None
        names.append(name)
        module = module.get_submodule(name)
    return ".".join(names)


def cut_linear(linear: nn.Linear, fqn: str, cutter: Cutter, columns: Tensor, scale: Tensor) -> None:
    """Shrinks a linear layer's input to `columns`, each multiplied by its `scale`.

    Args:
        linear: linear layer, changed in place.
        fqn: own fqn of the layer.
        cutter: cutter that records the cut.
        columns: (I',) int64 positions of the kept inputs.
        scale: (I',) fp32 scales of the kept inputs.
    """
    old = linear.weight
    linear.in_features = len(columns)
    linear.weight = nn.Parameter(
        torch.empty(old.shape[0], len(columns), dtype=old.dtype, device="meta"),
        requires_grad=old.requires_grad,
    )
    cutter.record(f"{fqn}.weight", old, columns, scale)


def kept_columns(
    blocks: Iterable[tuple[str | None, int]], gates: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Kept columns of a concatenation and their scales, as arguments for `cut_linear`.

    Args:
        blocks: concatenated blocks, in order: (feature, number of columns), with None as the
            feature for a block that stays unchanged.
        gates: gates of the kept features, as returned by `cut_tables`.

    Returns:
        (I',) int64 columns in ascending order, and (I',) fp32 scales.
    """
    gate_of_column = [
        1.0 if feature is None else gates.get(feature)
        for feature, width in blocks
        for _ in range(width)
    ]
    kept = [(i, gate) for i, gate in enumerate(gate_of_column) if gate is not None]
    columns = torch.tensor([i for i, _ in kept], dtype=torch.int64)
    return columns, torch.tensor([gate for _, gate in kept], dtype=torch.float32)
