"""Ridge settings of RanPAC on one stream: separate ``cil run`` commands compared with one ``cil sweep``.

Cold: every run is a fresh process, as in a shell loop. Swept: one command with workers that are reused, and what
``--warm`` configures to be kept between runs, filled by an earlier run of another learner (timed separately). Both
produce the same runs; their accuracies are compared.

    python -m scripts.bench.sweep [CONFIG] [key=value …] [--limit 2] [--out results/bench/sweep.json]
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from cil import results
from cil.runner.provenance import versions
from cil.sweep.grid import flow, trials
from cil.utils import hardware

STRENGTHS = [float(f"1e{power}") for power in range(-4, 8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="split_tiny_imagenet100/ncm")
    parser.add_argument("overrides", nargs="*", default=[], help="key=value for all runs")
    parser.add_argument("--projection", type=int, default=2000, help="width of RanPAC's random projection")
    parser.add_argument("--limit", type=int, default=len(STRENGTHS), help="number of settings")
    parser.add_argument("--jobs", type=int, help="parallel runs of the sweep")
    parser.add_argument("--cold", action="append", default=[], help="key=value only for the cold runs")
    parser.add_argument("--warm", action="append", default=[], help="key=value for the sweep and the run before it")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    args = parser.parse_intermixed_args()

    learner = f"learners=[{{name: ranpac, projection: {args.projection}}}]"
    grid = f"learner.strength={','.join(flow(strength) for strength in STRENGTHS[: args.limit])}"
    given = [*args.overrides, learner]
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = Path(folder) / "cold", Path(folder) / "warm"
        lines = [trial.line(cold) for trial in trials(args.config, [*given, *args.cold], [grid])]
        seconds = [cil(shlex.split(line)[1:]) for line in lines]
        filling = cil(["run", args.config, *args.overrides, "learners=[ncm]", *args.warm, "--results", str(warm)])
        jobs = ["--jobs", str(args.jobs)] if args.jobs else []
        swept = cil(["sweep", args.config, *given, *args.warm, "--grid", grid, *jobs, "--results", str(warm)])
        places = [trial.plan.place for trial in trials(args.config, given, [grid])]
        runs = [[results.read_run(root / place) for place in places] for root in (cold, warm)]
    accuracies = [[run["summary"]["accuracy_last"] for run in of] for of in runs]
    found = {
        "config": args.config,
        "overrides": [*given, *args.cold],
        "warm": args.warm,
        "settings": [run["config"]["learners"][0]["strength"] for run in runs[0]],
        "cold_seconds": seconds,
        "filling_seconds": filling,
        "sweep_seconds": swept,
        "times_faster": sum(seconds) / swept,
        "times_faster_with_filling": sum(seconds) / (swept + filling),
        "accuracy_last": accuracies[1],
        "largest_difference": max(abs(a - b) for a, b in zip(*accuracies, strict=True)),
        "machine": hardware.facts(hardware.accelerator("auto")),
        "threads_in_sweep": runs[1][0]["machine"]["threads"],
        "versions": versions(),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")


def cil(arguments: Sequence[str]) -> float:
    """Seconds of a whole command, including its start."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "cil", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
