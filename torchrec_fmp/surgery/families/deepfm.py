"""Cut rule of TorchRec's `SimpleDeepFMNN`.

A feature whose gate is 0 contributes zeros. The deep layer loses the feature's columns. The
factorization machine takes the products of all pairs of elements, so it needs no cut. A gate
between 0 and 1 is exact only in a table's rows: the deep layer reads the embeddings linearly, but
the factorization machine does not.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchrec.models.deepfm import FMInteractionArch, SimpleDeepFMNN, SparseArch
from torchrec.modules.deepfm import DeepFM, FactorizationMachine

from torchrec_fmp.embeddings.collections import feature_widths
from torchrec_fmp.embeddings.fqns import join_fqn
from torchrec_fmp.surgery.cut_tables import cut_tables
from torchrec_fmp.surgery.linear import cut_linear, first_linear, kept_columns
from torchrec_fmp.surgery.rules import Cutter, check_parts, cut_rule


@cut_rule(SimpleDeepFMNN)
def cut_deepfm(model: SimpleDeepFMNN, fqn: str, cutter: Cutter) -> None:
    """Shrinks the tables and the deep layer of the interaction; its output keeps its size.

    Raises:
        TypeError: if a part that reads features was replaced by a module of another type.
        ValueError: if no sparse feature is left, because TorchRec's interaction then returns
            another number of columns, or if a table's features have different gates.
    """
    check_parts(model, fqn, {"sparse_arch": SparseArch, "inter_arch": FMInteractionArch})
    collection = model.sparse_arch.embedding_bag_collection
    smaller, gates = cut_tables(
        collection, join_fqn(fqn, "sparse_arch.embedding_bag_collection"), cutter
    )
    if smaller is None:
        raise ValueError(f"{fqn or 'the model'} has no sparse feature left: keep at least one")
    model.sparse_arch = SparseArch(smaller)
    widths = feature_widths(collection)
    cut_fm_interaction(model.inter_arch, join_fqn(fqn, "inter_arch"), cutter, widths, gates)


def cut_fm_interaction(
    interaction: FMInteractionArch,
    fqn: str,
    cutter: Cutter,
    widths: Mapping[str, int],
    gates: Mapping[str, float],
) -> None:
    """Shrinks TorchRec's DeepFM interaction, for the rule of any model that holds one.

    Args:
        interaction: TorchRec's interaction, changed in place.
        fqn: own fqn of the interaction.
        cutter: cutter that records the cut.
        widths: embedding dimension of each feature that the interaction reads.
        gates: gates of the kept features, as returned by `cut_tables`.

    Raises:
        TypeError: if a part was replaced, or the deep module's first layer is not known to be
            linear.
        ValueError: if a gate other than 1 is left, or no feature is left.
    """
    check_parts(interaction, fqn, {"deep_fm": DeepFM, "fm": FactorizationMachine})
    names = list(interaction.sparse_feature_names)
    kept = [name for name in names if name in gates]
    if not kept:
        raise ValueError(f"{fqn} has no sparse feature left: keep at least one")
    scaled = {name: gates[name] for name in kept if gates[name] != 1}
    if scaled:
        raise ValueError(
            f"{fqn} multiplies the features with each other, so their gates must fold into tables. "
            f"The gates {scaled} do not, because features that share a table have different gates: "
            "give them the same gate in the selection, such as 1, or separate tables"
        )
    first = first_linear(interaction.deep_fm.dense_module)
    if first is None:
        raise TypeError(
            f"{fqn}.deep_fm.dense_module is a {type(interaction.deep_fm.dense_module).__name__}, "
            "whose first layer is not known to be linear: use a Linear, Sequential or MLP"
        )
    name = join_fqn("deep_fm.dense_module", first)
    linear = interaction.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    blocks = [(feature, widths[feature]) for feature in names]
    dense = linear.in_features - sum(width for _, width in blocks)
    interaction.sparse_feature_names = kept
    cut_linear(
        linear,
        join_fqn(fqn, name),
        cutter,
        *kept_columns([(None, dense), *blocks], gates),
    )
