"""From what a configuration writes to a learner class: a name, ``pkg.module:Class``, ``path/file.py:Class``, or an
entry point of the group ``cil.learners``. Imports nothing heavy until a class is asked for."""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from cil.config import LearnerEntry, named
from cil.configfile import validated
from cil.errors import PluginError, nearest
from cil.plugins import load

if TYPE_CHECKING:
    from cil.backbone import Backbone
    from cil.learner import Learner, LearnerConfig

BUILTIN = {
    "ncm": "cil.learners.ncm:NCMLearner",
    "finetune": "cil.learners.finetune:Finetune",
    "linear_probe": "cil.learners.linear_probe:LinearProbe",
    "joint": "cil.learners.joint:Joint",
    "aper": "cil.learners.aper:APER",
    "ranpac": "cil.learners.ranpac:RanPAC",
    "loranpac": "cil.learners.loranpac:LoRanPAC",
    "fecam": "cil.learners.fecam:FeCAM",
    "slda": "cil.learners.slda:SLDA",
    "ease": "cil.learners.ease:EASE",
    "tuna": "cil.learners.tuna:TUNA",
    "mos": "cil.learners.mos:MOS",
    "slca": "cil.learners.slca:SLCA",
    "lae": "cil.learners.lae:LAE",
    "l2p": "cil.learners.l2p:L2P",
    "dualprompt": "cil.learners.dualprompt:DualPrompt",
    "coda_prompt": "cil.learners.coda_prompt:CODAPrompt",
    "merge": "cil.learners.merge:Merge",
    "merge_lca": "cil.learners.merge_lca:MergeLCA",
    "merge_oracle": "cil.learners.merge_oracle:MergeOracle",
    "avalanche": "cil.learners.avalanche:AvalancheLearner",
    "avalanche_replay": "cil.learners.avalanche:AvalancheReplay",
    "l2_sp": "cil.learners.l2_sp:L2SP",
    "ssiat": "cil.learners.ssiat:SSIAT",
    "rsiat": "cil.learners.rsiat:RSIAT",
}


def installed() -> dict[str, EntryPoint]:
    """Learners that other installed packages offer, by name."""
    return {entry.name: entry for entry in entry_points(group="cil.learners")}


def resolve(spec: str) -> type[Learner]:
    """The learner class a specification names.

    Raises:
        PluginError: Unknown name, missing file or module, no such class in it, or not a :class:`Learner`.
    """
    if spec in BUILTIN:
        module, _, attribute = BUILTIN[spec].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if ":" in spec:
        found = load(spec, "learner")
    elif spec in installed():
        try:
            found = installed()[spec].load()
        except Exception as error:  # somebody else's package may fail in any way while it is imported
            raise PluginError(
                f"learner {spec!r} (entry point {installed()[spec].value}): {type(error).__name__}: {error}"
            ) from error
    else:
        known = sorted([*BUILTIN, *installed()])
        raise PluginError(
            f"unknown learner {spec!r}{nearest(spec, known)}; known: {', '.join(known)}, or class: file.py:Class"
        )
    from cil.learner import Learner

    if not (isinstance(found, type) and issubclass(found, Learner)):
        raise PluginError(f"learner {spec!r} is {found!r}; it must be a subclass of cil.Learner")
    return found


def configure(entry: LearnerEntry) -> tuple[type[Learner], LearnerConfig]:
    """The class of a configuration entry and its validated hyper-parameters.

    Raises:
        PluginError: See :func:`resolve`.
        ConfigError: A hyper-parameter is unknown, of the wrong type or out of range.
    """
    cls = resolve(entry.spec)
    return cls, validated(cls.Config, entry.parameters, prefix=f"learner {entry.title}: ")


def build_learner(config: LearnerEntry | str | dict[str, Any], backbone: Backbone) -> Learner:
    """A fresh learner on a backbone, for use without the runner.

    Args:
        config: As in a configuration: ``"ranpac"``, ``"mine.py:Mine"``, ``{"name": "ranpac", "projection": 2000}``.
        backbone: The frozen backbone.

    Raises:
        PluginError: See :func:`resolve`.
        ConfigError: A hyper-parameter is unknown, of the wrong type or out of range.
        BackboneError: The learner does not fit the backbone.
    """
    cls, parameters = configure(validated(LearnerEntry, named(config)))
    return cls(parameters, backbone)
