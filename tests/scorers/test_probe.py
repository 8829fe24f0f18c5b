"""A probe passes the model's inputs to a scorer, and the scorer's values to the model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.support.process_group import ProcessGroup
from tests.support.scoring import hooks_left, logits_of, make_pretraining, sequence_pretraining
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.scorers.features import features_of
from torchrec_fmp.scorers.pretraining import Pretraining
from torchrec_fmp.scorers.probe import Block, observed, probed


def check_gates(pretraining: Pretraining) -> list[tuple[str, ...]]:
    """The features of the blocks of a forward pass."""
    model = pretraining.job.model
    features = features_of(model)
    batch = next(pretraining.batches(1))
    before = logits_of(pretraining, batch)
    with probed(model, lambda block: block.values):
        assert torch.equal(logits_of(pretraining, batch), before)

    values = torch.linspace(0.1, 0.9, len(features))
    per_example = values.repeat(len(batch.labels), 1)
    for module in pretraining.gates:
        module.fix(dict(zip(features, values.tolist(), strict=True)))
    expected = logits_of(pretraining, batch)
    for module in pretraining.gates:
        module.fix(None)
    assert not torch.equal(expected, before)
    blocks = []
    for gates in (values, per_example):

        def scale(block: Block, gates: Tensor = gates) -> Tensor:
            blocks.append(block.features)
            return block.scaled(block.of_keys(gates, features))

        with probed(model, scale):
            assert torch.allclose(logits_of(pretraining, batch), expected, atol=1e-6)
    assert hooks_left(model) == []
    assert torch.equal(logits_of(pretraining, batch), before)
    return blocks


def check_gates_of_dlrm(config_path: str) -> list[tuple[str, ...]]:
    return check_gates(make_pretraining(config_path))


def check_gates_of_sequences() -> list[tuple[str, ...]]:
    return check_gates(sequence_pretraining())


def test_scaling_pooled_embeddings_and_dense_columns_equals_gating_them(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    path = write_config(tmp_path, tiny(data__init_args__multi_valued=1))
    dense = ("dense_0", "dense_noise_0")
    sparse = ("main_0", "main_1", "noise_0", "noise_1", "noise_2", "multi_0")
    for blocks in run_ranks.run(check_gates_of_dlrm, path):
        assert blocks == [dense, sparse] * 2


def test_scaling_sequences_equals_gating_them(run_ranks: ProcessGroup) -> None:
    for blocks in run_ranks.run(check_gates_of_sequences):
        assert sorted(blocks) == sorted([("r",), ("s",), ("s",), ("u",), ("s", "v")] * 2)


def check_observed(config_path: str) -> None:
    pretraining = make_pretraining(config_path)
    model = pretraining.job.model
    pretraining.train(3)
    batch = next(pretraining.batches(1))
    before = logits_of(pretraining, batch)
    model.train()
    gate = torch.ones((), requires_grad=True)
    with observed(model), probed(model, lambda block: block.values * gate):
        assert not model.training
        loss, _ = model(batch)
        (gradient,) = torch.autograd.grad(loss, gate)
    assert gradient != 0
    assert model.training
    assert torch.equal(logits_of(pretraining, batch), before)
    # DistributedDataParallel does not wait for the gradients that were left out.
    pretraining.train(3)


def test_observing_gradients_does_not_train_the_tables(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    run_ranks.run(check_observed, write_config(tmp_path, tiny()))
