"""Processor seconds of what computes next to nothing, and of a stage of ``l2p``; writes JSON.

Every case is a process of its own, which is timed up to its end, or up to its first line where the rest is a run. With
``--against`` another checkout of this repository answers the same in turn, and the ratio of each pair is this checkout
over that one, below 1 if this one is faster. The stage of ``l2p`` is timed inside its process, without imports: what
differs between checkouts is the histogram of used prompts, which once took a pass over the task.

    python -m scripts.bench.startup --pairs 3 --against ../before
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cil.runner.checkpoint import to_json
from cil.runner.provenance import versions
from cil.utils import hardware
from scripts import ROOT

RUN = ["run", "quickstart", "learner=ncm", "data.per_class=20", "orders=[1993]"]
COMMANDS = {
    "list of learners": ["list", "learners"],
    "misspelt learner": ["run", "quickstart", "learner=ranpak"],
    "misspelt hyper-parameter": ["run", "quickstart", "learner={name: ranpac, projectin: 5}"],
    "misspelt key of a grid": ["sweep", "quickstart", "learner=ncm", "--grid", "learner.metricc=cosine,euclidean"],
}
FIRST_LINE, AGAIN, STAGE = "first line of a run", "finished benchmark, run again", "stage of l2p"
CASES = [*COMMANDS, FIRST_LINE, AGAIN, STAGE]
L2P_STAGE = """
import sys, time
import cil
from cil.learners.l2p import L2P

def timed(self, task, ctx, learn=L2P.learn):
    started = time.process_time()
    learn(self, task, ctx)
    print(time.process_time() - started, flush=True)
    raise SystemExit

L2P.learn = timed
cil.run(cil.load_config("quickstart", sys.argv[2:]), sys.argv[1])
"""
"""Learns the first stage alone and prints its processor seconds, with what all checkouts since 2026 have."""
Found = dict[str, Any]


class Side:
    """The commands of one checkout.

    Args:
        checkout: The checkout.
        folder: Where its results and its cache are.
        images: Images per class of the stage of ``l2p``.
    """

    def __init__(self, checkout: Path, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        }
        self.runs = 0

    def seconds(self, case: str) -> float:
        """Processor seconds of a case."""
        if case == STAGE:
            learner = "learner={name: l2p, epochs: 3}"
            code = ["-c", L2P_STAGE, str(self._results()), learner, f"data.per_class={self.images}"]
            return float(self._output(code).split()[-1])
        if case == FIRST_LINE:
            return self._spent(["-m", "cil", *RUN, "--results", str(self._results())], first_line=True)
        if case == AGAIN:
            finished = ["-m", "cil", *RUN, "--results", str(self.folder / "finished")]
            if not (self.folder / "finished").exists():
                self._output(finished)
            return self._spent(finished)
        return self._spent(["-m", "cil", *COMMANDS[case]])

    def _results(self) -> Path:
        self.runs += 1
        return self.folder / f"results{self.runs}"

    def _output(self, arguments: list[str]) -> str:
        started: Callable[..., Any] = partial(subprocess.run, check=True, capture_output=True, text=True)
        return str(started([sys.executable, *arguments], cwd=self.folder, env=self.environment).stdout)

    def _spent(self, arguments: list[str], first_line: bool = False) -> float:
        """Processor seconds of a process, until it writes its first line or until it ends."""
        with subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            answer = process.stdout.readline() if first_line else process.stdout.read()
            if first_line:
                process.kill()
            usage = os.wait4(process.pid, 0)[2]
        if not answer:
            raise RuntimeError(f"no answer to {' '.join(arguments)}")
        return usage.ru_utime + usage.ru_stime


def compare(case: str, sides: dict[str, Side], pairs: int) -> Found:
    """Median seconds of every side; with two sides, the median and both ends of the ratios of the pairs."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name in list(sides)[:: 1 if pair % 2 else -1]:
            seconds[name].append(sides[name].seconds(case))
    found: Found = {name: {"cpu_seconds": statistics.median(values)} for name, values in seconds.items()}
    if len(sides) > 1:
        ratios = [ours / before for ours, before in zip(seconds["ours"], seconds["against"], strict=True)]
        found |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return found


def commit(checkout: Path) -> str:
    """The commit that a checkout is at."""
    asked = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=32, help="images per class, of two classes, in the stage of l2p")
    parser.add_argument("--against", type=Path, help="another checkout of this repository, measured in turn")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/startup.json")
    given = parser.parse_args()
    result: Found = {"machine": hardware.facts(hardware.accelerator("cpu")), "versions": versions()}
    result |= {"pairs": given.pairs, "against": commit(given.against) if given.against else None}
    known = json.loads(given.out.read_text(encoding="utf-8"))["cases"] if given.out.exists() else {}
    result["cases"] = known  # cases that are not measured now keep what was measured of them
    with tempfile.TemporaryDirectory() as folder:
        checkouts = {"ours": ROOT} | ({"against": given.against.resolve()} if given.against else {})
        sides = {}
        for name, checkout in checkouts.items():
            (Path(folder) / name).mkdir()
            sides[name] = Side(checkout, Path(folder) / name, given.images)
        for case in given.cases:
            known[case] = compare(case, sides, given.pairs)
            print(case, json.dumps(known[case]), flush=True)
            given.out.write_text(to_json(result), encoding="utf-8")


if __name__ == "__main__":
    main()
