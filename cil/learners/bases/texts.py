"""The base of learners that compare images with the names of their classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cil.backbone import Backbone
from cil.classifiers.text import TextClassifier
from cil.learner import Context, Learner, LearnerConfig
from cil.prompts import TEMPLATES, Descriptors, Form, Templates, described, sentences
from cil.stream import Task

SENTENCES: Any = Field(
    TEMPLATES["simple"],
    description="sentences with {} for the class, or the name of a set: simple, bad, good, cifar18, photo7 or "
    "imagenet80",
)
"""The field ``templates`` of every section that puts class names into sentences."""
PHRASES: Any = Field("words", description="words: underscores in class names become spaces; raw: names as they are")
"""The field ``phrases`` beside it."""


class Wording(Protocol):
    """How a class is put into sentences."""

    @property
    def templates(self) -> Sequence[str]: ...

    @property
    def phrases(self) -> Form: ...


def text_classifier(backbone: Backbone) -> TextClassifier:
    """The text scores of a backbone, without a class yet; those of a stored learner if there is no text side."""
    side = backbone.text
    if side is None:
        return TextClassifier(backbone.feature_dim)
    return TextClassifier(side.width, side.scale, side.bias, side.projection, side.offset)


def name_prototype(name: str, wording: Wording, backbone: Backbone, ctx: Context) -> Tensor:
    """n(mean_k n(encode(template_k(name)))), the prototype [d] of a class, float32."""
    vectors = ctx.texts(backbone, sentences(name, wording.templates, wording.phrases))
    return F.normalize(F.normalize(vectors, dim=1).mean(0), dim=0)


class NamesClasses(Learner):
    """A learner on a vision-language backbone that has a text prototype for each class seen.

    A class is put into sentences by its name in the stream, and only when its task comes: names of later classes are
    not known. With the templates e_k = encode(template_k(name)) the prototype is t_c = n(mean_k n(e_k)), n the
    normalisation to length 1, as open_clip's ``build_zero_shot_classifier`` computes it. All sentences about a class
    are encoded together, once per machine.

    Args:
        config: Hyper-parameters.
        backbone: The frozen backbone; without a text side, a stored learner can be loaded, but not learn.
    """

    class Config(LearnerConfig):
        templates: Templates = SENTENCES
        phrases: Form = PHRASES

    needs_text = True
    reads_names = True

    def __init__(self, config: Any, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.text = text_classifier(backbone)
        self.make_parts(self.text.width)

    def make_parts(self, joint: int) -> None:
        """Build what depends on the width of the joint space; called again if a stored learner has another one."""

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.text.grow(len(task.seen))

    def learn(self, task: Task, ctx: Context) -> None:
        """Add the prototypes of the task's classes that have none."""
        known = self.text.known
        for label in task.classes:
            if not known[label]:
                self.text.set(label, self.prototype(task.names[label], ctx))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        width = state_dict[f"{prefix}text.prototypes"].shape[1]
        if width != self.text.width:  # an exported model has no text side that says the width of the joint space
            self.make_parts(width)
            self.to(self.text.prototypes.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def prototype(self, name: str, ctx: Context) -> Tensor:
        """The prototype [d] of a class, float32, of length 1."""
        return name_prototype(name, self.config, self.backbone, ctx)


class MapsTexts(NamesClasses):
    """The same, with a raw text vector per class, for learners that map texts.

    Buffers:
        raw: float32 [C, d], mean of a class's sentences e_k, not normalised.
    """

    raw: Tensor

    def make_parts(self, joint: int) -> None:
        self.register_buffer("raw", torch.zeros(0, joint))

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.raw = F.pad(self.raw, (0, 0, 0, len(task.seen) - len(self.raw)))

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        for c in task.classes:
            texts = sentences(task.names[c], self.config.templates, self.config.phrases)
            self.raw[c] = ctx.texts(self.backbone, texts).mean(0)


class DescribesClasses(NamesClasses):
    """The same, with prototypes made of what a file says about the classes, if there is one (Menon and Vondrick)."""

    class Config(NamesClasses.Config):
        descriptors: Descriptors | None = Field(
            None,
            description="file with texts about each class, in place of templates: knowledge from outside the stream",
        )
        renormalise: bool = Field(
            False,
            description="whether the mean of a class's descriptors has length 1; published: false, which lowers the "
            "scores of classes with diverse descriptors",
        )

    def prototype(self, name: str, ctx: Context) -> Tensor:
        config = self.config
        if config.descriptors is None:
            return super().prototype(name, ctx)
        [texts] = config.descriptors.of([name])
        vectors = ctx.texts(self.backbone, described(name, texts, config.phrases))
        mean = F.normalize(vectors, dim=1).mean(0)
        return F.normalize(mean, dim=0) if config.renormalise else mean
