"""Finds the learner class for a name, ``pkg.module:Class``, ``path/file.py:Class`` or an entry point ``cil.learners``.

A method's module is imported when its class is needed, so listing the names is fast.
"""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from cil.config import LearnerEntry, as_section
from cil.config.explaining import explain_unknown
from cil.config.methods import unknown_keys
from cil.config.plugins import load_object
from cil.config.reading import validated
from cil.errors import ConfigError, PluginError, nearest, shortened

if TYPE_CHECKING:
    from cil.backbone import Backbone
    from cil.learner import Learner, LearnerConfig

BUILTIN = {
    "ncm": "cil.learners.ncm:NCMLearner",
    "linear_probe": "cil.learners.linear_probe:LinearProbe",
    "finetune": "cil.learners.finetune:Finetune",
    "joint": "cil.learners.joint:Joint",
    "aper": "cil.learners.aper:APER",
    "amalgamate": "cil.learners.amalgamate:Amalgamate",
    "ranpac": "cil.learners.ranpac:RanPAC",
    "acil": "cil.learners.analytic:ACIL",
    "air": "cil.learners.analytic:AIR",
    "ds_al": "cil.learners.analytic:DSAL",
    "gkeal": "cil.learners.gkeal:GKEAL",
    "loranpac": "cil.learners.loranpac:LoRanPAC",
    "fecam": "cil.learners.fecam:FeCAM",
    "slda": "cil.learners.slda:SLDA",
    "layer_lda": "cil.learners.layer_lda:LayerLDA",
    "ease": "cil.learners.ease:EASE",
    "tuna": "cil.learners.tuna:TUNA",
    "mos": "cil.learners.mos:MOS",
    "care": "cil.learners.care:CaRE",
    "care_ensemble": "cil.learners.care:CaREEnsemble",
    "slca": "cil.learners.slca:SLCA",
    "ssiat": "cil.learners.ssiat:SSIAT",
    "cds": "cil.learners.cds:CDS",
    "rsiat": "cil.learners.rsiat:RSIAT",
    "macil": "cil.learners.macil:MACIL",
    "min": "cil.learners.min:MIN",
    "moal": "cil.learners.moal:MoAL",
    "l2p": "cil.learners.l2p:L2P",
    "dualprompt": "cil.learners.dualprompt:DualPrompt",
    "coda_prompt": "cil.learners.coda_prompt:CODAPrompt",
    "lae": "cil.learners.lae:LAE",
    "l2_sp": "cil.learners.l2_sp:L2SP",
    "loda": "cil.learners.loda:LoDA",
    "inflora": "cil.learners.inflora:InfLoRA",
    "sd_lora": "cil.learners.sd_lora:SDLoRA",
    "cl_lora": "cil.learners.cl_lora:CLLoRA",
    "e2_lora": "cil.learners.e2_lora:E2LoRA",
    "avalanche": "cil.avalanche.learner:AvalancheLearner",
    "avalanche_replay": "cil.avalanche.learner:AvalancheReplay",
    "merge": "cil.learners.merge:Merge",
    "merge_lca": "cil.learners.merge_lca:MergeLCA",
    "acmap": "cil.learners.acmap:ACMap",
    "cofima": "cil.learners.cofima:CoFiMA",
    "duct": "cil.learners.duct:DUCT",
    "merge_oracle": "cil.learners.merge_oracle:MergeOracle",
    "smile": "cil.learners.smile:Smile",
    "routed": "cil.learners.routed:Routed",
    "zero_shot": "cil.learners.zero_shot:ZeroShot",
    "clip_gda": "cil.learners.clip_gda:ClipGDA",
    "tip_adapter": "cil.learners.tip_adapter:TipAdapter",
    "rapf": "cil.learners.rapf:RAPF",
    "engine": "cil.learners.engine:Engine",
    "proof": "cil.learners.proof:Proof",
}
"""Place of every built-in learner's class, by name; lists and tables have this order."""


def installed() -> dict[str, EntryPoint]:
    """Learners of other installed packages (entry points), by name."""
    return {entry.name: entry for entry in entry_points(group="cil.learners")}


def require_known(spec: str) -> None:
    """Check that a specification is a learner's name, or has the form of a place; nothing is imported.

    Raises:
        PluginError: It is the name of no learner.
    """
    if spec in BUILTIN or ":" in spec or spec in installed():
        return
    known = sorted([*BUILTIN, *installed()])
    raise PluginError(
        f"unknown learner {shortened(spec)}{nearest(spec, known)}; known: {', '.join(known)}, or class: file.py:Class"
    )


def require_keys(entry: LearnerEntry) -> None:
    """Check that a built-in learner has the hyper-parameters that a configuration gives it; nothing is imported.

    :func:`configure` checks their values, and all keys.

    Raises:
        PluginError: See :func:`require_known`.
        ConfigError: A hyper-parameter is unknown.
    """
    require_known(entry.spec)
    if found := unknown_keys(entry.spec, entry.parameters):
        raise ConfigError(explain_unknown(found, f"learner {entry.title}: "))


def resolve(spec: str) -> type[Learner]:
    """The learner class for a specification.

    Raises:
        PluginError: Unknown name, missing file or module, no such class in it, or not a :class:`Learner`.
    """
    require_known(spec)
    if spec in BUILTIN:
        module, _, attribute = BUILTIN[spec].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if ":" in spec:
        cls = load_object(spec, "learner")
    else:
        try:
            cls = installed()[spec].load()
        except Exception as error:  # importing another package may fail in any way
            raise PluginError(
                f"learner {shortened(spec)} (entry point {installed()[spec].value}): {type(error).__name__}: {error}"
            ) from error
    from cil.learner import Learner

    if not (isinstance(cls, type) and issubclass(cls, Learner)):
        raise PluginError(f"learner {shortened(spec)} is {shortened(cls)}; it must be a subclass of cil.Learner")
    return cls


def configure(entry: LearnerEntry) -> tuple[type[Learner], LearnerConfig]:
    """The class of a configuration entry and its validated hyper-parameters.

    Raises:
        PluginError: See :func:`resolve`.
        ConfigError: A hyper-parameter is unknown, of the wrong type or out of range.
    """
    cls = resolve(entry.spec)
    return cls, validated(cls.Config, entry.parameters, prefix=f"learner {entry.title}: ")


def instantiate(cls: type[Learner], parameters: LearnerConfig, backbone: Backbone) -> Learner:
    """A fresh learner of a class that was configured by :func:`configure`, or one on each of several backbones.

    The global random state is isolated from it: a learner that forgets to use its generator still starts from the
    same weights every time, and the learner checks find the mistake.
    """
    from cil.backbone import Backbones
    from cil.learners.bases.heads import Heads
    from cil.utils.randomness import isolated

    if not isinstance(backbone, Backbones):
        with isolated(0):
            return cls(parameters, backbone)
    with isolated(0):
        joint = backbone.combine.heads == "joint"
        learner = cls(parameters, backbone) if joint else Heads(cls, parameters, backbone)
    if not (joint and cls.takes_teachers):
        backbone.require_frozen(learner.views().values())
    return learner


def build_learner(config: LearnerEntry | str | dict[str, Any], backbone: Backbone) -> Learner:
    """A new learner on a backbone, for use without the runner.

    Args:
        config: Learner as in a configuration: ``"ranpac"``, ``"mine.py:Mine"``,
            ``{"name": "ranpac", "projection": 2000}``.
        backbone: The frozen backbone.

    Raises:
        PluginError: See :func:`resolve`.
        ConfigError: A hyper-parameter is unknown, of the wrong type or out of range.
        BackboneError: The learner does not fit the backbone.
    """
    cls, parameters = configure(validated(LearnerEntry, as_section(config)))
    return instantiate(cls, parameters, backbone)
