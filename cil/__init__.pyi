from . import learners
from .backbone import Backbone, Backbones, Tuner, load_backbone
from .config import Config
from .config.reading import load_config
from .data.images import load_images
from .errors import CilError
from .estimator import IncrementalClassifier
from .growing.model import GrowingModel
from .learner import Context, Learner, LearnerConfig, RoutedLearner
from .learners.registry import build_learner
from .merging import build_rule
from .reuse.finding import find
from .reuse.joining import join
from .runner import run, run_stages
from .selection.backbones import rank_backbones
from .stream import ClassIncremental, DomainIncremental, Stream, Task
from .training import Group, ParamGroup, Recipe, fit
from .tuning import build_tuner

__all__ = [
    "Backbone",
    "Backbones",
    "CilError",
    "ClassIncremental",
    "Config",
    "Context",
    "DomainIncremental",
    "Group",
    "GrowingModel",
    "IncrementalClassifier",
    "Learner",
    "LearnerConfig",
    "ParamGroup",
    "Recipe",
    "RoutedLearner",
    "Stream",
    "Task",
    "Tuner",
    "build_learner",
    "build_rule",
    "build_tuner",
    "find",
    "fit",
    "join",
    "learners",
    "load_backbone",
    "load_config",
    "load_images",
    "rank_backbones",
    "run",
    "run_stages",
]
