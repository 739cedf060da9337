"""Class-incremental learning on frozen pre-trained vision transformers.

Names are imported when first used: timm, peft and avalanche cost seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cil import learners
    from cil.backbone import Backbone, load_backbone
    from cil.config import Config
    from cil.configfile import load as load_config
    from cil.data.images import load_images
    from cil.errors import CilError
    from cil.learner import Context, Learner, LearnerConfig, RoutedLearner
    from cil.learners.registry import build_learner
    from cil.merging import build_rule
    from cil.protocol import ClassIncremental, DomainIncremental
    from cil.runner import run, run_stages
    from cil.stream import Stream, Task
    from cil.sweep.backbones import rank_backbones
    from cil.training import Group, Recipe, fit
    from cil.tuning import build_tuner
    from cil.vit import Tuner

_WHERE = {
    "Backbone": "cil.backbone",
    "CilError": "cil.errors",
    "ClassIncremental": "cil.protocol",
    "Config": "cil.config",
    "Context": "cil.learner",
    "DomainIncremental": "cil.protocol",
    "Group": "cil.training",
    "Learner": "cil.learner",
    "RoutedLearner": "cil.learner",
    "LearnerConfig": "cil.learner",
    "Recipe": "cil.training",
    "Stream": "cil.stream",
    "Task": "cil.stream",
    "Tuner": "cil.vit",
    "build_learner": "cil.learners.registry",
    "build_rule": "cil.merging",
    "build_tuner": "cil.tuning",
    "fit": "cil.training",
    "load_backbone": "cil.backbone",
    "load_config": "cil.configfile:load",
    "load_images": "cil.data.images",
    "rank_backbones": "cil.sweep.backbones",
    "run": "cil.runner",
    "run_stages": "cil.runner",
}

__all__ = [
    "Backbone",
    "CilError",
    "ClassIncremental",
    "Config",
    "Context",
    "DomainIncremental",
    "Group",
    "Learner",
    "LearnerConfig",
    "Recipe",
    "RoutedLearner",
    "Stream",
    "Task",
    "Tuner",
    "build_learner",
    "build_rule",
    "build_tuner",
    "fit",
    "learners",
    "load_backbone",
    "load_config",
    "load_images",
    "rank_backbones",
    "run",
    "run_stages",
]


def __getattr__(name: str) -> Any:
    if name == "learners":
        return import_module("cil.learners")
    if name not in _WHERE:
        raise AttributeError(f"module 'cil' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
