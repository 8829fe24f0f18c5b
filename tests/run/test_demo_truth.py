"""The demo finds its planted truth from a fifth of the data; benchmarks/truth.py measures more."""

from __future__ import annotations

import json
from pathlib import Path

from torchrec_fmp.cli.__main__ import main

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")


# Half of the demo's rows: with some seeds they are too few for the weakest effect.
SMALLER = ["--data.rows", "200000", "--data.test_rows", "20000", "--reference", "false"]


def test_every_noise_feature_is_dropped_and_every_main_effect_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    overrides = ["--data.seed", "1", "--seed", "1", *SMALLER]
    assert main(["run", DEMO, "--out", str(out), *overrides]) == 0
    result = json.loads((out / "result.json").read_text())
    samples, planted, kept = result["samples"], result["planted"], set(result["kept"])
    assert samples["pretrain"] <= 0.2 * (samples["pretrain"] + samples["continue"] + 1024)
    main_effects = {name for name in planted["signal"] if not name.startswith("pair")}
    assert any(name.startswith("main_") for name in main_effects)
    assert any(name.startswith("dense_") for name in main_effects)
    gates = {
        name: f"{decision['gate']:.3f} at log_alpha {decision['score']:.2f}"
        for name, decision in json.loads((out / "selection.json").read_text()).items()
    }
    lost = {name: gates[name] for name in sorted(main_effects - kept)}
    stayed = {name: gates[name] for name in sorted(kept.intersection(planted["noise"]))}
    assert not lost and not stayed, f"lost {lost}, noise that stayed {stayed}, gates {gates}"
    assert result["metrics"]["final"]["auc"] > 0.75
