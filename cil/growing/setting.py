"""The learner and the backbone of a growing model: those that it was made with, or the wanted ones of a new one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator

from cil import history
from cil.backbone import Backbone, load_backbone
from cil.config import BackboneConfig, Config, LearnerEntry, as_section
from cil.config.names import fitting
from cil.config.reading import validated
from cil.data.transforms import Transforms
from cil.errors import BackboneError, PluginError, RunError, shortened
from cil.growing import DEFAULT_LEARNER
from cil.growing.events import Header, data_of
from cil.learners.layer_lda import LayerLDA
from cil.prediction.model import recorded_setting
from cil.runner.plan import Plan, plans
from cil.runner.provenance import header_of
from cil.utils import hardware

MOST_BYTES = 128 * 2**20
"""Size of the default learner's matrices up to which it uses all blocks, because every stage of a model stores them."""


class Setting(NamedTuple):
    """A learner's class and settings, its backbone, and the device."""

    plan: Plan
    backbone: Backbone
    accelerator: Accelerator


def default_learner(backbone: Backbone) -> dict[str, Any]:
    """The learner of a new model on a backbone: the default one, on all blocks or on the backbone's own feature alone.

    All blocks are used where their outputs can be collected, and the matrices have at most :data:`MOST_BYTES`.
    """
    try:
        whole = LayerLDA.default_bytes(backbone) <= MOST_BYTES
    except BackboneError:
        whole = False
    return DEFAULT_LEARNER if whole else {**DEFAULT_LEARNER, "layers": None}


def new_header(setting: Setting) -> Header:
    """The header of a model that has learned nothing yet."""
    plan, backbone, accelerator = setting
    transforms = Transforms(backbone.data_config, plan.config.transform)
    header = header_of(plan, [], [], [], data_of([]), backbone, transforms, accelerator)
    return {**header, "growing": history.VERSION, "lessons": [], "changes": []}


class Settings:
    """Finds the setting of a model, and loads its backbone once.

    Args:
        folder: The model's folder.
        learner: The wanted learner, as in a configuration; None: the model's own, or the default of a new one.
        backbone: The wanted backbone; None: the same.
        device: As ``hardware.device``.
        weights: New place of the backbone's weights.
        code: New places of the files of custom classes.

    Raises:
        ConfigError: A section is wrong.
    """

    def __init__(
        self,
        folder: Path,
        learner: LearnerEntry | str | dict[str, Any] | None,
        backbone: BackboneConfig | str | dict[str, Any] | None,
        device: str,
        weights: Path | None,
        code: Sequence[Path],
    ) -> None:
        self.folder, self.device, self.weights, self.code = folder, device, weights, tuple(code)
        self.learner = None if learner is None else validated(LearnerEntry, as_section(learner))
        self.backbone = None if backbone is None else validated(BackboneConfig, as_section(backbone), "backbone: ")
        self._loaded: Setting | None = None
        self._config: dict[str, Any] = {}  # the recorded configuration of what is loaded; empty for a new model's

    def of(self, header: Header | None, holdout: float = 0.0) -> Setting:
        """The setting of a model with this header; a model without a lesson gets the wanted one.

        Args:
            header: The model's header; None if there is no model yet.
            holdout: What the configuration of a new model says of its first lesson.

        Raises:
            ConfigError: A setting of the learner is wrong.
            PluginError: There is no such learner, or it keeps old images.
            BackboneError: The backbone cannot be loaded.
            RunError: The model has another learner or backbone than the wanted one, or its weights are not there.
        """
        if header is None or not header["tasks"]:
            self._config, self._loaded = {}, self._new(holdout)
            return self._loaded
        if self._loaded is None or self._config not in ({}, header["config"]):
            accelerator = hardware.accelerator(self.device, header["config"]["precision"])
            device = accelerator.device
            found = recorded_setting(self.folder, header, device, weights=self.weights, code=self.code)
            self._loaded = Setting(*found, accelerator)
        self._config = header["config"]
        self._check(self._loaded)
        return self._loaded

    def _check(self, there: Setting) -> None:
        entry, backbone = there.plan.entry, there.backbone.name
        if self.learner is not None and (wanted := self._plan(0.0).entry) != entry:
            raise RunError(
                f"{self.folder}: its learner is {shortened(entry.title)} with {shortened(entry.parameters)}, "
                f"not {shortened(wanted.title)} with {shortened(wanted.parameters)}; leave it out, or give a new folder"
            )
        if self.backbone is not None and self.backbone.name not in (backbone, there.plan.config.backbone.name):
            raise RunError(f"{self.folder}: its backbone is {backbone}; leave the backbone out, or give a new folder")

    def _new(self, holdout: float) -> Setting:
        plan = self._plan(holdout)
        if plan.cls.stores_images:
            raise PluginError(
                f"learner {plan.entry.title} keeps old images, and a model of `cil learn` keeps none; "
                "choose another one (see `cil list learners`)"
            )
        accelerator = hardware.accelerator(self.device, plan.config.precision)
        backbone = load_backbone(plan.config.backbone, accelerator.device)
        if self.learner is None:
            plan = self._plan(holdout, default_learner(backbone))
        return Setting(plan, backbone, accelerator)

    def _plan(self, holdout: float, default: dict[str, Any] = DEFAULT_LEARNER) -> Plan:
        settings: dict[str, Any] = {
            "name": fitting(self.folder.absolute().name),
            "data": {"dataset": "cil learn"},
            "stream": {"validation": holdout, "test_on": "validation"},
            "learners": [default if self.learner is None else self.learner],
            "orders": ["natural"],
        }
        if self.backbone is not None:
            settings["backbone"] = self.backbone
        [plan] = plans(validated(Config, settings))
        return plan
