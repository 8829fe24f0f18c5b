"""Full runs on real data sets over seeds; prints the table of docs/results.md.

    python benchmarks/real_data.py --data ../shared/data --seeds 5

The folder holds flights13.parquet, diabetes130.parquet and census_kdd.parquet, each with string
fields, a `label`, and `is_test` for the last tenth of its rows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

from torchrec_fmp import cli

DATA_SETS = ("flights13", "diabetes130", "census_kdd")
ROOT = Path(__file__).parent.parent
VARIANTS = {
    "gates closed at 3e-4": ["--scorer.penalty.weight=3e-4"],
    "gates closed at 1e-3": ["--scorer.penalty.weight=1e-3"],
    "half of the features": [
        "--scorer.penalty=TargetPenalty",
        "--scorer.penalty.keep=0.5",
        "--policy=TopFraction",
        "--policy.fraction=0.5",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    print(
        "| data | what stays | features | table bytes | step ms | AUC full | AUC final |"
        " difference | NE difference | seconds full | seconds of ours |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for name in DATA_SETS:
            prepared = Path(work, name)
            raw = str(arguments.data / f"{name}.parquet")
            options = ["--label", "label", "--split", "column", "--split_column", "is_test"]
            call("prepare", "parquet", raw, "--out", str(prepared), *options)
            references: list[dict] = []
            for variant, overrides in VARIANTS.items():
                results = []
                for seed in range(arguments.seeds):
                    out = Path(work, f"{name}-{variant}-{seed}")
                    call(
                        *("run", str(ROOT / "configs" / f"{name}.yaml"), "--out", str(out)),
                        *("--data.path", str(prepared), "--seed", str(seed)),
                        *overrides,
                        # The unpruned model is the same for every variant of a seed.
                        *("--reference", "false" if references else "true"),
                    )
                    results.append(json.loads((out / "result.json").read_text()))
                references = references or results
                print(row(name, variant, results, references), flush=True)


def call(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(arguments)
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with {status}")


def row(name: str, variant: str, results: list[dict], references: list[dict]) -> str:
    full = [result["metrics"]["full"] for result in references]
    final = [result["metrics"]["final"] for result in results]
    auc_difference = [b["auc"] - a["auc"] for a, b in zip(full, final, strict=True)]
    ne_difference = [b["ne"] - a["ne"] for a, b in zip(full, final, strict=True)]
    kept = sorted({result["features_kept"] for result in results})
    kept_range = f"{kept[0]}" if len(kept) == 1 else f"{kept[0]} to {kept[-1]}"
    ours = [
        sum(result["seconds"][p] for p in ("pretrain", "prune", "continue")) for result in results
    ]
    full_step = mean(result["step_ms"]["full"] for result in references)
    cells = [
        name,
        variant,
        f"{kept_range} of {results[0]['features_total']}",
        f"{mean(r['bytes']['after'] / r['bytes']['before'] for r in results):.2f} of all",
        f"{mean(r['step_ms']['pruned'] for r in results) / full_step:.2f} of full",
        f"{mean(metrics['auc'] for metrics in full):.4f}",
        f"{mean(metrics['auc'] for metrics in final):.4f}",
        with_deviation(auc_difference),
        with_deviation(ne_difference),
        f"{mean(result['seconds']['full'] for result in references):.1f}",
        f"{mean(ours):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def mean(values) -> float:
    return statistics.fmean(values)


def with_deviation(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{mean(values):+.4f} (sd {deviation:.4f})"


if __name__ == "__main__":
    main()
