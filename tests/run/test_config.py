"""The configuration: misspelt, mistyped and out-of-range options are refused and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.data.parquet import PreparedDataset
from torchrec_fmp.data.schema import Schema, SparseColumn
from torchrec_fmp.data.synthetic import SyntheticDataset
from torchrec_fmp.gates.penalty import L0Penalty, TargetPenalty
from torchrec_fmp.models.dlrm import DlrmBackbone
from torchrec_fmp.run.config import RunConfig, load_config
from torchrec_fmp.selection.feature_scores import FeatureScores
from torchrec_fmp.selection.policies.closed_gates import ClosedGates
from torchrec_fmp.selection.policies.policy import Policy, drop, keep
from torchrec_fmp.selection.policies.top_fraction import TopFraction
from torchrec_fmp.selection.selection import Selection
from torchrec_fmp.strict import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
TOP_FRACTION = "torchrec_fmp.selection.policies.top_fraction.TopFraction"
TARGET = "torchrec_fmp.gates.penalty.TargetPenalty"


class OutOfTree(Policy):
    """Drops features with low scores; the package does not know this policy."""

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def select(self, scores: FeatureScores) -> Selection:
        decisions = {True: keep, False: drop}
        return Selection(
            {
                name: decisions[score > self.threshold](scores, name, "by threshold")
                for name, score in scores.scores.items()
            }
        )


def load(tmp_path: Path, config: dict[str, Any], *overrides: str) -> RunConfig:
    return load_config(write_config(tmp_path, config), overrides)[0]


@pytest.mark.parametrize(
    ("settings", "misspelt", "meant"),
    [
        ({"pretrian": {}}, "pretrian", "pretrain"),
        ({"train__batchsize": 8}, "batchsize", "train.batch_size"),
        ({"gates__init_log_alpha": 1.0}, "init_log_alpha", "gates.initial_log_alpha"),
        ({"gates__distribution__temprature": 0.5}, "temprature", "temperature"),
        ({"data__init_args__rwos": 9}, "rwos", "rows"),
        ({"scorer__init_args__penalty__init_args__wieght": 1}, "wieght", "weight"),
        (
            {"policy": {"class_path": TOP_FRACTION, "init_args": {"fractoin": 0.5}}},
            "fractoin",
            "fraction",
        ),
    ],
)
def test_a_misspelt_option_in_yaml_is_an_error_that_names_the_nearest(
    tmp_path: Path, settings: dict[str, Any], misspelt: str, meant: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{misspelt}(.|\n)*Did you mean '[\w.]*{meant}'"):
        load(tmp_path, tiny(**settings))


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--sead", "seed"),
        ("--batch_size", "train.batch_size"),
        ("--train.batchsize", "train.batch_size"),
        ("--train.batch-size", "train.batch_size"),
        ("--gates.distribution.temprature", "gates.distribution.temperature"),
        ("--data.rwos", "rows"),
        ("--model.init_args.embeding_dim", "embedding_dim"),
        ("--scorer.penalty.wieght", "weight"),
    ],
)
def test_a_misspelt_override_is_an_error_that_names_the_nearest(
    tmp_path: Path, option: str, meant: str
) -> None:
    with pytest.raises(ConfigError, match=rf"Did you mean '{meant}'"):
        load(tmp_path, tiny(), option, "3")


def test_an_abbreviated_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--train\.batch 3"):
        load(tmp_path, tiny(), "--train.batch", "3")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("train.batch_size", "many"),
        ("train.batch_size", "1.5"),
        ("train.bad_input", "skip"),
        ("train.learning_rate", "nan"),
        ("reference", "ture"),
        ("gates.sampling", "row"),
        ("gates.log_alpha_bounds", "[-4, 0, 4]"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error_that_names_option_and_value(
    tmp_path: Path, option: str, value: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{option}(.|\n)*{value[1:-1]}"):
        load(tmp_path, tiny(), f"--{option}", value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train__batch_size": 0}, r"train\.batch_size is 0"),
        ({"train__learning_rate": -1e-3}, r"train\.learning_rate is -0.001"),
        ({"train__learning_rate": float("nan")}, r"train\.learning_rate is nan"),
        ({"train__embedding_learning_rate": float("inf")}, r"embedding_learning_rate is inf"),
        ({"train__log_interval": 0}, r"train\.log_interval is 0"),
        ({"train__workers": -1}, r"train\.workers is -1"),
        ({"pretrain__batch_size": -8}, r"pretrain\.batch_size is -8"),
        ({"pretrain__fraction": 0.0}, r"pretrain\.fraction is 0"),
        ({"pretrain__fraction": 1.5}, r"pretrain\.fraction is 1.5; it must be at most 1"),
        ({"scorer__init_args__learning_rate": float("nan")}, r"learning_rate is nan"),
        ({"scorer__init_args__open_fraction": 0.9}, r"open_fraction 0.9 and ramp_fraction 0.1"),
        ({"scorer__init_args__ramp_fraction": -0.1}, r"ramp_fraction -0.1 must not be negative"),
        ({"scorer__init_args__ramp_fraction": float("nan")}, r"ramp_fraction nan"),
        ({"parity_tolerance": -1.0}, r"parity_tolerance is -1"),
        ({"parity_tolerance": float("nan")}, r"parity_tolerance is nan"),
        ({"seed": -1}, r"seed is -1"),
        ({"gates__initial_log_alpha": 99.0}, r"initial_log_alpha is 99"),
        ({"gates__distribution__gamma": 0.5}, r"gamma is 0.5"),
        ({"data__init_args__rows": 0}, r"rows and test_rows must be at least 1"),
        ({"model__init_args__embedding_dim": 6}, r"embedding_dim is 6"),
        ({"planner__sharding_types": ["tablewise"]}, r"tablewise.*table_wise"),
        ({"policy": {"class_path": TOP_FRACTION, "init_args": {"fraction": 2}}}, r"keep is 2"),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_option_and_value(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(tmp_path, tiny(**settings))
    assert str(caught.value).startswith(str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"class_path": TOP_FRACTION}, "required: fraction"),
        ({"class_path": TOP_FRACTION[:-1]}, "TopFractio"),
        ({"class_path": "no_such_package.Policy"}, "no_such_package"),
        ({"class_path": "torchrec_fmp.models.dlrm.DlrmBackbone"}, "not.*a subclass of Policy"),
    ],
)
def test_a_class_that_cannot_be_used_is_an_error_that_names_it(
    tmp_path: Path, policy: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"policy(.|\n)*{message}"):
        load(tmp_path, tiny(policy=policy))


@pytest.mark.parametrize("section", ["data", "model"])
def test_data_and_model_must_be_named(tmp_path: Path, section: str) -> None:
    config = tiny()
    del config[section]
    with pytest.raises(ConfigError, match=f"required: {section}"):
        load(tmp_path, config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nreference: true\nseed: 2\n", "line 3: 'seed' is given twice"),
        ("train:\n  workers: 1\n  workers: 1\n", "line 3: 'workers' is given twice"),
        ("data: [1\n", "line 1"),
        ("- 1\n", "not a YAML mapping"),
        ("", "not a YAML mapping"),
        ("1: 2\n", "there is no section '1'"),
    ],
)
def test_invalid_yaml_is_refused_with_its_location(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"broken.yaml(.|\n)*{message}"):
        load_config(str(path))


def test_a_missing_file_is_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.yaml"):
        load_config(str(tmp_path / "absent.yaml"))


def test_overrides_win_over_yaml_and_leave_the_rest(tmp_path: Path) -> None:
    config = load(tmp_path, tiny(seed=3), "--train.batch_size", "64", "--data.rows=7000")
    assert (config.train.batch_size, config.train.log_interval, config.seed) == (64, 7, 3)
    assert isinstance(config.data, SyntheticDataset)
    assert (config.data.rows, config.data.test_rows) == (7000, 1000)
    assert isinstance(config.model, DlrmBackbone)
    assert isinstance(config.policy, ClosedGates)
    assert isinstance(config.scorer.penalty, L0Penalty)
    assert config.scorer.penalty.weight == 0.015


def settings_of(part: object) -> object:
    """A configuration as plain data, to compare parts that are not dataclasses."""
    if hasattr(part, "__dict__"):
        return {name: settings_of(value) for name, value in vars(part).items()}
    return list(part) if isinstance(part, tuple) else part


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy": {"class_path": TOP_FRACTION, "init_args": {"fraction": 0.3}}, "seed": 9},
        {"scorer__init_args__penalty": {"class_path": TARGET, "init_args": {"keep": 0.4}}},
        {"policy": {"class_path": f"{__name__}.OutOfTree", "init_args": {"threshold": 0.25}}},
        {"planner__tables": {"t_main_0": ["row_wise"]}, "reference": True},
        {"train__learning_rate": 1e-5, "gates__log_alpha_bounds": [-5, 3]},
    ],
)
def test_the_composed_yaml_gives_the_same_configuration_and_composes_to_itself(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    overrides = ["--train.shuffle", "true"]
    config, composed = load_config(write_config(tmp_path, tiny(**settings)), overrides)
    assert config.train.shuffle
    again, composed_again = load_config(write_config(tmp_path, yaml.safe_load(composed)))
    assert composed_again == composed
    assert type(again.policy) is type(config.policy)
    assert type(again.scorer.penalty) is type(config.scorer.penalty)
    assert settings_of(again) == settings_of(config)


def test_the_composed_yaml_states_every_default(tmp_path: Path) -> None:
    _, composed = load_config(write_config(tmp_path, tiny()))
    content = yaml.safe_load(composed)
    assert set(content) == set(RunConfig.__dataclass_fields__)
    assert content["gates"]["distribution"]["zeta"] == 1.1
    assert content["data"]["init_args"]["bias"] == -1.5
    assert content["policy"]["class_path"].endswith("ClosedGates")


def test_classes_outside_the_package_are_named_by_their_path(tmp_path: Path) -> None:
    policy = {"class_path": f"{__name__}.OutOfTree", "init_args": {"threshold": 0.25}}
    config = load(tmp_path, tiny(policy=policy))
    assert type(config.policy) is OutOfTree
    assert config.policy.threshold == 0.25


@pytest.mark.parametrize("shown", ["TargetPenalty", TARGET])
def test_classes_of_the_package_may_be_named_without_their_module(
    tmp_path: Path, shown: str
) -> None:
    overrides = [f"--scorer.penalty={shown}", "--scorer.penalty.keep", "0.25"]
    policy = {"class_path": "TopFraction", "init_args": {"fraction": 0.5}}
    config = load(tmp_path, tiny(policy=policy), *overrides)
    assert isinstance(config.scorer.penalty, TargetPenalty)
    assert config.scorer.penalty.keep == 0.25
    assert isinstance(config.policy, TopFraction)


@pytest.mark.parametrize(
    "shown",
    [
        *("SfsScorer", "TaylorScorer", "PermutationScorer", "RandomScorer", "CardinalityScorer"),
        *("MutualInformationScorer", "GradientBoostedTreesScorer", "RandomForestScorer"),
        *("LassoScorer", "AutoFieldScorer", "AdaFsScorer", "OptFsScorer", "LpfsScorer"),
        *("ShuffleGateScorer", "ConcreteDropoutScorer"),
    ],
)
def test_a_scorer_is_named_by_its_class_alone(tmp_path: Path, shown: str) -> None:
    assert type(load(tmp_path, tiny(scorer={"class_path": shown})).scorer).__name__ == shown


@pytest.mark.parametrize(
    "shown", ["GradientBoostedTreesScorer", "RandomForestScorer", "LassoScorer"]
)
def test_a_scorer_without_its_optional_package_names_the_extra(
    tmp_path: Path, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrec_fmp.scorers.tabular.find_spec", lambda name: None)
    message = rf"{shown} needs scikit-learn: pip install 'torchrec-fmp\[scorers\]'"
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, tiny(scorer={"class_path": shown}))


def test_two_configurations_share_no_penalty_or_policy(tmp_path: Path) -> None:
    first, second = (load(tmp_path, tiny()) for _ in range(2))
    assert first.scorer.penalty is not second.scorer.penalty
    assert first.policy is not second.policy


# What-ifs are not runs; tests/planning/test_what_if.py reads them.
RUNS = sorted(set(CONFIGS.glob("*.yaml")) - set(CONFIGS.glob("what_if*.yaml")))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load(path.read_text())
    if content["data"]["class_path"].endswith("PreparedDataset"):
        # Only the schema is read when a configuration is composed.
        directory = tmp_path / content["data"]["init_args"]["path"]
        directory.mkdir(parents=True)
        Schema("label", (), (SparseColumn("a", 2),)).save(str(directory / "schema.json"))
    monkeypatch.chdir(tmp_path)
    config, _ = load_config(str(path))
    assert isinstance(config.data, SyntheticDataset | PreparedDataset)
