"""Several runs as one learner: the density of an image under each run says how much the run's answer counts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from cil.backbone import FROZEN, Backbone
from cil.classifiers.tied import TiedGaussians
from cil.config import LearnerEntry, Section
from cil.errors import TrainingError
from cil.features import View
from cil.learner import Context, Learner, LearnerConfig
from cil.learners import registry
from cil.reuse.specification import unit_length
from cil.stream import Task, past_tasks


class Part(Section):
    """One of the runs."""

    learner: dict[str, Any] = Field(description="section of its learner")
    labels: list[int] = Field(description="its own labels of the classes that it predicts")
    classes: list[int] = Field(description="for each of these, the class of the joint model")
    tasks: list[list[int]] = Field(description="its own labels of each of its tasks")
    widths: list[int] = Field(description="widths of its views of an image besides the frozen features")


class Routed(Learner):
    """Density-routed reuse (Tang et al., IJCAI 2023), on Gaussians of frozen features.

    Run i gives p_i(c|x), the softmax of its logits; a density p_i(x); and a share π_i = n_i / Σ n of the images. With
    g_c(x) = Σ_i π_i p_i(x) p_i(c|x), to which a run without class c adds nothing, the score of c is log g_c / Σ_d g_d.
    p_i is the mixture of the run's class Gaussians on unit-length frozen features, with one covariance per run, shrunk
    by 0.5. The original has normalising flows on pixels, and calibrates them on images of all sites together; here
    nothing is trained, and no image is needed. If p_i(c|x) is the posterior under the same Gaussians, g is their joint
    posterior.

    Logits that are no logarithms of probabilities, such as cosines, are used as they are: then the densities decide
    between runs, and the logits within one. Costs the forward passes of all runs, with one for all frozen features.
    """

    class Config(LearnerConfig):
        parts: list[Part] = Field(min_length=1, description="the runs")

    name = ""
    summary = "runs of any learners, routed by the density of an image's frozen features"
    trains = "nothing"
    paper = "Tang et al., Improving Heterogeneous Model Reuse by Density Estimation, IJCAI 2023"

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        entries = [LearnerEntry.model_validate(part.learner) for part in config.parts]
        self.parts = nn.ModuleList(registry.instantiate(*registry.configure(entry), backbone) for entry in entries)
        self.densities = nn.ModuleList(TiedGaussians(backbone.feature_dim) for _ in config.parts)

    @property
    def learners(self) -> list[Learner]:
        return list(self.parts)  # type: ignore[arg-type]

    def begin(self, task: Task, ctx: Context) -> None:
        super().begin(task, ctx)
        for part, learner in zip(self.config.parts, self.learners, strict=True):
            names = dict(zip(part.labels, (task.names[c] for c in part.classes), strict=True))
            seen = max(max(labels) for labels in part.tasks) + 1
            for past in past_tasks(part.tasks, [names.get(label, "") for label in range(seen)]):
                learner.begin(past, Context(ctx.accelerator, ctx.cache, stage=past.index))
        ctx.learner = self

    def learn(self, task: Task, ctx: Context) -> None:
        raise TrainingError("a routed model learns nothing more; teach its runs, and join them again")

    def views(self) -> Mapping[Hashable, View]:
        """The frozen backbone first, then the views of each run that are not this one."""
        views: dict[Hashable, View] = {FROZEN: self.backbone}
        for i, learner in enumerate(self.learners):
            views |= {(i, version): view for version, view in learner.views().items() if view is not self.backbone}
        return views

    def logits(self, features: Tensor) -> Tensor:
        frozen, *others = features.split(self._widths, dim=1)
        scores = features.new_full((features.shape[0], self.seen), -torch.inf, dtype=torch.float64)
        images = torch.stack([density.counts.sum() for density in self.gaussians]).double()
        shares, u, own = (images / images.sum()).log(), unit_length(frozen), iter(others)
        for part, learner, density, share in zip(self.config.parts, self.learners, self.gaussians, shares, strict=True):
            seen = [frozen if view is self.backbone else next(own) for view in learner.views().values()]
            x = torch.cat(seen, dim=1)
            if learner.statistics is not None:  # in float32, offsets that all classes share would hide differences
                x = x.double()
            answers = learner.logits(x)[:, part.labels].double().log_softmax(1)
            weight = share + density.logits(u).logsumexp(1, keepdim=True)
            classes = torch.as_tensor(part.classes, device=scores.device)
            scores = scores.index_copy(1, classes, torch.logaddexp(scores[:, classes], weight + answers))
        return scores.log_softmax(1)

    @property
    def gaussians(self) -> list[TiedGaussians]:
        return list(self.densities)  # type: ignore[arg-type]

    @property
    def _widths(self) -> list[int]:
        """Widths of all views, the frozen features first."""
        return [self.backbone.feature_dim, *(width for part in self.config.parts for width in part.widths)]
