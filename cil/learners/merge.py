"""Sequential merging: each task is trained from the same pre-trained weights, and the updates are merged."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from cil.backbone import FROZEN, Backbone
from cil.classifiers import LDA, NCM, Classifier, CosineHead, Ridge
from cil.classifiers.drift import AffineMap, ridge_map, translation
from cil.features import View
from cil.learner import Context, Learner
from cil.learners.bases.coefficients import CoefficientRecipe, scaled_update
from cil.learners.bases.merged_space import mergeable, require_weights, some_images
from cil.learners.bases.task_training import train_tuner
from cil.merging import ExpertBank, Rule, RuleConfig, build_rule
from cil.merging.configs import OPCMConfig, TaskArithmeticConfig
from cil.merging.statistics import Statistics, diagonal_fisher, input_grams
from cil.stream import Task
from cil.tuning import Tuner
from cil.tuning.frozen import replaced_tree


class Merge(Learner):
    """Continual model merging (OPCM, arXiv 2501.09522, and its family) with one classifier over all classes.

    Task t: θ_t = θ_0 + τ_t is trained from the pre-trained θ_0 on the task's own classes, with a cosine head that is
    then dropped. A rule of :mod:`cil.merging` merges τ_t into θ^(t), and θ_t is discarded. The classifier is computed
    in closed form on [φ_0; φ_{θ^(t)}] (with ``anchor``) or on φ_{θ^(t)}. Statistics of old classes under θ_0 stay
    exact. Those under θ^(t−1) are corrected by a map fitted on the current images' features under θ^(t−1) and θ^(t)
    (:mod:`cil.classifiers.drift`). Keeps the rule's state and the classifier's statistics. Forward passes per training
    image: one per epoch, and one under each of θ_0, θ^(t−1) and θ^(t).

    θ are the backbone's weights if the tuner updates them, else the tuner's own parameters
    (:mod:`~cil.learners.bases.merged_space`). With ``start: merged`` each task starts from θ^(t−1), and the rule
    receives θ_t − θ_0 as before: ``ema`` is then a moving average during training, and with α = 1 it is sequential
    training. ``trained: first`` is adaptation on the first task only.
    """

    class Config(CoefficientRecipe):
        rule: RuleConfig = Field(OPCMConfig(), description="rule that merges the tasks' updates")
        start: Literal["pretrained", "merged"] = Field(
            "pretrained", description="weights at which each task starts: pre-trained (θ_0) or merged (θ^(t−1))"
        )
        trained: Literal["all", "first"] = Field(
            "all", description="tasks that are trained and merged; first: later tasks only update the classifier"
        )
        prototypes: Literal["stale", "translate", "linear"] = Field(
            "linear", description="correction of old classes' statistics: none, a translation, or a ridge regression"
        )
        map_shrinkage: float = Field(
            0.05, ge=0, description="shrinkage ≥ 0 of the ridge regression towards the identity"
        )
        anchor: bool = Field(True, description="whether to add the features of the pre-trained weights")
        head: Literal["ncm", "lda", "ridge", "concat"] = Field(
            "lda",
            description="classifier: class means, LDA, ridge regression, or the concatenation of the tasks' own heads",
        )
        shrinkage: float = Field(1e-2, ge=0, le=1, description="shrinkage in [0, 1] of LDA's covariance")
        projection: PositiveInt | None = Field(
            None, description="width of a random projection before the ridge regression (RanPAC: 10,000); null: none"
        )
        statistics: PositiveInt = Field(256, description="images per task for rules that need Fisher or Gram matrices")

        @model_validator(mode="after")
        def _fit_together(self) -> Any:
            if self.head == "concat" and (self.anchor or self.prototypes != "stale"):
                raise ValueError("head: concat has no statistics to correct; set prototypes: stale and anchor: false")
            if self.head == "concat" and self.trained == "first":
                raise ValueError("head: concat needs a trained head per task; set trained: all")
            if self.projection is not None and self.head != "ridge":
                raise ValueError(f"projection belongs to head: ridge, not {self.head}; leave it out")
            if self.projection is not None and self.prototypes in ("translate", "linear"):
                raise ValueError(
                    "projection: statistics after its ReLU cannot be corrected by a map; set prototypes: stale"
                )
            added = TaskArithmeticConfig(scale=1.0)
            if self.coefficients == "layers" and (self.rule != added or self.start != "pretrained"):
                raise ValueError(
                    "coefficients: layers scales updates that are added to θ_0; set "
                    "rule: {name: task_arithmetic, scale: 1.0} and start: pretrained"
                )
            return self

    name = "merge"
    summary = "one model per task, merged sequentially, classified by LDA"
    trains = "one tuner per task"
    paper = "Tang et al., Merging Models on the Fly Without Retraining (OPCM), arXiv 2501.09522"
    trains_backbone = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.models = mergeable(config.tuner, backbone)
        if config.coefficients == "layers":
            require_weights(self.name, self.models, "coefficients: layers scales updates of weights")
        self.rule = self.models.start(self.make_rule())
        self.classifier = self.make_classifier()
        self._merged_tuner: tuple[Tuner, ...] = ()  # a tuple keeps the tuner out of the state

    def make_rule(self) -> Rule:
        """The rule, not started."""
        return build_rule(self.config.rule)

    def make_classifier(self) -> Classifier:
        """The classifier on :meth:`features`, without statistics."""
        widths = [self.backbone.feature_dim, self.models.width] if self.config.anchor else [self.models.width]
        width = sum(widths)
        if self.config.head == "lda":
            return LDA(width, self.config.shrinkage, priors="uniform", blocks=widths)
        if self.config.head == "ridge":
            return Ridge(width, self.config.projection)
        return {"ncm": NCM, "concat": CosineHead}[self.config.head](width)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if not isinstance(self.classifier, CosineHead):  # a head receives its rows after training
            self.classifier.grow(len(task.seen))
        if task.index == 0:
            self.models.draw(ctx.generator)
            self._merged_tuner = ()
            if isinstance(self.classifier, Ridge):
                self.classifier.draw(ctx.generator)

    def trains_on(self, task: Task) -> bool:
        """Whether the task is trained and merged; otherwise it only updates the classifier."""
        return task.index == 0 or self.config.trained == "all"

    def learn(self, task: Task, ctx: Context) -> None:
        corrects = task.index > 0 and self.trains_on(task) and self.config.prototypes != "stale"
        before = ctx.features(self, task.train)[0] if corrects else None
        if self.trains_on(task):
            self.add(*self.train_task(task, ctx), task, ctx)
        if self.config.head == "concat":
            return
        after, labels = ctx.features(self, task.train)
        if before is not None:
            self.correct_drift(before, after)
        self.classifier.partial_fit(after, labels)

    def train_task(self, task: Task, ctx: Context) -> tuple[Tuner, CosineHead]:
        """Train θ_t from :meth:`start`, with the task's own classes in the softmax; returns tuner and head."""
        return train_tuner(self.models, self.start(), self.backbone, self.config, task, ctx)

    def start(self) -> Mapping[str, Tensor]:
        """The weights at which the next task starts, by name."""
        return self.rule.merged() if self.config.start == "merged" else self.models.initial

    def update(self, tuner: Tuner) -> dict[str, Tensor]:
        """τ_t = θ_t − θ_0 of a trained tuner, by name; before it is merged."""
        return self.models.update(tuner, self.start())

    def add(self, tuner: Tuner, head: CosineHead, task: Task, ctx: Context) -> None:
        """Merge a task: measure the statistics that the rule needs, compute θ^(t), append the head if it is used."""
        update = self.update(tuner)
        ctx.log("task_vector_norm", math.hypot(*[float(delta.norm()) for delta in update.values()]))
        if self.config.coefficients == "layers":
            update = scaled_update(self.models, update, self.rule.merged(), self.backbone, head, self.config, task, ctx)
        self.fold(update, self.measure(update, head, task, ctx))
        if isinstance(self.rule, ExpertBank):
            ctx.log("bank_bytes", self.rule.bytes)
        if isinstance(self.classifier, CosineHead):
            self.classifier.extend(head)

    def fold(self, update: Mapping[str, Tensor], stats: Statistics | None) -> None:
        """Compute θ^(t) from θ^(t−1) and τ_t."""
        self.rule.add_update(update, stats)
        self._merged_tuner = ()

    def measure(self, update: Mapping[str, Tensor], head: CosineHead, task: Task, ctx: Context) -> Statistics | None:
        """Fisher information or Gram matrices of θ_t on some of the task's images, if the rule needs them."""
        if self.rule.needs is None:
            return None
        frozen = dict(self.backbone.model.named_parameters())
        model = replaced_tree(self.backbone.model, {name: frozen[name] + delta for name, delta in update.items()})
        images = some_images(self.backbone, task, self.config.statistics, ctx)
        if self.rule.needs == "fisher":
            return Statistics(fisher=diagonal_fisher(model, images, list(update), head=head, generator=ctx.generator))
        return Statistics(grams=input_grams(model, images, block=getattr(self.rule, "block", None)))

    def correct_drift(self, before: Tensor, after: Tensor) -> None:
        """Map old classes' statistics from θ^(t−1) to θ^(t), given the current images' features [N, F] under both."""
        width = self.models.width
        if not isinstance(self.classifier, NCM | LDA | Ridge):
            return  # heads have no statistics
        drift = self.drift(before[:, -width:], after[:, -width:])
        self.classifier.transport(drift.beside(after.shape[1] - width))

    def drift(self, before: Tensor, after: Tensor) -> AffineMap:
        """The map from φ_{θ^(t−1)} to φ_{θ^(t)}, fitted on the current images [N, F]."""
        if self.config.prototypes == "translate":
            return translation(before, after)
        return ridge_map(before, after, self.config.map_shrinkage)

    def make_tuner(self) -> Tuner:
        """A tuner at θ^(t)."""
        return self.models.tuner_at(self.rule.merged())

    def merged(self, images: Tensor) -> Tensor:
        """φ_{θ^(t)}(x), [B, F]."""
        if not self._merged_tuner:
            self._merged_tuner = (self.make_tuner(),)
        return self.backbone(images, *self._merged_tuner)

    def views(self) -> Mapping[Hashable, View]:
        # the count is the value of a tensor, which a program must not read while it is exported
        count = "any" if torch.compiler.is_exporting() else int(self.rule.count)
        merged: dict[Hashable, View] = {("merged", count): self.merged}
        return {FROZEN: self.backbone, **merged} if self.config.anchor else merged

    def logits(self, features: Tensor) -> Tensor:
        return self.classifier.logits(features)
