"""Names and settings of data sets, backbones and scorers, all in this one place.

They are sections of a run's YAML, so that a cell runs what `torchrec-fmp run` would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
FRACTIONS = (0.75, 0.5, 0.25)

# Raw files that `prepare` reads, each with string fields, a `label`, and `is_test`.
REAL = ("flights13", "diabetes130", "census_kdd")

PRETRAIN: dict[str, Any] = {"fraction": 0.12}

# With which the full model is at its best; continuing uses the same.
TRAIN: dict[str, dict[str, Any]] = {
    "flights13": {"batch_size": 512},
    "diabetes130": {"batch_size": 256},
    "census_kdd": {
        "batch_size": 256,
        "learning_rate": 2e-3,
        "embedding_learning_rate": 5e-2,
    },
}
TRAIN_ELSE: dict[str, Any] = {"batch_size": 256}

# Arguments of SyntheticDataset by name, which says how many features there are. One label in ten is
# positive, in planted28 three; noise reaches from two values to a million.
_IMBALANCED = {"bias": -3.5, "noise_cardinalities": [2, 1_000_000]}
PLANTED: dict[str, dict[str, Any]] = {
    "planted24": {**_IMBALANCED, "main": 6, "noise": 7, "cardinalities": [10, 1000]},
    "planted24_wide": {**_IMBALANCED, "main": 6, "noise": 7, "cardinalities": [10, 10_000]},
    "planted28": {},
    "planted60": {
        **_IMBALANCED,
        "main": 12,
        "pairs": 3,
        "copies": 5,
        "noise": 27,
        "dense": 3,
        "dense_noise": 3,
        "multi_valued": 2,
        "multi_valued_noise": 2,
        "strongest": 0.7,
        "weakest": 0.25,
        "cardinalities": [10, 1000],
    },
    "planted100": {
        **_IMBALANCED,
        "main": 20,
        "pairs": 4,
        "copies": 8,
        "noise": 50,
        "dense": 4,
        "dense_noise": 4,
        "multi_valued": 3,
        "multi_valued_noise": 3,
        "strongest": 0.6,
        "weakest": 0.25,
        "cardinalities": [10, 1000],
    },
    "planted400": {
        **_IMBALANCED,
        "main": 40,
        "pairs": 10,
        "copies": 20,
        "noise": 290,
        "dense": 8,
        "dense_noise": 8,
        "multi_valued": 6,
        "multi_valued_noise": 8,
        "strongest": 0.5,
        "weakest": 0.25,
        "bias": -4.0,
        "cardinalities": [10, 1000],
        "noise_cardinalities": [2, 100_000],
    },
}
# Planted features whose effect adds less to the AUC are too weak to be missed.
STRONG = 1e-3
# In the grid, which trains on all of them three times.
PLANTED_ROWS = {"rows": 200_000, "test_rows": 100_000}

BACKBONES: dict[str, dict[str, Any]] = {
    "dlrm": {
        "class_path": "DlrmBackbone",
        "init_args": {"embedding_dim": 16, "dense_arch": [64], "over_arch": [128, 64]},
    },
    "deepfm": {"class_path": "DeepFmBackbone"},
    # Its defaults are those of ERASE.
    "mlp": {"class_path": "MlpBackbone"},
}

# The scorer that the others are compared with.
OURS = "hard_concrete"
SCORERS: dict[str, dict[str, dict[str, Any]]] = {
    OURS: {"scorer": {"class_path": "HardConcreteScorer"}},
    "sfs": {"scorer": {"class_path": "SfsScorer"}},
    "taylor": {"scorer": {"class_path": "TaylorScorer"}},
    "permutation": {"scorer": {"class_path": "PermutationScorer"}},
    "autofield": {"scorer": {"class_path": "AutoFieldScorer"}},
    "adafs": {"scorer": {"class_path": "AdaFsScorer"}},
    "optfs": {"scorer": {"class_path": "OptFsScorer"}},
    "lpfs": {"scorer": {"class_path": "LpfsScorer"}},
    "shuffle_gate": {"scorer": {"class_path": "ShuffleGateScorer"}},
    "concrete_dropout": {"scorer": {"class_path": "ConcreteDropoutScorer"}},
    "gradient_boosted_trees": {"scorer": {"class_path": "GradientBoostedTreesScorer"}},
    "random_forest": {"scorer": {"class_path": "RandomForestScorer"}},
    "lasso": {"scorer": {"class_path": "LassoScorer"}},
    "mutual_information": {"scorer": {"class_path": "MutualInformationScorer"}},
    "cardinality": {"scorer": {"class_path": "CardinalityScorer"}},
    "random": {"scorer": {"class_path": "RandomScorer"}},
}

# Hard concrete gates again, with one thing changed: see docs/method.md. Variants of continued
# training, or of the target, run at one kept fraction, because all fractions share a scoring.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "started_open": {
        "gates": {"initial_log_alpha": 1.5},
        "scorer": {"class_path": "HardConcreteScorer", "init_args": {"open_fraction": 0.4}},
    },
    "twice_the_rows": {"pretrain": {"fraction": 0.24}},
    "four_times_the_rows": {"pretrain": {"fraction": 0.48}},
    "prefix": {"pretrain": {"subset": {"class_path": "Prefix"}}},
    "stratified": {"pretrain": {"subset": {"class_path": "Stratified"}}},
    "recent_resampling": {"pretrain": {"subset": {"class_path": "RecentResampling"}}},
    "target": {
        "scorer": {
            "class_path": "HardConcreteScorer",
            "init_args": {"penalty": {"class_path": "TargetPenalty", "init_args": {"keep": 0.5}}},
        }
    },
    "reinitialized": {"continuation": {"start": "reinitialized"}},
    "rewound": {"continuation": {"start": "rewound"}},
    "warmup": {"continuation": {"warmup_steps": 50}},
    "two_prunes": {"schedule": {"class_path": "Gradual", "init_args": {"prunes": 2}}},
}


def sections(name: str) -> dict[str, dict[str, Any]]:
    """What a scorer or a variant changes in a run's YAML."""
    if name in VARIANTS:
        return SCORERS[OURS] | VARIANTS[name]
    return SCORERS[name]


def shared_config(data: str, backbone: dict[str, Any]) -> dict[str, Any]:
    """The sections that all cells of a data set and backbone share, without `data` and `seed`.

    configs/<data>.yaml, or the demo's for planted data, with the settings above on top.
    """
    file = CONFIGS / f"{'demo' if data in PLANTED else data}.yaml"
    base = yaml.safe_load(file.read_text()) if file.exists() else {}
    config = {name: base[name] for name in base if name not in ("data", "scorer", "reference")}
    config["model"] = backbone
    config["pretrain"] = {**config.get("pretrain", {}), **PRETRAIN}
    config["train"] = {**config.get("train", {}), **TRAIN.get(data, TRAIN_ELSE)}
    return config
