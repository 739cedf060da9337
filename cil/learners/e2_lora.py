"""E²-LoRA: full-rank updates of a layer outside what old tasks write to, of which each keeps few directions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from cil.backbone import Backbone
from cil.backbone.views import require_views
from cil.backbone.vit import widening_layers
from cil.classifiers import Gaussians, LinearHead
from cil.learner import Context
from cil.learners.bases.alignment import AlignedRecipe, align, mean_scales, softmax_of
from cil.learners.bases.low_rank import input_moments, require_called
from cil.learners.bases.new_classes import TaskOfClass, task_head
from cil.learners.bases.sequential import SequentialTuning
from cil.learners.bases.subspaces import output_directions, within_budget
from cil.stream import Task
from cil.training import Loss, ParamGroup, Schedule, fit, local_cross_entropy
from cil.tuning import ExternalWeights
from cil.tuning.projected_updates import ProjectedUpdates


class E2LoRA(TaskOfClass, SequentialTuning):
    """E²-LoRA (ICML 2026, arXiv 2605.27482) in its projected form.

    The weights [R, D] of queries, keys and values and of the MLP's first layer get W_t = W_{t−1} + ΔW_t, where ΔW_t is
    trained at full rank under Uᵀ ΔW_t = 0, U the directions of the layer's outputs that old tasks keep. This is the
    authors' training of A_t in B_t A_t with B_t an orthonormal basis of the other directions. Loss: CE over the task's
    own classes, plus from the second task on λ T² KL(W_{t−1}'s scores of old classes ‖ W_t's). Then the columns of U_t
    are the principal directions of ΔW_t x over the task's images, in order of energy. Before task t each old task keeps
    its leading directions up to a share θ of its energy, with the largest θ that leaves R t/(t + 1) of them in all; the
    rest of its update is removed. One Gaussian per class, not updated, from which all rows of the head are aligned.
    Keeps the updated weights, U and what it writes, head and Gaussians. One pass per image at test.
    """

    class Config(AlignedRecipe):
        weight_decay: float = Field(5e-4, ge=0, description="L2 penalty on updates and rows, also in the alignment")
        schedule: Schedule = Field("multistep", description="learning-rate schedule")
        milestones: list[PositiveInt] = Field([4], description="epochs at which a multistep schedule lowers the rate")
        update_lr_factor: float = Field(0.05, gt=0, description="factor on the learning rate for the weights' updates")
        first: Literal["direct", "product"] = Field(
            "direct", description="form of the first task's update: direct, or a product of two trained factors"
        )
        distillation: float = Field(0.25, ge=0, description="weight λ ≥ 0 of the KL divergence of old classes' scores")
        temperature: float = Field(2.0, gt=0, description="temperature T > 0 of the KL divergence")
        ridge: float = Field(2e-4, gt=0, description="constant > 0 added to each variance of the Gaussians")
        alignment_epochs: NonNegativeInt = Field(3, description="epochs of the alignment; 0: no alignment")
        fresh_norm: bool = Field(
            False, description="whether the final norm layer is reset, as the authors' code does; it is not trained"
        )

    name = "e2_lora"
    summary = "full-rank updates outside the directions old tasks write to, head aligned on Gaussians"
    trains = "queries, keys, values and the MLP's first layer, head"
    paper = "E²-LoRA, ICML 2026, arXiv 2605.27482"
    trains_backbone = True

    tuner: ProjectedUpdates

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        require_views(backbone.model)
        layers = [name for i in range(len(backbone.model.blocks)) for name in widening_layers(backbone.model, i)]  # type: ignore[arg-type]
        require_called(backbone, layers)
        self.tuner = ProjectedUpdates(backbone, layers, fresh_norm=config.fresh_norm)
        self.head = LinearHead(backbone.feature_dim)
        self.gaussians = Gaussians(backbone.feature_dim, config.ridge, config.covariance_rank)

    def learn(self, task: Task, ctx: Context) -> None:
        self.make_room(task.index)
        self.head.extend(self.train_rows(task, ctx))
        self.remember(self.tuner.fold(), task, ctx)
        self.gaussians.partial_fit(*ctx.features(self, task.train))
        if task.index and self.config.alignment_epochs:
            scales = mean_scales(self.task_of)
            align(softmax_of(self.head), ParamGroup(self.head.rows), self.gaussians, scales, self.config, ctx)

    def make_room(self, tasks: int) -> None:
        """Let ``tasks`` old tasks keep tasks / (tasks + 1) of each layer's output directions at most."""
        for pairs in self.tuner.kept:
            pairs.cut(within_budget(pairs.before, tasks * len(pairs.folded) // (tasks + 1)))

    def train_rows(self, task: Task, ctx: Context) -> LinearHead:
        """Train the task's update and its new rows; returns the rows."""
        config = self.config
        product = config.first == "product" and task.index == 0
        updates = self.tuner.start(ctx.generator if product else None)
        rows = task_head(LinearHead(self.backbone.feature_dim), task, ctx)
        plain = local_cross_entropy(rows, config, task.classes[0])

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            return plain(self.tuned(images), labels)

        taught = self.with_teacher(plain) if task.index and config.distillation else loss
        groups = [ParamGroup(updates, config.update_lr_factor), ParamGroup(rows.parameters())]
        fit(taught, groups, task.train, config, ctx)
        return rows

    def with_teacher(self, plain: Loss) -> Loss:
        """``plain``, a loss of features, + λ T² KL(p_{t−1} ‖ p_t) over old classes; p_{t−1} has the weights of now."""
        weight, t = self.config.distillation, self.config.temperature
        teacher = ExternalWeights({name: value.detach() for name, value in self.tuner.weights().items()})
        old = self.head.requires_grad_(False)

        def loss(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            features = self.tuned(images)
            value, logits = plain(features, labels)
            with torch.no_grad():
                target = (old(self.backbone(images, teacher)).float() / t).log_softmax(1)
            now = (old(features).float() / t).log_softmax(1)
            kl = F.kl_div(now, target, reduction="batchmean", log_target=True)
            return value + weight * t**2 * kl, logits

        return loss

    def remember(self, updates: list[Tensor], task: Task, ctx: Context) -> None:
        """Order what the task's updates ΔW write by its energy on the task's images, and keep it."""
        covariances = input_moments(self, self.tuner.layers, task, ctx, centred=True)
        for pairs, update, name in zip(self.tuner.kept, updates, self.tuner.layers, strict=True):
            pairs.append(*output_directions(update, covariances[name]), update, task.index)
        ctx.log("kept_share", sum(len(p.before) / len(p.folded) for p in self.tuner.kept) / len(self.tuner.kept))

    def logits(self, features: Tensor) -> Tensor:
        return self.head.logits(features)
