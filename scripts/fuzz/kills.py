"""Kills learn, undo and forget, and checks that the model is the one before the call or the one after it.

A child process makes the call, and is killed at a random moment, or ends itself at one of the points at which the call
leaves something else on the disk. Then the model is read, the same call is repeated, and the model must be the one that
a call without a fault makes. ``python -m scripts.fuzz.kills --kills 100`` prints how many kills were before, after, and
neither.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cil import history, results
from cil.errors import RunError
from cil.growing import GrowingModel
from cil.growing.events import read
from cil.growing.summary import facts
from cil.prediction import open_run
from cil.runner.checkpoint import WEIGHTS
from cil.utils.stored import file_digest

TINY = {
    "name": "vit_tiny_patch16_224",
    "weights": "random",
    "options": {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 2},
}
FORK = multiprocessing.get_context("fork")
Call = Callable[[GrowingModel], object]
Point = Callable[[str], None]


def make_images(root: Path) -> None:
    """Three folders of two classes each, with six images per class."""
    rng = np.random.RandomState(0)
    for lesson in range(3):
        for name in "ab":
            for i in range(6):
                file = root / str(lesson) / f"{name}{lesson}" / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.randint(0, 256, (16, 16, 3)).astype(np.uint8)).save(file)


def opened(folder: Path, point: Point = lambda name: None) -> GrowingModel:
    return GrowingModel(folder, "slda", TINY, device="cpu", point=point)


def calls(images: Path) -> dict[str, tuple[list[Call], Call]]:
    """Name → the calls that make the model before, and the call that is killed."""
    first: Call = lambda model: model.learn(images / "0")  # noqa: E731
    second: Call = lambda model: model.learn(images / "1")  # noqa: E731
    forget: Call = lambda model: model.forget("a0", images / "0")  # noqa: E731
    undo: Call = lambda model: model.undo()  # noqa: E731
    return {
        "first lesson": ([], first),
        "second lesson": ([first], second),
        "forget": ([first, second], forget),
        "hide": ([first, second], lambda model: model.forget("b1", hide=True)),
        "rename": ([first], lambda model: model.rename("a0", "c0")),
        "undo of a lesson": ([first, second], undo),
        "undo of the first lesson": ([first], undo),
        "undo of forget": ([first, forget], undo),
        "lesson after forget": ([first, forget], second),
    }


def signature(folder: Path) -> Any:
    """What tells a model from another one: classes, lessons, rows, and the learner's state; None for no lesson.

    Raises:
        CilError: The model cannot be read, shown or used.
    """
    try:
        header = read(folder)
    except RunError:
        if (folder / "metrics.json").exists():
            raise
        return None
    stages = len(header["tasks"])
    if not stages:
        return None
    facts(folder)
    run = results.read_run(folder)
    trained = open_run(folder)
    change = history.changed_state(header, stages)
    place = folder / change["folder"] if change else results.stage_folder(folder, stages - 1)
    return (
        trained.names,
        [lesson["train_sha256"] for lesson in header["lessons"]],
        [(row["correct"], row["total"]) for row in run["stages"]],
        file_digest(place / WEIGHTS),
    )


class Kills:
    """Kills calls in copies of prepared models.

    Args:
        work: A folder to work in.

    Attributes:
        counts: Kills by (call, what the model was after the kill).
        findings: Sentences about what must not be.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.counts, self.findings = work, Counter[tuple[str, str]](), list[str]()
        make_images(work / "images")
        self.calls = calls(work / "images")
        self.known: dict[str, tuple[Any, Any, float, list[str]]] = {}
        for name, (before, call) in self.calls.items():
            model = opened(work / name / "before")
            for one in before:
                one(model)
            start = signature(model.path)
            points: list[str] = []
            after = self._copy(name)
            started = time.perf_counter()
            call(opened(after, points.append))
            self.known[name] = start, signature(after), time.perf_counter() - started, points

    def _copy(self, name: str) -> Path:
        place = self.work / name / "copy"
        shutil.rmtree(place, ignore_errors=True)
        if (self.work / name / "before").exists():
            shutil.copytree(self.work / name / "before", place)
        return place

    def at_points(self) -> Iterator[tuple[str, str]]:
        """Kill every call at each of its points in turn; yields (call, point)."""
        for name, (*_, points) in self.known.items():
            for number, point in enumerate(points):
                self.kill(name, lambda folder, number=number: _die_at(folder, number), None)  # type: ignore[misc]
                yield name, point

    def at_random(self, count: int, seed: int = 0) -> None:
        """Kill calls at random moments of their time."""
        rng = random.Random(seed)
        for _ in range(count):
            name = rng.choice(list(self.calls))
            self.kill(name, opened, rng.uniform(0, 1.3 * self.known[name][2]))

    def kill(self, name: str, opening: Callable[[Path], GrowingModel], delay: float | None) -> None:
        """Start a call in a child, kill it after ``delay`` seconds if one is given, and check what is there."""
        before, after, _, _ = self.known[name]
        folder, call = self._copy(name), self.calls[name][1]
        child = FORK.Process(target=_run, args=(folder, opening, call))
        child.start()
        if delay is not None:
            child.join(delay)
            child.kill()
        child.join()
        try:
            found = signature(folder)
        except Exception as error:  # whatever it is, it is a finding
            self.findings.append(f"{name}: after the kill the model cannot be read: {type(error).__name__}: {error}")
            self.counts[name, "neither"] += 1
            return
        was = "before" if found == before else "after" if found == after else "neither"
        self.counts[name, was] += 1
        if was == "neither":
            self.findings.append(f"{name}: after the kill the model is neither the one before nor the one after")
        if was != "before":
            return
        call(opened(folder))
        if signature(folder) != after:
            self.findings.append(f"{name}: repeated after the kill, the call makes another model")
        extra = {place.name for place in folder.iterdir() if place.is_dir()} ^ {
            place.name for place in folder.iterdir() if place.name.startswith(("stage-", "change-"))
        }
        if extra:
            self.findings.append(f"{name}: {', '.join(sorted(extra))} is left over")


def _run(folder: Path, opening: Callable[[Path], GrowingModel], call: Call) -> None:
    torch.set_num_threads(1)  # threads of the parent are not there in a child
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the life of the process
    call(opening(folder))
    os._exit(0)


def _die_at(folder: Path, number: int) -> GrowingModel:
    left = iter(range(number, -1, -1))

    def point(name: str) -> None:
        if next(left) == 0:
            os._exit(9)

    return opened(folder, point)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as work:
        kills, started = Kills(Path(work)), time.monotonic()
        kills.at_random(options.kills, options.seed)
    for (name, was), count in sorted(kills.counts.items()):
        print(f"{name:26} {was:8} {count}")
    for finding in kills.findings:
        print(f"finding: {finding}")
    found = len(kills.findings)
    print(f"{sum(kills.counts.values())} kills in {time.monotonic() - started:.0f} s, {found} findings")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
