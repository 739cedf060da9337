"""The published experiments: the shipped configurations of each, and which of their runs are finished."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from cil import report, results
from cil.config.reading import read_raw
from cil.errors import ConfigError, RunError, nearest
from cil.sweep.grid import Trial, flow, trials


@dataclass(frozen=True)
class Campaign:
    """Runs that share a folder below the results, and a table.

    Attributes:
        name: Folder, which is also the ``name`` of its configurations.
        configs: Shipped configurations; if two hold the same run, the first counts.
        overrides: Overrides per configuration.
        kind: Kind of its table in results/README.md; see tables.py. ``leads``: the page's table of one learner on every
            stream names it.
        beside: Folders whose runs the table shows as well.
    """

    name: str
    configs: tuple[str, ...]
    overrides: dict[str, tuple[str, ...]] = field(default_factory=dict)
    kind: str = "table"
    beside: tuple[str, ...] = ()

    @property
    def mark(self) -> str:
        """The mark above its table in results/README.md."""
        others = f":{','.join(self.beside)}" if self.beside else ""
        return f"<!-- {self.kind}: results/reference/{self.name}{others} -->"


TINY = "split_tiny_imagenet100"
SHIPPED = "{name: vit_tiny_patch8_64.tinyimagenet100}"
RANDOM = "{name: vit_tiny_patch8_64.tinyimagenet100, weights: random}"
MEMBERS = {  # of the ensembles, in place of the two sizes of the shipped backbone
    "one_size": ("backbones=null",),
    "with_random": (f"backbones=[{SHIPPED}, {RANDOM}]",),
    "with_random_stacked": (f"backbones=[{SHIPPED}, {RANDOM}]", "combine={weights: stack}"),
}
CAMPAIGNS = (
    Campaign("quickstart", ("quickstart",)),
    Campaign(TINY, (f"{TINY}/ncm", f"{TINY}/frozen"), {f"{TINY}/ncm": ("orders=[1993, natural]",)}),
    Campaign(
        f"{TINY}_50", tuple(f"{TINY}/{n}" for n in ("bounds", "adapted", "prompts", "merging", "avalanche", "ewc"))
    ),
    Campaign(f"{TINY}_records", (f"{TINY}/records",)),
    Campaign(f"{TINY}_records_2026", (f"{TINY}/records_2026",)),
    Campaign(f"{TINY}_orders", (f"{TINY}/orders",)),
    Campaign(f"{TINY}_defaults", (f"{TINY}/defaults",), kind="settings", beside=(f"{TINY}_orders", f"{TINY}_records")),
    Campaign(f"{TINY}_layers", (f"{TINY}/layers",)),
    Campaign(f"{TINY}_two_sizes", (f"{TINY}/two_sizes",)),
    *(
        Campaign(f"{TINY}_{name}", (f"{TINY}/two_sizes",), {f"{TINY}/two_sizes": (f"name={TINY}_{name}", *members)})
        for name, members in MEMBERS.items()
    ),
    Campaign(f"{TINY}_min", (f"{TINY}/min",)),
    Campaign(f"{TINY}_confidence", (f"{TINY}/confidence",)),
    *(
        Campaign(f"{TINY}_{name}", (f"{TINY}/{name}",))
        for name in ("few_shots", "long_tail", "blurry", "online", "noisy")
    ),
    Campaign(f"{TINY}_matrix", (f"{TINY}/matrix",), kind="matrix"),
    Campaign("cifar10_500", ("cifar10/frozen",)),
    Campaign("cifar10_50", ("cifar10/defaults", "cifar10/chosen"), kind="settings"),
    Campaign("digits_all", ("digits/frozen",)),
    Campaign("digits_50", ("digits/defaults", "digits/chosen"), kind="settings"),
    Campaign(f"{TINY}_long", (f"{TINY}/long", f"{TINY}/long_chosen"), kind="settings"),
    Campaign(f"{TINY}_one_default", (f"{TINY}/one_default",), kind="leads"),
    Campaign(f"{TINY}_long_one_default", (f"{TINY}/one_default_long",), kind="leads"),
    *(
        Campaign(f"{name}_one_default", (f"{data}/one_default",), {f"{data}/one_default": overrides}, "leads")
        for name, data, overrides in (
            ("cifar10_50", "cifar10", ()),
            ("cifar10_500", "cifar10", ("name=cifar10_500_one_default", "data.per_class=null")),
            ("digits_50", "digits", ()),
            ("digits_all", "digits", ("name=digits_all_one_default", "data.per_class=null")),
        )
    ),
)


@dataclass(frozen=True)
class Job:
    """One run and its progress.

    Attributes:
        trial: Plan, and the ``cil run`` command for it.
        stages: Number of finished stages; None if the folder holds a run of other settings.
        complete: Whether all stages are finished.
        seconds: Duration of a finished run; of any other, the mean of the setting's other class orders or of the
            learner's other settings; None if none was timed.
    """

    trial: Trial
    stages: int | None
    complete: bool
    seconds: float | None

    @property
    def title(self) -> str:
        return self.trial.plan.place.as_posix()

    def state(self) -> str:
        if self.complete:
            return f"done in {self.seconds:.0f} s"
        if self.stages is None:
            return "holds a run of other settings"
        return f"{self.stages} stages done" if self.stages else "to do"


def pick(patterns: Sequence[str]) -> list[Campaign]:
    """Campaigns by name or pattern; all of them without a pattern.

    Raises:
        ConfigError: A pattern matches none.
    """
    names = [campaign.name for campaign in CAMPAIGNS]
    wanted = _matching("--streams", patterns, names)
    return [campaign for campaign in CAMPAIGNS if campaign.name in wanted]


def runs(
    campaigns: Iterable[Campaign],
    learners: Sequence[str] = (),
    orders: Sequence[str] = (),
    per_class: int | None = None,
    data_root: Path | None = None,
) -> list[Trial]:
    """The runs of campaigns, each once, in the order of the configurations; all of them are valid.

    Args:
        campaigns: Campaigns to run.
        learners: Patterns of labels; empty for all.
        orders: Class orders in place of the configurations'; a learner with its own list runs only those it contains.
        per_class: Training images per class in place of the configurations', in separate folders (``…_at_20``).
        data_root: Folder in place of the configurations' ``data.root``.

    Raises:
        CilError: A pattern matches none, a configuration is invalid, or data are missing.
    """
    found: dict[Path, Trial] = {}
    for campaign in campaigns:
        for name in campaign.configs:
            given = [*campaign.overrides.get(name, ()), *([f"orders=[{', '.join(orders)}]"] if orders else [])]
            data = read_raw(name).get("data", {})
            if data_root is not None and "root" in data:
                given.append(f"data.root={flow(str(data_root))}")
            if per_class is not None and per_class != data.get("per_class"):
                given += [f"data.per_class={per_class}", f"name={campaign.name}_at_{per_class}"]
            for trial in trials(name, given, []):
                if not orders or str(trial.plan.order) in orders:
                    found.setdefault(trial.plan.place, trial)
    titles = list(dict.fromkeys(trial.plan.entry.title for trial in found.values()))
    wanted = _matching("--learners", learners, titles)
    picked = [trial for trial in found.values() if trial.plan.entry.title in wanted]
    if not picked:
        raise ConfigError(f"--orders {' '.join(orders)}: none of these learners has a run of these class orders")
    for data in dict.fromkeys((t.plan.config.data.root, t.plan.config.data.train) for t in picked):
        if data[0] is not None and not (data[0] / (data[1] or "")).exists():
            raise ConfigError(f"data.root: {data[0] / (data[1] or '')} does not exist; say where with --data-root")
    return picked


def _matching(option: str, patterns: Sequence[str], known: Sequence[str]) -> set[str]:
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            few = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
            raise ConfigError(f"{option} {pattern}: matches none{nearest(pattern, known)}; there are: {few}")
    return {name for pattern in patterns or ["*"] for name in fnmatch.filter(known, pattern)}


def jobs(wanted: Sequence[Trial], root: Path) -> list[Job]:
    """The progress of each run below the results folder ``root``.

    Raises:
        RunError: A ``metrics.json`` is damaged.
    """
    from cil.runner.identity import identity_settings
    from cil.runner.plan import dump

    there = {file.parent: results.read_run(file.parent) for file in root.glob("*/*/*/metrics.json")}
    times: dict[Path | str | None, list[float]] = {}  # by the label's folder and by the learner's name
    for folder, run in there.items():
        if run["complete"]:
            for key in (folder.parent, run["config"]["learners"][0].get("name")):
                times.setdefault(key, []).append(run["summary"]["seconds"])
    found = []
    for trial in wanted:
        folder = root / trial.plan.place
        run = there.get(folder)
        known = times.get(folder.parent) or times.get(trial.plan.entry.name)
        expected = mean(known) if known else None
        if run is None:
            found.append(Job(trial, 0, False, expected))
        elif identity_settings(run["config"]) != identity_settings(dump(trial.plan.config)):
            found.append(Job(trial, None, False, expected))
        else:
            seconds = run["summary"]["seconds"] if run["complete"] else expected
            found.append(Job(trial, len(run["stages"]), run["complete"], seconds))
    return found


def costs(root: Path) -> str:
    """A table of the published runs: number, configurations, and hours if run one after the other."""
    lines = ["| runs in | made by | finished | class orders | hours |", "|---|---|---|---|---|"]
    every: list[dict] = []
    for campaign in CAMPAIGNS:
        try:
            found = [run for run in results.find([root / campaign.name]) if run["complete"]]
        except RunError:  # nothing there yet
            continue
        every += found
        orders = sorted({str(run["config"]["orders"][0]) for run in found})
        lines.append(
            f"| `{campaign.name}` | {', '.join(f'`{name}`' for name in campaign.configs)} | {len(found)} | "
            f"{', '.join(orders)} | {_hours(found):.1f} |"
        )
    lines.append(f"| all | | {len(every)} | | {_hours(every):.1f} |")
    return "\n".join(lines) + "\n"


def _hours(found: Iterable[dict]) -> float:
    return sum(run["summary"]["seconds"] for run in found) / 3600


def sections(page: str, root: Path) -> str:
    """results/README.md with the commands and a table for every campaign that has finished runs and no table yet."""
    for campaign in CAMPAIGNS:
        if campaign.kind == "leads" or campaign.mark in page or not (root / campaign.name).is_dir():
            continue
        if not any(row.finished for one in report.compare_runs([root / campaign.name]) for row in one.rows):
            continue
        commands = "\n".join(f"`{_command(name)}`" for name in campaign.configs)
        before, heading, after = page.partition("## Reproduce the results\n")
        page = f"{before}{commands}\n\n{campaign.mark}\n<!-- /table -->\n\n{heading}{after}"
    return page


def _command(config: str) -> str:
    return f"cil run {config}" + (" data.root=../shared/data" if "root" in read_raw(config).get("data", {}) else "")
