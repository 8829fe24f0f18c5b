"""Cut rule of `Mlp`, ERASE's backbone.

The first layer reads the concatenated embeddings linearly, so closed gates drop its columns and
those between 0 and 1 scale them where they do not fold into a table. The dense input has a layer of
its own, and batch normalization lies behind both: nothing is to be cut there.
"""

from __future__ import annotations

from torchrec_fmp.gates.collections import feature_widths
from torchrec_fmp.models.mlp import Mlp, regrouped
from torchrec_fmp.surgery.dense import cut_linear, kept_columns
from torchrec_fmp.surgery.rules import Cutter, cut_rule, join_fqn
from torchrec_fmp.surgery.tables import cut_tables


@cut_rule(Mlp)
def cut_mlp(model: Mlp, fqn: str, cutter: Cutter) -> None:
    """Shrinks the tables, the order of the features and the first layer.

    Raises:
        ValueError: if no sparse feature is left.
    """
    collection = model.embedding_bag_collection
    smaller, gates = cut_tables(collection, join_fqn(fqn, "embedding_bag_collection"), cutter)
    if smaller is None:
        raise ValueError(f"{fqn or 'the model'} has no sparse feature left: keep at least one")
    model.embedding_bag_collection = smaller
    model.regroup = regrouped(smaller)
    cut_linear(
        model.sparse_layer,
        join_fqn(fqn, "sparse_layer"),
        cutter,
        *kept_columns(feature_widths(collection).items(), gates),
    )
