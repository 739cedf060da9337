"""What ``cil list`` prints."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import get_args

from rich.table import Table

from cil.config import Section
from cil.learners import registry


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, overflow="fold", no_wrap=i == 0)  # names stay whole, to be copied
    return table


def learners(pattern: str = "") -> Table:
    """Registered learners and those other packages offer, with their facts."""
    table = _table("learner", "old images", "trains", "what")
    for name in [*registry.BUILTIN, *registry.installed()]:
        cls = registry.resolve(name)
        summary = (inspect.getdoc(cls) or "").split("\n")[0]
        table.add_row(name, "keeps" if cls.stores_images else "–", "backbone" if cls.trains_backbone else "–", summary)
    return table


def tuners(pattern: str = "") -> Table:
    """What a learner's ``tuner`` may be, with hyper-parameters and their defaults."""
    from cil.tuning.table import TunerSection

    return _sections("tuner", get_args(TunerSection))


def rules(pattern: str = "") -> Table:
    """Rules that merge models, and finalisers of what they merge, with hyper-parameters and their defaults."""
    from cil.merging.table import FinaliserSection, RuleSection

    return _sections("rule, finaliser", [*get_args(RuleSection), *get_args(FinaliserSection)])


def _sections(title: str, sections: Iterable[type[Section]]) -> Table:
    table = _table(title, "what", "hyper-parameters")
    for section in sections:
        fields = {key: field.get_default() for key, field in section.model_fields.items() if key != "finalisers"}
        summary = (inspect.getdoc(section) or "").split(";")[0].removesuffix(".")
        table.add_row(fields.pop("name"), summary, ", ".join(f"{key}: {value}" for key, value in fields.items()))
    table.add_row("class: file.py:Class", "one of your own", "the arguments of its constructor")
    return table


def datasets(pattern: str = "") -> Table:
    """How datasets are named."""
    from cil.data.sources import TORCHVISION

    table = _table("data.dataset", "what")
    table.add_row("digits", "scikit-learn's 1,797 digits, ten classes; needs no download")
    table.add_row("folder", "class folders or tar files below data.root (data.train, data.test)")
    table.add_row("hfds/<org>/<set>", "a Hugging Face dataset (pip install 'cil\\[hf]')")
    for name in TORCHVISION:
        table.add_row(f"torch/{name}", "torchvision; lies in or is fetched to data.root")
    table.add_row("file.py:function", "a function of your own, from train or test to images")
    return table


def backbones(pattern: str = "") -> Table:
    """The embedded default and timm's vision transformers (or whatever matches ``pattern``)."""
    import timm

    from cil.backbone import EMBEDDED

    table = _table("backbone.name", "what")
    table.add_row(EMBEDDED, "the embedded default: 2.7 M weights, 64×64 pixels, 192 features")
    for name in timm.list_pretrained(pattern or "vit_*"):
        cfg = timm.get_pretrained_cfg(name)
        table.add_row(name, f"{cfg.input_size[-1]}×{cfg.input_size[-1]} pixels" if cfg else "")
    return table


def configs(pattern: str = "") -> Table:
    """Configurations that come with the package."""
    from cil.configfile import shipped

    table = _table("config", "what")
    for name, path in shipped().items():
        first = path.read_text(encoding="utf-8").split("\n")[0]
        table.add_row(name, first.removeprefix("#").strip() if first.startswith("#") else "")
    return table
