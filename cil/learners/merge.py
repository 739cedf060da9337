"""Sequential merging: every task is learned from the same pre-trained weights, and the updates become one backbone."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from cil.backbone import FROZEN, Backbone
from cil.classifiers import LDA, NCM, Classifier, CosineHead, Ridge
from cil.classifiers.drift import AffineMap, ridge_map, translation
from cil.features import View
from cil.learner import Context, Learner
from cil.learners.mergeable import mergeable
from cil.merging import RuleConfig, build_rule
from cil.merging.statistics import Statistics, diagonal_fisher, input_grams
from cil.merging.table import OPCMConfig
from cil.stream import Task
from cil.training import Group, Optimizer, Recipe, fit, local_cross_entropy
from cil.tuning import Tuner, TunerConfig
from cil.tuning.frozen import replaced_tree
from cil.tuning.table import LoraConfig


class Merge(Learner):
    """Continual model merging (OPCM, arXiv 2501.09522, and its family) with one classifier over all classes.

    Task t: θ_t = θ_0 + τ_t is trained from the pre-trained θ_0 on the task's own classes, with a cosine head that is
    thrown away; a rule of :mod:`cil.merging` folds τ_t into the merged θ^(t); θ_t is discarded. The classifier is in
    closed form on [φ_0; φ_{θ^(t)}] (``anchor``) or φ_{θ^(t)}. Statistics of old classes were taken under θ^(t−1): a map
    fitted on the current images, seen under both, carries them along (:mod:`cil.classifiers.drift`); those under θ_0
    stay exact. Passes per training image: the epochs, and one under each of θ_0, θ^(t−1) and θ^(t).

    θ are the backbone's weights where the tuner comes to an update of them, else the tuner's own parameters
    (:mod:`cil.learners.mergeable`). With ``start: merged`` tasks go on from θ^(t−1), the rule seeing θ_t − θ_0 as
    before: ``ema`` then averages along the way, and with α = 1 this is sequential training. ``trained: first`` is
    adaptation on the first task alone.
    """

    class Config(Recipe):
        rule: RuleConfig = Field(OPCMConfig(), description="how updates are merged")
        tuner: TunerConfig = Field(
            LoraConfig(rank=16, alpha=16, targets=["qkv", "attn.proj", "fc1", "fc2"]),
            description="what a task trains; merged are the weights it comes to, or else its own parameters",
        )
        start: Literal["pretrained", "merged"] = Field(
            "pretrained", description="where every task's training starts: at θ_0, or where merging has come to"
        )
        trained: Literal["all", "first"] = Field(
            "all", description="tasks that are trained and merged; first: later ones are classified only"
        )
        optimizer: Optimizer = Field("adamw", description="SGD with momentum, Adam or AdamW")
        lr: float = Field(1e-3, gt=0, description="peak learning rate")
        head_lr: float = Field(10.0, gt=0, description="factor on it for the head a task is trained with")
        sigma: float = Field(16.0, gt=0, description="scale of that head's cosine logits at the start")
        prototypes: Literal["stale", "translate", "linear"] = Field(
            "linear", description="old classes' statistics: as they were, shifted, or mapped with a ridge regression"
        )
        map_shrinkage: float = Field(0.05, ge=0, description="of that map towards the identity")
        anchor: bool = Field(True, description="see through the pre-trained weights, too")
        head: Literal["ncm", "lda", "ridge", "concat"] = Field(
            "lda", description="class means, LDA, ridge regression, or the tasks' own heads side by side"
        )
        shrinkage: float = Field(1e-2, ge=0, le=1, description="of LDA's covariance")
        projection: PositiveInt | None = Field(
            None, description="width of a random projection before the ridge regression (RanPAC has 10,000); null: none"
        )
        statistics: PositiveInt = Field(256, description="images a task for rules that need Fisher or Gram matrices")

        @model_validator(mode="after")
        def _fit_together(self) -> Any:
            if self.head == "concat" and (self.anchor or self.prototypes != "stale"):
                raise ValueError("head: concat has no statistics to carry; set prototypes: stale and anchor: false")
            if self.head == "concat" and self.trained == "first":
                raise ValueError("head: concat has a head of every task; set trained: all")
            if self.projection is not None and self.head != "ridge":
                raise ValueError(f"projection belongs to head: ridge, not {self.head}; leave it out")
            if self.projection is not None and self.prototypes in ("translate", "linear"):
                raise ValueError("no map carries what passed the projection's ReLU; set prototypes: stale")
            return self

    name = "merge"
    paper = "Tang et al., Merging Models on the Fly Without Retraining (OPCM), arXiv 2501.09522"
    trains_backbone = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.models = mergeable(config.tuner, backbone)
        self.rule = self.models.start(build_rule(config.rule))
        self.classifier = self.make_classifier()
        self._seen_through: tuple[Tuner, ...] = ()  # a tuple, or the tuner would become part of the state

    def make_classifier(self) -> Classifier:
        """The classifier on :meth:`features`, without statistics."""
        width = self.backbone.feature_dim * len(self.views())
        if self.config.head == "lda":
            return LDA(width, self.config.shrinkage, priors="uniform", blocks=len(self.views()))
        if self.config.head == "ridge":
            return Ridge(width, self.config.projection)
        return {"ncm": NCM, "concat": CosineHead}[self.config.head](width)

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if not isinstance(self.classifier, CosineHead):  # whose rows come with their training
            self.classifier.grow(len(task.seen))
        if task.index == 0:
            self.models.draw(ctx.generator)
            self._seen_through = ()
            if isinstance(self.classifier, Ridge):
                self.classifier.draw(ctx.generator)

    def trains(self, task: Task) -> bool:
        """Whether the task moves θ; else it is classified as others left it."""
        return task.index == 0 or self.config.trained == "all"

    def learn(self, task: Task, ctx: Context) -> None:
        carries = task.index > 0 and self.trains(task) and self.config.prototypes != "stale"
        before = ctx.features(self, task.train)[0] if carries else None
        if self.trains(task):
            self.add(*self.train_task(task, ctx), task, ctx)
        if self.config.head == "concat":
            return
        after, labels = ctx.features(self, task.train)
        if before is not None:
            self.carry(before, after)
        self.classifier.partial_fit(after, labels)

    def train_task(self, task: Task, ctx: Context) -> tuple[Tuner, CosineHead]:
        """θ_t from :meth:`start`, with the task's own classes in the softmax."""
        tuner = self.models.tuner(self.start(), ctx.generator)
        head = CosineHead(self.backbone.feature_dim, self.config.sigma)
        head.grow(len(task.classes), ctx.generator)
        head.to(ctx.device)
        loss = local_cross_entropy(lambda images: head(self.backbone(images, tuner)), self.config, task.classes[0])
        fit(
            loss,
            [Group(tuner.parameters()), Group(head.parameters(), lr=self.config.head_lr)],
            task.train,
            self.config,
            ctx,
        )
        return tuner, head

    def start(self) -> Mapping[str, Tensor]:
        """Where the next task's training starts, by name."""
        return self.rule.merged() if self.config.start == "merged" else self.models.initial

    def update(self, tuner: Tuner) -> dict[str, Tensor]:
        """τ_t = θ_t − θ_0 of what a task trained, by name; before it is merged."""
        return self.models.update(tuner, self.start())

    def add(self, tuner: Tuner, head: CosineHead, task: Task, ctx: Context) -> None:
        """θ^(t) from θ^(t−1) and τ_t, and what else the rule needs to know of the task."""
        update = self.update(tuner)
        ctx.log("task_vector_norm", math.hypot(*[float(delta.norm()) for delta in update.values()]))
        self.fold(update, self.measure(update, head, task, ctx))
        if isinstance(self.classifier, CosineHead):
            self.classifier.extend(head)

    def fold(self, update: Mapping[str, Tensor], stats: Statistics | None) -> None:
        """θ^(t) from θ^(t−1) and τ_t alone."""
        self.rule.add_update(update, stats)
        self._seen_through = ()

    def measure(self, update: Mapping[str, Tensor], head: CosineHead, task: Task, ctx: Context) -> Statistics | None:
        """Fisher information or Gram matrices of θ_t on some of the task's images, where the rule asks for them."""
        if self.rule.needs is None:
            return None
        frozen = dict(self.backbone.model.named_parameters())
        model = replaced_tree(self.backbone.model, {name: frozen[name] + delta for name, delta in update.items()})
        images = self.some_images(task, ctx)
        if self.rule.needs == "fisher":
            return Statistics(fisher=diagonal_fisher(model, images, list(update), head=head, generator=ctx.generator))
        return Statistics(grams=input_grams(model, images, block=getattr(self.rule, "block", None)))

    def some_images(self, task: Task, ctx: Context) -> Iterator[Tensor]:
        left = self.config.statistics
        for images, _ in task.train.batches(min(64, left), generator=ctx.generator, device=ctx.device):
            images = images[:left]
            self.backbone.passes += len(images)
            yield images
            left -= len(images)
            if left == 0:
                return

    def carry(self, before: Tensor, after: Tensor) -> None:
        """Statistics of old classes, from θ^(t−1) to θ^(t), by the current images' features [N, F] under both."""
        width = self.backbone.feature_dim
        if not isinstance(self.classifier, NCM | LDA | Ridge):
            return  # heads have no statistics
        drift = self.drift(before[:, -width:], after[:, -width:])
        self.classifier.transport(drift.beside(after.shape[1] - width))

    def drift(self, before: Tensor, after: Tensor) -> AffineMap:
        """The map from φ_{θ^(t−1)} to φ_{θ^(t)}, fitted on the current images [N, F]."""
        if self.config.prototypes == "translate":
            return translation(before, after)
        return ridge_map(before, after, self.config.map_shrinkage)

    def merged(self, images: Tensor) -> Tensor:
        """φ_{θ^(t)}(x), [B, F]."""
        if not self._seen_through:
            self._seen_through = (self.models.given(self.rule.merged()),)
        return self.backbone(images, *self._seen_through)

    def views(self) -> Mapping[Hashable, View]:
        merged: dict[Hashable, View] = {("merged", int(self.rule.count)): self.merged}
        return {FROZEN: self.backbone, **merged} if self.config.anchor else merged

    def features(self, images: Tensor) -> Tensor:
        # not through views(): the count in their names is a value, and an exported program may not look at values
        merged = self.merged(images)
        return torch.cat([self.backbone(images), merged], dim=1) if self.config.anchor else merged

    def logits(self, features: Tensor) -> Tensor:
        return self.classifier.logits(features)

    @property
    def feature_version(self) -> Hashable:
        return int(self.rule.count)
