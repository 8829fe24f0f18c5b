"""Gated collections under every sharding type and kernel that TorchRec runs on CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import (
    ShardingPlan,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.support.explicit_plans import FLAT, HIERARCHICAL, Placement, collection_plan, hosts_of
from tests.support.gated_dlrm import Tensors, local, set_open
from tests.support.process_group import ProcessGroup
from torchrec_fmp.gates.attach import attach_gates, feature_gates
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.sharded import sharders

BATCH_SIZE = 5
STEPS = 3
LEARNING_RATE = 0.5

ON_FLAT = [
    Placement(sharding, kernel)
    for sharding in FLAT
    for kernel in (("dense",) if sharding == "data_parallel" else ("fused", "dense"))
]
ON_HOSTS = [
    *ON_FLAT,
    *(Placement(s, kernel) for s in HIERARCHICAL for kernel in ("fused", "dense")),
]


# The only placement under which TorchRec's plain collection trains on CPU with a batch size for
# each feature (docs/shardings.md).
VARIABLE_BATCH = Placement("table_wise", "fused")


@dataclass(frozen=True)
class Case:
    """A model of several collections.

    Args:
        placement: placement of every table.
        gates: gate configuration; None for the plain model.
        variable_batch: whether batch sizes differ between features.
        expanded: whether those batches are expanded to one size by their `inverse_indices`.
        mean: pooling of the tables `t_mean` and `t_weighted_mean`.
        optimizer: type of the fused optimizer.
    """

    placement: Placement
    gates: GateConfig | None = None
    variable_batch: bool = False
    expanded: bool = False
    mean: PoolingType = PoolingType.MEAN
    optimizer: EmbOptimType = EmbOptimType.EXACT_ROWWISE_ADAGRAD


def table(
    name: str, rows: int, dim: int, pooling: PoolingType, *features: str
) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(
        name=name,
        num_embeddings=rows,
        embedding_dim=dim,
        feature_names=list(features),
        pooling=pooling,
    )


class Model(nn.Module):
    """Mixed dimensions, both poolings, a shared table, a weighted and a one-table collection."""

    def __init__(self, mean: PoolingType) -> None:
        super().__init__()
        total = PoolingType.SUM
        self.ebc = EmbeddingBagCollection(
            [
                table("t_shared", 21, 16, total, "a", "b"),
                table("t_wide", 13, 32, total, "c"),
                table("t_mean", 10, 16, mean, "d"),
            ]
        )
        self.weighted = EmbeddingBagCollection(
            [table("t_weighted", 17, 16, total, "e"), table("t_weighted_mean", 8, 32, mean, "f")],
            is_weighted=True,
        )
        self.alone = EmbeddingBagCollection([table("t_alone", 7, 16, total, "g")])
        self.over = nn.Linear(2 * 16 + 32 + 16 + 16 + 32 + 16, 1)

    def forward(self, plain: KeyedJaggedTensor, weighted: KeyedJaggedTensor) -> Tensor:
        """Logits (B,)."""
        embeddings = {
            **self.ebc(plain).to_dict(),
            **self.weighted(weighted).to_dict(),
            **self.alone(plain).to_dict(),
        }
        return self.over(torch.cat([embeddings[key] for key in "abcdefg"], 1)).squeeze(1)


def whole_model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = Model(case.mean)
    return model if case.gates is None else attach_gates(model, case.gates)


def shard(case: Case) -> DistributedModelParallel:
    """The sharded model with the weights of the whole one."""
    whole = whole_model(case)
    fused = {"optimizer": case.optimizer, "learning_rate": LEARNING_RATE}
    names = ("ebc", "weighted", "alone")
    plan = ShardingPlan({name: collection_plan(whole, name, case.placement) for name in names})
    dmp = DistributedModelParallel(
        copy.deepcopy(whole),
        device=torch.device("cpu"),
        plan=plan,
        sharders=sharders(fused),
    )
    # On CPU the sharded tables start from new random weights.
    dmp.load_state_dict(whole.state_dict())
    return dmp


Inputs = tuple[KeyedJaggedTensor, KeyedJaggedTensor, Tensor]


def batches(case: Case) -> Iterator[Inputs]:
    """Plain features, weighted features and labels, which differ between ranks."""
    generator = torch.Generator().manual_seed(1000 + dist.get_rank())
    for _ in range(STEPS):
        plain = features("gdcba", case.variable_batch, generator)
        weighted = features("fe", case.variable_batch, generator, weighted=True)
        labels = torch.rand(BATCH_SIZE, generator=generator)
        if case.expanded:
            plain, weighted = expand(plain), expand(weighted)
        yield plain, weighted, labels


def expand(some: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The same examples, with a separate bag per example for every feature."""
    bags: list[Tensor] = []
    weights: list[Tensor] = []
    for jagged, row in zip(some.to_dict().values(), some.inverse_indices()[1], strict=True):
        lengths = jagged.lengths().tolist()
        bags += [jagged.values().split(lengths)[i] for i in row]
        if some.weights_or_none() is not None:
            weights += [jagged.weights().split(lengths)[i] for i in row]
    return KeyedJaggedTensor(
        keys=some.keys(),
        values=torch.cat(bags),
        lengths=torch.tensor([len(bag) for bag in bags]),
        weights=torch.cat(weights) if weights else None,
    )


def features(
    keys: str, variable_batch: bool, generator: torch.Generator, weighted: bool = False
) -> KeyedJaggedTensor:
    # Distinct bags of a feature; several examples may share one.
    sizes = [1 + i % BATCH_SIZE if variable_batch else BATCH_SIZE for i in range(len(keys))]
    lengths = torch.randint(0, 4, (sum(sizes),), generator=generator)
    total = int(lengths.sum())
    inverse = [torch.randint(0, size, (BATCH_SIZE,), generator=generator) for size in sizes]
    variable = {
        "stride_per_key_per_rank": [[size] for size in sizes],
        "inverse_indices": (list(keys), torch.stack(inverse)),
    }
    return KeyedJaggedTensor(
        keys=list(keys),
        values=torch.randint(0, 7, (total,), generator=generator),
        lengths=lengths,
        weights=torch.rand(total, generator=generator) if weighted else None,
        **(variable if variable_batch else {}),
    )


class Trained(NamedTuple):
    """Results of a few steps of a model, under the plain model's names, and its gates."""

    steps: list[Tensors]
    state: Tensors
    log_alphas: Tensors


def trained(case: Case, is_open: bool, local_size: int) -> Trained:
    with hosts_of(local_size):
        dmp = shard(case)
    set_open(dmp, is_open)
    # With gates, DistributedDataParallel's bucket holds log_alpha too, and gloo adds the gradients
    # of more than two ranks in an order that depends on the place in the bucket.
    constant = () if dist.get_world_size() <= 2 else ("over.weight", "over.bias")
    parameters = {
        name: parameter
        for name, parameter in in_backward_optimizer_filter(dmp.named_parameters())
        if name not in constant
    }
    optimizer = torch.optim.SGD([{"params": [*parameters.values()]}], lr=LEARNING_RATE)
    steps = []
    for plain, weighted, labels in batches(case):
        optimizer.zero_grad()
        logits = dmp(plain, weighted)
        nn.functional.binary_cross_entropy_with_logits(logits, labels).backward()
        gradients = {
            name: parameter.grad.clone()
            for name, parameter in parameters.items()
            if parameter.grad is not None
        }
        optimizer.step()
        steps.append(plain_names({"logits": logits.detach(), **gradients}))
    state = local(dmp.state_dict()) | local({"fused": dmp.fused_optimizer.state_dict()["state"]})
    log_alphas = {fqn: gates.log_alpha.detach().clone() for fqn, gates in feature_gates(dmp)}
    return Trained(steps, plain_names(state), log_alphas)


def plain_names(tensors: Tensors) -> Tensors:
    return {
        name.replace("._embedding_bag_collection", ""): tensor
        for name, tensor in tensors.items()
        if not name.endswith(("log_alpha", "_extra_state"))
    }


def assert_equal(expected: Tensors, computed: Tensors, where: str) -> None:
    assert expected.keys() == computed.keys(), where
    for name, tensor in expected.items():
        assert torch.equal(computed[name], tensor), f"{where}, {name}"


def check_open_gates(group: ProcessGroup, case: Case, local_size: int) -> None:
    gated_case = replace(case, gates=GateConfig())
    plain = group.run(trained, case, True, local_size)
    gated = group.run(trained, gated_case, True, local_size)
    for rank, (expected, computed) in enumerate(zip(plain, gated, strict=True)):
        for step, pair in enumerate(zip(expected.steps, computed.steps, strict=True)):
            assert_equal(*pair, f"rank {rank}, step {step}")
        assert_equal(expected.state, computed.state, f"rank {rank}")
        assert len(computed.log_alphas) == 3
    has_fused_state = any("fused/" in name for of_rank in plain for name in of_rank.state)
    assert has_fused_state == (case.placement.kernel != "dense")


@pytest.mark.parametrize("placement", ON_FLAT, ids=str)
def test_open_gates_change_no_bit_on_one_host(ranks_2: ProcessGroup, placement: Placement) -> None:
    check_open_gates(ranks_2, Case(placement), 2)


@pytest.mark.parametrize("placement", ON_HOSTS, ids=str)
def test_open_gates_change_no_bit_on_two_hosts(ranks_4: ProcessGroup, placement: Placement) -> None:
    check_open_gates(ranks_4, Case(placement), 2)


def check_sampled_gates(group: ProcessGroup, case: Case) -> None:
    """With SGD, every placement does the same arithmetic, so the gates must train alike."""
    reference = replace(case, placement=VARIABLE_BATCH)
    for expected, computed in zip(
        group.run(trained, reference, False, 2),
        group.run(trained, case, False, 2),
        strict=True,
    ):
        for fqn, log_alpha in expected.log_alphas.items():
            assert (log_alpha != GateConfig().initial_log_alpha).all(), fqn
            torch.testing.assert_close(computed.log_alphas[fqn], log_alpha, rtol=0, atol=1e-5)
        for step, other in zip(expected.steps, computed.steps, strict=True):
            torch.testing.assert_close(other["logits"], step["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("placement", ON_HOSTS, ids=str)
def test_sampled_gates_train_alike_under_every_placement(
    ranks_4: ProcessGroup, placement: Placement
) -> None:
    # TorchRec's own mean pooling depends on the placement: see its test below.
    case = Case(placement, GateConfig(), mean=PoolingType.SUM, optimizer=EmbOptimType.EXACT_SGD)
    check_sampled_gates(ranks_4, case)


def test_open_gates_change_no_bit_with_a_batch_size_per_feature(
    ranks_4: ProcessGroup,
) -> None:
    check_open_gates(ranks_4, Case(VARIABLE_BATCH, variable_batch=True), 2)


@pytest.mark.parametrize(("sampling", "centered"), [("example", True), ("batch", False)])
def test_sampled_gates_with_a_batch_size_per_feature_train_as_on_the_expanded_batch(
    ranks_4: ProcessGroup, sampling: Literal["example", "batch"], centered: bool
) -> None:
    # Not 0: near 0, a change by the rounding error of a zero gradient would count as a move.
    gates = GateConfig(initial_log_alpha=1.5, sampling=sampling, centered=centered)
    case = Case(VARIABLE_BATCH, gates, variable_batch=True, optimizer=EmbOptimType.EXACT_SGD)
    for expected, computed in zip(
        ranks_4.run(trained, replace(case, expanded=True), False, 2),
        ranks_4.run(trained, case, False, 2),
        strict=True,
    ):
        # Two features have one bag for all examples, from which a centered gate learns nothing.
        moved = torch.cat([*expected.log_alphas.values()]) != gates.initial_log_alpha
        assert moved.sum() == (5 if centered else 7)
        close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
        close(computed.log_alphas, expected.log_alphas)
        close(computed.steps, expected.steps)
        close(computed.state, expected.state)


def means(placement: Placement) -> tuple[Tensor, Tensor]:
    """Plain TorchRec's mean pooling, unweighted and weighted."""
    case = Case(placement)
    with hosts_of(2):
        model = shard(case).module
    plain, weighted, _ = next(batches(case))
    with torch.no_grad():
        ebc, weighted_ebc = model.get_submodule("ebc"), model.get_submodule("weighted")
        return ebc(plain).to_dict()["d"].clone(), weighted_ebc(weighted).to_dict()["f"].clone()


@pytest.mark.parametrize(
    ("sharding", "unweighted_is_equal"), [("row_wise", True), ("grid_shard", False)]
)
def test_torchrecs_own_mean_pooling_depends_on_the_sharding_type(
    ranks_4: ProcessGroup, sharding: str, unweighted_is_equal: bool
) -> None:
    """A prune that changes the sharding type of such a table must know this; docs/shardings.md."""
    by_table = ranks_4.run(means, Placement("table_wise", "fused"))
    others = ranks_4.run(means, Placement(sharding, "fused"))
    for (mean, weighted), (other_mean, other_weighted) in zip(by_table, others, strict=True):
        assert torch.allclose(mean, other_mean, rtol=0, atol=1e-5) == unweighted_is_equal
        assert not torch.allclose(weighted, other_weighted, rtol=0, atol=1e-2)
