"""A run of a few seconds: its configuration, and the command-line call that runs it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

TINY: dict[str, Any] = {
    "data": {
        "class_path": "torchrec_fmp.data.synthetic.SyntheticDataset",
        "init_args": {
            "rows": 10_000,
            "test_rows": 1000,
            "main": 2,
            "pairs": 0,
            "copies": 0,
            "noise": 3,
            "dense": 1,
            "dense_noise": 1,
            "strongest": 2.0,
            "weakest": 2.0,
            "cardinalities": [8, 16],
        },
    },
    "model": {
        "class_path": "torchrec_fmp.models.dlrm.DlrmBackbone",
        "init_args": {"embedding_dim": 8, "dense_arch": [8], "over_arch": [16]},
    },
    # Far stronger than for real data, so that gates close within 160 steps.
    "pretrain": {"fraction": 0.5, "batch_size": 32},
    "scorer": {
        "class_path": "torchrec_fmp.scorers.hard_concrete.HardConcreteScorer",
        "init_args": {
            "learning_rate": 0.2,
            "open_fraction": 0.3,
            "penalty": {
                "class_path": "torchrec_fmp.gates.penalty.L0Penalty",
                "init_args": {"weight": 0.015},
            },
        },
    },
    "train": {"batch_size": 100, "log_interval": 7},
}


def tiny(**settings: Any) -> dict[str, Any]:
    """The configuration with settings by path, `__` between the parts: `train__batch_size=8`."""
    config = copy.deepcopy(TINY)
    for path, value in settings.items():
        *parents, name = path.split("__")
        section = config
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return config


def write_config(directory: Path, config: dict[str, Any]) -> str:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return str(path)
