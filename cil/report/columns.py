"""The columns of a comparison: their numbers, units and cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cil.errors import RunError, nearest
from cil.report.row import SettingRow, paired
from cil.rows import SCORES

UNKNOWN = "–"


@dataclass(frozen=True)
class Column:
    """One number of the summary, over the runs of a row.

    Attributes:
        name: Name for ``--columns`` and ``--sort``; as in the summary of ``metrics.json`` unless ``key`` is set.
        heading: Printed heading.
        meaning: One line of explanation for readers of the page.
        factor: Factor from the summary's unit (fraction, byte, second) to the printed one.
        form: Format of the printed number.
        ascending: Whether smaller is better.
        exact: Whether it is a count, usually equal in every run; a deviation of 0 is then not printed.
        key: Key of the summary, if it differs from the name.
        difference: Whether it shows row − baseline on identical class orders and seeds.
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
        """Key of the number in the summary of ``metrics.json``."""
        return self.key or self.name

    def title(self, baseline: SettingRow | None = None) -> str:
        """The heading, with the name of the baseline."""
        return self.heading.format(baseline=baseline.title if baseline else UNKNOWN)

    def values(self, row: SettingRow, baseline: SettingRow | None = None) -> list[float]:
        """The numbers of the cell, one per run or pair, in the summary's unit."""
        if not self.difference:
            return row.values(self.summary_key)
        return paired(row, baseline, self.summary_key) if baseline else []

    def mean(self, row: SettingRow, baseline: SettingRow | None = None) -> float | None:
        """Mean of the numbers, in the printed unit; rows are sorted by it. None without numbers."""
        values = self.values(row, baseline)
        return self.factor * float(np.mean(values)) if values else None

    def cell(self, row: SettingRow, baseline: SettingRow | None = None) -> str:
        """The printed text: mean ± sample standard deviation if there are several runs; for differences also the number
        of pairs."""
        if self.difference and baseline is not None and row.title == baseline.title:
            return "baseline"
        values = self.factor * np.array(self.values(row, baseline))
        text = spread(values[:1] if self.exact and len(values) and np.ptp(values) == 0 else values, self.form)
        return f"{text} ({len(values)})" if self.difference and len(values) else text


def spread(values: np.ndarray, form: str = ".1f") -> str:
    """Mean ± sample standard deviation of values [N] as text; only the mean of one value, ``UNKNOWN`` for none."""
    if not len(values):
        return UNKNOWN
    deviation = f" ± {format(float(values.std(ddof=1)), form.lstrip('+'))}" if len(values) > 1 else ""
    return format(float(values.mean()), form) + deviation


def _percent(name: str, heading: str, meaning: str) -> Column:
    return Column(name, heading, meaning, 100)


COLUMNS: tuple[Column, ...] = (
    # in the order in which they are shown; a terminal shows the first ones that fit
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
        "forgetting with the task given, i.e. without growth of the label space, points",
        100,
        ".1f",
        True,
    ),
    _percent("backward_transfer", "BWT", "accuracy now − when just learned, mean over old tasks, points"),
    _percent("task_id_accuracy", "task id %", "fraction of images whose predicted class belongs to the right task"),
    _percent("within_task_accuracy", "within task %", "accuracy per image with the task given"),
    Column("trainable_parameters", "trained", "largest number of parameters trained in a stage", 1, ",.0f", True, True),
    Column(
        "kept_bytes", "kept MiB", "parameters, statistics and old images stored at the end", 2**-20, ".2f", True, True
    ),
    Column("passes_per_train_image", "passes", "forward passes per training image", 1, ".1f", True, True),
    Column("passes_per_test_image", "passes test", "forward passes per test image, all stages", 1, ".1f", True, True),
    Column("minutes", "minutes", "wall-clock time of learning and testing", 1 / 60, ".1f", True, key="seconds"),
    _percent("learning_accuracy", "learned %", "accuracy on a task when just learned, mean over tasks"),
)
FURTHER: tuple[Column, ...] = (
    # shown only by name
    Column("seconds", "seconds", "wall-clock time of learning and testing", 1, ".0f", True),
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
    _percent("router_accuracy", "router %", "fraction of images that are routed to the adapter of their task"),
    _percent("oracle_router_accuracy", "A_last % routed", "accuracy after the last stage if all images were so routed"),
    Column("forgetting_clipped", "forgetting ≥ 0", "forgetting as PyCIL and Mammoth print it", 100, ".1f", True),
    _percent("accuracy_base", "base %", "accuracy after the last stage on the classes of the first task"),
    _percent("accuracy_novel", "novel %", "accuracy after the last stage on the classes of all later tasks"),
    _percent("accuracy_harmonic", "harmonic %", "harmonic mean of the accuracies on base and novel classes"),
    Column(
        "performance_drop",
        "drop",
        "accuracy after the first stage minus that over all classes after the last, points",
        100,
        ".1f",
        True,
    ),
    _percent("accuracy_many", "many %", "accuracy after the last stage on classes with more than 100 training images"),
    _percent("accuracy_medium", "medium %", "the same on classes with 20 to 100"),
    _percent("accuracy_few", "few %", "the same on classes with fewer than 20"),
    _percent("accuracy_anytime", "A_AUC %", "area under the curve of accuracy over training images"),
    Column("forgetting_base", "forgetting base", "of classes that appear first in the first task", 100, ".1f", True),
    Column("forgetting_novel", "forgetting novel", "of classes that appear first later", 100, ".1f", True),
    Column("calibration_error", "ECE %", "expected calibration error after the last stage", 100, ".1f", True),
    Column("calibration_error_uncalibrated", "ECE % (T = 1)", "the same without calibration", 100, ".1f", True),
    *(
        column
        for score in SCORES
        for column in (
            _percent(f"unknown_auroc_{score}", f"AUROC % {score}", "unknown classes told from known ones by it"),
            Column(f"unknown_fpr95_{score}", f"FPR95 % {score}", "unknown images that pass as known", 100, ".1f", True),
        )
    ),
)
NAMED = {column.name: column for column in (*COLUMNS, *FURTHER)}


def find_column(name: str, option: str) -> Column:
    """The column of that name; ``option`` names the command-line option in the message.

    Raises:
        RunError: The name is unknown; the message suggests the nearest and lists all.
    """
    if name not in NAMED:
        raise RunError(f"{option} {name}: no such column{nearest(name, NAMED)}; there are: {', '.join(NAMED)}")
    return NAMED[name]


def select_columns(names: Sequence[str], ranked_by: Column = NAMED["accuracy_last"]) -> tuple[Column, ...]:
    """Columns by name; without names, the columns of every table.

    Args:
        names: Names as in ``metrics.json``; an entry may hold several, separated by commas.
        ranked_by: The first column if no names are given.

    Raises:
        RunError: A name is unknown.
    """
    every = [name.strip() for entry in names for name in entry.split(",") if name.strip()]
    return tuple(find_column(name, "--columns") for name in every) or tuple(dict.fromkeys((ranked_by, *COLUMNS)))
