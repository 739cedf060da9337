"""From folders to comparisons: filters, one comparison per protocol, ranked rows, and a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from cil import results, stream_values
from cil.errors import RunError, nearest
from cil.report.columns import COLUMNS, NAMED, Column
from cil.report.protocols import Run, by_protocol, describe_protocol, differences
from cil.report.row import SettingRow, order_of, paired, rows, seed_of


@dataclass(frozen=True)
class Filters:
    """The runs to compare; an empty filter passes everything.

    Attributes:
        learner: Patterns of learners' names, such as ``ranpac*``, or whole row titles.
        order: Class orders as configured: seeds or names.
        seed: Training seeds.
        complete: Whether only finished runs pass.
        protocol: Number of the only protocol that passes; tables count protocols from 1.
    """

    learner: Sequence[str] = ()
    order: Sequence[str] = ()
    seed: Sequence[int] = ()
    complete: bool = False
    protocol: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Runs of one protocol.

    Attributes:
        number: Number of the protocol, from 1, in the order of the given folders and before filtering.
        rows: The rows, best first.
        baseline: The row that is subtracted from the others; it need not be among ``rows``.
        lacks: The requested baseline, if it has no run of this protocol.
        differs: The facts by which this protocol differs from the others, by name; empty if it is the only one.
    """

    number: int
    rows: tuple[SettingRow, ...]
    baseline: SettingRow | None = None
    lacks: str = ""
    differs: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """One line about the protocol."""
        return describe_protocol(self.rows[0].runs[0])

    @property
    def runs(self) -> list[Run]:
        """The runs of all rows."""
        return [run for row in self.rows for run in row.runs]

    def shown(self, columns: Sequence[Column]) -> list[Column]:
        """The columns that have numbers: those of differences are dropped if no run can be paired. A table of all usual
        columns has those, too, that this kind of stream gives a meaning."""
        columns = list(columns)
        if set(COLUMNS) <= set(columns):
            at = columns.index(NAMED["accuracy_average"]) + 1
            columns[at:at] = [NAMED[name] for name in self.of_stream if NAMED[name] not in columns]
        return [c for c in columns if not c.difference or any(c.values(row, self.baseline) for row in self._others)]

    @property
    def of_stream(self) -> tuple[str, ...]:
        """The numbers of the summary that this kind of stream gives a meaning, beside those of every stream."""
        return tuple(dict.fromkeys(name for run in self.runs for name in stream_values.names(run["stages"][-1])))

    def why_no_differences(self) -> str:
        """The reason why the table shows no differences; empty if it shows some."""
        if self.lacks:
            return f"no differences: there is no run of {self.lacks}"
        if self.baseline is None or not self._others or any(paired(row, self.baseline) for row in self._others):
            return ""
        return f"no differences: no other finished run shares a class order and seed with {self.baseline.title}"

    @property
    def _others(self) -> list[SettingRow]:
        return [row for row in self.rows if self.baseline is None or row.title != self.baseline.title]


def rank(
    unranked: Iterable[SettingRow], column: Column = NAMED["accuracy_last"], baseline: SettingRow | None = None
) -> tuple[SettingRow, ...]:
    """Rows ranked by the mean of a column: finished ones, the best first, then those without a value, then unfinished
    ones."""

    def place(row: SettingRow) -> tuple[bool, bool, float]:
        mean = column.mean(row, baseline)
        return not row.finished, mean is None, (mean or 0.0) * (1 if column.ascending else -1)

    return tuple(sorted(unranked, key=place))


def compare_runs(
    paths: Sequence[Path],
    filters: Filters = Filters(),
    baseline: str | None = None,
    sort: Column = NAMED["accuracy_last"],
) -> list[Comparison]:
    """Compares all runs below ``paths``; one comparison per protocol.

    Args:
        paths: Run folders, or folders that contain some.
        filters: The runs to compare. A baseline need not pass ``learner``.
        baseline: Title of a row, or ``none`` for no differences; by default the best finished row that stores no
            images, which excludes ``joint``.
        sort: Column to rank by.

    Raises:
        RunError: There is nothing to compare, a result is damaged, or a filter or baseline matches nothing; the
            message then suggests the nearest existing one.
    """
    by_folder: dict[Path, Run] = {}
    for run in results.find(list(paths)):
        by_folder.setdefault(Path(run["folder"]).resolve(), run)  # a folder given twice counts once
    groups = by_protocol(list(by_folder.values()))
    differing = differences(groups)
    if filters.protocol is not None and not 1 <= filters.protocol <= len(groups):
        raise RunError(f"--protocol {filters.protocol}: no such protocol; allowed: 1 to {len(groups)}")
    numbers = range(len(groups)) if filters.protocol is None else [filters.protocol - 1]
    passing = _passing({i: groups[i] for i in numbers}, filters)
    pool = [Comparison(i + 1, tuple(rows(runs)), differs=differing[i]) for i, runs in passing.items()]
    all_rows = {one.number: one.rows for one in pool}
    compared = []
    for one in _matching(pool, filters.learner):
        base = _baseline(baseline, all_rows[one.number], one.rows)
        lacks = baseline if baseline and baseline != "none" and base is None else ""
        compared.append(replace(one, rows=rank(one.rows, sort, base), baseline=base, lacks=lacks))
    if all(one.lacks for one in compared):
        titles = sorted({row.title for one in pool for row in one.rows})
        raise RunError(f"--baseline {baseline}: no such row{nearest(str(baseline), titles)}; {_list(titles)}, none")
    return compared


def _passing(groups: dict[int, list[Run]], filters: Filters) -> dict[int, list[Run]]:
    """The runs that pass the filters on runs, without groups that have none."""
    every = [run for runs in groups.values() for run in runs]
    seeds = [str(seed) for seed in filters.seed]
    for option, values, existing in (
        ("--order", filters.order, sorted({order_of(run) for run in every})),
        ("--seed", seeds, sorted({str(seed_of(run)) for run in every})),
    ):
        for value in values:
            if value not in existing:
                raise RunError(f"{option} {value}: no such run{nearest(value, existing)}; {_list(existing)}")

    def passes(run: Run) -> bool:
        return (
            (not filters.order or order_of(run) in filters.order)
            and (not filters.seed or seed_of(run) in filters.seed)
            and (not filters.complete or run["complete"])
        )

    passing = {i: some for i, runs in groups.items() if (some := [run for run in runs if passes(run)])}
    if not passing:
        options = [f"--order {value}" for value in filters.order] + [f"--seed {value}" for value in seeds]
        options += ["--complete"] if filters.complete else []
        raise RunError(f"none of the {len(every)} runs passes {' '.join(options)}; omit one of these options")
    return passing


def _matching(comparisons: list[Comparison], patterns: Sequence[str]) -> list[Comparison]:
    """The comparisons with only the rows that match a pattern, without comparisons that have none."""
    every = [row for one in comparisons for row in one.rows]
    names = sorted({row.learner for row in every})
    for pattern in patterns:
        if not any(_matches(row, pattern) for row in every):
            known = [*names, *(f"{name[: len(pattern) - 1]}*" for name in names if pattern.endswith("*"))]
            raise RunError(f"--learner {pattern}: matches none{nearest(pattern, known)}; {_list(names)}")
    if not patterns:
        return comparisons
    matching = [
        replace(one, rows=tuple(r for r in one.rows if any(_matches(r, p) for p in patterns))) for one in comparisons
    ]
    return [one for one in matching if one.rows]


def _matches(row: SettingRow, pattern: str) -> bool:
    return fnmatchcase(row.learner, pattern) or pattern == row.title


def _list(names: Sequence[str], most: int = 8) -> str:
    return f"there are: {', '.join(names[:most])}" + (f" and {len(names) - most} more" if len(names) > most else "")


def _baseline(name: str | None, every: Sequence[SettingRow], shown: Sequence[SettingRow]) -> SettingRow | None:
    """The row of that title; without a name, the best finished row, preferably one that stores no images."""
    if name == "none":
        return None
    if name is not None:
        return next((row for row in every if row.title == name), None)
    ranked = [row for row in rank(shown) if row.finished]
    return next((row for row in ranked if not row.runs[0]["stores_images"]), next(iter(ranked), None))
