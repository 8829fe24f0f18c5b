"""The gradient scorers' formulas, recomputed by hand on the parts of a DLRM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import get_unwrapped_module

from tests.support.process_group import ProcessGroup
from tests.support.scoring import make_pretraining
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.embeddings.local_shards import local_shards, sharded_collections
from torchrec_fmp.scorers.sfs import SfsScorer
from torchrec_fmp.scorers.taylor import TaylorScorer


class Example(NamedTuple):
    """The model's inputs for one example, and the gradient of the example's loss."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


def examples_by_hand(config_path: str) -> list[Example]:
    """Examples of the first validation batch, after pretraining."""
    pretraining = make_pretraining(config_path)
    pretraining.train()
    (batch,) = pretraining.validation_batches(pretraining.batch_size)
    dlrm = get_unwrapped_module(pretraining.job.model).model
    (collection,) = sharded_collections(pretraining.job.model).values()
    tables = {shard.table: shard.weight for shard in local_shards(collection)}
    schema = pretraining.job.schema
    examples = []
    for i, label in enumerate(batch.labels):
        values = {
            name: tables[f"t_{name}"][batch.sparse_features[name].values()[i]].clone()
            for name in schema.sparse_names
        }
        values |= {name: batch.dense_features[i, n] for n, name in enumerate(schema.dense)}
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        dense = torch.stack([leaves[name] for name in schema.dense]).unsqueeze(0)
        embeddings = torch.stack([leaves[name] for name in schema.sparse_names]).unsqueeze(0)
        bottom = dlrm.dense_arch._module(dense)
        logit = dlrm.over_arch(dlrm.inter_arch(bottom, embeddings)).squeeze()
        loss = nn.functional.binary_cross_entropy_with_logits(logit, label)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        examples.append(Example(values, dict(zip(leaves, gradients, strict=True))))
    return examples


def sfs_and_taylor(config_path: str) -> list[tuple[Mapping[str, float], Mapping[str, float]]]:
    """Both scores of the first validation batch, each by the scorer and by hand."""
    examples = examples_by_hand(config_path)
    sfs, taylor = {}, {}
    for name in examples[0].values:
        values = torch.stack([example.values[name] for example in examples])
        gradients = torch.stack([example.gradients[name] for example in examples])
        sfs[name] = float((gradients * values).sum().abs() / len(examples))
        products = gradients * (values.mean(0) - values)
        taylor[name] = float(products.reshape(len(examples), -1).sum(1).abs().mean())
    return [
        (SfsScorer(1).score(make_pretraining(config_path)).scores, sfs),
        (TaylorScorer(1).score(make_pretraining(config_path)).scores, taylor),
    ]


def test_sfs_and_taylor_scores_are_the_papers_formulas(
    ranks_1: ProcessGroup, tmp_path: Path
) -> None:
    (outcomes,) = ranks_1.run(sfs_and_taylor, write_config(tmp_path, tiny()))
    for scores, by_hand in outcomes:
        assert scores == pytest.approx(by_hand, rel=1e-3, abs=1e-6)
