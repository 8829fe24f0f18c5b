"""What TorchRec's planner itself takes, by search, tables and ranks.

    python benchmarks/planner.py
    python benchmarks/planner.py --searches full --fractions 0.1 --world_sizes 128 --profile

Plans a part of configs/what_if_128.yaml (1,000 tables) on CPU, offline. A search that has not ended
after `--timeout` seconds stops with the best plan so far, which TorchRec checks between proposals.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import pstats
import time
import warnings
from pathlib import Path

from torchrec_fmp.planning.estimates import estimate_as
from torchrec_fmp.run.what_if_config import load_what_if

CONFIG = Path(__file__).parents[1] / "configs" / "what_if_128.yaml"


def measure(search: str, fraction: float, world_size: int, timeout: int, profile: bool) -> None:
    overrides = ["--planner.search", search, "--table_fraction", str(fraction)]
    config = load_what_if(str(CONFIG), [*overrides, "--topology.world_size", str(world_size)])
    model = config.build()
    planner = config.build_planner(model)
    planner._timeout_seconds = timeout
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    start = time.perf_counter()
    plan = planner.plan(model, list(config.sharders()))
    seconds = time.perf_counter() - start
    profiler.disable()
    tables = sum(len(module) for module in plan.plan.values())  # type: ignore[arg-type]
    step_ms = estimate_as(planner, plan, model, config.sharders()).step_ms
    print(
        f"{search:<8} {tables:>6,} {world_size:>6,} {planner._num_proposals:>9,} {seconds:>8.1f} "
        f"{step_ms:>9.1f}",
        flush=True,
    )
    if profile:
        pstats.Stats(profiler).sort_stats("cumulative").print_stats("torchrec|copy.py", 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--searches", nargs="+", default=["by_time", "greedy"])
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.05])
    parser.add_argument("--world_sizes", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--timeout", type=int, default=60)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print("search   tables  ranks proposals  seconds   step ms")
    for search in options.searches:
        for fraction in options.fractions:
            for world_size in options.world_sizes:
                measure(search, fraction, world_size, options.timeout, options.profile)


if __name__ == "__main__":
    main()
