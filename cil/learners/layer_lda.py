"""LayerLDA: one linear discriminant per kind of token, on the outputs of all blocks, with shrinkage from the sums."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field

from cil.backbone import Backbone
from cil.classifiers import PartsLDA
from cil.classifiers.memory import DOUBLE
from cil.learner import Context
from cil.learners.bases.on_features import Chosen, ClassifierOnFeatures, Layers
from cil.stream import Task
from cil.tuning.layers import Collector


class LayerLDA(ClassifierOnFeatures):
    """Linear discriminants on every block of a frozen backbone. This method is ours and unpublished.

    One forward pass gives, of every block l, three vectors: the class token, and mean and standard deviation of the
    patch tokens. Each is divided by its length. For each kind k the vectors of all blocks side by side are u_k(x), and

        logit_c(x) = ⅓ Σ_k [ u_kᵀ Σ_k⁻¹ μ_kc − ½ μ_kcᵀ Σ_k⁻¹ μ_kc ],

    with class means μ_kc and one within-class covariance Σ_k of all classes, shrunk to (1 − s_k) Σ_k + s_k · τ_k I with
    τ_k = tr(Σ_k)/F_k. s_k is chosen after every task by generalised cross-validation of the regression that LDA is
    equivalent to. It is a function of the sums (:class:`cil.classifiers.LDA`), as is everything else here, so the
    result is that of joint training for any order of classes and tasks. Nothing is trained and nothing is random. Keeps
    Σ_k F_k² numbers and, per class, Σ_k F_k. One forward pass per image.
    """

    class Config(ClassifierOnFeatures.Config):
        layers: Chosen = Field(
            Layers(blocks="all", tokens=["class", "mean", "std"], final=False, scale="unit"),
            description="blocks and tokens that are part of the features; the kinds of token have a discriminant each. "
            "null: one discriminant on the backbone's own feature",
        )
        shrinkage: Literal["gcv"] | Annotated[float, Field(ge=0, le=1)] = Field(
            "gcv", description="shrinkage s in [0, 1] of every covariance, or gcv: chosen from the statistics"
        )

    name = "layer_lda"
    summary = "one linear discriminant per kind of token, on all blocks of the frozen backbone"
    trains = "nothing"
    paper = "unpublished, a method of this library"
    classifier: PartsLDA

    @classmethod
    def default_bytes(cls, backbone: Backbone) -> int:
        """Size of the matrices Σ_k that the default setting keeps on a backbone, in bytes.

        Raises:
            BackboneError: Its blocks' outputs cannot be collected.
        """
        collector = Collector(backbone, **cls.Config().model_dump(exclude={"layers": {"scale"}})["layers"])
        kinds = len(collector.tokens)
        return DOUBLE * sum(sum(collector.widths[k::kinds]) ** 2 for k in range(kinds))

    def make_classifier(self) -> PartsLDA:
        return PartsLDA(self.width, self.parts(), self.config.shrinkage)

    def parts(self) -> list[list[int]]:
        """The columns of every kind of token, in all blocks; the backbone's own feature is a kind, too."""
        kinds: dict[str, list[int]] = {}
        start = 0
        for view in self.views().values():
            collector = view.keywords["tuner"] if isinstance(view, partial) else None
            if not isinstance(collector, Collector):
                return [list(range(self.width))]
            names = [*collector.tokens * len(collector.blocks), *["final"] * collector.final]
            for name, width in zip(names, collector.widths, strict=True):
                kinds.setdefault(name, []).extend(range(start, start + width))
                start += width
        return list(kinds.values())

    def learn(self, task: Task, ctx: Context) -> None:
        super().learn(task, ctx)
        for shrinkage in self.classifier.shrinkages:
            ctx.log("shrinkage", shrinkage)
