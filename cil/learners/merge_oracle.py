"""Upper bound for merging: class statistics are recomputed from all images after each merge."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cil.backbone import Backbone
from cil.learner import Context
from cil.learners.joint import Joint
from cil.learners.merge import Merge
from cil.stream import Task, TaskData


class MergeOracle(Merge):
    """Merging with the statistics of all classes recomputed under every θ^(t), from the images of all tasks.

    Tasks are trained and merged as in ``merge``, bit for bit; only the classifier's statistics differ. The difference
    of the two accuracies is the cost of the drift that the map of ``merge`` does not correct. It is not a continual
    learner, since it keeps all images (``stores_images``).
    """

    class Config(Merge.Config):
        prototypes: Literal["oracle"] = Field(
            "oracle", description="always oracle: statistics are computed from all images so far"
        )  # type: ignore[assignment]
        head: Literal["ncm", "lda", "ridge"] = Field(
            "lda", description="classifier: class means, LDA or ridge regression"
        )

    name = "merge_oracle"
    summary = "merging, with class statistics recomputed from old images: an upper bound"
    trains = "one tuner per task"
    stores_images = True
    exemplar_bytes = Joint.exemplar_bytes

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tasks: list[TaskData] = []

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.tasks.append(task.train)

    def learn(self, task: Task, ctx: Context) -> None:
        if self.trains_on(task):
            self.add(*self.train_task(task, ctx), task, ctx)
        self.classifier = self.make_classifier().to(ctx.device)
        for data in self.tasks:
            self.classifier.partial_fit(*ctx.features(self, data))
