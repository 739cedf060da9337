"""Hyper-parameters chosen on the first task alone: on images held out of its training split.

Nothing else is opened: of the training split the images of the first tasks, of the test split not even the list of its
files. What was tried, on what, and what came out is written beside the configuration that was chosen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from cil import hardware, metrics
from cil.checkpoint import to_json
from cil.config import Config, StreamConfig
from cil.configfile import validated
from cil.console import Display
from cil.errors import ConfigError, TrainingError
from cil.plan import Plan, dump, plans
from cil.provenance import versions
from cil.report.files import write
from cil.results import matrices
from cil.runner import build, run_stages
from cil.sweep.first_tasks import FirstTasks, first_order
from cil.sweep.grid import Setting, settings

FRACTION = 0.2
"""Of each class's training images, held out unless the configuration says ``stream.validation``."""
WORDS = (
    "",
    "first_task",
    *(f"first_{number}_tasks" for number in ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")),
)
FIXED = ("stream", "data")
"""Sections that decide what the first task is; settings on different ones cannot be ranked."""


@dataclass(frozen=True)
class Tried:
    """A setting and its accuracy on the held-out images over all classes of the first tasks, one a training seed.

    A setting whose training failed has a ``reason`` and ranks below all others.
    """

    setting: Setting
    accuracies: tuple[float, ...]
    seconds: float
    reason: str = ""

    @property
    def accuracy(self) -> float:
        """Mean over seeds, in [0, 1]; −1 after a failure."""
        return -1.0 if self.reason else fmean(self.accuracies)

    @property
    def told(self) -> str:
        """``lr=0.1, epochs=5``."""
        return ", ".join(self.setting.told)


@dataclass(frozen=True)
class Choice:
    """What was chosen for one learner.

    Attributes:
        ranked: Everything tried, best first; of equals the one that comes first in the grid.
        undecided: Keys whose values all gave the same accuracies: the first tasks do not judge them.
    """

    learner: str
    ranked: tuple[Tried, ...]
    undecided: tuple[str, ...]


@dataclass(frozen=True)
class Tuned:
    """The configuration that was written, the record of how it was chosen, and the choices."""

    config: Path
    record: Path
    choices: tuple[Choice, ...]


def tune(
    name: str,
    overrides: Sequence[str],
    grid: Sequence[str],
    *,
    first_tasks: int = 1,
    results: Path = Path("results"),
    display: Display | None = None,
) -> Tuned:
    """Try a grid on the first task of the first class order, and write the best setting of each learner it concerns.

    Args:
        name: A configuration's file or shipped name.
        overrides: ``key=value`` as for ``cil run``.
        grid: ``KEY=V1,V2``, as for a sweep.
        first_tasks: Judge after so many tasks, on the held-out images of all of them. What acts between tasks (a
            moving average, a penalty on change) needs more than one.
        results: Where ``<name>/tuned.yaml`` and ``tuned.json`` are written.
        display: Terminal output; none by default.

    Raises:
        ConfigError: A wrong key or value, no grid, or a key whose settings cannot be ranked on one first task.
        StreamError: So many first tasks are the whole stream.
        TrainingError: Every setting of a learner failed.
    """
    todo = _wanted(name, overrides, grid)
    config = todo[0][1][0].config
    fraction = config.stream.validation or FRACTION
    held_out = config.stream.model_copy(update={"validation": fraction, "test_on": "validation"})
    accelerator = hardware.accelerator(config.hardware.device, config.precision)
    display = display if display is not None and accelerator.is_main_process else Display()
    data = FirstTasks(first_tasks)
    tried: dict[str, list[Tried]] = {}
    with display:
        for setting, found in todo:
            accelerator = hardware.accelerator(setting.config.hardware.device, setting.config.precision)
            one = _try(setting, found, held_out, data, accelerator, display)
            tried.setdefault(setting.learner, []).append(one)
            display.say(f"{setting.learner} {one.told}  " + (one.reason or f"{100 * one.accuracy:.1f} %"))
    choices = tuple(_choice(learner, of) for learner, of in tried.items())
    chosen_by = WORDS[first_tasks] if first_tasks < len(WORDS) else f"first_{first_tasks}_tasks"
    place = results / config.name
    record = {
        "chosen_by": chosen_by,
        "measure": "accuracy on held-out training images over all classes of these tasks, mean over seeds",
        "validation": fraction,
        **data.facts,
        "learners": {choice.learner: _record(choice) for choice in choices},
        "versions": versions(),
        "machine": hardware.facts(accelerator),
    }
    tuned = Tuned(place / "tuned.yaml", place / "tuned.json", choices)
    if accelerator.is_main_process:
        write(tuned.record, to_json(record))
        write(tuned.config, _as_yaml(choices, chosen_by))
    return tuned


def _wanted(name: str, overrides: Sequence[str], grid: Sequence[str]) -> list[tuple[Setting, list[Plan]]]:
    """The settings of the learners the grid concerns, with their runs; all of them are valid."""
    for text in grid:
        if text.split("=")[0].split(".")[0] in FIXED:
            raise ConfigError(f"--grid {text!r}: its values have different first tasks, and cannot be ranked")
    found = settings(name, overrides, grid)
    common = [key for key in found[0].values if key.split(".")[0] not in ("learner", "learners")]
    if common and len({setting.learner for setting in found}) > 1:
        raise ConfigError(f"--grid {common[0]}: it may be chosen for one learner at a time; give learners=[…] with one")
    found = [setting for setting in found if setting.values]
    if not found:
        raise ConfigError("cil tune needs a grid to choose from, e.g. --grid learner.lr=0.1,0.01")
    return [(setting, list(plans(first_order(setting.config)))) for setting in found]


def _try(
    setting: Setting, found: list[Plan], held_out: StreamConfig, data: FirstTasks, accelerator: Any, display: Display
) -> Tried:
    started, accuracies = time.perf_counter(), []
    for plan in found:
        stream, backbone = data.stream(plan, held_out, accelerator.device)
        try:
            rows = run_stages(
                build(plan, backbone),
                stream,
                accelerator=accelerator,
                seed=plan.seed,
                batch_size=plan.config.batch_size,
                display=display,
                stop_after=data.count,
            )
        except TrainingError as error:  # a learning rate too large is an answer, too
            return Tried(setting, (), time.perf_counter() - started, f"failed: {' '.join(str(error).split())}")
        r, _, total = matrices(rows)
        accuracies.append(float(metrics.seen_accuracy(r, total)[-1]))
    return Tried(setting, tuple(accuracies), time.perf_counter() - started)


def _choice(learner: str, tried: list[Tried]) -> Choice:
    """Rank what was tried, and find the keys that made no difference at all."""
    ranked = sorted(tried, key=lambda one: -one.accuracy)  # stable: of equals the first in the grid
    if ranked[0].reason:
        raise TrainingError(f"cil tune: every setting of {learner} failed; {ranked[0].told}: {ranked[0].reason}")
    undecided = []
    for key in tried[0].setting.values:
        groups: dict[str, set[tuple[float, ...]]] = {}
        for one in tried:
            others = repr([value for k, value in one.setting.values.items() if k != key])
            groups.setdefault(others, set()).add(one.accuracies)
        if len(tried) > len(groups) and all(len(group) == 1 for group in groups.values()):
            undecided.append(key)
    return Choice(learner, tuple(ranked), tuple(undecided))


def _record(choice: Choice) -> dict[str, Any]:
    return {
        "chosen": choice.ranked[0].setting.values,
        "undecided": list(choice.undecided),
        "tried": [
            {
                "setting": one.setting.values,
                "accuracy": None if one.reason else one.accuracy,
                "accuracies": list(one.accuracies),
                "seeds": one.setting.config.learners[0].seeds or one.setting.config.seeds,
                "failed": one.reason or None,
                "seconds": one.seconds,
                "config": dump(next(plans(first_order(one.setting.config))).config),
            }
            for one in choice.ranked
        ],
    }


def _as_yaml(choices: Sequence[Choice], chosen_by: str) -> str:
    """The tuned learners in a configuration of their own: where it came from keeps its other learners."""
    best = [(choice.learner, choice.ranked[0].setting.raw) for choice in choices]
    learners = [{**raw["learners"][0], "label": f"{learner}_tuned"} for learner, raw in best]
    for entry in learners:
        entry.pop("chosen_by", None)  # how it was chosen before
    raw = {**best[0][1], "chosen_by": chosen_by, "learners": learners}
    validated(Config, raw)
    count = sum(len(choice.ranked) for choice in choices)
    return (
        f"# Written by cil tune: chosen among {count} settings on held-out training images, see tuned.json beside it.\n"
        + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, default_flow_style=None)
    )
