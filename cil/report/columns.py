"""The columns of a comparison: what each shows, in which unit, and what stands in a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cil.errors import RunError, nearest
from cil.report.row import Row, paired

UNKNOWN = "–"


@dataclass(frozen=True)
class Column:
    """A number of the summary over a row's runs.

    Attributes:
        name: As in the summary of ``metrics.json``; what ``--columns`` and ``--sort`` take.
        heading: As printed.
        meaning: One line for a reader of the page.
        factor: From the summary's unit (fractions, bytes, seconds) to the printed one.
        form: Format of the printed number.
        ascending: Whether a small number is the good one.
        exact: A count, the same in every run as a rule; a spread of nothing is not printed.
        key: Which number of the summary, where that is not the name.
        difference: Shows row − baseline on identical class orders and seeds.
    """

    name: str
    heading: str
    meaning: str
    factor: float = 1
    form: str = ".1f"
    ascending: bool = False
    exact: bool = False
    key: str = ""
    difference: bool = False

    @property
    def summary_key(self) -> str:
        return self.key or self.name

    def title(self, baseline: Row | None = None) -> str:
        return self.heading.format(baseline=baseline.title if baseline else UNKNOWN)

    def values(self, row: Row, baseline: Row | None = None) -> list[float]:
        """The numbers of the cell, one a run or one a pair, in the summary's unit."""
        if not self.difference:
            return row.values(self.summary_key)
        return paired(row, baseline, self.summary_key) if baseline else []

    def mean(self, row: Row, baseline: Row | None = None) -> float | None:
        """What the cell is sorted by, in the printed unit."""
        values = self.values(row, baseline)
        return self.factor * float(np.mean(values)) if values else None

    def cell(self, row: Row, baseline: Row | None = None) -> str:
        """Mean ± sample standard deviation where there are several; of differences, the number of pairs as well."""
        if self.difference and baseline is not None and row.title == baseline.title:
            return "baseline"
        values = self.factor * np.array(self.values(row, baseline))
        text = spread(values[:1] if self.exact and len(values) and np.ptp(values) == 0 else values, self.form)
        return f"{text} ({len(values)})" if self.difference and len(values) else text


def spread(values: np.ndarray, form: str = ".1f") -> str:
    """Mean ± sample standard deviation [N], the latter without a sign and only of several; of none, ``UNKNOWN``."""
    if not len(values):
        return UNKNOWN
    deviation = f" ± {format(float(values.std(ddof=1)), form.lstrip('+'))}" if len(values) > 1 else ""
    return format(float(values.mean()), form) + deviation


def _percent(name: str, heading: str, meaning: str) -> Column:
    return Column(name, heading, meaning, 100)


COLUMNS: tuple[Column, ...] = (
    # in the order in which they are shown; a terminal shows as many as fit, counted from the first
    _percent("accuracy_last", "A_last %", "accuracy per image over all classes after the last stage, no task id"),
    Column(
        "difference",
        "Δ {baseline}",
        "A_last minus the baseline's on identical class orders and seeds, points; in brackets the number of pairs",
        100,
        "+.1f",
        key="accuracy_last",
        difference=True,
    ),
    _percent("accuracy_average", "A_avg %", "mean over stages of the accuracy over all classes seen"),
    Column("forgetting", "forgetting", "best earlier accuracy − now, mean over old tasks, points", 100, ".1f", True),
    Column(
        "forgetting_within_task",
        "…task given",
        "forgetting with the task given, that is without the growth of the label space, points",
        100,
        ".1f",
        True,
    ),
    _percent("backward_transfer", "BWT", "accuracy now − when just learned, mean over old tasks, points"),
    _percent("task_id_accuracy", "task id %", "how often the predicted class is one of the right task"),
    _percent("within_task_accuracy", "within task %", "accuracy per image with the task given"),
    Column("trainable_parameters", "trained", "parameters trained in a stage, at most", 1, ",.0f", True, True),
    Column(
        "kept_bytes", "kept MiB", "parameters, statistics and old images kept to the end", 2**-20, ".2f", True, True
    ),
    Column("passes_per_train_image", "passes", "forward passes a training image", 1, ".1f", True, True),
    Column("passes_per_test_image", "passes test", "forward passes a test image, all stages", 1, ".1f", True, True),
    Column("minutes", "minutes", "learning and testing, wall clock", 1 / 60, ".1f", True, key="seconds"),
    _percent("learning_accuracy", "learned %", "accuracy on a task when just learned, mean over tasks"),
)
FURTHER: tuple[Column, ...] = (
    # by name only
    Column("seconds", "seconds", "learning and testing, wall clock", 1, ".0f", True),
    Column(
        "difference_average",
        "Δ A_avg {baseline}",
        "A_avg minus the baseline's on identical class orders and seeds, points; in brackets the number of pairs",
        100,
        "+.1f",
        key="accuracy_average",
        difference=True,
    ),
    _percent("accuracy_last_task_mean", "A_last % (tasks)", "accuracy after the last stage, mean over tasks"),
    _percent("accuracy_average_task_mean", "A_avg % (tasks)", "mean over stages of the accuracy, mean over tasks"),
    _percent("router_accuracy", "router %", "how often a learner with an adapter a task takes an image for its task"),
    _percent("oracle_router_accuracy", "A_last % routed", "accuracy after the last stage if it always did"),
    Column("forgetting_clipped", "forgetting ≥ 0", "forgetting as PyCIL and Mammoth print it", 100, ".1f", True),
)
NAMED = {column.name: column for column in (*COLUMNS, *FURTHER)}


def named(name: str, option: str) -> Column:
    """The column of that name.

    Raises:
        RunError: Unknown; names the nearest, and all there are.
    """
    if name not in NAMED:
        raise RunError(f"{option} {name}: no such column{nearest(name, NAMED)}; there are: {', '.join(NAMED)}")
    return NAMED[name]


def chosen(names: Sequence[str], ranked_by: Column = NAMED["accuracy_last"]) -> tuple[Column, ...]:
    """Columns by name, each entry one or several with commas between; without any, those of every table.

    Args:
        names: As in ``metrics.json``.
        ranked_by: Stands first where no names are given.

    Raises:
        RunError: A name is unknown.
    """
    every = [name.strip() for entry in names for name in entry.split(",") if name.strip()]
    return tuple(named(name, "--columns") for name in every) or tuple(dict.fromkeys((ranked_by, *COLUMNS)))
