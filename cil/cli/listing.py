"""What ``cil list`` prints: for every kind of thing that a configuration can name, its names and a line about each."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from cil.config.methods import PartFacts, methods
from cil.errors import ConfigError, nearest


class Listing(NamedTuple):
    columns: Sequence[str]
    rows: Mapping[str, Callable[[], Iterable[str]]]
    """Name → the further cells of its row, made only for names that are shown."""


def table(kind: str, pattern: str = "") -> Table:
    """The names of a kind that match a pattern, with a line about each.

    Args:
        kind: A key of :data:`KINDS`.
        pattern: A glob for the whole name if it holds ``*``, ``?`` or ``[``, else a part of the name; in any case.

    Raises:
        ConfigError: An unknown kind, or a pattern that no name matches.
    """
    if kind not in KINDS:
        raise ConfigError(f"cil list {kind}: unknown{nearest(kind, KINDS)}; allowed: {', '.join(KINDS)}")
    listing = KINDS[kind]()
    pattern = pattern or DEFAULT_PATTERN.get(kind, "")
    names = [name for name in listing.rows if matches(name, pattern)]
    if not names:
        close = closest(pattern, listing.rows)
        hint = f"nearest: {', '.join(close)}" if close else f"`cil list {kind}` lists them"
        raise ConfigError(f"cil list {kind}: no name matches {pattern!r}; {hint}")
    found = Table(box=None, pad_edge=False)
    for i, column in enumerate(listing.columns):
        found.add_column(column, overflow="fold", no_wrap=i == 0)  # names stay whole, to be copied
    for name in names:
        found.add_row(Text(name), *(Text(cell) for cell in listing.rows[name]()))
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether a name matches a pattern of :func:`table`.

    >>> [matches("vit_base_patch16_224", pattern) for pattern in ("", "BASE", "vit*224", "base*")]
    [True, True, True, False]
    """
    name, pattern = name.lower(), pattern.lower()
    return fnmatchcase(name, pattern) if any(sign in pattern for sign in "*?[") else pattern in name


def closest(pattern: str, names: Iterable[str]) -> list[str]:
    """At most three names that resemble a pattern, as a whole or in their last part.

    >>> closest("cfar100", ["torch/cifar100", "digits"])
    ['torch/cifar100']
    """
    known = {part.lower(): name for name in names for part in (name.rsplit("/", 1)[-1], name)}
    word = "".join(letter for letter in pattern.lower() if letter not in "*?[]")
    return list(dict.fromkeys(known[part] for part in difflib.get_close_matches(word, known)))


def learners() -> Listing:
    """Built-in learners, and those that other installed packages offer, which are imported if they are shown."""
    from cil.learners import registry

    def cells(name: str) -> list[str]:
        cls = registry.resolve(name)
        return [summary_of(cls), trained_by(cls), kept(cls.stores_images)]

    rows: dict[str, Callable[[], Iterable[str]]] = {
        name: partial(list, [facts["summary"], facts["trains"], kept(facts["stores_images"])])
        for name, facts in methods()["learners"].items()
    }
    rows |= {name: partial(cells, name) for name in registry.installed() if name not in rows}
    return Listing(("learner", "what it does", "trains", "old images"), rows)


def kept(stores_images: bool) -> str:
    """What a list says of old images."""
    return "kept" if stores_images else "–"


def summary_of(cls: type[Any]) -> str:
    """A learner's own ``summary``, else the first line of its docstring."""
    own = vars(cls).get("summary")
    return own if own and isinstance(own, str) else inspect.cleandoc(cls.__doc__ or "").split("\n")[0]


def trained_by(cls: type[Any]) -> str:
    """What a learner says it trains, else what is known of it."""
    if isinstance(cls.trains, str) and cls.trains:
        return cls.trains
    return "backbone" if cls.trains_backbone else "–"


def tuners() -> Listing:
    """Tuners, with hyper-parameters and their defaults."""
    return _parts(("tuner", "what it trains", "hyper-parameters"), methods()["tuners"])


def rules() -> Listing:
    """Rules that merge models, and finalisers of what they merge, with hyper-parameters and their defaults."""
    return _parts(("rule or finaliser", "what it does", "hyper-parameters"), methods()["rules"])


def _parts(columns: Sequence[str], facts: Mapping[str, PartFacts]) -> Listing:
    rows: dict[str, Callable[[], Iterable[str]]] = {
        name: partial(list, [one["summary"], one["hyper_parameters"]]) for name, one in facts.items()
    }
    return Listing(columns, {**rows, **_CUSTOM})


_CUSTOM: dict[str, Callable[[], Iterable[str]]] = {
    "class: file.py:Class": lambda: ("your own", "the arguments of its constructor")
}


def datasets() -> Listing:
    """The forms that a dataset's name can have."""
    from cil.data.libraries import TORCHVISION

    what = {
        "digits": "scikit-learn's 1,797 digits, ten classes; needs no download",
        "folder": "class folders, tar or CSV files below data.root (data.train, data.test)",
        "hfds/<org>/<set>": "a Hugging Face dataset (pip install 'cil[hf]')",
        **{f"torch/{name}": "torchvision, read from data.root or downloaded there" for name in TORCHVISION},
        "file.py:function": "your own function, from train or test to images",
    }
    return Listing(("data.dataset", "what it is"), {name: partial(tuple, [text]) for name, text in what.items()})


def backbones() -> Listing:
    """The embedded default and timm's pre-trained models."""
    import timm

    from cil.backbone import EMBEDDED, fits

    def cells(name: str) -> list[str]:
        cfg = timm.get_pretrained_cfg(name)
        return [f"{cfg.input_size[-1]}×{cfg.input_size[-1]} pixels" if cfg else "", fits(name)]

    every = fits("vit_tiny_patch16_224")  # the architecture of the default
    rows: dict[str, Callable[[], Iterable[str]]] = {
        EMBEDDED: lambda: ["the embedded default: 2.7 M weights, 64×64 pixels, 192 features", every],
        "hf-hub:<org>/<model>": lambda: ["a timm model of a repository on the Hugging Face Hub", "as its architecture"],
        "open_clip/<architecture>.<tag>": lambda: ["a vision-language model (pip install 'cil[clip]')", every],
        "local-dir:<folder>": lambda: ["a timm model of a folder: config.json and its weights", "as its architecture"],
    }
    rows |= {name: partial(cells, name) for name in timm.list_pretrained()}
    return Listing(("backbone.name", "what it is", "what fits it"), rows)


def configs() -> Listing:
    """Configurations that come with the package."""
    from cil.config.reading import shipped

    def title(path: Any) -> list[str]:
        first = path.read_text(encoding="utf-8").split("\n")[0]
        return [first.removeprefix("#").strip() if first.startswith("#") else ""]

    return Listing(("config", "what it is"), {name: partial(title, path) for name, path in shipped().items()})


KINDS: dict[str, Callable[[], Listing]] = {
    "learners": learners,
    "tuners": tuners,
    "rules": rules,
    "datasets": datasets,
    "backbones": backbones,
    "configs": configs,
}
DEFAULT_PATTERN = {"backbones": "vit_*"}
"""What is listed of a kind that is too long to be listed whole."""
