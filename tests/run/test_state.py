"""The state of a run is plain data: it goes to JSON and back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from tests.support.process_group import ProcessGroup
from tests.support.scoring import this_rank
from tests.support.tiny_run import tiny, write_config
from torchrec_fmp.run.config import load_config
from torchrec_fmp.run.outcome import Outcome
from torchrec_fmp.run.pipeline import Pipeline
from torchrec_fmp.run.state import RunState


def finished(config_path: str) -> RunState:
    config, _ = load_config(config_path)
    pipeline = Pipeline(config, this_rank())
    pipeline.run()
    return pipeline.state


def test_the_state_of_a_finished_run_survives_json_and_holds_its_measurements(
    run_ranks: ProcessGroup, tmp_path: Path
) -> None:
    half = {"keep": 0.5, "unit": "bytes"}
    config = write_config(
        tmp_path,
        tiny(
            reference=True,
            schedule={"class_path": "Gradual", "init_args": {"prunes": 2}},
            policy={"class_path": "TopBudget", "init_args": half},
            scorer__init_args__penalty={"class_path": "TargetPenalty", "init_args": half},
        ),
    )
    states = run_ranks.run(finished, config)
    # Rank 0 decides for all.
    assert states[0].table_costs
    for state in states:
        restored = RunState.of(json.loads(json.dumps(state.describe())))
        assert restored == state
        assert state.phase == "done"
        assert state.prunes == len(state.selections) == len(state.manifests) == 2
        assert state.rows.keys() == {"full", "pretrain", "continue"}
        assert state.costs.keys() == {"bytes", "features"}
        outcome, again = Outcome(state), Outcome(restored)
        assert outcome.selection == again.selection == state.selection
        assert outcome.table_bytes == again.table_bytes
        assert outcome.parity_max_abs == again.parity_max_abs


def test_a_new_state_and_counts_of_replaced_values_survive_json() -> None:
    state = RunState(replaced=Counter({("price", "null"): 3}))
    assert RunState.of(json.loads(json.dumps(state.describe()))) == state
    assert state.selection is None
