"""Backbones ranked on the first task alone: by scores of its training images' frozen features, without training.

What is opened is what ``cil tune`` opens (:class:`cil.sweep.first_tasks.FirstTasks`): of the training split the images
of the first task, of the test split nothing. The scores are those of :mod:`cil.transferability`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator

from cil import hardware
from cil.backbone import load_backbone
from cil.checkpoint import to_json
from cil.config import BackboneConfig, Config
from cil.configfile import validated
from cil.console import Display
from cil.errors import CilError, ConfigError, StreamError
from cil.features import FeatureCache
from cil.plan import Plan, plans
from cil.provenance import versions
from cil.report.files import write
from cil.sweep.first_tasks import FirstTasks, first_order
from cil.transferability import RANKING, SCORES, Scores, agreement, scores

Candidate = str | Mapping[str, Any] | BackboneConfig


@dataclass(frozen=True)
class Scored:
    """A candidate and what its features are worth on the first task.

    Attributes:
        title: The candidate in one line of YAML: a bare name, or what differs from the defaults.
        backbone: The section ``backbone`` of a configuration that chooses it.
        name: Name with its weights' tag.
        sha256: Over all weights.
        feature_dim: Width F.
        scores: See :class:`cil.transferability.Scores`.
        seconds: For features, and for their scores.
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
    """Candidates, best first; Kendall's τ between their scores; and the file all is recorded in."""

    ranked: tuple[Scored, ...]
    agreement: Mapping[str, Mapping[str, float | None]]
    record: Path


def rank_backbones(
    config: Config,
    candidates: Sequence[Candidate],
    root: Path | str = "results",
    *,
    by: str = "ncm",
    display: Display | None = None,
) -> Ranking:
    """Score candidates on the training images of the first task of the first class order, and record the ranking.

    Every candidate is loaded once before the first one is scored: one that cannot be stops all, and nothing is written.

    Args:
        config: The benchmark; its own section ``backbone`` is not used, its section ``transform`` is everybody's.
        candidates: Names, or sections ``backbone`` of a configuration.
        root: The results folder; the record is ``<name>/backbones.json`` in it.
        by: The score to rank by, ``ncm``, ``ridge`` or ``logme``; of equals the one given first comes first.
        display: Terminal output; none by default.

    Raises:
        ConfigError: No candidate, the same one twice, a wrong key, or no such score.
        BackboneError: A candidate cannot be loaded; the message begins with it.
        StreamError: The stream has one task only, or its first task one class.
        DataError: An image cannot be read, or a candidate's features cannot be scored.
    """
    if by not in RANKING:
        raise ConfigError(f"--by {by}: unknown; allowed: {', '.join(RANKING)}")
    sections = _sections(candidates)
    plan = next(plans(first_order(config)))
    accelerator = hardware.accelerator(config.hardware.device, config.precision)
    display = display if display is not None and accelerator.is_main_process else Display()
    for title, section in sections.items():
        with _named(title):
            load_backbone(section)
    data, scored = FirstTasks(1), []
    with display:
        for title, section in sections.items():
            chosen = Plan(plan.config.model_copy(update={"backbone": section}), plan.cls, plan.parameters)
            one = _scored(title, chosen, data, accelerator, display)
            display.say(f"{title}  {one.seconds[0] + one.seconds[1]:.1f} s")
            scored.append(one)
    ranked = tuple(sorted(scored, key=lambda one: -getattr(one.scores, by)))
    taus = agreement({score: [getattr(one.scores, score) for one in ranked] for score in SCORES})
    ranking = Ranking(ranked, taus, Path(root) / config.name / "backbones.json")
    if accelerator.is_main_process:
        record = {
            "measure": "scores of frozen features of the first task's training images",
            "by": by,
            **data.facts,
            "ranked": [_row(one) for one in ranked],
            "agreement": {"measure": "Kendall's tau-b over the candidates", **taus},
            "versions": versions(),
            "machine": hardware.facts(accelerator),
        }
        write(ranking.record, to_json(record))
    return ranking


def _sections(candidates: Sequence[Candidate]) -> dict[str, BackboneConfig]:
    """Candidates by title, validated.

    Raises:
        ConfigError: None, one twice, no YAML, or a wrong key, which is named.
    """
    if not candidates:
        raise ConfigError(
            "cil rank-backbones needs candidates, e.g. --backbone vit_tiny_patch8_64.tinyimagenet100 "
            "--backbone '{name: vit_tiny_patch8_64.tinyimagenet100, weights: random}'"
        )
    found: dict[str, BackboneConfig] = {}
    for candidate in candidates:
        section = candidate if isinstance(candidate, BackboneConfig) else _section(candidate)
        title = _title(section)
        if title in found:
            raise ConfigError(f"--backbone {title}: given twice")
        found[title] = section
    return found


def _section(candidate: str | Mapping[str, Any]) -> BackboneConfig:
    """A candidate as it was written: a name, or a section in YAML."""
    raw: Any = candidate
    if isinstance(candidate, str):
        try:
            raw = yaml.safe_load(candidate)
        except yaml.YAMLError as error:
            raise ConfigError(f"--backbone {candidate}: not valid YAML: {' '.join(str(error).split())}") from None
        raw = {"name": raw} if isinstance(raw, str) else raw
    if not isinstance(raw, Mapping) or "name" not in raw:
        raise ConfigError(
            f"--backbone {candidate}: expected a name or a section with one, e.g. {{name: …, weights: FILE}}"
        )
    return validated(BackboneConfig, dict(raw), prefix=f"--backbone {candidate}: ")


def _title(section: BackboneConfig) -> str:
    changed = section.model_dump(mode="json", exclude_defaults=True)
    raw = {"name": section.name, **changed}
    if len(raw) == 1:
        return section.name
    return yaml.safe_dump(raw, sort_keys=False, default_flow_style=True, width=10_000, allow_unicode=True).strip()


@contextmanager
def _named(title: str) -> Iterator[None]:
    """Errors inside say which candidate they are about."""
    try:
        yield
    except StreamError:  # of the stream, whoever asked for it
        raise
    except CilError as error:
        raise type(error)(f"--backbone {title}: {error}") from None


def _scored(title: str, plan: Plan, data: FirstTasks, accelerator: Accelerator, display: Display) -> Scored:
    started = time.perf_counter()
    stream, backbone = data.stream(plan, plan.config.stream, accelerator.device)
    first = stream.tasks[0]
    if len(first.classes) < 2:
        raise StreamError(f"the first task has one class, {first.names[0]!r}; ranking backbones needs at least two")
    cache = FeatureCache(accelerator, plan.config.batch_size, display.track)
    features = cache.get(backbone, *first.train.source)
    computed = time.perf_counter()
    with _named(title):
        found = scores(features, first.train.labels)
    seconds = computed - started, time.perf_counter() - computed
    return Scored(
        title, plan.config.backbone, backbone.name, backbone.fingerprint, backbone.feature_dim, found, seconds
    )


def _row(one: Scored) -> dict[str, Any]:
    """A candidate as the record has it."""
    return {
        "candidate": one.backbone.model_dump(mode="json", exclude_defaults=True) | {"name": one.backbone.name},
        "name": one.name,
        "sha256": one.sha256,
        "feature_dim": one.feature_dim,
        **asdict(one.scores),
        "seconds": {"features": one.seconds[0], "scores": one.seconds[1]},
    }
