"""Ranks backbones by scores of their frozen features on the first task's training images, without training.

As in ``cil tune``, only the first task's images of the training split are read
(:class:`~cil.selection.first_tasks.FirstTasks`); the test split is not opened. The scores are those of
:mod:`cil.selection.transferability`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import Tensor

from cil.backbone import load_backbone
from cil.config import BackboneConfig, Config
from cil.config.parsing import parse, to_yaml
from cil.config.reading import validated
from cil.errors import CilError, ConfigError, StreamError, shortened
from cil.features import FeatureCache
from cil.runner.checkpoint import to_json
from cil.runner.display import Display
from cil.runner.plan import Plan, plans
from cil.runner.provenance import versions
from cil.selection.first_tasks import FirstTasks, first_order
from cil.selection.together import choose_together
from cil.selection.transferability import RANKING, SCORES, Scores, agreement, leep, scores
from cil.utils import hardware
from cil.utils.files import write
from cil.utils.paths import expand

Candidate = str | Mapping[str, Any] | BackboneConfig


@dataclass(frozen=True)
class Scored:
    """A candidate and the scores of its features on the first task.

    Attributes:
        title: The candidate in one line of YAML: a bare name, or the keys that differ from the defaults.
        backbone: The section ``backbone`` of a configuration that selects it.
        name: Name with the tag of its weights.
        sha256: Digest of all weights.
        feature_dim: Width F of the features.
        scores: See :class:`cil.selection.transferability.Scores`.
        seconds: Duration of (feature extraction, scoring) in seconds.
    """

    title: str
    backbone: BackboneConfig
    name: str
    sha256: str
    feature_dim: int
    scores: Scores
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first; Kendall's τ between their scores; the file of the record; and those to use together.

    Attributes:
        together: The chosen candidates in order, each with the leave-one-out ridge accuracy of those so far; None if
            none were asked for.
    """

    ranked: tuple[Scored, ...]
    agreement: Mapping[str, Mapping[str, float | None]]
    record: Path
    together: Sequence[tuple[Scored, float]] | None = None


def rank_backbones(
    config: Config,
    candidates: Sequence[Candidate],
    root: Path | str = "results",
    *,
    by: str = "ncm",
    together: int | None = None,
    display: Display | None = None,
) -> Ranking:
    """Score candidates on the training images of the first task of the first class order, and record the ranking.

    Every candidate is loaded once before the first is scored, so one that cannot be loaded stops all before anything is
    written.

    Args:
        config: The benchmark. Its section ``backbone`` is ignored; its section ``transform`` applies to all candidates.
        candidates: Names, or sections ``backbone`` of a configuration.
        root: The results folder; the record is ``<name>/backbones.json`` in it.
        by: Score to rank by, ``ncm``, ``ridge``, ``logme`` or ``leep``, which needs ``source_head: true`` in every
            candidate; candidates with equal scores keep their order.
        together: Choose up to so many of the candidates to be used together, see
            :func:`cil.selection.together.choose_together`; None: choose none.
        display: Terminal output; none by default.

    Raises:
        ConfigError: There is no candidate, a candidate is given twice or has a wrong key, or the score is unknown.
        BackboneError: A candidate cannot be loaded; the message begins with its title.
        StreamError: The stream has only one task, or its first task only one class.
        DataError: An image cannot be read, or a candidate's features cannot be scored.
    """
    if by not in RANKING:
        raise ConfigError(f"--by {by}: unknown; allowed: {', '.join(RANKING)}")
    sections = _sections(candidates)
    headless = [title for title, section in sections.items() if not section.source_head]
    if by == "leep" and headless:
        raise ConfigError(
            f"--by leep: compares by the classes that a backbone was pre-trained on, and {headless[0]} is used without "
            "its classifier; give it source_head: true, or rank by another score"
        )
    if together is not None and not 2 <= together <= len(sections):
        raise ConfigError(
            f"--together {together}: the number of backbones to use together, of {len(sections)} candidates; allowed: "
            + (f"2 to {len(sections)}" if len(sections) > 1 else "none, give another --backbone")
        )
    plan = next(plans(first_order(config)))
    accelerator = hardware.accelerator(config.hardware.device, config.precision)
    display = display if display is not None and accelerator.is_main_process else Display()
    for title, section in sections.items():
        with _errors_name(title):
            load_backbone(section)
    data, scored, features = FirstTasks(1), [], []
    with display:
        for title, section in sections.items():
            only = {"backbone": section, "backbones": None, "combine": None}
            candidate = Plan(plan.config.model_copy(update=only), plan.cls, plan.parameters)
            result, frozen, labels = _score(title, candidate, data, accelerator, display)
            display.say(f"{title}  {result.seconds[0] + result.seconds[1]:.1f} s")
            scored.append(result)
            features += [frozen] if together is not None else []
    ranked = tuple(sorted(scored, key=lambda one: -getattr(one.scores, by)))
    taus = agreement({score: [getattr(one.scores, score) for one in ranked] for score in SCORES})
    chosen = None
    if together is not None:
        chosen = [(scored[k], accuracy) for k, accuracy in choose_together(features, labels, together)]
    ranking = Ranking(ranked, taus, expand(root) / config.name / "backbones.json", chosen)
    if accelerator.is_main_process:
        record = {
            "measure": "scores of frozen features of the first task's training images",
            "by": by,
            **data.facts,
            "ranked": [_row(one) for one in ranked],
            "agreement": {"measure": "Kendall's tau-b over the candidates", **taus},
            **({} if chosen is None else {"together": _record(chosen)}),
            "versions": versions(),
            "machine": hardware.facts(accelerator),
        }
        write(ranking.record, to_json(record))
    return ranking


def _sections(candidates: Sequence[Candidate]) -> dict[str, BackboneConfig]:
    """The candidates' sections ``backbone`` by title, validated.

    Raises:
        ConfigError: There is no candidate, or a candidate is given twice, is not valid YAML or has a wrong key.
    """
    if not candidates:
        raise ConfigError(
            "cil rank-backbones needs candidates, e.g. --backbone vit_tiny_patch8_64.tinyimagenet100 "
            "--backbone '{name: vit_tiny_patch8_64.tinyimagenet100, weights: random}'"
        )
    sections: dict[str, BackboneConfig] = {}
    for candidate in candidates:
        section = candidate if isinstance(candidate, BackboneConfig) else _section(candidate)
        title = _title(section)
        if title in sections:
            raise ConfigError(f"--backbone {title}: given twice")
        sections[title] = section
    return sections


def _section(candidate: str | Mapping[str, Any]) -> BackboneConfig:
    """The section of a candidate: a name, a section in YAML, or a mapping."""
    raw: Any = candidate
    if isinstance(candidate, str):
        raw = parse(candidate, f"--backbone {shortened(candidate)}")
        raw = {"name": raw} if isinstance(raw, str) else raw
    if not isinstance(raw, Mapping) or "name" not in raw:
        raise ConfigError(
            f"--backbone {candidate}: expected a name or a section with one, e.g. {{name: …, weights: FILE}}"
        )
    return validated(BackboneConfig, dict(raw), prefix=f"--backbone {candidate}: ")


def _title(section: BackboneConfig) -> str:
    """The section in one line of YAML, without defaults; just the name if nothing else is set."""
    changed = section.model_dump(mode="json", exclude_defaults=True)
    raw = {"name": section.name, **changed}
    if len(raw) == 1:
        return section.name
    return to_yaml(raw, default_flow_style=True, width=10_000).strip()


@contextmanager
def _errors_name(title: str) -> Iterator[None]:
    """Errors raised inside the block begin with the candidate."""
    try:
        yield
    except StreamError:  # it concerns the stream, not the candidate
        raise
    except CilError as error:
        raise type(error)(f"--backbone {title}: {error}") from None


def _score(
    title: str, plan: Plan, data: FirstTasks, accelerator: Accelerator, display: Display
) -> tuple[Scored, Tensor, np.ndarray]:
    """A candidate with its scores, its features [N, F] and their labels [N]."""
    started = time.perf_counter()
    stream, backbone = data.stream(plan, plan.config.stream, accelerator.device)
    first = stream.tasks[0]
    if len(first.classes) < 2:
        raise StreamError(f"the first task has one class, {first.names[0]!r}; ranking backbones needs at least two")
    cache = FeatureCache(accelerator, plan.config.inference_batch_size, display.track)
    features = cache.get(backbone, *first.train.source)
    computed = time.perf_counter()
    with _errors_name(title):
        worth = scores(features, first.train.labels)
    if (head := backbone.source_head) is not None:
        own = head(features.float().cpu()).softmax(1)
        worth = replace(worth, leep=leep(own, first.train.labels))
    seconds = computed - started, time.perf_counter() - computed
    found = Scored(
        title, plan.config.backbone, backbone.name, backbone.fingerprint, backbone.feature_dim, worth, seconds
    )
    return found, features, first.train.labels


def _candidate(one: Scored) -> dict[str, Any]:
    return one.backbone.model_dump(mode="json", exclude_defaults=True) | {"name": one.backbone.name}


def _record(chosen: Sequence[tuple[Scored, float]]) -> dict[str, Any]:
    """The candidates to use together as ``backbones.json`` records them."""
    return {
        "measure": "leave-one-out ridge accuracy of the members so far, features scaled by their root mean square",
        "chosen": [
            {"candidate": _candidate(one), "ridge": accuracy, "passes_per_image": passes}
            for passes, (one, accuracy) in enumerate(chosen, 1)
        ],
    }


def _row(one: Scored) -> dict[str, Any]:
    """A candidate as ``backbones.json`` records it."""
    return {
        "candidate": _candidate(one),
        "name": one.name,
        "sha256": one.sha256,
        "feature_dim": one.feature_dim,
        **{score: value for score, value in asdict(one.scores).items() if value is not None},
        "seconds": {"features": one.seconds[0], "scores": one.seconds[1]},
    }
