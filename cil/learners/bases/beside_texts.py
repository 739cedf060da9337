"""Texts as an option of learners on frozen features: their scores beside the classifier's, or as virtual images."""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor
from typing_extensions import Self

from cil.backbone import Backbone
from cil.classifiers.base import StatisticsClassifier
from cil.classifiers.fusion import held_out_weights
from cil.config import Section
from cil.learner import Context
from cil.learners.bases.first_session import AdaptOnce
from cil.learners.bases.texts import PHRASES, SENTENCES, name_prototype, text_classifier
from cil.prompts import Form, Templates
from cil.stream import Task

Positive = Annotated[float, Field(gt=0)]
Weight = Literal["each_task", "first_task"] | Positive


class BesideTexts(Section):
    """How class names take part in the decision of a learner on frozen features."""

    weight: Weight | None = Field(
        "each_task",
        description="weights of text scores and the classifier's: fitted on held-out images of each task, or of the "
        "first one; a number: that of the classifier, with 1 for the texts; null: no text scores, only the prior",
    )
    prior: NonNegativeFloat = Field(
        0.0, description="number of images that a class name is worth in the classifier; needs space: joint"
    )
    space: Literal["pooled", "joint"] = Field(
        "pooled", description="features of the classifier: the backbone's own, or those in the space of the texts"
    )
    templates: Templates = SENTENCES
    phrases: Form = PHRASES

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.prior and self.space != "joint":
            raise ValueError("prior compares images with texts; set space: joint, or prior: 0")
        if self.weight is None and not self.prior:
            raise ValueError("weight: null and prior: 0 leave the texts out; set one of them, or text: null")
        return self


class OptionalTexts(AdaptOnce):
    """A learner with a classifier made of sums, which class names can join (``text``, on vision-language backbones).

    With ``text.weight`` logits are a · z + b · g: z those of ``zero_shot``, g the classifier's, and (a, b) fitted as in
    ``clip_gda`` to held-out images of the task. While they cannot be fitted, a = 1 and b is :meth:`usual_weight`. With
    ``text.prior`` each class has virtual images at a place that its text says
    (:func:`~cil.classifiers.text_prior.expected_means`). Without ``text`` nothing of this exists.
    """

    class Config(AdaptOnce.Config):
        text: BesideTexts | None = Field(
            None,
            description="class names beside the classifier, on a vision-language backbone; {}: text scores with "
            "weights that are fitted on each task; null: none",
        )

        @model_validator(mode="after")
        def _frozen(self) -> Self:
            for key in ("tuner", "layers"):
                if self.text is not None and getattr(self, key) is not None:
                    raise ValueError(f"text needs the features that the texts were trained with; leave out {key}")
            return self

    weights: Tensor

    def __init__(self, config: Any, backbone: Backbone) -> None:
        self._joint = backbone.feature_dim if backbone.text is None else backbone.text.width  # for make_classifier
        super().__init__(config, backbone)
        if config.text is not None:
            self.text = text_classifier(backbone)
            self.register_buffer("weights", torch.zeros(2, dtype=torch.float64))  # (a, b)

    @classmethod
    def uses_texts(cls, parameters: Any) -> bool:
        return parameters.text is not None

    @property
    def width(self) -> int:
        text = self.config.text
        return super().width if text is None or text.space == "pooled" else self._joint

    @property
    def statistics(self) -> StatisticsClassifier | None:
        return super().statistics if self.config.text is None else None

    @abstractmethod
    def usual_weight(self) -> float:
        """b while no image could be held out."""

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if self.config.text is not None:
            self.text.grow(len(task.seen))

    def learn(self, task: Task, ctx: Context) -> None:
        text = self.config.text
        if text is None:
            return super().learn(task, ctx)
        for label in task.classes:
            if not self.text.known[label]:
                self.text.set(label, name_prototype(task.names[label], text, self.backbone, ctx))
        if text.weight == "each_task" or (text.weight == "first_task" and task.index == 0):
            self._weigh(task, ctx)
        super().learn(task, ctx)
        if text.weight is not None:
            if not bool(self.weights.any()):
                chosen = text.weight if isinstance(text.weight, float) else self.usual_weight()
                # single images say nothing of the variance, and so nothing of the size of g
                counts: Any = self.classifier.counts
                alone = not bool((counts > 1).any())
                self.weights = self.weights.new_tensor([1.0, 0.0 if alone else chosen])
            ctx.log("weight_of_texts", float(self.weights[0]))
            ctx.log("weight_of_images", float(self.weights[1]))

    def _weigh(self, task: Task, ctx: Context) -> None:
        features, labels = ctx.features(self, task.train)
        scaled = self.scaled(features)

        def images(fitted: Tensor, held_out: Tensor) -> Tensor:
            return deepcopy(self.classifier).partial_fit(scaled[fitted], labels[fitted]).logits(scaled[held_out])

        found = held_out_weights(self.text.logits(features), images, labels, ctx.generator)
        if found is not None:
            self.weights = self.weights.new_tensor(found)

    def scaled(self, features: Tensor) -> Tensor:
        text = self.config.text
        return super().scaled(features) if text is None or text.space == "pooled" else self.text.project(features)

    def logits(self, features: Tensor) -> Tensor:
        scores = super().logits(features)
        if self.config.text is None or self.config.text.weight is None:
            return scores
        a, b = self.weights.to(features.dtype)
        return a * self.text.logits(features) + b * scores

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}text.prototypes")
        if saved is not None and saved.shape[1] != self._joint:  # an exported model has no text side that says it
            self._joint = saved.shape[1]
            self.classifier = self.make_classifier().to(self.text.prototypes.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
