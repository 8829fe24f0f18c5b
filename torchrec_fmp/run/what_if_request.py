"""The `plan` verb: plans a config with features dropped, without ranks and weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jsonargparse import ArgumentError, ArgumentParser

from torchrec_fmp.embeddings.collections import features_by_table
from torchrec_fmp.gates.attach import attach_gates
from torchrec_fmp.planning.planner import planner_for
from torchrec_fmp.planning.replan import narrowed_planner
from torchrec_fmp.planning.what_if import WhatIf, what_if
from torchrec_fmp.run.config import load_config
from torchrec_fmp.run.what_if_config import TopologyConfig, check_known, load_what_if
from torchrec_fmp.selection.selection import FeatureDecision, Selection
from torchrec_fmp.strict import ConfigError, read_yaml
from torchrec_fmp.surgery.blueprint import blueprint
from torchrec_fmp.surgery.cut import cut
from torchrec_fmp.training.job import table_sharders


@dataclass(frozen=True)
class Request:
    """The config to plan, and the features to drop.

    Args:
        config: path of a what-if (it has `groups`) or of a run.
        drop: names of features to drop.
        selection: path of a selection file.
        keep_fraction: fraction of each group's features to keep, the first ones; for a what-if
            only.
        overrides: overrides of the config. A run has no ranks yet; `--topology.*` defines them.
    """

    config: str
    drop: Sequence[str] = ()
    selection: str | None = None
    keep_fraction: float | None = None
    overrides: Sequence[str] = ()


def run(request: Request) -> WhatIf:
    """Plans the model before and after the features are dropped.

    Raises:
        ConfigError: for a config that cannot be used.
        ValueError: for features that the model does not have, nothing to drop, or a model that
            does not fit on the ranks.
        TypeError: if a module of a run's model has no cut rule.
        FileNotFoundError: if a file is missing.
    """
    if "groups" in read_yaml(request.config):
        return _run_what_if(request)
    return _run_job(request)


def _run_what_if(request: Request) -> WhatIf:
    config = load_what_if(request.config, request.overrides)
    groups = config.features()
    dropped = _dropped(request, [name for names in groups.values() for name in names])
    if request.keep_fraction is not None:
        if not 0 < request.keep_fraction <= 1:
            raise ValueError(f"keep-fraction is {request.keep_fraction}; it must be in (0, 1]")
        for names in groups.values():
            dropped += names[math.ceil(request.keep_fraction * len(names)) :]
    _check_dropped(dropped)
    model, smaller_model = config.build(), config.build(dropped)
    return what_if(
        model,
        smaller_model,
        config.build_planner(model),
        config.build_planner(smaller_model),
        config.sharders(),
        config.steps_left,
    )


def _run_job(request: Request) -> WhatIf:
    if request.keep_fraction is not None:
        raise ValueError(
            "--keep-fraction is only for a what-if: for a run, give --selection or --drop"
        )
    topology_overrides, others = _split(request.overrides)
    config, _ = load_config(request.config, others)
    schema, meta = config.data.schema, torch.device("meta")
    model = config.model.build(schema, meta)
    attach_gates(model, config.gates, config.model.dense_modules(schema))
    dropped = _dropped(request, [*schema.sparse_names, *schema.dense])
    _check_dropped(dropped)
    gone = set(dropped)
    selection = Selection(
        {
            name: FeatureDecision(0.0, float(name not in gone), name not in gone, "planned")
            for name in (*schema.sparse_names, *schema.dense)
        }
    )
    plain = blueprint(model)
    tables = features_by_table(plain.model)
    planner = planner_for(
        config.planner, tables, config.train.batch_size, _topology(topology_overrides).build()
    )
    model_sharders = table_sharders(config.train)
    smaller_model = cut(plain, selection).model
    smaller_planner = narrowed_planner(planner, plain.model, smaller_model)
    return what_if(plain.model, smaller_model, planner, smaller_planner, model_sharders)


def _dropped(request: Request, known: Sequence[str]) -> list[str]:
    """The features that the selection and the command line drop."""
    dropped = list(request.drop)
    if request.selection is not None:
        selection = Selection.load(request.selection)
        check_known(list(selection.features), known)
        dropped += selection.dropped
    check_known(dropped, known)
    return dropped


def _check_dropped(dropped: Sequence[str]) -> None:
    if not dropped:
        raise ValueError("nothing is dropped: give --drop, --selection or --keep-fraction")


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the topology, which is not a section of a run's config, and all others."""
    topology: list[str] = []
    others: list[str] = []
    chosen = others
    for argument in overrides:
        if argument.startswith("--"):
            chosen = topology if argument.startswith("--topology.") else others
        chosen.append(argument)
    return topology, others


def _topology(overrides: Sequence[str]) -> TopologyConfig:
    parser = ArgumentParser(prog="torchrec-fmp plan", exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(TopologyConfig, "topology")
    try:
        settings = parser.parse_args(list(overrides))
        topology: TopologyConfig = parser.instantiate(settings).topology
    except ArgumentError as error:
        raise ConfigError(str(error)) from error
    return topology
