"""The configuration of an old run still loads, although its classes have moved since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.run.config import load_config

# Written by version 0.1.0 for configs/demo.yaml.
FORMER = Path(__file__).parent / "config_of_a_former_run.yaml"
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
HALF = {"keep": 0.5}
POLICIES = {
    "best_size.BestSize": {},
    "closed_gates.ClosedGates": {},
    "top_budget.TopBudget": HALF,
    "top_fraction.TopFraction": {"fraction": 0.5},
}
SCHEDULES = {"gradual.Gradual": {"prunes": 2}, "one_shot.OneShot": {}}
SCORERS = (
    *("adafs.AdaFsScorer", "autofield.AutoFieldScorer", "cardinality.CardinalityScorer"),
    *("concrete_dropout.ConcreteDropoutScorer", "hard_concrete.HardConcreteScorer"),
    *("lasso.LassoScorer", "lpfs.LpfsScorer", "mutual_information.MutualInformationScorer"),
    *("optfs.OptFsScorer", "permutation.PermutationScorer", "random.RandomScorer"),
    *("sfs.SfsScorer", "shuffle_gate.ShuffleGateScorer", "taylor.TaylorScorer"),
    *("trees.GradientBoostedTreesScorer", "trees.RandomForestScorer"),
)
SECTIONS = [
    *(("policy", f"torchrec_fmp.policies.{name}", given) for name, given in POLICIES.items()),
    *(("schedule", f"torchrec_fmp.schedules.{name}", given) for name, given in SCHEDULES.items()),
    *(("scorer", f"torchrec_fmp.scores.{name}", {}) for name in SCORERS),
]


@pytest.mark.parametrize(("section", "former", "given"), SECTIONS)
def test_a_class_is_found_by_its_former_path_in_yaml_and_on_the_command_line(
    tmp_path: Path, section: str, former: str, given: dict[str, Any]
) -> None:
    name = former.rpartition(".")[2]
    content = tiny(**{section: {"class_path": former, "init_args": given}})
    config, composed = load_config(write_config(tmp_path, content))
    assert type(getattr(config, section)).__name__ == name
    assert yaml.safe_load(composed)[section]["class_path"] == name
    overrides = [f"--{section}={former}"]
    overrides += [f"--{section}.{option}={value}" for option, value in given.items()]
    config, _ = load_config(write_config(tmp_path, tiny()), overrides)
    assert type(getattr(config, section)).__name__ == name


def test_a_selection_is_replayed_by_the_former_path_of_its_policy(tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    path.write_text("{}")
    policy = {
        "class_path": "torchrec_fmp.policies.from_file.FromFile",
        "init_args": {"path": str(path)},
    }
    config, _ = load_config(write_config(tmp_path, tiny(policy=policy)))
    assert type(config.policy).__name__ == "FromFile"


def test_the_config_of_a_former_run_loads_and_is_written_with_short_class_names() -> None:
    _, former = load_config(str(FORMER))
    _, present = load_config(str(DEMO))
    assert former == present
    assert "torchrec_fmp" in FORMER.read_text()
    assert "torchrec_fmp" not in present
