"""Sentences about classes, from their names: phrases, templates, and files of descriptors. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from cil.backbone.clip_library import imagenet_templates
from cil.config import Section
from cil.config.backbones import Place
from cil.config.parsing import parse
from cil.errors import ConfigError, nearest
from cil.utils.paths import expand
from cil.utils.stored import file_digest

TEMPLATES: dict[str, tuple[str, ...]] = {
    "simple": ("a photo of a {}.",),
    "bad": ("a bad photo of a {}.",),
    "good": ("a good photo of a {}.",),
    "cifar18": tuple(
        template.format(article, "{}")
        for article in ("a", "the")
        for template in (
            "a photo of {} {}.",
            "a blurry photo of {} {}.",
            "a black and white photo of {} {}.",
            "a low contrast photo of {} {}.",
            "a high contrast photo of {} {}.",
            "a bad photo of {} {}.",
            "a good photo of {} {}.",
            "a photo of {} small {}.",
            "a photo of {} big {}.",
        )
    ),
    "photo7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}
"""Sets of templates by name: those of Continual-CLIP and RAPF, CLIP's 18 for CIFAR and its 7 best for ImageNet."""
FROM_OPEN_CLIP = "imagenet80"
"""CLIP's 80 templates for ImageNet, which open_clip holds."""
Form = Literal["words", "raw"]


def _resolved(raw: Any) -> Any:
    """The templates that a name stands for; anything else unchanged."""
    if not isinstance(raw, str) or "{}" in raw:
        return [raw] if isinstance(raw, str) else raw
    if raw == FROM_OPEN_CLIP:
        return imagenet_templates()
    if raw not in TEMPLATES:
        known = [*TEMPLATES, FROM_OPEN_CLIP]
        raise ValueError(
            f"there are no templates {raw!r}{nearest(raw, known)}; known: {', '.join(known)}, or a list of sentences "
            "with {} for the class"
        )
    return TEMPLATES[raw]


def _checked(templates: tuple[str, ...]) -> tuple[str, ...]:
    for template in templates:
        if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
            raise ValueError(f"the template {template!r} must contain {{}} once, for the class, and no other braces")
    return templates


Templates = Annotated[tuple[str, ...], BeforeValidator(_resolved), Field(min_length=1), AfterValidator(_checked)]
"""Type of the key ``templates``; a name is replaced by its sentences, so that results record these."""


class Descriptors(Section):
    """A file that says what each class looks like, written beforehand, e.g. by a language model.

    It is knowledge from outside the stream, so its digest is part of a learner's settings. Only what it says about
    classes that were seen is ever handed out.
    """

    file: Place = Field(
        description="YAML or JSON file with a list of texts for each class, or for each pair of classes"
    )
    sha256: str | None = Field(None, description="SHA-256 of the file; default: that of the file as it is")

    @model_validator(mode="before")
    @classmethod
    def _identified(cls, raw: Any) -> Any:
        raw = {"file": raw} if isinstance(raw, str) else raw
        if isinstance(raw, dict) and isinstance(raw.get("file"), str | Path) and raw.get("sha256") is None:
            return {**raw, "sha256": _digest(expand(raw["file"]))}
        return raw

    def of(self, names: Sequence[str]) -> list[list[str]]:
        """The texts about each of several classes.

        Args:
            names: Names of classes that were seen.

        Raises:
            ConfigError: The file is missing, has changed since the settings were made, is no such file, or lacks a
                class.
        """
        known = self._content()
        return [self._texts(_entry(known, name), f"the class {name!r}") for name in names]

    def contrasts(self, pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
        """The texts that tell the first class of each pair from the second, from ``class: {other: [text, …]}``.

        Args:
            pairs: Names of classes that were seen.

        Raises:
            ConfigError: As in :meth:`of`.
        """
        known, found = self._content(), []
        for name, other in pairs:
            about = _entry(known, name)
            texts = _entry(about, other) if isinstance(about, dict) else None
            found.append(self._texts(texts, f"the class {name!r} against {other!r}"))
        return found

    def _content(self) -> dict[str, Any]:
        if _digest(self.file) != self.sha256:
            raise ConfigError(
                f"descriptors: {self.file} has changed since the run began; restore it, or start a new run"
            )
        text = self.file.read_text(encoding="utf-8")
        try:
            content = json.loads(text) if self.file.suffix == ".json" else parse(text, str(self.file))
        except ValueError as error:
            raise ConfigError(f"descriptors: {self.file}: {' '.join(str(error).split())}") from None
        return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}

    def _texts(self, texts: Any, what: str) -> list[str]:
        if isinstance(texts, list) and texts and all(isinstance(one, str) and one for one in texts):
            return texts
        lacks = "has no entry for" if texts is None else "has no list of texts for"
        raise ConfigError(f"descriptors: {self.file} {lacks} {what}; add a list with one text or more")


def _entry(entries: dict[str, Any], name: str) -> Any:
    """The entry of a class, under its name or its words; None if there is none."""
    return entries.get(name, entries.get(phrase(name)))


def _digest(file: Path) -> str:
    """SHA-256 of a file that a user named.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return file_digest(file)
    except OSError as error:
        raise ConfigError(
            f"descriptors: {file} cannot be read ({error.strerror}); give the place of the file"
        ) from None


def phrase(name: str, form: Form = "words") -> str:
    """The words for a class: its name, with spaces in place of underscores unless ``form`` is ``raw``.

    >>> phrase("great_white_shark"), phrase("great_white_shark", "raw")
    ('great white shark', 'great_white_shark')
    """
    return name.replace("_", " ") if form == "words" else name


def sentences(name: str, templates: Sequence[str], form: Form = "words") -> list[str]:
    """The templates filled with a class.

    >>> sentences("tabby_cat", ["a photo of a {}."])
    ['a photo of a tabby cat.']
    """
    return [template.format(phrase(name, form)) for template in templates]


def described(name: str, descriptors: Sequence[str], form: Form = "words") -> list[str]:
    """A class with each of its descriptors, linked as Menon and Vondrick's code links them: by its first letters.

    >>> described("hen", ["two legs", "a red comb", "often brown"])
    ['hen, which has two legs', 'hen, which is a red comb', 'hen, which often brown']
    """
    return [f"{phrase(name, form)}, {_link(text)} {text}" for text in descriptors]


def _link(descriptor: str) -> str:
    start = descriptor.lower()
    if start.startswith(("a", "used")):  # "a" also catches "antlers", as it does in the authors' code
        return "which is"
    return "which" if start.startswith(("has", "often", "typically", "may", "can")) else "which has"
