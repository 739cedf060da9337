"""First-session adaptation: a tuner trained on the first task, then frozen (APER, RanPAC, LoRanPAC, FeCAM, SLDA)."""

from __future__ import annotations

from pydantic import Field

from cil.backbone import Backbone, feature_width
from cil.classifiers import CosineHead
from cil.classifiers.random_features import RandomFeatures
from cil.learner import Context
from cil.learners.bases.new_classes import task_head
from cil.learners.bases.on_features import ClassifierOnFeatures
from cil.stream import Task
from cil.training import ParamGroup, Recipe, cross_entropy, fit
from cil.tuning import Tuner, TunerConfig, build_tuner


class AdaptOnce(ClassifierOnFeatures):
    """First-session adaptation (Zhou et al., arXiv 2303.07338; phase 1 of RanPAC), then statistics only.

    Task 0: minimise CE(σ · cos(f_θ(x), W), y) over the tuner θ and a temporary cosine head W, then drop the head. After
    that nothing is trained: each task adds its features to the classifier's statistics, with one forward pass per
    image. Without a tuner the features are those of the frozen backbone. With ``layers`` the classifier also gets
    those of the adapted blocks; the tuner is trained on the backbone's own feature as before.
    """

    class Config(ClassifierOnFeatures.Config, Recipe):
        tuner: TunerConfig | None = Field(None, description="tuner trained on the first task; null: none")
        epochs: int = Field(20, gt=0, description="epochs on the first task")
        train_batch_size: int = Field(48, gt=0, description="images per optimiser step")
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty")

    def __init__(self, config: Config, backbone: Backbone) -> None:
        inserted = None if config.tuner is None else build_tuner(config.tuner, self.tuned(backbone))
        super().__init__(config, backbone, inserted)

    @classmethod
    def tuned(cls, backbone: Backbone) -> Backbone:
        """The backbone into which the tuner is inserted."""
        return backbone

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        if task.index == 0 and self.tuner is not None:
            self.tuner.reset(ctx.generator)
        if task.index == 0 and isinstance(self.classifier, RandomFeatures):
            self.classifier.draw(ctx.generator)

    def learn(self, task: Task, ctx: Context) -> None:
        if task.index == 0 and self.tuner is not None:
            self.adapt(self.tuner, task, ctx)
        super().learn(task, ctx)

    def adapt(self, tuner: Tuner, task: Task, ctx: Context) -> None:
        """Train the tuner and a head that is then dropped."""
        head = task_head(CosineHead(feature_width(self.backbone, tuner)), task, ctx)
        loss = cross_entropy(lambda images: head(self.backbone(images, tuner)), self.config)
        fit(loss, [ParamGroup([*tuner.parameters(), *head.parameters()])], task.train, self.config, ctx)
