"""What merging could reach if statistics never grew old: an upper bound that keeps all images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cil.backbone import Backbone
from cil.learner import Context
from cil.learners.joint import Joint
from cil.learners.merge import Merge
from cil.stream import Task, TaskData


class MergeOracle(Merge):
    """Merging with the statistics of all classes taken anew under every θ^(t), from the images of all tasks.

    Tasks are trained and merged as by ``merge``, to the bit; only the classifier's statistics differ. Its accuracy less
    that of ``merge`` is the price of drift that no map made up for. Not a continual learner (``stores_images``).
    """

    class Config(Merge.Config):
        prototypes: Literal["oracle"] = Field("oracle", description="statistics from all images so far")  # type: ignore[assignment]
        head: Literal["ncm", "lda", "ridge"] = Field("lda", description="class means, LDA or ridge regression")

    name = "merge_oracle"
    stores_images = True
    exemplar_bytes = Joint.exemplar_bytes

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.tasks: list[TaskData] = []

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        self.tasks.append(task.train)

    def learn(self, task: Task, ctx: Context) -> None:
        if self.trains(task):
            self.add(*self.train_task(task, ctx), task, ctx)
        self.classifier = self.make_classifier().to(ctx.device)
        for data in self.tasks:
            self.classifier.partial_fit(*ctx.features(self, data))
