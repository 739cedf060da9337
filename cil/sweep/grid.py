"""From ``--grid KEY=V1,V2`` to the single runs of a sweep, each with a label, a folder and a command line of its own.

Keys are those of ``cil run``: ``learner.lr`` reaches the only learner, ``learners.ranpac.strength`` the one of that
name and no other, any other key (``precision``, ``stream.increment``) all of them. Several grids make their product.
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

import yaml

from cil.config import Config, LearnerEntry, named
from cil.configfile import override, validated, written
from cil.errors import ConfigError

if TYPE_CHECKING:
    from cil.plan import Plan

ELSEWHERE = {
    "name": "all settings of a sweep lie below one name",
    "learner": "list the learners in the configuration, or give learners=[…]",
    "learners": "list the learners in the configuration, or give learners=[…]",
    "orders": "give --orders",
    "seeds": "give --seeds",
    "hardware": "nothing there makes a run another run",
}
"""Keys that are no axis of a grid → what to do instead."""
LONGEST = 120
"""Characters of a label, which is a folder's name."""


@dataclass(frozen=True)
class Axis:
    """A key and the values it takes in turn.

    Attributes:
        key: As an override writes it.
        learner: Title of the learner it belongs to; None: every one.
        values: Two or more, or one to be seen in the label.
    """

    key: str
    learner: str | None
    values: tuple[Any, ...]

    @property
    def inner(self) -> str:
        """The key below its learner, or the key itself."""
        return self.key.split(".", 1 if self.key.startswith("learner.") else 2)[-1] if self.learner else self.key


@dataclass(frozen=True)
class Setting:
    """One learner at one point of the grid.

    Attributes:
        learner: Its title in the configuration, before the grid.
        values: The grid's keys and values at this point, those that concern this learner.
        told: The same for people: ``lr=0.1``.
        raw: The whole configuration as written, with this learner alone, labelled.
        config: The same, validated.
        changes: The overrides that turn the configuration that was given into this one.
    """

    learner: str
    values: dict[str, Any]
    told: tuple[str, ...]
    raw: dict[str, Any]
    config: Config
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One run of a sweep, and the ``cil run`` command that is the same."""

    plan: Plan
    command: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.plan.entry.title} {self.plan.place.name}"

    def line(self, results: Path) -> str:
        """The command as a shell takes it; it writes to the folder the sweep would write to."""
        return shlex.join(["cil", "run", *self.command, "--results", str(results)])


def settings(name: str, overrides: Sequence[str], grid: Sequence[str]) -> list[Setting]:
    """Every learner at every point of the grid that concerns it, in the order of the grid; all of them are valid.

    Args:
        name: A configuration's file or shipped name.
        overrides: ``key=value`` as for ``cil run``; applied before the grid.
        grid: ``KEY=V1,V2``, the values in YAML.

    Raises:
        ConfigError: A key that is no axis, no such learner, a value given twice, or a configuration that is not valid.
    """
    raw = written(name, overrides)
    validated(Config, raw, prefix="config: ")
    entries = {title_of(entry): named(entry) for entry in raw.get("learners") or [raw["learner"]]}
    axes = [_axis(text, raw, list(entries)) for text in grid]
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(f"--grid: {twice} is given twice; list all its values in one")
    rest = {key: value for key, value in raw.items() if key not in ("learner", "learners")}
    found: list[Setting] = []
    for title, entry in entries.items():
        own = [axis for axis in axes if axis.learner in (None, title)]
        found += _of_learner({**rest, "learners": [entry]}, title, own)
    return found


def trials(name: str, overrides: Sequence[str], grid: Sequence[str]) -> list[Trial]:
    """The runs of a sweep: every setting with every class order and seed.

    Raises:
        ConfigError: See :func:`settings`; or a hyper-parameter is wrong.
        PluginError: A learner cannot be found.
    """
    from cil.plan import plans

    found = []
    given = [text for text in overrides if not text.startswith(("orders=", "seeds="))]  # each run has its own
    for setting in settings(name, overrides, grid):
        for plan in plans(setting.config):
            change = [*setting.changes, f"orders={flow([plan.order])}", f"seeds={flow([plan.seed])}"]
            found.append(Trial(plan, (name, *given, *change)))
    places = [trial.plan.place for trial in found]
    twice = [place for place in dict.fromkeys(places) if places.count(place) > 1]
    if twice:
        raise ConfigError(f"two runs of the sweep would share the folder {twice[0]}; give each learner a label")
    return found


def _axis(text: str, raw: dict[str, Any], titles: list[str]) -> Axis:
    key, equals, listed = text.partition("=")
    head, *path = key.split(".")
    if not equals or not listed.strip():
        raise ConfigError(f"--grid {text!r}: write KEY=VALUE,VALUE, e.g. learner.lr=0.1,0.01")
    try:
        values = yaml.safe_load(f"[{listed}]")
    except yaml.YAMLError as error:
        raise ConfigError(f"--grid {text!r}: the values are not valid YAML: {' '.join(str(error).split())}") from None
    if head in ELSEWHERE and not (head in ("learner", "learners") and path):
        raise ConfigError(f"--grid {text!r}: {head} is no axis of a grid; {ELSEWHERE[head]}")
    texts = [flow(value) for value in values]
    for one in texts:
        if texts.count(one) > 1:
            raise ConfigError(f"--grid {text!r}: {one} is given twice")
        override(raw, [f"{key}={one}"])  # says what is wrong with the key in the words of `cil run`
    learner = {"learner": titles[0], "learners": path[0] if path else None}.get(head)
    axis = Axis(key, learner, tuple(values))
    if learner is not None and axis.inner in ("name", "class", "label", "orders", "seeds", "chosen_by"):
        raise ConfigError(f"--grid {text!r}: {axis.inner} is no axis of a grid; {ELSEWHERE['learners']}")
    return axis


def _of_learner(raw: dict[str, Any], title: str, axes: list[Axis]) -> Iterator[Setting]:
    """The product of the axes that concern one learner; ``raw`` has it alone."""
    shown = [axis.inner.rsplit(".", 1)[-1] for axis in axes]
    shown = [axis.inner if shown.count(name) > 1 else name for axis, name in zip(axes, shown, strict=True)]
    for point in itertools.product(*(axis.values for axis in axes)):
        own = {axis.inner: value for axis, value in zip(axes, point, strict=True) if axis.learner is not None}
        common = [f"{a.key}={flow(value)}" for a, value in zip(axes, point, strict=True) if a.learner is None]
        told = [f"{name}={plain(value)}" for name, value in zip(shown, point, strict=True)]
        label = [f"learner.label={flow(label_of(title, told))}"] if told else []
        changed = override(raw, [*common, *(f"learner.{key}={flow(value)}" for key, value in own.items()), *label])
        [entry] = changed["learners"]
        yield Setting(
            learner=title,
            values={axis.key: value for axis, value in zip(axes, point, strict=True)},
            told=tuple(told),
            raw=changed,
            config=validated(Config, changed, prefix="config: "),
            changes=(*common, f"learners={flow([{k: v for k, v in entry.items() if k not in ('orders', 'seeds')}])}"),
        )


def label_of(title: str, told: Sequence[str]) -> str:
    """A learner's name with what the grid says of it, fit to be a folder: ``ranpac_strength=10``.

    >>> label_of("ranpac", ["strength=10", "tuner={name: lora, rank: 4}"])
    'ranpac_strength=10_tuner=name-lora-rank-4'
    """
    text = "_".join([title, *told])
    name = re.sub(r"[^\w.=+\-]+", "-", re.sub(r"[{}\[\]'\"]", "", text)).strip("-")
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def plain(value: Any) -> str:
    """A value for people: 1e-05, true, null, {name: lora, rank: 4}."""
    return repr(value) if isinstance(value, float) else value if isinstance(value, str) else flow(value)


def flow(value: Any) -> str:
    """A value as YAML on one line, which reads back as the same."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def title_of(entry: Any) -> str:
    """What overrides and results call a learner's entry."""
    return LearnerEntry.model_validate(named(entry)).title
