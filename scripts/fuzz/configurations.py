"""Mutated configurations through ``cil run``, up to the moment when data would be loaded; prints counts and seconds.

Every configuration must be accepted, or be refused by a :class:`~cil.errors.CilError` of short lines, within two
seconds. Some of the accepted ones are then run on a few digits with ``ncm``, where the same holds, and nothing may be
written outside the results folder. The exit code is 1 if one does otherwise.

    python -m scripts.fuzz.configurations --count 10000
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cil.config import Config
from cil.config.reading import load_config, shipped
from cil.errors import CilError
from cil.runner import Inputs, run
from cil.runner.plan import dump
from scripts.fuzz.mutations import Case, case, seeds

LONGEST_LINE, MOST_LINES, MOST_SECONDS = 500, 11, 2.0


class Stop(Exception):
    """Data would be loaded now."""


class Fuzzer:
    """Tries configurations in an empty folder.

    Args:
        place: The folder.
        seed: Seed of the mutations.
        shipped_seeds: Number of shipped configurations to start from; default: all.

    Attributes:
        counts: Number of configurations by what became of them.
        findings: One line for each that did what none may.
        slowest: Seconds of processor time, and the number, of the slowest.
    """

    def __init__(self, place: Path, seed: int = 0, shipped_seeds: int | None = None) -> None:
        self.place, self.seed = place, seed
        configs = next(iter(shipped().values()))
        root = next(parent for parent in configs.parents if parent.name == "configs")
        shutil.copytree(root, place / "in" / "configs")
        self.known = seeds(root, shipped_seeds)
        self.counts: Counter[str] = Counter()
        self.findings: list[str] = []
        self.slowest = (0.0, -1)
        self._inputs: dict[str, Inputs] = {}

    def try_one(self, number: int, *, run_it: bool = False) -> None:
        """Try the configuration of this number, and run it if it is accepted."""
        tried = case(number, self.seed, self.known)
        file = self.place / "in" / "configs" / tried.folder / "case.yaml"
        file.write_bytes(tried.text)
        accepted: list[Config] = []
        outcome = self._judge(number, lambda: accepted.append(self._load(file, tried)))
        self.counts[outcome] += 1
        if accepted and run_it:
            self.counts["run: " + self._judge(number, lambda: self._run(accepted[0]))] += 1
        file.unlink()

    def check_nothing_escaped(self) -> None:
        """Add a finding if anything was written outside of the results folder."""
        found = {path.name for path in self.place.iterdir()} - {"in", "results"}
        if found:
            self.findings.append(f"written outside of the results folder: {sorted(found)}")

    def _judge(self, number: int, action: Callable[[], None]) -> str:
        """Whether the action ends well ("accepted"), with an error in the right form ("refused"), or otherwise."""
        outcome, seconds = self._timed(number, action)
        if seconds > MOST_SECONDS:  # the first use of a learner imports its libraries
            outcome, seconds = self._timed(number, action)
        self.slowest = max(self.slowest, (seconds, number))
        if seconds > MOST_SECONDS:
            self.findings.append(f"{number}: took {seconds:.1f} s")
        return outcome

    def _timed(self, number: int, action: Callable[[], None]) -> tuple[str, float]:
        start, outcome = time.process_time(), "accepted"
        try:
            action()
        except CilError as error:
            outcome, lines = "refused", str(error).split("\n")
            wrong = [line for line in lines if not (0 < len(line) <= LONGEST_LINE and line.isprintable())]
            if wrong or len(lines) > MOST_LINES:
                self.findings.append(f"{number}: {len(lines)} lines, wrong are {[line[:200] for line in wrong]}")
        except Exception as error:  # what is looked for
            outcome = "failed"
            self.findings.append(f"{number}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return outcome, time.process_time() - start

    def _load(self, file: Path, tried: Case) -> Config:
        config = load_config(str(file), tried.overrides)
        try:
            run(config, self.place / "results", load=_stop)
        except Stop:
            return config
        raise AssertionError("nothing to run")

    def _run(self, config: Config) -> None:
        """Run ``ncm`` on the configuration's stream of a few digits, under the names that it gives."""
        raw = dump(config)
        hardware = {"device": "cpu", "workers": 0, "feature_store": "off"}
        small: dict[str, Any] = {
            "data": {"dataset": "digits", "per_class": 4},
            "backbone": {},
            "learners": [{"name": "ncm", "label": config.learners[0].title}],
            "orders": raw["orders"][:2],
            "seeds": raw["seeds"][:2],
            "hardware": hardware,
        }
        if (config.transform.resize or 0) > 512:
            small["transform"] = {}
        run(Config.model_validate({**raw, **small}), self.place / "results", load=self._cached)

    def _cached(self, config: Config, device: Any) -> Inputs:
        key = config.transform.model_dump_json()
        if key not in self._inputs:
            self._inputs[key] = Inputs(config, device)
        return self._inputs[key]


def _stop(config: Config, device: Any) -> Inputs:
    raise Stop


def main() -> int:
    """Try the configurations that the command line asks for; 1 if there are findings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=10_000, help="number of configurations")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations")
    parser.add_argument("--first", type=int, default=0, help="number of the first; a finding names its own")
    parser.add_argument("--every", type=int, default=100, help="one in so many is run, if it is accepted")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), args.seed)
        for number in range(args.first, args.first + args.count):
            fuzzer.try_one(number, run_it=number % args.every == 0)
        fuzzer.check_nothing_escaped()
    for finding in fuzzer.findings:
        print(finding)
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(fuzzer.counts.items()))
    seconds, number = fuzzer.slowest
    print(f"{args.count} configurations in {time.perf_counter() - start:.0f} s: {counts}")
    print(f"{len(fuzzer.findings)} findings; the slowest, {number}, took {seconds:.2f} s of processor time")
    return 1 if fuzzer.findings else 0


if __name__ == "__main__":
    sys.exit(main())
