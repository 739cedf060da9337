"""Selects hyper-parameters on the first task only, on images held out of its training split.

Only the first tasks' images of the training split are read; of the test split not even the list of files. A record of
all settings, their data and their accuracies is written beside the selected configuration.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cil import metrics
from cil.config import Config, StreamConfig
from cil.config.parsing import to_yaml
from cil.config.reading import validated
from cil.errors import ConfigError, TrainingError
from cil.learners import registry
from cil.results import matrices
from cil.runner import Observer, run_stages
from cil.runner.checkpoint import to_json
from cil.runner.display import Display
from cil.runner.plan import Plan, dump, plans
from cil.runner.provenance import versions
from cil.selection.first_tasks import FirstTasks, first_order
from cil.sweep.grid import Setting, expand_grid
from cil.utils import hardware
from cil.utils.files import write
from cil.utils.paths import expand

FRACTION = 0.2
"""Fraction of each class's training images to hold out, unless the configuration sets ``stream.validation``."""
WORDS = (
    "",
    "first_task",
    *(f"first_{number}_tasks" for number in ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")),
)
FIXED = ("stream", "data")
"""Sections that define the first task; settings on different first tasks cannot be ranked."""


@dataclass(frozen=True)
class Tried:
    """A setting and its accuracies on the held-out images over all classes of the first tasks.

    Attributes:
        setting: The setting.
        accuracies: One per training seed, in [0, 1].
        seconds: Duration of all its runs.
        reason: Why its training failed, else empty. A failed setting ranks below all others.
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
    def title(self) -> str:
        """The setting in one line, e.g. ``lr=0.1, epochs=5``."""
        return ", ".join(self.setting.assignments)


@dataclass(frozen=True)
class Choice:
    """The settings of one learner, ranked.

    Attributes:
        learner: Title of the learner.
        ranked: All settings, best first; settings of equal accuracy are in the order of the grid.
        undecided: Keys whose values all gave the same accuracies, so the first tasks cannot select one.
    """

    learner: str
    ranked: tuple[Tried, ...]
    undecided: tuple[str, ...]


@dataclass(frozen=True)
class Tuned:
    """The files of the selected configuration and of its record, and the choices."""

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
    """Run a grid on the first tasks of the first class order, and write the best setting of each learner in the grid.

    Args:
        name: File or shipped name of a configuration.
        overrides: ``key=value`` as for ``cil run``.
        grid: ``KEY=V1,V2``, as for a sweep.
        first_tasks: Number of tasks to learn before the test on the held-out images of all of them. Hyper-parameters
            that act between tasks (a moving average, a penalty on change) need more than one.
        results: Folder in which ``<name>/tuned.yaml`` and ``<name>/tuned.json`` are written at the end, and until
            then, after every setting, ``<name>/tuned.partial.json``.
        display: Terminal output; none by default.

    Raises:
        ConfigError: A key or value is wrong, there is no grid, or a key changes the first task itself.
        StreamError: The whole stream has no more tasks than ``first_tasks``.
        TrainingError: Every setting of a learner failed.
    """
    settings = _settings(name, overrides, grid)
    config = settings[0][1][0].config
    fraction = config.stream.validation or FRACTION
    held_out = config.stream.model_copy(update={"validation": fraction, "test_on": "validation"})
    accelerator = hardware.accelerator(config.hardware.device, config.precision)
    display = display if display is not None and accelerator.is_main_process else Display()
    data = FirstTasks(first_tasks)
    chosen_by = WORDS[first_tasks] if first_tasks < len(WORDS) else f"first_{first_tasks}_tasks"
    place = expand(results) / config.name
    partial = place / "tuned.partial.json"
    record: dict[str, Any] = {
        "chosen_by": chosen_by,
        "measure": "accuracy on held-out training images over all classes of these tasks, mean over seeds",
        "validation": fraction,
    }
    tried: dict[str, list[Tried]] = {}
    with display:
        for done, (setting, runs) in enumerate(settings, start=1):
            accelerator = hardware.accelerator(setting.config.hardware.device, setting.config.precision)
            result = _try(setting, runs, held_out, data, accelerator, display)
            tried.setdefault(setting.learner, []).append(result)
            display.say(f"{setting.learner} {result.title}  " + (result.reason or f"{100 * result.accuracy:.1f} %"))
            choices = tuple(_choice(learner, outcomes) for learner, outcomes in tried.items())
            record |= {
                "not_tried_yet": [f"{later.learner} {', '.join(later.assignments)}" for later, _ in settings[done:]],
                **data.facts,
                "learners": {choice.learner: _record(choice) for choice in choices},
                "versions": versions(),
                "machine": hardware.facts(accelerator),
            }
            if accelerator.is_main_process:  # so that an interruption loses one setting, and no earlier selection
                write(partial, to_json(record))
    for choice in choices:
        if choice.ranked[0].reason:
            best = choice.ranked[0]
            raise TrainingError(f"cil tune: every setting of {choice.learner} failed; {best.title}: {best.reason}")
    tuned = Tuned(place / "tuned.yaml", place / "tuned.json", choices)
    if accelerator.is_main_process:
        write(tuned.record, to_json(record))
        write(tuned.config, _as_yaml(choices, chosen_by))
        partial.unlink()
    return tuned


def _settings(name: str, overrides: Sequence[str], grid: Sequence[str]) -> list[tuple[Setting, list[Plan]]]:
    """The settings of the learners in the grid, with the runs of each; all of them are valid."""
    for text in grid:
        if text.split("=")[0].split(".")[0] in FIXED:
            raise ConfigError(f"--grid {text!r}: its values have different first tasks, so they cannot be ranked")
    settings = expand_grid(name, overrides, grid)
    common = [key for key in settings[0].values if key.split(".")[0] not in ("learner", "learners")]
    if common and len({setting.learner for setting in settings}) > 1:
        raise ConfigError(f"--grid {common[0]}: this key is shared by all learners; give learners=[…] with one")
    settings = [setting for setting in settings if setting.values]
    if not settings:
        raise ConfigError("cil tune needs a grid to select from, e.g. --grid learner.lr=0.1,0.01")
    return [(setting, list(plans(first_order(setting.config)))) for setting in settings]


def _try(
    setting: Setting, runs: list[Plan], held_out: StreamConfig, data: FirstTasks, accelerator: Any, display: Display
) -> Tried:
    started, accuracies = time.perf_counter(), []
    for plan in runs:
        stream, backbone = data.stream(plan, held_out, accelerator.device)
        try:
            rows = run_stages(
                registry.instantiate(plan.cls, plan.parameters, backbone),
                stream,
                accelerator=accelerator,
                seed=plan.seed,
                batch_size=plan.config.inference_batch_size,
                observer=Observer(display),
                stop_after=data.count,
                noise_filter=plan.config.noise_filter,
                pseudo=plan.config.pseudo,
            )
        except TrainingError as error:  # a learning rate may be too large; the other settings are still tried
            return Tried(setting, (), time.perf_counter() - started, f"failed: {' '.join(str(error).split())}")
        r, _, total = matrices(rows)
        accuracies.append(float(metrics.seen_accuracy(r, total)[-1]))
    return Tried(setting, tuple(accuracies), time.perf_counter() - started)


def _choice(learner: str, tried: list[Tried]) -> Choice:
    """Rank the settings of one learner, and list the keys that made no difference at all."""
    ranked = sorted(tried, key=lambda one: -one.accuracy)  # stable: equal ones keep the order of the grid
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
    """A configuration of the tuned learners only; the original configuration keeps its other learners."""
    best = [(choice.learner, choice.ranked[0].setting.raw) for choice in choices]
    learners = [{**raw["learners"][0], "label": f"{learner}_tuned"} for learner, raw in best]
    for entry in learners:
        entry.pop("chosen_by", None)  # how its hyper-parameters were chosen before
    raw = {**best[0][1], "chosen_by": chosen_by, "learners": learners}
    validated(Config, raw)
    count = sum(len(choice.ranked) for choice in choices)
    return (
        f"# Written by cil tune: selected among {count} settings on held-out training images; see tuned.json.\n"
        + to_yaml(raw, default_flow_style=None)
    )
