"""Expands ``--grid KEY=V1,V2`` into the single runs of a sweep, each with its own label, folder and command line.

Keys are those of ``cil run``: ``learner.lr`` applies to the only learner, ``learners.ranpac.strength`` to the learner
of that name, and any other key (``precision``, ``stream.increment``) to all learners. Several grids form their product.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cil.config import Config, LearnerEntry, as_section
from cil.config.names import MOST_BYTES
from cil.config.parsing import parse, to_yaml
from cil.config.reading import override, read_raw, validated
from cil.errors import ConfigError, clipped, shortened
from cil.learners.registry import require_keys

if TYPE_CHECKING:
    from cil.runner.plan import Plan

ELSEWHERE = {
    "name": "all settings of a sweep share one name",
    "learner": "list the learners in the configuration, or give learners=[…]",
    "learners": "list the learners in the configuration, or give learners=[…]",
    "orders": "give --orders",
    "seeds": "give --seeds",
    "hardware": "its keys are not part of a run's identity",
}
"""Keys that cannot be an axis of a grid → what to do instead."""
LONGEST = 120
"""Maximum number of characters of a label, which becomes a folder name."""


@dataclass(frozen=True)
class Axis:
    """A key of the grid and its values.

    Attributes:
        key: The key as an override has it.
        learner: Title of the learner it belongs to; None: all learners.
        values: The values, all different; a single one only appears in the label.
    """

    key: str
    learner: str | None
    values: tuple[Any, ...]

    @property
    def inner(self) -> str:
        """The key within its learner's entry, or the whole key."""
        return self.key.split(".", 1 if self.key.startswith("learner.") else 2)[-1] if self.learner else self.key


@dataclass(frozen=True)
class Setting:
    """One learner at one point of the grid.

    Attributes:
        learner: The learner's title in the configuration, before the grid is applied.
        values: Keys and values of the grid at this point, for this learner.
        assignments: The same as texts for readers, e.g. ``lr=0.1``.
        raw: The whole configuration before validation, with this learner only, labelled.
        config: The same configuration, validated.
        changes: The overrides that turn the original configuration into this one.
    """

    learner: str
    values: dict[str, Any]
    assignments: tuple[str, ...]
    raw: dict[str, Any]
    config: Config
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, and the overrides of the ``cil run`` command that runs the same."""

    plan: Plan
    command: tuple[str, ...]

    @property
    def title(self) -> str:
        """The run in one line: learner, class order and seed."""
        return f"{self.plan.entry.title} {self.plan.place.name}"

    def line(self, results: Path) -> str:
        """The command for a shell; it writes to the same folder as the sweep."""
        return shlex.join(["cil", "run", *self.command, "--results", str(results)])


def expand_grid(name: str, overrides: Sequence[str], grid: Sequence[str]) -> list[Setting]:
    """Every learner at every point of its part of the grid, in the order of the grid.

    All settings are valid but for the values of hyper-parameters, which need torch to be checked
    (:func:`cil.runner.plan.plans`).

    Args:
        name: File or shipped name of a configuration.
        overrides: ``key=value`` as for ``cil run``; applied before the grid.
        grid: ``KEY=V1,V2`` with the values in YAML.

    Raises:
        ConfigError: A key cannot be an axis, a learner does not exist, a key or value is given twice, or a
            configuration is not valid.
        PluginError: It names a learner that does not exist.
    """
    raw = read_raw(name, overrides)
    validated(Config, raw, prefix="config: ")
    entries = {title_of(entry): as_section(entry) for entry in raw.get("learners") or [raw["learner"]]}
    rest = {key: value for key, value in raw.items() if key not in ("learner", "learners")}
    whole = {**rest, "learners": list(entries.values())}
    axes = [_axis(text, whole, list(entries)) for text in grid]
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"--grid: {twice} is given twice; list all its values in one")
    settings: list[Setting] = []
    for title, entry in entries.items():
        own = [axis for axis in axes if axis.learner in (None, title)]
        settings += _of_learner({**rest, "learners": [entry]}, title, own)
    for setting in settings:
        require_keys(setting.config.learners[0])
    return settings


def trials(name: str, overrides: Sequence[str], grid: Sequence[str]) -> list[Trial]:
    """The runs of a sweep: every setting with every class order and seed.

    Raises:
        ConfigError: As :func:`expand_grid` raises it; or a hyper-parameter is wrong, or two runs share a folder.
        PluginError: A learner cannot be found.
    """
    settings = expand_grid(name, overrides, grid)  # a misspelt name or key is found before torch is imported
    from cil.runner.plan import plans

    runs = []
    shared = [text for text in overrides if not text.startswith(("orders=", "seeds="))]  # each run sets its own
    for setting in settings:
        for plan in plans(setting.config):
            change = [*setting.changes, f"orders={flow([plan.order])}", f"seeds={flow([plan.seed])}"]
            runs.append(Trial(plan, (name, *shared, *change)))
    places = [trial.plan.place for trial in runs]
    twice = [place for place in dict.fromkeys(places) if places.count(place) > 1]
    if twice:
        raise ConfigError(f"two runs of the sweep would share the folder {twice[0]}; give each learner a label")
    return runs


def _axis(text: str, raw: dict[str, Any], titles: list[str]) -> Axis:
    key, equals, listed = text.partition("=")
    head, *path = key.split(".")
    if not equals or not listed.strip():
        raise ConfigError(f"--grid {shortened(text)}: write KEY=VALUE,VALUE, e.g. learner.lr=0.1,0.01")
    values = parse(f"[{listed}]", f"--grid {shortened(text)}")
    if head in ELSEWHERE and not (head in ("learner", "learners") and path):
        raise ConfigError(f"--grid {shortened(text)}: {head} cannot be an axis of a grid; {ELSEWHERE[head]}")
    texts = [flow(value) for value in values]
    for one in texts:
        if texts.count(one) > 1:
            raise ConfigError(f"--grid {shortened(text)}: {clipped(one)} is given twice")
        override(raw, [f"{key}={one}"])  # a wrong key raises the same error as in `cil run`
    learner = {"learner": titles[0], "learners": path[0] if path else None}.get(head)
    axis = Axis(key, learner, tuple(values))
    if learner is not None and axis.inner in ("name", "class", "label", "orders", "seeds", "chosen_by"):
        raise ConfigError(
            f"--grid {shortened(text)}: {axis.inner} cannot be an axis of a grid; {ELSEWHERE['learners']}"
        )
    return axis


def _of_learner(raw: dict[str, Any], title: str, axes: list[Axis]) -> Iterator[Setting]:
    """The product of the axes of one learner; ``raw`` is the configuration with this learner only."""
    names = [axis.inner.rsplit(".", 1)[-1] for axis in axes]
    names = [axis.inner if names.count(name) > 1 else name for axis, name in zip(axes, names, strict=True)]
    for point in itertools.product(*(axis.values for axis in axes)):
        own = {axis.inner: value for axis, value in zip(axes, point, strict=True) if axis.learner is not None}
        common = [f"{a.key}={flow(value)}" for a, value in zip(axes, point, strict=True) if a.learner is None]
        assignments = [f"{name}={plain(value)}" for name, value in zip(names, point, strict=True)]
        label = [f"learner.label={flow(label_of(title, assignments))}"] if assignments else []
        changed = override(raw, [*common, *(f"learner.{key}={flow(value)}" for key, value in own.items()), *label])
        [entry] = changed["learners"]
        yield Setting(
            learner=title,
            values={axis.key: value for axis, value in zip(axes, point, strict=True)},
            assignments=tuple(assignments),
            raw=changed,
            config=validated(Config, changed, prefix="config: "),
            changes=(*common, f"learners={flow([{k: v for k, v in entry.items() if k not in ('orders', 'seeds')}])}"),
        )


def label_of(title: str, assignments: Sequence[str]) -> str:
    """A learner's title and its assignments of the grid as a folder name, e.g. ``ranpac_strength=10``.

    >>> label_of("ranpac", ["strength=10", "tuner={name: lora, rank: 4}"])
    'ranpac_strength=10_tuner=name-lora-rank-4'
    """
    text = "_".join([title, *assignments])
    name = re.sub(r"[^\w.=+\-]+", "-", re.sub(r"[{}\[\]'\"]", "", text)).strip("-").strip(".")
    if len(name) <= LONGEST and len(name.encode()) <= MOST_BYTES:
        return name
    first = name[:LONGEST].encode()[: MOST_BYTES - 9].decode(errors="ignore")
    return f"{first}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def plain(value: Any) -> str:
    """A value as readable text: 1e-05, true, null, {name: lora, rank: 4}."""
    return repr(value) if isinstance(value, float) else value if isinstance(value, str) else flow(value)


def flow(value: Any) -> str:
    """A value as YAML on one line, which parses to the same value."""
    text = to_yaml(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def title_of(entry: Any) -> str:
    """The title of a learner's entry: its name in overrides and results."""
    return LearnerEntry.model_validate(as_section(entry)).title
