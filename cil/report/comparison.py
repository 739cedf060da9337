"""From folders to comparisons: filters, one comparison a protocol, ranked rows, a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path

from cil import results
from cil.errors import RunError, nearest
from cil.report.columns import NAMED, Column
from cil.report.protocols import Run, by_protocol, describe, differences
from cil.report.row import Row, order_of, paired, rows, seed_of


@dataclass(frozen=True)
class Filters:
    """What to leave in; empty keeps everything.

    Attributes:
        learner: Patterns such as ``ranpac*`` of learners' names or of whole row titles.
        order: Class orders as configured: seeds or names.
        seed: Training seeds.
        complete: Only finished runs.
        protocol: Only the protocol of that number, from 1, as the tables count them.
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
        number: Counts the protocols from 1, in the order of the folders given, before any is filtered out.
        rows: Best first.
        baseline: What the others' differences are to; its row need not be shown.
        lacks: The baseline that was asked for and has no run of this protocol.
        differs: The facts that tell this protocol from the others, by name; empty if there is one.
    """

    number: int
    rows: tuple[Row, ...]
    baseline: Row | None = None
    lacks: str = ""
    differs: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return describe(self.rows[0].runs[0])

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.runs]

    def shown(self, columns: Sequence[Column]) -> list[Column]:
        """Those with something to say: no differences where nothing can be subtracted."""
        return [c for c in columns if not c.difference or any(c.values(row, self.baseline) for row in self._others)]

    def why_no_differences(self) -> str:
        """What to tell a reader who looks for them, if anything."""
        if self.lacks:
            return f"no differences: no run of {self.lacks} is here"
        if self.baseline is None or not self._others or any(paired(row, self.baseline) for row in self._others):
            return ""
        return f"no differences: no other finished run shares a class order and seed with {self.baseline.title}"

    @property
    def _others(self) -> list[Row]:
        return [row for row in self.rows if self.baseline is None or row.title != self.baseline.title]


def rank(found: Iterable[Row], column: Column = NAMED["accuracy_last"], baseline: Row | None = None) -> tuple[Row, ...]:
    """Finished rows by the mean of a column, the good end first, then those without a value, then the unfinished."""

    def place(row: Row) -> tuple[bool, bool, float]:
        mean = column.mean(row, baseline)
        return not row.finished, mean is None, (mean or 0.0) * (1 if column.ascending else -1)

    return tuple(sorted(found, key=place))


def load(
    paths: Sequence[Path],
    filters: Filters = Filters(),
    baseline: str | None = None,
    sort: Column = NAMED["accuracy_last"],
) -> list[Comparison]:
    """Everything below ``paths``, a comparison a protocol.

    Args:
        paths: Run folders or folders that hold some.
        filters: What to leave in. A baseline need not pass ``learner``.
        baseline: Title of a row, ``none`` for no differences; by default the best finished row that keeps no old
            images (which a joint bound does).
        sort: What to rank by.

    Raises:
        RunError: Nothing to compare, a damaged result, or a filter or baseline that matches nothing; names the
            nearest that is there.
    """
    found: dict[Path, Run] = {}
    for run in results.find(list(paths)):
        found.setdefault(Path(run["folder"]).resolve(), run)  # given twice, counted once
    groups = by_protocol(list(found.values()))
    apart = differences(groups)
    if filters.protocol is not None and not 1 <= filters.protocol <= len(groups):
        raise RunError(f"--protocol {filters.protocol}: no such protocol; allowed: 1 to {len(groups)}")
    numbers = range(len(groups)) if filters.protocol is None else [filters.protocol - 1]
    left = _passing({i: groups[i] for i in numbers}, filters)
    pool = [Comparison(i + 1, tuple(rows(runs)), differs=apart[i]) for i, runs in left.items()]
    everything = {one.number: one.rows for one in pool}
    compared = []
    for one in _matching(pool, filters.learner):
        base = _baseline(baseline, everything[one.number], one.rows)
        lacks = baseline if baseline and baseline != "none" and base is None else ""
        compared.append(replace(one, rows=rank(one.rows, sort, base), baseline=base, lacks=lacks))
    if all(one.lacks for one in compared):
        titles = sorted({row.title for one in pool for row in one.rows})
        raise RunError(f"--baseline {baseline}: no such row{nearest(str(baseline), titles)}; {_there(titles)}, none")
    return compared


def _passing(groups: dict[int, list[Run]], filters: Filters) -> dict[int, list[Run]]:
    """The runs that pass the filters on runs; groups of which none does are left out."""
    every = [run for runs in groups.values() for run in runs]
    seeds = [str(seed) for seed in filters.seed]
    for option, values, there in (
        ("--order", filters.order, sorted({order_of(run) for run in every})),
        ("--seed", seeds, sorted({str(seed_of(run)) for run in every})),
    ):
        for value in values:
            if value not in there:
                raise RunError(f"{option} {value}: no such run{nearest(value, there)}; {_there(there)}")

    def passes(run: Run) -> bool:
        return (
            (not filters.order or order_of(run) in filters.order)
            and (not filters.seed or seed_of(run) in filters.seed)
            and (not filters.complete or run["complete"])
        )

    left = {i: kept for i, runs in groups.items() if (kept := [run for run in runs if passes(run)])}
    if not left:
        given = [f"--order {value}" for value in filters.order] + [f"--seed {value}" for value in seeds]
        given += ["--complete"] if filters.complete else []
        raise RunError(f"none of the {len(every)} runs passes {' '.join(given)}; leave one of these out")
    return left


def _matching(comparisons: list[Comparison], patterns: Sequence[str]) -> list[Comparison]:
    """Comparisons with the rows that match a pattern; those of which none does are left out."""
    every = [row for one in comparisons for row in one.rows]
    names = sorted({row.learner for row in every})
    for pattern in patterns:
        if not any(_matches(row, pattern) for row in every):
            known = [*names, *(f"{name[: len(pattern) - 1]}*" for name in names if pattern.endswith("*"))]
            raise RunError(f"--learner {pattern}: matches none{nearest(pattern, known)}; {_there(names)}")
    if not patterns:
        return comparisons
    left = [
        replace(one, rows=tuple(r for r in one.rows if any(_matches(r, p) for p in patterns))) for one in comparisons
    ]
    return [one for one in left if one.rows]


def _matches(row: Row, pattern: str) -> bool:
    return fnmatchcase(row.learner, pattern) or pattern == row.title


def _there(names: Sequence[str], most: int = 8) -> str:
    return f"there are: {', '.join(names[:most])}" + (f" and {len(names) - most} more" if len(names) > most else "")


def _baseline(name: str | None, every: Sequence[Row], shown: Sequence[Row]) -> Row | None:
    if name == "none":
        return None
    if name is not None:
        return next((row for row in every if row.title == name), None)
    ranked = [row for row in rank(shown) if row.finished]
    return next((row for row in ranked if not row.runs[0]["stores_images"]), next(iter(ranked), None))
