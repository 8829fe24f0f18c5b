"""The configuration of a run: composed of its parts' own dataclasses, strict, YAML."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pydoc import locate
from types import ModuleType
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from torchrec_fmp import data, models, paths, policies, schedules, scores
from torchrec_fmp.data.columns import BadInput
from torchrec_fmp.data.dataset import Dataset
from torchrec_fmp.data.subset import Random, Subset
from torchrec_fmp.gates.feature_gates import GateConfig
from torchrec_fmp.gates.penalty import Penalty
from torchrec_fmp.models.backbone import Backbone
from torchrec_fmp.planning.planner import PlannerConfig
from torchrec_fmp.planning.replan import Replan
from torchrec_fmp.policies.best_size import BestSize
from torchrec_fmp.policies.closed_gates import ClosedGates
from torchrec_fmp.policies.policy import Policy
from torchrec_fmp.reshard.reshard import MoveConfig
from torchrec_fmp.schedules.one_shot import OneShot
from torchrec_fmp.schedules.schedule import Schedule
from torchrec_fmp.scores.hard_concrete import HardConcreteScorer
from torchrec_fmp.scores.scorer import Scorer

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration that cannot be used; says which option, and what would be right."""


@dataclass(frozen=True)
class TrainConfig:
    """Training in both phases, and of the reference model.

    Args:
        batch_size: rows a step on each rank, outside of pretraining.
        learning_rate: of Adam, for the dense parameters.
        embedding_learning_rate: of the tables' optimizer.
        embedding_optimizer: of the tables, fused into the backward pass. With `adam` they may be
            data-parallel, and on CPU, where FBGEMM has no fused Adam, they must be:
            `torch.optim.Adam` trains these, and moves rows that a batch does not read by their
            momentum, where the fused one leaves them alone.
        shuffle: permute row groups and the rows in them; otherwise the data's order is kept.
        bad_input: raise at values that cannot be trained on, or replace and count them.
        workers: threads that decode ahead; they do not change the order.
        log_interval: steps between two lines of metrics.jsonl.
    """

    batch_size: int = 1024
    learning_rate: float = 5e-3
    embedding_learning_rate: float = 2e-2
    embedding_optimizer: Literal["rowwise_adagrad", "adam"] = "rowwise_adagrad"
    shuffle: bool = False
    bad_input: BadInput = "raise"
    workers: int = 1
    log_interval: int = 20

    def __post_init__(self) -> None:
        check_positive(self, "train", "batch_size", "learning_rate", "embedding_learning_rate")
        check_positive(self, "train", "log_interval")
        if self.workers < 0:
            raise ValueError(f"train.workers is {self.workers}, it must be at least 0")


@dataclass(frozen=True)
class PretrainConfig:
    """The phase in which features are scored, on a part of the data.

    Args:
        fraction: of the training rows; not used where `samples` is given.
        samples: training rows, over all ranks; rounded down to whole batches of every rank.
        batch_size: rows a step on each rank; by default as in training. Smaller ones move the
            gates further on the same rows, and take longer.
        subset: which rows; the others are for going on.
    """

    fraction: float = 0.2
    samples: int | None = None
    batch_size: int | None = None
    subset: Subset = field(default_factory=Random)

    def __post_init__(self) -> None:
        check_positive(self, "pretrain", "fraction")
        if self.fraction > 1:
            raise ValueError(f"pretrain.fraction is {self.fraction}, it must be at most 1")
        for name in ("samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"pretrain.{name} is {value}, it must be at least 1")

    def rows_of(self, rows: int) -> int:
        """How many of `rows` training rows are for pretraining."""
        return int(self.fraction * rows) if self.samples is None else self.samples


@dataclass(frozen=True)
class ContinuationConfig:
    """What training goes on from after the prune.

    Args:
        start: `carried`, the weights and optimizer states that the prune has moved; `rewound`, the
            weights that the surviving parameters had after `rewind_steps` steps of pretraining,
            with new optimizer states; `reinitialized`, a newly initialized model of the features
            that stay, under a plan of its own.
        rewind_steps: 0 are the initial weights.
        warmup_steps: over which the learning rates rise linearly, of dense parameters and tables.
    """

    start: Literal["carried", "rewound", "reinitialized"] = "carried"
    rewind_steps: int = 0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("rewind_steps", "warmup_steps"):
            if getattr(self, name) < 0:
                value = getattr(self, name)
                raise ValueError(f"continuation.{name} is {value}, it must be at least 0")
        if self.rewind_steps and self.start != "rewound":
            raise ValueError(
                f"continuation.rewind_steps is {self.rewind_steps}, which only start: rewound "
                f"reads, and start is {self.start}"
            )


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Args:
        data: the data set.
        model: the backbone.
        gates: start and noise of the gates.
        pretrain: the rows that features are scored on.
        scorer: what scores them; by default, gates that are trained with the model.
        policy: which features go.
        schedule: in one prune, or in several with training in between.
        parity_tolerance: largest difference allowed between gated and pruned logits.
        train: both phases' training.
        planner: what TorchRec's planner may choose from.
        replan: whether tables that survive move to the planner's new plan; see `prune`.
        move: how tables move.
        continuation: what training goes on from after the prune.
        reference: also train the unpruned model, on all rows in their own order.
        seed: of weights, shuffling and, added to gates.seed, gate noise.
    """

    data: Dataset
    model: Backbone
    gates: GateConfig = field(default_factory=GateConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    scorer: Scorer = field(default_factory=HardConcreteScorer)
    policy: Policy = field(default_factory=ClosedGates)
    schedule: Schedule = field(default_factory=OneShot)
    parity_tolerance: float = 1e-6
    train: TrainConfig = field(default_factory=TrainConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    replan: Replan = "auto"
    move: MoveConfig = field(default_factory=MoveConfig)
    continuation: ContinuationConfig = field(default_factory=ContinuationConfig)
    reference: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.parity_tolerance >= 0:
            raise ValueError(f"parity_tolerance is {self.parity_tolerance}, it must be at least 0")
        if self.planner.replicates and self.train.embedding_optimizer != "adam":
            raise ValueError(
                "data_parallel tables train with the dense optimizer. A run's is Adam, whose "
                f"states are not those of {self.train.embedding_optimizer}, so they could not move "
                "to or from other sharding types when the model is planned again: set "
                "train.embedding_optimizer to adam, or other planner.sharding_types"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, it must be at least 0")
        stops = isinstance(self.scorer, HardConcreteScorer) and self.scorer.stop is not None
        if stops and isinstance(self.policy, BestSize):
            raise ValueError(
                "policy BestSize decides by validation losses that are measured when pretraining "
                "has ended, and scorer.stop ends pretraining when the decision is stable: leave "
                "one of them out"
            )
        if self.continuation.start == "rewound" and self.schedule.prunes > 1:
            raise ValueError(
                f"continuation.start is rewound and the schedule has {self.schedule.prunes} "
                "prunes: the weights of an early step belong to a model before the last prune. Use "
                "start: carried or reinitialized, or the schedule OneShot"
            )

    @property
    def pretrain_batch_size(self) -> int:
        """Rows a step of pretraining on each rank."""
        return self.pretrain.batch_size or self.train.batch_size


def load_config(path: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, str]:
    """Reads a YAML file and applies overrides such as `--train.batch_size 512`.

    Returns:
        The configuration, and the composed YAML, which gives it again.

    Raises:
        ConfigError: for unknown options, wrong types or values, and keys given twice.
        FileNotFoundError: if there is no such file.
    """
    return load(path, overrides, RunConfig, _parser())


def load(
    path: str, overrides: Sequence[str], root: type[Config], parser: ArgumentParser
) -> tuple[Config, str]:
    """The same for any dataclass whose fields are the sections that `parser` knows."""
    content = read_yaml(path)
    _check_sections(content, path, root)
    try:
        settings = parser.parse_object(content)
        settings = parser.parse_args(list(overrides), namespace=settings)
        composed = parser.dump(settings)
        parts = parser.instantiate(settings)
        names = [section.name for section in fields(root)]  # type: ignore[arg-type]
        config = root(**{name: getattr(parts, name) for name in names})
    except ArgumentError as error:
        raise ConfigError(f"{path}: {_explain(str(error), parser, root)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return config, composed


def read_yaml(path: str) -> dict[str, Any]:
    """The sections of a YAML file.

    Raises:
        ConfigError: if it is no mapping, or gives a key twice.
        FileNotFoundError: if there is no such file.
    """
    with paths.open_path(path) as file:
        text = file.read()
    try:
        content = yaml.load(text, Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a YAML mapping of sections")
    return content


def _import_all(package: ModuleType) -> None:
    """Makes the classes of a package known, so that YAML may name them without their module."""
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


# What YAML names by class.
_NAMED_BASES = (Dataset, Subset, Backbone, Penalty, Policy, Schedule, Scorer)


def _parser() -> ArgumentParser:
    for package in (data, models, policies, schedules, scores):
        _import_all(package)
    parser = ArgumentParser(prog="torchrec-fmp run", exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(RunConfig)
    # An instance as default could not be written into the composed YAML.
    parser.set_defaults(
        {
            "policy": {"class_path": _class_path(ClosedGates)},
            "pretrain.subset": {"class_path": _class_path(Random)},
            "schedule": {"class_path": _class_path(OneShot)},
            "scorer": {"class_path": _class_path(HardConcreteScorer)},
        }
    )
    return parser


def _class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _explain(message: str, parser: ArgumentParser, root: type[Any]) -> str:
    """Adds the nearest valid option or class to a message about an unknown one."""
    sections = [section.name for section in fields(root)]
    known = [a.dest for a in parser._actions if a.dest.partition(".")[0] in sections]
    for class_path in re.findall(r"class_path '([\w.]+)'", message):
        located = locate(class_path)
        if callable(located):
            known += list(inspect.signature(located).parameters)
    unknown = re.findall(r"--([\w.]+)|[Oo]ption '([\w.]+)'", message)
    names = [part for match in unknown for part in match if part and part not in known]
    near = [match for name in names for match in nearest(name, known)]
    classes = [cls.__name__ for base in _NAMED_BASES for cls in base.__subclasses__()]
    for name in re.findall(r"import path string: (\w+)", message):
        near += nearest(name, classes)
    return f"{message}. Did you mean '{near[0]}'?" if near else message


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """The known name most like `name`, if any is."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.5)


def _check_sections(content: Mapping[str, object], path: str, root: type[Any]) -> None:
    known = [section.name for section in fields(root)]
    for name in content:
        if name not in known:
            near = "".join(f" Did you mean '{match}'?" for match in nearest(str(name), known))
            raise ConfigError(f"{path}: there is no section '{name}'.{near} There are {known}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that is given twice in one mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: '{key}' is given twice")
        return super().construct_mapping(node, deep)


def check_positive(config: object, section: str, *names: str) -> None:
    """Raises ValueError for the first of the attributes that is not positive and finite."""
    for name in names:
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{section}.{name} is {value}, it must be positive and finite")
