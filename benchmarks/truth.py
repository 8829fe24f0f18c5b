"""How often pretraining finds the planted truth, by setting; makes tables of docs/method.md.

    python benchmarks/truth.py run --study acceptance --seeds 5
    python benchmarks/truth.py run --study settings --planted planted24 planted28 --seeds 2
    python benchmarks/truth.py run --study whole --planted planted24 --seeds 3
    python benchmarks/truth.py report

A run is right if it drops every noise feature and keeps every signal whose effect adds more than
0.001 to the AUC of the true logit; redundant copies and weaker signals may go either way.
Pretraining reads 150,000 rows, 15% of a million; in the study `acceptance`, up to 600,000. Only the
study `whole` also makes the remaining rows and continues training on them, beside a reference: rows
are independent, so the selection does not depend on them. Started again after a stop, it continues
with the unfinished runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from selection_grid.settings import PLANTED, STRONG

BENCHMARKS = Path(__file__).parent
CONFIG = BENCHMARKS.parent / "configs" / "demo.yaml"
TEST_ROWS = 100_000

ACCEPTED = ["planted24", "planted24_wide", "planted28", "planted60", "planted100"]
PRETRAINING_ROWS = 150_000
# After the pretraining rows, for validation and continued training.
ROWS_BEHIND = 40_000


def pretrained_on(rows: int) -> list[str]:
    """Options for so many rows of pretraining."""
    return [f"--data.rows={rows + ROWS_BEHIND}", f"--pretrain.samples={rows}"]


# Batch size in pretraining and learning rate of the gates; the defaults are 128, as the demo's
# training, and 0.1.
_STEPS = [(64, 0.1), (128, 0.03), (128, 0.3), (256, 0.1), (256, 0.3), (512, 0.1), (512, 0.3)]
# All of the rows that pretraining reads 15% of, and a model that is trained on them without gates.
_WHOLE = ["--data.rows=1000000", "--reference=true"]
# Study -> variant -> what it changes.
DEFAULTS = "the defaults"
STUDIES: dict[str, dict[str, list[str]]] = {
    "acceptance": {
        f"{rows:,} rows, 15% of {of}": pretrained_on(rows)
        for rows, of in (
            (600_000, "four million"),
            (300_000, "two million"),
            (PRETRAINING_ROWS, "a million"),
        )
    },
    "whole": {
        DEFAULTS: _WHOLE,
        "half of the features": [*_WHOLE, "--policy=TopFraction", "--policy.fraction=0.5"],
    },
    "settings": {
        DEFAULTS: [],
        **{
            f"batches of {size}, gate rate {rate}": [
                f"--pretrain.batch_size={size}",
                f"--scorer.learning_rate={rate}",
            ]
            for size, rate in _STEPS
        },
        **{
            f"L0 weight {weight}": [
                "--scorer.penalty=L0Penalty",
                f"--scorer.penalty.weight={weight}",
            ]
            for weight in ("1e-4", "5e-4", "1e-3", "2e-3")
        },
        **{
            f"open for {share} of the steps": [f"--scorer.open_fraction={share}"]
            for share in (0, 0.3, 0.7, 0.8)
        },
        **{
            f"ramp over {share} of the steps": [f"--scorer.ramp_fraction={share}"]
            for share in (0, 0.3)
        },
        **{
            f"temperature {value}": [f"--gates.distribution.temperature={value}"]
            for value in (0.33, 1.0)
        },
        "noise per batch": ["--gates.sampling=batch"],
        "exact gradient": ["--gates.centered=false"],
        **{
            f"start at log_alpha {value}": [f"--gates.initial_log_alpha={value}"]
            for value in (-1, 1.5)
        },
        "gates that must close to exactly 0": ["--policy.threshold=0"],
        "dense rate 5e-3": ["--train.learning_rate=5e-3"],
        "table rate 2e-2": ["--train.embedding_learning_rate=2e-2"],
    },
    "stopping": {
        **{
            f"patience of {patience} of 20 checks": [
                f"--scorer.stop={json.dumps({'checks': 20, 'patience': patience})}"
            ]
            for patience in (3, 5, 8)
        },
        "patience of 8, at most 600,000 rows": [*pretrained_on(600_000), "--scorer.stop={}"],
    },
    "size": {
        "target of half": [
            "--scorer.penalty=TargetPenalty",
            "--scorer.penalty.keep=0.5",
        ],
        "best size": ["--policy=BestSize"],
    },
}


@dataclass(frozen=True)
class Run:
    """What one run found.

    Args:
        missed: signals that were dropped and should not have been.
        noise: that was kept.
        margin: log_alpha of the weakest signal that should stay, less that of the strongest noise.
        kept: number of features.
        rows: that were pretrained on.
        seconds: by phase.
        auc: of the test split, by model.
    """

    study: str
    data: str
    variant: str
    seed: int
    missed: list[str]
    noise: list[str]
    margin: float
    kept: int
    rows: int
    seconds: dict[str, float | None]
    auc: dict[str, float | None]
    jobs: int

    @property
    def is_right(self) -> bool:
        return not self.missed and not self.noise


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    run = verbs.add_parser("run", help="run what is not there yet")
    run.add_argument("--study", choices=STUDIES, default="acceptance")
    run.add_argument("--planted", nargs="+", choices=PLANTED, default=ACCEPTED)
    run.add_argument("--variants", nargs="+", help="by the start of their names; all by default")
    run.add_argument("--seeds", type=int, default=5, help="how many")
    run.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    report = verbs.add_parser("report", help="the tables as Markdown")
    report.add_argument("--plot", type=Path, help="SVG file of the margins, by setting")
    for verb in (run, report):
        verb.add_argument("--out", type=Path, default=BENCHMARKS / "results" / "truth.jsonl")
    arguments = parser.parse_args()
    if arguments.verb is None:
        print("Nothing to do without a verb:\n" + (__doc__ or "").split("\n\n")[1])
        return 0
    runs = read(arguments.out)
    if arguments.verb == "report":
        print(tables(runs))
        if arguments.plot:
            plot([run for run in runs if run.study == "settings"], arguments.plot)
        return 0
    done = {(run.study, run.data, run.variant, run.seed) for run in runs}
    todo = [
        (arguments.study, data, variant, seed, arguments.jobs)
        for seed in range(arguments.seeds)
        for data in arguments.planted
        for variant in STUDIES[arguments.study]
        if any(variant.startswith(name) for name in arguments.variants or [""])
        if (arguments.study, data, variant, seed) not in done
    ]
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchrec_fmp.cli.run", "torchrec_fmp.run.pipeline"])
    with context.Pool(arguments.jobs, maxtasksperchild=1) as pool:
        for run in pool.imap_unordered(measure, todo):
            with arguments.out.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")
            print(run.data, run.variant, run.seed, run.missed, run.noise, f"{run.margin:.2f}")
    return 0


def read(path: Path) -> list[Run]:
    if not path.exists():
        return []
    return [Run(**json.loads(line)) for line in path.read_text().splitlines()]


def measure(what: tuple[str, str, str, int, int]) -> Run:
    """Runs the command line once."""
    study, data, variant, seed, jobs = what
    from torchrec_fmp.cli import __main__ as cli
    from torchrec_fmp.data.synthetic import SyntheticDataset

    planted = {**PLANTED[data], "test_rows": TEST_ROWS, "seed": seed}
    dataset = SyntheticDataset(**planted)
    options = [
        *(f"--data.{name}={json.dumps(value)}" for name, value in planted.items()),
        f"--seed={seed}",
        "--reference=false",
        *pretrained_on(PRETRAINING_ROWS),
        *STUDIES[study][variant],
    ]
    with tempfile.TemporaryDirectory() as out:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            if cli.main(["run", str(CONFIG), "--out", out, *options]):
                # Not SystemExit, for which the pool would wait forever.
                raise RuntimeError(f"{data}, seed {seed}, failed with {options}: {log.getvalue()}")
        result = json.loads(Path(out, "result.json").read_text())
        selection = json.loads(Path(out, "selection.json").read_text())
    worth = dataset.oracle_contributions()
    strong = [name for name, value in worth.items() if value > STRONG]
    scores = {name: entry["score"] for name, entry in selection.items()}
    kept = set(result["kept"])
    return Run(
        study=study,
        data=data,
        variant=variant,
        seed=seed,
        missed=[name for name in strong if name not in kept],
        noise=[name for name in dataset.truth.noise if name in kept],
        margin=min(scores[name] for name in strong) - max(scores[n] for n in dataset.truth.noise),
        kept=len(kept),
        rows=result["samples"]["pretrain"],
        seconds=result["seconds"],
        auc={name: m and m["auc"] for name, m in result["metrics"].items()},
        jobs=jobs,
    )


def tables(runs: list[Run]) -> str:
    """One table a study."""
    lines = []
    for study in STUDIES:
        of_study = [run for run in runs if run.study == study]
        if not of_study:
            continue
        lines += [
            f"\n## {study}\n",
            "| data | setting | right | signals missed: pairs, others | noise kept "
            "| margin, worst and median | rows, mean | AUC, final less full "
            "| seconds, selection and total, of full |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        # A variant that the study no longer has is an error, not left out.
        order = list(itertools.product(STUDIES[study], PLANTED))
        of_study.sort(key=lambda run: order.index(_group(run)))
        for (variant, data), members in itertools.groupby(of_study, _group):
            lines.append("| " + " | ".join([data, variant, *figures(list(members))]) + " |")
    return "\n".join(lines)


def _group(run: Run) -> tuple[str, str]:
    return run.variant, run.data


def figures(runs: list[Run]) -> list[str]:
    missed = [name for run in runs for name in run.missed]
    pairs = sum(name.startswith("pair") for name in missed)
    margins = [run.margin for run in runs]
    return [
        f"{sum(run.is_right for run in runs)} of {len(runs)}",
        f"{pairs}, {len(missed) - pairs}",
        str(sum(len(run.noise) for run in runs)),
        f"{min(margins):+.1f}, {statistics.median(margins):+.1f}",
        f"{statistics.mean(run.rows for run in runs):,.0f}",
        *costs(runs),
    ]


def costs(runs: list[Run]) -> list[str]:
    if any(run.auc["full"] is None for run in runs):
        return ["", ""]
    differences = [run.auc["final"] - run.auc["full"] for run in runs]
    spread = statistics.stdev(differences) if len(runs) > 1 else float("nan")
    selection = statistics.mean(run.seconds["pretrain"] / run.seconds["full"] for run in runs)
    total = statistics.mean(
        sum(run.seconds[phase] for phase in ("pretrain", "prune", "continue")) / run.seconds["full"]
        for run in runs
    )
    return [
        f"{statistics.mean(differences):+.4f} (sd {spread:.4f})",
        f"{selection:.2f}, {total:.2f}",
    ]


def plot(runs: list[Run], out: Path) -> None:
    """A panel for each data set on which the defaults ran too: every run's margin, by setting.

    Right of 0 all are told apart.
    """
    from matplotlib.figure import Figure
    from selection_grid.plot import save

    data = list(dict.fromkeys(run.data for run in runs if run.variant == DEFAULTS))
    runs = [run for run in runs if run.data in data]
    variants = list(dict.fromkeys(run.variant for run in runs))[::-1]
    figure = Figure(figsize=(4 * len(data) + 2, 6), layout="constrained")
    axes = figure.subplots(1, len(data), sharey=True, squeeze=False)
    for panel, name in zip(axes[0], data, strict=True):
        members = [run for run in runs if run.data == name]
        panel.set_title(name)
        panel.axvline(0, color="grey", linewidth=0.5)
        places = [variants.index(run.variant) for run in members]
        colors = ["tab:green" if run.is_right else "tab:red" for run in members]
        panel.scatter([run.margin for run in members], places, c=colors, s=14)
        panel.set_yticks(range(len(variants)), variants)
        panel.set_xlabel("margin in log_alpha")
    save(figure, out)


if __name__ == "__main__":
    sys.exit(main())
